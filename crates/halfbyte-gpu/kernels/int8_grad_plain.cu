// halfbyte: exact
// The gradient of an 8-bit layer for its input, without tensor cores, in float32:
//
//   sum = 0
//   for each output o of the layer, ascending: sum = fma(grad[m][o], dequantize(codes[o][c]), sum)
//   out[m][c] = round(sum)
//
// A group takes 64 x 64 results: threads are 16 x 16, each has every sixteenth row and column.
#include "int8.h"

#define TILE 64
// Outputs of the layer in a step.
#define STEP 16
// A row of shared memory: one more than the tile, so that a warp writes to different banks.
#define PITCH 65

#define T f32
#include "dtype.h"
#include "int8_grad_plain.inc.h"
#include "undtype.h"
#define T f16
#include "dtype.h"
#include "int8_grad_plain.inc.h"
#include "undtype.h"
#define T bf16
#include "dtype.h"
#include "int8_grad_plain.inc.h"
#include "undtype.h"

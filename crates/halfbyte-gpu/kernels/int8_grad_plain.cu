// halfbyte: exact
// The gradient of an 8-bit layer for its input, without tensor cores, in float32:
//
//   sum = 0
//   for each output o of the layer, ascending: sum = fma(grad[m][o], dequantize(codes[o][c]), sum)
//   out[m][c] = round(sum)
//
// A group takes 64 x 64 results: threads are 16 x 16, each has every sixteenth row and column.
#include "int8_grad_plain.h"

#define GRAD_NAME int8_grad_plain
#define GRAD_ARGUMENTS                                                                             \
    (GLOBAL const T* grad, GLOBAL const i8* codes, GLOBAL const float* scales, GLOBAL T* out,      \
     u64 rows, u64 outputs, u64 columns)
#define GRAD_TILE()                                                                                \
    u64 across = (columns + TILE - 1) / TILE;                                                      \
    u64 m0 = GROUP / across * TILE, c0 = GROUP % across * TILE
#define GRAD_STORE STORE
#define ROUTED 0
#define INPUT_ROW(m) (m)
#define OUTPUT_ROW(m) (m)

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

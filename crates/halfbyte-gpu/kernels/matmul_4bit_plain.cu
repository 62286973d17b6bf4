// halfbyte: exact
// `matmul_4bit` and its gradient without tensor cores: any dtype, any shape, any alignment.
//
//   out = input · W^T + bias      W [out_features, in_features] = table[code] * scale of the block
//   out = grad · W                when `grad` is set, and `input` is grad
//
//   for each element of out:
//     c = 0; for each k of the depth: c = fma(input[row][k], w[k][column], c)
//     out = round(c + bias)
//
// Liberties taken with it:
// 1. A group makes a tile of 64 x 64, 32 of the depth at a time, through shared memory in float32.
// 2. A thread has 16 elements: rows and columns 16 apart, so that its reads of shared memory meet
//    no bank twice.
//
// The decoded weight is the scalar definition's in float32; it is not rounded to T.
#include "port.h"
#include "weight_4bit.h"

#define TILE 64
#define STEP 32
#define PITCH 65

#define T f32
#include "dtype.h"
#include "matmul_4bit_plain.inc.h"
#include "undtype.h"

#define T f16
#include "dtype.h"
#include "matmul_4bit_plain.inc.h"
#include "undtype.h"

#define T bf16
#include "dtype.h"
#include "matmul_4bit_plain.inc.h"
#include "undtype.h"

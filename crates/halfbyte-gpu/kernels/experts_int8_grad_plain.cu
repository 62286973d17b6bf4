// halfbyte: exact
// The gradient of 8-bit experts for their input, without tensor cores: the kernel of
// int8_grad_plain.cu for tiles of rows of one expert. With `products` results stay in float32, for
// sum_slots, which does not read those of rows without an expert.
#include "experts_int8.h"
#include "int8_grad_plain.h"

#define GRAD_NAME experts_int8_grad_plain
#define GRAD_ARGUMENTS                                                                             \
    (GLOBAL const T* grad, GLOBAL const i8* codes, GLOBAL const float* scales, GLOBAL T* out,      \
     GLOBAL float* products, ROUTING, u64 outputs, u64 columns)
#define ROUTED 1
#define INPUT_ROW(m) ((u64)inputs[(m) - m0])
#define OUTPUT_ROW(m) ((u64)listed[(m) - m0])
#define STORE_OUT(i, v) STORE(out, i, v)
#define GRAD_TILE()                                                                                \
    FIND_TILE(TILE);                                                                               \
    const u64 c0 = across * TILE;                                                                  \
    if (tile.expert >= experts) {                                                                  \
        if (!products) FILL_UNROUTED(c0, TILE, columns, STORE_OUT);                                \
        return;                                                                                    \
    }                                                                                              \
    const u64 m0 = tile.first, rows = m0 + tile.count;                                             \
    codes += tile.expert * outputs * columns;                                                      \
    scales += tile.expert * outputs;                                                               \
    LIST_ROWS(inputs, listed)
#define GRAD_STORE(p, i, v)                                                                        \
    do {                                                                                           \
        if (products) products[i] = v;                                                             \
        else STORE(p, i, v);                                                                       \
    } while (0)

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

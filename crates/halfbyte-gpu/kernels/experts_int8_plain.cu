// halfbyte: exact
// 8-bit experts in plain integer arithmetic: every back end with many rows where it has no tensor cores,
// and every one with few rows for each expert. For each row r of the result, e its expert and m =
// r / sharing its row of the input:
//
//   s[o]  = sum over k of a[m][k] * weight[e][o][k]                      int32, exact
//         - sum over outlier columns j of a[m][j] * weight[e][o][j]
//   y     = s * (row_stats[m] / 127^2) * scales[e][o]
//   y     = fma(input[m][j], decode(weight[e][o][j]), y)                 for each of these j, in order
//   out[r][o] = round(y + bias[e][o])                                    0 without an expert, NaN for
//                                                                        a bad id
//
// Outlier columns are those of the expert's rows: `columns` [experts, depth], `count` [experts] of them
// (experts_int8_rows.cu), or null. A row of the input that several experts share is quantized once, with
// all of its columns, so the product with the columns that are outliers for this expert comes off again.
//
// The kernels are those of int8_matmul_plain.cu, for tiles of rows of one expert.
#include "experts_int8.h"
#include "int8_matmul_plain.h"

#define ROUTED 1
#define FEW_NAME experts_int8_few_
#define TILE_NAME experts_int8_tile
#define PRODUCT_ARGUMENTS                                                                          \
    (GLOBAL const i8* a, GLOBAL const i8* weight, GLOBAL const float* row_stats,                   \
     GLOBAL const float* scales, GLOBAL const T* input, GLOBAL const i32* columns,                 \
     GLOBAL const i32* count, GLOBAL const T* bias, GLOBAL T* out, ROUTING, u64 outputs,           \
     u64 depth, u64 stride)
#define INPUT_ROW(m) ((u64)((u32)order[m] / sharing))
#define OUTPUT_ROW(m) ((u64)order[m])
// In the large tile they are listed in shared memory.
#define LISTED_INPUT(m) ((u64)inputs[(m) - m0])
#define LISTED_OUTPUT(m) ((u64)listed[(m) - m0])
#define PLACED(i) ((i) < tile.count)
#define STORE_OUT(i, v) STORE(out, i, v)
#define ROUTED_TILE(height, width)                                                                 \
    FIND_TILE(height);                                                                             \
    if (tile.expert >= experts) {                                                                  \
        FILL_UNROUTED(across * (width), width, outputs, STORE_OUT);                                \
        return;                                                                                    \
    }                                                                                              \
    const u64 m0 = tile.first, rows = m0 + tile.count;                                             \
    weight += tile.expert * outputs * depth;                                                       \
    scales += tile.expert * outputs;                                                               \
    if (bias) bias += tile.expert * outputs;                                                       \
    if (count) {                                                                                   \
        columns += tile.expert * depth;                                                            \
        count += tile.expert;                                                                      \
    }
#define FEW_TILE() ROUTED_TILE(ROWS, FEW_THREADS / 32 * FEW_OUTPUTS)
#define LARGE_TILE()                                                                               \
    ROUTED_TILE(TILE, TILE);                                                                       \
    LIST_ROWS(inputs, listed)

#define SCALED 1
#define T f32
#include "dtype.h"
#include "int8_matmul_plain.inc.h"
#include "undtype.h"
#define T f16
#include "dtype.h"
#include "int8_matmul_plain.inc.h"
#include "undtype.h"
#define T bf16
#include "dtype.h"
#include "int8_matmul_plain.inc.h"
#include "undtype.h"

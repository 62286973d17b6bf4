// halfbyte: exact
// The int8 product in plain integer arithmetic: every back end with many rows where it has no tensor
// cores, and every one with few rows.
//
//   s[m][o] = sum over k of a[m][k] * weight[o][k]                 int32, exact
//   y       = s * (row_stats[m] / 127^2) * scales[o]
//   y       = fma(input[m][j], decode(weight[o][j]), y)            for each outlier column j, in order
//   out     = round(y + bias[o])
//
// `a` has `stride` codes a row. `input`, `columns`, `count` and `bias` may be null. The variant for
// int32 ends after the first line.
//
//   int8_few_<rows>   a warp takes two outputs and reads their weights once for up to that many rows
//   int8_tile         a group takes 64 x 64 results, through shared memory
#include "int8_matmul_plain.h"

#define PRODUCT_ARGUMENTS                                                                          \
    (GLOBAL const i8* a, GLOBAL const i8* weight, GLOBAL const float* row_stats,                   \
     GLOBAL const float* scales, GLOBAL const T* input, GLOBAL const i32* columns,                 \
     GLOBAL const i32* count, GLOBAL const T* bias, GLOBAL T* out, u64 rows, u64 outputs,          \
     u64 depth, u64 stride)

// The places of a tile's rows are the rows.
#define ROUTED 0
#define FEW_NAME int8_few_
#define TILE_NAME int8_tile
#define INPUT_ROW(m) (m)
#define OUTPUT_ROW(m) (m)
#define LISTED_INPUT(m) (m)
#define LISTED_OUTPUT(m) (m)
#define PLACED(i) true
#define FEW_TILE()                                                                                 \
    u64 m0 = GROUP_Y * ROWS, across = GROUP
#define LARGE_TILE()                                                                               \
    u64 tiles = (outputs + TILE - 1) / TILE;                                                       \
    u64 m0 = GROUP / tiles * TILE, across = GROUP % tiles

#define T i32
#define SCALED 0
#include "dtype.h"
#include "int8_matmul_plain.inc.h"
#include "undtype.h"
#undef SCALED
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

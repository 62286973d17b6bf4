// The kernels of int8_matmul_plain.cu for results of type T; int32 sums unless SCALED.

#if SCALED
// From a sum, of row `from` of the input, to what is stored in row `to`.
DEVICE void NAMED(finish)(i32 sum, u64 from, u64 to, u64 o, GLOBAL const i8* a,
                          GLOBAL const i8* weight, GLOBAL const float* row_stats,
                          GLOBAL const float* scales, GLOBAL const T* input,
                          GLOBAL const i32* columns, u32 outliers, GLOBAL const T* bias,
                          GLOBAL T* out, u64 outputs, u64 depth, u64 stride) {
    float scale = scales[o];
#if ROUTED
    // Codes are those of all columns, whichever of them are outliers of which expert: exactly what the
    // outliers' columns have added comes off again.
    for (u32 i = 0; i < outliers; i++) {
        u64 j = (u64)columns[i];
        sum -= (i32)a[from * stride + j] * (i32)weight[o * depth + j];
    }
#endif
    float y = scaled8(sum, row_stats[from], scale);
    for (u32 i = 0; i < outliers; i++) {
        u64 j = (u64)columns[i];
        y = fma_(LOAD(input, from * depth + j), decode8(weight[o * depth + j], scale), y);
    }
    if (bias) y = y + LOAD(bias, o);
    STORE(out, to * outputs + o, y);
}
#define FINISH(sum, from, to, o)                                                                   \
    NAMED(finish)(sum, from, to, o, a, weight, row_stats, scales, input,        \
                  columns, outliers, bias, out, outputs, depth, stride)
#else
#define FINISH(sum, from, to, o) out[(to) * outputs + (o)] = sum
#endif

#if !ROUTED
#define ROWS 1
#include "int8_few.inc.h"
#undef ROWS
#define ROWS 4
#include "int8_few.inc.h"
#undef ROWS
#endif
#define ROWS 8
#include "int8_few.inc.h"
#undef ROWS

#if !ROUTED || !CUDA // which has rows of experts on tensor cores
// Threads are 16 x 16; each has every sixteenth row and output of the tile.
KERNEL(256, NAMED(TILE_NAME), PRODUCT_ARGUMENTS) {
    SHARED(u32, left, TILE * PITCH);
    SHARED(u32, right, TILE * PITCH);
#if ROUTED
    SHARED(u32, inputs, TILE);
    SHARED(u32, listed, TILE);
#endif
    LARGE_TILE();
    u64 o0 = across * TILE;
    u32 x = THREAD % 16, y = THREAD / 16;
    bool left_aligned = (((u64)a & 3) | (stride & 3) | (depth & 3)) == 0;
    bool right_aligned = (((u64)weight & 3) | (depth & 3)) == 0;
    i32 sums[4][4];
    for (u32 i = 0; i < 4; i++) {
        for (u32 j = 0; j < 4; j++) sums[i][j] = 0;
    }
    for (u64 k = 0; k < depth; k += 4 * STEP) {
        for (u32 i = THREAD; i < TILE * STEP; i += THREADS) {
            u32 row = i / STEP, word = i % STEP;
            u64 m = m0 + row, o = o0 + row, at = k + 4 * word;
            left[row * PITCH + word] =
                m < rows ? word_at(a + LISTED_INPUT(m) * stride, at, depth, left_aligned) : 0;
            right[row * PITCH + word] =
                o < outputs ? word_at(weight + o * depth, at, depth, right_aligned) : 0;
        }
        BARRIER();
        UNROLL
        for (u32 word = 0; word < STEP; word++) {
            UNROLL
            for (u32 i = 0; i < 4; i++) {
                UNROLL
                for (u32 j = 0; j < 4; j++) {
                    sums[i][j] = dot4(left[(y + 16 * i) * PITCH + word],
                                      right[(x + 16 * j) * PITCH + word], sums[i][j]);
                }
            }
        }
        BARRIER();
    }
#if SCALED
    u32 outliers = count ? (u32)count[0] : 0;
#endif
    UNROLL
    for (u32 i = 0; i < 4; i++) {
        UNROLL
        for (u32 j = 0; j < 4; j++) {
            u64 m = m0 + y + 16 * i, o = o0 + x + 16 * j;
            if (m < rows && o < outputs) FINISH(sums[i][j], LISTED_INPUT(m), LISTED_OUTPUT(m), o);
        }
    }
}
#endif

#undef FINISH

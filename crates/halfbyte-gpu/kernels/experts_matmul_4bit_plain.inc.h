// The kernel of experts_matmul_4bit_plain.cu for one T.

KERNEL(256, NAMED(experts_matmul_4bit_plain),
       (GLOBAL const u8* packed, SCALE_PARAMETERS, TABLE_PARAMETERS, u32 shift,
        GLOBAL const i32* order, GLOBAL const i32* starts, u32 experts, u32 tiles, u32 sharing,
        GLOBAL const T* input, GLOBAL const T* bias, GLOBAL T* out, GLOBAL float* sums,
        u64 out_features, u64 in_features, u32 grad)) {
    SHARED(float, values, 16);
    SHARED(float, x, STEP * PITCH);
    SHARED(float, w, STEP * PITCH);
    SHARED(u32, inputs, TILE); // rows of the input
    SHARED(u32, listed, TILE); // rows of out
    const u64 columns = grad ? in_features : out_features;
    const u64 depth = grad ? out_features : in_features;
    const u64 column0 = GROUP / tiles * TILE;
    const ExpertTile tile = find_tile(starts, experts, TILE, (u32)(GROUP % tiles));
    if (tile.count == 0) return;
    if (THREAD < tile.count) {
        listed[THREAD] = (u32)order[tile.first + THREAD];
        inputs[THREAD] = listed[THREAD] / sharing;
    }
    BARRIER();
    if (tile.expert >= experts) {
        if (sums) return; // sum_slots does not read them
        const float value = unrouted(tile.expert, experts);
        const u32 width = (u32)min_(columns - column0, (u64)TILE);
        for (u32 i = THREAD; i < tile.count * width; i += 256) {
            STORE(out, listed[i / width] * columns + column0 + i % width, value);
        }
        return;
    }
    const u64 blocks = (out_features * in_features + (1u << shift) - 1) >> shift;
    const u64 first = tile.expert * blocks;
    packed += first << shift >> 1;
    if (bias) bias += tile.expert * out_features;
    const u64 row0 = 0, rows = tile.count;
#define INPUT_ROW(row) ((u64)inputs[row])
#define STORE_SUM(row, column, sum)                                                                \
    do {                                                                                           \
        const u64 at = listed[row] * columns + (column);                                          \
        if (sums) sums[at] = sum;                                                                  \
        else STORE(out, at, sum);                                                                  \
    } while (0)
#define BLOCK(element) (first + ((element) >> shift))
#include "matmul_4bit_plain_tile.inc.h"
}

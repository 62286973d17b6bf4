// The kernels of matmul_4bit_plain.cu for one T.

KERNEL(256, NAMED(matmul_4bit_plain),
       (GLOBAL const u8* packed, SCALE_PARAMETERS, TABLE_PARAMETERS, u32 shift,
        GLOBAL const T* input, GLOBAL const T* bias, GLOBAL T* out, u64 rows, u64 out_features,
        u64 in_features, u32 grad)) {
    SHARED(float, values, 16);
    SHARED(float, x, STEP * PITCH);
    SHARED(float, w, STEP * PITCH);
    const u64 columns = grad ? in_features : out_features;
    const u64 depth = grad ? out_features : in_features;
    const u64 tiles_down = (rows + TILE - 1) / TILE;
    const u64 row0 = GROUP % tiles_down * TILE, column0 = GROUP / tiles_down * TILE;
#define INPUT_ROW(row) (row)
#define STORE_SUM(row, column, sum) STORE(out, (row) * columns + (column), sum)
#define BLOCK(element) ((element) >> shift)
#include "matmul_4bit_plain_tile.inc.h"
}

// The sums of `splits` parts of the depth, in order: partials [splits, rows, columns].
KERNEL(256, NAMED(matmul_4bit_sum),
       (GLOBAL const float* partials, u32 splits, GLOBAL const T* bias, GLOBAL T* out, u64 rows,
        u64 columns)) {
    const u64 column = GROUP * 256 + THREAD;
    if (column >= columns) return;
    float last = 0.0f;
    if (bias) last = LOAD(bias, column);
    for (u64 row = GROUP_Y; row < rows; row += GROUPS_Y) {
        float sum = partials[row * columns + column];
        for (u32 i = 1; i < splits; i++) sum += partials[(i * rows + row) * columns + column];
        if (bias) sum += last;
        STORE(out, row * columns + column, sum);
    }
}

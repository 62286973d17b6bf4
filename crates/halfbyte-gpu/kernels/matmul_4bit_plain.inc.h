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
    float c[4][4];
    for (u32 i = 0; i < 4; i++)
        for (u32 j = 0; j < 4; j++) c[i][j] = 0.0f;
    if (THREAD < 16) values[THREAD] = TABLE(THREAD);

    for (u64 start = 0; start < depth; start += STEP) {
        BARRIER(); // the table is there; the last step has been read
        for (u32 i = 0; i < TILE / 8; i++) {
            const u32 line = THREAD / STEP + i * 8, k = THREAD % STEP;
            const u64 row = row0 + line;
            float value = 0.0f;
            if (row < rows && start + k < depth) value = LOAD(input, row * depth + start + k);
            x[k * PITCH + line] = value;
        }
        for (u32 i = 0; i < TILE / 8; i++) {
            // Neighbouring threads read neighbouring codes.
            const u32 k = grad ? THREAD / TILE + i * 4 : THREAD % STEP;
            const u32 line = grad ? THREAD % TILE : THREAD / STEP + i * 8;
            const u64 row = grad ? start + k : column0 + line;
            const u64 column = grad ? column0 + line : start + k;
            float value = 0.0f;
            if (row < out_features && column < in_features) {
                const u64 element = row * in_features + column;
                const u32 codes = packed[element / 2];
                value = values[element % 2 ? codes & 15 : codes >> 4] * SCALE(element >> shift);
            }
            w[k * PITCH + line] = value;
        }
        BARRIER();
        for (u32 k = 0; k < STEP; k++) {
            float a[4], b[4];
            UNROLL
            for (u32 i = 0; i < 4; i++) {
                a[i] = x[k * PITCH + THREAD / 16 + i * 16];
                b[i] = w[k * PITCH + THREAD % 16 + i * 16];
            }
            UNROLL
            for (u32 i = 0; i < 4; i++) {
                UNROLL
                for (u32 j = 0; j < 4; j++) c[i][j] = fma_(a[i], b[j], c[i][j]);
            }
        }
    }

    UNROLL
    for (u32 i = 0; i < 4; i++) {
        UNROLL
        for (u32 j = 0; j < 4; j++) {
            const u64 row = row0 + THREAD / 16 + i * 16, column = column0 + THREAD % 16 + j * 16;
            if (row < rows && column < columns) {
                float sum = c[i][j];
                if (bias) sum += LOAD(bias, column);
                STORE(out, row * columns + column, sum);
            }
        }
    }
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

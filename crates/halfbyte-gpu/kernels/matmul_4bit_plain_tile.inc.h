// A tile of matmul_4bit_plain.cu: TILE columns from column0 on, TILE rows from row0 on as far as
// there are `rows`. The kernel says where a row lies, INPUT_ROW, where to STORE_SUM, and the number
// of the BLOCK of an element of the weight. Their macros end here.
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
            if (row < rows && start + k < depth) {
                value = LOAD(input, INPUT_ROW(row) * depth + start + k);
            }
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
                value = values[element % 2 ? codes & 15 : codes >> 4] * SCALE(BLOCK(element));
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
                STORE_SUM(row, column, sum);
            }
        }
    }
#undef INPUT_ROW
#undef STORE_SUM
#undef BLOCK

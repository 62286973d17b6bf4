// The kernel of int8_grad_plain.cu for elements of type T.

KERNEL(256, NAMED(GRAD_NAME), GRAD_ARGUMENTS) {
    SHARED(float, left, STEP * PITCH);
    SHARED(float, right, STEP * PITCH);
#if ROUTED
    SHARED(u32, inputs, TILE);
    SHARED(u32, listed, TILE);
#endif
    GRAD_TILE();
    u32 x = THREAD % 16, y = THREAD / 16;
    float sums[4][4];
    for (u32 i = 0; i < 4; i++) {
        for (u32 j = 0; j < 4; j++) sums[i][j] = 0.0f;
    }
    for (u64 o0 = 0; o0 < outputs; o0 += STEP) {
        for (u32 i = THREAD; i < TILE * STEP; i += THREADS) {
            u64 m = m0 + i / STEP, o = o0 + i % STEP;
            left[i % STEP * PITCH + i / STEP] =
                m < rows && o < outputs ? LOAD(grad, INPUT_ROW(m) * outputs + o) : 0.0f;
        }
        for (u32 i = THREAD; i < TILE * STEP; i += THREADS) {
            u64 o = o0 + i / TILE, c = c0 + i % TILE;
            right[i / TILE * PITCH + i % TILE] =
                o < outputs && c < columns ? decode8(codes[o * columns + c], scales[o]) : 0.0f;
        }
        BARRIER();
        UNROLL
        for (u32 o = 0; o < STEP; o++) {
            UNROLL
            for (u32 i = 0; i < 4; i++) {
                UNROLL
                for (u32 j = 0; j < 4; j++) {
                    sums[i][j] = fma_(left[o * PITCH + y + 16 * i], right[o * PITCH + x + 16 * j],
                                      sums[i][j]);
                }
            }
        }
        BARRIER();
    }
    UNROLL
    for (u32 i = 0; i < 4; i++) {
        UNROLL
        for (u32 j = 0; j < 4; j++) {
            u64 m = m0 + y + 16 * i, c = c0 + x + 16 * j;
            if (m < rows && c < columns) GRAD_STORE(out, OUTPUT_ROW(m) * columns + c, sums[i][j]);
        }
    }
}

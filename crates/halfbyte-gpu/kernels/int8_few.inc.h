// int8_few_<ROWS> of int8_matmul_plain.cu: up to ROWS rows, and the outputs of a group.
//
// Rows and outputs past the end repeat the last one and are not stored, so that there is no branch
// around the loads.

#define SUMS (FEW_OUTPUTS * ROWS)

KERNEL(FEW_THREADS, NAMED(PASTE(FEW_NAME, ROWS)), PRODUCT_ARGUMENTS) {
#if !HAVE_SHUFFLE
    SHARED(i32, partial, SUMS * FEW_THREADS);
#endif
    FEW_TILE();
    u64 o0 = (across * (FEW_THREADS / 32) + THREAD / 32) * FEW_OUTPUTS;
    i32 sums[SUMS];
    GLOBAL const i8* w[FEW_OUTPUTS];
    GLOBAL const i8* x[ROWS];
    UNROLL
    for (u32 i = 0; i < SUMS; i++) sums[i] = 0;
    UNROLL
    for (u32 i = 0; i < FEW_OUTPUTS; i++) w[i] = weight + min_(o0 + i, outputs - 1) * depth;
    UNROLL
    for (u32 i = 0; i < ROWS; i++) x[i] = a + INPUT_ROW(min_(m0 + i, rows - 1)) * stride;

    if ((((u64)a | (u64)weight | stride | depth) & 15) == 0) {
        for (u64 k = 16 * LANE; k < depth; k += FEW_AHEAD * 512) {
            U4 weights[FEW_AHEAD][FEW_OUTPUTS];
            UNROLL
            for (u32 s = 0; s < FEW_AHEAD; s++) {
                // The last step repeats itself; its second half is not multiplied.
                u64 at = k + s * 512 < depth ? k + s * 512 : k;
                UNROLL
                for (u32 i = 0; i < FEW_OUTPUTS; i++) {
                    weights[s][i] = *(GLOBAL const U4*)(w[i] + at);
                }
            }
            UNROLL
            for (u32 s = 0; s < FEW_AHEAD; s++) {
                if (k + s * 512 >= depth) break;
                UNROLL
                for (u32 m = 0; m < ROWS; m++) {
                    if (!PLACED(m)) break;
                    U4 codes = *(GLOBAL const U4*)(x[m] + k + s * 512);
                    UNROLL
                    for (u32 i = 0; i < FEW_OUTPUTS; i++) {
                        sums[m * FEW_OUTPUTS + i] =
                            dot16(codes, weights[s][i], sums[m * FEW_OUTPUTS + i]);
                    }
                }
            }
        }
    } else {
        for (u64 k = LANE; k < depth; k += 32) {
            UNROLL
            for (u32 m = 0; m < ROWS; m++) {
                if (!PLACED(m)) break;
                UNROLL
                for (u32 i = 0; i < FEW_OUTPUTS; i++) {
                    sums[m * FEW_OUTPUTS + i] += (i32)x[m][k] * (i32)w[i][k];
                }
            }
        }
    }

    // Lane i gets sum i.
    i32 mine = 0;
#if HAVE_SHUFFLE
    UNROLL
    for (u32 i = 0; i < SUMS; i++) {
        i32 sum = sums[i];
        UNROLL
        for (u32 mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
        mine = LANE == i ? sum : mine;
    }
#else
    for (u32 i = 0; i < SUMS; i++) partial[i * FEW_THREADS + THREAD] = sums[i];
    BARRIER();
    for (u32 i = 0; LANE < SUMS && i < 32; i++) {
        mine += partial[LANE * FEW_THREADS + THREAD - LANE + i];
    }
#endif
#if SCALED
    u32 outliers = count ? (u32)count[0] : 0;
#endif
    u64 m = m0 + LANE / FEW_OUTPUTS, o = o0 + LANE % FEW_OUTPUTS;
    if (LANE < SUMS && m < rows && o < outputs) FINISH(mine, INPUT_ROW(m), OUTPUT_ROW(m), o);
}

#undef SUMS

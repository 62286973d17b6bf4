// What reads and writes a row, for elements of type T.

// Elements that a thread takes at once: 16 or 32 bytes.
#define RUN 8

// True where runs of elements and of codes are aligned in every row.
DEVICE bool NAMED(runs_aligned)(GLOBAL const T* x, GLOBAL const i8* codes, u64 columns, u64 stride) {
    return (((u64)x & 15) | ((u64)codes & 7) | (columns % RUN) | (stride % RUN)) == 0;
}

DEVICE void NAMED(load_run)(GLOBAL const T* x, float* values) {
    GLOBAL const U4* from = (GLOBAL const U4*)x;
    U4 v = from[0];
    u32 words[4] = {v.x, v.y, v.z, v.w};
    if (sizeof(T) == 4) {
        U4 more = from[sizeof(T) / 4];
        values[0] = as_float(v.x), values[1] = as_float(v.y);
        values[2] = as_float(v.z), values[3] = as_float(v.w);
        values[4] = as_float(more.x), values[5] = as_float(more.y);
        values[6] = as_float(more.z), values[7] = as_float(more.w);
        return;
    }
    UNROLL
    for (u32 i = 0; i < 4; i++) {
        values[2 * i] = PASTE(REGISTER_, T)(words[i] & 0xFFFFu);
        values[2 * i + 1] = PASTE(REGISTER_, T)(words[i] >> 16);
    }
}

// The bits of the largest magnitude of a row that is no outlier, as far as this thread sees it;
// calls FLAG(column) for the outliers, and FLAGGED(k) after those of the word of column k.
#define ROW_MOST(row, columns, aligned, threshold, most, FLAG, FLAGGED)                            \
    if (aligned) {                                                                                 \
        for (u64 k = THREAD * RUN; k < columns; k += THREADS * RUN) {                              \
            float values[RUN];                                                                     \
            NAMED(load_run)(row + k, values);                                                      \
            UNROLL                                                                                 \
            for (u32 i = 0; i < RUN; i++) {                                                        \
                u32 m = magnitude_bits(values[i]);                                                 \
                if (is_outlier(m, threshold)) FLAG(k + i);                                         \
                else most = max_(most, m);                                                         \
            }                                                                                      \
            FLAGGED(k);                                                                            \
        }                                                                                          \
    } else {                                                                                       \
        for (u64 k = THREAD; k < columns; k += THREADS) {                                          \
            u32 m = magnitude_bits(LOAD(row, k));                                                  \
            if (is_outlier(m, threshold)) FLAG(k);                                                 \
            else most = max_(most, m);                                                             \
            FLAGGED(k);                                                                            \
        }                                                                                          \
    }

// codes[k] = encode(row[k]) for a row; 0 behind its last column.
DEVICE void NAMED(encode_row)(GLOBAL const T* row, GLOBAL i8* codes, u64 columns, u64 stride,
                              bool aligned, float scale) {
    if (aligned) {
        for (u64 k = THREAD * RUN; k < columns; k += THREADS * RUN) {
            float values[RUN];
            NAMED(load_run)(row + k, values);
            u32 low = 0, high = 0;
            UNROLL
            for (u32 i = 0; i < 4; i++) {
                low |= encode8(values[i], scale) << (8 * i);
                high |= encode8(values[4 + i], scale) << (8 * i);
            }
            GLOBAL u32* to = (GLOBAL u32*)(codes + k);
            to[0] = low;
            to[1] = high;
        }
    } else {
        for (u64 k = THREAD; k < columns; k += THREADS) codes[k] = (i8)encode8(LOAD(row, k), scale);
    }
    for (u64 k = columns + THREAD; k < stride; k += THREADS) codes[k] = 0;
}

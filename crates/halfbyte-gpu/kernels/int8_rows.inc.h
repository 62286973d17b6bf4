// The kernels of int8_rows.cu that read or write elements of type T.

#include "int8_row.inc.h"

// Row by row, outlier columns included: int8_outlier_columns clears those. `flags` is not touched
// without a threshold.
KERNEL(256, NAMED(int8_row_codes), (GLOBAL const T* x, GLOBAL i8* codes, GLOBAL float* row_stats,
                                    GLOBAL u32* flags, u64 rows, u64 columns, u64 stride,
                                    float threshold)) {
    SHARED(u32, scratch, 256);
    bool aligned = NAMED(runs_aligned)(x, codes, columns, stride);
    for (u64 r = GROUP; r < rows; r += GROUPS) {
        GLOBAL const T* row = x + r * columns;
        u32 most = 0;
#define FLAG(column)                                                                               \
    do {                                                                                           \
        if (!(flags[WORD(column)] & BIT(column))) atomic_or_u32(&flags[WORD(column)], BIT(column)); \
    } while (0)
        ROW_MOST(row, columns, aligned, threshold, most, FLAG, NOTHING)
#undef FLAG
        float stat = row_stat(group_most(most, scratch));
        if (THREAD == 0) row_stats[r] = stat;
        NAMED(encode_row)(row, codes + r * stride, columns, stride, aligned, code_scale(stat));
    }
}

// All of it in one group, for a few rows of at most 32768 columns. `list` and `count` may be null.
KERNEL(512, NAMED(int8_few_row_codes), (GLOBAL const T* x, GLOBAL i8* codes, GLOBAL float* row_stats,
                                        GLOBAL u32* flags, GLOBAL i32* list, GLOBAL i32* count,
                                        u64 rows, u64 columns, u64 stride, float threshold)) {
    SHARED(u32, scratch, 512);
    SHARED(u32, found, 1024);
    bool aligned = NAMED(runs_aligned)(x, codes, columns, stride);
    u32 words = (u32)((columns + 31) / 32);
    for (u32 word = THREAD; word < words; word += THREADS) found[word] = 0;
    BARRIER();
    for (u64 r = 0; r < rows; r++) {
        GLOBAL const T* row = x + r * columns;
        u32 most = 0;
#define FLAG(column) atomic_or_u32(&found[WORD(column)], BIT(column))
        ROW_MOST(row, columns, aligned, threshold, most, FLAG, NOTHING)
#undef FLAG
        float stat = row_stat(group_most(most, scratch));
        if (THREAD == 0) row_stats[r] = stat;
        NAMED(encode_row)(row, codes + r * stride, columns, stride, aligned, code_scale(stat));
    }
    BARRIER_GLOBAL();
    for (u32 word = THREAD; word < words; word += THREADS) {
        u32 bits = found[word];
        flags[word] = bits;
        for (u64 r = 0; bits != 0 && r < rows; r++) clear_columns(bits, word, codes + r * stride);
    }
    if (count) {
        // Two words a thread.
        u32 first = 2 * THREAD, total;
        u32 low = first < words ? found[first] : 0, high = first + 1 < words ? found[first + 1] : 0;
        u32 at = group_before(popcount_(low) + popcount_(high), scratch, &total);
        at = list_columns(low, first, at, list);
        list_columns(high, first + 1, at, list);
        if (THREAD == 0) count[0] = (i32)total;
    }
}

// 32 columns a group: their largest magnitudes, then their codes. `flags` is not read without a
// threshold.
KERNEL(256, NAMED(int8_column_codes), (GLOBAL const T* x, GLOBAL i8* codes, GLOBAL float* col_stats,
                                       GLOBAL const u32* flags, u64 rows, u64 columns,
                                       float threshold)) {
    SHARED(u32, most, 256);
    u64 column = GROUP * 32 + THREAD % 32;
    u32 mine = 0;
    if (column < columns) {
        for (u64 r = THREAD / 32; r < rows; r += THREADS / 32) {
            u32 m = magnitude_bits(LOAD(x, r * columns + column));
            if (!is_outlier(m, threshold)) mine = max_(mine, m);
        }
    }
    most[THREAD] = mine;
    BARRIER();
    if (column >= columns) return;
    for (u32 i = THREAD % 32; i < THREADS; i += 32) mine = max_(mine, most[i]);
    float stat = row_stat(mine), scale = code_scale(stat);
    if (THREAD < 32) col_stats[column] = stat;
    if (threshold > 0.0f && flags[WORD(column)] & BIT(column)) scale = 0.0f;
    for (u64 r = THREAD / 32; r < rows; r += THREADS / 32) {
        u64 i = r * columns + column;
        codes[i] = (i8)encode8(LOAD(x, i), scale);
    }
}

KERNEL(256, NAMED(int8_dequantize), (GLOBAL const i8* codes, GLOBAL const float* row_stats,
                                     GLOBAL T* out, u64 rows, u64 columns)) {
    bool aligned = (((u64)codes & 3) | (columns & 3)) == 0;
    for (u64 r = GROUP; r < rows; r += GROUPS) {
        float stat = row_stats[r];
        u64 start = r * columns;
        if (aligned) {
            for (u64 k = start + 4 * THREAD; k < start + columns; k += 4 * THREADS) {
                u32 four = *(GLOBAL const u32*)(codes + k);
                UNROLL
                for (u32 i = 0; i < 4; i++) STORE(out, k + i, decode8((i8)(four >> (8 * i)), stat));
            }
        } else {
            for (u64 k = start + THREAD; k < start + columns; k += THREADS) {
                STORE(out, k, decode8(codes[k], stat));
            }
        }
    }
}

// `bias` may be null.
KERNEL(256, NAMED(int8_rescale), (GLOBAL const i32* acc, GLOBAL const float* row_stats,
                                  GLOBAL const float* col_stats, GLOBAL const float* bias,
                                  GLOBAL T* out, u64 rows, u64 columns)) {
    for (u64 r = GROUP; r < rows; r += GROUPS) {
        float stat = row_stats[r];
        for (u64 n = THREAD; n < columns; n += THREADS) {
            float y = scaled8(acc[r * columns + n], stat, col_stats[n]);
            if (bias) y = y + bias[n];
            STORE(out, r * columns + n, y);
        }
    }
}

KERNEL(256, NAMED(int8_gather), (GLOBAL const T* x, GLOBAL const i64* list, GLOBAL T* out, u64 rows,
                                 u64 columns, u64 n)) {
    for (u64 r = GROUP; r < rows; r += GROUPS) {
        for (u64 j = THREAD; j < n; j += THREADS) {
            i64 column = list[j];
            bool inside = column >= 0 && column < (i64)columns;
            T value = 0;
            if (inside) value = x[r * columns + (u64)column];
            out[r * n + j] = value;
        }
    }
}

#undef ROW_MOST
#undef RUN

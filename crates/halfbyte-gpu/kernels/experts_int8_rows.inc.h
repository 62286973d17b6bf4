// The kernel of experts_int8_rows.cu for elements of type T.

#include "int8_row.inc.h"

// The row goes to the experts of `ids` [rows, sharing]. Without a threshold neither these nor `flags`
// are read.
KERNEL(256, NAMED(experts_int8_row_codes), (GLOBAL const T* x, GLOBAL i8* codes,
                                            GLOBAL float* row_stats, GLOBAL u32* flags,
                                            GLOBAL const i64* ids, u32 sharing, u32 experts, u64 rows,
                                            u64 columns, u64 stride, float threshold)) {
    SHARED(u32, scratch, 256);
    bool aligned = NAMED(runs_aligned)(x, codes, columns, stride);
    for (u32 r = (u32)GROUP; r < rows; r += (u32)GROUPS) {
        GLOBAL const T* row = x + r * columns;
        u32 most = 0;
        u32 found = 0; // in one word
#define FLAG(column) found |= BIT(column)
#define FLAGGED(column)                                                                            \
    if (found != 0) {                                                                              \
        flag_columns(flags, columns, WORD(column), found, ids, r, sharing, experts);               \
        found = 0;                                                                                 \
    }
        ROW_MOST(row, columns, aligned, threshold, most, FLAG, FLAGGED)
#undef FLAG
#undef FLAGGED
        float stat = row_stat(group_most(most, scratch));
        if (THREAD == 0) row_stats[r] = stat;
        NAMED(encode_row)(row, codes + r * stride, columns, stride, aligned, code_scale(stat));
    }
}

#undef ROW_MOST
#undef RUN

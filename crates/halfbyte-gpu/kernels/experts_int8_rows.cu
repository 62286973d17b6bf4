// halfbyte: exact
// Activations of 8-bit experts to codes, each row once, and the outlier columns of each expert:
//
//   for each row of x:                                      one group a row
//       r = max |x[k]| below the threshold; flag the columns that hold an outlier, for each expert that
//       the row goes to
//       codes[k] = round(x[k] * (127 / r))
//   for each expert, for each column flagged, ascending:    a second launch, one group an expert
//       list[expert][count[expert]++] = column
//
// Codes of outlier columns stay: a row may go to experts with other outliers. The product takes them
// out again.
#include "experts.h"
#include "int8_rows.h"

// Flags columns of a word for each of the experts that row r goes to.
DEVICE void flag_columns(GLOBAL u32* flags, u64 columns, u64 word, u32 bits, GLOBAL const i64* ids,
                         u32 r, u32 sharing, u32 experts) {
    for (u32 slot = 0; slot < sharing; slot++) {
        u32 expert = bucket_of(ids[(u64)r * sharing + slot], experts);
        if (expert < experts) atomic_or_u32(flags + expert * ((columns + 31) / 32) + word, bits);
    }
}

// `flags` [experts, words]. Experts that no row has flagged columns for get an empty list.
KERNEL(256, experts_int8_columns, (GLOBAL const u32* flags, GLOBAL i32* list, GLOBAL i32* count,
                                   u64 experts, u64 columns)) {
    SHARED(u32, sums, 256);
    u64 words = (columns + 31) / 32, each = (words + THREADS - 1) / THREADS;
    u64 first = min_(THREAD * each, words), end = min_(first + each, words);
    for (u64 expert = GROUP; expert < experts; expert += GROUPS) {
        GLOBAL const u32* own = flags + expert * words;
        u32 found = 0, total;
        for (u64 word = first; word < end; word++) found += popcount_(own[word]);
        u32 at = group_before(found, sums, &total);
        for (u64 word = first; word < end; word++) {
            at = list_columns(own[word], word, at, list + expert * columns);
        }
        if (THREAD == 0) count[expert] = (i32)total;
        BARRIER(); // the total has been read
    }
}

#define T f32
#include "dtype.h"
#include "experts_int8_rows.inc.h"
#include "undtype.h"
#define T f16
#include "dtype.h"
#include "experts_int8_rows.inc.h"
#include "undtype.h"
#define T bf16
#include "dtype.h"
#include "experts_int8_rows.inc.h"
#include "undtype.h"

// halfbyte: exact
// The element by element half of LLM.int8().
//
//   for each row of x:                                      one group a row
//       r = max |x[k]| below the threshold; flag the columns that hold an outlier
//       codes[k] = round(x[k] * (127 / r))                  while the row is in L1
//   for each flagged column, ascending:                     a second launch
//       list[count++] = column; codes[column] = 0 in every row
//
// So x is read from memory once. Flags are bits, set atomically: outliers are few. The first group of
// the second launch makes the list, all of them clear codes of their rows.
#include "int8_rows.h"

// Clears the codes of a word's flagged columns in one row.
DEVICE void clear_columns(u32 bits, u64 word, GLOBAL i8* codes) {
    for (; bits != 0; bits &= bits - 1) codes[word * 32 + lowest(bits)] = 0;
}

KERNEL(256, int8_clear, (GLOBAL u32* words, u64 n)) {
    for (u64 i = GROUP * THREADS + THREAD; i < n; i += GROUPS * THREADS) words[i] = 0;
}

// `list` and `count` may be null.
KERNEL(256, int8_outlier_columns, (GLOBAL const u32* flags, GLOBAL i8* codes, GLOBAL i32* list,
                                   GLOBAL i32* count, u64 rows, u64 columns, u64 stride)) {
    SHARED(u32, sums, 256);
    u64 words = (columns + 31) / 32;
    for (u64 word = THREAD; word < words; word += THREADS) {
        u32 bits = flags[word];
        if (bits == 0) continue;
        for (u64 r = GROUP; r < rows; r += GROUPS) clear_columns(bits, word, codes + r * stride);
    }
    if (GROUP == 0 && count) {
        u64 each = (words + THREADS - 1) / THREADS;
        u64 first = min_(THREAD * each, words), end = min_(first + each, words);
        u32 found = 0, total;
        for (u64 word = first; word < end; word++) found += popcount_(flags[word]);
        u32 at = group_before(found, sums, &total);
        for (u64 word = first; word < end; word++) at = list_columns(flags[word], word, at, list);
        if (THREAD == 0) count[0] = (i32)total;
    }
}

// Sorts by counting, for each column, those that come before it: no scratch, and lists are short.
KERNEL(256, int8_sort_columns, (GLOBAL const i64* columns, GLOBAL i32* list, GLOBAL i32* count, u64 n,
                                u64 limit)) {
    for (u64 i = THREAD; i < n; i += THREADS) {
        i64 mine = columns[i];
        if (mine < 0 || mine >= (i64)limit) continue;
        u64 at = 0;
        for (u64 j = 0; j < n; j++) {
            i64 other = columns[j];
            at += other >= 0 && (other < mine || (other == mine && j < i)) ? 1 : 0;
        }
        list[at] = (i32)mine;
    }
    if (THREAD == 0) {
        i32 inside = 0;
        for (u64 j = 0; j < n; j++) inside += columns[j] >= 0 && columns[j] < (i64)limit ? 1 : 0;
        count[0] = inside;
    }
}

#define T f32
#include "dtype.h"
#include "int8_rows.inc.h"
#include "undtype.h"
#define T f16
#include "dtype.h"
#include "int8_rows.inc.h"
#include "undtype.h"
#define T bf16
#include "dtype.h"
#include "int8_rows.inc.h"
#include "undtype.h"

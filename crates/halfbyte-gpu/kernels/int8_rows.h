// What int8_rows.cu and experts_int8_rows.cu share. See the first for what they compute.
#ifndef HALFBYTE_INT8_ROWS_H
#define HALFBYTE_INT8_ROWS_H
#include "int8.h"

// The largest value of a group of THREADS threads, in all of them. `most` holds a value a thread;
// it may be used again after the next barrier.
DEVICE u32 group_most(u32 value, LOCAL u32* most) {
#if HAVE_SHUFFLE
    for (u32 mask = 16; mask > 0; mask /= 2) {
        u32 other = shuffle_xor(value, mask); // all lanes, once: max_ is a macro
        value = max_(value, other);
    }
    if (LANE == 0) most[THREAD / 32] = value;
    BARRIER();
    value = most[0];
    for (u32 i = 1; i < THREADS / 32; i++) value = max_(value, most[i]);
#else
    most[THREAD] = value;
    BARRIER();
    for (u32 apart = THREADS / 2; apart > 0; apart /= 2) {
        if (THREAD < apart) most[THREAD] = max_(most[THREAD], most[THREAD + apart]);
        BARRIER();
    }
    value = most[0];
#endif
    BARRIER();
    return value;
}

// The sum of `value` over the threads before this one. `sums` holds a value a thread. `total` is
// the sum of all.
DEVICE u32 group_before(u32 value, LOCAL u32* sums, u32* total) {
    sums[THREAD] = value;
    BARRIER();
    for (u32 by = 1; by < THREADS; by *= 2) {
        u32 left = THREAD >= by ? sums[THREAD - by] : 0;
        BARRIER();
        sums[THREAD] += left;
        BARRIER();
    }
    *total = sums[THREADS - 1];
    return sums[THREAD] - value;
}

// Where the flag of a column lies.
#define WORD(column) ((column) / 32)
#define BIT(column) (1u << (u32)((column) % 32))

// For ROW_MOST, where FLAG has done it all.
#define NOTHING(k)

// The index of the lowest bit that is set.
DEVICE u32 lowest(u32 bits) { return 31u - (u32)clz_(bits & (0u - bits)); }

// The flagged columns of a word, ascending, from list[at] on. Gives where the next ones go.
DEVICE u32 list_columns(u32 bits, u64 word, u32 at, GLOBAL i32* list) {
    for (; bits != 0; bits &= bits - 1) list[at++] = (i32)(word * 32 + lowest(bits));
    return at;
}

#endif

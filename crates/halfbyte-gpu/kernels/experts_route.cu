// halfbyte: exact
// Which rows go to which expert, on the device.
//
//   order   [rows]         rows by bucket (see experts.h), ascending within one
//   starts  [experts + 3]  the first place of each bucket; the last one is the number of rows
//
// It is a counting sort that keeps the order of equal numbers, so nothing depends on timing:
// 1. experts_route_few, for up to 512 rows: one group. A row's place is the number of rows that go
//    before it.
// 2. For more rows three launches: experts_route_count counts the buckets in each chunk of rows,
//    experts_route_scan sums over chunks and buckets, experts_route_place gives each row its place.
//    Counts are added atomically, as integers.
//
// After the products:
//   fill_unrouted  rows without an expert become 0, rows with a bad id NaN
//   sum_slots      out[t] = round(sum over slots s of products[t][s]), in float32, by ascending s
#include "experts.h"

#define FEW 512

KERNEL(256, experts_route_few,
       (GLOBAL const i64* ids, u32 rows, u32 experts, GLOBAL i32* order, GLOBAL i32* starts)) {
    // Bucket and row in one number: all of them differ, and sort as rows shall lie.
    SHARED(u32, keys, FEW);
    for (u32 row = THREAD; row < rows; row += 256) {
        keys[row] = bucket_of(ids[row], experts) * FEW + row;
    }
    BARRIER();
    for (u32 row = THREAD; row < rows; row += 256) {
        u32 place = 0;
        for (u32 i = 0; i < rows; i++) place += keys[i] < keys[row] ? 1 : 0;
        order[place] = (i32)row;
    }
    for (u32 bucket = THREAD; bucket <= BUCKETS(experts); bucket += 256) {
        u32 first = 0;
        for (u32 i = 0; i < rows; i++) first += keys[i] < bucket * FEW ? 1 : 0;
        starts[bucket] = (i32)first;
    }
}

// counts [chunks, BUCKETS]: rows of each chunk and bucket.
KERNEL(256, experts_route_count,
       (GLOBAL const i64* ids, u32 rows, u32 experts, u32 chunk, GLOBAL u32* counts)) {
    GLOBAL u32* own = counts + GROUP * BUCKETS(experts);
    for (u32 bucket = THREAD; bucket < BUCKETS(experts); bucket += 256) own[bucket] = 0;
    BARRIER_GLOBAL();
    u32 first = (u32)GROUP * chunk, end = min_(first + chunk, rows);
    for (u32 row = first + THREAD; row < end; row += 256) {
        atomic_add_u32(own + bucket_of(ids[row], experts), 1);
    }
}

// One group. Counts become the place of the first row of their chunk and bucket.
KERNEL(256, experts_route_scan,
       (u32 chunks, u32 rows, u32 experts, GLOBAL u32* counts, GLOBAL i32* starts)) {
    SHARED(u32, sums, 256);
    u32 before = 0;
    for (u32 base = 0; base < BUCKETS(experts); base += 256) {
        u32 bucket = base + THREAD, own = 0;
        if (bucket < BUCKETS(experts)) {
            for (u32 c = 0; c < chunks; c++) own += counts[(u64)c * BUCKETS(experts) + bucket];
        }
        sums[THREAD] = own;
        BARRIER();
        for (u32 by = 1; by < 256; by <<= 1) {
            u32 other = THREAD >= by ? sums[THREAD - by] : 0;
            BARRIER();
            sums[THREAD] += other;
            BARRIER();
        }
        u32 place = before + sums[THREAD] - own;
        before += sums[255];
        if (bucket < BUCKETS(experts)) {
            starts[bucket] = (i32)place;
            for (u32 c = 0; c < chunks; c++) {
                u64 at = (u64)c * BUCKETS(experts) + bucket;
                own = counts[at];
                counts[at] = place;
                place += own;
            }
        }
        BARRIER(); // the last sum has been read
    }
    if (THREAD == 0) starts[BUCKETS(experts)] = (i32)rows;
}

KERNEL(256, experts_route_place,
       (GLOBAL const i64* ids, u32 rows, u32 experts, u32 chunk, GLOBAL u32* counts,
        GLOBAL i32* order)) {
    SHARED(u32, buckets, 256);
    GLOBAL u32* next = counts + GROUP * BUCKETS(experts);
    u32 first = (u32)GROUP * chunk, end = min_(first + chunk, rows);
    for (u32 base = first; base < end; base += 256) {
        u32 row = base + THREAD, count = min_(end - base, 256u), own = 0, place = 0;
        if (row < end) {
            own = bucket_of(ids[row], experts);
            place = next[own];
        }
        buckets[THREAD] = own;
        BARRIER_GLOBAL(); // all places have been read
        if (row < end) {
            u32 earlier = 0, later = 0;
            for (u32 i = 0; i < count; i++) {
                u32 same = buckets[i] == own ? 1 : 0;
                earlier += i < THREAD ? same : 0;
                later += i > THREAD ? same : 0;
            }
            order[place + earlier] = (i32)row;
            if (later == 0) next[own] = place + earlier + 1;
        }
        BARRIER_GLOBAL();
    }
}

#define T f32
#include "dtype.h"
#include "experts_route.inc.h"
#include "undtype.h"

#define T f16
#include "dtype.h"
#include "experts_route.inc.h"
#include "undtype.h"

#define T bf16
#include "dtype.h"
#include "experts_route.inc.h"
#include "undtype.h"

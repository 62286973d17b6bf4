// 8-bit states: decode, and encode to the nearest code of any table.
//
//     n = number of borders below y         a border: midpoint of neighbouring values
//
// A search for n takes eight dependent loads. Instead each group makes itself a table over the bits
// of y:
//
//     a      = max(|y|, LOWEST)
//     bucket = max(fine(a), coarse(a))                      (1)
//     n      = upper byte of entry + low bits of a          (2)
//
// 1. Buckets divide octaves evenly: coarsely up to 2^-4, four times as finely above, as dynamic
//    maps have twice the codes in each decade. With at most one border in a bucket the result is exact,
//    and so it is for the default maps. A table for which that does not hold, or that could give
//    a code of the wrong sign, is searched instead (`notes`).
// 2. An entry is code << 24 | 0xFFFFFF - b, where b are the low bits of the border in the bucket:
//    the sum carries into the code above the border. Below zero, where the order is reversed, the
//    bits are inverted.
// 3. A second moment above zero never gets a code of zero: the entries of the unsigned table are
//    that of the first code above zero at least.
#ifndef HALFBYTE_OPTIM_CODES_H
#define HALFBYTE_OPTIM_CODES_H
#include "optim_table.h"

#define SIGNED_FINE 17u // the bits of a float32 below a bucket: 64 buckets an octave
#define SIGNED_COARSE 19u
#define SIGNED_LOWEST 0x34800000u // 2^-22, below the first border
#define SIGNED_BUCKETS 545u       // of each sign, which alternate; the last one is 1
#define UNSIGNED_FINE 16u
#define UNSIGNED_COARSE 18u
#define UNSIGNED_LOWEST 0x34000000u // 2^-23
#define UNSIGNED_BUCKETS 1121u
#define KNEE 0x3D800000u // 2^-4
#define ONE 0x3F800000u

#define CODES_BUCKETS (2 * SIGNED_BUCKETS + UNSIGNED_BUCKETS)

// What making the tables found out.
#define NOTE_SEARCH_SIGNED 0
#define NOTE_SEARCH_UNSIGNED 1
#define NOTE_POSITIVE 2 // the first code above zero, or 255
#define NOTES 3

// The bucket of a magnitude, given as its bits, which are LOWEST at least.
DEVICE u32 bucket_of(u32 bits, u32 fine, u32 coarse, u32 lowest) {
    u32 a = bits >> fine, b = (bits >> coarse) + ((KNEE >> fine) - (KNEE >> coarse));
    return max_(a, b) - ((KNEE >> fine) - (KNEE >> coarse) + (lowest >> coarse));
}

DEVICE u32 signed_bucket(u32 bits) {
    return bucket_of(bits, SIGNED_FINE, SIGNED_COARSE, SIGNED_LOWEST);
}

DEVICE u32 unsigned_bucket(u32 bits) {
    return bucket_of(bits, UNSIGNED_FINE, UNSIGNED_COARSE, UNSIGNED_LOWEST);
}

// The border between code i and the next, rounded once: halving is exact or, below the normal
// numbers, the sum is.
DEVICE float border(LOCAL const float* values, u32 i) {
    float a = values[i], b = values[i + 1], sum = a + b;
    return isfinite_(sum) ? 0.5f * sum : 0.5f * a + 0.5f * b;
}

// The definition: the number of borders below y.
DEVICE u32 search(LOCAL const float* values, float y) {
    u32 n = 0;
    for (u32 step = 128; step > 0; step /= 2) {
        if (y > border(values, n + step - 1)) n += step;
    }
    return n;
}

DEVICE float clamp_one(float y) { return y < -1.0f ? -1.0f : y > 1.0f ? 1.0f : y; }

// A code as the definition finds it, and the neighbour where the sign would change.
OUTLINE u32 search_signed(LOCAL const float* values, float y, float s) {
    u32 n = search(values, clamp_one(y));
    float value = values[n];
    if (s > 0.0f && value < 0.0f) return n < 255 ? n + 1 : n;
    if (s < 0.0f && value > 0.0f) return n > 0 ? n - 1 : n;
    return n;
}

OUTLINE u32 search_unsigned(LOCAL const float* values, float y, float s, u32 positive) {
    u32 n = search(values, clamp_one(y));
    return s > 0.0f && values[n] <= 0.0f ? positive : n;
}

// The nearest code of y in the upper byte.
DEVICE u32 encode_signed(LOCAL const u32* table, float y) {
    u32 negative = as_u32(y) >> 31;
    u32 bits = as_u32(LARGER(abs_(y), as_float(SIGNED_LOWEST)));
    u32 low = (bits ^ (0 - negative)) & ((1u << SIGNED_COARSE) - 1);
    return table[2 * signed_bucket(bits) + negative] + low;
}

// Of y for a moment s: zero or less has code 0.
DEVICE u32 encode_unsigned(LOCAL const u32* table, float y, float s) {
    u32 bits = as_u32(LARGER(y, as_float(UNSIGNED_LOWEST)));
    u32 low = bits & ((1u << UNSIGNED_COARSE) - 1);
    u32 entry = table[2 * SIGNED_BUCKETS + unsigned_bucket(bits)] + low;
    return s > 0.0f ? entry : 0;
}

// An entry whose border has the low bits b; those of the largest number where there is none.
DEVICE u32 entry_of(u32 code, u32 b) { return code << 24 | (0xFFFFFFu - b); }

// Where a border lies: its bucket, or `buckets` past the last number to be encoded.
DEVICE u32 signed_place(u32 bits) {
    return bits < SIGNED_LOWEST ? 0 : bits > ONE ? SIGNED_BUCKETS : signed_bucket(bits);
}

DEVICE u32 unsigned_place(u32 bits) {
    return bits < UNSIGNED_LOWEST ? 0 : bits >= ONE ? UNSIGNED_BUCKETS : unsigned_bucket(bits);
}

// Code `t` covers y in (below, above], and makes its entries: those of the buckets between its
// borders, and of that of one border. All 256 threads of a group, after a barrier.
OUTLINE void fill_signed(LOCAL const float* values, LOCAL u32* table, LOCAL u32* notes, u32 t) {
    const u32 mask = (1u << SIGNED_COARSE) - 1;
    u32 lowest = t == 0, highest = t == 255, search = 0;
    float below = lowest ? -2.0f : border(values, t - 1);
    float above = highest ? 2.0f : border(values, t);
    u32 below_bits = as_u32(abs_(below)), above_bits = as_u32(abs_(above));
    if (above > 0.0f) {
        // Numbers end at 1: a border at 1 is past the end.
        u32 from = below <= 0.0f ? 0 : signed_place(below_bits) + 1;
        u32 to = above_bits == ONE ? SIGNED_BUCKETS : signed_place(above_bits);
        for (u32 b = from; b <= to && b < SIGNED_BUCKETS; b++) {
            table[2 * b] = entry_of(t, b == to ? above_bits & mask : mask);
        }
        search |= above_bits < SIGNED_LOWEST || (from > to && to < SIGNED_BUCKETS);
    }
    if (below < 0.0f) {
        // The border above is in the first of the buckets here; y at the border is this code's.
        u32 bounded = above < 0.0f;
        u32 from = bounded ? signed_place(above_bits) : 0, end = signed_place(below_bits);
        for (u32 b = from; b < end; b++) {
            table[2 * b + 1] = entry_of(t, bounded && b == from ? ~above_bits & mask : mask);
        }
        // Smaller numbers become LOWEST, which must be above the border.
        search |= bounded && above_bits <= SIGNED_LOWEST;
        search |= bounded && from >= end && from < SIGNED_BUCKETS;
    }
    // Zero must be a code, or the nearest code of a small moment could have the other sign; and a
    // border at zero is in no bucket.
    search |= (below < 0.0f && above >= 0.0f && values[t] != 0.0f) || above == 0.0f;
    if (search) notes[NOTE_SEARCH_SIGNED] = 1;
}

OUTLINE void fill_unsigned(LOCAL const float* values, LOCAL u32* table, LOCAL u32* notes, u32 t) {
    if (t == 0 && values[0] < 0.0f) { // negative borders have no bucket
        notes[NOTE_SEARCH_UNSIGNED] = 1;
        return;
    }
    const u32 mask = (1u << UNSIGNED_COARSE) - 1;
    u32 positive = notes[NOTE_POSITIVE];
    float above = t == 255 ? 2.0f : border(values, t);
    u32 above_bits = as_u32(above);
    u32 from = t == 0 ? 0 : unsigned_place(as_u32(border(values, t - 1))) + 1;
    u32 to = unsigned_place(above_bits);
    for (u32 b = from; b <= to && b < UNSIGNED_BUCKETS; b++) {
        // Where this and the next code are raised to the same one (3) there is no border.
        u32 bounded = b == to && t >= positive;
        u32 low = bounded ? above_bits & mask : mask;
        table[2 * SIGNED_BUCKETS + b] = entry_of(max_(t, positive), low);
    }
    u32 search = above_bits < UNSIGNED_LOWEST || (from > to && to < UNSIGNED_BUCKETS);
    if (search) notes[NOTE_SEARCH_UNSIGNED] = 1;
}

// Loads the values of both codes, 256 each (an address of 0: none), and makes the tables. All 256
// threads of a group.
DEVICE void make_codes(u64 code1, u64 code2, LOCAL float* values, LOCAL u32* table,
                       LOCAL u32* notes) {
    if (code1 != 0) values[THREAD] = ADDRESS(const float, code1)[THREAD];
    if (code2 != 0) values[256 + THREAD] = ADDRESS(const float, code2)[THREAD];
    if (THREAD < NOTES) notes[THREAD] = THREAD == NOTE_POSITIVE ? 255 : 0;
    BARRIER();
    if (code2 != 0) {
        LOCAL const float* second = values + 256;
        u32 above = second[THREAD] > 0.0f;
        if (above && (THREAD == 0 || second[THREAD - 1] <= 0.0f)) notes[NOTE_POSITIVE] = THREAD;
    }
    BARRIER();
    if (code1 != 0) fill_signed(values, table, notes, THREAD);
    if (code2 != 0) fill_unsigned(values + 256, table, notes, THREAD);
    BARRIER();
}

#endif

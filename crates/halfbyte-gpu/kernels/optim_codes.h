// 8-bit states: decode, and encode to the nearest code of any table.
//
//     n = number of borders below y         a border: midpoint of neighbouring values
//
// A search for n takes eight dependent loads. Instead each group makes itself a table over the bits
// of y:
//
//     bucket of y = max(fine(|y|), coarse(|y|), 0)          (1)
//     entry       = code << 24 | low bits of the border in the bucket
//     n           = code + (low bits of y > low bits of the border)
//
// 1. Buckets divide octaves evenly: coarsely up to 2^-4, four times as finely above, as dynamic maps
//    have twice the codes in each decade. With at most one border in a bucket the result is exact,
//    and it is so for the default maps. A table for which that does not hold, or that could give a
//    code of the wrong sign, is searched instead (`notes`).
// 2. A second moment above zero never gets a code of zero: the entries of the unsigned table are
//    that of the first code above zero at least.
#ifndef HALFBYTE_OPTIM_CODES_H
#define HALFBYTE_OPTIM_CODES_H
#include "optim_table.h"

#define SIGNED_FINE 17u // the bits of a float32 below a bucket: 64 buckets an octave
#define SIGNED_COARSE 19u
#define SIGNED_LOWEST 0x34800000u // 2^-22, below the first border; all below it is bucket 0
#define SIGNED_BUCKETS 546u       // of each sign; the last one is 1
#define UNSIGNED_FINE 16u
#define UNSIGNED_COARSE 18u
#define UNSIGNED_LOWEST 0x34000000u // 2^-23
#define UNSIGNED_BUCKETS 1122u
#define KNEE 0x3D800000u // 2^-4
#define ONE 0x3F800000u

#define CODES_BUCKETS (2 * SIGNED_BUCKETS + UNSIGNED_BUCKETS)

// What making the tables found out.
#define NOTE_SEARCH_SIGNED 0
#define NOTE_SEARCH_UNSIGNED 1
#define NOTE_POSITIVE 2 // the first code above zero, or 255
#define NOTES 3

// The bucket of a magnitude, given as its bits.
DEVICE u32 bucket_of(u32 bits, u32 fine, u32 coarse, u32 lowest) {
    i32 from = 1 - (i32)(lowest >> coarse);
    i32 knee = from + (i32)(KNEE >> coarse) - (i32)(KNEE >> fine);
    i32 a = (i32)(bits >> coarse) + from, b = (i32)(bits >> fine) + knee;
    i32 bucket = max_(a, b);
    return (u32)max_(bucket, 0);
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

DEVICE u32 encode_signed(LOCAL const u32* table, float y) {
    const u32 mask = (1u << SIGNED_COARSE) - 1;
    u32 bits = as_u32(y), negative = bits >> 31;
    // Below zero the order is reversed, and the entries' low bits are inverted.
    u32 low = (bits ^ (0 - negative)) & mask;
    u32 entry = table[signed_bucket(bits & 0x7FFFFFFFu) + negative * SIGNED_BUCKETS];
    return (entry >> 24) + (low > (entry & mask) ? 1 : 0);
}

// Of y for a moment s: zero or less has code 0.
DEVICE u32 encode_unsigned(LOCAL const u32* table, float y, float s) {
    const u32 mask = (1u << UNSIGNED_COARSE) - 1;
    u32 bits = s > 0.0f ? as_u32(y) : 0;
    u32 entry = table[2 * SIGNED_BUCKETS + unsigned_bucket(bits)];
    u32 code = (entry >> 24) + ((bits & mask) > (entry & mask) ? 1 : 0);
    return s > 0.0f ? code : 0;
}

// Fills the buckets of code `code`: those above the border `below` and up to the border `above`,
// which is in the last of them. A border with bits past ONE is outside. True if a bucket has two.
DEVICE u32 fill(LOCAL u32* table, u32 code, u32 from, u32 to, u32 inside, u32 last, u32 low,
                u32 mask) {
    for (u32 b = from; b <= to && b <= last; b++) {
        table[b] = code << 24 | (b == to && inside ? low & mask : mask);
    }
    return inside && to <= last && (from > to || to == 0);
}

// Code `t` covers y in (below, above], and makes its entries. 256 threads, after a barrier.
OUTLINE void fill_signed(LOCAL const float* values, LOCAL u32* table, LOCAL u32* notes, u32 t) {
    const u32 mask = (1u << SIGNED_COARSE) - 1, last = SIGNED_BUCKETS - 1;
    u32 lowest = t == 0, highest = t == 255;
    float below = lowest ? -1.0f : border(values, t - 1);
    float above = highest ? 1.0f : border(values, t);
    u32 search = 0;
    if (highest || above > 0.0f) {
        u32 outside = highest || above >= 1.0f;
        u32 from = lowest || below <= 0.0f ? 0 : below >= 1.0f ? last + 1 : signed_bucket(as_u32(below)) + 1;
        u32 to = outside ? last + 1 : signed_bucket(as_u32(above));
        search |= fill(table, t, from, to, !outside, last, as_u32(above), mask);
    }
    if (lowest || below < 0.0f) {
        // From the side of zero: down to -above, whose border is in the first bucket, and before
        // that of -below.
        u32 bounded = !highest && above < 0.0f;
        u32 from = !bounded ? 0 : above < -1.0f ? last + 1 : signed_bucket(as_u32(above) & 0x7FFFFFFFu);
        u32 end = lowest || below < -1.0f ? last + 1 : signed_bucket(as_u32(below) & 0x7FFFFFFFu);
        for (u32 b = from; b < end && b <= last; b++) {
            u32 low = bounded && b == from ? ~as_u32(above) & mask : mask;
            table[SIGNED_BUCKETS + b] = t << 24 | low;
        }
        search |= bounded && from <= last && (from == 0 || from == end);
    }
    // Zero must be a code, or the nearest code of a small moment could have the other sign; and a
    // border at zero is in no bucket.
    u32 of_zero = (lowest || below < 0.0f) && (highest || above >= 0.0f);
    search |= (of_zero && values[t] != 0.0f) || (!highest && above == 0.0f);
    if (search) notes[NOTE_SEARCH_SIGNED] = 1;
}

OUTLINE void fill_unsigned(LOCAL const float* values, LOCAL u32* table, LOCAL u32* notes, u32 t) {
    const u32 mask = (1u << UNSIGNED_COARSE) - 1, last = UNSIGNED_BUCKETS - 1;
    u32 positive = notes[NOTE_POSITIVE], highest = t == 255;
    float below = t == 0 ? 0.0f : border(values, t - 1);
    float above = highest ? 1.0f : border(values, t);
    u32 outside = highest || above >= 1.0f;
    u32 from = t == 0 ? 0 : below >= 1.0f ? last + 1 : unsigned_bucket(as_u32(below)) + 1;
    u32 to = outside ? last + 1 : unsigned_bucket(as_u32(above));
    u32 code = max_(t, positive); // (2)
    // Where this and the next code are raised to the same one there is no border.
    u32 low = t < positive ? mask : as_u32(above);
    u32 search = fill(table + 2 * SIGNED_BUCKETS, code, from, to, !outside, last, low, mask);
    if (search || (t == 0 && values[0] < 0.0f)) notes[NOTE_SEARCH_UNSIGNED] = 1;
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

// halfbyte: exact
// Double quantization: scales to 8-bit codes of their distance from their mean.
//
//   absmax_sum       exact sums of parts
//   absmax_mean      offset = the sum / n, rounded once to nearest even
//   quantize_absmax  quantize_blockwise of absmax - offset, with the signed dynamic code
//
// A sum is an integer in units of 2^-149, held in nine digits of 32 bits that may overflow into the
// upper halves of 64: 2^31 additions a digit are safe, and the launcher takes no more. Integer
// addition has no order, so the mean does not depend on the size of the grid.
#include "encode8.h"
#include "tile.h"

#define SUM_THREADS 128
#define DIGITS 9
#define WORDS 10 // digits, then flags; in the end, one more digit
#define POSITIVE_INFINITY 1
#define NEGATIVE_INFINITY 2
#define NOT_A_NUMBER 4

KERNEL(128, absmax_sum, (GLOBAL const float* absmax, u64 n, GLOBAL i64* sums)) {
    // Digit d of a thread is word d * SUM_THREADS + THREAD: neighbours in neighbouring banks.
    SHARED(i64, digits, SUM_THREADS * DIGITS);
    SHARED(u32, flags, SUM_THREADS);
    for (u32 d = 0; d < DIGITS; d++) digits[d * SUM_THREADS + THREAD] = 0;
    u32 seen = 0;
    for (u64 i = GROUP * SUM_THREADS + THREAD; i < n; i += GROUPS * SUM_THREADS) {
        u32 bits = as_u32(absmax[i]), exponent = bits >> 23 & 255u, stored = bits & 0x7FFFFFu;
        int negative = bits >> 31 != 0;
        if (exponent == 255) {
            seen |= stored ? NOT_A_NUMBER : negative ? NEGATIVE_INFINITY : POSITIVE_INFINITY;
            continue;
        }
        u32 place = exponent ? exponent - 1 : 0;
        u64 mantissa = (u64)(exponent ? stored | 0x800000u : stored) << (place & 31);
        i64 low = (i64)(mantissa & 0xFFFFFFFFu), high = (i64)(mantissa >> 32);
        u32 at = (place >> 5) * SUM_THREADS + THREAD;
        digits[at] += negative ? -low : low;
        digits[at + SUM_THREADS] += negative ? -high : high;
    }
    flags[THREAD] = seen;
    BARRIER();
    if (THREAD < DIGITS) {
        i64 sum = 0;
        for (u32 i = 0; i < SUM_THREADS; i++) sum += digits[THREAD * SUM_THREADS + i];
        sums[GROUP * WORDS + THREAD] = sum;
    }
    if (THREAD == DIGITS) {
        u32 all = 0;
        for (u32 i = 0; i < SUM_THREADS; i++) all |= flags[i];
        sums[GROUP * WORDS + DIGITS] = all;
    }
}

// The digits divided by count, rounded to nearest even: see the core's double_quant.rs. A sum of
// 2^31 of the largest values has 309 bits with its sign: there is a digit more for it.
DEVICE float divide(LOCAL i64* digits, u64 count) {
    i64 carry = 0;
    for (u32 d = 0; d < WORDS; d++) {
        carry += digits[d];
        digits[d] = carry & 0xFFFFFFFF;
        carry >>= 32;
    }
    u32 sign = 0;
    if (carry < 0) {
        // Two's complement of all digits.
        sign = 0x80000000u;
        i64 one = 1;
        for (u32 d = 0; d < WORDS; d++) {
            one += ~digits[d] & 0xFFFFFFFF;
            digits[d] = one & 0xFFFFFFFF;
            one >>= 32;
        }
    }
    u64 remainder = 0; // below count, which is below 2^32
    for (u32 d = WORDS; d-- > 0;) {
        u64 dividend = remainder << 32 | (u64)digits[d];
        digits[d] = (i64)(dividend / count);
        remainder = dividend % count;
    }
    u32 top = WORDS - 1;
    while (top > 0 && digits[top] == 0) top--;
    u32 length = 32 * top + 32 - (u32)clz_((u32)digits[top]);
    u32 shift = length > 24 ? length - 24 : 0;
    // The 24 bits from the highest on, or from the unit on.
    u32 first = shift / 32;
    u64 above = first + 1 < WORDS ? (u64)digits[first + 1] << 32 : 0;
    u32 mantissa = (u32)((above | (u64)digits[first]) >> shift % 32) & 0xFFFFFFu;
    // The leading one of the mantissa adds 1 to the exponent field; that of a subnormal is 0.
    u32 bits = (shift << 23) + mantissa;
    // What was cut off, against one half.
    u64 cut_off = 2 * remainder, one_half = count;
    if (shift > 0) {
        u32 place = (shift - 1) / 32, below = (shift - 1) % 32;
        int lower = remainder != 0;
        for (u32 d = 0; d < place; d++) lower |= digits[d] != 0;
        u64 part = (u64)digits[place] & (((u64)2 << below) - 1);
        cut_off = 2 * part + (lower ? 1 : 0);
        one_half = (u64)2 << below;
    }
    if (cut_off > one_half || (cut_off == one_half && (bits & 1))) bits++;
    return as_float(bits | sign);
}

KERNEL(128, absmax_mean, (GLOBAL const i64* sums, u32 groups, u64 n, GLOBAL float* offset)) {
    SHARED(i64, total, WORDS);
    if (THREAD < WORDS) {
        i64 sum = 0;
        for (u32 i = 0; i < groups; i++) {
            i64 word = sums[(u64)i * WORDS + THREAD];
            sum = THREAD < DIGITS ? sum + word : sum | word;
        }
        total[THREAD] = sum;
    }
    BARRIER();
    if (THREAD != 0) return;
    u32 seen = (u32)total[DIGITS];
    total[DIGITS] = 0;
    switch (seen) {
    case 0: offset[0] = n ? divide(total, n) : 0.0f; break;
    case POSITIVE_INFINITY: offset[0] = as_float(0x7F800000u); break;
    case NEGATIVE_INFINITY: offset[0] = as_float(0xFF800000u); break;
    default: offset[0] = as_float(0x7FC00000u);
    }
}

// The magnitude of eight distances from the mean.
DEVICE u32 distances_magnitude(const u32* w, float mean) {
    float x[8];
    UNROLL
    for (u32 i = 0; i < 8; i++) x[i] = as_float(w[i]) - mean;
    return magnitude8(x);
}

#define QUANTIZE quantize_absmax
#define CODE_PARAMETERS GLOBAL const float* offset
#define BORDER(i) DYNAMIC_SIGNED_BORDERS[i]
#define ELEMENT(x) ((x) - offset[0])
#define MAGNITUDE(w) distances_magnitude(w, offset[0])
#define T f32
#include "quantize_blockwise.inc.h"

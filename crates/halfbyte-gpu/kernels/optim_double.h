// float64 numbers that are not negative, as their bits: sums and ratios of norms, rounded to
// nearest even as IEEE 754 says. In integers, because Intel's GPUs (and OpenCL in general) need not
// have float64; a tensor has few of these operations.
#ifndef HALFBYTE_OPTIM_DOUBLE_H
#define HALFBYTE_OPTIM_DOUBLE_H
#include "port.h"

#define DOUBLE_INFINITY 0x7FF0000000000000ull
#define DOUBLE_NAN 0x7FF8000000000000ull
#define DOUBLE_ONE 0x3FF0000000000000ull
#define DOUBLE_SIGN 0x8000000000000000ull

// A number above zero: m * 2^(e - 63), the top bit of m set. The lowest bit of m also stands for
// any bits below it.
struct Scaled {
    i32 e;
    u64 m;
};

DEVICE u32 leading_zeros(u64 m) {
    return m >> 32 ? clz_((u32)(m >> 32)) : 32 + clz_((u32)m);
}

DEVICE struct Scaled unpack(u64 bits) {
    struct Scaled x;
    u64 fraction = bits & 0xFFFFFFFFFFFFFull;
    i32 exponent = (i32)(bits >> 52);
    if (exponent == 0) { // subnormal
        u32 zeros = leading_zeros(fraction);
        x.m = fraction << zeros;
        x.e = -1011 - (i32)zeros;
    } else {
        x.m = (fraction | 1ull << 52) << 11;
        x.e = exponent - 1023;
    }
    return x;
}

// Shifts right, keeping in the lowest bit whether any bit was lost.
DEVICE u64 shift_sticky(u64 m, u32 by) {
    if (by == 0) return m;
    if (by >= 64) return m != 0;
    return m >> by | (m << (64 - by) != 0);
}

// Rounds to a format of `width` fraction bits and the exponent bias `bias`.
DEVICE u64 pack(struct Scaled x, u32 width, i32 bias) {
    i32 exponent = x.e + bias;
    if (exponent > 2 * bias) return (u64)(2 * bias + 1) << width; // infinity
    u64 base = 0;
    if (exponent < 1) x.m = shift_sticky(x.m, (u32)(1 - exponent));
    else base = (u64)(exponent - 1) << width; // the leading bit of m adds one
    u32 shift = 63 - width;
    u64 kept = x.m >> shift, rest = x.m << (64 - shift);
    u64 up = rest > 1ull << 63 || (rest == 1ull << 63 && (kept & 1)) ? 1 : 0;
    return base + kept + up;
}

DEVICE u64 pack_double(struct Scaled x) { return pack(x, 52, 1023); }

// A float that is not negative, or NaN. Exact.
DEVICE u64 double_of(float x) {
    u32 bits = as_u32(x) & 0x7FFFFFFFu;
    if (bits > 0x7F800000u) return DOUBLE_NAN;
    if (bits == 0x7F800000u) return DOUBLE_INFINITY;
    if (bits >= 0x00800000u) return ((u64)bits << 29) + (896ull << 52);
    if (bits == 0) return 0;
    struct Scaled y;
    u32 zeros = clz_(bits);
    y.m = (u64)(bits << zeros) << 32;
    y.e = -118 - (i32)zeros; // the top bit of 32 stands for 2^(31 - 149)
    return pack_double(y);
}

DEVICE float double_to_float(u64 a, u32 negative) {
    u32 bits;
    if (a > DOUBLE_INFINITY) bits = 0x7FC00000u;
    else if (a == DOUBLE_INFINITY) bits = 0x7F800000u;
    else bits = a == 0 ? 0 : (u32)pack(unpack(a), 23, 127);
    return as_float(bits | (negative ? 0x80000000u : 0));
}

DEVICE u64 double_add(u64 a, u64 b) {
    u64 low = min_(a, b), high = max_(a, b);
    if (high >= DOUBLE_INFINITY || low == 0) return high; // NaN is above infinity
    struct Scaled x = unpack(high), y = unpack(low);
    u64 sum = (x.m >> 1) + shift_sticky(y.m, (u32)(x.e - y.e) + 1);
    if (sum >> 63) x.e += 1;
    else sum <<= 1;
    x.m = sum;
    return pack_double(x);
}

DEVICE u64 double_multiply(u64 a, u64 b) {
    u64 low = min_(a, b), high = max_(a, b);
    if (high > DOUBLE_INFINITY || (high == DOUBLE_INFINITY && low == 0)) return DOUBLE_NAN;
    if (high == DOUBLE_INFINITY || low == 0) return high == DOUBLE_INFINITY ? high : 0;
    struct Scaled x = unpack(a), y = unpack(b);
    u64 x1 = x.m >> 32, x0 = (u32)x.m, y1 = y.m >> 32, y0 = (u32)y.m;
    u64 middle = (x0 * y0 >> 32) + (u32)(x1 * y0) + x0 * y1;
    u64 upper = x1 * y1 + (x1 * y0 >> 32) + (middle >> 32);
    u64 lower = middle << 32 | (u32)(x0 * y0);
    x.e += y.e + 1;
    if (!(upper >> 63)) {
        upper = upper << 1 | lower >> 63;
        lower <<= 1;
        x.e -= 1;
    }
    x.m = upper | (lower != 0);
    return pack_double(x);
}

// Of two numbers a < b, which are neither infinite (a) nor NaN.
DEVICE u64 double_divide(u64 a, u64 b) {
    if (a == 0 || b == DOUBLE_INFINITY) return 0;
    struct Scaled x = unpack(a), y = unpack(b);
    u64 rest = x.m >> 11, divisor = y.m >> 11, quotient = 0;
    x.e -= y.e;
    if (rest < divisor) {
        rest <<= 1;
        x.e -= 1;
    }
    for (u32 bit = 0; bit < 56; bit++) {
        quotient <<= 1;
        if (rest >= divisor) {
            rest -= divisor;
            quotient |= 1;
        }
        rest <<= 1;
    }
    x.m = quotient << 8 | (rest != 0);
    return pack_double(x);
}

DEVICE u64 double_sqrt(u64 a) {
    if (a == 0 || a >= DOUBLE_INFINITY) return a;
    struct Scaled x = unpack(a);
    u64 square = x.m >> 11, root = 0, rest = 0; // square * 2^(e - 52)
    if (x.e & 1) {
        square <<= 1;
        x.e -= 1;
    }
    for (u32 digit = 0; digit < 56; digit++) { // of two bits of square, then zeros
        u64 two = digit < 27 ? square >> (52 - 2 * digit) & 3 : 0;
        rest = rest << 2 | two;
        u64 trial = root << 2 | 1;
        root <<= 1;
        if (rest >= trial) {
            rest -= trial;
            root |= 1;
        }
    }
    x.e /= 2;
    x.m = root << 8 | (rest != 0);
    return pack_double(x);
}

#endif

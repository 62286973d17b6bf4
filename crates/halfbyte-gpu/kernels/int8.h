// What the kernels of LLM.int8() share: the definition's scalar steps (the core's ops/int8/scalar.rs),
// each rounded once.
#ifndef HALFBYTE_INT8_H
#define HALFBYTE_INT8_H
#include "port.h"

// The float32 nearest to 1 / 127 and to 1 / 127^2.
#define INV_127 7.874015718698502e-03f
#define INV_127_SQUARED 6.200012285262346e-05f

// A value of each dtype in the low bits of a register.
#define REGISTER_f32(bits) as_float(bits)
#define REGISTER_f16(bits) half_to_float((u16)(bits))
#define REGISTER_bf16(bits) as_float((u32)(bits) << 16)

#define INFINITY_BITS 0x7F800000u
#define NAN_BITS 0x7FC00000u
#define LARGEST_BITS 0x7F7FFFFFu

// The bits of a magnitude, which compare as the magnitudes do. NaN lies above infinity.
DEVICE u32 magnitude_bits(float x) { return as_u32(x) & 0x7FFFFFFFu; }

// A threshold that is not above zero means no outliers; NaN is none.
DEVICE bool is_outlier(u32 magnitude, float threshold) {
    return threshold > 0.0f && magnitude >= as_u32(threshold) && magnitude <= INFINITY_BITS;
}

// A row's statistic from the largest magnitude: one NaN for all.
DEVICE float row_stat(u32 most) { return as_float(most > INFINITY_BITS ? NAN_BITS : most); }

// The factor that takes the statistic to 127; finite, or NaN for NaN.
DEVICE float code_scale(float stat) {
    if (stat == 0.0f) return 0.0f;
    float scale = div_(127.0f, stat);
    return as_u32(scale) == INFINITY_BITS ? as_float(LARGEST_BITS) : scale;
}

// To nearest even in -127..127, as a byte; NaN becomes 0.
DEVICE u32 encode8(float x, float scale) {
    float y = x * scale;
    y = y > 127.0f ? 127.0f : y;
    y = y < -127.0f ? -127.0f : y;
    // Added to 1.5 * 2^23, a number of this size is rounded to an integer in the low bits.
    return y == y ? as_u32(y + 12582912.0f) & 0xFFu : 0u;
}

// One weight as dequantization gives it.
DEVICE float decode8(i32 code, float scale) { return (float)code * scale * INV_127; }

// A sum under both of its scales.
DEVICE float scaled8(i32 sum, float row, float column) {
    return (float)sum * (row * INV_127_SQUARED) * column;
}

#endif

// The nearest of up to 256 codes.
#ifndef HALFBYTE_ENCODE8_H
#define HALFBYTE_ENCODE8_H
#include "cells8.h"
#include "port.h"

// What is known about a code: one of the default maps, or nothing.
#define KIND_OTHER 0
#define KIND_SIGNED 1
#define KIND_UNSIGNED 2

// `(a + b) / 2`, rounded once. A sum that overflows has large terms, whose halves are exact; any
// other is rounded once and halved exactly, or is exact and rounded by the halving.
DEVICE float midpoint(float a, float b) {
    float sum = a + b;
    return isfinite_(sum) ? sum * 0.5f : a * 0.5f + b * 0.5f;
}

// The number of borders below y (none is below NaN), of 255 in ascending order.
DEVICE u32 search8(float y, LOCAL const float* borders) {
    u32 below = 0;
    UNROLL
    for (u32 step = 128; step > 0; step >>= 1) {
        below += y > borders[below + step - 1] ? step : 0u;
    }
    return below;
}

// NaN stays NaN.
DEVICE float clamp_to_one(float y) { return y < -1.0f ? -1.0f : y > 1.0f ? 1.0f : y; }

// The default maps need no search: a cell of magnitudes (cells8.h) has one border at most, and a
// table says how many lie below it. borders[255] is infinity. y is not NaN.
#define CELL8_FLOOR 1.1920929e-7f // 2^-23, below every border above zero

DEVICE u32 start8(float magnitude, LOCAL const u8* starts) {
    return starts[(as_u32(magnitude) >> CELL8_SHIFT) - FLOOR_CELL];
}

DEVICE float into_cells8(float y) {
    y = y > CELL8_FLOOR ? y : CELL8_FLOOR;
    return y < 1.0f ? y : 1.0f;
}

// Index 127 is zero, and 0..=126 mirror 128..=254.
DEVICE u32 encode_signed(float y, LOCAL const float* borders, LOCAL const u8* starts) {
    float magnitude = into_cells8(abs_(y));
    u32 start = start8(magnitude, starts);
    float border = borders[127 + start];
    if (y < 0.0f) {
        u32 steps = start + (magnitude >= border ? 1u : 0u);
        return 127 - min_(steps, 127u);
    }
    return 127 + start + (magnitude > border ? 1u : 0u);
}

DEVICE u32 encode_unsigned(float y, LOCAL const float* borders, LOCAL const u8* starts) {
    float magnitude = into_cells8(y);
    u32 start = start8(magnitude, starts);
    return start + (magnitude > borders[start] ? 1u : 0u);
}

#endif

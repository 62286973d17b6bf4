// The nearest of up to 256 codes.
#ifndef HALFBYTE_ENCODE8_H
#define HALFBYTE_ENCODE8_H
#include "cells8.h"
#include "eight.h"

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

// The default maps need no search: one look-up in a table over the upper bits of y (cells8.h) and
// an addition. With bits = those of |y|, no number being nearer to zero than the first border,
//
//     z    = bits, inverted below zero: z ascends with y on either side
//     code = the upper byte of cells[upper bits of z] + z
//
// A cell holds one border at most. Its word is (code << 24) + 0xFFFFFF - (z of the border), code
// being the one below the border: above it the sum carries into the next. Twelve of the upper bits
// tell all cells apart. y is not NaN, and |y| is 1 and an ulp at most.

DEVICE u32 cell_word(LOCAL const U4* cells, u32 offset) {
    return *(LOCAL const u32*)((LOCAL const u8*)cells + (offset & 0x3FFCu) - 4 * CELLS8_FIRST);
}

// The nearest code in the upper byte.
DEVICE u32 nearest_signed(float y, LOCAL const U4* cells) {
    u32 bits = as_u32(LARGER(abs_(y), as_float(SIGNED_LOWEST8)));
    u32 z = bits ^ (u32)((i32)as_u32(y) >> 31);
    return cell_word(cells, z >> (SIGNED_SHIFT8 - 2)) + z;
}

DEVICE u32 nearest_unsigned(float y, LOCAL const U4* cells) {
    u32 z = as_u32(LARGER(y, as_float(UNSIGNED_LOWEST8)));
    return cell_word(cells, z >> (UNSIGNED_SHIFT8 - 2)) + z;
}

#if OPENCL
#define FOURS(words) ((__constant const U4*)(words))
#else
#define FOURS(words) ((const U4*)(words))
#endif

// The table of a map goes to where it is looked up. All 256 threads of a group take part.
DEVICE void copy_signed_cells(LOCAL U4* cells) {
    const u32 below = SIGNED_BELOW_WORDS8 / 4, above = SIGNED_ABOVE_WORDS8 / 4;
    UNROLL
    for (u32 k = 0; k < (below + above + 255) / 256; k++) {
        u32 i = THREAD + 256 * k, to = SIGNED_BELOW_AT8 / 4 + i;
        if (i >= below) to += (SIGNED_ABOVE_AT8 - SIGNED_BELOW_AT8) / 4 - below;
        if (i < below + above) cells[to] = FOURS(DYNAMIC_SIGNED_CELLS)[i];
    }
}

DEVICE void copy_unsigned_cells(LOCAL U4* cells) {
    for (u32 i = THREAD; i < UNSIGNED_ABOVE_WORDS8 / 4; i += 256) {
        cells[UNSIGNED_ABOVE_AT8 / 4 + i] = FOURS(DYNAMIC_UNSIGNED_CELLS)[i];
    }
}

#endif

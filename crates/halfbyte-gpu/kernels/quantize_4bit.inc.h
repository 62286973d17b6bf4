// The kernel of quantize_4bit.cu for one code and one dtype.
#include "dtype.h"

// Eight codes of any block as four bytes, in memory order from the low byte on; elements from
// `first` on.
DEVICE u32 PASTE(NAMED(QUANTIZE), _codes)(float* x, u32 magnitude, LOCAL const float* borders,
                                          LOCAL const u32* codes, u64 first, u64 n) {
    float reciprocal = reciprocal8(magnitude, x);
    u32 word = 0;
    if (magnitude < 0x7F800000u) {
        UNROLL
        for (u32 i = 0; i < 8; i++) word += ENCODE(x[i] * reciprocal, borders, codes, i);
    } else {
        for (u32 i = 0; i < 8; i++) {
            u32 zero = x[i] * reciprocal == 0.0f || first + i >= n;
            word |= (zero ? ZERO_CODE : 0u) << PLACE(i);
        }
    }
    return word;
}

KERNEL(256, NAMED(QUANTIZE),
       (GLOBAL const T* input, GLOBAL u8* packed, GLOBAL float* absmax, u64 n, u32 shift)) {
    SHARED(float, borders, 32);
    SHARED(u32, codes, CODE_WORDS);
    SHARED(u32, scratch, 256);
    u64 tile = GROUP * TILE, first = tile + 8 * THREAD;
    u32 whole = tile + TILE <= n && IS_ALIGNED(input, 16) && IS_ALIGNED(packed, 4);
    u32 w[UNITS * UNIT_WORDS], most[UNITS];
    if (whole) {
        UNROLL
        for (u32 u = 0; u < UNITS; u++) {
            LOAD_UNIT(input + first + UNIT_STRIDE * u, w + UNIT_WORDS * u);
        }
    }
    if (THREAD < 32) borders[THREAD] = as_float(CELL_BORDERS[THREAD]);
    PLACE_CODES(codes);
    BARRIER();

    UNROLL
    for (u32 u = 0; u < UNITS; u++) {
        u64 at = first + UNIT_STRIDE * u;
        most[u] = whole ? UNIT_MAGNITUDE(w + UNIT_WORDS * u)
                        : PASTE(edge_magnitude_, T)(input, at, n);
    }
    block_magnitudes(most, shift, scratch);
    store_magnitudes(most, shift, absmax, tile, n);

    if (whole && all_ordinary(most)) {
        UNROLL
        for (u32 u = 0; u < UNITS; u++) {
            float x[8], reciprocal = reciprocal_ordinary(most[u]);
            u32 word = 0;
            UNIT_FLOATS(w + UNIT_WORDS * u, x);
            UNROLL
            for (u32 i = 0; i < 8; i++) word += ENCODE(x[i] * reciprocal, borders, codes, i);
            *(GLOBAL u32*)(packed + (first + UNIT_STRIDE * u) / 2) = word;
        }
        return;
    }
    // Other blocks take their elements once more.
    for (u32 u = 0; u < UNITS; u++) {
        u64 at = first + UNIT_STRIDE * u;
        if (at >= n) break;
        u32 magnitude = u < 2 ? (u == 0 ? most[0] : most[1]) : (u == 2 ? most[2] : most[3]);
        float x[8];
        if (whole) {
            LOAD8(input + at, x);
        } else {
            UNROLL
            for (u32 i = 0; i < 8; i++) x[i] = at + i < n ? LOAD(input, at + i) : 0.0f;
        }
        u32 word = PASTE(NAMED(QUANTIZE), _codes)(x, magnitude, borders, codes, at, n);
        if (whole) {
            *(GLOBAL u32*)(packed + at / 2) = word;
        } else {
            for (u32 i = 0; i < 4; i++) {
                if (at + 2 * i < n) packed[at / 2 + i] = (u8)(word >> 8 * i);
            }
        }
    }
}
#include "undtype.h"

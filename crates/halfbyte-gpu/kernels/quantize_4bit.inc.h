// The kernel of quantize_4bit.cu for one code and one dtype.
#include "dtype.h"

// Eight codes as four bytes, in memory order from the low byte on; elements from `first` on.
DEVICE u32 PASTE(NAMED(QUANTIZE), _codes)(float* x, u32 magnitude, LOCAL const float* borders,
                                          LOCAL const u32* codes, u64 first, u64 n) {
    float reciprocal = reciprocal8(magnitude, x);
    u32 word = 0;
    if (magnitude < 0x7F800000u) {
        UNROLL
        for (u32 i = 0; i < 8; i++) {
            word |= ENCODE(x[i] * reciprocal, borders, codes) << PLACE(i);
        }
    } else {
        for (u32 i = 0; i < 8; i++) {
            int zero = x[i] * reciprocal == 0.0f || first + i >= n;
            word |= (zero ? ZERO_CODE : 0u) << PLACE(i);
        }
    }
    return word;
}

KERNEL(256, NAMED(QUANTIZE),
       (GLOBAL const T* input, GLOBAL u8* packed, GLOBAL float* absmax, u64 n, u32 shift)) {
    SHARED(float, borders, 32);
    SHARED(u32, codes, 32);
    SHARED(u32, scratch, 256);
    u64 tile = GROUP * 4096, first = tile + 8 * THREAD;
    int whole = tile + 4096 <= n && IS_ALIGNED(input, 16) && IS_ALIGNED(packed, 4);
    float x[2 * 8];
    u32 most[2];
    UNROLL
    for (u32 u = 0; u < 2; u++) {
        u64 at = first + 2048 * u;
        if (whole) {
            LOAD8(input + at, x + 8 * u);
        } else {
            UNROLL
            for (u32 i = 0; i < 8; i++) x[8 * u + i] = at + i < n ? LOAD(input, at + i) : 0.0f;
        }
        most[u] = magnitude8(x + 8 * u);
    }
    if (THREAD < 32) {
        borders[THREAD] = as_float(CELL_BORDERS[THREAD]);
        codes[THREAD] = CELL_CODES[THREAD];
    }
    BARRIER();

    u32 threads = (1u << shift) / 8;
    if (threads > 256) { // one block of 4096
        most[0] = most[1] = max_(most[0], most[1]);
        threads = 256;
    }
    most[0] = set_max(most[0], threads, scratch);
    most[1] = set_max(most[1], threads, scratch);
    UNROLL
    for (u32 u = 0; u < 2; u++) {
        u64 at = first + 2048 * u;
        if ((at & ((1u << shift) - 1)) == 0 && at < n) absmax[at >> shift] = as_float(most[u]);
        u32 word = PASTE(NAMED(QUANTIZE), _codes)(x + 8 * u, most[u], borders, codes, at, n);
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

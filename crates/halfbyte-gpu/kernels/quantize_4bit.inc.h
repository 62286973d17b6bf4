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
    u64 tile = GROUP * 4096, near = tile + 8 * THREAD, far = near + 2048;
    int whole = tile + 4096 <= n && IS_ALIGNED(input, 16) && IS_ALIGNED(packed, 4);
    float x[8], z[8];
    if (whole) {
        LOAD8(input + near, x);
        LOAD8(input + far, z);
    } else {
        for (u32 i = 0; i < 8; i++) {
            x[i] = near + i < n ? LOAD(input, near + i) : 0.0f;
            z[i] = far + i < n ? LOAD(input, far + i) : 0.0f;
        }
    }
    if (THREAD < 32) {
        borders[THREAD] = as_float(CELL_BORDERS[THREAD]);
        codes[THREAD] = CELL_CODES[THREAD];
    }
    BARRIER();

    u32 x_most = magnitude8(x), z_most = magnitude8(z);
    u32 threads = (1u << shift) / 8;
    if (threads > 256) { // one block of 4096
        x_most = z_most = max_(x_most, z_most);
        threads = 256;
    }
    x_most = set_max(x_most, threads, scratch);
    z_most = set_max(z_most, threads, scratch);
    u64 in_block = (1u << shift) - 1;
    if ((near & in_block) == 0 && near < n) absmax[near >> shift] = as_float(x_most);
    if ((far & in_block) == 0 && far < n) absmax[far >> shift] = as_float(z_most);

    u32 x_word = PASTE(NAMED(QUANTIZE), _codes)(x, x_most, borders, codes, near, n);
    u32 z_word = PASTE(NAMED(QUANTIZE), _codes)(z, z_most, borders, codes, far, n);
    if (whole) {
        *(GLOBAL u32*)(packed + near / 2) = x_word;
        *(GLOBAL u32*)(packed + far / 2) = z_word;
    } else {
        for (u32 i = 0; i < 4; i++) {
            if (near + 2 * i < n) packed[near / 2 + i] = (u8)(x_word >> 8 * i);
            if (far + 2 * i < n) packed[far / 2 + i] = (u8)(z_word >> 8 * i);
        }
    }
}
#include "undtype.h"

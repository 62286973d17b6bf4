// What quantizing kernels share: a group of 256 threads takes a tile of 8192 elements, which
// are whole blocks of any size. A thread has four units of 8 neighbours, 2048 elements apart, so
// that a block is shared by an aligned set of threads, and the input is read once. Until they are
// encoded, elements are kept as they were loaded.
#ifndef HALFBYTE_TILE_H
#define HALFBYTE_TILE_H
#include "eight.h"

#define TILE 8192
#define UNITS 4
#define UNIT_STRIDE 2048

// Words of a unit.
#define UNIT_WORDS PASTE(unit_words_, T)
#define unit_words_f32 8
#define unit_words_f16 4
#define unit_words_bf16 4

#define LOAD_UNIT(p, w) load_unit_words((GLOBAL const U4*)(p), UNIT_WORDS, w)
#define UNIT_MAGNITUDE(w) PASTE(magnitude_, T)(w)
#define UNIT_FLOATS(w, x) PASTE(floats8_, T)(w, x)

DEVICE void load_unit_words(GLOBAL const U4* from, u32 words, u32* w) {
    UNROLL
    for (u32 i = 0; i < words; i += 4) {
        U4 v = from[i / 4];
        w[i] = v.x, w[i + 1] = v.y, w[i + 2] = v.z, w[i + 3] = v.w;
    }
}

DEVICE void floats8_f32(const u32* w, float* x) {
    UNROLL
    for (u32 i = 0; i < 8; i++) x[i] = as_float(w[i]);
}

DEVICE void floats8_f16(const u32* w, float* x) {
    UNROLL
    for (u32 i = 0; i < 4; i++) pair_f16(w[i], x + 2 * i);
}

DEVICE void floats8_bf16(const u32* w, float* x) {
    UNROLL
    for (u32 i = 0; i < 4; i++) pair_bf16(w[i], x + 2 * i);
}

// ---- magnitudes: float32, as bits; infinity and then NaN above all numbers ----------------------

DEVICE u32 magnitude_f32(const u32* w) {
    u32 most = 0;
    UNROLL
    for (u32 i = 0; i < 8; i++) {
        u32 bits = w[i] & 0x7FFFFFFFu;
        most = max_(most, bits);
    }
    return most;
}

// The larger of the upper and the larger of the lower halves, neither with a sign. Magnitudes of
// 16-bit floats are ordered as integers; sm_80 compares them as bfloat16, which gives another NaN.
DEVICE u32 larger_halves(u32 a, u32 b) {
#if CUDA && !EMULATED && __CUDA_ARCH__ >= 900
    u32 most;
    asm("max.u16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
    return most;
#elif CUDA && !EMULATED && __CUDA_ARCH__ >= 800
    u32 most;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
    return most;
#else
    u32 low_a = a & 0xFFFFu, low_b = b & 0xFFFFu;
    u32 high_a = a & 0xFFFF0000u, high_b = b & 0xFFFF0000u;
    return max_(high_a, high_b) | max_(low_a, low_b);
#endif
}

DEVICE u32 magnitude_halves(const u32* w) {
    u32 most = w[0] & 0x7FFF7FFFu;
    UNROLL
    for (u32 i = 1; i < 4; i++) most = larger_halves(most, w[i] & 0x7FFF7FFFu);
    return most;
}

DEVICE u32 magnitude_bf16(const u32* w) {
    u32 most = magnitude_halves(w), low = most << 16, high = most & 0xFFFF0000u;
    return max_(low, high);
}

DEVICE u32 magnitude_f16(const u32* w) {
    u32 most = magnitude_halves(w), low = most & 0xFFFFu, high = most >> 16;
    return as_u32(half_to_float((u16)max_(low, high)));
}

// Of a unit that is loaded one by one: `at` may lie past the end.
#define EDGE_MAGNITUDE(T_)                                                                         \
    DEVICE u32 edge_magnitude_##T_(GLOBAL const T_* input, u64 at, u64 n) {                        \
        u32 most = 0;                                                                              \
        for (u64 i = at; i < at + 8 && i < n; i++) {                                               \
            u32 bits = as_u32(load_##T_(input, i)) & 0x7FFFFFFFu;                                  \
            most = max_(most, bits);                                                               \
        }                                                                                          \
        return most;                                                                               \
    }
EDGE_MAGNITUDE(f32)
EDGE_MAGNITUDE(f16)
EDGE_MAGNITUDE(bf16)

// set_max of each unit. `scratch` has a word per thread.
DEVICE void set_max_units(u32* most, u32 threads, LOCAL u32* scratch) {
#if HAVE_SHUFFLE
#if CUDA && !EMULATED && __CUDA_ARCH__ >= 800
    if (threads >= 32) {
        UNROLL
        for (u32 u = 0; u < UNITS; u++) most[u] = __reduce_max_sync(0xFFFFFFFFu, most[u]);
    } else
#endif
    {
        UNROLL
        for (u32 mask = 1; mask < 32; mask <<= 1) {
            if (mask < threads) {
                UNROLL
                for (u32 u = 0; u < UNITS; u++) {
                    u32 other = shuffle_xor(most[u], mask);
                    most[u] = max_(most[u], other);
                }
            }
        }
    }
    if (threads > 32) {
        BARRIER();
        if (LANE == 0) {
            UNROLL
            for (u32 u = 0; u < UNITS; u++) scratch[UNITS * (THREAD / 32) + u] = most[u];
        }
        BARRIER();
        u32 first = (THREAD & ~(threads - 1)) / 32;
        for (u32 i = first; i < first + threads / 32; i++) {
            UNROLL
            for (u32 u = 0; u < UNITS; u++) {
                u32 other = scratch[UNITS * i + u];
                most[u] = max_(most[u], other);
            }
        }
    }
#else
    for (u32 u = 0; u < UNITS; u++) most[u] = set_max(most[u], threads, scratch);
#endif
}

// The magnitudes of units become those of their blocks of 2^shift elements.
DEVICE void block_magnitudes(u32* most, u32 shift, LOCAL u32* scratch) {
    u32 threads = (1u << shift) / 8;
    if (threads > 256) { // blocks of two units
        most[0] = most[1] = max_(most[0], most[1]);
        most[2] = most[3] = max_(most[2], most[3]);
        threads = 256;
    }
    set_max_units(most, threads, scratch);
}

// Writes the scales of the blocks that begin in this thread's units.
DEVICE void store_magnitudes(const u32* most, u32 shift, GLOBAL float* absmax, u64 tile, u64 n) {
    u32 inside = (1u << shift) - 1, first = 8 * THREAD;
    u32 left = (u32)min_(n - tile, (u64)TILE);
    if ((first & inside) != 0) return;
    GLOBAL float* to = absmax + (tile >> shift) + (first >> shift);
    UNROLL
    for (u32 u = 0; u < UNITS; u++) {
        u32 at = UNIT_STRIDE * u;
        if ((at & inside) == 0 && first + at < left) to[at >> shift] = as_float(most[u]);
    }
}

// ---- reciprocals --------------------------------------------------------------------------------

// A magnitude that needs no care: zero, or one whose reciprocal and the steps to it are normal.
#define ORDINARY_LOWEST 0x08000000u  // 2^-111
#define ORDINARY_HIGHEST 0x77800000u // 2^112

DEVICE u32 all_ordinary(const u32* most) {
    u32 lowest = most[0] - 1, highest = most[0]; // of zero: the largest number
    UNROLL
    for (u32 u = 1; u < UNITS; u++) {
        u32 below = most[u] - 1;
        lowest = min_(lowest, below);
        highest = max_(highest, most[u]);
    }
    return lowest >= ORDINARY_LOWEST && highest <= ORDINARY_HIGHEST;
}

// 1 / magnitude rounded to nearest even, of an ordinary one. That of zero is finite: it multiplies
// zeros.
DEVICE float reciprocal_ordinary(u32 magnitude) {
    float a = as_float(max_(magnitude, ORDINARY_LOWEST));
#if CUDA && !EMULATED
    // What rcp.rn does between 2^-126 and 2^126, without asking whether it is there.
    float near;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(near) : "f"(a));
    return fma_(near, -fma_(a, near, -1.0f), near);
#else
    return div_(1.0f, a);
#endif
}

#endif

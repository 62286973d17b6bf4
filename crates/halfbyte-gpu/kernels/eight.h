// Eight elements at a time between memory and float registers, and sets of threads that share a
// block.
#ifndef HALFBYTE_EIGHT_H
#define HALFBYTE_EIGHT_H
#include "port.h"

#define IS_ALIGNED(p, bytes) (((u64)(p) & ((bytes) - 1)) == 0)

// ---- loads: p is aligned to 16 bytes ------------------------------------------------------------

DEVICE void load8_f32(GLOBAL const f32* p, float* x) {
    U4 a = ((GLOBAL const U4*)p)[0], b = ((GLOBAL const U4*)p)[1];
    x[0] = as_float(a.x), x[1] = as_float(a.y), x[2] = as_float(a.z), x[3] = as_float(a.w);
    x[4] = as_float(b.x), x[5] = as_float(b.y), x[6] = as_float(b.z), x[7] = as_float(b.w);
}

DEVICE void pair_bf16(u32 v, float* x) {
    x[0] = as_float(v << 16);
    x[1] = as_float(v & 0xFFFF0000u);
}

DEVICE void load8_bf16(GLOBAL const bf16* p, float* x) {
    U4 v = *(GLOBAL const U4*)p;
    pair_bf16(v.x, x), pair_bf16(v.y, x + 2), pair_bf16(v.z, x + 4), pair_bf16(v.w, x + 6);
}

DEVICE void pair_f16(u32 v, float* x) {
    x[0] = half_to_float((u16)v);
    x[1] = half_to_float((u16)(v >> 16));
}

DEVICE void load8_f16(GLOBAL const f16* p, float* x) {
    U4 v = *(GLOBAL const U4*)p;
    pair_f16(v.x, x), pair_f16(v.y, x + 2), pair_f16(v.z, x + 4), pair_f16(v.w, x + 6);
}

// ---- stores: each value rounded to nearest even -------------------------------------------------

DEVICE void store8_f32(GLOBAL f32* p, const float* x) {
    U4 a, b;
    a.x = as_u32(x[0]), a.y = as_u32(x[1]), a.z = as_u32(x[2]), a.w = as_u32(x[3]);
    b.x = as_u32(x[4]), b.y = as_u32(x[5]), b.z = as_u32(x[6]), b.w = as_u32(x[7]);
    ((GLOBAL U4*)p)[0] = a, ((GLOBAL U4*)p)[1] = b;
}

#if CUDA && !EMULATED && __CUDA_ARCH__ >= 800
DEVICE u32 to_pair_bf16(float low, float high) {
    u32 v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}
DEVICE u32 to_pair_f16(float low, float high) {
    u32 v;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}
#else
DEVICE u32 to_pair_bf16(float low, float high) {
    return (u32)float_to_bf16(low) | (u32)float_to_bf16(high) << 16;
}
DEVICE u32 to_pair_f16(float low, float high) {
    return (u32)float_to_half(low) | (u32)float_to_half(high) << 16;
}
#endif

DEVICE void store8_bf16(GLOBAL bf16* p, const float* x) {
    U4 v;
    v.x = to_pair_bf16(x[0], x[1]), v.y = to_pair_bf16(x[2], x[3]);
    v.z = to_pair_bf16(x[4], x[5]), v.w = to_pair_bf16(x[6], x[7]);
    *(GLOBAL U4*)p = v;
}

DEVICE void store8_f16(GLOBAL f16* p, const float* x) {
    U4 v;
    v.x = to_pair_f16(x[0], x[1]), v.y = to_pair_f16(x[2], x[3]);
    v.z = to_pair_f16(x[4], x[5]), v.w = to_pair_f16(x[6], x[7]);
    *(GLOBAL U4*)p = v;
}

#define LOAD8(p, x) PASTE(load8_, T)(p, x)
#define STORE8(p, x) PASTE(store8_, T)(p, x)

// The larger number; where one is NaN, the other.
#if OPENCL
#define LARGER(a, b) fmax(a, b)
#else
#define LARGER(a, b) fmaxf(a, b)
#endif

// The upper bytes of four words.
DEVICE u32 upper_bytes(u32 a, u32 b, u32 c, u32 d) {
#if CUDA && !EMULATED
    return __byte_perm(__byte_perm(a, b, 0x73), __byte_perm(c, d, 0x73), 0x5410);
#else
    return a >> 24 | b >> 24 << 8 | c >> 24 << 16 | d >> 24 << 24;
#endif
}

// ---- absmax -------------------------------------------------------------------------------------

// The largest magnitude of eight, as bits: infinity and then NaN above all numbers.
DEVICE u32 magnitude8(const float* x) {
    u32 most = 0;
    UNROLL
    for (u32 i = 0; i < 8; i++) {
        u32 bits = as_u32(x[i]) & 0x7FFFFFFFu;
        most = max_(most, bits);
    }
    return most;
}

// The maximum over each aligned set of `threads` threads, a power of two that all threads of the
// group pass alike. All threads take part. `scratch` has a word per thread.
DEVICE u32 set_max(u32 value, u32 threads, LOCAL u32* scratch) {
#if HAVE_SHUFFLE
    for (u32 mask = 1; mask < 32 && mask < threads; mask <<= 1) {
        u32 other = shuffle_xor(value, mask);
        value = max_(value, other);
    }
    if (threads > 32) {
        BARRIER();
        if (LANE == 0) scratch[THREAD / 32] = value;
        BARRIER();
        u32 first = (THREAD & ~(threads - 1)) / 32;
        for (u32 i = 0; i < threads / 32; i++) {
            u32 other = scratch[first + i];
            value = max_(value, other);
        }
    }
#else
    // Over sets of 16 or fewer, then over those.
    u32 few = min_(threads, 16u), first = THREAD & ~(few - 1);
    BARRIER();
    scratch[THREAD] = value;
    BARRIER();
    for (u32 i = 0; i < few; i++) {
        u32 other = scratch[first + i];
        value = max_(value, other);
    }
    first = THREAD & ~(threads - 1);
    BARRIER();
    scratch[THREAD] = value;
    BARRIER();
    for (u32 i = 0; i < threads; i += few) {
        u32 other = scratch[first + i];
        value = max_(value, other);
    }
#endif
    return value;
}

// `y = (x * lift) * reciprocal` scales a block to [-1, 1]; see the core's normalize.rs. A zero
// block is scaled by zero; one whose reciprocal would overflow is lifted by 2^64 first, exactly.
// For a lifted block this lifts x.
#define SMALLEST_DIRECT 2.938735877055719e-39f // 2^-128
#define LIFT 18446744073709551616.0f           // 2^64

DEVICE float reciprocal8(u32 magnitude, float* x) {
    float absmax = as_float(magnitude);
    if (magnitude == 0) return 0.0f;
    if (absmax <= SMALLEST_DIRECT) {
        UNROLL
        for (u32 i = 0; i < 8; i++) x[i] *= LIFT;
        absmax *= LIFT;
    }
    return div_(1.0f, absmax);
}

#endif

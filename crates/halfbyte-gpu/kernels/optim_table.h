// What optimizer kernels share: the table of tensors that one launch works on, and how a warp
// loads, rounds and stores a block of 256 elements.
#ifndef HALFBYTE_OPTIM_TABLE_H
#define HALFBYTE_OPTIM_TABLE_H
#include "port.h"
// PoCL 3.0 crashes while it compiles the 8-bit steps with hints to unroll.
#if OPENCL
#undef UNROLL
#define UNROLL
#endif
#include "eight.h"
#include "philox.h"

#define BLOCK 256u // elements that share a scale
#define WARPS 8u   // of a group; each has a block at a time
#define CHUNK 32u  // blocks that a group takes of a tensor at a time
#define TASK 256u  // blocks whose squares are summed before they join those of the whole tensor

// For what is rare or done once: one copy for all kernels of a module.
#if OPENCL || EMULATED
#define OUTLINE DEVICE
#else
#define OUTLINE static __device__ __noinline__
#endif

// A tensor. Addresses and `n`, its number of elements, as 64 bits.
struct Tensor {
    u64 param, grad, state1, state2;
    u64 absmax1, absmax2; // 8-bit states; trust ratio: address for the update's norm, given norm
    u64 rest;             // what rounding cut off (ROUND_KAHAN), or the seed (ROUND_STOCHASTIC)
    u64 n;
    u32 first; // chunks (tasks, for norms) of the tensors before this one
    u32 flags, stream, unused;
};

// Tensor.flags
#define PARAM_DTYPE(flags) ((flags) & 3u)
#define GRAD_DTYPE(flags) ((flags) >> 2 & 3u)
#define ROUNDING(flags) ((flags) >> 4 & 3u)
#define ROUND_STOCHASTIC 1u
#define ROUND_KAHAN 2u
#define ALIGNED 64u // four elements of anything can be loaded at once
#define NORM_GIVEN 128u

struct Header {
    u64 code1, code2;    // 256 values each
    u64 rates;           // where tensors have rates of their own, or 0
    u64 sums;            // squared norms of each task, float64: update, parameter
    u64 max_unorm, rate64; // float64
    float gnorm_scale, rate, shrink;
    float rule[10];
    u32 skip_zeros, step, tensors, units, unused; // units: chunks (tasks) in all
};

struct TableSmall { // 4096 bytes of kernel arguments
    struct Header header;
    struct Tensor tensors[49];
};
struct TableLarge { // 32764 bytes
    struct Header header;
    struct Tensor tensors[408];
};

// A struct that is a kernel's argument, read where it lies.
#if CUDA && !EMULATED
#define BY_VALUE(T_) const __grid_constant__ T_
#else
#define BY_VALUE(T_) const T_
#endif

// The tensor that a chunk (a task) belongs to.
DEVICE u32 tensor_of(GLOBAL const struct Tensor* tensors, u32 count, u32 unit) {
    u32 low = 0, high = count;
    while (high - low > 1) {
        u32 middle = (low + high) / 2;
        if (tensors[middle].first <= unit) low = middle;
        else high = middle;
    }
    return low;
}

// The largest of 32 lanes; `scratch` has a place for each thread. All threads of the group take
// part where there are no shuffles.
DEVICE u32 largest(u32 x, LOCAL u32* scratch) {
#if CUDA && !EMULATED && __CUDA_ARCH__ >= 800
    (void)scratch;
    return __reduce_max_sync(0xFFFFFFFFu, x);
#else
    return set_max(x, 32, scratch);
#endif
}

// ---- a warp's block ---------------------------------------------------------------------------
// Each lane has eight elements: four from 4 * lane on and four from 128 + 4 * lane on, so that
// every load and store of a warp touches consecutive memory, whatever the element. With `whole`, all 256
// elements exist and fours are aligned; else there are the first n, taken one by one.
#define FOUR(part) ((part) * 128 + 4 * LANE)
#define ELEMENT(j) (FOUR((j) / 4) + (j) % 4)

OUTLINE U4 load_some_floats(u64 at, u32 first, u32 n) {
    GLOBAL const float* from = ADDRESS(const float, at);
    U4 v;
    v.x = first < n ? as_u32(from[first]) : 0;
    v.y = first + 1 < n ? as_u32(from[first + 1]) : 0;
    v.z = first + 2 < n ? as_u32(from[first + 2]) : 0;
    v.w = first + 3 < n ? as_u32(from[first + 3]) : 0;
    return v;
}

OUTLINE void store_some_floats(u64 at, u32 first, u32 n, U4 v) {
    GLOBAL float* to = ADDRESS(float, at);
    if (first < n) to[first] = as_float(v.x);
    if (first + 1 < n) to[first + 1] = as_float(v.y);
    if (first + 2 < n) to[first + 2] = as_float(v.z);
    if (first + 3 < n) to[first + 3] = as_float(v.w);
}

OUTLINE u64 load_some_words(u64 at, u32 first, u32 n) {
    GLOBAL const u16* from = ADDRESS(const u16, at);
    u64 v = 0;
    for (u32 k = 0; k < 4 && first + k < n; k++) v |= (u64)from[first + k] << 16 * k;
    return v;
}

OUTLINE void store_some_words(u64 at, u32 first, u32 n, u64 v) {
    GLOBAL u16* to = ADDRESS(u16, at);
    for (u32 k = 0; k < 4 && first + k < n; k++) to[first + k] = (u16)(v >> 16 * k);
}

OUTLINE u32 load_some_codes(u64 at, u32 first, u32 n) {
    GLOBAL const u8* from = ADDRESS(const u8, at);
    u32 v = 0;
    for (u32 k = 0; k < 4 && first + k < n; k++) v |= (u32)from[first + k] << 8 * k;
    return v;
}

OUTLINE void store_some_codes(u64 at, u32 first, u32 n, u32 v) {
    GLOBAL u8* to = ADDRESS(u8, at);
    for (u32 k = 0; k < 4 && first + k < n; k++) to[first + k] = (u8)(v >> 8 * k);
}

DEVICE void load_floats(u64 at, u32 n, u32 whole, float* x) {
    UNROLL
    for (u32 part = 0; part < 2; part++) {
        U4 v;
        if (whole) v = *ADDRESS(const U4, at + 4 * FOUR(part));
        else v = load_some_floats(at, FOUR(part), n);
        x[4 * part] = as_float(v.x);
        x[4 * part + 1] = as_float(v.y);
        x[4 * part + 2] = as_float(v.z);
        x[4 * part + 3] = as_float(v.w);
    }
}

DEVICE void store_floats(u64 at, u32 n, u32 whole, const float* x) {
    UNROLL
    for (u32 part = 0; part < 2; part++) {
        U4 v;
        v.x = as_u32(x[4 * part]);
        v.y = as_u32(x[4 * part + 1]);
        v.z = as_u32(x[4 * part + 2]);
        v.w = as_u32(x[4 * part + 3]);
        if (whole) *ADDRESS(U4, at + 4 * FOUR(part)) = v;
        else store_some_floats(at, FOUR(part), n, v);
    }
}

// Two elements a word.
DEVICE void load_words(u64 at, u32 n, u32 whole, u32* w) {
    UNROLL
    for (u32 part = 0; part < 2; part++) {
        u64 v;
        if (whole) v = *ADDRESS(const u64, at + 2 * FOUR(part));
        else v = load_some_words(at, FOUR(part), n);
        w[2 * part] = (u32)v;
        w[2 * part + 1] = (u32)(v >> 32);
    }
}

DEVICE void store_words(u64 at, u32 n, u32 whole, const u32* w) {
    UNROLL
    for (u32 part = 0; part < 2; part++) {
        u64 v = w[2 * part] | (u64)w[2 * part + 1] << 32;
        if (whole) *ADDRESS(u64, at + 2 * FOUR(part)) = v;
        else store_some_words(at, FOUR(part), n, v);
    }
}

// Four codes a word.
DEVICE void load_codes(u64 at, u32 n, u32 whole, u32* w) {
    UNROLL
    for (u32 part = 0; part < 2; part++) {
        if (whole) w[part] = *ADDRESS(const u32, at + FOUR(part));
        else w[part] = load_some_codes(at, FOUR(part), n);
    }
}

DEVICE void store_codes(u64 at, u32 n, u32 whole, const u32* w) {
    UNROLL
    for (u32 part = 0; part < 2; part++) {
        if (whole) *ADDRESS(u32, at + FOUR(part)) = w[part];
        else store_some_codes(at, FOUR(part), n, w[part]);
    }
}

#if OPENCL
// A float as a half, to nearest even, in integers: PoCL 3.0 loses halfs that vstore_half puts into
// private memory, in all lanes but the first.
DEVICE u32 half_of(float v) {
    u32 bits = as_u32(v), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return 0x7FFFu;
    if (magnitude >= 0x477FF000u) return sign | 0x7C00u; // 65520 and more
    if (magnitude >= 0x38800000u) { // 2^-14 and more
        return sign | ((magnitude + 0xFFFu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13);
    }
    // In units of 2^-24, which adding 2^23 of them rounds.
    return sign | (as_u32(as_float(magnitude) + 0.5f) - 0x3F000000u);
}
#define TO_PAIR_F16(low, high) (half_of(low) | half_of(high) << 16)
#else
#define TO_PAIR_F16(low, high) to_pair_f16(low, high)
#endif

DEVICE u32 to_pair(u32 dtype, float low, float high) {
    return dtype == DTYPE_F16 ? TO_PAIR_F16(low, high) : to_pair_bf16(low, high);
}

// Elements of any dtype, from element `start` on.
DEVICE void load_any(u32 dtype, u64 from, u64 start, u32 n, u32 whole, float* x) {
    if (dtype == DTYPE_F32) {
        load_floats(from + 4 * start, n, whole, x);
        return;
    }
    u32 w[4];
    load_words(from + 2 * start, n, whole, w);
    if (dtype == DTYPE_F16) {
        UNROLL
        for (u32 k = 0; k < 4; k++) pair_f16(w[k], x + 2 * k);
        return;
    }
    UNROLL
    for (u32 k = 0; k < 4; k++) pair_bf16(w[k], x + 2 * k);
}

// ---- parameters -------------------------------------------------------------------------------

// A block of a parameter, with what earlier roundings cut off.
DEVICE void load_param(GLOBAL const struct Tensor* t, u64 start, u32 n, u32 whole, float* p) {
    load_any(PARAM_DTYPE(t->flags), t->param, start, n, whole, p);
    if (ROUNDING(t->flags) == ROUND_KAHAN) {
        float rest[8];
        load_any(DTYPE_BF16, t->rest, start, n, whole, rest);
        UNROLL
        for (u32 j = 0; j < 8; j++) p[j] = p[j] + rest[j];
    }
}

// Random words for this lane's elements, 16 bits each:
//
//     counter = (group of 8 elements: 64 bits, step: 32, stream: 32), key = seed
//     element 8 i + j: the j-th 16 bits of the four words, low halves first
//
// A group's elements belong to two lanes: one makes the words of the first half of the block for
// both, the other those of the second half.
DEVICE void random_words(GLOBAL const struct Header* h, GLOBAL const struct Tensor* t, u64 start,
                         u32* r) {
    u32 odd = LANE % 2;
#if HAVE_SHUFFLE
    u64 group = start / 8 + 16 * odd + LANE / 2;
    u32 words[4] = {(u32)group, (u32)(group >> 32), h->step, t->stream};
    philox(words, (u32)t->rest, (u32)(t->rest >> 32));
    u32 other0 = odd ? words[0] : words[2];
    u32 other1 = odd ? words[1] : words[3];
    other0 = shuffle_xor(other0, 1);
    other1 = shuffle_xor(other1, 1);
    r[0] = odd ? other0 : words[0];
    r[1] = odd ? other1 : words[1];
    r[2] = odd ? words[2] : other0;
    r[3] = odd ? words[3] : other1;
#else
    for (u32 part = 0; part < 2; part++) {
        u64 group = start / 8 + 16 * part + LANE / 2;
        u32 words[4] = {(u32)group, (u32)(group >> 32), h->step, t->stream};
        philox(words, (u32)t->rest, (u32)(t->rest >> 32));
        r[2 * part] = odd ? words[2] : words[0];
        r[2 * part + 1] = odd ? words[3] : words[1];
    }
#endif
}

// Up with the probability of the part cut off. Infinity and NaN have all exponent bits set, which a
// carry would change.
DEVICE u32 round_randomly(float x, u32 random) {
    u32 bits = as_u32(x);
    return isfinite_(x) ? (bits + random) >> 16 : float_to_bf16(x);
}

// What is left of x beside the bfloat16 that it was rounded to.
DEVICE float cut_off(float x, float rounded) {
    float cut = x - rounded;
    return isfinite_(cut) ? cut : 0.0f;
}

// Puts a block of a parameter back, rounded.
DEVICE void store_param(GLOBAL const struct Header* h, GLOBAL const struct Tensor* t, u64 start,
                        u32 n, u32 whole, const float* p) {
    u32 dtype = PARAM_DTYPE(t->flags), rounding = ROUNDING(t->flags);
    if (dtype == DTYPE_F32) {
        store_floats(t->param + 4 * start, n, whole, p);
        return;
    }
    u32 w[4];
    if (rounding == ROUND_STOCHASTIC) {
        u32 r[4];
        random_words(h, t, start, r);
        UNROLL
        for (u32 k = 0; k < 4; k++) {
            u32 low = round_randomly(p[2 * k], r[k] & 0xFFFFu);
            w[k] = low | round_randomly(p[2 * k + 1], r[k] >> 16) << 16;
        }
    } else {
        UNROLL
        for (u32 k = 0; k < 4; k++) w[k] = to_pair(dtype, p[2 * k], p[2 * k + 1]);
    }
    if (rounding == ROUND_KAHAN) {
        u32 rest[4];
        UNROLL
        for (u32 k = 0; k < 4; k++) {
            float low = cut_off(p[2 * k], as_float(w[k] << 16));
            float high = cut_off(p[2 * k + 1], as_float(w[k] & 0xFFFF0000u));
            rest[k] = to_pair_bf16(low, high);
        }
        store_words(t->rest + 2 * start, n, whole, rest);
    }
    store_words(t->param + 2 * start, n, whole, w);
}

#endif

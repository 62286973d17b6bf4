// One dialect for CUDA, HIP, OpenCL C and the emulator.
//
//   KERNEL(256, name, (GLOBAL const float* x, u64 n)) { ... }
//
// In portable files: C99 without variadic macros, no double, no recursion. Every float operation is
// rounded on its own (files marked "halfbyte: exact" are compiled without contraction); fma_ is the
// only fused multiply-add. SHARED arrays stand at the top level of a kernel. A BARRIER is reached
// by all threads of a group or by none.
#ifndef HALFBYTE_PORT_H
#define HALFBYTE_PORT_H

#if defined(__OPENCL_VERSION__) || defined(__OPENCL_C_VERSION__)
// ---- OpenCL C: PoCL, Intel ------------------------------------------------------------------
#define CUDA 0
#define OPENCL 1
#pragma OPENCL FP_CONTRACT OFF
typedef uchar u8;
typedef char i8;
typedef ushort u16;
typedef short i16;
typedef uint u32;
typedef int i32;
typedef ulong u64;
typedef long i64;
typedef uint4 U4;
#if defined(SUBGROUPS) // of 32 lanes: only the host knows that the device has them
#pragma OPENCL EXTENSION cl_khr_subgroups : enable
#define HAVE_SHUFFLE 1
#define KERNEL_(threads, name, args)                                                               \
    __attribute__((intel_reqd_sub_group_size(32)))                                                 \
    __attribute__((reqd_work_group_size(threads, 1, 1))) __kernel void name args
#define shuffle_xor(v, mask) intel_sub_group_shuffle_xor(v, mask)
#define shuffle_up(v, by) intel_sub_group_shuffle(v, max((int)LANE - (int)(by), 0))
#define shuffle(v, lane) intel_sub_group_shuffle(v, lane)
#else
#define HAVE_SHUFFLE 0
#define KERNEL_(threads, name, args)                                                               \
    __attribute__((reqd_work_group_size(threads, 1, 1))) __kernel void name args
#endif
#if defined(__SPIR__) || defined(__SPIRV__) // for GPUs
#define DEVICE static inline
#else
// Always inlined: PoCL 3.0 gives groups that run at the same time one and the same LOCAL array where
// another function than the kernel uses it, and clang may put it there.
#define DEVICE static inline __attribute__((always_inline))
#endif
#define CONSTANT __constant
#define GLOBAL __global
#define LOCAL __local
#define SHARED(T_, name, n) __local T_ name[n]
#define THREAD ((u32)get_local_id(0))
#define THREADS ((u32)get_local_size(0))
#define GROUP ((u64)get_group_id(0))
#define GROUPS ((u64)get_num_groups(0))
#define GROUP_Y ((u64)get_group_id(1))
#define GROUPS_Y ((u64)get_num_groups(1))
#define BARRIER() barrier(CLK_LOCAL_MEM_FENCE)
// Between writes to global memory and reads of them by other threads of the group.
#define BARRIER_GLOBAL() barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE)
#define as_u32(x) as_uint(x)
#define fma_(a, b, c) fma(a, b, c)
#define sqrt_(a) sqrt(a)
#define div_(a, b) ((a) / (b))
#define abs_(a) fabs(a)
#define min_(a, b) min(a, b)
#define max_(a, b) max(a, b)
#define mulhi_u32(a, b) mul_hi((u32)(a), (u32)(b))
#define popcount_(a) popcount(a)
#define clz_(a) clz((u32)(a))
#define isfinite_(a) (((as_uint(a)) & 0x7F800000u) != 0x7F800000u)
#define load_f16(p, i) vload_half(i, (GLOBAL const half*)(p))
#define store_f16(p, i, v) vstore_half_rte(v, i, (GLOBAL half*)(p))
#define half_to_float(h) half_to_float_((u16)(h))
#define float_to_half(v) float_to_half_(v)
#define ADDRESS(T_, address) ((GLOBAL T_*)(address))
#define atomic_or_u32(p, v) atomic_or(p, v)
#define atomic_max_u32(p, v) atomic_max(p, v)
#define atomic_add_u32(p, v) atomic_add(p, v)
#define UNROLL __attribute__((opencl_unroll_hint))

#else
// ---- CUDA, HIP, the emulator ----------------------------------------------------------------
#define OPENCL 0
typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef short i16;
typedef unsigned int u32;
typedef int i32;
typedef unsigned long long u64;
typedef long long i64;
#define GLOBAL
#define LOCAL
#define HAVE_SHUFFLE 1

#if defined(EMULATED)
#define CUDA 1
#include "emulator.h"
#define KERNEL_(threads, name, args)                                                               \
    static void name args;                                                                         \
    static emulator::Kernel kernel_##name(#name, threads, name);                                   \
    static void name args
#define DEVICE static inline
#define CONSTANT static const
#define SHARED(T_, name, n)                                                                        \
    T_(&name)[n] = *(T_(*)[n])emulator::shared(__LINE__, sizeof(T_) * (n), alignof(T_))
#define DYNAMIC_SHARED(T_, name) T_* name = (T_*)emulator::dynamic_shared()
#define UNROLL
#else
#if defined(__HIPCC_RTC__) || defined(__HIP__)
#define HIP 1
#define CUDA 0
#else
#define CUDA 1
#endif
#define KERNEL_(threads, name, args) extern "C" __global__ void __launch_bounds__(threads) name args
#define DEVICE static __device__ __forceinline__
#define CONSTANT static __device__ const
#define SHARED(T_, name, n) __shared__ T_ name[n]
#define DYNAMIC_SHARED(T_, name)                                                                   \
    extern __shared__ uint4 dynamic_shared_memory[];                                               \
    T_* name = (T_*)dynamic_shared_memory
#define UNROLL _Pragma("unroll")
#endif

template <class A, class B> DEVICE constexpr auto min_(A a, B b) { return a < b ? a : b; }
template <class A, class B> DEVICE constexpr auto max_(A a, B b) { return a > b ? a : b; }

#define THREAD ((u32)threadIdx.x)
#define THREADS ((u32)blockDim.x)
#define GROUP ((u64)blockIdx.x)
#define GROUPS ((u64)gridDim.x)
#define GROUP_Y ((u64)blockIdx.y)
#define GROUPS_Y ((u64)gridDim.y)
#define BARRIER() __syncthreads()
#define BARRIER_GLOBAL() __syncthreads()
#define as_float(x) __uint_as_float(x)
#define as_u32(x) __float_as_uint(x)
#if defined(HIP)
// HIP's __fsqrt_rn is the approximate instruction; these are correctly rounded unless asked otherwise.
#define fma_(a, b, c) __builtin_fmaf(a, b, c)
#define sqrt_(a) __builtin_sqrtf(a)
#define div_(a, b) ((float)(a) / (float)(b))
#else
#define fma_(a, b, c) __fmaf_rn(a, b, c)
#define sqrt_(a) __fsqrt_rn(a)
#define div_(a, b) __fdiv_rn(a, b)
#endif
#define abs_(a) fabsf(a)
#define mulhi_u32(a, b) __umulhi(a, b)
#define popcount_(a) __popc(a)
#define clz_(a) __clz((int)(a))
#define isfinite_(a) ((__float_as_uint(a) & 0x7F800000u) != 0x7F800000u)
#define load_f16(p, i) half_to_float((p)[i])
#define store_f16(p, i, v) ((p)[i] = float_to_half(v))
#if EMULATED || HIP
#define ADDRESS(T_, address) ((T_*)(address))
#else // of global memory: said so, accesses need not find that out
#define ADDRESS(T_, address) ((T_*)__cvta_global_to_generic(address))
#endif
#define atomic_or_u32(p, v) atomicOr(p, v)
#define atomic_max_u32(p, v) atomicMax(p, v)
#define atomic_add_u32(p, v) atomicAdd(p, v)

#if defined(HIP)
#define shuffle_xor(v, mask) __shfl_xor(v, mask, 32)
#define shuffle_up(v, by) __shfl_up(v, by, 32)
#define shuffle(v, lane) __shfl(v, lane, 32)
DEVICE float half_to_float(u16 h) {
    union { u16 bits; _Float16 value; } u;
    u.bits = h;
    return (float)u.value;
}
DEVICE u16 float_to_half(float v) {
    union { u16 bits; _Float16 value; } u;
    u.value = (_Float16)v;
    return u.bits;
}
#else
// All 32 lanes take part.
#define shuffle_xor(v, mask) __shfl_xor_sync(0xFFFFFFFFu, v, mask)
#define shuffle_up(v, by) __shfl_up_sync(0xFFFFFFFFu, v, by)
#define shuffle(v, lane) __shfl_sync(0xFFFFFFFFu, v, lane)
#if defined(EMULATED)
#define half_to_float(h) emulator::half_to_float(h)
#define float_to_half(v) emulator::float_to_half(v)
#else
DEVICE float half_to_float(u16 h) {
    float v;
    asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(h));
    return v;
}
DEVICE u16 float_to_half(float v) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
    return h;
}
#endif
#endif
struct alignas(16) U4 {
    u32 x, y, z, w;
};
#endif

#ifndef HIP
#define HIP 0
#endif
#ifndef EMULATED
#define EMULATED 0
#endif
#define KERNEL(threads, name, args) KERNEL_(threads, name, args)
#define LANE (THREAD % 32)

typedef float f32;
typedef u16 f16;
typedef u16 bf16;

#define load_f32(p, i) ((p)[i])
#define store_f32(p, i, v) ((p)[i] = (v))

DEVICE float bf16_to_float(u16 b) { return as_float((u32)b << 16); }

// To nearest even; NaN stays NaN (quiet, with the upper bits it had), as the `half` crate does it.
DEVICE u16 float_to_bf16(float v) {
    u32 bits = as_u32(v);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return (u16)((bits >> 16) | 0x0040u);
    return (u16)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}
#define load_bf16(p, i) bf16_to_float((p)[i])
#define store_bf16(p, i, v) ((p)[i] = float_to_bf16(v))

#if OPENCL
// Between registers, which vload_half and vstore_half do not offer. (PoCL 3.0 miscompiles them on
// private memory.)
DEVICE float half_to_float_(u16 h) {
    u32 sign = (u32)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
    if (exponent == 31) {
        return as_float(sign | 0x7F800000u | mantissa << 13 | (mantissa ? 0x400000u : 0));
    }
    if (exponent == 0) return as_float(as_u32((float)mantissa * 0x1p-24f) | sign);
    return as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}
DEVICE u16 float_to_half_(float v) { // to nearest even
    u32 bits = as_u32(v), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return 0x7FFF;
    if (magnitude >= 0x477FF000u) return (u16)(sign | 0x7C00); // 65520 and more
    if (magnitude < 0x38800000u) { // below 2^-14: in units of 2^-24
        return (u16)(sign | (u32)rint(as_float(magnitude) * 0x1p24f));
    }
    return (u16)(sign | (magnitude + 0xFFF + (magnitude >> 13 & 1) - (112u << 23)) >> 13);
}
#endif

// The dtypes of a Floats, as the launchers number them.
#define DTYPE_F32 0
#define DTYPE_F16 1
#define DTYPE_BF16 2

// One body for three dtypes: `#define T bf16`, `#include "dtype.h"`, the body, `#include "undtype.h"`.
#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)
#define NAMED(op) PASTE(PASTE(op, _), T)
#define LOAD(p, i) PASTE(load_, T)(p, i)
#define STORE(p, i, v) PASTE(store_, T)(p, i, v)

#endif

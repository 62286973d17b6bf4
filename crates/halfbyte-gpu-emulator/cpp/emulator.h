// CUDA on the CPU: one fiber a thread, the blocks of a launch one after the other.
//
// A fiber runs until it waits at a barrier (of its block or its warp) or ends. Shuffles and matrix
// instructions are exchanges through a buffer of the warp between two barriers, so that all lanes
// must take part. A missing barrier shows when the order of threads changes. Environment, read at
// each launch:
//   HALFBYTE_EMULATOR_ORDER=up|down|random:<seed>   of the threads of a block between two barriers
//   HALFBYTE_EMULATOR_WORKERS=<n>   blocks run on as many host threads at the same time
//   HALFBYTE_EMULATOR_RACES=1       accesses that nothing orders end the process (see races.h); the
//                                   blocks run one after the other
#ifndef HALFBYTE_EMULATOR_H
#define HALFBYTE_EMULATOR_H
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

struct dim3_ {
    unsigned x, y, z;
};
struct uint4 {
    unsigned x, y, z, w;
} __attribute__((aligned(16)));

namespace emulator {

// What a fiber sees.
struct Thread {
    dim3_ thread, block, threads, blocks;
    unsigned index; // in the block
    unsigned capability;
};
Thread& current();

void block_barrier();
// All lanes of the warp meet here; then `slot(lane)` of each is readable until the next one.
void warp_barrier();
void* slot(unsigned lane); // 64 bytes
unsigned lanes();          // of this warp that have not ended

// The same memory for all threads of the block, by the place of the declaration.
void* shared_at(const void* file, int line, size_t bytes, size_t alignment);
static const char file_identity = 0;
inline void* shared(int line, size_t bytes, size_t alignment) {
    return shared_at(&file_identity, line, bytes, alignment);
}
void* dynamic_shared();
// Ends the process with a message that names the kernel and the thread.
[[noreturn]] void fail(const char* what);

// A kernel, registered by name before main.
struct Kernel {
    const char* name;
    unsigned threads;
    void (*call)(const Kernel&, void** arguments);
    void (*function)();
    size_t count;
    const size_t* sizes;
    Kernel* next;
    template <class... A>
    Kernel(const char* name, unsigned threads, void (*f)(A...))
        : name(name), threads(threads), function((void (*)())f), count(sizeof...(A)) {
        static const size_t all[] = {sizeof(A)..., 0};
        sizes = all;
        call = [](const Kernel& k, void** arguments) {
            apply((void (*)(A...))k.function, arguments, std::index_sequence_for<A...>());
        };
        enlist();
    }
    template <class... A, size_t... I>
    static void apply(void (*f)(A...), void** arguments, std::index_sequence<I...>) {
        f(read<A>(arguments[I])...);
    }
    template <class V> static V read(const void* p) {
        typename std::remove_const<V>::type value;
        memcpy((void*)&value, p, sizeof value);
        return value;
    }
    void enlist();
};
const Kernel* find(const char* name);

// Runs all blocks. Arguments are pointers to values, as cuLaunchKernel takes them.
void launch(const Kernel& kernel, dim3_ blocks, dim3_ threads, size_t dynamic_shared_bytes,
            void** arguments, unsigned capability);

// Puts this lane's value up and gives the whole warp's; `done` before the next exchange.
template <class V> inline void put(const V& value) {
    static_assert(sizeof(V) <= 64, "a slot holds 64 bytes");
    memcpy(slot(current().index % 32), &value, sizeof value);
    warp_barrier();
}
template <class V> inline V get(unsigned lane) {
    V value;
    memcpy(&value, slot(lane), sizeof value);
    return value;
}
inline void done() { warp_barrier(); }

template <class V> inline V exchange(const V& value, unsigned from) {
    put(value);
    V result = get<V>(from < 32 ? from : current().index % 32);
    done();
    return result;
}

inline float bits_to_float(uint32_t bits) {
    float v;
    memcpy(&v, &bits, 4);
    return v;
}
inline uint32_t float_to_bits(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    return bits;
}

inline float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
    if (exponent == 31) return bits_to_float(sign | 0x7F800000u | mantissa << 13 | (mantissa ? 0x400000u : 0));
    if (exponent == 0) {
        float v = (float)mantissa * 0x1p-24f;
        return sign ? -v : v;
    }
    return bits_to_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

// To nearest even.
inline uint16_t float_to_half(float v) {
    uint32_t bits = float_to_bits(v), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
    // cvt.rn.f16.f32 gives the canonical NaN.
    if (magnitude > 0x7F800000u) return 0x7FFF;
    if (magnitude >= 0x477FF000u) return (uint16_t)(sign | 0x7C00); // 65520 and more
    if (magnitude < 0x38800000u) { // below 2^-14: in units of 2^-24
        float units = bits_to_float(magnitude) * 0x1p24f;
        return (uint16_t)(sign | (uint32_t)std::nearbyint(units));
    }
    uint32_t rounded = magnitude + 0xFFF + (magnitude >> 13 & 1);
    return (uint16_t)(sign | (rounded - (112u << 23)) >> 13);
}

} // namespace emulator

#define threadIdx (emulator::current().thread)
#define blockIdx (emulator::current().block)
#define blockDim (emulator::current().threads)
#define gridDim (emulator::current().blocks)
#define __syncthreads() emulator::block_barrier()
#define __launch_bounds__(...)
#define __forceinline__ inline

inline float __uint_as_float(unsigned x) { return emulator::bits_to_float(x); }
inline unsigned __float_as_uint(float x) { return emulator::float_to_bits(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __clz(int a) { return a ? __builtin_clz((unsigned)a) : 32; }
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += (int)(signed char)(a >> 8 * i) * (signed char)(b >> 8 * i);
    return c;
}
template <class V> inline V __shfl_xor_sync(unsigned, V v, int mask) {
    return emulator::exchange(v, (emulator::current().index % 32) ^ mask);
}
template <class V> inline V __shfl_up_sync(unsigned, V v, int by) {
    int lane = emulator::current().index % 32;
    return emulator::exchange(v, lane >= by ? lane - by : lane);
}
template <class V> inline V __shfl_sync(unsigned, V v, int lane) {
    return emulator::exchange(v, lane % 32);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
    emulator::put(predicate);
    unsigned result = 0;
    for (unsigned lane = 0; lane < 32; lane++) result |= (emulator::get<int>(lane) ? 1u : 0u) << lane;
    emulator::done();
    return result;
}
inline void __syncwarp(unsigned = 0xFFFFFFFFu) { emulator::warp_barrier(); }
inline void __threadfence() {}
inline unsigned atomicOr(unsigned* p, unsigned v) { return __atomic_fetch_or(p, v, __ATOMIC_RELAXED); }
inline unsigned atomicAdd(unsigned* p, unsigned v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
inline int atomicAdd(int* p, int v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
inline unsigned atomicMax(unsigned* p, unsigned v) {
    unsigned old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (old < v && !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}

#endif

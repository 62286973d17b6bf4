// PTX behind C functions, each with an emulation of its exact lane layout (PTX ISA, "Warp Level
// Matrix Instructions"). For CUDA-only files.
#ifndef HALFBYTE_PTX_H
#define HALFBYTE_PTX_H
#include "port.h"

#if !EMULATED
// The address of shared memory as PTX takes it.
DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
#endif

// ---- asynchronous copies from global to shared memory (sm_80) -----------------------------------
// A kernel waits for all of its copies before it ends. On sm_75 a copy is done at once.

#if EMULATED
#include <vector>
// Done when they are waited for, not before: a wait for too few groups shows.
struct PendingCopy {
    void* to;
    const void* from;
    u32 bytes, group;
};
struct PendingCopies {
    std::vector<PendingCopy> queue;
    u32 group = 0;
};
inline thread_local PendingCopies pending_copies[1024];
DEVICE PendingCopies& own_copies() { return pending_copies[emulator::current().index]; }
#endif

// 16 bytes, of which the first `bytes` (0 to 16) are read and the rest are set to zero. Both
// addresses are multiples of 16; with no bytes to read `from` is not read.
DEVICE void cp_async_16(void* to, const void* from, u32 bytes) {
#if EMULATED
    if (((size_t)to | (bytes ? (size_t)from : 0)) % 16 != 0) emulator::fail("copies misaligned");
    memset(to, 0xFF, 16);
    own_copies().queue.push_back({to, from, bytes, own_copies().group});
#elif __CUDA_ARCH__ < 800
    if (bytes == 16) {
        *(U4*)to = *(const U4*)from;
    } else {
        for (u32 i = 0; i < 16; i++) ((u8*)to)[i] = i < bytes ? ((const u8*)from)[i] : 0;
    }
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(bytes)
                 : "memory");
#endif
}

// Makes one group of this thread's copies since the last commit.
DEVICE void cp_async_commit() {
#if EMULATED
    own_copies().group++;
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all but the latest PENDING groups of this thread have arrived. Other threads see
// them after a barrier.
template <int PENDING> DEVICE void cp_async_wait() {
#if EMULATED
    PendingCopies& mine = own_copies();
    std::vector<PendingCopy> later;
    for (const PendingCopy& copy : mine.queue) {
        if (copy.group + PENDING >= mine.group) {
            later.push_back(copy);
            continue;
        }
        memset(copy.to, 0, 16);
        if (copy.bytes > 0) memcpy(copy.to, copy.from, copy.bytes);
    }
    mine.queue.swap(later);
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// ---- matrices of 16-bit floats: ldmatrix, mma m16n8k16, m16n8k8 ----------------------------------

// Byte i of the result is the byte of {b, a} (b the upper half) that the low three bits of nibble
// i of `selector` name; with the nibble's top bit set, that byte's sign in all eight bits.
DEVICE u32 permute(u32 a, u32 b, u32 selector) {
#if EMULATED
    u64 bytes = (u64)b << 32 | a;
    u32 result = 0;
    for (u32 i = 0; i < 4; i++) {
        u32 nibble = selector >> 4 * i & 15, byte = (u32)(bytes >> 8 * (nibble & 7)) & 255;
        if (nibble & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << 8 * i;
    }
    return result;
#else
    u32 result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
    return result;
#endif
}

// Four 8x8 matrices of 16-bit elements from shared memory. Lane i names row i % 8 (16 bytes,
// aligned) of matrix i / 8, and gets in r[m] the two elements at row i / 4, columns 2 (i % 4) and
// one on, of matrix m.
DEVICE void ldmatrix_x4(u32 (&r)[4], const void* row) {
#if EMULATED
    if ((size_t)row % 16 != 0) emulator::fail("reads a matrix from a misaligned row");
    emulator::put(row);
    const u32 lane = LANE;
    for (u32 m = 0; m < 4; m++) {
        const u8* from = emulator::get<const u8*>(m * 8 + lane / 4);
        memcpy(&r[m], from + lane % 4 * 4, 4);
    }
    emulator::done();
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

// The same, transposed: the lane gets rows 2 (i % 4) and one on, at column i / 4.
DEVICE void ldmatrix_x4_trans(u32 (&r)[4], const void* row) {
#if EMULATED
    if ((size_t)row % 16 != 0) emulator::fail("reads a matrix from a misaligned row");
    emulator::put(row);
    const u32 lane = LANE;
    for (u32 m = 0; m < 4; m++) {
        u16 pair[2];
        for (u32 i = 0; i < 2; i++) {
            const u8* from = emulator::get<const u8*>(m * 8 + lane % 4 * 2 + i);
            memcpy(&pair[i], from + lane / 4 * 2, 2);
        }
        memcpy(&r[m], pair, 4);
    }
    emulator::done();
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

#if EMULATED
// c += A B, A 16x16 and B 16x8. Lane 4 g + t holds of A, in pairs along k: (g, 2t), (g + 8, 2t),
// (g, 2t + 8), (g + 8, 2t + 8); of B, in pairs along k: (2t, g), (2t + 8, g); of c: (g, 2t),
// (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
template <class Convert>
DEVICE void mma_emulated(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, Convert to_float) {
    struct Fragments {
        float a[8], b[4];
    } mine, theirs_a, theirs_b;
    for (u32 i = 0; i < 8; i++) mine.a[i] = to_float((u16)(a[i / 2] >> 16 * (i % 2)));
    for (u32 i = 0; i < 4; i++) mine.b[i] = to_float((u16)((i < 2 ? b0 : b1) >> 16 * (i % 2)));
    emulator::put(mine);
    const u32 lane = LANE;
    for (u32 i = 0; i < 4; i++) {
        const u32 row = lane / 4, high = i / 2, column = lane % 4 * 2 + i % 2;
        float sum = c[i];
        for (u32 t = 0; t < 4; t++) {
            theirs_a = emulator::get<Fragments>(row * 4 + t);
            theirs_b = emulator::get<Fragments>(column * 4 + t);
            for (u32 j = 0; j < 2; j++) {
                sum += theirs_a.a[high * 2 + j] * theirs_b.b[j];
                sum += theirs_a.a[4 + high * 2 + j] * theirs_b.b[2 + j];
            }
        }
        c[i] = sum;
    }
    emulator::done();
}
#endif

// m16n8k16 of float16 into float32. On sm_75 two m16n8k8.
DEVICE void mma_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if EMULATED
    mma_emulated(c, a, b0, b1, [](u16 h) { return half_to_float(h); });
#elif __CUDA_ARCH__ < 800
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2]), "r"(a[3]), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

#if EMULATED || __CUDA_ARCH__ >= 800
// m16n8k16 of bfloat16 into float32.
DEVICE void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if EMULATED
    mma_emulated(c, a, b0, b1, [](u16 h) { return bf16_to_float(h); });
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
#endif

// Two floats rounded to nearest even, `low` in the lower half.
DEVICE u32 pack_f16(float low, float high) {
#if EMULATED || __CUDA_ARCH__ < 800
    return float_to_half(low) | (u32)float_to_half(high) << 16;
#else
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#endif
}
DEVICE u32 pack_bf16(float low, float high) {
#if EMULATED || __CUDA_ARCH__ < 800
    return float_to_bf16(low) | (u32)float_to_bf16(high) << 16;
#else
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#endif
}

// ---- matrices of int8: mma m16n8k32, m8n8k16 -----------------------------------------------------
// c[16][8] += a[16][32] * b[32][8] in int32, wrapping.
//
// Lane 4g + t holds of a the codes 4t..4t+3 of: row g (a[0]), row g + 8 (a[1]), and the same of
// columns 16 on (a[2], a[3]); of b those of column g, rows 4t.. (b[0]) and 16 + 4t.. (b[1]); of c
// columns 2t and 2t + 1 of row g (c[0], c[1]) and of row g + 8 (c[2], c[3]).
DEVICE void mma_s8_m16n8k32(i32 (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if EMULATED
    struct Operands {
        u32 a[4], b[2];
    } mine;
    memcpy(mine.a, a, sizeof a);
    memcpy(mine.b, b, sizeof b);
    emulator::put(mine);
    u32 g = LANE / 4, t = LANE % 4;
    for (u32 k = 0; k < 4; k++) {
        Operands row = emulator::get<Operands>(4 * g + k);
        for (u32 n = 0; n < 2; n++) {
            Operands column = emulator::get<Operands>(4 * (2 * t + n) + k);
            for (u32 m = 0; m < 2; m++) {
                i32& sum = c[2 * m + n];
                sum = __dp4a((i32)row.a[m], (i32)column.b[0], sum);
                sum = __dp4a((i32)row.a[m + 2], (i32)column.b[1], sum);
            }
        }
    }
    emulator::done();
#elif __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                 "{%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// c[8][8] += a[8][16] * b[16][8] in int32, wrapping: the same layout with one register of a and b
// and two of c.
DEVICE void mma_s8_m8n8k16(i32& c0, i32& c1, u32 a, u32 b) {
#if EMULATED
    struct Operands {
        u32 a, b;
    } mine = {a, b};
    emulator::put(mine);
    u32 g = LANE / 4, t = LANE % 4;
    for (u32 k = 0; k < 4; k++) {
        i32 row = (i32)emulator::get<Operands>(4 * g + k).a;
        c0 = __dp4a(row, (i32)emulator::get<Operands>(8 * t + k).b, c0);
        c1 = __dp4a(row, (i32)emulator::get<Operands>(8 * t + 4 + k).b, c1);
    }
    emulator::done();
#else
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                 : "+r"(c0), "+r"(c1)
                 : "r"(a), "r"(b));
#endif
}

// mma_s8_m16n8k32, where a device of sm_75 makes it of four.
DEVICE void mma_s8(i32 (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if EMULATED
    bool turing = emulator::current().capability < 80;
#elif __CUDA_ARCH__ < 800
    const bool turing = true;
#else
    const bool turing = false;
#endif
    if (turing) {
        mma_s8_m8n8k16(c[0], c[1], a[0], b[0]);
        mma_s8_m8n8k16(c[2], c[3], a[1], b[0]);
        mma_s8_m8n8k16(c[0], c[1], a[2], b[1]);
        mma_s8_m8n8k16(c[2], c[3], a[3], b[1]);
    } else {
        mma_s8_m16n8k32(c, a, b);
    }
}


#endif

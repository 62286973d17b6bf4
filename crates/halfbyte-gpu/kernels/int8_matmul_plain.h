// What int8_matmul_plain.cu and experts_int8_plain.cu share. See the first for what they compute.
#ifndef HALFBYTE_INT8_MATMUL_PLAIN_H
#define HALFBYTE_INT8_MATMUL_PLAIN_H
#include "int8.h"

// c plus the product of four codes with four codes.
#if CUDA
DEVICE i32 dot4(u32 a, u32 b, i32 c) { return __dp4a((i32)a, (i32)b, c); }
#else
DEVICE i32 dot4(u32 a, u32 b, i32 c) {
    for (u32 i = 0; i < 32; i += 8) c += (i32)(i8)(a >> i) * (i32)(i8)(b >> i);
    return c;
}
#endif

DEVICE i32 dot16(U4 a, U4 b, i32 c) {
    return dot4(a.w, b.w, dot4(a.z, b.z, dot4(a.y, b.y, dot4(a.x, b.x, c))));
}

// Codes k..k+4 of a row that ends at `depth`; 0 from there on.
DEVICE u32 word_at(GLOBAL const i8* row, u64 k, u64 depth, bool aligned) {
    if (k >= depth) return 0;
    if (aligned) return *(GLOBAL const u32*)(row + k);
    u32 word = 0;
    for (u32 i = 0; i < 4 && k + i < depth; i++) word |= (u32)(u8)row[k + i] << (8 * i);
    return word;
}

// Threads of a group with few rows, and the outputs of each warp.
#define FEW_THREADS 128
#define FEW_OUTPUTS 2
// Loads of 16 weights that a thread has under way for each output.
#define FEW_AHEAD 2

#define TILE 64
// 32-bit words of four codes in a step, and in a row of shared memory: one more, so that the
// threads of a warp read from different banks.
#define STEP 8
#define PITCH 9

#endif

// What matvec_4bit.cu and experts_matvec_4bit.cu share: codes to values.
#ifndef HALFBYTE_MATVEC_4BIT_H
#define HALFBYTE_MATVEC_4BIT_H
#include "eight.h"
#include "weight_4bit.h"

#define FEATURES 4

// An address of which the compiler does not know how it was made: it is kept in registers, and not
// made again for each access.
DEVICE u64 kept_address(u64 address) {
#if CUDA && !EMULATED
    asm("" : "+l"(address));
#endif
    return address;
}

#if CUDA
#include "ptx.h"

// The table starts at a multiple of 256 bytes: an index, times four, is the low byte of the address
// of its value, and one instruction puts it there.
#if EMULATED
#define TABLE_16(name) SHARED(float, name, 16)
#define TABLE_ADDRESS(values) 0
#define TABLE_VALUE(values, address) (*(const float*)((const u8*)(values) + (address)))
#else
#define TABLE_16(name) alignas(256) __shared__ float name[16]
#define TABLE_ADDRESS(values) shared_address(values)
#define TABLE_VALUE(values, address) table_value(address)
DEVICE float table_value(u32 address) {
    float value;
    asm("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address));
    return value;
}
#endif

// The eight values of four bytes.
DEVICE void values8(u32 word, LOCAL const float* values, float* w) {
    u32 high = word >> 2 & 0x3C3C3C3Cu, low = word << 2 & 0x3C3C3C3Cu;
    u32 table = TABLE_ADDRESS(values);
    UNROLL
    for (u32 i = 0; i < 4; i++) {
        w[2 * i] = TABLE_VALUE(values, permute(high, table, 0x7650u + i));
        w[2 * i + 1] = TABLE_VALUE(values, permute(low, table, 0x7650u + i));
    }
}
#else
#define TABLE_16(name) SHARED(float, name, 16)

// The eight values of four bytes.
DEVICE void values8(u32 word, LOCAL const float* values, float* w) {
    // Four times each index: the byte offset of its value.
    u32 high = word >> 2 & 0x3C3C3C3Cu, low = word << 2 & 0x3C3C3C3Cu;
    LOCAL const u8* bytes = (LOCAL const u8*)values;
    UNROLL
    for (u32 i = 0; i < 4; i++) {
        w[2 * i] = *(LOCAL const float*)(bytes + (high >> 8 * i & 0xFFu));
        w[2 * i + 1] = *(LOCAL const float*)(bytes + (low >> 8 * i & 0xFFu));
    }
}
#endif

#endif

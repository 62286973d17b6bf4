// halfbyte: exact
// matvec_4bit: 1 to 8 rows of activations times a 4-bit weight.
//
//   out[m][o] = round(sum over k of a[m][k] * (table[q[o][k]] * scale of its block) + bias[o])
//
// How it is done:
// 1. A group of 128 threads makes 4 output features for all rows, so that an activation that has
//    been loaded serves 4 weights, and a decoded weight all rows. The weight is read once.
// 2. A thread takes words of 8 codes, 128 words apart: neighbours read neighbouring words and
//    neighbouring activations. 8 codes lie in one block, and the scale multiplies their sum.
// 3. The loads of two words of each feature, and of their scales, are under way together when there
//    are one or two rows: no branch stands between them, and the code of nested scales is in shared
//    memory.
// 4. Sums of the threads are added in a tree whose shape never changes.
// 5. Words need rows of whole words and aligned buffers. All else goes code by code.
//
// The result before its rounding lies within (columns / 128 + 32) * 2^-24 * (sum |a * w| + |bias|)
// of the exact one, to first order.
#include "eight.h"
#include "weight_4bit.h"

#define FEATURES 4

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

#define ROWS 1
#define MATVEC matvec_4bit_1
#include "matvec_4bit_types.inc.h"
#define ROWS 2
#define MATVEC matvec_4bit_2
#include "matvec_4bit_types.inc.h"
#define ROWS 4
#define MATVEC matvec_4bit_4
#include "matvec_4bit_types.inc.h"
#define ROWS 8
#define MATVEC matvec_4bit_8
#include "matvec_4bit_types.inc.h"

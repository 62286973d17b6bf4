// halfbyte: exact
// dequantize_4bit: two 4-bit codes a byte back to elements.
//
//   out[i] = round(table[q[i]] * scale[i / blocksize])
//
// How it is done: a group decodes 8192 elements, a thread four times 8 neighbours, which lie in one
// block. Its four loads are under way together. The table's 16 words are in as many banks of shared
// memory. A nested scale is decoded by each thread of its block, from cached memory.
#include "eight.h"
#include "weight_4bit.h"

// The eight elements of four bytes, scaled.
DEVICE void decode8(u32 word, float scale, LOCAL const float* values, float* x) {
    UNROLL
    for (u32 i = 0; i < 4; i++) {
        x[2 * i] = values[word >> (8 * i + 4) & 15] * scale;
        x[2 * i + 1] = values[word >> 8 * i & 15] * scale;
    }
}

#define T f32
#include "dequantize_4bit.inc.h"
#define T f16
#include "dequantize_4bit.inc.h"
#define T bf16
#include "dequantize_4bit.inc.h"

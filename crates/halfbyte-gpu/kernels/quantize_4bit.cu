// halfbyte: exact
// quantize_4bit: flattened blocks to two 4-bit codes a byte.
//
//   for each block: absmax = max |x|
//                   for each x: y = x * (1 / absmax), code = the nearest of 16, ties downwards
//
// How it is done:
// 1. Tiles of 8192 elements (tile.h): a block is shared by an aligned set of threads, and the input
//    is read once.
// 2. absmax is an integer maximum over the bits, by shuffles within 32 threads.
// 3. A code is found without a search. 15 * y, rounded to quarters by adding a large number, has
//    the number of a cell in its low bits; no cell holds more than one border (codes.h). Two
//    look-ups (at most 32 words each: no bank conflicts) and one comparison give the code, which
//    the table has at its place among eight.
// 4. Blocks with NaN or infinity have no cells: their y is zero or NaN.
#include "codes.h"
#include "tile.h"

#define CELLS_PER_UNIT 15.0f
#define TO_QUARTERS 3145728.0f // 1.5 * 2^21: a float32 next to it is a multiple of 1/4

// The byte offset, in a table of 32 words, of the cell of y, |y| <= 1 and an ulp.
DEVICE u32 cell_offset(float y) { return as_u32(fma_(y, CELLS_PER_UNIT, TO_QUARTERS)) & 0x7Cu; }
#define AT_OFFSET(type, words, offset) (*(LOCAL const type*)((LOCAL const u8*)(words) + (offset)))

// Where code number i of eight stands in the word of its four bytes: the first in the high nibble.
#define PLACE(i) (8 * ((i) / 2) + 4 * (1 - (i) % 2))

// Each function gives code number i at its place. NF4 has 32 words for each place.
DEVICE u32 encode_nf4(float y, LOCAL const float* borders, LOCAL const u32* codes, u32 i) {
    u32 cell = cell_offset(y);
    u32 above = y > AT_OFFSET(float, borders, cell) ? 1u << PLACE(i) : 0u;
    return AT_OFFSET(u32, codes + 32 * i, cell) + above;
}

// Cells of the magnitude, which have 64 words for each place: the codes below the borders, then
// those above. -0.0 is not below zero.
DEVICE u32 encode_fp4(float y, LOCAL const float* borders, LOCAL const u32* codes, u32 i) {
    float magnitude = abs_(y);
    u32 cell = cell_offset(magnitude);
    if (magnitude > AT_OFFSET(float, borders, cell)) cell += 128;
    return AT_OFFSET(u32, codes + 64 * i, cell) + (y < 0.0f ? 8u << PLACE(i) : 0u);
}

// Fills the tables of codes. All 256 threads.
DEVICE void place_nf4(LOCAL u32* codes) {
    codes[THREAD] = NF4_CELL_CODES[THREAD % 32] << PLACE(THREAD / 32);
}

DEVICE void place_fp4(LOCAL u32* codes) {
    u32 both = FP4_CELL_CODES[THREAD % 32], i = THREAD / 32;
    codes[64 * i + THREAD % 32] = (both & 0xFu) << PLACE(i);
    codes[64 * i + 32 + THREAD % 32] = both >> 16 << PLACE(i);
}

#define QUANTIZE quantize_4bit_nf4
#define ENCODE encode_nf4
#define CELL_BORDERS NF4_CELL_BORDERS
#define CODE_WORDS 256
#define PLACE_CODES place_nf4
#define ZERO_CODE 7u
#define T f32
#include "quantize_4bit.inc.h"
#define T f16
#include "quantize_4bit.inc.h"
#define T bf16
#include "quantize_4bit.inc.h"
#undef QUANTIZE
#undef ENCODE
#undef CELL_BORDERS
#undef CODE_WORDS
#undef PLACE_CODES
#undef ZERO_CODE

#define QUANTIZE quantize_4bit_fp4
#define ENCODE encode_fp4
#define CELL_BORDERS FP4_CELL_BORDERS
#define CODE_WORDS 512
#define PLACE_CODES place_fp4
#define ZERO_CODE 0u
#define T f32
#include "quantize_4bit.inc.h"
#define T f16
#include "quantize_4bit.inc.h"
#define T bf16
#include "quantize_4bit.inc.h"

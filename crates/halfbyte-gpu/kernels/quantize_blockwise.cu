// halfbyte: exact
// quantize_blockwise: flattened blocks to one 8-bit code an element.
//
//   for each block: absmax = max |x|
//                   for each x: y = x * (1 / absmax), clamped to [-1, 1]
//                               code = the number of borders below y
//
// How it is done: as in quantize_4bit.cu, a group takes 4096 elements, twice 8 neighbours a thread.
// Each group makes the borders of the code that it is handed. If they are those of a default
// dynamic map, two look-ups and a comparison encode (encode8.h); else they are searched in eight
// steps.
#include "eight.h"
#include "encode8.h"

// The midpoint above value `i` of the code. There is none above the last.
DEVICE float border_above(GLOBAL const float* code, u32 count, u32 i) {
    return i + 1 < count ? midpoint(code[i], code[i + 1]) : as_float(0x7F800000u);
}

#define QUANTIZE quantize_blockwise
#define CODE_PARAMETERS GLOBAL const float *code, u32 count
#define BORDER(i) border_above(code, count, i)
#define ELEMENT(x) (x)
#define T f32
#include "quantize_blockwise.inc.h"
#define T f16
#include "quantize_blockwise.inc.h"
#define T bf16
#include "quantize_blockwise.inc.h"

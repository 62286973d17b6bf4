// halfbyte: exact
// quantize_blockwise: flattened blocks to one 8-bit code an element.
//
//   for each block: absmax = max |x|
//                   for each x: y = x * (1 / absmax), clamped to [-1, 1]
//                               code = the number of borders below y
//
// How it is done: tiles of 8192 elements (tile.h). Each group makes the borders of the code that it
// is handed. If they are those of a default dynamic map, one look-up and an addition encode
// (encode8.h); else they are searched in eight steps. Blocks with NaN or infinity, and those whose
// reciprocal needs care, go a slower way too.
#include "encode8.h"
#include "tile.h"

// The midpoint above value `i` of the code. There is none above the last.
DEVICE float border_above(GLOBAL const float* code, u32 count, u32 i) {
    return i + 1 < count ? midpoint(code[i], code[i + 1]) : as_float(0x7F800000u);
}

#define QUANTIZE quantize_blockwise
#define CODE_PARAMETERS GLOBAL const float *code, u32 count
#define BORDER(i) border_above(code, count, i)
#define ELEMENT(x) (x)
#define MAGNITUDE(w) UNIT_MAGNITUDE(w)
#define T f32
#include "quantize_blockwise.inc.h"
#define T f16
#include "quantize_blockwise.inc.h"
#define T bf16
#include "quantize_blockwise.inc.h"

// halfbyte: exact
// dequantize_blockwise: 8-bit codes back to elements.
//
//   out[i] = round(code[q[i]] * absmax[i / blocksize])
//
// How it is done: a group decodes 8192 elements, a thread four times 8 neighbours, which lie in one
// block. Its four loads are under way together. The code's values are in shared memory.
#include "eight.h"

#define T f32
#include "dequantize_blockwise.inc.h"
#define T f16
#include "dequantize_blockwise.inc.h"
#define T bf16
#include "dequantize_blockwise.inc.h"

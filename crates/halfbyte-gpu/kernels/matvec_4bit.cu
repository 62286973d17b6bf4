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
#include "matvec_4bit.h"

#define EVEN_ROWS 1

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

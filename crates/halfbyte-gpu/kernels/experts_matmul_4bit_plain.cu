// halfbyte: exact
// `experts_matmul_4bit` and its gradient without tensor cores: any dtype, any shape, any alignment.
//
//   for each row r of the result, e its expert:
//     out[r] = input[r / sharing] · W[e]^T + bias[e]      W [experts, out_features, in_features]
//     out[r] = grad[r] · W[e]                             when `grad` is set, and `input` is grad
//     0 without an expert, NaN for a bad id
//
// A tile has rows of one expert (experts.h) and is matmul_4bit_plain.cu's. With `sums` the results
// stay in float32, for sum_slots.
#include "experts.h"
#include "weight_4bit.h"

#define TILE 64
#define STEP 32
#define PITCH 65

#define T f32
#include "dtype.h"
#include "experts_matmul_4bit_plain.inc.h"
#include "undtype.h"

#define T f16
#include "dtype.h"
#include "experts_matmul_4bit_plain.inc.h"
#include "undtype.h"

#define T bf16
#include "dtype.h"
#include "experts_matmul_4bit_plain.inc.h"
#include "undtype.h"

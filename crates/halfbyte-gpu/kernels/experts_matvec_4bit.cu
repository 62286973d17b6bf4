// halfbyte: exact
// `experts_matmul_4bit` where experts have few rows: the product of matvec_4bit.cu, over rows of
// any expert, and with its bound.
//
//   for each row r of the result, e its expert:
//     out[r] = a[r / sharing] · W[e]^T + bias[e]      W [experts, features, columns]
//     0 without an expert, NaN for a bad id
//
// A group makes FEATURES features of up to 4 rows of one expert (experts.h), whose part of the
// weight it reads once. Groups that find no rows end at once.
#include "experts.h"
#include "matvec_4bit.h"

#define MOST_ROWS 4

// With registers for four groups on a multiprocessor: they wait for memory most of the time.
#if CUDA && !EMULATED
#define FEW_KERNEL(name, args) extern "C" __global__ void __launch_bounds__(128, 4) name args
#else
#define FEW_KERNEL(name, args) KERNEL(128, name, args)
#endif

#define T f32
#include "experts_matvec_4bit.inc.h"
#define T f16
#include "experts_matvec_4bit.inc.h"
#define T bf16
#include "experts_matvec_4bit.inc.h"

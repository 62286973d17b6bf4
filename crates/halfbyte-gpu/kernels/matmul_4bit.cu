// halfbyte: exact
// halfbyte: cuda
// `matmul_4bit` and its gradient on tensor cores, for float16 (from sm_75 on) and bfloat16
// (from sm_80 on).
//
//   out = input · W^T + bias   W [out_features, in_features] = table[code] * scale of the block
//   out = input · W            the gradient of the first for its input
//
// A group of threads makes one tile of `out`, in steps of 64 along the depth (the sum's index):
//
//   c = 0
//   for each step:
//     w = round(table[codes] * scale)            to 16 bits, as dequantize_4bit gives it
//     c += input w^T                             products exact, sums in float32
//   out = round(c + bias)
//
// Liberties taken with it:
// 1. Inputs and codes are copied asynchronously, STAGES - 1 steps ahead, scales two steps ahead.
// 2. The weight of the next step is decoded between the products of this one, into the other of two
//    tiles in shared memory, so that one barrier a step is enough.
// 3. 32 codes that follow each other lie in one block. So the table is scaled and rounded once for
//    them, and a code then picks 16 bits of it: 2.6 instructions an element instead of a product, a
//    rounding and a look-up in memory. in_features must be a multiple of 32 for that.
// 4. Chunks of 16 bytes are swizzled: neither the stores nor ldmatrix meet a bank twice.
// 5. For the gradient the weight is decoded as it lies, and ldmatrix transposes it.
// 6. What lies outside of the matrices counts as zero: no copy, and a scale of zero.
// 7. When tiles are few, GROUPS_Y groups share one along the depth. Their sums go through memory
//    and are added in order by matmul_4bit_sum, so results do not change from run to run.
//
// Compiled without contraction: the decoded weight is dequantize_4bit's, bit for bit.
#include "matmul_4bit.h"

MATMUL(matmul_4bit_16_f16, F16, Shape16, false)
MATMUL(matmul_4bit_32_f16, F16, Shape32, false)
MATMUL(matmul_4bit_64_f16, F16, Shape64, false)

#if EMULATED || __CUDA_ARCH__ >= 800
MATMUL(matmul_4bit_128_f16, F16, Shape128, false)
MATMUL(matmul_4bit_256_f16, F16, Shape256, false)

MATMUL(matmul_4bit_16_bf16, Bf16, Shape16, false)
MATMUL(matmul_4bit_32_bf16, Bf16, Shape32, false)
MATMUL(matmul_4bit_64_bf16, Bf16, Shape64, false)
MATMUL(matmul_4bit_128_bf16, Bf16, Shape128, false)
MATMUL(matmul_4bit_256_bf16, Bf16, Shape256, false)
#endif

// halfbyte: exact
// halfbyte: cuda
// `experts_matmul_4bit_grad_input` on tensor cores: out[r] = grad[r] · W[expert of r].
// experts_matmul_4bit.cu says how. With `sums` the results stay in float32, for sum_slots.
#include "experts_matmul_4bit.h"

ROUTED_MATMUL(experts_matmul_4bit_grad_64_f16, F16, Shape64, true)

#if EMULATED || __CUDA_ARCH__ >= 800
ROUTED_MATMUL(experts_matmul_4bit_grad_128_f16, F16, Shape128, true)

ROUTED_MATMUL(experts_matmul_4bit_grad_64_bf16, Bf16, Shape64, true)
ROUTED_MATMUL(experts_matmul_4bit_grad_128_bf16, Bf16, Shape128, true)
#endif

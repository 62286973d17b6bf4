// halfbyte: exact
// halfbyte: cuda
// `matmul_4bit_grad_input` on tensor cores: out = grad · W. matmul_4bit.cu says how.
#include "matmul_4bit.h"

MATMUL(matmul_4bit_grad_64_f16, F16, Shape64, true)

#if EMULATED || __CUDA_ARCH__ >= 800
MATMUL(matmul_4bit_grad_128_f16, F16, Shape128, true)
MATMUL(matmul_4bit_grad_256_f16, F16, Shape256, true)

MATMUL(matmul_4bit_grad_64_bf16, Bf16, Shape64, true)
MATMUL(matmul_4bit_grad_128_bf16, Bf16, Shape128, true)
MATMUL(matmul_4bit_grad_256_bf16, Bf16, Shape256, true)
#endif

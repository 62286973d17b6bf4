// halfbyte: exact
// halfbyte: cuda
// `experts_matmul_4bit` on tensor cores: the product of matmul_4bit.cu, over rows of any expert.
//
//   for each row r of the result, e its expert:
//     out[r] = input[r / sharing] · W[e]^T + bias[e]      W [experts, out_features, in_features]
//     0 without an expert, NaN for a bad id
//
// The rows are sorted by expert (experts.h); a group makes a tile of rows of one expert. The grid
// is that of the most tiles that the rows can make, whatever their experts: the host does not know
// them. Groups that find no tile end at once. The rest is matmul_4bit.cu's, with the rows gathered
// and scattered by a list in shared memory, and the sums not split along the depth. So a row's
// result does not depend on the other rows.
#include "experts_matmul_4bit.h"

ROUTED_MATMUL(experts_matmul_4bit_16_f16, F16, Shape16, false)
ROUTED_MATMUL(experts_matmul_4bit_64_f16, F16, Shape64, false)

#if EMULATED || __CUDA_ARCH__ >= 800
ROUTED_MATMUL(experts_matmul_4bit_128_f16, F16, Shape128, false)

ROUTED_MATMUL(experts_matmul_4bit_16_bf16, Bf16, Shape16, false)
ROUTED_MATMUL(experts_matmul_4bit_64_bf16, Bf16, Shape64, false)
ROUTED_MATMUL(experts_matmul_4bit_128_bf16, Bf16, Shape128, false)
#endif

// halfbyte: fast
// halfbyte: cuda
// The gradient of an 8-bit layer for its input, on tensor cores: out = grad · dequantize(weight).
//
//   for each tile of rows x columns:                        a group of four warps
//       for each 32 outputs o of the layer:
//           left = grad[rows][o]                            copied to shared memory, two steps ahead
//           right = round(codes[o][columns] * (scales[o] / 127))    decoded on the way there
//           sums += left · right                            mma, float32
//       out = round(sums)
//
// Weights of a step are read into registers one step before they are decoded, and decoded one step
// before they are multiplied. A weight is rounded once, to the type of the gradient; a scale over 127
// is one float32. What lies behind the last row, output or column is zero.
#include "int8_grad.h"

#define INT8_GRAD(name, Type, ROWS, COLUMNS)                                                       \
    KERNEL(TILE_THREADS, name,                                                                     \
           (const u16* grad, const i8* codes, const float* scales, u16* out, u64 rows,             \
            u64 outputs, u64 columns)) {                                                           \
        DYNAMIC_SHARED(U4, shared);                                                                \
        u64 across = (columns + COLUMNS - 1) / COLUMNS;                                            \
        u64 m0 = GROUP / across * ROWS, c0 = GROUP % across * COLUMNS;                             \
        multiply<Type, ROWS, COLUMNS>(shared, InOrder{}, m0, rows, c0, grad, codes, scales, out,   \
                                      (float*)0, outputs, columns);                                \
    }

INT8_GRAD(int8_grad_large_f16, Float16, 128, 128)
INT8_GRAD(int8_grad_small_f16, Float16, 32, 64)
#if EMULATED || __CUDA_ARCH__ >= 800
INT8_GRAD(int8_grad_large_bf16, Bfloat16, 128, 128)
INT8_GRAD(int8_grad_small_bf16, Bfloat16, 32, 64)
#endif

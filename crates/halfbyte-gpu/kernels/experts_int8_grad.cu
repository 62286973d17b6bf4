// halfbyte: fast
// halfbyte: cuda
// The gradient of 8-bit experts for their input, on tensor cores: the tile of int8_grad.h for the rows
// of one expert. With `products` results stay in float32, for sum_slots,
// which does not read those of rows without an expert.
#include "experts_int8.h"
#include "int8_grad.h"

#define STORE_GRAD(i, v) out[i] = Type::round(v)

template <class Type, int ROWS, int COLUMNS>
DEVICE void routed_grad(U4* shared, const u16* grad, const i8* codes, const float* scales, u16* out,
                        float* products, ROUTING, u64 outputs, u64 columns) {
    FIND_TILE(ROWS);
    const u64 c0 = across * COLUMNS, end = (u64)tile.first + tile.count;
    if (tile.expert >= experts) {
        if (!products) FILL_UNROUTED(c0, COLUMNS, columns, STORE_GRAD);
        return;
    }
    const Routed rows = routed_rows<ROWS, 4>(order, sharing, tile.first, end);
    const u64 first = tile.expert * outputs;
    multiply<Type, ROWS, COLUMNS>(shared, rows, tile.first, end, c0, grad, codes + first * columns,
                                  scales + first, out, products, outputs, columns);
}

#define EXPERTS_INT8_GRAD(name, Type, ROWS, COLUMNS)                                               \
    KERNEL(TILE_THREADS, name,                                                                     \
           (const u16* grad, const i8* codes, const float* scales, u16* out, float* products,      \
            ROUTING, u64 outputs, u64 columns)) {                                                  \
        DYNAMIC_SHARED(U4, shared);                                                                \
        routed_grad<Type, ROWS, COLUMNS>(shared, grad, codes, scales, out, products, order,        \
                                         starts, experts, sharing, tiles, outputs, columns);       \
    }

EXPERTS_INT8_GRAD(experts_int8_grad_large_f16, Float16, 128, 128)
EXPERTS_INT8_GRAD(experts_int8_grad_small_f16, Float16, 32, 64)
#if EMULATED || __CUDA_ARCH__ >= 800
EXPERTS_INT8_GRAD(experts_int8_grad_large_bf16, Bfloat16, 128, 128)
EXPERTS_INT8_GRAD(experts_int8_grad_small_bf16, Bfloat16, 32, 64)
#endif

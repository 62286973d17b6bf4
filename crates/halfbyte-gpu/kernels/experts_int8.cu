// halfbyte: exact
// halfbyte: cuda
// 8-bit experts on tensor cores: the tile of int8_matmul.h for the rows of one expert; what it computes
// stands in experts_int8_plain.cu.
#include "experts_int8.h"
#include "int8_matmul.h"

#define EXPERTS_INT8(name, Out, ROWS, OUTPUTS, BYTES, STAGES)                                      \
    KERNEL(TILE_THREADS, name,                                                                     \
           (const i8* a, const i8* weight, const float* row_stats, const float* scales,            \
            const Out::Type* input, const i32* columns, const i32* count, const Out::Type* bias,   \
            Out::Type* out, ROUTING, u64 outputs, u64 depth, u64 stride)) {                        \
        DYNAMIC_SHARED(u8, ring);                                                                  \
        FIND_TILE(ROWS);                                                                           \
        const u64 o0 = across * OUTPUTS, end = (u64)tile.first + tile.count;                       \
        if (tile.expert >= experts) {                                                              \
            FILL_UNROUTED(o0, OUTPUTS, outputs, STORE_##Out);                                      \
            return;                                                                                \
        }                                                                                          \
        const Routed rows = routed_rows<ROWS, BYTES / 16>(order, sharing, tile.first, end);        \
        const u64 first = tile.expert * outputs;                                                   \
        multiply<Out, ROWS, OUTPUTS, BYTES, STAGES>(                                               \
            ring, rows, tile.first, end, o0, a, weight + first * depth, row_stats, scales + first, \
            input, columns ? columns + tile.expert * depth : columns,                              \
            count ? count + tile.expert : count, bias ? bias + first : bias, out, outputs, depth,  \
            stride);                                                                               \
    }

#define STORE_Float32(i, v) out[i] = v
#define STORE_Float16(i, v) store_f16(out, i, v)
#define STORE_Bfloat16(i, v) store_bf16(out, i, v)

EXPERTS_INT8(experts_int8_large_f32, Float32, 128, 128, 64, 3)
EXPERTS_INT8(experts_int8_large_f16, Float16, 128, 128, 64, 3)
EXPERTS_INT8(experts_int8_large_bf16, Bfloat16, 128, 128, 64, 3)
EXPERTS_INT8(experts_int8_small_f32, Float32, 64, 32, 128, 4)
EXPERTS_INT8(experts_int8_small_f16, Float16, 64, 32, 128, 4)
EXPERTS_INT8(experts_int8_small_bf16, Bfloat16, 64, 32, 128, 4)

// halfbyte: exact
// halfbyte: cuda
// The int8 product on tensor cores; what it computes stands in int8_matmul_plain.cu.
//
//   for each tile of rows x outputs:                        a group of four warps
//       for each stretch of BYTES codes:                    STAGES of them under way in shared memory
//           for each 32 codes: sums += left · right^T       mma, int32
//       y = sums under both scales                          in registers
//       for each 16 outlier columns:                        what the tile needs of them in shared memory
//           y = fma(left, right, y)                         column by column
//       out = round(y + bias)
//
// Liberties: rows of shared memory are BYTES long without padding, their 16-byte chunks exchanged so
// that eight rows of one column lie in different banks (`chunk_at`). What lies behind the last row,
// output or code is zero. Codes that are not aligned to 16 bytes are gathered byte by byte.
#include "int8_matmul.h"

// Tiles of rows that go past the same outputs before the next outputs come: what is read together
// stays in L2.
#define BAND 8

#define INT8_MATMUL(name, Out, ROWS, OUTPUTS, BYTES, STAGES)                                       \
    KERNEL(TILE_THREADS, name,                                                                     \
           (const i8* a, const i8* weight, const float* row_stats, const float* scales,            \
            const Out::Type* input, const i32* columns, const i32* count, const Out::Type* bias,   \
            Out::Type* out, u64 rows, u64 outputs, u64 depth, u64 stride)) {                       \
        DYNAMIC_SHARED(u8, ring);                                                                  \
        u64 across = (outputs + OUTPUTS - 1) / OUTPUTS, down = (rows + ROWS - 1) / ROWS;           \
        u64 band = GROUP / (BAND * across), within = GROUP % (BAND * across);                      \
        u64 height = min_(down - band * BAND, (u64)BAND);                                          \
        u64 m0 = (band * BAND + within % height) * ROWS, o0 = within / height * OUTPUTS;           \
        multiply<Out, ROWS, OUTPUTS, BYTES, STAGES>(ring, InOrder{}, m0, rows, o0, a, weight,      \
                                                    row_stats, scales, input, columns, count,      \
                                                    bias, out, outputs, depth, stride);            \
    }

INT8_MATMUL(int8_matmul_large_i32, Sums, 128, 128, 64, 3)
INT8_MATMUL(int8_matmul_large_f32, Float32, 128, 128, 64, 3)
INT8_MATMUL(int8_matmul_large_f16, Float16, 128, 128, 64, 3)
INT8_MATMUL(int8_matmul_large_bf16, Bfloat16, 128, 128, 64, 3)
INT8_MATMUL(int8_matmul_small_i32, Sums, 64, 32, 128, 4)
INT8_MATMUL(int8_matmul_small_f32, Float32, 64, 32, 128, 4)
INT8_MATMUL(int8_matmul_small_f16, Float16, 64, 32, 128, 4)
INT8_MATMUL(int8_matmul_small_bf16, Bfloat16, 64, 32, 128, 4)

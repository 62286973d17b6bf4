// The tile of int8_grad.cu. See there for what it computes.
#ifndef HALFBYTE_INT8_GRAD_H
#define HALFBYTE_INT8_GRAD_H
#include "int8.h"
#include "int8_tile.h"
#include "ptx.h"

// Outputs of the layer in a step.
#define STEP 32
#define LEFT_STAGES 3
#define RIGHT_STAGES 2

struct Float16 {
    DEVICE u32 pack(float low, float high) { return pack_f16(low, high); }
    DEVICE u16 round(float v) { return float_to_half(v); }
    DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_f16(c, a, b0, b1); }
};

#if EMULATED || __CUDA_ARCH__ >= 800
struct Bfloat16 {
    DEVICE u32 pack(float low, float high) { return pack_bf16(low, high); }
    DEVICE u16 round(float v) { return float_to_bf16(v); }
    DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_bf16(c, a, b0, b1); }
};
#endif

// ---- left: rows of 4 chunks of 8 elements, exchanged so that eight rows lie in different banks ------

DEVICE u32 left_chunk(u32 row, u32 chunk) { return row * 4 + (chunk ^ (row >> 1 & 3)); }

template <int ROWS, class Rows>
DEVICE void load_left(U4* left, const Rows& rows, const u16* grad, u64 first, u64 end, u64 k,
                      u64 outputs, bool aligned) {
    UNROLL
    for (u32 i = 0; i < ROWS * 4 / TILE_THREADS; i++) {
        u32 index = i * TILE_THREADS + THREAD, row = index / 4, chunk = index % 4;
        U4* to = left + left_chunk(row, chunk);
        u64 at = k + 8 * chunk;
        u32 elements = first + row < end && at < outputs ? (u32)min_(outputs - at, (u64)8) : 0;
        const u16* from =
            elements > 0 ? grad + copied_row(rows, i, first + row) * outputs + at : grad;
        if (aligned) {
            cp_async_16(to, from, 2 * elements);
        } else {
            u32 words[4] = {0, 0, 0, 0};
            UNROLL
            for (u32 e = 0; e < 8; e++) {
                if (e < elements) words[e / 2] |= (u32)from[e] << (e % 2 * 16);
            }
            *to = U4{words[0], words[1], words[2], words[3]};
        }
    }
}

// ---- right: rows of one output each -----------------------------------------------------------------

// Sixteen codes of one output, and its scale over 127.
struct Codes {
    U4 codes;
    float scale;
};

template <int COLUMNS>
DEVICE void read_codes(Codes (&held)[COLUMNS / 64], const i8* codes, const float* scales, u64 o0,
                       u64 outputs, u64 first, u64 columns, bool aligned) {
    UNROLL
    for (u32 i = 0; i < COLUMNS / 64; i++) {
        u32 index = i * TILE_THREADS + THREAD;
        u64 o = o0 + index / (COLUMNS / 16), at = first + 16 * (index % (COLUMNS / 16));
        u32 count = o < outputs && at < columns ? (u32)min_(columns - at, (u64)16) : 0;
        held[i].codes = U4{0, 0, 0, 0};
        held[i].scale = 0.0f;
        if (count == 0) continue;
        held[i].scale = scales[o] * INV_127;
        const i8* from = codes + o * columns + at;
        if (aligned) {
            held[i].codes = *(const U4*)from;
        } else {
            u32 words[4] = {0, 0, 0, 0};
            UNROLL
            for (u32 b = 0; b < 16; b++) {
                if (b < count) words[b / 4] |= (u32)(u8)from[b] << (b % 4 * 8);
            }
            held[i].codes = U4{words[0], words[1], words[2], words[3]};
        }
    }
}

// A byte of `word`, which holds codes plus 128: in the low bits of 2^23, it is a float.
template <int BYTE> DEVICE float code_at(u32 word) {
    return as_float(permute(word, 0x4B000000u, 0x7540u + BYTE)) - 8388736.0f;
}

template <class Type> DEVICE U4 decode_eight(u32 low, u32 high, float scale) {
    low ^= 0x80808080u;
    high ^= 0x80808080u;
    return U4{Type::pack(code_at<0>(low) * scale, code_at<1>(low) * scale),
              Type::pack(code_at<2>(low) * scale, code_at<3>(low) * scale),
              Type::pack(code_at<0>(high) * scale, code_at<1>(high) * scale),
              Type::pack(code_at<2>(high) * scale, code_at<3>(high) * scale)};
}

// The place of a chunk of 8 elements: exchanged so that eight outputs lie in different banks.
template <int COLUMNS> DEVICE u32 right_chunk(u32 o, u32 chunk) {
    return o * (COLUMNS / 8) + (chunk ^ (o & 7));
}

template <class Type, int COLUMNS>
DEVICE void decode_right(U4* right, const Codes (&held)[COLUMNS / 64]) {
    UNROLL
    for (u32 i = 0; i < COLUMNS / 64; i++) {
        u32 index = i * TILE_THREADS + THREAD;
        u32 o = index / (COLUMNS / 16), sixteen = index % (COLUMNS / 16);
        U4 codes = held[i].codes;
        U4 low = decode_eight<Type>(codes.x, codes.y, held[i].scale);
        U4 high = decode_eight<Type>(codes.z, codes.w, held[i].scale);
        // Every other four threads store their second half first: then eight are in eight banks.
        bool flip = sixteen / 4 % 2;
        right[right_chunk<COLUMNS>(o, 2 * sixteen + flip)] = flip ? high : low;
        right[right_chunk<COLUMNS>(o, 2 * sixteen + !flip)] = flip ? low : high;
    }
}

// ---- results of experts: rounded to the type of the gradient, or as they are, to be summed ----------

struct alignas(8) TwoFloats {
    float low, high;
};

// Two results from `at` on, `left` of them to the end of the row.
template <class Type>
DEVICE void store_routed(u16* out, float* products, u64 at, float low, float high, i32 left,
                         bool pairs) {
    if (products) {
        if (left >= 2 && pairs) {
            *(TwoFloats*)(products + at) = TwoFloats{low, high};
        } else {
            if (left >= 1) products[at] = low;
            if (left >= 2) products[at + 1] = high;
        }
    } else if (left >= 2 && pairs) {
        *(u32*)(out + at) = Type::pack(low, high);
    } else {
        if (left >= 1) out[at] = Type::round(low);
        if (left >= 2) out[at + 1] = Type::round(high);
    }
}

// ---- the product ------------------------------------------------------------------------------------

// The tile at place m0 of those before `end`, and column c0.
// Without `products` results go to `out`.
template <class Type, int ROWS, int COLUMNS, class Rows>
DEVICE void multiply(U4* shared, const Rows& rows, u64 m0, u64 end, u64 c0, const u16* grad,
                     const i8* codes, const float* scales, u16* out, float* products, u64 outputs,
                     u64 columns) {
    // Warps are 2 x 2; each has M tiles of 16 rows and N tiles of 8 columns.
    const int M = ROWS / 32, N = COLUMNS / 16;
    const int LEFT = ROWS * 4, RIGHT = STEP * COLUMNS / 8;
    static_assert((LEFT_STAGES * LEFT + RIGHT_STAGES * RIGHT) * 16 <= 48 * 1024,
                  "what the launcher asks for");
    U4* lefts = shared;
    U4* rights = shared + LEFT_STAGES * LEFT;

    u32 warp_m = THREAD / 64 * (ROWS / 2), warp_n = THREAD / 32 % 2 * (COLUMNS / 2);
    bool grad_aligned = (((u64)grad & 15) | (outputs & 7)) == 0;
    bool codes_aligned = (((u64)codes | columns) & 15) == 0;

    float sums[M][N][4];
    UNROLL
    for (int m = 0; m < M; m++) {
        UNROLL
        for (int n = 0; n < N; n++) {
            UNROLL
            for (int i = 0; i < 4; i++) sums[m][n][i] = 0.0f;
        }
    }

    u32 steps = (u32)((outputs + STEP - 1) / STEP);
    Codes held[COLUMNS / 64];
    UNROLL
    for (u32 s = 0; s < LEFT_STAGES - 1; s++) {
        if (s < steps) {
            load_left<ROWS>(lefts + s * LEFT, rows, grad, m0, end, s * STEP, outputs, grad_aligned);
        }
        cp_async_commit();
    }
    read_codes<COLUMNS>(held, codes, scales, 0, outputs, c0, columns, codes_aligned);
    decode_right<Type, COLUMNS>(rights, held);
    read_codes<COLUMNS>(held, codes, scales, STEP, outputs, c0, columns, codes_aligned);
    u32 stage = 0, coming = LEFT_STAGES - 1;
    for (u32 s = 0; s < steps; s++) {
        cp_async_wait<LEFT_STAGES - 2>();
        BARRIER();
        u64 next = (u64)(s + LEFT_STAGES - 1) * STEP;
        if (next < outputs) {
            load_left<ROWS>(lefts + coming * LEFT, rows, grad, m0, end, next, outputs, grad_aligned);
        }
        cp_async_commit();
        const U4* left = lefts + stage * LEFT;
        const U4* right = rights + s % RIGHT_STAGES * RIGHT;
        UNROLL
        for (int k = 0; k < STEP / 16; k++) {
            u32 a[M][4];
            UNROLL
            for (int m = 0; m < M; m++) {
                ldmatrix_x4(a[m], left + left_chunk(warp_m + 16 * m + LANE % 16, 2 * k + LANE / 16));
            }
            UNROLL
            for (int n = 0; n < N; n += 2) {
                u32 b[4];
                ldmatrix_x4_trans(b, right + right_chunk<COLUMNS>(16 * k + LANE % 16,
                                                                  warp_n / 8 + n + LANE / 16));
                UNROLL
                for (int m = 0; m < M; m++) {
                    Type::mma(sums[m][n], a[m], b[0], b[1]);
                    Type::mma(sums[m][n + 1], a[m], b[2], b[3]);
                }
            }
        }
        decode_right<Type, COLUMNS>(rights + (s + 1) % RIGHT_STAGES * RIGHT, held);
        read_codes<COLUMNS>(held, codes, scales, (u64)(s + 2) * STEP, outputs, c0, columns,
                            codes_aligned);
        stage = stage == LEFT_STAGES - 1 ? 0 : stage + 1;
        coming = coming == LEFT_STAGES - 1 ? 0 : coming + 1;
    }
    cp_async_wait<0>();

    u32 row = warp_m + LANE / 4, column = warp_n + LANE % 4 * 2;
    const i32 rows_left = (i32)min_(end - min_(m0 + row, end), (u64)ROWS);
    const i32 columns_left = (i32)min_(columns - min_(c0 + column, columns), (u64)COLUMNS);
    if constexpr (Rows::ROUTED) {
        u64 misaligned = products ? (u64)products & 7 : (u64)out & 3;
        bool pairs = (misaligned | (columns & 1)) == 0;
        UNROLL
        for (int m = 0; m < 2 * M; m++) {
            if (8 * m >= rows_left) continue;
            u64 at = output_row(rows, m0 + row + 8 * m) * columns + c0 + column;
            UNROLL
            for (int n = 0; n < N; n++) {
                store_routed<Type>(out, products, at + 8 * n, sums[m / 2][n][m % 2 * 2],
                                   sums[m / 2][n][m % 2 * 2 + 1], columns_left - 8 * n, pairs);
            }
        }
        return;
    }
    bool pairs = (((u64)out & 3) | (columns & 1)) == 0;
    u16* to = out + (m0 + row) * columns + c0 + column;
    UNROLL
    for (int m = 0; m < 2 * M; m++) {
        UNROLL
        for (int n = 0; n < N; n++) {
            i32 left = 8 * m < rows_left ? columns_left - 8 * n : 0;
            float low = sums[m / 2][n][m % 2 * 2], high = sums[m / 2][n][m % 2 * 2 + 1];
            if (left >= 2 && pairs) {
                *(u32*)(to + 8 * n) = Type::pack(low, high);
            } else {
                if (left >= 1) to[8 * n] = Type::round(low);
                if (left >= 2) to[8 * n + 1] = Type::round(high);
            }
        }
        to += 8 * columns;
    }
}

#endif

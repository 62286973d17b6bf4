// The tile of int8_matmul.cu. See there for what it computes.
#ifndef HALFBYTE_INT8_MATMUL_H
#define HALFBYTE_INT8_MATMUL_H
#include "int8.h"
#include "int8_tile.h"
#include "ptx.h"

// Outlier columns in shared memory at once.
#define OUTLIERS 16

// ---- what is stored -------------------------------------------------------------------------------

struct Sums {
    typedef i32 Type;
    static const bool SCALED = false;
};

struct Float32 {
    typedef f32 Type;
    static const bool SCALED = true;
    DEVICE float load(const f32* p, u64 i) { return p[i]; }
    DEVICE f32 round(float v) { return v; }
};

struct Float16 {
    typedef f16 Type;
    static const bool SCALED = true;
    DEVICE float load(const f16* p, u64 i) { return load_f16(p, i); }
    DEVICE f16 round(float v) { return float_to_half(v); }
};

struct Bfloat16 {
    typedef bf16 Type;
    static const bool SCALED = true;
    DEVICE float load(const bf16* p, u64 i) { return load_bf16(p, i); }
    DEVICE bf16 round(float v) { return float_to_bf16(v); }
};

template <class V> struct alignas(2 * sizeof(V)) Pair {
    V first, second;
};

// Stores what there is of two outputs: `left` of them to the end of the row.
template <class Out>
DEVICE void store_pair(typename Out::Type* to, typename Out::Type first, typename Out::Type second,
                       i32 left, bool pairs) {
    if (left >= 2 && pairs) {
        *(Pair<typename Out::Type>*)to = Pair<typename Out::Type>{first, second};
    } else {
        if (left >= 1) to[0] = first;
        if (left >= 2) to[1] = second;
    }
}

// ---- shared memory --------------------------------------------------------------------------------

// The place of a chunk of 16 codes within its row of `CHUNKS`.
template <int CHUNKS> DEVICE u32 chunk_at(u32 row, u32 chunk) {
    return CHUNKS == 8 ? chunk ^ (row & 7) : chunk ^ (row >> 1 & 3);
}

// Places first..first + ROWS of those before `end`, codes k.. of 16 * CHUNKS.
template <int ROWS, int CHUNKS, class Rows>
DEVICE void load_codes(u8* shared, const Rows& rows, const i8* codes, u64 first, u64 end, u64 stride,
                       u64 k, u64 depth, bool aligned) {
    UNROLL
    for (u32 i = 0; i < ROWS * CHUNKS / TILE_THREADS; i++) {
        u32 index = i * TILE_THREADS + THREAD, row = index / CHUNKS, chunk = index % CHUNKS;
        u8* to = shared + (row * CHUNKS + chunk_at<CHUNKS>(row, chunk)) * 16;
        u64 at = k + 16 * chunk;
        u32 bytes = first + row < end && at < depth ? (u32)min_(depth - at, (u64)16) : 0;
        const i8* from =
            bytes > 0 ? codes + copied_row(rows, i, first + row) * stride + at : codes;
        if (aligned) {
            cp_async_16(to, from, bytes);
        } else {
            u32 words[4] = {0, 0, 0, 0};
            UNROLL
            for (u32 b = 0; b < 16; b++) {
                if (b < bytes) words[b / 4] |= (u32)(u8)from[b] << (b % 4 * 8);
            }
            *(U4*)to = U4{words[0], words[1], words[2], words[3]};
        }
    }
}

// ---- the product ----------------------------------------------------------------------------------

// Of experts, codes are those of all columns, whichever of them are outliers of which expert: takes
// the products of the outliers' columns back out of the sums, exactly.
template <int ROWS, int OUTPUTS, int M, int N, class Rows>
DEVICE void take_back(i32 (&sums)[M][N][4], i32* left, i32* right, const Rows& rows, u64 m0, u64 end,
                      u64 o0, u32 row, u32 output, const i8* a, const i8* weight, const i32* columns,
                      u32 outliers, u64 outputs, u64 depth, u64 stride) {
    for (u32 j0 = 0; j0 < outliers; j0 += OUTLIERS) {
        u32 now = min_(outliers - j0, (u32)OUTLIERS);
        BARRIER();
        for (u32 i = THREAD; i < now * ROWS; i += TILE_THREADS) {
            u64 m = m0 + i % ROWS, column = (u64)columns[j0 + i / ROWS];
            left[i] = m < end ? a[input_row(rows, m) * stride + column] : 0;
        }
        for (u32 i = THREAD; i < now * OUTPUTS; i += TILE_THREADS) {
            u64 o = o0 + i % OUTPUTS, column = (u64)columns[j0 + i / OUTPUTS];
            right[i] = o < outputs ? weight[o * depth + column] : 0;
        }
        BARRIER();
        for (u32 j = 0; j < now; j++) {
            UNROLL
            for (int m = 0; m < 2 * M; m++) {
                i32 x = left[j * ROWS + row + 8 * m];
                UNROLL
                for (int n = 0; n < N; n++) {
                    UNROLL
                    for (int i = 0; i < 2; i++) {
                        sums[m / 2][n][m % 2 * 2 + i] -= x * right[j * OUTPUTS + output + 8 * n + i];
                    }
                }
            }
        }
    }
}

// The tile at place m0 of those before `end`, and output o0.
template <class Out, int ROWS, int OUTPUTS, int BYTES, int STAGES, class Rows>
DEVICE void multiply(u8* ring, const Rows& rows, u64 m0, u64 end, u64 o0, const i8* a,
                     const i8* weight, const float* row_stats, const float* scales,
                     const typename Out::Type* input, const i32* columns, const i32* count,
                     const typename Out::Type* bias, typename Out::Type* out, u64 outputs, u64 depth,
                     u64 stride) {
    // Warps are 2 x 2; each has M tiles of 16 rows and N tiles of 8 outputs.
    const int M = ROWS / 32, N = OUTPUTS / 16, CHUNKS = BYTES / 16;
    const int STAGE = (ROWS + OUTPUTS) * BYTES;
    static_assert(STAGES * STAGE <= 48 * 1024, "what the launcher asks for");
    static_assert((OUTLIERS + 1) * (ROWS + OUTPUTS) * 4 <= STAGES * STAGE, "outliers fit as well");

    u32 warp_m = THREAD / 64 * (ROWS / 2), warp_n = THREAD / 32 % 2 * (OUTPUTS / 2);
    bool left_aligned = (((u64)a | stride) & 15) == 0;
    bool right_aligned = (((u64)weight | depth) & 15) == 0;

    i32 sums[M][N][4];
    UNROLL
    for (int m = 0; m < M; m++) {
        UNROLL
        for (int n = 0; n < N; n++) {
            UNROLL
            for (int i = 0; i < 4; i++) sums[m][n][i] = 0;
        }
    }

    u32 steps = (u32)((depth + BYTES - 1) / BYTES);
    UNROLL
    for (u32 s = 0; s < STAGES - 1; s++) {
        if (s < steps) {
            u8* left = ring + s * STAGE;
            load_codes<ROWS, CHUNKS>(left, rows, a, m0, end, stride, s * BYTES, depth, left_aligned);
            load_codes<OUTPUTS, CHUNKS>(left + ROWS * BYTES, InOrder{}, weight, o0, outputs, depth,
                                        s * BYTES, depth, right_aligned);
        }
        cp_async_commit();
    }
    u32 stage = 0, coming = STAGES - 1;
    for (u32 s = 0; s < steps; s++) {
        cp_async_wait<STAGES - 2>();
        BARRIER();
        if (s + STAGES - 1 < steps) {
            u8* left = ring + coming * STAGE;
            u64 k = (u64)(s + STAGES - 1) * BYTES;
            load_codes<ROWS, CHUNKS>(left, rows, a, m0, end, stride, k, depth, left_aligned);
            load_codes<OUTPUTS, CHUNKS>(left + ROWS * BYTES, InOrder{}, weight, o0, outputs, depth, k,
                                        depth, right_aligned);
        }
        cp_async_commit();
        const u8* left = ring + stage * STAGE;
        const u8* right = left + ROWS * BYTES;
        UNROLL
        for (int k = 0; k < BYTES / 32; k++) {
            u32 rows_of[M][4], columns_of[N][2];
            UNROLL
            for (int m = 0; m < M; m++) {
                u32 row = warp_m + 16 * m + LANE % 16;
                u32 chunk = chunk_at<CHUNKS>(row, 2 * k + LANE / 16);
                ldmatrix_x4(rows_of[m], left + (row * CHUNKS + chunk) * 16);
            }
            UNROLL
            for (int n = 0; n < N; n += 2) {
                u32 row = warp_n + 8 * n + LANE % 8 + LANE / 16 * 8;
                u32 chunk = chunk_at<CHUNKS>(row, 2 * k + LANE / 8 % 2);
                u32 four[4];
                ldmatrix_x4(four, right + (row * CHUNKS + chunk) * 16);
                columns_of[n][0] = four[0];
                columns_of[n][1] = four[1];
                columns_of[n + 1][0] = four[2];
                columns_of[n + 1][1] = four[3];
            }
            UNROLL
            for (int m = 0; m < M; m++) {
                UNROLL
                for (int n = 0; n < N; n++) mma_s8(sums[m][n], rows_of[m], columns_of[n]);
            }
        }
        stage = stage == STAGES - 1 ? 0 : stage + 1;
        coming = coming == STAGES - 1 ? 0 : coming + 1;
    }
    cp_async_wait<0>();

    // Value i of tile (m, n) is that of row `16 * m + i / 2 * 8` and output `8 * n + i % 2` from the
    // lane's first ones on.
    const u32 row = warp_m + LANE / 4, output = warp_n + LANE % 4 * 2;
    const i32 rows_left = (i32)min_(end - min_(m0 + row, end), (u64)ROWS);
    const i32 outputs_left = (i32)min_(outputs - min_(o0 + output, outputs), (u64)OUTPUTS);
    typename Out::Type* to = out + (m0 + row) * outputs + o0 + output;
    bool pairs = (((u64)out | outputs * sizeof(*out)) & (2 * sizeof(*out) - 1)) == 0;
    if constexpr (!Out::SCALED) {
        UNROLL
        for (int m = 0; m < 2 * M; m++) {
            if (8 * m < rows_left) {
                UNROLL
                for (int n = 0; n < N; n++) {
                    store_pair<Out>(to + 8 * n, sums[m / 2][n][m % 2 * 2],
                                    sums[m / 2][n][m % 2 * 2 + 1], outputs_left - 8 * n, pairs);
                }
            }
            to += 8 * outputs;
        }
    } else {
        float* stats = (float*)ring;              // [ROWS]
        float* scale = stats + ROWS;              // [OUTPUTS]
        float* left = scale + OUTPUTS;            // [OUTLIERS][ROWS]
        float* right = left + OUTLIERS * ROWS;    // [OUTLIERS][OUTPUTS]
        BARRIER();
        for (u32 i = THREAD; i < ROWS; i += TILE_THREADS) {
            stats[i] = m0 + i < end ? row_stats[input_row(rows, m0 + i)] : 0.0f;
        }
        for (u32 i = THREAD; i < OUTPUTS; i += TILE_THREADS) {
            scale[i] = o0 + i < outputs ? scales[o0 + i] : 0.0f;
        }
        BARRIER();
        if constexpr (Rows::ROUTED) {
            take_back<ROWS, OUTPUTS>(sums, (i32*)left, (i32*)right, rows, m0, end, o0, row, output, a,
                                     weight, columns, count ? (u32)count[0] : 0, outputs, depth,
                                     stride);
        }
        float y[M][N][4];
        UNROLL
        for (int m = 0; m < M; m++) {
            UNROLL
            for (int n = 0; n < N; n++) {
                UNROLL
                for (int i = 0; i < 4; i++) {
                    y[m][n][i] = scaled8(sums[m][n][i], stats[row + 16 * m + i / 2 * 8],
                                         scale[output + 8 * n + i % 2]);
                }
            }
        }
        u32 outliers = count ? (u32)count[0] : 0;
        for (u32 j0 = 0; j0 < outliers; j0 += OUTLIERS) {
            u32 now = min_(outliers - j0, (u32)OUTLIERS);
            BARRIER();
            for (u32 i = THREAD; i < now * ROWS; i += TILE_THREADS) {
                u64 m = m0 + i % ROWS, column = (u64)columns[j0 + i / ROWS];
                left[i] = m < end ? Out::load(input, input_row(rows, m) * depth + column) : 0.0f;
            }
            for (u32 i = THREAD; i < now * OUTPUTS; i += TILE_THREADS) {
                u64 o = o0 + i % OUTPUTS, column = (u64)columns[j0 + i / OUTPUTS];
                right[i] =
                    o < outputs ? decode8(weight[o * depth + column], scale[i % OUTPUTS]) : 0.0f;
            }
            BARRIER();
            for (u32 j = 0; j < now; j++) {
                float w[N][2];
                UNROLL
                for (int n = 0; n < N; n++) {
                    w[n][0] = right[j * OUTPUTS + output + 8 * n];
                    w[n][1] = right[j * OUTPUTS + output + 8 * n + 1];
                }
                UNROLL
                for (int m = 0; m < 2 * M; m++) {
                    float x = left[j * ROWS + row + 8 * m];
                    UNROLL
                    for (int n = 0; n < N; n++) {
                        UNROLL
                        for (int i = 0; i < 2; i++) {
                            float& sum = y[m / 2][n][m % 2 * 2 + i];
                            sum = fma_(x, w[n][i], sum);
                        }
                    }
                }
            }
        }
        if (bias) {
            UNROLL
            for (int n = 0; n < N; n++) {
                UNROLL
                for (int i = 0; i < 2; i++) {
                    u64 o = o0 + output + 8 * n + i;
                    float b = o < outputs ? Out::load(bias, o) : 0.0f;
                    UNROLL
                    for (int m = 0; m < 2 * M; m++) y[m / 2][n][m % 2 * 2 + i] += b;
                }
            }
        }
        UNROLL
        for (int m = 0; m < 2 * M; m++) {
            if (8 * m < rows_left) {
                if constexpr (Rows::ROUTED) {
                    to = out + output_row(rows, m0 + row + 8 * m) * outputs + o0 + output;
                }
                UNROLL
                for (int n = 0; n < N; n++) {
                    store_pair<Out>(to + 8 * n, Out::round(y[m / 2][n][m % 2 * 2]),
                                    Out::round(y[m / 2][n][m % 2 * 2 + 1]), outputs_left - 8 * n,
                                    pairs);
                }
            }
            to += 8 * outputs;
        }
    }
}

#endif

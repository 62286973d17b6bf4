// The tile of matmul_4bit.cu. See there for what it computes.
#ifndef HALFBYTE_MATMUL_4BIT_H
#define HALFBYTE_MATMUL_4BIT_H
#include "port.h"
#include "ptx.h"
#include "weight_4bit.h"

#if EMULATED
#define DEVICE_MEMBER inline
#define ROLLED
#else
#define DEVICE_MEMBER __device__ __forceinline__
#define ROLLED _Pragma("unroll 1")
#endif

// A kernel that leaves registers for `resident` groups on a multiprocessor.
#if EMULATED
#define RESIDENT_KERNEL(threads, resident, name, args) KERNEL(threads, name, args)
#else
#define RESIDENT_KERNEL(threads, resident, name, args)                                             \
    extern "C" __global__ void __launch_bounds__(threads, resident) name args
#endif

// Of the depth, in one step.
#define STEP 64
// Tiles of neighbouring rows that run side by side, so that their inputs stay in the L2 cache
// while the weight passes by once.
#define BAND 16

struct F16 {
    static DEVICE_MEMBER u32 pack(float low, float high) { return pack_f16(low, high); }
    static DEVICE_MEMBER float load(const u16* p, u64 i) { return load_f16(p, i); }
    static DEVICE_MEMBER void store(u16* p, u64 i, float v) { store_f16(p, i, v); }
    static DEVICE_MEMBER void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        mma_f16(c, a, b0, b1);
    }
};

#if EMULATED || __CUDA_ARCH__ >= 800
struct Bf16 {
    static DEVICE_MEMBER u32 pack(float low, float high) { return pack_bf16(low, high); }
    static DEVICE_MEMBER float load(const u16* p, u64 i) { return load_bf16(p, i); }
    static DEVICE_MEMBER void store(u16* p, u64 i, float v) { store_bf16(p, i, v); }
    static DEVICE_MEMBER void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        mma_bf16(c, a, b0, b1);
    }
};
#endif

// A tile of R x C over DOWN x ACROSS warps, copies S steps deep, registers for at least RESIDENT
// groups on a multiprocessor. A thread decodes 32 codes a step, or two times 32 (its parts).
template <u32 R, u32 C, u32 DOWN, u32 ACROSS, int S, int RESIDENT_> struct Shape {
    static constexpr u32 ROWS = R, COLUMNS = C, WARPS_ACROSS = ACROSS;
    static constexpr u32 THREAD_COUNT = DOWN * ACROSS * 32, PARTS = 2 * C / THREAD_COUNT;
    static constexpr int STAGES = S, RESIDENT = RESIDENT_;
    // Of a warp: rows and columns, and their mma tiles.
    static constexpr u32 WARP_ROWS = R / DOWN, WARP_COLUMNS = C / ACROSS;
    static constexpr u32 TILES_DOWN = WARP_ROWS / 16, TILES_ACROSS = WARP_COLUMNS / 8;
    // Shared memory, in bytes: the table (64), the nested code (1024), then from here on rings of
    // packed codes and of inputs, and two tiles of decoded weight. ops/matmul_4bit/plan.rs has
    // the same sum.
    static constexpr u32 PACKED_BYTES = C * STEP / 2, DECODED_BYTES = C * STEP * 2;
    static constexpr u32 INPUT_BYTES = R * STEP * 2;
    static constexpr u32 PACKED_AT = 1152, DECODED_AT = PACKED_AT + S * PACKED_BYTES;
    static constexpr u32 INPUT_AT = DECODED_AT + 2 * DECODED_BYTES;
    // Behind them, where rows are listed: two lists of ROWS.
    static constexpr u32 ROWS_AT = INPUT_AT + S * INPUT_BYTES;
    static_assert(PARTS * THREAD_COUNT == 2 * C && PARTS <= 2, "32 codes a part");
    static_assert(TILES_DOWN >= 1 && TILES_ACROSS % 2 == 0, "ldmatrix_x4 takes two tiles");
    static_assert(R * 8 % THREAD_COUNT == 0 && THREAD_COUNT % 64 == 0, "whole rounds of copies");
};

struct Scales {
    const float* absmax;
    const u8* codes; // null for plain scales
    const float *code2, *absmax2, *offset;
    u32 shift, shift2; // logarithms of the block sizes
    u64 first; // the number of the weight's first block
};

// What a kernel is given.
struct Operands {
    Scales scales;
    const u8* packed;
    u32 table_kind;
    const float* table;
    const u16* input;
    const u16* bias;
    u16* out;
    float* partials;
    u64 rows;
    u32 out_features, in_features;
    // Steps that one split takes.
    u32 steps;
    u32 flags;
};
#define PACKED_IS_ALIGNED 1 // to 16 bytes
#define INPUT_IS_ALIGNED 2 // every row of it, to 16 bytes

// The 16 values of one block, scaled and rounded to 16 bits: byte planes of four times four.
struct Scaled {
    u32 low[4], high[4];
};

template <class E> DEVICE Scaled scale_table(const float* table, float scale) {
    Scaled scaled;
    UNROLL
    for (u32 i = 0; i < 4; i++) {
        const U4 bits = ((const U4*)table)[i];
        const u32 first = E::pack(as_float(bits.x) * scale, as_float(bits.y) * scale);
        const u32 second = E::pack(as_float(bits.z) * scale, as_float(bits.w) * scale);
        scaled.low[i] = permute(first, second, 0x6420);
        scaled.high[i] = permute(first, second, 0x7531);
    }
    return scaled;
}

// Eight codes, as they lie in four bytes, to eight elements. `permute` looks four codes up in eight
// entries by their low three bits; a second one picks by the top bit between two of these.
DEVICE U4 decode_8(const Scaled& scaled, u32 codes) {
    const u32 low_bits = codes & 0x77777777u;
    const u32 halves = (codes >> 1 & 0x44444444u) | 0x32103210u;
    u32 words[4];
    UNROLL
    for (u32 i = 0; i < 2; i++) {
        const u32 entry = low_bits >> 16 * i, half = halves >> 16 * i;
        const u32 low = permute(permute(scaled.low[0], scaled.low[1], entry),
                                permute(scaled.low[2], scaled.low[3], entry), half);
        const u32 high = permute(permute(scaled.high[0], scaled.high[1], entry),
                                 permute(scaled.high[2], scaled.high[3], entry), half);
        // The first element of a byte is its high nibble.
        words[2 * i] = permute(low, high, 0x4051);
        words[2 * i + 1] = permute(low, high, 0x6273);
    }
    return U4{words[0], words[1], words[2], words[3]};
}

// The weight's side of a tile, for one thread: 32 codes of one line a step, and as many of the line
// PART_LINES on when it has two parts. The lines of the tile are the weight's rows: COLUMNS of
// them, 64 codes long; for the gradient 64, COLUMNS long.
template <class E, class S, bool GRAD> struct WeightSide {
    static constexpr u32 LINE_BYTES = GRAD ? S::COLUMNS * 2 : STEP * 2;
    static constexpr u32 PART_BYTES = S::DECODED_BYTES / S::PARTS;
    static constexpr u32 PART_LINES = PART_BYTES / LINE_BYTES;
    struct Raw {
        float scale;
        u32 code;
    };
    const Operands& o;
    u8* memory;
    u64 element; // the first of the 32 in the flattened weight, at step 0
    u32 inside[S::PARTS]; // steps in which they exist
    u32 line_at, chunk; // the line of a decoded tile; the first of four chunks there, swizzled
    float offset;
    Raw first[S::PARTS], second[S::PARTS]; // of the next step to decode, and of the one after

    DEVICE_MEMBER WeightSide(const Operands& operands, u8* at, u64 column, u64 depth, u32 steps)
        : o(operands), memory(at) {
        // Eight neighbouring threads take two segments of four lines: their stores meet no bank
        // twice.
        const bool wide = GRAD && S::COLUMNS == 128;
        const u32 line = wide ? (THREAD >> 1 & 3) | THREAD >> 4 << 2 : THREAD / 2;
        const u32 segment = wide ? (THREAD & 1) | (THREAD >> 3 & 1) << 1 : THREAD % 2;
        const u64 row = (GRAD ? depth : column) + line;
        const u64 start = (GRAD ? column : depth) + segment * 32;
        element = row * o.in_features + start;
        UNROLL
        for (u32 part = 0; part < S::PARTS; part++) {
            const u64 line = row + part * PART_LINES;
            inside[part] = 0;
            if (line < o.out_features && start < o.in_features) {
                const u64 left = GRAD ? o.out_features - line : o.in_features - start;
                inside[part] = (u32)min_((left + STEP - 1) / STEP, (u64)steps);
            }
        }
        line_at = S::DECODED_AT + line * LINE_BYTES;
        chunk = segment * 4 ^ (line & 7);
        offset = o.scales.codes ? o.scales.offset[0] : 0.0f;
        UNROLL
        for (u32 part = 0; part < S::PARTS; part++) {
            first[part] = fetch(0, part);
            second[part] = fetch(1, part);
        }
    }

    DEVICE_MEMBER u64 element_at(u32 step, u32 part) const {
        return element + (GRAD ? (u64)(step * STEP + part * PART_LINES) * o.in_features
                               : (u64)(part * PART_LINES) * o.in_features + step * STEP);
    }

    DEVICE_MEMBER Raw fetch(u32 step, u32 part) const {
        Raw raw = {0.0f, 0};
        if (step < inside[part]) {
            const u64 block = o.scales.first + (element_at(step, part) >> o.scales.shift);
            if (o.scales.codes) {
                raw.code = o.scales.codes[block];
                raw.scale = o.scales.absmax2[block >> o.scales.shift2];
            } else {
                raw.scale = o.scales.absmax[block];
            }
        }
        return raw;
    }

    DEVICE_MEMBER u8* place(u32 slot, u32 part) const {
        const u32 at = part * S::THREAD_COUNT + THREAD;
        return memory + S::PACKED_AT + slot * S::PACKED_BYTES + at * 16;
    }

    // The codes of a step. Where there are none the scale is zero, whatever the slot holds.
    DEVICE_MEMBER void copy(u32 step, u32 slot) const {
        UNROLL
        for (u32 part = 0; part < S::PARTS; part++) {
            if (step < inside[part]) {
                const u8* from = o.packed + element_at(step, part) / 2;
                if (o.flags & PACKED_IS_ALIGNED) {
                    cp_async_16(place(slot, part), from, 16);
                } else {
                    ROLLED
                    for (u32 i = 0; i < 16; i++) place(slot, part)[i] = from[i];
                }
            }
        }
    }

    // The scaled table of a part of a step. Steps come one after the other.
    DEVICE_MEMBER Scaled take(u32 step, u32 part) {
        float scale = first[part].scale;
        if (o.scales.codes) {
            const float* code = (const float*)memory + 16;
            scale = step < inside[part] ? code[first[part].code] * scale + offset : 0.0f;
        }
        first[part] = second[part];
        second[part] = fetch(step + 2, part);
        return scale_table<E>((const float*)memory, scale);
    }

    // A quarter of a part's codes into the decoded tile number `tile`.
    DEVICE_MEMBER void decode(const Scaled& table, u32 codes, u32 tile, u32 part,
                              u32 quarter) const {
        u8* line = memory + line_at + tile * S::DECODED_BYTES + part * PART_BYTES;
        *(U4*)(line + ((chunk ^ quarter) << 4)) = decode_8(table, codes);
    }
};

// Where the rows of a tile lie: one after the other. (experts_matmul_4bit.h has another way.)
struct Consecutive {
    DEVICE_MEMBER u64 out(u64 row) const { return row; }
};

// The input's side: rows of 64 elements, eight chunks of 16 bytes, chunk i of row r at i ^ r % 8.
// A thread copies the same chunk of every APARTth row.
template <class S, class Rows> struct InputSide {
    static constexpr u32 ROUNDS = S::ROWS * 8 / S::THREAD_COUNT, APART = S::THREAD_COUNT / 8;
    u8* memory;
    const u16* from; // the chunk of the first row, at step 0
    u64 depth; // elements in a row
    u64 left; // of them from there on, or zero
    u32 rows; // that exist, from the first on
    bool aligned;

    DEVICE_MEMBER InputSide(const Operands& o, u8* at, Rows, u64 row, u64 column, u64 depth)
        : memory(at), depth(depth), aligned(o.flags & INPUT_IS_ALIGNED) {
        const u32 line = THREAD / 8, start = THREAD % 8 * 8;
        from = o.input + (row + line) * depth + column + start;
        left = column + start < depth ? depth - column - start : 0;
        rows = row + line < o.rows ? (u32)min_(o.rows - row - line, (u64)S::ROWS) : 0;
    }

    DEVICE_MEMBER void copy(u32 step, u32 slot) const {
        const u32 line = THREAD / 8, chunk = THREAD % 8 ^ (line & 7);
        u8* to = memory + S::INPUT_AT + slot * S::INPUT_BYTES + line * 128 + chunk * 16;
        const u64 skip = step * STEP;
        if (aligned) {
            UNROLL
            for (u32 i = 0; i < ROUNDS; i++) {
                const bool exists = i * APART < rows && skip < left;
                cp_async_16(to + i * APART * 128, from + skip + i * APART * depth, exists ? 16 : 0);
            }
        } else {
            ROLLED
            for (u32 i = 0; i < ROUNDS * 8; i++) {
                const u32 lines = i / 8 * APART, j = i % 8;
                const bool exists = lines < rows && skip + j < left;
                ((u16*)(to + lines * 128))[j] = exists ? from[skip + lines * depth + j] : 0;
            }
        }
    }
};

// A lane's part of `out` or of its split's sums. Neighbouring columns are stored as one.
template <class E, class S, class Rows>
DEVICE void store(const Operands& o, const float (&c)[S::TILES_DOWN][S::TILES_ACROSS][4],
                  Rows rows, u64 row, u64 column, u64 columns) {
    const u32 left = column < columns ? (u32)min_(columns - column, (u64)S::COLUMNS) : 0;
    float bias[S::TILES_ACROSS][2];
    UNROLL
    for (u32 j = 0; j < S::TILES_ACROSS; j++)
        UNROLL
        for (u32 k = 0; k < 2; k++)
            bias[j][k] = o.bias && j * 8 + k < left ? E::load(o.bias, column + j * 8 + k) : 0.0f;
    UNROLL
    for (u32 i = 0; i < S::TILES_DOWN * 2; i++) {
        const u64 line = row + i * 8;
        if (line >= o.rows) break;
        const u64 place = rows.out(line);
        float* sums = o.partials + (GROUP_Y * o.rows + place) * columns + column;
        u16* out = o.out + place * columns + column;
        UNROLL
        for (u32 j = 0; j < S::TILES_ACROSS; j++) {
            const float x = c[i / 2][j][i % 2 * 2], y = c[i / 2][j][i % 2 * 2 + 1];
            if (o.partials) {
                if (j * 8 < left) sums[j * 8] = x;
                if (j * 8 + 1 < left) sums[j * 8 + 1] = y;
            } else if (j * 8 < left) {
                *(u32*)(out + j * 8) = E::pack(x + bias[j][0], y + bias[j][1]);
            }
        }
    }
}

// Table and nested code, to where a group has them. Visible after a barrier.
template <class S> DEVICE void load_constants(const Operands& o, u8* memory) {
    float* constants = (float*)memory;
    if (THREAD < 16) constants[THREAD] = table_at(o.table_kind, o.table, THREAD);
    if (o.scales.codes) {
        for (u32 i = THREAD; i < 256; i += S::THREAD_COUNT) constants[16 + i] = o.scales.code2[i];
    }
}

// Which tile a group makes.
struct Tile {
    u32 down, across;
};

template <class S> DEVICE Tile tile_of(u32 group, u32 tiles_down, u64 columns) {
    const u32 tiles_across = (u32)((columns + S::COLUMNS - 1) / S::COLUMNS);
    const u32 band = group / (BAND * tiles_across) * BAND;
    const u32 height = min_(tiles_down - band, (u32)BAND), within = group - band * tiles_across;
    return {band + within % height, within / height};
}

template <class E, class S, bool GRAD, class Rows>
DEVICE void multiply_tile(const Operands& o, u8* memory, Rows rows, u64 row0, u64 column0) {
    const u64 columns = GRAD ? o.in_features : o.out_features;
    const u64 depth = GRAD ? o.out_features : o.in_features;
    const u64 begin = GROUP_Y * o.steps;
    const u32 steps = (u32)min_((depth + STEP - 1) / STEP - begin, (u64)o.steps);

    WeightSide<E, S, GRAD> weight(o, memory, column0, begin * STEP, steps);
    const InputSide<S, Rows> input(o, memory, rows, row0, begin * STEP, depth);

    // Step i goes to slot i % STAGES. Group i of the copies: the input of step i, the codes of the
    // next.
    weight.copy(0, 0);
    UNROLL
    for (u32 i = 0; i + 1 < S::STAGES; i++) {
        if (i < steps) input.copy(i, i);
        weight.copy(i + 1, (i + 1) % S::STAGES);
        cp_async_commit();
    }
    cp_async_wait<S::STAGES - 2>();
    UNROLL
    for (u32 part = 0; part < S::PARTS; part++) {
        const Scaled table = weight.take(0, part);
        const U4 codes = *(const U4*)weight.place(0, part);
        weight.decode(table, codes.x, 0, part, 0);
        weight.decode(table, codes.y, 0, part, 1);
        weight.decode(table, codes.z, 0, part, 2);
        weight.decode(table, codes.w, 0, part, 3);
    }

    const u32 lane = LANE, warp = THREAD / 32;
    const u32 warp_row = warp / S::WARPS_ACROSS * S::WARP_ROWS;
    const u32 warp_column = warp % S::WARPS_ACROSS * S::WARP_COLUMNS;
    const u32 a_row = (warp_row + lane % 16) * 128, a_chunk = lane / 16;
    const u32 b_line = lane % 8 + (GRAD ? lane / 8 % 2 * 8 : warp_column + lane / 16 * 8);
    const u32 b_chunk = GRAD ? warp_column / 8 + lane / 16 : lane / 8 % 2;

    float c[S::TILES_DOWN][S::TILES_ACROSS][4];
    UNROLL
    for (u32 i = 0; i < S::TILES_DOWN; i++)
        UNROLL
        for (u32 j = 0; j < S::TILES_ACROSS; j++)
            UNROLL
            for (u32 k = 0; k < 4; k++) c[i][j][k] = 0.0f;

    u32 slot = 0;
    ROLLED
    for (u32 step = 0; step < steps; step++) {
        cp_async_wait<S::STAGES - 2>();
        BARRIER(); // step's input and decoded weight are there; step - 1 has been read
        const u32 before = slot == 0 ? S::STAGES - 1 : slot - 1;
        const u32 after = slot == S::STAGES - 1 ? 0 : slot + 1;
        if (step + S::STAGES - 1 < steps) input.copy(step + S::STAGES - 1, before);
        weight.copy(step + S::STAGES, slot);
        cp_async_commit();
        // After the last step what this decodes is never read.
        Scaled table = weight.take(step + 1, 0);
        U4 codes = *(const U4*)weight.place(after, 0);

        const u8* inputs = memory + S::INPUT_AT + slot * S::INPUT_BYTES + a_row;
        const u8* weights = memory + S::DECODED_AT + step % 2 * S::DECODED_BYTES;
        UNROLL
        for (u32 k = 0; k < STEP / 16; k++) {
            u32 a[S::TILES_DOWN][4], b[S::TILES_ACROSS / 2][4];
            UNROLL
            for (u32 j = 0; j < S::TILES_ACROSS / 2; j++) {
                if constexpr (GRAD) {
                    const u32 at = (k * 16 + b_line) * S::COLUMNS * 2;
                    ldmatrix_x4_trans(b[j], weights + at + (((b_chunk + j * 2) ^ lane % 8) << 4));
                } else {
                    const u32 at = (j * 16 + b_line) * 128;
                    ldmatrix_x4(b[j], weights + at + (((b_chunk + k * 2) ^ lane % 8) << 4));
                }
            }
            UNROLL
            for (u32 i = 0; i < S::TILES_DOWN; i++)
                ldmatrix_x4(a[i], inputs + i * 16 * 128 + (((a_chunk + k * 2) ^ lane % 8) << 4));
            if (S::PARTS == 2 && k == 2) {
                table = weight.take(step + 1, S::PARTS - 1);
                codes = *(const U4*)weight.place(after, S::PARTS - 1);
            }
            UNROLL
            for (u32 i = 0; i < S::PARTS; i++) {
                const u32 quarter = k * S::PARTS + i, part = quarter / 4;
                const u32 quarters[4] = {codes.x, codes.y, codes.z, codes.w};
                weight.decode(table, quarters[quarter % 4], (step + 1) % 2, part, quarter % 4);
            }
            UNROLL
            for (u32 i = 0; i < S::TILES_DOWN; i++)
                UNROLL
                for (u32 j = 0; j < S::TILES_ACROSS; j++)
                    E::mma(c[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
        slot = after;
    }
    cp_async_wait<0>();

    store<E, S>(o, c, rows, row0 + warp_row + lane / 4, column0 + warp_column + lane % 4 * 2,
                columns);
}

template <class E, class S, bool GRAD> DEVICE void multiply(const Operands& o, u8* memory) {
    load_constants<S>(o, memory);
    BARRIER();
    const u32 tiles_down = (u32)((o.rows + S::ROWS - 1) / S::ROWS);
    const Tile tile = tile_of<S>((u32)GROUP, tiles_down, GRAD ? o.in_features : o.out_features);
    multiply_tile<E, S, GRAD>(o, memory, Consecutive(), (u64)tile.down * S::ROWS,
                              (u64)tile.across * S::COLUMNS);
}

#define PARAMETERS                                                                                 \
    (const u8 *packed, SCALE_PARAMETERS, TABLE_PARAMETERS, u32 shift, const u16 *input,            \
     const u16 *bias, u16 *out, float *partials, u64 rows, u32 out_features, u32 in_features,      \
     u32 steps, u32 flags)

#define MATMUL(name, E, S, GRAD)                                                                   \
    RESIDENT_KERNEL(S::THREAD_COUNT, S::RESIDENT, name, PARAMETERS) {                              \
        DYNAMIC_SHARED(u8, memory);                                                                \
        const Operands operands = {{absmax, absmax8, code2, absmax2, offset, shift, shift2, 0},    \
                                   packed, table_kind, table, input, bias, out, partials,          \
                                   rows, out_features, in_features, steps, flags};                 \
        multiply<E, S, GRAD>(operands, memory);                                                    \
    }

// In ops/matmul_4bit.rs: SHAPES.
typedef Shape<16, 64, 1, 4, 4, 4> Shape16;
typedef Shape<32, 64, 1, 4, 4, 4> Shape32;
typedef Shape<64, 64, 2, 2, 3, 4> Shape64;
typedef Shape<128, 128, 2, 2, 2, 2> Shape128;
typedef Shape<256, 128, 4, 2, 3, 1> Shape256;

#endif

// The tile of experts_matmul_4bit.cu. See there for what it computes.
#ifndef HALFBYTE_EXPERTS_MATMUL_4BIT_H
#define HALFBYTE_EXPERTS_MATMUL_4BIT_H
#include "matmul_4bit.h"
#include "experts.h"

// Rows that lie anywhere: lists in shared memory, of ROWS rows of the input and as many of `out`.
#define NO_ROW 0xFFFFFFFFu
template <u32 ROWS> struct Listed {
    const u32* list;
    DEVICE_MEMBER u32 input(u32 row) const { return list[row]; }
    DEVICE_MEMBER u64 out(u64 row) const { return list[ROWS + row]; }
};

template <class S> struct InputSide<S, Listed<S::ROWS>> {
    static constexpr u32 ROUNDS = S::ROWS * 8 / S::THREAD_COUNT, APART = S::THREAD_COUNT / 8;
    u8* memory;
    const Listed<S::ROWS> rows;
    const u16* from; // the chunk of row 0, at step 0
    u64 depth, left;
    bool aligned;

    DEVICE_MEMBER InputSide(const Operands& o, u8* at, Listed<S::ROWS> rows, u64, u64 column,
                            u64 depth)
        : memory(at), rows(rows), depth(depth), aligned(o.flags & INPUT_IS_ALIGNED) {
        const u32 start = THREAD % 8 * 8;
        from = o.input + column + start;
        left = column + start < depth ? depth - column - start : 0;
    }

    DEVICE_MEMBER void copy(u32 step, u32 slot) const {
        const u32 line = THREAD / 8, chunk = THREAD % 8 ^ (line & 7);
        u8* to = memory + S::INPUT_AT + slot * S::INPUT_BYTES + line * 128 + chunk * 16;
        const u64 skip = step * STEP;
        if (aligned) {
            UNROLL
            for (u32 i = 0; i < ROUNDS; i++) {
                const u32 row = rows.input(line + i * APART);
                const bool exists = row != NO_ROW && skip < left;
                cp_async_16(to + i * APART * 128, from + skip + row * depth, exists ? 16 : 0);
            }
        } else {
            ROLLED
            for (u32 i = 0; i < ROUNDS * 8; i++) {
                const u32 lines = i / 8 * APART, j = i % 8, row = rows.input(line + lines);
                const bool exists = row != NO_ROW && skip + j < left;
                ((u16*)(to + lines * 128))[j] = exists ? from[skip + row * depth + j] : 0;
            }
        }
    }
};

// Which rows go where.
struct Routes {
    const i32 *order, *starts;
    u32 experts;
    u32 tiles; // the most that there can be
    u32 sharing; // results that read one row of the input
};

template <class E, class S, bool GRAD>
DEVICE void multiply_routed(Operands o, const Routes& routes, u8* memory) {
    const u64 columns = GRAD ? o.in_features : o.out_features;
    const Tile at = tile_of<S>((u32)GROUP, routes.tiles, columns);
    const ExpertTile tile = find_tile(routes.starts, routes.experts, S::ROWS, at.down);
    if (tile.count == 0) return;
    const u64 column0 = (u64)at.across * S::COLUMNS;
    if (tile.expert >= routes.experts) {
        if (o.partials) return; // sum_slots does not read them
        const float value = unrouted(tile.expert, routes.experts);
        const u32 width = (u32)min_(columns - column0, (u64)S::COLUMNS);
        ROLLED
        for (u32 i = THREAD; i < tile.count * width; i += S::THREAD_COUNT) {
            const u64 row = (u32)routes.order[tile.first + i / width];
            E::store(o.out, row * columns + column0 + i % width, value);
        }
        return;
    }
    u32* list = (u32*)(memory + S::ROWS_AT);
    for (u32 i = THREAD; i < S::ROWS; i += S::THREAD_COUNT) {
        u32 row = 0, input = NO_ROW;
        if (i < tile.count) {
            row = (u32)routes.order[tile.first + i];
            input = row / routes.sharing;
        }
        list[i] = input;
        list[S::ROWS + i] = row;
    }
    const u64 elements = (u64)o.out_features * o.in_features;
    const u64 blocks = (elements + (1u << o.scales.shift) - 1) >> o.scales.shift;
    o.scales.first = tile.expert * blocks;
    o.packed += o.scales.first << o.scales.shift >> 1;
    if (o.bias) o.bias += (u64)tile.expert * o.out_features;
    o.rows = tile.count;
    load_constants<S>(o, memory);
    BARRIER();
    multiply_tile<E, S, GRAD>(o, memory, Listed<S::ROWS>{list}, 0, column0);
}

#define ROUTED_MATMUL(name, E, S, GRAD)                                                            \
    RESIDENT_KERNEL(S::THREAD_COUNT, S::RESIDENT, name,                                            \
                    (const u8* packed, SCALE_PARAMETERS, TABLE_PARAMETERS, u32 shift,              \
                     const i32* order, const i32* starts, u32 experts, u32 tiles, u32 sharing,     \
                     const u16* input, const u16* bias, u16* out, float* sums, u32 out_features,   \
                     u32 in_features, u32 steps, u32 flags)) {                                     \
        DYNAMIC_SHARED(u8, memory);                                                                \
        const Operands operands = {{absmax, absmax8, code2, absmax2, offset, shift, shift2, 0},    \
                                   packed, table_kind, table, input, bias, out, sums,              \
                                   0, out_features, in_features, steps, flags};                    \
        const Routes routes = {order, starts, experts, tiles, sharing};                            \
        multiply_routed<E, S, GRAD>(operands, routes, memory);                                     \
    }

#endif

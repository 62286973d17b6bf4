// What the kernels of 8-bit experts share: arguments that say which rows go to which expert, and what
// becomes of rows without one.
#ifndef HALFBYTE_EXPERTS_INT8_H
#define HALFBYTE_EXPERTS_INT8_H
#include "experts.h"

// `sharing` rows of the result read one row of the input; a product has `tiles` tiles at most.
#define ROUTING                                                                                    \
    GLOBAL const i32 *order, GLOBAL const i32 *starts, u32 experts, u32 sharing, u32 tiles

// The group's tile and `across`, which of the tiles along the row. Groups of the same columns lie
// together: what rows of one expert read of its weight stays in L2.
#define FIND_TILE(height)                                                                          \
    const ExpertTile tile = find_tile(starts, experts, height, (u32)(GROUP % tiles));              \
    const u64 across = GROUP / tiles;                                                              \
    if (tile.count == 0) return

// Lists the rows of the tile in shared memory: those of the input, and those of the result.
#define LIST_ROWS(inputs, listed)                                                                  \
    if (THREAD < tile.count) {                                                                     \
        listed[THREAD] = (u32)order[tile.first + THREAD];                                          \
        inputs[THREAD] = listed[THREAD] / sharing;                                                 \
    }                                                                                              \
    BARRIER()

// In a tile of rows without a weight: STORE_AT(index, value) for each result of columns c0 to c0 +
// width, as far as there are.
#define FILL_UNROUTED(c0, width, columns, STORE_AT)                                                \
    do {                                                                                           \
        const u32 filled = (u32)min_((columns) - (c0), (u64)(width));                              \
        for (u32 i = THREAD; i < tile.count * filled; i += THREADS) {                              \
            const u64 row = (u64)order[tile.first + i / filled];                                   \
            STORE_AT(row * (columns) + (c0) + i % filled, unrouted(tile.expert, experts));         \
        }                                                                                          \
    } while (0)

#endif

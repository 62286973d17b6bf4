// Where the rows of a tile lie, for the tiles of int8_matmul.h and int8_grad.h. Rows have places,
// and a tile is a stretch of places: of a matrix they are its rows, of experts the rows by expert.
#ifndef HALFBYTE_INT8_TILE_H
#define HALFBYTE_INT8_TILE_H
#include "port.h"

#define TILE_THREADS 128
// Copies of rows that a thread makes in a step, at most.
#define TILE_COPIES 4

// The row at a place is the place.
struct InOrder {
    static const bool ROUTED = false;
};

// The result's row at place m is order[m], its input that over `share`.
struct Routed {
    static const bool ROUTED = true;
    const i32* order;
    u32 share;
    // The inputs of this thread's copies.
    u32 own[TILE_COPIES];
};

DEVICE u64 input_row(const InOrder&, u64 m) { return m; }
DEVICE u64 input_row(const Routed& rows, u64 m) { return (u32)rows.order[m] / rows.share; }

DEVICE u64 output_row(const InOrder&, u64 m) { return m; }
DEVICE u64 output_row(const Routed& rows, u64 m) { return (u32)rows.order[m]; }

// The input of the thread's copy i, which is that of place m.
DEVICE u64 copied_row(const InOrder&, u32, u64 m) { return m; }
DEVICE u64 copied_row(const Routed& rows, u32 i, u64) { return rows.own[i]; }

// Places first..end, of which a thread's copies begin with place THREAD / CHUNKS, and go on by as many
// as there are threads for.
template <int ROWS, int CHUNKS>
DEVICE Routed routed_rows(const i32* order, u32 share, u64 first, u64 end) {
    static_assert(ROWS * CHUNKS <= TILE_COPIES * TILE_THREADS, "copies of a thread");
    Routed rows = {order, share, {}};
    UNROLL
    for (u32 i = 0; i < ROWS * CHUNKS / TILE_THREADS; i++) {
        u64 m = first + (i * TILE_THREADS + THREAD) / CHUNKS;
        if (m < end) rows.own[i] = (u32)input_row(rows, m);
    }
    return rows;
}

#endif

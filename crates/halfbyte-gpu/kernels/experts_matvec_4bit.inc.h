// The kernel of experts_matvec_4bit.cu for one T.
#include "dtype.h"
#if HAVE_SHUFFLE
#define PARTS 4 // of a sum, one a warp
#else
#define PARTS 128 // one a thread
#endif

FEW_KERNEL(NAMED(experts_matvec_4bit),
           (GLOBAL const T* a, GLOBAL const u8* packed, SCALE_PARAMETERS, TABLE_PARAMETERS,
            GLOBAL const i32* order, GLOBAL const i32* starts, u32 experts, u32 sharing,
            GLOBAL const T* bias, GLOBAL T* out, u64 features, u32 columns, u32 shift)) {
    TABLE_16(values);
    SHARED(float, second, 256); // the code of nested scales
    SHARED(float, parts, PARTS * FEATURES * MOST_ROWS);
    SHARED(u32, inputs, MOST_ROWS); // rows of a
    SHARED(u32, listed, MOST_ROWS); // rows of out
    const u64 across = (features + FEATURES - 1) / FEATURES;
    const u64 first = GROUP % across * FEATURES;
    const ExpertTile tile = find_tile(starts, experts, MOST_ROWS, (u32)(GROUP / across));
    const u32 n = tile.count;
    if (n == 0) return;
    if (THREAD < n) {
        listed[THREAD] = (u32)order[tile.first + THREAD];
        inputs[THREAD] = listed[THREAD] / sharing;
    }
    BARRIER();
    if (tile.expert >= experts) {
        const u64 feature = first + THREAD % FEATURES;
        if (THREAD < n * FEATURES && feature < features) {
            const float value = unrouted(tile.expert, experts);
            STORE(out, listed[THREAD / FEATURES] * features + feature, value);
        }
        return;
    }
    const u64 blocks_each = (features * columns + (1u << shift) - 1) >> shift;
    const u64 first_block = tile.expert * blocks_each;
    packed += first_block << shift >> 1;
    if (bias) bias += tile.expert * features;
#define A_ROW(m) ((u64)inputs[m])
#define OUT_ROW(m) ((u64)listed[m])
#define BLOCK(element) (first_block + ((element) >> shift))
    if (n == 1) {
#define ROWS 1
#include "matvec_4bit_rows.inc.h"
#undef ROWS
    } else if (n == 2) {
#define ROWS 2
#include "matvec_4bit_rows.inc.h"
#undef ROWS
    } else {
#define ROWS 4
#include "matvec_4bit_rows.inc.h"
#undef ROWS
    }
#undef A_ROW
#undef OUT_ROW
#undef BLOCK
}
#undef PARTS
#include "undtype.h"

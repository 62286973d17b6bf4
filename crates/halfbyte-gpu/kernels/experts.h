// Rows sorted by expert, as experts_route.cu leaves them, and the tiles that they are cut into.
//
// Bucket b < experts holds the rows of expert b, bucket `experts` those without an expert, the next
// one those whose id is out of range. `order` lists the rows bucket by bucket, ascending in each;
// starts[b] is the first place of bucket b, and starts[experts + 2] the number of rows.
#ifndef HALFBYTE_EXPERTS_H
#define HALFBYTE_EXPERTS_H
#include "port.h"

#define BUCKETS(experts) ((experts) + 2)

// A part of one bucket: the places first to first + count of `order`. No rows: no such tile.
typedef struct {
    u32 expert;
    u32 first;
    u32 count;
} ExpertTile;

// Tile number `index`, of up to `height` rows. All threads of a group ask for the same one.
// A product has rows / height + min(experts + 2, rows) tiles at most.
DEVICE ExpertTile find_tile(GLOBAL const i32* starts, u32 experts, u32 height, u32 index) {
    ExpertTile tile = {0, 0, 0};
    u32 before = 0; // tiles of the buckets that have been seen
#if HAVE_SHUFFLE
    // A lane takes one bucket of 32.
    for (u32 base = 0; base < BUCKETS(experts); base += 32) {
        u32 bucket = base + LANE, begin = 0, rows = 0;
        if (bucket < BUCKETS(experts)) {
            begin = (u32)starts[bucket];
            rows = (u32)starts[bucket + 1] - begin;
        }
        u32 own = (rows + height - 1) / height, sum = own;
        UNROLL
        for (u32 by = 1; by < 32; by <<= 1) {
            u32 others = shuffle_up(sum, by);
            if (LANE >= by) sum += others;
        }
        u32 all = shuffle(sum, 31u);
        if (index - before < all) {
            // The tile is the first lane's whose sum passes it.
            u32 lane = sum <= index - before ? 1 : 0;
            UNROLL
            for (u32 mask = 16; mask > 0; mask >>= 1) lane += shuffle_xor(lane, mask);
            u32 skipped = (index - before - shuffle(sum - own, lane)) * height;
            tile.expert = base + lane;
            tile.first = shuffle(begin, lane) + skipped;
            tile.count = min_(shuffle(rows, lane) - skipped, height);
            return tile;
        }
        before += all;
    }
#else
    for (u32 bucket = 0; bucket < BUCKETS(experts); bucket++) {
        u32 begin = (u32)starts[bucket], rows = (u32)starts[bucket + 1] - begin;
        u32 own = (rows + height - 1) / height;
        if (index - before < own) {
            u32 skipped = (index - before) * height;
            tile.expert = bucket;
            tile.first = begin + skipped;
            tile.count = min_(rows - skipped, height);
            return tile;
        }
        before += own;
    }
#endif
    return tile;
}

// What rows of a bucket without a weight become.
DEVICE float unrouted(u32 bucket, u32 experts) {
    return bucket == experts ? 0.0f : as_float(0x7FC00000u);
}

// The bucket of an id.
DEVICE u32 bucket_of(i64 id, u32 experts) {
    return id < 0 || id > (i64)experts ? experts + 1 : (u32)id;
}

#endif

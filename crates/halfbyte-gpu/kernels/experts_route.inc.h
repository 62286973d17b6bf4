// The kernels of experts_route.cu for one T.

KERNEL(256, NAMED(fill_unrouted),
       (GLOBAL const i64* ids, u64 rows, u32 experts, u64 features, GLOBAL T* out)) {
    for (u64 row = GROUP; row < rows; row += GROUPS) {
        u32 bucket = bucket_of(ids[row], experts);
        if (bucket < experts) continue;
        float value = unrouted(bucket, experts);
        for (u64 i = THREAD; i < features; i += 256) STORE(out, row * features + i, value);
    }
}

// Slots without an expert are not read, nor are those of bad ids.
KERNEL(256, NAMED(sum_slots),
       (GLOBAL const float* products, GLOBAL const i64* ids, u64 tokens, u32 slots, u32 experts,
        u64 features, GLOBAL T* out)) {
    u64 feature = GROUP * 256 + THREAD;
    if (feature >= features) return;
    for (u64 token = GROUP_Y; token < tokens; token += GROUPS_Y) {
        float sum = 0.0f;
        for (u32 slot = 0; slot < slots; slot++) {
            u64 row = token * slots + slot;
            u32 bucket = bucket_of(ids[row], experts);
            sum += bucket < experts ? products[row * features + feature]
                                    : unrouted(bucket, experts);
        }
        STORE(out, token * features + feature, sum);
    }
}

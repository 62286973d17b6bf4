// The squared norms of a rule's update and of the parameter. Nothing of the tensors is changed.
//
//     for each block: lane k of 16 sums x^2 of elements k, k + 16, ... in float32, fused
//     block = lane 0 + lane 1 + ... + lane 15 in float64
//     task  = block 0 + block 1 + ...         in float64
//
// in the core's order, so that the sums are the core's bit for bit. Half a warp has a block, a
// group a task of 256 blocks.
#include "optim_rule.h"

DEVICE float RULED(read)(u32 dtype, u64 from, u64 i) {
    if (dtype == DTYPE_F32) return load_f32(ADDRESS(const f32, from), i);
    if (dtype == DTYPE_F16) return load_f16(ADDRESS(const f16, from), i);
    return load_bf16(ADDRESS(const bf16, from), i);
}

DEVICE void RULED(norms)(GLOBAL const struct Header* h, GLOBAL const struct Tensor* tensors,
                         LOCAL float* lanes, LOCAL u64* blocks) {
    const u64 unit = GROUP;
    GLOBAL const struct Tensor* t = tensors + tensor_of(tensors, h->tensors, (u32)unit);
    const u64 first = (unit - t->first) * TASK, lane = THREAD % 16;
    const u64 rest = (t->n + BLOCK - 1) / BLOCK - first;
    const u32 count = (u32)min_(rest, (u64)TASK);
    for (u32 round = 0; round < count; round += 16) {
        const u64 start = (first + round + THREAD / 16) * BLOCK;
        float sums[2] = {0.0f, 0.0f};
        for (u64 at = start + lane; at < t->n && at < start + BLOCK; at += 16) {
            float s[STATES];
            for (u32 i = 0; i < STATES; i++) {
                u64 of = i < STATES - SECOND ? t->state1 + 4 * (i * t->n) : t->state2;
                s[i] = ADDRESS(const float, of)[at];
            }
            float g = RULED(read)(GRAD_DTYPE(t->flags), t->grad, at) * h->gnorm_scale;
            float p = RULED(read)(PARAM_DTYPE(t->flags), t->param, at);
            if (ROUNDING(t->flags) == ROUND_KAHAN) p = p + RULED(read)(DTYPE_BF16, t->rest, at);
            float carry = RULED(states)(h->rule, g, p, s);
            float update = RULED(update)(h->rule, s, carry);
            sums[0] = fma_(update, update, sums[0]);
            sums[1] = fma_(p, p, sums[1]);
        }
        lanes[THREAD] = sums[0];
        lanes[256 + THREAD] = sums[1];
        BARRIER();
        if (THREAD < 32) { // a block and one of the two sums
            LOCAL const float* of = lanes + THREAD / 16 * 256 + THREAD % 16 * 16;
            u64 sum = double_of(of[0]);
            for (u32 i = 1; i < 16; i++) sum = double_add(sum, double_of(of[i]));
            blocks[THREAD / 16 * TASK + round + THREAD % 16] = sum;
        }
        BARRIER();
    }
    if (THREAD < 2) {
        u64 sum = 0;
        for (u32 i = 0; i < count; i++) sum = double_add(sum, blocks[THREAD * TASK + i]);
        ADDRESS(u64, h->sums)[2 * unit + THREAD] = sum;
    }
}

#if OPENCL
KERNEL(256, PASTE(optim_norms_, RULED(uploaded)), (GLOBAL const struct TableLarge* table)) {
    SHARED(float, lanes, 512);
    SHARED(u64, blocks, 2 * TASK);
    RULED(norms)(&table->header, table->tensors, lanes, blocks);
}
#else
KERNEL(256, PASTE(optim_norms_, RULED(small)), (BY_VALUE(struct TableSmall) table)) {
    SHARED(float, lanes, 512);
    SHARED(u64, blocks, 2 * TASK);
    RULED(norms)(&table.header, table.tensors, lanes, blocks);
}
KERNEL(256, PASTE(optim_norms_, RULED(large)), (BY_VALUE(struct TableLarge) table)) {
    SHARED(float, lanes, 512);
    SHARED(u64, blocks, 2 * TASK);
    RULED(norms)(&table.header, table.tensors, lanes, blocks);
}
#endif

#include "optim_unrule.h"

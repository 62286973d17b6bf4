// A step of one rule with float32 states, over many tensors in one launch. Included after the
// definition of RULE.
#include "optim_table.h"
#include "optim_rules.h"

#include "optim_rule.h"

// A warp's block, as in optim_8bit.inc.h without the codes:
//
//     s, carry = states(g * gnorm_scale, p, s)
//     p = p + p * shrink + rate * update(s, carry)
//
// Where zeros are skipped an element without a gradient keeps both. NaN propagates.
DEVICE void RULED(block32)(GLOBAL const struct Header* h, GLOBAL const struct Tensor* t, u64 block,
                           u32 n, float rate) {
    const u64 start = block * BLOCK;
    const u32 whole = n == BLOCK && (t->flags & ALIGNED) != 0;
    float g[8], p[8], s[STATES][8];
    u64 states[STATES]; // addresses

    load_any(GRAD_DTYPE(t->flags), t->grad, start, n, whole, g);
    load_param(t, start, n, whole, p);
    UNROLL
    for (u32 i = 0; i < STATES; i++) {
        u64 of = i < STATES - SECOND ? t->state1 + 4 * (i * t->n) : t->state2;
        states[i] = of + 4 * start;
        load_floats(states[i], n, whole, s[i]);
    }
    UNROLL
    for (u32 j = 0; j < 8; j++) {
        if (h->skip_zeros && g[j] == 0.0f) continue;
        float state[STATES];
        UNROLL
        for (u32 i = 0; i < STATES; i++) state[i] = s[i][j];
        float carry = RULED(states)(h->rule, g[j] * h->gnorm_scale, p[j], state);
        UNROLL
        for (u32 i = 0; i < STATES; i++) s[i][j] = state[i];
        p[j] = stepped(p[j], h->shrink, rate, RULED(update)(h->rule, state, carry));
    }
    UNROLL
    for (u32 i = 0; i < STATES; i++) store_floats(states[i], n, whole, s[i]);
    store_param(h, t, start, n, whole, p);
}

// Groups take chunks in turn; the eight warps of a group take the chunk's blocks in turn.
DEVICE void RULED(step32)(GLOBAL const struct Header* h, GLOBAL const struct Tensor* tensors) {
    // Loaded here: clang for AMD would choose between two addresses below, and for that have each
    // thread copy the table.
    const float common = h->rate;
    for (u64 unit = GROUP; unit < h->units; unit += GROUPS) {
        const u32 index = tensor_of(tensors, h->tensors, (u32)unit);
        GLOBAL const struct Tensor* t = tensors + index;
        const float rate = h->rates != 0 ? ADDRESS(const float, h->rates)[index] : common;
        const u64 first = (unit - t->first) * CHUNK;
        for (u32 round = 0; round < CHUNK; round += WARPS) {
            const u64 block = first + round + THREAD / 32, start = block * BLOCK;
            if (start >= t->n) break;
            const u64 left = t->n - start;
            RULED(block32)(h, t, block, (u32)min_(left, (u64)BLOCK), rate);
        }
    }
}

#if OPENCL
KERNEL(256, PASTE(optim_32bit_, RULED(uploaded)), (GLOBAL const struct TableLarge* table)) {
    RULED(step32)(&table->header, table->tensors);
}
#else
KERNEL(256, PASTE(optim_32bit_, RULED(small)), (BY_VALUE(struct TableSmall) table)) {
    RULED(step32)(&table.header, table.tensors);
}
KERNEL(256, PASTE(optim_32bit_, RULED(large)), (BY_VALUE(struct TableLarge) table)) {
    RULED(step32)(&table.header, table.tensors);
}
#endif

#include "optim_unrule.h"

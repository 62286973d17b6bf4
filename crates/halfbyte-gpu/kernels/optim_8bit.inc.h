// A step of one rule with 8-bit states, over many tensors in one launch. Included after the
// definition of RULE.
#include "optim_table.h"
#include "optim_codes.h"
#include "optim_rules.h"

#include "optim_rule.h"
#define NEAR RULED(NEAR)

// Elements whose parameter stays, as bits; their states become zero where one of the new states is
// not finite, and stay where zeros are skipped. What is float32 always stays. Rare: out of the way.
DEVICE u32 RULED(keep8)(GLOBAL const struct Header* h, const float* g, u32 (*words)[2],
                        const float* scales, const float* floats, u32 n,
                        LOCAL const float* values, float (*s)[8], u32* top) {
    u32 kept = 0;
    for (u32 i = 0; i < STATES; i++) top[i] = 0;
    UNROLL
    for (u32 j = 0; j < 8; j++) {
        u32 finite = 1;
        UNROLL
        for (u32 i = 0; i < STATES; i++) finite = finite && isfinite_(s[i][j]);
        u32 skipped = h->skip_zeros && g[j] == 0.0f;
        if (!finite || skipped) kept |= 1u << j;
        UNROLL
        for (u32 i = 0; i < STATES; i++) {
            if (i < FLOATS) {
                if (!finite || skipped) s[i][j] = floats[j];
                continue;
            }
            LOCAL const float* code = values + (i >= STATES - SECOND ? 256 : 0);
            u32 q = words[i][j / 4] >> j % 4 * 8 & 255u;
            if (!finite) s[i][j] = 0.0f;
            else if (skipped) s[i][j] = ELEMENT(j) < n ? code[q] * scales[i] : 0.0f;
            u32 bits = as_u32(s[i][j]) & 0x7FFFFFFFu;
            top[i] = max_(top[i], bits);
        }
    }
    return kept;
}

// A warp's block: n elements, none for a warp that only keeps others company at barriers.
//
//     s = code[q] * absmax
//     s, carry = states(g * gnorm_scale, p, s)
//     absmax = max |s|
//     p = p + p * shrink + rate * update(s, carry)
//     q = nearest code of s * (1 / absmax)
//
// States stay in registers from decode to encode.
DEVICE void RULED(block8)(GLOBAL const struct Header* h, GLOBAL const struct Tensor* t, u64 block,
                          u32 n, LOCAL const float* values, LOCAL const u32* table,
                          LOCAL const u32* notes, LOCAL u32* scratch) {
    const u64 start = block * BLOCK, blocks = (t->n + BLOCK - 1) / BLOCK;
    const u32 whole = n == BLOCK && (t->flags & ALIGNED) != 0;
    float g[8], p[8], s[STATES][8], carry[8];
    u32 words[STATES][2], top[STATES];
    float scales[STATES];
    u64 codes[STATES], absmax[STATES]; // addresses

    load_any(GRAD_DTYPE(t->flags), t->grad, start, n, whole, g);
    load_param(t, start, n, whole, p);
    UNROLL
    for (u32 i = 0; i < STATES; i++) {
        top[i] = 0;
        if (i < FLOATS) {
            codes[i] = t->state1 + 4 * start;
            load_floats(codes[i], n, whole, s[i]);
            continue;
        }
        u64 of = i >= STATES - SECOND ? 0 : i - FLOATS; // which of the first moments
        codes[i] = (i >= STATES - SECOND ? t->state2 : t->state1) + of * t->n + start;
        absmax[i] = (i >= STATES - SECOND ? t->absmax2 : t->absmax1) + 4 * (of * blocks + block);
        load_codes(codes[i], n, whole, words[i]);
        scales[i] = n > 0 ? *ADDRESS(const float, absmax[i]) : 0.0f;
        LOCAL const u8* code = (LOCAL const u8*)(values + (i >= STATES - SECOND ? 256 : 0));
        UNROLL
        for (u32 j = 0; j < 8; j++) {
            // Four times the code: the byte offset of its value.
            u32 word = words[i][j / 4], at = j % 4 == 0 ? word << 2 : word >> (j % 4 * 8 - 2);
            s[i][j] = *(LOCAL const float*)(code + (at & 0x3FCu)) * scales[i];
        }
    }
    if (n < BLOCK) { // what a short block lacks is zero, whatever code 0 is
        UNROLL
        for (u32 i = FLOATS; i < STATES; i++) {
            UNROLL
            for (u32 j = 0; j < 8; j++) s[i][j] = ELEMENT(j) < n ? s[i][j] : 0.0f;
        }
    }

    u32 worst = 0;
    UNROLL
    for (u32 j = 0; j < 8; j++) {
        float state[STATES];
        UNROLL
        for (u32 i = 0; i < STATES; i++) state[i] = s[i][j];
        carry[j] = RULED(states)(h->rule, g[j] * h->gnorm_scale, p[j], state);
        UNROLL
        for (u32 i = 0; i < STATES; i++) {
            s[i][j] = state[i];
            // A second moment has no sign; one that has is not finite by these bits, and looked at.
            u32 bits = as_u32(state[i]) & (i < STATES - SECOND ? 0x7FFFFFFFu : 0xFFFFFFFFu);
            top[i] = max_(top[i], bits);
        }
    }
    UNROLL
    for (u32 i = 0; i < STATES; i++) worst = max_(worst, top[i]);
    u32 kept = 0;
    if (worst >= 0x7F800000u || h->skip_zeros) {
        float floats[8];
        if (FLOATS) load_floats(codes[0], n, whole, floats);
        kept = RULED(keep8)(h, g, words, scales, floats, n, values, s, top);
    }

#if NEAR
    if (kept == 0 && RULED(is_ordinary)(h->rule, s, top)) {
        UNROLL
        for (u32 j = 0; j < 8; j++) {
            float update = RULED(update_ordinary)(h->rule, s[0][j], s[1][j]);
            p[j] = stepped(p[j], h->shrink, h->rate, update);
        }
    } else
#endif
    {
        UNROLL
        for (u32 j = 0; j < 8; j++) {
            float state[STATES];
            UNROLL
            for (u32 i = 0; i < STATES; i++) state[i] = s[i][j];
            float update = RULED(update)(h->rule, state, carry[j]);
            float stepped_p = stepped(p[j], h->shrink, h->rate, update);
            p[j] = kept >> j & 1u ? p[j] : stepped_p;
        }
    }
    store_param(h, t, start, n, whole, p);

    if (FLOATS) store_floats(codes[0], n, whole, s[0]);
    UNROLL
    for (u32 i = FLOATS; i < STATES; i++) {
        const u32 second = i >= STATES - SECOND;
        u32 magnitude = largest(top[i], scratch);
        if (LANE == 0 && n > 0) *ADDRESS(float, absmax[i]) = as_float(magnitude);
        // Before it lifts a block without a reciprocal: which are above zero does not change.
        float reciprocal = reciprocal8(magnitude, s[i]);
        u32 q[8];
        if (notes[second ? NOTE_SEARCH_UNSIGNED : NOTE_SEARCH_SIGNED]) {
            UNROLL
            for (u32 j = 0; j < 8; j++) {
                float x = s[i][j], y = x * reciprocal;
                q[j] = second ? search_unsigned(values + 256, y, x, notes[NOTE_POSITIVE]) << 24
                              : search_signed(values, y, x) << 24;
            }
        } else {
            UNROLL
            for (u32 j = 0; j < 8; j++) {
                float x = s[i][j], y = x * reciprocal;
                q[j] = second ? encode_unsigned(table, y, x) : encode_signed(table, y);
            }
        }
        words[i][0] = upper_bytes(q[0], q[1], q[2], q[3]);
        words[i][1] = upper_bytes(q[4], q[5], q[6], q[7]);
        store_codes(codes[i], n, whole, words[i]);
    }
}

// Groups take chunks in turn; the eight warps of a group take the chunk's blocks in turn.
DEVICE void RULED(step8)(GLOBAL const struct Header* h, GLOBAL const struct Tensor* tensors,
                         LOCAL float* values, LOCAL u32* table, LOCAL u32* notes,
                         LOCAL u32* scratch) {
    make_codes(STATES - FLOATS - SECOND > 0 ? h->code1 : 0, SECOND ? h->code2 : 0, values, table,
               notes);
    for (u64 unit = GROUP; unit < h->units; unit += GROUPS) {
        GLOBAL const struct Tensor* t = tensors + tensor_of(tensors, h->tensors, (u32)unit);
        const u64 first = (unit - t->first) * CHUNK;
        for (u32 round = 0; round < CHUNK; round += WARPS) {
            if ((first + round) * BLOCK >= t->n) break;
            const u64 block = first + round + THREAD / 32, start = block * BLOCK;
            const u64 left = start < t->n ? t->n - start : 0;
            if (HAVE_SHUFFLE && left == 0) break;
            RULED(block8)(h, t, block, (u32)min_(left, (u64)BLOCK), values, table, notes, scratch);
        }
    }
}

#if OPENCL
KERNEL(256, PASTE(optim_8bit_, RULED(uploaded)), (GLOBAL const struct TableLarge* table)) {
    SHARED(float, values, 512);
    SHARED(u32, buckets, CODES_BUCKETS);
    SHARED(u32, notes, NOTES);
    SHARED(u32, scratch, 256);
    RULED(step8)(&table->header, table->tensors, values, buckets, notes, scratch);
}
#else
KERNEL(256, PASTE(optim_8bit_, RULED(small)), (BY_VALUE(struct TableSmall) table)) {
    SHARED(float, values, 512);
    SHARED(u32, buckets, CODES_BUCKETS);
    SHARED(u32, notes, NOTES);
    RULED(step8)(&table.header, table.tensors, values, buckets, notes, 0);
}
KERNEL(256, PASTE(optim_8bit_, RULED(large)), (BY_VALUE(struct TableLarge) table)) {
    SHARED(float, values, 512);
    SHARED(u32, buckets, CODES_BUCKETS);
    SHARED(u32, notes, NOTES);
    RULED(step8)(&table.header, table.tensors, values, buckets, notes, 0);
}
#endif

#undef NEAR
#include "optim_unrule.h"

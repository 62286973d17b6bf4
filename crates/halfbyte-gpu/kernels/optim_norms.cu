// halfbyte: exact
// Trust ratios (LAMB, LARS, max_unorm): the norms of update and parameter of many tensors in one
// launch, and from them, in another, the rate of each tensor.
#include "optim_table.h"
#include "optim_double.h"
#include "optim_rules.h"

#define RULE adam
#include "optim_norms.inc.h"
#define RULE momentum
#include "optim_norms.inc.h"
#define RULE rmsprop
#include "optim_norms.inc.h"

// A group's tensor: the sums of its tasks, in order, then
//
//     norm  = sqrt(update),  bound = max_unorm * parameter's norm
//     ratio = bound / norm where norm > bound, else 1        in float64
//     rate  = rate * ratio, rounded to float32
DEVICE void trust(GLOBAL const struct Header* h, GLOBAL const struct Tensor* tensors,
                  LOCAL u64* staged, LOCAL u64* totals) {
    const u32 index = (u32)GROUP;
    GLOBAL const struct Tensor* t = tensors + index;
    const u32 end = index + 1 < h->tensors ? tensors[index + 1].first : h->units;
    GLOBAL const u64* sums = ADDRESS(const u64, h->sums);
    u64 sum = 0;
    for (u32 task = t->first; task < end; task += 128) {
        const u32 count = min_(end - task, 128u);
        if (THREAD < 2 * count) staged[THREAD] = sums[2 * (u64)task + THREAD];
        BARRIER();
        if (THREAD < 2) {
            for (u32 i = 0; i < count; i++) sum = double_add(sum, staged[2 * i + THREAD]);
        }
        BARRIER();
    }
    if (THREAD < 2) totals[THREAD] = double_sqrt(sum);
    BARRIER();
    if (THREAD != 0) return;
    // Loaded before the choice: clang would choose between addresses, and copy the table for that.
    const u64 norm = totals[0], own = totals[1], given = t->absmax2;
    const u64 param = (t->flags & NORM_GIVEN) != 0 ? given : own;
    const u64 bound = double_multiply(h->max_unorm, param);
    u64 ratio = DOUBLE_ONE;
    if (norm <= DOUBLE_INFINITY && norm > bound) ratio = double_divide(bound, norm);
    const u64 rate = double_multiply(h->rate64 & ~DOUBLE_SIGN, ratio);
    ADDRESS(float, h->rates)[index] = double_to_float(rate, (h->rate64 & DOUBLE_SIGN) != 0);
    if (t->absmax1 != 0) *ADDRESS(float, t->absmax1) = double_to_float(norm, 0);
}

#if OPENCL
KERNEL(256, optim_trust_uploaded, (GLOBAL const struct TableLarge* table)) {
    SHARED(u64, staged, 256);
    SHARED(u64, totals, 2);
    trust(&table->header, table->tensors, staged, totals);
}
#else
KERNEL(256, optim_trust_small, (BY_VALUE(struct TableSmall) table)) {
    SHARED(u64, staged, 256);
    SHARED(u64, totals, 2);
    trust(&table.header, table.tensors, staged, totals);
}
KERNEL(256, optim_trust_large, (BY_VALUE(struct TableLarge) table)) {
    SHARED(u64, staged, 256);
    SHARED(u64, totals, 2);
    trust(&table.header, table.tensors, staged, totals);
}
#endif

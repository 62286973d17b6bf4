// halfbyte: cuda
// Kernels that race, for the test of the search for races. Nothing else launches them.
#include "port.h"

// Groups add to one number.
KERNEL(64, racy_groups, (GLOBAL u32* out)) {
    if (THREAD == 0) out[0] += (u32)GROUP;
}

// Threads read what their neighbour wrote, without a barrier.
KERNEL(64, racy_shared, (GLOBAL u32* out)) {
    SHARED(u32, words, 64);
    words[THREAD] = 0;
    BARRIER();
    words[THREAD] = THREAD;
    out[GROUP * 64 + THREAD] = words[(THREAD + 63) % 64];
}

// A warp's barrier does not order two warps.
KERNEL(64, racy_warps, (GLOBAL u32* out)) {
    SHARED(u32, words, 64);
    words[THREAD] = 0;
    BARRIER();
    words[THREAD] = THREAD;
    __syncwarp();
    out[GROUP * 64 + THREAD] = words[THREAD ^ 32];
}

// The memory is written anew before all have read it.
KERNEL(64, racy_reuse, (GLOBAL u32* out)) {
    SHARED(u32, words, 64);
    words[THREAD] = THREAD;
    BARRIER();
    u32 next = words[(THREAD + 1) % 64];
    words[THREAD] = next + 1;
    BARRIER();
    out[GROUP * 64 + THREAD] = words[THREAD ^ 1];
}

// Shared memory that nobody wrote.
KERNEL(64, racy_unwritten, (GLOBAL u32* out)) {
    SHARED(u32, words, 64);
    if (THREAD < 32) words[THREAD] = THREAD;
    BARRIER();
    out[GROUP * 64 + THREAD] = words[THREAD];
}

// None: barriers, a warp's exchange, atomics, one value from all.
KERNEL(64, not_racy, (GLOBAL u32* out)) {
    SHARED(u32, words, 64);
    SHARED(u32, any, 1);
    words[THREAD] = THREAD;
    any[0] = 7;
    __syncwarp();
    u32 v = words[THREAD ^ 1];
    BARRIER();
    words[THREAD] = v + any[0];
    BARRIER();
    v = words[THREAD ^ 32] + shuffle_xor(v, 2);
    atomic_add_u32(&out[64 * GROUPS], v);
    out[GROUP * 64 + THREAD] = v;
}

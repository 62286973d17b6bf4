// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
#ifndef HALFBYTE_PHILOX_H
#define HALFBYTE_PHILOX_H
#include "port.h"

// `counter` becomes the four random words.
DEVICE void philox(u32* counter, u32 key0, u32 key1) {
    UNROLL
    for (u32 round = 0; round < 10; round++) {
        u32 a_high = mulhi_u32(0xD2511F53u, counter[0]), a_low = 0xD2511F53u * counter[0];
        u32 b_high = mulhi_u32(0xCD9E8D57u, counter[2]), b_low = 0xCD9E8D57u * counter[2];
        counter[0] = b_high ^ counter[1] ^ key0;
        counter[1] = b_low;
        counter[2] = a_high ^ counter[3] ^ key1;
        counter[3] = a_low;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

#endif

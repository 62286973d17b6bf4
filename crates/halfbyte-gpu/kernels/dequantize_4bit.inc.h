// The kernel of dequantize_4bit.cu for one dtype.
#include "dtype.h"

KERNEL(256, NAMED(dequantize_4bit),
       (GLOBAL const u8* packed, SCALE_PARAMETERS, TABLE_PARAMETERS, GLOBAL T* out, u64 n,
        u32 shift)) {
    SHARED(float, values, 16);
    u64 tile = GROUP * 8192, first = tile + 8 * THREAD;
    int whole = tile + 8192 <= n && IS_ALIGNED(packed, 4) && IS_ALIGNED(out, 16);
    u32 words[4];
    float scales[4];
    UNROLL
    for (u32 u = 0; u < 4; u++) {
        u64 at = first + 2048 * u;
        words[u] = 0;
        scales[u] = 0.0f;
        if (whole) {
            words[u] = *(GLOBAL const u32*)(packed + at / 2);
        } else {
            for (u32 i = 0; i < 4; i++) {
                if (at + 2 * i < n) words[u] |= (u32)packed[at / 2 + i] << 8 * i;
            }
        }
        if (at < n) scales[u] = SCALE(at >> shift);
    }
    if (THREAD < 16) values[THREAD] = TABLE(THREAD);
    BARRIER();
    UNROLL
    for (u32 u = 0; u < 4; u++) {
        u64 at = first + 2048 * u;
        float x[8];
        decode8(words[u], scales[u], values, x);
        if (whole) {
            STORE8(out + at, x);
        } else {
            for (u32 i = 0; i < 8; i++) {
                if (at + i < n) STORE(out, at + i, x[i]);
            }
        }
    }
}
#include "undtype.h"

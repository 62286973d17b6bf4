// The kernel of dequantize_blockwise.cu for one dtype.
#include "dtype.h"

KERNEL(256, NAMED(dequantize_blockwise),
       (GLOBAL const u8* codes, GLOBAL const float* absmax, GLOBAL const float* code, u32 count,
        GLOBAL T* out, u64 n, u32 shift)) {
    SHARED(float, values, 256);
    u64 tile = GROUP * 8192, first = tile + 8 * THREAD;
    int whole = tile + 8192 <= n && IS_ALIGNED(codes, 8) && IS_ALIGNED(out, 16);
    u64 q[4];
    float scales[4];
    UNROLL
    for (u32 u = 0; u < 4; u++) {
        u64 at = first + 2048 * u;
        q[u] = 0;
        scales[u] = 0.0f;
        if (whole) {
            q[u] = *(GLOBAL const u64*)(codes + at);
        } else {
            for (u32 i = 0; i < 8; i++) {
                if (at + i < n) q[u] |= (u64)codes[at + i] << 8 * i;
            }
        }
        if (at < n) scales[u] = absmax[at >> shift];
    }
    values[THREAD] = code[min_(THREAD, count - 1)];
    BARRIER();
    UNROLL
    for (u32 u = 0; u < 4; u++) {
        u64 at = first + 2048 * u;
        float x[8];
        UNROLL
        for (u32 i = 0; i < 8; i++) x[i] = values[(u32)(q[u] >> 8 * i) & 255] * scales[u];
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

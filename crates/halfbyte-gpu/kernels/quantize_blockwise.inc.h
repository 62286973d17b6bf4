// The kernel of quantize_blockwise.cu for one dtype; double_quant.cu takes it too.
//   CODE_PARAMETERS, BORDER(i)  where the borders come from
//   ELEMENT(x)                  what is quantized of a loaded x
#include "dtype.h"

// Eight codes in memory order, from the low byte on.
DEVICE u64 PASTE(NAMED(QUANTIZE), _codes)(float* x, u32 magnitude, u32 kind,
                                          LOCAL const float* borders, LOCAL const u8* starts) {
    float reciprocal = reciprocal8(magnitude, x);
    u32 low = 0, high = 0;
    if (magnitude >= 0x7F800000u) kind = KIND_OTHER; // y may be NaN
    if (kind == KIND_SIGNED) {
        UNROLL
        for (u32 i = 0; i < 4; i++) {
            low |= encode_signed(x[i] * reciprocal, borders, starts) << 8 * i;
            high |= encode_signed(x[4 + i] * reciprocal, borders, starts) << 8 * i;
        }
    } else if (kind == KIND_UNSIGNED) {
        UNROLL
        for (u32 i = 0; i < 4; i++) {
            low |= encode_unsigned(x[i] * reciprocal, borders, starts) << 8 * i;
            high |= encode_unsigned(x[4 + i] * reciprocal, borders, starts) << 8 * i;
        }
    } else {
        UNROLL
        for (u32 i = 0; i < 4; i++) {
            low |= search8(clamp_to_one(x[i] * reciprocal), borders) << 8 * i;
            high |= search8(clamp_to_one(x[4 + i] * reciprocal), borders) << 8 * i;
        }
    }
    return (u64)high << 32 | low;
}

KERNEL(256, NAMED(QUANTIZE),
       (GLOBAL const T* input, CODE_PARAMETERS, GLOBAL u8* out, GLOBAL float* absmax, u64 n,
        u32 shift)) {
    SHARED(float, borders, 256);
    SHARED(u32, starts, CELL8_WORDS);
    SHARED(u32, scratch, 256);
    SHARED(u32, differs, 2); // from the signed and from the unsigned map
    u64 tile = GROUP * 4096, first = tile + 8 * THREAD;
    int whole = tile + 4096 <= n && IS_ALIGNED(input, 16) && IS_ALIGNED(out, 8);
    float x[2 * 8];
    u32 most[2];
    UNROLL
    for (u32 u = 0; u < 2; u++) {
        u64 at = first + 2048 * u;
        if (whole) {
            LOAD8(input + at, x + 8 * u);
            UNROLL
            for (u32 i = 0; i < 8; i++) x[8 * u + i] = ELEMENT(x[8 * u + i]);
        } else {
            UNROLL
            for (u32 i = 0; i < 8; i++) {
                x[8 * u + i] = 0.0f;
                if (at + i < n) x[8 * u + i] = ELEMENT(LOAD(input, at + i));
            }
        }
        most[u] = magnitude8(x + 8 * u);
    }
    // The cells of the signed map are fetched before it is known whether they are wanted.
    for (u32 i = THREAD; i < CELL8_WORDS; i += 256) starts[i] = DYNAMIC_SIGNED_STARTS[i];
    if (THREAD < 2) differs[THREAD] = 0;
    BARRIER();
    borders[THREAD] = as_float(0x7F800000u);
    if (THREAD < 255) {
        float border = BORDER(THREAD);
        borders[THREAD] = border;
        if (border != DYNAMIC_SIGNED_BORDERS[THREAD]) differs[0] = 1;
        if (border != DYNAMIC_UNSIGNED_BORDERS[THREAD]) differs[1] = 1;
    }
    BARRIER();
    u32 kind = differs[0] == 0 ? KIND_SIGNED : differs[1] == 0 ? KIND_UNSIGNED : KIND_OTHER;
    if (kind == KIND_UNSIGNED) {
        for (u32 i = THREAD; i < CELL8_WORDS; i += 256) starts[i] = DYNAMIC_UNSIGNED_STARTS[i];
    }
    BARRIER();

    u32 threads = (1u << shift) / 8;
    if (threads > 256) { // one block of 4096
        most[0] = most[1] = max_(most[0], most[1]);
        threads = 256;
    }
    most[0] = set_max(most[0], threads, scratch);
    most[1] = set_max(most[1], threads, scratch);
    UNROLL
    for (u32 u = 0; u < 2; u++) {
        u64 at = first + 2048 * u;
        if ((at & ((1u << shift) - 1)) == 0 && at < n) absmax[at >> shift] = as_float(most[u]);
        u64 codes = PASTE(NAMED(QUANTIZE), _codes)(x + 8 * u, most[u], kind, borders,
                                                   (LOCAL const u8*)starts);
        if (whole) {
            *(GLOBAL u64*)(out + at) = codes;
        } else {
            for (u32 i = 0; i < 8; i++) {
                if (at + i < n) out[at + i] = (u8)(codes >> 8 * i);
            }
        }
    }
}
#include "undtype.h"

// The kernel of quantize_blockwise.cu for one dtype; double_quant.cu takes it too.
//   CODE_PARAMETERS, BORDER(i)  where the borders come from
//   ELEMENT(x)                  what is quantized of a loaded x
//   MAGNITUDE(w)                the magnitude of a loaded unit
#include "dtype.h"

// Eight codes of any block, in memory order from the low byte on.
DEVICE u64 PASTE(NAMED(QUANTIZE), _codes)(float* x, u32 magnitude, u32 kind,
                                          LOCAL const float* borders, LOCAL const U4* cells) {
    float reciprocal = reciprocal8(magnitude, x);
    u32 q[8];
    if (magnitude >= 0x7F800000u) kind = KIND_OTHER; // y may be NaN
    if (kind == KIND_OTHER) {
        UNROLL
        for (u32 i = 0; i < 8; i++) {
            q[i] = search8(clamp_to_one(x[i] * reciprocal), borders) << 24;
        }
    } else {
        UNROLL
        for (u32 i = 0; i < 8; i++) {
            float y = x[i] * reciprocal;
            q[i] = kind == KIND_SIGNED ? nearest_signed(y, cells) : nearest_unsigned(y, cells);
        }
    }
    return upper_bytes(q[0], q[1], q[2], q[3]) | (u64)upper_bytes(q[4], q[5], q[6], q[7]) << 32;
}

KERNEL(256, NAMED(QUANTIZE),
       (GLOBAL const T* input, CODE_PARAMETERS, GLOBAL u8* out, GLOBAL float* absmax, u64 n,
        u32 shift)) {
    SHARED(U4, cells, CELLS8_WORDS / 4);
    SHARED(float, borders, 256);
    SHARED(u32, scratch, 256);
    SHARED(u32, differs, 2); // from the signed and from the unsigned map
    u64 tile = GROUP * TILE, first = tile + 8 * THREAD;
    u32 whole = tile + TILE <= n && IS_ALIGNED(input, 16) && IS_ALIGNED(out, 8);
    u32 w[UNITS * UNIT_WORDS], most[UNITS];
    if (whole) {
        UNROLL
        for (u32 u = 0; u < UNITS; u++) {
            LOAD_UNIT(input + first + UNIT_STRIDE * u, w + UNIT_WORDS * u);
        }
    }
    // The cells of the signed map are fetched before it is known whether they are wanted.
    copy_signed_cells(cells);
    if (THREAD < 2) differs[THREAD] = 0;
    BARRIER();
    float border = as_float(0x7F800000u);
    if (THREAD < 255) {
        border = BORDER(THREAD);
        if (border != DYNAMIC_SIGNED_BORDERS[THREAD]) differs[0] = 1;
    }
    borders[THREAD] = border;
    BARRIER();
    u32 kind = KIND_SIGNED;
    if (differs[0]) {
        if (THREAD < 255 && border != DYNAMIC_UNSIGNED_BORDERS[THREAD]) differs[1] = 1;
        copy_unsigned_cells(cells);
        BARRIER();
        kind = differs[1] ? KIND_OTHER : KIND_UNSIGNED;
    }

    UNROLL
    for (u32 u = 0; u < UNITS; u++) {
        if (whole) {
            most[u] = MAGNITUDE(w + UNIT_WORDS * u);
        } else {
            most[u] = 0;
            for (u64 i = first + UNIT_STRIDE * u; i < first + UNIT_STRIDE * u + 8 && i < n; i++) {
                u32 bits = as_u32(ELEMENT(LOAD(input, i))) & 0x7FFFFFFFu;
                most[u] = max_(most[u], bits);
            }
        }
    }
    block_magnitudes(most, shift, scratch);
    store_magnitudes(most, shift, absmax, tile, n);

    if (whole && kind != KIND_OTHER && all_ordinary(most)) {
        UNROLL
        for (u32 u = 0; u < UNITS; u++) {
            float x[8], reciprocal = reciprocal_ordinary(most[u]);
            u32 q[8];
            UNIT_FLOATS(w + UNIT_WORDS * u, x);
            UNROLL
            for (u32 i = 0; i < 8; i++) x[i] = ELEMENT(x[i]) * reciprocal;
            if (kind == KIND_SIGNED) {
                UNROLL
                for (u32 i = 0; i < 8; i++) q[i] = nearest_signed(x[i], cells);
            } else {
                UNROLL
                for (u32 i = 0; i < 8; i++) q[i] = nearest_unsigned(x[i], cells);
            }
            u32 low = upper_bytes(q[0], q[1], q[2], q[3]);
            u32 high = upper_bytes(q[4], q[5], q[6], q[7]);
            *(GLOBAL u64*)(out + first + UNIT_STRIDE * u) = low | (u64)high << 32;
        }
        return;
    }
    // Other codes and other blocks take their elements once more.
    for (u32 u = 0; u < UNITS; u++) {
        u64 at = first + UNIT_STRIDE * u;
        if (at >= n) break;
        u32 magnitude = u < 2 ? (u == 0 ? most[0] : most[1]) : (u == 2 ? most[2] : most[3]);
        float x[8];
        if (whole) {
            LOAD8(input + at, x);
            UNROLL
            for (u32 i = 0; i < 8; i++) x[i] = ELEMENT(x[i]);
        } else {
            UNROLL
            for (u32 i = 0; i < 8; i++) {
                x[i] = 0.0f;
                if (at + i < n) x[i] = ELEMENT(LOAD(input, at + i));
            }
        }
        u64 codes = PASTE(NAMED(QUANTIZE), _codes)(x, magnitude, kind, borders, cells);
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

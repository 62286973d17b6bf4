// The codes, as the core has them (crates/halfbyte/src/code). Written by tests/codes.rs, which also
// compares: HALFBYTE_WRITE_CODES=1 cargo test -p halfbyte-gpu --test codes
#ifndef HALFBYTE_CODES_H
#define HALFBYTE_CODES_H
#include "port.h"

// NF4 by index, ascending.
CONSTANT float NF4[16] = {
    -1.0f, -0.6961928f, -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f, -0.091050036f,
    0.0f, 0.0795803f, 0.1609302f, 0.2461123f, 0.33791524f, 0.44070983f, 0.562617f, 0.72295684f,
    1.0f,
};

// FP4 by index: eight magnitudes, then the same negated.
CONSTANT float FP4[16] = {
    0.0f, 0.0052083335f, 0.6666667f, 1.0f, 0.33333334f, 0.5f, 0.16666667f, 0.25f, -0.0f,
    -0.0052083335f, -0.6666667f, -1.0f, -0.33333334f, -0.5f, -0.16666667f, -0.25f,
};

// NF4: the border inside each cell of quantize_4bit.cu, as bits; infinity for none.
CONSTANT u32 NF4_CELL_BORDERS[32] = {
    0x3D22FAFFu, 0x3DF64862u, 0x7F800000u, 0x3E5067E0u, 0x3E9582D4u, 0x3EC753F9u, 0x7F800000u,
    0x3F006D04u, 0x7F800000u, 0x3F248DAFu, 0x7F800000u, 0x7F800000u, 0x7F800000u, 0x3F5C89DAu,
    0x7F800000u, 0x7F800000u, 0x7F800000u, 0x7F800000u, 0x7F800000u, 0xBF591CD8u, 0x7F800000u,
    0x7F800000u, 0xBF1C5270u, 0x7F800000u, 0x7F800000u, 0xBEEB8480u, 0x7F800000u, 0xBEADEA76u,
    0xBE703CECu, 0x7F800000u, 0xBE0D38BCu, 0xBD3A7871u,
};

// The code below that border; the one above it is the next.
CONSTANT u32 NF4_CELL_CODES[32] = {
    7, 8, 9, 9, 10, 11, 12, 12, 13, 13, 14, 14, 14, 14, 15, 15, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3,
    3, 4, 5, 5, 6,
};

// FP4: the same for magnitudes.
CONSTANT u32 FP4_CELL_BORDERS[32] = {
    0x3B2AAAABu, 0x3DB00000u, 0x7F800000u, 0x3E555556u, 0x3E955556u, 0x7F800000u, 0x3ED55556u,
    0x7F800000u, 0x3F155556u, 0x7F800000u, 0x7F800000u, 0x7F800000u, 0x3F555556u, 0x7F800000u,
    0x7F800000u, 0x7F800000u, 0x7F800000u, 0x7F800000u, 0x7F800000u, 0x7F800000u, 0x7F800000u,
    0x7F800000u, 0x7F800000u, 0x7F800000u, 0x7F800000u, 0x7F800000u, 0x7F800000u, 0x7F800000u,
    0x7F800000u, 0x7F800000u, 0x7F800000u, 0x7F800000u,
};

// The code below that border, and the one above it shifted by 16.
CONSTANT u32 FP4_CELL_CODES[32] = {
    0x10000, 0x60001, 0x70006, 0x70006, 0x40007, 0x50004, 0x50004, 0x20005, 0x20005, 0x30002,
    0x30002, 0x30002, 0x30002, 0x30003, 0x30003, 0x30003, 0x10000, 0x10000, 0x10000, 0x10000,
    0x10000, 0x10000, 0x10000, 0x10000, 0x10000, 0x10000, 0x10000, 0x10000, 0x10000, 0x10000,
    0x10000, 0x10000,
};

#endif

// How kernels are handed a 4-bit weight: its scales, plain or double-quantized, and its table.
#ifndef HALFBYTE_WEIGHT_4BIT_H
#define HALFBYTE_WEIGHT_4BIT_H
#include "port.h"
#include "codes.h"

// What `Scales::args` (ops/weight.rs) passes. Plain scales have no absmax8, nested ones no absmax.
#define SCALE_PARAMETERS                                                                           \
    GLOBAL const float *absmax, GLOBAL const u8 *absmax8, GLOBAL const float *code2,               \
        GLOBAL const float *absmax2, GLOBAL const float *offset, u32 shift2

// The scale of block number `block`; two roundings when nested.
#define SCALE(block) scale_at(absmax, absmax8, code2, absmax2, offset, shift2, block)

DEVICE float scale_at(SCALE_PARAMETERS, u64 block) {
    if (!absmax8) return absmax[block];
    float product = code2[absmax8[block]] * absmax2[block >> shift2];
    return product + offset[0];
}

// What `Table4::args` passes: which table, and where it lies if it is the caller's.
#define TABLE_NF4 0
#define TABLE_FP4 1
#define TABLE_PARAMETERS u32 table_kind, GLOBAL const float *table

// Value number `index` of the table.
#define TABLE(index) table_at(table_kind, table, index)

DEVICE float table_at(TABLE_PARAMETERS, u32 index) {
    if (table_kind == TABLE_NF4) return NF4[index];
    return table_kind == TABLE_FP4 ? FP4[index] : table[index];
}

#endif

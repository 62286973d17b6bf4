// What int8_grad_plain.cu and experts_int8_plain.cu share. See the first for what they compute.
#ifndef HALFBYTE_INT8_GRAD_PLAIN_H
#define HALFBYTE_INT8_GRAD_PLAIN_H
#include "int8.h"

#define TILE 64
// Outputs of the layer in a step.
#define STEP 16
// A row of shared memory: one more than the tile, so that a warp writes to different banks.
#define PITCH 65

#endif

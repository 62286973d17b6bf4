// After `#define T f32` (f16, bf16): NAMED(op) is op_f32, LOAD and STORE convert. See port.h.
#ifndef T
#error "define T before including dtype.h"
#endif

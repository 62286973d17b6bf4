// The kernels of matvec_4bit.cu for ROWS rows.
#define T f32
#include "matvec_4bit.inc.h"
#define T f16
#include "matvec_4bit.inc.h"
#define T bf16
#include "matvec_4bit.inc.h"
#undef MATVEC
#undef ROWS

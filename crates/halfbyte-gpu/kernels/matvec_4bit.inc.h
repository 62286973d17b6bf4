// The kernel of matvec_4bit.cu for up to ROWS rows of one dtype.
#include "dtype.h"
#if HAVE_SHUFFLE
#define PARTS 4 // of a sum, one a warp
#else
#define PARTS 128 // one a thread
#endif

KERNEL(128, NAMED(MATVEC),
       (GLOBAL const T* a, u32 n, GLOBAL const u8* packed, SCALE_PARAMETERS, TABLE_PARAMETERS,
        GLOBAL const T* bias, GLOBAL T* out, u64 features, u32 columns, u32 shift)) {
    TABLE_16(values);
    SHARED(float, second, 256); // the code of nested scales
    SHARED(float, parts, PARTS * FEATURES * ROWS);
    u64 first = GROUP * FEATURES;
#define A_ROW(m) ((u64)(m))
#define OUT_ROW(m) ((u64)(m))
#define BLOCK(element) ((element) >> shift)
#include "matvec_4bit_rows.inc.h"
#undef A_ROW
#undef OUT_ROW
#undef BLOCK
}
#undef PARTS
#include "undtype.h"

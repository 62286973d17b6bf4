// OpenCL C's types and constants as far as port.h uses them: clang carries them in a header that not
// every build of it comes with. It declares the functions by itself (-fdeclare-opencl-builtins).
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef __SIZE_TYPE__ size_t;
typedef uint uint4 __attribute__((ext_vector_type(4)));
typedef uint cl_mem_fence_flags;
#define CLK_LOCAL_MEM_FENCE 1
#define CLK_GLOBAL_MEM_FENCE 2
#define as_uint(x) __builtin_astype((x), uint)
#define as_float(x) __builtin_astype((x), float)

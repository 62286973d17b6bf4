// The driver functions that PyTorch links against, handed on to the emulated driver.
//
// PyTorch's libcaffe2_nvrtc needs a libcuda.so.1. The emulated runtime bears that name (its
// SONAME), so the loader is content with it; the driver itself is what HALFBYTE_CUDA_DRIVER names.
#include "cudart.h"

#include <dlfcn.h>

#define API extern "C" __attribute__((visibility("default")))

using cudart::driver;

// All arguments are integers or pointers, and at most six of them: what the registers hold.
using Six = int (*)(long, long, long, long, long, long);

#define FORWARD(name)                                                         \
    API int name(long a, long b, long c, long d, long e, long f) {            \
        static const auto call = (Six)(driver() ? dlsym(driver(), #name) : nullptr); \
        return call ? call(a, b, c, d, e, f) : cudart::NOT_SUPPORTED;         \
    }
FORWARD(cuCtxGetCurrent)
FORWARD(cuCtxSetCurrent)
FORWARD(cuDeviceGet)
FORWARD(cuDeviceGetAttribute)
FORWARD(cuDevicePrimaryCtxGetState)
FORWARD(cuDevicePrimaryCtxRetain)
FORWARD(cuFuncGetAttribute)
FORWARD(cuFuncSetAttribute)
FORWARD(cuFuncSetCacheConfig)
FORWARD(cuGetErrorString)
FORWARD(cuModuleGetFunction)
FORWARD(cuModuleLoad)
FORWARD(cuModuleLoadData)
FORWARD(cuModuleLoadDataEx)
FORWARD(cuModuleUnload)
FORWARD(cuOccupancyMaxActiveBlocksPerMultiprocessor)
FORWARD(cuPointerGetAttribute)

// More arguments than that: PyTorch calls these for kernels that it compiles itself.
#define REFUSE(name) \
    API int name() { return cudart::NOT_SUPPORTED; }
REFUSE(cuLaunchCooperativeKernel)
REFUSE(cuLaunchKernel)
REFUSE(cuLinkAddData_v2)
REFUSE(cuLinkComplete)
REFUSE(cuLinkCreate_v2)
REFUSE(cuTensorMapEncodeTiled)

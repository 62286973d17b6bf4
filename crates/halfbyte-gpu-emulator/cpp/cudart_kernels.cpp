// Kernels of PyTorch's own, which the emulated CUDA runtime cannot run, and what it does not have.
#include "cudart.h"

#include <cstdio>
#include <cstring>
#include <unordered_map>

#define API extern "C" __attribute__((visibility("default")))

using namespace cudart;

static std::unordered_map<const void*, const char*>& kernel_names() {
    static auto* names = new std::unordered_map<const void*, const char*>;
    return *names;
}

static int refuse(const void* function) {
    const auto found = kernel_names().find(function);
    fprintf(stderr, "the emulated CUDA runtime cannot run PyTorch's kernel %s\n",
          found == kernel_names().end() ? "(not registered)" : found->second);
    return fail(NO_KERNEL_IMAGE);
}

struct Dim3 {
    unsigned x, y, z;
};

API void** __cudaRegisterFatBinary(void*) {
    static void* handle = nullptr;
    return &handle;
}
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, void*,
                                void*, void*, void*, int*) {
    kernel_names()[function] = name;
}
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
API unsigned __cudaPushCallConfiguration(Dim3, Dim3, size_t, void*) { return SUCCESS; }
API int __cudaPopCallConfiguration(Dim3*, Dim3*, size_t*, void*) { return SUCCESS; }
API int __cudaGetKernel(const void** out, const void* function) { return *out = function, SUCCESS; }
API int __cudaLaunchKernel(const void* kernel, Dim3, Dim3, void**, size_t, void*) {
    return refuse(kernel);
}
API int cudaLaunchKernel(const void* function, Dim3, Dim3, void**, size_t, void*) {
    return refuse(function);
}
API int cudaLaunchCooperativeKernel(const void* function, Dim3, Dim3, void**, size_t, void*) {
    return refuse(function);
}
API int cudaLaunchKernelExC(const void*, const void* function, void**) { return refuse(function); }
API int cudaFuncSetAttribute(const void*, int, int) { return SUCCESS; }
API int cudaKernelSetAttributeForDevice(void*, int, int, int) { return SUCCESS; }
API int cudaFuncGetAttributes(size_t* out, const void*) {
    memset(out, 0, 3 * sizeof(size_t) + 8 * sizeof(int));
    ((int*)(out + 3))[0] = 1024;  // maxThreadsPerBlock
    return SUCCESS;
}
API int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* out, const void*, int, size_t) {
    return *out = 2, SUCCESS;
}
API int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* out, const void*, int, size_t,
                                                               unsigned) {
    return *out = 2, SUCCESS;
}
API int cudaGetSymbolAddress(void**, const void*) { return fail(INVALID_SYMBOL); }
API int cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, int) {
    return fail(INVALID_SYMBOL);
}

// --- not there -------------------------------------------------------------------------------

#define ABSENT(name) \
    API int name() { return fail(NOT_SUPPORTED); }
ABSENT(cudaIpcCloseMemHandle)
ABSENT(cudaIpcGetEventHandle)
ABSENT(cudaIpcGetMemHandle)
ABSENT(cudaIpcOpenEventHandle)
ABSENT(cudaIpcOpenMemHandle)
ABSENT(cudaDeviceGetDefaultMemPool)
ABSENT(cudaDeviceGetGraphMemAttribute)
ABSENT(cudaDeviceSetGraphMemAttribute)
ABSENT(cudaMemPoolGetAttribute)
ABSENT(cudaMemPoolSetAccess)
ABSENT(cudaMemPoolSetAttribute)
ABSENT(cudaMemPoolTrimTo)
ABSENT(cudaLibraryGetGlobal)
ABSENT(cudaLibraryGetKernel)
ABSENT(cudaLibraryGetKernelCount)
ABSENT(cudaLibraryGetManaged)
ABSENT(cudaLibraryGetUnifiedFunction)
ABSENT(cudaLibraryLoadData)
ABSENT(cudaLibraryLoadFromFile)
ABSENT(cudaLibraryUnload)
ABSENT(cudaGraphAddNode)
ABSENT(cudaGraphConditionalHandleCreate)
ABSENT(cudaStreamBeginCaptureToGraph)
API int cudaProfilerStart() { return SUCCESS; }
API int cudaProfilerStop() { return SUCCESS; }

// A CUDA driver that does nothing, as quickly as it can: what is left of a launch's time is ours.
// It allocates host memory, and loads modules only while this thread's capture mode is relaxed.
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

typedef int R;
typedef void* H;
typedef unsigned long long P;

static __thread H current;
static __thread int mode;
static H contexts[2] = {(H)16, (H)32};

R cuInit(unsigned f) { return 0; }
R cuDriverGetVersion(int* v) { return *v = 13000, 0; }
R cuGetErrorName(R e, const char** s) { return *s = e == 900 ? "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED" : 0, 0; }
R cuGetErrorString(R e, const char** s) { return *s = 0, 0; }
R cuDeviceGetCount(int* n) { return *n = 2, 0; }
R cuDeviceGet(int* d, int n) { return *d = n, 0; }
R cuDeviceGetName(char* s, int n, int d) { return strcpy(s, "stub"), 0; }
R cuDeviceGetAttribute(int* v, int a, int d) { return *v = a == 75 ? 8 : a == 97 ? 163 << 10 : a == 76 ? 0 : 1, 0; }
R cuDevicePrimaryCtxRetain(H* c, int d) { return *c = contexts[d], 0; }
R cuCtxGetCurrent(H* c) { return *c = current, 0; }
R cuCtxPushCurrent_v2(H c) { return current = c, 0; }
R cuCtxPopCurrent_v2(H* c) { return *c = current, current = 0, 0; }
R cuFuncGetAttribute(int* v, int a, H f) { return *v = 0, 0; }
R cuFuncSetAttribute(H f, int a, int v) { return 0; }
R cuPointerGetAttribute(void* v, int a, P p) { return 1; }
R cuModuleLoadData(H* m, const void* image) { return mode == 2 ? (*m = (H)64, 0) : 900; }
R cuModuleGetFunction(H* f, H m, const char* n) { return *f = (H)n, 0; }
R cuLaunchKernel(H f, unsigned x, unsigned y, unsigned z, unsigned a, unsigned b, unsigned c, unsigned s, H q, H* args, H* extra) { return 0; }
R cuStreamCreate(H* s, unsigned f) { return *s = (H)128, 0; }
R cuStreamSynchronize(H s) { return 0; }
R cuStreamIsCapturing(H s, int* v) { return *v = 1, 0; }
R cuThreadExchangeStreamCaptureMode(int* m) {
    int before = mode;
    return mode = *m, *m = before, 0;
}
R cuMemAlloc_v2(P* p, size_t n) { return *p = (P)calloc(n, 1), 0; }
R cuMemAllocManaged(P* p, size_t n, unsigned f) { return *p = (P)calloc(n, 1), 0; }
R cuMemFree_v2(P p) { return free((void*)p), 0; }
R cuMemcpyHtoDAsync_v2(P to, const void* from, size_t n, H s) { return memcpy((void*)to, from, n), 0; }
R cuMemcpyDtoHAsync_v2(void* to, P from, size_t n, H s) { return memcpy(to, (void*)from, n), 0; }
R cuMemsetD8Async(P to, unsigned char v, size_t n, H s) { return memset((void*)to, v, n), 0; }

// What the test asks on this thread.
H stub_current(void) { return current; }
void stub_set_current(int device) { current = device < 0 ? 0 : contexts[device]; }
int stub_mode(void) { return mode; }

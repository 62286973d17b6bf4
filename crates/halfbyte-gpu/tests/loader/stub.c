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
static const char* failing; // the function that fails, or null
#define FAILS if (failing && !strcmp(failing, __func__)) return 999

R cuInit(unsigned f) { FAILS; return 0; }
R cuDriverGetVersion(int* v) { FAILS; return *v = 13000, 0; }
R cuGetErrorName(R e, const char** s) { FAILS; return *s = e == 900 ? "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED" : 0, 0; }
R cuGetErrorString(R e, const char** s) { FAILS; return *s = 0, 0; }
R cuDeviceGetCount(int* n) { FAILS; return *n = 2, 0; }
R cuDeviceGet(int* d, int n) { FAILS; return *d = n, 0; }
R cuDeviceGetName(char* s, int n, int d) { FAILS; return strcpy(s, "stub"), 0; }
R cuDeviceGetAttribute(int* v, int a, int d) { FAILS; return *v = a == 75 ? 8 : a == 97 ? 163 << 10 : a == 76 ? 0 : 1, 0; }
R cuDevicePrimaryCtxRetain(H* c, int d) { FAILS; return *c = contexts[d], 0; }
R cuCtxGetCurrent(H* c) { FAILS; return *c = current, 0; }
R cuCtxPushCurrent_v2(H c) { FAILS; return current = c, 0; }
R cuCtxPopCurrent_v2(H* c) { FAILS; return *c = current, current = 0, 0; }
R cuFuncGetAttribute(int* v, int a, H f) { FAILS; return *v = 0, 0; }
R cuFuncSetAttribute(H f, int a, int v) { FAILS; return 0; }
R cuPointerGetAttribute(int* v, int a, P p) { FAILS; return *v = 0, 0; }
R cuModuleLoadData(H* m, const void* image) { FAILS; return mode == 2 ? (*m = (H)64, 0) : 900; }
R cuModuleGetFunction(H* f, H m, const char* n) { FAILS; return *f = (H)n, 0; }
R cuLaunchKernel(H f, unsigned x, unsigned y, unsigned z, unsigned a, unsigned b, unsigned c, unsigned s, H q, H* args, H* extra) { FAILS; return 0; }
R cuStreamCreate(H* s, unsigned f) { FAILS; return *s = (H)128, 0; }
R cuStreamSynchronize(H s) { FAILS; return 0; }
R cuStreamIsCapturing(H s, int* v) { FAILS; return *v = s != 0, 0; }
R cuThreadExchangeStreamCaptureMode(int* m) { FAILS;
    int before = mode;
    return mode = *m, *m = before, 0;
}
R cuMemAlloc_v2(P* p, size_t n) { FAILS; return *p = (P)calloc(n, 1), 0; }
R cuMemAllocManaged(P* p, size_t n, unsigned f) { FAILS; return *p = (P)calloc(n, 1), 0; }
R cuMemFree_v2(P p) { FAILS; return free((void*)p), 0; }
R cuMemcpyHtoDAsync_v2(P to, const void* from, size_t n, H s) { FAILS; return memcpy((void*)to, from, n), 0; }
R cuMemcpyDtoHAsync_v2(void* to, P from, size_t n, H s) { FAILS; return memcpy(to, (void*)from, n), 0; }
R cuMemsetD8Async(P to, unsigned char v, size_t n, H s) { FAILS; return memset((void*)to, v, n), 0; }
R cuMemPrefetchAsync(P p, size_t n, int device, H s) { FAILS; return 0; }

// What the test asks on this thread.
H stub_current(void) { return current; }
void stub_set_current(int device) { current = device < 0 ? 0 : contexts[device]; }
int stub_mode(void) { return mode; }
void stub_fail(const char* function) { failing = function; }

// The emulator as a driver: the part of libcuda's interface that halfbyte uses, over host memory.
// (nvrtc*, hip* and hiprtc* are here too, so that one library can stand for each of them.)
//
// Environment, read at each call:
//   HALFBYTE_EMULATOR_DEVICES=80,90      compute capabilities of the devices; 80 unless given
//   HALFBYTE_EMULATOR_CAPABILITY=90      the same for one device
//   HALFBYTE_EMULATOR_DRIVER=13000       what cuDriverGetVersion says
//   HALFBYTE_EMULATOR_NVRTC=13000        what nvrtcVersion says, in the same form
//   HALFBYTE_EMULATOR_FAIL=cuInit=100,cuLaunchKernel=700   calls that fail, and with what
//   HALFBYTE_EMULATOR_LOG=<file>         a line for each call that a test may want to count
#include "emulator.h"
#include "races.h"
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

namespace {

typedef int Result;
typedef unsigned long long Pointer;
const Result SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101,
             INVALID_IMAGE = 200, INVALID_CONTEXT = 201, NO_BINARY = 209, NOT_FOUND = 500;

std::mutex lock;

const char* text(const char* name, const char* otherwise) {
    const char* value = getenv(name);
    return value && *value ? value : otherwise;
}

// The code that a call is to fail with, or 0.
Result failure(const char* call) {
    const char* list = text("HALFBYTE_EMULATOR_FAIL", nullptr);
    size_t length = strlen(call);
    while (list && *list) {
        if (!strncmp(list, call, length) && list[length] == '=') return atoi(list + length + 1);
        list = strchr(list, ',');
        if (list) list++;
    }
    return SUCCESS;
}

void log(const char* format, ...) __attribute__((format(printf, 1, 2)));
void log(const char* format, ...) {
    const char* path = text("HALFBYTE_EMULATOR_LOG", nullptr);
    if (!path) return;
    char line[512];
    va_list rest;
    va_start(rest, format);
    int n = vsnprintf(line, sizeof line - 1, format, rest);
    va_end(rest);
    n = std::min(n, (int)sizeof line - 2);
    line[n++] = '\n';
    std::lock_guard<std::mutex> guard(lock);
    if (FILE* f = fopen(path, "a")) {
        fwrite(line, 1, n, f);
        fclose(f);
    }
}

#define ENTER(call)                                                                                \
    if (Result code = failure(call)) return code

std::vector<unsigned> capabilities() {
    std::vector<unsigned> result;
    const char* list = text("HALFBYTE_EMULATOR_DEVICES", text("HALFBYTE_EMULATOR_CAPABILITY", "80"));
    while (list && *list && strcmp(list, "none")) {
        result.push_back((unsigned)atoi(list));
        list = strchr(list, ',');
        if (list) list++;
    }
    return result;
}

// ---- contexts, streams, modules --------------------------------------------------------------

struct Context {
    int device;
    unsigned capability;
};
thread_local std::vector<Context*> stack; // of current contexts; the last is current

Context* primary(int device) {
    static std::map<int, Context*> all;
    std::vector<unsigned> devices = capabilities();
    if (device < 0 || device >= (int)devices.size()) return nullptr;
    std::lock_guard<std::mutex> guard(lock);
    Context*& context = all[device];
    if (!context) context = new Context{device, devices[device]};
    return context;
}
Context* now() { return stack.empty() ? nullptr : stack.back(); }

struct Module {
    Context* context;
};
struct Function {
    const emulator::Kernel* kernel;
    Context* context;
    int dynamic_limit = 48 << 10;
};

// A launch that waits in a graph: the arguments as they were.
struct Recorded {
    Function* function;
    dim3_ blocks, threads;
    unsigned shared;
    std::vector<std::vector<unsigned char>> arguments;
};
// What a stream is asked to do: now, or at each launch of the graph that it is captured into.
typedef std::function<void()> Work;
struct Capture {
    std::vector<Work> work;
};
std::map<void*, Capture*> capturing; // by stream

void run(const Recorded& r) {
    std::vector<void*> pointers;
    for (auto& a : r.arguments) pointers.push_back((void*)a.data());
    emulator::launch(*r.function->kernel, r.blocks, r.threads, r.shared, pointers.data(),
                     r.function->context->capability);
}

// The fake runtime beside us (cudart.cpp), if there is one, knows which streams are capturing. It
// answers 1 when it keeps the work.
typedef int (*Hook)(const char* what, void* stream, void (*run)(void*), void* data, void (*drop)(void*));

Result enqueue(const char* what, void* stream, Work work) {
    static Hook hook = (Hook)dlsym(RTLD_DEFAULT, "halfbyte_emulated_launch");
    {
        std::lock_guard<std::mutex> guard(lock);
        auto found = capturing.find(stream);
        if (found != capturing.end()) return found->second->work.push_back(std::move(work)), SUCCESS;
    }
    if (hook) {
        Work* kept = new Work(std::move(work));
        auto call = [](void* data) { (*(Work*)data)(); };
        auto drop = [](void* data) { delete (Work*)data; };
        if (hook(what, stream, call, kept, drop)) return SUCCESS;
        call(kept);
        drop(kept);
        return SUCCESS;
    }
    return work(), SUCCESS;
}

// ---- memory: every allocation ends at a page that nobody may touch ------------------------------

struct Block {
    char* base;
    size_t mapped, bytes;
    char* start;
    bool managed;
    int device;
};
std::map<Pointer, Block> blocks;

const unsigned char CANARY = 0xA5;

Result allocate(Pointer* out, size_t bytes, bool managed) {
    if (bytes == 0) return INVALID_VALUE;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t mapped = (bytes + 2 * page - 1) / page * page + page;
    char* base = (char*)mmap(nullptr, mapped, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) return OUT_OF_MEMORY;
    mprotect(base + mapped - page, page, PROT_NONE);
    // cuMemAlloc aligns to 256 bytes: what is left before the guard page holds canaries. Sizes that
    // are no multiple of it keep an alignment of 16.
    size_t alignment = bytes % 256 == 0 ? 256 : 16;
    char* end = base + mapped - page;
    char* start = (char*)((uintptr_t)(end - bytes) / alignment * alignment);
    memset(start, 0xFF, bytes); // not zero, and NaN as a float
    memset(start + bytes, CANARY, (size_t)(end - start) - bytes);
    memset(base, CANARY, (size_t)(start - base));
    emulator::races::allocated(start, bytes);
    std::lock_guard<std::mutex> guard(lock);
    *out = (Pointer)start;
    blocks[*out] = Block{base, mapped, bytes, start, managed, now() ? now()->device : 0};
    return SUCCESS;
}

Result release(Pointer pointer) {
    if (!pointer) return SUCCESS;
    std::lock_guard<std::mutex> guard(lock);
    auto found = blocks.find(pointer);
    if (found == blocks.end()) return INVALID_VALUE;
    Block b = found->second;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    for (char* p = b.base; p < b.base + b.mapped - page; p++) {
        if (p == b.start) p += b.bytes;
        if (p < b.base + b.mapped - page && *(unsigned char*)p != CANARY) {
            fprintf(stderr, "emulator: %td bytes from the start of an allocation of %zu bytes were overwritten\n",
                    p - b.start, b.bytes);
            abort();
        }
    }
    emulator::races::freed(b.start);
    munmap(b.base, b.mapped);
    blocks.erase(found);
    return SUCCESS;
}

// Which device memory of the fake runtime is on; -1 for memory that it does not know.
int device_of(const void* pointer) {
    typedef int (*DeviceOf)(const void*);
    static DeviceOf known = (DeviceOf)dlsym(RTLD_DEFAULT, "halfbyte_emulated_device_of");
    return known ? known(pointer) : -1;
}

// ---- names of errors --------------------------------------------------------------------------

struct Name {
    Result code;
    const char *name, *text;
};
const Name NAMES[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {35, "CUDA_ERROR_INSUFFICIENT_DRIVER", "CUDA driver version is insufficient for CUDA runtime version"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {209, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "the provided PTX was compiled with an unsupported toolchain."},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "system has unsupported display driver / cuda driver combination"},
    {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

} // namespace

// ---- the driver -------------------------------------------------------------------------------

API Result cuInit(unsigned) {
    log("cuInit");
    return failure("cuInit");
}
API Result cuDriverGetVersion(int* version) {
    ENTER("cuDriverGetVersion");
    *version = atoi(text("HALFBYTE_EMULATOR_DRIVER", "13000"));
    return SUCCESS;
}
API Result cuGetErrorName(Result code, const char** name) {
    for (auto& n : NAMES)
        if (n.code == code) return *name = n.name, SUCCESS;
    return *name = nullptr, INVALID_VALUE;
}
API Result cuGetErrorString(Result code, const char** string) {
    for (auto& n : NAMES)
        if (n.code == code) return *string = n.text, SUCCESS;
    return *string = nullptr, INVALID_VALUE;
}
API Result cuDeviceGetCount(int* count) {
    ENTER("cuDeviceGetCount");
    return *count = (int)capabilities().size(), SUCCESS;
}
API Result cuDeviceGet(int* device, int ordinal) {
    ENTER("cuDeviceGet");
    if (ordinal < 0 || ordinal >= (int)capabilities().size()) return INVALID_DEVICE;
    return *device = ordinal, SUCCESS;
}
API Result cuDeviceGetName(char* name, int length, int device) {
    ENTER("cuDeviceGetName");
    snprintf(name, (size_t)length, "halfbyte emulator %d", device);
    return SUCCESS;
}
API Result cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = (size_t)8 << 30, SUCCESS; }
API Result cuDeviceGetUuid_v2(unsigned char* uuid, int device) {
    memset(uuid, device, 16);
    return SUCCESS;
}
API Result cuDeviceGetAttribute(int* value, int attribute, int device) {
    ENTER("cuDeviceGetAttribute");
    std::vector<unsigned> all = capabilities();
    if (device < 0 || device >= (int)all.size()) return INVALID_DEVICE;
    switch (attribute) {
    case 1: *value = 1024; break;                 // threads per block
    case 8: *value = 48 << 10; break;             // shared memory per block
    case 10: *value = 32; break;                  // warp size
    case 16: *value = 4; break;                   // multiprocessors
    case 41: *value = 1; break;                   // unified addressing
    case 75: *value = (int)all[device] / 10; break;
    case 76: *value = (int)all[device] % 10; break;
    case 83: *value = 1; break;                   // managed memory
    case 89: *value = 1; break;                   // concurrent managed access
    case 97: *value = all[device] >= 90 ? 227 << 10 : all[device] == 80 ? 163 << 10 : all[device] == 75 ? 64 << 10 : 99 << 10; break;
    default: *value = 0;
    }
    return SUCCESS;
}
API Result cuDevicePrimaryCtxRetain(void** context, int device) {
    ENTER("cuDevicePrimaryCtxRetain");
    log("cuDevicePrimaryCtxRetain device=%d", device);
    Context* c = primary(device);
    return c ? (*context = c, SUCCESS) : INVALID_DEVICE;
}
API Result cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
API Result cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
    return *flags = 0, *active = 1, SUCCESS;
}
API Result cuCtxGetCurrent(void** context) { return *context = now(), SUCCESS; }
API Result cuCtxSetCurrent(void* context) {
    if (!stack.empty()) stack.pop_back();
    if (context) stack.push_back((Context*)context);
    return SUCCESS;
}
API Result cuCtxPushCurrent_v2(void* context) {
    ENTER("cuCtxPushCurrent");
    return stack.push_back((Context*)context), SUCCESS;
}
API Result cuCtxPopCurrent_v2(void** context) {
    if (stack.empty()) return INVALID_CONTEXT;
    if (context) *context = stack.back();
    return stack.pop_back(), SUCCESS;
}
API Result cuCtxGetDevice(int* device) {
    return now() ? (*device = now()->device, SUCCESS) : INVALID_CONTEXT;
}
API Result cuCtxSynchronize(void) {
    log("cuCtxSynchronize");
    return SUCCESS;
}

// Any ELF file, or what the nvrtc below makes, is a module; its kernels are those of the emulator.
API Result cuModuleLoadData(void** module, const void* image) {
    ENTER("cuModuleLoadData");
    log("cuModuleLoadData");
    if (!now()) return INVALID_CONTEXT;
    bool known = !memcmp(image, "\177ELF", 4) || !memcmp(image, "EMUL", 4);
    if (!known) return INVALID_IMAGE;
    return *module = new Module{now()}, SUCCESS;
}
API Result cuModuleLoadDataEx(void** module, const void* image, unsigned, int*, void**) {
    return cuModuleLoadData(module, image);
}
API Result cuModuleUnload(void* module) {
    delete (Module*)module;
    return SUCCESS;
}
API Result cuModuleGetFunction(void** function, void* module, const char* name) {
    ENTER("cuModuleGetFunction");
    const emulator::Kernel* kernel = emulator::find(name);
    if (!kernel) return NOT_FOUND;
    return *function = new Function{kernel, ((Module*)module)->context}, SUCCESS;
}
API Result cuFuncSetAttribute(void* function, int attribute, int value) {
    ENTER("cuFuncSetAttribute");
    if (attribute == 8) ((Function*)function)->dynamic_limit = value;
    return SUCCESS;
}
API Result cuFuncGetAttribute(int* value, int, void*) { return *value = 0, SUCCESS; }
API Result cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int, size_t) {
    return *blocks = 2, SUCCESS;
}

API Result cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                          unsigned by, unsigned bz, unsigned shared, void* stream, void** arguments,
                          void** extra) {
    ENTER("cuLaunchKernel");
    Function* f = (Function*)function;
    log("cuLaunchKernel %s stream=%p device=%d groups=%u,%u,%u threads=%u shared=%u", f->kernel->name,
        stream, f->context->device, gx, gy, gz, bx, shared);
    if (!now()) return INVALID_CONTEXT;
    if (now() != f->context) {
        fprintf(stderr, "emulator: %s was loaded on device %d, but device %d is current\n",
                f->kernel->name, f->context->device, now()->device);
        return 400; // CUDA_ERROR_INVALID_HANDLE
    }
    if (!gx || !gy || !gz || gy > 65535 || gz > 65535 || bx * by * bz > 1024 || extra) return INVALID_VALUE;
    if (bx * by * bz > f->kernel->threads || (int)shared > f->dynamic_limit) return INVALID_VALUE;
    size_t parameters = 0;
    for (size_t i = 0; i < f->kernel->count; i++) parameters += (f->kernel->sizes[i] + 7) / 8 * 8;
    bool large = atoi(text("HALFBYTE_EMULATOR_DRIVER", "13000")) >= 12010;
    if (parameters > (large ? 32764u : 4096u)) return 701;
    Recorded r = {f, {gx, gy, gz}, {bx, by, bz}, shared, {}};
    for (size_t i = 0; i < f->kernel->count; i++) {
        const unsigned char* value = (const unsigned char*)arguments[i];
        r.arguments.emplace_back(value, value + f->kernel->sizes[i]);
    }
    return enqueue(f->kernel->name, stream, [r] { run(r); });
}

API Result cuStreamCreate(void** stream, unsigned) {
    ENTER("cuStreamCreate");
    return *stream = malloc(1), SUCCESS;
}
API Result cuStreamDestroy_v2(void* stream) {
    free(stream);
    return SUCCESS;
}
API Result cuStreamSynchronize(void* stream) {
    ENTER("cuStreamSynchronize");
    log("cuStreamSynchronize");
    std::lock_guard<std::mutex> guard(lock);
    return capturing.count(stream) ? 900 : SUCCESS;
}
API Result cuStreamIsCapturing(void* stream, int* status) {
    typedef int (*Ask)(void*, int*);
    static Ask ask = (Ask)dlsym(RTLD_DEFAULT, "cudaStreamIsCapturing");
    {
        std::lock_guard<std::mutex> guard(lock);
        if (capturing.count(stream)) return *status = 1, SUCCESS;
    }
    return ask ? ask(stream, status) : (*status = 0, SUCCESS);
}
API Result cuThreadExchangeStreamCaptureMode(int* mode) {
    static thread_local int current_mode = 0;
    std::swap(*mode, current_mode);
    return SUCCESS;
}
API Result cuStreamBeginCapture_v2(void* stream, int) {
    std::lock_guard<std::mutex> guard(lock);
    return capturing[stream] = new Capture, SUCCESS;
}
API Result cuStreamEndCapture(void* stream, void** graph) {
    std::lock_guard<std::mutex> guard(lock);
    auto found = capturing.find(stream);
    if (found == capturing.end()) return INVALID_VALUE;
    *graph = found->second;
    capturing.erase(found);
    return SUCCESS;
}
API Result cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
    return *executable = graph, SUCCESS;
}
API Result cuGraphLaunch(void* graph, void*) {
    for (auto& work : ((Capture*)graph)->work) work();
    return SUCCESS;
}
API Result cuGraphExecDestroy(void*) { return SUCCESS; }
API Result cuGraphDestroy(void*) { return SUCCESS; }

API Result cuMemAlloc_v2(Pointer* pointer, size_t bytes) {
    ENTER("cuMemAlloc");
    log("cuMemAlloc %zu", bytes);
    if (!now()) return INVALID_CONTEXT;
    return allocate(pointer, bytes, false);
}
API Result cuMemAllocManaged(Pointer* pointer, size_t bytes, unsigned) {
    ENTER("cuMemAllocManaged");
    log("cuMemAllocManaged %zu", bytes);
    if (!now()) return INVALID_CONTEXT;
    return allocate(pointer, bytes, true);
}
API Result cuMemFree_v2(Pointer pointer) { return release(pointer); }
API Result cuMemGetInfo_v2(size_t* free, size_t* total) {
    return *free = *total = (size_t)8 << 30, SUCCESS;
}
API Result cuMemPrefetchAsync(Pointer, size_t bytes, int device, void* stream) {
    ENTER("cuMemPrefetchAsync");
    log("cuMemPrefetchAsync %zu to %d", bytes, device);
    return enqueue("cuMemPrefetchAsync", stream, [] {});
}
API Result cuMemAdvise(Pointer, size_t, int, int) { return failure("cuMemAdvise"); }
API Result cuMemcpyHtoD_v2(Pointer to, const void* from, size_t bytes) {
    return memmove((void*)to, from, bytes), SUCCESS;
}
API Result cuMemcpyDtoH_v2(void* to, Pointer from, size_t bytes) {
    return memmove(to, (void*)from, bytes), SUCCESS;
}
API Result cuMemcpyHtoDAsync_v2(Pointer to, const void* from, size_t bytes, void* stream) {
    ENTER("cuMemcpyHtoDAsync");
    log("cuMemcpyHtoDAsync %zu", bytes);
    return enqueue("cuMemcpyHtoDAsync", stream, [=] { memmove((void*)to, from, bytes); });
}
API Result cuMemcpyDtoHAsync_v2(void* to, Pointer from, size_t bytes, void* stream) {
    ENTER("cuMemcpyDtoHAsync");
    log("cuMemcpyDtoHAsync %zu", bytes);
    return enqueue("cuMemcpyDtoHAsync", stream, [=] { memmove(to, (void*)from, bytes); });
}
API Result cuMemcpyDtoDAsync_v2(Pointer to, Pointer from, size_t bytes, void* stream) {
    return enqueue("cuMemcpyDtoDAsync", stream, [=] { memmove((void*)to, (void*)from, bytes); });
}
API Result cuMemsetD8Async(Pointer to, unsigned char value, size_t bytes, void* stream) {
    return enqueue("cuMemsetD8Async", stream, [=] { memset((void*)to, value, bytes); });
}
API Result cuPointerGetAttribute(void* data, int attribute, Pointer pointer) {
    int device = device_of((void*)pointer);
    bool managed = false;
    {
        std::lock_guard<std::mutex> guard(lock);
        auto after = blocks.upper_bound(pointer);
        if (after != blocks.begin() && pointer < (--after)->first + after->second.bytes) {
            device = after->second.device;
            managed = after->second.managed;
        }
    }
    if (device < 0) return INVALID_VALUE; // the host's own memory
    switch (attribute) {
    case 2: *(unsigned*)data = 2; return SUCCESS; // memory type: device
    case 8: *(int*)data = managed; return SUCCESS;
    case 9: *(int*)data = device; return SUCCESS;
    default: return INVALID_VALUE;
    }
}

// ---- nvrtc ------------------------------------------------------------------------------------

namespace {
struct Program {
    std::string log;
    std::string image;
};
} // namespace

API Result nvrtcVersion(int* major, int* minor) {
    int version = atoi(text("HALFBYTE_EMULATOR_NVRTC", "13000"));
    return *major = version / 1000, *minor = version % 1000 / 10, SUCCESS;
}
API const char* nvrtcGetErrorString(Result code) {
    return code == 0 ? "NVRTC_SUCCESS" : code == 6 ? "NVRTC_ERROR_COMPILATION" : "NVRTC_ERROR_INTERNAL_ERROR";
}
API Result nvrtcCreateProgram(void** program, const char* source, const char*, int, const char* const*,
                              const char* const*) {
    ENTER("nvrtcCreateProgram");
    return *program = new Program{"", std::string("EMUL") + std::to_string(strlen(source))}, SUCCESS;
}
API Result nvrtcCompileProgram(void* program, int count, const char* const* options) {
    std::string line;
    for (int i = 0; i < count; i++) line += std::string(" ") + options[i];
    log("nvrtcCompileProgram%s", line.c_str());
    if (Result code = failure("nvrtcCompileProgram")) {
        ((Program*)program)->log = "kernel.cu(1): error: the emulator was told to fail";
        return code;
    }
    return SUCCESS;
}
API Result nvrtcGetProgramLogSize(void* program, size_t* size) {
    return *size = ((Program*)program)->log.size() + 1, SUCCESS;
}
API Result nvrtcGetProgramLog(void* program, char* out) {
    return strcpy(out, ((Program*)program)->log.c_str()), SUCCESS;
}
API Result nvrtcGetCUBINSize(void* program, size_t* size) {
    ENTER("nvrtcGetCUBINSize");
    return *size = ((Program*)program)->image.size(), SUCCESS;
}
API Result nvrtcGetCUBIN(void* program, char* out) {
    return memcpy(out, ((Program*)program)->image.data(), ((Program*)program)->image.size()), SUCCESS;
}
API Result nvrtcDestroyProgram(void** program) {
    delete (Program*)*program;
    return SUCCESS;
}

// ---- HIP and hiprtc: the same calls under other names --------------------------------------------

API Result hipInit(unsigned flags) { return cuInit(flags); }
API Result hipDriverGetVersion(int* version) { return *version = 60000000, SUCCESS; }
API Result hipRuntimeGetVersion(int* version) { return *version = 60000000, SUCCESS; }
API const char* hipGetErrorName(Result code) { return code == 100 ? "hipErrorNoDevice" : code ? "hipErrorUnknown" : "hipSuccess"; }
API const char* hipGetErrorString(Result code) { return code == 100 ? "no ROCm-capable device is detected" : code ? "unknown error" : "no error"; }
API Result hipGetDeviceCount(int* count) {
    ENTER("hipGetDeviceCount");
    return cuDeviceGetCount(count);
}
API Result hipDeviceGet(int* device, int ordinal) { return cuDeviceGet(device, ordinal); }
API Result hipDeviceGetName(char* name, int length, int device) { return cuDeviceGetName(name, length, device); }
API Result hipDeviceGetAttribute(int* value, int attribute, int) {
    ENTER("hipDeviceGetAttribute");
    // 9: concurrent managed access, 63: compute units, 74: shared memory per block
    return *value = attribute == 9 ? 1 : attribute == 63 ? 4 : attribute == 74 ? 64 << 10 : 0, SUCCESS;
}
// The name comes first; where gcnArchName lies differs between versions of HIP.
API Result hipGetDevicePropertiesR0600(char* properties, int device) {
    ENTER("hipGetDeviceProperties");
    memset(properties, 0, 1472);
    strcpy(properties + 1160, "gfx90a:sramecc+:xnack-");
    return cuDeviceGetName(properties, 256, device);
}
API Result hipThreadExchangeStreamCaptureMode(int* mode) { return cuThreadExchangeStreamCaptureMode(mode); }
API Result hipDevicePrimaryCtxRetain(void** context, int device) { return cuDevicePrimaryCtxRetain(context, device); }
// In HIP every thread has a current device, number 0 at first.
API Result hipGetDevice(int* device) {
    ENTER("hipGetDevice");
    if (!now()) cuCtxSetCurrent(primary(0));
    return now() ? (*device = now()->device, SUCCESS) : INVALID_DEVICE;
}
API Result hipSetDevice(int device) {
    ENTER("hipSetDevice");
    Context* c = primary(device);
    return c ? cuCtxSetCurrent(c) : INVALID_DEVICE;
}
API Result hipCtxGetCurrent(void** context) { return cuCtxGetCurrent(context); }
API Result hipCtxPushCurrent(void* context) { return cuCtxPushCurrent_v2(context); }
API Result hipCtxPopCurrent(void** context) { return cuCtxPopCurrent_v2(context); }
API Result hipModuleLoadData(void** module, const void* image) { return cuModuleLoadData(module, image); }
API Result hipModuleUnload(void* module) { return cuModuleUnload(module); }
API Result hipModuleGetFunction(void** function, void* module, const char* name) { return cuModuleGetFunction(function, module, name); }
API Result hipModuleLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                                 unsigned by, unsigned bz, unsigned shared, void* stream,
                                 void** arguments, void** extra) {
    ENTER("hipModuleLaunchKernel");
    return cuLaunchKernel(function, gx, gy, gz, bx, by, bz, shared, stream, arguments, extra);
}
API Result hipMalloc(void** pointer, size_t bytes) { return allocate((Pointer*)pointer, bytes, false); }
API Result hipMallocManaged(void** pointer, size_t bytes, unsigned) { return allocate((Pointer*)pointer, bytes, true); }
API Result hipFree(void* pointer) { return release((Pointer)pointer); }
API Result hipMemcpyHtoD(void* to, void* from, size_t bytes) { return cuMemcpyHtoD_v2((Pointer)to, from, bytes); }
API Result hipMemcpyDtoH(void* to, void* from, size_t bytes) { return cuMemcpyDtoH_v2(to, (Pointer)from, bytes); }
API Result hipMemcpyHtoDAsync(void* to, void* from, size_t bytes, void* s) { return cuMemcpyHtoDAsync_v2((Pointer)to, from, bytes, s); }
API Result hipMemcpyDtoHAsync(void* to, void* from, size_t bytes, void* s) { return cuMemcpyDtoHAsync_v2(to, (Pointer)from, bytes, s); }
API Result hipMemcpyDtoDAsync(void* to, void* from, size_t bytes, void* s) { return cuMemcpyDtoDAsync_v2((Pointer)to, (Pointer)from, bytes, s); }
API Result hipMemsetAsync(void* to, int value, size_t bytes, void* s) { return cuMemsetD8Async((Pointer)to, (unsigned char)value, bytes, s); }
API Result hipMemsetD8Async(void* to, unsigned char value, size_t bytes, void* s) { return cuMemsetD8Async((Pointer)to, value, bytes, s); }
API Result hipMemPrefetchAsync(const void* p, size_t bytes, int device, void* s) { return cuMemPrefetchAsync((Pointer)p, bytes, device, s); }
API Result hipMemAdvise(const void* p, size_t bytes, int advice, int device) { return cuMemAdvise((Pointer)p, bytes, advice, device); }
API Result hipStreamCreateWithFlags(void** stream, unsigned flags) { return cuStreamCreate(stream, flags); }
API Result hipStreamCreate(void** stream) { return cuStreamCreate(stream, 0); }
API Result hipStreamDestroy(void* stream) { return cuStreamDestroy_v2(stream); }
API Result hipStreamSynchronize(void* stream) { return cuStreamSynchronize(stream); }
API Result hipStreamIsCapturing(void* stream, int* status) { return cuStreamIsCapturing(stream, status); }

API Result hiprtcVersion(int* major, int* minor) { return *major = 6, *minor = 0, SUCCESS; }
API const char* hiprtcGetErrorString(Result code) { return code ? "HIPRTC_ERROR_COMPILATION" : "HIPRTC_SUCCESS"; }
API Result hiprtcCreateProgram(void** program, const char* source, const char* name, int n, const char* const* h, const char* const* i) {
    return nvrtcCreateProgram(program, source, name, n, h, i);
}
API Result hiprtcCompileProgram(void* program, int count, const char* const* options) {
    ENTER("hiprtcCompileProgram");
    return nvrtcCompileProgram(program, count, options);
}
API Result hiprtcGetProgramLogSize(void* program, size_t* size) { return nvrtcGetProgramLogSize(program, size); }
API Result hiprtcGetProgramLog(void* program, char* out) { return nvrtcGetProgramLog(program, out); }
API Result hiprtcGetCodeSize(void* program, size_t* size) { return nvrtcGetCUBINSize(program, size); }
API Result hiprtcGetCode(void* program, char* out) { return nvrtcGetCUBIN(program, out); }
API Result hiprtcDestroyProgram(void** program) { return nvrtcDestroyProgram(program); }

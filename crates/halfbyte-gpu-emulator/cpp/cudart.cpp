// The CUDA runtime, as far as PyTorch calls it, on a machine without a GPU.
//
// Loaded ahead of libcudart (LD_PRELOAD), it answers for every function that PyTorch imports.
// Device memory is host memory, work is done at once, and a stream only matters while it
// captures a graph. PyTorch's own kernels are machine code for a GPU and cannot run: a launch
// fails and names the kernel. Kernels of halfbyte go through the emulated driver
// (libcuda_emulated.so), which tells this library about every launch.
//
// An allocation begins after a page that may not be touched and ends at another (at most 15 bytes
// before it: canaries), and is filled with 0xFF (NaN as any float): a kernel that reads or writes
// outside, or reads what nobody wrote, is seen. PyTorch's caching allocator hides that, so tests
// run with PYTORCH_NO_CUDA_MEMORY_CACHING=1.
#include "cudart.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

#define API extern "C" __attribute__((visibility("default")))

namespace cudart {

// --- errors and counters ---------------------------------------------------------------------

static thread_local int last_error = SUCCESS;

int fail(int error) {
    if (error != SUCCESS) last_error = error;
    return error;
}

static std::mutex counters_lock;
static Counter* counters = nullptr;

Counter::Counter(const char* name) : name(name) {
    std::lock_guard<std::mutex> guard(counters_lock);
    next = counters;
    counters = this;
}

// --- devices ---------------------------------------------------------------------------------

thread_local int current_device = 0;

const std::vector<int>& devices() {
    static const std::vector<int> list = [] {
        std::vector<int> found;
        const char* text = getenv("HALFBYTE_EMULATOR_DEVICES");
        if (!text || !*text) text = getenv("HALFBYTE_EMULATOR_CAPABILITY");
        for (const char* at = text && *text ? text : "80"; *at;) {
            char* end;
            const long capability = strtol(at, &end, 10);
            if (end == at) break;
            found.push_back((int)capability);
            at = *end == ',' ? end + 1 : end;
        }
        return found;
    }();
    return list;
}

static bool is_device(int ordinal) { return ordinal >= 0 && ordinal < (int)devices().size(); }

constexpr size_t TOTAL_MEMORY = size_t{16} << 30;
constexpr int MULTIPROCESSORS = 8;

static size_t shared_opt_in(int capability) {
    switch (capability) {
        case 75: return 64 << 10;
        case 80: case 87: return 163 << 10;
        case 90: case 100: case 103: return 227 << 10;
        default: return 99 << 10;
    }
}

// --- memory ----------------------------------------------------------------------------------

static std::mutex memory_lock;
static std::map<const char*, Allocation>& memory() {
    static auto* table = new std::map<const char*, Allocation>;  // outlives static destructors
    return *table;
}
static size_t allocated_bytes = 0;

static size_t page() { return (size_t)sysconf(_SC_PAGESIZE); }
static size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

// Alignment of device memory that is not a whole number of pages: small, so that the end of the
// memory is near the guard page. Kernels may rely on 16 bytes at the start of an allocation.
constexpr size_t ALIGNMENT = 16;

// What stands beside an allocation, up to the guard pages; looked at when it is freed.
constexpr unsigned char CANARY = 0xA5;

// Ends the process when a byte of [from, to) is no canary any more.
static void check_canaries(const Allocation& a, const char* from, const char* to) {
    for (const char* at = from; at < to; ++at) {
        if (*(const unsigned char*)at == CANARY) continue;
        fprintf(stderr, "emulator: byte %td of an allocation of %zu bytes was written\n",
                at - a.start, a.bytes);
        abort();
    }
}

static int allocate(void** out, size_t bytes, Memory kind) {
    if (out == nullptr) return fail(INVALID_VALUE);
    *out = nullptr;
    if (bytes == 0) return SUCCESS;
    const size_t inner = round_up(bytes, page());
    const size_t whole = inner + 2 * page();
    if (bytes > TOTAL_MEMORY) return fail(OUT_OF_MEMORY);
    void* map = mmap(nullptr, whole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) return fail(OUT_OF_MEMORY);
    char* first = (char*)map + page();
    if (mprotect(first, inner, PROT_READ | PROT_WRITE) != 0) {
        munmap(map, whole);
        return fail(OUT_OF_MEMORY);
    }
    char* start = first + (inner - round_up(bytes, ALIGNMENT));
    memset(first, CANARY, inner);
    memset(start, 0xFF, bytes);
    std::lock_guard<std::mutex> guard(memory_lock);
    memory()[start] = Allocation{start, bytes, current_device, kind, (char*)map, whole};
    allocated_bytes += bytes;
    *out = start;
    return SUCCESS;
}

static int release(void* pointer) {
    if (pointer == nullptr) return SUCCESS;
    std::lock_guard<std::mutex> guard(memory_lock);
    const auto found = memory().find((const char*)pointer);
    if (found == memory().end() || found->second.map == nullptr) return fail(INVALID_VALUE);
    const Allocation& a = found->second;
    check_canaries(a, a.map + page(), a.start);
    check_canaries(a, a.start + a.bytes, a.map + a.map_bytes - page());
    allocated_bytes -= a.bytes;
    munmap(a.map, a.map_bytes);
    memory().erase(found);
    return SUCCESS;
}

Allocation find(const void* pointer) {
    std::lock_guard<std::mutex> guard(memory_lock);
    auto next = memory().upper_bound((const char*)pointer);
    if (next == memory().begin()) return {};
    const Allocation& found = std::prev(next)->second;
    return (const char*)pointer < found.start + found.bytes ? found : Allocation{};
}

// --- the driver beneath ----------------------------------------------------------------------

void* driver() {
    static void* library = [] {
        const char* path = getenv("HALFBYTE_CUDA_DRIVER");
        return path && *path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
    }();
    return library;
}

// What stands for a driver function that the emulated driver does not have.
static int not_supported() { return NOT_SUPPORTED; }

}  // namespace cudart

using namespace cudart;

// --- what tests ask --------------------------------------------------------------------------

// How often the runtime function `name` was called since the process began.
API uint64_t halfbyte_emulated_calls(const char* name) {
    std::lock_guard<std::mutex> guard(counters_lock);
    for (const Counter* at = counters; at; at = at->next) {
        if (strcmp(at->name, name) == 0) return at->calls.load();
    }
    return 0;
}

// The device whose memory `pointer` is, or -1.
API int halfbyte_emulated_device_of(const void* pointer) {
    const Allocation found = find(pointer);
    return found.kind == Memory::DEVICE || found.kind == Memory::MANAGED ? found.device : -1;
}

// Bytes of device memory allocated now.
API size_t halfbyte_emulated_bytes() {
    std::lock_guard<std::mutex> guard(memory_lock);
    return allocated_bytes;
}

// --- errors ----------------------------------------------------------------------------------

API int cudaGetLastError() { return std::exchange(last_error, SUCCESS); }
API int cudaPeekAtLastError() { return last_error; }

static const char* describe(int error, bool name) {
    switch (error) {
#define CASE(code, label, text) case code: return name ? label : text;
        CASE(SUCCESS, "cudaSuccess", "no error")
        CASE(INVALID_VALUE, "cudaErrorInvalidValue", "invalid argument")
        CASE(OUT_OF_MEMORY, "cudaErrorMemoryAllocation", "out of memory")
        CASE(INVALID_SYMBOL, "cudaErrorInvalidSymbol", "invalid device symbol")
        CASE(NO_DEVICE, "cudaErrorNoDevice", "no CUDA-capable device is detected")
        CASE(INVALID_DEVICE, "cudaErrorInvalidDevice", "invalid device ordinal")
        CASE(NO_KERNEL_IMAGE, "cudaErrorNoKernelImageForDevice",
         "the emulated CUDA runtime cannot run PyTorch's own kernels")
        CASE(INVALID_HANDLE, "cudaErrorInvalidResourceHandle", "invalid resource handle")
        CASE(PEER_ACCESS_ALREADY_ENABLED, "cudaErrorPeerAccessAlreadyEnabled",
         "peer access is already enabled")
        CASE(NOT_SUPPORTED, "cudaErrorNotSupported", "the emulated CUDA runtime does not have this")
        CASE(CAPTURE_UNSUPPORTED, "cudaErrorStreamCaptureUnsupported",
         "operation not permitted when stream is capturing")
        CASE(CAPTURE_INVALIDATED, "cudaErrorStreamCaptureInvalidated",
         "operation failed due to a previous error during capture")
        CASE(CAPTURE_UNMATCHED, "cudaErrorStreamCaptureUnmatched",
         "capture was not initiated in this stream")
#undef CASE
        default: return name ? "cudaErrorUnknown" : "unknown error";
    }
}
API const char* cudaGetErrorName(int error) { return describe(error, true); }
API const char* cudaGetErrorString(int error) { return describe(error, false); }

// --- devices ---------------------------------------------------------------------------------

API int cudaDriverGetVersion(int* version) { return *version = 13020, SUCCESS; }
API int cudaRuntimeGetVersion(int* version) { return *version = 13020, SUCCESS; }

API int cudaGetDeviceCount(int* count) {
    *count = (int)devices().size();
    return *count == 0 ? fail(NO_DEVICE) : SUCCESS;
}

API int cudaGetDevice(int* device) { return *device = current_device, SUCCESS; }

API int cudaSetDevice(int device) {
    if (!is_device(device)) return fail(INVALID_DEVICE);
    current_device = device;
    return SUCCESS;
}

// The layout of cudaDeviceProp since CUDA 13.0, of which the texture limits stay zero.
struct DeviceProperties {
    char name[256];
    char uuid[16];
    char luid[8];
    unsigned luid_node_mask;
    size_t total_memory;
    size_t shared_per_block;
    int registers_per_block;
    int warp_size;
    size_t pitch;
    int max_threads_per_block;
    int max_threads[3];
    int max_grid[3];
    size_t constant_memory;
    int major, minor;
    size_t texture_alignment, texture_pitch_alignment;
    int multiprocessors;
    int integrated;
    int can_map_host_memory;
    int textures[39];
    size_t surface_alignment;
    int concurrent_kernels;
    int ecc;
    int pci_bus, pci_device, pci_domain;
    int tcc;
    int async_engines;
    int unified_addressing;
    int bus_width;
    int l2_bytes;
    int persisting_l2_bytes;
    int max_threads_per_multiprocessor;
    int stream_priorities;
    int global_l1, local_l1;
    size_t shared_per_multiprocessor;
    int registers_per_multiprocessor;
    int managed_memory;
    int board[2];
    int host_atomics;
    int pageable_access;
    int concurrent_managed_access;
    int preemption;
    int host_pointer_for_registered;
    int cooperative_launch;
    size_t shared_per_block_opt_in;
    int rest[26 + 56];
};
static_assert(offsetof(DeviceProperties, multiprocessors) == 384, "cudaDeviceProp has moved");
static_assert(offsetof(DeviceProperties, surface_alignment) == 552, "cudaDeviceProp has moved");
static_assert(offsetof(DeviceProperties, shared_per_block_opt_in) == 672,
              "cudaDeviceProp has moved");
static_assert(sizeof(DeviceProperties) == 1008, "cudaDeviceProp has another size");

API int cudaGetDeviceProperties(DeviceProperties* out, int device) {
    if (!is_device(device)) return fail(INVALID_DEVICE);
    const int capability = devices()[device];
    memset(out, 0, sizeof *out);
    snprintf(out->name, sizeof out->name, "halfbyte emulated sm_%d", capability);
    out->uuid[15] = (char)(device + 1);
    out->total_memory = TOTAL_MEMORY;
    out->shared_per_block = 48 << 10;
    out->registers_per_block = out->registers_per_multiprocessor = 65536;
    out->warp_size = 32;
    out->max_threads_per_block = out->max_threads[0] = out->max_threads[1] = 1024;
    out->max_threads[2] = 64;
    out->max_grid[0] = 0x7fffffff;
    out->max_grid[1] = out->max_grid[2] = 65535;
    out->constant_memory = 64 << 10;
    out->major = capability / 10;
    out->minor = capability % 10;
    out->texture_alignment = 512;
    out->multiprocessors = MULTIPROCESSORS;
    out->can_map_host_memory = out->concurrent_kernels = out->unified_addressing = 1;
    out->pci_bus = device + 1;
    out->async_engines = 2;
    out->bus_width = 256;
    out->l2_bytes = 4 << 20;
    out->max_threads_per_multiprocessor = 1536;
    out->stream_priorities = out->managed_memory = out->concurrent_managed_access = 1;
    out->shared_per_multiprocessor = shared_opt_in(capability) + 1024;
    out->shared_per_block_opt_in = shared_opt_in(capability);
    return SUCCESS;
}

API int cudaDeviceGetAttribute(int* value, int attribute, int device) {
    if (!is_device(device)) return fail(INVALID_DEVICE);
    const int capability = devices()[device];
    switch (attribute) {
        case 1: case 2: case 3: *value = 1024; break;                  // threads of a block
        case 4: *value = 64; break;
        case 5: *value = 0x7fffffff; break;                            // blocks of a grid
        case 6: case 7: *value = 65535; break;
        case 8: *value = 48 << 10; break;                              // shared memory of a block
        case 10: *value = 32; break;                                   // lanes of a warp
        case 16: *value = MULTIPROCESSORS; break;
        case 39: *value = 1536; break;  // threads of a multiprocessor
        case 41: case 83: case 89: *value = 1; break;                  // unified and managed memory
        case 75: *value = capability / 10; break;
        case 76: *value = capability % 10; break;
        case 81: *value = (int)shared_opt_in(capability) + 1024; break;
        case 97: *value = (int)shared_opt_in(capability); break;
        default: *value = 0;
    }
    return SUCCESS;
}

API int cudaDeviceGetPCIBusId(char* out, int bytes, int device) {
    if (!is_device(device)) return fail(INVALID_DEVICE);
    snprintf(out, (size_t)bytes, "0000:%02x:00.0", device + 1);
    return SUCCESS;
}

API int cudaDeviceCanAccessPeer(int* can, int a, int b) {
    if (!is_device(a) || !is_device(b)) return fail(INVALID_DEVICE);
    *can = a != b;
    return SUCCESS;
}
API int cudaDeviceEnablePeerAccess(int, unsigned) { return SUCCESS; }

// Driver functions that c10 asks for: the emulated driver's where it has them. Of the others, the
// required ones get a function that refuses.
API int cudaGetDriverEntryPointByVersion(const char* symbol, void** out, unsigned version,
                                         unsigned long long, int* status) {
    *out = driver() ? dlsym(driver(), symbol) : nullptr;
    if (*out == nullptr && version <= 12000) *out = (void*)not_supported;
    if (status) *status = *out == nullptr;
    return SUCCESS;
}

// --- memory ----------------------------------------------------------------------------------

API int cudaMalloc(void** out, size_t bytes) {
    COUNT();
    if (forbidden_by_capture()) return fail(CAPTURE_UNSUPPORTED);
    return allocate(out, bytes, Memory::DEVICE);
}
API int cudaFree(void* pointer) {
    COUNT();
    // PyTorch calls cudaFree(0) to create the context.
    if (pointer && forbidden_by_capture()) return fail(CAPTURE_UNSUPPORTED);
    return release(pointer);
}
API int cudaMallocAsync(void** out, size_t bytes, void*) {
    COUNT();
    return allocate(out, bytes, Memory::DEVICE);
}
API int cudaFreeAsync(void* pointer, void*) {
    COUNT();
    return release(pointer);
}
API int cudaMallocManaged(void** out, size_t bytes, unsigned) {
    COUNT();
    return allocate(out, bytes, Memory::MANAGED);
}
API int cudaHostAlloc(void** out, size_t bytes, unsigned) {
    COUNT();
    return allocate(out, bytes, Memory::HOST);
}
API int cudaMallocHost(void** out, size_t bytes) { return cudaHostAlloc(out, bytes, 0); }
API int cudaFreeHost(void* pointer) { return release(pointer); }

API int cudaHostRegister(void* pointer, size_t bytes, unsigned) {
    std::lock_guard<std::mutex> guard(memory_lock);
    memory()[(char*)pointer] =
            Allocation{(char*)pointer, bytes, current_device, Memory::HOST, nullptr, 0};
    return SUCCESS;
}
API int cudaHostUnregister(void* pointer) {
    std::lock_guard<std::mutex> guard(memory_lock);
    return memory().erase((const char*)pointer) ? SUCCESS : fail(INVALID_VALUE);
}

API int cudaMemGetInfo(size_t* free, size_t* total) {
    *total = TOTAL_MEMORY;
    *free = TOTAL_MEMORY - halfbyte_emulated_bytes();
    return SUCCESS;
}

struct PointerAttributes {
    int type;
    int device;
    void* device_pointer;
    void* host_pointer;
    long reserved[8];
};

API int cudaPointerGetAttributes(PointerAttributes* out, const void* pointer) {
    const Allocation found = find(pointer);
    *out = {};
    out->type = (int)found.kind;
    out->device = found.kind == Memory::UNREGISTERED ? -2 : found.device;
    out->device_pointer = found.kind == Memory::UNREGISTERED ? nullptr : (void*)pointer;
    out->host_pointer = found.kind == Memory::DEVICE ? nullptr : (void*)pointer;
    if (found.kind != Memory::UNREGISTERED || driver() == nullptr) return SUCCESS;
    // Memory of the driver: its type (CU_POINTER_ATTRIBUTE_MEMORY_TYPE), whether it is managed
    // (.._IS_MANAGED) and its device (.._DEVICE_ORDINAL).
    using Query = int (*)(void*, int, uint64_t);
    static const auto query = (Query)dlsym(driver(), "cuPointerGetAttribute");
    int type = 0, managed = 0, device = 0;
    if (!query || query(&type, 2, (uint64_t)pointer) != SUCCESS || type == 0) return SUCCESS;
    query(&managed, 8, (uint64_t)pointer);
    query(&device, 9, (uint64_t)pointer);
    out->type = managed ? (int)Memory::MANAGED : type;
    out->device = device;
    out->device_pointer = (void*)pointer;
    return SUCCESS;
}

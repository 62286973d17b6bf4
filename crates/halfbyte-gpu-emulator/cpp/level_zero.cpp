// The emulator as an Intel GPU: the part of Level Zero, SYCL and ocloc that halfbyte uses.
//
// Every argument is checked as a driver may check it: types of structs, handles of the right kind
// and context, sizes of kernel arguments, threads per group. What does not fit is an error.
//
// Devices: an integrated GPU, a GPU, and one that is no GPU.
//   HALFBYTE_EMULATOR_ZE_FAIL=zeInit     the call of that name fails (ZE_RESULT_ERROR_UNINITIALIZED)
#include "emulator.h"
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

// The emulated driver's memory: every allocation ends at a guard page.
extern "C" int cuDevicePrimaryCtxRetain(void** context, int device);
extern "C" int cuCtxPushCurrent_v2(void* context);
extern "C" int cuCtxPopCurrent_v2(void** context);
extern "C" int cuMemAllocManaged(unsigned long long* pointer, size_t bytes, unsigned flags);
extern "C" int cuMemFree_v2(unsigned long long pointer);

namespace {

typedef unsigned Result;
const Result SUCCESS = 0, OUT_OF_MEMORY = 0x70000003, BUILD_FAILURE = 0x70000004,
             UNINITIALIZED = 0x78000001, INVALID_ARGUMENT = 0x78000004,
             INVALID_HANDLE = 0x78000005, INVALID_POINTER = 0x78000007,
             INVALID_KERNEL_NAME = 0x78000011, INVALID_GROUP_SIZE = 0x78000013,
             INVALID_ARGUMENT_INDEX = 0x78000015, INVALID_ARGUMENT_SIZE = 0x78000016;

// The first member of every object says what it is.
enum Kind : unsigned { DRIVER = 0x5A450001, DEVICE, CONTEXT, LIST, MODULE, KERNEL, LOG, QUEUE };
struct Object {
    Kind kind;
};
struct Device : Object {
    unsigned type, number, flags;
};
struct Context : Object {};
struct List : Object {
    Context* context;
    bool waits;
};
struct Module : Object {
    Context* context;
};
struct Kernel : Object {
    const emulator::Kernel* kernel;
    Context* context;
    unsigned threads;
    bool follows_addresses;
    std::vector<std::vector<unsigned char>> arguments;
};
struct Log : Object {
    std::string text;
};
struct Queue : Object {
    char backend;
    bool immediate;
    Context* context;
    List* list;
    int waits;
};

Object driver = {DRIVER};
Device devices[3] = {{{DEVICE}, 1, 0x46a6, 1}, {{DEVICE}, 1, 0xe20b, 0}, {{DEVICE}, 2, 0xffff, 0}};

bool fails(const char* call) {
    const char* name = getenv("HALFBYTE_EMULATOR_ZE_FAIL");
    return name && !strcmp(name, call);
}
#define ENTER(call)                                                                                \
    if (fails(call)) return UNINITIALIZED

template <class T> T* as(void* handle, Kind kind) {
    return handle && ((Object*)handle)->kind == kind ? (T*)handle : nullptr;
}

// What every description starts with.
struct Head {
    unsigned kind;
    const Head* next;
};
bool is(const void* description, unsigned kind) {
    return description && ((const Head*)description)->kind == kind;
}
void put(void* base, size_t offset, unsigned value) { memcpy((char*)base + offset, &value, 4); }

template <class T> Result list(unsigned* count, T** out, T* first, unsigned known) {
    if (!count) return INVALID_POINTER;
    if (!out) return *count = known, SUCCESS;
    *count = std::min(*count, known);
    for (unsigned i = 0; i < *count; i++) out[i] = first + i;
    return SUCCESS;
}

// A list that a launch or a copy goes to, without events.
List* open(void* handle, void* signal, unsigned waits, void** events) {
    return signal || waits || events ? nullptr : as<List>(handle, LIST);
}

Result allocate(size_t bytes, void** out) {
    void* context;
    unsigned long long pointer = 0;
    cuDevicePrimaryCtxRetain(&context, 0);
    cuCtxPushCurrent_v2(context);
    int code = cuMemAllocManaged(&pointer, bytes, 1);
    cuCtxPopCurrent_v2(&context);
    *out = (void*)pointer;
    return code ? OUT_OF_MEMORY : SUCCESS;
}

} // namespace

// ---- Level Zero -------------------------------------------------------------------------------

API Result zeInit(unsigned flags) {
    ENTER("zeInit");
    return flags ? INVALID_ARGUMENT : SUCCESS;
}
API Result zeDriverGet(unsigned* count, Object** out) { return list(count, out, &driver, 1); }
API Result zeDriverGetApiVersion(void* handle, unsigned* version) {
    if (!as<Object>(handle, DRIVER)) return INVALID_HANDLE;
    return *version = 1 << 16 | 6, SUCCESS;
}
API Result zeDeviceGet(void* handle, unsigned* count, Device** out) {
    ENTER("zeDeviceGet");
    if (!as<Object>(handle, DRIVER)) return INVALID_HANDLE;
    return list(count, out, devices, 3);
}
API Result zeDeviceGetProperties(void* handle, void* out) {
    Device* device = as<Device>(handle, DEVICE);
    if (!device) return INVALID_HANDLE;
    if (!is(out, 3)) return INVALID_ARGUMENT;
    put(out, 16, device->type);
    put(out, 20, 0x8086);
    put(out, 24, device->number);
    put(out, 28, device->flags);
    put(out, 40, 1u << 30); // the largest allocation
    put(out, 68, 4);        // subslices of a slice
    put(out, 72, 5);        // slices
    snprintf((char*)out + 112, 256, "halfbyte emulator %x", device->number);
    return SUCCESS;
}
API Result zeDeviceGetComputeProperties(void* handle, void* out) {
    if (!as<Device>(handle, DEVICE)) return INVALID_HANDLE;
    if (!is(out, 4)) return INVALID_ARGUMENT;
    put(out, 16, 1024);
    put(out, 44, 64 << 10);
    return SUCCESS;
}
API Result zeDeviceGetModuleProperties(void* handle, void* out) {
    if (!as<Device>(handle, DEVICE)) return INVALID_HANDLE;
    if (!is(out, 5)) return INVALID_ARGUMENT;
    put(out, 16, fails("spirv") ? 0 : 1 << 16 | 2);
    put(out, 28, 0x7F);
    put(out, 36, 2048);
    return SUCCESS;
}
// A group that only copies, then one that computes.
API Result zeDeviceGetCommandQueueGroupProperties(void* handle, unsigned* count, char* out) {
    if (!as<Device>(handle, DEVICE)) return INVALID_HANDLE;
    if (!out) return *count = 2, SUCCESS;
    for (unsigned i = 0; i < 2; i++) {
        if (!is(out + 40 * i, 6)) return INVALID_ARGUMENT;
        put(out, 40 * i + 16, i ? 1 : 2);
        put(out, 40 * i + 32, 1);
    }
    return SUCCESS;
}
API Result zeContextCreate(void* handle, const void* description, void** out) {
    ENTER("zeContextCreate");
    if (!as<Object>(handle, DRIVER)) return INVALID_HANDLE;
    if (!is(description, 0xd)) return INVALID_ARGUMENT;
    return *out = new Context{{CONTEXT}}, SUCCESS;
}
API Result zeCommandListCreateImmediate(void* context, void* device, const unsigned* description,
                                        void** out) {
    ENTER("zeCommandListCreateImmediate");
    if (!as<Context>(context, CONTEXT) || !as<Device>(device, DEVICE)) return INVALID_HANDLE;
    // The group that computes, no flags, a list that waits.
    if (!is(description, 0xe) || description[4] != 1 || description[6] || description[7] != 1)
        return INVALID_ARGUMENT;
    return *out = new List{{LIST}, (Context*)context, true}, SUCCESS;
}
API Result zeCommandListAppendLaunchKernel(void* handle, void* kernel, const unsigned* groups,
                                           void* signal, unsigned waits, void** events) {
    ENTER("zeCommandListAppendLaunchKernel");
    List* target = open(handle, signal, waits, events);
    Kernel* k = as<Kernel>(kernel, KERNEL);
    if (!target || !k || k->context != target->context) return INVALID_HANDLE;
    if (!k->threads || !k->follows_addresses) return INVALID_ARGUMENT;
    std::vector<void*> arguments;
    for (auto& a : k->arguments) {
        if (a.empty()) return INVALID_ARGUMENT_INDEX;
        arguments.push_back(a.data());
    }
    emulator::launch(*k->kernel, {groups[0], groups[1], groups[2]}, {k->threads, 1, 1}, 0,
                     arguments.data(), 0);
    return SUCCESS;
}
API Result zeCommandListAppendMemoryCopy(void* handle, void* to, const void* from, size_t bytes,
                                         void* signal, unsigned waits, void** events) {
    List* target = open(handle, signal, waits, events);
    if (!target || !target->waits) return INVALID_HANDLE;
    return memmove(to, from, bytes), SUCCESS;
}
API Result zeCommandListAppendMemoryFill(void* handle, void* to, const void* pattern,
                                         size_t pattern_bytes, size_t bytes, void* signal,
                                         unsigned waits, void** events) {
    if (!open(handle, signal, waits, events)) return INVALID_HANDLE;
    if (pattern_bytes != 1) return INVALID_ARGUMENT;
    return memset(to, *(const unsigned char*)pattern, bytes), SUCCESS;
}
API Result zeCommandListAppendMemoryPrefetch(void* handle, const void* pointer, size_t bytes) {
    if (!as<List>(handle, LIST)) return INVALID_HANDLE;
    return pointer && bytes ? SUCCESS : INVALID_ARGUMENT;
}
API Result zeMemAllocDevice(void* context, const Head* description, size_t bytes, size_t alignment,
                            void* device, void** out) {
    ENTER("zeMemAllocDevice");
    if (!as<Context>(context, CONTEXT) || !as<Device>(device, DEVICE)) return INVALID_HANDLE;
    if (!is(description, 0x15) || !bytes || alignment & (alignment - 1)) return INVALID_ARGUMENT;
    if (bytes > 1u << 30 && !is(description->next, 0x20001)) return 0x78000009;
    return allocate(bytes, out);
}
API Result zeMemAllocShared(void* context, const Head* description, const Head* host, size_t bytes,
                            size_t alignment, void* device, void** out) {
    if (!is(host, 0x16)) return INVALID_ARGUMENT;
    return zeMemAllocDevice(context, description, bytes, alignment, device, out);
}
API Result zeMemFree(void* context, void* pointer) {
    if (!as<Context>(context, CONTEXT)) return INVALID_HANDLE;
    return cuMemFree_v2((unsigned long long)pointer) ? INVALID_ARGUMENT : SUCCESS;
}
API Result zeModuleCreate(void* context, void* device, const char* description, void** out, void** log) {
    if (!as<Context>(context, CONTEXT) || !as<Device>(device, DEVICE)) return INVALID_HANDLE;
    if (!is(description, 0x1b)) return INVALID_ARGUMENT;
    size_t bytes;
    const char *code, *flags;
    memcpy(&bytes, description + 24, 8);
    memcpy(&code, description + 32, 8);
    memcpy(&flags, description + 40, 8);
    bool spirv = !((const unsigned*)description)[4] && bytes >= 4 && !memcmp(code, "\x03\x02\x23\x07", 4);
    if (!spirv || !strstr(flags, "-ze-opt-greater-than-4GB-buffer-required") || fails("zeModuleCreate")) {
        *log = new Log{{LOG}, "the emulator was told to fail"};
        return BUILD_FAILURE;
    }
    *log = new Log{{LOG}, ""};
    return *out = new Module{{MODULE}, (Context*)context}, SUCCESS;
}
API Result zeModuleBuildLogGetString(void* handle, size_t* bytes, char* out) {
    Log* log = as<Log>(handle, LOG);
    if (!log) return INVALID_HANDLE;
    if (out) memcpy(out, log->text.c_str(), *bytes);
    return *bytes = log->text.size() + 1, SUCCESS;
}
API Result zeModuleBuildLogDestroy(void* handle) {
    Log* log = as<Log>(handle, LOG);
    return log ? (delete log, SUCCESS) : INVALID_HANDLE;
}
API Result zeKernelCreate(void* handle, const char* description, void** out) {
    Module* module = as<Module>(handle, MODULE);
    if (!module) return INVALID_HANDLE;
    if (!is(description, 0x1d)) return INVALID_ARGUMENT;
    const char* name;
    memcpy(&name, description + 24, 8);
    const emulator::Kernel* kernel = emulator::find(name);
    if (!kernel) return INVALID_KERNEL_NAME;
    Kernel* k = new Kernel{{KERNEL}, kernel, module->context, 0, false, {}};
    k->arguments.resize(kernel->count);
    return *out = k, SUCCESS;
}
API Result zeKernelSetGroupSize(void* handle, unsigned x, unsigned y, unsigned z) {
    Kernel* k = as<Kernel>(handle, KERNEL);
    if (!k) return INVALID_HANDLE;
    // OpenCL C fixes it (reqd_work_group_size).
    if (x != k->kernel->threads || y != 1 || z != 1) return INVALID_GROUP_SIZE;
    return k->threads = x, SUCCESS;
}
API Result zeKernelSetArgumentValue(void* handle, unsigned index, size_t bytes, const void* value) {
    Kernel* k = as<Kernel>(handle, KERNEL);
    if (!k) return INVALID_HANDLE;
    if (index >= k->kernel->count) return INVALID_ARGUMENT_INDEX;
    if (bytes != k->kernel->sizes[index]) return INVALID_ARGUMENT_SIZE;
    const unsigned char* p = (const unsigned char*)value;
    k->arguments[index].assign(p, p + bytes);
    return SUCCESS;
}
API Result zeKernelSetIndirectAccess(void* handle, unsigned flags) {
    Kernel* k = as<Kernel>(handle, KERNEL);
    if (!k) return INVALID_HANDLE;
    return k->follows_addresses = flags == 7, SUCCESS;
}

// ---- SYCL: members of sycl::queue and sycl::context, by their mangled names ----------------------

// A queue of level_zero (2) or another backend, with a command list or a command queue.
API void* halfbyte_emulated_sycl_queue(char backend, int immediate) {
    Context* context = new Context{{CONTEXT}};
    return new Queue{{QUEUE}, backend, immediate != 0, context, new List{{LIST}, context, false}, 0};
}
API int halfbyte_emulated_sycl_waits(const Queue* queue) { return queue->waits; }

API char _ZNK4sycl3_V15queue11get_backendEv(const Queue* queue) { return queue->backend; }
API void* _ZNK4sycl3_V15queue11get_contextEv(Context** out, const Queue* queue) {
    return *out = queue->context, out;
}
API Context* _ZNK4sycl3_V17context9getNativeEv(Context* const* context) { return *context; }
API void* _ZNK4sycl3_V15queue9getNativeERi(const Queue* queue, int* immediate) {
    *immediate = queue->immediate;
    return queue->immediate ? (void*)queue->list : (void*)&driver;
}
API void _ZN4sycl3_V15queue10wait_proxyERKNS0_6detail13code_locationE(Queue* queue, void* const* place) {
    if (as<Queue>(queue, QUEUE) && !place[0] && !place[1]) queue->waits++;
}

// ---- ocloc ------------------------------------------------------------------------------------

API unsigned oclocVersion(void) { return 1 << 16; }
// Takes one text and gives a log, and what passes for SPIR-V above.
API int oclocInvoke(unsigned count, const char** arguments, unsigned sources, const unsigned char** data,
                    const uint64_t* lengths, const char** names, unsigned headers, const unsigned char**,
                    const uint64_t*, const char**, unsigned* outputs, unsigned char*** out_data,
                    uint64_t** out_lengths, char*** out_names) {
    bool fine = count == 7 && sources == 1 && !headers && !strcmp(arguments[4], names[0]) &&
                strlen((const char*)data[0]) + 1 == lengths[0] && !fails("oclocInvoke");
    *outputs = fine ? 2 : 1;
    *out_data = new unsigned char*[2];
    *out_lengths = new uint64_t[2];
    *out_names = new char*[2];
    const char* texts[2] = {"the emulator was told to fail", "\x03\x02\x23\x07 SPIR-V"};
    const char* files[2] = {"stdout.log", "kernel.spv"};
    for (unsigned i = 0; i < *outputs; i++) {
        (*out_data)[i] = (unsigned char*)strdup(texts[i]);
        (*out_lengths)[i] = strlen(texts[i]);
        (*out_names)[i] = strdup(files[i]);
    }
    return fine ? 0 : -43;
}
API int oclocFreeOutput(unsigned* outputs, unsigned char*** data, uint64_t** lengths, char*** names) {
    for (unsigned i = 0; i < *outputs; i++) {
        free((*data)[i]);
        free((*names)[i]);
    }
    delete[] * data;
    delete[] * lengths;
    delete[] * names;
    return *outputs = 0;
}

// Streams, events, copies and graphs of the emulated CUDA runtime.
//
// Work is done when it is enqueued, on the calling thread: order on a stream and between streams
// holds by itself. A capturing stream keeps the work as closures, and launching the graph runs
// them again over the same memory.
#include "cudart.h"

#include <cstring>
#include <mutex>
#include <unordered_set>

#define API extern "C" __attribute__((visibility("default")))

namespace cudart {

static std::recursive_mutex lock;
using Guard = std::lock_guard<std::recursive_mutex>;

static std::vector<std::shared_ptr<Capture>>& captures() {
    static auto* list = new std::vector<std::shared_ptr<Capture>>;
    return *list;
}
static std::unordered_set<Stream*>& streams() {
    static auto* set = new std::unordered_set<Stream*>;
    return *set;
}

// The default streams (null, legacy 1, per-thread 2) have no object and cannot capture.
static Stream* as_stream(void* handle) {
    return (uintptr_t)handle <= 2 ? nullptr : (Stream*)handle;
}

enum Mode : int { GLOBAL = 0, THREAD_LOCAL = 1, RELAXED = 2 };
static thread_local int mode_of_thread = GLOBAL;

bool forbidden_by_capture() {
    if (mode_of_thread == RELAXED) return false;
    Guard guard(lock);
    for (auto& capture : captures()) capture->invalidated = true;
    return !captures().empty();
}

int enqueue(void* handle, std::function<void()> work) {
    Stream* stream = as_stream(handle);
    if (stream && stream->capture) {
        Guard guard(lock);
        if (stream->capture->invalidated) return fail(CAPTURE_INVALIDATED);
        stream->capture->graph->work->nodes.push_back(std::move(work));
        return SUCCESS;
    }
    work();
    return SUCCESS;
}

// Waiting for a capturing stream ends its capture.
static int wait(void* handle) {
    Stream* stream = as_stream(handle);
    if (!stream || !stream->capture) return SUCCESS;
    stream->capture->invalidated = true;
    return fail(CAPTURE_UNSUPPORTED);
}

struct Launch {
    std::string what;
    void* stream;
};
static std::vector<Launch> launches;

}  // namespace cudart

using namespace cudart;

// --- the emulated driver's launches ----------------------------------------------------------

// The driver calls this before it does `what` (a kernel's name, or a function's) on `stream`.
// Returns 1 when the stream is capturing: `data` belongs to the graph, which calls run(data) at
// every launch and drop(data) at its end. Returns 0 when the driver is to do the work now.
API int halfbyte_emulated_launch(const char* what, void* stream, void (*run)(void*), void* data,
                                 void (*drop)(void*)) {
    Guard guard(lock);
    launches.push_back({what, stream});
    Stream* object = as_stream(stream);
    if (!object || !object->capture) return 0;
    std::shared_ptr<void> owned(data, [drop](void* at) { if (drop) drop(at); });
    enqueue(stream, [run, owned] { run(owned.get()); });
    return 1;
}

// The launches since the process began or since `halfbyte_emulated_forget`.
API size_t halfbyte_emulated_launches() {
    Guard guard(lock);
    return launches.size();
}
API const char* halfbyte_emulated_launch_name(size_t index) { return launches[index].what.c_str(); }
API void* halfbyte_emulated_launch_stream(size_t index) { return launches[index].stream; }
API void halfbyte_emulated_forget() {
    Guard guard(lock);
    launches.clear();
}

// --- streams ---------------------------------------------------------------------------------

API int cudaStreamCreateWithPriority(void** out, unsigned flags, int priority) {
    COUNT();
    Guard guard(lock);
    auto* stream = new Stream{current_device, flags, priority, nullptr};
    streams().insert(stream);
    *out = stream;
    return SUCCESS;
}
API int cudaStreamCreateWithFlags(void** out, unsigned flags) {
    return cudaStreamCreateWithPriority(out, flags, 0);
}
API int cudaStreamCreate(void** out) { return cudaStreamCreateWithPriority(out, 0, 0); }
API int cudaStreamDestroy(void* handle) {
    Guard guard(lock);
    Stream* stream = as_stream(handle);
    if (!stream || !streams().erase(stream)) return fail(INVALID_HANDLE);
    delete stream;
    return SUCCESS;
}
API int cudaStreamGetPriority(void* handle, int* priority) {
    Stream* stream = as_stream(handle);
    *priority = stream ? stream->priority : 0;
    return SUCCESS;
}
API int cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return SUCCESS;
}
API int cudaStreamQuery(void* handle) { return wait(handle); }
API int cudaStreamSynchronize(void* handle) {
    COUNT();
    return wait(handle);
}
API int cudaDeviceSynchronize() {
    COUNT();
    return forbidden_by_capture() ? fail(CAPTURE_UNSUPPORTED) : SUCCESS;
}
API int cudaLaunchHostFunc(void* stream, void (*function)(void*), void* data) {
    return enqueue(stream, [=] { function(data); });
}
API int cudaStreamAddCallback(void* stream, void (*callback)(void*, int, void*), void* data,
                              unsigned) {
    return enqueue(stream, [=] { callback(stream, SUCCESS, data); });
}

// --- events ----------------------------------------------------------------------------------

API int cudaEventCreateWithFlags(void** out, unsigned flags) {
    *out = new Event{flags, false, {}, nullptr};
    return SUCCESS;
}
API int cudaEventCreate(void** out) { return cudaEventCreateWithFlags(out, 0); }
API int cudaEventDestroy(void* event) { return delete (Event*)event, SUCCESS; }
API int cudaEventRecordWithFlags(void* handle, void* stream_handle, unsigned) {
    COUNT();
    auto* event = (Event*)handle;
    Stream* stream = as_stream(stream_handle);
    event->recorded = true;
    event->when = std::chrono::steady_clock::now();
    event->capture = stream ? stream->capture : nullptr;
    return SUCCESS;
}
API int cudaEventRecord(void* event, void* stream) {
    return cudaEventRecordWithFlags(event, stream, 0);
}
API int cudaEventQuery(void* event) {
    return ((Event*)event)->capture ? fail(CAPTURE_UNSUPPORTED) : SUCCESS;
}
API int cudaEventSynchronize(void* event) {
    COUNT();
    return cudaEventQuery(event);
}
API int cudaEventElapsedTime(float* milliseconds, void* start, void* end) {
    auto *from = (Event*)start, *to = (Event*)end;
    if (!from->recorded || !to->recorded) return fail(INVALID_HANDLE);
    *milliseconds = std::chrono::duration<float, std::milli>(to->when - from->when).count();
    return SUCCESS;
}
// A stream that waits for an event of a capture joins it.
API int cudaStreamWaitEvent(void* handle, void* event, unsigned) {
    COUNT();
    Guard guard(lock);
    Stream* stream = as_stream(handle);
    if (stream && ((Event*)event)->capture) stream->capture = ((Event*)event)->capture;
    return SUCCESS;
}

// --- copies ----------------------------------------------------------------------------------

API int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, void* stream) {
    COUNT();
    return enqueue(stream, [=] { memmove(to, from, bytes); });
}
API int cudaMemcpy(void* to, const void* from, size_t bytes, int) {
    COUNT();
    if (forbidden_by_capture()) return fail(CAPTURE_UNSUPPORTED);
    memmove(to, from, bytes);
    return SUCCESS;
}
API int cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, void* stream) {
    return cudaMemcpyAsync(to, from, bytes, 4, stream);
}
API int cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                          size_t width, size_t height, int, void* stream) {
    COUNT();
    return enqueue(stream, [=] {
        for (size_t row = 0; row < height; ++row) {
            memmove((char*)to + row * to_pitch, (const char*)from + row * from_pitch, width);
        }
    });
}
API int cudaMemsetAsync(void* to, int value, size_t bytes, void* stream) {
    COUNT();
    return enqueue(stream, [=] { memset(to, value, bytes); });
}
API int cudaMemset(void* to, int value, size_t bytes) {
    if (forbidden_by_capture()) return fail(CAPTURE_UNSUPPORTED);
    memset(to, value, bytes);
    return SUCCESS;
}

// --- capture and graphs ----------------------------------------------------------------------

API int cudaThreadExchangeStreamCaptureMode(int* mode) {
    std::swap(*mode, mode_of_thread);
    return SUCCESS;
}

API int cudaStreamBeginCapture(void* handle, int) {
    Guard guard(lock);
    static uint64_t last_id = 0;
    Stream* stream = as_stream(handle);
    if (!stream || stream->capture) return fail(CAPTURE_UNSUPPORTED);
    stream->capture = std::make_shared<Capture>(Capture{++last_id, new Graph, handle});
    captures().push_back(stream->capture);
    return SUCCESS;
}

API int cudaStreamEndCapture(void* handle, void** graph) {
    Guard guard(lock);
    *graph = nullptr;
    Stream* stream = as_stream(handle);
    if (!stream || !stream->capture || stream->capture->origin != handle) {
        return fail(CAPTURE_UNMATCHED);
    }
    const auto capture = stream->capture;
    for (Stream* other : streams()) {
        if (other->capture == capture) other->capture = nullptr;
    }
    auto& all = captures();
    for (size_t i = 0; i < all.size(); ++i) {
        if (all[i] == capture) all.erase(all.begin() + (long)i);
    }
    if (capture->invalidated) {
        delete capture->graph;
        return fail(CAPTURE_INVALIDATED);
    }
    *graph = capture->graph;
    return SUCCESS;
}

API int cudaStreamIsCapturing(void* handle, int* status) {
    Stream* stream = as_stream(handle);
    *status = !stream || !stream->capture ? 0 : stream->capture->invalidated ? 2 : 1;
    return SUCCESS;
}

API int cudaStreamGetCaptureInfo(void* handle, int* status, unsigned long long* id, void** graph,
                                 const void** dependencies, const void** edges, size_t* count) {
    Stream* stream = as_stream(handle);
    cudaStreamIsCapturing(handle, status);
    if (*status == 0) return SUCCESS;
    if (id) *id = stream->capture->id;
    if (graph) *graph = stream->capture->graph;
    if (dependencies) *dependencies = nullptr;
    if (edges) *edges = nullptr;
    if (count) *count = 0;
    return SUCCESS;
}
API int cudaStreamUpdateCaptureDependencies(void*, void*, const void*, size_t, unsigned) {
    return SUCCESS;
}

API int cudaGraphInstantiate(void** exec, void* graph, unsigned long long) {
    *exec = new Graph(*(Graph*)graph);  // shares the work
    return SUCCESS;
}
API int cudaGraphInstantiateWithFlags(void** exec, void* graph, unsigned long long flags) {
    return cudaGraphInstantiate(exec, graph, flags);
}
API int cudaGraphLaunch(void* exec, void* stream) {
    COUNT();
    const auto work = ((Graph*)exec)->work;
    return enqueue(stream, [work] {
        for (auto& node : work->nodes) node();
    });
}
API int cudaGraphDestroy(void* graph) { return delete (Graph*)graph, SUCCESS; }
API int cudaGraphExecDestroy(void* exec) { return delete (Graph*)exec, SUCCESS; }
API int cudaGraphGetNodes(void* graph, void** nodes, size_t* count) {
    const auto& all = ((Graph*)graph)->work->nodes;
    if (nodes) {
        for (size_t i = 0; i < *count; ++i) nodes[i] = i < all.size() ? (void*)&all[i] : nullptr;
    }
    *count = all.size();
    return SUCCESS;
}
API int cudaGraphNodeGetDependencies(void*, void**, void*, size_t* count) {
    return *count = 0, SUCCESS;
}

struct UserObject {
    void* data;
    void (*destroy)(void*);
    std::atomic<unsigned> references;
};
static void release_object(UserObject* object) {
    if (--object->references == 0) {
        object->destroy(object->data);
        delete object;
    }
}
API int cudaUserObjectCreate(void** out, void* data, void (*destroy)(void*), unsigned references,
                             unsigned) {
    *out = new UserObject{data, destroy, {references}};
    return SUCCESS;
}
API int cudaUserObjectRelease(void* object, unsigned count) {
    while (count-- > 0) release_object((UserObject*)object);
    return SUCCESS;
}
// The graph takes over the caller's reference when flags has cudaGraphUserObjectMove (1).
API int cudaGraphRetainUserObject(void* graph, void* handle, unsigned count, unsigned flags) {
    auto* object = (UserObject*)handle;
    if (!(flags & 1)) object->references += count;
    for (unsigned i = 0; i < count; ++i) {
        ((Graph*)graph)->work->at_end.push_back([object] { release_object(object); });
    }
    return SUCCESS;
}

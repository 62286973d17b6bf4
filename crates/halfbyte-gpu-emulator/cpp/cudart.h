// What the two files of the emulated CUDA runtime share: handles, the registry of memory, the
// counters. PyTorch calls the runtime through the C functions of `cudart.cpp` (devices, memory,
// kernels) and `cudart_stream.cpp` (streams, events, graphs).
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace cudart {

enum Error : int {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INVALID_SYMBOL = 13,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    NO_KERNEL_IMAGE = 209,
    INVALID_HANDLE = 400,
    PEER_ACCESS_ALREADY_ENABLED = 704,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_UNMATCHED = 903,
};

// Keeps `error` for cudaGetLastError and returns it.
int fail(int error);

// How often a function was called; `halfbyte_emulated_calls` reads it by name.
struct Counter {
    const char* name;
    std::atomic<uint64_t> calls{0};
    Counter* next;
    explicit Counter(const char* name);
};
#define COUNT()                                          \
    do {                                                   \
        static ::cudart::Counter counter(__func__);        \
        counter.calls.fetch_add(1, std::memory_order_relaxed); \
    } while (0)

// --- devices ---------------------------------------------------------------------------------

// The compute capability of each device, from HALFBYTE_EMULATOR_DEVICES ("80,90" are two devices)
// or HALFBYTE_EMULATOR_CAPABILITY, as in the emulated driver; one of 80 unless given.
const std::vector<int>& devices();
extern thread_local int current_device;

// The emulated driver that halfbyte opens too; null when HALFBYTE_CUDA_DRIVER names none.
void* driver();

// --- memory ----------------------------------------------------------------------------------

enum class Memory : int { UNREGISTERED = 0, HOST = 1, DEVICE = 2, MANAGED = 3 };

struct Allocation {
    char* start = nullptr;  // what the caller has
    size_t bytes = 0;
    int device = 0;
    Memory kind = Memory::UNREGISTERED;
    char* map = nullptr;  // what munmap takes; null when the memory is the caller's
    size_t map_bytes = 0;
};

// The allocation that holds `pointer`; its kind is UNREGISTERED when there is none.
Allocation find(const void* pointer);

// --- streams, events, graphs -----------------------------------------------------------------

// What a graph repeats: closures in the order of capture.
struct Work {
    std::vector<std::function<void()>> nodes;
    std::vector<std::function<void()>> at_end;  // user objects that the graph holds
    ~Work() {
        for (auto& destroy : at_end) destroy();
    }
};

struct Graph {
    std::shared_ptr<Work> work = std::make_shared<Work>();
};

struct Capture {
    uint64_t id;
    Graph* graph;
    void* origin;  // the stream it began on
    bool invalidated = false;
};

struct Stream {
    int device;
    unsigned flags;
    int priority;
    std::shared_ptr<Capture> capture;
};

struct Event {
    unsigned flags;
    bool recorded = false;
    std::chrono::steady_clock::time_point when;
    std::shared_ptr<Capture> capture;  // the capture it was recorded in
};

// Runs `work` now, or adds it to the graph when `stream` is capturing.
int enqueue(void* stream, std::function<void()> work);

// True while this thread may not make calls that a capture forbids (allocate, synchronize): a
// capture is under way and the thread's mode is not "relaxed". Such a call ends the capture with
// an error, as on a real device.
bool forbidden_by_capture();

}  // namespace cudart

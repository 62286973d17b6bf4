// See races.h. Groups run one after the other on one host thread, so that a record of the last write
// and of the last reads of each byte is enough.
#include "races.h"
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <sys/mman.h>
#include <vector>

namespace emulator {
namespace races {
namespace {

enum : uint8_t {
    WRITTEN_ATOMICALLY = 1,
    READ_BY_GROUPS = 2,  // more than one group of the launch
    READ_BY_WARPS = 4,   // more than one warp since the last barrier of the group
    READ_BY_THREADS = 8, // more than one thread of a warp since its last barrier
};

// One side of a byte's history: who touched it last. A run is one group of one launch, counted from
// 1 over the life of the process.
struct Touch {
    uint32_t run, group_barriers, warp_barriers;
    uint16_t thread;
};
struct Cell {
    Touch write, read;
    uint8_t flags;
};

struct Range {
    const char* start;
    size_t bytes;
    Cell* cells;
};

Cell* map_cells(size_t bytes) {
    void* p = mmap(nullptr, bytes * sizeof(Cell), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? nullptr : (Cell*)p;
}

std::mutex lock;
std::map<const void*, Range>& ranges() {
    static auto* all = new std::map<const void*, Range>; // outlives static destructors
    return *all;
}
std::atomic<uint32_t> next_run{1};

enum class Kind { Read, Write, Atomic };

// A write where another one was that nothing orders before it: a race unless it leaves the bytes as
// they were, which the next call knows.
struct Suspect {
    bool is = false;
    char* at;
    size_t bytes;
    unsigned char before[16];
    std::string report;
};

struct Watch {
    std::string kernel;
    dim3_ groups;
    Range shared = {};
    std::vector<Range> memory; // by address
    const Range* last = nullptr;
    uint32_t first_run = 0;
    bool fresh = false; // reads of what nobody wrote are reported too
    Touch now = {};
    Suspect suspect;
    ~Watch() {
        if (shared.cells) munmap(shared.cells, shared.bytes * sizeof(Cell));
    }
};
thread_local Watch kept;
// Set while a thread of a kernel runs.
thread_local Watch* watch = nullptr;
// Whether any launch was ever watched: spares the others the look at a thread's own memory.
std::atomic<bool> used{false};

bool is_mode(const char* name) {
    const char* mode = getenv("HALFBYTE_EMULATOR_RACES");
    return mode && !strcmp(mode, name);
}

// What is called in its scope is not the kernel.
struct Quiet {
    Watch* before = watch;
    Quiet() { watch = nullptr; }
    ~Quiet() { watch = before; }
};

void report(const std::string& what) {
    Quiet quiet;
    static std::map<std::string, int> said;
    std::lock_guard<std::mutex> guard(lock);
    const bool goes_on = is_mode("report") || is_mode("fresh");
    if (said[kept.kernel]++ < 4) {
        fprintf(stderr, "emulator: race in kernel %s: %s\n", kept.kernel.c_str(), what.c_str());
    }
    if (!goes_on) abort();
}

std::string group_name(const Watch& w, uint32_t run) {
    uint32_t n = run - w.first_run;
    return "group (" + std::to_string(n % w.groups.x) + ", " +
           std::to_string(n / w.groups.x % w.groups.y) + ", " +
           std::to_string(n / w.groups.x / w.groups.y) + ")";
}

std::string describe(const Watch& w, const Range& range, const char* at, const char* does,
                     const Touch& other, const char* did) {
    Quiet quiet;
    bool shared = range.cells == w.shared.cells;
    std::string text = group_name(w, w.now.run) + " thread " + std::to_string(w.now.thread) + " " +
                       does + " byte " + std::to_string(at - range.start) + " of " +
                       (shared ? "shared memory" : std::to_string(range.bytes) + " in device memory");
    if (!did) return text + ", which nobody wrote";
    text += ", which ";
    if (other.run != w.now.run) text += group_name(w, other.run) + " ";
    return text + "thread " + std::to_string(other.thread) + " " + did +
           (other.run == w.now.run ? " since the last barrier" : "");
}

void suspect(Watch& w, char* at, size_t bytes, std::string report) {
    Quiet quiet;
    Suspect& s = w.suspect;
    s.at = at;
    s.bytes = bytes;
    memcpy(s.before, at, bytes);
    s.report = std::move(report);
    s.is = true;
}

void settle(Watch& w) {
    Suspect& s = w.suspect;
    s.is = false;
    if (memcmp(s.at, s.before, s.bytes) != 0) report(s.report);
}

// Whether nothing orders `now` after an access by another thread of the same group.
bool unordered(const Touch& now, const Touch& then) {
    if (then.thread == now.thread || then.group_barriers != now.group_barriers) return false;
    return then.thread / 32 != now.thread / 32 || then.warp_barriers == now.warp_barriers;
}

bool unordered_with_reads(const Touch& now, const Cell& c) {
    if (c.read.group_barriers != now.group_barriers) return false;
    if (c.flags & READ_BY_WARPS) return true;
    if (c.read.thread / 32 != now.thread / 32) return true;
    return c.read.warp_barriers == now.warp_barriers &&
           (c.flags & READ_BY_THREADS || c.read.thread != now.thread);
}

void note_read(Cell& c, const Touch& now, uint32_t first_run) {
    if (c.read.run < first_run) {
        c.flags &= WRITTEN_ATOMICALLY;
    } else if (c.read.run != now.run) {
        c.flags = (c.flags & WRITTEN_ATOMICALLY) | READ_BY_GROUPS;
    } else if (c.read.group_barriers != now.group_barriers) {
        c.flags &= WRITTEN_ATOMICALLY | READ_BY_GROUPS;
    } else if (c.read.thread / 32 != now.thread / 32) {
        c.flags |= READ_BY_WARPS;
    } else if (c.read.warp_barriers != now.warp_barriers) {
        c.flags &= ~READ_BY_THREADS;
    } else if (c.read.thread != now.thread) {
        c.flags |= READ_BY_THREADS;
    }
    c.read = now;
}

const Range* find_range(Watch& w, const char* at) {
    if ((size_t)(at - w.shared.start) < w.shared.bytes) return &w.shared;
    if (w.last && (size_t)(at - w.last->start) < w.last->bytes) return w.last;
    size_t low = 0, high = w.memory.size();
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (w.memory[middle].start <= at) low = middle + 1;
        else high = middle;
    }
    if (low == 0 || (size_t)(at - w.memory[low - 1].start) >= w.memory[low - 1].bytes) return nullptr;
    return w.last = &w.memory[low - 1];
}

void touch(Watch& w, char* at, size_t bytes, Kind kind) {
    if (w.suspect.is) settle(w);
    const Range* range = find_range(w, at);
    if (!range) return;
    Cell* cells = range->cells + (at - range->start);
    bytes = std::min(bytes, range->bytes - (size_t)(at - range->start));
    const bool shared = range == &w.shared;
    const Touch now = w.now;
    bool told = false; // once for an access
    auto tell = [&](const char* byte, const char* does, const Touch& other, const char* did) {
        if (!told) report(describe(w, *range, byte, does, other, did));
        told = true;
    };
    for (size_t i = 0; i < bytes; i++) {
        Cell& c = cells[i];
        const bool here = c.write.run == now.run;
        const bool elsewhere = !shared && !here && c.write.run >= w.first_run;
        const bool raced = elsewhere || (here && unordered(now, c.write));
        const bool atomic = c.flags & WRITTEN_ATOMICALLY;
        const char* wrote = atomic ? "changed atomically" : "wrote";
        if (kind == Kind::Read) {
            if (raced && !atomic) tell(at + i, "reads", c.write, wrote);
            if (w.fresh && shared && !here) tell(at + i, "reads", c.write, nullptr);
            note_read(c, now, w.first_run);
            continue;
        }
        const char* writes = kind == Kind::Atomic ? "changes atomically" : "writes";
        const bool read_here = c.read.run == now.run;
        const bool read_elsewhere =
            !shared && c.read.run >= w.first_run && (!read_here || c.flags & READ_BY_GROUPS);
        if (kind == Kind::Write && (read_elsewhere || (read_here && unordered_with_reads(now, c)))) {
            tell(at + i, writes, c.read, "read");
        }
        if (raced && kind == Kind::Write && !atomic && bytes <= sizeof w.suspect.before) {
            if (!w.suspect.is) suspect(w, at, bytes, describe(w, *range, at + i, writes, c.write, wrote));
        } else if (raced && !(kind == Kind::Atomic && atomic)) {
            tell(at + i, writes, c.write, wrote);
        }
        c.write = now;
        c.flags = (c.flags & ~WRITTEN_ATOMICALLY) | (kind == Kind::Atomic ? WRITTEN_ATOMICALLY : 0);
    }
}

inline void access(void* at, size_t bytes, Kind kind) {
    if (!used.load(std::memory_order_relaxed)) return;
    if (Watch* w = watch) touch(*w, (char*)at, bytes, kind);
}

} // namespace

bool wanted() {
    const char* value = getenv("HALFBYTE_EMULATOR_RACES");
    return value && *value && strcmp(value, "0");
}

void allocated(const void* start, size_t bytes) {
    if (!wanted()) return;
    Cell* cells = map_cells(bytes);
    std::lock_guard<std::mutex> guard(lock);
    if (cells) ranges()[start] = Range{(const char*)start, bytes, cells};
}

void freed(const void* start) {
    std::lock_guard<std::mutex> guard(lock);
    auto found = ranges().find(start);
    if (found == ranges().end()) return;
    munmap(found->second.cells, found->second.bytes * sizeof(Cell));
    ranges().erase(found);
}

void begin(const char* kernel, dim3_ groups, const char* shared, size_t shared_bytes) {
    used = true;
    Watch& w = kept;
    w.kernel = kernel;
    w.groups = groups;
    w.fresh = is_mode("fresh");
    if (w.shared.start != shared) {
        if (w.shared.cells) munmap(w.shared.cells, w.shared.bytes * sizeof(Cell));
        w.shared = Range{shared, shared_bytes, map_cells(shared_bytes)};
        if (!w.shared.cells) fail("has no room for the record of its shared memory");
    }
    w.last = nullptr;
    w.memory.clear();
    std::lock_guard<std::mutex> guard(lock);
    for (auto& entry : ranges()) w.memory.push_back(entry.second);
    w.first_run = next_run.fetch_add((uint32_t)((uint64_t)groups.x * groups.y * groups.z));
}

void end() {
    if (kept.suspect.is) settle(kept);
}

void begin_group(uint64_t number) { kept.now.run = kept.first_run + (uint32_t)number; }

void enter(unsigned thread, unsigned group_barriers, unsigned warp_barriers) {
    if (kept.suspect.is) settle(kept);
    kept.now.thread = (uint16_t)thread;
    kept.now.group_barriers = group_barriers;
    kept.now.warp_barriers = warp_barriers;
    watch = &kept;
}
void leave() { watch = nullptr; }

} // namespace races
} // namespace emulator

// ---- what -fsanitize=thread calls before each access ----------------------------------------------

using emulator::races::access;
using emulator::races::Kind;

extern "C" {

#define ACCESS(n)                                                                                  \
    void __tsan_read##n(void* p) { access(p, n, Kind::Read); }                                     \
    void __tsan_write##n(void* p) { access(p, n, Kind::Write); }                                   \
    void __tsan_unaligned_read##n(void* p) { access(p, n, Kind::Read); }                           \
    void __tsan_unaligned_write##n(void* p) { access(p, n, Kind::Write); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)

void __tsan_read_range(void* p, size_t n) { access(p, n, Kind::Read); }
void __tsan_write_range(void* p, size_t n) { access(p, n, Kind::Write); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void) {}
void __tsan_init(void) {}

// Atomic operations are done by the call itself.
#define ATOMIC(bits, T)                                                                            \
    T __tsan_atomic##bits##_load(const volatile T* p, int) {                                       \
        return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                               \
    }                                                                                              \
    void __tsan_atomic##bits##_store(volatile T* p, T v, int) {                                    \
        access((void*)p, sizeof(T), Kind::Atomic);                                                 \
        __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                  \
    }                                                                                              \
    T __tsan_atomic##bits##_fetch_add(volatile T* p, T v, int) {                                   \
        access((void*)p, sizeof(T), Kind::Atomic);                                                 \
        return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                         \
    }                                                                                              \
    T __tsan_atomic##bits##_fetch_or(volatile T* p, T v, int) {                                    \
        access((void*)p, sizeof(T), Kind::Atomic);                                                 \
        return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST);                                          \
    }                                                                                              \
    int __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* expected, T v, int, int) { \
        access((void*)p, sizeof(T), Kind::Atomic);                                                 \
        return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST,                \
                                           __ATOMIC_SEQ_CST);                                      \
    }
ATOMIC(8, uint8_t)
ATOMIC(32, uint32_t)
ATOMIC(64, uint64_t)

// Calls that the compiler left as calls (ld's --wrap), or clang's names for them.
void* __real_memcpy(void* to, const void* from, size_t n);
void* __real_memset(void* to, int value, size_t n);
void* __wrap_memcpy(void* to, const void* from, size_t n) {
    access((void*)from, n, Kind::Read);
    access(to, n, Kind::Write);
    return __real_memcpy(to, from, n);
}
void* __wrap_memset(void* to, int value, size_t n) {
    access(to, n, Kind::Write);
    return __real_memset(to, value, n);
}
void* __tsan_memcpy(void* to, const void* from, size_t n) { return __wrap_memcpy(to, from, n); }
void* __tsan_memset(void* to, int value, size_t n) { return __wrap_memset(to, value, n); }

} // extern "C"

// The fibers and the registry. See emulator.h.
#include "emulator.h"
#include "races.h"
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <sys/mman.h>
#include <thread>
#include <vector>

namespace emulator {
namespace {

const size_t STACK = 256 << 10;

// ---- switching stacks -------------------------------------------------------------------------
// Saves what a function call must keep on the old stack, and takes it from the new one.
extern "C" void halfbyte_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl halfbyte_switch
.hidden halfbyte_switch
.type halfbyte_switch,@function
halfbyte_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    retq
.size halfbyte_switch,.-halfbyte_switch
)");
void* fresh_stack(char* top, void (*entry)()) {
    void** sp = (void**)((uintptr_t)top & ~(uintptr_t)15);
    *--sp = nullptr; // entry sees a stack as after a call
    *--sp = (void*)entry;
    for (int i = 0; i < 6; i++) *--sp = nullptr;
    return sp;
}
#elif defined(__aarch64__)
asm(R"(
.text
.globl halfbyte_switch
.hidden halfbyte_switch
.type halfbyte_switch,%function
halfbyte_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size halfbyte_switch,.-halfbyte_switch
)");
void* fresh_stack(char* top, void (*entry)()) {
    void** sp = (void**)((uintptr_t)top & ~(uintptr_t)15) - 20;
    for (int i = 0; i < 20; i++) sp[i] = nullptr;
    sp[11] = (void*)entry; // x30
    return sp;
}
#else
#error "the emulator knows x86-64 and aarch64"
#endif

// ---- one block --------------------------------------------------------------------------------

struct Barrier {
    unsigned wanted = 0, here = 0, generation = 0;
};
struct Warp {
    Barrier barrier;
    alignas(64) unsigned char slots[32][64];
};
struct Fiber {
    void* sp = nullptr;
    Thread state;
    bool ended = false;
    const unsigned* waits = nullptr; // for this generation to change
    unsigned generation = 0;
};
struct Place {
    size_t offset, bytes;
};

struct Launch {
    const Kernel& kernel;
    dim3_ blocks, threads;
    size_t dynamic_bytes;
    void** arguments;
    unsigned capability;
    bool watched; // for races
};

// What blocks run on, one after the other: each host thread has one and keeps it, so that stacks
// and shared memory are mapped once.
struct Machine {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Barrier barrier;
    char* stacks = nullptr;
    size_t stack_count = 0;
    void* host = nullptr;
    Fiber* now = nullptr;
    const Launch* launch = nullptr;
    std::map<std::pair<const void*, int>, Place> places;
    char* shared = nullptr; // static, then dynamic shared memory
    size_t shared_used = 0, dynamic_bytes = 0;
    ~Machine() {
        if (stacks) munmap(stacks, stack_count * STACK);
        if (shared) munmap(shared, SHARED_BYTES + GUARD_BYTES);
    }
    // Dynamic shared memory ends at a page that nobody may touch (but for what fills it up to 128).
    char* dynamic() const { return shared + SHARED_BYTES - (dynamic_bytes + 127) / 128 * 128; }
    static const size_t SHARED_BYTES = 1 << 20, STATIC_BYTES = 48 << 10, GUARD_BYTES = 64 << 10;
};
thread_local Machine* machine = nullptr;

// Tells the search for races where the running fiber is.
void watch(Machine& m) {
    if (!m.launch->watched) return;
    unsigned index = m.now->state.index;
    races::enter(index, m.barrier.generation, m.warps[index / 32].barrier.generation);
}

void yield() {
    Machine& m = *machine;
    Fiber* fiber = m.now;
    races::leave();
    halfbyte_switch(&fiber->sp, m.host);
}

void release(Barrier& barrier) {
    barrier.here = 0;
    barrier.generation++;
}

void wait(Barrier& barrier) {
    Machine& m = *machine;
    if (++barrier.here == barrier.wanted) {
        release(barrier);
        watch(m);
        return;
    }
    m.now->waits = &barrier.generation;
    m.now->generation = barrier.generation;
    yield();
}

void leave(Barrier& barrier) {
    barrier.wanted--;
    if (barrier.wanted > 0 && barrier.here == barrier.wanted) release(barrier);
}

void fiber_main() {
    Machine& m = *machine;
    m.launch->kernel.call(m.launch->kernel, m.launch->arguments);
    Fiber& fiber = *m.now;
    fiber.ended = true;
    leave(m.barrier);
    leave(m.warps[fiber.state.index / 32].barrier);
    yield();
    abort(); // an ended fiber is never resumed
}

enum class Order { Up, Down, Random };
struct Schedule {
    Order order = Order::Up;
    uint64_t seed = 1;
};
Schedule schedule() {
    Schedule result;
    const char* text = getenv("HALFBYTE_EMULATOR_ORDER");
    if (!text || !*text || !strcmp(text, "up")) return result;
    if (!strcmp(text, "down")) {
        result.order = Order::Down;
    } else if (!strncmp(text, "random", 6)) {
        result.order = Order::Random;
        if (text[6] == ':') result.seed = strtoull(text + 7, nullptr, 10) * 2 + 1;
    } else {
        fprintf(stderr, "HALFBYTE_EMULATOR_ORDER must be up, down or random:<seed>, got %s\n", text);
        abort();
    }
    return result;
}

void run_block(Machine& m, dim3_ block, std::vector<unsigned>& order, Schedule& s) {
    const dim3_ threads = m.launch->threads;
    unsigned n = threads.x * threads.y * threads.z;
    m.barrier = Barrier{n, 0, 0};
    memset(m.shared, 0xFF, m.shared_used);
    memset(m.dynamic(), 0xFF, m.dynamic_bytes);
    for (unsigned i = 0; i < m.warps.size(); i++) {
        m.warps[i].barrier = Barrier{std::min(32u, n - 32 * i), 0, 0};
        memset(m.warps[i].slots, 0xFF, sizeof m.warps[i].slots);
    }
    for (unsigned i = 0; i < n; i++) {
        Fiber& f = m.fibers[i];
        f.sp = fresh_stack(m.stacks + (i + 1) * STACK, fiber_main);
        f.ended = false;
        f.waits = nullptr;
        dim3_ thread = {i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y};
        f.state = Thread{thread, block, threads, m.launch->blocks, i, m.launch->capability};
    }
    unsigned left = n;
    while (left > 0) {
        if (s.order == Order::Random) {
            for (unsigned i = n - 1; i > 0; i--) {
                s.seed = s.seed * 6364136223846793005u + 1442695040888963407u;
                std::swap(order[i], order[(s.seed >> 33) % (i + 1)]);
            }
        }
        bool moved = false;
        for (unsigned i : order) {
            Fiber& f = m.fibers[i];
            if (f.ended || (f.waits && *f.waits == f.generation)) continue;
            f.waits = nullptr;
            m.now = &f;
            watch(m);
            halfbyte_switch(&m.host, f.sp);
            left -= f.ended;
            moved = true;
        }
        if (!moved) fail("waits for threads that never come (a barrier or an exchange in a branch)");
    }
}

} // namespace

Thread& current() { return machine->now->state; }
void block_barrier() { wait(machine->barrier); }
void warp_barrier() { wait(machine->warps[current().index / 32].barrier); }
void* slot(unsigned lane) { return machine->warps[current().index / 32].slots[lane % 32]; }
unsigned lanes() { return machine->warps[current().index / 32].barrier.wanted; }

void* shared_at(const void* file, int line, size_t bytes, size_t alignment) {
    Machine& m = *machine;
    auto [place, fresh] = m.places.try_emplace({file, line}, Place{0, bytes});
    if (fresh) {
        size_t at = (m.shared_used + alignment - 1) / alignment * alignment;
        at = (at + 15) / 16 * 16;
        if (at + bytes > Machine::STATIC_BYTES) fail("declares more than 48 KiB of shared memory");
        races::leave(); // this is not the kernel's doing
        memset(m.shared + at, 0xFF, bytes);
        watch(m);
        place->second.offset = at;
        m.shared_used = at + bytes;
    }
    return m.shared + place->second.offset;
}

void* dynamic_shared() { return machine->dynamic(); }

void fail(const char* what) {
    const Thread* t = machine && machine->now ? &machine->now->state : nullptr;
    fprintf(stderr, "emulator: kernel %s: block (%u, %u, %u) thread %u %s\n",
            machine ? machine->launch->kernel.name : "?", t ? t->block.x : 0,
            t ? t->block.y : 0, t ? t->block.z : 0, t ? t->index : 0, what);
    abort();
}

static Kernel*& first() {
    static Kernel* head = nullptr;
    return head;
}
void Kernel::enlist() {
    next = first();
    first() = this;
}
const Kernel* find(const char* name) {
    for (const Kernel* k = first(); k; k = k->next)
        if (!strcmp(k->name, name)) return k;
    return nullptr;
}

static void prepare(Machine& m, const Launch& launch) {
    unsigned n = launch.threads.x * launch.threads.y * launch.threads.z;
    if (m.stack_count < n) {
        if (m.stacks) munmap(m.stacks, m.stack_count * STACK);
        m.stack_count = n;
        m.stacks = (char*)mmap(nullptr, n * STACK, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    }
    if (!m.shared) {
        m.shared = (char*)mmap(nullptr, Machine::SHARED_BYTES + Machine::GUARD_BYTES,
                               PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        mprotect(m.shared + Machine::SHARED_BYTES, Machine::GUARD_BYTES, PROT_NONE);
    }
    m.fibers.resize(n);
    m.warps.resize((n + 31) / 32);
    m.launch = &launch;
    m.places.clear();
    m.shared_used = 0;
    m.dynamic_bytes = std::min(launch.dynamic_bytes, Machine::SHARED_BYTES - Machine::STATIC_BYTES);
}

// Runs blocks on this host thread until there are none left.
static void work(const Launch& launch, std::atomic<uint64_t>& next, unsigned worker) {
    static thread_local Machine kept;
    Machine& m = kept;
    prepare(m, launch);
    machine = &m;
    const dim3_ blocks = launch.blocks;
    if (launch.watched) races::begin(launch.kernel.name, blocks, m.shared, Machine::SHARED_BYTES);
    Schedule s = schedule();
    s.seed += 2 * worker;
    unsigned n = (unsigned)m.fibers.size();
    std::vector<unsigned> order(n);
    for (unsigned i = 0; i < n; i++) order[i] = s.order == Order::Down ? n - 1 - i : i;
    for (uint64_t i; (i = next++) < (uint64_t)blocks.x * blocks.y * blocks.z;) {
        if (launch.watched) races::begin_group(i);
        uint64_t row = i / blocks.x;
        dim3_ block = {(unsigned)(i % blocks.x), (unsigned)(row % blocks.y), (unsigned)(row / blocks.y)};
        run_block(m, block, order, s);
    }
    if (launch.watched) races::end();
    machine = nullptr;
}

void launch(const Kernel& kernel, dim3_ blocks, dim3_ threads, size_t dynamic_shared_bytes,
            void** arguments, unsigned capability) {
    Launch launch{kernel, blocks, threads, dynamic_shared_bytes, arguments, capability, races::wanted()};
    std::atomic<uint64_t> next{0};
    const char* text = getenv("HALFBYTE_EMULATOR_WORKERS");
    unsigned workers = text && !launch.watched ? (unsigned)atoi(text) : 1;
    std::vector<std::thread> others;
    for (unsigned i = 1; i < std::min<uint64_t>(workers, (uint64_t)blocks.x * blocks.y * blocks.z); i++)
        others.emplace_back([&launch, &next, i] { work(launch, next, i); });
    work(launch, next, 0);
    for (std::thread& other : others) other.join();
}

} // namespace emulator

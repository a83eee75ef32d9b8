// Every plain access to memory. Kernels are compiled with -fsanitize=thread, so that the compiler inserts a call before each one. These are the functions
// called, instead of ThreadSanitizer's own (https://github.com/llvm/llvm-project/blob/main/compiler-rt/lib/tsan/rtl/tsan_interface.h).
#include "launch.h"
#include "model.h"

namespace emulator {

static const char* verb(bool write) { return write ? "writes" : "reads"; }

// Whether what a launch wrote may not be there yet for the block.
static bool may_still_run(const Block& block, uint64_t launch) {
    return launch != session.launches && launch > session.overlap.ended && !block.follows;
}

static const Memory& access_global(Block& block, uintptr_t at, unsigned bytes, bool write, void* site) {
    for (Memory& memory : session.memories) {
        if (at < memory.first || at + bytes > memory.end) continue;
        if (write && !memory.writable)
            fail("thread %d writes %u bytes to %s, which is only read, at offset %lld: @%x", block.running, bytes, memory.name.c_str(), (long long)(at - memory.first), site_offset(site));
        if (!memory.written.empty())
            for (uintptr_t n = at - memory.first; n < at - memory.first + bytes; ++n) {
                uint16_t& writer = memory.written[n];
                if (!write && !writer)
                    fail("thread %d reads byte %lld of %s, which no thread has written: @%x", block.running, (long long)n, memory.name.c_str(), site_offset(site));
                if (may_still_run(block, writer))
                    fail("thread %d %s byte %lld of %s, which launch %d writes: this one, number %d, could begin before that has ended, and the block has not "
                         "waited: @%x", block.running, verb(write), (long long)n, memory.name.c_str(), writer, int(session.launches), site_offset(site));
                if (write) writer = session.launches;
            }
        return memory;
    }
    std::string near;
    for (const Memory& memory : session.memories)
        if (at + bytes > memory.first - 65536 && at < memory.end + 65536)
            near += text("; %s ends at byte %lld, this is byte %lld of it", memory.name.c_str(), (long long)(memory.end - memory.first), (long long)(at - memory.first));
    fail("thread %d %s %u bytes outside of all memory that it was given%s: @%x", block.running, verb(write), bytes, near.c_str(), site_offset(site));
}

static void access_registers(Block& block, uintptr_t at, unsigned bytes, bool write, void* site);

inline void access(const void* p, unsigned bytes, bool write, void* site, bool aligned = true) {
    Block* block = current;
    if (!block || block->running < 0) return;
    const uintptr_t at = reinterpret_cast<uintptr_t>(p);
    Thread& t = block->self();
    if (at - reinterpret_cast<uintptr_t>(t.stack) < STACK_BYTES) return access_registers(*block, at, bytes, write, site);
    if (write) block->loads_have_come();
    if (aligned && at % bytes) fail("thread %d %s %u bytes at an address that is not a multiple of %u: @%x", t.id, verb(write), bytes, bytes, site_offset(site));
    if (block->shared.holds(at)) {
        const uint32_t* seen = block->clock();
        count_shared(*block, block->shared.address(p), bytes, write, site);
        if (block->timing) block->timing->shared(block->shared.offset(p), bytes, write);
        block->shared.access(block->shared.offset(p), bytes, {.who = t.id, .when = seen[t.id], .seen = seen, .site = site, .write = write});
    } else {
        const Memory& memory = access_global(*block, at, bytes, write, site);
        if (&memory == &session.memories.back()) return;  // the launch's arguments, which a GPU keeps in constant memory
        count(write ? GLOBAL_WRITTEN : GLOBAL_READ, bytes);
        if (block->timing) block->timing->global(p, bytes, write, site);
    }
}

void check_global(const void* p, unsigned bytes, bool write, void* site) { access_global(*current, reinterpret_cast<uintptr_t>(p), bytes, write, site); }

// A local array whose address has been passed to a product.
static void access_registers(Block& block, uintptr_t at, unsigned bytes, bool write, void* site) {
    Thread& t = block.self();
    t.touched.touch(at - reinterpret_cast<uintptr_t>(t.stack), bytes);
    for (const BusyRegisters& busy : t.busy)
        if (at < busy.last && at + bytes > busy.first && (write || busy.written))
            fail("thread %d %s a register that a product under way %s: @%x", block.running, verb(write), busy.written ? "writes" : "reads", site_offset(site));
}

// ---- instructions that name their memory (PTX ISA 9.7.9.8: ld, 9.7.9.12: st, 9.7.13.14: red)

uint32_t shared_address(const void* p) {
    const Shared& shared = current->shared;
    if (!shared.holds(reinterpret_cast<uintptr_t>(p))) fail("thread %d: the address of shared memory, of a place that is not: @%x", current->running, site_offset(SITE));
    return shared.address(p);
}

void store_shared(uint32_t address, uint32_t x) {
    Block& block = *current;
    uint8_t* p = block.shared.at(address, 4, 4, "st.shared", SITE);
    block.loads_have_come();
    count_shared(block, address, 4, true, SITE);
    if (block.timing) block.timing->shared(block.shared.offset(p), 4, true);
    const uint32_t* seen = block.clock();
    block.shared.access(block.shared.offset(p), 4, {.who = block.running, .when = seen[block.running], .seen = seen, .site = SITE, .write = true});
    memcpy(p, &x, 4);
}

template <class T>
static T add(T* p, T x, void* site) {
    check_global(p, 4, false, site), check_global(p, 4, true, site);
    count(GLOBAL_ADDED, 4);
    current->loads_have_come();
    if (current->timing) current->timing->global(p, 4, true, site);
    const T before = *p;
    *p = before + x;
    return before;
}
float atomic_add(float* p, float x) { return add(p, x, SITE); }
int atomic_add(int* p, int x) { return add(p, x, SITE); }
void reduce_add(float* p, const float* x, int count) {
    if (reinterpret_cast<uintptr_t>(p) % (4 * count)) fail("thread %d: red of %d floats at an address that is not a multiple of %d: @%x", current->running, count, 4 * count, site_offset(SITE));
    for (int n = 0; n < count; ++n) add(p + n, x[n], SITE);
}

void reduce_max(int* p, int x) {
    check_global(p, 4, false, SITE), check_global(p, 4, true, SITE);
    *p = std::max(*p, x);
}

// The launch that wrote *p last; 0: it was written before the call.
static uint64_t writer_of(const int* p) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(p);
    for (const Memory& memory : session.memories)
        if (at >= memory.first && at < memory.end && !memory.written.empty()) return memory.written[at - memory.first];
    return 0;
}

// What no thread has written is NaN.
void load_perhaps_unwritten(const void* p, void* to, int bytes) {
    if (writer_of(static_cast<const int*>(p))) access(p, bytes, false, SITE), memcpy(to, p, bytes);
    else memset(to, 0xff, bytes);
}

// The launch that last stored *p without release semantics.
static uint64_t plain_writer_of(const int* p) {
    const uint64_t writer = writer_of(p);
    const auto released = session.overlap.released.find(p);
    return released != session.overlap.released.end() && released->second.launch == writer ? released->second.plain : writer;
}

int load_acquire(const int* p) {
    Block& block = *current;
    if (Timing* timing = block.timing.get()) timing->meet(SITE), timing->wait(block.running, timing->trace.released[p], {SIGNALLED}, SITE);
    if (const uint64_t writer = plain_writer_of(p); may_still_run(block, writer))
        fail("thread %d acquires a number that launch %d sets: this one, number %d, could begin before that has ended, and find an older number: @%x", block.running, int(writer),
             int(session.launches), site_offset(SITE));
    if (session.overlap.released.count(p)) block.follows = true;
    access(p, 4, false, SITE);
    Thread& t = block.self();
    const int x = *p;
    // A thread that reads the same value again is spinning: it waits until the value changes.
    if (t.memory == p && t.value == x) block.wait(Wait::memory, "ld.acquire", SITE, 0, x, p);
    else block.maybe_let_others_run();
    t.memory = p, t.value = *p;
    return *p;
}

int exchange_if(int* p, int from, int to) {
    check_global(p, 4, false, SITE);
    current->loads_have_come();
    current->maybe_let_others_run();
    const int before = *p;
    if (before == from) check_global(p, 4, true, SITE), *p = to;
    return before;
}

// Tells the threads that wait for *p, then changes it.
template <class Change>
static void release(int* p, void* site, Change change) {
    const uint64_t plain = plain_writer_of(p);
    access(p, 4, true, site);
    session.overlap.released[p] = {session.launches, plain};
    if (Timing* timing = current->timing.get()) {
        timing->meet(site);
        timing->trace.released[p] = timing->now() + model::SIGNAL, timing->limit = timing->now();  // others may be waiting for this value
        timing->arrive({SIGNALLED}, site);
    }
    change(*p);
    current->maybe_let_others_run();
}

void store_release(int* p, int x) {
    release(p, SITE, [&](int& value) { value = x; });
}

void add_release(int* p, int x) {
    access(p, 4, false, SITE);
    release(p, SITE, [&](int& value) { value += x; });
}

}  // namespace emulator

// ---- the compiler's calls

#define HOOKS(BYTES)                                                                                                                        \
    extern "C" void __tsan_read##BYTES(void* p) { emulator::access(p, BYTES, false, SITE); }                                                \
    extern "C" void __tsan_write##BYTES(void* p) { emulator::access(p, BYTES, true, SITE); }                                                \
    extern "C" void __tsan_unaligned_read##BYTES(void* p) { emulator::access(p, BYTES, false, SITE, false); }                               \
    extern "C" void __tsan_unaligned_write##BYTES(void* p) { emulator::access(p, BYTES, true, SITE, false); }                               \
    extern "C" void __tsan_read_write##BYTES(void* p) { emulator::access(p, BYTES, false, SITE), emulator::access(p, BYTES, true, SITE); }  \
    extern "C" void __tsan_unaligned_read_write##BYTES(void* p) { emulator::access(p, BYTES, false, SITE, false), emulator::access(p, BYTES, true, SITE, false); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
extern "C" void __tsan_read_range(void* p, long bytes) { emulator::access(p, bytes, false, SITE, false); }
extern "C" void __tsan_write_range(void* p, long bytes) { emulator::access(p, bytes, true, SITE, false); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
// For the guard of a static variable in the launcher, which is 64 bits wide on aarch64.
extern "C" uint8_t __tsan_atomic8_load(const volatile uint8_t* p, int) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
extern "C" uint64_t __tsan_atomic64_load(const volatile uint64_t* p, int) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
extern "C" void* __tsan_memcpy(void* to, const void* from, unsigned long bytes) {
    emulator::access(from, bytes, false, SITE, false), emulator::access(to, bytes, true, SITE, false);
    return memcpy(to, from, bytes);
}
extern "C" void* __tsan_memset(void* to, int x, unsigned long bytes) {
    emulator::access(to, bytes, true, SITE, false);
    return memset(to, x, bytes);
}
// Up to version 14, clang calls the C library's functions; the linker substitutes these (--wrap).
extern "C" void* __wrap_memcpy(void* to, const void* from, unsigned long bytes) {
    emulator::access(from, bytes, false, SITE, false), emulator::access(to, bytes, true, SITE, false);
    return memcpy(to, from, bytes);
}
extern "C" void* __wrap_memmove(void* to, const void* from, unsigned long bytes) {
    emulator::access(from, bytes, false, SITE, false), emulator::access(to, bytes, true, SITE, false);
    return memmove(to, from, bytes);
}
extern "C" void* __wrap_memset(void* to, int x, unsigned long bytes) {
    emulator::access(to, bytes, true, SITE, false);
    return memset(to, x, bytes);
}

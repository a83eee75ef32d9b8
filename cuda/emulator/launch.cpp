#include "launch.h"

#include <dlfcn.h>
#include <link.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>

#include <algorithm>

#include "tensor_map.h"

namespace emulator {

thread_local Session session;

// ---- messages

static std::string format_text(const char* format, va_list list) {
    char buffer[4096];
    vsnprintf(buffer, sizeof buffer, format, list);
    return buffer;
}

std::string text(const char* format, ...) {
    va_list list;
    va_start(list, format);
    std::string result = format_text(format, list);
    va_end(list);
    return result;
}

struct Failed {};  // thrown where the launcher runs, not a thread of the block

void fail(const char* format, ...) {
    va_list list;
    va_start(list, format);
    session.message = format_text(format, list);
    va_end(list);
    if (current) {
        const Index& at = current->index;
        session.message += text("\n(block %u, %u, %u, seed %llu)", at.x, at.y, at.z, static_cast<unsigned long long>(session.seed));
    }
    session.failed = true;
    if (!current || current->running < 0) throw Failed{};
    leave_block();
}

int last_error() { return session.failed ? 710 : 0; }

void* driver_function(const char* name) { return std::string(name) == "cuTensorMapEncodeTiled" ? reinterpret_cast<void*>(encode_tensor_map) : nullptr; }

// ---- launches that overlap

void next_launch_is_early(bool early) { session.overlap.next_is_early = early; }
void launch_dependents() {
    if (!current->follows) session.overlap.begins_next = true;
}
void wait_for_launches_before() { current->follows = session.overlap.waits = true; }

// ---- stacks, kept from launch to launch

constexpr size_t MAX_STACKS = 1024 * MAX_RESIDENT;

namespace {
struct Stacks {
    char* memory = nullptr;
    ~Stacks() {
        if (memory) munmap(memory, MAX_STACKS * STACK_BYTES);
    }
};
}  // namespace

char* stack_of(int thread) {
    static thread_local Stacks stacks;
    if (!stacks.memory)  // the system allocates pages when they are first touched
        stacks.memory = static_cast<char*>(mmap(nullptr, MAX_STACKS * STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    return stacks.memory + thread * STACK_BYTES;
}

void call_kernel() { session.kernel.thread(session.kernel.arguments); }

// ---- the grid

// A library's thread-local segment on this thread: the kernel's shared memory.
static uintptr_t find_library(void* kernel, uint8_t*& window, uint32_t& bytes) {
    Dl_info info{};
    dladdr(kernel, &info);
    struct Wanted {
        uintptr_t base;
        uint8_t* window;
        uint32_t bytes;
    } wanted{reinterpret_cast<uintptr_t>(info.dli_fbase), nullptr, 0};
    dl_iterate_phdr(
        [](dl_phdr_info* library, size_t, void* data) {
            auto& wanted = *static_cast<Wanted*>(data);
            if (library->dlpi_addr != wanted.base) return 0;
            for (int n = 0; n < library->dlpi_phnum; ++n)
                if (library->dlpi_phdr[n].p_type == PT_TLS) wanted.window = static_cast<uint8_t*>(library->dlpi_tls_data), wanted.bytes = library->dlpi_phdr[n].p_memsz;
            return 1;
        },
        &wanted);
    window = wanted.window, bytes = wanted.bytes;
    return wanted.base;
}

// How many blocks a multiprocessor holds at a time, limited by shared memory and threads. The emulator does not know how many registers a kernel needs.
static int how_many_fit(const Grid& grid, int static_bytes) {
    return std::max(1, std::min(2048 / grid.threads, (SHARED_MEMORY + FIRST_SHARED_ADDRESS) / (grid.dynamic_bytes + static_bytes + FIRST_SHARED_ADDRESS)));
}

// If traced, the block with the least time runs, until another block has less.
static size_t least_in_time(const std::vector<Block*>& resident) {
    size_t least = 0;
    double time = INFINITY, next = INFINITY;
    for (size_t n = 0; n < resident.size(); ++n) {
        const double of_block = resident[n]->next_time();
        if (of_block < time) next = time, time = of_block, least = n;
        else next = std::min(next, of_block);
    }
    resident[least]->timing->limit = next;
    return least;
}

// Several blocks are resident at a time, as on a multiprocessor. Only one runs, with its shared memory in the window; that of the others is saved elsewhere.
static void run_blocks(const Grid& grid, uint8_t* dynamic, void* kernel) {
    uint8_t* window;
    uint32_t bytes;
    const uintptr_t library = find_library(kernel, window, bytes);
    if (!window) fail("the library has no shared memory");
    const int64_t count = int64_t(grid.blocks.x) * grid.blocks.y * grid.blocks.z;
    int64_t begun = 0;
    static thread_local std::vector<std::unique_ptr<Block>> slots;
    Trace* trace = session.trace.get();
    const int resident_blocks = trace ? std::min(session.resident, how_many_fit(grid, bytes - SHARED_MEMORY)) : session.resident;
    while (slots.size() < static_cast<size_t>(session.resident)) slots.push_back(std::make_unique<Block>()), slots.back()->slot = slots.size() - 1;
    std::vector<Block*> resident;
    Random random{(session.seed + session.launches) * 2 + 1};
    Block* owner = nullptr;  // of the window
    if (trace) trace->begin = trace->end, ++trace->launch;
    for (auto& slot : slots) slot->free_from = trace ? trace->begin : 0;
    int in_vain = 0;         // consecutive blocks that could only wait for others
    while (true) {
        while (resident.size() < static_cast<size_t>(resident_blocks) && begun < count) {
            auto is_free = [&](auto& slot) { return std::find(resident.begin(), resident.end(), slot.get()) == resident.end(); };
            Block& block = **std::find_if(slots.begin(), slots.end(), is_free);
            if (owner) owner->shared.keep();
            current = owner = &block;
            block.library = library, block.alone = resident_blocks == 1;
            block.shared.begin(window, bytes, dynamic - window, grid.dynamic_bytes, dynamic - window + SHARED_MEMORY);
            block.begin(begun, grid, session.seed + session.launches);
            resident.push_back(&block), ++begun;
        }
        if (resident.empty()) return;
        const size_t drawn = trace ? least_in_time(resident) : random.below(resident.size());
        Block& block = *resident[drawn];
        if (owner != &block) {
            if (owner) owner->shared.keep();
            block.shared.restore();
        }
        current = owner = &block;
        switch (block.run()) {
            case Pause::fault: return;
            case Pause::done:
                while (!block.under_way.empty()) block.under_way.one(block.random());
                block_ends(block);
                if (!block.follows) session.overlap.begins_next = true;
                if (trace) block.free_from = block.timing->end();
                resident.erase(resident.begin() + drawn), owner = nullptr, in_vain = 0;
                break;
            case Pause::drawn: in_vain = 0; break;
            case Pause::waits:
                if (++in_vain > 64 * session.resident) report_deadlock(block);
        }
    }
}

void run(const Grid& grid, uint8_t* dynamic, void* kernel, void (*thread)(void*), void* arguments, long argument_bytes) {
    if (session.failed) return;
    const uintptr_t first = reinterpret_cast<uintptr_t>(arguments);
    session.memories.push_back({first, first + argument_bytes, false, "the arguments", {}});
    session.kernel = {thread, arguments, kernel};
    session.overlap.begin(++session.launches);
    try {
        if (grid.threads < 1 || grid.threads > 1024) fail("a launch with %d threads a block", grid.threads);
        if (grid.dynamic_bytes < 0 || grid.dynamic_bytes > SHARED_MEMORY) fail("a launch with %d bytes of dynamic shared memory", grid.dynamic_bytes);
        run_blocks(grid, dynamic, kernel);
        current = nullptr;
        if (!session.failed && session.overlap.early && !session.overlap.waits)
            fail("launch %d ended with none of its blocks having waited for the launch before it: what follows could begin before that has ended",
                 int(session.launches));
    } catch (const Failed&) {
    }
    current = nullptr;
    session.memories.pop_back();
}

}  // namespace emulator

// ---- what Python calls, before a call of attention() and after it

using emulator::session;

// `resident` blocks at a time, 1 to 8.
extern "C" void emulator_begin(uint64_t seed, int resident) {
    session.seed = seed, session.resident = resident, session.launches = 0;
    session.failed = false, session.message.clear(), session.memories.clear(), session.overlap = {};
}

// Memory that kernels may read and, if `writable`, write. If it has not been written yet, they must write it before they read it.
extern "C" void emulator_memory(uintptr_t first, int64_t bytes, int writable, int written, const char* name) {
    emulator::Memory memory{first, first + bytes, writable != 0, name, {}};
    if (!written) memory.written.assign(bytes, 0);
    session.memories.push_back(std::move(memory));
}

extern "C" const char* emulator_message() { return session.message.c_str(); }

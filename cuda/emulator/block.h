// A block: its threads, which of them can run, and in which order they do.
//
// A thread runs until it has to wait for others. Which one runs next, another lane of the warp or another warp, is chosen at random (or, if the launch is
// traced, by least time); so is the moment at which a copy or a product in flight takes effect. All random choices come from one seed. If no thread can
// run and nothing is in flight, the block hangs, and the error says who waits for what.
#pragma once

#include <stdint.h>

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "clock.h"
#include "emulator.h"
#include "mbarrier.h"
#include "shared.h"
#include "timing.h"
#include "under_way.h"
#include "warp.h"

#define SITE __builtin_return_address(0)  // in a function that a kernel calls: the call site

namespace emulator {

struct Random {  // xorshift64*, Marsaglia 2003
    uint64_t state = 1;
    uint32_t operator()() {
        state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
        return state * 0x2545f4914f6cdd1d >> 32;
    }
    uint32_t below(uint32_t n) { return static_cast<uint64_t>((*this)()) * n >> 32; }
};

enum class Pause { done, waits, drawn, fault };  // why a block pauses: it waits for another one; it was drawn that another one runs
enum class Wait { nothing, warp, barrier, mbarrier, registers, memory };

struct Thread {
    int id;
    void* stack_pointer;
    char* stack;
    bool done;
    Wait wait;         // for what
    const char* what;  // by which instruction
    void* site;        // and where
    int barrier;       // number of a barrier, index of an mbarrier
    int64_t value;     // a phase, a number of registers, …
    const int* memory; // that must change
    CopyGroups copies;
    std::vector<BusyRegisters> busy;
    Touched touched;
    int registers;
    uint32_t loads;    // the tick since which it has read bytes that the copy engine wrote, without waiting for their values; 0: none
    std::deque<std::pair<uint32_t, uint32_t>> early;  // the range of ticks of such reads at each of its last few arrivals at an mbarrier
};

struct NamedBarrier {
    int expected = 0, arrived = 0;
    bool any = false, any_before = false;  // whether a thread has come with true, to this phase and to the one before
    std::vector<int> waiting;
    std::vector<uint32_t> clock;  // union of the clocks of all threads that have arrived
};

struct Block {
    uintptr_t library;  // where the kernel's is loaded
    int slot;           // which of the resident blocks' slots
    bool alone;         // there is one slot
    bool follows;       // all launches before this one: it has waited for them, or acquired what they released
    Index index;
    Grid grid;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<uint32_t> ready;  // a bit for each lane of each warp
    uint32_t ready_warps;
    Clocks clocks;
    Shared shared;
    UnderWay under_way;
    NamedBarrier barriers[16];
    std::vector<MBarrier> mbarriers;
    std::vector<Warpgroup> warpgroups;
    int free_registers;
    Random random;
    Pause paused;
    int running, last, threads_done;  // running: −1 while the launcher is
    double free_from;                 // the slot, in the model's time
    std::unique_ptr<Timing> timing;   // if the launch is traced

    void begin(int64_t number, const Grid&, uint64_t seed);  // in the grid
    Pause run();

    Thread& self() { return threads[running]; }
    // The running thread uses the values that it has read, in an instruction that the compiler moves neither before the loads nor after an arrival.
    void loads_have_come() {
        if (self().loads) self().loads = 0, clocks.tick(running);
    }
    int lane() const { return running % 32; }
    Warp& warp() { return warps[running / 32]; }
    void wait(Wait, const char* what, void* site, int barrier = 0, int64_t value = 0, const int* memory = nullptr);  // returns when awake() was called
    void awake(int thread);
    void asleep(int thread);
    void maybe_let_others_run();
    void let_earlier_ones_run();  // traced
    double next_time();           // when something happens in it, if traced
    uint32_t* clock() { return clocks.of(running); }

private:
    static constexpr int NOBODY = -1, ANOTHER_BLOCK = -2;
    int next();  // the thread to run next
    int next_in_time();
    int direction = 1;  // in which a warp's lanes take turns: 1 or −1
    void switch_to(int thread);
    bool someone_waits_for_memory() const;
    bool wake_who_waits_for_memory();
    friend void thread_begins();
};

extern thread_local Block* current;  // the block that runs on this thread of the machine, or null

// Aborts the launch: the message becomes a Python exception. Sites are written as @offset, for addr2line.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
[[noreturn]] void leave_block();
[[noreturn]] void report_deadlock(Block&);
std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
inline uint32_t site_offset(const void* site);
std::string list_threads(const std::vector<int>&);  // "0 – 31, 64"
std::string who_is(int component, uint32_t when);  // "thread 5", "the copy engine, for phase 2 …"
void barrier_without_those_that_ended(Block&);
void count(Count, uint64_t amount);
void count_wait(void* site);
void count_shared(Block&, uint32_t address, int bytes, bool write, void* site);
void count_rows(const uint32_t (&addresses)[32], bool write, void* site);
void block_ends(Block&);
void check_global(const void*, unsigned bytes, bool write, void* site);

// A return address lies behind the call; one byte less lies inside it.
inline uint32_t site_offset(const void* site) { return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(site) - current->library - 1); }

}  // namespace emulator

// A block: its threads, who of them can go on, and in which order they do.
//
// A thread runs until it has to wait for others. Who goes on then is drawn (or, if the launch is traced, is who has the least time): another lane of the warp, or another warp; so is when a copy or a product that
// is under way takes effect. All that is drawn comes from one seed. If no thread can go on and nothing is under way, the block hangs, and the error says
// who waits for what.
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

#define SITE __builtin_return_address(0)  // in a function that a kernel calls: from where

namespace emulator {

struct Random {  // xorshift64*, Marsaglia 2003
    uint64_t state = 1;
    uint32_t operator()() {
        state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
        return state * 0x2545f4914f6cdd1d >> 32;
    }
    uint32_t below(uint32_t n) { return static_cast<uint64_t>((*this)()) * n >> 32; }
};

enum class Pause { done, waits, drawn, fault };  // why a block stops: it waits for another one; it was drawn that another one goes on
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
    uint32_t loads;    // the tick since which it has read what the copy engine brought, and done nothing that waits for the values; 0: none
    std::deque<std::pair<uint32_t, uint32_t>> early;  // from and to which tick it had such reads when it arrived at an mbarrier; the last few times
};

struct NamedBarrier {
    int expected = 0, arrived = 0;
    std::vector<int> waiting;
    std::vector<uint32_t> clock;  // what those who came know together
};

struct Block {
    uintptr_t library;  // where the kernel's is loaded
    int slot;           // of those resident at a time
    bool alone;         // there is one slot
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
    // The running thread does what needs the values that it has read: an instruction that the compiler moves neither before those that it depends on nor
    // behind an arrival.
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
    double next_time();           // when something happens in it, traced
    uint32_t* clock() { return clocks.of(running); }

private:
    static constexpr int NOBODY = -1, ANOTHER_BLOCK = -2;
    int next();  // who goes on
    int next_in_time();
    int direction = 1;  // in which a warp's lanes take turns
    void switch_to(int thread);
    bool someone_waits_for_memory() const;
    bool wake_who_waits_for_memory();
    friend void thread_begins();
};

extern thread_local Block* current;  // the block that runs on this thread of the machine, or null

// Gives up the launch: the message becomes Python's exception. Sites are written as @offset, for addr2line.
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

// A return address is behind the call: one less is in it.
inline uint32_t site_offset(const void* site) { return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(site) - current->library - 1); }

}  // namespace emulator

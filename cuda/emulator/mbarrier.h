// mbarrier objects (PTX ISA 9.7.13.15) and warpgroups' products (9.7.15), as a block keeps account of them.
#pragma once

#include <stdint.h>

#include <deque>
#include <functional>
#include <vector>

namespace emulator {

struct MBarrier {
    uint32_t offset;               // in shared memory
    int arrivals;                  // of a phase
    int missing;                   // arrivals in this one
    int64_t bytes;                 // announced and not yet come; may be below 0 for a while
    uint32_t phase;                // 0 at first
    int initialised_by;            // thread
    uint32_t initialised_at;       // its tick
    bool visible_to_engine;        // fence.mbarrier_init
    std::vector<uint32_t> coming;  // what those who have arrived in this phase know together
    std::vector<uint32_t> over;    // and those of the phases before
    std::vector<int> waiting;
};

struct Warpgroup {
    struct Group {
        std::vector<std::function<void()>> products;  // not yet executed
    };
    struct Registers {  // of a thread, that a product under way reads or writes
        uintptr_t first, last;
        bool written;
        uint32_t group;
    };
    uint32_t groups = 0;   // committed so far
    uint32_t awaited = 0;  // groups that have been waited for
    std::deque<Group> committed;
    Group open;
    std::vector<Registers> busy;
};

}  // namespace emulator

// mbarrier objects (PTX ISA 9.7.13.15), as a block tracks them.
#pragma once

#include <stdint.h>

#include <vector>

namespace emulator {

struct MBarrier {
    uint32_t offset;               // in shared memory
    int arrivals;                  // of a phase
    int missing;                   // arrivals in this one
    int64_t bytes;                 // bytes announced and not yet arrived; may be negative for a while
    uint32_t phase;                // 0 at first
    int initialised_by;            // thread
    uint32_t initialised_at;       // its tick
    bool visible_to_engine;        // fence.mbarrier_init
    std::vector<uint32_t> coming;  // union of the clocks of all threads that have arrived in this phase
    std::vector<uint32_t> over;    // and in the phases before
    std::vector<int> waiting;
};

int mbarrier_at(uint32_t address, const char* what, void* site);  // its number
void mbarrier_bytes_came(int number, int bytes, double at);  // in the model's time

}  // namespace emulator

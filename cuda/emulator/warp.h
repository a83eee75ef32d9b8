// Collective instructions of a warp (PTX ISA 9.7.13.2 – 9.7.13.6, 9.7.9.6, 9.7.14.5). Each lane leaves its arguments on its stack and waits; the last lane
// to arrive executes the instruction for all.
#pragma once

#include <stdint.h>

#include "counters.h"
#include "under_way.h"

namespace emulator {

struct Block;

struct Warp {
    int first;           // thread
    uint32_t lanes;      // that the warp has; the last one of a block may be smaller
    uint32_t exited = 0;
    BulkGroups bulk;
    Gathered gathered;
    struct Lane {
        uint32_t mask = 0;  // of those it waits for; 0: it does not
        const char* what = nullptr;
        void* site = nullptr;
        void* arguments = nullptr;
    } at[32];
};

// The calling lane waits for all lanes of the mask. `execute` is called once, with every lane's arguments.
void meet(uint32_t mask, const char* what, void* site, void* arguments, void (*execute)(Block&, Warp&, uint32_t mask));

// Lane `lane`'s arguments.
template <class T>
T& arguments_of(Warp& warp, int lane) {
    return *static_cast<T*>(warp.at[lane].arguments);
}

}  // namespace emulator

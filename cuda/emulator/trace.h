// A trace: who did what from when to when, in the model's cycles. One multiprocessor runs the whole grid; the engines that its blocks share serve requests
// in order.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <map>
#include <vector>

namespace emulator {

// Who: a warp, or an engine. mma.sync and exponentials have an engine in each of the four sub-partitions, where the warps w with the same w % 4 are.
enum Actor { WARP, TENSOR_CORES, TENSOR_CORE_OF, EXPONENTIALS_OF = TENSOR_CORE_OF + 4, ISSUE_OF = EXPONENTIALS_OF + 4, SHARED_ENGINE = ISSUE_OF + 4, COPIES_IN, COPIES_OUT, ACTORS };

// What a wait waits for, and what a copy, a product or an arrival is part of: the same words.
struct About {
    const char* words = "";  // with two numbers in them
    int of = 0;
    uint32_t number = 0;
    bool operator==(const About&) const = default;
};
constexpr const char *PHASE = "mbarrier %d, phase %u", *TURN = "barrier %d, turn %u", *PRODUCTS = "products of warpgroup %d, group %u", *COPY_GROUP = "cp.async of warp %d, group %u",
                     *BULK_STORES = "bulk stores of warp %d, group %u", *WARPGROUP = "the other warps of warpgroup %d", *SIGNALLED = "a number in global memory";

struct Event {
    int actor, block, warp;  // of an engine: whose request
    const char* kind;
    About about;
    double amount;      // bytes, FLOP, exponentials
    double from, to;
    uint32_t site;
    int tiles[2];       // of which tensors, where that can be told: as in Timing::tiles
    int launch = 0;
};

struct Trace {
    std::vector<Event> events;
    double free[ACTORS] = {};              // of an engine: from when on
    double begin = 0, end = 0;             // of the launch
    int launch = 0, last[ACTORS];          // its last event
    std::map<const int*, double> released;  // when a number in global memory was stored for others

    Trace() { std::fill(last, last + ACTORS, -1); }
    // Reserves the engine's next free cycles from `from` on; returns when they begin.
    double take(int actor, double from, double cycles) {
        const double start = std::max(free[actor], from);
        free[actor] = start + cycles;
        return start;
    }
    // Adds an engine's event; if it continues the last one, that is extended instead.
    void add(Event);
};

}  // namespace emulator

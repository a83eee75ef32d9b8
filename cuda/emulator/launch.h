// A launch: its settings, which Python makes before it, and its results, which Python reads after it. One for each thread of the machine.
#pragma once

#include <stdint.h>

#include <string>
#include <unordered_map>
#include <vector>

#include "block.h"

namespace emulator {

constexpr size_t STACK_BYTES = 128 * 1024;  // of a thread
constexpr int MAX_RESIDENT = 8;             // blocks
char* stack_of(int thread);
void call_kernel();  // by the thread that runs

// Global memory that a launch may touch.
struct Memory {
    uintptr_t first, end;
    bool writable;
    std::string name;
    std::vector<uint16_t> written;  // of each byte the launch that has written it, or 0; empty: all bytes were written before the call
};

// Launches run one after another here. On a GPU one that is early may begin while those before it still run. So what these write is not visible to a block
// of it until a thread of the block has waited for them, or has acquired what they released. A number that is acquired must have had its first value before
// the block began: otherwise the block may find what an earlier call left there.
struct Overlap {
    struct Released {
        uint64_t launch;  // that stored the number last with release semantics
        uint64_t plain;   // that stored it last without
    };

    bool next_is_early = false, early = false;
    uint64_t ended = 0;        // the launches up to this number have certainly ended when the present one begins
    bool waits = false;        // some block has waited, so that what follows this launch also follows those before it
    bool begins_next = false;  // some block has let the next launch begin, or has ended, without having waited
    std::unordered_map<const int*, Released> released;  // numbers stored with release semantics

    void begin(uint64_t launch) {
        early = next_is_early, next_is_early = false;
        if (!early) ended = launch - 1;
        else if (!begins_next && launch > 1) ended = launch - 2;
        waits = begins_next = false;
    }
};

struct Session {
    uint64_t seed = 0;
    int resident = 1;  // blocks at a time
    std::vector<Memory> memories;
    std::string message;
    bool failed = false;
    uint64_t launches = 0;
    Overlap overlap;
    Counters counters;
    std::unique_ptr<Trace> trace;  // if it is wanted
    struct {
        void (*thread)(void*);
        void* arguments;
        void* entry;
    } kernel;
};
extern thread_local Session session;

}  // namespace emulator

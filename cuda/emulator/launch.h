// A launch: its settings, which Python makes before it, and its results, which Python reads after it. One for each thread of the machine.
#pragma once

#include <stdint.h>

#include <string>
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
    std::vector<bool> written;  // bytes; empty: all were before the launch
};

struct Session {
    uint64_t seed = 0;
    int resident = 1;  // blocks at a time
    std::vector<Memory> memories;
    std::string message;
    bool failed = false;
    uint64_t launches = 0;
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

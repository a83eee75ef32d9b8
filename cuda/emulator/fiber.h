// A fiber: a stack, and the point at which it resumes. Thousands of them take turns on one thread of the machine.
#pragma once

#include <stddef.h>

namespace emulator {

// Leaves this stack, stores in *from where to resume it, and resumes `to`.
extern "C" void emulator_switch(void** from, void* to);

// The resume point of a new fiber: the start of `entry`, which must not return, on this stack.
void* prepare_fiber(char* stack, size_t bytes, void (*entry)());

}  // namespace emulator

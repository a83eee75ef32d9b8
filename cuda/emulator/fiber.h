// A fiber: a stack, and the place where it goes on. Thousands of them take turns on one thread of the machine.
#pragma once

#include <stddef.h>

namespace emulator {

// Leaves this stack, keeping in *from where to come back to, and goes on where `to` left off.
extern "C" void emulator_switch(void** from, void* to);

// Where a fiber goes on that has not begun: at the start of `entry`, which must not return, on this stack.
void* prepare_fiber(char* stack, size_t bytes, void (*entry)());

}  // namespace emulator

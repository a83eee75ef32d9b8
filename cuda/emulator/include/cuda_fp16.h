// __half: conversions round to nearest, ties to even, as cvt.rn.f16.f32 does.
#pragma once

#include "../half.h"

struct __half {
    uint16_t bits;
    constexpr __half() : bits(0) {}  // constant: shared memory, which is thread-local, needs no call to begin
    __half(float x) : bits(emulator::half_of(x)) {}
    operator float() const { return emulator::float_of_half(bits); }
};

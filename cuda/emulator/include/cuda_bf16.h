// __nv_bfloat16: the upper half of a float, rounded to nearest, ties to even, as cvt.rn.bf16.f32 does.
#pragma once

#include "../half.h"

struct __nv_bfloat16 {
    uint16_t bits;
    constexpr __nv_bfloat16() : bits(0) {}
    __nv_bfloat16(float x) : bits(emulator::bfloat_of(x)) {}
    operator float() const { return emulator::float_of_bfloat(bits); }
};

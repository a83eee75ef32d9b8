// float16 and bfloat16 from float and back, IEEE 754: round to nearest, ties to even; subnormals are kept.
#pragma once

#include <stdint.h>

namespace emulator {

inline float as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t as_bits(float x) { return __builtin_bit_cast(uint32_t, x); }

inline float float_of_half(uint16_t h) {
    const uint32_t magnitude = uint32_t(h & 0x7fff) << 13, sign = uint32_t(h & 0x8000) << 16;
    // The exponent's bias is 15 there and 127 here: a product with 2^112, which is exact, also makes subnormals normal.
    const uint32_t finite = as_bits(as_float(magnitude) * 0x1p112f);
    return as_float(sign | ((h & 0x7c00) == 0x7c00 ? 0x7f800000 | magnitude : finite));
}

inline uint16_t half_of(float x) {
    const uint32_t sign = as_bits(x) >> 16 & 0x8000, magnitude = as_bits(x) & 0x7fffffff;
    if (magnitude > 0x7f800000) return 0x7fff;             // NaN
    if (magnitude >= 0x477ff000) return sign | 0x7c00;     // 65520 and more round to infinity
    // Below 2^-14 a sum with 0.5 leaves the result's bits, rounded by the addition, at the end of the fraction.
    if (magnitude < 0x38800000) return sign | (as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f));
    return sign | ((magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

inline float float_of_bfloat(uint16_t b) { return as_float(uint32_t(b) << 16); }

inline uint16_t bfloat_of(float x) {
    const uint32_t bits = as_bits(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;  // NaN
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

}  // namespace emulator

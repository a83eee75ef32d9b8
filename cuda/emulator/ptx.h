// ptx.cuh for the emulator: the same functions, in the same order, with the same sections of the PTX ISA.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

namespace ptx {

inline uint32_t smem_address(const void* p) { return emulator::shared_address(p); }
inline int tid_x() { return emulator::thread_x(); }
template <class T>
void compute_now(T) {}

template <class T>
T unknown(T x) {
    return x;
}
inline int ctaid_x() { return emulator::block_index().x; }

// ---- asynchronous copies (9.7.9.25.3: cp.async)

template <int N>
inline void cp_async_first(uint32_t smem, const void* gmem, int bytes) {
    static_assert(N == 4 || N == 8 || N == 16, "cp.async copies 4, 8 or 16 bytes");
    emulator::cp_async(smem, gmem, N, bytes);
}
inline void cp_async_16(uint32_t smem, const void* gmem, bool valid) { cp_async_first<16>(smem, gmem, valid ? 16 : 0); }
inline uint64_t createpolicy_evict_first() { return 0; }
inline void cp_async_16(uint32_t smem, const void* gmem, bool valid, uint64_t) { cp_async_16(smem, gmem, valid); }
template <int N>
inline void cp_async_small(uint32_t smem, const void* gmem) {
    cp_async_first<N>(smem, gmem, N);
}
inline void cp_async_commit_group() { emulator::cp_async_commit(); }
template <int N>
inline void cp_async_wait_group() {
    emulator::cp_async_wait(N);
}

// 9.7.13.13: griddepcontrol
inline void griddepcontrol_launch_dependents() { emulator::launch_dependents(); }
inline void griddepcontrol_wait() { emulator::wait_for_launches_before(); }

// e4m3 as float16: sign, 4 bits of exponent with a bias of 7, 3 bits; all ones is NaN.
inline uint32_t half_of_float8(uint32_t byte) {
    const uint32_t sign = (byte & 0x80) << 8, exponent = byte >> 3 & 15, fraction = byte & 7;
    if ((byte & 0x7f) == 0x7f) return sign | 0x7fff;
    if (exponent) return sign | (exponent + 8) << 10 | fraction << 7;
    return sign | emulator::half_of(static_cast<float>(fraction) / 512);
}
inline uint32_t halves_of_float8(uint32_t x) { return half_of_float8(x & 0xff) | half_of_float8(x >> 8 & 0xff) << 16; }

inline void st_shared(uint32_t smem, uint32_t x) { emulator::store_shared(smem, x); }

// ---- matrix fragments and tensor cores (9.7.14.5.15: ldmatrix, 9.7.14.5.8: mma.m16n8k16)

// The emulator gets copies, here and below, so that the addresses of the caller's arrays do not escape and the compiler treats them like registers.
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t smem) {
    uint32_t x[4];
    emulator::ldmatrix_x4(x, smem, false);
    for (int n = 0; n < 4; ++n) r[n] = x[n];
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t smem) {
    uint32_t x[4];
    emulator::ldmatrix_x4(x, smem, true);
    for (int n = 0; n < 4; ++n) r[n] = x[n];
}

template <typename T>
constexpr emulator::Type type_of = std::is_same_v<T, __half> ? emulator::Type::float16 : emulator::Type::bfloat16;

template <typename T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    float sum[4] = {d[0], d[1], d[2], d[3]};
    const uint32_t left[4] = {a[0], a[1], a[2], a[3]}, right[2] = {b0, b1};
    emulator::mma_m16n8k16(type_of<T>, sum, left, right);
    for (int e = 0; e < 4; ++e) d[e] = sum[e];
}

// ---- arithmetic. ex2, lg2 and rcp are exact to the last bit or two here; a GPU's are approximations (9.7.3.21, 9.7.3.20, 9.7.3.14). tanh has 11
// bits here too (9.7.3.22).

inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }
inline float ex2(float x) { return flushed(emulator::exponential_2(flushed(x))); }
inline float lg2(float x) { return log2f(x); }
inline float rcp(float x) { return 1 / x; }
inline float tanh(float x) { return __uint_as_float((__float_as_uint(emulator::tangent(x)) + 0x800u) & 0xfffff000u); }

template <typename T>
inline uint32_t cvt_pair(float low, float high) {
    return T(low).bits | uint32_t(T(high).bits) << 16;
}

inline float2 floats_of_pair(uint32_t pair) { return {emulator::float_of_half(pair & 0xffff), emulator::float_of_half(pair >> 16)}; }

// 9.7.9.7: prmt
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    uint32_t d = 0;
    for (int n = 0; n < 4; ++n) {
        const uint32_t digit = selector >> 4 * n & 0xf, byte = bytes >> 8 * (digit & 7) & 0xff;
        d |= (digit & 8 ? (byte & 0x80 ? 0xff : 0) : byte) << 8 * n;
    }
    return d;
}

inline uint2 mul_wide(uint32_t a, uint32_t b) {
    const uint64_t product = uint64_t(a) * b;
    return {uint32_t(product), uint32_t(product >> 32)};
}

// ---- reductions in global memory (9.7.13.14: red), signals between blocks (9.7.9.8: ld, 9.7.9.12: st)

inline float4 ld_perhaps_unwritten(const float* p) {
    float4 x;
    emulator::load_perhaps_unwritten(p, &x, sizeof(x));
    return x;
}
inline void red_add_4(float* p, float x0, float x1, float x2, float x3) {
    const float x[4] = {x0, x1, x2, x3};
    emulator::reduce_add(p, x, 4);
}
inline void store_or_add_4(bool store, float* p, float x0, float x1, float x2, float x3) {
    const float x[4] = {x0, x1, x2, x3};
    if (store) *reinterpret_cast<float4*>(p) = {x0, x1, x2, x3};
    else emulator::reduce_add(p, x, 4);
}
inline void red_max(int* p, int x) { emulator::reduce_max(p, x); }
inline int ld_acquire(const int* p) { return emulator::load_acquire(p); }
inline int cas_acquire(int* p, int from, int to) { return emulator::exchange_if(p, from, to); }
inline void red_release(int* p, int x) { emulator::add_release(p, x); }
inline void st_release(int* p, int x) { emulator::store_release(p, x); }

}  // namespace ptx

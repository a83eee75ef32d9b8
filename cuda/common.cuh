// What every kernel shares: reading the specialisation, addresses, the mask, dropout's random bits, and launch checks.
// Matches reference/dropout.py bit for bit and reference/tiles.py in meaning.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math_constants.h>

#include <initializer_list>

#include "attention.h"
#include "launch.cuh"
#include "ptx.cuh"

#ifndef HEAD_DIM
#error "compile with -DHEAD_DIM=… -DDTYPE=… -DCAUSAL=… -DINTERVAL=… -DMASK=… -DDROPOUT=… (python -m flash_attention.build does)"
#endif

#ifndef V_HEAD_DIM
#define V_HEAD_DIM HEAD_DIM  // V, O and their gradients have rows as long as those of Q and K
#endif

#if DTYPE == FLOAT32
using element = float;
#elif DTYPE == FLOAT16
using element = __half;
#elif DTYPE == BFLOAT16
using element = __nv_bfloat16;
#endif

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

// ---- addresses

// Row 0 of batch b, head h. 64-bit, because B·H·N·D passes 2³¹.
__device__ inline element* head_of(const Tensor4& t, int b, int h) {
    return static_cast<element*>(t.data) + b * t.stride_b + h * t.stride_h;
}

// Grouped-query attention: the key/value head that query head h reads.
__device__ inline int kv_head(const AttentionParams& p, int h) { return h / (p.H / p.Hkv); }

// ---- dropout: Philox-4x32-10 (Salmon et al., SC 2011), see reference/dropout.py

__device__ inline uint4 philox_4x32_10(uint4 counter, uint2 key) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint2 product0 = ptx::mul_wide(counter.x, 0xD2511F53u), product1 = ptx::mul_wide(counter.z, 0xCD9E8D57u);  // x low, y high
        counter = make_uint4(product1.y ^ counter.y ^ key.x, product1.x, product0.y ^ counter.w ^ key.y, product0.x);
        key.x += 0x9E3779B9u;
        key.y += 0xBB67AE85u;
    }
    return counter;
}

__device__ inline uint2 dropout_key(const AttentionParams& p) {
    const uint64_t seed = static_cast<uint64_t>(*p.seed);
    return make_uint2(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// The 16 bytes that serve rows {i0, i0 + 8, i0 + 16, i0 + 24} × columns {j0, j0 + 8, j0 + 16, j0 + 24}, where i0 % 32 < 8 and j0 % 32 < 8.
// Row i0 + 8·w takes word w (x, y, z, w), column j0 + 8·y byte y of it, lowest first.
__device__ inline uint4 dropout_bytes(uint2 key, int b, int h, int i0, int j0) {
    const uint32_t row_group = (i0 >> 5) * 8 + (i0 & 7);
    const uint32_t column_group = (j0 >> 5) * 8 + (j0 & 7);
    return philox_4x32_10(make_uint4(column_group, row_group, h, b), key);
}

// For the random words of two neighbouring columns (first, second) and each of their four bytes: 0xffff in the low half of keep[byte] if the
// first column's element is kept, in the high half if the second's is. ANDed onto a pair of 16-bit elements, it drops without a comparison.
__device__ inline void keep_pairs(uint32_t (&keep)[4], uint32_t first, uint32_t second, const AttentionParams& p) {
    // 2¹⁵ + 128 · (byte − drop_below) in each half: bit 15 is set exactly when the byte keeps, and no half overflows into the other.
    const uint32_t base = 0x80008000u - p.drop_below * 0x00800080u;
    const uint32_t first_02 = (first & 0x00ff00ffu) * 128 + base, second_02 = (second & 0x00ff00ffu) * 128 + base;
    const uint32_t first_13 = (first >> 8 & 0x00ff00ffu) * 128 + base, second_13 = (second >> 8 & 0x00ff00ffu) * 128 + base;
    // Repeat the sign bits: of byte 1 of each (digits 9 and d), then of byte 3 (b and f).
    keep[0] = ptx::prmt(first_02, second_02, 0xdd99);
    keep[1] = ptx::prmt(first_13, second_13, 0xdd99);
    keep[2] = ptx::prmt(first_02, second_02, 0xffbb);
    keep[3] = ptx::prmt(first_13, second_13, 0xffbb);
}

// ---- the mask

// The value from which a score's accumulator starts under a mask: about −2¹²⁷ if the sign bit of byte n of `signs` is set, else 0. The repeated sign is
// the float's high byte.
__device__ inline float start_of_sum(uint32_t signs, int n) { return __uint_as_float(ptx::prmt(signs, 0, (8 + n) << 12 | 0x444)); }

// The same for the 32 columns of a word of bits. Of the four lanes that share a row, lane t holds columns 8n + 2t and 8n + 2t + 1: place(n, c) is the
// accumulator of column 8n + 2t + c.
template <class Place>
__device__ inline void start_sums(uint32_t hidden, int t, Place place) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        const uint32_t signs = hidden << (7 - 2 * t - c);  // byte n is about columns 8n …
#pragma unroll
        for (int n = 0; n < 4; ++n) place(n, c) = start_of_sum(signs, n);
    }
}

// A word whose lowest `count` bits are set.
__device__ inline uint32_t first_bits(int count) { return count >= 32 ? ~0u : count <= 0 ? 0 : (1u << count) - 1; }

// ---- the end of a row

// What O is multiplied by at the end: 1 / l, or 0 for a row that may attend nothing. m is the row's largest score before scaling.
//
// P = 2^(scale_log2 · S − M), where M is scale_log2 · m, rounded. A rounding error e makes P and l too large by the factor 2^e, which cancels in O = P V / l.
// But sums taken under different maxima have different errors. Up to |M| = 2²⁴ these differ by a factor of 2 at most, between scores that float32 itself
// can hardly tell apart. Beyond, O becomes NaN instead of a wrong number.
__device__ inline float factor_of_row(const AttentionParams& p, float m, float scale_log2, float one_over_l) {
    const bool dead = m == p.lowest && (MASK || CAUSAL || INTERVAL || p.Nk == 0);  // if nothing can be hidden, all scores were −∞: NaN
    const float factor = fabsf(m * scale_log2) < 0x1p24f ? one_over_l : CUDART_NAN_F;
    return dead ? 0 : factor;
}

// ---- launching

// Makes the tensors' device current while a launch function runs, and restores the previous one afterwards.
struct DeviceGuard {
    int before = -1;
    explicit DeviceGuard(int device) {
        cudaGetDevice(&before);
        if (before != device) cudaSetDevice(device);
        else before = -1;
    }
    ~DeviceGuard() {
        if (before >= 0) cudaSetDevice(before);
    }
};

// Whether 32-bit ints can number the blocks of each grid, and the rows and columns up to the end of the last tile. Launchers call it before anything
// else.
inline bool numbers_fit(const AttentionParams& p, std::initializer_list<int64_t> grids) {
    for (const int64_t blocks : grids)
        if (blocks > INT32_MAX) return false;
    return p.Nq <= INT32_MAX - 1024 && p.Nk <= INT32_MAX - 1024;  // no tile has more rows or columns
}

inline int64_t tiles_of(int64_t n, int size) { return (n + size - 1) / size; }

// Launches `blocks` blocks of a kernel on the call's stream, unless its output is empty. A kernel sees what earlier launches wrote.
inline cudaError_t launch(void (*kernel)(AttentionParams), int64_t blocks, int threads, const AttentionParams& p) {
    if (blocks == 0) return cudaSuccess;
    launch_kernel(kernel, static_cast<unsigned>(blocks), threads, 0, p.stream, p);
    return cudaGetLastError();
}

extern "C" int64_t params_size(void) { return sizeof(AttentionParams); }
extern "C" const char* error_name(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

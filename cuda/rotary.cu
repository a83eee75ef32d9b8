// Rotary position embedding (RoFormer, Su et al., 2021, arXiv:2104.09864, equation 34): each pair (x, y) of a row's first R features becomes
// (x cos − y sin, y cos + x sin), computed in float32 and rounded once; the other features are copied. The gradient is rotated back, by −sin.
//
// Memory bandwidth is the limit, so every feature is read once and written once, 16 bytes at a time. The angles, in float32, are half as many bytes as a row
// of bfloat16. A thread therefore loads its angles once and rotates HEADS heads of the token by them; it issues the loads of all these heads at once.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "attention.h"
#include "launch.cuh"

struct RotaryParams {
    const void* x;  // [B, H, N, D]: strides in elements, rows contiguous and, as every row of these tensors, aligned to 16 bytes
    int64_t x_stride_b, x_stride_h, x_stride_n;
    void* out;  // as x
    int64_t out_stride_b, out_stride_h, out_stride_n;
    const float *cos, *sin;  // [B, N, R / 2], batches perhaps the same
    int64_t angle_stride_b;
    int32_t B, H, N, D, R;
    int32_t type;  // FLOAT32, FLOAT16 or BFLOAT16
    int32_t interleaved, back, device;
    cudaStream_t stream;
};

constexpr int THREADS = 256;
constexpr int HEADS = 4;

// The grid of a kernel whose threads each rotate HEADS heads of one token (b, n): tokens and their chunks, groups of heads, batches.
static dim3 grid(const RotaryParams& p, int chunks) {
    return dim3(static_cast<unsigned>((static_cast<int64_t>(p.N) * chunks + THREADS - 1) / THREADS), (p.H + HEADS - 1) / HEADS, p.B);
}

template <class T>
constexpr int CHUNK = 16 / sizeof(T);  // features that a thread loads at once

// How many threads of a row rotate: each has one chunk of neighbouring pairs, or two chunks that lie R / 2 apart.
template <class T, bool INTERLEAVED>
__host__ __device__ inline int rotating_threads(const RotaryParams& p) {
    return p.R / CHUNK<T> / (INTERLEAVED ? 1 : 2);
}

template <class T>
__device__ inline void rotate(T& x, T& y, float cos, float sin) {
    const float a = static_cast<float>(x), b = static_cast<float>(y);
    x = T(a * cos - b * sin);
    y = T(b * cos + a * sin);
}

template <class T, bool INTERLEAVED>
__global__ void __launch_bounds__(THREADS) rotary_kernel(const __grid_constant__ RotaryParams p) {
    constexpr int FEATURES = CHUNK<T>, PAIRS = INTERLEAVED ? FEATURES / 2 : FEATURES;  // of a thread and head
    const int rotating = rotating_threads<T, INTERLEAVED>(p), chunks = rotating + (p.D - p.R) / FEATURES;
    const uint32_t index = blockIdx.x * THREADS + threadIdx.x;
    const int n = index / chunks, chunk = index % chunks, first_head = blockIdx.y * HEADS, b = blockIdx.z;
    if (n >= p.N) return;
    const bool rotates = chunk < rotating, has_second = rotates && !INTERLEAVED;
    const int first = rotates ? chunk * FEATURES : p.R + (chunk - rotating) * FEATURES, second = first + p.R / 2;
    const T* x_gmem = static_cast<const T*>(p.x) + b * p.x_stride_b + first_head * p.x_stride_h + n * p.x_stride_n;            // [HEADS, D]
    T* out_gmem = static_cast<T*>(p.out) + b * p.out_stride_b + first_head * p.out_stride_h + n * p.out_stride_n;              // [HEADS, D]
    const int64_t angles = b * p.angle_stride_b + static_cast<int64_t>(n) * (p.R / 2) + (INTERLEAVED ? first / 2 : first);

    uint4 x[HEADS][2];  // all loads are issued before the first result is used
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        if (first_head + h >= p.H) continue;
        x[h][0] = *reinterpret_cast<const uint4*>(x_gmem + h * p.x_stride_h + first);
        if (has_second) x[h][1] = *reinterpret_cast<const uint4*>(x_gmem + h * p.x_stride_h + second);
    }
    float2 cos[PAIRS / 2], sin[PAIRS / 2];
    if (rotates)
#pragma unroll
        for (int k = 0; k < PAIRS / 2; ++k) {
            cos[k] = *reinterpret_cast<const float2*>(p.cos + angles + 2 * k);
            sin[k] = *reinterpret_cast<const float2*>(p.sin + angles + 2 * k);
            if (p.back) sin[k] = make_float2(-sin[k].x, -sin[k].y);
        }
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        if (first_head + h >= p.H) continue;
        T *of_first = reinterpret_cast<T*>(&x[h][0]), *of_second = reinterpret_cast<T*>(&x[h][1]);
        if (rotates)
#pragma unroll
            for (int k = 0; k < PAIRS; ++k) {
                const float c = k % 2 ? cos[k / 2].y : cos[k / 2].x, s = k % 2 ? sin[k / 2].y : sin[k / 2].x;
                if (INTERLEAVED) rotate(of_first[2 * k], of_first[2 * k + 1], c, s);
                else rotate(of_first[k], of_second[k], c, s);
            }
        *reinterpret_cast<uint4*>(out_gmem + h * p.out_stride_h + first) = x[h][0];
        if (has_second) *reinterpret_cast<uint4*>(out_gmem + h * p.out_stride_h + second) = x[h][1];
    }
}

template <class T>
static cudaError_t launch_rotary(const RotaryParams& p) {
    const int rotating = p.interleaved ? rotating_threads<T, true>(p) : rotating_threads<T, false>(p), chunks = rotating + (p.D - p.R) / CHUNK<T>;
    if (p.interleaved) launch_kernel(rotary_kernel<T, true>, grid(p, chunks), THREADS, 0, p.stream, p);
    else launch_kernel(rotary_kernel<T, false>, grid(p, chunks), THREADS, 0, p.stream, p);
    return cudaGetLastError();
}

extern "C" int rotary(const RotaryParams* params) {
    const RotaryParams& p = *params;
    // A thread's number, through the last block, is 32 bits; a grid has 65535 blocks at most along its second and third dimension.
    if (static_cast<int64_t>(p.N) * (p.D / CHUNK<float>) > INT32_MAX - THREADS || p.H > 65535 * HEADS || p.B > 65535) return cudaErrorInvalidConfiguration;
    if (p.B == 0 || p.H == 0 || p.N == 0 || p.D == 0) return cudaSuccess;
    return on_device(p.device, [&] {
        return p.type == FLOAT32 ? launch_rotary<float>(p) : p.type == FLOAT16 ? launch_rotary<__half>(p) : launch_rotary<__nv_bfloat16>(p);
    });
}

extern "C" int64_t params_size(void) { return sizeof(RotaryParams); }
extern "C" const char* error_name(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

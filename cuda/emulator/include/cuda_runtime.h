// The parts of the CUDA runtime that the kernels here use, for a C++ compiler: a kernel is a function that every thread of every block calls on a
// stack of its own (emulator/block.h). Found in place of CUDA's header because -I names this folder.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include <tuple>
#include <utility>

#include "../emulator.h"

#define __host__
#define __device__
// All that a kernel calls becomes part of it. So its local arrays stay its own (the compiler knows who else may see them), as they are registers on a GPU.
#define __global__ __attribute__((flatten))
// A block's shared memory is its library's thread-local segment: one block at a time has it (emulator/launch.cpp). Inside a function this means static.
#define __shared__ thread_local
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __grid_constant__
#define __launch_bounds__(...)

// ---- vectors (CUDA C++ Programming Guide, "Built-in Vector Types")

struct alignas(8) int2 {
    int x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct uint3 {
    unsigned x, y, z;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- who a thread is: threads are numbered in x, blocks in x, y and z

#define threadIdx (emulator::Index{emulator::thread_x(), 0, 0})
#define blockIdx (emulator::block_index())
#define gridDim (emulator::grid_size())
#define blockDim (emulator::Index{emulator::threads_of_block(), 1, 1})

// ---- functions of the device

#define expf emulator::exponential  // counted

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float __uint_as_float(uint32_t x) { return __builtin_bit_cast(float, x); }
inline uint32_t __float_as_uint(float x) { return __builtin_bit_cast(uint32_t, x); }
namespace emulator {
// x, which the compiler must not fuse into another operation.
inline float rounded(float x) {
    uint32_t bits = __float_as_uint(x);
    asm("" : "+r"(bits));
    return __uint_as_float(bits);
}
}  // namespace emulator
inline float __fmul_rn(float x, float y) { return emulator::rounded(x * y); }
inline float __fadd_rn(float x, float y) { return emulator::rounded(x + y); }
template <class T>
inline T __ldcs(const T* p) {
    return *p;
}
// All ones in each byte that is the same in both.
inline uint32_t __vseteq4(uint32_t a, uint32_t b) {
    uint32_t equal = 0;
    for (int byte = 0; byte < 4; ++byte) equal |= uint32_t((a >> 8 * byte & 0xff) == (b >> 8 * byte & 0xff)) << 8 * byte;
    return equal;
}

inline void __syncthreads() { emulator::barrier_sync(0, emulator::threads_of_block()); }
inline int __syncthreads_or(int x) { return emulator::barrier_or(0, emulator::threads_of_block(), x != 0); }
inline void __syncwarp(uint32_t mask = 0xffffffff) { emulator::warp_sync(mask); }
inline void __threadfence() {}  // the emulator's memory is one; order between blocks comes from acquire and release
inline uint32_t __ballot_sync(uint32_t mask, bool x) { return emulator::ballot(mask, x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline bool __any_sync(uint32_t mask, bool x) { return emulator::ballot(mask, x) != 0; }
inline bool __all_sync(uint32_t mask, bool x) { return emulator::ballot(mask, x) == mask; }

namespace emulator {
template <class T>
inline T shuffled(uint32_t mask, T x, int source) {
    static_assert(sizeof(T) == 4, "a register");
    return __builtin_bit_cast(T, shuffle(mask, __builtin_bit_cast(uint32_t, x), source));
}
inline int this_lane() { return thread_x() % 32; }
}  // namespace emulator
template <class T>
inline T __shfl_sync(uint32_t mask, T x, int lane) {
    return emulator::shuffled(mask, x, lane % 32);
}
template <class T>
inline T __shfl_xor_sync(uint32_t mask, T x, int lanes) {
    return emulator::shuffled(mask, x, emulator::this_lane() ^ lanes);
}
template <class T>
inline T __shfl_down_sync(uint32_t mask, T x, int lanes) {
    const int source = emulator::this_lane() + lanes;
    return emulator::shuffled(mask, x, source < 32 ? source : emulator::this_lane());
}
template <class T>
inline T __shfl_up_sync(uint32_t mask, T x, int lanes) {
    const int source = emulator::this_lane() - lanes;
    return emulator::shuffled(mask, x, source >= 0 ? source : emulator::this_lane());
}
inline float atomicAdd(float* p, float x) { return emulator::atomic_add(p, x); }
inline int atomicAdd(int* p, int x) { return emulator::atomic_add(p, x); }
template <class T>
inline T __ldcg(const T* p) {
    return *p;
}

// ---- the host's side

using cudaStream_t = void*;
enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorCallRequiresNewerDriver = 36,
    cudaErrorAssert = 710,  // the emulator has something to say: emulator_message()
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum { cudaEnableDefault = 0 };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0 };
#define CUDART_VERSION 13000

inline const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        case cudaErrorCallRequiresNewerDriver: return "a function that the emulator does not have";
        default: return emulator_message();
    }
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return static_cast<cudaError_t>(emulator::last_error()); }
template <class Kernel>
inline cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
    return bytes <= emulator::SHARED_MEMORY ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* found) {
    *function = emulator::driver_function(name), *found = cudaDriverEntryPointSuccess;
    return *function ? cudaSuccess : cudaErrorCallRequiresNewerDriver;
}

// Dynamic shared memory: where a kernel says `extern __shared__ … smem[]`, it is this. A library has one source file, so this may stand in a header.
alignas(1024) __attribute__((visibility("hidden"))) thread_local uint8_t smem[emulator::SHARED_MEMORY];

namespace emulator {
// A launch's arguments, and how a thread calls the kernel with them: each gets copies, which are its registers.
template <class... P>
struct Call {
    void (*kernel)(P...);
    std::tuple<P...> arguments;
    static void thread(void* self) {
        Call& call = *static_cast<Call*>(self);
        std::apply(call.kernel, call.arguments);
    }
};
template <class... P, class... A>
inline void launch(void (*kernel)(P...), dim3 blocks, int threads, int dynamic_bytes, cudaStream_t, const A&... arguments) {
    Call<P...> call{kernel, std::tuple<P...>(arguments...)};
    run(Grid{{blocks.x, blocks.y, blocks.z}, threads, dynamic_bytes}, smem, reinterpret_cast<void*>(kernel), Call<P...>::thread, &call, sizeof call);
}
}  // namespace emulator

// What the exercises share: how check.py hands a problem to a kernel, and how it starts one.
#pragma once

#include "common.cuh"

struct Problem {
    const void* in[3];
    void* out;
    int* log;  // for what a kernel notes on its way
    int n[4];  // sizes
    int device;
    cudaStream_t stream;
};

// Each exercise defines it: starts its kernel, and returns a cudaError_t.
extern "C" int exercise(const Problem* problem);

template <class... P, class... A>
inline int start(void (*kernel)(P...), int blocks, int threads, int smem_bytes, const Problem& p, const A&... arguments) {
    DeviceGuard guard(p.device);
    if (smem_bytes) {
        const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
        if (error != cudaSuccess) return error;
    }
    launch_kernel(kernel, blocks, threads, smem_bytes, p.stream, arguments...);
    return cudaGetLastError();
}

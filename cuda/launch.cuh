// How a kernel is launched, written once, because only nvcc knows the <<<…>>> syntax. With another compiler the kernel runs on the CPU (emulator/).
#pragma once

#include <cuda_runtime.h>

template <class... P, class... A>
inline void launch_kernel(void (*kernel)(P...), dim3 blocks, int threads, int smem_bytes, cudaStream_t stream, const A&... arguments) {
#ifdef __CUDACC__
    kernel<<<blocks, threads, smem_bytes, stream>>>(arguments...);
#else
    emulator::launch(kernel, blocks, threads, smem_bytes, stream, arguments...);
#endif
}

// The same for a kernel that directly follows another one of this file: on sm_90 its blocks may start while the other's last blocks still run, and
// wait for the other kernel's end themselves (griddepcontrol_wait).
constexpr bool LAUNCHED_EARLY = ARCH >= 90;
template <class... P, class... A>
inline void launch_early(void (*kernel)(P...), dim3 blocks, int threads, int smem_bytes, cudaStream_t stream, const A&... arguments) {
#ifdef __CUDACC__
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = LAUNCHED_EARLY;
    cudaLaunchConfig_t config{};
    config.gridDim = blocks, config.blockDim = dim3(threads), config.dynamicSmemBytes = smem_bytes, config.stream = stream;
    config.attrs = &attribute, config.numAttrs = LAUNCHED_EARLY;
    cudaLaunchKernelEx(&config, kernel, arguments...);
#else
    emulator::next_launch_is_early(LAUNCHED_EARLY);
    launch_kernel(kernel, blocks, threads, smem_bytes, stream, arguments...);
#endif
}

// Early or not.
template <class... P, class... A>
inline void launch_early_if(bool early, void (*kernel)(P...), dim3 blocks, int threads, int smem_bytes, cudaStream_t stream, const A&... arguments) {
    if (early) launch_early(kernel, blocks, threads, smem_bytes, stream, arguments...);
    else launch_kernel(kernel, blocks, threads, smem_bytes, stream, arguments...);
}

// Calls `launch` while `device` is the current device, restores the previous one, and returns its result.
template <class Launch>
inline cudaError_t on_device(int device, Launch launch) {
    int before;
    cudaError_t error = cudaGetDevice(&before);
    if (error == cudaSuccess && before != device) error = cudaSetDevice(device);
    if (error != cudaSuccess) return error;
    error = launch();
    if (before != device) cudaSetDevice(before);
    return error;
}

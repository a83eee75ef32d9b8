// How a kernel is launched: written once, because nvcc alone knows the <<<…>>> of it. Another compiler runs the kernel on this machine (emulator/).
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

// The same for a kernel that follows another of this file closely: on sm_90 its blocks may take their places while the other's last blocks
// run, and wait for the other's end themselves (griddepcontrol_wait).
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
    launch_kernel(kernel, blocks, threads, smem_bytes, stream, arguments...);
#endif
}

// What `launch` returns, called while `device` is the current one; then the one before is current again.
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

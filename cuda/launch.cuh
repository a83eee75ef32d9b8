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

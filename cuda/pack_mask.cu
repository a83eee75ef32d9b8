// Packs a mask of bytes into bits, for the kernels that read 32 columns at a time: 8 times less to read, in a layout that fits fragments.
//
// A warp reads 128 columns of a row, 32 consecutive ones at a time; a ballot turns 32 answers into a word. Broadcast dimensions are packed once:
// Python passes 1 for their size, and stride 0 to the kernels that read the result.
#include <cuda_runtime.h>
#include <stdint.h>

struct PackParams {
    const uint8_t* mask;                             // bool [B, H, Nq, Nk], any strides
    int64_t stride_b, stride_h, stride_i, stride_j;
    uint32_t* bits;                                  // [B, H, Nq, 4 · row_blocks]: rows padded with 0 to a multiple of 128 columns
    int32_t B, H, Nq, Nk;
    int32_t device;
    cudaStream_t stream;
};

constexpr int WARPS = 8;

__global__ void pack_mask_kernel(const __grid_constant__ PackParams p, int row_blocks) {
    const int lane = threadIdx.x % 32;
    const int64_t block = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;  // 128 columns of one row
    const int64_t row = block / row_blocks;
    if (row >= static_cast<int64_t>(p.B) * p.H * p.Nq) return;
    const int64_t i = row % p.Nq, h = row / p.Nq % p.H, b = row / p.Nq / p.H;
    const uint8_t* mask = p.mask + b * p.stride_b + h * p.stride_h + i * p.stride_i;
    const int j0 = static_cast<int>(block % row_blocks) * 128;
    uint32_t word = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        const int j = j0 + 32 * w + lane;
        const uint32_t ballot = __ballot_sync(0xffffffff, j < p.Nk && mask[j * p.stride_j]);
        if (lane == w) word = ballot;
    }
    if (lane < 4) p.bits[block * 4 + lane] = word;
}

extern "C" int pack_mask(const PackParams* params) {
    int before;
    cudaError_t error = cudaGetDevice(&before);
    if (error == cudaSuccess && before != params->device) error = cudaSetDevice(params->device);
    if (error != cudaSuccess) return error;
    const int row_blocks = (params->Nk + 127) / 128;
    const int64_t blocks = static_cast<int64_t>(params->B) * params->H * params->Nq * row_blocks;
    pack_mask_kernel<<<static_cast<unsigned>((blocks + WARPS - 1) / WARPS), WARPS * 32, 0, params->stream>>>(*params, row_blocks);
    error = cudaGetLastError();
    if (before != params->device) cudaSetDevice(before);
    return error;
}

extern "C" int64_t params_size(void) { return sizeof(PackParams); }
extern "C" const char* error_name(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

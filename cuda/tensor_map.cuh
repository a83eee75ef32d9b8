// Tensor maps: how the copy engine finds a box of a (B, H, N, D) tensor. Made on the host, passed to the kernel by value.
#pragma once

#include <cuda.h>  // types only: the one function is looked up in the loaded driver, and nothing is linked

#include "common.cuh"

// In a ring of STAGES stages: the stage of the n-th tile, and the parity of the barriers' phase in which it is filled and emptied.
template <int STAGES>
struct Slot {
    int stage, parity;
    __device__ explicit Slot(unsigned n) : stage(n % STAGES), parity(n / STAGES & 1) {}
};

// Boxes of `rows` rows and `columns` columns. What lies beyond N or D arrives as zeros. Broadcast dimensions have stride 0.
inline cudaError_t encode_tensor_map(CUtensorMap* map, CUtensorMapDataType type, CUtensorMapSwizzle swizzle, const Tensor4& t, int B, int H, int N, int D,
                                     int rows, int columns) {
    static const auto encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
        const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
        const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
        return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function) : nullptr;
    }();
    if (encode == nullptr) return cudaErrorCallRequiresNewerDriver;
    const int element_bytes = type == CU_TENSOR_MAP_DATA_TYPE_UINT32 ? 4 : 2;
    // The stride of a dimension of size 1 may be anything, but the encoder requires a multiple of 16 bytes.
    auto bytes = [=](int64_t stride, int size) { return cuuint64_t(size == 1 ? 16 : stride * element_bytes); };
    const cuuint64_t sizes[4] = {cuuint64_t(D), cuuint64_t(N), cuuint64_t(H), cuuint64_t(B)};
    const cuuint64_t strides[3] = {bytes(t.stride_n, N), bytes(t.stride_h, H), bytes(t.stride_b, B)};
    const cuuint32_t box[4] = {cuuint32_t(columns), cuuint32_t(rows), 1, 1}, ones[4] = {1, 1, 1, 1};
    const CUresult result = encode(map, type, 4, t.data, sizes, strides, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Of q, k, v or dO: panels of 64 columns, swizzled as wgmma reads them (swizzle.cuh).
inline cudaError_t make_tensor_map(CUtensorMap* map, const Tensor4& t, int B, int H, int N, int D, int rows) {
    const auto type = DTYPE == FLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    return encode_tensor_map(map, type, CU_TENSOR_MAP_SWIZZLE_128B, t, B, H, N, D, rows, 64);
}

// A tensor map, as the emulator stores it in the 128 bytes of a CUtensorMap.
#pragma once

#include <stdint.h>

#include "include/cuda.h"

namespace emulator {

struct TensorMap {
    uint64_t magic;
    uint8_t* data;
    uint32_t sizes[4];    // elements: columns, rows, heads, batches
    uint64_t strides[3];  // bytes from row to row, head to head, batch to batch
    uint16_t box[4];
    uint32_t element_bytes;
    bool swizzled;  // CU_TENSOR_MAP_SWIZZLE_128B

    int box_bytes() const { return box[0] * box[1] * box[2] * box[3] * element_bytes; }
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));
constexpr uint64_t TENSOR_MAP = 0x70616d726f736e65;

// The address in shared memory of a byte under a 128-byte swizzle, which permutes the 16-byte chunks within each 128 bytes.
constexpr uint32_t swizzled_128(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

CUresult encode_tensor_map(CUtensorMap*, CUtensorMapDataType, cuuint32_t rank, void* address, const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                           const cuuint32_t* element_strides, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

}  // namespace emulator

// The mask in the hopper kernels: a tile of bits for each tile of S. The copy engine loads it, as it loads K or Q, from what pack_mask.cu has
// written. Each score's accumulator starts from 0, or, where the mask hides, from about −2¹²⁷, so large that adding any score changes nothing.
#pragma once

#include "keep_bits.cuh"
#include "tensor_map.cuh"

// The 128 bits that are loaded for one row of the tile. It may need only half of them, but the engine copies no less. A set bit hides.
struct alignas(16) BitRow {
    uint32_t word[4];
};
constexpr int BIT_COLUMNS = 128;

// Whether all queries share one row of the mask.
__host__ __device__ inline bool one_row(const AttentionParams& p) { return p.mask.stride_i == 0; }

// The tensor map of the mask's rows of words; a box has `rows` of them. A row belongs to a query (MASK_OF_BITS) or to a key (MASK_OF_KEY_BITS). A row that
// all queries share is copied once; otherwise every multiprocessor would load the same 16 bytes over and over.
inline cudaError_t make_mask_map(CUtensorMap* map, const AttentionParams& p, int rows) {
    const bool by_keys = MASK == MASK_OF_KEY_BITS;
    const int columns = by_keys ? p.Nq : p.Nk;
    const Tensor4 words = {const_cast<void*>(p.mask.data), p.mask.stride_b, p.mask.stride_h, by_keys ? p.mask.stride_j : p.mask.stride_i};
    return encode_tensor_map(map, CU_TENSOR_MAP_DATA_TYPE_UINT32, CU_TENSOR_MAP_SWIZZLE_NONE, words, p.B, p.H, by_keys ? p.Nk : p.Nq,
                             by_keys && one_row(p) ? 4 : (columns + BIT_COLUMNS - 1) / BIT_COLUMNS * 4, !by_keys && one_row(p) ? 1 : rows, 4);
}

// Initialises this lane's part of two rows of accumulators, columns 8n + 2t and 8n + 2t + 1 of the tile. Their bits are rows `row` and row + step; the tile
// begins `first` columns into the bits. more(r, w): further hidden columns of the r-th row, from 32·w on.
template <int COLUMNS, class More>
__device__ inline void start_S(float (&S)[COLUMNS / 2], const uint8_t* tile, int first, int row, int step, int t, More more) {
    static_assert(BIT_COLUMNS % COLUMNS == 0, "a tile's bits lie in one row");
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const uint32_t* words = reinterpret_cast<const BitRow*>(tile)[row + step * r].word + first / 32;
#pragma unroll
        for (int w = 0; w < COLUMNS / 32; ++w) {
            start_sums(words[w] | more(r, w), t, [&](int n, int c) -> float& { return S[4 * (4 * w + n) + 2 * r + c]; });
        }
    }
}

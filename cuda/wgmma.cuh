// What the teaching rungs on wgmma share, forward_3b_wgmma.cu and those above it: the two products of a warpgroup, issued but not awaited.
#pragma once

#include "mma.cuh"
#include "ptx_hopper.cuh"
#include "swizzle.cuh"

static_assert(HEAD_DIM % 64 == 0, "a panel has 64 columns");

// The accumulators of wgmma: each warp has 16 rows, and its registers are laid out like those of consecutive mma.sync. What softmax, hide() and
// store_rows() access as X[n][2r + e] is wgmma's register 4n + 2r + e.
template <int N>
__device__ inline float (&flat(float (&X_rmem)[N][4]))[4 * N] {
    return reinterpret_cast<float (&)[4 * N]>(X_rmem);
}

// S = A Bᵀ, summed over the head size: 64 rows of A from A_smem on, all rows of B. Both are read from shared memory by their descriptors, 16
// columns of the head, 32 bytes, a step; after four steps the next panel begins.
template <class Tile_A, class Tile_B>
__device__ inline void issue_product_transposed(float (&S_rmem)[Tile_B::ROWS / 8][4], uint32_t A_smem, uint32_t B_smem) {
    ptx::wgmma_fence();  // earlier accesses of this thread to these registers are complete
#pragma unroll
    for (int d = 0; d < HEAD_DIM / 16; ++d)
        ptx::wgmma_ss<element, Tile_B::ROWS>(flat(S_rmem), ptx::descriptor(A_smem + d / 4 * Tile_A::PANEL_BYTES + d % 4 * 32),
                                             ptx::descriptor(B_smem + d / 4 * Tile_B::PANEL_BYTES + d % 4 * 32), d > 0);
    ptx::wgmma_commit_group();
}

// P, rounded to the A operand of the next product: one fragment for every 16 keys.
template <int K_STEPS>
__device__ inline void round_P(uint32_t (&P_rmem)[K_STEPS][4], const float (&S_rmem)[2 * K_STEPS][4]) {
#pragma unroll
    for (int k = 0; k < K_STEPS; ++k) round_fragment(P_rmem[k], S_rmem[2 * k], S_rmem[2 * k + 1]);
}

// X += P B: P from registers, 16 rows of B a step from shared memory.
template <class Tile_B>
__device__ inline void issue_product(float (&X_rmem)[D_TILES][4], const uint32_t (&P_rmem)[Tile_B::ROWS / 16][4], uint32_t B_smem) {
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < Tile_B::ROWS / 16; ++k)
        ptx::wgmma_rs<element, HEAD_DIM>(flat(X_rmem), P_rmem[k], ptx::descriptor(B_smem + k * 16 * ROW_BYTES, Tile_B::PANEL_BYTES));
    ptx::wgmma_commit_group();
}

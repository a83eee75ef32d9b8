// The two matrix products of mma.cuh, from swizzled tiles (swizzle.cuh): what forward_2b_swizzle.cu and forward_2c_cp_async.cu share. Only the
// addresses that lanes give to ldmatrix differ.
#pragma once

#include "mma.cuh"
#include "swizzle.cuh"

static_assert(HEAD_DIM % 64 == 0, "a panel has 64 columns");

// S += A Bᵀ, summed over the head size: A is the warp's 16 rows, from row `warp_row` on. Bᵀ's columns are rows of B_smem.
template <class Tile_A, class Tile_B>
__device__ inline void add_product_transposed(float (&S_rmem)[Tile_B::ROWS / 8][4], uint32_t A_smem, int warp_row, uint32_t B_smem) {
    const int lane = threadIdx.x % 32;
    const uint32_t A_lane = A_smem + Tile_A::lane_a(warp_row, lane), B_lane = B_smem + Tile_B::lane_b(0, lane);
#pragma unroll
    for (int d = 0; d < HEAD_DIM / 16; ++d) {
        uint32_t a_rmem[4];  // [16, 16]
        ptx::ldmatrix_x4(a_rmem, Tile_A::step(A_lane, d));
#pragma unroll
        for (int n = 0; n < Tile_B::ROWS; n += 16) {
            uint32_t b_rmem[4];  // two fragments [16, 8] of Bᵀ
            ptx::ldmatrix_x4(b_rmem, Tile_B::step(B_lane, d) + n * ROW_BYTES);
            ptx::mma_m16n8k16<element>(S_rmem[n / 8], a_rmem, b_rmem[0], b_rmem[1]);
            ptx::mma_m16n8k16<element>(S_rmem[n / 8 + 1], a_rmem, b_rmem[2], b_rmem[3]);
        }
    }
}

// X += P B, summed over the rows of B_smem, which ldmatrix transposes on the way.
template <class Tile_B>
__device__ inline void add_product(float (&X_rmem)[D_TILES][4], const float (&P_rmem)[Tile_B::ROWS / 8][4], uint32_t B_smem) {
    const uint32_t B_lane = B_smem + Tile_B::lane_b_trans(threadIdx.x % 32);
#pragma unroll
    for (int n = 0; n < Tile_B::ROWS; n += 16) {
        uint32_t p_rmem[4];  // [16, 16]
        round_fragment(p_rmem, P_rmem[n / 8], P_rmem[n / 8 + 1]);
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 16; ++d) {
            uint32_t b_rmem[4];  // two fragments [16, 8] of B
            ptx::ldmatrix_x4_trans(b_rmem, Tile_B::step(B_lane, d) + n * ROW_BYTES);
            ptx::mma_m16n8k16<element>(X_rmem[2 * d], p_rmem, b_rmem[0], b_rmem[1]);
            ptx::mma_m16n8k16<element>(X_rmem[2 * d + 1], p_rmem, b_rmem[2], b_rmem[3]);
        }
    }
}

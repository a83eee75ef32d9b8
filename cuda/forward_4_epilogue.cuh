// The forward of `hopper`, last part, the epilogue: O /= l. Each warp writes its own rows to shared memory, from where the copy engine stores them.
#pragma once

#include "forward_4_softmax.cuh"

__device__ inline void write_O(const AttentionParams& p, const CUtensorMap& map, uint32_t O_smem, const Work& work, const Rows& rows, int lane, float scale_log2,
                               const float (&O_rmem)[V_HEAD_DIM / 2], const float (&m_rmem)[2], const float (&l_rmem)[2]) {
    float LSE[2], factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float l = row_sum(l_rmem[r]);
#if SCORE
        LSE[r] = (m_rmem[r] + ptx::lg2(l)) * LN_2;
        factor[r] = factor_of_scored_row(p, m_rmem[r], (DROPOUT ? p.keep_scale : 1.0f) * ptx::rcp(l));
#else
        LSE[r] = OPTIMISTIC ? (ptx::lg2(l * TO_M) - (shift_of(m_rmem[r], scale_log2) + BELOW_M)) * LN_2 : m_rmem[r] * p.scale + ptx::lg2(l) * LN_2;
        factor[r] = factor_of_row(p, m_rmem[r], scale_log2, (DROPOUT ? p.keep_scale : 1.0f) * ptx::rcp(l));
#endif
    }
    const int warp = uniform(ptx::tid_x() / 32) - 4;  // re-read here, so that values derived from it occupy no registers before
    const uint32_t O_rows = O_smem + warp * 16 * ROW_BYTES, O_lane = O_smem + Tile_O::lane_a(warp * 16, lane);
#pragma unroll
    for (int panel = 0; panel < V_PANELS; panel += O_PANELS) {
        if (lane == 0) ptx::cp_async_bulk_wait_group_read<0>();  // the previous contents have been stored
        __syncwarp();
#pragma unroll
        for (int k = 0; k < O_PANELS * 4; ++k) {
            const float* O = O_rmem + 32 * panel + 8 * k;
            uint32_t pairs[4] = {};  // zeros beyond the last column: not stored, but the engine reads them
            if (64 * panel + 16 * k < V_HEAD_DIM)
#pragma unroll
                for (int e = 0; e < 4; ++e) pairs[e] = ptx::cvt_pair<element>(O[2 * e] * factor[e % 2], O[2 * e + 1] * factor[e % 2]);
            ptx::stmatrix_x4(Tile_O::step(O_lane, k), pairs);
        }
        ptx::fence_proxy_async();  // for what this lane has stored
        __syncwarp();
        if (lane == 0) {
#pragma unroll
            for (int more = 0; more < O_PANELS; ++more)
#pragma unroll
                for (int row = 0; row < 16; row += O_ROWS)
                    ptx::cp_async_bulk_tensor_4d_store(&map, (panel + more) * 64, work.i0 + RowOrder::row(warp * 16 + row), work.h, work.b,
                                                       O_rows + more * Tile_O::PANEL_BYTES + row * ROW_BYTES);
            ptx::cp_async_bulk_commit_group();
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int i = work.i0 + rows.first + ROW_STEP * r;
        if (p.lse && rows.t == 0 && i < p.Nq) LSE_of(p, work, i) = LSE[r];
    }
}

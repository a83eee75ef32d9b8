// What the `mma` rungs (forward_2_mma.cu, backward_2_mma.cu) and, in part, the teaching rungs above them share: tiles in shared memory, the two matrix
// products, which scores are hidden, and stores.
//
// A block is four warps. Each owns 16 rows of a tile of scores, the height of one mma.sync, and all of its columns: its accumulators lie
// side by side. With g = l / 4 and t = l % 4, lane l holds in S_rmem[n][2r + e], where r and e are 0 or 1,
//
//     row g + 8r  ×  column 8n + 2t + e
//
// So a row lies in four neighbouring lanes, which find its maximum and its sum by shuffles.
#pragma once

#include "visible.cuh"

#if MASK || DROPOUT || INTERVAL || DTYPE == FLOAT32
#error "this rung serves float16 and bfloat16, and neither masks, intervals nor dropout"
#endif
static_assert(HEAD_DIM % 32 == 0 && HEAD_DIM <= 128, "the tiles must fit in the 48 KB that a kernel may declare");

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int WARP_ROWS = 16;
constexpr int D_TILES = HEAD_DIM / 8;  // 8-column tiles of O, dQ, dK and dV

// ---- tiles

// Shared memory: rows of HEAD_DIM elements, one after another. The eight rows that ldmatrix reads at once begin 128 or 256 bytes apart, and
// so at the same one of the 32 banks: they are read one by one instead of all eight at once (for head sizes 32 and 96, two by two). Each
// ldmatrix.x4 therefore takes 32 shared-memory cycles (or 16) instead of 4; the two mma.sync that it feeds take 4 cycles of an A100's tensor cores.
template <int N>
using Tile = element[N][HEAD_DIM];

// Rows [first, first + N) of one head, 16 bytes a thread at a time. What lies beyond `rows` or beyond D becomes 0.
template <int N>
__device__ inline void load_tile(Tile<N>& X_smem, const element* gmem, int64_t stride, int first, int rows, int D) {
    constexpr int CHUNKS = HEAD_DIM / 8;  // of 16 bytes, in a row
    static_assert(N * CHUNKS % THREADS == 0, "every thread copies as many chunks");
#pragma unroll
    for (int n = 0; n < N * CHUNKS / THREADS; ++n) {
        const int chunk = n * THREADS + threadIdx.x, row = chunk / CHUNKS, column = chunk % CHUNKS * 8;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (first + row < rows && column < D) x = *reinterpret_cast<const uint4*>(gmem + (first + row) * stride + column);
        *reinterpret_cast<uint4*>(&X_smem[row][column]) = x;
    }
}

// 16 rows of accumulators, rounded, to rows `first` and on of one head, a pair of columns at a time.
__device__ inline void store_rows(element* gmem, int64_t stride, int first, int rows, int D, const float (&X_rmem)[D_TILES][4]) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < D_TILES; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = first + g + 8 * r, column = 8 * n + 2 * t;
            if (row < rows && column < D)
                *reinterpret_cast<uint32_t*>(gmem + row * stride + column) = ptx::cvt_pair<element>(X_rmem[n][2 * r], X_rmem[n][2 * r + 1]);
        }
}

// Row g times the first factor, row g + 8 times the second.
__device__ inline void scale_rows(float (&X_rmem)[D_TILES][4], float factor_0, float factor_8) {
#pragma unroll
    for (int n = 0; n < D_TILES; ++n) {
        X_rmem[n][0] *= factor_0, X_rmem[n][1] *= factor_0;
        X_rmem[n][2] *= factor_8, X_rmem[n][3] *= factor_8;
    }
}

// ---- the two matrix products of simple.cuh, for one warp

// S += A Bᵀ, summed over the head size; A_smem points to the warp's 16 rows. Bᵀ's columns are rows of B_smem, read as they lie.
template <int N>
__device__ inline void add_product_transposed(float (&S_rmem)[N / 8][4], const element (*A_smem)[HEAD_DIM], const Tile<N>& B_smem) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int d = 0; d < HEAD_DIM; d += 16) {
        uint32_t a_rmem[4];  // [16, 16]: lanes 0–15 give the addresses of the rows of the left half, 16–31 of the right half
        ptx::ldmatrix_x4(a_rmem, ptx::smem_address(&A_smem[lane % 16][d + lane / 16 * 8]));
#pragma unroll
        for (int n = 0; n < N; n += 16) {
            uint32_t b_rmem[4];  // two fragments [16, 8] of Bᵀ: lanes 0–7 and 8–15 give the first's two halves, 16–31 the second's
            ptx::ldmatrix_x4(b_rmem, ptx::smem_address(&B_smem[n + lane / 16 * 8 + lane % 8][d + lane / 8 % 2 * 8]));
            ptx::mma_m16n8k16<element>(S_rmem[n / 8], a_rmem, b_rmem[0], b_rmem[1]);
            ptx::mma_m16n8k16<element>(S_rmem[n / 8 + 1], a_rmem, b_rmem[2], b_rmem[3]);
        }
    }
}

// Two neighbouring accumulators of P, rounded to pairs, are already laid out as the A operand [16, 16]: P goes through no memory.
__device__ inline void round_fragment(uint32_t (&p_rmem)[4], const float (&left)[4], const float (&right)[4]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) p_rmem[r] = ptx::cvt_pair<element>(left[2 * r], left[2 * r + 1]);
#pragma unroll
    for (int r = 0; r < 2; ++r) p_rmem[2 + r] = ptx::cvt_pair<element>(right[2 * r], right[2 * r + 1]);
}

// X += P B, summed over the rows of B_smem, which ldmatrix transposes on the way.
template <int N>
__device__ inline void add_product(float (&X_rmem)[D_TILES][4], const float (&P_rmem)[N / 8][4], const Tile<N>& B_smem) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < N; n += 16) {
        uint32_t p_rmem[4];  // [16, 16]
        round_fragment(p_rmem, P_rmem[n / 8], P_rmem[n / 8 + 1]);
#pragma unroll
        for (int d = 0; d < HEAD_DIM; d += 16) {
            uint32_t b_rmem[4];  // two fragments [16, 8] of B: lanes 0–15 give the addresses of the rows of the first, 16–31 of the second
            ptx::ldmatrix_x4_trans(b_rmem, ptx::smem_address(&B_smem[n + lane % 16][d + lane / 16 * 8]));
            ptx::mma_m16n8k16<element>(X_rmem[d / 8], p_rmem, b_rmem[0], b_rmem[1]);
            ptx::mma_m16n8k16<element>(X_rmem[d / 8 + 1], p_rmem, b_rmem[2], b_rmem[3]);
        }
    }
}

// ---- what may not be attended

// Scores beyond the last key or, if causal, in the future become −∞. The rows from row0 on are queries and the columns from column0 on
// keys; with KEYS_ARE_ROWS, the other way round.
template <bool KEYS_ARE_ROWS, int N_TILES>
__device__ inline void hide(float (&S_rmem)[N_TILES][4], const AttentionParams& p, int row0, int column0) {
    const int offset = diagonal(p);  // causal: row i sees columns j ≤ i + offset
    const int first_i = KEYS_ARE_ROWS ? column0 : row0;
    const int last_j = KEYS_ARE_ROWS ? row0 + WARP_ROWS - 1 : column0 + 8 * N_TILES - 1;
    if (last_j < p.Nk && (!CAUSAL || last_j <= first_i + offset)) return;  // wholly inside, and wholly in the past
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < N_TILES; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int row = row0 + g + 8 * r, column = column0 + 8 * n + 2 * t + e;
                const int i = KEYS_ARE_ROWS ? column : row, j = KEYS_ARE_ROWS ? row : column;
                if (j >= p.Nk || (CAUSAL && j > i + offset)) S_rmem[n][2 * r + e] = -CUDART_INF_F;
            }
}

// What those hopper backwards share that accumulate nothing in global memory: preparing Delta and LSE, the tiles that a block visits, Pᵀ from Sᵀ.
#pragma once

#include <algorithm>

#include "keep_bits.cuh"
#include "mask_start.cuh"
#include "ptx_hopper.cuh"
#include "swizzle.cuh"
#include "tensor_core.cuh"
#include "tensor_map.cuh"

#if DTYPE == FLOAT32 || (MASK && MASK != MASK_OF_KEY_BITS)
#error "this rung computes in 16-bit types, under masks of bits by keys"
#endif

constexpr int GROUP = 128;  // threads of a warpgroup
constexpr int CONSUMERS = 2;
constexpr int THREADS = GROUP * (1 + CONSUMERS);
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;  // all start with 168
constexpr int SMEM_LIMIT = SMEM_KB * 1024 - 1024;

extern __shared__ __align__(1024) uint8_t smem[];

// Waits for both groups.
__device__ inline void meet() { ptx::bar_sync(1, CONSUMERS * GROUP); }

// ---- before: LSE in base 2 and Delta = rowsum(dO∘O) − dLSE (Algorithm 2, line 4), for every row, padded to whole tiles

constexpr int PADDED_TO = 128;

struct Workspace {
    float *LSE, *Delta;  // [B·H·rows] each
    int rows;            // of one head

    __host__ __device__ explicit Workspace(const AttentionParams& p) : rows((p.Nq + PADDED_TO - 1) / PADDED_TO * PADDED_TO) {
        LSE = p.workspace, Delta = LSE + static_cast<int64_t>(p.B) * p.H * rows;
    }
    static int64_t all_rows(const AttentionParams& p) { return tiles_of(p.Nq, PADDED_TO) * PADDED_TO * p.H * p.B; }
};

constexpr int PREPARE_ROWS = 8;  // of a block, one a warp

__global__ void __launch_bounds__(32 * PREPARE_ROWS) prepare_kernel(const __grid_constant__ AttentionParams p) {
    const Workspace workspace(p);
    const int blocks_per_head = workspace.rows / PREPARE_ROWS, lane = threadIdx.x % 32;
    const int i = blockIdx.x % blocks_per_head * PREPARE_ROWS + threadIdx.x / 32;
    const int bh = blockIdx.x / blocks_per_head, b = bh / p.H, h = bh % p.H;

    float Delta = 0;
    for (int column = lane * 8; i < p.Nq && column < p.Dv; column += 32 * 8) {
        const uint4 O_rmem = *reinterpret_cast<const uint4*>(head_of(p.o, b, h) + i * p.o.stride_n + column);
        const uint4 dO_rmem = *reinterpret_cast<const uint4*>(head_of(p.d_o, b, h) + i * p.d_o.stride_n + column);
        const element *O = reinterpret_cast<const element*>(&O_rmem), *dO = reinterpret_cast<const element*>(&dO_rmem);
#pragma unroll
        for (int d = 0; d < 8; ++d) Delta = fmaf(static_cast<float>(O[d]), static_cast<float>(dO[d]), Delta);
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) Delta += __shfl_xor_sync(0xffffffff, Delta, lanes);

    if (lane == 0) {
        const int64_t row = static_cast<int64_t>(bh) * workspace.rows + i, row_gmem = static_cast<int64_t>(bh) * p.Nq + i;
        const float LSE = i < p.Nq ? p.lse[row_gmem] : -CUDART_INF_F;
        if (i < p.Nq && p.d_lse) Delta -= p.d_lse[row_gmem];
        // A row that attends nothing, or lies beyond the end: P = 2^(S − ∞) = 0, and what comes back to it, NaN too, is dropped.
        const bool dead = LSE == -CUDART_INF_F;
        workspace.LSE[row] = dead ? CUDART_INF_F : LSE * LOG2_E;
        if (dead) Delta = 0;
        workspace.Delta[row] = DROPOUT ? Delta / p.keep_scale : Delta;  // with dropout, dS / keep_scale is computed
    }
}

// ---- which tiles a block visits

// The tiles of BLOCK queries that see some of the keys from j0 on, of every query head that shares them: head h, first row i0, and its number n.
template <int BLOCK>
struct QueryVisit {
    int begin, end, end_h;
    int h, i0, n = 0;

    __device__ QueryVisit(const AttentionParams& p, int j0, int kv_h) {
        const int group = p.H / p.Hkv;
        begin = CAUSAL ? max(0, j0 - (p.Nk - p.Nq)) / BLOCK * BLOCK : 0;
        end = p.Nq, end_h = (kv_h + 1) * group;
        h = begin < end ? kv_h * group : end_h;
        i0 = begin;
    }
    __device__ bool more() const { return h < end_h; }
    __device__ void advance() {
        i0 += BLOCK;
        if (i0 >= end) i0 = begin, ++h;
        ++n;
    }
};

// A thread's view of Sᵀ or dPᵀ of 64 keys.
struct Lane {
    int t, place, first_row;  // this thread has the keys at two places of the tile, `place` and the one 8 further: keys first_row and first_row + ROW_STEP

    __device__ explicit Lane(int tile_row) : t(threadIdx.x % 4), place(tile_row + threadIdx.x % GROUP / 32 * 16 + threadIdx.x % 32 / 4), first_row(RowOrder::row(place)) {}
};

// Whether some of `keys` keys from j0 on is not seen by all rows from i0 on.
__device__ inline bool is_cut(const AttentionParams& p, int i0, int j0, int keys) { return j0 + keys > min(p.Nk, CAUSAL ? i0 + p.Nk - p.Nq + 1 : p.Nk); }

#if MASK
// Sᵀ's sums start from the mask. Key j is seen by the rows from j − offset on.
template <int BLOCK>
__device__ inline void start_from_mask(float (&S_rmem)[BLOCK / 2], const AttentionParams& p, const uint8_t* mask, const Lane& lane, int i0, int j0, bool cut) {
    start_S<BLOCK>(S_rmem, mask, i0 % BIT_COLUMNS, lane.first_row, ROW_STEP, lane.t, [&](int r, int w) {
        const int j = j0 + lane.first_row + ROW_STEP * r;
        return !cut ? 0 : j >= p.Nk ? ~0u : CAUSAL ? first_bits(j - (p.Nk - p.Nq) - i0 - 32 * w) : 0;
    });
}
#endif

// Sᵀ of columns 8n … becomes Pᵀ = exp(scale · Sᵀ − LSE), 0 beyond the diagonal or the end of the keys. Beyond the end of the rows LSE is ∞.
template <int N>
__device__ inline void make_P(float (&S_rmem)[N], const AttentionParams& p, const float* LSE_smem, const Lane& lane, int n, int i0, int j0, bool cut) {
    const float scale_log2 = p.scale * LOG2_E;  // exp(scale · x) = 2^(scale_log2 · x)
    const float2 LSE = *reinterpret_cast<const float2*>(LSE_smem + 8 * n + 2 * lane.t);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float &P0 = S_rmem[4 * n + 2 * r], &P1 = S_rmem[4 * n + 2 * r + 1];
        P0 = ptx::ex2(fmaf(P0, scale_log2, -LSE.x));
        P1 = ptx::ex2(fmaf(P1, scale_log2, -LSE.y));
        if (!MASK && cut) {
            const int j = j0 + lane.first_row + ROW_STEP * r, i = i0 + 8 * n + 2 * lane.t, offset = p.Nk - p.Nq;
            if (j >= p.Nk || (CAUSAL && j > i + offset)) P0 = 0;
            if (j >= p.Nk || (CAUSAL && j > i + 1 + offset)) P1 = 0;
        }
    }
}

// 64 or more rows of one panel of 64 columns, from row `first` and column `column` on.
template <class Tile, class Order>
__device__ inline void load_panel(uint32_t smem, const CUtensorMap& map, int column, int first, int h, int b, uint32_t full) {
#pragma unroll 1
    for (int position = 0; position < Tile::ROWS; position += BOX_ROWS<Tile, Order>)
        ptx::cp_async_bulk_tensor_4d(smem + position * ROW_BYTES, &map, column, first + Order::row(position), h, b, full);
}

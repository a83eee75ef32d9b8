// The gradient of a bias, in its own shape, after backward_kernel of backward_4_hopper.cu: what S and dP say once more, summed over all that the bias is
// broadcast over.
//
// A block owns 64 rows × BLOCK_K keys of the bias, or of a bias with one row for all queries BLOCK_K keys. It meets every batch, head and tile of queries
// that shares them, in one order, and keeps the sum in registers: no matrix of scores is written but the bias' own, and the bits are the same each time.
// A warp copies; two groups have 64 keys each, as in backward_kernel.
//
// Serves calls without a mask, dropout and intervals; of others it refuses the launch.
#pragma once

#include "backward_hopper.cuh"

#if (SCORE & SCORE_BIAS) && !MASK && !DROPOUT && !INTERVAL
constexpr int DBIAS_THREADS = CONSUMERS * GROUP + 32;
constexpr int DBIAS_STAGE_BYTES = 2 * Tile_K::BYTES + 2 * Tile_Q::BYTES;
constexpr int DBIAS_SMEM_BYTES = STAGES * (DBIAS_STAGE_BYTES + 2 * ROWS_BYTES) + Tile_bias::BYTES;
static_assert(DBIAS_SMEM_BYTES <= SMEM_KB * 1024 - 1024, "choose smaller tiles");

// The tiles of queries that share the block's part of the bias: of each batch, of each head, from the first row on.
struct SharedBy {
    int b, h, tile, n = 0;
    const int first_b, end_b, first_h, end_h, first_tile, end_tile;

    __device__ SharedBy(const AttentionParams& p, int own_b, int own_h, int own_tile, int j0)
        : first_b(p.scoring.bias_b == 1 ? 0 : own_b),
          end_b(p.scoring.bias_b == 1 ? p.B : own_b + 1),
          first_h(p.scoring.bias_h == 1 ? 0 : own_h),
          end_h(p.scoring.bias_h == 1 ? p.H : own_h + 1),
          first_tile(max(one_bias_row(p) ? 0 : own_tile, first_row_of(p, j0) / BLOCK_Q)),  // causal: rows before see none of the keys
          end_tile(one_bias_row(p) ? (p.Nq + BLOCK_Q - 1) / BLOCK_Q : own_tile + 1) {
        b = first_tile < end_tile ? first_b : end_b, h = first_h, tile = first_tile;
    }
    __device__ bool more() const { return b < end_b; }
    __device__ void advance() {
        ++n;
        if (++tile < end_tile) return;
        tile = first_tile;
        if (++h < end_h) return;
        h = first_h, ++b;
    }
    __device__ Slot<STAGES> slot() const { return Slot<STAGES>(n); }
};

__global__ void __launch_bounds__(DBIAS_THREADS, 1) dbias_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Maps maps) {
    extern __shared__ __align__(1024) uint8_t smem[];  // STAGES × (K, V [BLOCK_K, HEAD_DIM], Q, dO [BLOCK_Q, HEAD_DIM]), bias [BLOCK_Q, BLOCK_K], rows
    __shared__ __align__(8) uint64_t full[STAGES], empty[STAGES], bias_full;
    constexpr int BIAS_AT = STAGES * DBIAS_STAGE_BYTES, ROWS_AT = BIAS_AT + Tile_bias::BYTES;
    const uint32_t tiles = ptx::smem_address(smem);
    auto barrier = [](uint64_t* of, int stage) { return ptx::smem_address(of + stage); };

    const Scoring& bias = p.scoring;
    const bool one_row = one_bias_row(p);
    const int j_tiles = (p.Nk + BLOCK_K - 1) / BLOCK_K, i_tiles = one_row ? 1 : (p.Nq + BLOCK_Q - 1) / BLOCK_Q;
    int block = blockIdx.x;
    const int j0 = block % j_tiles * BLOCK_K;
    const int own_tile = (block /= j_tiles) % i_tiles, own_h = (block /= i_tiles) % bias.bias_h, own_b = block / bias.bias_h;

    if (threadIdx.x == 0) {
        ptx::mbarrier_init(ptx::smem_address(&bias_full), 1);
        for (int stage = 0; stage < STAGES; ++stage) {
            ptx::mbarrier_init(barrier(full, stage), 1);
            ptx::mbarrier_init(barrier(empty, stage), CONSUMERS * GROUP);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();

    const int warp_of_block = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
    SharedBy now(p, own_b, own_h, own_tile, j0);
    if (warp_of_block == 4 * CONSUMERS) {
        // ---- one thread asks for the bias once, and for the tiles of every visit
        if (lane > 0) return;
        const Workspace workspace(p);
        const uint32_t of_bias = ptx::smem_address(&bias_full);
        ptx::mbarrier_arrive_expect_tx(of_bias, one_row ? Tile_bias::PANELS * ROW_BYTES : Tile_bias::BYTES);
        for (int panel = 0; panel < Tile_bias::PANELS; ++panel)
            ptx::cp_async_bulk_tensor_4d(tiles + BIAS_AT + panel * Tile_bias::PANEL_BYTES, &maps.bias, j0 + panel * BIAS_PANEL, own_tile * BLOCK_Q, own_h, own_b,
                                         of_bias);
        for (; now.more(); now.advance()) {
            const Slot<STAGES> slot = now.slot();
            const int i0 = now.tile * BLOCK_Q, kv_h = kv_head(p, now.h);
            const int64_t row = (static_cast<int64_t>(now.b) * p.H + now.h) * workspace.rows + i0;
            const uint32_t to = tiles + slot.stage * DBIAS_STAGE_BYTES, rows = tiles + ROWS_AT + slot.stage * 2 * ROWS_BYTES;
            const uint32_t when = barrier(full, slot.stage);
            ptx::mbarrier_wait(barrier(empty, slot.stage), slot.parity ^ 1);  // passes at once in the first round
            ptx::mbarrier_arrive_expect_tx(when, DBIAS_STAGE_BYTES + 2 * ROWS_BYTES);
            load_boxes<Tile_K>(to, maps.k, j0, kv_h, now.b, when);
            load_boxes<Tile_Q>(to + 2 * Tile_K::BYTES, maps.q, i0, now.h, now.b, when);
            ptx::cp_async_bulk(rows, workspace.LSE + row, ROWS_BYTES, when);
            load_boxes<Tile_K>(to + Tile_K::BYTES, maps.v, j0, kv_h, now.b, when);
            load_boxes<Tile_Q>(to + 2 * Tile_K::BYTES + Tile_Q::BYTES, maps.d_o, i0, now.h, now.b, when);
            ptx::cp_async_bulk(rows + ROWS_BYTES, workspace.Delta + row, ROWS_BYTES, when);
        }
        return;
    }

    // ---- the groups: 64 keys each
    const int consumer = warp_of_block / 4, warp = warp_of_block % 4, t = lane % 4;
    const int place = consumer * 64 + warp * 16 + lane / 4;  // this lane's keys are j0 + place and 8 further
    const uint8_t* bias_tile = smem + BIAS_AT;
    const float unit = unit_log2(p);
    float sum_rmem[BLOCK_Q / 2] = {};  // [64 keys, BLOCK_Q], as the accumulators lie
    ptx::mbarrier_wait(ptx::smem_address(&bias_full), 0);
    for (; now.more(); now.advance()) {
        const Slot<STAGES> slot = now.slot();
        const int i0 = now.tile * BLOCK_Q;
        const uint32_t K_tile = tiles + slot.stage * DBIAS_STAGE_BYTES, Q_tile = K_tile + 2 * Tile_K::BYTES;
        const float* LSE_smem = reinterpret_cast<const float*>(smem + ROWS_AT + slot.stage * 2 * ROWS_BYTES) + 2 * t;
        const float* Delta_smem = LSE_smem + BLOCK_Q;
        float S_rmem[BLOCK_Q / 2], dP_rmem[BLOCK_Q / 2];
        auto multiply = [&](float(&C)[BLOCK_Q / 2], uint32_t A, uint32_t B) {
            const uint64_t a = ptx::descriptor(uniform(A + consumer * 64 * ROW_BYTES)), b = ptx::descriptor(uniform(B));
            ptx::wgmma_fence();
#pragma unroll
            for (int d = 0; d < HEAD_DIM / 16; ++d)
                ptx::wgmma_ss<element, BLOCK_Q>(C, ptx::advance(a, d / 4 * Tile_K::PANEL_BYTES + d % 4 * 32),
                                                ptx::advance(b, d / 4 * Tile_Q::PANEL_BYTES + d % 4 * 32), d > 0);
            ptx::wgmma_commit_group();
        };
        ptx::mbarrier_wait(barrier(full, slot.stage), slot.parity);
        multiply(S_rmem, K_tile, Q_tile);
        multiply(dP_rmem, K_tile + Tile_K::BYTES, Q_tile + Tile_Q::BYTES);
        if (now.n > 0) ptx::mbarrier_arrive(barrier(empty, Slot<STAGES>(now.n - 1).stage));  // these products come after what was read there
        const float slope = SLOPED ? slope_of_head(p, now.b, now.h) : 0;
        const bool cut = j0 + BLOCK_K > min(p.Nk, CAUSAL ? i0 + diagonal(p) + 1 : p.Nk);
        ptx::wgmma_wait_group<1>();  // S is there
        score_keys<BLOCK_Q>(
            S_rmem, p, slope, i0, i0 + 2 * t, j0, j0 + place,
            [&](int n, uint32_t(&pairs)[4]) {
                const int row = one_row ? 0 : 8 * n + lane % 8 + lane / 16 * 8;
                ptx::ldmatrix_x4_trans(pairs, ptx::smem_address(bias_tile) + Tile_bias::offset(row, (consumer * 4 + warp) * 2 + lane / 8 % 2));
            },
            [&](int n, int r, const float(&x)[2], const float(&)[2]) {
                const float2 LSE = *reinterpret_cast<const float2*>(LSE_smem + 8 * n);
                const int j = j0 + place + 8 * r, i = i0 + 8 * n + 2 * t;
                const bool beyond = cut && j >= p.Nk;
                S_rmem[4 * n + 2 * r] = beyond || (CAUSAL && cut && j > i + diagonal(p)) ? 0 : ptx::ex2(fmaf(x[0], unit, -LSE.x));
                S_rmem[4 * n + 2 * r + 1] = beyond || (CAUSAL && cut && j > i + 1 + diagonal(p)) ? 0 : ptx::ex2(fmaf(x[1], unit, -LSE.y));
            });
        ptx::wgmma_wait_group<0>();  // so is dP
#pragma unroll
        for (int n = 0; n < BLOCK_Q / 8; ++n) {
            const float2 Delta = *reinterpret_cast<const float2*>(Delta_smem + 8 * n);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int e = 4 * n + 2 * r;
                sum_rmem[e] = fmaf(S_rmem[e], dP_rmem[e] - Delta.x, sum_rmem[e]);
                sum_rmem[e + 1] = fmaf(S_rmem[e + 1], dP_rmem[e + 1] - Delta.y, sum_rmem[e + 1]);
            }
        }
    }

    element* dBias = static_cast<element*>(bias.d_bias) + (static_cast<int64_t>(own_b) * bias.bias_h + own_h) * bias.bias_i * p.Nk;
    if (one_row) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float sum = 0;
#pragma unroll
            for (int n = 0; n < BLOCK_Q / 8; ++n) sum += sum_rmem[4 * n + 2 * r] + sum_rmem[4 * n + 2 * r + 1];
            sum += __shfl_xor_sync(0xffffffff, sum, 1);
            sum += __shfl_xor_sync(0xffffffff, sum, 2);
            if (t == 0 && j0 + place + 8 * r < p.Nk) dBias[j0 + place + 8 * r] = element(sum);
        }
        return;
    }
    // Out through the group's own panel of the bias, which no other reads, so that rows are written as they lie in memory.
    ptx::bar_sync(1 + consumer, GROUP);  // the group is done with it
#pragma unroll
    for (int n = 0; n < BLOCK_Q / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int row = 8 * n + 2 * t + e % 2, key = place + 8 * (e / 2);
            *reinterpret_cast<element*>(smem + BIAS_AT + Tile_bias::offset(row, key / 8) + key % 8 * 2) = element(sum_rmem[4 * n + e]);
        }
    ptx::bar_sync(1 + consumer, GROUP);  // the panel is written
    const int i0 = own_tile * BLOCK_Q, first = j0 + consumer * 64;
    for (int n = threadIdx.x % GROUP; n < BLOCK_Q * 8; n += GROUP) {
        const int row = n / 8, j = first + n % 8 * 8;
        if (i0 + row >= p.Nq || j >= p.Nk) continue;
        const element* from = reinterpret_cast<const element*>(bias_tile + Tile_bias::offset(row, consumer * 8 + n % 8));
        element* to = dBias + static_cast<int64_t>(i0 + row) * p.Nk + j;
        if (p.Nk % 8 == 0) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
        else
            for (int k = 0; k < min(8, p.Nk - j); ++k) to[k] = from[k];
    }
}

inline cudaError_t launch_dbias(const AttentionParams& p, const Maps& maps) {
    const Scoring& bias = p.scoring;
    const int64_t i_tiles = one_bias_row(p) ? 1 : tiles_of(p.Nq, BLOCK_Q), blocks = tiles_of(p.Nk, BLOCK_K) * i_tiles * bias.bias_h * bias.bias_b;
    if (!numbers_fit(p, {blocks})) return cudaErrorInvalidConfiguration;
    if (blocks == 0) return cudaSuccess;
    const cudaError_t error = cudaFuncSetAttribute(dbias_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, DBIAS_SMEM_BYTES);
    if (error != cudaSuccess) return error;
    launch_kernel(dbias_kernel, static_cast<unsigned>(blocks), DBIAS_THREADS, DBIAS_SMEM_BYTES, p.stream, p, maps);
    return cudaGetLastError();
}
#elif SCORE & SCORE_BIAS
inline cudaError_t launch_dbias(const AttentionParams&, const Maps&) { return cudaErrorInvalidConfiguration; }
#endif

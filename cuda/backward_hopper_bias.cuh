// The gradient of a bias, in its own shape, after backward_kernel of backward_4_hopper.cu: S and dP are computed again, and dS is summed over all dimensions
// that the bias is broadcast over.
//
// A block owns 128 rows × BLOCK_K keys of the bias at a time or, if all queries share one row, BLOCK_K keys. It visits every batch, head and tile of queries
// that shares this part, always in the same order, and keeps the sum in registers. So no matrix larger than the bias is written, and results repeat bit for
// bit. One group copies, and two groups have 64 keys each, as in backward_kernel.
//
// The L2 cache is the limit: each visit reads K, V, Q and dO for only two products. With 128 rows a score costs a third fewer bytes than with 64. S needs
// only K and Q, so they are a pair whose buffer becomes free before that of V and dO. There are as many blocks as multiprocessors, and each goes from part to
// part, so that the first tiles of the next part are loaded while the last sum is stored.
//
// Serves calls without a mask, dropout and intervals; of others it refuses the launch.
#pragma once

#include <algorithm>

#include "backward_hopper.cuh"

#if (SCORE & SCORE_BIAS) && !MASK && !DROPOUT && !INTERVAL
using DBiasTile = SwizzledTile<DBIAS_ROWS, BLOCK_K>;
using DBiasQ = SwizzledTile<DBIAS_ROWS, 64 * Tile_Q::PANELS>;
constexpr int PAIR_BYTES = Tile_K::BYTES + DBiasQ::BYTES;  // K and Q, or V and dO
constexpr int PAIRS = HEAD_DIM <= 64 ? 4 : 3;              // in shared memory
constexpr int DBIAS_PRODUCER_REGISTERS = 56, DBIAS_CONSUMER_REGISTERS = 224;  // the producer counts through batches, heads and tiles
constexpr int HALF = DBIAS_ROWS / 2;                       // rows of dP that are in registers at a time
constexpr int DBIAS_ROWS_BYTES = 2 * DBIAS_ROWS * 4;       // LSE and Delta of a visit
constexpr int ROW_PLACES = PAIRS - 1;                       // for these: a buffer is overwritten only after the visit following its own has begun
constexpr int DBIAS_SMEM_BYTES = PAIRS * PAIR_BYTES + DBiasTile::BYTES + ROW_PLACES * DBIAS_ROWS_BYTES;
static_assert(DBIAS_SMEM_BYTES <= SMEM_KB * 1024 - 1024, "choose smaller tiles");
static_assert(DBIAS_ROWS % BLOCK_Q == 0 && PADDED_TO % DBIAS_ROWS == 0, "boxes of Q have BLOCK_Q rows, LSE and Delta whole tiles");
// LSE and Delta of visit n are overwritten once V and dO of visit n + PAIRS - 1 have a free buffer, that is after a pair of visit n + 1 was released: by then
// every warp has used the values that it read in visit n. With one buffer fewer, only the warp's own last release would protect them, and a release does not
// wait for loads in flight.

// A block's part of the bias.
struct DBiasPart {
    int j0, tile, h, b;

    // The part with this number. Keys vary fastest, so that blocks that run at the same time share Q and dO.
    __device__ DBiasPart(const AttentionParams& p, int64_t part) {
        const int j_tiles = (p.Nk + BLOCK_K - 1) / BLOCK_K, i_tiles = one_bias_row(p) ? 1 : (p.Nq + DBIAS_ROWS - 1) / DBIAS_ROWS;
        const int rest = static_cast<int>(part / j_tiles);
        j0 = static_cast<int>(part % j_tiles) * BLOCK_K, tile = rest % i_tiles;
        h = rest / i_tiles % p.scoring.bias_h, b = rest / i_tiles / p.scoring.bias_h;
    }
    static int64_t count(const AttentionParams& p) {
        return tiles_of(p.Nk, BLOCK_K) * (one_bias_row(p) ? 1 : tiles_of(p.Nq, DBIAS_ROWS)) * p.scoring.bias_h * p.scoring.bias_b;
    }
};

// The tiles of queries that share a part: of each batch, of each head, from the first row on.
struct SharedBy {
    int b, h, tile;
    const int first_b, end_b, first_h, end_h, first_tile, end_tile;

    __device__ SharedBy(const AttentionParams& p, const DBiasPart& part)
        : first_b(p.scoring.bias_b == 1 ? 0 : part.b),
          end_b(p.scoring.bias_b == 1 ? p.B : part.b + 1),
          first_h(p.scoring.bias_h == 1 ? 0 : part.h),
          end_h(p.scoring.bias_h == 1 ? p.H : part.h + 1),
          first_tile(max(one_bias_row(p) ? 0 : part.tile, first_row_of(p, part.j0) / DBIAS_ROWS)),  // causal: earlier rows see none of the keys
          end_tile(one_bias_row(p) ? (p.Nq + DBIAS_ROWS - 1) / DBIAS_ROWS : part.tile + 1) {
        b = first_tile < end_tile ? first_b : end_b, h = first_h, tile = first_tile;
    }
    __device__ bool more() const { return b < end_b; }
    __device__ void advance() {
        if (++tile < end_tile) return;
        tile = first_tile;
        if (++h < end_h) return;
        h = first_h, ++b;
    }
};

// "full": the bytes have arrived. "empty": every computing warp is done with them.
struct DBiasBarriers {
    uint64_t full[PAIRS], empty[PAIRS], bias_full, bias_empty;
};

__global__ void __launch_bounds__(THREADS, 1)
    dbias_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Maps maps, const __grid_constant__ int parts) {
    // PAIRS × (K or V [BLOCK_K, HEAD_DIM], Q or dO [DBIAS_ROWS, HEAD_DIM]), bias [DBIAS_ROWS, BLOCK_K], ROW_PLACES × (LSE, Delta [DBIAS_ROWS])
    extern __shared__ __align__(1024) uint8_t smem[];
    __shared__ __align__(8) DBiasBarriers barriers;
    constexpr int BIAS_AT = PAIRS * PAIR_BYTES, ROWS_AT = BIAS_AT + DBiasTile::BYTES;
    const uint32_t tiles = ptx::smem_address(smem);
    auto barrier = [](uint64_t* of, int stage) { return ptx::smem_address(of + stage); };
    const uint32_t bias_full = ptx::smem_address(&barriers.bias_full), bias_empty = ptx::smem_address(&barriers.bias_empty);
    const Scoring& bias = p.scoring;
    const bool one_row = one_bias_row(p);

    if (threadIdx.x == 0) {
        ptx::mbarrier_init(bias_full, 1);
        ptx::mbarrier_init(bias_empty, 4 * CONSUMERS);
        for (int stage = 0; stage < PAIRS; ++stage) {
            ptx::mbarrier_init(barrier(barriers.full, stage), 1);
            ptx::mbarrier_init(barrier(barriers.empty, stage), 4 * CONSUMERS);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();

    const int group = uniform(threadIdx.x / GROUP);
    int n = 0, parity = 0;  // of all visits; of the part's bias
    if (group == 0) {
        // ---- the producer: one thread asks for each part's bias, and for the tiles of every visit
        ptx::setmaxnreg_dec<DBIAS_PRODUCER_REGISTERS>();
        if (threadIdx.x > 0) return;
        const Workspace workspace(p);
        for (int part_index = blockIdx.x; part_index < parts; part_index += gridDim.x, parity ^= 1) {
            const DBiasPart part(p, part_index);
            const int first_row = part.tile * DBIAS_ROWS;
            ptx::mbarrier_wait(bias_empty, parity ^ 1);  // passes at once for the first part
            ptx::mbarrier_arrive_expect_tx(bias_full, one_row ? DBiasTile::PANELS * ROW_BYTES : DBiasTile::BYTES);
            for (int panel = 0; panel < DBiasTile::PANELS; ++panel)
                for (int row = 0; row < (one_row ? 1 : DBIAS_ROWS); row += BLOCK_Q)
                    ptx::cp_async_bulk_tensor_4d(tiles + BIAS_AT + panel * DBiasTile::PANEL_BYTES + row * ROW_BYTES, &maps.bias,
                                                 part.j0 + panel * BIAS_PANEL, one_row ? 0 : first_row + row, part.h, part.b, bias_full);
            for (SharedBy now(p, part); now.more(); now.advance(), ++n) {
                const int i0 = now.tile * DBIAS_ROWS, kv_h = kv_head(p, now.h);
                auto load = [&](int pair, const CUtensorMap& keys, const CUtensorMap& queries, int more_bytes) {
                    const Slot<PAIRS> slot(pair);
                    const uint32_t to = tiles + slot.stage * PAIR_BYTES, full = barrier(barriers.full, slot.stage);
                    ptx::mbarrier_wait(barrier(barriers.empty, slot.stage), slot.parity ^ 1);  // returns immediately in the first round
                    ptx::mbarrier_arrive_expect_tx(full, PAIR_BYTES + more_bytes);
                    load_boxes<Tile_K>(to, keys, part.j0, kv_h, now.b, full);
                    for (int panel = 0; panel < DBiasQ::PANELS; ++panel)
                        for (int row = 0; row < DBIAS_ROWS; row += BLOCK_Q)
                            ptx::cp_async_bulk_tensor_4d(to + Tile_K::BYTES + panel * DBiasQ::PANEL_BYTES + row * ROW_BYTES, &queries, panel * 64, i0 + row,
                                                         now.h, now.b, full);
                    return full;
                };
                load(2 * n, maps.k, maps.q, 0);
                const uint32_t full = load(2 * n + 1, maps.v, maps.d_o, DBIAS_ROWS_BYTES);
                const int64_t row = (static_cast<int64_t>(now.b) * p.H + now.h) * workspace.rows + i0;
                const uint32_t rows = tiles + ROWS_AT + n % ROW_PLACES * DBIAS_ROWS_BYTES;
                ptx::cp_async_bulk(rows, workspace.LSE + row, DBIAS_ROWS_BYTES / 2, full);
                ptx::cp_async_bulk(rows + DBIAS_ROWS_BYTES / 2, workspace.Delta + row, DBIAS_ROWS_BYTES / 2, full);
            }
        }
        return;
    }

    // ---- the consumers: 64 keys each
    ptx::setmaxnreg_inc<DBIAS_CONSUMER_REGISTERS>();
    const int consumer = group - 1, warp = uniform(threadIdx.x % GROUP / 32), lane = threadIdx.x % 32, t = lane % 4;
    const int place = consumer * 64 + warp * 16 + lane / 4;  // this lane's keys are j0 + place and 8 further
    const float unit = unit_log2(p);
    // Where a lane's ldmatrix, and stmatrix, of rows 8n … 8n + 15 finds the warp's 16 keys.
    auto bias_at = [&](int n) {
        const int row = one_row ? 0 : 8 * n + lane % 8 + lane / 16 * 8;
        return tiles + BIAS_AT + DBiasTile::offset(row, (consumer * 4 + warp) * 2 + lane / 8 % 2);
    };
    auto release = [&](uint32_t empty) {
        __syncwarp();  // every lane has read what was there
        if (lane == 0) ptx::mbarrier_arrive(empty);
    };
    for (int part_index = blockIdx.x; part_index < parts; part_index += gridDim.x, parity ^= 1) {
        const DBiasPart part(p, part_index);
        const int j0 = part.j0;
        float sum_rmem[DBIAS_ROWS / 2];  // [64 keys, DBIAS_ROWS], as the accumulators lie
#pragma unroll
        for (int e = 0; e < DBIAS_ROWS / 2; ++e) sum_rmem[e] = 0;
        ptx::mbarrier_wait(bias_full, parity);
        for (SharedBy now(p, part); now.more(); now.advance(), ++n) {
            const Slot<PAIRS> of_S(2 * n), of_dP(2 * n + 1);
            const int i0 = now.tile * DBIAS_ROWS;
            const bool cut = j0 + BLOCK_K > min(p.Nk, CAUSAL ? i0 + diagonal(p) + 1 : p.Nk);
            const float slope = SLOPED ? slope_of_head(p, now.b, now.h) : 0;
            float S_rmem[2][HALF / 2], dP_rmem[HALF / 2];  // [64 keys, HALF], S of both halves of the rows
            // Issues the product of a group's 64 rows of K or V with rows of Q or dO, from this one on.
            auto multiply = [&](float(&C)[HALF / 2], const Slot<PAIRS>& slot, int row) {
                const uint32_t pair = tiles + slot.stage * PAIR_BYTES;
                const uint64_t a = ptx::descriptor(uniform(pair + consumer * 64 * ROW_BYTES));
                const uint64_t b = ptx::descriptor(uniform(pair + Tile_K::BYTES + row * ROW_BYTES));
                ptx::wgmma_fence();
#pragma unroll
                for (int d = 0; d < HEAD_DIM / 16; ++d)
                    ptx::wgmma_ss<element, HALF>(C, ptx::advance(a, d / 4 * Tile_K::PANEL_BYTES + d % 4 * 32),
                                                 ptx::advance(b, d / 4 * DBiasQ::PANEL_BYTES + d % 4 * 32), d > 0);
                ptx::wgmma_commit_group();
            };
            ptx::mbarrier_wait(barrier(barriers.full, of_S.stage), of_S.parity);
            multiply(S_rmem[0], of_S, 0);
            multiply(S_rmem[1], of_S, HALF);
            ptx::mbarrier_wait(barrier(barriers.full, of_dP.stage), of_dP.parity);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int first = half * HALF, row = i0 + first + 2 * t;
                const float* LSE_smem = reinterpret_cast<const float*>(smem + ROWS_AT + n % ROW_PLACES * DBIAS_ROWS_BYTES) + first + 2 * t;
                const float* Delta_smem = LSE_smem + DBIAS_ROWS;
                float(&S)[HALF / 2] = S_rmem[half];
                multiply(dP_rmem, of_dP, first);
                ptx::wgmma_wait_group<1>();  // S is there
                if (half == 0) release(barrier(barriers.empty, of_S.stage));
                score_keys<HALF>(
                    S, p, slope, i0 + first, row, j0, j0 + place, [&](int n, uint32_t(&pairs)[4]) { ptx::ldmatrix_x4_trans(pairs, bias_at(first / 8 + n)); },
                    [&](int n, int r, const float(&x)[2], const float(&)[2]) {
                        const float2 LSE = *reinterpret_cast<const float2*>(LSE_smem + 8 * n);
                        const int j = j0 + place + 8 * r, i = row + 8 * n;
                        const bool beyond = cut && j >= p.Nk;
                        S[4 * n + 2 * r] = beyond || (CAUSAL && cut && j > i + diagonal(p)) ? 0 : ptx::ex2(fmaf(x[0], unit, -LSE.x));
                        S[4 * n + 2 * r + 1] = beyond || (CAUSAL && cut && j > i + 1 + diagonal(p)) ? 0 : ptx::ex2(fmaf(x[1], unit, -LSE.y));
                    });
                ptx::wgmma_wait_group<0>();  // so is dP
#pragma unroll
                for (int n = 0; n < HALF / 8; ++n) {
                    const float2 Delta = *reinterpret_cast<const float2*>(Delta_smem + 8 * n);
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        const int e = 4 * n + 2 * r;
                        float* sum = sum_rmem + half * HALF / 2 + e;
                        sum[0] = fmaf(S[e], dP_rmem[e] - Delta.x, sum[0]);
                        sum[1] = fmaf(S[e + 1], dP_rmem[e + 1] - Delta.y, sum[1]);
                    }
                }
            }
            release(barrier(barriers.empty, of_dP.stage));
        }

        element* dBias = static_cast<element*>(bias.d_bias) + (static_cast<int64_t>(part.b) * bias.bias_h + part.h) * bias.bias_i * p.Nk;
        if (one_row) {
            release(bias_empty);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float sum = 0;
#pragma unroll
                for (int n = 0; n < DBIAS_ROWS / 8; ++n) sum += sum_rmem[4 * n + 2 * r] + sum_rmem[4 * n + 2 * r + 1];
                sum = row_sum(sum);
                if (t == 0 && j0 + place + 8 * r < p.Nk) dBias[j0 + place + 8 * r] = element(sum);
            }
            continue;
        }
        // Stored by way of the bias' buffer, so that rows are written contiguously. Only this warp has read, and now writes, its 16 keys of the bias there.
        __syncwarp();  // all lanes have read them
#pragma unroll
        for (int n = 0; n < DBIAS_ROWS / 8; n += 2) {
            uint32_t pairs[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) pairs[e] = ptx::cvt_pair<element>(sum_rmem[4 * n + 2 * e], sum_rmem[4 * n + 2 * e + 1]);
            ptx::stmatrix_x4_trans(bias_at(n), pairs);
        }
        ptx::bar_sync(1 + consumer, GROUP);  // the group's panel is written
        const int i0 = part.tile * DBIAS_ROWS, first = j0 + consumer * 64;
        for (int chunk = threadIdx.x % GROUP; chunk < DBIAS_ROWS * 8; chunk += GROUP) {
            const int row = chunk / 8, j = first + chunk % 8 * 8;
            if (i0 + row >= p.Nq || j >= p.Nk) continue;
            const element* from = reinterpret_cast<const element*>(smem + BIAS_AT + DBiasTile::offset(row, consumer * 8 + chunk % 8));
            element* to = dBias + static_cast<int64_t>(i0 + row) * p.Nk + j;
            if (p.Nk % 8 == 0) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
            else
                for (int k = 0; k < min(8, p.Nk - j); ++k) to[k] = from[k];
        }
        ptx::fence_proxy_async();  // orders the reads and writes here before the copy of the next part's bias
        release(bias_empty);
    }
}

inline cudaError_t launch_dbias(const AttentionParams& p, const Maps& maps) {
    const int64_t parts = DBiasPart::count(p);
    if (!numbers_fit(p, {parts + p.sm_count})) return cudaErrorInvalidConfiguration;
    if (parts == 0) return cudaSuccess;
    const cudaError_t error = cudaFuncSetAttribute(dbias_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, DBIAS_SMEM_BYTES);
    if (error != cudaSuccess) return error;
    const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(parts, p.sm_count));
    launch_kernel(dbias_kernel, blocks, THREADS, DBIAS_SMEM_BYTES, p.stream, p, maps, static_cast<int>(parts));
    return cudaGetLastError();
}
#elif SCORE & SCORE_BIAS
inline cudaError_t launch_dbias(const AttentionParams&, const Maps&) { return cudaErrorInvalidConfiguration; }
#endif

// What the two hopper backwards share: tiles and tensor maps, the order in which a block visits tiles of Q, the way of dQ to global memory, and the
// launch. Includers define BLOCK_K, BLOCK_Q and HALVES.
#pragma once

#include "common.cuh"

constexpr int GROUP = 128;  // threads of a warpgroup
constexpr int CONSUMERS = 2;
constexpr int THREADS = GROUP * (1 + CONSUMERS);
constexpr int PADDED_TO = BLOCK_Q;
#include "backward_workspace.cuh"
#include "keep_bits.cuh"
#include "mask_start.cuh"
#include "ptx_hopper.cuh"
#include "tensor_map.cuh"

#if DTYPE == FLOAT32 || (MASK && MASK != MASK_OF_KEY_BITS)
#error "this rung computes in 16-bit types, under masks of bits by keys"
#endif

constexpr int STAGES = 2;  // pairs of Q and dO tiles in shared memory, each with its LSE and Delta

// A tile has the head's columns in HALVES parts, each filled up to whole panels: a product that takes one part finds it at the start of a panel.
constexpr int panels_of(int columns) { return HALVES * ((columns / HALVES + 63) / 64); }
using Tile_K = SwizzledTile<BLOCK_K, 64 * panels_of(HEAD_DIM)>;
using Tile_V = SwizzledTile<BLOCK_K, 64 * panels_of(V_HEAD_DIM)>;
using Tile_Q = SwizzledTile<BLOCK_Q, 64 * panels_of(HEAD_DIM)>;
using Tile_dO = SwizzledTile<BLOCK_Q, 64 * panels_of(V_HEAD_DIM)>;
using Tile_S = SwizzledTile<BLOCK_K, BLOCK_Q>;  // transposed: rows are keys
constexpr int ROWS_BYTES = BLOCK_Q * 4;         // of LSE, and as many of Delta
constexpr int MASK_BYTES = MASK ? BLOCK_K * static_cast<int>(sizeof(BitRow)) : 0;

struct Maps {
    CUtensorMap q, k, v, d_o, mask;
};

// The tiles of Q that see some of a block's keys, of every query head that shares them: head bh = b·H + h, tile, and the how-manieth it is. Causal:
// from the last tile down, so that the blocks of a head are at the same tile at about the same time; taking turns, they must be.
#if INTERVAL
struct Visit {
    const Visits visits;
    int bh, tile, n = 0;

    __device__ Visit(const AttentionParams& p, int j0, int b_kv_h)
        : visits{Summaries(p, Workspace(p).summaries(p), BLOCK_Q, BLOCK_K), 0, j0 / BLOCK_K, BLOCK_Q, BLOCK_K, (b_kv_h + 1) * (p.H / p.Hkv)},
          bh(b_kv_h * (p.H / p.Hkv)) {
        visits.start(p, bh, tile);
    }
    __device__ bool more() const { return bh < visits.end_h; }
    __device__ void advance(const AttentionParams& p) {
        --tile, ++n;
        visits.settle(p, bh, tile);
    }
    __device__ Slot<STAGES> slot() const { return Slot<STAGES>(n); }
    // Whether every row of the tile sees all of the block's keys; how many blocks before this one add to its dQ.
    __device__ bool whole(const AttentionParams& p, int j0) const { return visits.bounds(p, bh, tile).see_whole(j0, BLOCK_K); }
    __device__ int turn(const AttentionParams& p, int) const { return visits.turn(p, bh, tile); }
};
#else
struct Visit {
    int begin, end, end_bh;
    int bh, tile, n = 0;

    __device__ Visit(const AttentionParams& p, int j0, int b_kv_h) {
        const int tiles = (p.Nq + BLOCK_Q - 1) / BLOCK_Q, group = p.H / p.Hkv;
        begin = CAUSAL ? tiles - 1 : 0;
        end = CAUSAL ? max(0, j0 - diagonal(p)) / BLOCK_Q - 1 : tiles;
        end_bh = (b_kv_h + 1) * group;
        bh = begin == end || (CAUSAL && begin < end) ? end_bh : b_kv_h * group;
        tile = begin;
    }
    __device__ bool more() const { return bh < end_bh; }
    __device__ void advance(const AttentionParams&) {
        tile += CAUSAL ? -1 : 1;
        if (tile == end) tile = begin, ++bh;
        ++n;
    }
    __device__ Slot<STAGES> slot() const { return Slot<STAGES>(n); }
    __device__ int turn(const AttentionParams&, int k_tile) const { return k_tile; }
};
#endif

// Registers of the producer's threads and of the others: all start with 168; what 128 give back is what 256 can take.
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;

// Both groups are there.
__device__ inline void meet() { ptx::bar_sync(1, CONSUMERS * GROUP); }

// Deterministic: blocks add to a tile in the order of their keys, `row` the tile's first in the workspace. They start in that order too, so the one
// waited for is running or done.
__device__ inline void take_turn(const AttentionParams& p, const Workspace& workspace, int64_t row, int turn) {
    if (!p.deterministic) return;
    if (threadIdx.x == GROUP)
        while (ptx::ld_acquire(workspace.turns + row / BLOCK_Q) != turn) {}
    meet();  // our turn, for every thread
}
__device__ inline void end_turn(const AttentionParams& p, const Workspace& workspace, int64_t row, int turn) {
    if (!p.deterministic) return;
    __threadfence();  // this thread's additions come before the next block's
    meet();           // everybody's additions are made
    if (threadIdx.x == GROUP) ptx::st_release(workspace.turns + row / BLOCK_Q, turn + 1);
}

// Adds a group's 64 rows × COLUMNS columns to dQ, from row `row` of the workspace and this column of the head on; none beyond its last.
template <int COLUMNS = 64>
__device__ inline void add_dQ(const Workspace& workspace, int64_t row, int column, const float (&dQ_rmem)[COLUMNS / 2]) {
    const int thread = ptx::tid_x() % GROUP;  // read anew, so that what follows from it takes no registers meanwhile
    float* dQ_gmem = workspace.dQ + fragment_offset(row + thread / 32 * 16, column, thread % 32);
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; ++n)
        if (HEAD_DIM % 64 == 0 || column + 8 * n < HEAD_DIM)
            ptx::red_add_4(dQ_gmem + fragment_offset(0, 8 * n, 0), dQ_rmem[4 * n], dQ_rmem[4 * n + 1], dQ_rmem[4 * n + 2], dQ_rmem[4 * n + 3]);
}

// The kernel, and what comes before and after it.
inline cudaError_t launch_backward(void (*kernel)(AttentionParams, Maps), int smem_bytes, const AttentionParams& p) {
    const int64_t all_rows = Workspace::all_rows(p), k_blocks = tiles_of(p.Nk, BLOCK_K) * p.Hkv * p.B;
    if (!numbers_fit(p, {all_rows / PREPARE_ROWS, k_blocks})) return cudaErrorInvalidConfiguration;
    DeviceGuard guard(p.device);
#if INTERVAL
    if (const cudaError_t error = summarise_spans(p, Workspace(p).summaries(p), BLOCK_Q, BLOCK_K); error != cudaSuccess) return error;
#endif
    if (all_rows > 0) launch_kernel(prepare_kernel, static_cast<unsigned>(all_rows / PREPARE_ROWS), PREPARE_THREADS, 0, p.stream, p);
    if (k_blocks > 0) {
        // Comes first, because it gives a thread that has not yet used the device its context, and making maps does not.
        cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
        Maps maps = {};
        if (error == cudaSuccess) error = make_tensor_map(&maps.k, p.k, p.B, p.Hkv, p.Nk, p.D, BOX_ROWS<Tile_K, RowOrder>);
        if (error == cudaSuccess) error = make_tensor_map(&maps.v, p.v, p.B, p.Hkv, p.Nk, p.Dv, BOX_ROWS<Tile_V, RowOrder>);
        if (error == cudaSuccess && p.Nq > 0) error = make_tensor_map(&maps.q, p.q, p.B, p.H, p.Nq, p.D, BLOCK_Q);
        if (error == cudaSuccess && p.Nq > 0) error = make_tensor_map(&maps.d_o, p.d_o, p.B, p.H, p.Nq, p.Dv, BLOCK_Q);
        if (error == cudaSuccess && p.Nq > 0 && MASK) error = make_mask_map(&maps.mask, p, BLOCK_K);
        if (error != cudaSuccess) return error;
        launch_kernel(kernel, static_cast<unsigned>(k_blocks), THREADS, smem_bytes, p.stream, p, maps);
    }
    if (all_rows > 0) launch_kernel(finish_dq_kernel, static_cast<unsigned>(all_rows / (16 * FINISH_WARPS)), 32 * FINISH_WARPS, 0, p.stream, p);
    return cudaGetLastError();
}

// What the two hopper backwards share: the tensor maps, the order in which a block visits tiles of Q, and the launch. Includers define BLOCK_K, and
// what backward_workspace.cuh wants.
#pragma once

#include "backward_workspace.cuh"
#include "keep_bits.cuh"
#include "mask_start.cuh"
#include "ptx_hopper.cuh"
#include "tensor_map.cuh"

#if DTYPE == FLOAT32 || (MASK && MASK != MASK_OF_KEY_BITS)
#error "this rung computes in 16-bit types, under masks of bits by keys"
#endif

constexpr int STAGES = 2;  // pairs of Q and dO tiles in shared memory, each with its LSE and Delta

struct Maps {
    CUtensorMap q, k, v, d_o, mask;
};

// The tiles of Q that see some of a block's keys, of every query head that shares them: head bh = b·H + h, tile, and the how-manieth it is. Causal:
// from the last tile down, so that the blocks of a head are at the same tile at about the same time; taking turns, they must be.
struct Visit {
    int begin, end, end_bh;
    int bh, tile, n = 0;

    __device__ Visit(const AttentionParams& p, int j0, int b_kv_h) {
        const int tiles = (p.Nq + BLOCK_Q - 1) / BLOCK_Q, group = p.H / p.Hkv;
        begin = CAUSAL ? tiles - 1 : 0;
        end = CAUSAL ? max(0, j0 - (p.Nk - p.Nq)) / BLOCK_Q - 1 : tiles;
        end_bh = (b_kv_h + 1) * group;
        bh = begin == end || (CAUSAL && begin < end) ? end_bh : b_kv_h * group;
        tile = begin;
    }
    __device__ bool more() const { return bh < end_bh; }
    __device__ void advance() {
        tile += CAUSAL ? -1 : 1;
        if (tile == end) tile = begin, ++bh;
        ++n;
    }
    __device__ int stage() const { return n % STAGES; }
    __device__ int parity() const { return n / STAGES & 1; }
};

// The kernel, and what comes before and after it.
template <class Tile_K>
inline cudaError_t launch_backward(void (*kernel)(AttentionParams, Maps), int threads, int smem_bytes, const AttentionParams& p) {
    DeviceGuard guard(p.device);
    const int64_t all_rows = static_cast<int64_t>(p.B) * p.H * Workspace(p).rows;
    const int64_t k_blocks = static_cast<int64_t>((p.Nk + BLOCK_K - 1) / BLOCK_K) * p.Hkv * p.B;
    if (all_rows > 0) prepare_kernel<<<static_cast<unsigned>(all_rows / PREPARE_ROWS), PREPARE_THREADS, 0, p.stream>>>(p);
    if (k_blocks > 0) {
        // Comes first, because it gives a thread that has not yet used the device its context, and making maps does not.
        cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
        Maps maps = {};
        if (error == cudaSuccess) error = make_tensor_map(&maps.k, p.k, p.B, p.Hkv, p.Nk, p.D, BOX_ROWS<Tile_K>);
        if (error == cudaSuccess) error = make_tensor_map(&maps.v, p.v, p.B, p.Hkv, p.Nk, p.Dv, BOX_ROWS<Tile_K>);
        if (error == cudaSuccess && p.Nq > 0) error = make_tensor_map(&maps.q, p.q, p.B, p.H, p.Nq, p.D, BLOCK_Q);
        if (error == cudaSuccess && p.Nq > 0) error = make_tensor_map(&maps.d_o, p.d_o, p.B, p.H, p.Nq, p.Dv, BLOCK_Q);
        if (error == cudaSuccess && p.Nq > 0 && MASK) error = make_mask_map(&maps.mask, p, BLOCK_K);
        if (error != cudaSuccess) return error;
        kernel<<<static_cast<unsigned>(k_blocks), threads, smem_bytes, p.stream>>>(p, maps);
    }
    if (all_rows > 0) finish_dq_kernel<<<static_cast<unsigned>(all_rows / (16 * FINISH_WARPS)), 32 * FINISH_WARPS, 0, p.stream>>>(p);
    return cudaGetLastError();
}

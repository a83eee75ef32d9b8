// Which tiles a hopper kernel visits under a mask: of each tile of Q (forward) or of keys (backward) a list of the others, in their order; visited are they
// from the last to the first. A tile in which nothing may be attended is in no list, so that it is neither copied nor computed; one in which nothing is hidden is marked, and
// takes no mask. pack_mask.cu has said of each 64 × 64 elements of the mask what is among them; a small kernel makes the lists from that.
//
// Where a call is so small that this kernel would not pay, there are no lists, and every tile is visited as if something were hidden in it.
#pragma once

#include "longest_first.cuh"

#if MASK
// A visit is 4 · tile, plus these:
constexpr int CUT = 1;     // some row does not see all of the tile's columns, the mask aside
constexpr int MASKED = 2;  // the mask hides something
__device__ inline bool hides(int visit) { return visit & (CUT | MASKED); }

// What pack_mask.cu has written behind the bits: a byte for each 64 × 64 elements.
struct MaskSummary {
    static constexpr int TILE = 64, SEEN = 1, HIDDEN = 2;  // bits of a byte: something may be attended; something may not

    const uint8_t* bytes;  // [B or 1, H or 1, q_tiles, k_tiles]
    int64_t stride_b, stride_h;
    int q_tiles, k_tiles;

    explicit MaskSummary(const AttentionParams& p) {
        constexpr bool BY_KEYS = MASK == MASK_OF_KEY_BITS;
        const bool one_row = p.mask.stride_i == 0;
        const int64_t rows = BY_KEYS ? p.Nk : one_row ? 1 : p.Nq, columns = !BY_KEYS ? p.Nk : one_row ? 128 : p.Nq;
        const int64_t batches = p.mask.stride_b ? p.B : 1, heads = p.mask.stride_h ? p.H : 1;
        bytes = static_cast<const uint8_t*>(p.mask.data) + batches * heads * rows * tiles_of(columns, 128) * 16;
        q_tiles = one_row ? 1 : static_cast<int>(tiles_of(p.Nq, TILE));
        k_tiles = 2 * static_cast<int>(tiles_of(p.Nk, 2 * TILE));
        const int64_t of_head = static_cast<int64_t>(k_tiles) * (one_row && BY_KEYS ? 2 : q_tiles);
        stride_h = p.mask.stride_h ? of_head : 0, stride_b = p.mask.stride_b ? of_head * heads : 0;
    }
    // What is among the elements of a tile; where its keys end amid 64, among those 64 too.
    __device__ int tile(int b, int h, int i0, int block_q, int j0, int block_k) const {
        const int first = q_tiles == 1 ? 0 : i0 / TILE, end = min(q_tiles, first + block_q / TILE);
        int found = 0;
        for (int q_tile = first; q_tile < end; ++q_tile) {
            const uint8_t* row = bytes + b * stride_b + h * stride_h + static_cast<int64_t>(q_tile) * k_tiles;
            for (int k_tile = j0 / TILE; k_tile < min(k_tiles, (j0 + block_k + TILE - 1) / TILE); ++k_tile) found |= row[k_tile];
        }
        return found;
    }
};

// In a workspace. A line is a tile of Q of a head, or, in a backward, a tile of keys.
struct TileLists {
    int* counts;  // [lines]; NULL: there are no lists
    int* visits;  // [lines, length]
    int length;   // of the longest list that there may be

    TileLists() = default;
    TileLists(float* workspace, int64_t lines, int length)
        : counts(reinterpret_cast<int*>(workspace)), visits(counts + whole_chunks(lines)), length(length) {}
    static int64_t floats(int64_t lines, int length) { return whole_chunks(lines) + whole_chunks(lines * length); }

    __device__ bool made() const { return INTERVAL || counts != nullptr; }
    __device__ const int* of_line(int64_t line) const { return visits + line * length; }
};

// Whether a launch makes them. Two small kernels take as long as a multiprocessor takes for a few tiles. Intervals are always found out beforehand.
inline bool lists_pay(const AttentionParams& p, int block_q, int block_k) {
    return INTERVAL || tiles_of(p.Nq, block_q) * tiles_of(p.Nk, block_k) * p.H * p.B >= int64_t{64} * p.sm_count;
}

constexpr int LIST_WARPS = 4;  // of a block; each makes one list

// BY_KEYS: the lists of tiles of keys. bounds: of rows (visible.cuh), where there are spans. Where blocks take turns (`all`), those that the mask
// alone hides are visited too: a turn is counted by tiles.
template <bool BY_KEYS>
__global__ void __launch_bounds__(32 * LIST_WARPS)
    list_tiles_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ MaskSummary summary, const __grid_constant__ TileLists lists,
                      const Bounds* bounds, int block_q, int block_k, bool all) {
    const int q_tiles = (p.Nq + block_q - 1) / block_q, k_tiles = (p.Nk + block_k - 1) / block_k, own_tiles = BY_KEYS ? k_tiles : q_tiles;
    const int64_t line = static_cast<int64_t>(blockIdx.x) * LIST_WARPS + threadIdx.x / 32;
    if (line >= static_cast<int64_t>(p.B) * p.H * own_tiles) return;
    const int bh = line / own_tiles, own = line % own_tiles, lane = threadIdx.x % 32;
    int count = 0;
    for (int begin = 0; begin < lists.length; begin += 32) {
        const int tile = begin + lane, q_tile = BY_KEYS ? tile : own, k_tile = BY_KEYS ? own : tile;
        const int i0 = q_tile * block_q, j0 = k_tile * block_k;
        bool seen = false, cut = false;
        if (tile < lists.length) {
#if INTERVAL
            const Bounds rows = bounds_of_rows(p, bounds, static_cast<int64_t>(bh) * q_tiles + q_tile, i0, block_q);
            seen = rows.see_some(j0, block_k), cut = !rows.see_whole(j0, block_k);
#else
            seen = j0 < stop_of_rows(p, i0, block_q), cut = j0 + block_k > min(p.Nk, CAUSAL ? i0 + diagonal(p) + 1 : p.Nk);
#endif
        }
        const int found = seen ? summary.tile(bh / p.H, bh % p.H, i0, block_q, j0, block_k) : 0;
        const bool visited = found & MaskSummary::SEEN || (all && seen);
        const uint32_t visits = __ballot_sync(0xffffffff, visited);
        if (visited)
            lists.visits[line * lists.length + count + __popc(visits & first_bits(lane))] = 4 * tile + (cut ? CUT : 0) + (found & MaskSummary::HIDDEN ? MASKED : 0);
        count += __popc(visits);
    }
    if (lane == 0) lists.counts[line] = count;
}

// What kernels that follow on the stream find listed.
template <bool BY_KEYS>
inline cudaError_t list_tiles(const AttentionParams& p, const TileLists& lists, const Bounds* bounds, int block_q, int block_k, bool all) {
    const int64_t lines = tiles_of(BY_KEYS ? p.Nk : p.Nq, BY_KEYS ? block_k : block_q) * p.H * p.B, blocks = tiles_of(lines, LIST_WARPS);
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    if (blocks > 0)
        launch_kernel(list_tiles_kernel<BY_KEYS>, static_cast<unsigned>(blocks), 32 * LIST_WARPS, 0, p.stream, p, MaskSummary(p), lists, bounds, block_q, block_k, all);
    return cudaGetLastError();
}
#endif

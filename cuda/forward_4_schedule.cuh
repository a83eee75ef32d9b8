// The forward of `hopper`, second part: who computes what. A block stays on its multiprocessor and takes one work after another. The producer finds out
// which; consumers are told which work a tile of Q is for.
#pragma once

#include "forward_4_tiles.cuh"
#include "visible.cuh"

// A tile of Q, against the tiles of keys that it sees, from the last to the first, since those that are cut come last.
struct Work {
    int i0, h, b;  // first row, query head, batch
    int k_tiles;
#if INTERVAL
    int first_tile;
    Interval all;  // that every row sees

    __device__ int j0(int n) const { return (first_tile + k_tiles - 1 - n) * BLOCK_K; }
#else
    // First key of the n-th tile.
    __device__ int j0(int n) const { return (k_tiles - 1 - n) * BLOCK_K; }
#endif
};

// Where the LSE of row i of the work's head is kept.
__device__ inline float& LSE_of(const AttentionParams& p, const Work& work, int i) {
    return p.lse[(static_cast<int64_t>(work.b) * p.H + work.h) * p.Nq + i];
}

// Of the tiles of keys, from the first, those that some of `rows` rows from i0 on see. Tiles beyond are never visited.
__device__ inline int tiles_seen(const AttentionParams& p, int i0, int rows) {
    const int columns = i0 >= p.Nq ? 0 : CAUSAL ? max(0, stop_of_rows(p, i0, rows)) : p.Nk;
    return (columns + BLOCK_K - 1) / BLOCK_K;
}

// How the tiles of Q are dealt out to blocks: units, head by head, so that at any time few heads' K and V are read. A unit is a tile, or causal a pair,
// one from the end of the sequence and its mirror image from the start: nearly all pairs are equally long.
struct Schedule {
    int units;
    int q_tiles, of_head;  // of one head: tiles, units
    int mask_bytes;        // that come with a tile of K; the producer has no registers left to find it out

    // The block's m-th work. False if there are not so many.
    __device__ bool deal(const AttentionParams& p, int m, Work& work) const {
        const int blocks = gridDim.x, unit = (CAUSAL ? m / 2 : m) * blocks + blockIdx.x;
        if (unit >= units) return false;
        const int bh = unit / of_head, first = bh * of_head;
        // Turned by one place a round: where a head has 2, 3 or 4, a block would otherwise have the same one of every head, and some are shorter.
        const int place = (unit + first / blocks) % of_head;
        const bool from_end = CAUSAL && m % 2 == 0;
        // The middle one of an odd number of tiles is its own mirror image: the second time there is nothing to do.
        const bool again = CAUSAL && m % 2 && 2 * place + 1 == q_tiles;
        const int i0 = again ? p.Nq : (from_end ? q_tiles - 1 - place : place) * BLOCK_Q;
#if INTERVAL
        const Bounds seen = bounds_of_rows(p, reinterpret_cast<const Bounds*>(p.workspace), static_cast<int64_t>(bh) * q_tiles + place, i0, BLOCK_Q);
        const int first_tile = seen.some.start / BLOCK_K;
        work = {i0, bh % p.H, bh / p.H, max(0, (seen.some.stop + BLOCK_K - 1) / BLOCK_K - first_tile), first_tile, seen.all};
#else
        work = {i0, bh % p.H, bh / p.H, tiles_seen(p, i0, BLOCK_Q)};
#endif
        return true;
    }
};

// What the threads of a block share: their tiles, the barriers, and what each Q is for. A work without keys says that there is no more.
struct Shared {
    uint32_t Q;     // Q_STAGES × [BLOCK_Q, HEAD_DIM]
    uint32_t K;     // STAGES × [BLOCK_K, HEAD_DIM]
    uint32_t V;     // STAGES × [BLOCK_K, V_HEAD_DIM]
    uint32_t O;     // [BLOCK_Q, 64 · O_PANELS]
    uint8_t* mask;  // STAGES × [BLOCK_Q] BitRow
    Barriers& barriers;
    Work* works;    // [Q_STAGES]

    __device__ Shared(uint8_t* smem, Barriers& barriers, Work* works)
        : Q(ptx::smem_address(smem)),
          K(Q + Q_STAGES * Tile_Q::BYTES),
          V(K + STAGES * Tile_K::BYTES),
          O(V + STAGES * Tile_V::BYTES),
          mask(smem + SMEM_BYTES - STAGES * MASK_BYTES),
          barriers(barriers),
          works(works) {}
};

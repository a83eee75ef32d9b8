// Which columns a row sees, before any mask: an interval [start, stop). Defined once, for the loops, schedules and masking of every kernel, with the
// names of reference/visible.py.
//
// Kernels are compiled for three kinds of calls: every row sees every column; CAUSAL, a row sees the columns up to its own; INTERVAL, each row sees its own
// interval, from a window and spans, where positions may also be counted from the start of a longer sequence. In the first two kinds, most bounds are
// compile-time constants, so the three kinds share this file but not the machine code.
//
// With spans, and in a backward, the bounds of a tile are needed many times but its rows are read only once: summaries hold each tile's least and
// greatest bounds and, for a backward, the first and last tile of rows that see a tile of keys.
#pragma once

#include "common.cuh"

#if CAUSAL && INTERVAL
#error "an INTERVAL kernel is told by its arguments whether it is causal"
#endif

constexpr bool LIMITED = CAUSAL || INTERVAL;  // a row may not see every column

struct Interval {
    int start, stop;

    __device__ bool holds(int j) const { return start <= j && j < stop; }
};

// ---- rows

// Row i stands at column i + diagonal.
__device__ inline int diagonal(const AttentionParams& p) { return INTERVAL ? p.seen.diagonal : p.Nk - p.Nq; }

// What row i sees without the spans.
__device__ inline Interval window_of_row(const AttentionParams& p, int i) {
    Interval keys = {0, p.Nk};
    if (CAUSAL) keys.stop = min(p.Nk, i + diagonal(p) + 1);
    if (INTERVAL && p.seen.left >= 0) keys.start = max(0, i + diagonal(p) - p.seen.left);
    if (INTERVAL && p.seen.right >= 0) keys.stop = min(p.Nk, i + diagonal(p) + p.seen.right + 1);
    return keys;
}

// The span of row i as the caller gave it; only where there are spans.
__device__ inline Interval span_of_row(const AttentionParams& p, int b, int h, int i) {
    const int32_t* span = p.seen.spans + b * p.seen.stride_b + h * p.seen.stride_h + min(i, p.Nq - 1) * p.seen.stride_i;
    return {span[0], span[p.seen.stride_e]};
}

// The part of an interval that lies in a span.
__device__ inline Interval cut_to_span(const AttentionParams& p, Interval keys, Interval span) {
    constexpr int FAR = 1 << 30;  // no row or column has such a number, and none overflows
    return {max(keys.start, max(span.start, -FAR) - p.seen.k_offset), min(keys.stop, max(span.stop, -FAR) - p.seen.k_offset)};
}

// What row i sees.
__device__ inline Interval keys_of_row(const AttentionParams& p, int b, int h, int i) {
    Interval keys = window_of_row(p, i);
    if (INTERVAL && p.seen.spans != nullptr) keys = cut_to_span(p, keys, span_of_row(p, b, h, i));
    return keys;
}

// Row i and column j as dropout numbers them.
__device__ inline int global_row(const AttentionParams& p, int i) { return INTERVAL ? i + p.seen.q_offset : i; }
__device__ inline int global_column(const AttentionParams& p, int j) { return INTERVAL ? j + p.seen.k_offset : j; }

// ---- tiles, where intervals begin at the first column

// The end of the columns that any of `size` rows from i0 on sees.
__device__ inline int stop_of_rows(const AttentionParams& p, int i0, int size) {
    return CAUSAL ? min(p.Nk, min(i0 + size, p.Nq) + p.Nk - p.Nq) : p.Nk;
}

// The first row that sees column j0.
__device__ inline int first_row_of(const AttentionParams& p, int j0) { return CAUSAL ? max(0, j0 + p.Nq - p.Nk) : 0; }

// ---- tiles of intervals

// What a tile of rows sees: every row sees the columns of `all`; no row sees a column outside `some`, which reaches from the least start to the greatest stop.
struct Bounds {
    Interval some, all;

    // Of `size` columns from j0 on.
    __device__ bool see_some(int j0, int size) const { return some.start < j0 + size && j0 < some.stop; }
    __device__ bool see_whole(int j0, int size) const { return all.start <= j0 && j0 + size <= all.stop; }
    // Whether some row may see nothing.
    __device__ bool may_be_blind() const { return all.start >= all.stop; }
};

// Of `size` rows from i0 on; `tile` is their number among B·H·tiles, `summaries` those of spans.
__device__ inline Bounds bounds_of_rows(const AttentionParams& p, const Bounds* summaries, int64_t tile, int i0, int size) {
    if (p.seen.spans != nullptr) return summaries[tile];
    const Interval first = window_of_row(p, i0), last = window_of_row(p, min(i0 + size, p.Nq) - 1);
    return {{first.start, last.stop}, {last.start, first.stop}};
}

// The tiles of `block_q` rows, from the first up to before the stop, in which some row sees some of `size` columns from j0 on; without the spans.
__device__ inline Interval tiles_of_keys(const AttentionParams& p, int j0, int size, int block_q) {
    Interval rows = {0, p.Nq};
    if (p.seen.right >= 0) rows.start = max(0, j0 - p.seen.right - diagonal(p));
    if (p.seen.left >= 0) rows.stop = min(p.Nq, min(j0 + size, p.Nk) + p.seen.left - diagonal(p));
    if (rows.start >= rows.stop) return {0, 0};
    return {rows.start / block_q, (rows.stop + block_q - 1) / block_q};
}

// A multiple of 16 bytes, at which each part of a workspace begins.
__host__ __device__ inline int64_t whole_chunks(int64_t floats) { return (floats + 3) / 4 * 4; }

#if INTERVAL
// ---- summaries, in a workspace: of each tile of rows its bounds, then, in a backward, of each tile of keys the tiles of rows that see it

struct Summaries {
    Bounds* of_rows;    // [B·H, q_tiles]
    Interval* of_keys;  // [B·H, k_tiles]
    int q_tiles, k_tiles;

    Summaries() = default;
    __host__ __device__ Summaries(const AttentionParams& p, float* workspace, int block_q, int block_k)
        : of_rows(reinterpret_cast<Bounds*>(workspace)), q_tiles((p.Nq + block_q - 1) / block_q), k_tiles((p.Nk + block_k - 1) / block_k) {
        of_keys = reinterpret_cast<Interval*>(of_rows + static_cast<int64_t>(p.B) * p.H * q_tiles);
    }
    // Whether a launch makes them: without spans, a forward computes bounds by arithmetic.
    static bool made(const AttentionParams& p, bool with_keys) { return with_keys || p.seen.spans != nullptr; }
    // Of workspace, with those of keys or without.
    static int64_t floats(const AttentionParams& p, int block_q, int block_k, bool with_keys) {
        if (!made(p, with_keys)) return 0;
        const Summaries summaries(p, nullptr, block_q, block_k);
        return static_cast<int64_t>(p.B) * p.H * (summaries.q_tiles * int64_t{4} + (with_keys ? summaries.k_tiles * int64_t{2} : 0));
    }
};

// What a block of a backward visits: for each query head that shares its keys, the tiles of rows that see some of them, from the last one down, so
// that the blocks of a head reach the same tile at about the same time.
struct Visits {
    const Summaries summaries;
    int b, k_tile, block_k, end_h;

    __device__ Bounds bounds(const AttentionParams& p, int h, int tile) const {
        return summaries.of_rows[(static_cast<int64_t>(b) * p.H + h) * summaries.q_tiles + tile];
    }
    __device__ Interval tiles(const AttentionParams& p, int h) const {
        return summaries.of_keys[(static_cast<int64_t>(b) * p.H + h) * summaries.k_tiles + k_tile];
    }
    // The first position from head h on; h is end_h if there is none.
    __device__ void start(const AttentionParams& p, int& h, int& tile) const {
        tile = tiles(p, h).stop - 1;
        settle(p, h, tile);
    }
    // From here on down.
    __device__ void settle(const AttentionParams& p, int& h, int& tile) const {
        while (h < end_h) {
            const int first = tiles(p, h).start;
            while (tile >= first && !bounds(p, h, tile).see_some(k_tile * block_k, block_k)) --tile;
            if (tile >= first) return;
            if (++h < end_h) tile = tiles(p, h).stop - 1;
        }
    }
    // How many of the blocks that visit this tile have earlier keys than this block.
    __device__ int turn(const AttentionParams& p, int h, int tile) const { return k_tile - bounds(p, h, tile).some.start / block_k; }
};

constexpr int SUMMARY_WARPS = 4;  // of a block; each makes one summary

// The bounds of `size` rows from i0 on, from their spans and the window; a whole warp calls it.
__device__ inline Bounds read_bounds(const AttentionParams& p, int b, int h, int i0, int size) {
    const int end = min(i0 + size, p.Nq);
    constexpr int AT_ONCE = 4;  // rows that a lane reads at once; the last may be read several times
    Bounds bounds = {{p.Nk, 0}, {0, p.Nk}};
    for (int i = i0 + threadIdx.x % 32; i < end; i += AT_ONCE * 32) {
        Interval spans[AT_ONCE];
        if (p.seen.spans != nullptr)
#pragma unroll
            for (int n = 0; n < AT_ONCE; ++n) spans[n] = span_of_row(p, b, h, min(i + 32 * n, end - 1));
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n) {
            Interval keys = window_of_row(p, min(i + 32 * n, end - 1));
            if (p.seen.spans != nullptr) keys = cut_to_span(p, keys, spans[n]);
            if (keys.start < keys.stop) {
                bounds.some = {min(bounds.some.start, keys.start), max(bounds.some.stop, keys.stop)};
                bounds.all = {max(bounds.all.start, keys.start), min(bounds.all.stop, keys.stop)};
            } else {
                bounds.all = {p.Nk, 0};  // a row that sees nothing
            }
        }
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        bounds.some.start = min(bounds.some.start, __shfl_xor_sync(0xffffffff, bounds.some.start, lanes));
        bounds.some.stop = max(bounds.some.stop, __shfl_xor_sync(0xffffffff, bounds.some.stop, lanes));
        bounds.all.start = max(bounds.all.start, __shfl_xor_sync(0xffffffff, bounds.all.start, lanes));
        bounds.all.stop = min(bounds.all.stop, __shfl_xor_sync(0xffffffff, bounds.all.stop, lanes));
    }
    if (bounds.some.start >= bounds.some.stop) bounds.some = {0, 0};
    return bounds;
}

__global__ void __launch_bounds__(32 * SUMMARY_WARPS)
    summarise_rows_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Summaries summaries, int block_q) {
    if (LAUNCHED_EARLY) ptx::griddepcontrol_launch_dependents();
    const int64_t tile = static_cast<int64_t>(blockIdx.x) * SUMMARY_WARPS + threadIdx.x / 32;
    if (tile >= static_cast<int64_t>(p.B) * p.H * summaries.q_tiles) return;
    const int bh = tile / summaries.q_tiles, b = bh / p.H, h = bh % p.H, i0 = tile % summaries.q_tiles * block_q;
    const Bounds bounds = read_bounds(p, b, h, i0, block_q);
    if (threadIdx.x % 32 == 0) summaries.of_rows[tile] = bounds;
}

__global__ void __launch_bounds__(32 * SUMMARY_WARPS)
    summarise_keys_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Summaries summaries, int block_k) {
    if (LAUNCHED_EARLY) {
        ptx::griddepcontrol_wait();  // the rows' summaries are visible
        ptx::griddepcontrol_launch_dependents();  // not earlier: the kernel before a persistent backward reads those of rows without a wait
    }
    const int64_t tile = static_cast<int64_t>(blockIdx.x) * SUMMARY_WARPS + threadIdx.x / 32;
    if (tile >= static_cast<int64_t>(p.B) * p.H * summaries.k_tiles) return;
    const int64_t bh = tile / summaries.k_tiles;
    const int j0 = tile % summaries.k_tiles * block_k;
    int first = summaries.q_tiles, last = -1;
    for (int q_tile = threadIdx.x % 32; q_tile < summaries.q_tiles; q_tile += 32)
        if (summaries.of_rows[bh * summaries.q_tiles + q_tile].see_some(j0, block_k)) first = min(first, q_tile), last = q_tile;
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        first = min(first, __shfl_xor_sync(0xffffffff, first, lanes));
        last = max(last, __shfl_xor_sync(0xffffffff, last, lanes));
    }
    if (threadIdx.x % 32 == 0) summaries.of_keys[tile] = last < 0 ? Interval{0, 0} : Interval{first, last + 1};
}

// Launches the kernels that write the summaries. Without those of keys, block_k is 0.
inline cudaError_t summarise(const AttentionParams& p, float* workspace, int block_q, int block_k) {
    if (!Summaries::made(p, block_k > 0)) return cudaSuccess;
    const Summaries summaries(p, workspace, block_q, block_k > 0 ? block_k : 1);
    auto blocks = [&](int tiles) { return static_cast<unsigned>((static_cast<int64_t>(p.B) * p.H * tiles + SUMMARY_WARPS - 1) / SUMMARY_WARPS); };
    if (blocks(summaries.q_tiles) == 0) return cudaSuccess;
    launch_kernel(summarise_rows_kernel, blocks(summaries.q_tiles), 32 * SUMMARY_WARPS, 0, p.stream, p, summaries, block_q);
    if (block_k > 0 && blocks(summaries.k_tiles) > 0)
        launch_early(summarise_keys_kernel, blocks(summaries.k_tiles), 32 * SUMMARY_WARPS, 0, p.stream, p, summaries, block_k);
    return cudaGetLastError();
}
#endif

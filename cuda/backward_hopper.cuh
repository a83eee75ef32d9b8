// What the three hopper backwards share: tiles and tensor maps, the order in which a block visits tiles of Q, the way of dQ to global memory, and the
// launch. Includers define BLOCK_K, BLOCK_Q, CONSUMERS and HALVES.
#pragma once

#include "common.cuh"

constexpr int GROUP = 128;  // threads of a warpgroup
constexpr int THREADS = GROUP * (1 + CONSUMERS);
constexpr int DBIAS_ROWS = 128;  // of a tile of a bias' gradient
constexpr int PADDED_TO = SCORE & SCORE_BIAS ? DBIAS_ROWS : BLOCK_Q;
#include "seen_tiles.cuh"
#include "backward_workspace.cuh"
#include "keep_bits.cuh"
#include "longest_first.cuh"
#include "mask_start.cuh"
#include "ptx_hopper.cuh"
#include "score_tile.cuh"
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
constexpr int ROWS_BYTES = BLOCK_Q * 4;         // of LSE, and as many of Delta
constexpr int MASK_BYTES = MASK ? BLOCK_K * static_cast<int>(sizeof(BitRow)) : 0;

struct Maps {
    CUtensorMap q, k, v, d_o, mask;
#if INTERVAL
    Summaries summaries;
    const uint2* seen;  // Workspace::seen
    const int* order;   // of blocks, each a tile of keys; NULL: as they are numbered
#elif LISTED
    SeenTiles seen_tiles;
    Order order;  // of blocks, if there are seen_tiles
#endif
#if SCORE & SCORE_BIAS
    CUtensorMap bias;
#endif
};

// A block's tile of keys and its head, b·Hkv + kv_h: head after head, whose Q, dO and dQ then stay in the L2 cache. Causal: a head's first keys are
// seen by the most rows, and start first. LEAVES_OUT: whether a mask leaves out tiles.
struct Unit {
    int k_tile, b_kv_h;
};
template <bool LEAVES_OUT>
__device__ inline Unit unit_of_block([[maybe_unused]] const AttentionParams& p, [[maybe_unused]] const Maps& maps, int k_tiles) {
#if INTERVAL
    const int unit = maps.order != nullptr ? maps.order[blockIdx.x] : blockIdx.x;
#else
    unsigned unit = blockIdx.x;
#endif
#if LISTED
    if (LEAVES_OUT) unit = maps.order.units[unit];
#endif
#if CAUSAL && !INTERVAL && HEAD_DIM > 64 && HEAD_DIM <= 128
    // So do those of the last few heads, two blocks for each multiprocessor: else the longest block of the last head would start when all others are
    // nearly done. Not where so few heads do not fit the cache together.
    const int heads = p.B * p.Hkv, last = min(heads, 2 * p.sm_count / k_tiles), block = static_cast<int>(unit) - (heads - last) * k_tiles;
    if (!LEAVES_OUT && 2 * k_tiles <= p.sm_count && block >= 0) return {block / last, heads - last + block % last};
#endif
    return {static_cast<int>(unit % k_tiles), static_cast<int>(unit / k_tiles)};
}

// The tiles of Q that see some of a block's keys, of every query head that shares them: head bh = b·H + h, tile, and its index among them. Causal:
// from the last tile down, so that the blocks of a head are at the same tile at about the same time; taking turns, they must be.
#if INTERVAL
// Which tiles these are takes several dependent reads to find out, so the producer alone does, ahead of the others, and tells them.
struct Told {
    int bh, tile;  // a tile of −1: there is no more
    int cut;       // whether some row does not see all of the block's keys
};

struct Visit : Told {
    int first, end_bh, n = 0;  // the head's first tile
    const int k_tile;

    __device__ Visit(const AttentionParams& p, const Maps& maps, int k_tile, int b_kv_h) : k_tile(k_tile) {
        const int group = p.H / p.Hkv;
        bh = b_kv_h * group, end_bh = bh + group;
        if (p.Nq > 0) enter(maps), settle(maps);
        else bh = end_bh;
    }
    __device__ bool more() const { return bh < end_bh; }
    __device__ void advance(const Maps& maps) { --tile, ++n, settle(maps); }
    __device__ Slot<STAGES> slot() const { return Slot<STAGES>(n); }

private:
    // The head's tiles, from the last one.
    __device__ void enter(const Maps& maps) {
        const Interval tiles = maps.summaries.of_keys[bh * maps.summaries.k_tiles + k_tile];
        first = tiles.start, tile = tiles.stop - 1;
    }
    // From here on down, and through the heads that follow.
    __device__ void settle(const Maps& maps) {
        while (true) {
            for (; tile >= first; --tile) {
                const Bounds bounds = maps.summaries.of_rows[bh * maps.summaries.q_tiles + tile];
                cut = !bounds.see_whole(k_tile * BLOCK_K, BLOCK_K);
                if (bounds.see_some(k_tile * BLOCK_K, BLOCK_K)) return;
            }
            if (++bh == end_bh) return;
            enter(maps);
        }
    }
};

// The same visits as the consumers are told of them, each with its tile of Q.
struct ToldVisit : Told {
    const Told* told;  // [STAGES], in shared memory
    uint32_t Q_full;   // barriers
    int n = 0;

    __device__ ToldVisit(const Told* told, const uint64_t* Q_full) : told(told), Q_full(ptx::smem_address(Q_full)) { listen(); }
    __device__ bool more() const { return tile >= 0; }
    __device__ void advance(const AttentionParams&) { ++n, listen(); }
    __device__ Slot<STAGES> slot() const { return Slot<STAGES>(n); }
    // How many blocks before this one add to the tile's dQ.
    __device__ int turn(const AttentionParams& p, const Maps& maps, int k_tile) const {
        return p.deterministic ? k_tile - maps.summaries.of_rows[bh * maps.summaries.q_tiles + tile].some.start / BLOCK_K : 0;
    }

private:
    __device__ void listen() {
        ptx::mbarrier_wait(Q_full + slot().stage * sizeof(uint64_t), slot().parity);
        const Told& now = told[slot().stage];
        bh = uniform(now.bh), tile = uniform(now.tile), cut = uniform(now.cut);
    }
};
#else
#if LISTED
// Where a mask leaves out tiles: from the last one down.
struct ListedVisit {
    const SeenTiles& seen;
    const int k_tile, first, end_bh;  // first: the first tile whose rows the diagonal lets see some of the block's keys
    int bh, tile, n = 0;
    uint32_t word = 0;  // of the tile's chunk of 32: those that are left

    __device__ ListedVisit(const AttentionParams& p, const Maps& maps, int k_tile, int b_kv_h)
        : seen(maps.seen_tiles), k_tile(k_tile), first(first_row_of(p, k_tile * BLOCK_K) / BLOCK_Q), end_bh((b_kv_h + 1) * (p.H / p.Hkv)) {
        bh = b_kv_h * (p.H / p.Hkv), tile = tiles(p);
        settle(p);
    }
    __device__ bool more() const { return bh < end_bh; }
    __device__ void advance(const AttentionParams& p) {
        ++n;
        if (word == 0) tile = tile / 32 * 32;
        settle(p);
    }
    __device__ Slot<STAGES> slot() const { return Slot<STAGES>(n); }

private:
    __device__ static int tiles(const AttentionParams& p) { return (p.Nq + BLOCK_Q - 1) / BLOCK_Q; }
    // From the tiles before this one to the next that is visited, through the heads that follow.
    __device__ void settle(const AttentionParams& p) {
        while (word == 0) {
            if (tile <= first) {
                if (++bh == end_bh) return;
                tile = tiles(p);
                continue;
            }
            const int base = (tile - 1) / 32 * 32;
            word = seen.word(p, bh / p.H, bh % p.H, k_tile, base / 32) & first_bits(tile - base) & ~first_bits(first - base);
            tile = base;
        }
        const int bit = 31 - __clz(word);
        word ^= 1u << bit;
        tile = tile / 32 * 32 + bit;
    }
};
#endif

struct Visit {
    int begin, end, end_bh;
    int bh, tile, n = 0;

    __device__ Visit(const AttentionParams& p, const Maps&, int k_tile, int b_kv_h) {
        const int tiles = (p.Nq + BLOCK_Q - 1) / BLOCK_Q, group = p.H / p.Hkv;
        begin = CAUSAL ? tiles - 1 : 0;
        end = CAUSAL ? max(0, k_tile * BLOCK_K - diagonal(p)) / BLOCK_Q - 1 : tiles;
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

#if LISTED
__device__ inline bool leaves_out(const Maps& maps) { return maps.seen_tiles.words != nullptr && !maps.order.none(); }
template <bool LEAVES_OUT>
using VisitOf = std::conditional_t<LEAVES_OUT, ListedVisit, Visit>;
#else
template <bool>
using VisitOf = Visit;
#endif

#if SCORE
// Scores of a tile, transposed, become what P is the power of. key: the lane's first, of two ROW_STEP apart; row: of Q, of its first column.
template <int COLUMNS, class Bias, class Done>
__device__ inline void score_keys(const float (&S_rmem)[COLUMNS / 2], const AttentionParams& p, float slope, int i0, int row, int j0, int key, Bias bias,
                                  Done done) {
    const int distance = row + diagonal(p) - key, of_tile = i0 + diagonal(p) - j0;
    const Slopes slopes(slope, {distance, distance - ROW_STEP}, 1, of_tile - (BLOCK_K - 1), of_tile + COLUMNS - 1);
    score_tile<COLUMNS, false, false>(S_rmem, p, slopes, bias, done);
}
#endif

// Registers of the producer's threads and of the others: all start with 168, or with three groups of consumers with 128; the others can take what the
// producer's 128 give back.
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = CONSUMERS == 2 ? 240 : 160;

// All groups of consumers are there.
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
// dQ_rmem: [COLUMNS / 2]
template <int COLUMNS = 64>
__device__ inline void add_dQ(const Workspace& workspace, int64_t row, int column, const float* dQ_rmem) {
    const int thread = ptx::tid_x() % GROUP;  // read anew, so that what follows from it takes no registers meanwhile
    float* dQ_gmem = workspace.dQ + fragment_offset(row + thread / 32 * 16, column, thread % 32);
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; ++n)
        if (HEAD_DIM % 64 == 0 || column + 8 * n < HEAD_DIM)
            ptx::red_add_4(dQ_gmem + fragment_offset(0, 8 * n, 0), dQ_rmem[4 * n], dQ_rmem[4 * n + 1], dQ_rmem[4 * n + 2], dQ_rmem[4 * n + 3]);
}

#if INTERVAL
// A tile of keys visits so many tiles of Q.
struct KeyTileLength {
    static constexpr bool SAYS_MOST = false;
    Summaries summaries;

    __device__ int operator()(const AttentionParams& p, int unit) const {
        const int k_tile = unit % summaries.k_tiles, group = p.H / p.Hkv;
        int length = 0;
        for (int bh = unit / summaries.k_tiles * group, end = bh + group; bh < end; ++bh) {
            const Interval tiles = summaries.of_keys[bh * summaries.k_tiles + k_tile];
            length += tiles.stop - tiles.start;
        }
        return length;
    }
};

inline float* workspace_for_order(const AttentionParams& p) {
    return Workspace(p).summaries(p) + whole_chunks(Summaries::floats(p, BLOCK_Q, BLOCK_K, true));
}
#elif LISTED
// A tile of keys visits so many tiles of Q.
struct KeyTileLength {
    static constexpr bool SAYS_MOST = true;
    SeenTiles seen;
    int lines;

    __device__ static Interval left(const AttentionParams& p, int k_tile) {
        const int tiles = (p.Nq + BLOCK_Q - 1) / BLOCK_Q;
        return {min(tiles, first_row_of(p, k_tile * BLOCK_K) / BLOCK_Q), tiles};
    }
    __device__ void measure(const AttentionParams& p) const {
        seen.measure(lines, [&](int k_tile) { return left(p, k_tile); });
    }
    __device__ int most(const AttentionParams& p, int unit) const {
        const Interval some = left(p, unit % seen.tiles);
        return p.H / p.Hkv * (some.stop - some.start);
    }
    __device__ int operator()(const AttentionParams& p, int unit) const {
        const int group = p.H / p.Hkv;
        int length = 0;
        for (int bh = unit / seen.tiles * group, end = bh + group; bh < end; ++bh) length += seen.length(p, bh / p.H, bh % p.H, unit % seen.tiles);
        return length;
    }
};

inline float* workspace_for_seen(const AttentionParams& p) { return p.workspace + whole_chunks(Workspace::floats(p)); }
inline float* workspace_for_order(const AttentionParams& p) {
    return workspace_for_seen(p) + SeenTiles::floats(p, tiles_of(p.Nk, BLOCK_K), tiles_of(p.Nq, BLOCK_Q));
}
#endif

// Of workspace.
inline int64_t backward_floats(const AttentionParams& p) {
#if LISTED
    // Whether gradients must repeat may change after memory has been planned for, and is not asked.
    if (!worth_looking(p, BLOCK_Q, BLOCK_K)) return Workspace::floats(p);
#endif
#if INTERVAL || LISTED
    return workspace_for_order(p) - p.workspace + Order::floats(tiles_of(p.Nk, BLOCK_K) * p.Hkv * p.B);
#else
    return Workspace::floats(p);
#endif
}

// The kernel, and what comes before and after it. more: what else is launched with the same maps.
inline cudaError_t launch_backward(void (*kernel)(AttentionParams, Maps), int smem_bytes, const AttentionParams& p,
                                   cudaError_t (*more)(const AttentionParams&, const Maps&) = nullptr) {
    const int64_t all_rows = Workspace::all_rows(p), k_blocks = tiles_of(p.Nk, BLOCK_K) * p.Hkv * p.B;
    if (!numbers_fit(p, {all_rows / PREPARE_ROWS, k_blocks})) return cudaErrorInvalidConfiguration;
    DeviceGuard guard(p.device);
#if INTERVAL
    if (const cudaError_t error = summarise(p, Workspace(p).summaries(p), BLOCK_Q, BLOCK_K); error != cudaSuccess) return error;
#endif
#if LISTED
    // Where gradients must repeat, blocks take turns by the numbers of their keys, and visit every tile.
    SeenTiles seen_tiles{};
    const Order order(workspace_for_order(p));
    if (!p.deterministic && p.Nq > 0 && k_blocks > 0 && worth_looking(p, BLOCK_Q, BLOCK_K)) {
        const int64_t k_tiles = tiles_of(p.Nk, BLOCK_K);
        seen_tiles = SeenTiles(workspace_for_seen(p), p, k_tiles, tiles_of(p.Nq, BLOCK_Q));
        const KeyTileLength length{seen_tiles, static_cast<int>(seen_tiles.lines(p))};
        if (const cudaError_t error = look<BLOCK_K, BLOCK_Q>(p, seen_tiles, length, order, k_blocks); error != cudaSuccess) return error;
        launch_early(prepare_kernel, static_cast<unsigned>(all_rows / PREPARE_ROWS), PREPARE_THREADS, 0, p.stream, p);  // runs beside these
    } else
#endif
    if (all_rows > 0) launch_kernel(prepare_kernel, static_cast<unsigned>(all_rows / PREPARE_ROWS), PREPARE_THREADS, 0, p.stream, p);
    if (k_blocks > 0) {
        // Comes first, because it gives a thread that has not yet used the device its context, and making maps does not.
        cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
#if INTERVAL
        Maps maps = {{}, {}, {}, {}, {}, Summaries(p, Workspace(p).summaries(p), BLOCK_Q, BLOCK_K), Workspace(p).seen(p),
                     p.deterministic || p.seen.spans == nullptr ? nullptr : Order(workspace_for_order(p)).units};
        if (maps.order != nullptr) error = put_longest_first(p, KeyTileLength{maps.summaries}, Order(workspace_for_order(p)), k_blocks, p.sm_count);
#else
        Maps maps = {};
#endif
#if LISTED
        maps.seen_tiles = seen_tiles, maps.order = order;
#endif
        if (error == cudaSuccess) error = make_tensor_map(&maps.k, p.k, p.B, p.Hkv, p.Nk, p.D, BOX_ROWS<Tile_K, RowOrder>);
        if (error == cudaSuccess) error = make_tensor_map(&maps.v, p.v, p.B, p.Hkv, p.Nk, p.Dv, BOX_ROWS<Tile_V, RowOrder>);
        if (error == cudaSuccess && p.Nq > 0) error = make_tensor_map(&maps.q, p.q, p.B, p.H, p.Nq, p.D, BLOCK_Q);
        if (error == cudaSuccess && p.Nq > 0) error = make_tensor_map(&maps.d_o, p.d_o, p.B, p.H, p.Nq, p.Dv, BLOCK_Q);
        if (error == cudaSuccess && p.Nq > 0 && MASK) error = make_mask_map(&maps.mask, p, BLOCK_K);
#if SCORE & SCORE_BIAS
        if (error == cudaSuccess && p.Nq > 0) error = make_bias_map(&maps.bias, p, BLOCK_Q);
#endif
        if (error != cudaSuccess) return error;
        launch_kernel(kernel, static_cast<unsigned>(k_blocks), THREADS, smem_bytes, p.stream, p, maps);
        if (more != nullptr) error = more(p, maps);
        if (error != cudaSuccess) return error;
    }
    if (all_rows > 0) launch_kernel(finish_dq_kernel, static_cast<unsigned>(all_rows / (16 * FINISH_WARPS)), 32 * FINISH_WARPS, 0, p.stream, p);
    return cudaGetLastError();
}

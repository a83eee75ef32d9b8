// What the three hopper backwards share: tiles and tensor maps, the accumulation of dQ in global memory, and the launch. backward_hopper_visit.cuh says what
// a block visits. Includers define BLOCK_K, BLOCK_Q, CONSUMERS and HALVES.
#pragma once

#include "common.cuh"

constexpr int GROUP = 128;  // threads of a warpgroup
constexpr int THREADS = GROUP * (1 + CONSUMERS);
constexpr int DBIAS_ROWS = 128;  // of a tile of a bias' gradient
constexpr int PADDED_TO = SCORE & SCORE_BIAS ? DBIAS_ROWS : BLOCK_Q;
#include "seen_tiles.cuh"
#include "backward_workspace.cuh"
#if FINISHES_DQ
#include "backward_hopper_slots.cuh"
#endif
#include "keep_bits.cuh"
#include "longest_first.cuh"
#include "mask_start.cuh"
#include "ptx_hopper.cuh"
#include "score_tile.cuh"
#include "tensor_map.cuh"

#if DTYPE == FLOAT32 || (MASK && MASK != MASK_OF_KEY_BITS)
#error "this rung computes in 16-bit types, under masks of bits by keys"
#endif

#if PERSISTENT
constexpr int KV_BUFFERS = 2;  // while one unit is computed, the next one's K and V arrive
#else
constexpr int KV_BUFFERS = 1;
#endif
constexpr int STAGES = 2;  // pairs of Q and dO tiles in shared memory, each with its LSE and Delta

// A tile holds the head's columns in HALVES parts, each padded to whole panels, so that a product of one part starts at a panel.
constexpr int panels_of(int columns) { return HALVES * ((columns / HALVES + 63) / 64); }
using Tile_K = SwizzledTile<BLOCK_K, 64 * panels_of(HEAD_DIM)>;
using Tile_V = SwizzledTile<BLOCK_K, 64 * panels_of(V_HEAD_DIM)>;
using Tile_Q = SwizzledTile<BLOCK_Q, 64 * panels_of(HEAD_DIM)>;
using Tile_dO = SwizzledTile<BLOCK_Q, 64 * panels_of(V_HEAD_DIM)>;
constexpr int ROWS_BYTES = BLOCK_Q * 4;         // of LSE, and as many of Delta
constexpr int MASK_BYTES = MASK ? BLOCK_K * static_cast<int>(sizeof(BitRow)) : 0;

struct Maps {
    CUtensorMap q, k, v, d_o, mask;
#if FINISHES_DQ
    Slots slots;
#endif
#if FINISHES_DQ || PERSISTENT || STORES_FIRST
    Workspace workspace;
#endif
#if PERSISTENT || COPIES_TILES
    CUtensorMap d_o_copy;  // of the tiles in which a row may see nothing
#endif
#if PERSISTENT
    CUtensorMap d_k, d_v;
#endif
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

#if FINISHES_DQ || PERSISTENT || STORES_FIRST
__device__ inline const Workspace& workspace_of(const AttentionParams&, const Maps& maps) { return maps.workspace; }
#else
__device__ inline Workspace workspace_of(const AttentionParams& p, const Maps&) { return Workspace(p); }
#endif
#if FINISHES_DQ
__device__ inline int slot_of(const Maps& maps, int b_kv_h) { return maps.slots.of(b_kv_h); }
#else
__device__ inline int slot_of(const Maps&, int b_kv_h) { return b_kv_h; }
#endif

#include "backward_hopper_visit.cuh"
#if STORES_FIRST
#include "backward_hopper_claims.cuh"
#endif

#if SCORE
// Applies the hook to a transposed tile of scores; P is 2 to the power of the result. key: the lane's first of two keys ROW_STEP apart; row: the query of its
// first column.
template <int COLUMNS, class Bias, class Done>
__device__ inline void score_keys(const float (&S_rmem)[COLUMNS / 2], const AttentionParams& p, float slope, int i0, int row, int j0, int key, Bias bias,
                                  Done done) {
    const int distance = row + diagonal(p) - key, of_tile = i0 + diagonal(p) - j0;
    const Slopes slopes(slope, {distance, distance - ROW_STEP}, 1, of_tile - (BLOCK_K - 1), of_tile + COLUMNS - 1);
    score_tile<COLUMNS, false, false>(S_rmem, p, slopes, bias, done);
}
#endif

// Registers of the producer's threads and of the others. All start with 168, or with 128 if there are three groups of consumers; the others can take what the
// producer's 128 threads return.
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = CONSUMERS == 2 ? 240 : 160;

// Waits for all groups of consumers.
__device__ inline void meet() { ptx::bar_sync(1, CONSUMERS * GROUP); }

// Deterministic: blocks add to a tile in the order of their keys; `row` is the tile's first row in the workspace. They start in that order too, so the
// block that is waited for is running or has finished.
__device__ inline void take_turn(const AttentionParams& p, const Workspace& workspace, int64_t row, int turn) {
    if (!p.deterministic) return;
    if (threadIdx.x == GROUP)
        while (ptx::ld_acquire(workspace.turns + row / BLOCK_Q) != turn) {}
    meet();  // our turn, for every thread
}
__device__ inline void end_turn(const AttentionParams& p, const Workspace& workspace, int64_t row, int turn) {
    if (!p.deterministic) return;
    __threadfence();  // this thread's additions come before the next block's
    meet();           // all threads' additions are done
    if (threadIdx.x == GROUP) ptx::st_release(workspace.turns + row / BLOCK_Q, turn + 1);
}

// Adds a group's 64 rows × COLUMNS columns to dQ, from row `row` of the workspace and column `column` of the head on, up to the head's last column.
// dQ_rmem: [COLUMNS / 2]; first: there is nothing to add to yet, if STORES_FIRST.
template <int COLUMNS = 64>
__device__ inline void add_dQ(const Workspace& workspace, int64_t row, int column, const float* dQ_rmem, [[maybe_unused]] bool first = false) {
    const int thread = ptx::tid_x() % GROUP;  // re-read here, so that values derived from it occupy no registers before
    float* dQ_gmem = workspace.dQ + fragment_offset(row + thread / 32 * 16, column, thread % 32);
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; ++n)
        if (HEAD_DIM % 64 == 0 || column + 8 * n < HEAD_DIM) {
            float* to = dQ_gmem + fragment_offset(0, 8 * n, 0);
#if STORES_FIRST
            ptx::store_or_add_4(first, to, dQ_rmem[4 * n], dQ_rmem[4 * n + 1], dQ_rmem[4 * n + 2], dQ_rmem[4 * n + 3]);
#else
            ptx::red_add_4(to, dQ_rmem[4 * n], dQ_rmem[4 * n + 1], dQ_rmem[4 * n + 2], dQ_rmem[4 * n + 3]);
#endif
        }
}

#if INTERVAL
// The number of tiles of Q that a tile of keys visits.
struct KeyTileLength {
    static constexpr bool SAYS_MOST = false, SAYS_WORTH = PERSISTENT;
    Summaries summaries;

    // If units are sorted, no head is complete before the end. If not, blocks are idle at the end, for half of a unit's time on average, but the kernel after
    // them uses that time to round dQ of complete heads. So sorting pays if half of the longest unit takes longer than rounding dQ. On an H200 a visit takes
    // as long as rounding dQ of about 190 tiles of Q.
    __device__ bool worth_sorting(const AttentionParams& p, int longest) const { return 190 / 2 * longest > p.B * p.H * summaries.q_tiles; }

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
// The number of tiles of Q that a tile of keys visits.
struct KeyTileLength {
    static constexpr bool SAYS_MOST = true, SAYS_WORTH = false;
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

#if STORES_FIRST
// Where the mask leaves out no tile, blocks add to zeros, and do not ask who is the first at a tile of dQ.
constexpr int ZERO_THREADS = 512;  // one block for each multiprocessor, which leaves room for the kernel after, which runs beside this one
__global__ void __launch_bounds__(ZERO_THREADS) zero_dq_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Order order) {
    ptx::griddepcontrol_launch_dependents();
    ptx::griddepcontrol_wait();  // it is known whether there is an order
    const Workspace workspace(p);
    const bool zeros = order.none();
    for (int tile = blockIdx.x, tiles = p.B * p.H * (workspace.rows / BLOCK_Q); tile < tiles; tile += gridDim.x) {
        if (threadIdx.x == 0) workspace.turns[tile] = zeros ? Workspace::STORED : Workspace::UNTOUCHED;
        if (!zeros) continue;
        float4* dQ = reinterpret_cast<float4*>(workspace.dQ + int64_t{tile} * BLOCK_Q * HEAD_DIM);
        for (int e = threadIdx.x; e < BLOCK_Q * HEAD_DIM / 4; e += blockDim.x) dQ[e] = make_float4(0, 0, 0, 0);
    }
}
#endif

inline float* workspace_for_seen(const AttentionParams& p) { return p.workspace + whole_chunks(Workspace::floats(p)); }
inline float* workspace_for_order(const AttentionParams& p) {
    return workspace_for_seen(p) + SeenTiles::floats(p, tiles_of(p.Nk, BLOCK_K), tiles_of(p.Nq, BLOCK_Q));
}
#endif

// Of workspace, without a copy of dO and with it.
inline int64_t floats_before_copy(const AttentionParams& p) {
#if LISTED
    // `deterministic` is not looked at here: it may change after the workspace has been sized.
    if (!worth_looking(p, BLOCK_Q, BLOCK_K)) return Workspace::floats(p);
#endif
#if INTERVAL || LISTED
    return workspace_for_order(p) - p.workspace + Order::floats(tiles_of(p.Nk, BLOCK_K) * p.Hkv * p.B);
#else
    return Workspace::floats(p);
#endif
}
inline int64_t backward_floats(const AttentionParams& p) { return floats_with_copy(p, floats_before_copy(p)); }

#if PERSISTENT
// One for each multiprocessor. But if units are equally long, all but those at the ends of a head, then some blocks would have one unit more than the others at
// any rate; so there are as few blocks as have no more units each, and the kernel after rounds dQ on the multiprocessors that are left.
inline int64_t persistent_blocks(const AttentionParams& p, int64_t units) {
    const int64_t blocks = std::min<int64_t>(units, p.sm_count);
    const bool equal = p.seen.spans == nullptr && p.seen.left >= 0 && p.seen.right >= 0 && (int64_t{p.seen.left} + p.seen.right) * 12 <= p.Nk;
    return equal ? tiles_of(units, static_cast<int>(tiles_of(units, static_cast<int>(blocks)))) : blocks;
}
#endif

// Launches the kernel and those before and after it. more: launches further kernels that use the same maps.
inline cudaError_t launch_backward(void (*kernel)(AttentionParams, Maps), int smem_bytes, const AttentionParams& call,
                                   cudaError_t (*more)(const AttentionParams&, const Maps&) = nullptr) {
    const AttentionParams p = with_copy(call, floats_before_copy(call));
    const int64_t all_rows = Workspace::all_rows(p), k_blocks = tiles_of(p.Nk, BLOCK_K) * p.Hkv * p.B;
    if (!numbers_fit(p, {all_rows / PREPARE_ROWS, k_blocks})) return cudaErrorInvalidConfiguration;
    DeviceGuard guard(p.device);
    const Slots slots = slots_of(p);
    const Workspace workspace(p, slots);
    Maps maps = {};
#if INTERVAL
    if (const cudaError_t error = summarise(p, workspace.summaries(p), BLOCK_Q, BLOCK_K); error != cudaSuccess) return error;
    maps.summaries = Summaries(p, workspace.summaries(p), BLOCK_Q, BLOCK_K), maps.seen = workspace.seen(p);
    if (!p.deterministic && p.seen.spans != nullptr && p.Nq > 0 && k_blocks > 0) {
        const Order order(workspace_for_order(p));
        maps.order = order.units;
        const cudaError_t error = put_longest_first(p, KeyTileLength{maps.summaries}, order, k_blocks, p.sm_count);
        if (error != cudaSuccess) return error;
    }
#endif
#if LISTED
    // If deterministic, blocks take turns in the order of their keys, and visit every tile.
    SeenTiles seen_tiles{};
    const Order order(workspace_for_order(p));
    if (!p.deterministic && p.Nq > 0 && k_blocks > 0 && worth_looking(p, BLOCK_Q, BLOCK_K)) {
        const int64_t k_tiles = tiles_of(p.Nk, BLOCK_K);
        seen_tiles = SeenTiles(workspace_for_seen(p), p, k_tiles, tiles_of(p.Nq, BLOCK_Q));
        const KeyTileLength length{seen_tiles, static_cast<int>(seen_tiles.lines(p))};
        if (const cudaError_t error = look<BLOCK_K, BLOCK_Q>(p, seen_tiles, length, order, k_blocks); error != cudaSuccess) return error;
#if STORES_FIRST
        launch_early(zero_dq_kernel, static_cast<unsigned>(std::min<int64_t>(all_rows / BLOCK_Q, p.sm_count)), ZERO_THREADS, 0, p.stream, p, order);
#endif
        launch_prepare(call, p, true, !STORES_FIRST);  // overlaps these
    } else
#endif
    launch_prepare(call, p, PERSISTENT, !PERSISTENT || !STORES_FIRST);
    if (k_blocks > 0) {
        // First, because it creates the CUDA context of a thread that has not used the device yet; making tensor maps does not.
        cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
#if FINISHES_DQ
        maps.slots = slots;
#endif
#if FINISHES_DQ || PERSISTENT || STORES_FIRST
        maps.workspace = workspace;
#endif
#if LISTED
        maps.seen_tiles = seen_tiles, maps.order = order;
#endif
        if (error == cudaSuccess) error = make_tensor_map(&maps.k, p.k, p.B, p.Hkv, p.Nk, p.D, BOX_ROWS<Tile_K, RowOrder>);
        if (error == cudaSuccess) error = make_tensor_map(&maps.v, p.v, p.B, p.Hkv, p.Nk, p.Dv, BOX_ROWS<Tile_V, RowOrder>);
        if (error == cudaSuccess && p.Nq > 0) error = make_tensor_map(&maps.q, p.q, p.B, p.H, p.Nq, p.D, BLOCK_Q);
#if PERSISTENT || COPIES_TILES
        if (error == cudaSuccess && p.Nq > 0) error = make_tensor_map(&maps.d_o, call.d_o, p.B, p.H, p.Nq, p.Dv, BLOCK_Q);
        if (error == cudaSuccess && p.Nq > 0) error = make_tensor_map(&maps.d_o_copy, p.d_o, p.B, p.H, p.Nq, p.Dv, BLOCK_Q);
#else
        if (error == cudaSuccess && p.Nq > 0) error = make_tensor_map(&maps.d_o, p.d_o, p.B, p.H, p.Nq, p.Dv, BLOCK_Q);
#endif
#if PERSISTENT
        if (error == cudaSuccess) error = make_tensor_map(&maps.d_k, p.dk, p.B, p.Hkv, p.Nk, p.D, BLOCK_K);
        if (error == cudaSuccess) error = make_tensor_map(&maps.d_v, p.dv, p.B, p.Hkv, p.Nk, p.Dv, BLOCK_K);
#endif
        if (error == cudaSuccess && p.Nq > 0 && MASK) error = make_mask_map(&maps.mask, p, BLOCK_K);
#if SCORE & SCORE_BIAS
        if (error == cudaSuccess && p.Nq > 0) error = make_bias_map(&maps.bias, p, BLOCK_Q);
#endif
        if (error != cudaSuccess) return error;
#if PERSISTENT
        // Without rows nothing has set the count of units that blocks take to 0.
        const unsigned blocks = static_cast<unsigned>(p.Nq == 0 ? k_blocks : persistent_blocks(p, k_blocks));
#else
        const unsigned blocks = static_cast<unsigned>(k_blocks);
#endif
        launch_early_if(PERSISTENT, kernel, blocks, THREADS, smem_bytes, p.stream, p, maps);
        if (more != nullptr) error = more(p, maps);
        if (error != cudaSuccess) return error;
    }
    launch_finish(p, COUNTS_UNITS && k_blocks > 0);
    return cudaGetLastError();
}

// What comes before and after the backward kernels that visit each pair of tiles once: Delta and LSE are prepared; dQ is summed in the order of the
// accumulators and put into row order at the end. Includers define BLOCK_Q and PADDED_TO, a multiple of it, and may define FINISHES_DQ as 1: then the
// backward kernel itself finishes most of dQ (backward_hopper_slots.cuh); or COUNTS_UNITS as 1: then it counts the units of each head that have added to dQ,
// and the kernel after starts when multiprocessors run out of them.
#pragma once

#include <algorithm>

#include "tensor_core.cuh"

#ifndef PERSISTENT
#define PERSISTENT 0
#endif
#ifndef COUNTS_UNITS
#define COUNTS_UNITS 0
#endif
#ifndef STORES_FIRST
#define STORES_FIRST 0
#endif
// Whether, under a mask, only tiles in which a row attends nothing are copied. Elsewhere the backward kernel does not look.
#ifndef COPIES_TILES
#define COPIES_TILES 0
#endif

// ---- where dQ is summed

// Heads of K and V, each with all query heads that share it, that have memory for dQ at a time. Head h has slot h % count.
struct Slots {
    int count;  // B·Hkv, unless slots are used again
    int lag;    // a block finishes its share of the head that comes `lag` before its own; B·Hkv or more: the kernel after finishes all of them

    __host__ __device__ int of(int b_kv_h) const { return b_kv_h % count; }
    // A slot for every head, and the kernel after finishes all of them.
    __host__ __device__ static Slots of_all_heads(const AttentionParams& p) { return {p.B * p.Hkv, p.B * p.Hkv}; }
};

#if FINISHES_DQ
Slots slots_of(const AttentionParams& p);  // backward_hopper_slots.cuh
#else
inline Slots slots_of(const AttentionParams& p) { return Slots::of_all_heads(p); }
#endif

// ---- workspace: dQ in fragment order, then LSE·log2 e and Delta of every row, then counters; where rows see intervals, these too, and their summaries.
// Rows are padded to whole tiles.
struct Workspace {
    float* dQ;            // [slots, H/Hkv, rows, HEAD_DIM]
    float *LSE, *Delta;   // [B·H·rows]
    int* turns;           // [slots, H/Hkv, rows / BLOCK_Q]: how many key blocks have added to the tile, used if deterministic; otherwise a TileState
    // [B·Hkv]: how many blocks have added all that they add to the head's dQ; how many warps have set their share of it to 0 again, or, in zeroed[0], how
    // many units persistent blocks have taken beside the first of each.
    int *added, *zeroed;
    int* dead;            // [B·H, rows / BLOCK_Q]: COPIES_TILES: whether the copy of dO has the tile
    int rows;             // of one head

    // STORES_FIRST: how far a tile is, if blocks do not take turns. In either case 0 means that no block has anything to add to it.
    enum TileState { UNTOUCHED, CLAIMED, STORED };

    Workspace() = default;
    __host__ __device__ Workspace(const AttentionParams& p, const Slots& slots) : rows((p.Nq + PADDED_TO - 1) / PADDED_TO * PADDED_TO) {
        const int64_t all_rows = static_cast<int64_t>(p.B) * p.H * rows;
#if FINISHES_DQ
        const int64_t slot_rows = static_cast<int64_t>(slots.count) * (p.H / p.Hkv) * rows;
#else
        const int64_t slot_rows = all_rows;
#endif
        dQ = p.workspace, LSE = dQ + slot_rows * HEAD_DIM, Delta = LSE + all_rows;
        turns = reinterpret_cast<int*>(Delta + all_rows), added = turns + slot_rows / BLOCK_Q, zeroed = added + p.B * p.Hkv;
        dead = zeroed + p.B * p.Hkv;
    }
#if FINISHES_DQ
    explicit Workspace(const AttentionParams& p) : Workspace(p, slots_of(p)) {}
#else
    __host__ __device__ explicit Workspace(const AttentionParams& p) : Workspace(p, Slots::of_all_heads(p)) {}
#endif
    static int64_t floats(const AttentionParams& p) {
        const Workspace workspace(p);
#if INTERVAL
        return workspace.summaries(p) - p.workspace + Summaries::floats(p, BLOCK_Q, BLOCK_K, true);
#endif
        return reinterpret_cast<float*>(workspace.end(p)) - p.workspace;
    }
    __host__ __device__ int* end(const AttentionParams& p) const { return dead + (COPIES_TILES ? static_cast<int64_t>(p.B) * p.H * (rows / BLOCK_Q) : 0); }
#if INTERVAL
    // [B·H·rows]: the first column that a row sees, and how many.
    __host__ __device__ uint2* seen(const AttentionParams& p) const {
        return reinterpret_cast<uint2*>(p.workspace + whole_chunks(reinterpret_cast<float*>(end(p)) - p.workspace));
    }
    // Where summaries begin, behind the rest.
    __host__ __device__ float* summaries(const AttentionParams& p) const {
        return reinterpret_cast<float*>(seen(p) + static_cast<int64_t>(p.B) * p.H * rows);
    }
#endif
    // The number of a tile of head bh among those of all heads.
    __device__ int tile_of_all(int bh, int tile) const { return bh * (rows / BLOCK_Q) + tile; }
    static int64_t all_rows(const AttentionParams& p) { return tiles_of(p.Nq, PADDED_TO) * PADDED_TO * p.H * p.B; }
};

// Where a lane's four values of an accumulator tile lie in the workspace's dQ: tiles of 16 rows (from `row`) × 8 columns (from `column`) follow each
// other along the columns, each 512 contiguous bytes.
__device__ inline int64_t fragment_offset(int64_t row, int column, int lane) { return row * HEAD_DIM + column * 16 + lane * 4; }

// ---- rows that attend nothing: their dO is ignored. It may be NaN, and although their P is 0, 0 · NaN would make dK and dV NaN. If a call may have such
// rows, the kernel before the backward therefore writes a copy of dO in which they are 0, and the backward reads that copy. It lies in dQ's memory, which
// is not written until all blocks of the head are done, unless V's rows are longer than Q's: then it lies in the workspace.

inline bool may_be_dead(const AttentionParams& p) {
    if (MASK || SCORE & SCORE_BIAS) return true;
#if INTERVAL
    const int64_t first = p.seen.diagonal, last = first + p.Nq - 1;  // columns of the diagonal in the first and the last row
    return p.seen.spans != nullptr || (p.seen.right >= 0 && first + p.seen.right < 0) || (p.seen.left >= 0 && last - p.seen.left >= p.Nk);
#endif
    return CAUSAL && p.Nq > p.Nk;
}
inline bool copy_needs_workspace(const AttentionParams& p) { return may_be_dead(p) && p.Dv > p.D; }
// There the copy, [B, H, Nq, Dv], begins after `after` floats, rounded up to a multiple of 512 bytes, as tensors are: the copy engine reads whole cache
// lines.
inline int64_t begin_of_copy(int64_t after) { return tiles_of(after, 128) * 128; }
// Of workspace.
inline int64_t floats_with_copy(const AttentionParams& p, int64_t after) {
    return copy_needs_workspace(p) ? begin_of_copy(after) + tiles_of(static_cast<int64_t>(p.B) * p.H * p.Nq * p.Dv, 2) : after;
}
// The call as the backward kernel gets it.
inline AttentionParams with_copy(AttentionParams p, int64_t after) {
    const int64_t head = static_cast<int64_t>(p.Nq) * p.Dv;
    if (copy_needs_workspace(p)) p.d_o = {p.workspace + begin_of_copy(after), p.H * head, head, p.Dv};
    else if (may_be_dead(p)) p.d_o = p.dq;
    return p;
}

__device__ inline void await(const int* count, int n) {
    while (ptx::ld_acquire(count) != n) {}
}

// ---- before: Delta = rowsum(dO∘O) − dLSE (line 4), LSE in base 2, and zeros for dQ (line 3)

constexpr int ROW_LANES = HEAD_DIM <= 64 ? 8 : HEAD_DIM <= 128 ? 16 : 32;  // threads that sum one row, 8 columns each
constexpr int PREPARE_THREADS = 256;
// A thread takes several rows, because what it does once costs as many instructions as eight rows.
constexpr int ROWS_AT_ONCE = PREPARE_THREADS / ROW_LANES, ROWS_EACH = std::min(4, PADDED_TO / ROWS_AT_ONCE), PREPARE_ROWS = ROWS_AT_ONCE * ROWS_EACH;
constexpr int PREPARE_BLOCKS = 4;  // at least, of a multiprocessor: some have 1024 threads

// Whether the copy of dO has the tile of row i of head bh. Persistent blocks read it only where a row may see nothing, which is rare.
__device__ inline bool is_copied([[maybe_unused]] const AttentionParams& p, [[maybe_unused]] const Workspace& workspace, [[maybe_unused]] int bh,
                                 [[maybe_unused]] int i) {
#if PERSISTENT
    if (p.seen.spans == nullptr) return bounds_of_rows(p, nullptr, 0, i / BLOCK_Q * BLOCK_Q, BLOCK_Q).may_be_blind();
    // Their summaries were complete before this kernel started, which does not wait. So they are read from L2: the L1 cache may have older ones.
    const Summaries summaries(p, workspace.summaries(p), BLOCK_Q, BLOCK_K);
    const int2 all = __ldcg(reinterpret_cast<const int2*>(&summaries.of_rows[bh * summaries.q_tiles + i / BLOCK_Q].all));
    return Bounds{{}, {all.x, all.y}}.may_be_blind();
#else
    return true;
#endif
}

// Of 8 elements each.
__device__ inline float dot_8(const uint4& a, const uint4& b) {
    const uint32_t as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
    float sum = 0;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        const float2 x = floats_of(as[n]), y = floats_of(bs[n]);
        sum = fmaf(x.x, y.x, sum), sum = fmaf(x.y, y.y, sum);
    }
    return sum;
}

// COPIES: also writes the copy of dO in which rows that attend nothing are 0
template <bool COPIES>
__device__ inline void prepare(const AttentionParams& p, const Slots& slots, [[maybe_unused]] const Tensor4& copy, bool zeros) {
    zeros |= !STORES_FIRST;
#if PERSISTENT
    ptx::griddepcontrol_launch_dependents();
#endif
    const Workspace workspace(p, slots);
    const int blocks_per_head = workspace.rows / PREPARE_ROWS;
    // The thread reads 8 columns of ROWS_EACH rows, which are ROWS_AT_ONCE apart. Beyond the ends it reads the last ones again.
    const int first = blockIdx.x % blocks_per_head * PREPARE_ROWS + threadIdx.x / ROW_LANES;
    const int bh = blockIdx.x / blocks_per_head, b = bh / p.H, h = bh % p.H;
    const int lane = threadIdx.x % ROW_LANES, column = min(lane * 8, p.Dv - 8);
    const int group = p.H / p.Hkv;
    const bool has_slot = bh < slots.count * group;

    // The other numbers of row n are lane n's.
    const int i = first + lane * ROWS_AT_ONCE;
    const bool mine = lane < ROWS_EACH && i < p.Nq;
    float LSE = -CUDART_INF_F, d_LSE = 0;
    if (mine) {
        LSE = p.lse[static_cast<int64_t>(bh) * p.Nq + i];
        if (p.d_lse) d_LSE = p.d_lse[static_cast<int64_t>(bh) * p.Nq + i];
    }
#if INTERVAL
    const Interval keys = mine ? keys_of_row(p, b, h, i) : Interval{0, 0};
#endif
    [[maybe_unused]] bool copied = COPIES && is_copied(p, workspace, bh, blockIdx.x % blocks_per_head * PREPARE_ROWS);
    uint4 O_rmem[ROWS_EACH], dO_rmem[ROWS_EACH];
    const element *O = head_of(p.o, b, h) + column, *dO = head_of(p.d_o, b, h) + column;
#pragma unroll
    for (int n = 0; n < ROWS_EACH; ++n) {
        const int i = min(first + n * ROWS_AT_ONCE, p.Nq - 1);
        O_rmem[n] = *reinterpret_cast<const uint4*>(O + i * p.o.stride_n), dO_rmem[n] = *reinterpret_cast<const uint4*>(dO + i * p.d_o.stride_n);
    }

    static_assert((!PERSISTENT && !COPIES_TILES) || PREPARE_ROWS == BLOCK_Q, "a block prepares a tile, which is copied or not");
#if COPIES_TILES
    if (COPIES) {
        copied = __syncthreads_or(mine && LSE == -CUDART_INF_F);
        if (threadIdx.x == 0) workspace.dead[blockIdx.x] = copied;
    }
#endif
    float Delta = 0;
#pragma unroll
    for (int n = 0; n < ROWS_EACH; ++n) {
        float sum = dot_8(O_rmem[n], dO_rmem[n]);
        if (lane * 8 >= p.Dv) sum = 0;
#pragma unroll
        for (int lanes = ROW_LANES / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffff, sum, lanes);
        if (lane == n) Delta = sum - d_LSE;
        if (COPIES) {
            const int i = first + n * ROWS_AT_ONCE;
            const bool dead = __shfl_sync(0xffffffff, LSE, threadIdx.x % 32 / ROW_LANES * ROW_LANES + n) == -CUDART_INF_F;
            if (copied && i < p.Nq && lane * 8 < p.Dv)
                *reinterpret_cast<uint4*>(head_of(copy, b, h) + i * copy.stride_n + column) = dead ? uint4{} : dO_rmem[n];
        }
    }

    if (lane < ROWS_EACH) {
        const int64_t row = static_cast<int64_t>(bh) * workspace.rows + i;
#if SCORE & SCORE_BIAS
        // LSE so large that float32 cannot tell the row's scores apart: P, which could be any power of 2, is limited to 1.
        if (fabsf(LSE) >= 0x1p16f && fabsf(LSE) < CUDART_INF_F) LSE += fabsf(LSE) * 0x1p-22f;
#endif
        // A row that attends nothing, or lies beyond the end: P = 2^(S − ∞) = 0, and what comes back to it, NaN too, is dropped.
        const bool dead = LSE == -CUDART_INF_F;
        workspace.LSE[row] = dead ? CUDART_INF_F : LSE * LOG2_E;
        if (dead) Delta = 0;
        workspace.Delta[row] = DROPOUT ? Delta / p.keep_scale : Delta;  // with dropout, the backward computes dS / keep_scale
        // Zeros count as stored. Under a mask, the kernel that decides whether there are zeros says so.
        const int state = STORES_FIRST && zeros && !p.deterministic ? Workspace::STORED : Workspace::UNTOUCHED;
        if (i % BLOCK_Q == 0 && has_slot && (zeros || PERSISTENT)) workspace.turns[row / BLOCK_Q] = state;
        if (i == 0 && bh % group == 0) workspace.added[bh / group] = workspace.zeroed[bh / group] = 0;
#if INTERVAL
        workspace.seen(p)[row] = make_uint2(keys.start, max(0, keys.stop - keys.start));
#endif
    }
    if (zeros && has_slot) {
        float4* dQ = reinterpret_cast<float4*>(workspace.dQ + static_cast<int64_t>(blockIdx.x) * PREPARE_ROWS * HEAD_DIM);
#pragma unroll
        for (int e = threadIdx.x; e < PREPARE_ROWS * HEAD_DIM / 4; e += PREPARE_THREADS) dQ[e] = make_float4(0, 0, 0, 0);
    }
#if LISTED || PERSISTENT
    // Launched early, this kernel runs beside the kernels that scan the mask or sort units. One block waits for them, and thereby also the next kernel.
    if (blockIdx.x == gridDim.x - 1) ptx::griddepcontrol_wait();
#endif
}
__global__ void __launch_bounds__(PREPARE_THREADS, PREPARE_BLOCKS)
    prepare_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Slots slots, const __grid_constant__ bool zeros) {
    prepare<false>(p, slots, {}, zeros);
}
__global__ void __launch_bounds__(PREPARE_THREADS, PREPARE_BLOCKS)
    prepare_copying_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Slots slots, const __grid_constant__ bool zeros,
                           const __grid_constant__ Tensor4 copy) {
    prepare<true>(p, slots, copy, zeros);
}

// early: may overlap the previous kernels. with: the call as the backward kernel gets it. zeros: STORES_FIRST: whether blocks add to zeros nevertheless.
inline void launch_prepare(const AttentionParams& p, const AttentionParams& with, bool early = false, bool zeros = true) {
    const unsigned blocks = static_cast<unsigned>(Workspace::all_rows(p) / PREPARE_ROWS);
    if (blocks == 0) return;
    const Slots slots = slots_of(p);
    if (may_be_dead(p)) launch_early_if(early, prepare_copying_kernel, blocks, PREPARE_THREADS, 0, p.stream, p, slots, zeros, with.d_o);
    else launch_early_if(early, prepare_kernel, blocks, PREPARE_THREADS, 0, p.stream, p, slots, zeros);
}

// ---- after: dQ out of fragment order, scaled and rounded. One warp takes 16 rows, through shared memory so that it writes 16 bytes a lane.

constexpr int FINISH_WARPS = 4;
using Tile_dQ = SwizzledTile<16, HEAD_DIM>;

// Of all query heads from `first` on. If the backward counts units, blocks of this kernel start as soon as a multiprocessor has no more units, and take heads
// that are complete while others are still computed.
__global__ void __launch_bounds__(32 * FINISH_WARPS)
    finish_dq_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Slots slots, const __grid_constant__ int first) {
    __shared__ __align__(128) uint8_t smem[FINISH_WARPS][Tile_dQ::BYTES];
    const Workspace workspace(p, slots);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, group = p.H / p.Hkv;
    const int blocks_per_head = workspace.rows / (16 * FINISH_WARPS);
    const int i0 = blockIdx.x % blocks_per_head * (16 * FINISH_WARPS) + warp * 16;
    const int bh = first + blockIdx.x / blocks_per_head;
    const int64_t row = static_cast<int64_t>(slots.of(bh / group) * group + bh % group) * workspace.rows + i0;
    const float scale = DROPOUT ? p.scale * p.keep_scale : p.scale;
#if COUNTS_UNITS
    if (lane == 0) await(workspace.added + bh / group, (p.Nk + BLOCK_K - 1) / BLOCK_K);
    __syncwarp();
#endif
    // If no block had anything to add to a tile, it has not even been stored. This is not known before the loads are issued.
    const bool untouched = STORES_FIRST && workspace.turns[row / BLOCK_Q] == Workspace::UNTOUCHED;
    constexpr int AT_ONCE = HEAD_DIM == 112 ? 2 : 8;  // otherwise eight of fourteen specialisations would spill a register
#pragma unroll AT_ONCE
    for (int column = 0; column < HEAD_DIM; column += 8) {
        const float* from = workspace.dQ + fragment_offset(row, column, lane);
        const float4 sums = STORES_FIRST ? ptx::ld_perhaps_unwritten(from) : *reinterpret_cast<const float4*>(from);
        const float4 dQ_rmem = untouched ? float4{} : sums;
        *reinterpret_cast<uint32_t*>(smem[warp] + Tile_dQ::offset(g, column / 8) + 4 * t) =
            ptx::cvt_pair<element>(dQ_rmem.x * scale, dQ_rmem.y * scale);
        *reinterpret_cast<uint32_t*>(smem[warp] + Tile_dQ::offset(g + 8, column / 8) + 4 * t) =
            ptx::cvt_pair<element>(dQ_rmem.z * scale, dQ_rmem.w * scale);
    }
    __syncwarp();  // the warp's rows are written, by lanes other than those that read them next
    store_16_rows<Tile_dQ>(head_of(p.dq, bh / p.H, bh % p.H), smem[warp], p.dq.stride_n, 0, lane, i0, p.Nq, p.D);
#if COUNTS_UNITS
    if (blockIdx.x == gridDim.x - 1) ptx::griddepcontrol_wait();  // so the next kernel starts only after the backward has stored dK and dV
#endif
}

// For the last `lag` heads of K and V: the backward kernel has finished the others. early: may overlap it.
inline void launch_finish(const AttentionParams& p, bool early = false) {
    const Slots slots = slots_of(p);
    const int group = p.H / p.Hkv, first = std::max(0, p.B * p.Hkv - slots.lag) * group;
    const int64_t rows = tiles_of(p.Nq, PADDED_TO) * PADDED_TO * (static_cast<int64_t>(p.B) * p.H - first);
    if (rows == 0) return;
    launch_early_if(early, finish_dq_kernel, static_cast<unsigned>(rows / (16 * FINISH_WARPS)), 32 * FINISH_WARPS, 0, p.stream, p, slots, first);
}

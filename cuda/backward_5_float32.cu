// Backward in float32 on Hopper's tensor cores: FlashAttention-3 (Shah et al., 2024, arXiv:2407.08608), Algorithm 3, each product of float32 numbers made
// of three of float16 numbers (Ootomo and Yokota, 2022, arXiv:2203.03341).  sm_90a.
//
// The idea: forward_5_float32.cu's, for five products. Q, K, V and dO come as planes (planes.cuh); Pᵀ and dSᵀ are split when they are computed, and
// go through shared memory, from where both groups multiply them.
//
// Change from backward_4_hopper_wide.cu: two warpgroups share 64 keys here too, and each computes Sᵀ = K Qᵀ and dPᵀ = V dOᵀ for half
// the rows of Q. But then one group computes all of dV += Pᵀ dO, the other all of dK += dSᵀ Q: the same instructions with other operands, and larger
// products, which shared memory can feed at full speed. Each computes half of dQ = dS K. A tile's sums begin at 0 and are added in float32; there are
// enough registers for that because a group keeps one gradient instead of two.
//
// Serves float32, everything in the interface, positive scale; head sizes up to 128 that are multiples of 4.
//
// One file because the main kernel's loop is one schedule; the two small kernels prepare its rows and order its dQ.
#include "keep_bits.cuh"
#include "mask_start.cuh"
#include "planes.cuh"
#include "ptx_hopper.cuh"
#include "swizzle.cuh"
#include "tensor_core.cuh"
#include "tensor_map.cuh"

#if MASK && MASK != MASK_OF_KEY_BITS
#error "this rung reads masks of bits by keys"
#endif

// Heads whose values the planes cannot represent are computed by the `simple` rung.
__device__ inline bool planes_have_served(const AttentionParams& p, int b, int h_kv) { return gradients_fit(p, range_before(p, b, h_kv)); }
#define HEAD_IS_DONE(p, b, h) planes_have_served(p, b, h)
#define attention exact_attention
#define workspace_floats exact_workspace_floats
namespace exact {
#include "backward_1_simple.cu"
}
#undef attention
#undef workspace_floats

// ---- tile sizes
constexpr int GROUP = 128;  // threads of a warpgroup
constexpr int CONSUMERS = 2;
constexpr int THREADS = GROUP * (1 + CONSUMERS);
constexpr int BLOCK_K = 64;
constexpr int BLOCK_Q = HEAD_DIM <= 64 ? 128 : 64;
constexpr int ROWS = BLOCK_Q / CONSUMERS;  // of Q: a group's columns of Sᵀ and dPᵀ
constexpr int N_TILES = ROWS / 8;
constexpr bool BY_ROWS = BLOCK_Q == 128;           // a group computes 64 rows of dQ or, if the tile has no more, 64 columns
constexpr int STAGES = BY_ROWS && MASK ? 1 : 2;    // pairs of Q and dO tiles in shared memory, each with its LSE and Delta

using Tile_K = SwizzledTile<BLOCK_K, HEAD_DIM>;
using Tile_Q = SwizzledTile<BLOCK_Q, HEAD_DIM>;
using Tile_S = SwizzledTile<BLOCK_K, BLOCK_Q>;  // transposed: rows are keys
constexpr int K_BYTES = PLANES * Tile_K::BYTES, Q_BYTES = PLANES * Tile_Q::BYTES, S_BYTES = PLANES * Tile_S::BYTES;
constexpr int ROWS_BYTES = BLOCK_Q * 4;  // of LSE, and as many of Delta
constexpr int MASK_BYTES = MASK ? BLOCK_K * static_cast<int>(sizeof(BitRow)) : 0;
constexpr int ROWS_OFFSET = 2 * K_BYTES + STAGES * 2 * Q_BYTES + 2 * S_BYTES, MASK_OFFSET = ROWS_OFFSET + STAGES * 2 * ROWS_BYTES;
constexpr int SMEM_BYTES = MASK_OFFSET + MASK_BYTES;
static_assert(SMEM_BYTES <= SMEM_KB * 1024 - 1024, "choose smaller tiles");

constexpr int P_EXPONENT = 15;  // P, at most 1, is multiplied by 2^15, to fill float16's range

// ---- workspace: of a part of the heads, planes, dQ in fragment order, LSE and Delta of every row, a counter for every tile of Q; the Ranges; the
// simple rung's own. Rows are padded to whole tiles.
struct Workspace {
    float *dQ, *LSE, *Delta;  // [B·H·rows, HEAD_DIM], [B·H·rows], [B·H·rows]
    int* turns;               // [B·H·rows / BLOCK_Q]: how many key blocks have added to the tile, used if deterministic
    Range* ranges;            // [B, Hkv]
    First first;              // head of the part
    int rows;                 // of one head

    static int64_t all_rows(const AttentionParams& p) { return tiles_of(p.Nq, BLOCK_Q) * BLOCK_Q * p.H * p.B; }
    static int64_t floats(const AttentionParams& p) { return all_rows(p) * (HEAD_DIM + 2) + all_rows(p) / BLOCK_Q; }
    Workspace(const AttentionParams& p, const Operands& all, First first)
        : ranges(all.ranges), first(first), rows(static_cast<int>(tiles_of(p.Nq, BLOCK_Q) * BLOCK_Q)) {
        dQ = p.workspace + all.floats, LSE = dQ + all_rows(p) * HEAD_DIM, Delta = LSE + all_rows(p);
        turns = reinterpret_cast<int*>(Delta + all_rows(p));
    }
};

// Where a lane's four values of an accumulator tile lie in the workspace's dQ: tiles of 16 rows (from `row`) × 8 columns (from `column`) follow each
// other along the columns, each 512 contiguous bytes.
__device__ inline int64_t fragment_offset(int64_t row, int column, int lane) { return row * HEAD_DIM + column * 16 + lane * 4; }

// ---- the first kernel: Delta = rowsum(dO∘O) − dLSE (line 4), in the scale of dP; LSE; zeros for dQ (line 3)

__global__ void __launch_bounds__(PREPARE_THREADS) delta_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Workspace workspace) {
    const int blocks_per_head = workspace.rows / ROWS_AT_ONCE;
    const int i = blockIdx.x % blocks_per_head * ROWS_AT_ONCE + threadIdx.x / ROW_LANES;
    const int bh = blockIdx.x / blocks_per_head, b = bh / p.H, h = bh % p.H;
    const int column = threadIdx.x % ROW_LANES * 8;
    Range& range = workspace.ranges[b * p.Hkv + kv_head(p, h)];

    float part_of_Delta = 0;
    const float* O_gmem = static_cast<const float*>(p.o.data) + b * p.o.stride_b + h * p.o.stride_h + i * p.o.stride_n + column;
    const float* dO_gmem = static_cast<const float*>(p.d_o.data) + b * p.d_o.stride_b + h * p.d_o.stride_h + i * p.d_o.stride_n + column;
#pragma unroll
    for (int half = 0; half < 2; ++half)
        if (i < p.Nq && column + 4 * half < p.Dv) {
            const float4 O = reinterpret_cast<const float4*>(O_gmem)[half], dO = rounded_as_planes(reinterpret_cast<const float4*>(dO_gmem)[half], range);
            part_of_Delta += fmaf(O.x, dO.x, fmaf(O.y, dO.y, fmaf(O.z, dO.z, O.w * dO.w)));
        }
    const auto [LSE, Delta] = finish_row(p, range, bh, i, part_of_Delta);
    const int64_t row = static_cast<int64_t>(bh) * workspace.rows + i;
    if (column == 0) {
        workspace.LSE[row] = LSE;
        workspace.Delta[row] = Delta;
        if (i % BLOCK_Q == 0) workspace.turns[row / BLOCK_Q] = 0;
    }
    float4* dQ = reinterpret_cast<float4*>(workspace.dQ + static_cast<int64_t>(blockIdx.x) * ROWS_AT_ONCE * HEAD_DIM);
#pragma unroll
    for (int e = threadIdx.x; e < ROWS_AT_ONCE * HEAD_DIM / 4; e += PREPARE_THREADS) dQ[e] = make_float4(0, 0, 0, 0);
}

// ---- the last kernel: brings dQ from fragment order into rows, and scales it. A warp takes 16 rows.

constexpr int FINISH_WARPS = 4;

__global__ void __launch_bounds__(32 * FINISH_WARPS) finish_dq_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Workspace workspace) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int blocks_per_head = workspace.rows / (16 * FINISH_WARPS);
    const int i0 = blockIdx.x % blocks_per_head * (16 * FINISH_WARPS) + warp * 16;
    const int bh = blockIdx.x / blocks_per_head, b = bh / p.H, h = bh % p.H;
    const int64_t row = static_cast<int64_t>(bh) * workspace.rows + i0;
    Range& range = workspace.ranges[b * p.Hkv + kv_head(p, h)];
    const int exponent = exponent_of_dS(range) + exponent_of(range.v) + exponent_of(range.d_o) + exponent_of(range.k);
    const float scale = DROPOUT ? p.scale * p.keep_scale : p.scale;
    float* dQ_gmem = static_cast<float*>(p.dq.data) + b * p.dq.stride_b + h * p.dq.stride_h;
    float largest = 0;
#pragma unroll 4
    for (int column = 0; column < HEAD_DIM; column += 8) {
        const float4 dQ = *reinterpret_cast<const float4*>(workspace.dQ + fragment_offset(row, column, lane));
        largest = fmaxf(fmaxf(largest, fmaxf(fabsf(dQ.x), fabsf(dQ.y))), fmaxf(fabsf(dQ.z), fabsf(dQ.w)));
        auto store = [&](int i, float x0, float x1) {
            if (i < p.Nq && column + 2 * t < p.D)
                *reinterpret_cast<float2*>(dQ_gmem + i * p.dq.stride_n + column + 2 * t) = make_float2(scalbnf(x0 * scale, -exponent), scalbnf(x1 * scale, -exponent));
        };
        store(i0 + g, dQ.x, dQ.y);
        store(i0 + g + 8, dQ.z, dQ.w);
    }
    join_maximum(&range.dq, magnitude(largest));
}

// ---- the products

struct Maps {
    CUtensorMap q, k, v, d_o, mask;
};

// "full": the bytes have arrived (Q's barrier counts the mask's too). "empty": every computing thread has finished reading them. The mask has a
// single buffer with its own barrier: its tile is read early in a step, long before Q and dO are released.
struct Barriers {
    uint64_t KV_full, Q_full[STAGES], dO_full[STAGES], empty[STAGES], mask_empty;
};

// The tiles of Q that see some of a block's keys, of every query head that shares them: head bh = b·H + h, tile, and its index in the visit. Causal:
// from the last tile down, so that the blocks of a head reach the same tile at about the same time; when blocks take turns, this order is required.
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
    __device__ Slot<STAGES> slot() const { return Slot<STAGES>(n); }
};

// Waits for both groups.
__device__ inline void meet() { ptx::bar_sync(1, CONSUMERS * GROUP); }

__global__ void __launch_bounds__(THREADS, 1)
    backward_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Maps maps, const __grid_constant__ Workspace workspace) {
    extern __shared__ __align__(1024) uint8_t smem[];
    __shared__ __align__(8) Barriers barriers;
    const uint32_t K_smem = ptx::smem_address(smem);              // PLANES × [BLOCK_K, HEAD_DIM]
    const uint32_t V_smem = K_smem + K_BYTES;                     // PLANES × [BLOCK_K, HEAD_DIM]
    const uint32_t QdO_smem = V_smem + K_BYTES;                   // STAGES × (PLANES × Q [BLOCK_Q, HEAD_DIM], PLANES × dO [BLOCK_Q, HEAD_DIM])
    const uint32_t P_smem = QdO_smem + STAGES * 2 * Q_BYTES;      // PLANES × Pᵀ [BLOCK_K, BLOCK_Q]
    const uint32_t dS_smem = P_smem + S_BYTES;                    // PLANES × dSᵀ [BLOCK_K, BLOCK_Q]
    const float* rows_smem = reinterpret_cast<const float*>(smem + ROWS_OFFSET);  // STAGES × (LSE [BLOCK_Q], Delta [BLOCK_Q])
    uint8_t* mask_smem = smem + MASK_OFFSET;                                      // [BLOCK_K] BitRow
    const uint32_t KV_full = ptx::smem_address(&barriers.KV_full), mask_empty = ptx::smem_address(&barriers.mask_empty);
    auto barrier = [](uint64_t* of, int stage) { return ptx::smem_address(of + stage); };

    // One block computes dK and dV of BLOCK_K keys. Causal: the first keys are seen by the most rows, and start first.
    const int k_tiles = (p.Nk + BLOCK_K - 1) / BLOCK_K;
    const int k_tile = blockIdx.x % k_tiles, b_kv_h = blockIdx.x / k_tiles;  // b_kv_h = b·Hkv + kv_h
    const int j0 = k_tile * BLOCK_K, offset = p.Nk - p.Nq;                   // causal: row i sees columns j ≤ i + offset
    Range& range = workspace.ranges[b_kv_h];
    if (!scores_fit(p, range)) return;  // the simple rung's

    if (threadIdx.x == 0) {
        ptx::mbarrier_init(KV_full, 1);
        ptx::mbarrier_init(mask_empty, GROUP * CONSUMERS);
        for (int stage = 0; stage < STAGES; ++stage) {
            ptx::mbarrier_init(barrier(barriers.Q_full, stage), 1);
            ptx::mbarrier_init(barrier(barriers.dO_full, stage), 1);
            ptx::mbarrier_init(barrier(barriers.empty, stage), GROUP * CONSUMERS);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();

    const int group = uniform(threadIdx.x / GROUP);
    if (group == 0) {
        // ---- the producer: one thread loads every tile
        ptx::setmaxnreg_dec<24>();  // all start with 168; the two other groups take the 144 · 128 that this group returns
        if (threadIdx.x == 0) {
            ptx::mbarrier_arrive_expect_tx(KV_full, 2 * K_BYTES);
            for (int plane = 0; plane < PLANES; ++plane) {
                load_boxes<Tile_K, RowOrder>(K_smem + plane * Tile_K::BYTES, maps.k, j0, b_kv_h, plane, KV_full);
                load_boxes<Tile_K, RowOrder>(V_smem + plane * Tile_K::BYTES, maps.v, j0, b_kv_h, plane, KV_full);
            }
            for (Visit at(p, j0, b_kv_h); at.more(); at.advance()) {
                const Slot<STAGES> slot = at.slot();
                const int stage = slot.stage, i0 = at.tile * BLOCK_Q;
                const int64_t row = static_cast<int64_t>(at.bh) * workspace.rows + i0;
                const uint32_t rows = K_smem + ROWS_OFFSET + stage * 2 * ROWS_BYTES;
                auto load = [&](uint32_t tile, const CUtensorMap& map, uint32_t rows, const float* of_rows, uint32_t full, int more_bytes) {
                    ptx::mbarrier_arrive_expect_tx(full, Q_BYTES + ROWS_BYTES + more_bytes);
                    for (int plane = 0; plane < PLANES; ++plane) load_boxes<Tile_Q>(tile + plane * Tile_Q::BYTES, map, i0, at.bh, plane, full);
                    ptx::cp_async_bulk(rows, of_rows, ROWS_BYTES, full);
                };
                ptx::mbarrier_wait(barrier(barriers.empty, stage), slot.parity ^ 1);  // returns immediately in the first round
                const uint32_t Q_tile = QdO_smem + stage * 2 * Q_BYTES;
                load(Q_tile, maps.q, rows, workspace.LSE + row, barrier(barriers.Q_full, stage), MASK_BYTES);
                if (MASK) {
                    ptx::mbarrier_wait(mask_empty, (at.n & 1) ^ 1);
                    ptx::cp_async_bulk_tensor_4d(ptx::smem_address(mask_smem), &maps.mask, one_row(p) ? 0 : i0 / BIT_COLUMNS * 4, j0, at.bh % p.H,
                                                 at.bh / p.H, barrier(barriers.Q_full, stage));
                }
                load(Q_tile + Q_BYTES, maps.d_o, rows + ROWS_BYTES, workspace.Delta + row, barrier(barriers.dO_full, stage), 0);
            }
        }
    } else {
        // ---- the consumers
        ptx::setmaxnreg_inc<240>();
        const int consumer = group - 1, warp = threadIdx.x % GROUP / 32, lane = threadIdx.x % 32, t = lane % 4;
        const int place = warp * 16 + lane / 4;      // in the tile of keys; this thread holds it and the row 8 further on,
        const int first_row = RowOrder::row(place);  // keys first_row and first_row + ROW_STEP
        const float scale = scale_of_scores(p, range);
        const int dS_exponent = exponent_of_dS(range);
        const float dS_factor = scalbnf(1, dS_exponent - P_EXPONENT);  // of P as it is scaled

        // dV of the first group, dK of the second; a tile's part of it, and of dQ
        float X_rmem[HEAD_DIM / 2] = {}, X_tile_rmem[HEAD_DIM / 2], dQ_rmem[32];

        ptx::mbarrier_wait(KV_full, 0);
        for (Visit now(p, j0, b_kv_h); now.more(); now.advance()) {
            const Slot<STAGES> slot = now.slot();
            const int stage = slot.stage, i0 = now.tile * BLOCK_Q;
            const uint32_t Q_tile = QdO_smem + stage * 2 * Q_BYTES, dO_tile = Q_tile + Q_BYTES;
            const float* LSE_smem = rows_smem + stage * 2 * BLOCK_Q + consumer * ROWS + 2 * t;
            const float* Delta_smem = LSE_smem + BLOCK_Q;

            // Whether some key of the tile is not seen by all rows.
            const bool cut = j0 + BLOCK_K > min(p.Nk, CAUSAL ? i0 + offset + 1 : p.Nk);

            // Issues the group's columns of Sᵀ = K Qᵀ and dPᵀ = V dOᵀ
            float S_rmem[ROWS / 2], dP_rmem[ROWS / 2];
            auto multiply = [&](float(&C)[ROWS / 2], uint32_t A, uint32_t B, bool from_zero) {
                const uint64_t a = ptx::descriptor(uniform(A)), b = ptx::descriptor(uniform(B + consumer * ROWS * ROW_BYTES));
                ptx::wgmma_fence();
#pragma unroll
                for (int product = 0; product < PRODUCTS; ++product)  // Q is the first factor, as in the forward
#pragma unroll
                    for (int d = 0; d < HEAD_DIM / 16; ++d)
                        ptx::wgmma_ss<__half, ROWS>(C, ptx::advance(a, plane_of_second(product) * Tile_K::BYTES + d / 4 * Tile_K::PANEL_BYTES + d % 4 * 32),
                                                    ptx::advance(b, plane_of_first(product) * Tile_Q::BYTES + d / 4 * Tile_Q::PANEL_BYTES + d % 4 * 32),
                                                    !from_zero || product > 0 || d > 0);
                ptx::wgmma_commit_group();
            };
            ptx::mbarrier_wait(barrier(barriers.Q_full, stage), slot.parity);
#if MASK
            // Key j is seen by the rows from j − offset on.
            const int first_i = i0 + consumer * ROWS;
            start_S<ROWS>(S_rmem, mask_smem, first_i % BIT_COLUMNS, first_row, ROW_STEP, t, [&](int r, int w) {
                const int j = j0 + first_row + ROW_STEP * r;
                return first_bits((j >= p.Nk ? ROWS : CAUSAL ? j - offset - first_i : 0) - 32 * w);
            });
#endif
            multiply(S_rmem, K_smem, Q_tile, !MASK);
            if (MASK) ptx::mbarrier_arrive(mask_empty);  // not before the product has used the values: an arrival does not wait for loads
            ptx::mbarrier_wait(barrier(barriers.dO_full, stage), slot.parity);
            multiply(dP_rmem, V_smem, dO_tile, true);

            // While they run: which elements of the tile dropout keeps.
            [[maybe_unused]] KeepBits<ROWS> keep;
            if (DROPOUT) keep.draw_keys(p, workspace.first.b + now.bh / p.H, workspace.first.h + now.bh % p.H, j0 + first_row, i0 + consumer * ROWS, lane);

            ptx::wgmma_wait_group<0>();
            meet();  // both groups are done with the last tile's Pᵀ and dSᵀ
            // P = exp(scale · S − LSE), 0 beyond the diagonal or the end of the keys. Beyond the end of the rows LSE is ∞.
            // dS = P∘(dP − Delta). With dropout, dS = P∘(keep_scale · kept dP − Delta); the factor keep_scale is applied at the end, as for dV.
#pragma unroll
            for (int n = 0; n < N_TILES; ++n) {
                const float2 LSE = *reinterpret_cast<const float2*>(LSE_smem + 8 * n), Delta = *reinterpret_cast<const float2*>(Delta_smem + 8 * n);
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    // The difference comes first: in base 2, score and LSE would each be rounded, relative to their size. The product is rounded, as in LSE.
                    float P0 = ptx::ex2(fmaf(__fmul_rn(S_rmem[4 * n + 2 * r], scale) - LSE.x, LOG2_E, P_EXPONENT));
                    float P1 = ptx::ex2(fmaf(__fmul_rn(S_rmem[4 * n + 2 * r + 1], scale) - LSE.y, LOG2_E, P_EXPONENT));
                    if (!MASK && cut) {
                        const int j = j0 + first_row + ROW_STEP * r, i = i0 + consumer * ROWS + 8 * n + 2 * t;
                        if (j >= p.Nk || (CAUSAL && j > i + offset)) P0 = 0;
                        if (j >= p.Nk || (CAUSAL && j > i + 1 + offset)) P1 = 0;
                    }
                    float dP0 = dP_rmem[4 * n + 2 * r], dP1 = dP_rmem[4 * n + 2 * r + 1];
                    if (DROPOUT) dP0 = keep.kept(dP0, r, n, 0), dP1 = keep.kept(dP1, r, n, 1);
                    const uint32_t to = Tile_S::offset(place + 8 * r, consumer * N_TILES + n) + 4 * t;
                    uint32_t hi, lo;
                    split(P0, P1, hi, lo);
                    const uint32_t kept = DROPOUT ? keep.pair(r, n) : ~0u;
                    ptx::st_shared(P_smem + to, hi & kept);
                    if (PLANES == 2) ptx::st_shared(P_smem + Tile_S::BYTES + to, lo & kept);
                    split(P0 * dS_factor * (dP0 - Delta.x), P1 * dS_factor * (dP1 - Delta.y), hi, lo);
                    ptx::st_shared(dS_smem + to, hi);
                    if (PLANES == 2) ptx::st_shared(dS_smem + Tile_S::BYTES + to, lo);
                }
            }
            ptx::fence_proxy_async();  // this thread's part of Pᵀ and dSᵀ
            meet();                    // Pᵀ and dSᵀ are whole

            // Issues the tile's part of dV = Pᵀ dO or dK = dSᵀ Q: the summation index runs over the rows of dO and Q
            const uint64_t A = ptx::descriptor(uniform(consumer == 0 ? P_smem : dS_smem));
            const uint64_t B = ptx::descriptor(uniform(consumer == 0 ? dO_tile : Q_tile), Tile_Q::PANEL_BYTES);
            ptx::wgmma_fence();
#pragma unroll
            for (int product = 0; product < PRODUCTS; ++product)
#pragma unroll
                for (int k = 0; k < BLOCK_Q / 16; ++k)
                    ptx::wgmma_ss_transposed_b<__half, HEAD_DIM>(
                        X_tile_rmem, ptx::advance(A, plane_of_first(product) * Tile_S::BYTES + k / 4 * Tile_S::PANEL_BYTES + k % 4 * 32),
                        ptx::advance(B, plane_of_second(product) * Tile_Q::BYTES + k * 16 * ROW_BYTES), product > 0 || k > 0);
            ptx::wgmma_commit_group();
            // Issues the group's part of dQ = dS K
            const uint64_t dS_part = ptx::descriptor(uniform(dS_smem + (BY_ROWS ? consumer * Tile_S::PANEL_BYTES : 0)));
            const uint64_t K_part = ptx::descriptor(uniform(K_smem + (BY_ROWS ? 0 : consumer * Tile_K::PANEL_BYTES)));
#pragma unroll
            for (int product = 0; product < PRODUCTS; ++product)
#pragma unroll
                for (int k = 0; k < BLOCK_K / 16; ++k)
                    ptx::wgmma_ss_transposed<__half, 64>(dQ_rmem, ptx::advance(dS_part, plane_of_first(product) * Tile_S::BYTES + k * 16 * ROW_BYTES),
                                                         ptx::advance(K_part, plane_of_second(product) * Tile_K::BYTES + k * 16 * ROW_BYTES),
                                                         product > 0 || k > 0);
            ptx::wgmma_commit_group();

            ptx::wgmma_wait_group<1>();  // the tile's part of dV or dK is there
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 2; ++i) X_rmem[i] += X_tile_rmem[i];
            ptx::mbarrier_arrive(barrier(barriers.empty, stage));  // done with Q and dO
            ptx::wgmma_wait_group<0>();                            // dQ too
            const int64_t row = static_cast<int64_t>(now.bh) * workspace.rows + i0;
            // Deterministic: blocks add to a tile in the order of their keys. They start in that order too, so the block waited for is running or done.
            if (p.deterministic) {
                if (threadIdx.x == GROUP)
                    while (ptx::ld_acquire(workspace.turns + row / BLOCK_Q) != k_tile) {}
                meet();  // our turn, for every thread
            }
            float* dQ_gmem = workspace.dQ + fragment_offset(row + (BY_ROWS ? consumer * 64 : 0) + warp * 16, BY_ROWS ? 0 : consumer * 64, lane);
#pragma unroll
            for (int n = 0; n < 8; ++n)
                ptx::red_add_4(dQ_gmem + fragment_offset(0, 8 * n, 0), dQ_rmem[4 * n], dQ_rmem[4 * n + 1], dQ_rmem[4 * n + 2], dQ_rmem[4 * n + 3]);
            if (p.deterministic) {
                __threadfence();  // this thread's additions come before the next block's
                meet();           // all threads' additions are made
                if (threadIdx.x == GROUP) ptx::st_release(workspace.turns + row / BLOCK_Q, k_tile + 1);
            }
        }

        // Stores dV or dK, two columns at a time: four lanes write 32 bytes of a row.
        const Tensor4& X = consumer == 0 ? p.dv : p.dk;
        const int columns = consumer == 0 ? p.Dv : p.D;
        const int exponent = exponent_of(range.d_o) + (consumer == 0 ? P_EXPONENT : dS_exponent + exponent_of(range.v) + exponent_of(range.q));
        const float factor = (DROPOUT ? p.keep_scale : 1.0f) * (consumer == 0 ? 1.0f : p.scale);
        float* X_gmem = static_cast<float*>(X.data) + b_kv_h / p.Hkv * X.stride_b + b_kv_h % p.Hkv * X.stride_h;
        float largest = 0;
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; ++n) {
                const float x0 = X_rmem[4 * n + 2 * r], x1 = X_rmem[4 * n + 2 * r + 1];
                const int j = j0 + first_row + ROW_STEP * r, column = 8 * n + 2 * t;
                largest = fmaxf(largest, fmaxf(fabsf(x0), fabsf(x1)));
                if (j < p.Nk && column < columns)
                    *reinterpret_cast<float2*>(X_gmem + j * X.stride_n + column) = make_float2(scalbnf(x0 * factor, -exponent), scalbnf(x1 * factor, -exponent));
            }
        join_maximum(consumer == 0 ? &range.dv : &range.dk, magnitude(largest));
    }
}

// ---- launching

inline int64_t k_blocks(const AttentionParams& p) { return tiles_of(p.Nk, BLOCK_K) * p.Hkv * p.B; }
inline int64_t part_floats(const AttentionParams& p) { return Operands(p, true, nullptr).floats + Workspace::floats(p); }
inline Parts parts_of(const AttentionParams& p) { return Parts(p, part_floats(p) * 4, {k_blocks(call_of(p, {0, 1, 0, 1}))}); }

extern "C" int64_t workspace_floats(const AttentionParams* params) {
    const AttentionParams& p = *params;
    return part_floats(call_of(p, parts_of(p).largest())) + Operands::range_floats(p) + exact::exact_workspace_floats(params);
}

static cudaError_t launch_part(const AttentionParams& p, Range* ranges, First first) {
    const Operands all(p, true, ranges);
    const Workspace workspace(p, all, first);
    const unsigned rows = static_cast<unsigned>(Workspace::all_rows(p)), of_k = static_cast<unsigned>(k_blocks(p));
    launch_planes(p, all);
    if (rows > 0) launch_kernel(delta_kernel, rows / ROWS_AT_ONCE, PREPARE_THREADS, 0, p.stream, p, workspace);
    if (of_k > 0) {
        cudaError_t error = cudaFuncSetAttribute(backward_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SMEM_BYTES);
        Maps maps = {};
        if (error == cudaSuccess && p.Nq > 0) error = make_planes_map(&maps.q, all.of[0], p.B, BLOCK_Q);
        if (error == cudaSuccess) error = make_planes_map(&maps.k, all.of[1], p.B, BOX_ROWS<Tile_K, RowOrder>);
        if (error == cudaSuccess) error = make_planes_map(&maps.v, all.of[2], p.B, BOX_ROWS<Tile_K, RowOrder>);
        if (error == cudaSuccess && p.Nq > 0) error = make_planes_map(&maps.d_o, all.of[3], p.B, BLOCK_Q);
        if (error == cudaSuccess && p.Nq > 0 && MASK) error = make_mask_map(&maps.mask, p, BLOCK_K);
        if (error != cudaSuccess) return error;
        launch_kernel(backward_kernel, of_k, THREADS, SMEM_BYTES, p.stream, p, maps, workspace);
    }
    if (rows > 0) launch_kernel(finish_dq_kernel, rows / (16 * FINISH_WARPS), 32 * FINISH_WARPS, 0, p.stream, p, workspace);
    return cudaSuccess;
}

extern "C" int attention(const AttentionParams* params) {
    const AttentionParams& p = *params;
    if (Workspace::all_rows(p) == 0 && k_blocks(p) == 0) return cudaSuccess;
    if (!numbers_fit(p, {Workspace::all_rows(p), k_blocks(p), prepare_blocks(p, Operands(p, true, nullptr))})) return cudaErrorInvalidConfiguration;
    DeviceGuard guard(p.device);
    return launch_parts(p, parts_of(p), p.workspace + workspace_floats(params) - exact::exact_workspace_floats(params), launch_part, exact::exact_attention);
}

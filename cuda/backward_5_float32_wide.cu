// Backward in float32 on Hopper's tensor cores for heads of up to 512 columns: FlashAttention-3 (Shah et al., 2024, arXiv:2407.08608), Algorithm 3, with the
// planes of planes.cuh (Ootomo and Yokota, 2022, arXiv:2203.03341).  sm_90a.
//
// The idea: that of forward_5_float32_wide.cu, three times. Each gradient has its own kernel, because no two of them fit into registers: a block holds 64
// rows of one gradient and loops over the rows of the other side (keys for dQ, queries for dK and dV), 64 at a time. Each of two warpgroups computes 32
// columns of S and dP, the groups exchange their parts of dS (or P) through shared memory, and each adds to half of the gradient's columns. So S is computed
// three times and dP twice, 8 products instead of 5; in return nothing is summed in global memory, and gradients always repeat bit for bit.
//
// Change from backward_5_float32.cu: one kernel for each gradient. As in the wide forward, sums over every 64 columns of the head, and over every 64 rows
// of a gradient's sum, begin at 0 and are added in float32: S equals the forward's to the last bit.
//
// Serves float32, everything in the interface but windows and spans, positive scale; head sizes up to 512 that are multiples of 4.
//
// One file because its kernel is one loop, for each of three gradients, whose branches share the ring and the registers.
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
constexpr int BLOCK = 64;                      // rows of the gradient, and rows that they meet at a time ("others")
constexpr int PART = BLOCK / CONSUMERS;        // others whose scores a group computes
constexpr int COLUMNS = HEAD_DIM / CONSUMERS;  // of the gradient, of a group
constexpr int PANELS = HEAD_DIM / 64;

using Tile_X = SwizzledTile<BLOCK, HEAD_DIM>;  // the operand of S that a block keeps: its rows of Q or K
using Tile_S = SwizzledTile<BLOCK, BLOCK>;     // of dS or P, rows as the gradient's
using Piece_A = SwizzledTile<BLOCK, 64>;       // of the other operand that has these rows, dO or V: its planes fill a stage that the groups share
using Piece = SwizzledTile<PART, 64>;          // of the other side's operands: their planes fill a stage of a group's ring
constexpr int X_BYTES = PLANES * Tile_X::BYTES, S_BYTES = PLANES * Tile_S::BYTES, A_BYTES = PLANES * Piece_A::BYTES, STAGE_BYTES = PLANES * Piece::BYTES;
constexpr int A_STAGES = 2;
constexpr int MASK_BYTES = MASK ? BLOCK * static_cast<int>(sizeof(BitRow)) : 0;
constexpr int MOST_RING = (SMEM_KB * 1024 - 1024 - X_BYTES - S_BYTES - A_STAGES * A_BYTES - MASK_BYTES) / (CONSUMERS * STAGE_BYTES);
constexpr int RING = MOST_RING < 6 ? MOST_RING : 6;  // stages of a group's
constexpr int RING_BYTES = RING * STAGE_BYTES;
constexpr int MASK_OFFSET = X_BYTES + S_BYTES + A_STAGES * A_BYTES + CONSUMERS * RING_BYTES, SMEM_BYTES = MASK_OFFSET + MASK_BYTES;
static_assert(RING >= 3, "two pieces are multiplied while another comes");

constexpr int P_EXPONENT = 15;  // P, at most 1, is multiplied by 2^15, to fill float16's range

enum Gradient { OF_Q, OF_K, OF_V };

// ---- workspace: planes, and LSE and Delta of every row, padded to whole tiles, of a part of the heads; the Ranges; the simple rung's own
struct Workspace {
    float *LSE, *Delta;  // [B·H·rows]
    Range* ranges;       // [B, Hkv]
    First first;         // head of the part
    int rows;            // of one head

    static int64_t all_rows(const AttentionParams& p) { return tiles_of(p.Nq, BLOCK) * BLOCK * p.H * p.B; }
    static int64_t floats(const AttentionParams& p) { return 2 * all_rows(p); }
    Workspace(const AttentionParams& p, const Operands& all, First first) : ranges(all.ranges), first(first), rows(static_cast<int>(tiles_of(p.Nq, BLOCK) * BLOCK)) {
        LSE = p.workspace + all.floats, Delta = LSE + all_rows(p);
    }
};

// dV is computed last and does not need V: until then, V's planes occupy its memory.
inline Operands operands_of(const AttentionParams& p, Range* ranges) { return Operands(p, true, ranges, true); }

// ---- the first kernel: Delta = rowsum(dO∘O) − dLSE (line 4), in the scale of dP; LSE

__global__ void __launch_bounds__(PREPARE_THREADS) delta_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Workspace workspace) {
    const int blocks_per_head = workspace.rows / ROWS_AT_ONCE;
    const int i = blockIdx.x % blocks_per_head * ROWS_AT_ONCE + threadIdx.x / ROW_LANES;
    const int bh = blockIdx.x / blocks_per_head, b = bh / p.H, h = bh % p.H;
    Range& range = workspace.ranges[b * p.Hkv + kv_head(p, h)];

    float part_of_Delta = 0;
    const float* O_gmem = static_cast<const float*>(p.o.data) + b * p.o.stride_b + h * p.o.stride_h + i * p.o.stride_n;
    const float* dO_gmem = static_cast<const float*>(p.d_o.data) + b * p.d_o.stride_b + h * p.d_o.stride_h + i * p.d_o.stride_n;
#pragma unroll
    for (int e = 0; e < 2 * ROW_PARTS; ++e) {
        const int column = (e * ROW_LANES + threadIdx.x % ROW_LANES) * 4;
        if (i >= p.Nq || column >= p.Dv) continue;
        const float4 O = *reinterpret_cast<const float4*>(O_gmem + column);
        const float4 dO = rounded_as_planes(*reinterpret_cast<const float4*>(dO_gmem + column), range);
        part_of_Delta += fmaf(O.x, dO.x, fmaf(O.y, dO.y, fmaf(O.z, dO.z, O.w * dO.w)));
    }
    const auto [LSE, Delta] = finish_row(p, range, bh, i, part_of_Delta);
    const int64_t row = static_cast<int64_t>(bh) * workspace.rows + i;
    if (threadIdx.x % ROW_LANES == 0) workspace.LSE[row] = LSE, workspace.Delta[row] = Delta;
}

// ---- the products

// Of boxes of a block's own rows, and of pieces of the others.
struct Maps {
    CUtensorMap own[4], others[4], mask;  // of q, k, v, dO
};
enum { MAP_Q, MAP_K, MAP_V, MAP_DO };

// "full": the bytes have arrived. "empty": the warps that compute with them are done.
struct Barriers {
    uint64_t X_full, A_full[A_STAGES], A_empty[A_STAGES], full[CONSUMERS][RING], empty[CONSUMERS][RING], mask_full, mask_empty;
};

// The stages of a ring of N, one after another.
template <int N>
struct Place {
    int stage = 0, parity = 0;
    __device__ void advance() {
        if (++stage == N) stage = 0, parity ^= 1;
    }
};

// The tiles that a block loops over: tiles of keys, from the first, or tiles of Q that see some of the block's keys, of every query head that shares them.
template <Gradient OF>
struct Visit {
    int h, end_h, begin, end;
    int tile, n = 0;  // n counts tiles

    __device__ Visit(const AttentionParams& p, int head, int row0) {
        const int group = p.H / p.Hkv;
        h = OF == OF_Q ? head : head * group, end_h = OF == OF_Q ? h + 1 : h + group;
        begin = OF == OF_Q ? 0 : first_row_of(p, row0) / BLOCK;
        end = ((OF == OF_Q ? stop_of_rows(p, row0, BLOCK) : p.Nq) + BLOCK - 1) / BLOCK;
        if (begin >= end) h = end_h;
        tile = begin;
    }
    __device__ bool more() const { return h < end_h; }
    __device__ void advance() {
        if (++tile == end) tile = begin, ++h;
        ++n;
    }
};

// Waits for both groups.
__device__ inline void meet() { ptx::bar_sync(1, CONSUMERS * GROUP); }

template <Gradient OF>
__global__ void __launch_bounds__(THREADS, 1)
    gradient_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Maps maps, const __grid_constant__ Workspace workspace) {
    extern __shared__ __align__(1024) uint8_t smem[];
    __shared__ __align__(8) Barriers barriers;
    const uint32_t X_smem = ptx::smem_address(smem);                 // PLANES × [BLOCK, HEAD_DIM]
    const uint32_t S_smem = X_smem + X_BYTES;                        // PLANES × [BLOCK, BLOCK]
    const uint32_t A_smem = S_smem + S_BYTES;                        // A_STAGES × PLANES × [BLOCK, 64]
    const uint32_t rings_smem = A_smem + A_STAGES * A_BYTES;         // CONSUMERS × RING × PLANES × [PART, 64]
    const uint8_t* mask_smem = smem + MASK_OFFSET;                   // [BLOCK] BitRow, of keys
    auto barrier = [](uint64_t& of) { return ptx::smem_address(&of); };

    // One block computes BLOCK rows of a head's gradient. Causal: those that meet the most start first.
    constexpr bool BY_ROWS = OF == OF_Q;  // the block's rows are queries and it loops over keys; otherwise the other way round
    const int heads = BY_ROWS ? p.H : p.Hkv, tiles = ((BY_ROWS ? p.Nq : p.Nk) + BLOCK - 1) / BLOCK;
    const int tile = CAUSAL && BY_ROWS ? tiles - 1 - blockIdx.x % tiles : blockIdx.x % tiles;
    const int b = blockIdx.x / tiles / heads, head = blockIdx.x / tiles % heads, h_kv = BY_ROWS ? kv_head(p, head) : head;
    const int row0 = tile * BLOCK, offset = p.Nk - p.Nq;  // causal: row i sees columns j ≤ i + offset
    Range& range = workspace.ranges[b * p.Hkv + h_kv];
    if (!scores_fit(p, range)) return;  // the simple rung's

    if (threadIdx.x == 0) {
        ptx::mbarrier_init(barrier(barriers.X_full), 1);
        ptx::mbarrier_init(barrier(barriers.mask_full), 1);
        ptx::mbarrier_init(barrier(barriers.mask_empty), CONSUMERS * GROUP);
        for (int stage = 0; stage < A_STAGES; ++stage) {
            ptx::mbarrier_init(barrier(barriers.A_full[stage]), 1);
            ptx::mbarrier_init(barrier(barriers.A_empty[stage]), CONSUMERS * GROUP / 32);
        }
        for (int group = 0; group < CONSUMERS; ++group)
            for (int stage = 0; stage < RING; ++stage) {
                ptx::mbarrier_init(barrier(barriers.full[group][stage]), 1);
                ptx::mbarrier_init(barrier(barriers.empty[group][stage]), GROUP / 32);
            }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();

    const int group = uniform(threadIdx.x / GROUP);
    if (group == 0) {
        // ---- the producers: a thread for each ring, and one for what the groups share, in three warps
        ptx::setmaxnreg_dec<40>();
        const int ring = threadIdx.x / 32;
        constexpr int X = BY_ROWS ? MAP_Q : MAP_K, A = BY_ROWS ? MAP_DO : MAP_V, Y = BY_ROWS ? MAP_K : MAP_Q, B = BY_ROWS ? MAP_V : MAP_DO;
        auto own_rows = [&](uint32_t to, const CUtensorMap& map, int column, int plane, uint32_t full) {
#pragma unroll 1
            for (int position = 0; position < BLOCK; position += BOX_ROWS<Piece_A, RowOrder>)
                ptx::cp_async_bulk_tensor_4d(to + position * ROW_BYTES, &map, column, row0 + RowOrder::row(position), b * heads + head, plane, full);
        };
        if (threadIdx.x % 32 == 0 && ring < CONSUMERS) {
            Place<RING> place;
            auto load = [&](const CUtensorMap& map, int row, int column, int bh) {
                const uint32_t full = barrier(barriers.full[ring][place.stage]);
                ptx::mbarrier_wait(barrier(barriers.empty[ring][place.stage]), place.parity ^ 1);  // returns immediately in the first round
                ptx::mbarrier_arrive_expect_tx(full, STAGE_BYTES);
                for (int plane = 0; plane < PLANES; ++plane)
                    ptx::cp_async_bulk_tensor_4d(rings_smem + ring * RING_BYTES + place.stage * STAGE_BYTES + plane * Piece::BYTES, &map, column, row, bh, plane, full);
                place.advance();
            };
            for (Visit<OF> at(p, head, row0); at.more(); at.advance()) {
                const int bh = BY_ROWS ? b * p.Hkv + h_kv : b * p.H + at.h, first = at.tile * BLOCK;
#pragma unroll 1
                for (int panel = 0; panel < PANELS; ++panel) load(maps.others[Y], first + ring * PART, panel * 64, bh);
#pragma unroll 1
                for (int panel = 0; OF != OF_V && panel < PANELS; ++panel) load(maps.others[B], first + ring * PART, panel * 64, bh);
#pragma unroll 1
                for (int column = 0; column < COLUMNS; column += 64)
                    for (int row = 0; row < BLOCK; row += PART) load(maps.others[OF == OF_V ? B : Y], first + row, ring * COLUMNS + column, bh);
            }
        } else if (threadIdx.x % 32 == 0 && ring == CONSUMERS) {
            Visit<OF> at(p, head, row0);
            if (at.more()) {
                ptx::mbarrier_arrive_expect_tx(barrier(barriers.X_full), X_BYTES);
#pragma unroll 1
                for (int plane = 0; plane < PLANES; ++plane)
#pragma unroll 1
                    for (int panel = 0; panel < PANELS; ++panel)
                        own_rows(X_smem + plane * Tile_X::BYTES + panel * Tile_X::PANEL_BYTES, maps.own[X], panel * 64, plane, barrier(barriers.X_full));
            }
            Place<A_STAGES> place;
            for (; at.more() && (MASK || OF != OF_V); at.advance()) {
                if (MASK) {
                    const int i0 = BY_ROWS ? row0 : at.tile * BLOCK, j0 = BY_ROWS ? at.tile * BLOCK : row0;
                    ptx::mbarrier_wait(barrier(barriers.mask_empty), (at.n & 1) ^ 1);
                    ptx::mbarrier_arrive_expect_tx(barrier(barriers.mask_full), MASK_BYTES);
                    ptx::cp_async_bulk_tensor_4d(ptx::smem_address(mask_smem), &maps.mask, one_row(p) ? 0 : i0 / BIT_COLUMNS * 4, j0, at.h, b, barrier(barriers.mask_full));
                }
#pragma unroll 1
                for (int panel = 0; OF != OF_V && panel < PANELS; ++panel, place.advance()) {
                    const uint32_t full = barrier(barriers.A_full[place.stage]);
                    ptx::mbarrier_wait(barrier(barriers.A_empty[place.stage]), place.parity ^ 1);
                    ptx::mbarrier_arrive_expect_tx(full, A_BYTES);
                    for (int plane = 0; plane < PLANES; ++plane) own_rows(A_smem + place.stage * A_BYTES + plane * Piece_A::BYTES, maps.own[A], panel * 64, plane, full);
                }
            }
        }
    } else {
        // ---- the consumers
        ptx::setmaxnreg_inc<232>();
        const int consumer = group - 1, lane = threadIdx.x % 32, t = lane % 4;
        const int place_of_row = threadIdx.x % GROUP / 32 * 16 + lane / 4;  // in the tile; this thread has it and the one 8 further,
        const int first_row = RowOrder::row(place_of_row);                  // rows first_row and first_row + ROW_STEP
        const float scale = scale_of_scores(p, range);
        const int dS_exponent = exponent_of_dS(range);
        const float dS_factor = scalbnf(1, dS_exponent - P_EXPONENT);  // of P as it is scaled

        float X_rmem[COLUMNS / 2] = {};                               // [BLOCK, COLUMNS]: the gradient
        float S_rmem[PART / 2], dP_rmem[PART / 2], part_rmem[2][PART / 2], sum_rmem[32];
        float LSE_row[2], Delta_row[2];  // where the rows are Q's
        if (BY_ROWS) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int64_t row = static_cast<int64_t>(b * p.H + head) * workspace.rows + row0 + first_row + ROW_STEP * r;
                LSE_row[r] = workspace.LSE[row], Delta_row[r] = workspace.Delta[row];
            }
        }

        Place<RING> place;  // of the next piece
        Place<A_STAGES> place_of_A;
        // Waits for the next piece and returns its address.
        auto next_piece = [&] {
            ptx::mbarrier_wait(barrier(barriers.full[consumer][place.stage]), place.parity);
            const uint32_t at = uniform(rings_smem + consumer * RING_BYTES + place.stage * STAGE_BYTES);
            place.advance();
            return at;
        };
        auto next_A = [&] {
            ptx::mbarrier_wait(barrier(barriers.A_full[place_of_A.stage]), place_of_A.parity);
            const uint32_t at = uniform(A_smem + place_of_A.stage * A_BYTES);
            place_of_A.advance();
            return at;
        };
        // One lane of every warp arrives for the piece that is `before` pieces before the next, once the warp's products that read it have finished.
        auto release = [&](int before) {
            if (lane == 0) ptx::mbarrier_arrive(barrier(barriers.empty[consumer][(place.stage + RING - before) % RING]));
        };
        auto release_A = [&](int before) {
            if (lane == 0) ptx::mbarrier_arrive(barrier(barriers.A_empty[(place_of_A.stage + A_STAGES - before) % A_STAGES]));
        };
        // Issues a panel's part of S or dP. For S, Q is the first factor, as in the forward.
        auto multiply = [&](float (&C)[PART / 2], uint32_t A, int A_lo, uint32_t B, bool A_first) {
            const uint64_t a = ptx::descriptor(uniform(A)), b = ptx::descriptor(uniform(B));
            ptx::wgmma_fence();
#pragma unroll
            for (int product = 0; product < PRODUCTS; ++product)
#pragma unroll
                for (int d = 0; d < 4; ++d) {
                    const int first = plane_of_first(product), second = plane_of_second(product);
                    ptx::wgmma_ss<__half, PART>(C, ptx::advance(a, (A_first ? first : second) * A_lo + d * 32),
                                                ptx::advance(b, (A_first ? second : first) * Piece::BYTES + d * 32), product > 0 || d > 0);
                }
            ptx::wgmma_commit_group();
        };
        auto add = [](float (&to)[PART / 2], const float (&part)[PART / 2]) {
#pragma unroll
            for (int i = 0; i < PART / 2; ++i) to[i] += part[i];
        };

        Visit<OF> now(p, head, row0);
        if (now.more()) ptx::mbarrier_wait(barrier(barriers.X_full), 0);
        for (; now.more(); now.advance()) {
            const int i0 = BY_ROWS ? row0 : now.tile * BLOCK, j0 = BY_ROWS ? now.tile * BLOCK : row0;
            const int other0 = consumer * PART;  // the group's first column in the tile

            // ---- S, or its transpose
#if MASK
            ptx::mbarrier_wait(barrier(barriers.mask_full), now.n & 1);
            if constexpr (BY_ROWS) {  // the bits of a key's row are queries
                const int bit = i0 % BIT_COLUMNS + first_row;  // both of a thread's rows are in the same word
#pragma unroll
                for (int i = 0; i < PART / 8; ++i)
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        const uint32_t word = reinterpret_cast<const BitRow*>(mask_smem)[other0 + 8 * i + 2 * t + c].word[bit / 32];
#pragma unroll
                        for (int r = 0; r < 2; ++r) S_rmem[4 * i + 2 * r + c] = start_of_sum(word >> (bit + ROW_STEP * r) % 32 << 7, 0);
                    }
            } else {
                start_S<PART>(S_rmem, mask_smem, (i0 + other0) % BIT_COLUMNS, first_row, ROW_STEP, t, [&](int, int) { return 0; });
            }
#else
#pragma unroll
            for (int i = 0; i < PART / 2; ++i) S_rmem[i] = 0;
#endif
#pragma unroll
            for (int panel = 0; panel < PANELS; ++panel) {
                const uint32_t Y = next_piece();
                multiply(part_rmem[panel % 2], X_smem + panel * Tile_X::PANEL_BYTES, Tile_X::BYTES, Y, BY_ROWS);
                if (panel == 0) continue;
                ptx::wgmma_wait_group<1>();
                release(2);
                add(S_rmem, part_rmem[(panel - 1) % 2]);
            }
            [[maybe_unused]] KeepBits<PART> keep;
            if (DROPOUT && BY_ROWS) keep.draw_rows(p, workspace.first.b + b, workspace.first.h + now.h, i0 + first_row, j0 + other0, lane);
            if (DROPOUT && !BY_ROWS) keep.draw_keys(p, workspace.first.b + b, workspace.first.h + now.h, j0 + first_row, i0 + other0, lane);
            ptx::wgmma_wait_group<0>();
            release(1);
            add(S_rmem, part_rmem[(PANELS - 1) % 2]);

            // ---- dP, or its transpose
            if constexpr (OF != OF_V) {
#pragma unroll
                for (int i = 0; i < PART / 2; ++i) dP_rmem[i] = 0;
#pragma unroll
                for (int panel = 0; panel < PANELS; ++panel) {
                    const uint32_t A = next_A(), B = next_piece();
                    multiply(part_rmem[panel % 2], A, Piece_A::BYTES, B, true);
                    if (panel == 0) continue;
                    ptx::wgmma_wait_group<1>();
                    release(2), release_A(2);
                    add(dP_rmem, part_rmem[(panel - 1) % 2]);
                }
                ptx::wgmma_wait_group<0>();
                release(1), release_A(1);
                add(dP_rmem, part_rmem[(PANELS - 1) % 2]);
            }

            // ---- P = exp(scale · S − LSE), 0 beyond the diagonal or the end of the keys; beyond the end of the rows LSE is ∞. dS = P∘(dP − Delta). With
            // dropout, dS = P∘(keep_scale · kept dP − Delta); the factor keep_scale is applied at the end, as for dV.
            const bool cut = j0 + BLOCK > min(p.Nk, CAUSAL ? i0 + offset + 1 : p.Nk);
            const int64_t columns = static_cast<int64_t>(b * p.H + now.h) * workspace.rows + i0 + other0 + 2 * t;
            meet();  // both groups are done with the last tile's dS
#pragma unroll
            for (int n = 0; n < PART / 8; ++n) {
                float2 LSE, Delta;
                if (!BY_ROWS) LSE = *reinterpret_cast<const float2*>(workspace.LSE + columns + 8 * n);
                if (OF == OF_K) Delta = *reinterpret_cast<const float2*>(workspace.Delta + columns + 8 * n);
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    if (BY_ROWS) LSE.x = LSE.y = LSE_row[r], Delta.x = Delta.y = Delta_row[r];
                    // The difference comes first: in base 2, score and LSE would each be rounded, relative to their size. The product is rounded, as in LSE.
                    float x0 = ptx::ex2(fmaf(__fmul_rn(S_rmem[4 * n + 2 * r], scale) - LSE.x, LOG2_E, P_EXPONENT));
                    float x1 = ptx::ex2(fmaf(__fmul_rn(S_rmem[4 * n + 2 * r + 1], scale) - LSE.y, LOG2_E, P_EXPONENT));
                    if (cut) {
                        const int own = first_row + ROW_STEP * r, other = other0 + 8 * n + 2 * t;
                        const int i = i0 + (BY_ROWS ? own : other), j = j0 + (BY_ROWS ? other : own);
                        const int i1 = i + !BY_ROWS, j1 = j + BY_ROWS;
                        if (j >= p.Nk || (CAUSAL && j > i + offset)) x0 = 0;
                        if (j1 >= p.Nk || (CAUSAL && j1 > i1 + offset)) x1 = 0;
                    }
                    if constexpr (OF != OF_V) {
                        float dP0 = dP_rmem[4 * n + 2 * r], dP1 = dP_rmem[4 * n + 2 * r + 1];
                        if (DROPOUT) dP0 = keep.kept(dP0, r, n, 0), dP1 = keep.kept(dP1, r, n, 1);
                        x0 *= dS_factor * (dP0 - Delta.x), x1 *= dS_factor * (dP1 - Delta.y);
                    }
                    uint32_t hi, lo;
                    split(x0, x1, hi, lo);
                    const uint32_t kept = DROPOUT && OF == OF_V ? keep.pair(r, n) : ~0u;
                    const uint32_t to = S_smem + Tile_S::offset(place_of_row + 8 * r, consumer * (PART / 8) + n) + 4 * t;
                    ptx::st_shared(to, hi & kept);
                    if (PLANES == 2) ptx::st_shared(to + Tile_S::BYTES, lo & kept);
                }
            }
            ptx::fence_proxy_async();  // this thread's part of dS
            if (MASK) ptx::mbarrier_arrive(barrier(barriers.mask_empty));  // the values read from it have arrived: the fence waits for loads
            meet();                    // dS is whole

            // ---- the gradient += dS Y, 64 columns at a time; of V, P dO
#pragma unroll
            for (int chunk = 0; chunk < COLUMNS / 64; ++chunk) {
#pragma unroll
                for (int row = 0; row < BLOCK; row += PART) {
                    const uint64_t a = ptx::descriptor(uniform(S_smem + row * 2)), y = ptx::descriptor(next_piece());
                    ptx::wgmma_fence();
#pragma unroll
                    for (int product = 0; product < PRODUCTS; ++product)
#pragma unroll
                        for (int k = 0; k < PART / 16; ++k)
                            ptx::wgmma_ss_transposed_b<__half, 64>(sum_rmem, ptx::advance(a, plane_of_first(product) * Tile_S::BYTES + k * 32),
                                                                   ptx::advance(y, plane_of_second(product) * Piece::BYTES + k * 16 * ROW_BYTES),
                                                                   row > 0 || product > 0 || k > 0);
                    ptx::wgmma_commit_group();
                    if (row == 0) continue;
                    ptx::wgmma_wait_group<1>();
                    release(2);
                }
                ptx::wgmma_wait_group<0>();
                release(1);
#pragma unroll
                for (int i = 0; i < 32; ++i) X_rmem[32 * chunk + i] += sum_rmem[i];
            }
        }

        // ---- stores the gradient, two columns at a time: four lanes write 32 bytes of a row
        const Tensor4& X = OF == OF_Q ? p.dq : OF == OF_K ? p.dk : p.dv;
        const int rows = BY_ROWS ? p.Nq : p.Nk, D = OF == OF_V ? p.Dv : p.D;
        const int exponent = exponent_of(range.d_o) + (OF == OF_V ? P_EXPONENT : dS_exponent + exponent_of(range.v) + exponent_of(OF == OF_Q ? range.k : range.q));
        const float factor = (DROPOUT ? p.keep_scale : 1.0f) * (OF == OF_V ? 1.0f : p.scale);
        float* X_gmem = static_cast<float*>(X.data) + b * X.stride_b + head * X.stride_h;
        float largest = 0;
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; ++n) {
                const float x0 = X_rmem[4 * n + 2 * r], x1 = X_rmem[4 * n + 2 * r + 1];
                const int row = row0 + first_row + ROW_STEP * r, column = consumer * COLUMNS + 8 * n + 2 * t;
                largest = fmaxf(largest, fmaxf(fabsf(x0), fabsf(x1)));
                if (row < rows && column < D)
                    *reinterpret_cast<float2*>(X_gmem + row * X.stride_n + column) = make_float2(scalbnf(x0 * factor, -exponent), scalbnf(x1 * factor, -exponent));
            }
        join_maximum(OF == OF_Q ? &range.dq : OF == OF_K ? &range.dk : &range.dv, magnitude(largest));
    }
}

// ---- launching

inline int64_t q_blocks(const AttentionParams& p) { return tiles_of(p.Nq, BLOCK) * p.H * p.B; }
inline int64_t k_blocks(const AttentionParams& p) { return tiles_of(p.Nk, BLOCK) * p.Hkv * p.B; }
inline int64_t part_floats(const AttentionParams& p) { return operands_of(p, nullptr).floats + Workspace::floats(p); }
inline Parts parts_of(const AttentionParams& p) {
    const AttentionParams one = call_of(p, {0, 1, 0, 1});
    return Parts(p, part_floats(p) * 4, {q_blocks(one), k_blocks(one), k_blocks(one)});
}

extern "C" int64_t workspace_floats(const AttentionParams* params) {
    const AttentionParams& p = *params;
    return part_floats(call_of(p, parts_of(p).largest())) + Operands::range_floats(p) + exact::exact_workspace_floats(params);
}

static cudaError_t launch_part(const AttentionParams& p, Range* ranges, First first) {
    const Operands all = operands_of(p, ranges);
    const Workspace workspace(p, all, first);
    Maps maps = {};
    cudaError_t error = cudaSuccess;
    for (int n = 0; n < all.count; ++n) {
        if (all.of[n].N == 0) continue;
        if (error == cudaSuccess) error = make_planes_map(&maps.own[n], all.of[n], p.B, BOX_ROWS<Piece_A, RowOrder>);
        if (error == cudaSuccess) error = make_planes_map(&maps.others[n], all.of[n], p.B, PART);
    }
    if (error == cudaSuccess && p.Nq > 0 && p.Nk > 0 && MASK) error = make_mask_map(&maps.mask, p, BLOCK);
    if (error != cudaSuccess) return error;
    launch_planes(p, all);
    const unsigned rows = static_cast<unsigned>(Workspace::all_rows(p)), of_q = static_cast<unsigned>(q_blocks(p)), of_k = static_cast<unsigned>(k_blocks(p));
    if (rows > 0) launch_kernel(delta_kernel, rows / ROWS_AT_ONCE, PREPARE_THREADS, 0, p.stream, p, workspace);
    if (of_q > 0) launch_kernel(gradient_kernel<OF_Q>, of_q, THREADS, SMEM_BYTES, p.stream, p, maps, workspace);
    if (of_k > 0) {
        launch_kernel(gradient_kernel<OF_K>, of_k, THREADS, SMEM_BYTES, p.stream, p, maps, workspace);
        launch_kernel(gradient_kernel<OF_V>, of_k, THREADS, SMEM_BYTES, p.stream, p, maps, workspace);  // last: V's planes may lie in dV
    }
    return cudaSuccess;
}

extern "C" int attention(const AttentionParams* params) {
    const AttentionParams& p = *params;
    if (q_blocks(p) == 0 && k_blocks(p) == 0) return cudaSuccess;
    if (!numbers_fit(p, {Workspace::all_rows(p), k_blocks(p), prepare_blocks(p, operands_of(p, nullptr))})) return cudaErrorInvalidConfiguration;
    DeviceGuard guard(p.device);
    cudaError_t error = cudaSuccess;
    for (const auto kernel : {gradient_kernel<OF_Q>, gradient_kernel<OF_K>, gradient_kernel<OF_V>})
        if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SMEM_BYTES);
    if (error != cudaSuccess) return error;
    return launch_parts(p, parts_of(p), p.workspace + workspace_floats(params) - exact::exact_workspace_floats(params), launch_part, exact::exact_attention);
}

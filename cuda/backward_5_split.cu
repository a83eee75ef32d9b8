// Backward for heads of 160 to 256 columns that adds nothing up in global memory: dK and dV in one kernel, dQ in another.  sm_90a.
//
// The idea: backward_4_hopper_wide.cu computes S = Q Kᵀ and dP = dO Vᵀ once, but every tile of 64 keys adds its part of dQ to global memory: 4 bytes for every
// 160 operations, and that is what it waits for. Here a second kernel computes S and dP again, and sums dQ in registers: 7 products for 5, each in a
// loop that waits for nothing but the tensor cores. All gradients repeat bit for bit.
//
//     dK, dV   a block has 64 keys. One group computes Sᵀ = K Qᵀ and Pᵀ, the other dPᵀ = V dOᵀ and dSᵀ, of the next tile; meanwhile run dV += Pᵀ dO
//              and dK += dSᵀ Q of this one, of which each group has half of the head's columns
//     dQ       as forward_4_hopper.cu: a block has 128 rows, a group 64, and keys come past. dS is in registers what dQ += dS K needs
//
// Serves everything in the interface for float16 and bfloat16, positive scale; head sizes up to 256 that are multiples of 8.
#include <algorithm>

#include "backward_split.cuh"

// First column of a panel of a tile that has the head in two halves, each filled up to whole panels; and the products of 16 columns that it takes.
template <int HALF>
struct Halves {
    static constexpr int PANELS_OF_ONE = (HALF + 63) / 64, PANELS = 2 * PANELS_OF_ONE, COLUMNS = HALF;
    __device__ static constexpr int steps(int panel) { return HALF - panel % PANELS_OF_ONE * 64 < 64 ? (HALF - panel % PANELS_OF_ONE * 64) / 16 : 4; }
};

// ---- dK and dV

namespace of_kv {

constexpr int BLOCK = 64;   // keys, and queries of a tile
constexpr int STAGES = 2;   // pairs of Q and dO tiles
using K_halves = Halves<HEAD_DIM / 2>;
using V_halves = Halves<V_HEAD_DIM / 2>;
static_assert(K_halves::COLUMNS % 16 == 0 && K_halves::COLUMNS <= 128 && V_halves::COLUMNS % 16 == 0 && V_halves::COLUMNS <= 128, "a group's columns");
using Tile_K = SwizzledTile<BLOCK, 64 * K_halves::PANELS>;  // of K or Q
using Tile_V = SwizzledTile<BLOCK, 64 * V_halves::PANELS>;  // of V or dO
using Tile_S = SwizzledTile<BLOCK, BLOCK>;                  // transposed: rows are keys
constexpr int LSE_BYTES = BLOCK * 4, MASK_BYTES = MASK ? BLOCK * static_cast<int>(sizeof(BitRow)) : 0;
constexpr int SMEM_BYTES = (1 + STAGES) * (Tile_K::BYTES + Tile_V::BYTES) + 2 * 2 * Tile_S::BYTES + STAGES * 2 * LSE_BYTES + MASK_BYTES;
static_assert(SMEM_BYTES <= SMEM_LIMIT, "choose smaller tiles");

struct Maps {
    CUtensorMap q, k, v, d_o, mask;
};

// "full": the bytes have arrived, with those of Q its LSE and the mask's, with those of dO its Delta. "empty": the computing warps are done with both.
struct Barriers {
    uint64_t own_full, Q_full[STAGES], dO_full[STAGES], empty[STAGES], mask_empty;
};

constexpr int P_IS_THERE = 2;  // a named barrier between the groups

__global__ void __launch_bounds__(THREADS, 1) dKdV_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Maps maps) {
    __shared__ __align__(8) Barriers barriers;
    const uint32_t K_smem = ptx::smem_address(smem);                                          // [BLOCK, HEAD_DIM]
    const uint32_t V_smem = K_smem + Tile_K::BYTES;                                           // [BLOCK, V_HEAD_DIM]
    const uint32_t Q_smem = V_smem + Tile_V::BYTES;                                           // STAGES × [BLOCK, HEAD_DIM]
    const uint32_t dO_smem = Q_smem + STAGES * Tile_K::BYTES;                                 // STAGES × [BLOCK, V_HEAD_DIM]
    const uint32_t PdS_smem = dO_smem + STAGES * Tile_V::BYTES;                               // 2 × (Pᵀ [BLOCK, BLOCK], dSᵀ [BLOCK, BLOCK])
    uint8_t* mask_smem = smem + SMEM_BYTES - STAGES * 2 * LSE_BYTES - MASK_BYTES;             // [BLOCK] BitRow
    float* rows_smem = reinterpret_cast<float*>(smem + SMEM_BYTES - STAGES * 2 * LSE_BYTES);  // STAGES × (LSE [BLOCK], Delta [BLOCK])
    auto barrier = [](uint64_t& of) { return ptx::smem_address(&of); };

    // One block computes dK and dV of BLOCK keys. Causal: the first keys are seen by the most rows, and start first.
    const int k_tiles = (p.Nk + BLOCK - 1) / BLOCK;
    const int j0 = blockIdx.x % k_tiles * BLOCK, b = blockIdx.x / k_tiles / p.Hkv, kv_h = blockIdx.x / k_tiles % p.Hkv;

    if (threadIdx.x == 0) {
        ptx::mbarrier_init(barrier(barriers.own_full), 1);
        ptx::mbarrier_init(barrier(barriers.mask_empty), GROUP);
        for (int stage = 0; stage < STAGES; ++stage) {
            ptx::mbarrier_init(barrier(barriers.Q_full[stage]), 1);
            ptx::mbarrier_init(barrier(barriers.dO_full[stage]), 1);
            ptx::mbarrier_init(barrier(barriers.empty[stage]), GROUP * CONSUMERS);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();

    const int group = uniform(threadIdx.x / GROUP);
    if (group == 0) {
        // ---- the producer: one thread asks for every tile
        ptx::setmaxnreg_dec<24>();  // all start with 168; what this group gives back, 144 · 128, is what two others can take
        if (threadIdx.x == 0) {
            const Workspace workspace(p);
            const uint32_t own_full = barrier(barriers.own_full);
            ptx::mbarrier_arrive_expect_tx(own_full, Tile_K::BYTES + Tile_V::BYTES);
            load_boxes<Tile_K, RowOrder, K_halves::COLUMNS>(K_smem, maps.k, j0, kv_h, b, own_full);
            load_boxes<Tile_V, RowOrder, V_halves::COLUMNS>(V_smem, maps.v, j0, kv_h, b, own_full);
            for (QueryVisit<BLOCK> at(p, j0, kv_h); at.more(); at.advance()) {
                const Slot<STAGES> slot(at.n);
                const uint32_t Q_full = barrier(barriers.Q_full[slot.stage]), dO_full = barrier(barriers.dO_full[slot.stage]);
                const uint32_t rows = ptx::smem_address(rows_smem) + slot.stage * 2 * LSE_BYTES;
                const int64_t row = (static_cast<int64_t>(b) * p.H + at.h) * workspace.rows + at.i0;
                ptx::mbarrier_wait(barrier(barriers.empty[slot.stage]), slot.parity ^ 1);  // passes at once in the first round
                ptx::mbarrier_arrive_expect_tx(Q_full, Tile_K::BYTES + LSE_BYTES + MASK_BYTES);
                load_boxes<Tile_K, InOrder, K_halves::COLUMNS>(Q_smem + slot.stage * Tile_K::BYTES, maps.q, at.i0, at.h, b, Q_full);
                ptx::cp_async_bulk(rows, workspace.LSE + row, LSE_BYTES, Q_full);
                ptx::mbarrier_arrive_expect_tx(dO_full, Tile_V::BYTES + LSE_BYTES);
                load_boxes<Tile_V, InOrder, V_halves::COLUMNS>(dO_smem + slot.stage * Tile_V::BYTES, maps.d_o, at.i0, at.h, b, dO_full);
                ptx::cp_async_bulk(rows + LSE_BYTES, workspace.Delta + row, LSE_BYTES, dO_full);
                if (MASK) {
                    ptx::mbarrier_wait(barrier(barriers.mask_empty), (at.n & 1) ^ 1);
                    ptx::cp_async_bulk_tensor_4d(ptx::smem_address(mask_smem), &maps.mask, one_row(p) ? 0 : at.i0 / BIT_COLUMNS * 4, j0, at.h, b, Q_full);
                }
            }
        }
    } else {
        // ---- the consumers: all of them have all keys
        ptx::setmaxnreg_inc<240>();
        const int consumer = group - 1, warp = threadIdx.x % GROUP / 32, lane = threadIdx.x % 32;
        const Lane mine(0);
        float dK_rmem[K_halves::COLUMNS / 2] = {}, dV_rmem[V_halves::COLUMNS / 2] = {};  // [BLOCK, half of the head]
        float S_rmem[BLOCK / 2];                                                         // [BLOCK, BLOCK]: Sᵀ, or in the other group dPᵀ
        [[maybe_unused]] KeepBits<BLOCK> keep;

        auto P_of = [&](int n) { return PdS_smem + n % 2 * 2 * Tile_S::BYTES; };
        auto dS_of = [&](int n) { return P_of(n) + Tile_S::BYTES; };
        // Where this thread's pair of Pᵀ or dSᵀ lies in such a tile: key `place` or, r = 1, 8 further; queries 8n + 2t and the next.
        auto pair_at = [&](int r, int n) { return Tile_S::offset(mine.place + 8 * r, n) + 4 * mine.t; };

        // A tile of 64 keys against one of 64 queries, over the head, under way.
        auto multiply = [&](auto halves, uint32_t A, uint32_t B, bool from_zero) {
            using H = decltype(halves);
            const uint64_t a = ptx::descriptor(uniform(A)), b = ptx::descriptor(uniform(B));
            ptx::wgmma_fence();
#pragma unroll
            for (int panel = 0; panel < H::PANELS; ++panel)
#pragma unroll
                for (int d = 0; d < H::steps(panel); ++d)
                    ptx::wgmma_ss<element, BLOCK>(S_rmem, ptx::advance(a, panel * Tile_S::PANEL_BYTES + d * 32), ptx::advance(b, panel * Tile_S::PANEL_BYTES + d * 32),
                                                  !from_zero || panel > 0 || d > 0);
            ptx::wgmma_commit_group();
        };
        // Sᵀ, or in the other group dPᵀ, of a tile
        auto start_scores = [&](auto is_first, const QueryVisit<BLOCK>& at) {
            const Slot<STAGES> slot(at.n);
            ptx::mbarrier_wait(barrier(barriers.Q_full[slot.stage]), slot.parity);
            if constexpr (decltype(is_first)::value) {
#if MASK
                start_from_mask<BLOCK>(S_rmem, p, mask_smem, mine, at.i0, j0, is_cut(p, at.i0, j0, BLOCK));
                ptx::mbarrier_arrive(barrier(barriers.mask_empty));
#endif
                multiply(K_halves(), K_smem, Q_smem + slot.stage * Tile_K::BYTES, !MASK);
            }
            ptx::mbarrier_wait(barrier(barriers.dO_full[slot.stage]), slot.parity);
            if constexpr (!decltype(is_first)::value) multiply(V_halves(), V_smem, dO_smem + slot.stage * Tile_V::BYTES, true);
        };
        auto draw = [&](const QueryVisit<BLOCK>& at) {
            if (!DROPOUT) return;
            const int thread = ptx::tid_x() % GROUP;  // read anew, so that what follows from it takes no registers meanwhile
            keep.draw_keys(p, b, at.h, j0 + RowOrder::row(thread / 32 * 16 + thread % 32 / 4), at.i0, thread % 32);
        };
        // Once they are there: Pᵀ, and in the other group dSᵀ, to shared memory.
        auto finish_scores = [&](auto is_first, const QueryVisit<BLOCK>& at) {
            const float* LSE_smem = rows_smem + at.n % STAGES * 2 * BLOCK;
            const float* Delta_smem = LSE_smem + BLOCK + 2 * mine.t;
            if constexpr (decltype(is_first)::value) {
                const bool cut = is_cut(p, at.i0, j0, BLOCK);
#pragma unroll
                for (int n = 0; n < BLOCK / 8; ++n) {
                    make_P(S_rmem, p, LSE_smem, mine, n, at.i0, j0, cut);
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        // The other group takes P itself, from the place where it leaves dS; dV what dropout keeps of it.
                        const uint32_t P = ptx::cvt_pair<element>(S_rmem[4 * n + 2 * r], S_rmem[4 * n + 2 * r + 1]);
                        ptx::st_shared(dS_of(at.n) + pair_at(r, n), P);
                        ptx::st_shared(P_of(at.n) + pair_at(r, n), P & (DROPOUT ? keep.pair(r, n) : ~0u));
                    }
                }
                ptx::bar_arrive(P_IS_THERE, CONSUMERS * GROUP);
            } else {
                ptx::bar_sync(P_IS_THERE, CONSUMERS * GROUP);
                // dS = P∘(dP − Delta). With dropout, of dS = P∘(keep_scale · kept dP − Delta) the factor keep_scale is left to the end, as it is in dV.
#pragma unroll
                for (int n = 0; n < BLOCK / 8; ++n) {
                    const float2 Delta = *reinterpret_cast<const float2*>(Delta_smem + 8 * n);
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        const uint32_t P = *reinterpret_cast<const uint32_t*>(smem + (dS_of(at.n) - K_smem) + pair_at(r, n));
                        const element* P_pair = reinterpret_cast<const element*>(&P);
                        float dP0 = S_rmem[4 * n + 2 * r], dP1 = S_rmem[4 * n + 2 * r + 1];
                        if (DROPOUT) dP0 = keep.kept(dP0, r, n, 0), dP1 = keep.kept(dP1, r, n, 1);
                        ptx::st_shared(dS_of(at.n) + pair_at(r, n), ptx::cvt_pair<element>(static_cast<float>(P_pair[0]) * (dP0 - Delta.x),
                                                                                           static_cast<float>(P_pair[1]) * (dP1 - Delta.y)));
                    }
                }
            }
            ptx::fence_proxy_async();  // this thread's part of Pᵀ or dSᵀ
        };
        // dV += Pᵀ dO and dK += dSᵀ Q of tile number n, the group's half of the columns, under way: the rows of dO and Q are the sum's index
        auto add = [&](auto& C, uint32_t A, uint32_t B) {
            constexpr int N = sizeof(C) / sizeof(float) * 2;  // columns
            const uint64_t a = ptx::descriptor(uniform(A));
            const uint64_t b = ptx::descriptor(uniform(B + consumer * ((N + 63) / 64) * Tile_S::PANEL_BYTES), Tile_S::PANEL_BYTES);
            ptx::wgmma_fence();
#pragma unroll
            for (int k = 0; k < BLOCK / 16; ++k)
                ptx::wgmma_ss_transposed_b<element, N>(C, ptx::advance(a, k * 32), ptx::advance(b, k * 16 * ROW_BYTES), 1);
        };
        auto start_sums = [&](int n) {
            add(dV_rmem, P_of(n), dO_smem + n % STAGES * Tile_V::BYTES);
            add(dK_rmem, dS_of(n), Q_smem + n % STAGES * Tile_K::BYTES);
            ptx::wgmma_commit_group();
        };

        // All tiles. is_first: whether the group computes Sᵀ; the other one computes dPᵀ. (Were that a branch around each product, they would be serialised.)
        auto visit_all = [&](auto is_first) {
            QueryVisit<BLOCK> next(p, j0, kv_h);
            if (!next.more()) return;
            // The first tile has no predecessor whose products could run under its exponentials.
            start_scores(is_first, next);
            draw(next);
            ptx::wgmma_wait_group<0>();
            finish_scores(is_first, next);
            meet();
            int n = 0;
            for (next.advance(); next.more(); next.advance(), ++n) {
                start_scores(is_first, next);
                start_sums(n);
                draw(next);
                ptx::wgmma_wait_group<1>();  // the scores are there
                finish_scores(is_first, next);
                ptx::wgmma_wait_group<0>();  // so are the sums: done with Q and dO
                ptx::mbarrier_arrive(barrier(barriers.empty[n % STAGES]));
                meet();  // Pᵀ and dSᵀ are whole, and both groups are done with the other ones
            }
            start_sums(n);
            ptx::wgmma_wait_group<0>();
        };
        ptx::mbarrier_wait(barrier(barriers.own_full), 0);
        if (consumer == 0) visit_all(std::true_type());
        else visit_all(std::false_type());

        // dK and dV out through the places of K and V, so that global stores are 16 bytes wide. Both groups are done with those since they met.
        const float dV_scale = DROPOUT ? p.keep_scale : 1.0f, dK_scale = p.scale * dV_scale;
        auto store = [&](auto tile, auto halves, const float* sums, float scale, int from, const Tensor4& to, int D) {
            using Tile = decltype(tile);
            using H = decltype(halves);
#pragma unroll
            for (int r = 0; r < 2; ++r)
#pragma unroll
                for (int n = 0; n < H::COLUMNS / 8; ++n)
                    ptx::st_shared(K_smem + from + Tile::offset(mine.place + 8 * r, consumer * H::PANELS_OF_ONE * 8 + n) + 4 * mine.t,
                                   ptx::cvt_pair<element>(sums[4 * n + 2 * r] * scale, sums[4 * n + 2 * r + 1] * scale));
            __syncwarp();  // the warp's part is written, by lanes other than those that read it next
            store_16_rows<Tile, RowOrder, H::COLUMNS>(head_of(to, b, kv_h), smem + from, to.stride_n, warp * 16, lane, j0, p.Nk, D, consumer * H::COLUMNS,
                                                      consumer * (H::PANELS_OF_ONE * 8 - H::COLUMNS / 8));
        };
        store(Tile_K(), K_halves(), dK_rmem, dK_scale, 0, p.dk, p.D);
        store(Tile_V(), V_halves(), dV_rmem, dV_scale, Tile_K::BYTES, p.dv, p.Dv);
    }
}

}  // namespace of_kv

// ---- dQ

namespace of_q {

constexpr int BLOCK_Q = 128, BLOCK_K = 64;
using Tile_Q = SwizzledTile<BLOCK_Q, HEAD_DIM>;
using Tile_dO = SwizzledTile<BLOCK_Q, V_HEAD_DIM>;
using Tile_K = SwizzledTile<BLOCK_K, HEAD_DIM>;
using Tile_V = SwizzledTile<BLOCK_K, V_HEAD_DIM>;
constexpr int K_STAGES = 2;  // a tile of K is in use until dQ has been added to, while the next one is multiplied
constexpr int MASK_BYTES = MASK ? BLOCK_K * static_cast<int>(sizeof(BitRow)) : 0;
constexpr int SMEM_BYTES = Tile_Q::BYTES + Tile_dO::BYTES + K_STAGES * Tile_K::BYTES + Tile_V::BYTES + MASK_BYTES;
static_assert(SMEM_BYTES <= SMEM_LIMIT, "choose smaller tiles");

struct Maps {
    CUtensorMap q, k, v, d_o, mask;
};

// "full": the bytes have arrived, with those of K the mask's. "empty": the computing threads are done with them.
struct Barriers {
    uint64_t own_full, K_full[K_STAGES], K_empty[K_STAGES], V_full, V_empty, mask_empty;
};

__global__ void __launch_bounds__(THREADS, 1) dQ_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Maps maps) {
    __shared__ __align__(8) Barriers barriers;
    const uint32_t Q_smem = ptx::smem_address(smem);              // [BLOCK_Q, HEAD_DIM]
    const uint32_t dO_smem = Q_smem + Tile_Q::BYTES;              // [BLOCK_Q, V_HEAD_DIM]
    const uint32_t K_smem = dO_smem + Tile_dO::BYTES;             // K_STAGES × [BLOCK_K, HEAD_DIM]
    const uint32_t V_smem = K_smem + K_STAGES * Tile_K::BYTES;    // [BLOCK_K, V_HEAD_DIM]
    const uint8_t* mask_smem = smem + SMEM_BYTES - MASK_BYTES;    // [BLOCK_K] BitRow
    auto barrier = [](uint64_t& of) { return ptx::smem_address(&of); };

    // One block computes dQ of BLOCK_Q rows. Causal: the last rows see the most keys, and start first.
    const int q_tiles = (p.Nq + BLOCK_Q - 1) / BLOCK_Q, tile = blockIdx.x % q_tiles;
    const int i0 = (CAUSAL ? q_tiles - 1 - tile : tile) * BLOCK_Q, b = blockIdx.x / q_tiles / p.H, h = blockIdx.x / q_tiles % p.H;
    const int columns = CAUSAL ? max(0, min(p.Nk, min(i0 + BLOCK_Q, p.Nq) + p.Nk - p.Nq)) : p.Nk, k_tiles = (columns + BLOCK_K - 1) / BLOCK_K;

    if (threadIdx.x == 0) {
        ptx::mbarrier_init(barrier(barriers.own_full), 1);
        ptx::mbarrier_init(barrier(barriers.V_full), 1);
        ptx::mbarrier_init(barrier(barriers.V_empty), GROUP * CONSUMERS);
        ptx::mbarrier_init(barrier(barriers.mask_empty), GROUP * CONSUMERS);
        for (int stage = 0; stage < K_STAGES; ++stage) {
            ptx::mbarrier_init(barrier(barriers.K_full[stage]), 1);
            ptx::mbarrier_init(barrier(barriers.K_empty[stage]), GROUP * CONSUMERS);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();

    const int group = uniform(threadIdx.x / GROUP);
    if (group == 0) {
        // ---- the producer: one thread asks for every tile
        ptx::setmaxnreg_dec<24>();  // all start with 168; what this group gives back, 144 · 128, is what two others can take
        if (threadIdx.x == 0) {
            const int kv_h = kv_head(p, h);
            const uint32_t own_full = barrier(barriers.own_full), V_full = barrier(barriers.V_full);
            ptx::mbarrier_arrive_expect_tx(own_full, Tile_Q::BYTES + Tile_dO::BYTES);
            load_boxes<Tile_Q, RowOrder>(Q_smem, maps.q, i0, h, b, own_full);
            load_boxes<Tile_dO, RowOrder>(dO_smem, maps.d_o, i0, h, b, own_full);
            for (int n = 0; n < k_tiles; ++n) {
                const Slot<K_STAGES> slot(n);
                const uint32_t K_full = barrier(barriers.K_full[slot.stage]);
                ptx::mbarrier_wait(barrier(barriers.K_empty[slot.stage]), slot.parity ^ 1);  // passes at once in the first round
                ptx::mbarrier_arrive_expect_tx(K_full, Tile_K::BYTES + MASK_BYTES);
                load_boxes<Tile_K>(K_smem + slot.stage * Tile_K::BYTES, maps.k, n * BLOCK_K, kv_h, b, K_full);
                if (MASK) {
                    ptx::mbarrier_wait(barrier(barriers.mask_empty), (n & 1) ^ 1);
                    ptx::cp_async_bulk_tensor_4d(ptx::smem_address(mask_smem), &maps.mask, one_row(p) ? 0 : i0 / BIT_COLUMNS * 4, n * BLOCK_K, h, b, K_full);
                }
                ptx::mbarrier_wait(barrier(barriers.V_empty), (n & 1) ^ 1);
                ptx::mbarrier_arrive_expect_tx(V_full, Tile_V::BYTES);
                load_boxes<Tile_V>(V_smem, maps.v, n * BLOCK_K, kv_h, b, V_full);
            }
        }
    } else {
        // ---- the consumers: 64 rows each
        ptx::setmaxnreg_inc<240>();
        const int consumer = group - 1, warp = threadIdx.x % GROUP / 32, lane = threadIdx.x % 32, t = lane % 4;
        const int place = consumer * 64 + warp * 16 + lane / 4;  // in the tile of Q; this thread has it and the one 8 further,
        const int first_row = RowOrder::row(place);              // rows first_row and first_row + ROW_STEP
        const float scale_log2 = p.scale * LOG2_E;               // exp(scale · x) = 2^(scale_log2 · x)
        // Two numbers of each of the thread's rows; read again for every tile where registers are scarcest.
        constexpr bool AGAIN = HEAD_DIM > 192 && MASK && DROPOUT;
        float LSE[2], Delta[2];
        auto read_rows = [&] {
            const Workspace workspace(p);
            const int thread = ptx::tid_x() - GROUP;
            const int64_t row = (static_cast<int64_t>(b) * p.H + h) * workspace.rows + i0 + RowOrder::row(thread / 32 * 16 + thread % 32 / 4);
#pragma unroll
            for (int r = 0; r < 2; ++r) LSE[r] = workspace.LSE[row + ROW_STEP * r], Delta[r] = workspace.Delta[row + ROW_STEP * r];
        };
        if (!AGAIN) read_rows();

        float dQ_rmem[HEAD_DIM / 2] = {};
        float S_rmem[BLOCK_K / 2], dP_rmem[BLOCK_K / 2];
        uint32_t dS_rmem[BLOCK_K / 16][4];  // A operand of the products over 16 keys at a time
        [[maybe_unused]] KeepBits<BLOCK_K> keep;

        // The group's rows of Q Kᵀ or dO Vᵀ, under way.
        auto multiply = [&](auto rows, auto columns, float(&C)[BLOCK_K / 2], uint32_t A, uint32_t B, bool from_zero) {
            const uint64_t a = ptx::descriptor(uniform(A + consumer * 64 * ROW_BYTES)), b = ptx::descriptor(uniform(B));
            ptx::wgmma_fence();
#pragma unroll
            for (int d = 0; d < decltype(columns)::value / 16; ++d)
                ptx::wgmma_ss<element, BLOCK_K>(C, ptx::advance(a, d / 4 * decltype(rows)::PANEL_BYTES + d % 4 * 32),
                                                ptx::advance(b, d / 4 * Tile_K::PANEL_BYTES + d % 4 * 32), !from_zero || d > 0);
        };
        auto start_scores = [&](int n) {
            const Slot<K_STAGES> slot(n);
            ptx::mbarrier_wait(barrier(barriers.K_full[slot.stage]), slot.parity);
#if MASK
            // The bits of a key's row are queries; what lies beyond the end of the keys or the diagonal is cut afterwards.
            const int bit = i0 % BIT_COLUMNS + first_row, words = bit / 32;  // both of a thread's rows are in the same word
#pragma unroll
            for (int i = 0; i < BLOCK_K / 8; ++i)
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const uint32_t word = reinterpret_cast<const BitRow*>(mask_smem)[8 * i + 2 * t + c].word[words];
#pragma unroll
                    for (int r = 0; r < 2; ++r) S_rmem[4 * i + 2 * r + c] = start_of_sum(word >> (bit + ROW_STEP * r) % 32 << 7, 0);
                }
            ptx::mbarrier_arrive(barrier(barriers.mask_empty));
#endif
            multiply(Tile_Q(), std::integral_constant<int, HEAD_DIM>(), S_rmem, Q_smem, K_smem + slot.stage * Tile_K::BYTES, !MASK);
            ptx::mbarrier_wait(barrier(barriers.V_full), n & 1);
            multiply(Tile_dO(), std::integral_constant<int, V_HEAD_DIM>(), dP_rmem, dO_smem, V_smem, true);
            ptx::wgmma_commit_group();
        };
        auto draw = [&](int n) {
            if (!DROPOUT) return;
            const int thread = ptx::tid_x() - GROUP;  // read anew, so that what follows from it takes no registers meanwhile
            keep.draw_rows(p, b, h, i0 + RowOrder::row(thread / 32 * 16 + thread % 32 / 4), n * BLOCK_K, thread % 32);
        };
        // Once they are there: S becomes dS = P∘(dP − Delta), P = exp(scale · S − LSE), 0 beyond the diagonal or the end of the keys. Beyond the end of the
        // rows LSE is ∞. With dropout, of dS = P∘(keep_scale · kept dP − Delta) the factor keep_scale is left to the end.
        auto make_dS = [&](int n) {
            ptx::mbarrier_arrive(barrier(barriers.V_empty));
            if (AGAIN) read_rows();
            const int j0 = n * BLOCK_K;
            const bool cut = is_cut(p, i0, j0, BLOCK_K);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int visible = (CAUSAL ? min(p.Nk, i0 + first_row + ROW_STEP * r + p.Nk - p.Nq + 1) : p.Nk) - j0 - 2 * t;  // columns, from this lane's first
#pragma unroll
                for (int i = 0; i < BLOCK_K / 8; ++i)
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        float &x = S_rmem[4 * i + 2 * r + c], dP = dP_rmem[4 * i + 2 * r + c];
                        if (DROPOUT) dP = keep.kept(dP, r, i, c);
                        x = ptx::ex2(fmaf(x, scale_log2, -LSE[r])) * (dP - Delta[r]);
                        if (cut && 8 * i + c >= visible) x = 0;
                    }
            }
        };
        auto round_dS = [&] {
#pragma unroll
            for (int k = 0; k < BLOCK_K / 16; ++k)
#pragma unroll
                for (int e = 0; e < 4; ++e) dS_rmem[k][e] = ptx::cvt_pair<element>(S_rmem[8 * k + 2 * e], S_rmem[8 * k + 2 * e + 1]);
        };
        // dQ += dS K of tile number n, under way
        auto add = [&](int n) {
            const uint32_t K_tile = uniform(K_smem + n % K_STAGES * Tile_K::BYTES);
            ptx::wgmma_fence();
#pragma unroll
            for (int k = 0; k < BLOCK_K / 16; ++k)
                ptx::wgmma_rs<element, HEAD_DIM>(dQ_rmem, dS_rmem[k], ptx::descriptor(K_tile + k * 16 * ROW_BYTES, Tile_K::PANEL_BYTES));
            ptx::wgmma_commit_group();
        };

        ptx::mbarrier_wait(barrier(barriers.own_full), 0);
        if (k_tiles > 0) {
            // The first tile has no predecessor whose product could run under its exponentials.
            start_scores(0);
            draw(0);
            ptx::wgmma_wait_group<0>();
            make_dS(0);
            round_dS();
            for (int n = 1; n < k_tiles; ++n) {
                start_scores(n);
                add(n - 1);
                draw(n);
                ptx::wgmma_wait_group<1>();  // the scores are there
                make_dS(n);
                ptx::wgmma_wait_group<0>();  // the tile before has been added
                ptx::mbarrier_arrive(barrier(barriers.K_empty[(n - 1) % K_STAGES]));
                round_dS();
            }
            add(k_tiles - 1);
            ptx::wgmma_wait_group<0>();
        }

        // dQ out through the place of Q, so that global stores are 16 bytes wide.
        meet();  // every warp is done with Q
        const float scale = DROPOUT ? p.scale * p.keep_scale : p.scale;
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; ++n)
                ptx::st_shared(Q_smem + Tile_Q::offset(place + 8 * r, n) + 4 * t,
                               ptx::cvt_pair<element>(dQ_rmem[4 * n + 2 * r] * scale, dQ_rmem[4 * n + 2 * r + 1] * scale));
        __syncwarp();  // the warp's rows are written, by lanes other than those that read them next
        store_16_rows<Tile_Q, RowOrder>(head_of(p.dq, b, h), smem, p.dq.stride_n, consumer * 64 + warp * 16, lane, i0, p.Nq, p.D);
    }
}

}  // namespace of_q

// ---- launching

extern "C" int64_t workspace_floats(const AttentionParams* params) { return 2 * Workspace::all_rows(*params); }

// Maps of Q, K, V, dO and the mask, with boxes of so many rows of queries and of keys.
template <class Maps>
static cudaError_t make_maps(Maps* maps, const AttentionParams& p, int query_rows, int key_rows) {
    cudaError_t error = cudaSuccess;
    if (p.Nk > 0) error = make_tensor_map(&maps->k, p.k, p.B, p.Hkv, p.Nk, p.D, key_rows);
    if (error == cudaSuccess && p.Nk > 0) error = make_tensor_map(&maps->v, p.v, p.B, p.Hkv, p.Nk, p.Dv, key_rows);
    if (error == cudaSuccess && p.Nq > 0) error = make_tensor_map(&maps->q, p.q, p.B, p.H, p.Nq, p.D, query_rows);
    if (error == cudaSuccess && p.Nq > 0) error = make_tensor_map(&maps->d_o, p.d_o, p.B, p.H, p.Nq, p.Dv, query_rows);
    if (error == cudaSuccess && p.Nq > 0 && p.Nk > 0 && MASK) error = make_mask_map(&maps->mask, p, 64);
    return error;
}

extern "C" int attention(const AttentionParams* params) {
    const AttentionParams& p = *params;
    const int64_t all_rows = Workspace::all_rows(p), kv_blocks = tiles_of(p.Nk, of_kv::BLOCK) * p.Hkv * p.B, q_blocks = tiles_of(p.Nq, of_q::BLOCK_Q) * p.H * p.B;
    if (!numbers_fit(p, {all_rows / PREPARE_ROWS, kv_blocks, q_blocks})) return cudaErrorInvalidConfiguration;
    DeviceGuard guard(p.device);
    // Comes first, because it gives a thread that has not yet used the device its context, and making maps does not.
    cudaError_t error = cudaFuncSetAttribute(of_kv::dKdV_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, of_kv::SMEM_BYTES);
    if (error == cudaSuccess) error = cudaFuncSetAttribute(of_q::dQ_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, of_q::SMEM_BYTES);
    if (error == cudaSuccess && all_rows > 0) {
        launch_kernel(prepare_kernel, static_cast<unsigned>(all_rows / PREPARE_ROWS), 32 * PREPARE_ROWS, 0, p.stream, p);
        error = cudaGetLastError();
    }
    if (error == cudaSuccess && kv_blocks > 0) {
        of_kv::Maps maps = {};
        error = make_maps(&maps, p, of_kv::BLOCK, BOX_ROWS<of_kv::Tile_K, RowOrder>);
        if (error == cudaSuccess) launch_kernel(of_kv::dKdV_kernel, static_cast<unsigned>(kv_blocks), THREADS, of_kv::SMEM_BYTES, p.stream, p, maps);
        if (error == cudaSuccess) error = cudaGetLastError();
    }
    if (error == cudaSuccess && q_blocks > 0) {
        of_q::Maps maps = {};
        error = make_maps(&maps, p, BOX_ROWS<of_q::Tile_Q, RowOrder>, of_q::BLOCK_K);
        if (error == cudaSuccess) launch_kernel(of_q::dQ_kernel, static_cast<unsigned>(q_blocks), THREADS, of_q::SMEM_BYTES, p.stream, p, maps);
        if (error == cudaSuccess) error = cudaGetLastError();
    }
    return error;
}

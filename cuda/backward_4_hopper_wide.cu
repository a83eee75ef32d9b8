// Backward with Hopper's own instructions for head sizes above 128: FlashAttention-3 (Shah et al., 2024, arXiv:2407.08608), Algorithm 3.  sm_90a.
//
// The idea: as in backward_4_hopper.cu, one thread copies while two warpgroups compute; but dK and dV of 64 keys would fill
// all registers of one group. So the two groups share 64 keys instead of having 64 each: a group computes Sᵀ = K Qᵀ and dPᵀ = V dOᵀ for half the
// rows of Q, and half the head's columns of dV += Pᵀ dO, dK += dSᵀ Q and dQ = dS K. Those products sum over all rows or all keys of the tile, so
// Pᵀ and dSᵀ go through shared memory: each group writes half and reads all.
//
// Products run in the order in which a group issues them, and issuing does not wait for the result. So a group issues S and dP of the next tile
// before the last products of this one, and computes the exponentials while those run:
//
//     products:   dK(n)   S(n+1)   dQ(n), first half   dV(n)   dP(n+1)   dQ(n), second half   │ dK(n+1) …
//     meanwhile:                                               P(n+1)    dS(n+1)              │
//                                                                              both groups meet ┘
//
// Shared memory has no room for a third tile of Q or dO. So dK comes before S, and dV before dP: a tile's buffer is free almost a whole step before the
// tile after next, which is loaded into it, is needed.
//
// While its additions to dQ issue, a group cannot issue products. So the groups add the second half at different times, one while the other's products
// run: before the next dK, and after the next S. Both add the first half after P(n+1).
//
// Where half of the head is not a whole number of panels of 64 columns, each half of a tile starts with a new panel.
//
// Serves float16 and bfloat16, everything in the interface, positive scale; head sizes up to 256 that are multiples of 8. Up to 192
// backward_4_hopper_192.cu is faster, and this one serves calls with dropout, or with a mask over intervals. Above, backward_4_hopper_256.cu serves plain calls.
//
// One file because its kernel is one schedule; what the three hopper backwards share is in backward_hopper.cuh.
#include "common.cuh"

constexpr int BLOCK_K = 64;
constexpr int BLOCK_Q = 64;
constexpr int CONSUMERS = 2, HALVES = 2;
#include "backward_hopper.cuh"

constexpr int ROWS = BLOCK_Q / CONSUMERS;      // of Q: a group's columns of Sᵀ and dPᵀ
constexpr int COLUMNS = HEAD_DIM / CONSUMERS;  // of the head: a group's columns of dK and dQ
constexpr int V_COLUMNS = V_HEAD_DIM / CONSUMERS;  // and of dV
constexpr int N_TILES = ROWS / 8;
static_assert(HEAD_DIM > 128, "narrower heads: backward_4_hopper.cu");
static_assert(!BIASED, "shared memory has no room for a tile of a bias");
static_assert(COLUMNS > 64 && COLUMNS <= 128 && COLUMNS % 16 == 0 && V_COLUMNS <= COLUMNS && V_COLUMNS % 16 == 0, "two products are a group's columns of dQ");
using Tile_S = SwizzledTile<BLOCK_K, BLOCK_Q>;  // of P and dS, transposed: rows are keys
constexpr int QDO_BYTES = Tile_Q::BYTES + Tile_dO::BYTES;
constexpr int SMEM_BYTES = Tile_K::BYTES + Tile_V::BYTES + STAGES * QDO_BYTES + 2 * 2 * Tile_S::BYTES + STAGES * 2 * ROWS_BYTES + MASK_BYTES;
static_assert(SMEM_BYTES <= SMEM_KB * 1024 - 1024, "choose smaller tiles");

// "full": the bytes have arrived (Q's barrier counts the mask's too). "empty": every computing thread has finished reading them. The mask has a
// single buffer with its own barrier: its tile is read early in a step, long before Q and dO are released.
struct Barriers {
    uint64_t KV_full, Q_full[STAGES], Q_empty[STAGES], dO_full[STAGES], dO_empty[STAGES], mask_empty;
};

// Reuses the first array's registers for the second if both have the same length. (The compiler serialises a product that writes part of an array
// which another product writes as a whole.)
template <int N, int M>
__device__ inline auto& shared_if_equal(float (&first)[N], float (&second)[M]) {
    if constexpr (N == M) return first;
    else return second;
}

// LEAVES_OUT: whether the mask lets tiles be skipped. For false, the code is the same as without a scan of the mask.
template <bool LEAVES_OUT>
__device__ inline void backward(const AttentionParams& p, const Maps& maps) {
    extern __shared__ __align__(1024) uint8_t smem[];
    __shared__ __align__(8) Barriers barriers;
    const uint32_t K_smem = ptx::smem_address(smem);                  // [BLOCK_K, HEAD_DIM]
    const uint32_t V_smem = K_smem + Tile_K::BYTES;                   // [BLOCK_K, V_HEAD_DIM]
    const uint32_t QdO_smem = V_smem + Tile_V::BYTES;                 // STAGES × (Q [BLOCK_Q, HEAD_DIM], dO [BLOCK_Q, V_HEAD_DIM])
    const uint32_t PdS_smem = QdO_smem + STAGES * QDO_BYTES;          // 2 × (Pᵀ [BLOCK_K, BLOCK_Q], dSᵀ [BLOCK_K, BLOCK_Q])
    constexpr int ROWS_OFFSET = Tile_K::BYTES + Tile_V::BYTES + STAGES * QDO_BYTES + 2 * 2 * Tile_S::BYTES;
    const float* rows_smem = reinterpret_cast<const float*>(smem + ROWS_OFFSET);  // STAGES × (LSE [BLOCK_Q], Delta [BLOCK_Q])
    uint8_t* mask_smem = smem + ROWS_OFFSET + STAGES * 2 * ROWS_BYTES;            // [BLOCK_K] BitRow
#if INTERVAL
    __shared__ Told told_smem[STAGES];
#endif
    const uint32_t KV_full = ptx::smem_address(&barriers.KV_full), mask_empty = ptx::smem_address(&barriers.mask_empty);
    auto barrier = [](uint64_t* of, int stage) { return ptx::smem_address(of + stage); };

    // One block computes dK and dV of BLOCK_K keys.
    const int k_tiles = (p.Nk + BLOCK_K - 1) / BLOCK_K;
    const auto [k_tile, b_kv_h] = unit_at<LEAVES_OUT>(p, maps, k_tiles, blockIdx.x);
    const int j0 = k_tile * BLOCK_K, offset = diagonal(p);                   // causal: row i sees columns j ≤ i + offset

    if (threadIdx.x == 0) {
        ptx::mbarrier_init(KV_full, 1);
        ptx::mbarrier_init(mask_empty, GROUP * CONSUMERS);
        for (int stage = 0; stage < STAGES; ++stage) {
            ptx::mbarrier_init(barrier(barriers.Q_full, stage), 1);
            ptx::mbarrier_init(barrier(barriers.dO_full, stage), 1);
            ptx::mbarrier_init(barrier(barriers.Q_empty, stage), GROUP * CONSUMERS);
            ptx::mbarrier_init(barrier(barriers.dO_empty, stage), GROUP * CONSUMERS);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();

    const int group = uniform(threadIdx.x / GROUP);
    if (group == 0) {
        // ---- the producer: one thread issues all loads
        ptx::setmaxnreg_dec<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) {
            const Workspace workspace(p);
            ptx::mbarrier_arrive_expect_tx(KV_full, Tile_K::BYTES + Tile_V::BYTES);
            load_boxes<Tile_K, RowOrder, COLUMNS>(K_smem, maps.k, j0, b_kv_h % p.Hkv, b_kv_h / p.Hkv, KV_full);
            load_boxes<Tile_V, RowOrder, V_COLUMNS>(V_smem, maps.v, j0, b_kv_h % p.Hkv, b_kv_h / p.Hkv, KV_full);
#if INTERVAL
            Visit at(p, maps, k_tile, b_kv_h);
            for (; at.more(); at.advance(maps)) {
#else
            for (VisitOf<LEAVES_OUT> at(p, maps, k_tile, b_kv_h); at.more(); at.advance(p)) {
#endif
                const Slot<STAGES> slot = at.slot();
                const int stage = slot.stage, i0 = at.tile * BLOCK_Q;
                const int64_t row = static_cast<int64_t>(at.bh) * workspace.rows + i0;
                const uint32_t Q_tile = QdO_smem + stage * QDO_BYTES, rows = K_smem + ROWS_OFFSET + stage * 2 * ROWS_BYTES;
                auto load = [&](auto kind, auto half, uint32_t tile, const CUtensorMap& map, uint32_t rows, const float* of_rows, uint32_t full,
                                uint32_t empty, int more) {
                    using Tile = decltype(kind);
                    ptx::mbarrier_wait(empty, slot.parity ^ 1);  // returns immediately in the first round
                    ptx::mbarrier_arrive_expect_tx(full, Tile::BYTES + ROWS_BYTES + more);
                    load_boxes<Tile, InOrder, decltype(half)::value>(tile, map, i0, at.bh % p.H, at.bh / p.H, full);
                    ptx::cp_async_bulk(rows, of_rows, ROWS_BYTES, full);
                };
#if INTERVAL
                ptx::mbarrier_wait(barrier(barriers.Q_empty, stage), slot.parity ^ 1);
                told_smem[stage] = at;  // visible to threads that have waited for "full"
#endif
                load(Tile_Q(), std::integral_constant<int, COLUMNS>(), Q_tile, maps.q, rows, workspace.LSE + row, barrier(barriers.Q_full, stage), barrier(barriers.Q_empty, stage), MASK_BYTES);
                if (MASK) {
                    ptx::mbarrier_wait(mask_empty, (at.n & 1) ^ 1);
                    ptx::cp_async_bulk_tensor_4d(ptx::smem_address(mask_smem), &maps.mask, one_row(p) ? 0 : i0 / BIT_COLUMNS * 4, j0, at.bh % p.H,
                                                 at.bh / p.H, barrier(barriers.Q_full, stage));
                }
                load(Tile_dO(), std::integral_constant<int, V_COLUMNS>(), Q_tile + Tile_Q::BYTES, maps.d_o, rows + ROWS_BYTES, workspace.Delta + row, barrier(barriers.dO_full, stage),
                     barrier(barriers.dO_empty, stage), 0);
            }
#if INTERVAL
            ptx::mbarrier_wait(barrier(barriers.Q_empty, at.slot().stage), at.slot().parity ^ 1);
            told_smem[at.slot().stage] = {0, -1, 0};
            ptx::mbarrier_arrive(barrier(barriers.Q_full, at.slot().stage));
#endif
        }
    } else {
        // ---- the consumers
        ptx::setmaxnreg_inc<CONSUMER_REGISTERS>();
        const int consumer = group - 1, warp = threadIdx.x % GROUP / 32, lane = threadIdx.x % 32, t = lane % 4;
        const int place = warp * 16 + lane / 4;  // in the tile of keys; this thread holds it and the row 8 further on,
        const int first_row = RowOrder::row(place);  // keys first_row and first_row + ROW_STEP
        const float scale_log2 = p.scale * LOG2_E;   // exp(scale · x) = 2^(scale_log2 · x)

        float dK_rmem[COLUMNS / 2], dV_rmem[V_COLUMNS / 2] = {};  // [BLOCK_K, COLUMNS], [BLOCK_K, V_COLUMNS]
        float S_rmem[ROWS / 2], dP_rmem[ROWS / 2];              // [BLOCK_K, ROWS], transposed; of the tile that comes next
        float dQ_rmem[32];                                      // [BLOCK_Q, 64]: of the group's columns
        [[maybe_unused]] float more_rmem[COLUMNS / 2 - 32];     // [BLOCK_Q, COLUMNS - 64]: of those beyond
        auto& dQ_rest_rmem = shared_if_equal(dQ_rmem, more_rmem);
        [[maybe_unused]] KeepBits<ROWS> keep;                   // of the tile that comes next

        // Tile number n of the visit: where it is in shared memory.
        auto Q_of = [&](int n) { return QdO_smem + n % STAGES * QDO_BYTES; };
        auto dO_of = [&](int n) { return Q_of(n) + Tile_Q::BYTES; };
        auto P_of = [&](int n) { return PdS_smem + n % 2 * 2 * Tile_S::BYTES; };
        auto dS_of = [&](int n) { return P_of(n) + Tile_S::BYTES; };

        // A tile's first row in the workspace.
        auto first_row_of = [&](const auto& at) { return static_cast<int64_t>(at.bh) * Workspace(p).rows + at.tile * BLOCK_Q; };
        // Whether some key of the block is not seen by all rows of a tile.
#if INTERVAL
        using Visited = ToldVisit<>;
        auto cut = [&](const Visited& at) { return at.cut != 0; };
#else
        using Visited = VisitOf<LEAVES_OUT>;
        auto cut = [&](const Visited& at) { return j0 + BLOCK_K > min(p.Nk, CAUSAL ? at.tile * BLOCK_Q + offset + 1 : p.Nk); };
#endif

        // Issues the group's columns of K Qᵀ or V dOᵀ.
        auto multiply = [&](auto half, float(&C)[ROWS / 2], uint32_t A, uint32_t B, bool from_zero) {
            constexpr int STEPS = decltype(half)::value / 16, PANELS = (decltype(half)::value + 63) / 64;  // of a half of the head
            const uint64_t a = ptx::descriptor(uniform(A)), b = ptx::descriptor(uniform(B + consumer * ROWS * ROW_BYTES));
            ptx::wgmma_fence();
#pragma unroll
            for (int d = 0; d < 2 * STEPS; ++d) {
                const int panel = d / STEPS * PANELS + d % STEPS / 4, column = d % STEPS % 4 * 32;
                ptx::wgmma_ss<element, ROWS>(C, ptx::advance(a, panel * Tile_K::PANEL_BYTES + column),
                                             ptx::advance(b, panel * Tile_Q::PANEL_BYTES + column), !from_zero || d > 0);
            }
            ptx::wgmma_commit_group();
        };
        auto start_S_of = [&](const Visited& at) {
            ptx::mbarrier_wait(barrier(barriers.Q_full, at.slot().stage), at.slot().parity);
#if MASK
            // Key j is seen by the rows from j − offset on.
            const int i0 = at.tile * BLOCK_Q + consumer * ROWS;
            start_S<ROWS>(S_rmem, mask_smem, i0 % BIT_COLUMNS, first_row, ROW_STEP, t, [&](int r, int) {
                const int j = j0 + first_row + ROW_STEP * r;
                return INTERVAL ? 0u : first_bits(j >= p.Nk ? ROWS : CAUSAL ? j - offset - i0 : 0);
            });
#endif
            multiply(std::integral_constant<int, COLUMNS>(), S_rmem, K_smem, Q_of(at.n), !MASK);
            if (MASK) ptx::mbarrier_arrive(mask_empty);
        };
        auto start_dP = [&](const Visited& at) {
            ptx::mbarrier_wait(barrier(barriers.dO_full, at.slot().stage), at.slot().parity);
            multiply(std::integral_constant<int, V_COLUMNS>(), dP_rmem, V_smem, dO_of(at.n), true);
        };
        // Draws what dropout keeps of a tile.
        auto draw = [&](const Visited& at) {
            if (DROPOUT) keep.draw_keys(p, at.bh / p.H, at.bh % p.H, j0 + first_row, at.tile * BLOCK_Q + consumer * ROWS, lane);
        };
        // S becomes P = exp(scale · S − LSE), 0 beyond the diagonal or the end of the keys. Beyond the end of the rows LSE is ∞.
        [[maybe_unused]] auto make_P = [&](const Visited& at) {
            const float* LSE_smem = rows_smem + at.slot().stage * 2 * BLOCK_Q + consumer * ROWS + 2 * t;
            const bool is_cut = (INTERVAL || !MASK) && cut(at);
#if INTERVAL
            const uint2* seen = maps.seen + first_row_of(at) + consumer * ROWS + 2 * t;  // in global memory: shared memory is full
#endif
#pragma unroll
            for (int n = 0; n < N_TILES; ++n) {
                const float2 LSE = *reinterpret_cast<const float2*>(LSE_smem + 8 * n);
#if INTERVAL
                const uint4 two_rows = is_cut ? *reinterpret_cast<const uint4*>(seen + 8 * n) : uint4{};
#endif
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    float &P0 = S_rmem[4 * n + 2 * r], &P1 = S_rmem[4 * n + 2 * r + 1];
                    P0 = ptx::ex2(fmaf(P0, scale_log2, -LSE.x));
                    P1 = ptx::ex2(fmaf(P1, scale_log2, -LSE.y));
                    if (is_cut) {
#if INTERVAL
                        const unsigned j = j0 + first_row + ROW_STEP * r;
                        if (j - two_rows.x >= two_rows.y) P0 = 0;  // unsigned: columns before the first are hidden too
                        if (j - two_rows.z >= two_rows.w) P1 = 0;
#else
                        const int j = j0 + first_row + ROW_STEP * r, i = at.tile * BLOCK_Q + consumer * ROWS + 8 * n + 2 * t;
                        if (j >= p.Nk || (CAUSAL && j > i + offset)) P0 = 0;
                        if (j >= p.Nk || (CAUSAL && j > i + 1 + offset)) P1 = 0;
#endif
                    }
                    ptx::st_shared(P_of(at.n) + Tile_S::offset(place + 8 * r, consumer * N_TILES + n) + 4 * t,
                                   ptx::cvt_pair<element>(P0, P1) & (DROPOUT ? keep.pair(r, n) : ~0u));
                }
            }
        };
#if SCORE
        // The same through the hook for scores. S is overwritten with the factor of dS: P, or with softcap P times the derivative of the cap.
        const float unit = unit_log2(p);
        auto score_P = [&](const Visited& at) {
            const float* LSE_smem = rows_smem + at.slot().stage * 2 * BLOCK_Q + consumer * ROWS + 2 * t;
            const bool is_cut = (INTERVAL || !MASK) && cut(at);
            const int i0 = at.tile * BLOCK_Q, row = i0 + consumer * ROWS + 2 * t;
            const float slope = SLOPED ? slope_of_head(p, at.bh / p.H, at.bh % p.H) : 0;
#if INTERVAL
            const uint2* seen = maps.seen + first_row_of(at) + consumer * ROWS + 2 * t;  // in global memory: shared memory is full
#endif
            score_keys<ROWS>(
                S_rmem, p, slope, i0, row, j0, j0 + first_row, [](int, uint32_t(&)[4]) {},
                [&](int n, int r, const float(&x)[2], const float(&capped)[2]) {
                    const float2 LSE = *reinterpret_cast<const float2*>(LSE_smem + 8 * n);
                    float P[2] = {ptx::ex2(fmaf(x[0], unit, -LSE.x)), ptx::ex2(fmaf(x[1], unit, -LSE.y))};
                    const int j = j0 + first_row + ROW_STEP * r;
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        float& S = S_rmem[4 * n + 2 * r + c];
                        if (MASK && S < p.lowest) P[c] = 0;
#if INTERVAL
                        if (is_cut) {
                            const uint2 keys = seen[8 * n + c];
                            if (static_cast<unsigned>(j) - keys.x >= keys.y) P[c] = 0;  // unsigned: columns before the first are hidden too
                        }
#else
                        if (is_cut && (j >= p.Nk || (CAUSAL && j > row + 8 * n + c + offset))) P[c] = 0;
#endif
                        S = CAPPED ? P[c] * fmaf(-capped[c], capped[c], 1.0f) : P[c];
                    }
                    ptx::st_shared(P_of(at.n) + Tile_S::offset(place + 8 * r, consumer * N_TILES + n) + 4 * t,
                                   ptx::cvt_pair<element>(P[0], P[1]) & (DROPOUT ? keep.pair(r, n) : ~0u));
                });
        };
#endif
        auto to_P = [&](const Visited& at) {
#if SCORE
            score_P(at);
#else
            make_P(at);
#endif
        };
        // dS = P∘(dP − Delta). With dropout, dS = P∘(keep_scale · kept dP − Delta); the factor keep_scale is applied at the end, as for dV.
        auto make_dS = [&](const Visited& at) {
            const float* Delta_smem = rows_smem + at.slot().stage * 2 * BLOCK_Q + BLOCK_Q + consumer * ROWS + 2 * t;
#pragma unroll
            for (int n = 0; n < N_TILES; ++n) {
                const float2 Delta = *reinterpret_cast<const float2*>(Delta_smem + 8 * n);
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    float dP0 = dP_rmem[4 * n + 2 * r], dP1 = dP_rmem[4 * n + 2 * r + 1];
                    if (DROPOUT) dP0 = keep.kept(dP0, r, n, 0), dP1 = keep.kept(dP1, r, n, 1);
                    ptx::st_shared(dS_of(at.n) + Tile_S::offset(place + 8 * r, consumer * N_TILES + n) + 4 * t,
                                   ptx::cvt_pair<element>(S_rmem[4 * n + 2 * r] * (dP0 - Delta.x), S_rmem[4 * n + 2 * r + 1] * (dP1 - Delta.y)));
                }
            }
            ptx::fence_proxy_async();  // this thread's part of Pᵀ and dSᵀ
        };

        // Issues dV += Pᵀ dO or dK += dSᵀ Q: the summation index runs over the rows of dO and Q
        auto add = [&](auto& C, uint32_t A, uint32_t B, bool from_zero) {
            constexpr int N = sizeof(C) / sizeof(float) * 2;  // columns
            const uint64_t a = ptx::descriptor(uniform(A));
            const uint64_t b = ptx::descriptor(uniform(B + consumer * ((N + 63) / 64) * Tile_Q::PANEL_BYTES), Tile_Q::PANEL_BYTES);
            ptx::wgmma_fence();
#pragma unroll
            for (int k = 0; k < BLOCK_Q / 16; ++k)
                ptx::wgmma_ss_transposed_b<element, N>(C, ptx::advance(a, k * 32), ptx::advance(b, k * 16 * ROW_BYTES), !from_zero || k > 0);
            ptx::wgmma_commit_group();
        };
        // Issues the first 64 of the group's columns of dQ = dS K, or the remaining ones
        auto start_dQ = [&](int n, int half) {
            const uint64_t a = ptx::descriptor(uniform(dS_of(n)));
            const uint64_t b = ptx::descriptor(uniform(K_smem + (consumer * (Tile_K::PANELS / CONSUMERS) + half) * Tile_K::PANEL_BYTES));
            ptx::wgmma_fence();
#pragma unroll
            for (int k = 0; k < BLOCK_K / 16; ++k) {
                const uint64_t a_k = ptx::advance(a, k * 16 * ROW_BYTES), b_k = ptx::advance(b, k * 16 * ROW_BYTES);
                if (half == 0) ptx::wgmma_ss_transposed<element, 64>(dQ_rmem, a_k, b_k, k > 0);
                else ptx::wgmma_ss_transposed<element, COLUMNS - 64>(dQ_rest_rmem, a_k, b_k, k > 0);
            }
            ptx::wgmma_commit_group();
        };
        // Adds them to the tile's rows, from `row` on.
        auto add_half = [&](int64_t row, int half) {
            if (half == 0) add_dQ<64>(Workspace(p), row, consumer * COLUMNS, dQ_rmem);
            else add_dQ<COLUMNS - 64>(Workspace(p), row, consumer * COLUMNS + 64, dQ_rest_rmem);
        };

        ptx::mbarrier_wait(KV_full, 0);
#if INTERVAL
        ToldVisit<> next(told_smem, barriers.Q_full);
#else
        VisitOf<LEAVES_OUT> next(p, maps, k_tile, b_kv_h);
#endif
        if (next.more()) {
            // The first tile has no predecessor whose products could run under its exponentials.
            start_S_of(next);
            start_dP(next);
            draw(next);
            ptx::wgmma_wait_group<1>();
            to_P(next);
            ptx::wgmma_wait_group<0>();
            make_dS(next);
            meet();
            add(dK_rmem, dS_of(0), Q_of(0), true);
            int64_t row = first_row_of(next), row_before = 0;
#if INTERVAL
            int turn = next.turn(p, maps, k_tile);
#else
            const int& turn = k_tile;
#endif
            const bool adds_late = consumer == 0 && !p.deterministic;
            int n = 0;
            for (next.advance(p); next.more(); next.advance(p), ++n) {
                start_S_of(next);
                if (n > 0 && adds_late) add_half(row_before, 1);
                start_dQ(n, 0);
                add(dV_rmem, P_of(n), dO_of(n), false);
                start_dP(next);
                draw(next);
                ptx::wgmma_wait_group<3>();  // S is there, and dK: done with Q
                ptx::mbarrier_arrive(barrier(barriers.Q_empty, n % STAGES));
                to_P(next);
                ptx::wgmma_wait_group<2>();  // the first half of dQ is there
                take_turn(p, Workspace(p), row, turn);
                add_half(row, 0);
                start_dQ(n, 1);
                ptx::wgmma_wait_group<2>();  // dV is there: done with dO
                ptx::mbarrier_arrive(barrier(barriers.dO_empty, n % STAGES));
                ptx::wgmma_wait_group<1>();  // dP is there
                make_dS(next);
                ptx::wgmma_wait_group<0>();  // so is the second half of dQ
                meet();                      // Pᵀ and dSᵀ are whole, and both groups are done with the other ones
                if (!adds_late) add_half(row, 1);
                end_turn(p, Workspace(p), row, turn);
                add(dK_rmem, dS_of(next.n), Q_of(next.n), false);
                row_before = row;
                row = first_row_of(next);
#if INTERVAL
                turn = next.turn(p, maps, k_tile);
#endif
            }
            if (n > 0 && adds_late) add_half(row_before, 1);
            start_dQ(n, 0);
            add(dV_rmem, P_of(n), dO_of(n), false);
            ptx::wgmma_wait_group<1>();
            take_turn(p, Workspace(p), row, turn);
            add_half(row, 0);
            start_dQ(n, 1);
            ptx::wgmma_wait_group<0>();
            add_half(row, 1);
            end_turn(p, Workspace(p), row, turn);
        } else {
#pragma unroll
            for (int i = 0; i < COLUMNS / 2; ++i) dK_rmem[i] = 0;
        }

        // dK and dV are stored by way of the buffers of K and V, so that global stores are 16 bytes wide.
        meet();  // both groups are done with K
        const float dV_scale = DROPOUT ? p.keep_scale : 1.0f, dK_scale = p.scale * dV_scale;
        constexpr int CHUNKS = Tile_K::PANELS / CONSUMERS * 8, V_CHUNKS = Tile_V::PANELS / CONSUMERS * 8;  // of a half, of 8 columns
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; ++n) {
                const uint32_t to = Tile_K::offset(place + 8 * r, consumer * CHUNKS + n) + 4 * t;
                const uint32_t to_V = CHUNKS == V_CHUNKS ? to : Tile_V::offset(place + 8 * r, consumer * V_CHUNKS + n) + 4 * t;
                ptx::st_shared(K_smem + to, ptx::cvt_pair<element>(dK_rmem[4 * n + 2 * r] * dK_scale, dK_rmem[4 * n + 2 * r + 1] * dK_scale));
                if (n < V_COLUMNS / 8)
                    ptx::st_shared(V_smem + to_V, ptx::cvt_pair<element>(dV_rmem[4 * n + 2 * r] * dV_scale, dV_rmem[4 * n + 2 * r + 1] * dV_scale));
            }
        __syncwarp();  // the warp's part is written, by lanes other than those that read it next
        const int b = b_kv_h / p.Hkv, kv_h = b_kv_h % p.Hkv;
        store_16_rows<Tile_K, RowOrder, COLUMNS>(head_of(p.dk, b, kv_h), smem, p.dk.stride_n, warp * 16, lane, j0, p.Nk, p.D, consumer * COLUMNS,
                                                 consumer * (CHUNKS - COLUMNS / 8));
        store_16_rows<Tile_V, RowOrder, V_COLUMNS>(head_of(p.dv, b, kv_h), smem + Tile_K::BYTES, p.dv.stride_n, warp * 16, lane, j0, p.Nk, p.Dv,
                                                   consumer * V_COLUMNS, consumer * (V_CHUNKS - V_COLUMNS / 8));
    }
}

__global__ void __launch_bounds__(THREADS, 1) backward_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Maps maps) {
#if LISTED
    if (leaves_out(maps)) return backward<true>(p, maps);
#endif
    backward<false>(p, maps);
}

extern "C" int64_t workspace_floats(const AttentionParams* params) { return backward_floats(*params); }

extern "C" int attention(const AttentionParams* params) { return launch_backward(backward_kernel, SMEM_BYTES, *params); }

// Backward with Hopper's own instructions for head sizes from 129 to 192: FlashAttention-3 (Shah et al., 2024, arXiv:2407.08608), Algorithm 3.  sm_90a.
//
// The idea: a block's dQ is added to global memory, and its Q and dO are read from L2, once for every tile of keys; so a tile should have many keys. In
// backward_4_hopper_wide.cu 64 keys fill the registers of two groups. Three groups hold dK and dV of 96, if each has a panel of 64 of the head's columns:
// dKᵀ (64 columns × 96 keys) is a product of 64 rows, as wgmma has them, where dK (96 keys × 64 columns) is not. (FlashAttention-3's own backward of this
// size has the same tiles and three groups.) A group computes S = Q Kᵀ and dP = dO Vᵀ of 32 keys, so a thread has two rows, and two values of LSE and
// of Delta. P and dS go through shared memory: each group writes a third and reads all.
//
// Products run in the order in which a group issues them, and issuing does not wait for the result. So a group issues S and dP of the next tile before
// dV of this one, and computes the exponentials while those run:
//
//     products:   dQ(n)   dK(n)           S(n+1)          dP(n+1)   dV(n)     │ dQ(n+1) …
//     meanwhile:          adds half dQ    the other half  P(n+1)    dS(n+1)   │
//                                                                    all meet ┘
//
// dQ is added in two halves: adding all of it at once would stall the group, and S can use the registers of the first half.
//
// Q's buffer is free after dK, and dO's after dV, each long before the tile after next, which is loaded into it, is needed. dS has one buffer: it is
// written again once all groups have waited for dK, which Q's "empty" barrier counts. P(n+1) is written while dV(n) reads P(n), so P has two buffers.
//
// Serves float16 and bfloat16, everything in the interface but dropout and a mask over intervals, positive scale; head sizes from 129 to 192 that are
// multiples of 8.
//
// One file because its kernel is one schedule; what the three hopper backwards share is in backward_hopper.cuh.
#include "common.cuh"

constexpr int BLOCK_K = 96;
constexpr int BLOCK_Q = 64;
constexpr int CONSUMERS = 3, HALVES = 1;
#include "backward_hopper.cuh"

#if DROPOUT || (MASK && INTERVAL)
#error "dropout, and a mask over intervals, take more registers than there are: backward_4_hopper_wide.cu"
#endif

constexpr int KEYS = BLOCK_K / CONSUMERS;  // a group's columns of S and dP
static_assert(HEAD_DIM > 128 && HEAD_DIM <= 192 && V_HEAD_DIM > 64 && V_HEAD_DIM <= HEAD_DIM, "each group has a panel of Q's columns");
using Tile_P = SwizzledTile<BLOCK_Q, BLOCK_K>;
constexpr int QDO_BYTES = Tile_Q::BYTES + Tile_dO::BYTES;
constexpr int SEEN_BYTES = INTERVAL ? BLOCK_Q * static_cast<int>(sizeof(uint2)) : 0;  // the interval that each row sees
constexpr int ROWS_OFFSET = Tile_K::BYTES + Tile_V::BYTES + STAGES * QDO_BYTES + 3 * Tile_P::BYTES;
constexpr int MASK_OFFSET = ROWS_OFFSET + STAGES * 2 * ROWS_BYTES, SEEN_OFFSET = MASK_OFFSET + STAGES * MASK_BYTES;
constexpr int SMEM_BYTES = SEEN_OFFSET + STAGES * SEEN_BYTES;
static_assert(SMEM_BYTES <= SMEM_KB * 1024 - 1024, "choose smaller tiles");

// "full": the bytes have arrived (Q's barrier counts the mask's too). "empty": every computing thread has finished reading them.
struct Barriers {
    uint64_t KV_full, Q_full[STAGES], Q_empty[STAGES], dO_full[STAGES], dO_empty[STAGES];
};

// LEAVES_OUT: whether the mask lets tiles be skipped. For false, the code is the same as without a scan of the mask.
template <bool LEAVES_OUT>
__device__ inline void backward(const AttentionParams& p, const Maps& maps) {
    extern __shared__ __align__(1024) uint8_t smem[];
    __shared__ __align__(8) Barriers barriers;
    const uint32_t K_smem = ptx::smem_address(smem);                  // [BLOCK_K, HEAD_DIM]
    const uint32_t V_smem = K_smem + Tile_K::BYTES;                   // [BLOCK_K, V_HEAD_DIM]
    const uint32_t QdO_smem = V_smem + Tile_V::BYTES;                 // STAGES × (Q [BLOCK_Q, HEAD_DIM], dO [BLOCK_Q, V_HEAD_DIM])
    const uint32_t P_smem = QdO_smem + STAGES * QDO_BYTES;            // 2 × [BLOCK_Q, BLOCK_K]
    const uint32_t dS_smem = P_smem + 2 * Tile_P::BYTES;              // [BLOCK_Q, BLOCK_K]
    const float* rows_smem = reinterpret_cast<const float*>(smem + ROWS_OFFSET);  // STAGES × (LSE [BLOCK_Q], Delta [BLOCK_Q])
    [[maybe_unused]] const uint8_t* mask_smem = smem + MASK_OFFSET;               // STAGES × [BLOCK_K] BitRow
#if INTERVAL
    __shared__ Told told_smem[STAGES];
    const uint2* seen_smem = reinterpret_cast<const uint2*>(smem + SEEN_OFFSET);  // STAGES × [BLOCK_Q]: each row's first column, and how many
#endif
    const uint32_t KV_full = ptx::smem_address(&barriers.KV_full);
    auto barrier = [](uint64_t* of, int stage) { return ptx::smem_address(of + stage); };

    // One block computes dK and dV of BLOCK_K keys.
    const int k_tiles = (p.Nk + BLOCK_K - 1) / BLOCK_K;
    const auto [k_tile, b_kv_h] = unit_at<LEAVES_OUT>(p, maps, k_tiles, blockIdx.x);
    const int j0 = k_tile * BLOCK_K, offset = diagonal(p);                   // causal: row i sees columns j ≤ i + offset

    if (threadIdx.x == 0) {
        ptx::mbarrier_init(KV_full, 1);
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
            load_boxes<Tile_K>(K_smem, maps.k, j0, b_kv_h % p.Hkv, b_kv_h / p.Hkv, KV_full);
            load_boxes<Tile_V>(V_smem, maps.v, j0, b_kv_h % p.Hkv, b_kv_h / p.Hkv, KV_full);
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
                auto load = [&](auto kind, uint32_t tile, const CUtensorMap& map, uint32_t rows, const float* of_rows, uint32_t full, int more_bytes) {
                    using Tile = decltype(kind);
                    ptx::mbarrier_arrive_expect_tx(full, Tile::BYTES + ROWS_BYTES + more_bytes);
                    load_boxes<Tile>(tile, map, i0, at.bh % p.H, at.bh / p.H, full);
                    ptx::cp_async_bulk(rows, of_rows, ROWS_BYTES, full);
                };
                const uint32_t Q_full = barrier(barriers.Q_full, stage);
                ptx::mbarrier_wait(barrier(barriers.Q_empty, stage), slot.parity ^ 1);  // returns immediately in the first round
#if INTERVAL
                told_smem[stage] = at;  // visible to threads that have waited for "full"
#endif
                load(Tile_Q(), Q_tile, maps.q, rows, workspace.LSE + row, Q_full, MASK_BYTES + SEEN_BYTES);
#if INTERVAL
                ptx::cp_async_bulk(K_smem + SEEN_OFFSET + stage * SEEN_BYTES, maps.seen + row, SEEN_BYTES, Q_full);
#endif
                if (MASK)
                    ptx::cp_async_bulk_tensor_4d(K_smem + MASK_OFFSET + stage * MASK_BYTES, &maps.mask, one_row(p) ? 0 : i0 / BIT_COLUMNS * 4, j0, at.bh % p.H,
                                                 at.bh / p.H, Q_full);
                ptx::mbarrier_wait(barrier(barriers.dO_empty, stage), slot.parity ^ 1);
                load(Tile_dO(), Q_tile + Tile_Q::BYTES, maps.d_o, rows + ROWS_BYTES, workspace.Delta + row, barrier(barriers.dO_full, stage), 0);
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
        const int place = warp * 16 + lane / 4;     // in the tile of Q; this thread has it and the one 8 further,
        const int first_key = consumer * KEYS + 2 * t;  // and keys 8n + first_key and + 1 of the block's
        const float scale_log2 = p.scale * LOG2_E;  // exp(scale · x) = 2^(scale_log2 · x)
        const uint32_t PdS_lane = Tile_P::step(Tile_P::lane_a(warp * 16, lane), consumer * KEYS / 16);  // its row of a tile of P and dS, as stmatrix wants it

        float dK_rmem[BLOCK_K / 2] = {}, dV_rmem[BLOCK_K / 2] = {};  // [64, BLOCK_K], transposed: of the group's panel of columns
        float S_rmem[KEYS / 2], dP_rmem[KEYS / 2];              // [BLOCK_Q, KEYS], of the tile that comes next
        float dQ_rmem[32];                                      // [BLOCK_Q, 64]: of the group's panel

        // Tile number n of the visit: where it is in shared memory.
        auto Q_of = [&](int n) { return QdO_smem + n % STAGES * QDO_BYTES; };
        auto dO_of = [&](int n) { return Q_of(n) + Tile_Q::BYTES; };
        auto P_of = [&](int n) { return P_smem + n % 2 * Tile_P::BYTES; };

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

        // Issues Q Kᵀ or dO Vᵀ for the group's keys. A's rows are queries, B's are keys; the sum runs over the COLUMNS columns of the head.
        auto multiply = [&](auto columns, float(&C)[KEYS / 2], uint32_t A, uint32_t B, bool from_zero) {
            const uint64_t a = ptx::descriptor(uniform(A)), b = ptx::descriptor(uniform(B + consumer * KEYS * ROW_BYTES));
            ptx::wgmma_fence();
#pragma unroll
            for (int d = 0; d < decltype(columns)::value / 16; ++d)
                ptx::wgmma_ss<element, KEYS>(C, ptx::advance(a, d / 4 * Tile_Q::PANEL_BYTES + d % 4 * 32),
                                             ptx::advance(b, d / 4 * Tile_K::PANEL_BYTES + d % 4 * 32), !from_zero || d > 0);
            ptx::wgmma_commit_group();
        };
        auto start_scores = [&](const Visited& at) {
            ptx::mbarrier_wait(barrier(barriers.Q_full, at.slot().stage), at.slot().parity);
#if MASK
            // Each key has a row of bits, in which a lane's two queries are 8 bits apart.
            const BitRow* mask = reinterpret_cast<const BitRow*>(mask_smem + at.slot().stage * MASK_BYTES) + first_key;
            const int word = at.tile * BLOCK_Q % BIT_COLUMNS / 32 + warp / 2;
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const uint32_t signs = mask[8 * n + c].word[word] << (7 - lane / 4);
#pragma unroll
                    for (int r = 0; r < 2; ++r) S_rmem[4 * n + 2 * r + c] = start_of_sum(signs, warp % 2 * 2 + r);
                }
#endif
            multiply(std::integral_constant<int, HEAD_DIM>(), S_rmem, Q_of(at.n), K_smem, !MASK);
        };
        auto start_dP = [&](const Visited& at) {
            ptx::mbarrier_wait(barrier(barriers.dO_full, at.slot().stage), at.slot().parity);
            multiply(std::integral_constant<int, V_HEAD_DIM>(), dP_rmem, dO_of(at.n), V_smem, true);
        };
        // Stores two registers of 8 keys each as 16 keys of P or dS.
        auto store = [&](uint32_t tile, auto pair) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; n += 2) {
                const uint32_t pairs[4] = {pair(n, 0), pair(n, 1), pair(n + 1, 0), pair(n + 1, 1)};
                ptx::stmatrix_x4(tile + (PdS_lane ^ n * 16), pairs);
            }
        };
        // S becomes P = exp(scale · S − LSE), 0 beyond the diagonal or the end of the keys. Beyond the end of the rows LSE is ∞.
        auto make_P = [&](const Visited& at) {
            const float* LSE_smem = rows_smem + at.slot().stage * 2 * BLOCK_Q + place;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float LSE = LSE_smem[8 * r];
#pragma unroll
                for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        float& P = S_rmem[4 * n + 2 * r + c];
                        P = ptx::ex2(fmaf(P, scale_log2, -LSE));
                    }
            }
            if (cut(at)) {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    // Of the block's keys the row sees `seen` from `from` on.
#if INTERVAL
                    const uint2 keys = seen_smem[at.slot().stage * BLOCK_Q + place + 8 * r];
                    const unsigned from = keys.x - j0, seen = keys.y;
#else
                    const unsigned from = 0, seen = max(0, min(p.Nk, CAUSAL ? at.tile * BLOCK_Q + place + 8 * r + offset + 1 : p.Nk) - j0);
#endif
#pragma unroll
                    for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
                        for (int c = 0; c < 2; ++c)
                            if (8 * n + first_key + c - from >= seen) S_rmem[4 * n + 2 * r + c] = 0;  // unsigned: columns before the first are hidden too
                }
            }
            store(P_of(at.n), [&](int n, int r) { return ptx::cvt_pair<element>(S_rmem[4 * n + 2 * r], S_rmem[4 * n + 2 * r + 1]); });
        };
        // dS = P∘(dP − Delta)
        auto make_dS = [&](const Visited& at) {
            const float* Delta_smem = rows_smem + at.slot().stage * 2 * BLOCK_Q + BLOCK_Q + place;
            const float Delta[2] = {Delta_smem[0], Delta_smem[8]};
            store(dS_smem, [&](int n, int r) {
                const int i = 4 * n + 2 * r;
                return ptx::cvt_pair<element>(S_rmem[i] * (dP_rmem[i] - Delta[r]), S_rmem[i + 1] * (dP_rmem[i + 1] - Delta[r]));
            });
            ptx::fence_proxy_async();  // this thread's part of P and dS
        };

        // Issues dVᵀ += dOᵀ P or dKᵀ += Qᵀ dS for one panel: the summation index runs over the rows of dO and Q
        auto add = [&](float(&C)[BLOCK_K / 2], uint32_t panel, uint32_t B) {
            const uint64_t a = ptx::descriptor(uniform(panel)), b = ptx::descriptor(uniform(B), Tile_P::PANEL_BYTES);
            ptx::wgmma_fence();
#pragma unroll
            for (int k = 0; k < BLOCK_Q / 16; ++k)
                ptx::wgmma_ss_transposed<element, BLOCK_K>(C, ptx::advance(a, k * 16 * ROW_BYTES), ptx::advance(b, k * 16 * ROW_BYTES), 1);
            ptx::wgmma_commit_group();
        };
        auto add_dK = [&](int n) { add(dK_rmem, Q_of(n) + consumer * Tile_Q::PANEL_BYTES, dS_smem); };
        // If V has two panels, the third group also computes the second one and discards it, because no branch may come between products in flight.
        auto add_dV = [&](int n) { add(dV_rmem, dO_of(n) + min(consumer, Tile_dO::PANELS - 1) * Tile_dO::PANEL_BYTES, P_of(n)); };
        // Issues the group's panel of dQ = dS K
        auto start_dQ = [&] {
            const uint64_t a = ptx::descriptor(uniform(dS_smem)), b = ptx::descriptor(uniform(K_smem + consumer * Tile_K::PANEL_BYTES));
            ptx::wgmma_fence();
#pragma unroll
            for (int k = 0; k < BLOCK_K / 16; ++k)
                ptx::wgmma_ss_transposed_b<element, 64>(dQ_rmem, ptx::advance(a, k / 4 * Tile_P::PANEL_BYTES + k % 4 * 32),
                                                        ptx::advance(b, k * 16 * ROW_BYTES), k > 0);
            ptx::wgmma_commit_group();
        };
        // Adds its first or second 32 columns to the tile's rows, from `row` on.
        auto add_half = [&](int64_t row, int half) { add_dQ<32>(Workspace(p), row, consumer * 64 + 32 * half, dQ_rmem + 16 * half); };

        ptx::mbarrier_wait(KV_full, 0);
#if INTERVAL
        ToldVisit<> next(told_smem, barriers.Q_full);
#else
        VisitOf<LEAVES_OUT> next(p, maps, k_tile, b_kv_h);
#endif
        if (next.more()) {
            // The first tile has no predecessor whose products could run under its exponentials.
            start_scores(next);
            start_dP(next);
            ptx::wgmma_wait_group<1>();
            make_P(next);
            ptx::wgmma_wait_group<0>();
            make_dS(next);
            meet();
            int64_t row = first_row_of(next);
#if INTERVAL
            int turn = next.turn(p, maps, k_tile);
#else
            const int& turn = k_tile;
#endif
            int n = 0;
            for (next.advance(p); next.more(); next.advance(p), ++n) {
                start_dQ();
                add_dK(n);
                ptx::wgmma_wait_group<1>();  // dQ is there
                take_turn(p, Workspace(p), row, turn);
                add_half(row, 0);
                if (INTERVAL) add_half(row, 1);  // there are not enough registers for the better order:
                start_scores(next);
                if (!INTERVAL) add_half(row, 1);
                end_turn(p, Workspace(p), row, turn);
                start_dP(next);
                add_dV(n);
                ptx::wgmma_wait_group<3>();  // dK is there: done with Q and dS
                ptx::mbarrier_arrive(barrier(barriers.Q_empty, n % STAGES));
                ptx::wgmma_wait_group<2>();  // S is there
                make_P(next);
                ptx::wgmma_wait_group<1>();  // dP is there
                ptx::mbarrier_wait(barrier(barriers.Q_empty, n % STAGES), n / STAGES & 1);  // all groups are done with dS
                make_dS(next);
                ptx::wgmma_wait_group<0>();  // dV is there: done with dO and P
                ptx::mbarrier_arrive(barrier(barriers.dO_empty, n % STAGES));
                meet();  // P and dS are whole
                row = first_row_of(next);
#if INTERVAL
                turn = next.turn(p, maps, k_tile);
#endif
            }
            start_dQ();
            add_dK(n);
            add_dV(n);
            ptx::wgmma_wait_group<2>();
            take_turn(p, Workspace(p), row, turn);
            add_half(row, 0);
            add_half(row, 1);
            end_turn(p, Workspace(p), row, turn);
            ptx::wgmma_wait_group<0>();
        }

        // dK and dV are stored by way of the buffers of K and V, and transposed on the way, so that global stores are 16 bytes wide.
        meet();  // all groups are done with K and V
        auto transpose = [&](auto kind, uint32_t tile, const float(&C)[BLOCK_K / 2], float scale) {
            using Tile = decltype(kind);
            // Of four matrices of 8 keys × 8 columns, two follow each other along the columns, two along the keys.
            const uint32_t lane_row = tile + Tile::offset(lane % 8 + lane / 16 * 8, consumer * 8 + warp * 2 + lane / 8 % 2);
#pragma unroll
            for (int n = 0; n < BLOCK_K / 8; n += 2) {
                uint32_t pairs[4];
#pragma unroll
                for (int m = 0; m < 4; ++m) {
                    const int i = 4 * (n + m / 2) + m % 2 * 2;
                    pairs[m] = ptx::cvt_pair<element>(C[i] * scale, C[i + 1] * scale);
                }
                ptx::stmatrix_x4_trans(lane_row + n * 8 * ROW_BYTES, pairs);
            }
        };
        transpose(Tile_K(), K_smem, dK_rmem, p.scale);
        if (consumer < Tile_V::PANELS) transpose(Tile_V(), V_smem, dV_rmem, 1.0f);
        meet();  // both are whole
        const int its = LEAVES_OUT ? unit_at<LEAVES_OUT>(p, maps, k_tiles, blockIdx.x).b_kv_h : b_kv_h;  // read anew, to save a register meanwhile
        const int b = its / p.Hkv, kv_h = its % p.Hkv;
        constexpr int OF_16_ROWS = BLOCK_K / 16;  // warps; as many store dV
        static_assert(2 * OF_16_ROWS == CONSUMERS * GROUP / 32, "each warp stores 16 rows");
        const int index = consumer * 4 + warp, rows = index % OF_16_ROWS * 16;
        if (index < OF_16_ROWS) store_16_rows<Tile_K>(head_of(p.dk, b, kv_h), smem, p.dk.stride_n, rows, lane, j0, p.Nk, p.D);
        else store_16_rows<Tile_V, InOrder, V_HEAD_DIM>(head_of(p.dv, b, kv_h), smem + Tile_K::BYTES, p.dv.stride_n, rows, lane, j0, p.Nk, p.Dv);
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

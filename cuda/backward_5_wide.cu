// Backward for heads of 320 to 512 columns: three kernels, one for each gradient.  sm_90a.
//
// The idea: dK and dV of 64 keys, in float32, would fill all registers of a multiprocessor. So each gradient has its own kernel:
//
//     dV += Pᵀ dO   as in forward_5_wide.cu: a block has 128 keys and half of dV's columns, and Q comes by panels through a ring
//     dK += dSᵀ Q   a block has 64 keys and all columns: one group computes Sᵀ = K Qᵀ and from it Pᵀ, the other dPᵀ = V dOᵀ and from both dSᵀ;
//                   then each adds to half of dK's columns. dSᵀ is stored
//     dQ += dS K    a matrix product of what was stored: a block has 128 rows and half of dQ's columns
//
// These are 6 products instead of 5, S being computed twice. All of dS would take Nq · Nk elements. So keys are taken in pieces, as many as give every
// multiprocessor work: dK and dS of a piece, then its part of dQ (stored_dS.cuh). No two blocks add to the same element, so all gradients repeat bit for bit.
//
// In the kernel of dK the groups exchange Pᵀ and dSᵀ through one buffer in shared memory: the thread that reads an element of Pᵀ overwrites it with dSᵀ.
// While the next tile of Q is being loaded, the products for dPᵀ run; their dO is loaded through a ring.
//
// Serves everything in the interface for float16 and bfloat16, head sizes up to 512 that are multiples of 8, positive scale.
//
// One file because a backward is one file with one launcher, and this one has three kernels.
#include <algorithm>

#include "stored_dS.cuh"

constexpr int HALF = HEAD_DIM / 2, PART = V_HEAD_DIM / 2;  // columns of dQ and dK in a group; of dV in a block
constexpr int OF_HALF = (HALF + 63) / 64;                  // panels
static_assert(HEAD_DIM % 64 == 0 && V_HEAD_DIM % 64 == 0 && HALF <= 256 && PART <= 256, "whole panels, and a product's columns");

// ---- dV

namespace of_v {

constexpr int BLOCK_K = 128;                         // 64 for each group
constexpr int BLOCK_Q = HEAD_DIM <= 384 ? 128 : 64;  // dV, Sᵀ and Pᵀ share a thread's registers: 96 + 64 + 32, or 128 + 32 + 16
using Tile_K = SwizzledTile<BLOCK_K, HEAD_DIM>;
using Tile_dO = SwizzledTile<BLOCK_Q, PART>;
using Tile_dV = SwizzledTile<BLOCK_K, PART>;  // in K's place
using Panel_Q = SwizzledTile<BLOCK_Q, 64>;
constexpr int Q_PANELS = HEAD_DIM / 64;
constexpr int LSE_BYTES = BLOCK_Q * 4, MASK_BYTES = MASK ? BLOCK_K * static_cast<int>(sizeof(BitRow)) : 0, ROWS_BYTES = LSE_BYTES + MASK_BYTES;
constexpr int OTHER_BYTES = Tile_K::BYTES + Tile_dO::BYTES + 2 * ROWS_BYTES;
constexpr int RING = std::min(Q_PANELS, (SMEM_LIMIT - OTHER_BYTES) / Panel_Q::BYTES);  // panels of Q in shared memory
constexpr int SMEM_BYTES = OTHER_BYTES + RING * Panel_Q::BYTES;
static_assert(RING >= 3 && Tile_dV::BYTES <= Tile_K::BYTES, "choose smaller tiles");

struct Maps {
    CUtensorMap q, k, d_o[2], mask;  // of dO one for each part of its columns
};

// "full": the bytes have arrived, with those of a tile's first panel of Q its LSE and mask ("rows"). "empty": the computing threads are done with them.
struct Barriers {
    uint64_t K_full, Q_full[RING], Q_empty[RING], dO_full, dO_empty, rows_empty[2];
};

__global__ void __launch_bounds__(THREADS, 1) dV_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Maps maps, int parts) {
    __shared__ __align__(8) Barriers barriers;
    const uint32_t K_smem = ptx::smem_address(smem);           // [BLOCK_K, HEAD_DIM]
    const uint32_t Q_smem = K_smem + Tile_K::BYTES;            // RING × [BLOCK_Q, 64]
    const uint32_t dO_smem = Q_smem + RING * Panel_Q::BYTES;   // [BLOCK_Q, PART]
    uint8_t* rows_smem = smem + SMEM_BYTES - 2 * ROWS_BYTES;   // 2 × (mask [BLOCK_K] BitRow, LSE [BLOCK_Q])
    auto barrier = [](uint64_t& of) { return ptx::smem_address(&of); };

    // One block computes dV of BLOCK_K keys, a part of its columns. Causal: blocks of the first keys start first, because the most rows see them.
    const int part = blockIdx.x % parts, k_tiles = (p.Nk + BLOCK_K - 1) / BLOCK_K;
    const int j0 = blockIdx.x / parts % k_tiles * BLOCK_K, b_kv_h = blockIdx.x / parts / k_tiles, b = b_kv_h / p.Hkv, kv_h = b_kv_h % p.Hkv;

    if (threadIdx.x == 0) {
        ptx::mbarrier_init(barrier(barriers.K_full), 1);
        ptx::mbarrier_init(barrier(barriers.dO_full), 1);
        ptx::mbarrier_init(barrier(barriers.dO_empty), GROUP * CONSUMERS);
        for (int stage = 0; stage < 2; ++stage) ptx::mbarrier_init(barrier(barriers.rows_empty[stage]), GROUP * CONSUMERS);
        for (int stage = 0; stage < RING; ++stage) {
            ptx::mbarrier_init(barrier(barriers.Q_full[stage]), 1);
            ptx::mbarrier_init(barrier(barriers.Q_empty[stage]), GROUP * CONSUMERS);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();

    const int group = uniform(threadIdx.x / GROUP);
    if (group == 0) {
        // ---- the producer: one thread loads every tile
        ptx::setmaxnreg_dec<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) {
            const Workspace workspace(p);
            const uint32_t K_full = barrier(barriers.K_full);
            ptx::mbarrier_arrive_expect_tx(K_full, Tile_K::BYTES);
            load_boxes<Tile_K, RowOrder>(K_smem, maps.k, j0, kv_h, b, K_full);
            Place<RING> place;
            // The load of the previous tile's dO is issued midway through this tile's Q: it is needed later, and its stage is in use for longer.
            auto load_dO = [&](int i0, int h, int n) {
                const uint32_t full = barrier(barriers.dO_full);
                ptx::mbarrier_wait(barrier(barriers.dO_empty), n & 1 ^ 1);  // returns immediately in the first round
                ptx::mbarrier_arrive_expect_tx(full, Tile_dO::BYTES);
                load_boxes<Tile_dO>(dO_smem, maps.d_o[part], i0, h, b, full);
            };
            int i0 = 0, h = 0, n = 0;  // of the previous tile, and the number of tiles so far
            for (QueryVisit<BLOCK_Q> at(p, j0, kv_h); at.more(); at.advance()) {
#pragma unroll 1
                for (int panel = 0; panel < Q_PANELS; ++panel, place.advance()) {
                    const uint32_t full = barrier(barriers.Q_full[place.stage]);
                    ptx::mbarrier_wait(barrier(barriers.Q_empty[place.stage]), place.parity ^ 1);
                    ptx::mbarrier_arrive_expect_tx(full, Panel_Q::BYTES + (panel == 0 ? ROWS_BYTES : 0));
                    load_panel<Panel_Q, InOrder>(Q_smem + place.stage * Panel_Q::BYTES, maps.q, panel * 64, at.i0, at.h, b, full);
                    if (panel == 0) {
                        const uint32_t rows = ptx::smem_address(rows_smem + n % 2 * ROWS_BYTES);
                        ptx::mbarrier_wait(barrier(barriers.rows_empty[n % 2]), n / 2 & 1 ^ 1);
                        ptx::cp_async_bulk(rows + MASK_BYTES, workspace.LSE + (static_cast<int64_t>(b) * p.H + at.h) * workspace.rows + at.i0, LSE_BYTES, full);
                        if (MASK) ptx::cp_async_bulk_tensor_4d(rows, &maps.mask, one_row(p) ? 0 : at.i0 / BIT_COLUMNS * 4, j0, at.h, b, full);
                    }
                    if (panel == Q_PANELS / 2 - 1 && n > 0) load_dO(i0, h, n - 1);
                }
                i0 = at.i0, h = at.h, ++n;
            }
            if (n > 0) load_dO(i0, h, n - 1);
        }
    } else {
        // ---- the consumers: 64 keys each
        ptx::setmaxnreg_inc<CONSUMER_REGISTERS>();
        const int consumer = group - 1, warp = threadIdx.x % GROUP / 32, lane = threadIdx.x % 32;
        const Lane mine(consumer * 64);
        Place<RING> place;  // of the next panel of Q

        float dV_rmem[PART / 2] = {};
        float S_rmem[BLOCK_Q / 2];
        uint32_t P_rmem[BLOCK_Q / 16][4];
        [[maybe_unused]] KeepBits<BLOCK_Q> keep;
        auto release = [&](uint64_t& empty) { ptx::mbarrier_arrive(barrier(empty)); };
        // Issues Sᵀ = K Qᵀ. The last panel's stage is not released yet.
        auto multiply_KQ = [&](const uint8_t* rows, int i0, bool cut) {
            const uint64_t K_rows = ptx::descriptor(uniform(K_smem + consumer * 64 * ROW_BYTES));
#pragma unroll
            for (int panel = 0; panel < Q_PANELS; ++panel) {
                const int before = place.before();
                ptx::mbarrier_wait(barrier(barriers.Q_full[place.stage]), place.parity);
#if MASK
                if (panel == 0) start_from_mask<BLOCK_Q>(S_rmem, p, rows, mine, i0, j0, cut);
#endif
                const uint64_t Q_panel = ptx::descriptor(uniform(Q_smem + place.stage * Panel_Q::BYTES));
                ptx::wgmma_fence();
#pragma unroll
                for (int d = 0; d < 4; ++d)
                    ptx::wgmma_ss<element, BLOCK_Q>(S_rmem, ptx::advance(K_rows, panel * Tile_K::PANEL_BYTES + d * 32), ptx::advance(Q_panel, d * 32),
                                                    MASK || panel > 0 || d > 0);
                ptx::wgmma_commit_group();
                if (panel > 0) {
                    ptx::wgmma_wait_group<1>();  // the panel before has been read
                    release(barriers.Q_empty[before]);
                }
                place.advance();
            }
        };
        // Issues dV += Pᵀ dO of tile number n
        auto multiply_PdO = [&](int n) {
            ptx::mbarrier_wait(barrier(barriers.dO_full), n & 1);
            const uint32_t dO_tile = uniform(dO_smem);
            ptx::wgmma_fence();
#pragma unroll
            for (int k = 0; k < BLOCK_Q / 16; ++k)
                ptx::wgmma_rs<element, PART>(dV_rmem, P_rmem[k], ptx::descriptor(dO_tile + k * 16 * ROW_BYTES, Tile_dO::PANEL_BYTES));
            ptx::wgmma_commit_group();
            ptx::mbarrier_arrive(barrier(barriers.rows_empty[n % 2]));  // not before the product has used the values: an arrival does not wait for loads
        };

        // Sᵀ is complete: Pᵀ overwrites it.
        auto exponentials = [&](int n, int i0, bool cut) {
            release(barriers.Q_empty[place.before()]);
            const float* LSE_smem = reinterpret_cast<const float*>(rows_smem + n % 2 * ROWS_BYTES + MASK_BYTES);
#pragma unroll
            for (int i = 0; i < BLOCK_Q / 8; ++i) make_P(S_rmem, p, LSE_smem, mine, i, i0, j0, cut);
        };
        auto draw = [&](int h, int i0) {
            if (!DROPOUT) return;
            const int thread = ptx::tid_x() - GROUP;  // re-read here, so that values derived from it occupy no registers before
            keep.draw_keys(p, b, h, j0 + RowOrder::row(thread / 32 * 16 + thread % 32 / 4), i0, thread % 32);
        };
        // The accumulators of Sᵀ, in pairs, are the A operand of dV += Pᵀ dO as they lie.
        auto round_P = [&] {
#pragma unroll
            for (int k = 0; k < BLOCK_Q / 16; ++k)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    P_rmem[k][e] = ptx::cvt_pair<element>(S_rmem[8 * k + 2 * e], S_rmem[8 * k + 2 * e + 1]);
                    if (DROPOUT) P_rmem[k][e] &= keep.pair(e % 2, 2 * k + e / 2);
                }
        };

        ptx::mbarrier_wait(barrier(barriers.K_full), 0);
        QueryVisit<BLOCK_Q> at(p, j0, kv_h);
        if (at.more()) {
            // The first tile has no predecessor whose product could run under its exponentials.
            bool cut = is_cut(p, at.i0, j0, BLOCK_K);
            multiply_KQ(rows_smem, at.i0, cut);
            draw(at.h, at.i0);
            ptx::wgmma_wait_group<0>();
            exponentials(0, at.i0, cut);
            round_P();
            for (at.advance(); at.more(); at.advance()) {
                cut = is_cut(p, at.i0, j0, BLOCK_K);
                multiply_KQ(rows_smem + at.n % 2 * ROWS_BYTES, at.i0, cut);
                multiply_PdO(at.n - 1);
                draw(at.h, at.i0);
                ptx::wgmma_wait_group<1>();  // Sᵀ is there
                exponentials(at.n, at.i0, cut);
                ptx::wgmma_wait_group<0>();  // the tile before has been added
                release(barriers.dO_empty);
                round_P();
            }
            multiply_PdO(at.n - 1);
            ptx::wgmma_wait_group<0>();
        }

        // dV goes through K's buffer, so that global stores are 16 bytes wide.
        meet();  // both groups are done with K
        const float scale = DROPOUT ? p.keep_scale : 1.0f;
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int c = 0; c < PART / 8; ++c)
                ptx::st_shared(K_smem + Tile_dV::offset(mine.place + 8 * r, c) + 4 * mine.t,
                               ptx::cvt_pair<element>(dV_rmem[4 * c + 2 * r] * scale, dV_rmem[4 * c + 2 * r + 1] * scale));
        __syncwarp();  // the warp's rows are written, by lanes other than those that read them next
        store_16_rows<Tile_dV, RowOrder, PART>(head_of(p.dv, b, kv_h) + part * PART, smem, p.dv.stride_n, consumer * 64 + warp * 16, lane, j0, p.Nk,
                                               min(PART, p.Dv - part * PART));
    }
}

}  // namespace of_v

// ---- dK

namespace of_k {

// Tiles of Q and K have the head's columns in two halves, each filled up to whole panels: a group finds its half at the start of a panel.
constexpr int PANELS = 2 * OF_HALF;
using Tile = SwizzledTile<BLOCK, 64 * PANELS>;   // of K or Q
using Tile_V = SwizzledTile<BLOCK, V_HEAD_DIM>;
constexpr int V_PANELS = V_HEAD_DIM / 64;
constexpr int LSE_BYTES = BLOCK * 4, MASK_BYTES = MASK ? BLOCK * static_cast<int>(sizeof(BitRow)) : 0, ROWS_BYTES = MASK_BYTES + 2 * LSE_BYTES;
constexpr int OTHER_BYTES = 2 * Tile::BYTES + Tile_V::BYTES + Tile_S::BYTES + ROWS_BYTES;
constexpr int RING = std::min(V_PANELS, (SMEM_LIMIT - OTHER_BYTES) / Panel::BYTES);  // panels of dO in shared memory
constexpr int SMEM_BYTES = OTHER_BYTES + RING * Panel::BYTES;
static_assert(RING >= 3, "choose smaller tiles");

struct Maps {
    CUtensorMap q, k, v, d_o, mask, dS;
};

// "Q": a tile, with its LSE, Delta and mask, panel by panel. "dO": a panel. "full": the bytes have arrived. "empty": the computing threads are done with them.
struct Barriers {
    uint64_t KV_full, Q_full[PANELS], Q_empty, dO_full[RING], dO_empty[RING];
};

constexpr int PLACE_IS_FREE = P_IS_THERE + 1;  // a named barrier: Pᵀ may be written

// First column of a panel of Q or K, and how many products of 16 columns it has.
__device__ constexpr int column_of(int panel) { return panel / OF_HALF * HALF + panel % OF_HALF * 64; }
__device__ constexpr int steps_of(int panel) { return HALF - panel % OF_HALF * 64 < 64 ? (HALF - panel % OF_HALF * 64) / 16 : 4; }

__global__ void __launch_bounds__(THREADS, 1) dK_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Maps maps, Piece piece) {
    __shared__ __align__(8) Barriers barriers;
    const uint32_t K_smem = ptx::smem_address(smem);            // [BLOCK, HEAD_DIM]
    const uint32_t V_smem = K_smem + Tile::BYTES;               // [BLOCK, V_HEAD_DIM]
    const uint32_t Q_smem = V_smem + Tile_V::BYTES;             // [BLOCK, HEAD_DIM]
    const uint32_t dO_smem = Q_smem + Tile::BYTES;              // RING × [BLOCK, 64]
    const uint32_t dS_smem = dO_smem + RING * Panel::BYTES;     // Pᵀ, then dSᵀ: [BLOCK keys, BLOCK queries]
    uint8_t* rows_smem = smem + SMEM_BYTES - ROWS_BYTES;        // mask [BLOCK] BitRow, LSE [BLOCK], Delta [BLOCK]
    auto barrier = [](uint64_t& of) { return ptx::smem_address(&of); };

    // One block computes dK of BLOCK keys. Causal: blocks of the first keys start first, because the most rows see them.
    const int head = blockIdx.x / piece.keys, j_tile = piece.first_key + blockIdx.x % piece.keys, j0 = j_tile * BLOCK;
    const int b_kv_h = piece.first_head + head, b = b_kv_h / p.Hkv, kv_h = b_kv_h % p.Hkv;

    if (threadIdx.x == 0) {
        ptx::mbarrier_init(barrier(barriers.KV_full), 1);
        ptx::mbarrier_init(barrier(barriers.Q_empty), GROUP * CONSUMERS);
        for (int panel = 0; panel < PANELS; ++panel) ptx::mbarrier_init(barrier(barriers.Q_full[panel]), 1);
        for (int stage = 0; stage < RING; ++stage) {
            ptx::mbarrier_init(barrier(barriers.dO_full[stage]), 1);
            ptx::mbarrier_init(barrier(barriers.dO_empty[stage]), GROUP);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();

    const int group = uniform(threadIdx.x / GROUP);
    if (group == 0) {
        // ---- the producers: one thread loads K, V and the tiles of Q, another the panels of dO
        ptx::setmaxnreg_dec<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) {
            const Workspace workspace(p);
            const uint32_t KV_full = barrier(barriers.KV_full);
            ptx::mbarrier_arrive_expect_tx(KV_full, Tile::BYTES + Tile_V::BYTES);
            load_boxes<Tile, RowOrder, HALF>(K_smem, maps.k, j0, kv_h, b, KV_full);
            load_boxes<Tile_V, RowOrder>(V_smem, maps.v, j0, kv_h, b, KV_full);
            for (QueryVisit<BLOCK> at(p, j0, kv_h); at.more(); at.advance()) {
                ptx::mbarrier_wait(barrier(barriers.Q_empty), at.n & 1 ^ 1);  // returns immediately in the first round
#pragma unroll 1
                for (int panel = 0; panel < PANELS; ++panel) {
                    const uint32_t full = barrier(barriers.Q_full[panel]);
                    ptx::mbarrier_arrive_expect_tx(full, Panel::BYTES + (panel == 0 ? ROWS_BYTES : 0));
                    load_panel<Panel, InOrder>(Q_smem + panel * Panel::BYTES, maps.q, column_of(panel), at.i0, at.h, b, full);
                    if (panel == 0) {
                        const uint32_t rows = ptx::smem_address(rows_smem);
                        const int64_t row = (static_cast<int64_t>(b) * p.H + at.h) * workspace.rows + at.i0;
                        ptx::cp_async_bulk(rows + MASK_BYTES, workspace.LSE + row, LSE_BYTES, full);
                        ptx::cp_async_bulk(rows + MASK_BYTES + LSE_BYTES, workspace.Delta + row, LSE_BYTES, full);
                        if (MASK) ptx::cp_async_bulk_tensor_4d(rows, &maps.mask, one_row(p) ? 0 : at.i0 / BIT_COLUMNS * 4, j0, at.h, b, full);
                    }
                }
            }
        } else if (threadIdx.x == 32) {
            Place<RING> place;
            for (QueryVisit<BLOCK> at(p, j0, kv_h); at.more(); at.advance()) {
#pragma unroll 1
                for (int panel = 0; panel < V_PANELS; ++panel, place.advance()) {
                    const uint32_t full = barrier(barriers.dO_full[place.stage]);
                    ptx::mbarrier_wait(barrier(barriers.dO_empty[place.stage]), place.parity ^ 1);
                    ptx::mbarrier_arrive_expect_tx(full, Panel::BYTES);
                    load_panel<Panel, InOrder>(dO_smem + place.stage * Panel::BYTES, maps.d_o, panel * 64, at.i0, at.h, b, full);
                }
            }
        }
    } else {
        // ---- the consumers
        ptx::setmaxnreg_inc<CONSUMER_REGISTERS>();
        const int consumer = group - 1, warp = threadIdx.x % GROUP / 32, lane = threadIdx.x % 32;
        const Lane mine(0);
        const float* LSE_smem = reinterpret_cast<const float*>(rows_smem + MASK_BYTES);
        const float* Delta_smem = LSE_smem + BLOCK;

        float dK_rmem[HALF / 2] = {};  // [BLOCK, HALF]: the group's half
        auto release = [&](uint64_t& empty) { ptx::mbarrier_arrive(barrier(empty)); };
        // Issues dK += dSᵀ Q for the group's half of the columns: the summation index runs over the rows of Q
        auto multiply_dSQ = [&] {
            const uint64_t dS_rows = ptx::descriptor(uniform(dS_smem));
            const uint64_t Q_columns = ptx::descriptor(uniform(Q_smem + consumer * OF_HALF * Panel::BYTES), Panel::BYTES);
            ptx::wgmma_fence();
#pragma unroll
            for (int k = 0; k < BLOCK / 16; ++k)
                ptx::wgmma_ss_transposed_b<element, HALF>(dK_rmem, ptx::advance(dS_rows, k * 32), ptx::advance(Q_columns, k * 16 * ROW_BYTES), 1);
            ptx::wgmma_commit_group();
        };

        ptx::mbarrier_wait(barrier(barriers.KV_full), 0);
        if (consumer == 0) {
            // ---- Sᵀ = K Qᵀ, and Pᵀ
            float S_rmem[BLOCK / 2];
            for (QueryVisit<BLOCK> at(p, j0, kv_h); at.more(); at.advance()) {
                const bool cut = is_cut(p, at.i0, j0, BLOCK);
                const uint64_t K_rows = ptx::descriptor(uniform(K_smem)), Q_rows = ptx::descriptor(uniform(Q_smem));
#pragma unroll
                for (int panel = 0; panel < PANELS; ++panel) {
                    ptx::mbarrier_wait(barrier(barriers.Q_full[panel]), at.n & 1);
#if MASK
                    if (panel == 0) start_from_mask<BLOCK>(S_rmem, p, rows_smem, mine, at.i0, j0, cut);
#endif
                    ptx::wgmma_fence();
#pragma unroll
                    for (int d = 0; d < steps_of(panel); ++d) {
                        const int column = panel * Panel::BYTES + d * 32;
                        ptx::wgmma_ss<element, BLOCK>(S_rmem, ptx::advance(K_rows, column), ptx::advance(Q_rows, column), MASK || panel > 0 || d > 0);
                    }
                }
                ptx::wgmma_commit_group();
                ptx::wgmma_wait_group<0>();
#pragma unroll
                for (int i = 0; i < BLOCK / 8; ++i) make_P(S_rmem, p, LSE_smem, mine, i, at.i0, j0, cut);
                if (at.n > 0) ptx::bar_sync(PLACE_IS_FREE, CONSUMERS * GROUP);  // the last dSᵀ has been read, and stored
                write_P(dS_smem, S_rmem, mine);
                ptx::bar_arrive(P_IS_THERE, CONSUMERS * GROUP);
                meet();  // dSᵀ is there
                multiply_dSQ();
                ptx::wgmma_wait_group<0>();
                release(barriers.Q_empty);
            }
        } else {
            // ---- dPᵀ = V dOᵀ, and dSᵀ
            float dP_rmem[BLOCK / 2];
            [[maybe_unused]] KeepBits<BLOCK> keep;
            Place<RING> place;  // of the next panel
            const bool stores = threadIdx.x % GROUP == 0;
            for (QueryVisit<BLOCK> at(p, j0, kv_h); at.more(); at.advance()) {
                const uint64_t V_rows = ptx::descriptor(uniform(V_smem));
#pragma unroll
                for (int panel = 0; panel < V_PANELS; ++panel) {
                    const int before = place.before();
                    ptx::mbarrier_wait(barrier(barriers.dO_full[place.stage]), place.parity);
                    const uint64_t dO_rows = ptx::descriptor(uniform(dO_smem + place.stage * Panel::BYTES));
                    ptx::wgmma_fence();
#pragma unroll
                    for (int d = 0; d < 4; ++d)
                        ptx::wgmma_ss<element, BLOCK>(dP_rmem, ptx::advance(V_rows, panel * Panel::BYTES + d * 32), ptx::advance(dO_rows, d * 32),
                                                      panel > 0 || d > 0);
                    ptx::wgmma_commit_group();
                    if (panel > 0) {
                        ptx::wgmma_wait_group<1>();  // the panel before has been read
                        release(barriers.dO_empty[before]);
                    } else if (at.n > 0) {
                        ptx::wgmma_wait_group<1>();  // the last tile has been added: done with it, and with its dSᵀ
                        release(barriers.Q_empty);
                        if (stores) ptx::cp_async_bulk_wait_group_read<0>();
                        ptx::bar_arrive(PLACE_IS_FREE, CONSUMERS * GROUP);
                    }
                    place.advance();
                }
                if (DROPOUT) keep.draw_keys(p, b, at.h, j0 + mine.first_row, at.i0, lane);
                ptx::wgmma_wait_group<0>();  // dPᵀ is there
                release(barriers.dO_empty[place.before()]);
                // The tile, with Delta, has arrived for this group, too.
#pragma unroll
                for (int panel = 0; panel < PANELS; ++panel) ptx::mbarrier_wait(barrier(barriers.Q_full[panel]), at.n & 1);
                ptx::bar_sync(P_IS_THERE, CONSUMERS * GROUP);
                write_dS(dS_smem, smem + (dS_smem - K_smem), dP_rmem, Delta_smem, mine,
                         [&](float dP, int r, int i, int c) { return DROPOUT ? keep.kept(dP, r, i, c) : dP; });
                ptx::fence_proxy_async();  // this thread's part of dSᵀ
                meet();
                multiply_dSQ();
                if (stores) {
                    const int64_t tile = piece.tile(p, Tiles(p), head, at.h - kv_h * (p.H / p.Hkv), at.i0 / BLOCK, j_tile);
#pragma unroll 1
                    for (int row = 0; row < BLOCK; row += BOX_ROWS<Tile_S, RowOrder>)  // in memory keys are in order
                        ptx::cp_async_bulk_tensor_4d_store(&maps.dS, 0, static_cast<int>(tile) * BLOCK + RowOrder::row(row), 0, 0, dS_smem + row * ROW_BYTES);
                    ptx::cp_async_bulk_commit_group();
                }
            }
            ptx::wgmma_wait_group<0>();
            if (stores) ptx::cp_async_bulk_wait_group_read<0>();  // the block must not end while the copy engine reads its shared memory
        }

        // dK is stored by way of K's shared memory, so that global stores are 16 bytes wide. The last product that read it finished before the groups met.
        const float scale = DROPOUT ? p.scale * p.keep_scale : p.scale;
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int c = 0; c < HALF / 8; ++c)
                ptx::st_shared(K_smem + Tile::offset(mine.place + 8 * r, consumer * OF_HALF * 8 + c) + 4 * mine.t,
                               ptx::cvt_pair<element>(dK_rmem[4 * c + 2 * r] * scale, dK_rmem[4 * c + 2 * r + 1] * scale));
        __syncwarp();  // the warp's part is written, by lanes other than those that read it next
        store_16_rows<Tile, RowOrder, HALF>(head_of(p.dk, b, kv_h), smem, p.dk.stride_n, warp * 16, lane, j0, p.Nk, p.D, consumer * HALF,
                                            consumer * (OF_HALF * 8 - HALF / 8));
    }
}

}  // namespace of_k

// ---- launching

extern "C" int64_t workspace_floats(const AttentionParams* params) { return floats_with_dS(*params); }

static cudaError_t launch_dV(const AttentionParams& p, int64_t blocks, int parts) {
    using namespace of_v;
    cudaError_t error = cudaFuncSetAttribute(dV_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SMEM_BYTES);
    Maps maps = {};
    if (error == cudaSuccess) error = make_tensor_map(&maps.k, p.k, p.B, p.Hkv, p.Nk, p.D, BOX_ROWS<Tile_K, RowOrder>);
    if (error == cudaSuccess && p.Nq > 0) error = make_tensor_map(&maps.q, p.q, p.B, p.H, p.Nq, p.D, BLOCK_Q);
    for (int part = 0; part < parts; ++part) {
        const Tensor4 columns = {static_cast<element*>(p.d_o.data) + part * PART, p.d_o.stride_b, p.d_o.stride_h, p.d_o.stride_n};
        // Columns of dO beyond its part count as outside the tensor, so zeros are loaded.
        if (error == cudaSuccess && p.Nq > 0) error = make_tensor_map(&maps.d_o[part], columns, p.B, p.H, p.Nq, std::min(PART, p.Dv - part * PART), BLOCK_Q);
    }
    if (error == cudaSuccess && p.Nq > 0 && MASK) error = make_mask_map(&maps.mask, p, BLOCK_K);
    if (error != cudaSuccess) return error;
    launch_kernel(dV_kernel, static_cast<unsigned>(blocks), THREADS, SMEM_BYTES, p.stream, p, maps, parts);
    return cudaGetLastError();
}

static cudaError_t launch_dK_and_dQ(const AttentionParams& p) {
    using namespace of_k;
    cudaError_t error = cudaFuncSetAttribute(dK_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SMEM_BYTES);
    Maps maps = {};
    if (error == cudaSuccess && p.Nk > 0) error = make_tensor_map(&maps.k, p.k, p.B, p.Hkv, p.Nk, p.D, BOX_ROWS<Tile, RowOrder>);
    if (error == cudaSuccess && p.Nk > 0) error = make_tensor_map(&maps.v, p.v, p.B, p.Hkv, p.Nk, p.Dv, BOX_ROWS<Tile, RowOrder>);
    if (error == cudaSuccess && p.Nq > 0) error = make_tensor_map(&maps.q, p.q, p.B, p.H, p.Nq, p.D, BLOCK);
    if (error == cudaSuccess && p.Nq > 0) error = make_tensor_map(&maps.d_o, p.d_o, p.B, p.H, p.Nq, p.Dv, BLOCK);
    if (error == cudaSuccess && p.Nq > 0 && p.Nk > 0 && MASK) error = make_mask_map(&maps.mask, p, BLOCK);
    if (error == cudaSuccess) error = make_dS_map(&maps.dS, p, BOX_ROWS<Tile_S, RowOrder>);
    if (error != cudaSuccess) return error;
    return launch_pieces(p, [&](const Piece& piece, unsigned blocks) { launch_kernel(dK_kernel, blocks, THREADS, SMEM_BYTES, p.stream, p, maps, piece); });
}

extern "C" int attention(const AttentionParams* params) {
    const AttentionParams& p = *params;
    const int parts = static_cast<int>(tiles_of(p.Dv, PART));
    const int64_t all_rows = Workspace::all_rows(p), dV_blocks = tiles_of(p.Nk, of_v::BLOCK_K) * p.Hkv * p.B * parts;
    if (!numbers_fit(p, {all_rows / PREPARE_ROWS, dV_blocks}) || !pieces_fit(p)) return cudaErrorInvalidConfiguration;
    DeviceGuard guard(p.device);
    if (all_rows > 0) launch_kernel(prepare_kernel, static_cast<unsigned>(all_rows / PREPARE_ROWS), 32 * PREPARE_ROWS, 0, p.stream, p);
    cudaError_t error = cudaGetLastError();
    if (error == cudaSuccess && dV_blocks > 0) error = launch_dV(p, dV_blocks, parts);
    if (error == cudaSuccess) error = launch_dK_and_dQ(p);
    return error;
}

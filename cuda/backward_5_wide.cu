// Backward for heads of 320 to 512 columns: three kernels, one for each gradient.  sm_90a.
//
// The idea: dK and dV of 64 keys, in float32, would fill all registers of a multiprocessor. So each gradient has its own kernel, which recomputes
// S = Q Kᵀ and dP = dO Vᵀ where it needs them: 8 products instead of 5. No two blocks add to the same element, so nothing is accumulated in global
// memory, and all gradients repeat bit for bit.
//
//     dV += Pᵀ dO   as in forward_5_wide.cu: a block has 128 keys and half of dV's columns, and Q comes by panels through a ring
//     dK += dSᵀ Q   a block has 64 keys and all columns: one group computes Sᵀ = K Qᵀ and from it Pᵀ, the other dPᵀ = V dOᵀ and from both dSᵀ;
//                   then each adds to half of dK's columns
//     dQ += dS K    the same, with 64 rows of Q in the block and a loop over keys
//
// The groups exchange Pᵀ and dSᵀ through one buffer in shared memory: the thread that reads an element of Pᵀ overwrites it with dSᵀ. While the next tile of
// Q is being loaded, the products for dPᵀ run; their dO is loaded through a ring.
//
// Serves everything in the interface for float16 and bfloat16, head sizes up to 512 that are multiples of 8, positive scale.
//
// One file because a backward is one file with one launcher, and this one has three kernels.
#include <algorithm>

#include "backward_split.cuh"

constexpr int HALF = HEAD_DIM / 2, PART = V_HEAD_DIM / 2;  // columns of dQ and dK in a group; of dV in a block
constexpr int OF_HALF = (HALF + 63) / 64;                  // panels
static_assert(HEAD_DIM % 64 == 0 && V_HEAD_DIM % 64 == 0 && HALF <= 256 && PART <= 256, "whole panels, and a product's columns");

// A stage of a ring of N, and the parity of the barrier phase in which it is filled.
template <int N>
struct Place {
    int stage = 0, parity = 0;
    __device__ void advance() {
        if (++stage == N) stage = 0, parity ^= 1;
    }
    __device__ int before() const { return stage == 0 ? N - 1 : stage - 1; }
};

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

// "full": the bytes have arrived, with those of a tile's first panel of Q its LSE and mask ("rows"). "empty": the computing warps are done with them.
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
        ptx::mbarrier_init(barrier(barriers.dO_empty), 4 * CONSUMERS);
        for (int stage = 0; stage < 2; ++stage) ptx::mbarrier_init(barrier(barriers.rows_empty[stage]), GROUP * CONSUMERS);
        for (int stage = 0; stage < RING; ++stage) {
            ptx::mbarrier_init(barrier(barriers.Q_full[stage]), 1);
            ptx::mbarrier_init(barrier(barriers.Q_empty[stage]), 4 * CONSUMERS);
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
        auto release = [&](uint64_t& empty) {
            if (lane == 0) ptx::mbarrier_arrive(barrier(empty));
        };
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
                // lane == 0, computed through a shuffle: an arrival does not wait for loads, and up to here the last loads, of LSE, are used in registers only.
                if (lane == uniform(lane)) ptx::mbarrier_arrive(barrier(barriers.dO_empty));
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

// ---- dK and dQ

namespace of_qk {

constexpr int BLOCK = 64;  // keys and queries of a tile
// Tiles of Q and K have the head's columns in two halves, each filled up to whole panels: a group finds its half at the start of a panel.
constexpr int PANELS = 2 * OF_HALF;
using Tile = SwizzledTile<BLOCK, 64 * PANELS>;       // of K or Q
using Tile_V = SwizzledTile<BLOCK, V_HEAD_DIM>;      // of V or dO
using Tile_S = SwizzledTile<BLOCK, BLOCK>;           // transposed: rows are keys
using Panel = SwizzledTile<BLOCK, 64>;
constexpr int V_PANELS = V_HEAD_DIM / 64;
constexpr int LSE_BYTES = BLOCK * 4, MASK_BYTES = MASK ? BLOCK * static_cast<int>(sizeof(BitRow)) : 0, ROWS_BYTES = MASK_BYTES + 2 * LSE_BYTES;
constexpr int OTHER_BYTES = 2 * Tile::BYTES + Tile_V::BYTES + Tile_S::BYTES + ROWS_BYTES;
constexpr int RING = std::min(V_PANELS, (SMEM_LIMIT - OTHER_BYTES) / Panel::BYTES);  // panels of dO or V in shared memory
constexpr int SMEM_BYTES = OTHER_BYTES + RING * Panel::BYTES;
static_assert(RING >= 3, "choose smaller tiles");

struct Maps {
    CUtensorMap q, k, v, d_o, mask;
};

// "own": the block's own tiles. "tile": one of Q, with its LSE, Delta and mask, or of K, panel by panel. "panel": one of dO, or of V. "full": the bytes
// have arrived. "empty": the computing warps are done with them.
struct Barriers {
    uint64_t own_full, tile_full[PANELS], tile_empty, panel_full[RING], panel_empty[RING];
};

// Named barriers between the groups: Pᵀ is written; its buffer is free.
constexpr int P_IS_THERE = 2, PLACE_IS_FREE = 3;

// First column of a panel of Q or K, and how many products of 16 columns it has.
__device__ constexpr int column_of(int panel) { return panel / OF_HALF * HALF + panel % OF_HALF * 64; }
__device__ constexpr int steps_of(int panel) { return HALF - panel % OF_HALF * 64 < 64 ? (HALF - panel % OF_HALF * 64) / 16 : 4; }

// The tiles of keys that some of a block's rows see. Same words as QueryVisit.
struct KeyVisit {
    int j0 = 0, n = 0, end;
    __device__ KeyVisit(const AttentionParams& p, int i0) { end = CAUSAL ? max(0, min(p.Nk, min(i0 + BLOCK, p.Nq) + p.Nk - p.Nq)) : p.Nk; }
    __device__ bool more() const { return j0 < end; }
    __device__ void advance() { j0 += BLOCK, ++n; }
};

// The order in which either kind of block visits tiles.
template <bool OF_KEYS>
struct Visit {
    std::conditional_t<OF_KEYS, QueryVisit<BLOCK>, KeyVisit> at;
    int own, own_h;  // the block's first row, and its head: of keys, or of queries

    __device__ Visit(const AttentionParams& p, int own, int own_h) : at(p, own, own_h), own(own), own_h(own_h) {}
    __device__ Visit(const AttentionParams& p, int own) : at(p, own), own(own), own_h(0) {}
    __device__ int i0() const {
        if constexpr (OF_KEYS) return at.i0;
        else return own;
    }
    __device__ int j0() const {
        if constexpr (OF_KEYS) return own;
        else return at.j0;
    }
};

template <bool OF_KEYS>
__global__ void __launch_bounds__(THREADS, 1) gradient_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Maps maps) {
    using OwnOrder = std::conditional_t<OF_KEYS, RowOrder, InOrder>;    // dropout permutes the keys
    using OtherOrder = std::conditional_t<OF_KEYS, InOrder, RowOrder>;
    __shared__ __align__(8) Barriers barriers;
    const uint32_t own_smem = ptx::smem_address(smem);            // K, or Q: [BLOCK, HEAD_DIM]
    const uint32_t own_V_smem = own_smem + Tile::BYTES;           // V, or dO: [BLOCK, V_HEAD_DIM]
    const uint32_t tile_smem = own_V_smem + Tile_V::BYTES;        // Q, or K: [BLOCK, HEAD_DIM]
    const uint32_t panel_smem = tile_smem + Tile::BYTES;          // dO, or V: RING × [BLOCK, 64]
    const uint32_t dS_smem = panel_smem + RING * Panel::BYTES;    // Pᵀ, then dSᵀ: [BLOCK keys, BLOCK queries]
    uint8_t* rows_smem = smem + SMEM_BYTES - ROWS_BYTES;          // mask [BLOCK] BitRow, LSE [BLOCK], Delta [BLOCK]
    auto barrier = [](uint64_t& of) { return ptx::smem_address(&of); };

    // One block computes a gradient of BLOCK rows. Causal: the rows that see, or are seen by, the most start first.
    const int tiles = ((OF_KEYS ? p.Nk : p.Nq) + BLOCK - 1) / BLOCK, heads = OF_KEYS ? p.Hkv : p.H;
    const int tile_of_head = blockIdx.x % tiles, own = (CAUSAL && !OF_KEYS ? tiles - 1 - tile_of_head : tile_of_head) * BLOCK;
    const int b = blockIdx.x / tiles / heads, own_h = blockIdx.x / tiles % heads;
    auto visits = [&] {
        if constexpr (OF_KEYS) return Visit<true>(p, own, own_h);
        else return Visit<false>(p, own);
    };
    // The query head of a visit.
    auto query_head = [&](const Visit<OF_KEYS>& visit) {
        if constexpr (OF_KEYS) return visit.at.h;
        else return own_h;
    };

    if (threadIdx.x == 0) {
        ptx::mbarrier_init(barrier(barriers.own_full), 1);
        ptx::mbarrier_init(barrier(barriers.tile_empty), 4 * CONSUMERS);
        for (int panel = 0; panel < PANELS; ++panel) ptx::mbarrier_init(barrier(barriers.tile_full[panel]), 1);
        for (int stage = 0; stage < RING; ++stage) {
            ptx::mbarrier_init(barrier(barriers.panel_full[stage]), 1);
            ptx::mbarrier_init(barrier(barriers.panel_empty[stage]), 4);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();

    const int group = uniform(threadIdx.x / GROUP);
    if (group == 0) {
        // ---- the producers: one thread loads the block's own tiles and those of Q or K, another the panels of dO or V
        ptx::setmaxnreg_dec<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) {
            const Workspace workspace(p);
            const uint32_t full = barrier(barriers.own_full);
            ptx::mbarrier_arrive_expect_tx(full, Tile::BYTES + Tile_V::BYTES);
            load_boxes<Tile, OwnOrder, HALF>(own_smem, OF_KEYS ? maps.k : maps.q, own, own_h, b, full);
            load_boxes<Tile_V, OwnOrder>(own_V_smem, OF_KEYS ? maps.v : maps.d_o, own, own_h, b, full);
            for (auto visit = visits(); visit.at.more(); visit.at.advance()) {
                const int h = query_head(visit);
                ptx::mbarrier_wait(barrier(barriers.tile_empty), visit.at.n & 1 ^ 1);  // returns immediately in the first round
#pragma unroll 1
                for (int panel = 0; panel < PANELS; ++panel) {
                    const uint32_t full = barrier(barriers.tile_full[panel]);
                    ptx::mbarrier_arrive_expect_tx(full, Panel::BYTES + (panel == 0 ? ROWS_BYTES : 0));
                    load_panel<Panel, OtherOrder>(tile_smem + panel * Panel::BYTES, OF_KEYS ? maps.q : maps.k, column_of(panel),
                                                  OF_KEYS ? visit.i0() : visit.j0(), OF_KEYS ? h : kv_head(p, h), b, full);
                    if (panel == 0) {
                        const uint32_t rows = ptx::smem_address(rows_smem);
                        const int64_t row = (static_cast<int64_t>(b) * p.H + h) * workspace.rows + visit.i0();
                        ptx::cp_async_bulk(rows + MASK_BYTES, workspace.LSE + row, LSE_BYTES, full);
                        ptx::cp_async_bulk(rows + MASK_BYTES + LSE_BYTES, workspace.Delta + row, LSE_BYTES, full);
                        if (MASK) ptx::cp_async_bulk_tensor_4d(rows, &maps.mask, one_row(p) ? 0 : visit.i0() / BIT_COLUMNS * 4, visit.j0(), h, b, full);
                    }
                }
            }
        } else if (threadIdx.x == 32) {
            Place<RING> place;
            for (auto visit = visits(); visit.at.more(); visit.at.advance()) {
                const int h = query_head(visit);
#pragma unroll 1
                for (int panel = 0; panel < V_PANELS; ++panel, place.advance()) {
                    const uint32_t full = barrier(barriers.panel_full[place.stage]);
                    ptx::mbarrier_wait(barrier(barriers.panel_empty[place.stage]), place.parity ^ 1);
                    ptx::mbarrier_arrive_expect_tx(full, Panel::BYTES);
                    load_panel<Panel, OtherOrder>(panel_smem + place.stage * Panel::BYTES, OF_KEYS ? maps.d_o : maps.v, panel * 64,
                                                  OF_KEYS ? visit.i0() : visit.j0(), OF_KEYS ? h : kv_head(p, h), b, full);
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

        float sum_rmem[HALF / 2] = {};  // [BLOCK, HALF]: the group's half of dK or dQ
        auto release = [&](uint64_t& empty) {
            if (lane == 0) ptx::mbarrier_arrive(barrier(empty));
        };
        // Where this thread's pair of Pᵀ or dSᵀ lies: key `place` or, for r = 1, the one 8 further on; queries 8n + 2t and the next.
        auto pair_at = [&](int r, int n) { return Tile_S::offset(mine.place + 8 * r, n) + 4 * mine.t; };
        // Issues dK += dSᵀ Q or dQ += dS K for the group's half of the columns: the summation index runs over the rows of Q or K
        auto multiply_dS = [&] {
            const uint64_t a = ptx::descriptor(uniform(dS_smem));
            const uint64_t b = ptx::descriptor(uniform(tile_smem + consumer * OF_HALF * Panel::BYTES), Panel::BYTES);
            ptx::wgmma_fence();
#pragma unroll
            for (int k = 0; k < BLOCK / 16; ++k) {
                const uint64_t b_k = ptx::advance(b, k * 16 * ROW_BYTES);
                if constexpr (OF_KEYS) ptx::wgmma_ss_transposed_b<element, HALF>(sum_rmem, ptx::advance(a, k * 32), b_k, 1);
                else ptx::wgmma_ss_transposed<element, HALF>(sum_rmem, ptx::advance(a, k * 16 * ROW_BYTES), b_k, 1);
            }
            ptx::wgmma_commit_group();
        };

        ptx::mbarrier_wait(barrier(barriers.own_full), 0);
        if (consumer == 0) {
            // ---- Sᵀ = K Qᵀ, and Pᵀ
            float S_rmem[BLOCK / 2];
            for (auto visit = visits(); visit.at.more(); visit.at.advance()) {
                const int n = visit.at.n;
                const bool cut = is_cut(p, visit.i0(), visit.j0(), BLOCK);
                const uint64_t own_rows = ptx::descriptor(uniform(own_smem)), tile = ptx::descriptor(uniform(tile_smem));
#pragma unroll
                for (int panel = 0; panel < PANELS; ++panel) {
                    ptx::mbarrier_wait(barrier(barriers.tile_full[panel]), n & 1);
#if MASK
                    if (panel == 0) start_from_mask<BLOCK>(S_rmem, p, rows_smem, mine, visit.i0(), visit.j0(), cut);
#endif
                    ptx::wgmma_fence();
#pragma unroll
                    for (int d = 0; d < steps_of(panel); ++d) {
                        const uint64_t mine_d = ptx::advance(own_rows, panel * Panel::BYTES + d * 32), other_d = ptx::advance(tile, panel * Panel::BYTES + d * 32);
                        ptx::wgmma_ss<element, BLOCK>(S_rmem, OF_KEYS ? mine_d : other_d, OF_KEYS ? other_d : mine_d, MASK || panel > 0 || d > 0);
                    }
                }
                ptx::wgmma_commit_group();
                ptx::wgmma_wait_group<0>();
#pragma unroll
                for (int i = 0; i < BLOCK / 8; ++i) make_P(S_rmem, p, LSE_smem, mine, i, visit.i0(), visit.j0(), cut);
                if (n > 0) ptx::bar_sync(PLACE_IS_FREE, CONSUMERS * GROUP);  // the other group has read the last dSᵀ; this one has, too
#pragma unroll
                for (int i = 0; i < BLOCK / 8; ++i)
#pragma unroll
                    for (int r = 0; r < 2; ++r) ptx::st_shared(dS_smem + pair_at(r, i), ptx::cvt_pair<element>(S_rmem[4 * i + 2 * r], S_rmem[4 * i + 2 * r + 1]));
                ptx::bar_arrive(P_IS_THERE, CONSUMERS * GROUP);
                meet();  // dSᵀ is there
                multiply_dS();
                ptx::wgmma_wait_group<0>();
                release(barriers.tile_empty);
            }
        } else {
            // ---- dPᵀ = V dOᵀ, and dSᵀ
            float dP_rmem[BLOCK / 2];
            [[maybe_unused]] KeepBits<BLOCK> keep;
            Place<RING> place;  // of the next panel
            for (auto visit = visits(); visit.at.more(); visit.at.advance()) {
                const int n = visit.at.n;
                const uint64_t own_rows = ptx::descriptor(uniform(own_V_smem));
#pragma unroll
                for (int panel = 0; panel < V_PANELS; ++panel) {
                    const int before = place.before();
                    ptx::mbarrier_wait(barrier(barriers.panel_full[place.stage]), place.parity);
                    const uint64_t other = ptx::descriptor(uniform(panel_smem + place.stage * Panel::BYTES));
                    ptx::wgmma_fence();
#pragma unroll
                    for (int d = 0; d < 4; ++d) {
                        const uint64_t mine_d = ptx::advance(own_rows, panel * Panel::BYTES + d * 32), other_d = ptx::advance(other, d * 32);
                        ptx::wgmma_ss<element, BLOCK>(dP_rmem, OF_KEYS ? mine_d : other_d, OF_KEYS ? other_d : mine_d, panel > 0 || d > 0);
                    }
                    ptx::wgmma_commit_group();
                    if (panel > 0) {
                        ptx::wgmma_wait_group<1>();  // the panel before has been read
                        release(barriers.panel_empty[before]);
                    } else if (n > 0) {
                        ptx::wgmma_wait_group<1>();  // the last tile has been added: done with it, and with its dSᵀ
                        release(barriers.tile_empty);
                        ptx::bar_arrive(PLACE_IS_FREE, CONSUMERS * GROUP);
                    }
                    place.advance();
                }
                if (DROPOUT) keep.draw_keys(p, b, query_head(visit), visit.j0() + mine.first_row, visit.i0(), lane);
                ptx::wgmma_wait_group<0>();  // dPᵀ is there
                release(barriers.panel_empty[place.before()]);
                // The tile, with Delta, has arrived for this group, too.
#pragma unroll
                for (int panel = 0; panel < PANELS; ++panel) ptx::mbarrier_wait(barrier(barriers.tile_full[panel]), n & 1);
                ptx::bar_sync(P_IS_THERE, CONSUMERS * GROUP);
                // dS = P∘(dP − Delta). With dropout, dS = P∘(keep_scale · kept dP − Delta); the factor keep_scale is applied at the end.
#pragma unroll
                for (int i = 0; i < BLOCK / 8; ++i) {
                    const float2 Delta = *reinterpret_cast<const float2*>(Delta_smem + 8 * i + 2 * mine.t);
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        const uint32_t P = *reinterpret_cast<const uint32_t*>(smem + (dS_smem - own_smem) + pair_at(r, i));
                        const element* P_pair = reinterpret_cast<const element*>(&P);
                        float dP0 = dP_rmem[4 * i + 2 * r], dP1 = dP_rmem[4 * i + 2 * r + 1];
                        if (DROPOUT) dP0 = keep.kept(dP0, r, i, 0), dP1 = keep.kept(dP1, r, i, 1);
                        ptx::st_shared(dS_smem + pair_at(r, i), ptx::cvt_pair<element>(static_cast<float>(P_pair[0]) * (dP0 - Delta.x),
                                                                                       static_cast<float>(P_pair[1]) * (dP1 - Delta.y)));
                    }
                }
                ptx::fence_proxy_async();  // this thread's part of dSᵀ
                meet();
                multiply_dS();
            }
            ptx::wgmma_wait_group<0>();
        }

        // The gradient is stored by way of the shared memory of the block's own K or Q, so that global stores are 16 bytes wide. The last product that
        // read that memory finished before the groups met.
        const float scale = DROPOUT ? p.scale * p.keep_scale : p.scale;
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int c = 0; c < HALF / 8; ++c)
                ptx::st_shared(own_smem + Tile::offset(mine.place + 8 * r, consumer * OF_HALF * 8 + c) + 4 * mine.t,
                               ptx::cvt_pair<element>(sum_rmem[4 * c + 2 * r] * scale, sum_rmem[4 * c + 2 * r + 1] * scale));
        __syncwarp();  // the warp's part is written, by lanes other than those that read it next
        const Tensor4& to = OF_KEYS ? p.dk : p.dq;
        store_16_rows<Tile, OwnOrder, HALF>(head_of(to, b, own_h), smem, to.stride_n, warp * 16, lane, own, OF_KEYS ? p.Nk : p.Nq, p.D, consumer * HALF,
                                            consumer * (OF_HALF * 8 - HALF / 8));
    }
}

}  // namespace of_qk

// ---- launching

extern "C" int64_t workspace_floats(const AttentionParams* params) { return 2 * Workspace::all_rows(*params); }

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

template <bool OF_KEYS>
static cudaError_t launch_gradient(const AttentionParams& p, int64_t blocks) {
    using namespace of_qk;
    if (blocks == 0) return cudaSuccess;
    cudaError_t error = cudaFuncSetAttribute(gradient_kernel<OF_KEYS>, cudaFuncAttributeMaxDynamicSharedMemorySize, SMEM_BYTES);
    Maps maps = {};
    if (error == cudaSuccess && p.Nk > 0) error = make_tensor_map(&maps.k, p.k, p.B, p.Hkv, p.Nk, p.D, BOX_ROWS<Tile, RowOrder>);
    if (error == cudaSuccess && p.Nk > 0) error = make_tensor_map(&maps.v, p.v, p.B, p.Hkv, p.Nk, p.Dv, BOX_ROWS<Tile, RowOrder>);
    if (error == cudaSuccess && p.Nq > 0) error = make_tensor_map(&maps.q, p.q, p.B, p.H, p.Nq, p.D, BLOCK);
    if (error == cudaSuccess && p.Nq > 0) error = make_tensor_map(&maps.d_o, p.d_o, p.B, p.H, p.Nq, p.Dv, BLOCK);
    if (error == cudaSuccess && p.Nq > 0 && p.Nk > 0 && MASK) error = make_mask_map(&maps.mask, p, BLOCK);
    if (error != cudaSuccess) return error;
    launch_kernel(gradient_kernel<OF_KEYS>, static_cast<unsigned>(blocks), THREADS, SMEM_BYTES, p.stream, p, maps);
    return cudaGetLastError();
}

extern "C" int attention(const AttentionParams* params) {
    const AttentionParams& p = *params;
    const int parts = static_cast<int>(tiles_of(p.Dv, PART));
    const int64_t all_rows = Workspace::all_rows(p), of_v_blocks = tiles_of(p.Nk, of_v::BLOCK_K) * p.Hkv * p.B * parts;
    const int64_t of_k_blocks = tiles_of(p.Nk, of_qk::BLOCK) * p.Hkv * p.B, of_q_blocks = tiles_of(p.Nq, of_qk::BLOCK) * p.H * p.B;
    if (!numbers_fit(p, {all_rows / PREPARE_ROWS, of_v_blocks, of_k_blocks, of_q_blocks})) return cudaErrorInvalidConfiguration;
    DeviceGuard guard(p.device);
    if (all_rows > 0) launch_kernel(prepare_kernel, static_cast<unsigned>(all_rows / PREPARE_ROWS), 32 * PREPARE_ROWS, 0, p.stream, p);
    cudaError_t error = cudaGetLastError();
    if (error == cudaSuccess && of_v_blocks > 0) error = launch_dV(p, of_v_blocks, parts);
    if (error == cudaSuccess) error = launch_gradient<true>(p, of_k_blocks);
    if (error == cudaSuccess) error = launch_gradient<false>(p, of_q_blocks);
    return error;
}

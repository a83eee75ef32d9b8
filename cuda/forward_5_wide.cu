// Forward for heads of 320 to 512 columns: FlashAttention-3 (Shah et al., 2024, arXiv:2407.08608) with V in two halves.  sm_90a.
//
// The idea: O of 128 rows × 512 columns in float32 would fill all registers of a multiprocessor. So a block computes all of S, but only half of the
// columns of O, from half of the columns of V; another block computes the same S again for the other half. That costs 3 products instead of 2, but keeps
// the tile at 128 rows. The alternative, 64 rows with all of O, computes nothing twice but reads K and V twice as often: 1 byte for every 64
// operations, or 15 TB/s at the tensor cores' full speed, where the L2 cache delivers 6. A block here reads 1 byte for every 128 operations.
//
// Change from forward_4_hopper.cu: a tile of Q and one of K take 192 KB of the 227. So K is loaded in panels of 64 columns, through a ring of stages in
// shared memory: a stage is released as soon as the product that reads it has finished, in the middle of the sum over the head. Both groups work on the
// same panel, so they do not take turns; the softmax of both overlaps O += P V of the previous tile. A second producer loads V: V's single buffer becomes
// free at the end of a tile, and a thread that waited for it could not issue K's loads meanwhile (445 → 481 TFLOP/s at D 512).
//
// Serves everything in the interface for float16 and bfloat16, head sizes up to 512 that are multiples of 8, positive scale.
//
// One file because its kernel is one schedule: consumers wait for what the producers copy.
#include <algorithm>

#include "keep_bits.cuh"
#include "lazy_softmax.cuh"
#include "mask_start.cuh"
#include "ptx_hopper.cuh"
#include "swizzle.cuh"
#include "tensor_core.cuh"
#include "tensor_map.cuh"

#if DTYPE == FLOAT32 || (MASK && MASK != MASK_OF_BITS)
#error "this rung computes in 16-bit types, under masks of bits"
#endif

// ---- tile sizes. A warpgroup owns 64 rows of Q.
constexpr int GROUP = 128;  // threads
constexpr int CONSUMERS = 2;
constexpr int THREADS = GROUP * (1 + CONSUMERS);
constexpr int BLOCK_Q = 64 * CONSUMERS;
// O, S and P share a thread's 232 registers: 96 + 64 + 32, or 128 + 32 + 16; dropout needs a few more.
constexpr int BLOCK_K = HEAD_DIM <= (DROPOUT ? 320 : 384) ? 128 : 64;
constexpr int PART = V_HEAD_DIM / 2;                 // columns of V and O that a block computes
static_assert(HEAD_DIM % 64 == 0 && PART % 32 == 0 && PART <= 256, "whole panels of K, and a product's columns of V");

using Tile_Q = SwizzledTile<BLOCK_Q, HEAD_DIM>;
using Tile_V = SwizzledTile<BLOCK_K, PART>;
using Tile_O = SwizzledTile<BLOCK_Q, 64>;
constexpr int O_ROWS = std::min(16, BOX_ROWS<Tile_O, RowOrder>);  // of a box of O: a warp's at most
constexpr int K_PANELS = HEAD_DIM / 64;                           // of a tile of K
constexpr int PANEL_BYTES = BLOCK_K * ROW_BYTES;                  // of one of them
constexpr int MASK_BYTES = MASK ? BLOCK_Q * static_cast<int>(sizeof(BitRow)) : 0;
constexpr int OTHER_BYTES = Tile_Q::BYTES + Tile_V::BYTES + Tile_O::BYTES + MASK_BYTES;
constexpr int RING = std::min(K_PANELS, (SMEM_KB * 1024 - 1024 - OTHER_BYTES) / PANEL_BYTES);  // panels of K in shared memory
constexpr int SMEM_BYTES = OTHER_BYTES + RING * PANEL_BYTES;
static_assert(RING >= 3, "choose smaller tiles");

struct Maps {
    CUtensorMap q, k, v[2], o[2], mask;  // V and O have one for each part, so that columns beyond the part are out of bounds
};

// "full": the bytes have arrived (those of the mask count with a tile's first panel of K). "empty": the consumers have finished reading them.
struct Barriers {
    uint64_t Q_full, Q_empty, K_full[RING], K_empty[RING], V_full, V_empty, mask_empty;
};

// A stage of the ring, and the parity of the barrier phase in which it is filled.
struct Place {
    int stage = 0, parity = 0;
    __device__ void advance() {
        if (++stage == RING) stage = 0, parity ^= 1;
    }
};

// ---- the schedule. Blocks are persistent: each takes one work item after another.

// A work item: a tile of Q and a part of O's columns, against the tiles of keys that it sees. These are visited from the last to the first: only the last
// need masking.
struct Work {
    int i0, h, b, part;  // first row, query head, batch, 0 or 1
    int k_tiles;

    // First key of the n-th tile.
    __device__ int j0(int n) const { return (k_tiles - 1 - n) * BLOCK_K; }
};

// The LSE of row i of the work item's head, in global memory.
__device__ inline float& LSE_of(const AttentionParams& p, const Work& work, int i) {
    return p.lse[(static_cast<int64_t>(work.b) * p.H + work.h) * p.Nq + i];
}

// The number of tiles of keys that some row of the tile sees, counted from the first. Tiles beyond are never visited.
__device__ inline int tiles_seen(const AttentionParams& p, int i0) {
    const int columns = i0 >= p.Nq ? 0 : CAUSAL ? max(0, min(p.Nk, min(i0 + BLOCK_Q, p.Nq) + p.Nk - p.Nq)) : p.Nk;
    return (columns + BLOCK_K - 1) / BLOCK_K;
}

// Which block computes which work items, as in forward_4_hopper.cu: units are numbered head by head; a unit is a tile of Q or, if causal, a long tile paired
// with a short one. The parts of a unit have consecutive numbers, because they read the same Q and K.
struct Schedule {
    int units, parts;      // all units times parts; parts that V has
    int q_tiles, of_head;  // of one head: tiles, units
    int mask_bytes;        // that come with a tile of K

    // The block's m-th work item. False if it has fewer.
    __device__ bool get_work(const AttentionParams& p, int m, Work& work) const {
        const int blocks = gridDim.x, n = (CAUSAL ? m / 2 : m) * blocks + blockIdx.x;
        if (n >= units) return false;
        const int unit = n / parts, bh = unit / of_head, first = bh * of_head;
        // Rotated by one each round, so that a block does not get the same tile of every head.
        const int place = (unit + first * parts / blocks) % of_head;
        const bool from_end = CAUSAL && m % 2 == 0;
        // With an odd number of tiles, the middle one is paired with itself: the second time there is nothing to do.
        const bool again = CAUSAL && m % 2 && 2 * place + 1 == q_tiles;
        const int i0 = again ? p.Nq : (from_end ? q_tiles - 1 - place : place) * BLOCK_Q;
        work = {i0, bh % p.H, bh / p.H, n % parts, tiles_seen(p, i0)};
        return true;
    }
};

__global__ void __launch_bounds__(THREADS, 1)
    forward_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Maps maps, const __grid_constant__ Schedule schedule) {
    extern __shared__ __align__(1024) uint8_t smem[];
    __shared__ __align__(8) Barriers barriers;
    __shared__ Work shared_work;                              // the work item that Q belongs to; one without keys ends the loop
    const uint32_t Q_smem = ptx::smem_address(smem);          // [BLOCK_Q, HEAD_DIM]
    const uint32_t K_smem = Q_smem + Tile_Q::BYTES;           // RING × [BLOCK_K, 64]
    const uint32_t V_smem = K_smem + RING * PANEL_BYTES;      // [BLOCK_K, PART]
    const uint32_t O_smem = V_smem + Tile_V::BYTES;           // [BLOCK_Q, 64]
    uint8_t* mask_smem = smem + SMEM_BYTES - MASK_BYTES;      // [BLOCK_Q] BitRow
    auto barrier = [](uint64_t& of) { return ptx::smem_address(&of); };

    if (threadIdx.x == 0) {
        ptx::mbarrier_init(barrier(barriers.Q_full), 1);
        ptx::mbarrier_init(barrier(barriers.Q_empty), GROUP * CONSUMERS);
        ptx::mbarrier_init(barrier(barriers.V_full), 1);
        ptx::mbarrier_init(barrier(barriers.V_empty), 4 * CONSUMERS);
        ptx::mbarrier_init(barrier(barriers.mask_empty), GROUP * CONSUMERS);
        for (int stage = 0; stage < RING; ++stage) {
            ptx::mbarrier_init(barrier(barriers.K_full[stage]), 1);
            ptx::mbarrier_init(barrier(barriers.K_empty[stage]), 4 * CONSUMERS);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();

    const int group = uniform(threadIdx.x / GROUP);
    if (group == 0) {
        ptx::setmaxnreg_dec<40>();  // all start with 168; the two other groups take the 128 · 128 that this group returns
        // The next work item, from the m-th on, that has keys; or one without keys, if none is left.
        auto next_with_keys = [&](int& m) {
            Work work;
            while (schedule.get_work(p, m++, work))
                if (work.k_tiles > 0) return work;
            return Work{};
        };
        if (threadIdx.x == 0) {
            // ---- a producer: this thread picks the work items and loads Q and K, in the order in which their stages become empty
            int m = 0, q = 0, n = 0;  // counters over all work items, tiles of Q, tiles of keys
            Place place;
            // The first wait for a stage's "empty" passes at once.
            auto hand_out = [&](const Work& work) {
                const uint32_t full = barrier(barriers.Q_full);
                ptx::mbarrier_wait(barrier(barriers.Q_empty), q++ & 1 ^ 1);
                shared_work = work;  // visible to threads that have waited for "full"
                if (work.k_tiles == 0) return ptx::mbarrier_arrive(full);
                ptx::mbarrier_arrive_expect_tx(full, Tile_Q::BYTES);
                load_boxes<Tile_Q, RowOrder>(Q_smem, maps.q, work.i0, work.h, work.b, full);
            };
            Work work = next_with_keys(m);
            while (work.k_tiles > 0) {
                const int kv_h = kv_head(p, work.h);
                for (int tile = 0; tile < work.k_tiles; ++tile, ++n) {
                    const int j0 = work.j0(tile);
#pragma unroll 1
                    for (int panel = 0; panel < K_PANELS; ++panel, place.advance()) {
                        const uint32_t full = barrier(barriers.K_full[place.stage]);
                        const bool with_mask = MASK && panel == 0;
                        ptx::mbarrier_wait(barrier(barriers.K_empty[place.stage]), place.parity ^ 1);
                        ptx::mbarrier_arrive_expect_tx(full, PANEL_BYTES + (with_mask ? schedule.mask_bytes : 0));
                        ptx::cp_async_bulk_tensor_4d(K_smem + place.stage * PANEL_BYTES, &maps.k, panel * 64, j0, kv_h, work.b, full);
                        if (with_mask) {
                            ptx::mbarrier_wait(barrier(barriers.mask_empty), n & 1 ^ 1);
                            ptx::cp_async_bulk_tensor_4d(ptx::smem_address(mask_smem), &maps.mask, j0 / BIT_COLUMNS * 4, work.i0, work.h, work.b, full);
                        }
                        // The ring's stages become empty without this item's Q, but only as many as the ring has.
                        if (tile == 0 && panel == (K_PANELS < RING ? K_PANELS : RING) - 1) hand_out(work);
                    }
                }
                work = next_with_keys(m);
            }
            hand_out(work);
        } else if (threadIdx.x == 64) {
            // ---- another producer: it waits for V's buffer while loads of the next tile's K continue
            int m = 0, n = 0;
            for (Work work = next_with_keys(m); work.k_tiles > 0; work = next_with_keys(m)) {
                const int kv_h = kv_head(p, work.h);
                for (int tile = 0; tile < work.k_tiles; ++tile, ++n) {
                    const uint32_t full = barrier(barriers.V_full);
                    ptx::mbarrier_wait(barrier(barriers.V_empty), n & 1 ^ 1);
                    ptx::mbarrier_arrive_expect_tx(full, Tile_V::BYTES);
                    load_boxes<Tile_V>(V_smem, maps.v[work.part], work.j0(tile), kv_h, work.b, full);
                }
            }
        } else if (threadIdx.x / 32 == 1) {
            // ---- an otherwise idle warp: writes O = 0 for work items without keys
            Work work;
            for (int m = 0; schedule.get_work(p, m, work); ++m)
                for (int i = work.i0; work.k_tiles == 0 && i < min(p.Nq, work.i0 + BLOCK_Q); ++i) {
                    element* O = head_of(p.o, work.b, work.h) + i * p.o.stride_n;
                    for (int d = work.part * PART + threadIdx.x % 32; d < min(p.Dv, (work.part + 1) * PART); d += 32) O[d] = element(0.0f);
                    if (p.lse && work.part == 0 && threadIdx.x % 32 == 0) LSE_of(p, work, i) = -CUDART_INF_F;
                }
        }
    } else {
        // ---- the consumers: 64 rows each
        ptx::setmaxnreg_inc<232>();
        const int consumer = group - 1, lane = threadIdx.x % 32, t = lane % 4;
        // This thread holds two rows of the tile, first_row and first_row + ROW_STEP.
        const int first_row = RowOrder::row((threadIdx.x - GROUP) / 32 * 16 + lane / 4);
        const int offset = p.Nk - p.Nq;             // causal: row i sees columns j ≤ i + offset
        const float scale_log2 = p.scale * LOG2_E;  // exp(scale · x) = 2^(scale_log2 · x)
        const float above = above_m(scale_log2);

        float O_rmem[PART / 2];  // not yet divided by l
        float S_rmem[BLOCK_K / 2];
        uint32_t P_rmem[BLOCK_K / 16][4];
        float m_rmem[2], l_rmem[2], alpha[2];  // l is this lane's share of the sum
        Place place;                           // of the next panel of K
        int n = 0;                             // of all tiles of keys

        // One lane of every warp arrives at an "empty" barrier once the warp's products that read the stage have finished.
        auto release = [&](uint64_t& empty) {
            if (lane == 0) ptx::mbarrier_arrive(barrier(empty));
        };
        // How many of the tile's columns, counted from its first, the row first_row + ROW_STEP·r sees.
        auto visible = [&](int i0, int j0, int r) { return (CAUSAL ? min(p.Nk, i0 + first_row + ROW_STEP * r + offset + 1) : p.Nk) - j0; };
        // Whether some row does not see the whole tile.
        auto cut = [&](int i0, int j0) { return j0 + BLOCK_K > min(p.Nk, CAUSAL ? i0 + offset + 1 : p.Nk); };

        // Issues S = Q Kᵀ. Each panel's stage is released one panel later, so that the next panel is being loaded while this one is multiplied;
        // finish_QK releases the last.
        auto multiply_QK = [&](int i0, int j0) {
            const uint64_t Q_rows = ptx::descriptor(uniform(Q_smem + consumer * 64 * ROW_BYTES));
#pragma unroll
            for (int panel = 0; panel < K_PANELS; ++panel) {
                const int before = place.stage == 0 ? RING - 1 : place.stage - 1;
                ptx::mbarrier_wait(barrier(barriers.K_full[place.stage]), place.parity);
                if (panel == 0) {
#if MASK
                    const bool diagonal = CAUSAL && cut(i0, j0);
                    const bool shared = one_row(p);
                    start_S<BLOCK_K>(S_rmem, mask_smem, j0 % BIT_COLUMNS, shared ? 0 : first_row, shared ? 0 : ROW_STEP, t,
                                     [&](int r, int w) { return diagonal ? ~first_bits(visible(i0, j0, r) - 32 * w) : 0; });
#endif
                }
                ptx::wgmma_fence();
                const uint64_t K_panel = ptx::descriptor(uniform(K_smem + place.stage * PANEL_BYTES));
#pragma unroll
                for (int d = 0; d < 4; ++d)
                    ptx::wgmma_ss<element, BLOCK_K>(S_rmem, ptx::advance(Q_rows, panel * Tile_Q::PANEL_BYTES + d * 32), ptx::advance(K_panel, d * 32),
                                                    MASK || panel > 0 || d > 0);
                ptx::wgmma_commit_group();
                if (MASK && panel == 0) ptx::mbarrier_arrive(barrier(barriers.mask_empty));  // not before the product has used the values
                if (panel > 0) {
                    ptx::wgmma_wait_group<1>();  // the panel before has been read
                    release(barriers.K_empty[before]);
                }
                place.advance();
            }
        };
        // Waits until S is complete.
        auto finish_QK = [&](bool last_of_work) {
            release(barriers.K_empty[place.stage == 0 ? RING - 1 : place.stage - 1]);
            // Every thread releases Q, because every thread has read shared_work.
            if (last_of_work) ptx::mbarrier_arrive(barrier(barriers.Q_empty));
        };
        // Issues O += P V of tile number `tile`.
        auto multiply_PV = [&](int tile) {
            ptx::mbarrier_wait(barrier(barriers.V_full), tile & 1);
            const uint32_t V_tile = uniform(V_smem);
            ptx::wgmma_fence();
#pragma unroll
            for (int k = 0; k < BLOCK_K / 16; ++k)
                ptx::wgmma_rs<element, PART>(O_rmem, P_rmem[k], ptx::descriptor(V_tile + k * 16 * ROW_BYTES, Tile_V::PANEL_BYTES));
            ptx::wgmma_commit_group();
        };
        // Without a mask, in a tile that is cut: elements that a row does not see become −∞.
        auto hide = [&](int i0, int j0) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int columns = visible(i0, j0, r) - 2 * t;  // from this lane's first
#pragma unroll
                for (int i = 0; i < BLOCK_K / 8; ++i)
#pragma unroll
                    for (int c = 0; c < 2; ++c)
                        if (8 * i + c >= columns) S_rmem[4 * i + 2 * r + c] = -CUDART_INF_F;
            }
        };
        // Replaces S by P. Calls rescale_O(whether some alpha is not 1) on the way.
        auto exponentials = [&](int i0, int j0, const auto& rescale_O) {
            if (!MASK && cut(i0, j0)) hide(i0, j0);
            softmax<true>(S_rmem, m_rmem, l_rmem, alpha, scale_log2, above, [] {}, rescale_O);
        };
        // Draws which elements of the tile dropout keeps.
        [[maybe_unused]] KeepBits<BLOCK_K> keep;
        auto draw = [&](const Work& work, int j0) {
            if (!DROPOUT) return;
            const int thread = ptx::tid_x() - GROUP;  // re-read here, so that values derived from it occupy no registers before
            const int row = RowOrder::row(thread / 32 * 16 + thread % 32 / 4);
            keep.draw_rows(p, work.b, work.h, work.i0 + row, j0, thread % 32);
        };
        // The accumulators of S, rounded to pairs, are already laid out as the A operand of O += P V.
        auto round_P = [&] {
#pragma unroll
            for (int k = 0; k < BLOCK_K / 16; ++k)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    P_rmem[k][e] = ptx::cvt_pair<element>(S_rmem[8 * k + 2 * e], S_rmem[8 * k + 2 * e + 1]);
                    if (DROPOUT) P_rmem[k][e] &= keep.pair(e % 2, 2 * k + e / 2);
                }
        };

        for (int q = 0;; ++q) {
            ptx::mbarrier_wait(barrier(barriers.Q_full), q & 1);
            const Work work = {uniform(shared_work.i0), uniform(shared_work.h), uniform(shared_work.b), uniform(shared_work.part), uniform(shared_work.k_tiles)};
            if (work.k_tiles == 0) break;

            // The first tile has no predecessor whose product could run under its softmax.
            multiply_QK(work.i0, work.j0(0));
            draw(work, work.j0(0));
            ptx::wgmma_wait_group<0>();
#pragma unroll
            for (int i = 0; i < PART / 2; ++i) O_rmem[i] = 0;
            m_rmem[0] = m_rmem[1] = p.lowest, l_rmem[0] = l_rmem[1] = 0;
            finish_QK(work.k_tiles == 1);
            exponentials(work.i0, work.j0(0), [](const auto&) {});
            round_P();
            ++n;
            for (int tile = 1; tile < work.k_tiles; ++tile, ++n) {
                multiply_QK(work.i0, work.j0(tile));
                multiply_PV(n - 1);
                draw(work, work.j0(tile));
                ptx::wgmma_wait_group<1>();  // S is there
                finish_QK(tile + 1 == work.k_tiles);
                exponentials(work.i0, work.j0(tile), [&](const auto& raised) {
                    // As in forward_4_consumer.cuh: the condition, which always holds, keeps the wait for O after the exponentials that should overlap its
                    // product.
                    if (scale_log2 > 0) {
                        ptx::wgmma_wait_group<0>();
                        if (raised()) {
#pragma unroll
                            for (int i = 0; i < PART / 2; ++i) O_rmem[i] *= alpha[i >> 1 & 1];
                        }
                    }
                    ptx::wgmma_wait_group<0>();  // O is complete
                    release(barriers.V_empty);
                });
                round_P();
            }
            multiply_PV(n - 1);
            ptx::wgmma_wait_group<0>();
            release(barriers.V_empty);

            // O /= l. Each warp writes its own rows to shared memory, from where the copy engine stores them.
            float LSE[2], factor[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float l = row_sum(l_rmem[r]);
                LSE[r] = m_rmem[r] * p.scale + ptx::lg2(l) * LN_2;
                factor[r] = factor_of_row(p, m_rmem[r], scale_log2, (DROPOUT ? p.keep_scale : 1.0f) * ptx::rcp(l));
            }
            const int warp = uniform(ptx::tid_x() / 32) - 4;  // re-read here, so that values derived from it occupy no registers before
            const uint32_t O_rows = O_smem + warp * 16 * ROW_BYTES, O_lane = O_smem + Tile_O::lane_a(warp * 16, lane);
#pragma unroll
            for (int panel = 0; panel < Tile_V::PANELS; ++panel) {
                if (lane == 0) ptx::cp_async_bulk_wait_group_read<0>();  // the previous contents have been stored
                __syncwarp();
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const float* O = O_rmem + 32 * panel + 8 * k;
                    uint32_t pairs[4] = {};  // zeros beyond the part's last column: not stored, but the engine reads them
                    if (64 * panel + 16 * k < PART)
#pragma unroll
                        for (int e = 0; e < 4; ++e) pairs[e] = ptx::cvt_pair<element>(O[2 * e] * factor[e % 2], O[2 * e + 1] * factor[e % 2]);
                    ptx::stmatrix_x4(Tile_O::step(O_lane, k), pairs);
                }
                ptx::fence_proxy_async();  // of what this lane has stored
                __syncwarp();
                if (lane == 0) {
#pragma unroll
                    for (int row = 0; row < 16; row += O_ROWS)
                        ptx::cp_async_bulk_tensor_4d_store(&maps.o[work.part], panel * 64, work.i0 + RowOrder::row(warp * 16 + row), work.h, work.b,
                                                           O_rows + row * ROW_BYTES);
                    ptx::cp_async_bulk_commit_group();
                }
            }
            // Both parts have computed the same LSE.
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int i = work.i0 + first_row + ROW_STEP * r;
                if (p.lse && work.part == 0 && t == 0 && i < p.Nq) LSE_of(p, work, i) = LSE[r];
            }
        }
        if (lane == 0) ptx::cp_async_bulk_wait_group_read<0>();  // the block must not end while the copy engine reads its shared memory
    }
}

extern "C" int64_t workspace_floats(const AttentionParams*) { return 0; }

// Columns of a (B, H, N, D) tensor from `first` on.
inline Tensor4 columns_from(const Tensor4& t, int first) { return {static_cast<element*>(t.data) + first, t.stride_b, t.stride_h, t.stride_n}; }

extern "C" int attention(const AttentionParams* params) {
    const AttentionParams& p = *params;
    if (p.B == 0 || p.Nq == 0) return cudaSuccess;
    const int parts = static_cast<int>(tiles_of(p.Dv, PART));
    const int64_t q_tiles = tiles_of(p.Nq, BLOCK_Q), of_head = CAUSAL ? (q_tiles + 1) / 2 : q_tiles, units = of_head * p.H * p.B * parts;
    if (!numbers_fit(p, {2 * units})) return cudaErrorInvalidConfiguration;  // including the number of a block's next unit
    DeviceGuard guard(p.device);
    // First, because it creates the CUDA context of a thread that has not used the device yet; making tensor maps does not.
    cudaError_t error = cudaFuncSetAttribute(forward_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SMEM_BYTES);
    Maps maps;
    if (error == cudaSuccess) error = make_tensor_map(&maps.q, p.q, p.B, p.H, p.Nq, p.D, BOX_ROWS<Tile_Q, RowOrder>);
    if (error == cudaSuccess && p.Nk > 0) error = make_tensor_map(&maps.k, p.k, p.B, p.Hkv, p.Nk, p.D, BLOCK_K);
    for (int part = 0; part < parts; ++part) {
        const int columns = std::min(PART, p.Dv - part * PART);
        if (error == cudaSuccess) error = make_tensor_map(&maps.o[part], columns_from(p.o, part * PART), p.B, p.H, p.Nq, columns, O_ROWS);
        if (error == cudaSuccess && p.Nk > 0) error = make_tensor_map(&maps.v[part], columns_from(p.v, part * PART), p.B, p.Hkv, p.Nk, columns, BLOCK_K);
    }
    if (error == cudaSuccess && p.Nk > 0 && MASK) error = make_mask_map(&maps.mask, p, BLOCK_Q);
    if (error != cudaSuccess) return error;
    const int mask_bytes = !MASK ? 0 : one_row(p) ? static_cast<int>(sizeof(BitRow)) : MASK_BYTES;
    const Schedule schedule = {static_cast<int>(units), parts, static_cast<int>(q_tiles), static_cast<int>(of_head), mask_bytes};
    const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(units, p.sm_count));
    launch_kernel(forward_kernel, blocks, THREADS, SMEM_BYTES, p.stream, p, maps, schedule);
    return cudaGetLastError();
}

// Forward in float32 on Hopper's tensor cores for heads of up to 512 columns: forward_5_float32.cu's planes (planes.cuh; Ootomo and Yokota, 2022,
// arXiv:2203.03341) for FlashAttention-3's loop (Shah et al., 2024, arXiv:2407.08608, Algorithm 1).  sm_90a.
//
// The idea: two warpgroups share 64 rows of Q. Each computes the scores of half of the keys of a tile, gives the other its part of P through shared
// memory, and then computes half of O's columns over all keys of the tile. So no product is made twice. Each group reads its
// own pieces of K and V, through its own ring.
//
// Change from forward_5_float32.cu: two groups for the same rows. Q K^T is summed separately for every 64 columns of the head and these sums are added
// in float32, as P V is for each tile: tensor cores truncate each addition, and 512 columns would be 96 of them in a row. The part of O that a tile adds
// is computed 64 columns at a time, because there are no registers for all of it.
//
// Serves float32, everything in the interface but windows and spans, positive scale; head sizes up to 512 that are multiples of 4.
#include "keep_bits.cuh"
#include "mask_start.cuh"
#include "planes.cuh"
#include "ptx_hopper.cuh"
#include "swizzle.cuh"
#include "tensor_core.cuh"
#include "tensor_map.cuh"

#if MASK && MASK != MASK_OF_BITS
#error "this rung reads masks of bits"
#endif

// Heads whose values the planes cannot represent are computed by the `simple` rung.
__device__ inline bool planes_have_served(const AttentionParams& p, int b, int h_kv) {
    const Range& range = range_before(p, b, h_kv);
    return scores_fit(p, range) && !range.o_is_small;
}
#define HEAD_IS_DONE(p, b, h) planes_have_served(p, b, h)
#define attention exact_attention
#define workspace_floats exact_workspace_floats
namespace exact {
#include "forward_1_simple.cu"
}
#undef attention
#undef workspace_floats

// ---- tile sizes
constexpr int GROUP = 128;  // threads of a warpgroup
constexpr int CONSUMERS = 2;
constexpr int THREADS = GROUP * (1 + CONSUMERS);
constexpr int BLOCK_Q = 64;
constexpr int PART_K = 64;                     // keys whose scores a group computes
constexpr int BLOCK_K = PART_K * CONSUMERS;
constexpr int COLUMNS = HEAD_DIM / CONSUMERS;  // of O, of a group

using Tile_Q = SwizzledTile<BLOCK_Q, HEAD_DIM>;
using Tile_P = SwizzledTile<BLOCK_Q, BLOCK_K>;
using Piece_K = SwizzledTile<PART_K, 64>;       // one plane of it fills a stage of a ring
using Piece_V = SwizzledTile<64 / PLANES, 64>;  // all planes do
constexpr int STAGE_BYTES = Piece_K::BYTES;
static_assert(PLANES * Piece_V::BYTES == STAGE_BYTES, "pieces of V fill a stage");
constexpr int Q_BYTES = PLANES * Tile_Q::BYTES, P_BYTES = PLANES * Tile_P::BYTES;
constexpr int MASK_BYTES = MASK ? BLOCK_Q * static_cast<int>(sizeof(BitRow)) : 0;
constexpr int STATS_BYTES = CONSUMERS * BLOCK_Q * 4;  // row values that the groups exchange
constexpr int RING = (SMEM_KB * 1024 - 1024 - Q_BYTES - P_BYTES - MASK_BYTES - STATS_BYTES) / (CONSUMERS * STAGE_BYTES) / 2 * 2;  // stages of a group's
constexpr int RING_BYTES = RING * STAGE_BYTES;
constexpr int STATS_OFFSET = Q_BYTES + P_BYTES + CONSUMERS * RING_BYTES, MASK_OFFSET = STATS_OFFSET + STATS_BYTES;
constexpr int SMEM_BYTES = MASK_OFFSET + MASK_BYTES;
static_assert(RING >= 4, "two pieces are multiplied while two others come");

// The stages of a ring, one after another.
struct Place {
    int stage = 0, parity = 0;
    __device__ void advance() {
        if (++stage == RING) stage = 0, parity ^= 1;
    }
};

constexpr int P_EXPONENT = 15;  // P, at most 1, is multiplied by 2^15, to fill float16's range. So is l, and the factor cancels in O = P V / l.

struct Maps {
    CUtensorMap q, k, v, mask;
};

// "full": the bytes have arrived. "empty": the warps that compute with them are done.
struct Barriers {
    uint64_t Q_full, full[CONSUMERS][RING], empty[CONSUMERS][RING], mask_full, mask_empty;
};

// Waits for both groups.
__device__ inline void meet() { ptx::bar_sync(1, CONSUMERS * GROUP); }

__global__ void __launch_bounds__(THREADS, 1)
    forward_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Maps maps, Range* ranges, [[maybe_unused]] First first) {
    extern __shared__ __align__(1024) uint8_t smem[];
    __shared__ __align__(8) Barriers barriers;
    const uint32_t Q_smem = ptx::smem_address(smem);                            // PLANES × [BLOCK_Q, HEAD_DIM]
    const uint32_t P_smem = Q_smem + Q_BYTES;                                   // PLANES × [BLOCK_Q, BLOCK_K]
    const uint32_t rings_smem = P_smem + P_BYTES;                               // CONSUMERS × RING × (a plane of K [PART_K, 64], or Piece_V of all planes)
    float* stats_smem = reinterpret_cast<float*>(smem + STATS_OFFSET);          // [CONSUMERS, BLOCK_Q]
    const uint8_t* mask_smem = smem + MASK_OFFSET;                              // [BLOCK_Q] BitRow
    auto barrier = [](uint64_t& of) { return ptx::smem_address(&of); };

    // One tile of Q against the tiles of keys that it sees, from the last to the first: only the last need masking. Causal: the longest rows of a
    // head start first.
    const int q_tiles = (p.Nq + BLOCK_Q - 1) / BLOCK_Q, offset = p.Nk - p.Nq;  // causal: row i sees columns j ≤ i + offset
    const int q_tile = CAUSAL ? q_tiles - 1 - blockIdx.x % q_tiles : blockIdx.x % q_tiles;
    const int bh = blockIdx.x / q_tiles, b = bh / p.H, h = bh % p.H, b_kv_h = b * p.Hkv + kv_head(p, h);
    const int i0 = q_tile * BLOCK_Q;
    const int k_tiles = (stop_of_rows(p, i0, BLOCK_Q) + BLOCK_K - 1) / BLOCK_K;  // 0 or less: the rows attend nothing
    auto j0_of = [&](int n) { return (k_tiles - 1 - n) * BLOCK_K; };
    const int panels = (p.D + 63) / 64;  // of Q and K; beyond them all is 0
    if (!scores_fit(p, ranges[b_kv_h])) return;  // the simple rung's

    if (threadIdx.x == 0) {
        ptx::mbarrier_init(barrier(barriers.Q_full), 1);
        ptx::mbarrier_init(barrier(barriers.mask_full), 1);
        ptx::mbarrier_init(barrier(barriers.mask_empty), CONSUMERS * GROUP);
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
        // ---- the producers: a thread for each ring, in two warps
        ptx::setmaxnreg_dec<40>();
        const int ring = threadIdx.x / 32;
        if (threadIdx.x % 32 == 0 && ring < CONSUMERS && k_tiles > 0) {
            if (ring == 0) {
                ptx::mbarrier_arrive_expect_tx(barrier(barriers.Q_full), Q_BYTES);
                for (int plane = 0; plane < PLANES; ++plane)
                    load_boxes<Tile_Q, RowOrder>(Q_smem + plane * Tile_Q::BYTES, maps.q, i0, bh, plane, barrier(barriers.Q_full));
            }
            Place place;
            // Loads planes [from, to).
            auto load = [&](const CUtensorMap& map, int bytes, int j, int column, int plane, int end) {
                const uint32_t full = barrier(barriers.full[ring][place.stage]);
                ptx::mbarrier_wait(barrier(barriers.empty[ring][place.stage]), place.parity ^ 1);  // returns immediately in the first round
                ptx::mbarrier_arrive_expect_tx(full, STAGE_BYTES);
                for (uint32_t to = rings_smem + ring * RING_BYTES + place.stage * STAGE_BYTES; plane < end; ++plane, to += bytes)
                    ptx::cp_async_bulk_tensor_4d(to, &map, column, j, b_kv_h, plane, full);
                place.advance();
            };
            for (int n = 0; n < k_tiles; ++n) {
                if (MASK && ring == 0) {
                    ptx::mbarrier_wait(barrier(barriers.mask_empty), (n & 1) ^ 1);
                    ptx::mbarrier_arrive_expect_tx(barrier(barriers.mask_full), one_row(p) ? static_cast<int>(sizeof(BitRow)) : MASK_BYTES);
                    ptx::cp_async_bulk_tensor_4d(ptx::smem_address(mask_smem), &maps.mask, j0_of(n) / BIT_COLUMNS * 4, i0, h, b, barrier(barriers.mask_full));
                }
                for (int panel = 0; panel < panels; ++panel)
                    for (int plane = 0; plane < PLANES; ++plane) load(maps.k, Piece_K::BYTES, j0_of(n) + ring * PART_K, panel * 64, plane, plane + 1);
                for (int column = 0; column < COLUMNS; column += 64)
                    for (int j = 0; j < BLOCK_K; j += Piece_V::ROWS) load(maps.v, Piece_V::BYTES, j0_of(n) + j, ring * COLUMNS + column, 0, PLANES);
            }
        }
    } else {
        // ---- the consumers
        ptx::setmaxnreg_inc<232>();
        const int consumer = group - 1, lane = threadIdx.x % 32, t = lane % 4;
        const int place_of_row = threadIdx.x % GROUP / 32 * 16 + lane / 4;  // in the tile of Q; this thread has it and the one 8 further,
        const int first_row = RowOrder::row(place_of_row);                  // rows first_row and first_row + ROW_STEP
        const float scale = scale_of_scores(p, ranges[b_kv_h]), scale_log2 = scale * LOG2_E;  // exp(scale · x) = 2^(scale_log2 · x)
        const float lowest = -0x1p126f / fmaxf(1, scale_log2);                                // p.lowest in the units of the planes' products

        float O_rmem[COLUMNS / 2] = {};  // [BLOCK_Q, COLUMNS], not yet divided by l
        float S_rmem[PART_K / 2], part_rmem[32];
        float m_rmem[2] = {lowest, lowest}, l_rmem[2] = {}, alpha[2];  // l is this lane's share of the group's sum

        Place place;  // of the next piece
        // Waits for the next piece and returns its address.
        auto next_piece = [&] {
            ptx::mbarrier_wait(barrier(barriers.full[consumer][place.stage]), place.parity);
            const uint32_t at = uniform(rings_smem + consumer * RING_BYTES + place.stage * STAGE_BYTES);
            place.advance();
            return at;
        };
        // One lane of every warp arrives for the piece that is `before` pieces before the next, once the warp's products that read it have finished.
        auto release = [&](int before) {
            if (lane == 0) ptx::mbarrier_arrive(barrier(barriers.empty[consumer][(place.stage + RING - before) % RING]));
        };
        // How many of the group's columns, counted from its first, the row first_row + ROW_STEP·r sees.
        auto visible = [&](int j0, int r) { return (CAUSAL ? min(p.Nk, i0 + first_row + ROW_STEP * r + offset + 1) : p.Nk) - j0; };
        // Whether some row does not see all of them.
        auto cut = [&](int j0) { return j0 + PART_K > min(p.Nk, CAUSAL ? i0 + offset + 1 : p.Nk); };

        // Combines both groups' values of a row. Both have read the previous values before either writes the next: they meet in between.
        auto join = [&](float (&x)[2], auto together) {
            if (t == 0) stats_smem[consumer * BLOCK_Q + place_of_row] = x[0], stats_smem[consumer * BLOCK_Q + place_of_row + 8] = x[1];
            meet();
#pragma unroll
            for (int r = 0; r < 2; ++r) x[r] = together(stats_smem[place_of_row + 8 * r], stats_smem[BLOCK_Q + place_of_row + 8 * r]);
        };
        auto larger = [](float x, float y) { return fmaxf(x, y); };

        if (k_tiles > 0) ptx::mbarrier_wait(barrier(barriers.Q_full), 0);
        for (int n = 0; n < k_tiles; ++n) {
            const int j0 = j0_of(n) + consumer * PART_K;

            // ---- S = Q K^T for the group's keys, starting from the mask, 64 columns of the head at a time
#if MASK
            ptx::mbarrier_wait(barrier(barriers.mask_full), n & 1);
            const bool diagonal = CAUSAL && cut(j0), shared = one_row(p);
            start_S<PART_K>(S_rmem, mask_smem, j0 % BIT_COLUMNS, shared ? 0 : first_row, shared ? 0 : ROW_STEP, t,
                            [&](int r, int w) { return diagonal ? ~first_bits(visible(j0, r) - 32 * w) : 0; });
#else
#pragma unroll
            for (int i = 0; i < PART_K / 2; ++i) S_rmem[i] = 0;
#endif
#pragma unroll 1
            for (int panel = 0; panel < panels; ++panel) {
                const uint64_t Q_panel = ptx::descriptor(uniform(Q_smem + panel * Tile_Q::PANEL_BYTES));
                const uint64_t K_hi = ptx::descriptor(next_piece()), K_lo = PLANES == 2 ? ptx::descriptor(next_piece()) : 0;
                ptx::wgmma_fence();
#pragma unroll
                for (int product = 0; product < PRODUCTS; ++product)
#pragma unroll
                    for (int d = 0; d < 4; ++d)
                        ptx::wgmma_ss<__half, PART_K>(part_rmem, ptx::advance(Q_panel, plane_of_first(product) * Tile_Q::BYTES + d * 32),
                                                      ptx::advance(plane_of_second(product) ? K_lo : K_hi, d * 32), product > 0 || d > 0);
                ptx::wgmma_commit_group();
                ptx::wgmma_wait_group<0>();
                if (PLANES == 2) release(2);
                release(1);
#pragma unroll
                for (int i = 0; i < PART_K / 2; ++i) S_rmem[i] += part_rmem[i];
            }

            // ---- P = 2^(scale_log2 · (S − m) + P_EXPONENT), split, for both groups; alpha is what O must be multiplied by
            if (!MASK && cut(j0)) {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int columns = visible(j0, r) - 2 * t;  // from this lane's first
#pragma unroll
                    for (int i = 0; i < PART_K / 8; ++i)
#pragma unroll
                        for (int c = 0; c < 2; ++c)
                            if (8 * i + c >= columns) S_rmem[4 * i + 2 * r + c] = -CUDART_INF_F;
                }
            }
            [[maybe_unused]] KeepBits<PART_K> keep;
            if (DROPOUT) keep.draw_rows(p, first.b + b, first.h + h, i0 + first_row, j0, lane);
            float m_new[2] = {m_rmem[0], m_rmem[1]};
#pragma unroll
            for (int r = 0; r < 2; ++r) {
#pragma unroll
                for (int i = 0; i < PART_K / 8; ++i) m_new[r] = fmaxf(m_new[r], fmaxf(S_rmem[4 * i + 2 * r], S_rmem[4 * i + 2 * r + 1]));
                m_new[r] = fmaxf(m_new[r], __shfl_xor_sync(0xffffffff, m_new[r], 1));  // the four lanes of a row
                m_new[r] = fmaxf(m_new[r], __shfl_xor_sync(0xffffffff, m_new[r], 2));
            }
            join(m_new, larger);  // and both groups are done with the last tile's P
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                alpha[r] = ptx::ex2((m_rmem[r] - m_new[r]) * scale_log2);
                m_rmem[r] = m_new[r];
                float sum = 0;
#pragma unroll
                for (int i = 0; i < PART_K / 8; ++i) {
                    // The difference comes first: a rounded m · scale_log2 would be visible in LSE.
                    const float P0 = ptx::ex2(fmaf(S_rmem[4 * i + 2 * r] - m_rmem[r], scale_log2, P_EXPONENT));
                    const float P1 = ptx::ex2(fmaf(S_rmem[4 * i + 2 * r + 1] - m_rmem[r], scale_log2, P_EXPONENT));
                    sum += P0 + P1;
                    uint32_t hi, lo;
                    split(P0, P1, hi, lo);
                    const uint32_t kept = DROPOUT ? keep.pair(r, i) : ~0u, to = P_smem + Tile_P::offset(place_of_row + 8 * r, consumer * (PART_K / 8) + i) + 4 * t;
                    ptx::st_shared(to, hi & kept);
                    if (PLANES == 2) ptx::st_shared(to + Tile_P::BYTES, lo & kept);
                }
                l_rmem[r] = l_rmem[r] * alpha[r] + sum;
            }
            ptx::fence_proxy_async();  // this thread's part of P
            if (MASK) ptx::mbarrier_arrive(barrier(barriers.mask_empty));  // the values read from it have arrived: the fence waits for loads
            meet();                    // P is whole

            // ---- O = alpha · O + P V, 64 columns at a time
#pragma unroll
            for (int chunk = 0; chunk < COLUMNS / 64; ++chunk) {
#pragma unroll
                for (int j = 0; j < BLOCK_K; j += Piece_V::ROWS) {
                    const uint64_t P_part = ptx::descriptor(uniform(P_smem + j / 64 * Tile_P::PANEL_BYTES + j % 64 * 2)), V = ptx::descriptor(next_piece());
                    ptx::wgmma_fence();
#pragma unroll
                    for (int product = 0; product < PRODUCTS; ++product)
#pragma unroll
                        for (int k = 0; k < Piece_V::ROWS / 16; ++k)
                            ptx::wgmma_ss_transposed_b<__half, 64>(part_rmem, ptx::advance(P_part, plane_of_first(product) * Tile_P::BYTES + k * 32),
                                                                   ptx::advance(V, plane_of_second(product) * Piece_V::BYTES + k * 16 * ROW_BYTES),
                                                                   j > 0 || product > 0 || k > 0);
                    ptx::wgmma_commit_group();
                    if (j == 0) continue;
                    ptx::wgmma_wait_group<1>();  // the piece before has been read
                    release(2);
                }
                ptx::wgmma_wait_group<0>();
                release(1);
#pragma unroll
                for (int i = 0; i < 32; ++i) O_rmem[32 * chunk + i] = fmaf(O_rmem[32 * chunk + i], alpha[i >> 1 & 1], part_rmem[i]);
            }
        }

        // ---- O /= l, stored two columns at a time: four lanes write 32 bytes of a row
        const int bh_again = ptx::ctaid_x() / q_tiles;  // re-read, so that the address occupies no registers before
        Range& range = ranges[bh_again / p.H * p.Hkv + kv_head(p, bh_again % p.H)];
        const float V_factor = scalbnf(1, -exponent_of(range.v));
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            l_rmem[r] += __shfl_xor_sync(0xffffffff, l_rmem[r], 1);
            l_rmem[r] += __shfl_xor_sync(0xffffffff, l_rmem[r], 2);
        }
        meet();  // the last maxima have been read
        join(l_rmem, [](float x, float y) { return x + y; });
        float largest[2] = {};
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const bool dead = l_rmem[r] == 0 && (MASK || CAUSAL || p.Nk == 0);  // it may attend nothing
            const float factor = dead ? 0 : (DROPOUT ? p.keep_scale : 1.0f) / l_rmem[r];
            const int i = i0 + first_row + ROW_STEP * r;
            float* O_gmem = static_cast<float*>(p.o.data) + b * p.o.stride_b + h * p.o.stride_h + i * p.o.stride_n + consumer * COLUMNS;
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; ++n) {
                const float x0 = O_rmem[4 * n + 2 * r] * factor, x1 = O_rmem[4 * n + 2 * r + 1] * factor;
                largest[r] = fmaxf(largest[r], fmaxf(fabsf(x0), fabsf(x1)));
                const int column = 8 * n + 2 * t;
                if (i < p.Nq && consumer * COLUMNS + column < p.Dv) *reinterpret_cast<float2*>(O_gmem + column) = make_float2(x0 * V_factor, x1 * V_factor);
            }
            largest[r] = fmaxf(largest[r], __shfl_xor_sync(0xffffffff, largest[r], 1));
            largest[r] = fmaxf(largest[r], __shfl_xor_sync(0xffffffff, largest[r], 2));
        }
        meet();  // the sums have been read
        join(largest, larger);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const bool dead = l_rmem[r] == 0 && (MASK || CAUSAL || p.Nk == 0);
            const int i = i0 + first_row + ROW_STEP * r;
            if (i >= p.Nq || t != 0 || consumer != 0) continue;
            if (!dead && range.v != 0 && !row_fits(largest[r])) range.o_is_small = 1;
            // The product is rounded: if a row has large scores of which one dominates, P is then exactly 1.
            const float LSE = __fmul_rn(m_rmem[r], scale) + logf(l_rmem[r] * (1.0f / (1 << P_EXPONENT)));
            if (p.lse) p.lse[static_cast<int64_t>(bh) * p.Nq + i] = dead ? -CUDART_INF_F : LSE;
        }
    }
}

// ---- launching

constexpr int K_BOX_ROWS = PART_K, V_BOX_ROWS = Piece_V::ROWS;
#include "forward_5_float32_launch.cuh"

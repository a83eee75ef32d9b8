// Forward in float32 on Hopper's tensor cores: FlashAttention-3 (Shah et al., 2024, arXiv:2407.08608), Algorithm 1, each product of float32 numbers made
// of three of float16 numbers (Ootomo and Yokota, 2022, arXiv:2203.03341).  sm_90a.
//
// The idea: tensor cores multiply 16-bit numbers 15 times as fast as CUDA cores multiply float32. planes.cuh says how a float32 number is split into
// two of them, and what is lost. A small kernel splits Q, K and V once; tensor maps then copy the planes to shared memory like 16-bit tiles. P is split in
// registers, where it is the A operand of P V.
//
// Change from forward_4_hopper.cu: each product becomes three; a tile's P V is summed separately, then added to O; the scale differs from head to
// head; O is stored directly from registers. In one way it is simpler: a block computes one tile of Q and ends.
//
// Serves float32, everything in the interface, positive scale; head sizes up to 128 that are multiples of 4.
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

// ---- tile sizes. A warpgroup owns 64 rows of Q.
constexpr int GROUP = 128;  // threads
constexpr int CONSUMERS = 2;
constexpr int THREADS = GROUP * (1 + CONSUMERS);
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
constexpr int BLOCK_Q = 64 * CONSUMERS;
constexpr int BLOCK_K = HEAD_DIM <= 64 ? 128 : 64;
constexpr int STAGES = 2;  // pairs of K and V tiles in shared memory

using Tile_Q = SwizzledTile<BLOCK_Q, HEAD_DIM>;
using Tile_KV = SwizzledTile<BLOCK_K, HEAD_DIM>;
constexpr int Q_BYTES = PLANES * Tile_Q::BYTES, KV_BYTES = PLANES * Tile_KV::BYTES;
constexpr int MASK_BYTES = MASK ? BLOCK_Q * static_cast<int>(sizeof(BitRow)) : 0;
constexpr int SMEM_BYTES = Q_BYTES + STAGES * (2 * KV_BYTES + MASK_BYTES);
static_assert(SMEM_BYTES <= SMEM_KB * 1024 - 1024, "choose smaller tiles");

constexpr int P_EXPONENT = 15;  // P, at most 1, is multiplied by 2^15, to fill float16's range. So is l, and the factor cancels in O = P V / l.

struct Maps {
    CUtensorMap q, k, v, mask;
};

// "full": the bytes have arrived (K's barrier counts the mask's too). "empty": the computing warps have finished reading them.
struct Barriers {
    uint64_t Q_full, K_full[STAGES], K_empty[STAGES], V_full[STAGES], V_empty[STAGES];
};

__global__ void __launch_bounds__(THREADS, 1)
    forward_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Maps maps, Range* ranges, [[maybe_unused]] First first) {
    extern __shared__ __align__(1024) uint8_t smem[];
    __shared__ __align__(8) Barriers barriers;
    const uint32_t Q_smem = ptx::smem_address(smem);       // PLANES × [BLOCK_Q, HEAD_DIM]
    const uint32_t K_smem = Q_smem + Q_BYTES;              // STAGES × PLANES × [BLOCK_K, HEAD_DIM]
    const uint32_t V_smem = K_smem + STAGES * KV_BYTES;    // STAGES × PLANES × [BLOCK_K, HEAD_DIM]
    uint8_t* mask_smem = smem + Q_BYTES + STAGES * 2 * KV_BYTES;  // STAGES × [BLOCK_Q] BitRow
    const uint32_t Q_full = ptx::smem_address(&barriers.Q_full);
    auto barrier = [](uint64_t* of, int stage) { return ptx::smem_address(of + stage); };

    // One tile of Q against the tiles of keys that it sees, from the last to the first: only the last need masking. Causal: the longest rows of a
    // head start first.
    const int q_tiles = (p.Nq + BLOCK_Q - 1) / BLOCK_Q, offset = p.Nk - p.Nq;  // causal: row i sees columns j ≤ i + offset
    const int q_tile = CAUSAL ? q_tiles - 1 - blockIdx.x % q_tiles : blockIdx.x % q_tiles;
    const int bh = blockIdx.x / q_tiles, b = bh / p.H, h = bh % p.H, b_kv_h = b * p.Hkv + kv_head(p, h);
    const int i0 = q_tile * BLOCK_Q;
    const int columns = CAUSAL ? max(0, min(p.Nk, min(i0 + BLOCK_Q, p.Nq) + offset)) : p.Nk;
    const int k_tiles = (columns + BLOCK_K - 1) / BLOCK_K;
    auto j0_of = [&](int n) { return (k_tiles - 1 - n) * BLOCK_K; };
    if (!scores_fit(p, ranges[b_kv_h])) return;  // the simple rung's

    if (threadIdx.x == 0) {
        ptx::mbarrier_init(Q_full, 1);
        for (int stage = 0; stage < STAGES; ++stage) {
            ptx::mbarrier_init(barrier(barriers.K_full, stage), 1);
            ptx::mbarrier_init(barrier(barriers.V_full, stage), 1);
            ptx::mbarrier_init(barrier(barriers.K_empty, stage), 4 * CONSUMERS);
            ptx::mbarrier_init(barrier(barriers.V_empty, stage), 4 * CONSUMERS);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();

    const int group = uniform(threadIdx.x / GROUP);
    if (group == 0) {
        // ---- the producer: one thread issues all loads
        ptx::setmaxnreg_dec<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0 && k_tiles > 0) {
            ptx::mbarrier_arrive_expect_tx(Q_full, Q_BYTES);
            for (int plane = 0; plane < PLANES; ++plane) load_boxes<Tile_Q, RowOrder>(Q_smem + plane * Tile_Q::BYTES, maps.q, i0, bh, plane, Q_full);
            for (int n = 0; n < k_tiles; ++n) {
                const Slot<STAGES> slot(n);
                auto load = [&](uint32_t tiles, const CUtensorMap& map, uint64_t* of_full, uint64_t* of_empty, int more_bytes) {
                    const uint32_t full = barrier(of_full, slot.stage);
                    ptx::mbarrier_wait(barrier(of_empty, slot.stage), slot.parity ^ 1);  // returns immediately in the first round
                    ptx::mbarrier_arrive_expect_tx(full, KV_BYTES + more_bytes);
                    for (int plane = 0; plane < PLANES; ++plane)
                        load_boxes<Tile_KV>(tiles + slot.stage * KV_BYTES + plane * Tile_KV::BYTES, map, j0_of(n), b_kv_h, plane, full);
                };
                load(K_smem, maps.k, barriers.K_full, barriers.K_empty, !MASK ? 0 : one_row(p) ? static_cast<int>(sizeof(BitRow)) : MASK_BYTES);
                if (MASK)
                    ptx::cp_async_bulk_tensor_4d(ptx::smem_address(mask_smem + slot.stage * MASK_BYTES), &maps.mask, j0_of(n) / BIT_COLUMNS * 4, i0, h, b,
                                                 barrier(barriers.K_full, slot.stage));
                load(V_smem, maps.v, barriers.V_full, barriers.V_empty, 0);
            }
        }
    } else {
        // ---- the consumers: 64 rows each
        ptx::setmaxnreg_inc<CONSUMER_REGISTERS>();
        const int consumer = group - 1, lane = threadIdx.x % 32, t = lane % 4;
        // This thread holds two rows of the tile, first_row and first_row + ROW_STEP.
        const int first_row = RowOrder::row((threadIdx.x - GROUP) / 32 * 16 + lane / 4);
        const float scale = scale_of_scores(p, ranges[b_kv_h]), scale_log2 = scale * LOG2_E;  // exp(scale · x) = 2^(scale_log2 · x)
        const float lowest = -0x1p126f / fmaxf(1, scale_log2);                       // p.lowest in the units of the planes' products

        float O_rmem[HEAD_DIM / 2] = {}, O_tile_rmem[HEAD_DIM / 2];  // not yet divided by l; of one tile of keys
        float S_rmem[BLOCK_K / 2];
        uint32_t P_rmem[PLANES][BLOCK_K / 16][4];
        float m_rmem[2] = {lowest, lowest}, l_rmem[2] = {}, alpha[2];  // l is this lane's share of the sum

        // One lane of every warp arrives at an "empty" barrier, once the warp's products that read the tile have finished.
        auto release = [&](uint64_t* empty, int stage) {
            if (lane == 0) ptx::mbarrier_arrive(barrier(empty, stage));
        };
        // How many of the tile's columns, counted from its first, the row first_row + ROW_STEP·r sees.
        auto visible = [&](int j0, int r) { return (CAUSAL ? min(p.Nk, i0 + first_row + ROW_STEP * r + offset + 1) : p.Nk) - j0; };
        // Whether some row does not see the whole tile.
        auto cut = [&](int j0) { return j0 + BLOCK_K > min(p.Nk, CAUSAL ? i0 + offset + 1 : p.Nk); };

        // Waits for K and the mask, with which the accumulators start, and issues S = Q Kᵀ.
        auto multiply_QK = [&](int n) {
            const Slot<STAGES> slot(n);
            ptx::mbarrier_wait(barrier(barriers.K_full, slot.stage), slot.parity);
#if MASK
            const int j0 = j0_of(n);
            const bool diagonal = CAUSAL && cut(j0), shared = one_row(p);
            start_S<BLOCK_K>(S_rmem, mask_smem + slot.stage * MASK_BYTES, j0 % BIT_COLUMNS, shared ? 0 : first_row, shared ? 0 : ROW_STEP, t,
                             [&](int r, int w) { return diagonal ? ~first_bits(visible(j0, r) - 32 * w) : 0; });
#endif
            const uint64_t Q_rows = ptx::descriptor(uniform(Q_smem + consumer * 64 * ROW_BYTES)), K_tile = ptx::descriptor(uniform(K_smem + slot.stage * KV_BYTES));
            ptx::wgmma_fence();
#pragma unroll
            for (int product = 0; product < PRODUCTS; ++product)
#pragma unroll
                for (int d = 0; d < HEAD_DIM / 16; ++d)
                    ptx::wgmma_ss<__half, BLOCK_K>(
                        S_rmem, ptx::advance(Q_rows, plane_of_first(product) * Tile_Q::BYTES + d / 4 * Tile_Q::PANEL_BYTES + d % 4 * 32),
                        ptx::advance(K_tile, plane_of_second(product) * Tile_KV::BYTES + d / 4 * Tile_KV::PANEL_BYTES + d % 4 * 32),
                        MASK || product > 0 || d > 0);
            ptx::wgmma_commit_group();
        };
        // Waits for V and issues P V, the tile's part of O.
        auto multiply_PV = [&](int n) {
            const Slot<STAGES> slot(n);
            ptx::mbarrier_wait(barrier(barriers.V_full, slot.stage), slot.parity);
            const uint64_t V_tile = ptx::descriptor(uniform(V_smem + slot.stage * KV_BYTES), Tile_KV::PANEL_BYTES);
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 2; ++i) O_tile_rmem[i] = 0;
            ptx::wgmma_fence();
#pragma unroll
            for (int product = 0; product < PRODUCTS; ++product)
#pragma unroll
                for (int k = 0; k < BLOCK_K / 16; ++k)
                    ptx::wgmma_rs<__half, HEAD_DIM>(O_tile_rmem, P_rmem[plane_of_first(product)][k],
                                                    ptx::advance(V_tile, plane_of_second(product) * Tile_KV::BYTES + k * 16 * ROW_BYTES));
            ptx::wgmma_commit_group();
        };
        // S becomes 2^(scale_log2 · (S − m) + P_EXPONENT); alpha is what O must be multiplied by.
        auto softmax = [&](int j0) {
            if (!MASK && cut(j0)) {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int columns = visible(j0, r) - 2 * t;  // from this lane's first
#pragma unroll
                    for (int i = 0; i < BLOCK_K / 8; ++i)
#pragma unroll
                        for (int c = 0; c < 2; ++c)
                            if (8 * i + c >= columns) S_rmem[4 * i + 2 * r + c] = -CUDART_INF_F;
                }
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float m_new = m_rmem[r];
#pragma unroll
                for (int i = 0; i < BLOCK_K / 8; ++i) m_new = fmaxf(m_new, fmaxf(S_rmem[4 * i + 2 * r], S_rmem[4 * i + 2 * r + 1]));
                m_new = row_max(m_new);
                alpha[r] = ptx::ex2((m_rmem[r] - m_new) * scale_log2);
                m_rmem[r] = m_new;
                float sum = 0;
#pragma unroll
                for (int i = 0; i < BLOCK_K / 8; ++i)
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        float& x = S_rmem[4 * i + 2 * r + c];
                        x = ptx::ex2(fmaf(x - m_new, scale_log2, P_EXPONENT));  // the difference comes first: a rounded m · scale_log2 would be visible in LSE
                        sum += x;
                    }
                l_rmem[r] = l_rmem[r] * alpha[r] + sum;
            }
        };
        // The accumulators of S, in pairs and split, are the A operands of P V as they lie.
        [[maybe_unused]] KeepBits<BLOCK_K> keep;
        auto split_P = [&] {
#pragma unroll
            for (int k = 0; k < BLOCK_K / 16; ++k)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    uint32_t pairs[PLANES];
                    split(S_rmem[8 * k + 2 * e], S_rmem[8 * k + 2 * e + 1], pairs);
                    const uint32_t kept = DROPOUT ? keep.pair(e % 2, 2 * k + e / 2) : ~0u;
#pragma unroll
                    for (int plane = 0; plane < PLANES; ++plane) P_rmem[plane][k][e] = pairs[plane] & kept;
                }
        };
        // Draws which elements of the tile dropout keeps.
        auto draw = [&](int j0) {
            if (DROPOUT) keep.draw_rows(p, first.b + b, first.h + h, i0 + first_row, j0, lane);
        };

        if (k_tiles > 0) {
            ptx::mbarrier_wait(Q_full, 0);
            // The first tile has no predecessor whose product could run under its softmax.
            multiply_QK(0);
            draw(j0_of(0));
            ptx::wgmma_wait_group<0>();
            if (MASK) __syncwarp();  // every lane has read its part of the mask
            release(barriers.K_empty, 0);
            softmax(j0_of(0));
            split_P();
            for (int n = 1; n < k_tiles; ++n) {
                multiply_QK(n);
                draw(j0_of(n));  // before the tile's part of O takes its registers
                multiply_PV(n - 1);
                ptx::wgmma_wait_group<1>();  // S is there
                if (MASK) __syncwarp();      // every lane has read its part of the mask
                release(barriers.K_empty, Slot<STAGES>(n).stage);
                softmax(j0_of(n));
                // The compiler would move the wait for O ahead of the exponentials, but it moves nothing over a branch. The condition always holds.
                if (scale_log2 > 0) ptx::wgmma_wait_group<0>();
                ptx::wgmma_wait_group<0>();  // the tile's part of O is there
                release(barriers.V_empty, Slot<STAGES>(n - 1).stage);
#pragma unroll
                for (int i = 0; i < HEAD_DIM / 2; ++i) O_rmem[i] = (O_rmem[i] + O_tile_rmem[i]) * alpha[i >> 1 & 1];
                split_P();
            }
            multiply_PV(k_tiles - 1);
            ptx::wgmma_wait_group<0>();
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 2; ++i) O_rmem[i] += O_tile_rmem[i];
        }

        // O /= l, stored two columns at a time: four lanes write 32 bytes of a row.
        // The block's number is re-read, so that the address occupies no registers before.
        const int bh_again = ptx::ctaid_x() / q_tiles;
        Range& range = ranges[bh_again / p.H * p.Hkv + kv_head(p, bh_again % p.H)];
        const float V_factor = scalbnf(1, -exponent_of(range.v));
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float l = row_sum(l_rmem[r]);
            const bool dead = l == 0 && (MASK || CAUSAL || p.Nk == 0);  // it may attend nothing
            const float factor = dead ? 0 : (DROPOUT ? p.keep_scale : 1.0f) / l;
            const int i = i0 + first_row + ROW_STEP * r;
            float* O_gmem = static_cast<float*>(p.o.data) + b * p.o.stride_b + h * p.o.stride_h + i * p.o.stride_n;
            float largest = 0;
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; ++n) {
                const float x0 = O_rmem[4 * n + 2 * r] * factor, x1 = O_rmem[4 * n + 2 * r + 1] * factor;
                largest = fmaxf(largest, fmaxf(fabsf(x0), fabsf(x1)));
                const int column = 8 * n + 2 * t;
                if (i < p.Nq && column < p.Dv) *reinterpret_cast<float2*>(O_gmem + column) = make_float2(x0 * V_factor, x1 * V_factor);
            }
            largest = row_max(largest);
            if (i < p.Nq && t == 0) {
                if (!dead && range.v != 0 && !row_fits(largest)) range.o_is_small = 1;
                // The product is rounded, as in the backward: if a row has large scores of which one dominates, P is then exactly 1.
                const float LSE = __fmul_rn(m_rmem[r], scale) + logf(l * (1.0f / (1 << P_EXPONENT)));
                if (p.lse) p.lse[static_cast<int64_t>(bh) * p.Nq + i] = dead ? -CUDART_INF_F : LSE;
            }
        }
    }
}

// ---- launching

constexpr int K_BOX_ROWS = BLOCK_K, V_BOX_ROWS = BLOCK_K;
#include "forward_5_float32_launch.cuh"

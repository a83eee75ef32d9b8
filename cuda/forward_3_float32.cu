// Forward in float32 on tensor cores: FlashAttention-2, Algorithm 1, each product of float32 numbers made of three of float16 numbers (Ootomo and
// Yokota, 2022, arXiv:2203.03341).  sm_80 and newer.
//
// The idea: an A100's tensor cores multiply float16 numbers 16 times as fast as its CUDA cores multiply float32, so three products are still 5 times
// as fast. planes.cuh says how a float32 number is split into two of them, and what is lost. A small kernel splits Q, K and V once; their planes are
// then copied to shared memory like 16-bit tiles. P is split in registers, where it is the A operand of P V.
//
// Change from forward_3_tensor_core.cu: each product becomes three (planes_mma.cuh); a tile's P V is summed separately, then added to O; the scale
// differs from head to head; O is stored directly from registers.
//
// Serves float32, everything in the interface but windows and spans, positive scale; head sizes up to 128 that are multiples of 4.
#include "mask_tile.cuh"
#include "planes_mma.cuh"

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

// ---- tile sizes. At D 64 a warp owns 32 rows of Q, so that a fragment of K or V serves two products of each kind. At D 128, and with dropout, there
// are registers for 16, and a block has twice as many warps. Two blocks share a multiprocessor at D 64; at D 128 shared memory has room for one.
constexpr int M_TILES = HEAD_DIM <= 64 && !DROPOUT ? 2 : 1, WARP_ROWS = 16 * M_TILES;
constexpr int BLOCK_Q = 128;
constexpr int WARPS = BLOCK_Q / WARP_ROWS;
constexpr int THREADS = 32 * WARPS;
constexpr int BLOCK_K = 32;
constexpr int N_TILES = BLOCK_K / 8;              // 8-column tiles of S
constexpr int O_TILES = HEAD_DIM / 8;             // of O
constexpr int STAGES = SMEM_KB >= 163 ? 2 : 1;    // pairs of K and V tiles in shared memory

using Tile_Q = SwizzledTile<BLOCK_Q, HEAD_DIM>;
using Tile_KV = SwizzledTile<BLOCK_K, HEAD_DIM>;
using MaskTile = MaskOfBits<THREADS, WARP_ROWS, BLOCK_K>;
constexpr int Q_BYTES = PLANES * Tile_Q::BYTES, KV_BYTES = PLANES * Tile_KV::BYTES;
constexpr int SMEM_BYTES = Q_BYTES + STAGES * (2 * KV_BYTES + (MASK ? MaskTile::SIZE : 0));
static_assert(SMEM_BYTES <= SMEM_KB * 1024, "choose smaller tiles");
__device__ inline int stage(int j) { return j % STAGES; }

constexpr int P_EXPONENT = 15;  // P, at most 1, is multiplied by 2^15, to fill float16's range. So is l, and the factor cancels in O = P V / l.

__global__ void __launch_bounds__(THREADS, 1)
    forward_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Operands all, [[maybe_unused]] First first) {
    extern __shared__ __align__(1024) uint8_t smem[];
    const uint32_t Q_smem = ptx::smem_address(smem);                                  // PLANES × [BLOCK_Q, HEAD_DIM]
    const uint32_t KV_smem = Q_smem + Q_BYTES;                                        // STAGES × (PLANES × K [BLOCK_K, HEAD_DIM], PLANES × V)
    [[maybe_unused]] uint8_t* mask_smem = smem + Q_BYTES + STAGES * 2 * KV_BYTES;     // STAGES × a tile of the mask

    // One block computes BLOCK_Q rows of one head. Causal: the longest rows start first.
    const int q_tiles = (p.Nq + BLOCK_Q - 1) / BLOCK_Q, offset = p.Nk - p.Nq;  // causal: row i sees columns j ≤ i + offset
    const int i0 = (CAUSAL ? q_tiles - 1 - blockIdx.x % q_tiles : blockIdx.x % q_tiles) * BLOCK_Q;
    const int bh = blockIdx.x / q_tiles, b = bh / p.H, h = bh % p.H, b_kv_h = b * p.Hkv + kv_head(p, h);
    const int k_tiles = (max(0, stop_of_rows(p, i0, BLOCK_Q)) + BLOCK_K - 1) / BLOCK_K;
    Range& range = all.ranges[b_kv_h];
    if (!scores_fit(p, range)) return;  // the simple rung's

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int g = lane / 4, t = lane % 4;      // this lane's row and column pair in an 8×8 fragment
    const int warp_row = warp * WARP_ROWS;     // the warp's first row in the tile

    [[maybe_unused]] const uint32_t mask_origin = MASK ? MaskTile::origin(p, b, h, i0, threadIdx.x) : 0;
    auto load_K = [&](int j) {
        load_planes<Tile_KV, THREADS>(KV_smem + stage(j) * 2 * KV_BYTES, all.of[1], b_kv_h, j * BLOCK_K);
        if (MASK) MaskTile::copy(mask_smem + stage(j) * MaskTile::SIZE, p, mask_origin, i0, j * BLOCK_K, threadIdx.x);
    };
    auto load_V = [&](int j) { load_planes<Tile_KV, THREADS>(KV_smem + (stage(j) * 2 + 1) * KV_BYTES, all.of[2], b_kv_h, j * BLOCK_K); };

    if (k_tiles > 0) {
        load_planes<Tile_Q, THREADS>(Q_smem, all.of[0], bh, i0);
        load_K(k_tiles - 1);
        if (STAGES == 2) load_V(k_tiles - 1);
    }
    ptx::cp_async_commit_group();

    const float scale = scale_of_scores(p, range), scale_log2 = scale * LOG2_E;  // exp(scale · x) = 2^(scale_log2 · x)
    const float lowest = -0x1p126f / fmaxf(1, scale_log2);                       // p.lowest in the units of the planes' products
    float O_rmem[M_TILES][O_TILES][4] = {};                                      // not yet divided by l
    float m_rmem[M_TILES][2], l_rmem[M_TILES][2] = {};                           // of rows g and g + 8; l is this lane's share of the sum
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) m_rmem[m][0] = m_rmem[m][1] = lowest;
    const uint32_t Q_lane = Q_smem + Tile_Q::lane_a(warp_row, lane);

    // One tile of K and V: S, its softmax against the running maximum, and its contribution to O. `cut`: the diagonal or the end of the sequence cuts
    // it.
    auto step = [&](int j, bool cut) {
        const int j0 = j * BLOCK_K;
        const uint32_t K_smem = KV_smem + stage(j) * 2 * KV_BYTES, V_smem = K_smem + KV_BYTES;

        // While tile j is in use, the next copies run: of the next K and V into the other stage or, if shared memory has room for only one pair, of
        // this V under Q Kᵀ and of the next K under the rest.
        ptx::cp_async_wait_group<0>();
        __syncthreads();  // K (and V) are there for every thread, and every warp is done with what the next copy overwrites
        if (STAGES == 1) load_V(j);
        if (STAGES == 2 && j > 0) load_K(j - 1), load_V(j - 1);
        ptx::cp_async_commit_group();

        // How many of the tile's columns the row 16·m + 8·r + g of the warp sees.
        auto visible = [&](int m, int r) { return (CAUSAL ? min(p.Nk, i0 + warp_row + 16 * m + 8 * r + g + offset + 1) : p.Nk) - j0; };
        float S_rmem[M_TILES][N_TILES][4] = {};  // S = Q Kᵀ, with accumulators that start from 0 or from the mask
        if (MASK) {
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int r = 0; r < 2; ++r)
                    MaskTile::start<CAUSAL>(S_rmem[m], 2 * r, mask_smem + stage(j) * MaskTile::SIZE, 2 * m + r, cut, visible(m, r), threadIdx.x);
        }
        multiply<Tile_Q, Tile_KV, true>(S_rmem, Q_lane, K_smem + Tile_KV::lane_b(0, lane));
        if (!MASK && cut) {  // Hide scores beyond the diagonal or the end of the sequence.
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int columns = visible(m, r) - 2 * t;  // from this lane's first
#pragma unroll
                    for (int n = 0; n < N_TILES; ++n)
#pragma unroll
                        for (int c = 0; c < 2; ++c)
                            if (8 * n + c >= columns) S_rmem[m][n][2 * r + c] = -CUDART_INF_F;
                }
        }

        if (STAGES == 1) {
            ptx::cp_async_wait_group<0>();
            __syncthreads();  // V is there for every thread, and every warp is done with K and the mask's words
            if (j > 0) load_K(j - 1);
            ptx::cp_async_commit_group();
        }

        // Online softmax: S becomes P = 2^(scale_log2 · (S − m) + P_EXPONENT); alpha is what O must be multiplied by.
        float alpha[M_TILES][2];
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float m_new = m_rmem[m][r];
#pragma unroll
                for (int n = 0; n < N_TILES; ++n) m_new = fmaxf(m_new, fmaxf(S_rmem[m][n][2 * r], S_rmem[m][n][2 * r + 1]));
                m_new = row_max(m_new);
                alpha[m][r] = ptx::ex2((m_rmem[m][r] - m_new) * scale_log2);
                m_rmem[m][r] = m_new;
                float sum = 0;
#pragma unroll
                for (int n = 0; n < N_TILES; ++n)
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        float& x = S_rmem[m][n][2 * r + c];
                        // The difference comes first: a rounded m · scale_log2 would be visible in LSE.
                        x = ptx::ex2(fmaf(x - m_new, scale_log2, P_EXPONENT));
                        sum += x;
                    }
                l_rmem[m][r] = l_rmem[m][r] * alpha[m][r] + sum;
            }

        uint32_t P_rmem[PLANES][BLOCK_K / 16][M_TILES][4];
        split_fragments(P_rmem, S_rmem);
#if DROPOUT
        // A call of Philox covers 32 rows and the tile's 32 columns, 8 apart. Two calls serve this lane's even and odd columns. A word of theirs is
        // about one row.
        const uint2 key = dropout_key(p);
        const int row_group = (i0 + warp_row) / 32 * 32 + g, column_group = j0 + 2 * t;
        const uint4 even = dropout_bytes(key, first.b + b, first.h + h, row_group, column_group);
        const uint4 odd = dropout_bytes(key, first.b + b, first.h + h, row_group, column_group + 1);
        const bool upper = warp_row % 32 == 16;  // the warp has the last 16 of these rows
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            uint32_t keep[N_TILES];  // of row 8·r + g, for each 8-column tile, the lane's pair of columns
            if (r == 0) keep_pairs(keep, upper ? even.z : even.x, upper ? odd.z : odd.x, p);
            else keep_pairs(keep, upper ? even.w : even.y, upper ? odd.w : odd.y, p);
#pragma unroll
            for (int n = 0; n < N_TILES; ++n)
#pragma unroll
                for (int plane = 0; plane < PLANES; ++plane) P_rmem[plane][n / 2][0][n % 2 * 2 + r] &= keep[n];
        }
#endif
        // O = alpha O + P V
        multiply_tile<Tile_KV>(p.scale > 0, P_rmem, V_smem + Tile_KV::lane_b_trans(lane), [&](int m, int o, const float(&part)[4]) {
#pragma unroll
            for (int e = 0; e < 4; ++e) O_rmem[m][o][e] = fmaf(O_rmem[m][o][e], alpha[m][e / 2], part[e]);
        });
    };

    // From right to left: the tiles that the diagonal or the end of the sequence cuts come first; in the others nothing is hidden.
    const int uncut = min(p.Nk, CAUSAL ? i0 + offset + 1 : p.Nk) / BLOCK_K;  // tiles in which every row sees every column
    for (int j = k_tiles - 1; j >= 0; --j) step(j, j >= uncut);

    // O /= l, stored two columns at a time: four lanes write 32 bytes of a row.
    const float V_factor = scalbnf(1, -exponent_of(range.v));
    float* O_gmem = static_cast<float*>(p.o.data) + b * p.o.stride_b + h * p.o.stride_h;  // [Nq, Dv]
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int i = i0 + warp_row + 16 * m + 8 * r + g;
            const float l = row_sum(l_rmem[m][r]);
            const bool dead = l == 0 && (MASK || CAUSAL || p.Nk == 0);  // it may attend nothing
            const float factor = dead ? 0 : (DROPOUT ? p.keep_scale : 1.0f) / l;
            float largest = 0;
#pragma unroll
            for (int o = 0; o < O_TILES; ++o) {
                const float x0 = O_rmem[m][o][2 * r] * factor, x1 = O_rmem[m][o][2 * r + 1] * factor;
                largest = fmaxf(largest, fmaxf(fabsf(x0), fabsf(x1)));
                const int column = 8 * o + 2 * t;
                if (i < p.Nq && column < p.Dv)
                    *reinterpret_cast<float2*>(O_gmem + i * p.o.stride_n + column) = make_float2(x0 * V_factor, x1 * V_factor);
            }
            largest = row_max(largest);
            if (i < p.Nq && t == 0) {
                if (!dead && range.v != 0 && !row_fits(largest)) range.o_is_small = 1;
                // The product is rounded, as in the backward: if a row has large scores of which one dominates, P is then exactly 1.
                const float LSE = __fmul_rn(m_rmem[m][r], scale) + logf(l * (1.0f / (1 << P_EXPONENT)));
                if (p.lse) p.lse[static_cast<int64_t>(bh) * p.Nq + i] = dead ? -CUDART_INF_F : LSE;
            }
        }
}

// ---- launching

inline int64_t blocks_of(const AttentionParams& p) { return tiles_of(p.Nq, BLOCK_Q) * p.H * p.B; }
inline int64_t planes_floats(const AttentionParams& p) { return Operands(p, false, nullptr).floats; }
inline Parts parts_of(const AttentionParams& p) { return Parts(p, planes_floats(p) * 4, {blocks_of(call_of(p, {0, 1, 0, 1}))}); }

extern "C" int64_t workspace_floats(const AttentionParams* params) {
    return planes_floats(call_of(*params, parts_of(*params).largest())) + Operands::range_floats(*params);
}

static cudaError_t launch_part(const AttentionParams& p, Range* ranges, First first) {
    const Operands all(p, false, ranges);
    const bool mask_fits = !MASK || units_fit(p.mask.stride_b, p.mask.stride_h, p.mask.stride_i, p.B, p.H, p.Nq, MaskTile::UNIT);
    if (!planes_reachable(all, p.B) || !mask_fits) return cudaErrorInvalidValue;
    launch_planes(p, all);
    launch_kernel(forward_kernel, static_cast<unsigned>(blocks_of(p)), THREADS, SMEM_BYTES, p.stream, p, all, first);
    return cudaGetLastError();
}

extern "C" int attention(const AttentionParams* params) {
    const AttentionParams& p = *params;
    if (p.B == 0 || p.Nq == 0) return cudaSuccess;
    if (!numbers_fit(p, {blocks_of(p), prepare_blocks(p, Operands(p, false, nullptr))})) return cudaErrorInvalidConfiguration;
    DeviceGuard guard(p.device);
    const cudaError_t error = cudaFuncSetAttribute(forward_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SMEM_BYTES);
    if (error != cudaSuccess) return error;
    return launch_parts(p, parts_of(p), p.workspace + workspace_floats(params), launch_part, exact::exact_attention);
}

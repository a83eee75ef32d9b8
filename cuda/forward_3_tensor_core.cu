// Forward on tensor cores with swizzled shared memory and double-buffered copies: FlashAttention-2, Algorithm 1.  sm_80 and newer.
//
// The idea: feed mma.sync without waiting. Tiles of K and V arrive by cp.async while the previous pair is in use; in shared memory the position of
// each 16-byte chunk is xor-ed with its row ("swizzled"), so that every ldmatrix reads eight rows from eight different groups of banks.
// P never leaves registers: the accumulators of S = Q Kᵀ, rounded to pairs, are already laid out as the A operand of O += P V.
//
// Change from forward_2c_cp_async.cu: more rows per warp, so that a fragment of K or V serves two products; O is stored by way of shared memory; tile
// sizes that fit each architecture's registers; masks and dropout. Serves everything in the interface for float16 and bfloat16, head sizes up to 256
// that are multiples of 8, positive scale.
#include "mask_tile.cuh"
#include "score_mma.cuh"

// ---- tile sizes. A warp owns ROWS_PER_WARP rows of Q, so softmax needs no other warp. Two or three blocks share a multiprocessor: one
// block's softmax runs under another's matrix products.
#define ROWS_PER_WARP (HEAD_DIM <= 128 ? 32 : 16)
// As many columns as fit into registers beside S, O and what masks and dropout need. The assembler fits more for sm_90, and nearly as many for sm_100.
#define ROOMY (ARCH == 90 || (ARCH >= 100 && ARCH < 120 && !(CAUSAL && (MASK || HEAD_DIM <= 64))))
#define WIDE (HEAD_DIM <= 64 && ROOMY && !INTERVAL && !SCORE && !(MASK && (CAUSAL || DROPOUT)))
#define BLOCK_K (WIDE ? 128 : HEAD_DIM <= 64 || HEAD_DIM > 128 || (!DROPOUT && ROOMY && !(SCORE & (SCORE_SOFTCAP | SCORE_BIAS))) ? 64 : 32)
#define BLOCKS_PER_SM 2
#define STAGES (HEAD_DIM <= 128 ? 2 : 1)  // how many pairs of K and V tiles shared memory holds

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int BLOCK_Q = WARPS * ROWS_PER_WARP;
constexpr int M_TILES = ROWS_PER_WARP / 16;  // 16-row tiles of Q in a warp
constexpr int N_TILES = BLOCK_K / 8;         // 8-column tiles of S
constexpr int O_TILES = HEAD_DIM / 8;        // 8-column tiles of O
constexpr int D_STEPS = HEAD_DIM / 16;       // steps of 16 along the head size, in Q Kᵀ

using Tile_Q = SwizzledTile<BLOCK_Q, HEAD_DIM>;
using Tile_KV = SwizzledTile<BLOCK_K, HEAD_DIM>;
__device__ inline int stage(int j) { return STAGES == 2 ? j & 1 : 0; }

// Where registers are short, values that are cheap to recompute (from thread and block indices, from the seed) are recomputed in the loop.
constexpr bool TIGHT = BLOCK_K == 128 ? CAUSAL || MASK || DROPOUT : HEAD_DIM > 64 && (MASK || !DROPOUT || !ROOMY);
__device__ inline int thread_anew() { return TIGHT ? ptx::tid_x() : threadIdx.x; }
__device__ inline uint32_t copying_thread() { return BLOCK_K == 128 || (HEAD_DIM > 64 && !MASK) ? ptx::tid_x() : threadIdx.x; }

#if MASK == MASK_OF_BYTES
using MaskTile = MaskOfBytes<THREADS, ROWS_PER_WARP, BLOCK_K>;
#else
using MaskTile = MaskOfBits<THREADS, ROWS_PER_WARP, BLOCK_K>;
#endif
using Order = MaskTile::Order;  // of keys in a tile
constexpr int SMEM_BYTES = Tile_Q::BYTES + STAGES * (2 * Tile_KV::BYTES + (MASK ? MaskTile::SIZE : 0));

struct Rows {
    int i0, h, b;  // first row of the tile of Q, query head, batch
};
// One block computes BLOCK_Q rows of one head. Causal: the longest rows start first.
__device__ inline Rows rows_of_block(const AttentionParams& p) {
    const int tiles = (p.Nq + BLOCK_Q - 1) / BLOCK_Q, block = ptx::ctaid_x();
    return {(CAUSAL ? tiles - 1 - block % tiles : block % tiles) * BLOCK_Q, block / tiles % p.H, block / tiles / p.H};
}

__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) forward_kernel(const __grid_constant__ AttentionParams p) {
    extern __shared__ __align__(1024) uint8_t smem[];
    const uint32_t Q_smem = ptx::smem_address(smem);            // [BLOCK_Q, HEAD_DIM]
    const uint32_t KV_smem = Q_smem + Tile_Q::BYTES;            // STAGES × (K [BLOCK_K, HEAD_DIM], V [BLOCK_K, HEAD_DIM])
    [[maybe_unused]] uint8_t* mask_smem = smem + Tile_Q::BYTES + STAGES * 2 * Tile_KV::BYTES;  // STAGES × a tile of the mask

    const Rows rows = rows_of_block(p);
    const int i0 = rows.i0, h = rows.h, b = rows.b;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int g = lane / 4, t = lane % 4;              // this lane's row and column pair in an 8×8 fragment
    const int warp_row = warp * ROWS_PER_WARP;         // the warp's first row in the tile
    [[maybe_unused]] const int offset = diagonal(p);   // causal: row i sees columns j ≤ i + offset

    const uint32_t K_head = head_unit(p.k, b, kv_head(p, h)), V_head = head_unit(p.v, b, kv_head(p, h));

    [[maybe_unused]] const uint32_t mask_origin = MASK ? MaskTile::origin(p, b, h, i0, threadIdx.x) : 0;

    // The tiles of columns that some of these rows see, from the first to the last; no others are visited.
#if INTERVAL
    const Bounds seen = bounds_of_rows(p, reinterpret_cast<const Bounds*>(p.workspace), blockIdx.x, i0, BLOCK_Q);  // blocks are tiles in their order
    const int first_tile = seen.some.start / BLOCK_K;
    const int k_tiles = max(first_tile, (seen.some.stop + BLOCK_K - 1) / BLOCK_K);
#else
    const int columns = CAUSAL ? max(0, min(p.Nk, min(i0 + BLOCK_Q, p.Nq) + offset)) : p.Nk;
    constexpr int first_tile = 0;
    const int k_tiles = (columns + BLOCK_K - 1) / BLOCK_K;
#endif

    auto load_K = [&](int j) {
        load_tile<Tile_KV, THREADS, Order>(KV_smem + stage(j) * 2 * Tile_KV::BYTES, p.k, K_head, j * BLOCK_K, p.Nk, p.D, copying_thread());
        if (MASK) MaskTile::copy(mask_smem + stage(j) * MaskTile::SIZE, p, mask_origin, i0, j * BLOCK_K, thread_anew());
    };
    auto load_V = [&](int j) {
        load_tile<Tile_KV, THREADS, Order>(KV_smem + (stage(j) * 2 + 1) * Tile_KV::BYTES, p.v, V_head, j * BLOCK_K, p.Nk, p.Dv, copying_thread());
    };

    if (k_tiles > first_tile) {  // if no row sees anything, nothing is copied: a copy could still arrive when O overwrites Q
        load_tile<Tile_Q, THREADS>(Q_smem, p.q, head_unit(p.q, b, h), i0, p.Nq, p.D, copying_thread());
        load_K(k_tiles - 1);
        if (STAGES == 2) load_V(k_tiles - 1);
    }
    ptx::cp_async_commit_group();

    float O_rmem[M_TILES][O_TILES][4] = {};  // not yet divided by l
    float m_rmem[M_TILES][2], l_rmem[M_TILES][2];  // of rows g and g + 8; l is this lane's share of the sum
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) m_rmem[m][0] = m_rmem[m][1] = SCORE ? LOWEST_LOG2 : p.lowest, l_rmem[m][0] = l_rmem[m][1] = 0;

    const float scale_log2 = SCORE ? 1 : p.scale * LOG2_E;  // exp(scale · x) = 2^(scale_log2 · x); scores that have been through the hook are in base 2
#if SCORE
    const float slope = slope_log2(p, b, h);
#endif
    [[maybe_unused]] const uint2 kept_key = DROPOUT ? dropout_key(p) : uint2{};
    const uint32_t Q_lane = Q_smem + Tile_Q::lane_a(warp_row, lane);

    // One tile of K and V: S, its softmax against the running maximum, and its contribution to O. `cut`: the diagonal or the end of the sequence cuts it.
    auto step = [&](int j, bool cut) {
        const int j0 = j * BLOCK_K;
        const uint32_t K_smem = KV_smem + stage(j) * 2 * Tile_KV::BYTES, V_smem = K_smem + Tile_KV::BYTES;

        // While tile j is in use, the next copies run: of the next K and V into the other stage or, if shared memory has room for only one pair, of
        // this V under Q Kᵀ and of the next K under the rest.
        ptx::cp_async_wait_group<0>();
        __syncthreads();  // K (and V) are there for every thread, and every warp is done with what the next copy overwrites
        if (STAGES == 1) load_V(j);
        if (STAGES == 2 && j > first_tile) load_K(j - 1), load_V(j - 1);
        ptx::cp_async_commit_group();

#if SCORE
        auto query = [&](int m, int r) {
            const int i = i0 + warp_row + 16 * m + 8 * r + g;
            return scored_query(p, b, h, i, i + offset - j0 - 2 * t, slope);
        };
        BiasOfTile<M_TILES, N_TILES> bias_rmem;
        if (BIASED) load_bias_of_rows(bias_rmem, p, j0 + 2 * t, j0 + BLOCK_K <= p.Nk, query);
#endif
        float S_rmem[M_TILES][N_TILES][4] = {};  // S = Q Kᵀ, with accumulators that start from 0 or from the mask
        if (MASK) {
            const int thread = thread_anew();
            [[maybe_unused]] const int first_row_sees = i0 + thread / 32 * ROWS_PER_WARP + thread % 32 / 4 + offset + 1 - j0;  // columns of this tile, causally
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
#if INTERVAL
                    const int row = i0 + thread / 32 * ROWS_PER_WARP + thread % 32 / 4 + 16 * m + 8 * r;
                    const Interval keys = cut ? keys_of_row(p, b, h, row) : Interval{j0, j0 + BLOCK_K};
                    MaskTile::start<true>(S_rmem[m], 2 * r, mask_smem + stage(j) * MaskTile::SIZE, 2 * m + r, cut, keys.stop - j0, thread, keys.start - j0);
#else
                    const int visible = min(p.Nk - j0, first_row_sees + 16 * m + 8 * r);
                    MaskTile::start<CAUSAL>(S_rmem[m], 2 * r, mask_smem + stage(j) * MaskTile::SIZE, 2 * m + r, cut, visible, thread);
#endif
                }
        }
        const uint32_t K_lane = K_smem + Tile_KV::lane_b(0, lane);
#pragma unroll
        for (int d = 0; d < D_STEPS; ++d) {
            uint32_t Q_rmem[M_TILES][4];
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) ptx::ldmatrix_x4(Q_rmem[m], Tile_Q::step(Q_lane, d) + m * 16 * ROW_BYTES);
#pragma unroll
            for (int n = 0; n < N_TILES; n += 2) {
                uint32_t K_rmem[4];
                ptx::ldmatrix_x4(K_rmem, Tile_KV::step(K_lane, d) + n * 8 * ROW_BYTES);
#pragma unroll
                for (int m = 0; m < M_TILES; ++m) {
                    ptx::mma_m16n8k16<element>(S_rmem[m][n], Q_rmem[m], K_rmem[0], K_rmem[1]);
                    ptx::mma_m16n8k16<element>(S_rmem[m][n + 1], Q_rmem[m], K_rmem[2], K_rmem[3]);
                }
            }
        }

#if SCORE
        score_rows(S_rmem, bias_rmem, p, score_units(p), query);
#endif
#if !MASK
        if (cut) {  // Hide scores beyond the diagonal or the end of the sequence.
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
#if INTERVAL
                    const Interval keys = keys_of_row(p, b, h, i0 + warp_row + 16 * m + 8 * r + g);
                    const int from = keys.start - j0 - 2 * t, to = keys.stop - j0 - 2 * t;  // counted from this lane's first column
#pragma unroll
                    for (int n = 0; n < N_TILES; ++n)
#pragma unroll
                        for (int c = 0; c < 2; ++c)
                            if (8 * n + c < from || 8 * n + c >= to) S_rmem[m][n][2 * r + c] = -CUDART_INF_F;
#else
                    const int visible = (CAUSAL ? min(p.Nk, i0 + warp_row + 16 * m + 8 * r + g + offset + 1) : p.Nk) - j0;  // columns from j0 on
#pragma unroll
                    for (int n = 0; n < N_TILES; ++n)
#pragma unroll
                        for (int c = 0; c < 2; ++c)
                            if (8 * n + c >= visible - 2 * t) S_rmem[m][n][2 * r + c] = -CUDART_INF_F;
#endif
                }
        }
#endif

        if (STAGES == 1) {
            ptx::cp_async_wait_group<0>();
            __syncthreads();  // V is there for every thread, and every warp is done with K and the mask's words
            if (j > first_tile) load_K(j - 1);
            ptx::cp_async_commit_group();
        }

        // Online softmax: P overwrites S.
        float alpha[M_TILES][2];
        bool grew = false;
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float m_new = m_rmem[m][r];
#pragma unroll
                for (int n = 0; n < N_TILES; ++n) m_new = fmaxf(m_new, fmaxf(S_rmem[m][n][2 * r], S_rmem[m][n][2 * r + 1]));
                m_new = row_max(m_new);
                alpha[m][r] = ptx::ex2((m_rmem[m][r] - m_new) * scale_log2);
                grew |= m_new > m_rmem[m][r];
                m_rmem[m][r] = m_new;
                const float m_log2 = m_new * scale_log2;
                float sum = 0;
#pragma unroll
                for (int n = 0; n < N_TILES; ++n) {
                    S_rmem[m][n][2 * r] = ptx::ex2(fmaf(S_rmem[m][n][2 * r], scale_log2, -m_log2));
                    S_rmem[m][n][2 * r + 1] = ptx::ex2(fmaf(S_rmem[m][n][2 * r + 1], scale_log2, -m_log2));
                    sum += S_rmem[m][n][2 * r] + S_rmem[m][n][2 * r + 1];
                }
                l_rmem[m][r] = l_rmem[m][r] * alpha[m][r] + sum;
            }
        // If no maximum of the warp's rows has grown, O needs no rescaling. With random scores this becomes common only late in a long row: some maximum
        // of 32 rows grows in 85 % of the steps of 128 keys at N 4096, in 48 % at N 16384 (the n-th step raises a row's maximum with probability 1 / n).
        if (__any_sync(0xffffffff, grew)) {
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int o = 0; o < O_TILES; ++o) {
                    O_rmem[m][o][0] *= alpha[m][0], O_rmem[m][o][1] *= alpha[m][0];
                    O_rmem[m][o][2] *= alpha[m][1], O_rmem[m][o][3] *= alpha[m][1];
                }
        }

        // O += P V, 32 keys at a time, as many as a call of Philox covers. Two calls serve this lane's even and odd columns.
        const uint32_t V_lane = V_smem + Tile_KV::lane_b_trans(lane);
#pragma unroll
        for (int w = 0; w < BLOCK_K / 32; ++w) {
#if DROPOUT
            const uint2 key = TIGHT ? dropout_key(p) : kept_key;
            const int thread = thread_anew();
            const int row_group = global_row(p, (i0 + warp_row) / 32 * 32 + thread % 32 / 4), column_group = global_column(p, j0 + 32 * w + thread % 4 * 2);
            const uint4 even = dropout_bytes(key, b, h, row_group, column_group), odd = dropout_bytes(key, b, h, row_group, column_group + 1);
            uint32_t keep[M_TILES][2][4];  // of rows g and g + 8, for each of four 8-column tiles, the lane's pair of columns
            if (ROWS_PER_WARP == 32 || warp_row % 32 == 0) keep_pairs(keep[0][0], even.x, odd.x, p), keep_pairs(keep[0][1], even.y, odd.y, p);
            else keep_pairs(keep[0][0], even.z, odd.z, p), keep_pairs(keep[0][1], even.w, odd.w, p);
            if (M_TILES == 2) keep_pairs(keep[M_TILES - 1][0], even.z, odd.z, p), keep_pairs(keep[M_TILES - 1][1], even.w, odd.w, p);
#endif
#pragma unroll
            for (int k = 2 * w; k < 2 * w + 2; ++k) {
                uint32_t P_rmem[M_TILES][4];
#pragma unroll
                for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                    for (int half = 0; half < 2; ++half)
#pragma unroll
                        for (int r = 0; r < 2; ++r) {
                            P_rmem[m][2 * half + r] = ptx::cvt_pair<element>(S_rmem[m][2 * k + half][2 * r], S_rmem[m][2 * k + half][2 * r + 1]);
#if DROPOUT
                            P_rmem[m][2 * half + r] &= keep[m][r][(2 * k + half) % 4];
#endif
                        }
#pragma unroll
                for (int o = 0; o < O_TILES; o += 2) {
                    uint32_t V_rmem[4];
                    ptx::ldmatrix_x4_trans(V_rmem, Tile_KV::step(V_lane, o / 2) + k * 16 * ROW_BYTES);
#pragma unroll
                    for (int m = 0; m < M_TILES; ++m) {
                        ptx::mma_m16n8k16<element>(O_rmem[m][o], P_rmem[m], V_rmem[0], V_rmem[1]);
                        ptx::mma_m16n8k16<element>(O_rmem[m][o + 1], P_rmem[m], V_rmem[2], V_rmem[3]);
                    }
                }
            }
        }
    };

    // From right to left: the tiles that the diagonal or the end of the sequence cuts come first; in the others nothing is hidden.
#if INTERVAL
    for (int j = k_tiles - 1; j >= first_tile; --j) step(j, !seen.see_whole(j * BLOCK_K, BLOCK_K));
#else
    const int uncut = min(p.Nk, CAUSAL ? i0 + offset + 1 : p.Nk) / BLOCK_K;  // tiles in which every row sees every column
    for (int j = k_tiles - 1; j >= 0; --j) step(j, j >= uncut);
#endif

    const Rows out = TIGHT ? rows_of_block(p) : rows;
    // O /= l. It is stored by way of Q's buffer in shared memory, each warp in its own rows, so that global stores are 16 bytes wide.
    __syncwarp();  // every lane is done reading Q
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float l = row_sum(l_rmem[m][r]);
            const int row = warp_row + 16 * m + 8 * r + g;
            if (p.lse && t == 0 && out.i0 + row < p.Nq) p.lse[(static_cast<int64_t>(out.b) * p.H + out.h) * p.Nq + out.i0 + row] = m_rmem[m][r] * (SCORE ? LN_2 : p.scale) + logf(l);
#if SCORE
            const float factor = factor_of_scored_row(p, m_rmem[m][r], (DROPOUT ? p.keep_scale : 1.0f) / l);
#else
            const float factor = factor_of_row(p, m_rmem[m][r], scale_log2, (DROPOUT ? p.keep_scale : 1.0f) / l);
#endif
#pragma unroll
            for (int o = 0; o < O_TILES; ++o)
                *reinterpret_cast<uint32_t*>(smem + Tile_Q::offset(row, o) + 4 * t) =
                    ptx::cvt_pair<element>(O_rmem[m][o][2 * r] * factor, O_rmem[m][o][2 * r + 1] * factor);
        }
    __syncwarp();  // the warp's rows are written, by lanes other than those that read them next
    element* O_gmem = head_of(p.o, out.b, out.h);  // [Nq, Dv]
    constexpr int CHUNKS = HEAD_DIM / 8;
#pragma unroll
    for (int chunk = lane; chunk < ROWS_PER_WARP * CHUNKS; chunk += 32) {
        const int row = warp_row + chunk / CHUNKS, column = chunk % CHUNKS * 8;
        if (out.i0 + row < p.Nq && column < p.Dv)
            *reinterpret_cast<uint4*>(O_gmem + (out.i0 + row) * p.o.stride_n + column) =
                *reinterpret_cast<const uint4*>(smem + Tile_Q::offset(row, column / 8));
    }
}

#if INTERVAL
extern "C" int64_t workspace_floats(const AttentionParams* params) { return Summaries::floats(*params, BLOCK_Q, 1, false); }
#else
extern "C" int64_t workspace_floats(const AttentionParams*) { return 0; }
#endif

extern "C" int attention(const AttentionParams* params) {
    const AttentionParams& p = *params;
    const bool fits = units_fit(p.q, p.B, p.H, p.Nq) && units_fit(p.k, p.B, p.Hkv, p.Nk) && units_fit(p.v, p.B, p.Hkv, p.Nk);
    const bool mask_fits = !MASK || units_fit(p.mask.stride_b, p.mask.stride_h, p.mask.stride_i, p.B, p.H, p.Nq, MaskTile::UNIT);
    if (!fits || !mask_fits) return cudaErrorInvalidValue;
    const int64_t blocks = tiles_of(p.Nq, BLOCK_Q) * p.H * p.B;
    if (!numbers_fit(p, {blocks})) return cudaErrorInvalidConfiguration;
    if (p.B == 0 || p.Nq == 0) return cudaSuccess;
    DeviceGuard guard(p.device);
    cudaError_t error = cudaFuncSetAttribute(forward_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SMEM_BYTES);
#if INTERVAL
    if (error == cudaSuccess) error = summarise(p, p.workspace, BLOCK_Q, 0);
#endif
    if (error != cudaSuccess) return error;
    launch_kernel(forward_kernel, static_cast<unsigned>(blocks), THREADS, SMEM_BYTES, p.stream, p);
    return cudaGetLastError();
}

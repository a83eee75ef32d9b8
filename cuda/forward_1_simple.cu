// Forward in float32 arithmetic on CUDA cores: FlashAttention-2 (Dao 2023, arXiv:2307.08691), Algorithm 1.  sm_75 and newer.
//
// The idea: a block of threads keeps O, m and l of a few rows in registers while tiles of K and V pass by. Scores exist one tile at a time:
// S in registers, where its softmax is taken, then P in shared memory, from where it multiplies V. Nothing of size Nq · Nk is ever written.
//
// Change from reference/flash2.py: the same lines, for one tile of rows of one head where PyTorch takes all batches and heads at once; each
// matrix product walks over 32 columns of Q, K or V at a time, so that shared memory suffices for any head size. simple.cuh says which
// thread holds which scores.
//
// Serves everything in the interface: float32, and float16 and bfloat16 converted when loaded and rounded when stored; any head sizes up to
// HEAD_DIM, any strides, any scale. Measured on an H200, float32, B 2, H 8, N 8192, D 64: 30.6 TFLOP/s.
#include <float.h>

#include "simple.cuh"

// ---- tile sizes. A thread keeps ROWS · HEAD_DIM / 8 numbers of O, at most half of its 255 registers.
constexpr int ROWS = HEAD_DIM < 256 ? 4 : 2;  // of a tile, in one thread
constexpr int BLOCK_Q = ROWS * GROUPS;        // 64
constexpr int BLOCK_K = TILE;                 // 64
static_assert(BLOCK_Q == TILE, "summaries of intervals are of this many rows");

// ---- a row's maximum and sum, over the lanes that share it

__device__ inline float row_max(float x) {
#pragma unroll
    for (int distance = 1; distance < LANES; distance *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, distance));
    return x;
}

__device__ inline float row_sum(float x) {
#pragma unroll
    for (int distance = 1; distance < LANES; distance *= 2) x += __shfl_xor_sync(0xffffffff, x, distance);
    return x;
}

__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) forward_kernel(const __grid_constant__ AttentionParams p) {
    __shared__ __align__(16) Chunk<BLOCK_Q> Q_smem;   // [BLOCK_Q, CHUNK] of Qi
    __shared__ __align__(16) Chunk<BLOCK_K> KV_smem;  // [BLOCK_K, CHUNK] of Kj, then of Vj
    __shared__ __align__(16) Scores<BLOCK_Q> P_smem;  // [BLOCK_Q, BLOCK_K]

    // line 3: each block takes one i. Causal: the longest rows start first, so that no long one is left over at the end.
    const int q_tiles = (p.Nq + BLOCK_Q - 1) / BLOCK_Q;
    const int q_tile = CAUSAL ? q_tiles - 1 - blockIdx.x % q_tiles : blockIdx.x % q_tiles;
    const int h = blockIdx.x / q_tiles % p.H, b = blockIdx.x / q_tiles / p.H;
    const int i0 = q_tile * BLOCK_Q;
    if (HEAD_IS_DONE(p, b, kv_head(p, h))) return;
    const Matrix Q = matrix(p.q, b, h, p.Nq, p.D, ROUNDING_OF_Q(p, b, kv_head(p, h)));              // [Nq, D]
    const Matrix K = matrix(p.k, b, kv_head(p, h), p.Nk, p.D, ROUNDING_OF_K(p, b, kv_head(p, h)));  // [Nk, D]
    const Matrix V = matrix(p.v, b, kv_head(p, h), p.Nk, p.Dv);                                     // [Nk, Dv]
    const Matrix O = matrix(p.o, b, h, p.Nq, p.Dv);                                                 // [Nq, Dv]
    const uint8_t* mask_gmem = mask_of(p, b, h);                                                    // [Nq, Nk]

    float O_rmem[CHUNKS][ROWS][4] = {};  // line 5: [c][r][e] is O of row g + GROUPS · r, column 32c + 4t + e; not yet divided by l
    float m_rmem[ROWS], l_rmem[ROWS] = {};
#pragma unroll
    for (int r = 0; r < ROWS; ++r) m_rmem[r] = -FLT_MAX;  // not −∞: a row that has met only hidden scores would compute −∞ − (−∞) = NaN

    // line 6, over the columns that some of these rows see
#if INTERVAL
    const Bounds seen = bounds_of_tile(p, 0, b, h, i0);
    for (int j0 = seen.some.start / BLOCK_K * BLOCK_K; j0 < seen.some.stop; j0 += BLOCK_K) {
        const bool whole = seen.see_whole(j0, BLOCK_K);
#else
    const int columns = stop_of_rows(p, i0, BLOCK_Q);
    for (int j0 = 0; j0 < columns; j0 += BLOCK_K) {
        constexpr bool whole = false;
#endif
        // lines 7 and 8: S = Qi Kjᵀ, the scale going with Qi
        float S_rmem[ROWS][COLUMNS] = {};
        for (int d0 = 0; d0 < p.D; d0 += CHUNK) {
            __syncthreads();  // all threads have finished reading the previous chunks; the next ones overwrite them
            load_chunk<BLOCK_Q>(Q_smem, Q, i0, d0, p.scale);
            load_chunk<BLOCK_K>(KV_smem, K, j0, d0);
            __syncthreads();  // both chunks are complete
            add_product_transposed<ROWS>(S_rmem, Q_smem, KV_smem);
        }

#if SCORE
        float unused_rmem[ROWS][COLUMNS];
        apply_score<false>(S_rmem, unused_rmem, p, b, h, i0, j0);
#endif
        // Hidden before the maximum is taken, so that no hidden score, however large, can push the others towards 0.
        hide<false>(S_rmem, p, mask_gmem, whole, b, h, i0, j0);

        // line 9, a row at a time
        float alpha_rmem[ROWS], P_rmem[ROWS][COLUMNS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            float m_new = S_rmem[r][0], sum = 0;
#pragma unroll
            for (int c = 1; c < COLUMNS; ++c) m_new = fmaxf(m_new, S_rmem[r][c]);
            m_new = fmaxf(m_rmem[r], row_max(m_new));
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) {
                P_rmem[r][c] = expf(S_rmem[r][c] - m_new);
                sum += P_rmem[r][c];
            }
            alpha_rmem[r] = expf(m_rmem[r] - m_new);  // what was summed against the old maximum shrinks by this
            l_rmem[r] = alpha_rmem[r] * l_rmem[r] + row_sum(sum);  // before dropout: softmax is normalised over all that a row may attend
            m_rmem[r] = m_new;
        }
        if (DROPOUT) {
            const uint32_t kept = kept_scores<false, ROWS>(p, b, h, i0, j0);
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) P_rmem[r][c] *= bit(kept, r, c) ? p.keep_scale : 0;
        }
        store_scores(P_smem, P_rmem);

        // line 10: O = diag(alpha) O + P Vj
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            if (c * CHUNK >= p.Dv) break;
            __syncthreads();  // all threads have finished reading the previous chunk of Kj or Vj; this one overwrites it
            load_chunk<BLOCK_K>(KV_smem, V, j0, c * CHUNK);
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
#pragma unroll
                for (int e = 0; e < 4; ++e) O_rmem[c][r][e] *= alpha_rmem[r];
            __syncthreads();  // the chunk is complete
            add_product<ROWS>(O_rmem[c], P_smem, KV_smem);
        }
    }

    // lines 12 and 14: O /= l. l = 0 only where a row may attend nothing: there O = 0 already.
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const bool may_be_dead = MASK || LIMITED || BIASED || p.Nk == 0;  // otherwise every score was −∞, and O is NaN
        const float factor = may_be_dead && l_rmem[r] == 0 ? 0 : 1 / l_rmem[r];
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
            for (int e = 0; e < 4; ++e) O_rmem[c][r][e] *= factor;
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) store_chunk(O, i0, c * CHUNK, O_rmem[c]);

    // lines 13 and 15: LSE = m + log l, −inf where l = 0
    float* LSE_gmem = p.lse + (static_cast<int64_t>(b) * p.H + h) * p.Nq;  // [Nq]
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const int i = i0 + group() + r * GROUPS;
        if (p.lse && lane() == 0 && i < p.Nq) LSE_gmem[i] = m_rmem[r] + logf(l_rmem[r]);
    }
}

#if INTERVAL
extern "C" int64_t workspace_floats(const AttentionParams* params) { return Summaries::floats(*params, BLOCK_Q, 1, false); }
#else
extern "C" int64_t workspace_floats(const AttentionParams*) { return 0; }
#endif

extern "C" int attention(const AttentionParams* params) {
    const AttentionParams& p = *params;
    const int64_t blocks = tiles_of(p.Nq, BLOCK_Q) * p.H * p.B;
    if (!numbers_fit(p, {blocks})) return cudaErrorInvalidConfiguration;
    DeviceGuard guard(p.device);
#if INTERVAL
    if (const cudaError_t error = summarise(p, p.workspace, BLOCK_Q, 0); error != cudaSuccess) return error;
#endif
    return launch(forward_kernel, blocks, THREADS, p);
}

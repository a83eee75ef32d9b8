// Backward in float32 arithmetic on CUDA cores: FlashAttention-2 (Dao 2023, arXiv:2307.08691), Algorithm 2.  sm_75 and newer.
//
// The idea: P is not read back but computed again from Q, K and LSE, a tile at a time. Kernels, one after another:
//     delta_kernel   line 4: Delta = rowsum(dO∘O), the paper's vector D
//     dkv_kernel     a block keeps dK and dV of a few keys in registers while tiles of Q and dO pass by
//     dq_kernel      a block keeps dQ of a few queries in registers while tiles of K and V pass by
//     dbias_kernel   where a bias was added to the scores and its gradient is wanted: a block keeps a tile of it
//
// Change from reference/flash2.py: Algorithm 2 computes all three gradients in one loop with K outside and Q inside, where different j add to
// the same dQi. On a GPU that needs atomics, whose order, and with it the rounding, changes from run to run. Here each gradient has one owner
// and one order of summation, so results repeat bit for bit; the price is that S and dP are computed twice, 7 products instead of 5.
// dkv_kernel works on transposed tiles, Sᵀ = Kj Qiᵀ: then Pᵀ dO and dSᵀ Q are the same product of a tile and a chunk as P V is.
//
// Serves everything in the interface, as forward_1_simple.cu does. Measured on an H200, float32, B 2, H 8, N 8192, D 64: 20.4 TFLOP/s.
//
// One file because its four kernels are the parts of one backward, each a short loop.
#include "simple.cuh"

// ---- tile sizes. A thread keeps 2 · ROWS_KV · HEAD_DIM / 8 numbers of dK and dV, or ROWS_Q · HEAD_DIM / 8 of dQ: at most half of its 255
// registers.
constexpr int ROWS_KV = HEAD_DIM <= 64 ? 4 : HEAD_DIM <= 256 ? 2 : 1;  // keys of a tile, in one thread
constexpr int ROWS_Q = HEAD_DIM <= 128 ? 4 : 2;                        // queries of a tile, in one thread

static_assert(TILE % (ROWS_Q * GROUPS) == 0, "a tile of queries lies within one of TILE rows, of which spans are summarised");

// ---- workspace: Delta of every row, then summaries of spans
__host__ __device__ inline int64_t delta_floats(const AttentionParams& p) { return static_cast<int64_t>(p.B) * p.H * p.Nq; }
#if INTERVAL
__host__ __device__ inline int64_t summaries_offset(const AttentionParams& p) { return whole_chunks(delta_floats(p)); }
#endif

// A row that may attend nothing has LSE = −inf, but P = exp(S − LSE) = 0; so has a row that does not exist.
__device__ inline float lse_of_row(const float* LSE_gmem, int i, int Nq) {
    const float LSE = i < Nq ? LSE_gmem[i] : -CUDART_INF_F;
    return LSE == -CUDART_INF_F ? CUDART_INF_F : LSE;
}

// line 4: Delta = rowsum(dO∘O) − dLSE, a row a thread. ∂LSE/∂S = P, so that dS = P∘(dP − D) + P∘dLSE. Its sum runs in the order of those in
// dP = dO Vᵀ: if a row attends to only one column, O = V, and dP − D is exactly 0, without a rounding error.
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) delta_kernel(const __grid_constant__ AttentionParams p) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;  // of B·H·Nq
    if (row >= static_cast<int64_t>(p.B) * p.H * p.Nq) return;
    const int i = row % p.Nq, h = row / p.Nq % p.H, b = row / p.Nq / p.H;
    if (HEAD_IS_DONE(p, b, kv_head(p, h))) return;
    const element* O_gmem = head_of(p.o, b, h) + i * p.o.stride_n;       // [Dv]
    const element* dO_gmem = head_of(p.d_o, b, h) + i * p.d_o.stride_n;  // [Dv]
    float Delta = 0;
    for (int d0 = 0; d0 < p.Dv; d0 += SUM) {
        float sum = 0;
        for (int d = d0; d < min(d0 + SUM, p.Dv); ++d) sum = fmaf(static_cast<float>(O_gmem[d]), static_cast<float>(dO_gmem[d]), sum);
        Delta += sum;
    }
    if (p.d_lse) Delta -= p.d_lse[row];
    p.workspace[row] = p.lse[row] == -CUDART_INF_F ? 0 : Delta;  // a row that attends nothing: its incoming gradient, even if NaN, is ignored
}

__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) dkv_kernel(const __grid_constant__ AttentionParams p) {
    constexpr int BLOCK_K = ROWS_KV * GROUPS, BLOCK_Q = TILE;
    __shared__ __align__(16) Chunk<BLOCK_K> KV_smem;   // [BLOCK_K, CHUNK] of Kj, then of Vj
    __shared__ __align__(16) Chunk<BLOCK_Q> QdO_smem;  // [BLOCK_Q, CHUNK] of Qi, dOi, dOi again, Qi again
    __shared__ __align__(16) Scores<BLOCK_K> P_smem;   // [BLOCK_K, BLOCK_Q] of (P∘Z)ᵀ, then of dSᵀ

    // line 5: each block takes one j. Causal: the longest columns start first by themselves.
    const int k_tiles = (p.Nk + BLOCK_K - 1) / BLOCK_K;
    const int h_kv = blockIdx.x / k_tiles % p.Hkv, b = blockIdx.x / k_tiles / p.Hkv;
    const int j0 = blockIdx.x % k_tiles * BLOCK_K;
    if (HEAD_IS_DONE(p, b, h_kv)) return;
    const Matrix K = matrix(p.k, b, h_kv, p.Nk, p.D, ROUNDING_OF_K(p, b, h_kv));   // [Nk, D]
    const Matrix V = matrix(p.v, b, h_kv, p.Nk, p.Dv, ROUNDING_OF_V(p, b, h_kv));  // [Nk, Dv]

    float dK_rmem[CHUNKS][ROWS_KV][4] = {}, dV_rmem[CHUNKS][ROWS_KV][4] = {};  // line 7

    // The query heads that read this head of K and V, one after another: their gradients are summed here.
    for (int h = h_kv * (p.H / p.Hkv); h < (h_kv + 1) * (p.H / p.Hkv); ++h) {
        const Matrix Q = matrix(p.q, b, h, p.Nq, p.D, ROUNDING_OF_Q(p, b, h_kv));    // [Nq, D]
        const Matrix dO = matrix(p.d_o, b, h, p.Nq, p.Dv);                           // [Nq, Dv]
        const float* LSE_gmem = p.lse + (static_cast<int64_t>(b) * p.H + h) * p.Nq;  // [Nq]
        const float* Delta_gmem = p.workspace + (LSE_gmem - p.lse);                  // [Nq]
        const uint8_t* mask_gmem = mask_of(p, b, h);                                 // [Nq, Nk]

        // line 8, over the tiles in which some row sees some of these columns
#if INTERVAL
        const Interval tiles = tiles_of_keys(p, j0, BLOCK_K, BLOCK_Q);
        for (int i0 = tiles.start * BLOCK_Q; i0 < tiles.stop * BLOCK_Q; i0 += BLOCK_Q) {
            const Bounds seen = bounds_of_tile(p, summaries_offset(p), b, h, i0);
            if (!seen.see_some(j0, BLOCK_K)) continue;
            const bool whole = seen.see_whole(j0, BLOCK_K);
#else
        for (int i0 = first_row_of(p, j0) / BLOCK_Q * BLOCK_Q; i0 < p.Nq; i0 += BLOCK_Q) {
            constexpr bool whole = false;
#endif
            // lines 9 and 10: Sᵀ = Kj Qiᵀ, the scale going with Qi
            float P_rmem[ROWS_KV][COLUMNS] = {};  // Sᵀ, which (P∘Z)ᵀ will overwrite
            for (int d0 = 0; d0 < p.D; d0 += CHUNK) {
                __syncthreads();  // all threads have finished reading the previous chunks; the next ones overwrite them
                load_chunk<BLOCK_K>(KV_smem, K, j0, d0);
                load_chunk<BLOCK_Q>(QdO_smem, Q, i0, d0, p.scale);
                __syncthreads();  // both chunks are complete
                add_product_transposed<ROWS_KV>(P_rmem, KV_smem, QdO_smem);
            }

            // line 13: dPᵀ = Vj dOiᵀ
            float dS_rmem[ROWS_KV][COLUMNS] = {};  // dPᵀ, which dSᵀ will overwrite
            for (int d0 = 0; d0 < p.Dv; d0 += CHUNK) {
                __syncthreads();  // all threads have finished reading the previous chunks; the next ones overwrite them
                load_chunk<BLOCK_K>(KV_smem, V, j0, d0);
                load_chunk<BLOCK_Q>(QdO_smem, dO, i0, d0);
                __syncthreads();  // both chunks are complete
                add_product_transposed<ROWS_KV>(dS_rmem, KV_smem, QdO_smem);
            }

            // line 11: P = exp(S − LSE), the softmax again, from LSE alone; line 14: dS = P∘(dP∘Z − Delta)
#if SCORE
            float derivative_rmem[ROWS_KV][COLUMNS];
            apply_score<true>(P_rmem, derivative_rmem, p, b, h, j0, i0);
#endif
            hide<true>(P_rmem, p, mask_gmem, whole, b, h, j0, i0);
            const uint32_t kept = DROPOUT ? kept_scores<true, ROWS_KV>(p, b, h, j0, i0) : 0;  // the forward's mask, drawn again
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) {
                const int i = i0 + lane() + c * LANES;
                const float LSE = lse_of_row(LSE_gmem, i, p.Nq), Delta = i < p.Nq ? Delta_gmem[i] : 0;
#pragma unroll
                for (int r = 0; r < ROWS_KV; ++r) {
                    const float P = expf(P_rmem[r][c] - LSE);
                    const float Z = !DROPOUT ? 1 : bit(kept, r, c) ? p.keep_scale : 0;
                    dS_rmem[r][c] = P * (dS_rmem[r][c] * Z - Delta);
#if SCORE
                    if (CAPPED) dS_rmem[r][c] *= derivative_rmem[r][c];
#endif
                    P_rmem[r][c] = P * Z;
                }
            }

            // line 12: dV += (P∘Z)ᵀ dOi
            store_scores(P_smem, P_rmem);
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c) {
                if (c * CHUNK >= p.Dv) break;
                __syncthreads();  // all threads have finished reading the previous chunk; this one overwrites it
                load_chunk<BLOCK_Q>(QdO_smem, dO, i0, c * CHUNK);
                __syncthreads();  // the chunk is complete
                add_product<ROWS_KV>(dV_rmem[c], P_smem, QdO_smem);
            }

            // line 16: dK += dSᵀ Qi, Qi carrying the scale
            store_scores(P_smem, dS_rmem);
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c) {
                if (c * CHUNK >= p.D) break;
                __syncthreads();  // all threads have finished reading the previous chunk; this one overwrites it
                load_chunk<BLOCK_Q>(QdO_smem, Q, i0, c * CHUNK, p.scale);
                __syncthreads();  // the chunk is complete
                add_product<ROWS_KV>(dK_rmem[c], P_smem, QdO_smem);
            }
        }
    }

    // line 18
    const Matrix dK = matrix(p.dk, b, h_kv, p.Nk, p.D);   // [Nk, D]
    const Matrix dV = matrix(p.dv, b, h_kv, p.Nk, p.Dv);  // [Nk, Dv]
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        store_chunk(dK, j0, c * CHUNK, dK_rmem[c]);
        store_chunk(dV, j0, c * CHUNK, dV_rmem[c]);
    }
}

// Lines 10, 11, 13 and 14 once more, with the tile the other way round, for line 15.
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) dq_kernel(const __grid_constant__ AttentionParams p) {
    constexpr int BLOCK_Q = ROWS_Q * GROUPS, BLOCK_K = TILE;
    __shared__ __align__(16) Chunk<BLOCK_Q> QdO_smem;  // [BLOCK_Q, CHUNK] of Qi, then of dOi
    __shared__ __align__(16) Chunk<BLOCK_K> KV_smem;   // [BLOCK_K, CHUNK] of Kj, then of Vj, then of Kj again
    __shared__ __align__(16) Scores<BLOCK_Q> dS_smem;  // [BLOCK_Q, BLOCK_K]

    const int q_tiles = (p.Nq + BLOCK_Q - 1) / BLOCK_Q;
    const int q_tile = CAUSAL ? q_tiles - 1 - blockIdx.x % q_tiles : blockIdx.x % q_tiles;  // causal: the longest rows start first
    const int h = blockIdx.x / q_tiles % p.H, b = blockIdx.x / q_tiles / p.H;
    const int i0 = q_tile * BLOCK_Q;
    if (HEAD_IS_DONE(p, b, kv_head(p, h))) return;
    const Matrix Q = matrix(p.q, b, h, p.Nq, p.D, ROUNDING_OF_Q(p, b, kv_head(p, h)));               // [Nq, D]
    const Matrix K = matrix(p.k, b, kv_head(p, h), p.Nk, p.D, ROUNDING_OF_K(p, b, kv_head(p, h)));   // [Nk, D]
    const Matrix V = matrix(p.v, b, kv_head(p, h), p.Nk, p.Dv, ROUNDING_OF_V(p, b, kv_head(p, h)));  // [Nk, Dv]
    const Matrix dO = matrix(p.d_o, b, h, p.Nq, p.Dv);                                               // [Nq, Dv]
    const float* LSE_gmem = p.lse + (static_cast<int64_t>(b) * p.H + h) * p.Nq;                      // [Nq]
    const float* Delta_gmem = p.workspace + (LSE_gmem - p.lse);                                      // [Nq]
    const uint8_t* mask_gmem = mask_of(p, b, h);                                                     // [Nq, Nk]

    float dQ_rmem[CHUNKS][ROWS_Q][4] = {};  // line 3
    float LSE_rmem[ROWS_Q], Delta_rmem[ROWS_Q];
#pragma unroll
    for (int r = 0; r < ROWS_Q; ++r) {
        const int i = i0 + group() + r * GROUPS;
        LSE_rmem[r] = lse_of_row(LSE_gmem, i, p.Nq);
        Delta_rmem[r] = i < p.Nq ? Delta_gmem[i] : 0;
    }

#if INTERVAL
    const Bounds seen = bounds_of_tile(p, summaries_offset(p), b, h, i0);
    for (int j0 = seen.some.start / BLOCK_K * BLOCK_K; j0 < seen.some.stop; j0 += BLOCK_K) {
        const bool whole = seen.see_whole(j0, BLOCK_K);
#else
    const int columns = stop_of_rows(p, i0, BLOCK_Q);
    for (int j0 = 0; j0 < columns; j0 += BLOCK_K) {
        constexpr bool whole = false;
#endif
        // line 10: S = Qi Kjᵀ
        float S_rmem[ROWS_Q][COLUMNS] = {};
        for (int d0 = 0; d0 < p.D; d0 += CHUNK) {
            __syncthreads();  // all threads have finished reading the previous chunks; the next ones overwrite them
            load_chunk<BLOCK_Q>(QdO_smem, Q, i0, d0, p.scale);
            load_chunk<BLOCK_K>(KV_smem, K, j0, d0);
            __syncthreads();  // both chunks are complete
            add_product_transposed<ROWS_Q>(S_rmem, QdO_smem, KV_smem);
        }

        // line 13: dP = dOi Vjᵀ
        float dS_rmem[ROWS_Q][COLUMNS] = {};  // dP, which dS will overwrite
        for (int d0 = 0; d0 < p.Dv; d0 += CHUNK) {
            __syncthreads();  // all threads have finished reading the previous chunks; the next ones overwrite them
            load_chunk<BLOCK_Q>(QdO_smem, dO, i0, d0);
            load_chunk<BLOCK_K>(KV_smem, V, j0, d0);
            __syncthreads();  // both chunks are complete
            add_product_transposed<ROWS_Q>(dS_rmem, QdO_smem, KV_smem);
        }

        // line 11: P = exp(S − LSE); line 14: dS = P∘(dP∘Z − Delta)
#if SCORE
        float derivative_rmem[ROWS_Q][COLUMNS];
        apply_score<false>(S_rmem, derivative_rmem, p, b, h, i0, j0);
#endif
        hide<false>(S_rmem, p, mask_gmem, whole, b, h, i0, j0);
        const uint32_t kept = DROPOUT ? kept_scores<false, ROWS_Q>(p, b, h, i0, j0) : 0;
#pragma unroll
        for (int r = 0; r < ROWS_Q; ++r)
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) {
                const float P = expf(S_rmem[r][c] - LSE_rmem[r]);
                const float Z = !DROPOUT ? 1 : bit(kept, r, c) ? p.keep_scale : 0;
                dS_rmem[r][c] = P * (dS_rmem[r][c] * Z - Delta_rmem[r]);
#if SCORE
                if (CAPPED) dS_rmem[r][c] *= derivative_rmem[r][c];
#endif
            }

        // line 15: dQ += dS Kj, Kj carrying the scale
        store_scores(dS_smem, dS_rmem);
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            if (c * CHUNK >= p.D) break;
            __syncthreads();  // all threads have finished reading the previous chunk of Vj or Kj; this one overwrites it
            load_chunk<BLOCK_K>(KV_smem, K, j0, c * CHUNK, p.scale);
            __syncthreads();  // the chunk is complete
            add_product<ROWS_Q>(dQ_rmem[c], dS_smem, KV_smem);
        }
    }

    const Matrix dQ = matrix(p.dq, b, h, p.Nq, p.D);  // [Nq, D]
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) store_chunk(dQ, i0, c * CHUNK, dQ_rmem[c]);
}

#if SCORE & SCORE_BIAS
// dBias, in the bias' own shape: the sum of the gradients of all scores that an element of the bias was added to. A block owns a tile of the bias and
// visits, always in the same order, every batch, head, row and column over which it is broadcast. So the sum repeats bit for bit, and nothing larger
// than the bias is written. S and dP are computed a third time.
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) dbias_kernel(const __grid_constant__ AttentionParams p) {
    constexpr int BLOCK_Q = ROWS_Q * GROUPS, BLOCK_K = TILE;
    __shared__ __align__(16) Chunk<BLOCK_Q> QdO_smem;   // [BLOCK_Q, CHUNK] of Qi, then of dOi
    __shared__ __align__(16) Chunk<BLOCK_K> KV_smem;    // [BLOCK_K, CHUNK] of Kj, then of Vj
    __shared__ __align__(16) Scores<BLOCK_Q> sum_smem;  // [BLOCK_Q, BLOCK_K]

    const Scoring& bias = p.scoring;
    const int i_tiles = (bias.bias_i + BLOCK_Q - 1) / BLOCK_Q, j_tiles = (bias.bias_j + BLOCK_K - 1) / BLOCK_K;
    int block = blockIdx.x;
    const int own_j = block % j_tiles * BLOCK_K;
    const int own_i = (block /= j_tiles) % i_tiles * BLOCK_Q;
    const int own_h = (block /= i_tiles) % bias.bias_h, own_b = block / bias.bias_h;
    const bool all_b = bias.bias_b == 1, all_h = bias.bias_h == 1, all_i = bias.bias_i == 1, all_j = bias.bias_j == 1;

    float sum_rmem[ROWS_Q][COLUMNS] = {};
    for (int b = all_b ? 0 : own_b; b < (all_b ? p.B : own_b + 1); ++b)
        for (int h = all_h ? 0 : own_h; h < (all_h ? p.H : own_h + 1); ++h) {
            const Matrix Q = matrix(p.q, b, h, p.Nq, p.D);                               // [Nq, D]
            const Matrix K = matrix(p.k, b, kv_head(p, h), p.Nk, p.D);                   // [Nk, D]
            const Matrix V = matrix(p.v, b, kv_head(p, h), p.Nk, p.Dv);                  // [Nk, Dv]
            const Matrix dO = matrix(p.d_o, b, h, p.Nq, p.Dv);                           // [Nq, Dv]
            const float* LSE_gmem = p.lse + (static_cast<int64_t>(b) * p.H + h) * p.Nq;  // [Nq]
            const float* Delta_gmem = p.workspace + (LSE_gmem - p.lse);                  // [Nq]
            const uint8_t* mask_gmem = mask_of(p, b, h);                                 // [Nq, Nk]
            for (int i0 = all_i ? 0 : own_i; i0 < (all_i ? p.Nq : own_i + 1); i0 += BLOCK_Q) {
                float LSE_rmem[ROWS_Q], Delta_rmem[ROWS_Q];
#pragma unroll
                for (int r = 0; r < ROWS_Q; ++r) {
                    const int i = i0 + group() + r * GROUPS;
                    LSE_rmem[r] = lse_of_row(LSE_gmem, i, p.Nq);
                    Delta_rmem[r] = i < p.Nq ? Delta_gmem[i] : 0;
                }
#if INTERVAL
                const Bounds seen = bounds_of_tile(p, summaries_offset(p), b, h, i0);
#endif
                for (int j0 = all_j ? 0 : own_j; j0 < (all_j ? p.Nk : own_j + 1); j0 += BLOCK_K) {
#if INTERVAL
                    if (!seen.see_some(j0, BLOCK_K)) continue;
                    const bool whole = seen.see_whole(j0, BLOCK_K);
#else
                    if (j0 >= stop_of_rows(p, i0, BLOCK_Q)) continue;  // wholly in the future
                    constexpr bool whole = false;
#endif
                    // Lines 10, 11, 13 and 14, as in dq_kernel; with softcap, without the factor of its derivative.
                    float S_rmem[ROWS_Q][COLUMNS] = {};
                    for (int d0 = 0; d0 < p.D; d0 += CHUNK) {
                        __syncthreads();  // all threads have finished reading the previous chunks; the next ones overwrite them
                        load_chunk<BLOCK_Q>(QdO_smem, Q, i0, d0, p.scale);
                        load_chunk<BLOCK_K>(KV_smem, K, j0, d0);
                        __syncthreads();  // both chunks are complete
                        add_product_transposed<ROWS_Q>(S_rmem, QdO_smem, KV_smem);
                    }

                    float dS_rmem[ROWS_Q][COLUMNS] = {}, derivative_rmem[ROWS_Q][COLUMNS];
                    for (int d0 = 0; d0 < p.Dv; d0 += CHUNK) {
                        __syncthreads();  // all threads have finished reading the previous chunks; the next ones overwrite them
                        load_chunk<BLOCK_Q>(QdO_smem, dO, i0, d0);
                        load_chunk<BLOCK_K>(KV_smem, V, j0, d0);
                        __syncthreads();  // both chunks are complete
                        add_product_transposed<ROWS_Q>(dS_rmem, QdO_smem, KV_smem);
                    }

                    apply_score<false>(S_rmem, derivative_rmem, p, b, h, i0, j0);
                    hide<false>(S_rmem, p, mask_gmem, whole, b, h, i0, j0);
                    const uint32_t kept = DROPOUT ? kept_scores<false, ROWS_Q>(p, b, h, i0, j0) : 0;
#pragma unroll
                    for (int r = 0; r < ROWS_Q; ++r)
#pragma unroll
                        for (int c = 0; c < COLUMNS; ++c) {
                            const float P = expf(S_rmem[r][c] - LSE_rmem[r]);
                            const float Z = !DROPOUT ? 1 : bit(kept, r, c) ? p.keep_scale : 0;
                            sum_rmem[r][c] += P * (dS_rmem[r][c] * Z - Delta_rmem[r]);
                        }
                }
            }
        }

    store_scores(sum_smem, sum_rmem);
    __syncthreads();  // the tile is complete; what follows reads other groups' rows
    const int own_rows = all_i ? 1 : BLOCK_Q, own_columns = all_j ? 1 : BLOCK_K;
    for (int n = threadIdx.x; n < own_rows * own_columns; n += THREADS) {
        const int r = n / own_columns, c = n % own_columns;
        float sum = 0;
        for (int i = r; i < (all_i ? BLOCK_Q : r + 1); ++i) {
            float of_row = 0;  // partial sums are added to a total: the rounding error grows with the length of the longest sum
            for (int j = c; j < (all_j ? BLOCK_K : c + 1); ++j) of_row += sum_smem[i][j];
            sum += of_row;
        }
        if (own_i + r >= bias.bias_i || own_j + c >= bias.bias_j) continue;
        const int64_t row = (static_cast<int64_t>(own_b) * bias.bias_h + own_h) * bias.bias_i + own_i + r;
        store_as(bias.d_bias, bias.bias_type, row * bias.bias_j + own_j + c, sum);
    }
}
#endif

extern "C" int64_t workspace_floats(const AttentionParams* params) {
#if INTERVAL
    if (params->seen.spans) return summaries_offset(*params) + Summaries::floats(*params, TILE, 1, false);
#endif
    return delta_floats(*params);
}

extern "C" int attention(const AttentionParams* params) {
    const AttentionParams& p = *params;
    const int64_t delta_blocks = tiles_of(static_cast<int64_t>(p.B) * p.H * p.Nq, THREADS);
    const int64_t dkv_blocks = tiles_of(p.Nk, ROWS_KV * GROUPS) * p.Hkv * p.B, dq_blocks = tiles_of(p.Nq, ROWS_Q * GROUPS) * p.H * p.B;
#if SCORE & SCORE_BIAS
    const Scoring& bias = p.scoring;
    const int64_t dbias_blocks = tiles_of(bias.bias_i, ROWS_Q * GROUPS) * tiles_of(bias.bias_j, TILE) * bias.bias_h * bias.bias_b;
    if (!numbers_fit(p, {dbias_blocks})) return cudaErrorInvalidConfiguration;
#endif
    if (!numbers_fit(p, {delta_blocks, dkv_blocks, dq_blocks})) return cudaErrorInvalidConfiguration;
    DeviceGuard guard(p.device);
#if INTERVAL
    if (const cudaError_t error = summarise(p, p.workspace + summaries_offset(p), TILE, 0); error != cudaSuccess) return error;
#endif
    cudaError_t error = launch(delta_kernel, delta_blocks, THREADS, p);
    if (error == cudaSuccess) error = launch(dkv_kernel, dkv_blocks, THREADS, p);
    if (error == cudaSuccess) error = launch(dq_kernel, dq_blocks, THREADS, p);
#if SCORE & SCORE_BIAS
    if (error == cudaSuccess && p.scoring.d_bias) error = launch(dbias_kernel, dbias_blocks, THREADS, p);
#endif
    return error;
}

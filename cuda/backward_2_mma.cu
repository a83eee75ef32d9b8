// Backward on tensor cores, and nothing else changed: FlashAttention-2 (Dao 2023, arXiv:2307.08691), Algorithm 2.  sm_80 and newer.
//
// The idea: the three kernels of backward_1_simple.cu with their products done by mma.sync:
//     delta_kernel   line 4: Delta = rowsum(dO∘O), the paper's vector D
//     dkv_kernel     a block keeps dK and dV of a few keys in registers while tiles of Q and dO pass by
//     dq_kernel      a block keeps dQ of a few queries in registers while tiles of K and V pass by
// dkv_kernel works on transposed tiles, Sᵀ = K Qᵀ: then Pᵀ and dSᵀ come out of the accumulators as the A operands of dV += Pᵀ dO and
// dK += dSᵀ Q. In dq_kernel S is not transposed, and dS is the A operand of dQ += dS K. No score passes through memory.
//
// Change from backward_1_simple.cu: the products (mma.cuh). Tiles of 16-bit elements are small enough for the whole head size, so that each
// is loaded once for both products that need it. Every gradient still has one owner and one order of summation, so results repeat bit for
// bit, at the price of 7 products instead of 5; rung 3 computes 5, and adds up dQ by atomics.
//
// Limits: those of forward_2_mma.cu.
#include "mma.cuh"

// ---- tile sizes. A lane keeps HEAD_DIM numbers of dK and dV and VISITED of S and dP, and four tiles must fit in 48 KB.
constexpr int OWNED = WARPS * WARP_ROWS;           // rows that a block computes: 64
constexpr int VISITED = HEAD_DIM <= 64 ? 64 : 32;  // rows of the tiles that pass by
constexpr int N_TILES = VISITED / 8;               // 8-column tiles of S

// A row that may attend nothing has LSE = −inf, but P = exp(S − LSE) = 0; so has a row that does not exist. In base 2.
__device__ inline float lse_of_row(const float* LSE_gmem, int i, int Nq) {
    const float LSE = i < Nq ? LSE_gmem[i] : -CUDART_INF_F;
    return LSE == -CUDART_INF_F ? CUDART_INF_F : LSE * LOG2_E;
}

// line 4: Delta = rowsum(dO∘O) − dLSE, a row a thread. ∂LSE/∂S = P, so that dS = P∘(dP − D) + P∘dLSE.
__global__ void __launch_bounds__(THREADS) delta_kernel(const __grid_constant__ AttentionParams p) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;  // of B·H·Nq
    if (row >= static_cast<int64_t>(p.B) * p.H * p.Nq) return;
    const int i = row % p.Nq, h = row / p.Nq % p.H, b = row / p.Nq / p.H;
    const element* O_gmem = head_of(p.o, b, h) + i * p.o.stride_n;       // [Dv]
    const element* dO_gmem = head_of(p.d_o, b, h) + i * p.d_o.stride_n;  // [Dv]
    float Delta = 0;
    for (int d0 = 0; d0 < p.Dv; d0 += 8) {
        const uint4 O_rmem = *reinterpret_cast<const uint4*>(O_gmem + d0), dO_rmem = *reinterpret_cast<const uint4*>(dO_gmem + d0);
        const element *O = reinterpret_cast<const element*>(&O_rmem), *dO = reinterpret_cast<const element*>(&dO_rmem);
#pragma unroll
        for (int d = 0; d < 8; ++d) Delta = fmaf(static_cast<float>(O[d]), static_cast<float>(dO[d]), Delta);
    }
    if (p.d_lse) Delta -= p.d_lse[row];
    p.workspace[row] = p.lse[row] == -CUDART_INF_F ? 0 : Delta;  // a row that attends nothing: its incoming gradient, even if NaN, is ignored
}

__global__ void __launch_bounds__(THREADS) dkv_kernel(const __grid_constant__ AttentionParams p) {
    constexpr int BLOCK_K = OWNED, BLOCK_Q = VISITED;
    __shared__ __align__(16) Tile<BLOCK_K> K_smem;   // [BLOCK_K, HEAD_DIM]
    __shared__ __align__(16) Tile<BLOCK_K> V_smem;   // [BLOCK_K, HEAD_DIM]
    __shared__ __align__(16) Tile<BLOCK_Q> Q_smem;   // [BLOCK_Q, HEAD_DIM]
    __shared__ __align__(16) Tile<BLOCK_Q> dO_smem;  // [BLOCK_Q, HEAD_DIM]

    // line 5: each block takes one j. Causal: the longest columns start first by themselves.
    const int k_tiles = (p.Nk + BLOCK_K - 1) / BLOCK_K;
    const int h_kv = blockIdx.x / k_tiles % p.Hkv, b = blockIdx.x / k_tiles / p.Hkv;
    const int j0 = blockIdx.x % k_tiles * BLOCK_K;
    const int warp_row = threadIdx.x / 32 * WARP_ROWS, t = threadIdx.x % 4;
    const float scale_log2 = p.scale * LOG2_E;

    load_tile(K_smem, head_of(p.k, b, h_kv), p.k.stride_n, j0, p.Nk, p.D);  // line 6
    load_tile(V_smem, head_of(p.v, b, h_kv), p.v.stride_n, j0, p.Nk, p.Dv);
    float dK_rmem[D_TILES][4] = {}, dV_rmem[D_TILES][4] = {};  // line 7

    // The query heads that read this head of K and V, one after another: their gradients are summed here.
    for (int h = h_kv * (p.H / p.Hkv); h < (h_kv + 1) * (p.H / p.Hkv); ++h) {
        const element* Q_gmem = head_of(p.q, b, h);                                  // [Nq, D]
        const element* dO_gmem = head_of(p.d_o, b, h);                               // [Nq, Dv]
        const float* LSE_gmem = p.lse + (static_cast<int64_t>(b) * p.H + h) * p.Nq;  // [Nq]
        const float* Delta_gmem = p.workspace + (LSE_gmem - p.lse);                  // [Nq]

        // line 8; causal: from the tile of the first row that sees the first of these columns
        for (int i0 = first_row_of(p, j0) / BLOCK_Q * BLOCK_Q; i0 < p.Nq; i0 += BLOCK_Q) {
            // line 9
            __syncthreads();  // all warps have finished reading the previous tiles; the next ones overwrite them
            load_tile(Q_smem, Q_gmem, p.q.stride_n, i0, p.Nq, p.D);
            load_tile(dO_smem, dO_gmem, p.d_o.stride_n, i0, p.Nq, p.Dv);
            __syncthreads();  // Q, dO and, in the first step, K and V are complete

            // lines 10 and 13: Sᵀ = K Qᵀ, dPᵀ = V dOᵀ
            float P_rmem[N_TILES][4] = {}, dS_rmem[N_TILES][4] = {};  // Sᵀ and dPᵀ, which Pᵀ and dSᵀ will overwrite
            add_product_transposed(P_rmem, &K_smem[warp_row], Q_smem);
            add_product_transposed(dS_rmem, &V_smem[warp_row], dO_smem);
            hide<true>(P_rmem, p, j0 + warp_row, i0);

            // line 11: P = exp(S − LSE), the softmax again, from LSE alone; line 14: dS = P∘(dP − Delta)
#pragma unroll
            for (int n = 0; n < N_TILES; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int i = i0 + 8 * n + 2 * t + e;
                    const float LSE = lse_of_row(LSE_gmem, i, p.Nq), Delta = i < p.Nq ? Delta_gmem[i] : 0;
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        P_rmem[n][2 * r + e] = ptx::ex2(fmaf(P_rmem[n][2 * r + e], scale_log2, -LSE));
                        dS_rmem[n][2 * r + e] = P_rmem[n][2 * r + e] * (dS_rmem[n][2 * r + e] - Delta);
                    }
                }

            // lines 12 and 16: dV += Pᵀ dO, dK += dSᵀ Q
            add_product(dV_rmem, P_rmem, dO_smem);
            add_product(dK_rmem, dS_rmem, Q_smem);
        }
    }

    // line 18; times the scale, which Q does not include
    scale_rows(dK_rmem, p.scale, p.scale);
    store_rows(head_of(p.dk, b, h_kv), p.dk.stride_n, j0 + warp_row, p.Nk, p.D, dK_rmem);
    store_rows(head_of(p.dv, b, h_kv), p.dv.stride_n, j0 + warp_row, p.Nk, p.Dv, dV_rmem);
}

// Lines 10, 11, 13 and 14 once more, with the tile the other way round, for line 15.
__global__ void __launch_bounds__(THREADS) dq_kernel(const __grid_constant__ AttentionParams p) {
    constexpr int BLOCK_Q = OWNED, BLOCK_K = VISITED;
    __shared__ __align__(16) Tile<BLOCK_Q> Q_smem;   // [BLOCK_Q, HEAD_DIM]
    __shared__ __align__(16) Tile<BLOCK_Q> dO_smem;  // [BLOCK_Q, HEAD_DIM]
    __shared__ __align__(16) Tile<BLOCK_K> K_smem;   // [BLOCK_K, HEAD_DIM]
    __shared__ __align__(16) Tile<BLOCK_K> V_smem;   // [BLOCK_K, HEAD_DIM]

    const int q_tiles = (p.Nq + BLOCK_Q - 1) / BLOCK_Q;
    const int q_tile = CAUSAL ? q_tiles - 1 - blockIdx.x % q_tiles : blockIdx.x % q_tiles;  // causal: the longest rows start first
    const int h = blockIdx.x / q_tiles % p.H, b = blockIdx.x / q_tiles / p.H;
    const int i0 = q_tile * BLOCK_Q;
    const int warp_row = threadIdx.x / 32 * WARP_ROWS, g = threadIdx.x % 32 / 4;
    const element* K_gmem = head_of(p.k, b, kv_head(p, h));                      // [Nk, D]
    const element* V_gmem = head_of(p.v, b, kv_head(p, h));                      // [Nk, Dv]
    const float* LSE_gmem = p.lse + (static_cast<int64_t>(b) * p.H + h) * p.Nq;  // [Nq]
    const float* Delta_gmem = p.workspace + (LSE_gmem - p.lse);                  // [Nq]
    const float scale_log2 = p.scale * LOG2_E;

    load_tile(Q_smem, head_of(p.q, b, h), p.q.stride_n, i0, p.Nq, p.D);
    load_tile(dO_smem, head_of(p.d_o, b, h), p.d_o.stride_n, i0, p.Nq, p.Dv);
    float dQ_rmem[D_TILES][4] = {};  // line 3
    float LSE_rmem[2], Delta_rmem[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int i = i0 + warp_row + g + 8 * r;
        LSE_rmem[r] = lse_of_row(LSE_gmem, i, p.Nq);
        Delta_rmem[r] = i < p.Nq ? Delta_gmem[i] : 0;
    }

    const int columns = stop_of_rows(p, i0, BLOCK_Q);
    for (int j0 = 0; j0 < columns; j0 += BLOCK_K) {
        __syncthreads();  // all warps have finished reading the previous tiles; the next ones overwrite them
        load_tile(K_smem, K_gmem, p.k.stride_n, j0, p.Nk, p.D);
        load_tile(V_smem, V_gmem, p.v.stride_n, j0, p.Nk, p.Dv);
        __syncthreads();  // K, V and, in the first step, Q and dO are complete

        // lines 10 and 13: S = Q Kᵀ, dP = dO Vᵀ
        float S_rmem[N_TILES][4] = {}, dS_rmem[N_TILES][4] = {};  // S, and dP, which dS will overwrite
        add_product_transposed(S_rmem, &Q_smem[warp_row], K_smem);
        add_product_transposed(dS_rmem, &dO_smem[warp_row], V_smem);
        hide<false>(S_rmem, p, i0 + warp_row, j0);

        // line 11: P = exp(S − LSE); line 14: dS = P∘(dP − Delta)
#pragma unroll
        for (int n = 0; n < N_TILES; ++n)
#pragma unroll
            for (int r = 0; r < 2; ++r)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float P = ptx::ex2(fmaf(S_rmem[n][2 * r + e], scale_log2, -LSE_rmem[r]));
                    dS_rmem[n][2 * r + e] = P * (dS_rmem[n][2 * r + e] - Delta_rmem[r]);
                }

        // line 15: dQ += dS K
        add_product(dQ_rmem, dS_rmem, K_smem);
    }

    scale_rows(dQ_rmem, p.scale, p.scale);
    store_rows(head_of(p.dq, b, h), p.dq.stride_n, i0 + warp_row, p.Nq, p.D, dQ_rmem);
}

extern "C" int64_t workspace_floats(const AttentionParams* params) {
    return static_cast<int64_t>(params->B) * params->H * params->Nq;  // Delta
}

extern "C" int attention(const AttentionParams* params) {
    const AttentionParams& p = *params;
    const int64_t delta_blocks = tiles_of(static_cast<int64_t>(p.B) * p.H * p.Nq, THREADS);
    const int64_t dkv_blocks = tiles_of(p.Nk, OWNED) * p.Hkv * p.B, dq_blocks = tiles_of(p.Nq, OWNED) * p.H * p.B;
    if (!numbers_fit(p, {delta_blocks, dkv_blocks, dq_blocks})) return cudaErrorInvalidConfiguration;
    DeviceGuard guard(p.device);
    cudaError_t error = launch(delta_kernel, delta_blocks, THREADS, p);
    if (error == cudaSuccess) error = launch(dkv_kernel, dkv_blocks, THREADS, p);
    if (error == cudaSuccess) error = launch(dq_kernel, dq_blocks, THREADS, p);
    return error;
}

// Forward on tensor cores, and nothing else changed: FlashAttention-2 (Dao 2023, arXiv:2307.08691), Algorithm 1.  sm_80 and newer.
//
// The idea: one warp instruction, mma.sync, multiplies 16 × 16 by 16 × 8 numbers and replaces the loops of fma. Operands are 16-bit, sums
// float32. Every lane must hold the right elements of each operand; ldmatrix distributes them from shared memory. P does not need it: the
// accumulators of S = Q Kᵀ, rounded to pairs, are already laid out as the A operand of O += P V, so that P never leaves registers.
//
// Change from forward_1_simple.cu: the two products (mma.cuh), and what follows from their layout. A warp owns 16 whole rows; tiles of Q, K
// and V keep their 16-bit type and the whole head size; the scale is applied in the exponent, because scaling Q would round it again. Copies
// do not overlap arithmetic yet: load, barrier, compute, barrier. forward_2b_swizzle.cu removes the bank conflicts of plain rows, and
// forward_2c_cp_async.cu copies under the arithmetic.
//
// Limits: float16 and bfloat16, head sizes up to 128 that are multiples of 8, positive scale, rows that begin at multiples of 16 bytes;
// dense and causal attention with any lengths and grouped heads, but neither a mask nor dropout.
#include "mma.cuh"

constexpr int BLOCK_Q = WARPS * WARP_ROWS;  // 64
constexpr int BLOCK_K = 64;
constexpr int N_TILES = BLOCK_K / 8;  // 8-column tiles of S
constexpr int BLOCKS_PER_SM = 2;      // at least: left to itself, the compiler spills to fit three

__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) forward_kernel(const __grid_constant__ AttentionParams p) {
    __shared__ __align__(16) Tile<BLOCK_Q> Q_smem;  // [BLOCK_Q, HEAD_DIM]
    __shared__ __align__(16) Tile<BLOCK_K> K_smem;  // [BLOCK_K, HEAD_DIM]
    __shared__ __align__(16) Tile<BLOCK_K> V_smem;  // [BLOCK_K, HEAD_DIM]

    // line 3: one block computes BLOCK_Q rows of one head. Causal: the longest rows start first.
    const int q_tiles = (p.Nq + BLOCK_Q - 1) / BLOCK_Q;
    const int q_tile = CAUSAL ? q_tiles - 1 - blockIdx.x % q_tiles : blockIdx.x % q_tiles;
    const int h = blockIdx.x / q_tiles % p.H, b = blockIdx.x / q_tiles / p.H;
    const int i0 = q_tile * BLOCK_Q;
    const int warp_row = threadIdx.x / 32 * WARP_ROWS;       // the warp's first row in the tile
    const element* K_gmem = head_of(p.k, b, kv_head(p, h));  // [Nk, D]
    const element* V_gmem = head_of(p.v, b, kv_head(p, h));  // [Nk, Dv]

    load_tile(Q_smem, head_of(p.q, b, h), p.q.stride_n, i0, p.Nq, p.D);

    float O_rmem[D_TILES][4] = {};                       // line 5; not yet divided by l
    float m_rmem[2] = {p.lowest, p.lowest}, l_rmem[2] = {};  // of rows g and g + 8; l is this lane's share of the sum
    const float scale_log2 = p.scale * LOG2_E;           // exp(scale · x) = 2^(scale_log2 · x)

    // line 6; causal: up to the last column that the last of these rows sees
    const int columns = stop_of_rows(p, i0, BLOCK_Q);
    for (int j0 = 0; j0 < columns; j0 += BLOCK_K) {
        // line 7
        __syncthreads();  // all warps have finished reading the previous tiles; the next ones overwrite them
        load_tile(K_smem, K_gmem, p.k.stride_n, j0, p.Nk, p.D);
        load_tile(V_smem, V_gmem, p.v.stride_n, j0, p.Nk, p.Dv);
        __syncthreads();  // K, V and, in the first step, Q are complete

        // line 8: S = Q Kᵀ
        float S_rmem[N_TILES][4] = {};
        add_product_transposed(S_rmem, &Q_smem[warp_row], K_smem);
        hide<false>(S_rmem, p, i0 + warp_row, j0);

        // line 9: P overwrites S
        float alpha[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float m_new = m_rmem[r];
#pragma unroll
            for (int n = 0; n < N_TILES; ++n) m_new = fmaxf(m_new, fmaxf(S_rmem[n][2 * r], S_rmem[n][2 * r + 1]));
            m_new = fmaxf(m_new, __shfl_xor_sync(0xffffffff, m_new, 1));  // the four lanes of a row
            m_new = fmaxf(m_new, __shfl_xor_sync(0xffffffff, m_new, 2));
            alpha[r] = ptx::ex2((m_rmem[r] - m_new) * scale_log2);  // what was summed against the old maximum shrinks by this
            m_rmem[r] = m_new;
            const float m_log2 = m_new * scale_log2;
            float sum = 0;
#pragma unroll
            for (int n = 0; n < N_TILES; ++n) {
                S_rmem[n][2 * r] = ptx::ex2(fmaf(S_rmem[n][2 * r], scale_log2, -m_log2));
                S_rmem[n][2 * r + 1] = ptx::ex2(fmaf(S_rmem[n][2 * r + 1], scale_log2, -m_log2));
                sum += S_rmem[n][2 * r] + S_rmem[n][2 * r + 1];
            }
            l_rmem[r] = l_rmem[r] * alpha[r] + sum;
        }

        // line 10: O = diag(alpha) O + P V
        scale_rows(O_rmem, alpha[0], alpha[1]);
        add_product(O_rmem, S_rmem, V_smem);
    }

    // lines 12 to 15: O /= l and LSE = m + log l. l = 0 where a row may attend nothing: there LSE = −inf.
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float l = l_rmem[r];
        l += __shfl_xor_sync(0xffffffff, l, 1);
        l += __shfl_xor_sync(0xffffffff, l, 2);
        factor[r] = factor_of_row(p, m_rmem[r], scale_log2, 1 / l);
        const int lane = threadIdx.x % 32, i = i0 + warp_row + 8 * r + lane / 4;
        if (p.lse && lane % 4 == 0 && i < p.Nq) p.lse[(static_cast<int64_t>(b) * p.H + h) * p.Nq + i] = m_rmem[r] * p.scale + logf(l);
    }
    scale_rows(O_rmem, factor[0], factor[1]);
    store_rows(head_of(p.o, b, h), p.o.stride_n, i0 + warp_row, p.Nq, p.Dv, O_rmem);
}

extern "C" int64_t workspace_floats(const AttentionParams*) { return 0; }

extern "C" int attention(const AttentionParams* params) {
    const AttentionParams& p = *params;
    const int64_t blocks = tiles_of(p.Nq, BLOCK_Q) * p.H * p.B;
    if (!numbers_fit(p, {blocks})) return cudaErrorInvalidConfiguration;
    DeviceGuard guard(p.device);
    return launch(forward_kernel, blocks, THREADS, p);
}

// Forward on tensor cores, with copies under the arithmetic: FlashAttention-2 (Dao 2023, arXiv:2307.08691), Algorithm 1.  sm_80 and newer.
//
// The idea: load the next pair of K and V tiles while computing with the present one. cp.async copies from global to shared memory without
// going through registers, and the thread that issues it continues; shared memory holds two stages, one being read and one being filled.
//
// Change from forward_2b_swizzle.cu: load_tile issues cp.async (tensor_core.cuh) instead of loading and storing; K and V have two stages; the loop
// waits for the stage that it needs, then issues the copy of the next. One barrier a step is enough where two were needed: it says both that this
// stage is complete and that every warp has finished with the other one.
//
// Prediction, before any measurement: the wait for a pair of tiles, about 1 µs of latency and L2 bandwidth in a step of 2 to 3 µs, disappears
// behind the products of the same block. About 260 TFLOP/s at D 64, where forward_2b_swizzle.cu is expected to reach 190.
//
// Measured (H200, bfloat16, B 4 H 16 N 4096, dense): 283 TFLOP/s at D 64, 322 at D 128, from 205 and 208. The wait for global memory falls from 0.95 to
// 0.33 cycles an instruction; the gain is larger than predicted at D 128, where fewer blocks were there to hide it.
//
// Limits: as forward_2b_swizzle.cu; tensors up to 64 GB.
#include "mma_swizzled.cuh"
#include "tensor_core.cuh"

constexpr int BLOCK_Q = WARPS * WARP_ROWS;  // 64
constexpr int BLOCK_K = 64;
constexpr int N_TILES = BLOCK_K / 8;  // 8-column tiles of S
constexpr int BLOCKS_PER_SM = 2;      // at least: left to itself, the compiler spills to fit three

using Tile_Q = SwizzledTile<BLOCK_Q, HEAD_DIM>;
using Tile_KV = SwizzledTile<BLOCK_K, HEAD_DIM>;

constexpr int STAGES = 2;  // pairs of K and V tiles
constexpr int SMEM_BYTES = Tile_Q::BYTES + STAGES * 2 * Tile_KV::BYTES;

__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) forward_kernel(const __grid_constant__ AttentionParams p) {
    extern __shared__ __align__(1024) uint8_t smem[];
    const uint32_t Q_smem = ptx::smem_address(smem);           // [BLOCK_Q, HEAD_DIM]
    const uint32_t K_smem = Q_smem + Tile_Q::BYTES;            // STAGES × [BLOCK_K, HEAD_DIM]
    const uint32_t V_smem = K_smem + STAGES * Tile_KV::BYTES;  // STAGES × [BLOCK_K, HEAD_DIM]

    // line 3: one block computes BLOCK_Q rows of one head. Causal: the longest rows start first.
    const int q_tiles = (p.Nq + BLOCK_Q - 1) / BLOCK_Q;
    const int q_tile = CAUSAL ? q_tiles - 1 - blockIdx.x % q_tiles : blockIdx.x % q_tiles;
    const int h = blockIdx.x / q_tiles % p.H, b = blockIdx.x / q_tiles / p.H;
    const int i0 = q_tile * BLOCK_Q;
    const int warp_row = threadIdx.x / 32 * WARP_ROWS;  // the warp's first row in the tile
    const uint32_t K_head = head_unit(p.k, b, kv_head(p, h)), V_head = head_unit(p.v, b, kv_head(p, h));
    // line 7, issued ahead: K and V of a tile into their stage
    auto load_KV = [&](int tile) {
        const int stage = tile % STAGES * Tile_KV::BYTES;
        load_tile<Tile_KV, THREADS>(K_smem + stage, p.k, K_head, tile * BLOCK_K, p.Nk, p.D, threadIdx.x);
        load_tile<Tile_KV, THREADS>(V_smem + stage, p.v, V_head, tile * BLOCK_K, p.Nk, p.Dv, threadIdx.x);
    };

    float O_rmem[D_TILES][4] = {};                       // line 5; not yet divided by l
    float m_rmem[2] = {p.lowest, p.lowest}, l_rmem[2] = {};  // of rows g and g + 8; l is this lane's share of the sum
    const float scale_log2 = p.scale * LOG2_E;           // exp(scale · x) = 2^(scale_log2 · x)

    // line 6; causal: up to the last column that the last of these rows sees
    const int columns = CAUSAL ? min(p.Nk, min(i0 + BLOCK_Q, p.Nq) + p.Nk - p.Nq) : p.Nk;
    const int k_tiles = columns > 0 ? (columns + BLOCK_K - 1) / BLOCK_K : 0;
    if (k_tiles > 0) {
        load_tile<Tile_Q, THREADS>(Q_smem, p.q, head_unit(p.q, b, h), i0, p.Nq, p.D, threadIdx.x);
        load_KV(0);
    }
    ptx::cp_async_commit_group();
    for (int tile = 0; tile < k_tiles; ++tile) {
        const int j0 = tile * BLOCK_K, stage = tile % STAGES * Tile_KV::BYTES;
        ptx::cp_async_wait_group<0>();  // this thread's copies of this tile, and of Q, have arrived
        __syncthreads();                // so have all threads'; and every warp has finished with the tile before, which the next copy overwrites
        if (tile + 1 < k_tiles) load_KV(tile + 1);
        ptx::cp_async_commit_group();

        // line 8: S = Q Kᵀ
        float S_rmem[N_TILES][4] = {};
        add_product_transposed<Tile_Q, Tile_KV>(S_rmem, Q_smem, warp_row, K_smem + stage);
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
        add_product<Tile_KV>(O_rmem, S_rmem, V_smem + stage);
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
    if (!units_fit(p.q, p.B, p.H, p.Nq) || !units_fit(p.k, p.B, p.Hkv, p.Nk) || !units_fit(p.v, p.B, p.Hkv, p.Nk)) return cudaErrorInvalidValue;
    const int64_t blocks = tiles_of(p.Nq, BLOCK_Q) * p.H * p.B;
    if (!numbers_fit(p, {blocks})) return cudaErrorInvalidConfiguration;
    if (blocks == 0) return cudaSuccess;
    DeviceGuard guard(p.device);
    cudaError_t error = cudaFuncSetAttribute(forward_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SMEM_BYTES);
    if (error != cudaSuccess) return error;
    launch_kernel(forward_kernel, static_cast<unsigned>(blocks), THREADS, SMEM_BYTES, p.stream, p);
    return cudaGetLastError();
}

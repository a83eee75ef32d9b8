// Forward with whole tiles copied by tensor map: FlashAttention-2 (Dao 2023, arXiv:2307.08691), Algorithm 1.  sm_90a.
//
// The idea: one thread issues the copy of a whole tile to the copy engine. A tensor map, made on the host, says where a (B, H, N, D) tensor lies and how
// a box of it is swizzled in shared memory; the kernel gives coordinates. No thread computes an address or a bound: elements beyond the tensor arrive as
// zeros. The waiting threads issued no copies, so they cannot wait for groups of copies. Instead a barrier in shared memory counts bytes: the issuing
// thread announces how many will arrive, and the phase completes when they have. A wait names the parity of its phase: 0 the first time, then 1, 0, …
//
// Change from forward_3b_wgmma.cu: load_tile becomes load_boxes, cp.async's groups become one barrier a stage, and the proxy fence goes, since copy
// engine and wgmma see shared memory the same way. The rest is as it was.
//
// Prediction, before any measurement: for a pair of tiles at D 64, each of 128 threads issued 8 copies, with their addresses and bounds: some 60
// instructions per thread, beside about 500 for the softmax. These disappear, and little else changes. About 350 TFLOP/s at D 64, where
// forward_3b_wgmma.cu is expected to reach 330.
//
// Measured (H200, bfloat16, B 4 H 16 N 4096, dense): 448 TFLOP/s at D 64, 507 at D 128, from 411 and 474: 7 to 9 %, as predicted, for 10 % fewer
// instructions.
//
// Limits: as forward_3b_wgmma.cu, but tensors of any size that a map can describe.
#include "tensor_map.cuh"
#include "wgmma.cuh"

constexpr int BLOCK_Q = WARPS * WARP_ROWS;  // 64: the height of a wgmma
constexpr int BLOCK_K = 64;
constexpr int N_TILES = BLOCK_K / 8;  // 8-column tiles of S
constexpr int BLOCKS_PER_SM = 2;

using Tile_Q = SwizzledTile<BLOCK_Q, HEAD_DIM>;
using Tile_KV = SwizzledTile<BLOCK_K, HEAD_DIM>;

constexpr int STAGES = 2;  // pairs of K and V tiles
constexpr int SMEM_BYTES = Tile_Q::BYTES + STAGES * 2 * Tile_KV::BYTES;

struct Maps {
    CUtensorMap q, k, v;
};

// The box of a tile: rows from `row` on of one head. A box has 64 columns, a panel; `full` counts the bytes.
template <class Tile>
__device__ inline void load_boxes(uint32_t X_smem, const CUtensorMap& map, int row, int h, int b, uint32_t full) {
#pragma unroll
    for (int panel = 0; panel < Tile::PANELS; ++panel)
        ptx::cp_async_bulk_tensor_4d(X_smem + panel * Tile::PANEL_BYTES, &map, panel * 64, row, h, b, full);
}

__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    forward_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Maps maps) {
    extern __shared__ __align__(1024) uint8_t smem[];
    __shared__ __align__(8) uint64_t full[STAGES];  // phase n: the n-th pair of tiles in this stage has arrived
    const uint32_t Q_smem = ptx::smem_address(smem);           // [BLOCK_Q, HEAD_DIM]
    const uint32_t K_smem = Q_smem + Tile_Q::BYTES;            // STAGES × [BLOCK_K, HEAD_DIM]
    const uint32_t V_smem = K_smem + STAGES * Tile_KV::BYTES;  // STAGES × [BLOCK_K, HEAD_DIM]

    // line 3: one block computes BLOCK_Q rows of one head. Causal: the longest rows start first.
    const int q_tiles = (p.Nq + BLOCK_Q - 1) / BLOCK_Q;
    const int q_tile = CAUSAL ? q_tiles - 1 - blockIdx.x % q_tiles : blockIdx.x % q_tiles;
    const int h = blockIdx.x / q_tiles % p.H, b = blockIdx.x / q_tiles / p.H;
    const int i0 = q_tile * BLOCK_Q;
    const int warp_row = threadIdx.x / 32 * WARP_ROWS;  // the warp's first row in the tile
    // line 7, issued ahead by one thread: K and V of a tile into their stage. `more_bytes` arrive at the same barrier.
    auto load_KV = [&](int tile, int more_bytes = 0) {
        const int stage = tile % STAGES;
        const uint32_t barrier = ptx::smem_address(full + stage);
        ptx::mbarrier_arrive_expect_tx(barrier, 2 * Tile_KV::BYTES + more_bytes);
        load_boxes<Tile_KV>(K_smem + stage * Tile_KV::BYTES, maps.k, tile * BLOCK_K, kv_head(p, h), b, barrier);
        load_boxes<Tile_KV>(V_smem + stage * Tile_KV::BYTES, maps.v, tile * BLOCK_K, kv_head(p, h), b, barrier);
    };

    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) ptx::mbarrier_init(ptx::smem_address(full + stage), 1);  // one thread arrives, with bytes
        ptx::fence_mbarrier_init();  // the copy engine sees them too
    }
    __syncthreads();  // no thread waits at a barrier that is not initialised yet

    float O_rmem[D_TILES][4] = {};                       // line 5; not yet divided by l
    float m_rmem[2] = {p.lowest, p.lowest}, l_rmem[2] = {};  // of rows g and g + 8; l is this lane's share of the sum
    const float scale_log2 = p.scale * LOG2_E;           // exp(scale · x) = 2^(scale_log2 · x)

    // line 6; causal: up to the last column that the last of these rows sees
    const int columns = CAUSAL ? min(p.Nk, min(i0 + BLOCK_Q, p.Nq) + p.Nk - p.Nq) : p.Nk;
    const int k_tiles = columns > 0 ? (columns + BLOCK_K - 1) / BLOCK_K : 0;
    if (k_tiles > 0 && threadIdx.x == 0) {
        load_KV(0, Tile_Q::BYTES);
        load_boxes<Tile_Q>(Q_smem, maps.q, i0, h, b, ptx::smem_address(full));
    }
    for (int tile = 0; tile < k_tiles; ++tile) {
        const int j0 = tile * BLOCK_K, stage = tile % STAGES * Tile_KV::BYTES;
        __syncthreads();  // every product with the tile before has finished; the next copy overwrites that tile
        if (tile + 1 < k_tiles && threadIdx.x == 0) load_KV(tile + 1);
        ptx::mbarrier_wait(ptx::smem_address(full + tile % STAGES), tile / STAGES & 1);  // this tile, and Q, have arrived

        // line 8: S = Q Kᵀ
        float S_rmem[N_TILES][4];
        issue_product_transposed<Tile_Q, Tile_KV>(S_rmem, Q_smem, K_smem + stage);
        ptx::wgmma_wait_group<0>();
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
        uint32_t P_rmem[BLOCK_K / 16][4];
        round_P(P_rmem, S_rmem);
        issue_product<Tile_KV>(O_rmem, P_rmem, V_smem + stage);
        ptx::wgmma_wait_group<0>();
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
    if (blocks == 0) return cudaSuccess;
    DeviceGuard guard(p.device);
    cudaError_t error = cudaFuncSetAttribute(forward_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SMEM_BYTES);
    Maps maps;
    if (error == cudaSuccess) error = make_tensor_map(&maps.q, p.q, p.B, p.H, p.Nq, p.D, BLOCK_Q);
    if (error == cudaSuccess && p.Nk > 0) error = make_tensor_map(&maps.k, p.k, p.B, p.Hkv, p.Nk, p.D, BLOCK_K);
    if (error == cudaSuccess && p.Nk > 0) error = make_tensor_map(&maps.v, p.v, p.B, p.Hkv, p.Nk, p.Dv, BLOCK_K);
    if (error != cudaSuccess) return error;
    launch_kernel(forward_kernel, static_cast<unsigned>(blocks), THREADS, SMEM_BYTES, p.stream, p, maps);
    return cudaGetLastError();
}

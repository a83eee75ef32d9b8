// Forward with a thread that does nothing but copy: FlashAttention-3 (Shah et al., 2024, arXiv:2407.08608), Algorithm 1.  sm_90a.
//
// The idea: a producer and consumers. Two groups of four warps compute, 64 rows each, and share every tile of K and V. A third group copies: one
// of its threads fills a ring of stages as fast as they are emptied, and never computes. Neither waits for the other at a barrier of the block.
// "Full" barriers count the bytes of the producer's loads; "empty" barriers count the warps that have finished with a stage. A consumer that
// is slow at its softmax no longer holds up the copies, nor the other consumer.
//
// Change from forward_3c_tensor_map.cu: which thread issues the copies, and the "empty" barriers that replace __syncthreads. K and V have separate
// barriers, so that S = Q Kᵀ starts before V has arrived. Registers move too: all threads of a block start with 168; the producer returns most of its
// own, and the consumers take them (setmaxnreg). And since 128 rows share a tile of keys, tiles are larger.
//
// Prediction, before any measurement: half the bytes from L2, and no barrier at which all threads wait; but a multiprocessor has only one block, of two
// computing groups, and nothing makes one group multiply while the other computes exponentials. About 400 TFLOP/s at D 64 and 520 at D 128, where
// forward_3c_tensor_map.cu is expected to reach 350 and 420.
//
// Measured (H200, bfloat16, B 4 H 16 N 4096, dense): 577 TFLOP/s at D 128, from 507, but 409 at D 64, from 448. There the three or four independent
// blocks of tensor_map fill each other's gaps better than two groups that start together.
//
// Limits: as forward_3c_tensor_map.cu.
#include "tensor_core.cuh"
#include "tensor_map.cuh"
#include "wgmma.cuh"

constexpr int GROUP = THREADS;  // what issues a wgmma
constexpr int CONSUMERS = 2;    // groups that compute; group 0 is the producer's
constexpr int BLOCK_THREADS = (1 + CONSUMERS) * GROUP;
constexpr int BLOCK_Q = CONSUMERS * WARPS * WARP_ROWS;  // 128: 64, the height of a wgmma, for each
constexpr int BLOCK_K = 128;
constexpr int N_TILES = BLOCK_K / 8;  // 8-column tiles of S
// Registers of a thread, in steps of 8: all threads start with equally many, then the consumers take what the producer returns.
constexpr int REGISTERS = 65536 / BLOCK_THREADS / 8 * 8;
constexpr int PRODUCER_REGISTERS = 40;
constexpr int CONSUMER_REGISTERS = 232;
static_assert(CONSUMERS * (CONSUMER_REGISTERS - REGISTERS) <= REGISTERS - PRODUCER_REGISTERS, "a group would wait for registers for ever");

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

__global__ void __launch_bounds__(BLOCK_THREADS, 1)
    forward_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Maps maps) {
    extern __shared__ __align__(1024) uint8_t smem[];
    // Phase n of a stage: the n-th tile in it has arrived ("full"), or all consumers have finished with it ("empty").
    __shared__ __align__(8) uint64_t K_full[STAGES], V_full[STAGES], K_empty[STAGES], V_empty[STAGES];
    const uint32_t Q_smem = ptx::smem_address(smem);           // [BLOCK_Q, HEAD_DIM]
    const uint32_t K_smem = Q_smem + Tile_Q::BYTES;            // STAGES × [BLOCK_K, HEAD_DIM]
    const uint32_t V_smem = K_smem + STAGES * Tile_KV::BYTES;  // STAGES × [BLOCK_K, HEAD_DIM]

    // line 3: one block computes BLOCK_Q rows of one head. Causal: the longest rows start first.
    const int q_tiles = (p.Nq + BLOCK_Q - 1) / BLOCK_Q;
    const int q_tile = CAUSAL ? q_tiles - 1 - blockIdx.x % q_tiles : blockIdx.x % q_tiles;
    const int h = blockIdx.x / q_tiles % p.H, b = blockIdx.x / q_tiles / p.H;
    const int i0 = q_tile * BLOCK_Q;
    // line 6; causal: up to the last column that the last of these rows sees
    const int columns = CAUSAL ? min(p.Nk, min(i0 + BLOCK_Q, p.Nq) + p.Nk - p.Nq) : p.Nk;
    const int k_tiles = columns > 0 ? (columns + BLOCK_K - 1) / BLOCK_K : 0;
    auto barrier = [](uint64_t (&of)[STAGES], int tile) { return ptx::smem_address(of + tile % STAGES); };
    auto parity = [](int tile) { return tile / STAGES & 1; };

    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            ptx::mbarrier_init(barrier(K_full, stage), 1);  // the producer arrives, with bytes
            ptx::mbarrier_init(barrier(V_full, stage), 1);
            ptx::mbarrier_init(barrier(K_empty, stage), CONSUMERS * WARPS);  // one lane of every warp arrives
            ptx::mbarrier_init(barrier(V_empty, stage), CONSUMERS * WARPS);
        }
        ptx::fence_mbarrier_init();  // the copy engine sees them too
    }
    __syncthreads();  // no thread waits at a barrier that is not initialised yet

    // Uniform, because descriptors belong in uniform registers.
    const int group = uniform(threadIdx.x / GROUP);
    if (group == 0) {
        // ---- the producer. A wait for "empty" names the phase before the tile's own: in a stage's first round it passes at once.
        ptx::setmaxnreg_dec<PRODUCER_REGISTERS>();
        for (int tile = 0; tile < k_tiles && threadIdx.x == 0; ++tile) {
            // line 7; the first K brings Q with it
            const uint32_t K_arrives = barrier(K_full, tile), V_arrives = barrier(V_full, tile);
            ptx::mbarrier_wait(barrier(K_empty, tile), parity(tile) ^ 1);
            ptx::mbarrier_arrive_expect_tx(K_arrives, Tile_KV::BYTES + (tile == 0 ? Tile_Q::BYTES : 0));
            if (tile == 0) load_boxes<Tile_Q>(Q_smem, maps.q, i0, h, b, K_arrives);
            load_boxes<Tile_KV>(K_smem + tile % STAGES * Tile_KV::BYTES, maps.k, tile * BLOCK_K, kv_head(p, h), b, K_arrives);
            ptx::mbarrier_wait(barrier(V_empty, tile), parity(tile) ^ 1);
            ptx::mbarrier_arrive_expect_tx(V_arrives, Tile_KV::BYTES);
            load_boxes<Tile_KV>(V_smem + tile % STAGES * Tile_KV::BYTES, maps.v, tile * BLOCK_K, kv_head(p, h), b, V_arrives);
        }
        return;
    }
    // ---- the consumers
    ptx::setmaxnreg_inc<CONSUMER_REGISTERS>();
    const int consumer = group - 1;
    const int warp_row = (threadIdx.x - GROUP) / 32 * WARP_ROWS;  // the warp's first row in the tile
    auto release = [&](uint64_t (&empty)[STAGES], int tile) {
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barrier(empty, tile));
    };

    float O_rmem[D_TILES][4] = {};                       // line 5; not yet divided by l
    float m_rmem[2] = {p.lowest, p.lowest}, l_rmem[2] = {};  // of rows g and g + 8; l is this lane's share of the sum
    const float scale_log2 = p.scale * LOG2_E;           // exp(scale · x) = 2^(scale_log2 · x)

    for (int tile = 0; tile < k_tiles; ++tile) {
        const int j0 = tile * BLOCK_K, stage = tile % STAGES * Tile_KV::BYTES;
        ptx::mbarrier_wait(barrier(K_full, tile), parity(tile));  // K of this tile, and Q, have arrived

        // line 8: S = Q Kᵀ
        float S_rmem[N_TILES][4];
        issue_product_transposed<Tile_Q, Tile_KV>(S_rmem, Q_smem + consumer * 64 * ROW_BYTES, K_smem + stage);
        ptx::wgmma_wait_group<0>();
        release(K_empty, tile);
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
        ptx::mbarrier_wait(barrier(V_full, tile), parity(tile));
        issue_product<Tile_KV>(O_rmem, P_rmem, V_smem + stage);
        ptx::wgmma_wait_group<0>();
        release(V_empty, tile);
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
    launch_kernel(forward_kernel, static_cast<unsigned>(blocks), BLOCK_THREADS, SMEM_BYTES, p.stream, p, maps);
    return cudaGetLastError();
}

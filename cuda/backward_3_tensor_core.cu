// Backward on tensor cores with swizzled shared memory and double-buffered copies: FlashAttention-2, Algorithm 2.  sm_80 and newer.
//
// The idea: compute S and dP transposed. The rows of Sᵀ = K Qᵀ in a warp's accumulators are keys: the same rows of dV = Pᵀ dO and dK = dSᵀ Q that
// this warp accumulates. Rounded to pairs they are already laid out as the A operand of those products, so for head sizes up to 64 only dS goes through
// shared memory, for dQ = dS K, which sums over the keys of all warps. Above 64 the accumulators dK and dV of a row no longer fit into one warp: two or
// four warps share the rows, each computes a part of the columns of Sᵀ and a part of the head size, and P goes through shared memory too.
//
// A block owns BLOCK_K keys of one key/value head and visits the tiles of Q (of each query head of the group in turn) that see them. dK and dV stay
// in registers. dQ is summed over the blocks in global memory, in float32, in the order of the accumulators ("fragment order"): a warp then adds 512
// contiguous bytes at a time. A kernel before it prepares Delta and LSE, a kernel after it puts dQ into row order.
//
// Change from backward_2_mma.cu: the swizzle and the stages; one pass with atomic additions to dQ instead of a second pass that recomputes S and dP.
// Limits: float16 and bfloat16, head sizes up to 256 that are multiples of 8, positive scale. dK and dV repeat bit for bit; dQ does only if
// `deterministic` is set, because several blocks' atomic additions happen in any order.
//
// One file because its kernel is one loop, in which the stages, the fragments and dQ's order depend on each other.
#include "score_mma.cuh"
#include "tensor_core.cuh"

// ---- tile sizes. Two blocks of four warps share a multiprocessor up to head size 128: one computes while the other waits at a barrier.
// SMEM_KB, the shared memory a block may have, comes from the build: 227 on sm_90, 163 on sm_80, 99 on sm_86 and sm_89.
#define BLOCK_Q (HEAD_DIM <= 64 || SMEM_KB >= 163 ? 64 : 32)
#define BLOCK_K (HEAD_DIM <= 64 || (HEAD_DIM <= 128 && SMEM_KB >= 163) ? 128 : HEAD_DIM <= 128 || SMEM_KB >= 163 ? 64 : 32)
#define WARPS (HEAD_DIM <= 64 || SMEM_KB < 163 ? 4 : 8)
#define WARPS_K (BLOCK_K >= 64 ? BLOCK_K / 32 : 2)  // warps along the rows of Sᵀ
#define S_STAGES (HEAD_DIM <= 192 && SMEM_KB >= 227 ? 2 : 1)  // tiles of dS and P in shared memory: with two, a step has one barrier
// How many columns of Sᵀ are computed at a time: as many as registers allow.
#define PASS_COLUMNS (ARCH >= 90 && ARCH < 120 && !INTERVAL && !SCORE && !(CAUSAL && MASK && (HEAD_DIM == 64 || (DROPOUT && ARCH > 90))) ? 32 : 16)
#define BIAS_EARLY (!INTERVAL && !DROPOUT && !MASK && (HEAD_DIM <= 64 || ARCH >= 90))  // a bias is loaded before S is computed, if there are enough registers
#define STAGES (HEAD_DIM <= 64 ? 2 : S_STAGES == 2 ? 3 : HEAD_DIM <= 192 || SMEM_KB >= 227 ? 2 : 1)  // tiles of Q and dO
#define DQ_WARPS_Q (HEAD_DIM == 96 && WARPS == 8 ? 4 : 2)  // warps along the rows of dQ, the others along the head size
#define BLOCKS_PER_SM (WARPS == 4 ? 2 : 1)

constexpr int PASS_UNROLL = 1;
constexpr int THREADS = 32 * WARPS;
constexpr int WARPS_Q = WARPS / WARPS_K;             // warps along the columns of Sᵀ, and along the head size of dK and dV
constexpr bool P_IN_REGISTERS = WARPS_Q == 1;
constexpr bool ONE_BARRIER = S_STAGES == 2;
constexpr int K_ROWS = BLOCK_K / WARPS_K;            // rows of Sᵀ, dK and dV that a warp computes
constexpr int M_TILES = K_ROWS / 16;
constexpr int Q_COLUMNS = BLOCK_Q / WARPS_Q < PASS_COLUMNS ? BLOCK_Q / WARPS_Q : PASS_COLUMNS;  // of Sᵀ that a warp computes in one pass
constexpr int PASSES = BLOCK_Q / WARPS_Q / Q_COLUMNS;
constexpr int N_TILES = Q_COLUMNS / 8;
constexpr int D_STEPS = HEAD_DIM / 16;
constexpr int D_TILES = HEAD_DIM / WARPS_Q / 8;      // 8-column tiles of dK and dV in a warp
constexpr int DQ_WARPS_D = WARPS / DQ_WARPS_Q;
constexpr int DQ_M_TILES = BLOCK_Q / DQ_WARPS_Q / 16;
constexpr int DQ_D_TILES = HEAD_DIM / DQ_WARPS_D / 8;

using Tile_K = SwizzledTile<BLOCK_K, HEAD_DIM>;
using Tile_Q = SwizzledTile<BLOCK_Q, HEAD_DIM>;
using Tile_S = SwizzledTile<BLOCK_K, BLOCK_Q>;       // transposed: rows are keys
constexpr int SMEM_BYTES = 2 * Tile_K::BYTES + STAGES * 2 * Tile_Q::BYTES + S_STAGES * (P_IN_REGISTERS ? 1 : 2) * Tile_S::BYTES +
                           STAGES * 2 * BLOCK_Q * static_cast<int>(sizeof(float));

static_assert(SMEM_BYTES <= SMEM_KB * 1024, "choose smaller tiles");
static_assert(BLOCK_Q <= 64, "Sᵀ is addressed as one panel");
static_assert(Q_COLUMNS % 16 == 0 && K_ROWS % 16 == 0 && D_TILES % 2 == 0 && DQ_D_TILES % 2 == 0, "fragments are 16 × 16");
static_assert(!ONE_BARRIER || STAGES == (P_IN_REGISTERS ? 2 : 3), "with one barrier, a tile is overwritten by the tile after next");

constexpr int PADDED_TO = 64;  // rows of a head in the workspace
#include "backward_workspace.cuh"

#include "backward_3_bias.cuh"

// ---- the backward itself

struct Keys {
    int tile, h, b;  // of K, key/value head, batch
};
__device__ inline Keys keys_of_block(const AttentionParams& p) {
    const int tiles = (p.Nk + BLOCK_K - 1) / BLOCK_K, block = ptx::ctaid_x();
    return {block % tiles, block / tiles % p.Hkv, block / tiles / p.Hkv};
}

// exp(scale · x) = 2^(scale_log2 · x). It is a kernel argument: instructions read those from constant memory, without a register.
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) backward_kernel(const __grid_constant__ AttentionParams p, float scale_log2) {
    extern __shared__ __align__(1024) uint8_t smem[];
    const uint32_t K_smem = ptx::smem_address(smem);                      // [BLOCK_K, HEAD_DIM]
    const uint32_t V_smem = K_smem + Tile_K::BYTES;                       // [BLOCK_K, HEAD_DIM]
    const uint32_t QdO_smem = V_smem + Tile_K::BYTES;                     // STAGES × (Q [BLOCK_Q, HEAD_DIM], dO [BLOCK_Q, HEAD_DIM])
    const uint32_t dS_smem = QdO_smem + STAGES * 2 * Tile_Q::BYTES;       // S_STAGES × dSᵀ [BLOCK_K, BLOCK_Q], then as many Pᵀ unless in registers
    constexpr int ROWS_OFFSET = 2 * Tile_K::BYTES + STAGES * 2 * Tile_Q::BYTES + S_STAGES * (P_IN_REGISTERS ? 1 : 2) * Tile_S::BYTES;
    const float* rows_smem = reinterpret_cast<const float*>(smem + ROWS_OFFSET);  // STAGES × (LSE [BLOCK_Q], Delta [BLOCK_Q])

    // line 5: one block computes dK and dV of BLOCK_K keys. Causal: the first keys are seen by the most rows, and start first.
    const Keys keys = keys_of_block(p);
    const int b = keys.b, j0 = keys.tile * BLOCK_K;
    const int warp = uniform(threadIdx.x / 32);
    const int warp_k = warp / WARPS_Q, warp_q = warp % WARPS_Q;
    [[maybe_unused]] const int offset = diagonal(p);                      // causal: row i sees columns j ≤ i + offset
    const Workspace workspace(p);
    // This block's turn to add to dQ, if deterministic, and, for dropout, its batch. They are recomputed: large head sizes leave no registers for them.
    [[maybe_unused]] auto turn = [&] { return HEAD_DIM > 192 ? keys_of_block(p).tile : keys.tile; };
    [[maybe_unused]] auto batch = [&] { return HEAD_DIM > 192 && ARCH > 90 ? keys_of_block(p).b : b; };

    // line 8: the tiles of Q that see some of these keys, of every query head that shares them. Causal: from the last one down, so that the blocks
    // of a head reach the same tile at about the same time and it stays in L2; when blocks take turns (below), this order is required.
    const int q_tiles = (p.Nq + BLOCK_Q - 1) / BLOCK_Q;
    [[maybe_unused]] const int begin = CAUSAL ? q_tiles - 1 : 0, end = CAUSAL ? max(0, j0 - offset) / BLOCK_Q - 1 : q_tiles;
    const int group = p.H / p.Hkv, end_h = (keys.h + 1) * group;
    struct Place {
        int h, tile;  // query head and tile of Q
        int stage;    // where in shared memory
    };
#if INTERVAL
    const Visits visits = {Summaries(p, workspace.summaries(p), BLOCK_Q, BLOCK_K), b, keys.tile, BLOCK_K, end_h};
#endif
    auto advance = [&](Place& at) {
        at.stage = at.stage == STAGES - 1 ? 0 : at.stage + 1;
#if INTERVAL
        --at.tile;
        visits.settle(p, at.h, at.tile);
#else
        at.tile += CAUSAL ? -1 : 1;
        if (at.tile == end) at.tile = begin, ++at.h;
#endif
    };
#if INTERVAL
    Place now = {keys.h * group, 0, 0};
    visits.start(p, now.h, now.tile);
#else
    Place now = {q_tiles > 0 ? keys.h * group : end_h, begin, 0};
#endif

    // line 9: copies the tile that is `steps` ahead.
    auto load_q = [&](int steps) {
        Place ahead = now;
        for (int step = 0; step < steps; ++step) advance(ahead);
        if (ahead.h < end_h) {
            const int i0 = ahead.tile * BLOCK_Q;
            const uint32_t stage = QdO_smem + ahead.stage * 2 * Tile_Q::BYTES;
            load_tile<Tile_Q, THREADS>(stage, p.q, head_unit(p.q, b, ahead.h), i0, p.Nq, p.D, ptx::tid_x());
            load_tile<Tile_Q, THREADS>(stage + Tile_Q::BYTES, p.d_o, head_unit(p.d_o, b, ahead.h), i0, p.Nq, p.Dv, ptx::tid_x());
            constexpr int CHUNKS = BLOCK_Q / 4;  // of 16 bytes in LSE, and as many in Delta
            if (threadIdx.x < 2 * CHUNKS) {
                const float* source = threadIdx.x < CHUNKS ? workspace.LSE : workspace.Delta;
                source += (static_cast<int64_t>(b) * p.H + ahead.h) * workspace.rows + i0 + threadIdx.x % CHUNKS * 4;
                ptx::cp_async_16(K_smem + ROWS_OFFSET + (ahead.stage * 2 * CHUNKS + threadIdx.x) * 16, source, true);
            }
        }
        ptx::cp_async_commit_group();
    };

    // line 6
    load_tile<Tile_K, THREADS>(K_smem, p.k, head_unit(p.k, b, keys.h), j0, p.Nk, p.D, ptx::tid_x());
    load_tile<Tile_K, THREADS>(V_smem, p.v, head_unit(p.v, b, keys.h), j0, p.Nk, p.Dv, ptx::tid_x());
    load_q(0);
    if (STAGES > 1) load_q(1);

    // line 7. A warp's share of the head size is D_TILES / 2 groups of 16 columns, WARPS_Q groups apart.
    float dK_rmem[M_TILES][D_TILES][4] = {}, dV_rmem[M_TILES][D_TILES][4] = {};

    // Where this lane's ldmatrix rows lie, in the products Sᵀ = K Qᵀ and dPᵀ = V dOᵀ, then dV = Pᵀ dO and dK = dSᵀ Q, then dQ = dS K.
    // The part that depends only on the warp is separate: it fits into uniform registers.
    int lane = threadIdx.x % 32;
    const uint32_t K_lane_a = Tile_K::lane_a(0, lane), Q_lane_b = Tile_Q::lane_b(0, lane);
    const uint32_t S_lane_a = Tile_S::lane_a(0, lane), Q_lane_b_trans = Tile_Q::step(Tile_Q::lane_b_trans(lane), warp_q);
    const int dq_row = warp % DQ_WARPS_Q * (16 * DQ_M_TILES), dq_warp_d = warp / DQ_WARPS_Q;
    const uint32_t S_lane_store = Tile_S::offset(lane / 4, warp_q * PASSES * N_TILES) + lane % 4 * 4;  // and where it writes its pairs of Sᵀ
    const uint32_t warp_rows = warp_k * K_ROWS * ROW_BYTES;                              // the warp's rows of K, V and Sᵀ

    ptx::cp_async_wait_group<(STAGES > 1)>();
    __syncthreads();  // K, V and the first tile of Q and dO are there for every thread

    uint32_t dS_stage = dS_smem;  // alternates if there are two
    for (; now.h < end_h; advance(now)) {
        const int i0 = now.tile * BLOCK_Q;
        const uint32_t Q_smem = QdO_smem + now.stage * 2 * Tile_Q::BYTES, dO_smem = Q_smem + Tile_Q::BYTES;
        const float* LSE_smem = rows_smem + now.stage * 2 * BLOCK_Q + warp_q * PASSES * Q_COLUMNS;
        const uint32_t P_smem = dS_stage + S_STAGES * Tile_S::BYTES;
#if INTERVAL
        const bool tile_cut = !visits.bounds(p, now.h, now.tile).see_whole(j0, BLOCK_K);
#else
        const bool tile_cut = j0 + BLOCK_K > min(p.Nk, CAUSAL ? i0 + offset + 1 : p.Nk);  // by the end of the keys or the diagonal
#endif
        const Pair pair = {b, now.h, i0, j0, offset, tile_cut, Q_smem, dO_smem, K_smem, V_smem, LSE_smem, LSE_smem + BLOCK_Q, K_lane_a, Q_lane_b};
#pragma unroll PASS_UNROLL
        for (int pass = 0; pass < PASSES; ++pass) {
            const uint32_t pass_rows = (warp_q * PASSES + pass) * Q_COLUMNS * ROW_BYTES;
            float S_rmem[M_TILES][N_TILES][4] = {}, dP_rmem[M_TILES][N_TILES][4] = {};
            uint32_t P_rmem[M_TILES][N_TILES][2], dS_rmem[M_TILES][N_TILES][2];  // rounded to pairs
            scores_of_part<false>(p, scale_log2, pair, warp_k, warp_q, pass, batch, S_rmem, dP_rmem, [&](int m, int n, int r, float P0, float P1, float dS0, float dS1) {
                dS_rmem[m][n][r] = ptx::cvt_pair<element>(dS0, dS1);
                if (DROPOUT) P0 = fmaxf(P0, 0), P1 = fmaxf(P1, 0);
                P_rmem[m][n][r] = ptx::cvt_pair<element>(P0, P1);
            });

            // dSᵀ, and Pᵀ for warps that share these rows, to shared memory.
#pragma unroll
            for (int n = 0; n < N_TILES; ++n)
#pragma unroll
                for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        const uint32_t place = (S_lane_store ^ ((pass * N_TILES + n) * 16)) + warp_rows + (16 * m + 8 * r) * ROW_BYTES;
                        ptx::st_shared(dS_stage + place, dS_rmem[m][n][r]);
                        if (!P_IN_REGISTERS) ptx::st_shared(P_smem + place, P_rmem[m][n][r]);
                    }

            // lines 12 and 16: dV += Pᵀ dO, dK += dSᵀ Q, the A operands straight from the accumulators
            if (P_IN_REGISTERS) {
                warp_matmul<Q_COLUMNS / 16>(
                    dV_rmem, [&](auto& a, int k, int m) { a[0] = P_rmem[m][2 * k][0], a[1] = P_rmem[m][2 * k][1], a[2] = P_rmem[m][2 * k + 1][0], a[3] = P_rmem[m][2 * k + 1][1]; },
                    [&](auto& b, int k, int n) { ptx::ldmatrix_x4_trans(b, dO_smem + pass_rows + Tile_Q::step(Q_lane_b_trans, n * WARPS_Q) + k * 16 * ROW_BYTES); });
                warp_matmul<Q_COLUMNS / 16>(
                    dK_rmem, [&](auto& a, int k, int m) { a[0] = dS_rmem[m][2 * k][0], a[1] = dS_rmem[m][2 * k][1], a[2] = dS_rmem[m][2 * k + 1][0], a[3] = dS_rmem[m][2 * k + 1][1]; },
                    [&](auto& b, int k, int n) { ptx::ldmatrix_x4_trans(b, Q_smem + pass_rows + Tile_Q::step(Q_lane_b_trans, n * WARPS_Q) + k * 16 * ROW_BYTES); });
            }
        }

        if (ONE_BARRIER) ptx::cp_async_wait_group<0>();  // this thread's part of the next tile
        // All warps have written dSᵀ (and Pᵀ). If this is the only barrier of a step, it also means that the next tile has arrived, and that all warps
        // have finished reading two buffers: the stage that the tile after next is loaded into, and the other dSᵀ, which the next step overwrites.
        __syncthreads();
        if (ONE_BARRIER) load_q(2);

        // lines 12 and 16 through shared memory
        if (!P_IN_REGISTERS) {
            warp_matmul<BLOCK_Q / 16>(
                dV_rmem, [&](auto& a, int k, int m) { ptx::ldmatrix_x4(a, P_smem + warp_rows + Tile_S::step(S_lane_a, k) + m * 16 * ROW_BYTES); },
                [&](auto& b, int k, int n) { ptx::ldmatrix_x4_trans(b, dO_smem + Tile_Q::step(Q_lane_b_trans, n * WARPS_Q) + k * 16 * ROW_BYTES); });
            warp_matmul<BLOCK_Q / 16>(
                dK_rmem, [&](auto& a, int k, int m) { ptx::ldmatrix_x4(a, dS_stage + warp_rows + Tile_S::step(S_lane_a, k) + m * 16 * ROW_BYTES); },
                [&](auto& b, int k, int n) { ptx::ldmatrix_x4_trans(b, Q_smem + Tile_Q::step(Q_lane_b_trans, n * WARPS_Q) + k * 16 * ROW_BYTES); });
        }

        // line 15: dQ += dS K
        float dQ_rmem[DQ_M_TILES][DQ_D_TILES][4] = {};
        lane = ptx::tid_x() % 32;
        const uint32_t S_lane_a_trans = Tile_S::step(Tile_S::lane_a_trans(lane), dq_row / 16);
        const uint32_t K_lane_b_trans = Tile_K::step(Tile_K::lane_b_trans(lane), dq_warp_d);
        warp_matmul<BLOCK_K / 16>(
            dQ_rmem, [&](auto& a, int k, int m) { ptx::ldmatrix_x4_trans(a, dS_stage + Tile_S::step(S_lane_a_trans, m) + k * 16 * ROW_BYTES); },
            [&](auto& b, int k, int n) { ptx::ldmatrix_x4_trans(b, K_smem + Tile_K::step(K_lane_b_trans, n * DQ_WARPS_D) + k * 16 * ROW_BYTES); });

        const int64_t row = (static_cast<int64_t>(b) * p.H + now.h) * workspace.rows + i0;
#if INTERVAL
        auto my_turn = [&] { return visits.turn(p, now.h, now.tile); };
#else
        auto& my_turn = turn;
#endif
        if (p.deterministic) {
            // Blocks add to a tile in the order of their keys. They start in that order too, so the block that is waited for is running or has finished.
            if (threadIdx.x == 0)
                while (ptx::ld_acquire(workspace.turns + row / BLOCK_Q) != my_turn()) {}
            __syncthreads();  // our turn, for every thread
        }
        float* dQ_gmem = workspace.dQ + fragment_offset(row + dq_row, dq_warp_d * 16, lane);
#pragma unroll
        for (int m = 0; m < DQ_M_TILES; ++m)
#pragma unroll
            for (int n = 0; n < DQ_D_TILES; ++n) {
                const float(&x)[4] = dQ_rmem[m][n];
                const int column = (n / 2 * DQ_WARPS_D * 2 + n % 2) * 8;
                ptx::red_add_4(dQ_gmem + fragment_offset(16 * m, column, 0), x[0], x[1], x[2], x[3]);
            }
        if (p.deterministic) {
            __threadfence();  // this thread's additions come before the next block's
            __syncthreads();  // all threads' additions are done
            if (threadIdx.x == 0) ptx::st_release(workspace.turns + row / BLOCK_Q, my_turn() + 1);
        }

        if (ONE_BARRIER) dS_stage ^= dS_smem ^ (dS_smem + Tile_S::BYTES);
        if (!ONE_BARRIER) {
            if (STAGES > 1) ptx::cp_async_wait_group<0>();  // this thread's part of the next tile
            __syncthreads();  // the next tile has arrived; all warps have finished reading this one, dSᵀ and Pᵀ
            load_q(STAGES);
            if (STAGES == 1) {
                ptx::cp_async_wait_group<0>();
                __syncthreads();  // the next tile is there, in the only place
            }
        }
    }

    // line 18: dK and dV are stored by way of the buffers of K and V, so that global stores are 16 bytes wide.
    __syncthreads();  // every warp is done with K and V
    lane = ptx::tid_x() % 32;
    const float dV_scale = DROPOUT ? p.keep_scale : 1.0f, dK_scale = p.scale * dV_scale;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int n = 0; n < D_TILES; ++n) {
                const uint32_t place = Tile_K::offset(warp_k * K_ROWS + 16 * m + 8 * r + lane / 4, (n / 2 * WARPS_Q + warp_q) * 2 + n % 2) + lane % 4 * 4;
                ptx::st_shared(K_smem + place, ptx::cvt_pair<element>(dK_rmem[m][n][2 * r] * dK_scale, dK_rmem[m][n][2 * r + 1] * dK_scale));
                ptx::st_shared(V_smem + place, ptx::cvt_pair<element>(dV_rmem[m][n][2 * r] * dV_scale, dV_rmem[m][n][2 * r + 1] * dV_scale));
            }
    __syncthreads();  // whole rows are written, by threads other than those that read them next
    const Keys out = keys_of_block(p);  // recomputed, so that they need not be kept in registers
    store_tile<Tile_K, THREADS>(head_of(p.dk, out.b, out.h), smem, p.dk.stride_n, out.tile * BLOCK_K, p.Nk, p.D);
    store_tile<Tile_K, THREADS>(head_of(p.dv, out.b, out.h), smem + Tile_K::BYTES, p.dv.stride_n, out.tile * BLOCK_K, p.Nk, p.Dv);
}

extern "C" int64_t workspace_floats(const AttentionParams* params) { return floats_with_copy(*params, Workspace::floats(*params)); }

extern "C" int attention(const AttentionParams* params) {
    const AttentionParams& p = *params;
    const bool q_fits = units_fit(p.q, p.B, p.H, p.Nq) && units_fit(p.d_o, p.B, p.H, p.Nq);
    if (!q_fits || !units_fit(p.k, p.B, p.Hkv, p.Nk) || !units_fit(p.v, p.B, p.Hkv, p.Nk)) return cudaErrorInvalidValue;
    const int64_t all_rows = Workspace::all_rows(p), k_blocks = tiles_of(p.Nk, BLOCK_K) * p.Hkv * p.B;
    if (!numbers_fit(p, {all_rows / PREPARE_ROWS, k_blocks})) return cudaErrorInvalidConfiguration;
#if SCORE & SCORE_BIAS
    if (p.scoring.d_bias && !numbers_fit(p, {BiasPart::count(p.scoring)})) return cudaErrorInvalidConfiguration;
#endif
    DeviceGuard guard(p.device);
    cudaError_t error = cudaFuncSetAttribute(backward_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SMEM_BYTES);
    if (error != cudaSuccess) return error;
#if INTERVAL
    if (error = summarise(p, Workspace(p).summaries(p), BLOCK_Q, BLOCK_K); error != cudaSuccess) return error;
#endif
    const AttentionParams with = with_copy(p, Workspace::floats(p));
    if (!units_fit(with.d_o, p.B, p.H, p.Nq)) return cudaErrorInvalidValue;
    launch_prepare(p, with);
    if (k_blocks > 0) launch_kernel(backward_kernel, static_cast<unsigned>(k_blocks), THREADS, SMEM_BYTES, p.stream, with, p.scale * LOG2_E);
#if SCORE & SCORE_BIAS
    if (p.scoring.d_bias) error = launch_dbias(with);
    if (error != cudaSuccess) return error;
#endif
    launch_finish(p);
    return cudaGetLastError();
}

// The gradient of a bias in the backward of `tensor_core`, in the bias' own shape, after backward_kernel: S and dP are computed again, and dS is summed over
// all dimensions that the bias is broadcast over.
//
// A block owns BLOCK_Q rows × BLOCK_K keys of the bias; all rows, or all keys, if the bias is broadcast over them. It visits every pair of tiles whose
// scores this part is added to, always in the same order, and keeps the sum in registers. So no matrix larger than the bias is written, and results repeat
// bit for bit. If two pairs of tiles fit into shared memory, one is loaded while the other is in use.
//
// A bias that is broadcast over rows and has few keys gives few blocks, each with a long loop.
#pragma once

#include "backward_3_scores.cuh"

#if SCORE & SCORE_BIAS
constexpr int DBIAS_ROWS_AT = 2 * (Tile_K::BYTES + Tile_Q::BYTES);  // of a stage: K and V, Q and dO, then LSE and Delta
constexpr int DBIAS_STAGE_BYTES = DBIAS_ROWS_AT + 2 * BLOCK_Q * static_cast<int>(sizeof(float));
constexpr int DBIAS_STAGES = 2 * DBIAS_STAGE_BYTES <= SMEM_KB * 1024 ? 2 : 1;
constexpr int DBIAS_SMEM_BYTES = DBIAS_STAGES * DBIAS_STAGE_BYTES;
constexpr int SUM_STRIDE = BLOCK_K + 4;  // of a row of sums in shared memory, padded so that lanes write to different banks
static_assert(BLOCK_Q * SUM_STRIDE * static_cast<int>(sizeof(float)) <= DBIAS_STAGE_BYTES, "the sums take a stage's place");

// A block's part of the bias. Keys vary fastest, so that blocks that run at the same time share Q and dO.
struct BiasPart {
    int j0, i0, h, b;

    __device__ explicit BiasPart(const Scoring& bias) {
        const int j_tiles = (bias.bias_j + BLOCK_K - 1) / BLOCK_K, i_tiles = (bias.bias_i + BLOCK_Q - 1) / BLOCK_Q;
        const int block = ptx::ctaid_x(), rest = block / j_tiles;
        j0 = block % j_tiles * BLOCK_K, i0 = rest % i_tiles * BLOCK_Q;
        h = rest / i_tiles % bias.bias_h, b = rest / i_tiles / bias.bias_h;
    }
    static int64_t count(const Scoring& bias) { return tiles_of(bias.bias_j, BLOCK_K) * tiles_of(bias.bias_i, BLOCK_Q) * bias.bias_h * bias.bias_b; }
};

// A pair of tiles: batch, query head, tile of keys, tile of rows; `run`: how many before it had its keys.
struct Visit {
    int b, h, j, i, run;

    __device__ int j0() const { return j * BLOCK_K; }
    __device__ int i0() const { return i * BLOCK_Q; }
#if INTERVAL
    __device__ Bounds bounds(const AttentionParams& p) const {
        const Summaries summaries(p, Workspace(p).summaries(p), BLOCK_Q, BLOCK_K);
        return summaries.of_rows[(static_cast<int64_t>(b) * p.H + h) * summaries.q_tiles + i];
    }
    __device__ bool seen(const AttentionParams& p) const { return bounds(p).see_some(j0(), BLOCK_K); }
    __device__ bool cut(const AttentionParams& p) const { return !bounds(p).see_whole(j0(), BLOCK_K); }
#else
    __device__ bool seen(const AttentionParams& p) const { return j0() < stop_of_rows(p, i0(), BLOCK_Q); }
    __device__ bool cut(const AttentionParams& p) const { return j0() + BLOCK_K > min(p.Nk, CAUSAL ? i0() + diagonal(p) + 1 : p.Nk); }
#endif
};

// The pairs whose scores a part is added to: for each batch, head and tile of keys, the tiles of rows that see some of them.
struct SharedBy {
    const AttentionParams& p;
    const Interval b, h, j, i;

    __device__ SharedBy(const AttentionParams& p, const BiasPart& part)
        : p(p),
          b(p.scoring.bias_b == 1 ? Interval{0, p.B} : Interval{part.b, part.b + 1}),
          h(p.scoring.bias_h == 1 ? Interval{0, p.H} : Interval{part.h, part.h + 1}),
          j(p.scoring.bias_j == 1 ? Interval{0, (p.Nk + BLOCK_K - 1) / BLOCK_K} : Interval{part.j0 / BLOCK_K, part.j0 / BLOCK_K + 1}),
          i(p.scoring.bias_i == 1 ? Interval{0, (p.Nq + BLOCK_Q - 1) / BLOCK_Q} : Interval{part.i0 / BLOCK_Q, part.i0 / BLOCK_Q + 1}) {}

    __device__ Visit first() const {
        const bool none = j.start >= j.stop || i.start >= i.stop;  // no keys, no rows
        return settle({none ? b.stop : b.start, h.start, j.start, i.start, 0});
    }
    __device__ bool has(const Visit& at) const { return at.b < b.stop; }
    __device__ Visit after(const Visit& at) const {
        Visit next = settle(step(at));
        next.run = next.b == at.b && kv_head(p, next.h) == kv_head(p, at.h) && next.j == at.j ? at.run + 1 : 0;
        return next;
    }

private:
    __device__ Visit step(Visit at) const {
        if (++at.i < i.stop) return at;
        at.i = i.start;
        if (++at.j < j.stop) return at;
        at.j = j.start;
        if (++at.h < h.stop) return at;
        at.h = h.start, ++at.b;
        return at;
    }
    __device__ Visit settle(Visit at) const {
        while (has(at) && !at.seen(p)) at = step(at);
        return at;
    }
};

__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) dbias_kernel(const __grid_constant__ AttentionParams p, float scale_log2) {
    // DBIAS_STAGES × (K, V [BLOCK_K, HEAD_DIM], Q, dO [BLOCK_Q, HEAD_DIM], LSE, Delta [BLOCK_Q]); at the end the sums [BLOCK_Q, SUM_STRIDE]
    extern __shared__ __align__(1024) uint8_t smem[];
    const uint32_t stages = ptx::smem_address(smem);
    const Scoring& bias = p.scoring;
    const Workspace workspace(p);
    const int warp = uniform(threadIdx.x / 32), warp_k = warp / WARPS_Q, warp_q = warp % WARPS_Q;

    auto visits = [&] { return SharedBy(p, BiasPart(bias)); };  // recomputed where it is used, which is cheaper than the registers it would take
    auto load = [&](const Visit& at, int stage) {
        if (visits().has(at)) {
            const uint32_t K_smem = stages + stage * DBIAS_STAGE_BYTES, Q_smem = K_smem + 2 * Tile_K::BYTES;
            if (at.run < DBIAS_STAGES) {  // else they lie there already
                const int kv_h = kv_head(p, at.h);
                load_tile<Tile_K, THREADS>(K_smem, p.k, head_unit(p.k, at.b, kv_h), at.j0(), p.Nk, p.D, ptx::tid_x());
                load_tile<Tile_K, THREADS>(K_smem + Tile_K::BYTES, p.v, head_unit(p.v, at.b, kv_h), at.j0(), p.Nk, p.Dv, ptx::tid_x());
            }
            load_tile<Tile_Q, THREADS>(Q_smem, p.q, head_unit(p.q, at.b, at.h), at.i0(), p.Nq, p.D, ptx::tid_x());
            load_tile<Tile_Q, THREADS>(Q_smem + Tile_Q::BYTES, p.d_o, head_unit(p.d_o, at.b, at.h), at.i0(), p.Nq, p.Dv, ptx::tid_x());
            constexpr int CHUNKS = BLOCK_Q / 4;  // of 16 bytes in LSE, and as many in Delta
            if (threadIdx.x < 2 * CHUNKS) {
                const float* source = threadIdx.x < CHUNKS ? workspace.LSE : workspace.Delta;
                source += (static_cast<int64_t>(at.b) * p.H + at.h) * workspace.rows + at.i0() + threadIdx.x % CHUNKS * 4;
                ptx::cp_async_16(K_smem + DBIAS_ROWS_AT + threadIdx.x * 16, source, true);
            }
        }
        ptx::cp_async_commit_group();
    };

    float sum_rmem[PASSES][M_TILES][N_TILES][4] = {};
    Visit now = visits().first();
    load(now, 0);
    for (int stage = 0; visits().has(now); stage = DBIAS_STAGES - 1 - stage) {
        const Visit next = visits().after(now);
        if (DBIAS_STAGES == 2) load(next, 1 - stage);
        ptx::cp_async_wait_group<DBIAS_STAGES - 1>();
        __syncthreads();  // the pair is there, for every thread
        const uint32_t K_smem = stages + stage * DBIAS_STAGE_BYTES, Q_smem = K_smem + 2 * Tile_K::BYTES;
        const int lane = ptx::tid_x() % 32;  // re-read in every visit, to save registers
        const float* LSE_smem =
            reinterpret_cast<const float*>(smem + stage * DBIAS_STAGE_BYTES + DBIAS_ROWS_AT) + warp_q * PASSES * Q_COLUMNS;
        const Pair pair = {now.b,  now.h,    now.i0(), now.j0(),           diagonal(p), now.cut(p), Q_smem, Q_smem + Tile_Q::BYTES, K_smem, K_smem + Tile_K::BYTES,
                           LSE_smem, LSE_smem + BLOCK_Q, Tile_K::lane_a(0, lane), Tile_Q::lane_b(0, lane)};
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            float S_rmem[M_TILES][N_TILES][4] = {}, dP_rmem[M_TILES][N_TILES][4] = {};
            scores_of_part<true>(p, scale_log2, pair, warp_k, warp_q, pass, [&] { return now.b; }, S_rmem, dP_rmem,
                                 [&](int m, int n, int r, float, float, float dS0, float dS1) {
                                     sum_rmem[pass][m][n][2 * r] += dS0;
                                     sum_rmem[pass][m][n][2 * r + 1] += dS1;
                                 });
        }
        __syncthreads();  // all warps have finished reading the pair
        if (DBIAS_STAGES == 1) load(next, 0);
        now = next;
    }

    // Through shared memory, so that rows are stored contiguously, and partial sums over rows or keys can be added.
    const int lane = threadIdx.x % 32;
    float* sum_smem = reinterpret_cast<float*>(smem);  // [BLOCK_Q, SUM_STRIDE]
    const float scale = DROPOUT ? p.keep_scale : 1;    // left out of dS
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass)
#pragma unroll
        for (int n = 0; n < N_TILES; ++n)
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int column = (warp_q * PASSES + pass) * Q_COLUMNS + 8 * n + lane % 4 * 2 + e % 2;
                    const int row = warp_k * K_ROWS + 16 * m + e / 2 * 8 + lane / 4;
                    sum_smem[column * SUM_STRIDE + row] = sum_rmem[pass][m][n][e] * scale;
                }
    __syncthreads();  // all sums are there
    const BiasPart part(bias);
    element* dBias = static_cast<element*>(bias.d_bias) + (static_cast<int64_t>(part.b) * bias.bias_h + part.h) * bias.bias_i * bias.bias_j;
    const bool all_i = bias.bias_i == 1, all_j = bias.bias_j == 1;
    for (int n = threadIdx.x; n < (all_i ? 1 : BLOCK_Q) * BLOCK_K; n += THREADS) {
        const int r = n / BLOCK_K, c = n % BLOCK_K, i = part.i0 + r, j = part.j0 + c;
        if (i >= bias.bias_i || j >= bias.bias_j || (all_j && c > 0)) continue;
        float sum = 0;
        for (int row = r; row < (all_i ? BLOCK_Q : r + 1); ++row) {
            float of_row = 0;
            for (int key = c; key < (all_j ? BLOCK_K : c + 1); ++key) of_row += sum_smem[row * SUM_STRIDE + key];
            sum += of_row;
        }
        dBias[static_cast<int64_t>(i) * bias.bias_j + j] = element(sum);
    }
}

inline cudaError_t launch_dbias(const AttentionParams& p) {
    const int64_t blocks = BiasPart::count(p.scoring);
    if (blocks == 0) return cudaSuccess;
    const cudaError_t error = cudaFuncSetAttribute(dbias_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, DBIAS_SMEM_BYTES);
    if (error == cudaSuccess) launch_kernel(dbias_kernel, static_cast<unsigned>(blocks), THREADS, DBIAS_SMEM_BYTES, p.stream, p, p.scale * LOG2_E);
    return error == cudaSuccess ? cudaGetLastError() : error;
}
#endif

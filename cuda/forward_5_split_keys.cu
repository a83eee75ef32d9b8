// Forward for few rows: the keys split over the multiprocessors ("Flash-Decoding", Dao, Haziza, Massa, Sizov 2023).  sm_80 and newer.
//
// The idea: a generated token is one query against all keys so far. Every byte of K and V is used in only a handful of products, so the lower bound is
// the time to read them once, (bytes of K + V) / bandwidth, and the only task is to keep enough copies in flight. In rungs 3 and 4 a block has a tile
// of 128 rows of one head: 127 of them are empty, K and V are read once for each query head of a group, and B·H blocks share 132 multiprocessors. Here
//
//   - the query heads that share a key head are packed into one tile of 16 or 32 rows, row i · group + g: K and V are read once;
//   - the keys of a head are split over several blocks, each of which writes its O, m and l in float32; a second kernel merges them;
//   - within a block each warp works alone: it takes every fourth step of 32 keys, copies them itself into a ring of tiles (K, V, K, V, …) and
//     keeps its own maximum, sum and O. The loop has no barrier; the warps' results are merged in shared memory at the end.
//
// Change from forward_3_tensor_core.cu: a tile is the query heads of one key head, a block has a part of the keys, each warp its own steps and copies;
// parts are merged twice, in shared memory and by a second kernel.
//
// The number of splits depends only on sizes and on the number of multiprocessors, so results repeat bit for bit.
//
// On sm_90 the merge's blocks are launched while the last blocks of the forward run. The lengths of the sequences may lie in device memory, and the
// keys in pages (KeySource in attention.h); with KEYS_FLOAT8 keys and values are e4m3 numbers with a scale for each key head (sm_89).
//
// One file because it has two kernels that belong together: the second merges what the first writes.
//
// Measured on an H200: 5 to 7 µs more than a kernel that only reads the keys (LOG.md).
//
// Limits: float16 and bfloat16, head sizes up to 256 that are multiples of 8, positive scale. Its backward is rung 3's, which needs only O and LSE.
#include "score_mma.cuh"
#include "tensor_core.cuh"

#ifndef KEYS_FLOAT8
#define KEYS_FLOAT8 0  // 1: k and v are float8 (e4m3), with a scale for each key head
#endif

constexpr int KEYS = 32;  // of a step: as many as one word of the mask, or one call of Philox, covers
// Four, or two where shared memory has no room for two tiles of K and V for each of four warps.
constexpr int WARPS = SMEM_KB < 128 && HEAD_DIM > 128 ? 2 : 4;
constexpr int THREADS = 32 * WARPS;
// Two blocks per multiprocessor where they fit: one block's prologue and epilogue run under the other's copies.
constexpr int BLOCKS_PER_SM = HEAD_DIM <= 64 || (HEAD_DIM <= 128 && SMEM_KB >= 160) ? 2 : 1;
constexpr int MOST_M_TILES = HEAD_DIM <= 128 ? 2 : 1;  // 16-row tiles of Q, as registers allow
constexpr int N_TILES = KEYS / 8;                      // 8-column tiles of S
constexpr int O_TILES = HEAD_DIM / 8;                  // 8-column tiles of O
constexpr int D_STEPS = HEAD_DIM / 16;                 // steps of 16 along the head size, in Q Kᵀ

template <int M_TILES>
using Tile_Q = SwizzledTile<16 * M_TILES, HEAD_DIM>;
using Tile_KV = SwizzledTile<KEYS, KEYS_FLOAT8 ? HEAD_DIM / 2 : HEAD_DIM>;
constexpr int UNIT = KEYS_FLOAT8 ? 16 : 8;  // elements of k and v in 16 bytes

// A warp's ring. One tile is in use while the others are being loaded: at D 128 on sm_90, 2 · 8 KB in each of eight warps, 128 KB per multiprocessor.
// Bandwidth times latency, 25 bytes/ns · 1 µs, is 25 KB.
constexpr int ROOM = (SMEM_KB + 1) * 1024 / BLOCKS_PER_SM - 1024;  // the system reserves 1 KB per block
constexpr int FITTING = (ROOM - Tile_Q<MOST_M_TILES>::BYTES) / (WARPS * Tile_KV::BYTES);
constexpr int SLOTS = FITTING < 6 ? FITTING : 6;
static_assert(SLOTS >= 2, "one tile to compute with, one on its way");

// The warps' partial results, exchanged at the end 16 rows at a time; they overwrite Q and the rings.
constexpr int PADDED = HEAD_DIM + 4;  // so that rows g of the accumulators begin in different banks
struct Merge {
    float O[WARPS][16][PADDED];
    float2 ml[WARPS][16];
};
template <int M_TILES>
constexpr int SMEM_BYTES = Tile_Q<M_TILES>::BYTES + WARPS * SLOTS * Tile_KV::BYTES;
static_assert(sizeof(Merge) <= SMEM_BYTES<1>, "it takes the place of the rings");

struct Call {
    AttentionParams p;
    KeySource keys;
    int rows;    // of a tile of Q: 16 or 32
    int tiles;   // of Q, for each key head
    int splits;  // of the keys
};

// ---- workspace, where keys are split: O [blocks, rows, HEAD_DIM], not divided by l, then m and l [blocks, rows]
__device__ inline float* partial_O(const Call& c, int64_t row) { return c.p.workspace + row * HEAD_DIM; }
__device__ inline float2* partial_ml(const Call& c, int64_t row) {
    const int64_t rows = static_cast<int64_t>(c.p.B) * c.p.Hkv * c.tiles * c.splits * c.rows;
    return reinterpret_cast<float2*>(c.p.workspace + rows * HEAD_DIM) + row;
}

// ---- which keys

// Where a head of k or v begins, in units of 16 bytes.
__device__ inline uint32_t first_unit(const Tensor4& t, int b, int h) { return static_cast<uint32_t>((b * t.stride_b + h * t.stride_h) / UNIT); }

struct Sequence {
    int start, length;  // keys [start, length) may be attended
};
__device__ inline Sequence sequence(const Call& c, int b) {
    return {c.keys.starts ? max(c.keys.starts[b], 0) : 0, c.keys.lengths ? min(max(c.keys.lengths[b], 0), c.p.Nk) : c.p.Nk};
}

// The steps of 32 keys that the last row of a tile of packed rows sees, divided among the splits; the last splits may get none.
struct Steps {
    int limit;  // no key from here on is seen
    int first, count;
    int share;
};
__device__ inline Steps steps_of(const Call& c, const Sequence& keys, int tile) {
    const int group = c.p.H / c.p.Hkv, last_row = min((tile + 1) * c.rows, c.p.Nq * group) - 1;
    const int limit = CAUSAL ? min(keys.length, last_row / group + keys.length - c.p.Nq + 1) : keys.length;
    const int first = keys.start / KEYS, count = max(0, (max(limit, 0) + KEYS - 1) / KEYS - first);
    return {limit, first, count, (count + c.splits - 1) / c.splits};
}

// ---- scales of a key head

struct Scales {
    float score, value;  // of Q Kᵀ and of P V
    float lowest;        // below every sum of products that is not hidden; times score · log2 e it does not overflow

    // Where a running maximum starts, and the factors that convert it to base 2 and to base e.
    __device__ float least_m() const { return SCORE ? LOWEST_LOG2 : lowest; }
    __device__ float m_to_log2() const { return SCORE ? 1 : score * LOG2_E; }
    __device__ float m_to_natural() const { return SCORE ? LN_2 : score; }
};
__device__ inline Scales scales_of(const Call& c, int h_kv) {
#if KEYS_FLOAT8
    const float k = c.keys.k_scale[h_kv], v = c.keys.v_scale[h_kv];
    return {c.p.scale * k, v, c.p.lowest / fmaxf(1, k)};
#else
    return {c.p.scale, 1, c.p.lowest};
#endif
}

// ---- float8 keys and values as operands. A lane's four bytes are columns 4t … 4t + 3 of a row of 16, while a fragment of 16-bit elements holds columns
// 2t, 2t + 1, 2t + 8 and 2t + 9. Q Kᵀ sums over columns, so Q's fragment uses the same order; O's columns are put back in order when they are stored.

#if KEYS_FLOAT8
__device__ inline uint32_t operand_of(uint32_t two) {  // as Q's elements
    const uint32_t halves = ptx::halves_of_float8(two);
    if (DTYPE == FLOAT16) return halves;
    const float2 x = ptx::floats_of_pair(halves);
    return ptx::cvt_pair<element>(x.x, x.y);
}
using probability = __half;  // P and V
#else
using probability = element;
#endif

// ---- the end of a row

// Merges sums that were taken against different maxima.
__device__ inline float weight(const Scales& s, float m, float m_all) { return ptx::ex2((m - m_all) * s.m_to_log2()); }

__device__ inline float final_factor(const Call& c, const Scales& s, int b, float m, float l) {
    const Sequence keys = sequence(c, b);
    if (m == s.least_m() && keys.length <= keys.start) return 0;  // nothing to attend
#if SCORE
    return factor_of_scored_row(c.p, m, (DROPOUT ? c.p.keep_scale : 1.0f) / l) * s.value;
#else
    return factor_of_row(c.p, m == s.lowest ? c.p.lowest : m, s.score * LOG2_E, (DROPOUT ? c.p.keep_scale : 1.0f) / l) * s.value;
#endif
}
__device__ inline void store_lse(const Call& c, const Scales& s, int b, int h, int i, float m, float l) {
    if (c.p.lse) c.p.lse[(static_cast<int64_t>(b) * c.p.H + h) * c.p.Nq + i] = m * s.m_to_natural() + logf(l);
}

// ---- one block: one tile of packed rows against one split of the keys

// ONCE: keys are marked evict-first in the L2 cache.
template <int M_TILES, bool ONCE>
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) forward_kernel(const __grid_constant__ Call c) {
    constexpr int ROWS = 16 * M_TILES;
    extern __shared__ __align__(1024) uint8_t smem[];
    const AttentionParams& p = c.p;
    const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
    const int g = lane / 4, t = lane % 4;                                     // this lane's row and column pair in an 8×8 fragment
    const uint32_t Q_smem = ptx::smem_address(smem);                          // [ROWS, HEAD_DIM]
    const uint32_t ring = Q_smem + Tile_Q<M_TILES>::BYTES + warp * SLOTS * Tile_KV::BYTES;  // SLOTS × [KEYS, HEAD_DIM]

    const int split = blockIdx.x % c.splits, tile = blockIdx.x / c.splits % c.tiles;
    const int head = blockIdx.x / c.splits / c.tiles, h_kv = head % p.Hkv, b = head / p.Hkv;
    const int group = p.H / p.Hkv, rows = p.Nq * group, row0 = tile * ROWS;  // packed rows of a key head, and the tile's first

    if (LAUNCHED_EARLY) ptx::griddepcontrol_launch_dependents();  // once every block has executed this, blocks of the merge kernel may be launched

    const Scales scales = scales_of(c, h_kv);
    const Sequence keys = sequence(c, b);
    const int offset = keys.length - p.Nq;  // causal: row i sees columns j ≤ i + offset
    const Steps steps = steps_of(c, keys, tile);
    const int limit = steps.limit;
    const int begin = split * steps.share, end = min(begin + steps.share, steps.count);
    if (c.splits > 1 && begin >= end) return;  // no keys: the merge skips such splits
    auto step_of = [&](int n) { return steps.first + begin + n * WARPS + warp; };  // the warp's n-th
    const int count = max(0, (end - begin - warp + WARPS - 1) / WARPS);

    for (int n = threadIdx.x; n < ROWS * Tile_Q<M_TILES>::PANELS * 8; n += THREADS) {
        const int row = n / (Tile_Q<M_TILES>::PANELS * 8), chunk = n % (Tile_Q<M_TILES>::PANELS * 8);
        const int i = (row0 + row) / group, h = h_kv * group + (row0 + row) % group;
        ptx::cp_async_16(Q_smem + Tile_Q<M_TILES>::offset(row, chunk), head_of(p.q, b, h) + i * p.q.stride_n + chunk * 8,
                         row0 + row < rows && chunk * 8 < p.D);
    }
    ptx::cp_async_commit_group();

    const uint64_t policy = ONCE ? ptx::createpolicy_evict_first() : 0;
    auto copy = [&](uint32_t to, const void* from, bool valid) {
        if (ONCE) ptx::cp_async_16(to, from, valid, policy);
        else ptx::cp_async_16(to, from, valid);
    };

    // The n-th tile of this warp: K of step n / 2, or V. Where keys lie in pages, lane 2·s + e holds the address of the e-th 16 keys of step s of 16.
    uint32_t page_K = 0, page_V = 0;
    auto load = [&](int n, uint32_t smem) {
        const bool is_K = n % 2 == 0;
        const Tensor4& X = is_K ? p.k : p.v;
        const int D = is_K ? p.D : p.Dv;
        const uint32_t stride = static_cast<uint32_t>(X.stride_n / UNIT);  // offsets are in 16-byte units, as in load_tile
        const int j0 = step_of(n / 2) * KEYS;
        uint32_t from[2];
        if (c.keys.block_table) {
            if (n % 32 == 0) {
                const int j = step_of(n / 2 + lane / 2) * KEYS + lane % 2 * 16;
                const int page = j < limit ? c.keys.block_table[b * c.keys.block_table_stride + j / c.keys.page_size] : 0;
                const int row = j % c.keys.page_size;
                page_K = first_unit(p.k, page, h_kv) + row * static_cast<uint32_t>(p.k.stride_n / UNIT);
                page_V = first_unit(p.v, page, h_kv) + row * static_cast<uint32_t>(p.v.stride_n / UNIT);
            }
#pragma unroll
            for (int e = 0; e < 2; ++e) from[e] = __shfl_sync(0xffffffff, is_K ? page_K : page_V, n % 32 / 2 * 2 + e);
        } else {
            from[0] = first_unit(X, b, h_kv) + j0 * stride, from[1] = from[0] + 16 * stride;
        }
        const int row = lane / 8, chunk = lane % 8;  // eight lanes copy 128 bytes of a row
#pragma unroll
        for (int r = 0; r < KEYS; r += 4)
#pragma unroll
            for (int panel = 0; panel < Tile_KV::PANELS; ++panel)
                // Where not valid, the address may lie outside the tensor; nothing is read there.
                copy(smem + Tile_KV::offset(row + r, panel * 8 + chunk),
                     static_cast<const uint4*>(X.data) + from[r / 16] + (row + r % 16) * stride + panel * 8 + chunk,
                     j0 + row + r < limit && j0 + row + r >= keys.start && panel * 8 * UNIT + chunk * UNIT < D);
    };
    int filled = 0, to_fill = 0;  // tiles whose loads have been issued, and the slot of the next one
    auto fill = [&]() {           // commits even when nothing is left to load, so that tile n is always group n + 1
        if (filled < 2 * count) load(filled, ring + to_fill * Tile_KV::BYTES);
        ptx::cp_async_commit_group();
        ++filled, to_fill = to_fill + 1 == SLOTS ? 0 : to_fill + 1;
    };
    int slot = 0;
    // Waits for the next tile of the ring and returns its address; refills the slot of the previous tile.
    auto next = [&]() {
        ptx::cp_async_wait_group<SLOTS - 2>();
        __syncwarp();  // the tile is visible to every lane, and all have finished reading the previous one, whose slot is refilled
        fill();
        const uint32_t tile = ring + slot * Tile_KV::BYTES;
        slot = slot + 1 == SLOTS ? 0 : slot + 1;
        return tile;
    };
#pragma unroll
    for (int n = 0; n < SLOTS - 1; ++n) fill();

    float O_rmem[M_TILES][O_TILES][4] = {};        // not yet divided by l
    float m_rmem[M_TILES][2], l_rmem[M_TILES][2];  // of rows g and g + 8; l is this lane's share of the sum
    int i_rmem[M_TILES][2];                        // their queries
    [[maybe_unused]] int h_rmem[M_TILES][2];       // and heads
    [[maybe_unused]] float slope_rmem[M_TILES][2];
    [[maybe_unused]] uint32_t hidden_origin[M_TILES][2], hidden_next[M_TILES][2];  // where their words of the mask begin; the words of the next step
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            m_rmem[m][r] = scales.least_m(), l_rmem[m][r] = 0;
            const int row = min(row0 + 16 * m + 8 * r + g, rows - 1);
            i_rmem[m][r] = row / group, h_rmem[m][r] = h_kv * group + row % group;
#if SCORE
            slope_rmem[m][r] = slope_log2(p, b, h_rmem[m][r]);
#endif
            if (MASK) {
                hidden_origin[m][r] =
                    static_cast<uint32_t>(b * p.mask.stride_b + h_rmem[m][r] * p.mask.stride_h + i_rmem[m][r] * p.mask.stride_i);
                hidden_next[m][r] = count ? static_cast<const uint32_t*>(p.mask.data)[hidden_origin[m][r] + step_of(0)] : 0;
            }
        }
    const float scale_log2 = scales.m_to_log2();  // exp(scale · x) = 2^(scale_log2 · x)
#if SCORE
    const ScoreUnits units = {scales.score * LOG2_E, KEYS_FLOAT8 ? scales.score / p.scoring.softcap : p.scoring.scale_in_cap, scales.lowest};
#endif
    [[maybe_unused]] const uint2 key = DROPOUT ? dropout_key(p) : uint2{};

    ptx::cp_async_wait_group<SLOTS - 1>();
    __syncthreads();  // Q is there for every thread

    for (int n = 0; n < count; ++n) {
        const int j0 = step_of(n) * KEYS;

#if SCORE
        auto query = [&](int m, int r) {
            int i = i_rmem[m][r], h = h_rmem[m][r];
            float slope = slope_rmem[m][r];
            if (BIASED && M_TILES > 1) {  // recomputed, so that it takes no registers in the rest of a step
                const int row = min(row0 + 16 * m + 8 * r + static_cast<int>(ptx::tid_x()) % 32 / 4, rows - 1);
                i = row / group, h = h_kv * group + row % group, slope = slope_log2(p, b, h);
            }
            return scored_query(p, b, h, i, i + offset - j0 - 2 * t, slope);
        };
        BiasOfTile<M_TILES, N_TILES> bias_rmem;
        if (BIASED) load_bias_of_rows(bias_rmem, p, j0 + 2 * t, j0 + KEYS <= p.Nk, query);
#endif
        float S_rmem[M_TILES][N_TILES][4] = {};  // S = Q Kᵀ, with accumulators that start from 0 or from the mask
#if MASK
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                start_sums(hidden_next[m][r], t, [&](int k, int e) -> float& { return S_rmem[m][k][2 * r + e]; });
                if (n + 1 < count) hidden_next[m][r] = static_cast<const uint32_t*>(p.mask.data)[hidden_origin[m][r] + step_of(n + 1)];
            }
#endif
        const uint32_t K_smem = next() + Tile_KV::lane_b(0, lane);
#if KEYS_FLOAT8
#pragma unroll
        for (int d = 0; d < D_STEPS; d += 2) {
            uint32_t K_rmem[N_TILES][2];  // the bytes of steps d and d + 1, for each tile of 8 keys
#pragma unroll
            for (int k = 0; k < N_TILES; k += 2) {
                uint32_t x[4];
                ptx::ldmatrix_x4(x, Tile_KV::step(K_smem, d / 2) + k * 8 * ROW_BYTES);
                K_rmem[k][0] = x[0], K_rmem[k][1] = x[1], K_rmem[k + 1][0] = x[2], K_rmem[k + 1][1] = x[3];
            }
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                uint32_t Q_rmem[M_TILES][4];
#pragma unroll
                for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        const uint32_t from = Tile_Q<M_TILES>::offset(16 * m + 8 * r + g, 2 * (d + e) + t / 2) + t % 2 * 8;
                        const uint2 x = *reinterpret_cast<const uint2*>(smem + from);
                        Q_rmem[m][r] = x.x, Q_rmem[m][2 + r] = x.y;
                    }
#pragma unroll
                for (int k = 0; k < N_TILES; ++k) {
                    const uint32_t first = operand_of(K_rmem[k][e] & 0xffff), second = operand_of(K_rmem[k][e] >> 16);
#pragma unroll
                    for (int m = 0; m < M_TILES; ++m) ptx::mma_m16n8k16<element>(S_rmem[m][k], Q_rmem[m], first, second);
                }
            }
        }
#else
#pragma unroll
        for (int d = 0; d < D_STEPS; ++d) {
            uint32_t Q_rmem[M_TILES][4];
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
                ptx::ldmatrix_x4(Q_rmem[m], Tile_Q<M_TILES>::step(Q_smem + Tile_Q<M_TILES>::lane_a(0, lane), d) + m * 16 * ROW_BYTES);
#pragma unroll
            for (int k = 0; k < N_TILES; k += 2) {
                uint32_t K_rmem[4];
                ptx::ldmatrix_x4(K_rmem, Tile_KV::step(K_smem, d) + k * 8 * ROW_BYTES);
#pragma unroll
                for (int m = 0; m < M_TILES; ++m) {
                    ptx::mma_m16n8k16<element>(S_rmem[m][k], Q_rmem[m], K_rmem[0], K_rmem[1]);
                    ptx::mma_m16n8k16<element>(S_rmem[m][k + 1], Q_rmem[m], K_rmem[2], K_rmem[3]);
                }
            }
        }
#endif

#if SCORE
        score_rows(S_rmem, bias_rmem, p, units, query);
#endif
        // Hide scores before the first key, beyond the diagonal and beyond the last key.
        const int first_visible = CAUSAL ? min(limit, row0 / group + offset + 1) : limit;
        if (j0 < keys.start || j0 + KEYS > first_visible) {
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int visible = CAUSAL ? min(limit, i_rmem[m][r] + offset + 1) : limit;
#pragma unroll
                    for (int k = 0; k < N_TILES; ++k)
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            const int j = j0 + 8 * k + 2 * t + e;
                            if (j < keys.start || j >= visible) S_rmem[m][k][2 * r + e] = -CUDART_INF_F;
                        }
                }
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
                for (int k = 0; k < N_TILES; ++k) m_new = fmaxf(m_new, fmaxf(S_rmem[m][k][2 * r], S_rmem[m][k][2 * r + 1]));
                m_new = row_max(m_new);
                alpha[m][r] = ptx::ex2((m_rmem[m][r] - m_new) * scale_log2);
                grew |= m_new > m_rmem[m][r];
                m_rmem[m][r] = m_new;
                const float m_log2 = m_new * scale_log2;
                float sum = 0;
#pragma unroll
                for (int k = 0; k < N_TILES; ++k) {
                    S_rmem[m][k][2 * r] = ptx::ex2(fmaf(S_rmem[m][k][2 * r], scale_log2, -m_log2));
                    S_rmem[m][k][2 * r + 1] = ptx::ex2(fmaf(S_rmem[m][k][2 * r + 1], scale_log2, -m_log2));
                    sum += S_rmem[m][k][2 * r] + S_rmem[m][k][2 * r + 1];
                }
                l_rmem[m][r] = l_rmem[m][r] * alpha[m][r] + sum;
            }
        if (__any_sync(0xffffffff, grew)) {  // a maximum grew
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int o = 0; o < O_TILES; ++o) {
                    O_rmem[m][o][0] *= alpha[m][0], O_rmem[m][o][1] *= alpha[m][0];
                    O_rmem[m][o][2] *= alpha[m][1], O_rmem[m][o][3] *= alpha[m][1];
                }
        }

        // O += P V
        uint32_t P_rmem[M_TILES][KEYS / 16][4];
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                [[maybe_unused]] uint32_t keep[4];  // the lane's pair of columns in each of four 8-column tiles
#if DROPOUT
                const int i = i_rmem[m][r], h = h_rmem[m][r], word = i % 32 / 8;  // neighbouring rows belong to different heads, each with its own bits
                const uint4 even = dropout_bytes(key, b, h, i, j0 + 2 * t), odd = dropout_bytes(key, b, h, i, j0 + 2 * t + 1);
                keep_pairs(keep, word == 0 ? even.x : word == 1 ? even.y : word == 2 ? even.z : even.w,
                           word == 0 ? odd.x : word == 1 ? odd.y : word == 2 ? odd.z : odd.w, p);
#endif
#pragma unroll
                for (int k = 0; k < N_TILES; ++k) {
                    uint32_t pair = ptx::cvt_pair<probability>(S_rmem[m][k][2 * r], S_rmem[m][k][2 * r + 1]);
                    if (DROPOUT) pair &= keep[k];
                    P_rmem[m][k / 2][k % 2 * 2 + r] = pair;
                }
            }
        const uint32_t V_smem = next() + Tile_KV::lane_b_trans(lane);
#pragma unroll
        for (int k = 0; k < KEYS / 16; ++k)
#if KEYS_FLOAT8
#pragma unroll
            for (int o = 0; o < O_TILES; o += 4) {
                uint32_t V_rmem[4];  // of columns 8o …, keys 0 … 7 and 8 … 15, then of columns 8o + 16 …
                ptx::ldmatrix_x4_trans(V_rmem, Tile_KV::step(V_smem, o / 4) + k * 16 * ROW_BYTES);
#pragma unroll
                for (int e = 0; e < 4; ++e) {  // even columns, odd columns
                    const uint32_t selector = e % 2 ? 0x4431 : 0x4420;
                    const uint32_t first = ptx::halves_of_float8(ptx::prmt(V_rmem[e / 2 * 2], 0, selector));
                    const uint32_t second = ptx::halves_of_float8(ptx::prmt(V_rmem[e / 2 * 2 + 1], 0, selector));
#pragma unroll
                    for (int m = 0; m < M_TILES; ++m) ptx::mma_m16n8k16<probability>(O_rmem[m][o + e], P_rmem[m][k], first, second);
                }
            }
#else
#pragma unroll
            for (int o = 0; o < O_TILES; o += 2) {
                uint32_t V_rmem[4];
                ptx::ldmatrix_x4_trans(V_rmem, Tile_KV::step(V_smem, o / 2) + k * 16 * ROW_BYTES);
#pragma unroll
                for (int m = 0; m < M_TILES; ++m) {
                    ptx::mma_m16n8k16<element>(O_rmem[m][o], P_rmem[m][k], V_rmem[0], V_rmem[1]);
                    ptx::mma_m16n8k16<element>(O_rmem[m][o + 1], P_rmem[m][k], V_rmem[2], V_rmem[3]);
                }
            }
#endif
    }

    // Merges the warps' sums, 16 rows at a time, into O / l, or into the block's part of it.
    ptx::cp_async_wait_group<0>();
    Merge& merge = *reinterpret_cast<Merge*>(smem);
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
        __syncthreads();  // every warp is done with Q, its ring and the 16 rows before
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float l = row_sum(l_rmem[m][r]);
            if (row0 + 16 * m + 8 * r + g >= rows) continue;
            if (t == 0) merge.ml[warp][8 * r + g] = make_float2(m_rmem[m][r], l);
#if KEYS_FLOAT8
#pragma unroll
            for (int o = 0; o < O_TILES; o += 2)
                *reinterpret_cast<float4*>(&merge.O[warp][8 * r + g][8 * o + 4 * t]) =
                    make_float4(O_rmem[m][o][2 * r], O_rmem[m][o + 1][2 * r], O_rmem[m][o][2 * r + 1], O_rmem[m][o + 1][2 * r + 1]);
#else
#pragma unroll
            for (int o = 0; o < O_TILES; ++o)
                *reinterpret_cast<float2*>(&merge.O[warp][8 * r + g][8 * o + 2 * t]) = make_float2(O_rmem[m][o][2 * r], O_rmem[m][o][2 * r + 1]);
#endif
        }
        __syncthreads();  // all warps' sums are there
        for (int n = threadIdx.x; n < 16 * O_TILES; n += THREADS) {
            const int r = n / O_TILES, column = n % O_TILES * 8, row = row0 + 16 * m + r;
            if (row >= rows) continue;
            float m_all = scales.least_m(), l = 0, O[8] = {};
#pragma unroll
            for (int w = 0; w < WARPS; ++w) m_all = fmaxf(m_all, merge.ml[w][r].x);
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                const float factor = weight(scales, merge.ml[w][r].x, m_all);
                l += factor * merge.ml[w][r].y;
#pragma unroll
                for (int e = 0; e < 8; ++e) O[e] = fmaf(factor, merge.O[w][r][column + e], O[e]);
            }
            if (c.splits > 1) {
                const int64_t place = static_cast<int64_t>(blockIdx.x) * ROWS + 16 * m + r;
                float4* to = reinterpret_cast<float4*>(partial_O(c, place) + column);
                to[0] = make_float4(O[0], O[1], O[2], O[3]), to[1] = make_float4(O[4], O[5], O[6], O[7]);
                if (column == 0) *partial_ml(c, place) = make_float2(m_all, l);
            } else {
                const int i = row / group, h = h_kv * group + row % group;
                const float factor = final_factor(c, scales, b, m_all, l);
                uint4 x;
                x.x = ptx::cvt_pair<element>(O[0] * factor, O[1] * factor), x.y = ptx::cvt_pair<element>(O[2] * factor, O[3] * factor);
                x.z = ptx::cvt_pair<element>(O[4] * factor, O[5] * factor), x.w = ptx::cvt_pair<element>(O[6] * factor, O[7] * factor);
                if (column < p.Dv) *reinterpret_cast<uint4*>(head_of(p.o, b, h) + i * p.o.stride_n + column) = x;
                if (column == 0) store_lse(c, scales, b, h, i, m_all, l);
            }
        }
    }
}

// ---- merging the splits' parts of a row. W warps share a row: 1 for few splits, else all warps of a block, each taking every W-th split. A warp loads
// several splits at once, so that it waits for memory only once.

constexpr int MERGE_WARPS = 8;
constexpr int LANE_COLUMNS = (HEAD_DIM + 127) / 128;  // times four
constexpr int AT_ONCE = 4;                            // splits

template <int W>
__global__ void __launch_bounds__(32 * MERGE_WARPS, HEAD_DIM > 128 ? 2 : 4) merge_kernel(const __grid_constant__ Call c) {
    __shared__ __align__(16) float O_smem[W][HEAD_DIM];
    __shared__ float2 ml_smem[W];
    const AttentionParams& p = c.p;
    const int warp = threadIdx.x / 32 % W, lane = threadIdx.x % 32;
    const int group = p.H / p.Hkv, rows = p.Nq * group;
    const int number = blockIdx.x * (MERGE_WARPS / W) + threadIdx.x / 32 / W;
    if (number >= p.B * p.Hkv * rows) return;
    const int row = number % rows, head = number / rows, h_kv = head % p.Hkv, b = head / p.Hkv;
    const int i = row / group, h = h_kv * group + row % group, tile = row / c.rows;
    const int64_t first = (static_cast<int64_t>(head) * c.tiles + tile) * c.splits * c.rows + row % c.rows;  // the first split's row
    const Steps steps = steps_of(c, sequence(c, b), tile);
    const int splits = steps.count ? (steps.count + steps.share - 1) / steps.share : 0;  // those that have keys

    if (LAUNCHED_EARLY) ptx::griddepcontrol_wait();  // the forward has ended, and what it wrote is visible

    const Scales scales = scales_of(c, h_kv);
    float m_all = scales.least_m(), l = 0, O[LANE_COLUMNS][4] = {};
    for (int from = warp; from < splits; from += W * AT_ONCE) {
        float2 ml[AT_ONCE];
        float4 x[AT_ONCE][LANE_COLUMNS];
        float m_new = m_all;
#pragma unroll
        for (int s = 0; s < AT_ONCE; ++s) {
            const int split = from + s * W;
            const int64_t place = first + static_cast<int64_t>(split) * c.rows;
            ml[s] = split < splits ? *partial_ml(c, place) : make_float2(scales.least_m(), 0);
#pragma unroll
            for (int n = 0; n < LANE_COLUMNS; ++n) {
                const int column = 128 * n + 4 * lane;
                x[s][n] = split < splits && column < HEAD_DIM ? *reinterpret_cast<const float4*>(partial_O(c, place) + column) : float4{};
            }
        }
#pragma unroll
        for (int s = 0; s < AT_ONCE; ++s) m_new = fmaxf(m_new, ml[s].x);
        const float alpha = weight(scales, m_all, m_new);
        l *= alpha;
#pragma unroll
        for (int n = 0; n < LANE_COLUMNS; ++n) O[n][0] *= alpha, O[n][1] *= alpha, O[n][2] *= alpha, O[n][3] *= alpha;
#pragma unroll
        for (int s = 0; s < AT_ONCE; ++s) {
            const float factor = weight(scales, ml[s].x, m_new);
            l += factor * ml[s].y;
#pragma unroll
            for (int n = 0; n < LANE_COLUMNS; ++n) {
                O[n][0] = fmaf(factor, x[s][n].x, O[n][0]), O[n][1] = fmaf(factor, x[s][n].y, O[n][1]);
                O[n][2] = fmaf(factor, x[s][n].z, O[n][2]), O[n][3] = fmaf(factor, x[s][n].w, O[n][3]);
            }
        }
        m_all = m_new;
    }
    if constexpr (W > 1) {  // the first warp takes all sums
        if (lane == 0) ml_smem[warp] = make_float2(m_all, l);
#pragma unroll
        for (int n = 0; n < LANE_COLUMNS; ++n)
            if (128 * n + 4 * lane < HEAD_DIM)
                *reinterpret_cast<float4*>(&O_smem[warp][128 * n + 4 * lane]) = make_float4(O[n][0], O[n][1], O[n][2], O[n][3]);
        __syncthreads();  // all warps' sums are there
        if (warp > 0) return;
        float m_new = scales.least_m();
#pragma unroll
        for (int w = 0; w < W; ++w) m_new = fmaxf(m_new, ml_smem[w].x);
        m_all = m_new, l = 0;
#pragma unroll
        for (int n = 0; n < LANE_COLUMNS; ++n) O[n][0] = O[n][1] = O[n][2] = O[n][3] = 0;
#pragma unroll
        for (int w = 0; w < W; ++w) {
            const float factor = weight(scales, ml_smem[w].x, m_all);
            l += factor * ml_smem[w].y;
#pragma unroll
            for (int n = 0; n < LANE_COLUMNS; ++n) {
                if (128 * n + 4 * lane >= HEAD_DIM) continue;
                const float4 x = *reinterpret_cast<const float4*>(&O_smem[w][128 * n + 4 * lane]);
                O[n][0] = fmaf(factor, x.x, O[n][0]), O[n][1] = fmaf(factor, x.y, O[n][1]);
                O[n][2] = fmaf(factor, x.z, O[n][2]), O[n][3] = fmaf(factor, x.w, O[n][3]);
            }
        }
    }
    const float factor = final_factor(c, scales, b, m_all, l);
#pragma unroll
    for (int n = 0; n < LANE_COLUMNS; ++n) {
        const int column = 128 * n + 4 * lane;
        if (column >= p.Dv) continue;
        const uint2 x = make_uint2(ptx::cvt_pair<element>(O[n][0] * factor, O[n][1] * factor), ptx::cvt_pair<element>(O[n][2] * factor, O[n][3] * factor));
        *reinterpret_cast<uint2*>(head_of(p.o, b, h) + i * p.o.stride_n + column) = x;
    }
    if (lane == 0) store_lse(c, scales, b, h, i, m_all, l);
}

// ---- launching

// How many splits: the number that minimises the time until the last block ends, in steps of a warp. A block's prologue and epilogue cost about as much as
// three steps, the merge as much as two. Depends only on sizes and on the number of multiprocessors.
inline Call planned(const AttentionParams& p, const KeySource& keys) {
    const int64_t packed = static_cast<int64_t>(p.Nq) * (p.H / p.Hkv);
    Call c{p, keys, packed > 16 && MOST_M_TILES > 1 ? 32 : 16, 0, 1};
    c.tiles = static_cast<int>(tiles_of(packed, c.rows));
    const int64_t blocks = static_cast<int64_t>(p.B) * p.Hkv * c.tiles, at_once = static_cast<int64_t>(p.sm_count) * BLOCKS_PER_SM;
    const int64_t steps = tiles_of(tiles_of(p.Nk, KEYS), WARPS);  // of a warp, unless split
    int64_t best = INT64_MAX;
    for (int64_t splits = 1; splits <= steps && splits <= 256 && (splits == 1 || blocks * splits <= 8 * at_once); ++splits) {
        const int64_t time = tiles_of(blocks * splits, static_cast<int>(at_once)) * (tiles_of(steps, static_cast<int>(splits)) + 3) + (splits > 1 ? 2 : 0);
        if (time < best) best = time, c.splits = static_cast<int>(splits);
    }
    return c;
}
inline Call planned(const AttentionParams* params) { return planned(*params, *reinterpret_cast<const KeySource*>(params + 1)); }

extern "C" int64_t workspace_floats(const AttentionParams* params) {
    const Call c = planned(params);
    return c.splits == 1 ? 0 : static_cast<int64_t>(c.p.B) * c.p.Hkv * c.tiles * c.splits * c.rows * (HEAD_DIM + 2);
}

template <int M_TILES, bool ONCE>
inline cudaError_t launch_forward(const Call& c, int64_t blocks) {
    auto kernel = forward_kernel<M_TILES, ONCE>;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SMEM_BYTES<M_TILES>);
    if (error != cudaSuccess) return error;
    launch_kernel(kernel, static_cast<unsigned>(blocks), THREADS, SMEM_BYTES<M_TILES>, c.p.stream, c);
    return cudaGetLastError();
}

// Where one tile of Q has all rows of a key head, keys are read only once. They are then marked evict-first, so that they do not push out lines that others
// wrote, which would have to be written back to memory. On an H200 with 50 MB of L2 that saved 5 to 10 % of the time at 134 MB of keys and values, but cost
// 2 % at 268 MB and 4 % from 512 MB on.
constexpr int64_t MOST_BYTES_TO_EVICT_FIRST = 192 << 20;
template <int M_TILES>
inline cudaError_t launch_forward(const Call& c, int64_t blocks) {
    const int64_t bytes = static_cast<int64_t>(c.p.B) * c.p.Hkv * c.p.Nk * (c.p.D + c.p.Dv) * 16 / UNIT;
    return c.tiles == 1 && bytes <= MOST_BYTES_TO_EVICT_FIRST ? launch_forward<M_TILES, true>(c, blocks) : launch_forward<M_TILES, false>(c, blocks);
}

extern "C" int attention(const AttentionParams* params) {
    const Call c = planned(params);
    const AttentionParams& p = c.p;
    const bool paged = c.keys.block_table != nullptr;
    const int batches = paged ? c.keys.pages : p.B, length = paged ? c.keys.page_size : p.Nk;
    if (paged && (c.keys.page_size <= 0 || c.keys.page_size % 16)) return cudaErrorInvalidValue;
    const bool fits = units_fit(p.k, batches, p.Hkv, length) && units_fit(p.v, batches, p.Hkv, length);
    const bool mask_fits = !MASK || units_fit(p.mask.stride_b, p.mask.stride_h, p.mask.stride_i, p.B, p.H, p.Nq, 1);
    if (!fits || !mask_fits) return cudaErrorInvalidValue;
    const int64_t packed = static_cast<int64_t>(p.Nq) * (p.H / p.Hkv), blocks = static_cast<int64_t>(p.B) * p.Hkv * c.tiles * c.splits;
    if (!numbers_fit(p, {blocks, p.B * p.Hkv * packed, packed + 64})) return cudaErrorInvalidConfiguration;
    if (p.B == 0 || p.Nq == 0) return cudaSuccess;
    DeviceGuard guard(p.device);
    const cudaError_t error = c.rows == 16 ? launch_forward<1>(c, blocks) : launch_forward<MOST_M_TILES>(c, blocks);
    if (error != cudaSuccess || c.splits == 1) return error;
    const int64_t all = p.B * p.Hkv * packed;
    if (c.splits > 2 * AT_ONCE) launch_early(merge_kernel<MERGE_WARPS>, static_cast<unsigned>(all), 32 * MERGE_WARPS, 0, p.stream, c);
    else launch_early(merge_kernel<1>, static_cast<unsigned>(tiles_of(all, MERGE_WARPS)), 32 * MERGE_WARPS, 0, p.stream, c);
    return cudaGetLastError();
}

// The hook of score.cuh for scores in the accumulators of mma.sync. Their rows are queries in forward_3_tensor_core.cu and forward_5_split_keys.cu, and
// keys in backward_3_tensor_core.cu.
//
// The hook returns scores in base 2, so that softmax only subtracts the maximum and raises 2 to the result; scores that a mask hides become −∞. The cap is
// applied first, in a pass of its own, so that one vote chooses its tanh for the whole tile. A bias of q's type is read in place, with any strides.
#pragma once

#include <type_traits>

#include "score.cuh"
#include "tensor_core.cuh"

#if SCORE
#if DTYPE == FLOAT32 || MASK == MASK_OF_BYTES
#error "this hook is for 16-bit types, whose keys lie in order"
#endif

// Values shared by all scores of a tile.
struct ScoreUnits {
    float to_log2;  // scale · log2 e
    float in_cap;   // scale / softcap
    float lowest;   // a sum of products below this was hidden by the mask
};
__device__ inline ScoreUnits score_units(const AttentionParams& p) { return {p.scale * LOG2_E, p.scoring.scale_in_cap, p.lowest}; }

// What the hook adds to the scores of one query: a row of the tile, or in a backward a column.
struct ScoredQuery {
    int64_t bias;    // where its bias begins, in elements
    float distance;  // ALiBi's distance to the lane's first key
    float slope_log2;
};
__device__ inline ScoredQuery scored_query(const AttentionParams& p, int b, int h, int i, int distance, float slope_log2) {
    ScoredQuery query = {};
    if (BIASED) query.bias = b * p.scoring.stride_b + h * p.scoring.stride_h + min(i, p.Nq - 1) * p.scoring.stride_i;
    if (SLOPED) query.distance = static_cast<float>(distance), query.slope_log2 = slope_log2;
    return query;
}
__device__ inline float slope_log2(const AttentionParams& p, int b, int h) { return SLOPED ? slope_of_head(p, b, h) * LOG2_E : 0; }

// ---- the cap

// S becomes its tanh: by the polynomial if no score of the warp exceeds the cap, else by the hardware's tanh. Scores that the mask hides become −∞.
template <int M_TILES, int N_TILES>
__device__ inline void cap(float (&S_rmem)[M_TILES][N_TILES][4], const ScoreUnits& units) {
    float largest = 0;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int n = 0; n < N_TILES; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (!MASK || S_rmem[m][n][e] >= units.lowest) largest = fmaxf(largest, fabsf(S_rmem[m][n][e]));
    auto apply = [&](auto small) {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int n = 0; n < N_TILES; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float& s = S_rmem[m][n][e];
                    const float y = s * units.in_cap;
                    s = MASK && s < units.lowest ? -CUDART_INF_F : decltype(small)::value ? small_tanh(y) : ptx::tanh(y);
                }
    };
    if (__all_sync(0xffffffff, largest * units.in_cap <= 1)) apply(std::true_type());
    else apply(std::false_type());
}

// ---- the rest

// x of a score, or of its tanh.
__device__ inline float score_log2(const AttentionParams& p, const ScoreUnits& units, float s, float bias, float distance, float slope_log2) {
    const bool hidden = MASK && !CAPPED && s < units.lowest;
    float x = s * (CAPPED ? p.scoring.cap_log2 : units.to_log2);
    if (SLOPED) x = fmaf(-slope_log2, fabsf(distance), x);
    if (BIASED) x = fmaf(bias, LOG2_E, x);
    return hidden ? -CUDART_INF_F : x;
}

// Bias elements, of q's type, laid out like the accumulators of a tile: the pair [m][n][r] is for S_rmem[m][n][2r] and S_rmem[m][n][2r + 1]. If there are
// enough registers, they are loaded before the product and arrive while it runs.
template <int M_TILES, int N_TILES>
struct BiasOfTile {
    uint32_t pairs[M_TILES][N_TILES][2];
};

__device__ inline int64_t bias_column(const AttentionParams& p, int j) { return min(j, p.Nk - 1) * p.scoring.stride_j; }

__device__ inline uint32_t pair_of(const void* bias, int64_t first, int64_t second) {
    const uint16_t* of = static_cast<const uint16_t*>(bias);
    return of[first] | static_cast<uint32_t>(of[second]) << 16;
}

// Whether each pair of columns of a bias is 4 bytes at a multiple of 4.
__device__ inline bool bias_has_pairs(const AttentionParams& p) {
    const Scoring& bias = p.scoring;
    const int64_t odd = bias.stride_b | bias.stride_h | bias.stride_i;
    return bias.stride_j == 1 && odd % 2 == 0 && reinterpret_cast<uintptr_t>(bias.bias) % 4 == 0;
}

// For a tile whose rows are queries: query(m, r) is the query of the lane's row 16m + 8r; the lane's columns are keys j, j + 1, j + 8, j + 9, …
// `whole`: no key lies beyond the last.
template <int M_TILES, int N_TILES, class Query>
__device__ inline void load_bias_of_rows(BiasOfTile<M_TILES, N_TILES>& bias, const AttentionParams& p, int j, bool whole, Query query) {
    auto load = [&](auto pair) {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int64_t row = query(m, r).bias;
#pragma unroll
                for (int n = 0; n < N_TILES; ++n) bias.pairs[m][n][r] = pair(row, 8 * n);
            }
    };
    const uint32_t* lane = reinterpret_cast<const uint32_t*>(static_cast<const element*>(p.scoring.bias) + j);
    if (whole && bias_has_pairs(p)) load([&](int64_t row, int column) { return lane[row / 2 + column / 2]; });
    else load([&](int64_t row, int column) { return pair_of(p.scoring.bias, row + bias_column(p, j + column), row + bias_column(p, j + column + 1)); });
}

// For a tile whose columns are queries: query(n, e) is the query of the lane's column 8n + e; the lane's rows are keys j, j + 8, j + 16, …
template <int M_TILES, int N_TILES, class Query>
__device__ inline void load_bias_of_columns(BiasOfTile<M_TILES, N_TILES>& bias, const AttentionParams& p, int j, Query query) {
#pragma unroll
    for (int n = 0; n < N_TILES; ++n) {
        const int64_t first = query(n, 0).bias, second = query(n, 1).bias;
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int64_t column = bias_column(p, j + 16 * m + 8 * r);
                bias.pairs[m][n][r] = pair_of(p.scoring.bias, first + column, second + column);
            }
    }
}

// Scores a tile whose rows are queries (arguments as in load_bias_of_rows).
template <int M_TILES, int N_TILES, class Query>
__device__ inline void score_rows(float (&S_rmem)[M_TILES][N_TILES][4], const BiasOfTile<M_TILES, N_TILES>& bias, const AttentionParams& p,
                                  const ScoreUnits& units, Query query) {
    if (CAPPED) cap(S_rmem, units);
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const ScoredQuery row = query(m, r);
#pragma unroll
            for (int n = 0; n < N_TILES; ++n) {
                const float2 added = BIASED ? floats_of(bias.pairs[m][n][r]) : float2{};
                float &s0 = S_rmem[m][n][2 * r], &s1 = S_rmem[m][n][2 * r + 1];
                s0 = score_log2(p, units, s0, added.x, row.distance - static_cast<float>(8 * n), row.slope_log2);
                s1 = score_log2(p, units, s1, added.y, row.distance - static_cast<float>(8 * n + 1), row.slope_log2);
            }
        }
}

// Scores a tile whose columns are queries (arguments as in load_bias_of_columns). With a cap, `derivative` receives that of two neighbouring columns' scores,
// as a pair of float16.
template <int M_TILES, int N_TILES, class Query>
__device__ inline void score_columns(float (&S_rmem)[M_TILES][N_TILES][4], uint32_t (&derivative)[M_TILES][N_TILES][2],
                                     const BiasOfTile<M_TILES, N_TILES>& bias, const AttentionParams& p, const ScoreUnits& units, Query query) {
    if (CAPPED) cap(S_rmem, units);
#pragma unroll
    for (int n = 0; n < N_TILES; ++n) {
        const ScoredQuery first = query(n, 0), second = query(n, 1);
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float further = static_cast<float>(16 * m + 8 * r);
                const float2 added = BIASED ? floats_of(bias.pairs[m][n][r]) : float2{};
                float &s0 = S_rmem[m][n][2 * r], &s1 = S_rmem[m][n][2 * r + 1];
                if (CAPPED) derivative[m][n][r] = ptx::cvt_pair<__half>(fmaf(-s0, s0, 1), fmaf(-s1, s1, 1));
                s0 = score_log2(p, units, s0, added.x, first.distance - further, first.slope_log2);
                s1 = score_log2(p, units, s1, added.y, second.distance - further, second.slope_log2);
            }
    }
}
#endif

// The hook of score.cuh in the hopper kernels, for a tile of scores in the accumulators of wgmma.
//
// Scores are kept in a unit that equals unit_log2() in base 2. With softcap alone the score is the bare tanh, so that the cap costs one multiplication and
// one tanh per score; otherwise scores are in base e. ALiBi's distance is counted from a lane's first column, which costs one FFMA per score. A tile of the
// bias is copied by tensor map into the 128-byte swizzle, and ldmatrix gives each lane the pairs that match its accumulators. The bias' rows are queries and
// its columns keys; a backward, whose rows are keys, reads it transposed.
#pragma once

#include "score.cuh"

#if SCORE
#include "keep_bits.cuh"
#include "tensor_map.cuh"

constexpr bool ONLY_CAPPED = SCORE == SCORE_SOFTCAP;

// The unit of the scores that the hook returns, in base 2.
__device__ inline float unit_log2(const AttentionParams& p) { return ONLY_CAPPED ? p.scoring.cap_log2 : LOG2_E; }

// ---- softcap

// factor · tanh(s · in_cap) / (s · in_cap), to 12 bits, by a polynomial in s², for |s · in_cap| ≤ LARGEST_1, which holds for most scores under usual caps.
constexpr float LARGEST_1 = 0.3125f;
__device__ inline float tanh_over_1(float s, float in_cap, float factor) {
    return fmaf(s * s, -0.32075847f * factor * in_cap * in_cap, 0.99984765f * factor);
}
// Whether its coefficients, and s², are representable in float32.
__device__ inline bool has_tanh_over_1(const AttentionParams& p) {
    const float in_cap = p.scoring.scale_in_cap;
    return p.scale > 0x1p-40f && p.scale < 0x1p40f && in_cap > 0x1p-40f && in_cap < 0x1p40f;
}

// ---- ALiBi

// −slope · |distance| for the scores of a tile. For column 0, 1, 8, 9 … of the lane's row r it is first[r] + column · step, if the whole tile lies on one
// side of the diagonal. If it lies on both sides, the result takes its sign from the slope, whatever the sign of the distance.
struct Slopes {
    float first[2], step;
    uint32_t keep = ~0u, set = 0;  // bits of the result

    // distance[r] = i + diagonal − j for row r and the lane's first column; it changes by `grows` per column. least, greatest: over the whole tile.
    __device__ Slopes(float slope, const int (&distance)[2], int grows, int least, int greatest) {
        const float factor = CAUSAL || greatest > 0 ? -slope : slope;  // causal: scores beyond the diagonal are hidden
        if (!CAUSAL && least < 0 && greatest > 0) keep = 0x7fffffffu, set = slope > 0 ? 0x80000000u : 0;
        step = grows * factor;
        for (int r = 0; r < 2; ++r) first[r] = factor * static_cast<float>(distance[r]);
    }
    __device__ bool mixed() const { return !CAUSAL && keep != ~0u; }
    __device__ float of(int r, int column) const {
        const float x = fmaf(static_cast<float>(column), step, first[r]);
        return CAUSAL ? x : __uint_as_float((__float_as_uint(x) & keep) | set);
    }
};

// ---- bias

constexpr int BIAS_PANEL = 64;  // columns of a box: 128 bytes

// Whether all queries share one row of the bias. It is then copied once.
__host__ __device__ inline bool one_bias_row(const AttentionParams& p) { return p.scoring.bias_i == 1; }

// The tensor map of a bias, whose boxes have `rows` rows, or one.
inline cudaError_t make_bias_map(CUtensorMap* map, const AttentionParams& p, int rows) {
    const Scoring& bias = p.scoring;
    const Tensor4 t = {const_cast<void*>(bias.bias), bias.stride_b, bias.stride_h, bias.stride_i};
    return make_tensor_map(map, t, p.B, p.H, one_bias_row(p) ? 1 : p.Nq, p.Nk, one_bias_row(p) ? 1 : rows);
}

// ---- a tile

// Applies the hook to a tile of scores. bias(n, pairs) loads the bias of columns 8n … 8n + 15, in the order of the accumulators. done(n, r, x, capped)
// receives the results for columns 8n + 2t and 8n + 2t + 1 of row r, and their tanh.
// SMALL: no score exceeds the cap. ROWS_SHARE: the tile lies on one side of the diagonal, and what ALiBi adds to the first row is added to both rows.
template <int COLUMNS, bool SMALL, bool ROWS_SHARE, class Bias, class Done>
__device__ inline void score_tile(const float (&S_rmem)[COLUMNS / 2], const AttentionParams& p, [[maybe_unused]] const Slopes& slopes, Bias bias, Done done) {
    const float factor = CAPPED ? p.scoring.softcap : p.scale;
    [[maybe_unused]] uint32_t pairs[4];
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; ++n) {
        if (BIASED && n % 2 == 0) bias(n, pairs);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float x[2], capped[2] = {};
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const float s = S_rmem[4 * n + 2 * r + c];
                if (CAPPED) capped[c] = SMALL ? small_tanh(s * p.scoring.scale_in_cap) : ptx::tanh(s * p.scoring.scale_in_cap);
                x[c] = CAPPED ? capped[c] : s;
                if (ONLY_CAPPED) continue;
                float further = 0;
                if (BIASED) further = c ? floats_of(pairs[n % 2 * 2 + r]).y : floats_of(pairs[n % 2 * 2 + r]).x;
                if (SLOPED) further += ROWS_SHARE ? fmaf(static_cast<float>(8 * n + c), slopes.step, slopes.first[0]) : slopes.of(r, 8 * n + c);
                x[c] = fmaf(x[c], factor, further);
            }
            done(n, r, x, capped);
        }
    }
}
#endif

// What happens to a score before the softmax: softcap, bias and ALiBi, in this order. Defined once, with the names of reference/score.py:
//
//     x = softcap · tanh(s / softcap) + bias[b, h, i, j] − slope · |i + diagonal − j|,    ∂x/∂s = 1 − tanh²(s / softcap)
//
// A kernel is compiled for those that a call uses (SCORE); a kernel for calls without them contains no code for them.
#pragma once

#include "visible.cuh"

constexpr bool CAPPED = (SCORE & SCORE_SOFTCAP) != 0, BIASED = (SCORE & SCORE_BIAS) != 0, SLOPED = (SCORE & SCORE_ALIBI) != 0;
constexpr float LOWEST_LOG2 = -0x1.8p126f;  // where a running maximum in base 2 starts: below every finite bias that does not hide

#if SCORE
constexpr float HIDES = -0x1p126f;  // a bias below this hides its element, as a mask does

// Element n of a tensor of one of the three types.
__device__ inline float load_as_float(const void* x, int type, int64_t n) {
    if (type == FLOAT32) return static_cast<const float*>(x)[n];
    if (type == FLOAT16) return static_cast<float>(static_cast<const __half*>(x)[n]);
    return static_cast<float>(static_cast<const __nv_bfloat16*>(x)[n]);
}

__device__ inline void store_as(void* x, int type, int64_t n, float value) {
    if (type == FLOAT32)
        static_cast<float*>(x)[n] = value;
    else if (type == FLOAT16)
        static_cast<__half*>(x)[n] = static_cast<__half>(value);
    else
        static_cast<__nv_bfloat16*>(x)[n] = static_cast<__nv_bfloat16>(value);
}

// Values shared by all scores of a head.
struct ScoreOfHead {
    int64_t bias;  // where its bias begins, in elements
    float slope;
};

__device__ inline float slope_of_head(const AttentionParams& p, int b, int h) {
    return p.scoring.alibi[b * p.scoring.alibi_stride_b + h * p.scoring.alibi_stride_h];
}

__device__ inline ScoreOfHead score_of_head(const AttentionParams& p, int b, int h) {
    ScoreOfHead head = {};
    if (BIASED) head.bias = b * p.scoring.stride_b + h * p.scoring.stride_h;
    if (SLOPED) head.slope = slope_of_head(p, b, h);
    return head;
}

// x of the score s (scaled, natural) of row i and column j, which may lie beyond the last: such scores are hidden afterwards.
__device__ inline float score(const AttentionParams& p, const ScoreOfHead& head, float s, int i, int j, [[maybe_unused]] float& derivative) {
    if (CAPPED) {
        const float capped = tanhf(s / p.scoring.softcap);
        derivative = 1 - capped * capped;
        s = capped * p.scoring.softcap;
    }
    if (BIASED) {
        const int64_t place = head.bias + min(i, p.Nq - 1) * p.scoring.stride_i + min(j, p.Nk - 1) * p.scoring.stride_j;
        const float bias = load_as_float(p.scoring.bias, p.scoring.bias_type, place);
        s = bias < HIDES ? -CUDART_INF_F : s + bias;
    }
    if (SLOPED) s -= head.slope * static_cast<float>(abs(i + diagonal(p) - j));
    return s;
}

// ---- on tensor cores

// What O is multiplied by at the end: 1 / l, or 0 for a row that may attend nothing. m is the row's largest score in base 2.
//
// m is rounded before it is subtracted, always in the same way, so the rounding error cancels in O = P V / l. But P itself is larger by that error. Up to
// |m| = 2³¹ bfloat16 can still represent it; beyond, O becomes NaN instead of a wrong number.
__device__ inline float factor_of_scored_row(const AttentionParams& p, float m, float one_over_l) {
    const bool dead = m == LOWEST_LOG2 && (MASK || CAUSAL || INTERVAL || BIASED || p.Nk == 0);  // if nothing can be hidden, all scores were −∞: NaN
    return dead ? 0 : fabsf(m) < 0x1p31f ? one_over_l : CUDART_NAN_F;
}

// factor · tanh(y) / y for |y| ≤ 1, to 13 bits, by a polynomial in y²: it does not use the special function unit, which is busy with exponentials and takes
// twice as long for a tanh as for one of those.
__device__ inline float tanh_over(float y, float factor = 1) {
    const float u = y * y;
    return fmaf(fmaf(fmaf(-0.02662968f * factor, u, 0.11889755f * factor), u, -0.33065430f * factor), u, 0.99991856f * factor);
}
__device__ inline float small_tanh(float y) { return y * tanh_over(y); }
#endif

// Attention in float32 as its definition says, behind the C interface of a kernel's library: for checks of what surrounds a launch, without a GPU.
#include <cmath>
#include "attention.h"

extern "C" {
int fake_error = 0;          // what the next launches return
int fake_deterministic = 0;  // what the last one was asked for
}

static float* row(const Tensor4& x, int b, int h, int n) {
    return static_cast<float*>(x.data) + b * x.stride_b + h * x.stride_h + n * x.stride_n;
}

static float dot(const float* x, const float* y, int n) {
    float sum = 0;
    for (int d = 0; d < n; ++d) sum += x[d] * y[d];
    return sum;
}

static void add(float* x, float factor, const float* y, int n) {
    for (int d = 0; d < n; ++d) x[d] += factor * y[d];
}

static void clear(const Tensor4& x, int B, int H, int N, int D) {
    for (int b = 0; b < B; ++b)
        for (int h = 0; h < H; ++h)
            for (int n = 0; n < N; ++n)
                for (int d = 0; d < D; ++d) row(x, b, h, n)[d] = 0;
}

int64_t workspace_floats(const AttentionParams*) { return 7; }
int64_t params_size() { return sizeof(AttentionParams); }
const char* error_name(int) { return "made up"; }

int attention(const AttentionParams* params) {
    const AttentionParams& p = *params;
    const bool backward = p.d_o.data;
    fake_deterministic = p.deterministic;
    if (backward) {
        for (int n = 0; n < workspace_floats(params); ++n) p.workspace[n] = 0;
        clear(p.dq, p.B, p.H, p.Nq, p.D), clear(p.dk, p.B, p.Hkv, p.Nk, p.D), clear(p.dv, p.B, p.Hkv, p.Nk, p.Dv);
    } else {
        clear(p.o, p.B, p.H, p.Nq, p.Dv);
    }
    for (int b = 0; b < p.B; ++b)
        for (int h = 0; h < p.H; ++h)
            for (int i = 0; i < p.Nq; ++i) {
                const int g = h / (p.H / p.Hkv);
                const float* q = row(p.q, b, h, i);
                float *o = row(p.o, b, h, i), &lse = p.lse[(b * p.H + h) * p.Nq + i];
                if (!backward) {
                    float sum = 0;
                    for (int j = 0; j < p.Nk; ++j) sum += std::exp(p.scale * dot(q, row(p.k, b, g, j), p.D));
                    lse = std::log(sum);
                }
                for (int j = 0; j < p.Nk; ++j) {
                    const float *k = row(p.k, b, g, j), *v = row(p.v, b, g, j);
                    const float P = std::exp(p.scale * dot(q, k, p.D) - lse);
                    if (!backward) {
                        add(o, P, v, p.Dv);
                        continue;
                    }
                    const float* dO = row(p.d_o, b, h, i);
                    const float dS = P * (dot(dO, v, p.Dv) - dot(dO, o, p.Dv)) * p.scale;
                    add(row(p.dq, b, h, i), dS, k, p.D), add(row(p.dk, b, g, j), dS, q, p.D), add(row(p.dv, b, g, j), P, dO, p.Dv);
                }
            }
    return fake_error;
}

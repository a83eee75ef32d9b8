// What the two kernels of the backward of `tensor_core` share: from a pair of tiles in shared memory to P and dS, in registers. backward_kernel uses them as
// operands, dbias_kernel (backward_3_bias.cuh) sums dS.
//
// Includers define the sizes of tiles and of a pass.
#pragma once

#include "score_mma.cuh"
#include "tensor_core.cuh"

// A tile of Q and dO and one of K and V, all in shared memory.
struct Pair {
    int b, h, i0, j0;                    // batch, query head, first query and first key
    int offset;                          // causal: row i sees columns j ≤ i + offset
    bool cut;                            // whether some row does not see all of the keys, apart from a mask
    uint32_t Q_smem, dO_smem;            // [BLOCK_Q, HEAD_DIM]
    uint32_t K_smem, V_smem;             // [BLOCK_K, HEAD_DIM]
    const float *LSE_smem, *Delta_smem;  // [BLOCK_Q]
    uint32_t K_lane_a, Q_lane_b;         // where this lane's ldmatrix rows lie in a tile
};

// Lines 10 to 14 for K_ROWS rows of Sᵀ, from `row` on, and Q_COLUMNS columns, from `column` on: the part that a warp computes at a time. done(m, n, r, P0,
// P1, dS0, dS1) receives the elements of row 16·m + 8·r + lane / 4, columns 8·n + 2·(lane % 4) and the next; P is negative where dropout drops it. dS is the
// gradient of S or, if BEFORE_CAP, of the changed scores, which is also that of a bias. scale_log2: exp(scale · x) = 2^(scale_log2 · x). batch() returns
// pair.b, for which large head sizes have no register.
template <bool BEFORE_CAP, class Batch, class Done>
__device__ inline void scores_of_part(const AttentionParams& p, float scale_log2, const Pair& pair, int warp_k, int warp_q, int pass, [[maybe_unused]] const Batch& batch,
                                      float (&S_rmem)[M_TILES][N_TILES][4], float (&dP_rmem)[M_TILES][N_TILES][4], const Done& done) {
#if MASK
    // Lane l loads the word of row l of the 32 × 32 bits that this pass needs. It is used after the product that follows.
    const uint32_t* mask_gmem = static_cast<const uint32_t*>(p.mask.data) + pair.b * p.mask.stride_b + pair.h * p.mask.stride_h;
    const int mask_row = pair.i0 + (warp_q * PASSES + pass) * Q_COLUMNS + ptx::tid_x() % Q_COLUMNS;
    const uint32_t mask_word = mask_gmem[min(mask_row, p.Nq - 1) * p.mask.stride_i + (pair.j0 + warp_k * K_ROWS) / 32];
#endif
#if SCORE
    float slope = 0;  // read where it is used
    auto query = [&](int n, int e) {
        const int lane = ptx::tid_x() % 32;
        const int i = pair.i0 + (warp_q * PASSES + pass) * Q_COLUMNS + 8 * n + lane % 4 * 2 + e;
        return scored_query(p, pair.b, pair.h, i, i + pair.offset - pair.j0 - warp_k * K_ROWS - lane / 4, slope);
    };
    BiasOfTile<M_TILES, N_TILES> bias_rmem;
    auto load_bias = [&] { load_bias_of_columns(bias_rmem, p, pair.j0 + warp_k * K_ROWS + ptx::tid_x() % 32 / 4, query); };
    if (BIASED && BIAS_EARLY) load_bias();
#endif
#if DROPOUT
    const uint2 key = dropout_key(p);  // re-read in every pass, which is cheaper than keeping it in two registers
#endif
    // line 10: Sᵀ = K Qᵀ
    warp_matmul<D_STEPS>(
        S_rmem, [&](auto& a, int k, int m) { ptx::ldmatrix_x4(a, pair.K_smem + warp_k * K_ROWS * ROW_BYTES + Tile_K::step(pair.K_lane_a, k) + m * 16 * ROW_BYTES); },
        [&](auto& b, int k, int n) { ptx::ldmatrix_x4(b, pair.Q_smem + (warp_q * PASSES + pass) * Q_COLUMNS * ROW_BYTES + Tile_Q::step(pair.Q_lane_b, k) + n * 16 * ROW_BYTES); });

    // line 13: dPᵀ = V dOᵀ. It overlaps the exponentials below; with dropout it comes after them, because there are not enough registers.
    auto multiply_dP = [&] {
        warp_matmul<D_STEPS>(
            dP_rmem, [&](auto& a, int k, int m) { ptx::ldmatrix_x4(a, pair.V_smem + warp_k * K_ROWS * ROW_BYTES + Tile_K::step(pair.K_lane_a, k) + m * 16 * ROW_BYTES); },
            [&](auto& b, int k, int n) { ptx::ldmatrix_x4(b, pair.dO_smem + (warp_q * PASSES + pass) * Q_COLUMNS * ROW_BYTES + Tile_Q::step(pair.Q_lane_b, k) + n * 16 * ROW_BYTES); });
    };
    if (!DROPOUT) multiply_dP();

    const int lane = ptx::tid_x() % 32;    // re-read, so that values computed from it take no registers in the rest of a step
    const int g = lane / 4, t = lane % 4;  // this lane's row and column pair in an 8×8 fragment

#if SCORE
    uint32_t derivative_rmem[M_TILES][N_TILES][2];
    if (BIASED && !BIAS_EARLY) load_bias();
    slope = slope_log2(p, pair.b, pair.h);
    score_columns(S_rmem, derivative_rmem, bias_rmem, p, score_units(p), query);
#endif
    // line 11: P = exp(scale · S − LSE); it overwrites S
#pragma unroll
    for (int n = 0; n < N_TILES; ++n) {
        const float2 LSE = *reinterpret_cast<const float2*>(pair.LSE_smem + pass * Q_COLUMNS + 8 * n + 2 * t);
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                S_rmem[m][n][2 * r] = ptx::ex2(fmaf(S_rmem[m][n][2 * r], SCORE ? 1 : scale_log2, -LSE.x));
                S_rmem[m][n][2 * r + 1] = ptx::ex2(fmaf(S_rmem[m][n][2 * r + 1], SCORE ? 1 : scale_log2, -LSE.y));
            }
    }

#if MASK
    const bool cut = (LIMITED && pair.cut) || __any_sync(0xffffffff, mask_word != 0);  // bits beyond Nk are set
#else
    const bool cut = pair.cut;
#endif
    // Hide what may not be attended: row j0 + … + 16·m + 8·r + g of Sᵀ, column i0 + … + 8·n + 2·t + e.
    if (cut) {
        const int j = pair.j0 + warp_k * K_ROWS + g, i = pair.i0 + (warp_q * PASSES + pass) * Q_COLUMNS + 2 * t;
#pragma unroll
        for (int n = 0; n < N_TILES; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                uint32_t hidden = 0;  // bits of this lane's keys, from its first
#if MASK
                hidden = __shfl_sync(0xffffffff, mask_word, 8 * n + 2 * t + e) >> (warp_k * K_ROWS % 32 + g);
#endif
#if INTERVAL
                const Interval seen = keys_of_row(p, pair.b, pair.h, i + 8 * n + e);
                hidden |= ~first_bits(seen.stop - j) | first_bits(seen.start - j);
#else
                if (CAUSAL || !MASK) hidden |= ~first_bits((CAUSAL ? min(p.Nk, i + 8 * n + e + pair.offset + 1) : p.Nk) - j);
#endif
#pragma unroll
                for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                    for (int r = 0; r < 2; ++r)
                        if (hidden >> (16 * m + 8 * r) & 1) S_rmem[m][n][2 * r + e] = 0;
            }
    }

#if DROPOUT
    // Dropped elements get a negative sign on their P: dS needs |P| of all elements, dV only that of kept ones.
    // A call of Philox serves 32 × 32 elements 8 apart: two calls (e = 0, 1) give a lane's share of them.
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int i = pair.i0 + (warp_q * PASSES + pass) * Q_COLUMNS, j = pair.j0 + warp_k * K_ROWS;
        const uint4 bytes = dropout_bytes(key, batch(), pair.h, global_row(p, i / 32 * 32 + 2 * t + e), global_column(p, j / 32 * 32 + g));
        const bool second = Q_COLUMNS == 16 && i % 32 == 16;  // 16 columns take two of the four words,
        const int shift = K_ROWS == 16 ? j % 32 : 0;          // 16 rows two of a word's four bytes
        const uint32_t words[4] = {(second ? bytes.z : bytes.x) >> shift, (second ? bytes.w : bytes.y) >> shift, bytes.z >> shift,
                                   bytes.w >> shift};
#pragma unroll
        for (int n = 0; n < N_TILES; ++n)
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int byte = 8 * (2 * m + r);
                    if ((words[n] & 0xffu << byte) < static_cast<uint32_t>(p.drop_below) << byte) S_rmem[m][n][2 * r + e] *= -1;
                }
    }
#endif
    if (DROPOUT) multiply_dP();

    // line 14: dS = P∘(dP − Delta). With dropout, dS = P∘(keep_scale · kept dP − Delta); the factor keep_scale is applied at the end, as for
    // dV.
#pragma unroll
    for (int n = 0; n < N_TILES; ++n) {
        const float2 Delta = *reinterpret_cast<const float2*>(pair.Delta_smem + pass * Q_COLUMNS + 8 * n + 2 * t);
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float P0 = S_rmem[m][n][2 * r], P1 = S_rmem[m][n][2 * r + 1];
                float dP0 = dP_rmem[m][n][2 * r], dP1 = dP_rmem[m][n][2 * r + 1];
                if (DROPOUT) dP0 = P0 < 0 ? 0 : dP0, dP1 = P1 < 0 ? 0 : dP1;
                float dS0 = fabsf(P0) * (dP0 - Delta.x), dS1 = fabsf(P1) * (dP1 - Delta.y);
#if SCORE
                if (CAPPED && !BEFORE_CAP) {
                    const float2 derivative = ptx::floats_of_pair(derivative_rmem[m][n][r]);
                    dS0 *= derivative.x, dS1 *= derivative.y;
                }
#endif
                done(m, n, r, P0, P1, dS0, dS1);
            }
    }
}

// A tile's part of the online softmax, as `hopper` and `hopper_wide` have it: between its two products, all of it in registers, with maxima that are
// left alone while scores stay near them (as in FlashAttention-4, arXiv:2603.05451).
//
// Of a group's 64 × BLOCK_K accumulators a thread has those of two rows: S_rmem[4i + 2r + c] is row r, column 8i + 2t + c of the tile (t: lane % 4).
#pragma once

#include "ptx.cuh"

// So far, in base 2, scores may lie above the m of their row before it is raised: P and l are up to 2⁸ times as large, O = P V / l and the LSE are the same.
// Few tiles after the first then touch m and O at all.
constexpr float ABOVE_M = 8;

// ABOVE_M in units of S. Beside where m starts, p.lowest, it is lost in rounding, whatever the scale: any score that may be attended raises that.
__device__ inline float above_m(float scale_log2) { return SCORE ? ABOVE_M : fminf(ABOVE_M / scale_log2, 0x1p100f); }

// S becomes 2^(scale_log2 · (S − m)), m near its rows' maximum so far; l is this lane's share of the sum. m and `above` are in units of S; but of scores
// that are changed they are in base 2, and S becomes 2^(scale_log2 · S + shift − m). await_O() is called before all exponentials. rescale_O(raised), which
// multiplies O by alpha if some m was raised, is called before the second row's: they leave room for rounding the first row's P, for which P's registers
// must be free. LAZY: otherwise every tile sets m, and O is rescaled after all exponentials, which takes fewer registers.
template <bool LAZY, int SIZE, class AwaitO, class RescaleO>
__device__ inline void softmax(float (&S_rmem)[SIZE], float (&m_rmem)[2], float (&l_rmem)[2], float (&alpha)[2], float scale_log2, float above,
                               [[maybe_unused]] const float (&shift)[2], const AwaitO& await_O, const RescaleO& rescale_O) {
    constexpr bool SHIFTED = (SCORE & SCORE_ALIBI) != 0;
    // Whether row r of some lane has a new m.
    auto raise = [&](int r) {
        float largest = fmaxf(S_rmem[2 * r], S_rmem[2 * r + 1]);
#pragma unroll
        for (int i = 1; i < SIZE / 4; ++i) largest = fmaxf(largest, fmaxf(S_rmem[4 * i + 2 * r], S_rmem[4 * i + 2 * r + 1]));
        if (SCORE) largest = fmaf(largest, scale_log2, SHIFTED ? shift[r] : 0);
        const bool raised = !LAZY || __any_sync(0xffffffff, largest > m_rmem[r] + above);
        alpha[r] = 1;
        if (raised) {
            float m_new = fmaxf(m_rmem[r], largest);
            m_new = fmaxf(m_new, __shfl_xor_sync(0xffffffff, m_new, 1));  // the four lanes of a row
            m_new = fmaxf(m_new, __shfl_xor_sync(0xffffffff, m_new, 2));
            if (LAZY && m_new <= m_rmem[r] + above) m_new = m_rmem[r];  // another row's was raised: this one's bits do not depend on that
            alpha[r] = ptx::ex2(SCORE ? m_rmem[r] - m_new : (m_rmem[r] - m_new) * scale_log2);
            m_rmem[r] = m_new;
        }
        return raised;
    };
    auto exponentials = [&](int r) {
        const float m_log2 = SHIFTED ? m_rmem[r] - shift[r] : SCORE ? m_rmem[r] : m_rmem[r] * scale_log2;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < SIZE / 4; ++i)
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                float& x = S_rmem[4 * i + 2 * r + c];
                x = ptx::ex2(fmaf(x, scale_log2, -m_log2));
                sum += x;
            }
        l_rmem[r] = l_rmem[r] * alpha[r] + sum;
    };
    const bool first_raised = raise(0);
    await_O();
    exponentials(0);
    const bool second_raised = raise(1);  // found under the exponentials of the first row, which take longer
    auto raised = [&] { return first_raised || second_raised; };
    if (LAZY) rescale_O(raised);
    exponentials(1);
    if (!LAZY) rescale_O(raised);
}

// One tile's step of the online softmax in `hopper` and `hopper_wide`: between the tile's two products, in registers, with a lazy maximum, which is not
// updated while scores stay near it (as in FlashAttention-4, arXiv:2603.05451).
//
// Of a group's 64 × BLOCK_K accumulators a thread holds those of two rows: S_rmem[4i + 2r + c] is row r, column 8i + 2t + c of the tile (t: lane % 4).
#pragma once

#include "tensor_core.cuh"

// By how much, in base 2, scores may exceed the m of their row before m is raised: P and l are then up to 2⁸ times as large; O = P V / l and LSE do not
// change. So few tiles after the first update m or rescale O.
constexpr float ABOVE_M = 8;

// `above` in units of S. Added to m's initial value, p.lowest, it is lost in rounding, whatever the scale: any visible score raises m from there.
__device__ inline float above_m(float scale_log2, float above = ABOVE_M) { return fminf(above / scale_log2, 0x1p100f); }

// Replaces S by 2^(scale_log2 · (S − m)), where m is near the row's maximum so far; l is this lane's part of the sum. m and `above` are in units of S.
// await_O() is called before all exponentials. rescale_O(raised), which multiplies O by alpha if some m was raised, is called before the second row's
// exponentials: these leave issue slots for rounding the first row's P, which needs P's registers. If not LAZY, every tile sets m, and O is rescaled after
// all exponentials, which takes fewer registers.
template <bool LAZY, int SIZE, class AwaitO, class RescaleO>
__device__ inline void softmax(float (&S_rmem)[SIZE], float (&m_rmem)[2], float (&l_rmem)[2], float (&alpha)[2], float scale_log2, float above,
                               const AwaitO& await_O, const RescaleO& rescale_O) {
    // Updates m of row r. Returns whether some lane's m was raised.
    auto raise = [&](int r) {
        float largest = fmaxf(S_rmem[2 * r], S_rmem[2 * r + 1]);
#pragma unroll
        for (int i = 1; i < SIZE / 4; ++i) largest = fmaxf(largest, fmaxf(S_rmem[4 * i + 2 * r], S_rmem[4 * i + 2 * r + 1]));
        const bool raised = !LAZY || __any_sync(0xffffffff, largest > m_rmem[r] + above);
        alpha[r] = 1;
        if (raised) {
            float m_new = fmaxf(m_rmem[r], largest);
            m_new = row_max(m_new);
            if (LAZY && m_new <= m_rmem[r] + above) m_new = m_rmem[r];  // only another row's m is raised; this row's bits must not depend on that
            alpha[r] = ptx::ex2((m_rmem[r] - m_new) * scale_log2);
            m_rmem[r] = m_new;
        }
        return raised;
    };
    auto exponentials = [&](int r) {
        const float m_log2 = m_rmem[r] * scale_log2;
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
    const bool second_raised = raise(1);  // overlaps the exponentials of the first row, which take longer
    auto raised = [&] { return first_raised || second_raised; };
    if (LAZY) rescale_O(raised);
    exponentials(1);
    if (!LAZY) rescale_O(raised);
}

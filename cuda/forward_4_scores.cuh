// The forward of `hopper`, beside its fourth part: from S to P where softcap, bias or ALiBi change scores.
//
// As without them, P is computed without a search for the maximum in most tiles. m is kept in base 2.
#pragma once

#include "forward_4_softmax.cuh"

// Where ALiBi alone changes scores, its products are part of the exponents.
constexpr bool ONLY_SLOPED = SCORE == SCORE_ALIBI && !MASK;

// What exponents are made of: in base 2, the score of row r in a lane's column c (0, 1, 8, 9 …) is S · unit + shift[r], and if SLOPES, + c · step + first.
template <bool SLOPES>
struct Exponents {
    float unit, shift[2], step = 0, first = 0;

    // Minus m, and all that the columns of row r have in common.
    __device__ float base(int r, float m) const { return SLOPES ? shift[r] - m + first : shift[r] - m; }
    // The exponent of a score.
    __device__ float of(float S, int column, float base) const {
        return fmaf(S, unit, SLOPES ? fmaf(static_cast<float>(column), step, base) : base);
    }
};

// Applies softcap, bias and ALiBi to S, as far as they are not part of the exponents, and calls softmax() with what those are made of. Scores that the rows
// do not see become −∞. bias: the shared address from which this lane reads its rows' bias.
template <class Softmax>
__device__ inline void score_rows(float (&S_rmem)[BLOCK_K / 2], const Rows& rows, const Work& work, int j0, float slope, uint32_t bias,
                                  const Softmax& softmax) {
    const AttentionParams& p = rows.p;
    const int from_start = work.i0 + rows.offset - j0, distance = from_start + rows.first;  // from the tile's first column, of its first row; of the lane's
    Slopes slopes(ONLY_SLOPED ? slope * LOG2_E : slope, {distance, distance + ROW_STEP}, -1, from_start - (BLOCK_K - 1), from_start + BLOCK_Q - 1);
    const float lane_first = static_cast<float>(2 * rows.t) * slopes.step;
    if constexpr (ONLY_SLOPED) {
        if (rows.cut(work, j0)) rows.hide(S_rmem, work, j0);
        if (!slopes.mixed()) return softmax(Exponents<true>{p.scale * LOG2_E, {slopes.first[0], slopes.first[1]}, slopes.step, lane_first});
        for (int r = 0; r < 2; ++r) slopes.first[r] += lane_first;
#pragma unroll
        for (int i = 0; i < BLOCK_K / 2; ++i) S_rmem[i] = fmaf(S_rmem[i], p.scale * LOG2_E, slopes.of(i / 2 % 2, i / 4 * 8 + i % 2));
        softmax(Exponents<false>{1, {0, 0}});
    } else {
        auto apply = [&](auto small, auto rows_share) {
            score_tile<BLOCK_K, decltype(small)::value, decltype(rows_share)::value>(
                S_rmem, p, slopes, [&](int n, uint32_t(&pairs)[4]) { ptx::ldmatrix_x4(pairs, Tile_bias::step(bias, n / 2)); },
                [&](int n, int r, const float(&x)[2], const float(&)[2]) {
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        float& S = S_rmem[4 * n + 2 * r + c];
                        S = MASK && S < p.lowest ? -CUDART_INF_F : x[c];
                    }
                });
        };
        constexpr bool MAY_BE_SMALL = CAPPED && (!ONLY_CAPPED || MASK);  // with softcap alone, only a tile seen in part comes here
        [[maybe_unused]] float largest = 0;
        if (MAY_BE_SMALL)
#pragma unroll
            for (int i = 0; i < BLOCK_K / 2; ++i) largest = fmaxf(largest, fabsf(S_rmem[i]));
        auto score = [&](auto rows_share) {
            if (MAY_BE_SMALL && __all_sync(0xffffffff, largest * p.scoring.scale_in_cap <= 1)) apply(std::true_type(), rows_share);
            else apply(std::false_type(), rows_share);
        };
        Exponents<false> exponents = {unit_log2(p), {0, 0}};
        if (SLOPED && !slopes.mixed()) {
            for (int r = 0; r < 2; ++r) exponents.shift[r] = slopes.first[r] * LOG2_E;
            slopes.first[0] = lane_first;
            score(std::true_type());
        } else if (!SLOPED || !CAUSAL) {
            for (int r = 0; r < 2; ++r) slopes.first[r] += lane_first;
            score(std::false_type());
        }
        if (!MASK && rows.cut(work, j0)) rows.hide(S_rmem, work, j0);
        softmax(exponents);
    }
}

// P = 2^exponent, rounded. FIRST: the work item's first tile, which sets m.
template <bool FIRST, bool SLOPES, class AwaitO, class RescaleO>
__device__ inline void scored_softmax(uint32_t (&P_rmem)[BLOCK_K / 16][4], const float (&S_rmem)[BLOCK_K / 2], float (&m_rmem)[2], float (&l_rmem)[2],
                                      float (&alpha)[2], const Exponents<SLOPES>& exponents, const AttentionParams& p, const KeepBits<BLOCK_K>& keep, int lane,
                                      const AwaitO& await_O, const RescaleO& rescale_O) {
    float sum[2];
    auto exponentials = [&](auto between, const auto& await_O) {
        const float base[2] = {exponents.base(0, m_rmem[0]), exponents.base(1, m_rmem[1])};
        fill_P<decltype(between)::value>(P_rmem, sum, p, keep, await_O, [&](int r, int n, float(&x)[2]) {
#pragma unroll
            for (int c = 0; c < 2; ++c) x[c] = ptx::ex2(exponents.of(S_rmem[4 * n + 2 * r + c], 8 * n + c, base[r]));
        });
    };
    // The largest score of row r so far.
    auto largest = [&](int r) {
        Exponents<SLOPES> again = exponents;  // as if they were others: what was computed above would take too many registers
        again.unit = __uint_as_float(ptx::unknown(__float_as_uint(exponents.unit)));
        if (SLOPES) again.step = __uint_as_float(ptx::unknown(__float_as_uint(exponents.step)));
        float m_new = -CUDART_INF_F;
#pragma unroll
        for (int n = 0; n < BLOCK_K / 8; ++n)
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const float S = S_rmem[4 * n + 2 * r + c];
                m_new = fmaxf(m_new, SLOPES ? again.of(S, 8 * n + c, again.first) : S);
            }
        m_new = SLOPES ? m_new + again.shift[r] : fmaf(m_new, again.unit, again.shift[r]);
        m_new = row_max(m_new);
        return fmaxf(m_rmem[r], m_new);
    };
    uint32_t exceeding[2] = {~0u, ~0u};  // the lanes whose row needs another m
    if (!FIRST) {
        exponentials(std::bool_constant<O_BETWEEN>(), await_O);
#pragma unroll
        for (int r = 0; r < 2; ++r) exceeding[r] = __ballot_sync(0xffffffff, !(sum[r] <= MOST));
        if ((exceeding[0] | exceeding[1]) == 0) {
#pragma unroll
            for (int r = 0; r < 2; ++r) l_rmem[r] += sum[r];
            return;
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        // Each row decides by itself: no bit of it may depend on what another row sees.
        const float raised = largest(r), m_new = exceeding[r] >> lane / 4 * 4 & 15 ? raised : m_rmem[r];
        alpha[r] = ptx::ex2(m_rmem[r] - m_new);
        m_rmem[r] = m_new;
    }
    rescale_O([] { return true; });
    exponentials(std::false_type(), [] {});
#pragma unroll
    for (int r = 0; r < 2; ++r) l_rmem[r] = l_rmem[r] * alpha[r] + sum[r];
}

// scored_softmax() for scores that softcap alone changes. Sizes come first, because P's sums do not show that a score is too large for a polynomial. ORDER:
// tanh y is computed as y times a polynomial of this degree in y², so that S becomes 2^(factor(S²) · S − m) with one multiplication, ORDER FMAs and
// softmax's own FMA; 0: by the hardware's tanh. NEW_MAXIMUM: m is updated. tanh is monotonic, so the largest S of a row gives its m. round() is called at
// the end, because code after a branch cannot overlap code before it.
template <int ORDER, bool NEW_MAXIMUM, class AwaitO, class RescaleO, class Round>
__device__ inline void capped_softmax(float (&S_rmem)[BLOCK_K / 2], float (&m_rmem)[2], float (&l_rmem)[2], float (&alpha)[2], const AttentionParams& p,
                                      const AwaitO& await_O, const RescaleO& rescale_O, const Round& round) {
    const float scale_log2 = p.scale * LOG2_E, in_cap = p.scoring.scale_in_cap;
    auto capped = [&](float s, float minus_m) {
        if (ORDER == 0) return fmaf(ptx::tanh(s * in_cap), p.scoring.cap_log2, minus_m);
        return fmaf(s, ORDER == 1 ? tanh_over_1(s, in_cap, scale_log2) : tanh_over(s * in_cap, scale_log2), minus_m);
    };
    auto set_m = [&](int r) {
        float largest = -CUDART_INF_F;
#pragma unroll
        for (int i = 0; i < BLOCK_K / 8; ++i) largest = fmaxf(largest, fmaxf(S_rmem[4 * i + 2 * r], S_rmem[4 * i + 2 * r + 1]));
        largest = row_max(largest);
        const float m_new = fmaxf(m_rmem[r], capped(largest, 0));
        alpha[r] = ptx::ex2(m_rmem[r] - m_new);
        m_rmem[r] = m_new;
    };
    auto exponentials = [&](int r) {
        float sum = 0;
        // The condition, which always holds, keeps the compiler from computing a tanh long before its exponential, which would take too many registers.
        if (ORDER > 0 || p.scale > 0) {
#pragma unroll
            for (int i = 0; i < BLOCK_K / 8; ++i)
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    float& x = S_rmem[4 * i + 2 * r + c];
                    x = ptx::ex2(capped(x, -m_rmem[r]));
                    sum += x;
                }
        }
        l_rmem[r] = NEW_MAXIMUM ? l_rmem[r] * alpha[r] + sum : l_rmem[r] + sum;
    };
    if (NEW_MAXIMUM) set_m(0);
    await_O();
    exponentials(0);
    if (NEW_MAXIMUM) set_m(1);
    rescale_O([] { return NEW_MAXIMUM; });
    exponentials(1);
    round();
}

// By how much, in base 2, a score's magnitude may exceed its row's m before m is updated: P and l are larger by the same factor.
constexpr float SIZE_ABOVE_M = DTYPE == FLOAT16 ? 8 : 24;

// Runs capped_softmax() if nothing but softcap changes scores and the warp's rows see the whole tile. Returns whether it did.
template <class AwaitO, class RescaleO, class Round>
__device__ inline bool softmax_of_capped(float (&S_rmem)[BLOCK_K / 2], float (&m_rmem)[2], float (&l_rmem)[2], float (&alpha)[2], const Rows& rows,
                                         const Work& work, int j0, const AwaitO& await_O, const RescaleO& rescale_O, const Round& round) {
    if (!ONLY_CAPPED || MASK || rows.cut(work, j0)) return false;
    const AttentionParams& p = rows.p;
    // Four maxima at a time, so that each waits less for the previous one; three groups of causal rows have registers for only one.
    constexpr int AT_ONCE = CAUSAL && CONSUMERS > 2 ? 1 : 4;
    float size = 0, sizes[AT_ONCE] = {};
#pragma unroll
    for (int i = 0; i < BLOCK_K / 2; ++i) sizes[i % AT_ONCE] = fmaxf(sizes[i % AT_ONCE], fabsf(S_rmem[i]));
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) size = fmaxf(size, sizes[i]);
    const float in_cap = size * p.scoring.scale_in_cap;
    // A capped score exceeds neither the score nor the cap.
    const bool near_m = fminf(in_cap, 1) * p.scoring.cap_log2 <= fminf(m_rmem[0], m_rmem[1]) + SIZE_ABOVE_M;
    auto all = [](bool of_lane) { return __all_sync(0xffffffff, of_lane); };
    auto capped = [&](auto order, auto new_maximum) {
        capped_softmax<decltype(order)::value, decltype(new_maximum)::value>(S_rmem, m_rmem, l_rmem, alpha, p, await_O, rescale_O, round);
    };
    using std::false_type, std::true_type;
    using Order0 = std::integral_constant<int, 0>;
    using Order1 = std::integral_constant<int, 1>;
    using Order3 = std::integral_constant<int, 3>;
    if (all(near_m && in_cap <= LARGEST_1 && has_tanh_over_1(p))) capped(Order1(), false_type());
    else if (all(in_cap <= 1)) {
        if (all(near_m)) capped(Order3(), false_type());
        else capped(Order3(), true_type());
    } else {
        if (all(near_m)) capped(Order0(), false_type());
        else capped(Order0(), true_type());
    }
    return true;
}

// The forward of `hopper`, fourth part: what a thread does with its part of S between the two products, all of it in registers.
//
// Of a group's 64 × BLOCK_K accumulators, a thread holds those of two rows, ROW_STEP apart: S_rmem[4i + 2r + c] is row r, column 8i + 2t + c of the tile.
#pragma once

#include "forward_4_schedule.cuh"
#include "lazy_softmax.cuh"

// Whether rows' spans are read before they are needed. Changed scores leave no registers to hold them.
constexpr bool SPANS_EARLY = INTERVAL && !SCORE && !MASK;

// The thread's two rows of the tile of Q, and what they see. r: 0 or 1.
struct Rows {
    const AttentionParams& p;
    const int t;
    const int first;   // row r is first + ROW_STEP·r
    const int offset;  // causal: row i sees columns j ≤ i + offset
#if INTERVAL
    Interval span[2];  // of row r of the work item, if there are spans
#endif

    __device__ Rows(const AttentionParams& p, int lane)
        : p(p), t(lane % 4), first(RowOrder::row((threadIdx.x - GROUP) / 32 * 16 + lane / 4)), offset(diagonal(p)) {}

    // How many of the tile's columns, counted from its first, a row sees.
    __device__ int visible(int i0, int j0, int r) const { return (CAUSAL ? min(p.Nk, i0 + first + ROW_STEP * r + offset + 1) : p.Nk) - j0; }
#if INTERVAL
    // Whether some row does not see the whole tile.
    __device__ bool cut(const Work& work, int j0) const { return j0 < work.all.start || j0 + BLOCK_K > work.all.stop; }
    // The interval [start, stop) of the tile's columns that row r sees, counted from the tile's first.
    __device__ Interval interval(const Work& work, int j0, int r) const {
        const int i = work.i0 + first + ROW_STEP * r;
        const bool is_read = SPANS_EARLY && p.seen.spans != nullptr;
        const Interval keys = is_read ? cut_to_span(p, window_of_row(p, i), span[r]) : keys_of_row(p, work.b, work.h, i);
        return Interval{keys.start - j0, keys.stop - j0};
    }
    // Requests the rows' spans: before a work item's first product is issued, so that they have arrived when it ends.
    __device__ void read_spans(const Work& work) {
        if (!SPANS_EARLY || p.seen.spans == nullptr) return;
#pragma unroll
        for (int r = 0; r < 2; ++r) span[r] = span_of_row(p, work.b, work.h, work.i0 + first + ROW_STEP * r);
    }
    // How many of a lane's columns (0, 1, 8, 9, 16 … counted from its first) lie before this one.
    __device__ static int of_lane(int column) { return column <= 0 ? 0 : column / 8 * 2 + min(column % 8, 2); }
#else
    __device__ bool cut(const Work& work, int j0) const { return j0 + BLOCK_K > min(p.Nk, CAUSAL ? work.i0 + offset + 1 : p.Nk); }
#endif

#if MASK
    // Initialises the accumulators of S from the mask's bits, so that nothing has to be hidden later. mask: [BLOCK_Q] BitRow, or one for all rows.
    __device__ void start(float (&S_rmem)[BLOCK_K / 2], const uint8_t* mask, const Work& work, int j0) const {
        const bool edge = LIMITED && cut(work, j0);
        const bool shared = one_row(p);
        start_S<BLOCK_K>(S_rmem, mask, j0 % BIT_COLUMNS, shared ? 0 : first, shared ? 0 : ROW_STEP, t,
#if INTERVAL
                         [&](int r, int w) {
                             if (!edge) return 0u;
                             const Interval keys = interval(work, j0, r);
                             return ~first_bits(keys.stop - 32 * w) | first_bits(keys.start - 32 * w);
                         });
#else
                         [&](int r, int w) { return edge ? ~first_bits(visible(work.i0, j0, r) - 32 * w) : 0; });
#endif
    }
#endif

    // Without a mask, in a tile that rows see only in part: scores that a row does not see become −∞.
    __device__ void hide(float (&S_rmem)[BLOCK_K / 2], const Work& work, int j0) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#if INTERVAL
            const Interval keys = interval(work, j0, r);
            // A bit for each of this lane's columns, in their order: the instruction R2P tests seven bits at once, cheaper than two comparisons per column.
            const uint32_t seen = first_bits(of_lane(keys.stop - 2 * t)) & ~first_bits(of_lane(keys.start - 2 * t));
#pragma unroll
            for (int n = 0; n < BLOCK_K / 4; ++n)
                if (!(seen >> n & 1)) S_rmem[n / 2 * 4 + 2 * r + n % 2] = -CUDART_INF_F;
#else
            const int columns = visible(work.i0, j0, r) - 2 * t;  // from this lane's first
#pragma unroll
            for (int i = 0; i < BLOCK_K / 8; ++i)
#pragma unroll
                for (int c = 0; c < 2; ++c)
                    if (8 * i + c >= columns) S_rmem[4 * i + 2 * r + c] = -CUDART_INF_F;
#endif
        }
    }
};

#if SCORE
// Applies softcap, bias and ALiBi to S. The result is in units of unit_log2(), without shift[r], which applies to the whole row and is in base 2.
// Scores that the rows do not see become −∞. bias: the shared address from which this lane reads its rows' bias.
__device__ inline void score_rows(float (&S_rmem)[BLOCK_K / 2], float (&shift)[2], const Rows& rows, const Work& work, int j0, float slope, uint32_t bias) {
    const AttentionParams& p = rows.p;
    const int from_start = work.i0 + rows.offset - j0, distance = from_start + rows.first;  // from the tile's first column, of its first row; of the lane's
    Slopes slopes(slope, {distance, distance + ROW_STEP}, -1, from_start - (BLOCK_K - 1), from_start + BLOCK_Q - 1);
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
    const float lane_first = static_cast<float>(2 * rows.t) * slopes.step;
    if (SLOPED && !slopes.mixed()) {
        for (int r = 0; r < 2; ++r) shift[r] = slopes.first[r] * LOG2_E;
        slopes.first[0] = lane_first;
        score(std::true_type());
    } else if (!SLOPED || !CAUSAL) {
        shift[0] = shift[1] = 0;
        for (int r = 0; r < 2; ++r) slopes.first[r] += lane_first;
        score(std::false_type());
    }
    if (!MASK && rows.cut(work, j0)) rows.hide(S_rmem, work, j0);
}
#endif

// With a mask three groups have too few registers for the lazy maximum.
constexpr bool LAZY = CONSUMERS == 2 || !MASK;

#if SCORE
// softmax() for scores that softcap alone changes, in one pass. ORDER: tanh y is computed as y times a polynomial of this degree in y², so that S becomes
// 2^(factor(S²) · S − m) with one multiplication, ORDER FMAs and softmax's own FMA; 0: by the hardware's tanh. NEW_MAXIMUM: m is updated. tanh is
// monotonic, so the largest S of a row gives its m. round() is called at the end, because code after a branch cannot overlap code before it.
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
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 1));  // over the four lanes of a row
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 2));
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
#endif

// The accumulators of S, rounded to pairs, are already laid out as the A operand of O += P V: P_rmem[k] is the operand for 16 keys. `keep`: the elements
// that dropout keeps.
__device__ inline void round_P(uint32_t (&P_rmem)[BLOCK_K / 16][4], const float (&S_rmem)[BLOCK_K / 2], const KeepBits<BLOCK_K>& keep) {
#pragma unroll
    for (int k = 0; k < BLOCK_K / 16; ++k)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            P_rmem[k][e] = ptx::cvt_pair<element>(S_rmem[8 * k + 2 * e], S_rmem[8 * k + 2 * e + 1]);
            if (DROPOUT) P_rmem[k][e] &= keep.pair(e % 2, 2 * k + e / 2);
        }
}

// Draws which elements of the tile dropout keeps.
__device__ inline void draw(KeepBits<BLOCK_K>& keep, const AttentionParams& p, const Work& work, int j0) {
    if (!DROPOUT) return;
    const int thread = ptx::tid_x() - GROUP;  // re-read here, so that values derived from it occupy no registers before
    const int row = RowOrder::row(thread / 32 * 16 + thread % 32 / 4);
    keep.draw_rows(p, work.b, work.h, work.i0 + row, j0, thread % 32);
}

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
        if constexpr (SPANS_EARLY) {
            if (p.seen.spans == nullptr) return;
#pragma unroll
            for (int r = 0; r < 2; ++r) span[r] = span_of_row(p, work.b, work.h, work.i0 + first + ROW_STEP * r);
        }
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

// With a mask three groups have too few registers for the lazy maximum.
constexpr bool LAZY = CONSUMERS == 2 || !MASK;

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

// ---- P without a search for the maximum
//
// P is computed with the m of the tiles before, and rounded at once, while S stays as it is. Only if P's sums turn out too large, which is rare, m is raised
// and P computed once more. So nothing seeks a maximum in most tiles. O's product must have ended before P's registers are written.

// Without changed scores, in bfloat16 only, which has room for P of any size. Dropout leaves too few registers, and so does a mask with three groups.
constexpr bool OPTIMISTIC = LAZY && DTYPE == BFLOAT16 && !SCORE && !DROPOUT;

// P of a score that equals m is 2 to the power of −BELOW_M, so that scores may exceed m by that much more before P is too large; O / l does not change. From
// 16 on, an exponent would have too few bits after the point for LSE's tolerance.
constexpr float BELOW_M = OPTIMISTIC ? 15 : 0, TO_M = OPTIMISTIC ? 0x1p15f : 1;  // TO_M: 2 to the power of BELOW_M

// Elements 8n + 2t and the next of row r of P, rounded.
__device__ inline uint32_t pair_of_P(float first, float second, int r, int n, const KeepBits<BLOCK_K>& keep) {
    uint32_t pair = ptx::cvt_pair<element>(first, second);
    if (DROPOUT) pair &= keep.pair(r, n);
    return pair;
}

// Whether O's product still runs during the first row's exponentials: until these are rounded they take registers that three groups do not have.
constexpr bool O_BETWEEN = CONSUMERS == 2;

// Computes P and its sums. fill(r, n, x) sets x to P of row r, columns 8n + 2t and 8n + 2t + 1. await_O() is called before P's registers are written; if
// BETWEEN, between the rows.
template <bool BETWEEN, class AwaitO, class Fill>
__device__ inline void fill_P(uint32_t (&P_rmem)[BLOCK_K / 16][4], float (&sum)[2], const AttentionParams& p, const KeepBits<BLOCK_K>& keep,
                              const AwaitO& await_O, const Fill& fill) {
    float first_row[BLOCK_K / 8][2];
    if (!BETWEEN) await_O();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (BETWEEN && r == 1) {
            // The compiler would move the wait before the first row's exponentials, but does not move it across a branch. This condition always holds.
            if (p.scale > 0) ptx::wgmma_wait_group<0>();
            await_O();
        }
        sum[r] = 0;
#pragma unroll
        for (int n = 0; n < BLOCK_K / 8; ++n) {
            float x[2];
            fill(r, n, x);
            sum[r] += x[0];
            sum[r] += x[1];
            if (BETWEEN && r == 0) first_row[n][0] = x[0], first_row[n][1] = x[1];
            else P_rmem[n / 2][n % 2 * 2 + r] = pair_of_P(x[0], x[1], r, n, keep);
        }
    }
    if (BETWEEN)
#pragma unroll
        for (int n = 0; n < BLOCK_K / 8; ++n) P_rmem[n / 2][n % 2 * 2] = pair_of_P(first_row[n][0], first_row[n][1], 0, n, keep);
}

// The largest sum of a lane's part of a row of P for which m stays: P itself is then at most as large. It leaves float16 a factor of 8, and at least 2⁸⁰ of
// float32's range, in which O is summed, for V and the number of keys.
constexpr float MOST = DTYPE == FLOAT16 ? 0x1p13f : OPTIMISTIC ? 0x1p48f : 0x1p24f;

#if !SCORE
// Which of a warp's 16 rows seek their maximum in each tile, before P is computed: those that have no m yet, and those whose P has been too large twice in
// their work item. In a set of rows, bit 4i + 2r stands for row r of the lanes 4i to 4i + 3.
class Seekers {
    static constexpr uint32_t ALL = 0x55555555;
    uint32_t bits = ALL << 1;  // the set of rows whose P has been too large once, and between its bits, the set of those that seek

  public:
    // The set of rows r of these lanes.
    __device__ static uint32_t rows(uint32_t lanes, int r) { return ((lanes | lanes >> 1 | lanes >> 2 | lanes >> 3) & 0x11111111) << 2 * r; }
    __device__ uint32_t rows() const { return bits >> 1 & ALL; }
    __device__ bool any() const { return (bits & ALL << 1) != 0; }
    __device__ void remove(uint32_t rows) { bits &= ~(rows << 1); }
    // P of these rows, which do not seek, is too large.
    __device__ void too_large(uint32_t rows) { bits |= rows | (rows & bits) << 1; }
};

// What is added to scale_log2 · S to give the exponent of P. LSE is computed from it, so that its rounding does no harm.
__device__ inline float shift_of(float m, float scale_log2) { return fmaf(-m, scale_log2, -BELOW_M); }

// P = 2^(scale_log2 · (S − m) − BELOW_M), rounded; l grows by its sums. m is in units of S, and so is `above`, by which scores may exceed the m of a row that
// seeks. FIRST: in a work item's first tile.
template <bool FIRST, class AwaitO, class RescaleO>
__device__ inline void optimistic_softmax(uint32_t (&P_rmem)[BLOCK_K / 16][4], const float (&S_rmem)[BLOCK_K / 2], float (&m_rmem)[2], float (&l_rmem)[2],
                                          float (&alpha)[2], Seekers& seekers, float scale_log2, float above, const AttentionParams& p,
                                          const KeepBits<BLOCK_K>& keep, int lane, const AwaitO& await_O, const RescaleO& rescale_O) {
    float sum[2];
    // Raises m of row r, if it is one of `rows` and has larger scores. Returns whether it was raised in some lane.
    auto raise_row = [&](int r, uint32_t rows) {
        float largest = -CUDART_INF_F;
#pragma unroll
        for (int i = 0; i < BLOCK_K / 8; ++i) largest = fmaxf(largest, fmaxf(S_rmem[4 * i + 2 * r], S_rmem[4 * i + 2 * r + 1]));
        alpha[r] = 1;
        const bool seeks = rows >> (lane / 4 * 4 + 2 * r) & 1;
        if (!__any_sync(0xffffffff, seeks && largest > m_rmem[r] + above)) return false;
        largest = row_max(largest);
        const bool raised = seeks && largest > m_rmem[r] + above;  // each row decides by itself
        seekers.remove(Seekers::rows(__ballot_sync(0xffffffff, raised && m_rmem[r] == p.lowest), r));
        if (raised) {
            alpha[r] = ptx::ex2((m_rmem[r] - largest) * scale_log2);
            m_rmem[r] = largest, l_rmem[r] *= alpha[r];
        }
        return true;
    };
    auto raise = [&](uint32_t rows) {
        const bool first = raise_row(0, rows), second = raise_row(1, rows);
        return first || second;
    };
    auto exponentials = [&](auto between, const auto& await_O) {
        const float shift[2] = {shift_of(m_rmem[0], scale_log2), shift_of(m_rmem[1], scale_log2)};
        fill_P<decltype(between)::value>(P_rmem, sum, p, keep, await_O, [&](int r, int n, float(&x)[2]) {
#pragma unroll
            for (int c = 0; c < 2; ++c) x[c] = ptx::ex2(fmaf(S_rmem[4 * n + 2 * r + c], scale_log2, shift[r]));
        });
    };
    if (FIRST) seekers = Seekers();
    bool raised = false;
    if (FIRST || seekers.any()) raised = raise(seekers.rows());
    exponentials(std::bool_constant<O_BETWEEN && !FIRST>(), await_O);  // all warps of the group wait for O at the same place
    rescale_O([&] { return raised; });
    if (!FIRST && __any_sync(0xffffffff, !(sum[0] + sum[1] <= MOST))) {
        uint32_t rows = 0;
#pragma unroll
        for (int r = 0; r < 2; ++r) rows |= Seekers::rows(__ballot_sync(0xffffffff, !(sum[r] <= MOST)), r);
        rows &= ~seekers.rows();
        seekers.too_large(rows);
        if (raise(rows)) {
            rescale_O([] { return true; });
            exponentials(std::false_type(), [] {});
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) l_rmem[r] += sum[r];
}
#endif

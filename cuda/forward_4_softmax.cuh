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

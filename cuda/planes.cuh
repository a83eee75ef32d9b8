// float32 from 16-bit products: each operand as a sum of two float16 "planes", written once by a small kernel.
//
// One float16 holds the first 11 bits of a number, a second one 11 bits of the remainder: x = hi + lo, 22 to 23 bits of float32's 24. So x · y = hi·hi +
// hi·lo + lo·hi, three products that tensor cores make exactly and add up in float32; the fourth, lo·lo, is as small as float32's own rounding (Ootomo and
// Yokota, 2022, arXiv:2203.03341). There are two difficulties:
//
// - float16 reaches from 2^-24 to 2^16. A head is multiplied by a power of two, which changes no bit of it, so that its largest entry lies between
//   2^14 and 2^15. Then lo holds parts down to 2^-40 of that; smaller ones are lost. The kernels determine whether the loss matters:
//   for scores in advance (scores_fit), for O row by row, for gradients from their size when all is computed (gradients_fit).
//   If it may matter for a head, the `simple` rung computes that head again; it is launched every time and usually has nothing to do. So no result is
//   silently wrong, and the host never waits.
// - Tensor cores truncate their sums where float32 arithmetic rounds, so a sum over thousands of keys would drift. So every tile's products are summed
//   separately, the small ones first, and added to the running sum in float32.
//
// With -DPLANES=1, for torch.set_float32_matmul_precision("high") and "medium", there is hi alone and one product. Its 11 bits are TF32's. TF32 has
// float32's range too, while hi loses bits below 2^-29 of its head's largest entry; but even then its error is at most 2^-40 of that entry. So what is
// promised is TF32's accuracy relative to the largest entry of a head.
//
// The workspace, and the kernels that come before attention: range_kernel finds each head's largest entry, planes_kernel writes its planes.
#pragma once

#include "parts_of_heads.cuh"
#include "tensor_map.cuh"

#if DTYPE != FLOAT32
#error "planes are of float32 numbers; 16-bit types need none"
#endif

#ifndef PLANES
#define PLANES 2  // hi, lo
#endif
static_assert(PLANES == 1 || PLANES == 2, "hi, or hi and lo");

// The products of planes that make one product of numbers: lo · hi, hi · lo, hi · hi, the small ones first, while the sum is small; or hi · hi alone.
// Forward and backward take Q's plane (in P V, P's) as the first factor: both must have the same S, to the last bit.
constexpr int PRODUCTS = PLANES == 1 ? 1 : 3;
__device__ constexpr int plane_of_first(int product) { return PLANES == 2 && product == 0; }
__device__ constexpr int plane_of_second(int product) { return PLANES == 2 && product == 1; }

// The range of values in a head of K and V and the query heads that share it. The largest magnitudes are kept as the bits of floats, which compare in the
// same order as the numbers, with ∞ and NaN above all of them. 0 at first.
struct Range {
    int q, k, v, d_o;      // the largest entry
    int v_norm, d_o_norm;  // the largest sum of a row's squares, when scaled
    int delta;             // the largest Delta, when scaled
    int dq, dk, dv;        // the largest entry of the gradient, before it is scaled
    int o_is_small;        // whether some row of O may have lost bits
    int unused[5];
};

__device__ inline int magnitude(float x) { return __float_as_uint(x) & 0x7fffffff; }

// The exponent of the power of two that scales `largest`, the largest magnitude, into [2^14, 2^15).
__device__ inline int exponent_of(int largest) { return largest == 0 ? 0 : 14 + 127 - (largest >> 23); }
// Whether a head with this largest entry can be scaled like this: not if it is ∞, NaN or tiny.
__device__ inline bool can_scale(int largest) { return largest == 0 || (largest >= __float_as_uint(0x1p-100f) && largest < 0x7f800000); }

// ---- does the part that the planes lose matter?

// The factor that turns a sum of planes' products into a score.
__device__ inline float scale_of_scores(const AttentionParams& p, const Range& range) { return scalbnf(p.scale, -exponent_of(range.q) - exponent_of(range.k)); }

// Scores: the error of an entry is at most 2^-40 of the largest entry, so that of a score is at most 2 · 2^-40 · D · scale · (largest of Q) · (largest of K).
// It must be below 2^-23, which is float32's own error at a score of 2. That is more than one plane needs; but then the same heads can be scaled.
__device__ inline bool scores_fit(const AttentionParams& p, const Range& range) {
    const float bound = __uint_as_float(range.q) * __uint_as_float(range.k) * (p.scale * p.D), scale = scale_of_scores(p, range);
    // Limits of the scale: a hidden score must not come near the others (common.cuh: start_of_sum), and a maximum must not overflow.
    return can_scale(range.q) && can_scale(range.k) && can_scale(range.v) && bound < 0x1p16f && scale > 0x1p-90f && scale < 0x1p60f;
}
// For a row of O whose largest entry, in V's scale, is `largest`: P and V have errors of 2^-40, so `largest` must be at least 2^-15 of V's largest; or, if
// an error of 2^-12 will do, 2^-28 of it.
__device__ inline bool row_fits(float largest) { return largest >= (PLANES == 1 ? 0x1p-13f : 1); }

// dS = P∘(dP − Delta) is scaled by a bound known before it is computed: |dP| ≤ |dO row| · |V row|, P ≤ 1.
__device__ inline float bound_of_dS(const Range& range) {
    return sqrtf(__uint_as_float(range.v_norm)) * sqrtf(__uint_as_float(range.d_o_norm)) + __uint_as_float(range.delta);
}
__device__ inline int exponent_of_dS(const Range& range) { return min(60, exponent_of(__float_as_uint(bound_of_dS(range)))); }

// A gradient is a sum of `terms` products. One factor (dS, or P) has an error of at most 2^-25 of either sign, the other is below 2^15. `largest`, the
// gradient's largest entry before scaling, must be at least 2^19 times the expected sum of these errors; of one plane, 2^12 times.
__device__ inline bool sum_fits(int largest, int64_t terms) {
    return largest < 0x7f800000 && __uint_as_float(largest) >= (PLANES == 1 ? 0x1p2f : 0x1p9f) * (sqrtf(static_cast<float>(terms)) + 2);
}
// dQ and dK have another error: dP and Delta are each off by about 2^-27 of their bound, which matters where they cancel, most of all if a row sees only
// one key and dP − Delta should be exactly 0. A score contributes its share P of this error, about 1 / Nk. With one plane, dP and Delta have the
// same rounded factors (rounded_as_planes), and what they are off by is TF32's error, which exact arithmetic on this O would not mend.
__device__ inline bool sum_of_dS_fits(const AttentionParams& p, int largest, int64_t terms) {
    return sum_fits(largest, terms) && (PLANES == 1 || __uint_as_float(largest) * p.Nk >= 0x1p22f * sqrtf(static_cast<float>(terms)));
}
__device__ inline bool gradients_fit(const AttentionParams& p, const Range& range) {
    const int64_t rows = static_cast<int64_t>(p.Nq) * (p.H / p.Hkv);
    const float bound = bound_of_dS(range);
    if (!scores_fit(p, range) || !can_scale(range.d_o) || !(bound < 0x1p100f)) return false;
    const bool dS_fits = bound == 0 || (sum_of_dS_fits(p, range.dq, p.Nk) && sum_of_dS_fits(p, range.dk, rows));
    return dS_fits && (range.d_o == 0 || sum_fits(range.dv, rows));
}

// The Range of a head, for the simple rung: all of them precede its workspace.
__device__ inline const Range& range_before(const AttentionParams& p, int b, int h_kv) {
    return (reinterpret_cast<const Range*>(p.workspace) - p.B * p.Hkv)[b * p.Hkv + h_kv];
}
#if PLANES == 1
// Forward and backward may leave different heads to the simple rung, but P = exp(S − LSE) needs the S that LSE is of: large scores differ by more than 1
// in 11 bits and in 24. So that rung rounds Q and K too, in all heads whose scores fit; and in the backward V, of which O is made.
__device__ inline float scale_of_plane(const AttentionParams& p, int b, int h_kv, int Range::*largest) {
    const Range& range = range_before(p, b, h_kv);
    return scores_fit(p, range) ? scalbnf(1, exponent_of(range.*largest)) : 0;
}
#define ROUNDING_OF_Q(p, b, h) scale_of_plane(p, b, h, &Range::q)
#define ROUNDING_OF_K(p, b, h) scale_of_plane(p, b, h, &Range::k)
#define ROUNDING_OF_V(p, b, h) scale_of_plane(p, b, h, &Range::v)
#endif

// ---- workspace: planes of every operand of a part of the heads (parts_of_heads.cuh), what else its kernels need, then a Range for each head of K of
// the whole call, then what the simple rung needs.

// A tensor and its planes.
struct Operand {
    Tensor4 tensor;  // [B, heads, N, D] float32
    int heads, N, D;
    int share;         // heads that have a Range in common
    Tensor4 planes;    // [PLANES, B·heads, N, HEAD_DIM] float16, columns from D on 0
    int Range::*largest;
    int Range::*norm;  // or null

    __host__ __device__ int64_t rows(int B) const { return static_cast<int64_t>(B) * heads * N; }
};
struct Operands {
    Operand of[4];  // q, k, v and, of a backward, dO
    int count;
    Range* ranges;  // [B, Hkv]
    int64_t floats;  // of planes in the workspace

    // p: the call of a part of the heads. until_dV: V's planes may lie in dV's memory, because nothing reads them once dV is being written.
    Operands(const AttentionParams& p, bool backward, Range* ranges, bool until_dV = false)
        : of{{p.q, p.H, p.Nq, p.D, p.H / p.Hkv, {}, &Range::q, nullptr},
             {p.k, p.Hkv, p.Nk, p.D, 1, {}, &Range::k, nullptr},
             {p.v, p.Hkv, p.Nk, p.Dv, 1, {}, &Range::v, &Range::v_norm},
             {p.d_o, p.H, p.Nq, p.Dv, p.H / p.Hkv, {}, &Range::d_o, &Range::d_o_norm}},
          count(backward ? 4 : 3),
          ranges(ranges),
          floats(0) {
        for (int n = 0; n < count; ++n) {
            Operand& x = of[n];
            if (&x == &of[2] && until_dV && planes_fit_in(p.dv, p)) {  // a row of dV has room for hi of V's row, then lo
                x.planes = {p.dv.data, HEAD_DIM, 2 * p.dv.stride_h, 2 * p.dv.stride_n};
                continue;
            }
            x.planes = {p.workspace + floats, x.rows(p.B) * HEAD_DIM, static_cast<int64_t>(x.N) * HEAD_DIM, HEAD_DIM};
            floats += x.rows(p.B) * HEAD_DIM * PLANES / 2;
        }
    }
    // Whether a row has as many columns as its planes, and heads of all batches are equally spaced.
    static bool planes_fit_in(const Tensor4& dV, const AttentionParams& p) { return p.Dv == HEAD_DIM && (p.B == 1 || dV.stride_b == p.Hkv * dV.stride_h); }
    static int64_t range_floats(const AttentionParams& p) { return static_cast<int64_t>(p.B) * p.Hkv * (sizeof(Range) / 4); }
};

// The tensor map of an operand's planes: its box is `rows` rows and 64 columns; (column, row, head, plane) says where.
inline cudaError_t make_planes_map(CUtensorMap* map, const Operand& x, int B, int rows) {
    return encode_tensor_map(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_SWIZZLE_128B, x.planes, PLANES, B * x.heads, x.N, HEAD_DIM, rows, 64);
}

// ---- before attention

constexpr int PREPARE_THREADS = 256;
constexpr int ROW_LANES = HEAD_DIM <= 256 ? HEAD_DIM / 8 : 32;  // that share a row, 8 columns each at a time
constexpr int ROW_PARTS = HEAD_DIM / (8 * ROW_LANES);           // of a row, one after the other
constexpr int ROWS_AT_ONCE = PREPARE_THREADS / ROW_LANES, PREPARE_ROWS = 4 * ROWS_AT_ONCE;
static_assert(ROW_LANES * ROW_PARTS * 8 == HEAD_DIM, "lanes have whole parts of a row");

// Updates `largest` with the largest of a warp's numbers.
__device__ inline void join_maximum(int* to, int x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x = max(x, __shfl_xor_sync(0xffffffff, x, lanes));
    if (threadIdx.x % 32 == 0) ptx::red_max(to, x);
}

__global__ void __launch_bounds__(PREPARE_THREADS) clear_kernel(Range* ranges, int64_t ints) {
    const int64_t n = static_cast<int64_t>(blockIdx.x) * PREPARE_THREADS + threadIdx.x;
    if (n < ints) reinterpret_cast<int*>(ranges)[n] = 0;
}

// A block of these kernels handles PREPARE_ROWS rows of one head of operand blockIdx.y. For each row and each part of it, visit(x, range, bh, i, numbers)
// receives this lane's 8 numbers of row i of head bh, counted over all batches; from row x.N on they are 0.
template <class Visit>
__device__ inline void visit_rows(const Operands& all, int B, Visit visit) {
    const Operand& x = all.of[blockIdx.y];
    const int of_head = (x.N + PREPARE_ROWS - 1) / PREPARE_ROWS, bh = blockIdx.x / max(1, of_head), b = bh / x.heads, h = bh % x.heads;
    if (b >= B || of_head == 0) return;  // another operand has more rows
    Range& range = all.ranges[bh / x.share];
    const int column = threadIdx.x % ROW_LANES * 8;
#pragma unroll 1
    for (int r = 0; r < PREPARE_ROWS; r += ROWS_AT_ONCE) {
        const int i = blockIdx.x % of_head * PREPARE_ROWS + r + threadIdx.x / ROW_LANES;
        float4 numbers[ROW_PARTS][2] = {};
        const float* source = reinterpret_cast<const float*>(x.tensor.data) + b * x.tensor.stride_b + h * x.tensor.stride_h + i * x.tensor.stride_n + column;
#pragma unroll
        for (int part = 0; part < ROW_PARTS; ++part)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                if (i < x.N && column + part * ROW_LANES * 8 + 4 * half < x.D) numbers[part][half] = reinterpret_cast<const float4*>(source + part * ROW_LANES * 8)[half];
        visit(x, range, bh, i, reinterpret_cast<const float(&)[ROW_PARTS][8]>(numbers));
    }
}

__global__ void __launch_bounds__(PREPARE_THREADS) range_kernel(const __grid_constant__ Operands all, int B) {
    visit_rows(all, B, [](const Operand& x, Range& range, int, int, const float(&numbers)[ROW_PARTS][8]) {
        int largest = 0;
#pragma unroll
        for (int e = 0; e < 8 * ROW_PARTS; ++e) largest = max(largest, magnitude(numbers[e / 8][e % 8]));
        join_maximum(&(range.*x.largest), largest);
    });
}

// A pair of numbers as pairs of planes. Of one plane, lo is not used, and not computed.
__device__ inline void split(float x0, float x1, uint32_t& hi, uint32_t& lo) {
    hi = ptx::cvt_pair<__half>(x0, x1);
    const float2 held = ptx::floats_of_pair(hi);
    lo = ptx::cvt_pair<__half>(x0 - held.x, x1 - held.y);
}
__device__ inline void split(float x0, float x1, uint32_t (&pairs)[PLANES]) {
    uint32_t lo;
    split(x0, x1, pairs[0], lo);
    if (PLANES == 2) pairs[PLANES - 1] = lo;
}

// dO for Delta = rowsum(dO∘O): as the products have it, if there is no lo. So dP − Delta is as small as it should be where a row attends to one key.
__device__ inline float4 rounded_as_planes(const float4& x, const Range& range) {
    if (PLANES == 2) return x;
    const float factor = scalbnf(1, exponent_of(range.d_o)), back = scalbnf(1, -exponent_of(range.d_o));
    const float2 xy = ptx::floats_of_pair(ptx::cvt_pair<__half>(x.x * factor, x.y * factor));
    const float2 zw = ptx::floats_of_pair(ptx::cvt_pair<__half>(x.z * factor, x.w * factor));
    return make_float4(xy.x * back, xy.y * back, zw.x * back, zw.y * back);
}

// What a backward reads of row i of head bh: LSE, and Delta = rowsum(dO∘O) − dLSE (line 4) in the scale of dP. The ROW_LANES lanes that share a row each
// have a part of the sum.
struct RowOfBackward {
    float LSE, Delta;
};
__device__ inline RowOfBackward finish_row(const AttentionParams& p, Range& range, int bh, int i, float Delta) {
#pragma unroll
    for (int lanes = ROW_LANES / 2; lanes > 0; lanes /= 2) Delta += __shfl_xor_sync(0xffffffff, Delta, lanes);
    const int64_t row = static_cast<int64_t>(bh) * p.Nq + i;
    const float LSE = i < p.Nq ? p.lse[row] : -CUDART_INF_F;
    if (i < p.Nq && p.d_lse) Delta -= p.d_lse[row];
    // A row that attends nothing, or lies beyond the end: P = 2^(S − ∞) = 0, and its dO, even if NaN, is ignored.
    const bool dead = LSE == -CUDART_INF_F;
    if (DROPOUT) Delta /= p.keep_scale;  // the backward computes dS / keep_scale
    Delta = dead ? 0 : scalbnf(Delta, exponent_of(range.v) + exponent_of(range.d_o));
    join_maximum(&range.delta, magnitude(Delta));
    return {dead ? CUDART_INF_F : LSE, Delta};
}

__global__ void __launch_bounds__(PREPARE_THREADS) planes_kernel(const __grid_constant__ Operands all, int B) {
    visit_rows(all, B, [&](const Operand& x, Range& range, int bh, int i, const float(&numbers)[ROW_PARTS][8]) {
        const float factor = scalbnf(1, exponent_of(range.*x.largest));
        float squares = 0;
#pragma unroll
        for (int part = 0; part < ROW_PARTS; ++part) {
            uint32_t pairs[4][PLANES];
#pragma unroll
            for (int e = 0; e < 8; e += 2) {
                const float x0 = numbers[part][e] * factor, x1 = numbers[part][e + 1] * factor;
                split(x0, x1, pairs[e / 2]);
                squares = fmaf(x0, x0, fmaf(x1, x1, squares));
            }
#pragma unroll
            for (int plane = 0; plane < PLANES; ++plane) {
                __half* row = static_cast<__half*>(x.planes.data) + plane * x.planes.stride_b + bh * x.planes.stride_h + i * x.planes.stride_n;
                if (i >= x.N) continue;
                reinterpret_cast<uint4*>(row)[part * ROW_LANES + threadIdx.x % ROW_LANES] =
                    make_uint4(pairs[0][plane], pairs[1][plane], pairs[2][plane], pairs[3][plane]);
            }
        }
        if (x.norm == nullptr) return;
#pragma unroll
        for (int lanes = ROW_LANES / 2; lanes > 0; lanes /= 2) squares += __shfl_xor_sync(0xffffffff, squares, lanes);
        join_maximum(&(range.*x.norm), __float_as_uint(squares));
    });
}

// The grid of each of these launches.
inline int64_t prepare_blocks(const AttentionParams& p, const Operands& all) {
    int64_t blocks = 0;
    for (int n = 0; n < all.count; ++n) blocks = std::max(blocks, tiles_of(all.of[n].N, PREPARE_ROWS) * all.of[n].heads * p.B);
    return blocks;
}
inline void launch_clear(const AttentionParams& whole, Range* ranges) {
    const int64_t ints = Operands::range_floats(whole);
    launch_kernel(clear_kernel, static_cast<unsigned>(tiles_of(ints, PREPARE_THREADS)), PREPARE_THREADS, 0, whole.stream, ranges, ints);
}
// p: the call of a part. The Ranges of all parts are cleared beforehand, at once.
inline void launch_planes(const AttentionParams& p, const Operands& all) {
    const dim3 blocks(static_cast<unsigned>(prepare_blocks(p, all)), all.count);
    launch_kernel(range_kernel, blocks, PREPARE_THREADS, 0, p.stream, all, p.B);
    launch_kernel(planes_kernel, blocks, PREPARE_THREADS, 0, p.stream, all, p.B);
}

// Launches a whole call: its parts one after another, each by launch_part(its call, its Ranges, its first head); then, by `exact`, the heads that planes
// cannot represent. simple_workspace: the workspace of `exact`, at the end of the call's; the Ranges lie before it.
inline cudaError_t launch_parts(const AttentionParams& p, const Parts& parts, float* simple_workspace,
                                cudaError_t (*launch_part)(const AttentionParams&, Range*, First), int (*exact)(const AttentionParams*)) {
    Range* ranges = reinterpret_cast<Range*>(simple_workspace) - p.B * p.Hkv;
    launch_clear(p, ranges);
    for (int n = 0; n < parts.count(); ++n) {
        const Part part = parts.part(n);
        const cudaError_t error = launch_part(call_of(p, part), ranges + part.b * p.Hkv + part.h, first_of(p, part));
        if (error != cudaSuccess) return error;
    }
    AttentionParams of_simple = p;
    of_simple.workspace = simple_workspace;
    return static_cast<cudaError_t>(exact(&of_simple));
}

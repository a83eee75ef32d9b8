// What forward_1_simple.cu and backward_1_simple.cu share: how a block divides a tile of scores among its threads, chunks of matrices in
// shared memory, the two matrix products, which scores are hidden, and dropout.
//
// The threads of a block are GROUPS groups (16, or 32 for large head sizes) of 8 lanes. A tile of scores has ROWS · GROUPS rows and 64
// columns, and lane t of group g holds
//
//     rows g, g + GROUPS, g + 2 · GROUPS, …  ×  columns t, t + 8, …, t + 56
//
// in registers: ROWS × 8 scores. So a row lies in 8 neighbouring lanes of one warp, which find its maximum and its sum by shuffles; what
// neighbours read from shared memory lies in neighbouring rows, in different banks; and a thread's columns, 8 apart, are those that one
// call of Philox serves.
#pragma once

#include "score.cuh"

constexpr int THREADS = HEAD_DIM < 256 ? 128 : 256;
constexpr int BLOCKS_PER_SM = 1;         // at least. Kernels may use all registers: spilling a few to fit one more block is slower
constexpr int LANES = 8;                 // that share a row
constexpr int GROUPS = THREADS / LANES;  // rows that a block works on side by side
constexpr int COLUMNS = 8;               // of a tile of scores, in one thread
constexpr int TILE = LANES * COLUMNS;    // columns of a tile of scores
constexpr int CHUNK = 32;                // columns of Q, K, V or dO that shared memory holds at a time
constexpr int CHUNKS = HEAD_DIM / CHUNK;
static_assert(HEAD_DIM % CHUNK == 0, "a head size is padded to a multiple of 32");
// If registers are short, the thread's index is re-read, so that values derived from it occupy none in the rest of a step.
constexpr bool TIGHT = ARCH == 86 || ARCH == 89 ? HEAD_DIM <= 64 : ARCH >= 100 && ARCH < 120;

// Shared memory. Rows are padded, so that a warp's simultaneous accesses fall into different banks: eight lanes read 16 bytes from each of
// eight rows of a chunk, 36 words apart; four groups write eight columns each of four rows of scores, 72 words apart.
template <int N>
using Chunk = float[N][CHUNK + 4];  // N rows, CHUNK columns of a matrix
template <int N>
using Scores = float[N][TILE + 8];  // N rows of a tile of P or dS

__device__ inline int group() { return threadIdx.x / LANES; }
__device__ inline int lane() { return threadIdx.x % LANES; }

// A file that includes this rung can say which heads it has already computed itself (planes.cuh), and by which power of two Q, K and, in the backward, V
// are multiplied to be rounded to float16's 11 bits; 0 if they are read as they are. h is a head of K and V.
#ifndef HEAD_IS_DONE
#define HEAD_IS_DONE(p, b, h) false
#endif
#ifndef ROUNDING_OF_Q
#define ROUNDING_OF_Q(p, b, h) 0
#define ROUNDING_OF_K(p, b, h) 0
#define ROUNDING_OF_V(p, b, h) 0
#endif

// ---- matrices in global memory

struct Matrix {
    element* gmem;   // [rows, columns], columns contiguous
    int64_t stride;  // elements from row to row
    int rows, columns;
    float rounding;  // the power of two that multiplies its elements while they are rounded, or 0
};

__device__ inline Matrix matrix(const Tensor4& t, int b, int h, int rows, int columns, float rounding = 0) {
    return {head_of(t, b, h), t.stride_n, rows, columns, rounding};
}

// N rows from row i0 on, and CHUNK columns from column d0 on, times `factor`, as float32. What lies beyond the matrix becomes 0.
// A warp reads 32 neighbouring elements of one row, of any alignment and type; a thread issues all its loads before it waits for the first.
template <int N>
__device__ inline void load_chunk(Chunk<N>& X_smem, const Matrix& X, int i0, int d0, float factor = 1) {
    constexpr int WARPS = THREADS / 32;
    const int warp = threadIdx.x / 32, d = threadIdx.x % 32;
    const element* source = X.gmem + (i0 + warp) * X.stride + d0 + d;
    float x_rmem[N / WARPS];
#pragma unroll
    for (int n = 0; n < N / WARPS; ++n, source += WARPS * X.stride) {
        const bool inside = i0 + warp + n * WARPS < X.rows && d0 + d < X.columns;
        x_rmem[n] = inside ? static_cast<float>(*source) : 0;
    }
#pragma unroll
    for (int n = 0; n < N / WARPS; ++n) {
        if (X.rounding != 0) {
            const float back = __uint_as_float(0x7f000000 - __float_as_uint(X.rounding));  // 1 / rounding, in fewer registers than a division
            x_rmem[n] = static_cast<float>(static_cast<__half>(x_rmem[n] * X.rounding)) * back;
        }
        X_smem[warp + n * WARPS][d] = x_rmem[n] * factor;
    }
}

// A thread's part of the result of `add_product`, rounded and stored: rows i0 + g + GROUPS · r, columns d0 + 4t … d0 + 4t + 3.
template <int ROWS>
__device__ inline void store_chunk(const Matrix& X, int i0, int d0, const float (&X_rmem)[ROWS][4]) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const int i = i0 + group() + r * GROUPS, d = d0 + 4 * lane();
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if (i < X.rows && d + e < X.columns) X.gmem[i * X.stride + d + e] = static_cast<element>(X_rmem[r][e]);
    }
}

// ---- the two matrix products; operands come from shared memory 4 floats at a time

template <int N>
__device__ inline void read_smem(float (&x_rmem)[N], const float* x_smem) {
#pragma unroll
    for (int n = 0; n < N; n += 4) reinterpret_cast<float4&>(x_rmem[n]) = reinterpret_cast<const float4&>(x_smem[n]);
}

// This many products are summed on their own before they join a score: about half the rounding error of one long sum.
constexpr int SUM = HEAD_DIM < 256 ? 8 : 4;

// S += A Bᵀ over one chunk of columns. A number of A serves COLUMNS multiplications, a number of B serves ROWS.
template <int ROWS>
__device__ inline void add_product_transposed(float (&S_rmem)[ROWS][COLUMNS], const Chunk<ROWS * GROUPS>& A_smem,
                                              const Chunk<TILE>& B_smem) {
#pragma unroll 2
    for (int d = 0; d < CHUNK; d += SUM) {
        float a_rmem[ROWS][SUM], b_rmem[SUM];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) read_smem(a_rmem[r], &A_smem[group() + r * GROUPS][d]);
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
            read_smem(b_rmem, &B_smem[lane() + c * LANES][d]);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                float sum = 0;
#pragma unroll
                for (int e = 0; e < SUM; ++e) sum = fmaf(a_rmem[r][e], b_rmem[e], sum);
                S_rmem[r][c] += sum;
            }
        }
    }
}

// X += P B, where B is a chunk of columns of V, K, Q or dO: lane t computes columns 4t … 4t + 3 of it. Here too a tile is summed on its own.
template <int ROWS>
__device__ inline void add_product(float (&X_rmem)[ROWS][4], const Scores<ROWS * GROUPS>& P_smem, const Chunk<TILE>& B_smem) {
    float sum_rmem[ROWS][4] = {};
#pragma unroll 2
    for (int j = 0; j < TILE; j += 4) {
        float p_rmem[ROWS][4], b_rmem[4];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) read_smem(p_rmem[r], &P_smem[group() + r * GROUPS][j]);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            read_smem(b_rmem, &B_smem[j + e][4 * lane()]);
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
#pragma unroll
                for (int d = 0; d < 4; ++d) sum_rmem[r][d] = fmaf(p_rmem[r][e], b_rmem[d], sum_rmem[r][d]);
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int d = 0; d < 4; ++d) X_rmem[r][d] += sum_rmem[r][d];
}

// ---- a tile of scores

// A thread's part of a tile, where add_product reads it. Only the group that writes a row reads it, eight lanes of one warp, so barriers
// of the warp are enough.
template <int ROWS>
__device__ inline void store_scores(Scores<ROWS * GROUPS>& P_smem, const float (&P_rmem)[ROWS][COLUMNS]) {
    __syncwarp();  // every lane is done reading what was here before
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) P_smem[group() + r * GROUPS][lane() + c * LANES] = P_rmem[r][c];
    __syncwarp();  // a row is complete before a lane of its group reads it
}

// The mask of one batch and head: bool [Nq, Nk], read through its strides; or, in another form (attention.h), its words.
__device__ inline const uint8_t* mask_of(const AttentionParams& p, int b, int h) {
    constexpr int UNIT = MASK == MASK_OF_BITS || MASK == MASK_OF_KEY_BITS ? 4 : 1;
    return static_cast<const uint8_t*>(p.mask.data) + UNIT * (b * p.mask.stride_b + h * p.mask.stride_h);
}

#if MASK == MASK_OF_BITS || MASK == MASK_OF_KEY_BITS
// Whether a mask of bits, by rows or by columns, lets row i see column j.
__device__ inline bool mask_allows(const AttentionParams& p, const uint8_t* mask_gmem, int i, int j) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(mask_gmem);
    if (MASK == MASK_OF_KEY_BITS && p.mask.stride_i == 0) i %= 32;
    words += MASK == MASK_OF_BITS ? i * p.mask.stride_i + j / 32 : j * p.mask.stride_j + i / 32;
    return !(*words >> (MASK == MASK_OF_BITS ? j : i) % 32 & 1);
}
#endif

// Bit 8·r + c of a word belongs to a thread's score in its row r and column c.
__device__ inline bool bit(uint32_t bits, int r, int c) { return bits >> (COLUMNS * r + c) & 1; }

// Scores that may not be attended become −∞. The tile's rows are queries and its columns keys; with KEYS_ARE_ROWS, the other way round.
// whole: no interval hides anything in this tile.
template <bool KEYS_ARE_ROWS, int ROWS>
__device__ inline void hide(float (&S_rmem)[ROWS][COLUMNS], const AttentionParams& p, const uint8_t* mask_gmem, [[maybe_unused]] bool whole,
                            [[maybe_unused]] int b, [[maybe_unused]] int h, int row0, int column0) {
    static_assert(ROWS * COLUMNS <= 32, "one bit for each score");
    [[maybe_unused]] const int offset = diagonal(p);  // causal: row i sees columns j ≤ i + offset
    const int i0 = KEYS_ARE_ROWS ? column0 : row0, j0 = KEYS_ARE_ROWS ? row0 : column0;
    const int last = j0 + (KEYS_ARE_ROWS ? ROWS * GROUPS : TILE) - 1;
    if (!MASK && (INTERVAL ? whole : last < p.Nk && (!CAUSAL || last <= i0 + offset))) return;  // wholly inside, and wholly in the past

    // First collected as bits, row by row: the addresses of all rows at once would not fit in registers.
    uint32_t visible = 0;
#pragma unroll 1
    for (int r = 0; r < ROWS; ++r) {
        const int thread = TIGHT ? ptx::tid_x() : 0;
        const int row = row0 + (TIGHT ? thread / LANES : group()) + r * GROUPS, column = column0 + (TIGHT ? thread % LANES : lane());
        int i = KEYS_ARE_ROWS ? column : row, j = KEYS_ARE_ROWS ? row : column;
        const uint8_t* mask = mask_gmem + i * p.mask.stride_i + j * p.mask.stride_j;
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
            bool may = i < p.Nq && j < p.Nk && (!CAUSAL || j <= i + offset);
            if (INTERVAL) may = may && keys_of_row(p, b, h, i).holds(j);
#if MASK == MASK_OF_BITS || MASK == MASK_OF_KEY_BITS
            if (may) may = mask_allows(p, mask_gmem, i, j);
#else
            if (MASK && may) may = *mask;
#endif
            visible |= static_cast<uint32_t>(may) << (COLUMNS * r + c);
            (KEYS_ARE_ROWS ? i : j) += LANES;
            mask += LANES * (KEYS_ARE_ROWS ? p.mask.stride_i : p.mask.stride_j);
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
            if (!bit(visible, r, c)) S_rmem[r][c] = -CUDART_INF_F;
}

#if SCORE
// Applies softcap, bias and ALiBi to a tile of scaled scores. `derivative` receives the derivative, if there is a softcap.
template <bool KEYS_ARE_ROWS, int ROWS>
__device__ inline void apply_score(float (&S_rmem)[ROWS][COLUMNS], float (&derivative_rmem)[ROWS][COLUMNS], const AttentionParams& p, int b, int h,
                                   int row0, int column0) {
    const ScoreOfHead head = score_of_head(p, b, h);
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
            const int row = row0 + group() + r * GROUPS, column = column0 + lane() + c * LANES;
            S_rmem[r][c] = score(p, head, S_rmem[r][c], KEYS_ARE_ROWS ? column : row, KEYS_ARE_ROWS ? row : column, derivative_rmem[r][c]);
        }
}
#endif

// ---- intervals: where their summaries lie in the workspace, of tiles of TILE rows

#if INTERVAL
__device__ inline Bounds bounds_of_tile(const AttentionParams& p, int64_t offset, int b, int h, int i0) {
    const int64_t tile = (static_cast<int64_t>(b) * p.H + h) * ((p.Nq + TILE - 1) / TILE) + i0 / TILE;
    return bounds_of_rows(p, reinterpret_cast<const Bounds*>(p.workspace + offset), tile, i0, TILE);
}
#endif

// ---- dropout

// Which of a thread's scores dropout keeps, as bits. They depend only on the element (i, j), not on the kernel or the position of its tile.
template <bool KEYS_ARE_ROWS, int ROWS>
__device__ inline uint32_t kept_scores(const AttentionParams& p, int b, int h, int row0, int column0) {
    const uint2 key = dropout_key(p);
    uint32_t kept = 0;
#pragma unroll 1
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int c0 = 0; c0 < COLUMNS; c0 += 4) {
            const int row = row0 + group() + r * GROUPS, column = column0 + lane() + c0 * LANES;
            int i = KEYS_ARE_ROWS ? column : row, j = KEYS_ARE_ROWS ? row : column;
            const uint4 bytes = dropout_bytes(key, b, h, global_row(p, i), global_column(p, j));  // serves this column and those 8, 16 and 24 further
#pragma unroll
            for (int c = c0; c < c0 + 4; ++c) {
                const uint32_t word = i & 16 ? (i & 8 ? bytes.w : bytes.z) : (i & 8 ? bytes.y : bytes.x);  // word i / 8 % 4
                const int byte = word >> (j & 24) & 0xff;                                                  // byte j / 8 % 4
                kept |= static_cast<uint32_t>(byte >= p.drop_below) << (COLUMNS * r + c);
                (KEYS_ARE_ROWS ? i : j) += LANES;
            }
        }
    return kept;
}

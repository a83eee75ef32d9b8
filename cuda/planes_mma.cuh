// Products of planes (planes.cuh) by mma.sync: what forward_3_float32.cu and backward_3_float32.cu share.
//
// Tensor cores truncate their sums, so what is small is summed while the sum is small. For S and dP, which sum over the head size, lo · hi and hi ·
// lo have sums of their own, which are added at the end: so each fragment is read once, whatever the order. For O and the gradients a tile's part
// begins at 0, adds the small products first, and is then added to the running sum in float32.
#pragma once

#include "planes.cuh"
#include "tensor_core.cuh"

constexpr int LO = 1;  // the number of this plane; hi is 0

// C += A Bᵀ for one warp, over the head size: A has 16·M rows, B has 8·N. A and B: where this lane's ldmatrix rows lie in the tiles' hi planes
// (lane_a, lane_b). LO_OF_A_FIRST: whether lo of A times hi of B is added first. For S it is lo of Q times hi of K in every kernel: then S is the
// same to the last bit.
template <class Tile_A, class Tile_B, bool LO_OF_A_FIRST, int M, int N>
__device__ inline void multiply(float (&C)[M][N][4], uint32_t A, uint32_t B) {
    float small[M][N][4] = {};
#pragma unroll
    for (int d = 0; d < HEAD_DIM / 16; ++d) {
        uint32_t a[PLANES][M][4];
#pragma unroll
        for (int plane = 0; plane < PLANES; ++plane)
#pragma unroll
            for (int m = 0; m < M; ++m) ptx::ldmatrix_x4(a[plane][m], Tile_A::step(A, d) + plane * Tile_A::BYTES + m * 16 * ROW_BYTES);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t b[PLANES][4];
#pragma unroll
            for (int plane = 0; plane < PLANES; ++plane) ptx::ldmatrix_x4(b[plane], Tile_B::step(B, d) + plane * Tile_B::BYTES + n * 8 * ROW_BYTES);
#pragma unroll
            for (int product = 0; product < 3; ++product) {
                const int of_a = product == (LO_OF_A_FIRST ? 0 : 1), of_b = product == (LO_OF_A_FIRST ? 1 : 0);
                float(&to)[M][N][4] = product < 2 ? small : C;
#pragma unroll
                for (int m = 0; m < M; ++m)
#pragma unroll
                    for (int half = 0; half < 2; ++half) ptx::mma_m16n8k16<__half>(to[m][n + half], a[of_a][m], b[of_b][2 * half], b[of_b][2 * half + 1]);
            }
        }
    }
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) C[m][n][e] += small[m][n][e];
}

// A tile's part of A B for one warp: A has 16·M rows and 16·STEPS columns, as planes in registers; B is where this lane's ldmatrix rows lie in the hi
// plane of a tile with as many rows (lane_b_trans). add(m, n, part) receives each 16 × 8 part of the result, columns 8·n….
//
// `always` is true, but the compiler may not know it: it moves nothing over a branch. Otherwise it would load fragments far ahead, in so many
// registers that others are spilled. So there is a branch every 32 columns.
template <class Tile_B, int STEPS, int M, class Add>
__device__ inline void multiply_tile(bool always, const uint32_t (&A)[PLANES][STEPS][M][4], uint32_t B, Add add) {
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; n += 2) {
        if (n % 4 == 0 && !always) continue;
        uint32_t b[PLANES][STEPS][4];
#pragma unroll
        for (int plane = 0; plane < PLANES; ++plane)
#pragma unroll
            for (int k = 0; k < STEPS; ++k) ptx::ldmatrix_x4_trans(b[plane][k], Tile_B::step(B, n / 2) + plane * Tile_B::BYTES + k * 16 * ROW_BYTES);
        float part[M][2][4] = {};
#pragma unroll
        for (int product = 0; product < 3; ++product)  // lo hi, hi lo, hi hi
#pragma unroll
            for (int k = 0; k < STEPS; ++k)
#pragma unroll
                for (int m = 0; m < M; ++m)
#pragma unroll
                    for (int half = 0; half < 2; ++half)
                        ptx::mma_m16n8k16<__half>(part[m][half], A[product == 0][k][m], b[product == 1][k][2 * half], b[product == 1][k][2 * half + 1]);
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) add(m, n + half, part[m][half]);
    }
}

// Two neighbouring accumulators, as pairs and split, are the planes of the A operand [16, 16] as they lie: column tiles 2·k and 2·k + 1 of C are step
// k.
template <int STEPS, int M>
__device__ inline void split_fragments(uint32_t (&planes)[PLANES][STEPS][M][4], const float (&C)[M][2 * STEPS][4]) {
#pragma unroll
    for (int k = 0; k < STEPS; ++k)
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float(&x)[4] = C[m][2 * k + e / 2];
                split(x[e % 2 * 2], x[e % 2 * 2 + 1], planes[0][k][m][e], planes[LO][k][m][e]);
            }
}

// A power of two of any exponent, as two factors: scalbnf would take a branch for each number. Planes' products are multiples of 2^-48 and their sums
// stay far below 2^100, so where an exponent is cut to 2 · 126 the result is 0 or ∞ either way.
struct PowerOfTwo {
    float first, second;
    __device__ explicit PowerOfTwo(int exponent) {
        const int half = exponent / 2;
        first = scalbnf(1, max(-126, min(126, half))), second = scalbnf(1, max(-126, min(126, exponent - half)));
    }
    __device__ float times(float x) const { return x * first * second; }
};

// Copies a tile of both planes of an operand: rows from `first` on of head bh. The caller commits the copies.
template <class Tile, int THREADS>
__device__ inline void load_planes(uint32_t smem, const Operand& x, int bh, int first) {
#pragma unroll
    for (int plane = 0; plane < PLANES; ++plane)
        load_tile<Tile, THREADS>(smem + plane * Tile::BYTES, x.planes, head_unit(x.planes, plane, bh), first, x.N, HEAD_DIM, ptx::tid_x());
}

// Whether load_planes can address an operand's planes.
inline bool planes_reachable(const Operands& all, int B) {
    for (int n = 0; n < all.count; ++n)
        if (!units_fit(all.of[n].planes, PLANES, B * all.of[n].heads, all.of[n].N)) return false;
    return true;
}

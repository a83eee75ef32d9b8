// What the tensor-core forward and backward share: tiles between global and shared memory, and one warp's matrix product.
#pragma once

#include "common.cuh"
#include "ptx.cuh"
#include "swizzle.cuh"
#include "visible.cuh"

// x, which is equal in all lanes of the warp: this tells the compiler so, and it can keep x in a uniform register.
__device__ inline int uniform(int x) { return __shfl_sync(0xffffffff, x, 0); }

// Over a row of an accumulator, whose columns four neighbouring lanes hold: the largest of their x, and the sum.
__device__ inline float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}
__device__ inline float row_sum(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

#if DTYPE != FLOAT32
// The two elements of a pair.
__device__ inline float2 floats_of(uint32_t pair) {
    if (DTYPE == FLOAT16) return ptx::floats_of_pair(pair);
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
#endif

// Row r of a tile of keys is key r. Another order (mask_tile.cuh) has the same two functions: a thread that copies rows r, r + 16, … finds the
// first at row(r), and the others at distances from it that are compile-time constants.
struct InOrder {
    __device__ static int row(int r) { return r; }
    __device__ static constexpr int distance(int rows) { return rows; }
};

// Copies rows [first, first + ROWS) of one head into shared memory; what lies beyond `rows` or beyond D becomes 0. Eight threads copy 128 bytes of a
// row. The caller commits the copies. Offsets count 16-byte units: 32 bits reach 64 GB, and an address that stays in a register across a loop takes one
// register instead of two. The launcher refuses larger tensors (units_fit). `head` is head_unit(). `thread` is threadIdx.x, or tid_x(), which is re-read
// and keeps no register.
template <class Tile, int THREADS, class Order = InOrder>
__device__ inline void load_tile(uint32_t smem, const Tensor4& tensor, uint32_t head, int first, int rows, int D, uint32_t thread) {
    constexpr int ROWS_AT_ONCE = THREADS / 8;
    static_assert(Tile::ROWS % ROWS_AT_ONCE == 0 && ROWS_AT_ONCE % 8 == 0, "the swizzle must be the same for every row of a thread");
    const int row = Order::row(thread / 8), chunk = thread % 8;
    const uint32_t stride = static_cast<uint32_t>(tensor.stride_n / 8);
    uint32_t source = head + (first + row) * stride + chunk;
    smem += Tile::offset(thread / 8, chunk);
#pragma unroll
    for (int r = 0; r < Tile::ROWS; source += (Order::distance(r + ROWS_AT_ONCE) - Order::distance(r)) * stride, r += ROWS_AT_ONCE)
#pragma unroll
        for (int panel = 0; panel < Tile::PANELS; ++panel)
            // If not valid, the address may lie outside the tensor; nothing is read there.
            ptx::cp_async_16(smem + panel * Tile::PANEL_BYTES + r * ROW_BYTES, static_cast<const uint4*>(tensor.data) + source + panel * 8,
                             first + row + Order::distance(r) < rows && panel * 64 + chunk * 8 < D);
}

// Whether the offsets of all rows, counted in units of `unit` elements, fit in 32 bits.
inline bool units_fit(int64_t stride_b, int64_t stride_h, int64_t stride_n, int B, int H, int N, int unit) {
    return ((B - 1) * stride_b + (H - 1) * stride_h + N * stride_n) / unit < (int64_t(1) << 32);
}
inline bool units_fit(const Tensor4& t, int B, int H, int N) { return units_fit(t.stride_b, t.stride_h, t.stride_n, B, H, N, 8); }

// Where a head begins, in units of 16 bytes.
__device__ inline uint32_t head_unit(const Tensor4& t, int b, int h) { return static_cast<uint32_t>((b * t.stride_b + h * t.stride_h) / 8); }

// From shared memory back to global memory, 16 bytes at a time.
template <class Tile, int THREADS>
__device__ inline void store_tile(element* gmem, const uint8_t* smem, int64_t stride, int first, int rows, int D) {
    constexpr int ROWS_AT_ONCE = THREADS / 8;
    const int row = threadIdx.x / 8, chunk = threadIdx.x % 8;
#pragma unroll
    for (int r = 0; r < Tile::ROWS; r += ROWS_AT_ONCE)
#pragma unroll
        for (int panel = 0; panel < Tile::PANELS; ++panel)
            if (first + row + r < rows && panel * 64 + chunk * 8 < D)
                *reinterpret_cast<uint4*>(gmem + (first + row + r) * stride + panel * 64 + chunk * 8) =
                    *reinterpret_cast<const uint4*>(smem + Tile::offset(row + r, panel * 8 + chunk));
}

// The same for one warp: 16 rows of the tile, from row `row` on, and COLUMNS of the tensor's columns, from `column` on. In the tile these columns lie
// `more_chunks` chunks further right. The tile's first row is the tensor's row `first`.
template <class Tile, class Order = InOrder, int COLUMNS = HEAD_DIM>
__device__ inline void store_16_rows(element* gmem, const uint8_t* smem, int64_t stride, int row, int lane, int first, int rows, int D, int column = 0,
                                     int more_chunks = 0) {
    constexpr int CHUNKS = COLUMNS / 8;
#pragma unroll
    for (int n = lane; n < 16 * CHUNKS; n += 32) {
        const int r = row + n / CHUNKS, chunk = column / 8 + n % CHUNKS;
        const int i = first + Order::row(r);
        if (i < rows && chunk * 8 < D)
            *reinterpret_cast<uint4*>(gmem + i * stride + chunk * 8) = *reinterpret_cast<const uint4*>(smem + Tile::offset(r, chunk + more_chunks));
    }
}

// C += A · B for one warp: C has 16·M rows and 16·N columns, the sum runs over 16·STEPS. load_a(a, k, m) fetches the 16 × 16 fragment of A at
// step k, rows 16·m…; load_b(b, k, n) the one of B, columns 16·n….
template <int STEPS, int M, int N2, class LoadA, class LoadB>
__device__ inline void warp_matmul(float (&C)[M][N2][4], LoadA load_a, LoadB load_b) {
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
        uint32_t a[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) load_a(a[m], k, m);
#pragma unroll
        for (int n = 0; n < N2 / 2; ++n) {
            uint32_t b[4];
            load_b(b, k, n);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                ptx::mma_m16n8k16<element>(C[m][2 * n], a[m], b[0], b[1]);
                ptx::mma_m16n8k16<element>(C[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// The mask in the tensor-core forward. A tile of it is copied to shared memory together with the tiles of K and V; each score's accumulator then
// starts from it: from 0, or, where it hides, from about −2¹²⁷, so large that adding any score to it changes nothing. One struct for each form
// of attention.h:
//
// MaskOfBits   32 columns a word: a broadcast mask has been packed once. Serves dropout too.
// MaskOfBytes  as PyTorch stores it, for a mask of which each byte is read once; packing would read it just as often. A lane's accumulators are
//              columns 8n + 2t and 8n + 2t + 1, scattered pairs of bytes. But keys may be assigned to the rows of a tile in any order, as long
//              as K and V agree: in the order below a lane's columns are contiguous, and its bytes are copied 16 at a time.
#pragma once

#include "tensor_core.cuh"

// For THREADS threads, where each warp has ROWS_PER_WARP rows; `thread` is threadIdx.x or tid_x(), whichever saves more registers.
template <int THREADS, int ROWS_PER_WARP, int BLOCK_K>
struct MaskOfBits {
    static constexpr int BLOCK_Q = THREADS / 32 * ROWS_PER_WARP;
    static constexpr int UNIT = 1;  // of offsets, in words
    static constexpr int WORDS = BLOCK_K / 32;
    struct alignas(4 * WORDS) Row {
        uint32_t word[WORDS];  // a set bit hides
    };
    static constexpr int SIZE = BLOCK_Q * static_cast<int>(sizeof(Row));
    using Order = InOrder;  // of the keys in a tile

    // The word at which the row that this thread copies begins.
    __device__ static uint32_t origin(const AttentionParams& p, int b, int h, int i0, int thread) {
        return static_cast<uint32_t>(b * p.mask.stride_b + h * p.mask.stride_h + min(i0 + thread % BLOCK_Q, p.Nq - 1) * p.mask.stride_i);
    }
    __device__ static void copy(uint8_t* smem, const AttentionParams& p, uint32_t origin, int, int j0, int thread) {
        if (THREADS > BLOCK_Q && thread >= BLOCK_Q) return;  // one thread copies a row
        ptx::cp_async_small<sizeof(Row)>(ptx::smem_address(reinterpret_cast<Row*>(smem) + thread % BLOCK_Q),
                                         static_cast<const uint32_t*>(p.mask.data) + (origin + static_cast<uint32_t>(j0) / 32));
    }
    // Initialises this lane's part, S[n][first] and S[n][first + 1], of row r of the ROWS_PER_WARP / 8 rows that it shares. If `cut`, which requires CAN_CUT,
    // columns of the tile from `visible` on are hidden too, and in an INTERVAL kernel those before `from`.
    template <bool CAN_CUT, int N_TILES>
    __device__ static void start(float (&S)[N_TILES][4], int first, const uint8_t* smem, int r, bool cut, int visible, int thread, [[maybe_unused]] int from = 0) {
        const Row row = reinterpret_cast<const Row*>(smem)[thread / 32 * ROWS_PER_WARP + 8 * r + thread % 32 / 4];
#pragma unroll
        for (int w = 0; w < WORDS; ++w) {
            uint32_t hidden = row.word[w];
            if (CAN_CUT && cut) hidden |= ~first_bits(visible - 32 * w);
            if (INTERVAL && cut) hidden |= first_bits(from - 32 * w);
            start_sums(hidden, thread % 4, [&](int n, int c) -> float& { return S[4 * w + n][first + c]; });
        }
    }
};

// In each GROUP of keys, rows 8n + 2t and 8n + 2t + 1 of the tile (n = 0, 1, …), lane t's columns, are keys RUN·t + 2n and RUN·t + 2n + 1.
template <int BLOCK_K>
struct PermutedKeys {
    static constexpr int GROUP = BLOCK_K < 64 ? BLOCK_K : 64, RUN = GROUP / 4;
    __device__ static int row(int r) { return r % 8 / 2 * RUN + r / 8 * 2 + r % 2; }                             // of the first 16
    __device__ static constexpr int distance(int rows) { return rows / GROUP * GROUP + rows % GROUP / 4; }      // rows: a multiple of 16
};

template <int THREADS, int ROWS_PER_WARP, int BLOCK_K>
struct MaskOfBytes {
    using Order = PermutedKeys<BLOCK_K>;
    static constexpr int UNIT = 16;                        // of offsets, in bytes: 32 bits of them reach 64 GB
    static constexpr int RUN = Order::RUN;                 // bytes that a lane copies at once
    static constexpr int RUNS = BLOCK_K / Order::GROUP;    // of them in a lane's part of a row
    static constexpr int ROWS = ROWS_PER_WARP / 8;         // of which a lane has a part
    struct alignas(RUN) Run {
        uint32_t word[RUN / 4];  // a byte is 1 where a key may be attended
    };
    static constexpr int SIZE = ROWS * RUNS * THREADS * RUN;  // [ROWS, RUNS, THREADS] runs: each thread copies and reads its own

    // Where the head begins, in units.
    __device__ static uint32_t origin(const AttentionParams& p, int b, int h, int, int) {
        return static_cast<uint32_t>((b * p.mask.stride_b + h * p.mask.stride_h) / UNIT);
    }
    __device__ static void copy(uint8_t* smem, const AttentionParams& p, uint32_t origin, int i0, int j0, int thread) {
        const int i = i0 + thread / 32 * ROWS_PER_WARP + thread % 32 / 4;
        const uint32_t stride = static_cast<uint32_t>(p.mask.stride_i / UNIT);
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int n = 0; n < RUNS; ++n) {
                const int j = j0 + n * Order::GROUP + thread % 4 * RUN;
                const uint32_t row = origin + min(i + 8 * r, p.Nq - 1) * stride;
                const uint8_t* source = static_cast<const uint8_t*>(p.mask.data) + static_cast<int64_t>(row) * UNIT + j;
                const int there = min(max(p.Nk - j, 0), RUN);  // the rest becomes 0, which hides
                ptx::cp_async_first<RUN>(ptx::smem_address(reinterpret_cast<Run*>(smem) + (r * RUNS + n) * THREADS + thread), source, there);
            }
    }
    template <bool CAN_CUT, int N_TILES>
    __device__ static void start(float (&S)[N_TILES][4], int first, const uint8_t* smem, int r, bool cut, int visible, int thread, [[maybe_unused]] int from = 0) {
#pragma unroll
        for (int n = 0; n < RUNS; ++n) {
            const Run run = reinterpret_cast<const Run*>(smem)[(r * RUNS + n) * THREADS + thread];
#pragma unroll
            for (int w = 0; w < RUN / 4; ++w) {
                uint32_t may = run.word[w];
                if (CAN_CUT && cut) may &= first_bits(8 * (visible - n * Order::GROUP - thread % 4 * RUN - 4 * w));
                if (INTERVAL && cut) may &= ~first_bits(8 * (from - n * Order::GROUP - thread % 4 * RUN - 4 * w));
                const uint32_t signs = 0x80808080u - may;
#pragma unroll
                for (int c = 0; c < 4; ++c) S[n * (Order::GROUP / 8) + 2 * w + c / 2][first + c % 2] = start_of_sum(signs, c);
            }
        }
    }
};

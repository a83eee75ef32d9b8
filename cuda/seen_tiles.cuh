// Which tiles a mask leaves to visit, in the hopper kernels: a tile in which nothing may be attended is neither copied nor computed. A small kernel
// looks through the mask's bits, a tile at a time, and stops at the first element that may be attended; so a mask without structure costs next to
// nothing.
//
// Its result is one bit per tile: each tile of Q (forward) or of keys (backward) has a line of bits, one for each tile of the other side. The producer
// and the consumers each walk through the bits from the last tile to the first; finding the next set bit reads no memory. If every tile is visited, the
// kernels run loops that do not read the bits and compile to the same code as without a scan. Calls too small for the scan to be worthwhile have no lines.
//
// Not used with intervals, which already say what is visited, nor with a bias: the forward would have to know one tile ahead where to load the bias from,
// and the backward has no registers left.
#pragma once

#include "longest_first.cuh"
#include "mask_start.cuh"

#define LISTED (MASK && !INTERVAL && !(SCORE & SCORE_BIAS))

#if LISTED
// One line for each tile of Q (in a backward, of keys) of each head that has a mask of its own.
struct alignas(16) SeenTiles {
    uint32_t* words;  // [lines, of_line]; NULL: the mask was not scanned, and every tile is visited
    int* lengths;     // [lines]: how many tiles each visits, not counting those that the diagonal hides
    int tiles, of_line;

    SeenTiles() = default;
    __host__ __device__ SeenTiles(float* workspace, const AttentionParams& p, int64_t tiles, int64_t others)
        : words(reinterpret_cast<uint32_t*>(workspace)), tiles(static_cast<int>(tiles)), of_line(static_cast<int>((others + 31) / 32)) {
        lengths = reinterpret_cast<int*>(words) + tiles * p.H * p.B * of_line;
    }
    // When the workspace is sized, it is not known yet which dimensions of the mask are broadcast.
    static int64_t floats(const AttentionParams& p, int64_t tiles, int64_t others) {
        return whole_chunks(tiles * p.H * p.B * (tiles_of(others, 32) + 1));
    }

    int64_t lines(const AttentionParams& p) const { return int64_t{tiles} * (p.mask.stride_b ? p.B : 1) * (p.mask.stride_h ? p.H : 1); }
    __device__ int line(const AttentionParams& p, int b, int h, int tile) const {
        const int head = (p.mask.stride_b ? b * (p.mask.stride_h ? p.H : 1) : 0) + (p.mask.stride_h ? h : 0);
        return head * tiles + tile;
    }
    // Which of the 32 tiles from 32 · chunk on are visited, ignoring the diagonal.
    __device__ uint32_t word(const AttentionParams& p, int b, int h, int tile, int chunk) const {
        return words[static_cast<uint32_t>(line(p, b, h, tile) * of_line + chunk)];  // fewer than 2³¹: look() has checked
    }
    __device__ int length(const AttentionParams& p, int b, int h, int tile) const { return lengths[line(p, b, h, tile)]; }
    // One block computes the lengths of all lines. limits(tile): the tiles that the diagonal leaves visible.
    template <class Limits>
    __device__ void measure(int lines, Limits limits) const {
        for (int line = threadIdx.x; line < lines; line += blockDim.x) {
            const Interval left = limits(line % tiles);
            int length = 0;
#pragma unroll 8
            for (int chunk = 0; chunk < of_line; ++chunk) {
                const uint32_t leaves = first_bits(left.stop - 32 * chunk) & ~first_bits(left.start - 32 * chunk);
                length += __popc(words[static_cast<uint32_t>(line * of_line + chunk)] & leaves);
            }
            lengths[line] = length;
        }
    }
};

// Whether a launch scans the mask: if each multiprocessor visits so many tiles that the two small kernels take less than a fiftieth of the time. In the
// emulator, whose calls are small, the threshold is low, so that nearly all calls scan.
#ifdef __CUDACC__
constexpr int TILES_WORTH_IT = 256;
#else
constexpr int TILES_WORTH_IT = 4;
#endif
inline bool worth_looking(const AttentionParams& p, int block_q, int block_k) {
    return tiles_of(p.Nq, block_q) * tiles_of(p.Nk, block_k) * p.H * p.B >= int64_t{TILES_WORTH_IT} * p.sm_count;
}

constexpr int LOOK_WARPS = 4;  // of a block, which computes one word: a lane's tile is COLUMNS bits of each of ROWS rows; each warp reads every fourth row

template <int ROWS, int COLUMNS>
__global__ void __launch_bounds__(32 * LOOK_WARPS) look_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ SeenTiles seen) {
    constexpr bool BY_KEYS = MASK == MASK_OF_KEY_BITS;
    constexpr int AT_ONCE = 4;  // rows that a warp loads at once
    using Bits = std::conditional_t<COLUMNS == 64, uint2, uint4>;
    static_assert(sizeof(Bits) * 8 == COLUMNS, "a lane reads a row of its tile at once");
    __shared__ uint32_t found_smem[LOOK_WARPS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int chunk = blockIdx.x % seen.of_line, line = blockIdx.x / seen.of_line, heads = p.mask.stride_h ? p.H : 1;
    const int head = line / seen.tiles, tile = line % seen.tiles, other = 32 * chunk + lane;
    const bool there = other < ((BY_KEYS ? p.Nq : p.Nk) + COLUMNS - 1) / COLUMNS;
    const int rows = BY_KEYS ? p.Nk : one_row(p) ? 1 : p.Nq, begin = !BY_KEYS && one_row(p) ? 0 : tile * ROWS, end = min(rows, begin + ROWS);
    const int64_t stride = BY_KEYS ? p.mask.stride_j : p.mask.stride_i;
    const uint32_t* bits = static_cast<const uint32_t*>(p.mask.data) + head / heads * p.mask.stride_b + head % heads * p.mask.stride_h +
                           (BY_KEYS && one_row(p) ? 0 : other * (COLUMNS / 32));
    ptx::griddepcontrol_launch_dependents();
    ptx::griddepcontrol_wait();  // the mask is packed
    bool found = !there;
    for (int row = begin + warp; row < end && !__all_sync(0xffffffff, found); row += AT_ONCE * LOOK_WARPS) {
        if (found) continue;
        Bits hidden[AT_ONCE];
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n) hidden[n] = *reinterpret_cast<const Bits*>(bits + min(row + n * LOOK_WARPS, end - 1) * stride);
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n) {
            found |= (hidden[n].x & hidden[n].y) != ~0u;
            if constexpr (COLUMNS == 128) found |= (hidden[n].z & hidden[n].w) != ~0u;
        }
    }
    const uint32_t word = __ballot_sync(0xffffffff, found && there);
    if (lane == 0) found_smem[warp] = word;
    __syncthreads();  // every warp has said what it found
    if (threadIdx.x > 0) return;
    uint32_t all = 0;
    for (int w = 0; w < LOOK_WARPS; ++w) all |= found_smem[w];
    seen.words[blockIdx.x] = all;
}

// Launches the kernels that fill `seen` and the order in which blocks take `units` units of such lengths. A kernel that is launched early after these
// (launch.cuh) and waits, waits for both.
template <int ROWS, int COLUMNS, class Length>
inline cudaError_t look(const AttentionParams& p, const SeenTiles& seen, const Length& length, const Order& order, int64_t units) {
    const int64_t blocks = seen.lines(p) * seen.of_line;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    if (blocks == 0) return cudaSuccess;
    const unsigned count = static_cast<unsigned>(blocks);
    // In a backward, a kernel that is launched early after this one does not wait for kernels before it.
    launch_early_if(MASK == MASK_OF_BITS, look_kernel<ROWS, COLUMNS>, count, 32 * LOOK_WARPS, 0, p.stream, p, seen);
    return put_longest_first(p, length, order, units, p.sm_count);
}
#endif

// Packs a mask of bytes (true = may attend) into bits (set = hidden), for the kernels that read 32 of them at a time: 8 times less to read,
// in a layout that fits fragments. Words follow a query's keys, or, by_keys, a key's queries (attention.h). Beside them a byte for each 64 × 64
// elements says whether some of them may be attended and whether some may not: what a kernel may skip, and where it needs no mask.
//
// Where the mask's rows are contiguous and aligned, a lane reads 16 columns at once; the kernels then run at the speed of memory. Broadcast
// dimensions are packed once: Python passes 1 for their size, and stride 0 to the kernels that read the result.
#include <stdint.h>

#include "launch.cuh"

struct PackParams {
    const uint8_t* mask;                             // bool [B, H, Nq, Nk], any strides
    int64_t stride_b, stride_h, stride_i, stride_j;
    uint32_t* bits;                                  // [B, H, Nq or Nk, words]: rows padded with ones to a multiple of 128 bits
    uint8_t* summary;                                // [B, H, tiles of Nq, tiles of Nk padded to a multiple of 128]: what is among 64 × 64 elements
    int32_t B, H, Nq, Nk;
    int32_t by_keys, device;
    cudaStream_t stream;
};

constexpr int WARPS = 8;
constexpr int TILE = 64;             // a side of what a byte of the summary is about
constexpr int SEEN = 1, HIDDEN = 2;  // its bits; of what lies beyond the last row neither is said, what lies beyond the last column is hidden

// Blocks along the keys may be more than a grid has in its second dimension: they are numbered through the second and the third.
__device__ inline int block_along_keys() { return blockIdx.z * gridDim.y + blockIdx.y; }
static dim3 grid(int64_t x, int64_t along_keys) {
    const int64_t z = (along_keys + 65534) / 65535;
    return dim3(static_cast<unsigned>(x), static_cast<unsigned>((along_keys + z - 1) / z), static_cast<unsigned>(z));
}

// Bit c: column c of these 16 may not be attended.
__device__ inline uint32_t hidden_columns(const uint4& bytes) {
    const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
    uint32_t hidden = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        // 1 in each byte that was 0; the multiplication moves bits 0, 8, 16 and 24 to 28, 29, 30 and 31.
        const uint32_t zeros = __vseteq4(words[w], 0);
        hidden |= (zeros * 0x10204080u >> 28) << 4 * w;
    }
    return hidden;
}

// The same one by one, for any stride, and where the row ends: columns beyond it are hidden.
__device__ inline uint32_t hidden_columns(const uint8_t* mask_gmem, int64_t stride_j, int j, int Nk) {
    uint32_t hidden = 0;
    for (int c = 0; c < 16; ++c) hidden |= static_cast<uint32_t>(j + c >= Nk || !mask_gmem[(j + c) * stride_j]) << c;
    return hidden;
}

// ---- words of a query's keys: a block takes TILE rows and COLUMNS columns, a warp some of the rows, and two lanes make a word

constexpr int AT_ONCE = 32 * 16;  // columns that the lanes of a warp read together
constexpr int COLUMNS = 2 * AT_ONCE;
constexpr int ROW_WARPS = 16;
constexpr int ROWS = TILE / ROW_WARPS;  // of a warp

__global__ void __launch_bounds__(32 * ROW_WARPS) pack_mask_kernel(const __grid_constant__ PackParams p, bool aligned) {
    __shared__ uint32_t seen_smem[ROW_WARPS][COLUMNS / AT_ONCE], hidden_smem[ROW_WARPS][COLUMNS / AT_ONCE];  // bit `lane`: of a warp's rows, a lane's columns
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t column_blocks = (p.Nk + COLUMNS - 1) / COLUMNS, q_tiles = (p.Nq + TILE - 1) / TILE;
    const uint32_t tile = blockIdx.x / column_blocks;  // of rows, among those of all heads
    const int bh = tile / q_tiles, i0 = tile % q_tiles * TILE + warp * ROWS, j0 = blockIdx.x % column_blocks * COLUMNS;
    const uint8_t* mask_gmem = p.mask + bh / p.H * p.stride_b + bh % p.H * p.stride_h + i0 * p.stride_i;  // [ROWS, Nk]
    const int padded = (p.Nk + 127) / 128 * 128;
    uint32_t* bits_gmem = p.bits + (static_cast<int64_t>(bh) * p.Nq + i0) * (padded / 32);  // [ROWS, words]

    uint4 bytes[ROWS][COLUMNS / AT_ONCE];  // all loads are under way before the first is used
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int n = 0; n < COLUMNS / AT_ONCE; ++n) {
            const int j = j0 + n * AT_ONCE + 16 * lane;
            if (aligned && j + 16 <= p.Nk && i0 + r < p.Nq) bytes[r][n] = __ldcs(reinterpret_cast<const uint4*>(mask_gmem + r * p.stride_i + j));
        }
#pragma unroll
    for (int n = 0; n < COLUMNS / AT_ONCE; ++n) {
        const int j = j0 + n * AT_ONCE + 16 * lane;
        uint32_t all_hidden = 0xffff, some_hidden = 0;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            if (i0 + r >= p.Nq) break;
            const bool whole = aligned && j + 16 <= p.Nk;
            const uint32_t hidden = whole ? hidden_columns(bytes[r][n]) : hidden_columns(mask_gmem + r * p.stride_i, p.stride_j, j, p.Nk);
            all_hidden &= hidden, some_hidden |= hidden;
            const uint32_t word = hidden | __shfl_down_sync(0xffffffff, hidden, 1) << 16;  // the next lane's 16 columns
            if (lane % 2 == 0 && j < padded) bits_gmem[static_cast<int64_t>(r) * (padded / 32) + j / 32] = word;
        }
        const uint32_t seen_lanes = __ballot_sync(0xffffffff, all_hidden != 0xffff), hidden_lanes = __ballot_sync(0xffffffff, some_hidden != 0);
        if (lane == 0) seen_smem[warp][n] = seen_lanes, hidden_smem[warp][n] = hidden_lanes;
    }

    __syncthreads();  // every warp has said what it found
    constexpr int LANES = TILE / 16;  // that share a tile's columns
    if (threadIdx.x < COLUMNS / TILE && j0 + threadIdx.x * TILE < padded) {
        const int n = threadIdx.x * TILE / AT_ONCE;
        uint32_t seen = 0, hidden = 0;
        for (int w = 0; w < ROW_WARPS; ++w) seen |= seen_smem[w][n], hidden |= hidden_smem[w][n];
        const uint32_t lanes = ((1u << LANES) - 1) << threadIdx.x * LANES % 32;
        p.summary[static_cast<int64_t>(tile) * (padded / TILE) + j0 / TILE + threadIdx.x] = (seen & lanes ? SEEN : 0) | (hidden & lanes ? HIDDEN : 0);
    }
}

// ---- words of a key's queries: a block takes QUERIES rows, a lane each, and KEYS columns

constexpr int QUERIES = 32 * WARPS, KEYS = 128;

__global__ void __launch_bounds__(32 * WARPS) pack_by_keys_kernel(const __grid_constant__ PackParams p, bool aligned) {
    __shared__ uint4 bits_smem[KEYS][QUERIES / 128];
    __shared__ __align__(16) uint16_t hidden_smem[WARPS][32][KEYS / 16];
    __shared__ uint8_t found_smem[WARPS][KEYS / TILE];  // among a warp's rows and TILE columns
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int i_blocks = (p.Nq + QUERIES - 1) / QUERIES;
    const int i0 = blockIdx.x % i_blocks * QUERIES, bh = blockIdx.x / i_blocks, j0 = block_along_keys() * KEYS;
    const int i = i0 + threadIdx.x;
    const uint8_t* mask_gmem = p.mask + bh / p.H * p.stride_b + bh % p.H * p.stride_h;  // [Nq, Nk]

    // A warp's 32 rows: 8 lanes read a row, 16 columns each, so that whole lines come together; then every lane gets a row of its own.
    constexpr int LANES = KEYS / 16, STEPS = LANES;
    static_assert(32 / LANES * STEPS == 32, "steps are as many as lanes of a row");
    const int j_lane = j0 + lane % LANES * 16;
    auto row_of = [&](int step) { return mask_gmem + min(i0 + warp * 32 + step * (32 / LANES) + lane / LANES, p.Nq - 1) * p.stride_i; };
    const bool whole = aligned && j_lane + 16 <= p.Nk;
    uint4 bytes[STEPS];  // all loads are under way before the first is used
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
        if (whole) bytes[step] = __ldcs(reinterpret_cast<const uint4*>(row_of(step) + j_lane));
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
        hidden_smem[warp][step * (32 / LANES) + lane / LANES][lane % LANES] =
            static_cast<uint16_t>(whole ? hidden_columns(bytes[step]) : hidden_columns(row_of(step), p.stride_j, j_lane, p.Nk));
    __syncwarp();  // the warp's rows are there
    const uint4 row = *reinterpret_cast<const uint4*>(hidden_smem[warp][lane]);
    const uint32_t words[4] = {row.x, row.y, row.z, row.w};
    uint32_t found;
#pragma unroll
    for (int n = 0; n < KEYS / 16; ++n) {
        uint32_t hidden = words[n / 2] >> n % 2 * 16 & 0xffff;
        const bool seen = i < p.Nq && hidden != 0xffff, cut = i < p.Nq && hidden != 0;
        if (n % (TILE / 16) == 0) found = 0;
        found |= (__any_sync(0xffffffff, seen) ? SEEN : 0) | (__any_sync(0xffffffff, cut) ? HIDDEN : 0);
        if (n % (TILE / 16) == TILE / 16 - 1 && lane == 0) found_smem[warp][n * 16 / TILE] = found;
        if (i >= p.Nq) hidden = 0xffff;
        // Lane c keeps bit c of every lane: a column becomes a word.
        uint32_t word = 0;
#pragma unroll
        for (int c = 0; c < 16; ++c) {
            const uint32_t column = __ballot_sync(0xffffffff, hidden >> c & 1);
            if (lane == c) word = column;
        }
        if (lane < 16) reinterpret_cast<uint32_t*>(bits_smem[16 * n + lane])[warp] = word;
    }
    __syncthreads();  // bits and what was found are there

    constexpr int OF_WARPS = TILE / 32, K_TILES = KEYS / TILE;
    if (threadIdx.x < QUERIES / TILE * K_TILES) {
        const int q_tile = threadIdx.x / K_TILES, k_tile = threadIdx.x % K_TILES;
        uint8_t found = 0;
        for (int w = 0; w < OF_WARPS; ++w) found |= found_smem[q_tile * OF_WARPS + w][k_tile];
        const int q_tiles = (p.Nq + TILE - 1) / TILE, k_tiles = (p.Nk + 127) / 128 * (128 / TILE);
        if (i0 / TILE + q_tile < q_tiles)
            p.summary[(static_cast<int64_t>(bh) * q_tiles + i0 / TILE + q_tile) * k_tiles + j0 / TILE + k_tile] = found;
    }
    const int chunk = threadIdx.x % (QUERIES / 128), j = threadIdx.x / (QUERIES / 128);
    const int chunks = (p.Nq + 127) / 128, first = i0 / 128 + chunk;  // of 128 queries
    if (j0 + j < p.Nk && first < chunks) reinterpret_cast<uint4*>(p.bits)[(static_cast<int64_t>(bh) * p.Nk + j0 + j) * chunks + first] = bits_smem[j][chunk];
}

extern "C" int pack_mask(const PackParams* params) {
    const PackParams& p = *params;
    const int64_t rows = static_cast<int64_t>(p.B) * p.H * p.Nq;
    // Numbers of rows, and of columns up to the end of the last block, are ints.
    if (rows > INT32_MAX || p.Nk > INT32_MAX - (1 << 20)) return cudaErrorInvalidConfiguration;
    if (rows == 0 || p.Nk == 0) return cudaSuccess;
    int before;
    cudaError_t error = cudaGetDevice(&before);
    if (error == cudaSuccess && before != p.device) error = cudaSetDevice(p.device);
    if (error != cudaSuccess) return error;
    const bool aligned = p.stride_j == 1 && (reinterpret_cast<int64_t>(p.mask) | p.stride_b | p.stride_h | p.stride_i) % 16 == 0;
    if (p.by_keys) {
        const dim3 blocks = grid((p.Nq + QUERIES - 1) / QUERIES * p.B * p.H, (p.Nk + KEYS - 1) / KEYS);
        launch_kernel(pack_by_keys_kernel, blocks, 32 * WARPS, 0, p.stream, p, aligned);
    } else {
        // Neighbours read neighbouring columns.
        const int64_t blocks = (int64_t{p.Nq} + TILE - 1) / TILE * p.B * p.H * ((int64_t{p.Nk} + COLUMNS - 1) / COLUMNS);
        if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
        launch_kernel(pack_mask_kernel, static_cast<unsigned>(blocks), 32 * ROW_WARPS, 0, p.stream, p, aligned);
    }
    error = cudaGetLastError();
    if (before != p.device) cudaSetDevice(before);
    return error;
}

extern "C" int64_t params_size(void) { return sizeof(PackParams); }
extern "C" const char* error_name(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

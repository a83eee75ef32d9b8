// Packs a mask of bytes (true = may attend) into bits (set = hidden), for the kernels that read 32 of them at a time: 8 times less to read,
// in a layout that fits fragments. Words follow a query's keys, or, by_keys, a key's queries (attention.h).
//
// Where the mask's rows are contiguous and aligned, a lane reads 16 columns at once; the kernels then run at the speed of memory. Broadcast
// dimensions are packed once: Python passes 1 for their size, and stride 0 to the kernels that read the result.
#include <stdint.h>

#include <utility>

#include "launch.cuh"
#include "ptx.cuh"

struct PackParams {
    const uint8_t* mask;                             // bool [B, H, Nq, Nk], any strides
    int64_t stride_b, stride_h, stride_i, stride_j;
    uint32_t* bits;                                  // [B, H, Nq or Nk, words]: rows padded with ones to a multiple of 128 bits
    int32_t B, H, Nq, Nk;
    int32_t by_keys, device;
    cudaStream_t stream;
};

constexpr int WARPS = 8;

// There may be more blocks along the keys than a grid's second dimension allows: they are numbered through the second and the third.
__device__ inline int block_along_keys() { return blockIdx.z * gridDim.y + blockIdx.y; }
static dim3 grid(int64_t x, int64_t along_keys) {
    const int64_t z = (along_keys + 65534) / 65535;
    return dim3(static_cast<unsigned>(x), static_cast<unsigned>((along_keys + z - 1) / z), static_cast<unsigned>(z));
}

// Bit c is set if column c of these 16 may not be attended.
__device__ inline uint32_t hidden_columns(const uint4& bytes) {
    const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
    uint32_t hidden = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        // each byte that was 0 becomes 1; the multiplication moves bits 0, 8, 16 and 24 to 28, 29, 30 and 31
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

// 16 columns, a byte each, with any stride; columns beyond the row's end are 0.
__device__ inline uint4 columns_one_by_one(const uint8_t* mask_gmem, int64_t stride_j, int j, int Nk) {
    uint32_t words[4] = {};
#pragma unroll
    for (int c = 0; c < 16; ++c)
        if (j + c < Nk && mask_gmem[(j + c) * stride_j]) words[c / 4] |= 1u << c % 4 * 8;
    return {words[0], words[1], words[2], words[3]};
}

// ---- words of a query's keys: a warp packs COLUMNS columns of a row, and two lanes form a word

constexpr int COLUMNS = 2048;
constexpr int AT_ONCE = 32 * 16;  // columns that the lanes of a warp read together

__global__ void __launch_bounds__(32 * WARPS) pack_mask_kernel(const __grid_constant__ PackParams p, bool aligned) {
    const int lane = threadIdx.x % 32;
    const uint32_t row = blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= static_cast<uint32_t>(p.B * p.H) * p.Nq) return;
    const uint32_t i = row % p.Nq, h = row / p.Nq % p.H, b = row / p.Nq / p.H;
    const uint8_t* mask_gmem = p.mask + b * p.stride_b + h * p.stride_h + i * p.stride_i;  // [Nk]
    const int padded = (p.Nk + 127) / 128 * 128;
    uint32_t* bits_gmem = p.bits + static_cast<int64_t>(row) * (padded / 32);               // [words]
    const int begin = block_along_keys() * COLUMNS + 16 * lane;

    uint4 bytes[COLUMNS / AT_ONCE];  // all loads are issued before the first result is used
#pragma unroll
    for (int n = 0; n < COLUMNS / AT_ONCE; ++n) {
        const int j = begin + n * AT_ONCE;
        if (aligned && j + 16 <= p.Nk) bytes[n] = __ldcs(reinterpret_cast<const uint4*>(mask_gmem + j));
    }
#pragma unroll
    for (int n = 0; n < COLUMNS / AT_ONCE; ++n) {
        const int j = begin + n * AT_ONCE;
        uint32_t hidden = aligned && j + 16 <= p.Nk ? hidden_columns(bytes[n]) : hidden_columns(mask_gmem, p.stride_j, j, p.Nk);
        hidden |= __shfl_down_sync(0xffffffff, hidden, 1) << 16;  // the next lane's 16 columns
        if (lane % 2 == 0 && j < padded) bits_gmem[j / 32] = hidden;
    }
}

// ---- words that follow a key's queries: a block packs QUERIES rows and KEYS columns, each warp 32 of the rows

constexpr int QUERIES = 32 * WARPS, KEYS = 128;
constexpr int READERS = KEYS / 16;  // lanes that read a row, a whole line of the cache, together

__global__ void __launch_bounds__(32 * WARPS) pack_by_keys_kernel(const __grid_constant__ PackParams p, bool aligned) {
    constexpr int ROW_WORDS = KEYS + 4;  // so that the rows of two chunks of 128 queries begin at different banks
    __shared__ __align__(16) uint32_t bits_smem[WARPS][ROW_WORDS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t j_blocks = (p.Nk + KEYS - 1) / KEYS, i_blocks = (p.Nq + QUERIES - 1) / QUERIES;
    const int j0 = blockIdx.x % j_blocks * KEYS, i0 = blockIdx.x / j_blocks % i_blocks * QUERIES, bh = blockIdx.x / j_blocks / i_blocks;
    // A lane reads 16 columns of each of eight rows.
    const int part = lane / READERS, j = j0 + lane % READERS * 16, i = i0 + warp * 32 + part * 8;
    const uint8_t* mask_gmem = p.mask + bh / p.H * p.stride_b + bh % p.H * p.stride_h;

    uint4 bytes[8];  // all loads are issued before the first result is used
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        const uint8_t* row = mask_gmem + (i + n) * p.stride_i;
        if (i + n >= p.Nq) bytes[n] = uint4{};
        else if (aligned && j + 16 <= p.Nk) bytes[n] = __ldcs(reinterpret_cast<const uint4*>(row + j));
        else bytes[n] = columns_one_by_one(row, p.stride_j, j, p.Nk);
    }
    // Bit n of byte c: row n of the eight may attend column c.
    uint32_t may[4] = {};
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        const uint32_t words[4] = {bytes[n].x, bytes[n].y, bytes[n].z, bytes[n].w};
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const uint32_t nonzero = ((words[w] & 0x7f7f7f7fu) + 0x7f7f7f7fu | words[w]) & 0x80808080u;
            may[w] = may[w] >> 1 | nonzero;  // bits that the shift moves into the next byte are 0
        }
    }
    // Four lanes hold the same columns of 32 rows. They exchange words: afterwards lane `part` holds word `part` of each of the four.
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            if (w & bit) continue;
            uint32_t &low = may[w], &high = may[w + bit];
            const uint32_t other = __shfl_xor_sync(0xffffffff, part & bit ? low : high, bit * READERS);
            (part & bit ? low : high) = other;
        }
    // Transposes bytes: from four words (of eight rows) with a byte for each of four columns to four words, each with 32 rows of one column.
    const uint32_t first[2] = {ptx::prmt(may[0], may[1], 0x5140), ptx::prmt(may[0], may[1], 0x7362)};
    const uint32_t last[2] = {ptx::prmt(may[2], may[3], 0x5140), ptx::prmt(may[2], may[3], 0x7362)};
    uint4 columns;  // 16 · (lane % READERS) + 4 · part + 0, 1, 2, 3
    columns.x = ~ptx::prmt(first[0], last[0], 0x5410), columns.y = ~ptx::prmt(first[0], last[0], 0x7632);
    columns.z = ~ptx::prmt(first[1], last[1], 0x5410), columns.w = ~ptx::prmt(first[1], last[1], 0x7632);
    *reinterpret_cast<uint4*>(&bits_smem[warp][4 * lane]) = columns;
    __syncthreads();  // every column is there

    // Two threads store a column's 256 bits.
    const int chunk = threadIdx.x % 2, word = threadIdx.x / 2;
    const int column = j0 + word / 4 % READERS * 16 + word / (4 * READERS) * 4 + word % 4;
    const int chunks = (p.Nq + 127) / 128, at = i0 / 128 + chunk;  // of 128 queries
    if (column >= p.Nk || at >= chunks) return;
    const uint4 bits = {bits_smem[4 * chunk][word], bits_smem[4 * chunk + 1][word], bits_smem[4 * chunk + 2][word], bits_smem[4 * chunk + 3][word]};
    reinterpret_cast<uint4*>(p.bits)[(static_cast<int64_t>(bh) * p.Nk + column) * chunks + at] = bits;
}

extern "C" int pack_mask(const PackParams* params) {
    PackParams p = *params;
    if (p.stride_j != 1 && p.stride_i == 1) {  // the transpose of a mask with contiguous rows
        std::swap(p.stride_i, p.stride_j), std::swap(p.Nq, p.Nk);
        p.by_keys = !p.by_keys;
    }
    const int64_t rows = static_cast<int64_t>(p.B) * p.H * p.Nq;
    const int64_t key_blocks = (static_cast<int64_t>(p.Nq) + QUERIES - 1) / QUERIES * p.B * p.H * ((static_cast<int64_t>(p.Nk) + KEYS - 1) / KEYS);
    // Numbers of rows, of blocks, and of columns up to the end of the last block, are ints.
    const int most = INT32_MAX - (1 << 20);
    if (rows > INT32_MAX || p.Nq > most || p.Nk > most || (p.by_keys && key_blocks > INT32_MAX)) return cudaErrorInvalidConfiguration;
    if (rows == 0 || p.Nk == 0) return cudaSuccess;
    const bool aligned = p.stride_j == 1 && (reinterpret_cast<int64_t>(p.mask) | p.stride_b | p.stride_h | p.stride_i) % 16 == 0;
    return on_device(p.device, [&] {
        if (p.by_keys) {
            launch_kernel(pack_by_keys_kernel, dim3(static_cast<unsigned>(key_blocks)), 32 * WARPS, 0, p.stream, p, aligned);
        } else {
            const dim3 blocks = grid((rows + WARPS - 1) / WARPS, (p.Nk + COLUMNS - 1) / COLUMNS);
            launch_kernel(pack_mask_kernel, blocks, 32 * WARPS, 0, p.stream, p, aligned);
        }
        return cudaGetLastError();
    });
}

extern "C" int64_t params_size(void) { return sizeof(PackParams); }
extern "C" const char* error_name(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

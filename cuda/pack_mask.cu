// Packs a mask of bytes (true = may attend) into bits (set = hidden), for the kernels that read 32 of them at a time: 8 times less to read,
// in a layout that fits fragments. Words follow a query's keys, or, by_keys, a key's queries (attention.h).
//
// Where the mask's rows are contiguous and aligned, a lane reads 16 columns at once; the kernels then run at the speed of memory. Broadcast
// dimensions are packed once: Python passes 1 for their size, and stride 0 to the kernels that read the result.
#include <stdint.h>

#include "launch.cuh"

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

// ---- words of a key's queries: a block packs QUERIES rows, one per lane, and KEYS columns

constexpr int QUERIES = 32 * WARPS, KEYS = 128;

__global__ void __launch_bounds__(32 * WARPS) pack_by_keys_kernel(const __grid_constant__ PackParams p, bool aligned) {
    __shared__ uint4 bits_smem[KEYS][QUERIES / 128];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int i_blocks = (p.Nq + QUERIES - 1) / QUERIES;
    const int i0 = blockIdx.x % i_blocks * QUERIES, bh = blockIdx.x / i_blocks, j0 = block_along_keys() * KEYS;
    const int i = i0 + threadIdx.x;
    const uint8_t* mask_gmem = p.mask + bh / p.H * p.stride_b + bh % p.H * p.stride_h + min(i, p.Nq - 1) * p.stride_i;  // [Nk]

    uint4 bytes[KEYS / 16];  // all loads are issued before the first result is used
#pragma unroll
    for (int n = 0; n < KEYS / 16; ++n)
        if (aligned && j0 + 16 * n + 16 <= p.Nk) bytes[n] = *reinterpret_cast<const uint4*>(mask_gmem + j0 + 16 * n);
#pragma unroll
    for (int n = 0; n < KEYS / 16; ++n) {
        const int j = j0 + 16 * n;
        uint32_t hidden = aligned && j + 16 <= p.Nk ? hidden_columns(bytes[n]) : hidden_columns(mask_gmem, p.stride_j, j, p.Nk);
        if (i >= p.Nq) hidden = 0xffff;
        // Lane c collects bit c of every lane: a column becomes a word.
        uint32_t word = 0;
#pragma unroll
        for (int c = 0; c < 16; ++c) {
            const uint32_t column = __ballot_sync(0xffffffff, hidden >> c & 1);
            if (lane == c) word = column;
        }
        if (lane < 16) reinterpret_cast<uint32_t*>(bits_smem[16 * n + lane])[warp] = word;
    }
    __syncthreads();

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
    const bool aligned = p.stride_j == 1 && (reinterpret_cast<int64_t>(p.mask) | p.stride_b | p.stride_h | p.stride_i) % 16 == 0;
    return on_device(p.device, [&] {
        if (p.by_keys) {
            const dim3 blocks = grid((p.Nq + QUERIES - 1) / QUERIES * p.B * p.H, (p.Nk + KEYS - 1) / KEYS);
            launch_kernel(pack_by_keys_kernel, blocks, 32 * WARPS, 0, p.stream, p, aligned);
        } else {
            const dim3 blocks = grid((rows + WARPS - 1) / WARPS, (p.Nk + COLUMNS - 1) / COLUMNS);
            launch_kernel(pack_mask_kernel, blocks, 32 * WARPS, 0, p.stream, p, aligned);
        }
        return cudaGetLastError();
    });
}

extern "C" int64_t params_size(void) { return sizeof(PackParams); }
extern "C" const char* error_name(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// Small kernels, each of which breaks one rule if BROKEN, and does the same correctly if not. check_emulator.py runs both and reads the reports.
// One file because it is compiled once.
#include <string_view>

#include "common.cuh"
#include "ptx_hopper.cuh"
#include "tensor_map.cuh"

struct Faults {
    float* data;  // [4096]; the first 1024 have been written
    int* counter;
    CUtensorMap map;  // of data: 4 rows of 128 16-bit numbers, boxes of 4 × 64, swizzled
};

using Kernel = void (*)(Faults);
constexpr int WARPGROUP = 128;

// ---- threads and lanes

template <bool BROKEN>
__global__ void no_barrier(Faults f) {
    __shared__ float x[128];
    x[threadIdx.x] = f.data[threadIdx.x];
    if (!BROKEN) __syncthreads();
    f.data[threadIdx.x] = x[127 - threadIdx.x];
}
template <bool BROKEN>
__global__ void no_syncwarp(Faults f) {
    __shared__ float x[128];
    x[threadIdx.x] = f.data[threadIdx.x];
    if (!BROKEN) __syncwarp();
    f.data[threadIdx.x] = x[threadIdx.x ^ 1];
}
template <bool BROKEN>
__global__ void no_barrier_before_reuse(Faults f) {
    __shared__ float x[128];
    for (int n = 0; n < 2; ++n) {
        x[threadIdx.x] = f.data[threadIdx.x] + n;
        __syncthreads();
        f.data[threadIdx.x] = x[127 - threadIdx.x];
        if (!BROKEN) __syncthreads();
    }
}
template <bool BROKEN>
__global__ void lanes_missing(Faults f) {
    float x = f.data[threadIdx.x];
    if (!BROKEN || threadIdx.x % 32 < 31) x = __shfl_xor_sync(0xffffffff, x, 1);
    f.data[threadIdx.x] = x;
}
template <bool BROKEN>
__global__ void lanes_apart(Faults f) {
    const float x = f.data[threadIdx.x];
    if (BROKEN && threadIdx.x % 32 == 7) __syncwarp();
    f.data[threadIdx.x] = __shfl_xor_sync(0xffffffff, x, 1);
}
template <bool BROKEN>
__global__ void barrier_of_too_few(Faults f) {
    if (threadIdx.x < 64) ptx::bar_sync(2, BROKEN ? 96 : 64);
    f.data[threadIdx.x] = 0;
}
template <bool BROKEN>
__global__ void barrier_half_full(Faults f) {
    if (threadIdx.x < 32) ptx::bar_arrive(3, 64);
    else if (threadIdx.x < 64 && !BROKEN) ptx::bar_sync(3, 64);
    f.data[threadIdx.x] = 0;
}
template <bool BROKEN>
__global__ void barrier_of_two_sizes(Faults f) {
    ptx::bar_sync(4, BROKEN && threadIdx.x >= 64 ? 64 : 128);
    f.data[threadIdx.x] = 0;
}
// No error, but a result that depends on which thread is first: seeds show it.
template <bool BROKEN>
__global__ void depends_on_order(Faults f) {
    f.data[threadIdx.x] = threadIdx.x + 1000.0f;
    if (!BROKEN) __syncthreads();
    const float x = f.data[127 - threadIdx.x];
    __syncthreads();
    f.data[threadIdx.x] = x;
}

// ---- memory

template <bool BROKEN>
__global__ void beyond_global(Faults f) {
    f.data[threadIdx.x + (BROKEN ? 4096 - 64 : 0)] = 1;
}
template <bool BROKEN>
__global__ void far_beyond_global(Faults f) {
    f.data[0] = f.data[threadIdx.x + (BROKEN ? int64_t(1) << 40 : 0)];
}
template <bool BROKEN>
__global__ void unwritten_global(Faults f) {
    f.data[threadIdx.x] = f.data[threadIdx.x + (BROKEN ? 1024 - 64 : 0)];
}
template <bool BROKEN>
__global__ void beyond_shared(Faults f) {
    extern __shared__ __align__(1024) uint8_t smem[];  // 48 KB
    reinterpret_cast<float*>(smem)[threadIdx.x + (BROKEN ? 12 * 1024 - 64 : 0)] = 1;
}
template <bool BROKEN>
__global__ void unwritten_shared(Faults f) {
    __shared__ float x[128];
    if (!BROKEN || threadIdx.x != 5) x[threadIdx.x] = 0;
    __syncthreads();
    f.data[threadIdx.x] = x[127 - threadIdx.x];
}
template <bool BROKEN>
__global__ void misaligned(Faults f) {
    *reinterpret_cast<float4*>(f.data + 1024 + 4 * threadIdx.x) = *reinterpret_cast<const float4*>(f.data + 4 * threadIdx.x + BROKEN);
}

// ---- cp.async

template <bool BROKEN>
__global__ void cp_async_not_awaited(Faults f) {
    __shared__ __align__(16) float x[512];
    ptx::cp_async_16(ptx::smem_address(x + 4 * threadIdx.x), f.data + 4 * threadIdx.x, true);
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<BROKEN>();  // one group may be under way
    f.data[threadIdx.x] = x[4 * threadIdx.x];
    ptx::cp_async_wait_group<0>();
}
template <bool BROKEN>
__global__ void cp_async_of_others(Faults f) {
    __shared__ __align__(16) float x[512];
    ptx::cp_async_16(ptx::smem_address(x + 4 * threadIdx.x), f.data + 4 * threadIdx.x, true);
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    if (!BROKEN) __syncthreads();
    f.data[threadIdx.x] = x[4 * (127 - threadIdx.x)];
}
template <bool BROKEN>
__global__ void cp_async_over_readers(Faults f) {
    __shared__ __align__(16) float x[512];
    x[threadIdx.x] = 1;
    __syncthreads();
    const float read = x[127 - threadIdx.x];
    if (!BROKEN) __syncthreads();
    ptx::cp_async_16(ptx::smem_address(x + 4 * threadIdx.x), f.data + 4 * threadIdx.x, true);
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    f.data[threadIdx.x] = read;
}
template <bool BROKEN>
__global__ void cp_async_at_the_end(Faults f) {
    __shared__ __align__(16) float x[512];
    ptx::cp_async_16(ptx::smem_address(x + 4 * threadIdx.x), f.data + 4 * threadIdx.x, true);
    ptx::cp_async_commit_group();
    if (!BROKEN) ptx::cp_async_wait_group<0>();
}

// ---- mbarriers and the copy engine

struct Tile {
    uint8_t* bytes;  // [512]
    uint32_t full, empty;
};
// A tile of 512 bytes with its barriers, one of which a copy fills.
__device__ inline Tile begin(int full_arrivals, int empty_arrivals, bool fenced = true) {
    __shared__ __align__(1024) uint8_t bytes[512];
    __shared__ uint64_t barriers[2];
    const Tile tile{bytes, ptx::smem_address(&barriers[0]), ptx::smem_address(&barriers[1])};
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(tile.full, full_arrivals);
        ptx::mbarrier_init(tile.empty, empty_arrivals);
        if (fenced) ptx::fence_mbarrier_init();
    }
    __syncthreads();
    return tile;
}
__device__ inline void ask(const Tile& tile, const Faults& f, int bytes = 512) {
    ptx::mbarrier_arrive_expect_tx(tile.full, bytes);
    ptx::cp_async_bulk(ptx::smem_address(tile.bytes), f.data, 512, tile.full);
}
__device__ inline float read(const Tile& tile) { return reinterpret_cast<const float*>(tile.bytes)[threadIdx.x]; }

template <bool BROKEN>
__global__ void bulk_not_awaited(Faults f) {
    const Tile tile = begin(1, 128);
    if (threadIdx.x == 0) ask(tile, f);
    if (!BROKEN) ptx::mbarrier_wait(tile.full, 0);
    f.data[threadIdx.x] = read(tile);
    ptx::mbarrier_wait(tile.full, 0);
}
template <bool BROKEN>
__global__ void bulk_over_readers(Faults f) {
    const Tile tile = begin(1, 128);
    float sum = 0;
    for (int n = 0; n < 2; ++n) {
        if (threadIdx.x == 0) {
            if (!BROKEN) ptx::mbarrier_wait(tile.empty, n & 1 ^ 1);
            ask(tile, f);
        }
        ptx::mbarrier_wait(tile.full, n & 1);
        sum += read(tile);
        f.data[1024 + threadIdx.x] = sum;
        ptx::mbarrier_arrive(tile.empty);
    }
}
template <bool BROKEN>
__global__ void released_before_it_is_read(Faults f) {  // the load may still be under way
    const Tile tile = begin(1, 128);
    for (int n = 0; n < 2; ++n) {
        if (threadIdx.x == 0) {
            ptx::mbarrier_wait(tile.empty, n & 1 ^ 1);
            ask(tile, f);
        }
        ptx::mbarrier_wait(tile.full, n & 1);
        const float x = read(tile);
        if (!BROKEN) f.data[1024 + threadIdx.x] = x;
        ptx::mbarrier_arrive(tile.empty);
        f.data[2048 + threadIdx.x] = x;
    }
}
template <bool BROKEN>
__global__ void bytes_too_many(Faults f) {  // announced
    const Tile tile = begin(1, 128);
    if (threadIdx.x == 0) ask(tile, f, BROKEN ? 528 : 512);
    ptx::mbarrier_wait(tile.full, 0);
}
template <bool BROKEN>
__global__ void arrivals_too_few(Faults) {
    const Tile tile = begin(1, 128);
    if (!BROKEN || threadIdx.x != 77) ptx::mbarrier_arrive(tile.empty);
    ptx::mbarrier_wait(tile.empty, 0);
}
template <bool BROKEN>
__global__ void arrivals_too_many(Faults f) {
    const Tile tile = begin(1, 128);
    float sum = 0;
    for (int n = 0; n < 2; ++n) {
        if (threadIdx.x == 0) {
            ptx::mbarrier_wait(tile.empty, n & 1 ^ 1);
            ask(tile, f);
        }
        ptx::mbarrier_wait(tile.full, n & 1);
        sum += read(tile);
        f.data[1024 + threadIdx.x] = sum;
        ptx::mbarrier_arrive(tile.empty);
        if (BROKEN && threadIdx.x == 77) ptx::mbarrier_arrive(tile.empty);  // in place of the thread that comes last
    }
}
template <bool BROKEN>
__global__ void barrier_not_fenced(Faults f) {
    const Tile tile = begin(1, 128, !BROKEN);
    if (threadIdx.x == 0) ask(tile, f);
    ptx::mbarrier_wait(tile.full, 0);
}
template <bool BROKEN>
__global__ void store_without_fence(Faults f) {
    const Tile tile = begin(1, 128);
    reinterpret_cast<float*>(tile.bytes)[threadIdx.x] = 1;
    if (!BROKEN) ptx::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::cp_async_bulk_tensor_4d_store(&f.map, 0, 0, 0, 0, ptx::smem_address(tile.bytes));
        ptx::cp_async_bulk_commit_group();
        ptx::cp_async_bulk_wait_group_read<0>();
    }
}
template <bool BROKEN>
__global__ void store_not_awaited(Faults f) {
    const Tile tile = begin(1, 128);
    reinterpret_cast<float*>(tile.bytes)[threadIdx.x] = 1;
    ptx::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::cp_async_bulk_tensor_4d_store(&f.map, 0, 0, 0, 0, ptx::smem_address(tile.bytes));
        ptx::cp_async_bulk_commit_group();
        if (!BROKEN) ptx::cp_async_bulk_wait_group_read<0>();
    }
    __syncthreads();
    reinterpret_cast<float*>(tile.bytes)[threadIdx.x] = 2;
    if (threadIdx.x == 0) ptx::cp_async_bulk_wait_group_read<0>();
}
template <bool BROKEN>
__global__ void box_misplaced(Faults f) {
    const Tile tile = begin(1, 128);
    if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect_tx(tile.full, 512);
        ptx::cp_async_bulk_tensor_4d(ptx::smem_address(tile.bytes) + (BROKEN ? 64 : 0), &f.map, 0, 0, 0, 0, tile.full);
    }
    ptx::mbarrier_wait(tile.full, 0);
}
template <bool BROKEN>
__global__ void box_read_as_unswizzled(Faults f) {  // the box's second row is read where a plain one would lie
    const Tile tile = begin(1, 128);
    if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect_tx(tile.full, 512);
        ptx::cp_async_bulk_tensor_4d(ptx::smem_address(tile.bytes), &f.map, 0, 0, 0, 0, tile.full);
    }
    ptx::mbarrier_wait(tile.full, 0);
    const int row = threadIdx.x / 32, column = threadIdx.x % 32 * 4;  // bytes
    f.data[1024 + threadIdx.x] = *reinterpret_cast<const float*>(tile.bytes + row * 128 + (BROKEN ? column : column ^ row % 8 * 16));
}

// ---- products of a warpgroup: Q Kᵀ with Q = K = a tile of ones, [64, 64]

template <class Body>
__device__ inline void with_ones(Body body, bool fenced = true) {
    extern __shared__ __align__(1024) uint8_t smem[];
    const __half one(1.0f);
    for (int n = threadIdx.x; n < 64 * 64 / 2; n += WARPGROUP) ptx::st_shared(ptx::smem_address(smem) + 4 * n, one.bits | uint32_t(one.bits) << 16);
    if (fenced) ptx::fence_proxy_async();
    __syncthreads();
    float d[32] = {};
    const uint64_t tile = ptx::descriptor(ptx::smem_address(smem));
    ptx::wgmma_fence();
    body(d, tile);
    ptx::wgmma_wait_group<0>();
}
template <bool BROKEN>
__global__ void product_not_awaited(Faults f) {
    with_ones([&](float(&d)[32], uint64_t tile) {
        ptx::wgmma_ss<__half, 64>(d, tile, tile, 0);
        ptx::wgmma_commit_group();
        ptx::wgmma_wait_group<BROKEN>();
        f.data[threadIdx.x] = d[5];
    });
}
template <bool BROKEN>
__global__ void product_of_written_tile(Faults f) {
    extern __shared__ __align__(1024) uint8_t smem[];
    with_ones([&](float(&d)[32], uint64_t tile) {
        ptx::wgmma_ss<__half, 64>(d, tile, tile, 0);
        ptx::wgmma_commit_group();
        if (!BROKEN) ptx::wgmma_wait_group<0>();
        if (threadIdx.x == 9) ptx::st_shared(ptx::smem_address(smem), 0);
    });
}
template <bool BROKEN>
__global__ void product_without_fence(Faults f) {
    with_ones([&](float(&d)[32], uint64_t tile) {
        ptx::wgmma_ss<__half, 64>(d, tile, tile, 0);
        ptx::wgmma_commit_group();
    }, !BROKEN);
}
template <bool BROKEN>
__global__ void product_of_copied_tile(Faults f) {  // a fence before the copy has arrived is none
    extern __shared__ __align__(1024) uint8_t smem[];
    with_ones([&](float(&d)[32], uint64_t tile) {
        ptx::cp_async_16(ptx::smem_address(smem + 16 * threadIdx.x), f.data + 4 * threadIdx.x, true);
        ptx::cp_async_commit_group();
        if (BROKEN) ptx::fence_proxy_async();
        ptx::cp_async_wait_group<0>();
        if (!BROKEN) ptx::fence_proxy_async();
        __syncthreads();
        ptx::wgmma_ss<__half, 64>(d, tile, tile, 0);
        ptx::wgmma_commit_group();
    });
}
template <bool BROKEN>
__global__ void product_of_touched_registers(Faults f) {
    with_ones([&](float(&d)[32], uint64_t tile) {
        ptx::wgmma_ss<__half, 64>(d, tile, tile, 0);
        ptx::wgmma_commit_group();
        ptx::wgmma_wait_group<0>();
        d[7] *= 2;
        if (!BROKEN) ptx::wgmma_fence();
        ptx::wgmma_ss<__half, 64>(d, tile, tile, 1);
        ptx::wgmma_commit_group();
    });
}
template <bool BROKEN>
__global__ void product_of_wrong_rows(Faults f) {
    with_ones([&](float(&d)[32], uint64_t tile) {
        ptx::wgmma_ss<__half, 64>(d, BROKEN ? ptx::advance(tile, 128) : tile, tile, 0);
        ptx::wgmma_commit_group();
    });
}
template <bool BROKEN>
__global__ void product_beyond_shared(Faults f) {
    with_ones([&](float(&d)[32], uint64_t tile) {
        ptx::wgmma_ss<__half, 64>(d, BROKEN ? ptx::advance(tile, 44 * 1024) : tile, tile, 0);
        ptx::wgmma_commit_group();
    });
}
template <bool BROKEN>
__global__ void product_of_three_warps(Faults f) {
    with_ones([&](float(&d)[32], uint64_t tile) {
        ptx::wgmma_ss<__half, 64>(d, tile, tile, 0);
        if (!BROKEN || threadIdx.x < 96) ptx::wgmma_commit_group();
    });
}

// ---- registers, turns

template <bool BROKEN>
__global__ void registers_beyond_the_block(Faults f) {  // 128 threads with 255 each at the start leave 32896
    if (threadIdx.x / 128 == 0) ptx::setmaxnreg_dec<BROKEN ? 152 : 24>();
    else ptx::setmaxnreg_inc<240>();
}
template <bool BROKEN>
__global__ void turn_taken_twice(Faults f) {
    if (threadIdx.x == 0) {
        while (ptx::ld_acquire(f.counter) != static_cast<int>(blockIdx.x)) {}
        ptx::st_release(f.counter, blockIdx.x + (BROKEN ? 2 : 1));
    }
}

// ---- launches that overlap. Of two blocks the second always waits, so that the launch as a whole does. Before it, written() writes what it reads, and
// passed_on(), launched early too, runs between the two.

// Not f.counter, which has been written before the call, so that it is not known which launch writes it.
__device__ inline int* number_of(const Faults& f) { return reinterpret_cast<int*>(f.data + 2048); }

__global__ void written(Faults f) {
    f.data[1024 + threadIdx.x] = threadIdx.x;
    if (threadIdx.x == 0) *number_of(f) = 0;
}
template <bool BROKEN>
__global__ void passed_on(Faults f) {
    if (BROKEN) ptx::griddepcontrol_launch_dependents();
    ptx::griddepcontrol_wait();
    ptx::griddepcontrol_launch_dependents();
    if (threadIdx.x == 0) ptx::red_release(number_of(f), 1);
}
template <bool BROKEN>
__global__ void early_without_wait(Faults f) {
    if (!BROKEN || blockIdx.x == 1) ptx::griddepcontrol_wait();
    f.data[threadIdx.x] = f.data[1024 + threadIdx.x];
}
template <bool BROKEN>
__global__ void early_none_waits(Faults f) {
    if (!BROKEN) ptx::griddepcontrol_wait();
    f.data[threadIdx.x] = 0;
}
template <bool BROKEN>
__global__ void early_after_early(Faults f) {
    if (blockIdx.x == 1) ptx::griddepcontrol_wait();
    f.data[threadIdx.x] = f.data[1024 + threadIdx.x];
}
template <bool BROKEN>
__global__ void early_number_of_before(Faults f) {
    if (blockIdx.x == 1) ptx::griddepcontrol_wait();
    while (ptx::ld_acquire(number_of(f)) != 1) {}
    f.data[threadIdx.x] = f.data[1024 + threadIdx.x];
}

// ---- by number

#define FAULTS(X)                                                                                                                            \
    X(no_barrier) X(no_syncwarp) X(no_barrier_before_reuse) X(lanes_missing) X(lanes_apart) X(barrier_of_too_few) X(barrier_half_full)       \
    X(barrier_of_two_sizes) X(depends_on_order) X(beyond_global) X(far_beyond_global) X(unwritten_global) X(beyond_shared)                   \
    X(unwritten_shared) X(misaligned) X(cp_async_not_awaited) X(cp_async_of_others) X(cp_async_over_readers) X(cp_async_at_the_end)          \
    X(bulk_not_awaited) X(bulk_over_readers) X(released_before_it_is_read) X(bytes_too_many) X(arrivals_too_few) X(arrivals_too_many) X(barrier_not_fenced)                \
    X(store_without_fence) X(store_not_awaited) X(box_misplaced) X(box_read_as_unswizzled) X(product_not_awaited)                          \
    X(product_of_written_tile) X(product_without_fence) X(product_of_copied_tile) X(product_of_touched_registers) X(product_of_wrong_rows) X(product_beyond_shared) X(product_of_three_warps)          \
    X(registers_beyond_the_block) X(turn_taken_twice) X(early_without_wait) X(early_none_waits) X(early_after_early) X(early_number_of_before)

extern "C" const char* fault_names() {
#define NAME(fault) #fault " "
    return FAULTS(NAME);
}

// Numbers to float16 and bfloat16, and those back: what stands in for CUDA's types.
extern "C" void convert(const float* x, int count, uint16_t* half, uint16_t* bfloat, float* from_half, float* from_bfloat) {
    for (int n = 0; n < count; ++n) {
        const __half h(x[n]);
        const __nv_bfloat16 b(x[n]);
        half[n] = h.bits, bfloat[n] = b.bits, from_half[n] = h, from_bfloat[n] = b;
    }
}

extern "C" int fault(const char* name, float* data, int* counter, int broken) {
    Faults f{data, counter, {}};
    const Tensor4 rows{data, 0, 0, 128};
    if (encode_tensor_map(&f.map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_SWIZZLE_128B, rows, 1, 1, 4, 128, 4, 64) != cudaSuccess) return 1;
    Kernel kernel = nullptr;
    const std::string_view wanted(name);
#define PICK(fault) \
    if (wanted == #fault) kernel = broken ? fault<true> : fault<false>;
    FAULTS(PICK)
    if (!kernel) return cudaErrorInvalidValue;
    const bool turns = wanted == "turn_taken_twice", registers = wanted == "registers_beyond_the_block";
    if (wanted.substr(0, 5) == "early") {
        launch_kernel(written, 1, 128, 0, nullptr, f);
        if (wanted == "early_after_early" || wanted == "early_number_of_before") launch_early(broken ? passed_on<true> : passed_on<false>, 1, 128, 0, nullptr, f);
        launch_early(kernel, 2, 128, 0, nullptr, f);
        return cudaGetLastError();
    }
    launch_kernel(kernel, turns ? 3 : 1, registers ? 384 : 128, 48 * 1024, nullptr, f);
    return cudaGetLastError();
}

// The order in which blocks take units of work whose lengths differ, as they do under spans and masks: the longest first (Graham, 1969), so that no
// long unit starts when the other blocks are about to end. A unit is a tile of Q in the forward, a tile of keys in the backward, numbered head by head; its
// length is the number of tiles that it visits.
//
// If units were sorted by length alone, those that share keys would lie far apart, and each would read the keys from memory again. So units are sorted
// into classes of lengths, each class twice as long as the next, and within a class they keep their order. Only the end of the order decides how well
// blocks are balanced. So units of up to a quarter of a block's share that belong to the first third of the work form one class, in their own order; the
// other two thirds have classes down to a 128th of a share, which even out by what the blocks differ.
#pragma once

#include "visible.cuh"

#if INTERVAL || MASK
constexpr int ORDER_WARPS = 32;
constexpr int LONG_CLASSES = 3;   // longer than a quarter of a block's share, than half of it, than all of it
constexpr int SHORT_CLASSES = 6;  // of the other two thirds of the work: up to a quarter, down to a 128th
constexpr int CLASSES = LONG_CLASSES + 1 + SHORT_CLASSES;
constexpr int NO_ORDER = -1;

// In a workspace.
struct alignas(16) Order {
    int* queue;  // how many units blocks have taken from it; for a mask, whether there is no order
    int* units;  // [units]; each NO_ORDER if there is none

    Order() = default;
    __host__ __device__ Order(float* workspace) : queue(reinterpret_cast<int*>(workspace)), units(queue + 4) {}
    static int64_t floats(int64_t units) { return whole_chunks(units + 4); }

    __device__ bool none() const { return queue[1] != 0; }
    // The next unit of `count`, for any thread of any block; `none` if there is none.
    __device__ int take(int count, int none) const {
        const int place = atomicAdd(queue, 1);
        return place < count ? units[place] : none;
    }
};

// length(p, unit) is a unit's length. The units are for `blocks` blocks; those before `first` are not in the queue. A warp sorts a range of units, 32 at
// a time. If lengths come from a mask, the block first measures them; if every unit has the greatest possible length, length.most(p, unit), there is no
// order. If length.worth_sorting(p, longest) says no, units keep their own.
template <class Length>
__global__ void __launch_bounds__(32 * ORDER_WARPS)
    order_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Length length, const __grid_constant__ Order order, int first, int units,
                 int blocks) {
    __shared__ float sums_smem[ORDER_WARPS];
    [[maybe_unused]] __shared__ bool shorter_smem[ORDER_WARPS];
    [[maybe_unused]] __shared__ int longest_smem[ORDER_WARPS];
    __shared__ int counts_smem[CLASSES][ORDER_WARPS];  // of the class: first each warp's units, then all units before these
    __shared__ int totals_smem[CLASSES];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int stretch = (units - first + 32 * ORDER_WARPS - 1) / (32 * ORDER_WARPS) * 32, begin = first + warp * stretch + lane;
    const int end = min(units, first + (warp + 1) * stretch);

    ptx::griddepcontrol_launch_dependents();
    ptx::griddepcontrol_wait();  // the data that lengths are computed from is visible
    if constexpr (Length::SAYS_MOST) {
        length.measure(p);
        __syncthreads();  // so are lengths
    }
    float sum = 0;
    [[maybe_unused]] bool shorter = false;
    [[maybe_unused]] int longest = 0;
    for (int unit = begin; unit < end; unit += 32) {
        const int its = length(p, unit);
        sum += its;
        if constexpr (Length::SAYS_MOST) shorter |= its < length.most(p, unit);
        if constexpr (Length::SAYS_WORTH) longest = max(longest, its);
    }
    if constexpr (Length::SAYS_MOST) {
        shorter = __any_sync(0xffffffff, shorter);
        if (lane == 0) shorter_smem[warp] = shorter;
    }
    if constexpr (Length::SAYS_WORTH) {
        for (int lanes = 16; lanes > 0; lanes /= 2) longest = max(longest, __shfl_xor_sync(0xffffffff, longest, lanes));
        if (lane == 0) longest_smem[warp] = longest;
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffff, sum, lanes);
    if (lane == 0) sums_smem[warp] = sum;
    if (threadIdx.x == 0) *order.queue = 0;
    __syncthreads();  // every warp's sum is there
    float before_it = 0;  // the work of the warps before this one
    sum = 0;
    for (int w = 0; w < ORDER_WARPS; ++w) {
        if (w == warp) before_it = sum;
        sum += sums_smem[w];
    }
    if constexpr (Length::SAYS_MOST) {
        for (int w = 0; w < ORDER_WARPS; ++w) shorter |= shorter_smem[w];
        if (threadIdx.x == 0) order.queue[1] = !shorter;
        if (!shorter) {
            for (int unit = threadIdx.x; unit < units; unit += 32 * ORDER_WARPS) order.units[unit] = NO_ORDER;
            return;
        }
    }
    if constexpr (Length::SAYS_WORTH) {
        for (int w = 0; w < ORDER_WARPS; ++w) longest = max(longest, longest_smem[w]);
        if (!length.worth_sorting(p, longest)) {
            for (int unit = first + threadIdx.x; unit < units; unit += 32 * ORDER_WARPS) order.units[unit - first] = unit;
            return;
        }
    }
    const bool first_third = before_it < sum / 3;
    const float shortest = sum / (128.0f * blocks);
    auto class_of = [&](int unit) {  // beyond the last unit: none
        if (unit >= end) return CLASSES;
        float bound = shortest;
        int c = CLASSES - 1;
        for (const int n = length(p, unit); c > 0 && n > bound; bound *= 2) --c;
        // The class numbered LONG_CLASSES is the first third's: long classes come one earlier than counted here.
        return c <= LONG_CLASSES ? max(0, c - 1) : first_third ? LONG_CLASSES : c;
    };

    int counts[CLASSES] = {};
    for (int unit = begin; unit - lane < end; unit += 32) {
        const int its = class_of(unit);
#pragma unroll
        for (int c = 0; c < CLASSES; ++c) counts[c] += __popc(__ballot_sync(0xffffffff, its == c));
    }
#pragma unroll
    for (int c = 0; c < CLASSES; ++c)
        if (lane == 0) counts_smem[c][warp] = counts[c];
    __syncthreads();  // every warp's counts are there
    static_assert(ORDER_WARPS == 32 && CLASSES <= ORDER_WARPS, "a warp sums a class, a lane has a warp's");
    if (warp < CLASSES) {
        const int its = counts_smem[warp][lane];
        int up_to_it = its;
        for (int lanes = 1; lanes < 32; lanes *= 2) {
            const int from = __shfl_up_sync(0xffffffff, up_to_it, lanes);
            if (lane >= lanes) up_to_it += from;
        }
        counts_smem[warp][lane] = up_to_it - its;
        if (lane == 31) totals_smem[warp] = up_to_it;
    }
    __syncthreads();  // so are the sums over warps
    int before = 0;
#pragma unroll
    for (int c = 0; c < CLASSES; ++c) {
        counts[c] = before + counts_smem[c][warp];
        before += totals_smem[c];
    }
    for (int unit = begin; unit - lane < end; unit += 32) {
        const int its = class_of(unit);
#pragma unroll
        for (int c = 0; c < CLASSES; ++c) {
            const uint32_t same = __ballot_sync(0xffffffff, its == c);
            if (its == c) order.units[counts[c] + __popc(same & first_bits(lane))] = unit;
            counts[c] += __popc(same);
        }
    }
}

// first: the number of units that blocks take without asking the queue.
template <class Length>
inline cudaError_t put_longest_first(const AttentionParams& p, const Length& length, const Order& order, int64_t units, int64_t blocks,
                                     int64_t first = 0) {
    if (units == 0) return cudaSuccess;
    const int assigned = static_cast<int>(first), count = static_cast<int>(units), takers = static_cast<int>(blocks);
    launch_early(order_kernel<Length>, 1, 32 * ORDER_WARPS, 0, p.stream, p, length, order, assigned, count, takers);
    return cudaGetLastError();
}
#endif

// Where FINISHES_DQ: the memory in which dQ is summed, and what the idle warps of a block's first group do about it.
//
// dQ is summed in float32, over all blocks of a head. If every head has memory of its own, a kernel before sets all of it to zero and one after reads all of
// it again, to round it: a quarter of the time of a backward of 512 rows. Here a head's memory, its slot, is used again by heads that come later. The warps
// that do not load tiles would only wait. They round and store a part of an earlier head's dQ, whose blocks have all ended, and set the sums to zero again.
// The kernel before provides zeros for the first heads, and the kernel after rounds the last heads' dQ.
//
// Blocks start in the order of their numbers. So a block that waits for earlier ones waits for blocks that are running or have ended.
#pragma once

#include "backward_workspace.cuh"

constexpr int IDLE_WARPS = 3;

// A block's part of an earlier head takes the idle warps 5 to 15 µs. So blocks finish parts only if they last about as long themselves: if they visit so many
// rows on average, and share a head with so many others. In the emulator, whose calls are small, nearly all do.
#ifdef __CUDACC__
constexpr int LEAST_ROWS = HEAD_DIM <= 64 ? 256 : 576, LEAST_TILES = 4;
#else
constexpr int LEAST_ROWS = 0, LEAST_TILES = 1;
#endif

inline Slots slots_of(const AttentionParams& p) {
    const int64_t heads = static_cast<int64_t>(p.B) * p.Hkv, k_tiles = tiles_of(p.Nk, BLOCK_K);
    const int64_t rows = static_cast<int64_t>(p.Nq) * (p.H / p.Hkv) / (CAUSAL ? 2 : 1);
    if (k_tiles < LEAST_TILES || p.Nq == 0 || rows < LEAST_ROWS) return Slots::of_all_heads(p);
    auto heads_of = [&](int64_t blocks) { return tiles_of(blocks, static_cast<int>(k_tiles)); };
    // A round and a half of blocks lies between a head and the one that its blocks finish, and a round until its slot is used again. Blocks of the last heads
    // that start in another order (unit_at) must finish and replace heads before all of these.
    const int64_t reordered = CAUSAL && HEAD_DIM > 64 && 3 * k_tiles <= 2 * p.sm_count ? std::min(heads, p.sm_count / k_tiles * 2) : 0;
    const int64_t lag = std::max(reordered, 1 + heads_of(3 * p.sm_count / 2)), count = lag + std::max(reordered, 1 + heads_of(p.sm_count));
    if (lag >= heads) return Slots::of_all_heads(p);
    return {static_cast<int>(std::min(count, heads)), static_cast<int>(lag)};
}

// Brings 16 rows to the L1 cache: loads a word of each 32 bytes, because these warps have too few registers to load more at a time. The words are stored, as
// loads whose result is not used are not compiled.
__device__ inline void touch(const float* sums, uint32_t smem) {
    const int lane = ptx::tid_x() % 32;
    uint32_t words = 0;
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 16; ++n) words |= reinterpret_cast<const uint32_t*>(sums)[(32 * n + lane) * 8];
    ptx::st_shared(smem, words);
}

// Rows i0 … of query head bh, whose sums are the slots' rows `row` …. zero: the sums become 0 again.
__device__ inline void finish_16_rows(const AttentionParams& p, unsigned row, int bh, int i0, bool zero) {
    const int lane = ptx::tid_x() % 32, g = lane / 4, t = lane % 4, odd = t % 2;
    float4* sums = reinterpret_cast<float4*>(p.workspace + int64_t{row} * HEAD_DIM + lane * 4);
    // Of 16 columns a lane holds four numbers of row g and four of row g + 8, which two neighbours exchange so that each has four columns in a row.
    const int right = odd * 8 + t / 2 * 4;
    element* dQ = head_of(p.dq, bh / p.H, bh % p.H) + (i0 + g) * p.dq.stride_n + right;
#pragma unroll 2
    for (int column = 0; column < HEAD_DIM; column += 16) {
        const float4 left = sums[column * 4], next = sums[column * 4 + 32];
        const uint32_t pairs[2][2] = {{ptx::cvt_pair<element>(left.x * p.scale, left.y * p.scale), ptx::cvt_pair<element>(next.x * p.scale, next.y * p.scale)},
                                      {ptx::cvt_pair<element>(left.z * p.scale, left.w * p.scale), ptx::cvt_pair<element>(next.z * p.scale, next.w * p.scale)}};
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const uint32_t others = __shfl_xor_sync(0xffffffff, odd ? pairs[r][0] : pairs[r][1], 1);
            if (i0 + g + 8 * r < p.Nq && column + odd * 8 < p.D)
                *reinterpret_cast<uint2*>(dQ + 8 * r * p.dq.stride_n + column) = odd ? make_uint2(others, pairs[r][1]) : make_uint2(pairs[r][0], others);
        }
        if (zero) sums[column * 4] = sums[column * 4 + 32] = make_float4(0, 0, 0, 0);
    }
}

// For the warps of the first group but its first. KV_full: the barrier of the block's keys, which they join because nothing may be added to a slot before
// it is free. all_added: the barrier at which every consumer arrives after its last addition to dQ.
__device__ inline void finish_earlier_head(const AttentionParams& p, const Slots& slots, const Workspace& workspace, int k_tile, int k_tiles, int b_kv_h,
                                           uint32_t KV_full, uint32_t all_added) {
    const int heads = p.B * p.Hkv, group = p.H / p.Hkv;
    if (ptx::tid_x() == 32) {
        if (b_kv_h >= slots.count) await(workspace.zeroed + b_kv_h - slots.count, k_tiles * IDLE_WARPS);
        ptx::mbarrier_arrive(KV_full);
    }
    if (b_kv_h >= slots.lag) {
        const int its = b_kv_h - slots.lag;
        // Whether its slot is used again: computed once or each time, whichever leaves enough registers.
        const bool computed = its + slots.count < heads;
        auto used_again = [&] { return CAUSAL && HEAD_DIM > 64 ? b_kv_h - slots.lag + slots.count < p.B * p.Hkv : computed; };
        if (ptx::tid_x() % 32 == 0) await(workspace.added + its, k_tiles);
        __syncwarp();
        const int warp = uniform(ptx::tid_x() / 32);
        __shared__ uint32_t touched_smem[32 * IDLE_WARPS];
        // Of each query head, the block's share of strips of 16 rows.
        const int strips = workspace.rows / 16, share = (strips + k_tiles - 1) / k_tiles;
#pragma unroll 1
        for (int h = 0; h < group; ++h)
#pragma unroll 1
            for (int strip = k_tile * share + warp - 1; strip < min(strips, (k_tile + 1) * share); strip += IDLE_WARPS) {
                const unsigned row = (slots.of(its) * group + h) * 16u * strips + strip * 16;
                if (used_again() && row % BLOCK_Q == 0) workspace.turns[row / BLOCK_Q] = 0;
                touch(p.workspace + int64_t{row} * HEAD_DIM, ptx::smem_address(touched_smem + ptx::tid_x() - 32));
                finish_16_rows(p, row, its * group + h, strip * 16, used_again());
            }
        __syncwarp();  // the warp has stored its zeros
        if (used_again() && ptx::tid_x() % 32 == 0) ptx::red_release(workspace.zeroed + its, 1);
    }
    if (ptx::tid_x() == 32 && b_kv_h + slots.lag < heads) {
        ptx::mbarrier_wait(all_added, 0);
        ptx::red_release(workspace.added + b_kv_h, 1);
    }
}

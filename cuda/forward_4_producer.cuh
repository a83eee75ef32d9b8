// The forward of `hopper`, third part: the producer. One thread hands out work items and issues the load of every tile, in the order in which stages
// become empty.
#pragma once

#include "forward_4_schedule.cuh"

// With intervals: how many tiles before the end of a work item the producer asks for the next one. Late, because a queue balances blocks only if none takes
// an item long before it is free; and early enough for the item to be there when the last tile has been issued.
constexpr int ASKED_BEFORE = 3;

// The block's next work item with keys, from its m-th on; one without tiles if there is none.
template <bool LEAVES_OUT>
__device__ inline Work next_with_keys(const AttentionParams& p, const Schedule& schedule, int& m) {
    Work work;
    while (schedule.template get_work<LEAVES_OUT>(p, m++, work))
        if (work.k_tiles > 0) return work;
    return Work{};
}

// LEAVES_OUT: whether the mask lets tiles of keys be skipped. If not, a tile is loaded without reading which ones are visited.
template <bool LEAVES_OUT>
__device__ inline void produce(const AttentionParams& p, const Maps& maps, const Schedule& schedule, const Shared& shared) {
    int m = 0, q = 0, n = 0;  // counters over all work items, tiles of Q, tiles of keys
    auto take = [&] {
#if INTERVAL
        ptx::mbarrier_wait(ptx::smem_address(&shared.barriers.work_full), m++ & 1);  // another warp has determined it
        return shared.works[Q_STAGES];
#else
        return next_with_keys<LEAVES_OUT>(p, schedule, m);
#endif
    };
    // In a stage's first round, a wait for "empty" returns immediately.
    auto hand_out = [&](const Work& work) {
        const Slot_Q slot(q++);
        const uint32_t full = barrier(shared.barriers.Q_full, slot.stage);
        ptx::mbarrier_wait(barrier(shared.barriers.Q_empty, slot.stage), slot.parity ^ 1);
        shared.works[slot.stage] = work;  // visible to threads that have waited for "full"
        if (work.k_tiles == 0) return ptx::mbarrier_arrive(full);
        ptx::mbarrier_arrive_expect_tx(full, Tile_Q::BYTES);
        load_boxes<Tile_Q, RowOrder>(shared.Q + slot.stage * Tile_Q::BYTES, maps.q, work.i0, work.h, work.b, full);
    };
    struct Keys {
        int j0, kv_h, b;
    };
    // A tile of K or V, by panels. more_bytes: those that come with it.
    auto load = [&](auto tile, const Slot_KV& slot, uint32_t tiles, const CUtensorMap& map, uint64_t* full, uint64_t* empty, const Keys& keys,
                    int more_bytes) {
        using Tile = decltype(tile);
        ptx::mbarrier_wait(barrier(empty, slot.stage), slot.parity ^ 1);
        ptx::mbarrier_arrive_expect_tx(barrier(full, slot.stage), Tile::BYTES + more_bytes);
#pragma unroll
        for (int panel = 0; panel < Tile::PANELS; ++panel)
            ptx::cp_async_bulk_tensor_4d(tiles + slot.stage * Tile::BYTES + panel * Tile::PANEL_BYTES, &map, panel * 64, keys.j0, keys.kv_h, keys.b,
                                         barrier(full, slot.stage));
    };
    Keys keys{}, before;  // V is loaded a tile later than K: it is needed later, and its stage is in use for longer
    auto load_V = [&] { load(Tile_V(), Slot_KV(n - 1), shared.V, maps.v, shared.barriers.V_full, shared.barriers.V_empty, before, 0); };

    // Where tiles are skipped, there are not enough registers for two work items: they live in shared memory.
    Work own[2];
    Work &work = LEAVES_OUT ? shared.works[Q_STAGES] : own[0], &next = LEAVES_OUT ? shared.works[Q_STAGES + 1] : own[1];
    work = take();
    if (AHEAD) hand_out(work);
    while (work.k_tiles > 0) {
        if (!LEAVES_OUT && !INTERVAL) next = take();  // early, because that takes a while
        Walk<LEAVES_OUT> walk(p, work);
        for (int tile = 0; tile < work.k_tiles; ++tile, ++n) {
            const Slot_KV slot(n);
#if INTERVAL
            if (tile == max(0, work.k_tiles - ASKED_BEFORE)) ptx::mbarrier_arrive(ptx::smem_address(&shared.barriers.work_asked));
#endif
            before = keys, keys = {walk.next(p, schedule, work, tile), kv_head(p, work.h), work.b};
            if (LEAVES_OUT && TELLS) {
                ptx::mbarrier_wait(barrier(shared.barriers.K_empty, slot.stage), slot.parity ^ 1);
                shared.j0[slot.stage] = keys.j0;  // visible to threads that have waited for "full"
            }
            load(Tile_K(), slot, shared.K, maps.k, shared.barriers.K_full, shared.barriers.K_empty, keys, MASK ? schedule.mask_bytes : 0);
            if (MASK)
                ptx::cp_async_bulk_tensor_4d(ptx::smem_address(shared.mask + slot.stage * MASK_BYTES), &maps.mask, keys.j0 / BIT_COLUMNS * 4, work.i0,
                                             work.h, work.b, barrier(shared.barriers.K_full, slot.stage));
            if (n > 0) load_V();
            if (LEAVES_OUT && tile == min(1, work.k_tiles - 1)) next = take();  // the first tiles are being loaded meanwhile
            if (INTERVAL && tile + 1 == work.k_tiles) next = take();
            if (AHEAD && tile + 1 == work.k_tiles) hand_out(next);
            if (!AHEAD && tile == 0) hand_out(work);
        }
        work = next;
    }
    before = keys;
    if (n > 0) load_V();
    if (!AHEAD) hand_out(work);
}

#if INTERVAL
// Another warp determines the work items, because it takes long: of the queue, the order and the bounds, each is read after the one before.
__device__ inline void determine_work(const AttentionParams& p, const Schedule& schedule, const Shared& shared) {
    int n = 0;  // counts items
    auto put = [&](const Work& work) {
        shared.works[Q_STAGES] = work;
        ptx::mbarrier_arrive(ptx::smem_address(&shared.barriers.work_full));
        ++n;
    };
    const bool has_spans = p.seen.spans != nullptr;
    Work work{};
    if (has_spans) work = schedule.first_work(p);
    if (threadIdx.x % 32 > 0) return;
    if (work.k_tiles > 0) put(work);
    if (has_spans) ptx::griddepcontrol_wait();  // the bounds and the order are visible
    int m = 0;
    do {
        ptx::mbarrier_wait(ptx::smem_address(&shared.barriers.work_asked), (n & 1) ^ 1);  // returns immediately for the first item
        work = next_with_keys<false>(p, schedule, m);
        put(work);
    } while (work.k_tiles > 0);
}
#endif

// Another warp, otherwise idle, handles the work items without keys: their O is 0.
__device__ inline void write_rows_without_keys(const AttentionParams& p, const Schedule& schedule) {
    auto write = [&](const Work& work) {
        for (int i = work.i0; work.k_tiles == 0 && i < min(p.Nq, work.i0 + BLOCK_Q); ++i) {
            element* O = head_of(p.o, work.b, work.h) + i * p.o.stride_n;
            for (int d = threadIdx.x % 32; d < p.Dv; d += 32) O[d] = element(0.0f);
            if (p.lse && threadIdx.x % 32 == 0) LSE_of(p, work, i) = -CUDART_INF_F;
        }
    };
#if INTERVAL
    if (p.seen.spans != nullptr) ptx::griddepcontrol_wait();  // the bounds are visible
    for (int unit = blockIdx.x; unit < schedule.units; unit += gridDim.x) write(schedule.work_of(p, unit));
#else
#if LISTED
    if (schedule.leaves_out()) {
        for (int tile = blockIdx.x; tile < p.B * p.H * schedule.q_tiles; tile += gridDim.x) write(schedule.work_of(p, tile));
        return;
    }
#endif
    Work work;
    for (int m = 0; schedule.get_work<false>(p, m, work); ++m) write(work);
#endif
}

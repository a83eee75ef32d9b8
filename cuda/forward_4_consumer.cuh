// The forward of `hopper`, fifth part: the consumers, groups of four warps that compute. First a group's two products; then, in consume(), the barriers
// at which it arrives or waits, and its loop over work items and their tiles of keys.
#pragma once

#include "forward_4_epilogue.cuh"
#include "forward_4_softmax.cuh"
#if SCORE
#include "forward_4_scores.cuh"
#endif

// A group skips tiles of keys that only rows of other groups see. With two groups there are hardly any; under a mask there are not enough registers.
constexpr bool SKIPS = CONSUMERS > 2 && !MASK && !INTERVAL && !BIASED;

// Whether O's product ends before P is rounded, so that P is rounded under the exponentials.
constexpr bool O_EARLY = SCORE || OPTIMISTIC;

// Issues S = Q Kᵀ for this consumer's 64 rows of Q.
__device__ inline void multiply_QK(float (&S_rmem)[BLOCK_K / 2], const Shared& shared, int consumer, const Slot_Q& slot_Q, const Slot_KV& slot) {
    // Uniform, because descriptors belong in uniform registers.
    const uint64_t Q_rows = ptx::descriptor(uniform(shared.Q + slot_Q.stage * Tile_Q::BYTES + consumer * 64 * ROW_BYTES));
    const uint64_t K_tile = ptx::descriptor(uniform(shared.K + slot.stage * Tile_K::BYTES));
    ptx::wgmma_fence();
#pragma unroll
    for (int d = 0; d < HEAD_DIM / 16; ++d)
        ptx::wgmma_ss<element, BLOCK_K>(S_rmem, ptx::advance(Q_rows, d / 4 * Tile_Q::PANEL_BYTES + d % 4 * 32),
                                        ptx::advance(K_tile, d / 4 * Tile_K::PANEL_BYTES + d % 4 * 32), MASK || d > 0);
    ptx::wgmma_commit_group();
}

// Issues O += P V. Each descriptor is built from its address: advancing one by an addition, as above, makes D 64 2 to 3 % slower.
__device__ inline void multiply_PV(float (&O_rmem)[V_HEAD_DIM / 2], const uint32_t (&P_rmem)[BLOCK_K / 16][4], const Shared& shared, const Slot_KV& slot) {
    const uint32_t V_tile = uniform(shared.V + slot.stage * Tile_V::BYTES);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < BLOCK_K / 16; ++k)
        ptx::wgmma_rs<element, V_HEAD_DIM>(O_rmem, P_rmem[k], ptx::descriptor(V_tile + k * 16 * ROW_BYTES, Tile_V::PANEL_BYTES));
    ptx::wgmma_commit_group();
}

// Consumer 0, 1, …: 64 rows of each tile of Q. TOLD: the producer says which tile of keys has arrived.
template <bool TOLD>
__device__ inline void consume(const AttentionParams& p, const Maps& maps, const Shared& shared, int consumer) {
    Barriers& barriers = shared.barriers;
    const int lane = threadIdx.x % 32;
    Rows rows(p, lane);
    const float scale_log2 = p.scale * LOG2_E;  // exp(scale · x) = 2^(scale_log2 · x)
    [[maybe_unused]] const float above = above_m(scale_log2, ABOVE_M + BELOW_M);

    float O_rmem[V_HEAD_DIM / 2];  // not yet divided by l
    float S_rmem[BLOCK_K / 2];
    uint32_t P_rmem[BLOCK_K / 16][4];
    float m_rmem[2], l_rmem[2], alpha[2];
#if !SCORE
    [[maybe_unused]] Seekers seekers;
#endif
    [[maybe_unused]] KeepBits<BLOCK_K> keep;
    int q = 0, n = 0;  // counters over all tiles of Q, of keys

    // ---- arrivals
    // One lane of every warp arrives at an "empty" barrier, once the warp's products that read the tile have finished.
    auto release = [&](uint64_t* empty, int stage) {
        if (lane == 0) ptx::mbarrier_arrive(barrier(empty, stage));
    };
    // At Q's every thread arrives, since every thread has read the work item.
    auto release_Q = [&](const Slot_Q& slot) { ptx::mbarrier_arrive(barrier(barriers.Q_empty, slot.stage)); };
    // Groups take turns issuing products, so that one computes exponentials while another's products run.
    auto my_turn = [&] { ptx::bar_sync(1 + consumer, 2 * GROUP); };
    auto your_turn = [&](int next) { ptx::bar_arrive(1 + next, 2 * GROUP); };

    // ---- waits
    // Waits for the next Q and returns its work item.
    auto take = [&] {
        const Slot_Q slot(q);
        ptx::mbarrier_wait(barrier(barriers.Q_full, slot.stage), slot.parity);
        const Work& work = shared.works[slot.stage];
#if INTERVAL
        return Work{uniform(work.i0),      uniform(work.h),          uniform(work.b),
                    uniform(work.k_tiles), uniform(work.first_tile), {uniform(work.all.start), uniform(work.all.stop)}};
#else
        return Work{uniform(work.i0), uniform(work.h), uniform(work.b), uniform(work.k_tiles)};
#endif
    };
    // First key of the work item's n-th tile; if TOLD, of the tile that arrived last.
    [[maybe_unused]] int j0_told = 0;
    auto j0_of = [&](const Work& work, int n) { return TOLD ? j0_told : work.j0(p, n); };
    // Waits for K and for the mask, with which the accumulators of S are initialised.
    auto await_K = [&](const Slot_KV& slot, [[maybe_unused]] const Work& work, [[maybe_unused]] int tile) {
        ptx::mbarrier_wait(barrier(barriers.K_full, slot.stage), slot.parity);
        if (TOLD) j0_told = uniform(shared.j0[slot.stage]);
#if MASK
        rows.start(S_rmem, shared.mask + slot.stage * MASK_BYTES, work, j0_of(work, tile));
#elif INTERVAL
        if (tile == 0) rows.read_spans(work);
#endif
    };
    auto await_V = [&](const Slot_KV& slot) { ptx::mbarrier_wait(barrier(barriers.V_full, slot.stage), slot.parity); };

    // ---- tiles of keys that none of the group's rows sees
    // How many are skipped. At least one is computed, so that all work items take the same path.
    auto skipped = [&](const Work& work) {
        return SKIPS ? max(0, min(work.k_tiles - 1, work.k_tiles - tiles_seen(p, work.i0 + consumer * 64, 64))) : 0;
    };
    auto skip = [&](int tiles) {
        for (const int end = n + tiles; n < end; ++n) {
            const Slot_KV slot(n);
            ptx::mbarrier_wait(barrier(barriers.K_full, slot.stage), slot.parity);
            __syncwarp();  // all lanes have passed the barrier before the stage may be refilled
            release(barriers.K_empty, slot.stage);
            my_turn();
            your_turn((consumer + 1) % CONSUMERS);
            await_V(slot);
            __syncwarp();
            release(barriers.V_empty, slot.stage);
        }
    };

    // ---- scores
#if SCORE
    [[maybe_unused]] float slope = 0;
    [[maybe_unused]] auto enter = [&](const Work& work) {
        if (SLOPED) slope = slope_of_head(p, work.b, work.h);
    };
#endif
#if SCORE & SCORE_BIAS
    // The warp's rows of the bias have one buffer: the next load is issued as soon as all lanes have read the previous one.
    const int warp = uniform(threadIdx.x / 32) - 4;
    const uint32_t bias_tile = shared.bias + warp * Tile_bias::BYTES, bias_full = barrier(barriers.bias_full, warp);
    const bool one_row = one_bias_row(p);
    const uint32_t bias_lane = bias_tile + Tile_bias::offset(one_row ? 0 : lane % 16, lane / 16);
    auto ask_bias = [&](const Work& work, int j0) {
        __syncwarp();
        if (lane > 0) return;
        constexpr int ROWS = BOX_ROWS<Tile_bias, RowOrder>;  // of a box
        ptx::mbarrier_arrive_expect_tx(bias_full, one_row ? Tile_bias::PANELS * ROW_BYTES : Tile_bias::BYTES);
#pragma unroll
        for (int panel = 0; panel < Tile_bias::PANELS; ++panel)
#pragma unroll
            for (int row = 0; row < 16; row += ROWS)
                if (row == 0 || !one_row)
                    ptx::cp_async_bulk_tensor_4d(bias_tile + panel * Tile_bias::PANEL_BYTES + row * ROW_BYTES, &maps.bias, j0 + panel * BIAS_PANEL,
                                                 one_row ? 0 : work.i0 + RowOrder::row(warp * 16 + row), work.h, work.b, bias_full);
    };
#endif

    // ---- the steps of the loop
    // Issues a work item's first S.
    auto multiply_first = [&] {
        my_turn();
        multiply_QK(S_rmem, shared, consumer, Slot_Q(q), Slot_KV(n));
        your_turn((consumer + 1) % CONSUMERS);
    };
    // Computes P from S. Calls await_O() on the way, then rescale_O(whether some alpha is not 1). first: whether the tile is its work item's first.
    auto exponentials = [&]([[maybe_unused]] auto first, const Work& work, int tile, const auto& await_O, const auto& rescale_O) {
        const int j0 = j0_of(work, tile);
#if SCORE
        auto round = [&] { round_P(P_rmem, S_rmem, keep); };
        if (softmax_of_capped(S_rmem, m_rmem, l_rmem, alpha, rows, work, j0, await_O, rescale_O, round)) return;
#if SCORE & SCORE_BIAS
        ptx::mbarrier_wait(bias_full, n & 1);
#else
        constexpr uint32_t bias_lane = 0;
#endif
        score_rows(S_rmem, rows, work, j0, slope, bias_lane, [&](const auto& exponents) {
#if SCORE & SCORE_BIAS
            if (tile + 1 < work.k_tiles) ask_bias(work, j0_of(work, tile + 1));
#endif
            scored_softmax<decltype(first)::value>(P_rmem, S_rmem, m_rmem, l_rmem, alpha, exponents, p, keep, lane, await_O, rescale_O);
        });
#else
        if (!MASK && rows.cut(work, j0)) rows.hide(S_rmem, work, j0);
        if constexpr (OPTIMISTIC) {
            optimistic_softmax<decltype(first)::value>(P_rmem, S_rmem, m_rmem, l_rmem, alpha, seekers, scale_log2, above, p, keep, lane, await_O, rescale_O);
        } else {
            softmax<LAZY>(S_rmem, m_rmem, l_rmem, alpha, scale_log2, above, await_O, rescale_O);
            round_P(P_rmem, S_rmem, keep);
        }
#endif
    };

    if (consumer == CONSUMERS - 1) your_turn(0);
    Work work = take();
    if (work.k_tiles > 0) {
        int tile = skipped(work);
        skip(tile);
#if SCORE
        enter(work);
#endif
#if SCORE & SCORE_BIAS
        ask_bias(work, j0_of(work, tile));
#endif
        await_K(Slot_KV(n), work, tile);
        multiply_first();
        while (true) {
            const Slot_Q slot_Q(q);
            // The first tile has no predecessor whose product could run under its softmax.
            draw(keep, p, work, j0_of(work, tile));
            ptx::wgmma_wait_group<0>();
#pragma unroll
            for (int i = 0; i < V_HEAD_DIM / 2; ++i) O_rmem[i] = 0;
            m_rmem[0] = m_rmem[1] = SCORE ? LOWEST_LOG2 : p.lowest, l_rmem[0] = l_rmem[1] = 0;
            release(barriers.K_empty, Slot_KV(n).stage);
            if (tile + 1 == work.k_tiles) release_Q(slot_Q);
            exponentials(std::true_type(), work, tile, [] {}, [](const auto&) {});
            ++tile, ++n;
            for (; tile < work.k_tiles; ++tile, ++n) {
                const Slot_KV now(n), before(n - 1);
                await_K(now, work, tile);
                my_turn();
                multiply_QK(S_rmem, shared, consumer, slot_Q, now);
                await_V(before);
                multiply_PV(O_rmem, P_rmem, shared, before);
                your_turn((consumer + 1) % CONSUMERS);
                draw(keep, p, work, j0_of(work, tile));
                ptx::wgmma_wait_group<1>();  // S is complete
                release(barriers.K_empty, now.stage);
                if (tile + 1 == work.k_tiles) release_Q(slot_Q);
                auto O_is_there = [&] {
                    ptx::wgmma_wait_group<0>();
                    release(barriers.V_empty, before.stage);
                };
                auto multiply_O = [&](const auto& raised) {
                    if (raised()) {
#pragma unroll
                        for (int i = 0; i < V_HEAD_DIM / 2; ++i) O_rmem[i] *= alpha[i >> 1 & 1];
                    }
                };
                auto await_O = [&] {
                    if (O_EARLY) O_is_there();
                };
                exponentials(std::false_type(), work, tile, await_O, [&](const auto& raised) {
                    if (O_EARLY) return multiply_O(raised);
                    // The compiler would move the wait for O before the exponentials that should overlap O's product, but does not move it across a
                    // branch. This condition always holds.
                    if (scale_log2 > 0) {
                        ptx::wgmma_wait_group<0>();
                        multiply_O(raised);
                    }
                    O_is_there();
                });
            }
            // The last product, then the first of the next work item, which runs while O is stored. If there is no next item, it multiplies stale data and
            // the result is ignored: the compiler does not keep a product in flight across a branch.
            ++q;
            const Slot_KV last(n - 1);
            Work next;
            if (AHEAD) {
                next = take();
                tile = skipped(next);
                if (tile == 0 && next.k_tiles > 0) await_K(Slot_KV(n), next, 0);
#if SCORE & SCORE_BIAS
                if (next.k_tiles > 0) ask_bias(next, j0_of(next, 0));
#endif
            }
            await_V(last);
            multiply_PV(O_rmem, P_rmem, shared, last);
            if (AHEAD) {
                if (tile > 0) {
                    ptx::wgmma_wait_group<0>();
                    release(barriers.V_empty, last.stage);
                    skip(tile);
                    await_K(Slot_KV(n), next, tile);
                }
                multiply_first();
            }
            ptx::wgmma_wait_group<AHEAD ? 1 : 0>();
            if (!AHEAD || tile == 0) release(barriers.V_empty, last.stage);
            write_O(p, maps.o, shared.O, work, rows, lane, scale_log2, O_rmem, m_rmem, l_rmem);

            if (!AHEAD) next = take();
            if (next.k_tiles == 0) break;
            if (!AHEAD) {
                tile = 0;
#if SCORE & SCORE_BIAS
                ask_bias(next, j0_of(next, 0));
#endif
                await_K(Slot_KV(n), next, 0);
                multiply_first();
            }
            work = next;
#if SCORE
            enter(work);
#endif
        }
        ptx::wgmma_wait_group<0>();
        if (lane == 0) ptx::cp_async_bulk_wait_group_read<0>();  // the block must not end while the copy engine reads its shared memory
    }
    if (consumer == 0) my_turn();  // matches the last group's last arrival, so that no barrier is left half full
}

// Which events happened before which: a vector clock for each thread (Lamport 1978; Mattern 1988; used here as in FastTrack, Flanagan and Freund 2009).
//
// Component n of a thread's clock is the last tick of n that the thread can know of: everything that n did up to then happened before. Threads are the
// first components. The others are asynchronous units: a thread knows what they did once it has waited for it.
//
//     a warpgroup's products     ticks are groups (wgmma.commit_group)
//     a warp's bulk stores       groups (cp.async.bulk.commit_group)
//     an mbarrier                phases; what the copy engine writes belongs to the phase that its bytes complete
//     a thread's cp.async        groups (cp.async.commit_group)
#pragma once

#include <stdint.h>
#include <string.h>

#include <vector>

namespace emulator {

constexpr int MBARRIERS = 64;  // that a block may have

struct Clocks {
    int threads = 0, length = 0;
    bool cp_async_used = false;
    std::vector<uint32_t> ticks;  // [threads, length]
    // [threads, tick]: the last tick before this one that ended with a fence.proxy.async, or 0
    std::vector<std::vector<uint32_t>> fences;
    // [threads, groups of cp.async]: the thread's tick when it had waited for the group
    std::vector<std::vector<uint32_t>> cp_async_waits;

    void reset(int of_threads) {
        threads = of_threads, cp_async_used = false;
        length = cp_async_of(threads);
        ticks.assign(static_cast<size_t>(threads) * length, 0);
        fences.assign(threads, std::vector<uint32_t>(2, 0));
        cp_async_waits.assign(threads, std::vector<uint32_t>(1, 0));
        for (int t = 0; t < threads; ++t) of(t)[t] = 1;
    }
    int products_of(int warpgroup) const { return threads + warpgroup; }
    int bulk_of(int warp) const { return threads + 8 + warp; }
    int mbarrier(int n) const { return threads + 8 + 32 + n; }
    bool is_mbarrier(int component) const { return component >= mbarrier(0) && component < mbarrier(MBARRIERS); }
    int cp_async_of(int thread) const { return threads + 8 + 32 + MBARRIERS + thread; }
    int components() const { return cp_async_used ? length : cp_async_of(0); }

    uint32_t* of(int thread) { return ticks.data() + static_cast<size_t>(thread) * length; }
    uint32_t now(int thread) { return of(thread)[thread]; }

    void join(uint32_t* to, const uint32_t* from) const {
        for (int n = components(), c = 0; c < n; ++c) to[c] = to[c] > from[c] ? to[c] : from[c];
    }
    // What this thread does from here on is not part of what it has published so far.
    void tick(int thread, bool fence = false) {
        const uint32_t before = of(thread)[thread]++;
        fences[thread].push_back(fence ? before : fences[thread].back());
    }
    // Whether a write of this thread at tick `written` was followed by a fence.proxy.async that a clock with the value `seen` knows of.
    bool fenced(int thread, uint32_t written, uint32_t seen) const { return fences[thread][seen] >= written; }
    // The same for what this thread's cp.async wrote: the fence must come after the wait for its group.
    bool cp_async_fenced(int thread, uint32_t group, uint32_t seen) const {
        return group < cp_async_waits[thread].size() && fences[thread][seen] >= cp_async_waits[thread][group];
    }
};

}  // namespace emulator

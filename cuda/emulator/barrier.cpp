// Named barriers (PTX ISA 9.7.13.1: bar.sync, bar.arrive); __syncthreads is number 0. Also the report of a block that hangs, and the checks when one ends.
#include "launch.h"

namespace emulator {

// All expected threads have arrived: what each did before is visible to those that waited.
static void complete(Block& block, NamedBarrier& barrier) {
    Clocks& clocks = block.clocks;
    if (block.timing) block.timing->turn_is_over(&barrier - block.barriers, barrier.waiting);
    for (int t : barrier.waiting) {
        clocks.join(clocks.of(t), barrier.clock.data()), clocks.tick(t);
        if (t != block.running) block.awake(t);
    }
    barrier = {.any_before = barrier.any};
}

static bool arrive(int id, int threads, bool waits, void* site) {
    Block& block = *current;
    if (id < 0 || id > 15) fail("thread %d: barrier %d; there are 0 to 15: @%x", block.running, id, site_offset(site));
    if (threads % 32 && threads != block.grid.threads) fail("thread %d: barrier %d for %d threads, not a multiple of 32: @%x", block.running, id, threads, site_offset(site));
    if (block.timing) block.timing->comes_to_barrier(id, site);
    NamedBarrier& barrier = block.barriers[id];
    if (barrier.arrived == 0) barrier.expected = threads, barrier.clock.assign(block.clocks.length, 0);
    if (barrier.expected != threads) fail("thread %d comes to barrier %d for %d threads, others for %d: @%x", block.running, id, threads, barrier.expected, site_offset(site));
    block.clocks.join(barrier.clock.data(), block.clock());
    if (waits) barrier.waiting.push_back(block.running);
    else block.clocks.tick(block.running);
    ++barrier.arrived;
    const int ended = id == 0 && threads == block.grid.threads ? block.threads_done : 0;  // __syncthreads waits for the threads that have not ended
    if (barrier.arrived + ended < barrier.expected) return false;
    complete(block, barrier);
    return true;
}

static void sync(int id, int threads, void* site) {
    count_wait(site);
    if (!arrive(id, threads, true, site)) current->wait(Wait::barrier, id == 0 ? "__syncthreads" : "bar.sync", site, id);
}
void barrier_sync(int id, int threads) { sync(id, threads, SITE); }
bool barrier_or(int id, int threads, bool x) {
    current->barriers[id].any |= x;
    sync(id, threads, SITE);
    return current->barriers[id].any_before;
}
void barrier_arrive(int id, int threads) {
    arrive(id, threads, false, SITE);
    current->maybe_let_others_run();
}

void barrier_without_those_that_ended(Block& block) {
    NamedBarrier& barrier = block.barriers[0];
    if (barrier.arrived && barrier.expected == block.grid.threads && barrier.arrived + block.threads_done == barrier.expected) complete(block, barrier);
}

// ---- reports

std::string list_threads(const std::vector<int>& threads) {
    std::string list;
    for (size_t n = 0; n < threads.size();) {
        size_t end = n + 1;
        while (end < threads.size() && threads[end] == threads[end - 1] + 1) ++end;
        list += text(end - n > 1 ? "%s%d–%d" : "%s%d", list.empty() ? "" : ", ", threads[n], threads[end - 1]);
        n = end;
    }
    return list;
}

std::string who_is(int who, uint32_t when) {
    const Clocks& clocks = current->clocks;
    if (who < clocks.threads) return text("thread %d", who);
    if (who < clocks.bulk_of(0)) return text("a product of warpgroup %d (group %u)", who - clocks.products_of(0), when);
    if (who < clocks.mbarrier(0)) return text("a bulk store of warp %d (group %u)", who - clocks.bulk_of(0), when);
    if (who < clocks.cp_async_of(0)) {
        const MBarrier& barrier = current->mbarriers[who - clocks.mbarrier(0)];
        return text("the copy engine, for phase %u of the mbarrier at shared byte %u,", when - 1, barrier.offset);
    }
    return text("cp.async of thread %d (group %u)", who - clocks.cp_async_of(0), when);
}

static std::string what_it_waits_for(const Block& block, const Thread& t) {
    switch (t.wait) {
        case Wait::warp: return text("for the other lanes of its warp in %s", t.what);
        case Wait::barrier: {
            const NamedBarrier& barrier = block.barriers[t.barrier];
            return text("in %s for barrier %d, to which %d of %d threads have come", t.what, t.barrier, barrier.arrived, barrier.expected);
        }
        case Wait::mbarrier: {
            const MBarrier& barrier = block.mbarriers[t.barrier];
            return text("for phase %lld of the mbarrier at shared byte %u, which is in phase %u, where %d of %d arrivals and %lld bytes are missing", (long long)t.value,
                        barrier.offset, barrier.phase, barrier.missing, barrier.arrivals, (long long)barrier.bytes);
        }
        case Wait::registers: return text("for %lld registers, of which the block has %d left", (long long)t.value, block.free_registers);
        case Wait::memory: return text("for a number in global memory to be other than %lld", (long long)t.value);
        default: return "";
    }
}

void report_deadlock(Block& block) {
    std::vector<std::pair<std::string, std::vector<int>>> reasons;
    for (const Thread& t : block.threads) {
        if (t.wait == Wait::nothing) continue;
        const std::string reason = what_it_waits_for(block, t) + text(", at @%x", site_offset(t.site));
        size_t n = 0;
        while (n < reasons.size() && reasons[n].first != reason) ++n;
        if (n == reasons.size()) reasons.push_back({reason, {}});
        reasons[n].second.push_back(t.id);
    }
    std::string message = "the block hangs:";
    for (const auto& [reason, threads] : reasons) message += text("\n  thread%s %s wait%s ", threads.size() > 1 ? "s" : "", list_threads(threads).c_str(), threads.size() > 1 ? "" : "s") + reason;
    fail("%s", message.c_str());
}

// Nothing may be left unfinished.
void block_ends(Block& block) {
    for (Warp& warp : block.warps) warp.gathered.flush(session.counters);
    for (int id = 0; id < 16; ++id)
        if (const NamedBarrier& barrier = block.barriers[id]; barrier.arrived)
            fail("the block ended with barrier %d half full: %d of %d threads have come", id, barrier.arrived, barrier.expected);
    for (const Thread& t : block.threads)
        if (t.copies.under_way()) fail("thread %d ended without waiting for its cp.async", t.id);
    for (const MBarrier& barrier : block.mbarriers)
        if (barrier.bytes) fail("the block ended with %lld bytes under way for the mbarrier at shared byte %u", (long long)barrier.bytes, barrier.offset);
    for (const Thread& t : block.threads)
        if (!t.busy.empty()) fail("thread %d ended without waiting for its products", t.id);
    for (const Warp& warp : block.warps)
        if (!warp.bulk.under_way.empty()) fail("warp %d ended without waiting for its bulk stores to have read shared memory", warp.first / 32);
}

}  // namespace emulator

// mbarrier (PTX ISA 9.7.13.15): a phase completes once all arrivals and all announced bytes have come. What arriving threads did before is then visible to
// threads that wait for it.
#include "block.h"
#include "model.h"

namespace emulator {

int mbarrier_at(uint32_t address, const char* what, void* site) {
    Block& block = *current;
    const uint32_t offset = block.shared.offset(block.shared.at(address, 8, 8, what, site));
    for (size_t n = 0; n < block.mbarriers.size(); ++n) {
        const MBarrier& barrier = block.mbarriers[n];
        if (barrier.offset != offset) continue;
        if (block.clock()[barrier.initialised_by] < barrier.initialised_at)
            fail("thread %d uses the mbarrier at shared byte %u, and nothing orders that after its initialisation: @%x", block.running, offset, site_offset(site));
        return n;
    }
    fail("thread %d: %s at shared byte %u, where no mbarrier is: @%x", block.running, what, offset, site_offset(site));
}

void mbarrier_init(uint32_t address, int arrivals) {
    Block& block = *current;
    const uint32_t offset = block.shared.offset(block.shared.at(address, 8, 8, "mbarrier.init", SITE));
    if (arrivals < 1 || arrivals >= 1 << 20) fail("thread %d: an mbarrier of %d arrivals: @%x", block.running, arrivals, site_offset(SITE));
    for (const MBarrier& other : block.mbarriers)
        if (other.offset == offset) fail("thread %d initialises the mbarrier at shared byte %u again: @%x", block.running, offset, site_offset(SITE));
    if (block.mbarriers.size() == MBARRIERS) fail("more than %d mbarriers: @%x", MBARRIERS, site_offset(SITE));
    block.shared.reserve(offset, true);
    const std::vector<uint32_t> nothing(block.clocks.length, 0);
    block.mbarriers.push_back({offset, arrivals, arrivals, 0, 0, block.running, block.clocks.now(block.running), false, nothing, nothing, {}});
}

void mbarrier_init_fence() {
    for (MBarrier& barrier : current->mbarriers)
        if (barrier.initialised_by == current->running) barrier.visible_to_engine = true;
}

static void perhaps_over(int n) {
    Block& block = *current;
    MBarrier& barrier = block.mbarriers[n];
    if (barrier.missing || barrier.bytes) return;
    ++barrier.phase, barrier.missing = barrier.arrivals;
    block.clocks.join(barrier.over.data(), barrier.coming.data());
    barrier.over[block.clocks.mbarrier(n)] = barrier.phase;
    std::fill(barrier.coming.begin(), barrier.coming.end(), 0);
    if (block.timing) block.timing->phase_is_over(n, barrier.waiting);
    for (int t : barrier.waiting) block.awake(t);
    barrier.waiting.clear();
}

void mbarrier_arrive(uint32_t address, int expected_bytes) {
    Block& block = *current;
    const int n = mbarrier_at(address, "mbarrier.arrive", SITE);
    if (block.timing) block.timing->comes_to_phase(n, SITE);
    MBarrier& barrier = block.mbarriers[n];
    if (barrier.missing == 0)
        fail("thread %d arrives at the mbarrier at shared byte %u, where all %d arrivals of phase %u have come and %lld bytes are missing: @%x", block.running, barrier.offset,
             barrier.arrivals, barrier.phase, (long long)barrier.bytes, site_offset(SITE));
    barrier.bytes += expected_bytes, --barrier.missing;
    if (Thread& t = block.self(); t.loads) {
        t.early.push_back({t.loads, block.clocks.now(t.id)});
        if (t.early.size() > 16) t.early.pop_front();
    }
    block.clocks.join(barrier.coming.data(), block.clock());
    block.clocks.tick(block.running);
    perhaps_over(n);
    block.maybe_let_others_run();
}

void mbarrier_bytes_came(int n, int bytes, double at) {
    if (current->timing) current->timing->comes_to_phase(n, at);
    current->mbarriers[n].bytes -= bytes;
    perhaps_over(n);
}

void mbarrier_wait(uint32_t address, int parity) {
    Block& block = *current;
    const int n = mbarrier_at(address, "mbarrier.try_wait", SITE), me = block.running;
    if (parity != 0 && parity != 1) fail("thread %d waits for the parity %d: @%x", me, parity, site_offset(SITE));
    count_wait(SITE);
    block.maybe_let_others_run();
    if (block.timing) block.timing->meet(SITE);
    while (static_cast<int>(block.mbarriers[n].phase & 1) == parity) {  // the current phase, not the one before
        block.mbarriers[n].waiting.push_back(me);
        block.wait(Wait::mbarrier, "mbarrier.try_wait", SITE, n, block.mbarriers[n].phase);
    }
    block.clocks.join(block.clock(), block.mbarriers[n].over.data());
    if (block.timing) block.timing->spend(0, model::SYNC);
}

}  // namespace emulator

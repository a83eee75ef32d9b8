// cp.async (PTX ISA 9.7.9.25.3): a thread's own copies from global to shared memory, which may take effect at any time until it waits for their group.
#include "block.h"
#include "model.h"

namespace emulator {

static void take_effect(const CopyGroups::Copy& copy) {
    memcpy(copy.to, copy.from, copy.first), memset(copy.to + copy.first, 0, copy.bytes - copy.first);
}

void cp_async(uint32_t address, const void* source, int bytes, int first) {
    Block& block = *current;
    if (first < 0 || first > bytes) fail("thread %d: cp.async of %d bytes, the first %d from memory: @%x", block.running, bytes, first, site_offset(SITE));
    uint8_t* to = block.shared.at(address, bytes, bytes, "cp.async", SITE);
    if (first > 0) {
        if (reinterpret_cast<uintptr_t>(source) % bytes)
            fail("thread %d: cp.async of %d bytes from an address that is not a multiple of %d: @%x", block.running, bytes, bytes, site_offset(SITE));
        check_global(source, first, false, SITE);
        count(CP_ASYNC, first);
    }
    block.clocks.cp_async_used = true;
    CopyGroups& copies = block.self().copies;
    // Until this thread has waited for the group, no thread may read these bytes; and all their previous readers must be known to have finished.
    block.shared.access(block.shared.offset(to), bytes,
                        {.who = block.clocks.cp_async_of(block.running), .when = copies.groups + 1, .seen = block.clock(), .site = SITE, .write = true});
    if (Timing* timing = block.timing.get()) {
        const int warp = block.running / 32;
        const uint32_t group = copies.groups + 1;
        timing->spend(1), timing->tile(block.shared.offset(to), bytes, first > 0 ? source : nullptr);
        if (first > 0) of_group(timing->warps[warp].copies, group) = timing->copy(COPIES_IN, timing->now() + model::L2_LATENCY, source, first, {COPY_GROUP, warp, group}, SITE);
    }
    CopyGroups::Copy copy{to, static_cast<const uint8_t*>(source), bytes, first};
    if (block.random.below(2)) take_effect(copy), copy.bytes = copy.first = 0;
    copies.open.push_back(copy);
}

void cp_async_commit() {
    CopyGroups& copies = current->self().copies;
    copies.committed.push_back(std::move(copies.open)), copies.open.clear();
    ++copies.groups;
}

void cp_async_wait(int groups) {
    Block& block = *current;
    count_wait(SITE);
    CopyGroups& copies = block.self().copies;
    while (static_cast<int>(copies.committed.size()) > groups) {
        for (const auto& copy : copies.committed.front()) take_effect(copy);
        copies.committed.pop_front();
    }
    const uint32_t over = copies.groups - copies.committed.size();
    block.clock()[block.clocks.cp_async_of(block.running)] = over;
    if (Timing* timing = block.timing.get()) {
        timing->meet(SITE);
        timing->wait(block.running, of_group(timing->warps[block.running / 32].copies, over), {COPY_GROUP, block.running / 32, over}, SITE);
    }
    auto& waits = block.clocks.cp_async_waits[block.running];
    if (waits.size() <= over) waits.resize(over + 1, block.clocks.now(block.running));
}

}  // namespace emulator

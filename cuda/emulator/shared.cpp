#include "shared.h"

#include "block.h"

namespace emulator {

void Shared::begin(uint8_t* at, uint32_t all, uint32_t dynamic_from, uint32_t dynamic_bytes, uint32_t limit) {
    window = at, bytes = all, dynamic_at = dynamic_from, dynamic_end = dynamic_from + dynamic_bytes, dynamic_limit = limit;
    // Memory that no thread has written reads as NaN in every type.
    memset(window, 0xff, dynamic_end), memset(window + dynamic_limit, 0xff, bytes - dynamic_limit);
    granules.assign((bytes + 3) / 4, Granule{0, {0, 0}, 0, {0, 0}, NOBODY, {NOBODY, NOBODY}, 0, {0, 0}, 0, false});
}

void Shared::keep() {
    kept.resize(bytes);
    memcpy(kept.data(), window, dynamic_end), memcpy(kept.data() + dynamic_limit, window + dynamic_limit, bytes - dynamic_limit);
}

void Shared::restore() const {
    memcpy(window, kept.data(), dynamic_end), memcpy(window + dynamic_limit, kept.data() + dynamic_limit, bytes - dynamic_limit);
}

uint8_t* Shared::at(uint32_t address, int count, int alignment, const char* what, void* site) const {
    if (address % alignment) fail("%s at the shared address %u, which is not a multiple of %d: @%x", what, address, alignment, site_offset(site));
    if (address < FIRST_SHARED_ADDRESS || address + count > FIRST_SHARED_ADDRESS + bytes) fail("%s at the shared address %u, outside of the block's %u bytes: @%x", what, address, bytes, site_offset(site));
    return pointer(address);
}

void Shared::access(uint32_t offset, int count, const Access& by) {
    const uint32_t end = offset + count;
    if (end > bytes || (end > dynamic_end && offset < dynamic_limit))
        fail("%s %s byte %u of dynamic shared memory, of which the launch asked for %u: @%x", who_is(by.who, by.when).c_str(), by.write ? "writes" : "reads",
             end - 1 - dynamic_at, dynamic_end - dynamic_at, site_offset(by.site));
    for (uint32_t at = offset & ~3u; at < end; at += 4) {
        const uint32_t from = at < offset ? offset - at : 0, to = end - at < 4 ? end - at : 4;
        access(granules[at / 4], (1u << to) - (1u << from), at, by);
    }
}

void Shared::access(Granule& g, uint32_t mask, uint32_t offset, const Access& by) {
    // The same thread reads again, with no other access in between.
    if (!by.write && g.reader[0] == by.who && g.read_tick[0] == by.when && (g.read_bytes[0] & mask) == mask) return;
    if (g.reserved) fail("%s accesses an mbarrier, at shared byte %u, as if it were data: @%x", who_is(by.who, by.when).c_str(), offset, site_offset(by.site));
    if (g.writer != NOBODY && g.write_bytes & mask && by.seen[g.writer] < g.write_tick) report(g, -1, offset, by);
    if (by.write) {
        for (int n = 0; n < 2; ++n) {
            if (g.reader[n] == NOBODY || !(g.read_bytes[n] & mask)) continue;
            if (by.seen[g.reader[n]] < g.read_tick[n]) report(g, n, offset, by);
            // A thread waits for a load only where it uses the value: an arrival at a barrier does not wait for loads.
            if (!by.async || g.reader[n] >= current->clocks.threads) continue;
            for (const auto& [first, last] : current->threads[g.reader[n]].early)
                if (first <= g.read_tick[n] && g.read_tick[n] <= last && by.seen[g.reader[n]] == last)
                    fail("%s writes shared byte %u, at @%x, which thread %d reads at @%x: it has arrived since, but did nothing before that waits for the values", who_is(by.who, by.when).c_str(),
                         offset, site_offset(by.site), g.reader[n], g.read_site[n]);
        }
        g.writer = by.who, g.write_tick = by.when, g.write_site = site_offset(by.site), g.write_bytes = mask, g.written |= mask;
        g.reader[0] = g.reader[1] = NOBODY;
        return;
    }
    if ((g.written & mask) != mask && !by.may_be_garbage)
        fail("%s reads shared byte %u, which no thread has written: @%x", who_is(by.who, by.when).c_str(), offset, site_offset(by.site));
    Block& block = *current;
    if (by.async && g.writer < block.clocks.threads && !block.clocks.fenced(g.writer, g.write_tick, by.seen[g.writer]))
        fail("%s reads shared byte %u, at @%x, which thread %d wrote at @%x with no fence.proxy.async since: the engine may not see it", who_is(by.who, by.when).c_str(), offset,
             site_offset(by.site), g.writer, g.write_site);
    if (const int thread = g.writer - block.clocks.cp_async_of(0); by.async && g.writer != NOBODY && thread >= 0 && !block.clocks.cp_async_fenced(thread, g.write_tick, by.seen[thread]))
        fail("%s reads shared byte %u, at @%x, which cp.async of thread %d wrote at @%x with no fence.proxy.async between its wait and this: the engine may not see it",
             who_is(by.who, by.when).c_str(), offset, site_offset(by.site), thread, g.write_site);
    if (!by.async && g.writer != NOBODY && block.clocks.is_mbarrier(g.writer) && !block.threads[by.who].loads) block.threads[by.who].loads = by.when;
    // Only two readers are remembered. This one replaces a reader whose read is ordered before it, otherwise one chosen at random.
    int n = 0;
    if (g.reader[0] != NOBODY && g.reader[0] != by.who && by.seen[g.reader[0]] < g.read_tick[0]) {
        n = 1;
        if (g.reader[1] != NOBODY && g.reader[1] != by.who && by.seen[g.reader[1]] < g.read_tick[1]) n = block.random.below(2);
    }
    g.reader[n] = by.who, g.read_tick[n] = by.when, g.read_site[n] = site_offset(by.site), g.read_bytes[n] = mask;
}

void Shared::reserve(uint32_t offset, bool reserved) {
    for (int n = 0; n < 2; ++n) granules[offset / 4 + n].reserved = reserved;
}

void Shared::report(const Granule& g, int reader, uint32_t offset, const Access& by) const {
    const int other = reader < 0 ? g.writer : g.reader[reader];
    const uint32_t when = reader < 0 ? g.write_tick : g.read_tick[reader], site = reader < 0 ? g.write_site : g.read_site[reader];
    fail("nothing orders two accesses to shared byte %u: %s %s it, at @%x, and %s %s it, at @%x", offset, who_is(other, when).c_str(), reader < 0 ? "writes" : "reads", site,
         who_is(by.who, by.when).c_str(), by.write ? "writes" : "reads", site_offset(by.site));
}

}  // namespace emulator

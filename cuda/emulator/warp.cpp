#include "warp.h"

#include "block.h"
#include "model.h"

namespace emulator {

static std::string lanes_text(const Warp& warp, uint32_t lanes) {
    std::vector<int> threads;
    for (int lane = 0; lane < 32; ++lane)
        if (lanes >> lane & 1) threads.push_back(warp.first + lane);
    return list_threads(threads);
}

void meet(uint32_t mask, const char* what, void* site, void* arguments, void (*execute)(Block&, Warp&, uint32_t)) {
    Block& block = *current;
    Warp& warp = block.warp();
    const int lane = block.lane();
    mask &= warp.lanes;
    if (!(mask >> lane & 1)) fail("thread %d takes part in %s, but is not in its mask %08x: @%x", block.running, what, mask, site_offset(site));
    if (mask & warp.exited) fail("thread %d waits in %s for threads %s, which have ended: @%x", block.running, what, lanes_text(warp, mask & warp.exited).c_str(), site_offset(site));
    warp.at[lane] = {mask, what, site, arguments};
    uint32_t there = 0;
    for (int other = 0; other < 32; ++other) {
        const auto& at = warp.at[other];
        if (at.mask == mask && at.what == what) there |= 1u << other;
        else if (at.mask >> lane & 1 && mask >> other & 1)  // each waits for the other
            fail("the lanes of a warp do different things: threads %s wait in %s at @%x, thread %d in %s at @%x", lanes_text(warp, there).c_str(), what, site_offset(site),
                 warp.first + other, at.what, site_offset(at.site));
    }
    if (there != mask) return block.wait(Wait::warp, what, site);
    if (block.timing) block.timing->meet(warp.first, 32, mask, site);
    execute(block, warp, mask);
    for (int other = 0; other < 32; ++other)
        if (mask >> other & 1) {
            warp.at[other].mask = 0;
            if (other != lane) block.awake(warp.first + other);
        }
}

// ---- __syncwarp (PTX ISA 9.7.13.2: bar.warp.sync): the only one of these that orders memory accesses

void warp_sync(uint32_t mask) {
    meet(mask, "__syncwarp", SITE, nullptr, [](Block& block, Warp& warp, uint32_t mask) {
        Clocks& clocks = block.clocks;
        static thread_local std::vector<uint32_t> all;
        all.assign(clocks.length, 0);
        for (int lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1) clocks.join(all.data(), clocks.of(warp.first + lane));
        for (int lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1) clocks.join(clocks.of(warp.first + lane), all.data()), clocks.tick(warp.first + lane);
    });
}

// ---- shfl.sync and vote.sync (9.7.9.6, 9.7.13.4)

struct Shuffle {
    uint32_t x;
    int source;
    uint32_t result;
};

uint32_t shuffle(uint32_t mask, uint32_t x, int source) {
    Shuffle mine{x, source, 0};
    current->loads_have_come();
    if (!(mask >> source & 1)) fail("thread %d shuffles from lane %d, which is not in the mask %08x: @%x", current->running, source, mask, site_offset(SITE));
    meet(mask, "__shfl_sync", SITE, &mine, [](Block&, Warp& warp, uint32_t mask) {
        for (int lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1) arguments_of<Shuffle>(warp, lane).result = arguments_of<Shuffle>(warp, arguments_of<Shuffle>(warp, lane).source).x;
    });
    if (Timing* timing = current->timing.get()) timing->spend(1, model::SHUFFLE);
    return mine.result;
}

struct Vote {
    bool x;
    uint32_t result;
};

uint32_t ballot(uint32_t mask, bool x) {
    Vote mine{x, 0};
    meet(mask, "a vote", SITE, &mine, [](Block&, Warp& warp, uint32_t mask) {
        uint32_t votes = 0;
        for (int lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1) votes |= uint32_t(arguments_of<Vote>(warp, lane).x) << lane;
        for (int lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1) arguments_of<Vote>(warp, lane).result = votes;
    });
    if (Timing* timing = current->timing.get()) timing->spend(1, model::SHUFFLE);
    return mine.result;
}

}  // namespace emulator

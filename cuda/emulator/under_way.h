// What has been asked for and takes effect later: copies of the copy engine, cp.async, products. Each at a time that is drawn, between the instruction that
// asks for it and the one that waits for it.
#pragma once

#include <stdint.h>

#include <deque>
#include <functional>
#include <vector>

namespace emulator {

struct UnderWay {
    std::vector<std::function<void()>> effects;  // in any order
    bool empty() const { return effects.empty(); }
    // One of them, whichever is drawn, takes effect.
    void one(uint32_t drawn) {
        const size_t n = drawn % effects.size();
        auto effect = std::move(effects[n]);
        effects[n] = std::move(effects.back()), effects.pop_back();
        effect();
    }
};

// A thread's cp.async and bulk stores: groups in order, of which the last is still open.
struct CopyGroups {
    struct Copy {
        uint8_t* to;
        const uint8_t* from;
        int bytes, first;
    };
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> committed;
    uint32_t groups = 0;       // committed so far
    uint32_t bulk_groups = 0;  // of bulk stores
    bool bulk_open = false;
};

}  // namespace emulator

// Copies and products in flight. Each takes effect at a random time between the instruction that issues it and the one that waits for it.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <deque>
#include <functional>
#include <vector>

namespace emulator {

// The copy engine's operations take effect in any order.
struct UnderWay {
    struct Effect {
        std::function<void()> take;
        double at;  // in the model's time, if the launch is traced
    };
    std::vector<Effect> effects;
    bool empty() const { return effects.empty(); }
    void add(std::function<void()> take, double at) { effects.push_back({std::move(take), at}); }
    // One of them, chosen at random, takes effect.
    void one(uint32_t drawn) {
        const size_t n = drawn % effects.size();
        auto take = std::move(effects[n].take);
        effects[n] = std::move(effects.back()), effects.pop_back();
        take();
    }
    size_t earliest() const {
        return std::min_element(effects.begin(), effects.end(), [](const Effect& a, const Effect& b) { return a.at < b.at; }) - effects.begin();
    }
};

// A thread's cp.async: groups in order; the last one is not committed yet.
struct CopyGroups {
    struct Copy {
        uint8_t* to;
        const uint8_t* from;
        int bytes, first;
    };
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> committed;
    uint32_t groups = 0;  // committed so far

    bool under_way() const {
        bool any = !open.empty();
        for (const auto& group : committed) any |= !group.empty();
        return any;
    }
};

// The bulk stores of a warp, issued and waited for by one of its lanes.
struct BulkGroups {
    struct Store {
        uint32_t group;
        std::function<void()> store;
    };
    std::deque<Store> under_way;  // in order; those that no thread has waited for
    uint32_t committed = 0;
};

// Registers of a thread that a product in flight reads or writes.
struct BusyRegisters {
    uintptr_t first, last;
    bool written;
    uint32_t group;
};

// When a thread last touched each 4 bytes of its stack, counted in its wgmma.fences. A product may not use what the thread has touched since the last one.
struct Touched {
    uint8_t fences = 0;          // 0: none yet
    std::vector<uint8_t> when;   // by place in the stack

    void fence(size_t stack_bytes) {
        if (++fences == 0 || when.empty()) when.assign(stack_bytes / 4, 0), fences = 1;
    }
    void touch(size_t at, unsigned bytes) {
        for (size_t n = at / 4; fences && n < (at + bytes + 3) / 4; ++n) when[n] = fences;
    }
    bool since_fence(size_t at, size_t bytes) const {
        for (size_t n = at / 4; n < (at + bytes + 3) / 4; ++n)
            if (when[n] == fences) return true;
        return false;
    }
};

// The products of a warpgroup, in order.
struct Warpgroup {
    struct Product {
        uint32_t group;
        std::function<void()> execute;
    };
    std::deque<Product> waiting;  // for their time
    uint32_t groups = 0;          // committed so far
    // Where its threads meet: how many have arrived, and for which instruction.
    int there = 0;
    const char* what = nullptr;
    void* site = nullptr;
    void* arguments[128];
};

}  // namespace emulator

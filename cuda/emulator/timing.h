// The model's clock: when each thread of a block does what, if the launch is traced. Each thread has its own time. What it does between two points where it
// meets other threads is a segment, whose cost is the sum of the instructions seen in it; after a wait, it resumes when what it waited for is done. The
// block runs the thread whose time is least, so that requests reach the engines in the order of their times, whatever the seed.
#pragma once

#include <stdint.h>

#include <deque>
#include <vector>

#include "trace.h"

namespace emulator {

struct Block;

struct Segment {
    int exponentials = 0;
    double issue = 0, own = 0;  // cycles: of the sub-partition, which no other warp can use meanwhile; and further ones, of this warp alone
    bool operator==(const Segment&) const = default;
};

struct Timing {
    struct Lane {
        double now = 0;            // where its segment begins
        double products = 0;       // when its mma.sync are over: before its next arithmetic
        double loads = 0;          // when what it has loaded is there: at the segment's end
        Segment segment;
        int loaded = 0;            // from which tensor it last read
    };
    struct WarpTime {
        struct Done {
            Segment segment;
            double begin = 0, end = 0;
            uint32_t lanes = ~0u;
        } done[4];  // the last segments: lanes that do the same at about the same time are taken to do it together
        int next = 0, event = -1, arrival = -1, operand = 0;
        std::vector<double> copies;  // when the cp.async of each group of its lanes are over
        std::vector<double> stores;  // when each group of its bulk stores has read shared memory
    };
    struct Group {
        std::vector<double> over;  // when each group of products is
        std::deque<double> queue;  // ends of the last few products
    };
    struct Phase {
        double coming = 0, over = 0;
        uint32_t turn = 0;
    };

    Block& block;
    Trace& trace;
    double limit = 0;    // when another resident block can run
    double horizon = 0;  // at most the time of any thread outside the warp that ran last
    std::vector<Lane> lanes;
    std::vector<WarpTime> warps;
    std::vector<Group> groups;
    std::vector<Phase> mbarriers;
    Phase barriers[16];
    std::vector<uint8_t> tiles;  // from which tensor came each 16 bytes of shared memory: 1 + an index into the session's memories

    Timing(Block&, Trace&, double begin);
    Lane& lane();
    double& now() { return lane().now; }
    int number() const;  // of the block
    double end() const;  // of the last thread

    // ---- the calling thread
    void exponential() { ++lane().segment.exponentials; }
    void spend(double issue, double own = 0) { lane().segment.issue += issue, lane().segment.own += own; }
    void shared(uint32_t offset, int bytes, bool write);
    void global(const void*, int bytes, bool write, void* site);
    // Its segment ends here, and it resumes when no other thread has an earlier time.
    void meet(void* site);

    // ---- called by the last thread of a warp or warpgroup to arrive: the segments of all end here, and they get the same time
    double meet(int first, int count, uint32_t mask, void* site);
    double go_on(int first, int count, double at);  // at this time at the earliest

    // ---- waits and what ends them
    void wait(int thread, double until, const About& about, void* site);
    void arrive(const About& about, void* site);
    void comes_to_barrier(int id, void* site);
    void turn_is_over(int id, const std::vector<int>& waiting);
    void comes_to_phase(int mbarrier, void* site);
    void comes_to_phase(int mbarrier, double at) { mbarriers[mbarrier].coming = std::max(mbarriers[mbarrier].coming, at); }
    void phase_is_over(int mbarrier, const std::vector<int>& waiting);
    double copy(int actor, double from, const void* source, int bytes, const About& about, void* site);
    void tile(uint32_t offset, int bytes, const void* source);
    void product(int warpgroup, int n, int tile_a, int tile_b, double at, void* site);
    void mma(int warp, double at, void* site);
    void rows(int warp, const uint32_t (&addresses)[32], bool write, double at, void* site);
    void warp_event(int warp, const char* kind, double from, double to, double amount, const About& about, void* site);
    int tile_at(uint32_t offset) const { return offset / 16 < tiles.size() ? tiles[offset / 16] : 0; }

private:
    void close(int thread, void* site);
    friend void end_of_thread(Block&);
};

// The n-th of groups that complete in order: by default as the ones before, unless something is added to it.
inline double& of_group(std::vector<double>& over, uint32_t n) {
    if (over.size() <= n) over.resize(n + 1, over.empty() ? 0 : over.back());
    return over[n];
}

}  // namespace emulator

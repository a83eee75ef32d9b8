#include "timing.h"

#include "launch.h"
#include "model.h"

namespace emulator {

Timing::Timing(Block& block, Trace& trace, double begin) : block(block), trace(trace) {
    const int threads = block.grid.threads;
    lanes.resize(threads), warps.resize((threads + 31) / 32), groups.resize((threads + 127) / 128), mbarriers.resize(MBARRIERS);
    tiles.assign((block.shared.bytes + 15) / 16, 0);
    for (Lane& each : lanes) each.now = begin;
}

Timing::Lane& Timing::lane() { return lanes[block.running]; }

int Timing::number() const { return block.index.x + block.grid.blocks.x * (block.index.y + block.grid.blocks.y * block.index.z); }

double Timing::end() const {
    return std::max_element(lanes.begin(), lanes.end(), [](const Lane& a, const Lane& b) { return a.now < b.now; })->now;
}

// ---- segments

// A warp's events do not overlap: if lanes do different things at the same time, the first to be recorded is shown.
void Timing::warp_event(int warp, const char* kind, double from, double to, double amount, const About& about, void* site) {
    WarpTime& of = warps[warp];
    if (of.event >= 0) {
        Event& before = trace.events[of.event];
        from = std::max(from, before.to);
        if (from >= to) return;
        if (before.to == from && before.kind == kind && before.about == about) {
            before.to = to, before.amount += amount, trace.end = std::max(trace.end, to);
            return;
        }
    }
    if (from >= to) return;
    trace.last[WARP] = -1;  // events of other kinds are not extended
    of.event = trace.events.size();
    trace.add({WARP, number(), warp, kind, about, amount, from, to, site_offset(site), {0, 0}});
}

void Timing::close(int thread, void* site) {
    Lane& lane = lanes[thread];
    WarpTime& warp = warps[thread / 32];
    Segment& segment = lane.segment;
    const double begin = segment.exponentials ? std::max(lane.now, lane.products) : lane.now;
    double end = begin;
    const uint32_t bit = 1u << thread % 32;
    auto* same = std::find_if(warp.done, warp.done + 4, [&](const auto& done) { return done.segment == segment && !(done.lanes & bit) && std::abs(done.begin - begin) < 256; });
    if (segment == Segment{}) {
    } else if (same < warp.done + 4) {
        same->lanes |= bit, end = std::max(end, same->end);
    } else {
        const int part = thread / 32 % 4;
        const double exponentials = segment.exponentials * model::EXPONENTIAL, issue = segment.issue + segment.exponentials * model::ARITHMETIC;
        end += exponentials + issue + segment.own + segment.exponentials * model::SOFTMAX_LATENCY;
        if (exponentials) {
            const double start = trace.take(EXPONENTIALS_OF + part, begin, exponentials);
            trace.add({EXPONENTIALS_OF + part, number(), thread / 32, "exponentials", {}, 32.0 * segment.exponentials, start, start + exponentials, site_offset(site), {0, 0}});
            end = std::max(end, start + exponentials);
        }
        const double issued = issue ? trace.take(ISSUE_OF + part, begin, issue) + issue : begin;
        if (issue > 64) end = std::max(end, issued);  // a few instructions fit between those of other warps
        warp.done[warp.next] = {segment, begin, end, bit}, warp.next = (warp.next + 1) % 4;
        warp_event(thread / 32, segment.exponentials ? "exponentials" : "arithmetic", begin, end, 32.0 * segment.exponentials, {}, site);
    }
    if (lane.loads > end) warp_event(thread / 32, "load", end, lane.loads, 0, {}, site);
    lane.now = std::max(end, lane.loads);
    lane.segment = {}, lane.loaded = 0;
}

void Timing::meet(void* site) {
    close(block.running, site);
    block.let_earlier_ones_run();
}

double Timing::meet(int first, int count, uint32_t mask, void* site) {
    double latest = 0;
    for (int t = first; t < first + count; ++t)
        if (mask >> t % 32 & 1) close(t, site), latest = std::max(latest, lanes[t].now);
    for (int w = first / 32; count > 32 && w < (first + count) / 32; ++w)  // warps that wait for the rest of their warpgroup
        warp_event(w, "wait", lanes[32 * w].now, latest, 0, {WARPGROUP, first / 128}, site);
    for (int t = first; t < first + count; ++t)
        if (mask >> t % 32 & 1) lanes[t].now = latest;
    block.let_earlier_ones_run();
    return latest;
}

double Timing::go_on(int first, int count, double at) {
    for (int t = first; t < first + count; ++t) lanes[t].now = std::max(lanes[t].now, at);
    return at;
}

// ---- memory

void Timing::shared(uint32_t offset, int bytes, bool write) {
    Lane& mine = lane();
    mine.segment.issue += write ? 1 : bytes / 4 * model::MULTIPLY_ADDS;
    const double cycles = bytes / model::SHARED_BYTES;
    mine.loads = std::max(mine.loads, trace.take(SHARED_ENGINE, mine.now, cycles) + cycles);
    if (write && offset / 16 < tiles.size()) tiles[offset / 16] = mine.loaded;
}

static int memory_of(const void* p) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(p);
    for (size_t n = 0; n < session.memories.size(); ++n)
        if (at >= session.memories[n].first && at < session.memories[n].end) return n + 1;
    return 0;
}

void Timing::global(const void* p, int bytes, bool write, void* site) {
    Lane& mine = lane();
    mine.segment.issue += 1;
    if (write) copy(COPIES_OUT, mine.now, p, bytes, {}, site);
    else mine.loads = std::max(mine.loads, copy(COPIES_IN, mine.now + model::L2_LATENCY, p, bytes, {}, site)), mine.loaded = memory_of(p);
}

// Transfers bytes between global memory and the multiprocessor; returns when they are done.
double Timing::copy(int actor, double from, const void* global, int bytes, const About& about, void* site) {
    const double cycles = bytes / model::L2_BYTES, start = trace.take(actor, from, cycles);
    trace.add({actor, number(), block.running / 32, actor == COPIES_IN ? "copy" : "store", about, double(bytes), start, start + cycles, site_offset(site), {memory_of(global), 0}});
    return start + cycles;
}

void Timing::tile(uint32_t offset, int bytes, const void* source) { std::fill_n(tiles.begin() + offset / 16, (bytes + 15) / 16, memory_of(source)); }

// ldmatrix and stmatrix: lanes whose rows lie in the same banks are served one after another.
void Timing::rows(int warp, const uint32_t (&addresses)[32], bool write, double at, void* site) {
    Counters counter;
    counter.shared_instruction(0, 0xffffffff, addresses, 16);
    const double cycles = counter.shared[0].cycles, start = trace.take(SHARED_ENGINE, at, cycles);
    const uint32_t offset = block.shared.offset(block.shared.pointer(addresses[0]));
    trace.add({SHARED_ENGINE, number(), warp, write ? "stmatrix" : "ldmatrix", {}, 512, start, start + cycles, site_offset(site), {tile_at(offset), 0}});
    if (!write) warps[warp].operand = tile_at(offset);
    warp_event(warp, write ? "store" : "load", at, start + cycles, 512, {}, site);
    go_on(32 * warp, 32, start + cycles);
}

// ---- products

void Timing::mma(int warp, double at, void* site) {
    const double flop = 2 * 16 * 8 * 16, cycles = flop / (model::TENSOR_FLOP / 4) * model::MMA_SLOWER;
    const int actor = TENSOR_CORE_OF + warp % 4;
    const double start = trace.take(actor, at, cycles);
    trace.add({actor, number(), warp, "product", {}, flop, start, start + cycles, site_offset(site), {0, warps[warp].operand}});
    warp_event(warp, "product", at, start + cycles, flop, {}, site);
    for (int t = 32 * warp; t < 32 * warp + 32; ++t) lanes[t].products = start + cycles + model::MMA_LATENCY;
    go_on(32 * warp, 32, start + cycles);
}

void Timing::product(int warpgroup, int n, int tile_a, int tile_b, double at, void* site) {
    Group& group = groups[warpgroup];
    const uint32_t number_of_group = block.warpgroups[warpgroup].groups + 1;
    const double flop = 2.0 * 64 * n * 16, cycles = flop / model::TENSOR_FLOP, start = trace.take(TENSOR_CORES, at, cycles);
    trace.add({TENSOR_CORES, number(), 4 * warpgroup, "product", {PRODUCTS, warpgroup, number_of_group}, flop, start, start + cycles, site_offset(site), {tile_a, tile_b}});
    of_group(group.over, number_of_group) = start + cycles + model::WGMMA_LATENCY;
    group.queue.push_back(start + cycles);
    if (group.queue.size() <= model::WGMMA_DEPTH) return;
    for (int w = 4 * warpgroup; w < 4 * warpgroup + 4; ++w) warp_event(w, "issue", at, group.queue.front(), 0, {PRODUCTS, warpgroup, number_of_group}, site);
    go_on(128 * warpgroup, 128, group.queue.front());
    group.queue.pop_front();
}

// ---- waits, and the events that end them

void Timing::wait(int thread, double until, const About& about, void* site) {
    Lane& waits = lanes[thread];
    warp_event(thread / 32, "wait", waits.now, until, 0, about, site);
    waits.now = std::max(waits.now, until);
}

void Timing::arrive(const About& about, void* site) {
    WarpTime& warp = warps[block.running / 32];
    const double at = now();
    if (warp.arrival >= 0)
        if (const Event& before = trace.events[warp.arrival]; before.from == at && before.about == about) return;
    warp.arrival = trace.events.size();
    trace.last[WARP] = -1;
    trace.add({WARP, number(), block.running / 32, "arrive", about, 0, at, at, site_offset(site), {0, 0}});
}

void Timing::comes_to_barrier(int id, void* site) {
    meet(site);
    arrive({TURN, id, barriers[id].turn}, site);
    barriers[id].coming = std::max(barriers[id].coming, now());
    lane().segment.own += model::SYNC;
}

void Timing::turn_is_over(int id, const std::vector<int>& waiting) {
    Phase& turn = barriers[id];
    for (int t : waiting) wait(t, turn.coming, {TURN, id, turn.turn}, block.threads[t].site);
    turn = {0, 0, turn.turn + 1};
}

void Timing::comes_to_phase(int n, void* site) {
    meet(site);
    const MBarrier& barrier = block.mbarriers[n];
    arrive({PHASE, int(barrier.offset), barrier.phase}, site);
    comes_to_phase(n, now());
    lane().segment.own += model::SYNC;
}

void Timing::phase_is_over(int n, const std::vector<int>& waiting) {
    Phase& phase = mbarriers[n];
    const MBarrier& barrier = block.mbarriers[n];
    for (int t : waiting) wait(t, phase.coming, {PHASE, int(barrier.offset), barrier.phase - 1}, block.threads[t].site);
    phase.coming = 0;
}

void end_of_thread(Block& block) {
    Timing& timing = *block.timing;
    void* last = block.self().site;  // where it last waited
    timing.close(block.running, last ? last : static_cast<char*>(session.kernel.entry) + 1);
    timing.trace.end = std::max(timing.trace.end, timing.now());
}

}  // namespace emulator

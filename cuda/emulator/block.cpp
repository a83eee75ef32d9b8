#include "block.h"

#include <math.h>

#include "fiber.h"
#include "launch.h"

namespace emulator {

void thread_begins();
void end_of_thread(Block&);

thread_local Block* current = nullptr;
static thread_local void* launcher;  // where the launcher resumes

// ---- a block begins

static int registers_at_start(int threads) {  // what the compiler may use if one block fills a multiprocessor: 65536 divided among its threads, in units of 8
    const int each = 65536 / ((threads + 127) / 128 * 128) / 8 * 8;
    return each < 255 ? each : 255;
}

void Block::begin(int64_t number, const Grid& of_grid, uint64_t seed) {
    grid = of_grid, follows = false;
    index = {unsigned(number % grid.blocks.x), unsigned(number / grid.blocks.x % grid.blocks.y), unsigned(number / grid.blocks.x / grid.blocks.y)};
    random.state = (seed * 0x9e3779b97f4a7c15 ^ number * 0xbf58476d1ce4e5b9) | 1;
    for (int n = 0; n < 4; ++n) random();
    const int count = grid.threads, warp_count = (count + 31) / 32;
    threads.assign(count, Thread{});
    warps.assign(warp_count, Warp{});
    ready.assign(warp_count, 0);
    ready_warps = 0;
    for (int t = 0; t < count; ++t) {
        threads[t].id = t, threads[t].registers = registers_at_start(count);
        threads[t].stack = stack_of(slot * 1024 + t);
        threads[t].stack_pointer = prepare_fiber(threads[t].stack, STACK_BYTES, thread_begins);
        awake(t);
    }
    for (int w = 0; w < warp_count; ++w) warps[w].first = 32 * w, warps[w].lanes = ready[w];
    clocks.reset(count);
    under_way.effects.clear();
    for (auto& each : barriers) each = {};
    mbarriers.clear();
    warpgroups.assign((count + 127) / 128, Warpgroup{});
    free_registers = 65536 - registers_at_start(count) * warp_count * 32;
    running = -1, last = random.below(count), threads_done = 0;
    timing = session.trace ? std::make_unique<Timing>(*this, *session.trace, free_from) : nullptr;
    if (timing) last = 0;
}

Pause Block::run() {
    paused = Pause::waits;
    const int thread = next();
    if (thread >= 0) running = last = thread, emulator_switch(&launcher, threads[thread].stack_pointer);
    running = -1;
    return session.failed ? Pause::fault : threads_done == grid.threads ? Pause::done : paused;
}

void thread_begins() {
    Block& block = *current;
    call_kernel();
    Thread& t = block.self();
    Warp& warp = block.warp();
    if (block.timing) end_of_thread(block);
    t.done = true, warp.exited |= 1u << block.lane(), ++block.threads_done;
    for (int lane = 0; lane < 32; ++lane)
        if (warp.at[lane].mask >> block.lane() & 1)
            fail("thread %d waits in %s at @%x for lane %d, which has ended", warp.first + lane, warp.at[lane].what, site_offset(warp.at[lane].site), block.lane());
    barrier_without_those_that_ended(block);
    block.asleep(t.id);
    block.switch_to(block.next());
}

void leave_block() {
    void* here;
    emulator_switch(&here, launcher);
    __builtin_unreachable();
}

// ---- which thread runs next

void Block::awake(int t) {
    threads[t].wait = Wait::nothing;
    if (timing) timing->horizon = std::min(timing->horizon, timing->lanes[t].now);
    ready[t / 32] |= 1u << t % 32, ready_warps |= 1u << t / 32;
}

void Block::asleep(int t) {
    ready[t / 32] &= ~(1u << t % 32);
    if (!ready[t / 32]) ready_warps &= ~(1u << t / 32);
}

int Block::next() {
    if (timing) return next_in_time();
    if (!alone && running >= 0 && random.below(4096) == 0) return paused = Pause::drawn, ANOTHER_BLOCK;
    if (!under_way.empty() && random.below(8) == 0) under_way.one(random());
    int w = last / 32, lane = last % 32;
    while (!ready[w] || random.below(16) == 0) {  // another warp
        if (!ready_warps) {
            if (!under_way.empty()) under_way.one(random());
            else if (!wake_who_waits_for_memory()) return NOBODY;
            continue;
        }
        uint32_t among = ready_warps;
        for (uint32_t skip = random.below(__builtin_popcount(among)); skip > 0; --skip) among &= among - 1;
        w = __builtin_ctz(among), lane = random.below(32);
        direction = random.below(2) ? 1 : 31;
    }
    do lane = (lane + direction) % 32;
    while (!(ready[w] >> lane & 1));
    return 32 * w + lane;
}

double Block::next_time() {
    wake_who_waits_for_memory();
    double time = under_way.empty() ? INFINITY : under_way.effects[under_way.earliest()].at;
    for (const Thread& t : threads)
        if (ready[t.id / 32] >> t.id % 32 & 1) time = std::min(time, timing->lanes[t.id].now);
    return time;
}

// The thread with the least time. Operations in flight take effect in between.
int Block::next_in_time() {
    struct Least {
        int thread = NOBODY;
        double time = INFINITY;
    };
    const auto least_of = [&](uint32_t w) {  // of several, the running one, else the first
        Least least;
        for (uint32_t left = ready[w]; left; left &= left - 1) {
            const int t = 32 * w + __builtin_ctz(left);
            if (const double now = timing->lanes[t].now; now < least.time || (now == least.time && t == running)) least = {t, now};
        }
        return least;
    };
    while (true) {
        Least least = least_of(last / 32), other;
        if (least.time > timing->horizon || least.thread == NOBODY) {
            for (uint32_t left = ready_warps & ~(1u << last / 32); left; left &= left - 1)
                if (const Least of_warp = least_of(__builtin_ctz(left)); of_warp.time < other.time) other = of_warp;
            timing->horizon = other.time;
            if (other.time < least.time) least = other, timing->horizon = 0;
        }
        const size_t first = under_way.empty() ? 0 : under_way.earliest();
        const bool effect = !under_way.empty() && under_way.effects[first].at <= least.time;
        if ((effect ? under_way.effects[first].at : least.time) > timing->limit) return paused = Pause::drawn, ANOTHER_BLOCK;
        if (!effect) return least.thread;
        under_way.one(first);
    }
}

void Block::let_earlier_ones_run() {
    const int thread = next();
    if (thread != running) switch_to(thread);
}

void Block::switch_to(int thread) {
    if (thread == NOBODY && threads_done < grid.threads && !someone_waits_for_memory()) report_deadlock(*this);
    void** here = &self().stack_pointer;
    if (thread == NOBODY) paused = Pause::waits;
    running = thread;
    if (thread >= 0) last = thread;
    emulator_switch(here, thread < 0 ? launcher : threads[thread].stack_pointer);
}

void Block::wait(Wait what_for, const char* what, void* site, int barrier, int64_t value, const int* memory) {
    const int me = running;
    Thread& t = threads[me];
    t.wait = what_for, t.what = what, t.site = site, t.barrier = barrier, t.value = value, t.memory = memory;
    asleep(me);
    const int thread = next();
    if (thread != me) switch_to(thread);
}

void Block::maybe_let_others_run() {
    if (timing || random.below(8)) return;
    const int thread = next();
    if (thread != running) switch_to(thread);
}

bool Block::someone_waits_for_memory() const {
    for (const Thread& t : threads)
        if (t.wait == Wait::memory) return true;
    return false;
}

bool Block::wake_who_waits_for_memory() {
    bool any = false;
    for (Thread& t : threads)
        if (t.wait == Wait::memory && *t.memory != t.value) {
            if (timing) timing->wait(t.id, timing->trace.released[t.memory], {SIGNALLED}, t.site);
            awake(t.id), any = true;
        }
    return any;
}

// ---- what each thread is

unsigned thread_x() { return current->running; }
unsigned threads_of_block() { return current->grid.threads; }
Index block_index() { return current->index; }
Index grid_size() { return current->grid.blocks; }

void set_registers(int count) {
    Block& block = *current;
    meet(0xffffffff, "setmaxnreg", SITE, nullptr, [](Block&, Warp&, uint32_t) {});
    Thread& t = block.self();
    // A warp returns or takes registers as a whole: the block's 65536 are counted for warps of 32.
    if (block.lane() == 0) {
        while (32 * (count - t.registers) > block.free_registers) block.wait(Wait::registers, "setmaxnreg", SITE, 0, count);
        block.free_registers -= 32 * (count - t.registers);
        for (int each = 0; each < block.grid.threads; ++each)
            if (block.threads[each].wait == Wait::registers) {
                if (block.timing) block.timing->go_on(each, 1, block.timing->now());
                block.awake(each);
            }
    }
    t.registers = count;
    meet(0xffffffff, "setmaxnreg", SITE, nullptr, [](Block&, Warp&, uint32_t) {});
}

}  // namespace emulator

// wgmma (PTX ISA 9.7.15): the products of a warpgroup. They read shared memory and registers, and write registers, at any time between the instruction and
// the wait for their group.
#include "block.h"
#include "half.h"
#include "launch.h"
#include "tensor_map.h"

namespace emulator {

// ---- the 128 threads of a warpgroup together

static void meet_group(const char* what, void* site, void* arguments, void (*execute)(Block&, Warpgroup&, int first)) {
    Block& block = *current;
    const int me = block.running, first = me / 128 * 128;
    Warpgroup& group = block.warpgroups[me / 128];
    if (group.there == 0) group.what = what, group.site = site;
    if (group.what != what)
        fail("the threads of a warpgroup do different things: thread %d comes to %s at @%x, others wait in %s at @%x", me, what, site_offset(site), group.what, site_offset(group.site));
    group.arguments[me - first] = arguments;
    if (++group.there < 128) return block.wait(Wait::warp, what, site);
    if (block.timing) block.timing->meet(first, 128, 0xffffffff, site);
    group.there = 0;
    execute(block, group, first);
    for (int t = first; t < first + 128; ++t)
        if (t != me) block.awake(t);
}

// ---- operands in shared memory (9.7.15.5.1: matrix descriptor; 9.7.15.5.1.2: strides), with a 128-byte swizzle: rows of 128 bytes, 8 of them a pattern

struct Operand {
    uint32_t start, leading, stride;
    bool transposed;  // the summation index runs along the rows

    Operand(uint64_t descriptor, bool transposed, void* site)
        : start((descriptor & 0x3fff) << 4), leading((descriptor >> 16 & 0x3fff) << 4), stride((descriptor >> 32 & 0x3fff) << 4), transposed(transposed) {
        constexpr uint64_t DEFINED = 0x3fffull | 0x3fffull << 16 | 0x3fffull << 32 | 7ull << 49 | 3ull << 62;
        if (descriptor & ~DEFINED) fail("the matrix descriptor %016llx has bits that mean nothing: @%x", (unsigned long long)descriptor, site_offset(site));
        if (descriptor >> 62 != 1) fail("the matrix descriptor %016llx asks for a swizzle other than 128 bytes, which is not emulated: @%x", (unsigned long long)descriptor, site_offset(site));
        if ((descriptor >> 49 & 7) != (start >> 7 & 7))
            fail("the matrix descriptor %016llx begins within a swizzle's pattern of 1024 bytes: @%x", (unsigned long long)descriptor, site_offset(site));
    }
    // The address of 8 elements: of row or column `line` (of A or B), at k, k + 1, …; or transposed, of lines line, line + 1, … at k.
    uint32_t chunk(int line, int k) const {
        const uint32_t at = transposed ? start + line / 64 * leading + k / 8 * stride + k % 8 * 128 + line % 64 * 2 : start + line / 8 * stride + line % 8 * 128 + k * 2;
        return swizzled_128(at);
    }
    template <class Each>
    void each_chunk(int lines, Each each) const {
        if (transposed)
            for (int k = 0; k < 16; ++k)
                for (int line = 0; line < lines; line += 8) each(chunk(line, k), line, k);
        else
            for (int line = 0; line < lines; ++line)
                for (int k = 0; k < 16; k += 8) each(chunk(line, k), line, k);
    }
    // x[line][k]
    void read(const Shared& shared, Type type, int lines, float (*x)[16]) const {
        each_chunk(lines, [&](uint32_t at, int line, int k) {
            uint16_t eight[8];
            memcpy(eight, shared.pointer(at), 16);
            for (int e = 0; e < 8; ++e)
                (transposed ? x[line + e][k] : x[line][k + e]) = type == Type::float16 ? float_of_half(eight[e]) : float_of_bfloat(eight[e]);
        });
    }
};

// ---- a product: D (64 × n) += A (64 × 16) · B (16 × n)

struct Product {
    Wgmma of[128];
    void* site;

    void execute(Block& block) const {
        const Wgmma& w = of[0];
        const int n = w.n;
        static thread_local float A[64][16], B[256][16], Bt[16][256], D[64][256];
        Operand(w.b_descriptor, w.b_transposed, site).read(block.shared, w.type, n, B);
        if (w.a)
            for (int t = 0; t < 128; ++t)
                for (int r = 0; r < 4; ++r)
                    for (int e = 0; e < 2; ++e) {
                        const uint16_t x = of[t].a[r] >> 16 * e;
                        A[t / 32 * 16 + t % 32 / 4 + r % 2 * 8][2 * (t % 4) + r / 2 * 8 + e] = w.type == Type::float16 ? float_of_half(x) : float_of_bfloat(x);
                    }
        else Operand(w.a_descriptor, w.a_transposed, site).read(block.shared, w.type, 64, A);
        for (int k = 0; k < 16; ++k)
            for (int j = 0; j < n; ++j) Bt[k][j] = B[j][k];
        for (int i = 0; i < 64; ++i) {
            for (int j = 0; j < n; ++j) D[i][j] = A[i][0] * Bt[0][j];
            for (int k = 1; k < 16; ++k)
                for (int j = 0; j < n; ++j) D[i][j] += A[i][k] * Bt[k][j];
        }
        for (int t = 0; t < 128; ++t)
            for (int i = 0; i < n / 2; ++i) {
                float& d = of[t].d[i];
                d = (w.accumulate ? d : 0) + D[t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8][i / 4 * 8 + 2 * (t % 4) + i % 2];
            }
    }
};

// The shared memory that it will read must be known to be written, and must not change until its group has been waited for.
static void announce(Block& block, int group, const Operand& operand, int lines, int seen_by, void* site) {
    const Access by{.who = block.clocks.products_of(group), .when = block.warpgroups[group].groups + 1, .seen = block.clocks.of(seen_by), .site = site, .write = false, .async = true,
                    .may_be_garbage = true};
    operand.each_chunk(lines, [&](uint32_t at, int, int) { block.shared.access(block.shared.offset(block.shared.at(at, 16, 16, "wgmma", site)), 16, by); });
}

// Registers of a thread that the product uses, until its group has been waited for.
static void mark_busy(Thread& t, const void* first, size_t bytes, bool written, uint32_t group, void* site) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(first), place = at - reinterpret_cast<uintptr_t>(t.stack);
    if (place + bytes > STACK_BYTES) fail("thread %d: registers of a product that are not the thread's own: @%x", t.id, site_offset(site));
    if (!t.touched.fences || t.touched.since_fence(place, bytes))
        fail("thread %d: a product uses registers that the thread has touched with no wgmma.fence since: @%x", t.id, site_offset(site));
    for (auto& busy : t.busy)
        if (busy.first == at && busy.written == written) return void(busy.group = group);
    t.busy.push_back({at, at + bytes, written, group});
}

void wgmma(const Wgmma& mine) {
    struct Arguments {
        const Wgmma& w;
        void* site;
    } arguments{mine, SITE};
    current->loads_have_come();
    meet_group("wgmma", SITE, &arguments, [](Block& block, Warpgroup& group, int first) {
        auto product = std::make_shared<Product>();
        const auto& [w, site] = *static_cast<Arguments*>(group.arguments[0]);
        product->site = site;
        for (int t = 0; t < 128; ++t) {
            const Wgmma& each = static_cast<Arguments*>(group.arguments[t])->w;
            if (each.n != w.n || !each.a != !w.a || each.a_descriptor != w.a_descriptor || each.b_descriptor != w.b_descriptor || each.accumulate != w.accumulate)
                fail("threads %d and %d of a warpgroup ask for different products: @%x", first, first + t, site_offset(site));
            product->of[t] = each;
            mark_busy(block.threads[first + t], each.d, each.n / 2 * sizeof(float), true, group.groups + 1, site);
            if (each.a) mark_busy(block.threads[first + t], each.a, 16, false, group.groups + 1, site);
        }
        count(WGMMA_FLOP, 2 * 64 * w.n * 16), count(WGMMA_OPERANDS, (w.n + (w.a ? 0 : 64)) * 32);
        if (Timing* timing = block.timing.get()) {
            const Operand b(w.b_descriptor, w.b_transposed, site);
            const auto tile_of = [&](const Operand& operand) { return timing->tile_at(block.shared.offset(block.shared.pointer(operand.start))); };
            timing->product(first / 128, w.n, w.a ? 0 : tile_of(Operand(w.a_descriptor, w.a_transposed, site)), tile_of(b), timing->now(), site);
        }
        const int seen_by = first + block.random.below(128);  // one of the threads that must all know that the operands are written
        announce(block, first / 128, Operand(w.b_descriptor, w.b_transposed, site), w.n, seen_by, site);
        if (!w.a) announce(block, first / 128, Operand(w.a_descriptor, w.a_transposed, site), 64, seen_by, site);
        // Products take effect in order: this one now, if all earlier ones have and the random choice says so.
        if (group.waiting.empty() && block.random.below(2)) product->execute(block);
        else group.waiting.push_back({group.groups + 1, [product, &block] { product->execute(block); }});
    });
}

void wgmma_fence() {
    meet_group("wgmma.fence", SITE, nullptr, [](Block& block, Warpgroup&, int first) {
        for (int t = first; t < first + 128; ++t) block.threads[t].touched.fence(STACK_BYTES);
    });
}

void wgmma_commit() {
    meet_group("wgmma.commit_group", SITE, nullptr, [](Block&, Warpgroup& group, int) { ++group.groups; });
}

void wgmma_wait(int groups) {
    count_wait(SITE);
    meet_group("wgmma.wait_group", SITE, &groups, [](Block& block, Warpgroup& group, int first) {
        const uint32_t over = std::max(0, int(group.groups) - *static_cast<int*>(group.arguments[0]));
        while (!group.waiting.empty() && group.waiting.front().group <= over) group.waiting.front().execute(), group.waiting.pop_front();
        for (int t = first; t < first + 128; ++t) {
            uint32_t& known = block.clocks.of(t)[block.clocks.products_of(first / 128)];
            known = std::max(known, over);
            if (Timing* timing = block.timing.get()) timing->wait(t, of_group(timing->groups[first / 128].over, over), {PRODUCTS, first / 128, over}, group.site);
            std::erase_if(block.threads[t].busy, [&](const BusyRegisters& busy) { return busy.group <= over; });
        }
    });
}

}  // namespace emulator

#include "counters.h"

#include <math.h>

#include <algorithm>

#include "block.h"
#include "launch.h"

namespace emulator {

// Shared memory delivers 32 banks of 4 bytes per cycle: lanes that access different words of one bank are served one after another. Accesses of 8 bytes are
// served 16 lanes at a time, of 16 bytes 8 lanes.
void Counters::shared_instruction(uint32_t place, uint32_t lanes, const uint32_t (&addresses)[32], int bytes) {
    const int together = bytes <= 4 ? 32 : 128 / bytes;
    Place& at = shared[place];
    ++at.instructions;
    for (int first = 0; first < 32; first += together) {
        std::vector<uint32_t> words;
        for (int lane = first; lane < first + together; ++lane)
            for (int byte = 0; byte < bytes && lanes >> lane & 1; byte += 4) words.push_back((addresses[lane] + byte) / 4);
        if (words.empty()) continue;
        std::sort(words.begin(), words.end());
        words.erase(std::unique(words.begin(), words.end()), words.end());
        uint32_t of_bank[32] = {}, most = 0;
        for (uint32_t word : words) most = std::max(most, ++of_bank[word % 32]);
        at.cycles += most, ++at.least;
    }
}

void Gathered::add(Counters& counters, uint32_t place, int lane, uint32_t address, int bytes) {
    Place& at = places[place];
    at.bytes = bytes;
    const uint32_t n = at.seen[lane]++ - at.first;
    if (n >= at.rows.size()) at.rows.resize(n + 1);
    at.rows[n].lanes |= 1u << lane, at.rows[n].addresses[lane] = address;
    while (!at.rows.empty() && at.rows.front().lanes == 0xffffffff) {
        counters.shared_instruction(place, 0xffffffff, at.rows.front().addresses, bytes);
        at.rows.erase(at.rows.begin()), ++at.first;
    }
}

void Gathered::flush(Counters& counters) {
    for (auto& [place, at] : places)
        for (Row& row : at.rows)
            if (row.lanes) counters.shared_instruction(place, row.lanes, row.addresses, at.bytes);
    places.clear();
}

std::string Counters::report() const {
    static const char* const NAMES[COUNTS] = {"global bytes read by threads", "global bytes written by threads", "global bytes added to by red", "global bytes by cp.async",
                                              "global bytes by tensor map, to shared memory", "global bytes by tensor map, from shared memory", "global bytes by cp.async.bulk",
                                              "shared bytes read by threads", "shared bytes written by threads", "shared bytes by ldmatrix", "shared bytes by stmatrix",
                                              "shared bytes by wgmma", "FLOP by mma.sync", "FLOP by wgmma", "exponentials"};
    std::string lines;
    for (int n = 0; n < COUNTS; ++n)
        if (total[n]) lines += text("total\t%s\t%llu\n", NAMES[n], (unsigned long long)total[n]);
    for (const auto& [place, at] : shared)
        lines += text("shared\t@%x\t%llu\t%llu\t%llu\n", place, (unsigned long long)at.instructions, (unsigned long long)at.cycles, (unsigned long long)at.least);
    for (const auto& [place, times] : waits) lines += text("waits\t@%x\t%llu\n", place, (unsigned long long)times);
    return lines;
}

// ---- where they are counted

void count(Count what, uint64_t amount) {
    if (session.counters.enabled) session.counters.total[what] += amount;
}

void count_wait(void* site) {
    if (session.counters.enabled) ++session.counters.waits[site_offset(site)];
}

// A plain access of a thread to shared memory.
void count_shared(Block& block, uint32_t address, int bytes, bool write, void* site) {
    if (!session.counters.enabled) return;
    session.counters.total[write ? SHARED_WRITTEN : SHARED_READ] += bytes;
    block.warp().gathered.add(session.counters, site_offset(site), block.lane(), address, bytes);
}

// The rows of an ldmatrix or stmatrix: 8 at a time.
void count_rows(const uint32_t (&addresses)[32], bool write, void* site) {
    if (!session.counters.enabled) return;
    session.counters.total[write ? STMATRIX : LDMATRIX] += 16 * 32;
    session.counters.shared_instruction(site_offset(site), 0xffffffff, addresses, 16);
}

static void count_exponential() {
    if (!current) return;
    count(EXPONENTIALS, 1);
    if (current->timing) current->timing->exponential();
}

float exponential_2(float x) {
    count_exponential();
    return exp2f(x);
}
float exponential(float x) {
    count_exponential();
    return expf(x);
}
float tangent(float x) {
    count_exponential();
    return tanhf(x);
}

}  // namespace emulator

// As text, for Python: a line for each count, fields separated by tabs.
extern "C" const char* emulator_counters() {
    static thread_local std::string report;
    report = emulator::session.counters.report();
    return report.c_str();
}
extern "C" void emulator_count(int enabled) {
    emulator::session.counters = {};
    emulator::session.counters.enabled = enabled != 0;
}

// What a launch did, counted: bytes by path, bank conflicts by place, products, exponentials, waits by place.
#pragma once

#include <stdint.h>

#include <map>
#include <string>
#include <vector>

namespace emulator {

enum Count {
    GLOBAL_READ,
    GLOBAL_WRITTEN,
    GLOBAL_ADDED,
    CP_ASYNC,
    TENSOR_LOADED,
    TENSOR_STORED,
    BULK_LOADED,
    SHARED_READ,
    SHARED_WRITTEN,
    LDMATRIX,
    STMATRIX,
    WGMMA_OPERANDS,
    MMA_FLOP,
    WGMMA_FLOP,
    EXPONENTIALS,
    COUNTS
};

struct Counters {
    uint64_t total[COUNTS] = {};
    struct Place {
        uint64_t instructions = 0, cycles = 0, least = 0;  // of a warp; the cycles of shared memory that they took, and would take without any conflict
    };
    std::map<uint32_t, Place> shared;     // by place in the library
    std::map<uint32_t, uint64_t> waits;   // by place
    bool enabled = false;

    // One instruction of a warp on shared memory: the addresses of the lanes that take part, `bytes` each.
    void shared_instruction(uint32_t place, uint32_t lanes, const uint32_t (&addresses)[32], int bytes);
    std::string report() const;
};

// Lanes make their plain accesses one by one: the n-th accesses of all lanes at one place belong to one instruction of the warp.
struct Gathered {
    struct Row {
        uint32_t lanes = 0, addresses[32];
    };
    struct Place {
        uint32_t seen[32] = {};  // accesses of each lane
        uint32_t first = 0;      // index of rows[0]
        std::vector<Row> rows;
        int bytes = 0;
    };
    std::map<uint32_t, Place> places;

    void add(Counters&, uint32_t place, int lane, uint32_t address, int bytes);
    void flush(Counters&);
};

}  // namespace emulator

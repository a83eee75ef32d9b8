// Shared memory, and for every 4 bytes of it who wrote them last and who has read them since. Two accesses to the same bytes, of which one writes, must
// be ordered by a barrier, a wait or a fence (clock.h); if not, their order here is accidental.
#pragma once

#include <stdint.h>

#include <vector>

#include "clock.h"
#include "emulator.h"

namespace emulator {

// One access, by component `who` at its tick `when`; `seen` is the clock of the thread that makes or issues it.
struct Access {
    int who;
    uint32_t when;
    const uint32_t* seen;
    void* site;
    bool write;
    bool async = false;     // by wgmma or the copy engine, which see what threads wrote only after a fence.proxy.async
    bool may_be_garbage = false;  // reading bytes that were never written is no error: they are NaN
};

struct Shared {
    // Copies the block's memory into the window; and out of it again, while another block runs.
    void begin(uint8_t* window, uint32_t bytes, uint32_t dynamic_at, uint32_t dynamic_bytes, uint32_t dynamic_end);
    void keep();
    void restore() const;
    bool holds(uintptr_t p) const { return p - reinterpret_cast<uintptr_t>(window) < bytes; }
    uint32_t offset(const void* p) const { return static_cast<const uint8_t*>(p) - window; }
    // 32-bit addresses: dynamic memory first, as descriptors do not reach further than 256 KB, then what lies before it in the window.
    uint32_t address(const void* p) const { return FIRST_SHARED_ADDRESS + (offset(p) + bytes - dynamic_at) % bytes; }
    uint8_t* pointer(uint32_t address) const { return window + (address - FIRST_SHARED_ADDRESS + dynamic_at) % bytes; }
    // The bytes at a 32-bit address; an error names `what` if they are not the block's, or not aligned to `alignment`.
    uint8_t* at(uint32_t address, int count, int alignment, const char* what, void* site) const;
    void access(uint32_t offset, int count, const Access&);
    // From here on only barrier instructions may touch these 8 bytes.
    void reserve(uint32_t offset, bool reserved);

    uint8_t* window = nullptr;
    uint32_t bytes = 0, dynamic_at = 0, dynamic_end = 0, dynamic_limit = 0;  // dynamic memory: from, to; its variable ends at the limit

private:
    static constexpr uint16_t NOBODY = 0xffff;
    struct Granule {
        uint32_t write_tick, read_tick[2];
        uint32_t write_site, read_site[2];
        uint16_t writer, reader[2];
        uint8_t write_bytes, read_bytes[2];  // bit n: byte n
        uint8_t written;                     // at any time
        bool reserved;
    };
    std::vector<Granule> granules;
    std::vector<uint8_t> kept;

    void access(Granule&, uint32_t bytes, uint32_t offset, const Access&);
    [[noreturn]] void report(const Granule&, int reader, uint32_t offset, const Access&) const;
};

}  // namespace emulator

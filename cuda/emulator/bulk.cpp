// The copy engine: boxes by tensor map and plain rows of bytes, to shared memory and back (PTX ISA 9.7.9.25.4: cp.async.bulk, 9.7.9.27.1:
// cp.async.bulk.tensor). One thread issues a copy; the bytes move at some later time.
#include "launch.h"
#include "model.h"
#include "tensor_map.h"

namespace emulator {

// ---- tensor maps: refused here if the driver would refuse them (CUDA Driver API, cuTensorMapEncodeTiled)

CUresult encode_tensor_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* sizes, const cuuint64_t* strides,
                           const cuuint32_t* box, const cuuint32_t* element_strides, CUtensorMapInterleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                           CUtensorMapFloatOOBfill) {
    TensorMap encoded{TENSOR_MAP, static_cast<uint8_t*>(address), {}, {}, {}, type == CU_TENSOR_MAP_DATA_TYPE_UINT32 ? 4u : 2u, swizzle == CU_TENSOR_MAP_SWIZZLE_128B};
    bool valid = rank == 4 && address && reinterpret_cast<uintptr_t>(address) % 16 == 0;
    for (int d = 0; d < 4 && valid; ++d) {
        valid &= sizes[d] >= 1 && sizes[d] <= 1ull << 32 && box[d] >= 1 && box[d] <= 256 && element_strides[d] == 1;
        if (d < 3) valid &= strides[d] % 16 == 0 && strides[d] < 1ull << 40, encoded.strides[d] = strides[d];
        encoded.sizes[d] = sizes[d], encoded.box[d] = box[d];
    }
    const uint32_t row = encoded.box[0] * encoded.element_bytes;
    valid &= row % 16 == 0 && (!encoded.swizzled || row <= 128);
    if (!valid) return CUDA_ERROR_INVALID_VALUE;
    memcpy(map, &encoded, sizeof encoded);
    return CUDA_SUCCESS;
}

static TensorMap map_at(const void* p, void* site) {
    TensorMap map;
    memcpy(&map, p, sizeof map);
    if (map.magic != TENSOR_MAP) fail("thread %d: what should be a tensor map is none: @%x", current->running, site_offset(site));
    return map;
}

// Calls row(shared address, element in global memory or null beyond the tensor, bytes inside the tensor, bytes) for each row of the box.
template <class Row>
static void each_row(const TensorMap& map, const int (&at)[4], uint32_t address, Row row) {
    const int row_bytes = map.box[0] * map.element_bytes;
    for (int b = 0; b < map.box[3]; ++b)
        for (int h = 0; h < map.box[2]; ++h)
            for (int n = 0; n < map.box[1]; ++n, address += row_bytes) {
                const int64_t place[3] = {at[1] + n, at[2] + h, at[3] + b};
                bool inside = at[0] >= 0 && at[0] < int64_t(map.sizes[0]);
                uint8_t* p = map.data + int64_t(at[0]) * map.element_bytes;
                for (int d = 0; d < 3; ++d) inside &= place[d] >= 0 && place[d] < int64_t(map.sizes[d + 1]), p += place[d] * int64_t(map.strides[d]);
                const int64_t columns = int64_t(map.sizes[0]) - at[0];
                row(address, inside ? p : nullptr, inside ? int(std::min<int64_t>(columns, map.box[0])) * int(map.element_bytes) : 0, row_bytes);
            }
}

// How many of a row's bytes lie inside the tensor.
static int check_box(const TensorMap& map, const int (&at)[4], uint32_t address, bool write, void* site) {
    int all = 0;
    if (at[0] < 0) fail("thread %d: a box that begins at column %d is not emulated: @%x", current->running, at[0], site_offset(site));
    each_row(map, at, address, [&](uint32_t, uint8_t* p, int inside, int) {
        if (inside) check_global(p, inside, write, site), count(write ? TENSOR_STORED : TENSOR_LOADED, inside), all += inside;
    });
    return all;
}

// A row's bytes in 16-byte chunks, each at its swizzled position.
template <class Chunk>
static void each_chunk(const TensorMap& map, uint32_t address, int bytes, Chunk chunk) {
    for (int n = 0; n < bytes; n += 16) {
        const uint32_t to = map.swizzled ? swizzled_128(address + n) : address + n;
        chunk(current->shared.pointer(to), n);
    }
}

// ---- to shared memory; an mbarrier counts the bytes

static int engine_barrier(uint32_t address, void* site) {
    Block& block = *current;
    const int n = mbarrier_at(address, "the copy engine", site);
    if (!block.mbarriers[n].visible_to_engine)
        fail("thread %d: the mbarrier at shared byte %u has not been made visible to the copy engine (fence.mbarrier_init): @%x", block.running, block.mbarriers[n].offset, site_offset(site));
    return n;
}

// From now until the phase completes, no thread may read these bytes; and all their previous readers must be known to have finished.
static void announce(uint32_t address, int bytes, int alignment, int barrier, void* site) {
    Block& block = *current;
    uint8_t* to = block.shared.at(address, bytes, alignment, "the copy engine", site);
    block.shared.access(block.shared.offset(to), bytes,
                        {.who = block.clocks.mbarrier(barrier), .when = block.mbarriers[barrier].phase + 1, .seen = block.clock(), .site = site, .write = true, .async = true});
}

// When the bytes will have arrived, if the launch is traced.
static double time_of_load(uint32_t address, int bytes, int from_memory, const void* source, int barrier, void* site) {
    Block& block = *current;
    Timing* timing = block.timing.get();
    if (!timing) return 0;
    timing->spend(0, model::SYNC), timing->meet(site);
    timing->tile(block.shared.offset(block.shared.pointer(address)), bytes, source);
    const MBarrier& of = block.mbarriers[barrier];
    return timing->copy(COPIES_IN, timing->now() + model::TMA_LATENCY, source, from_memory, {PHASE, int(of.offset), of.phase}, site);
}

void tensor_load(uint32_t address, const void* p, const int (&at)[4], uint32_t barrier_address) {
    const TensorMap map = map_at(p, SITE);
    const int barrier = engine_barrier(barrier_address, SITE);
    announce(address, map.box_bytes(), 128, barrier, SITE);
    const int inside = check_box(map, at, address, false, SITE);
    const double over = time_of_load(address, map.box_bytes(), inside, map.data, barrier, SITE);
    current->under_way.add([=, x = at[0], n = at[1], h = at[2], b = at[3]] {
        each_row(map, {x, n, h, b}, address, [&](uint32_t to, const uint8_t* from, int inside, int bytes) {
            uint8_t row[1024] = {};
            if (inside) memcpy(row, from, inside);
            each_chunk(map, to, bytes, [&](uint8_t* chunk, int first) { memcpy(chunk, row + first, 16); });
        });
        mbarrier_bytes_came(barrier, map.box_bytes(), over);
    }, over);
}

void bulk_load(uint32_t address, const void* source, int bytes, uint32_t barrier_address) {
    if (bytes <= 0 || bytes % 16 || reinterpret_cast<uintptr_t>(source) % 16)
        fail("thread %d: a bulk copy of %d bytes; addresses and sizes must be multiples of 16: @%x", current->running, bytes, site_offset(SITE));
    const int barrier = engine_barrier(barrier_address, SITE);
    announce(address, bytes, 16, barrier, SITE);
    check_global(source, bytes, false, SITE);
    count(BULK_LOADED, bytes);
    const double over = time_of_load(address, bytes, bytes, source, barrier, SITE);
    current->under_way.add([=] {
        memcpy(current->shared.pointer(address), source, bytes);
        mbarrier_bytes_came(barrier, bytes, over);
    }, over);
}

// ---- from shared memory; the thread that issues a store waits for its groups

void tensor_store(const void* p, const int (&at)[4], uint32_t address) {
    Block& block = *current;
    const TensorMap map = map_at(p, SITE);
    const uint8_t* from = block.shared.at(address, map.box_bytes(), 128, "the copy engine", SITE);
    BulkGroups& bulk = block.warp().bulk;
    block.shared.access(block.shared.offset(from), map.box_bytes(),
                        {.who = block.clocks.bulk_of(block.running / 32), .when = bulk.committed + 1, .seen = block.clock(), .site = SITE, .write = false, .async = true});
    const int bytes_inside = check_box(map, at, address, true, SITE);
    auto done = std::make_shared<bool>(false);
    auto store = [=, x = at[0], n = at[1], h = at[2], b = at[3]] {
        if (*done) return;
        *done = true;
        each_row(map, {x, n, h, b}, address, [&](uint32_t row, uint8_t* to, int inside, int bytes) {
            uint8_t all[1024];
            each_chunk(map, row, bytes, [&](const uint8_t* chunk, int first) { memcpy(all + first, chunk, 16); });
            if (inside) memcpy(to, all, inside);
        });
    };
    bulk.under_way.push_back({bulk.committed + 1, store});
    double over = 0;
    if (Timing* timing = block.timing.get()) {
        timing->spend(0, model::SYNC), timing->meet(SITE);
        const int warp = block.running / 32;
        over = timing->copy(COPIES_OUT, timing->now() + model::STORE_LATENCY, map.data, bytes_inside, {BULK_STORES, warp, bulk.committed + 1}, SITE);
        of_group(timing->warps[warp].stores, bulk.committed + 1) = over;
    }
    block.under_way.add(store, over);
}

void bulk_commit() { ++current->warp().bulk.committed; }

void bulk_wait_read(int groups) {
    Block& block = *current;
    BulkGroups& bulk = block.warp().bulk;
    const uint32_t read = std::max(0, int(bulk.committed) - groups);
    if (Timing* timing = block.timing.get()) {
        timing->meet(SITE);
        const int warp = block.running / 32;
        timing->wait(block.running, of_group(timing->warps[warp].stores, read), {BULK_STORES, warp, read}, SITE);
    }
    while (!bulk.under_way.empty() && bulk.under_way.front().group <= read) bulk.under_way.front().store(), bulk.under_way.pop_front();
    uint32_t& known = block.clock()[block.clocks.bulk_of(block.running / 32)];
    known = std::max(known, read);
}

void fence_proxy_async() {
    current->self().loads = 0;
    current->clocks.tick(current->running, true);
}

}  // namespace emulator

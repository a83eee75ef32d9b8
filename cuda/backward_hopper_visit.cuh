// Which tile of keys a block of the hopper backwards takes, and which tiles of Q it visits: all, those on one side of the diagonal, those whose intervals
// include the keys, or those that the mask leaves visible. Maps is in backward_hopper.cuh.
#pragma once

constexpr int NO_TILE = -1, NO_UNIT = -2;  // in place of a tile's number
constexpr int MAY_BE_BLIND = 2;            // a value of `cut`

// A block's tile of keys and its head, b·Hkv + kv_h: head after head, whose Q, dO and dQ then stay in the L2 cache. Causal: a head's first keys are
// seen by the most rows, and start first. LEAVES_OUT: whether the mask lets tiles be skipped.
struct Unit {
    int k_tile, b_kv_h;  // NO_UNIT: there is none
};
// place: in the order of units.
template <bool LEAVES_OUT>
__device__ inline Unit unit_at([[maybe_unused]] const AttentionParams& p, [[maybe_unused]] const Maps& maps, int k_tiles, unsigned place) {
#if INTERVAL
    const int unit = maps.order != nullptr ? maps.order[place] : place;
#else
    unsigned unit = place;
#endif
#if LISTED
    if (LEAVES_OUT) unit = maps.order.units[unit];
#endif
#if CAUSAL && !INTERVAL && HEAD_DIM > 64
    // So do those of the last few heads, two blocks for each multiprocessor: otherwise the longest block of the last head would start when all others
    // have nearly finished. Not if one head's tiles of keys fill most of the multiprocessors: then there is little to gain, and two such heads do not fit
    // the cache together.
    const int heads = p.B * p.Hkv, last = min(heads, p.sm_count / k_tiles * 2), block = static_cast<int>(unit) - (heads - last) * k_tiles;
    if (!LEAVES_OUT && 3 * k_tiles <= 2 * p.sm_count && block >= 0) return {block / last, heads - last + block % last};
#endif
    return {static_cast<int>(unit % k_tiles), static_cast<int>(unit / k_tiles)};
}

#if PERSISTENT
// Each block begins with the unit of its own number, and takes further ones in their order when it has issued the loads of the one before.
__device__ inline int units_of(const AttentionParams& p, int k_tiles) { return k_tiles * p.Hkv * p.B; }
__device__ inline int take_place(const AttentionParams& p, const Workspace& workspace, int k_tiles) {
    const int blocks = gridDim.x, units = units_of(p, k_tiles);
    return blocks < units ? blocks + atomicAdd(workspace.zeroed, 1) : units;
}
#endif

// The tiles of Q that see some of a block's keys, of every query head that shares them: head bh = b·H + h, tile, and its index among them. Causal:
// from the last tile down, so that the blocks of a head reach the same tile at about the same time; when blocks take turns, this order is required.
#if INTERVAL
// Determining these tiles takes several dependent reads. So only the producer does it, ahead of the consumers, and tells them.
struct alignas(PERSISTENT ? 4 : 16) Told {  // 16: so that the compiler's vector loads do not read a word of another stage's message
    int bh, tile;  // NO_TILE: there is no more, or, if units follow, this one has none; NO_UNIT: no more units
    int cut;       // whether some row does not see all of the block's keys; MAY_BE_BLIND: some may even see no key at all
#if PERSISTENT
    int round;     // how many units the block has had before this one
#endif
};

// UP: from the first tile up.
template <bool UP>
struct IntervalVisit : Told {
    int last, end_bh, n = 0;  // the head's last tile to visit
    int k_tile;

#if PERSISTENT
    __device__ IntervalVisit() { round = 0; }
#else
    __device__ IntervalVisit(const AttentionParams& p, const Maps& maps, int k_tile, int b_kv_h) { begin_unit(p, maps, k_tile, b_kv_h); }
#endif
    __device__ void begin_unit(const AttentionParams& p, const Maps& maps, int its_k_tile, int b_kv_h) {
        const int group = p.H / ptx::unknown(p.Hkv);  // so that it occupies no register between units
        k_tile = its_k_tile;
        bh = b_kv_h * group, end_bh = bh + group;
        if (p.Nq > 0) enter(maps), settle(maps);
        else bh = end_bh;
    }
    __device__ bool more() const { return bh < end_bh; }
    __device__ void advance(const Maps& maps) { tile += STEP, ++n, settle(maps); }
    __device__ Slot<STAGES> slot() const { return Slot<STAGES>(n); }

private:
    static constexpr int STEP = UP ? 1 : -1;
    __device__ void enter(const Maps& maps) {
        const Interval tiles = maps.summaries.of_keys[bh * maps.summaries.k_tiles + k_tile];
        tile = UP ? tiles.start : tiles.stop - 1, last = UP ? tiles.stop - 1 : tiles.start;
    }
    // Moves to the next visited tile from this one on, then on through the heads that follow.
    __device__ void settle(const Maps& maps) {
        while (true) {
            for (; UP ? tile <= last : tile >= last; tile += STEP) {
                const Bounds bounds = maps.summaries.of_rows[bh * maps.summaries.q_tiles + tile];
                cut = bounds.see_whole(k_tile * BLOCK_K, BLOCK_K) ? 0 : bounds.may_be_blind() ? MAY_BE_BLIND : 1;
                if (bounds.see_some(k_tile * BLOCK_K, BLOCK_K)) return;
            }
            if (++bh == end_bh) return;
            enter(maps);
        }
    }
};
using Visit = IntervalVisit<false>;

// The same visits for the consumers and others: the producer stores them beside each tile of Q. ALONE: a thread without the rest of its warp.
template <bool ALONE = false>
struct ToldVisit : Told {
    const Told* told;  // [STAGES], in shared memory
    uint32_t Q_full;   // barriers
    unsigned n = 0;
#if PERSISTENT
    int its_round;
#endif

    __device__ ToldVisit(const Told* told, const uint64_t* Q_full) : told(told), Q_full(ptx::smem_address(Q_full)) { listen(); }
#if PERSISTENT
    // Whether there is another unit, number n of the block. Its first message is there already.
    __device__ bool begin_unit(int n) {
        its_round = n;
        return tile != NO_UNIT;
    }
    __device__ bool more() const { return tile >= 0 && round == its_round; }
#else
    __device__ bool more() const { return tile >= 0; }
#endif
    __device__ void advance(const AttentionParams&) { ++n, listen(); }
    __device__ Slot<STAGES> slot() const { return Slot<STAGES>(n); }
    // How many blocks before this one add to the tile's dQ.
    __device__ int turn(const AttentionParams& p, const Maps& maps, int k_tile) const {
        return p.deterministic ? k_tile - maps.summaries.of_rows[bh * maps.summaries.q_tiles + tile].some.start / BLOCK_K : 0;
    }

private:
    __device__ void listen() {
        ptx::mbarrier_wait(Q_full + slot().stage * sizeof(uint64_t), slot().parity);
        const Told& now = told[slot().stage];
        auto known = [](int x) { return ALONE ? x : uniform(x); };
        bh = known(now.bh), tile = known(now.tile), cut = known(now.cut);
#if PERSISTENT
        round = known(now.round);
#endif
    }
};
#else
#if LISTED
// Where the mask lets tiles be skipped: from the last tile down, or, if blocks decide who is the first at a tile of dQ, from the first one up.
struct ListedVisit {
    static constexpr bool UP = STORES_FIRST;
    const SeenTiles& seen;
    const int k_tile, first, end_bh;  // first: the first tile whose rows the diagonal lets see some of the block's keys
    int bh, tile, n = 0;
    uint32_t word = 0;  // remaining tiles of the chunk of 32

    __device__ ListedVisit(const AttentionParams& p, const Maps& maps, int k_tile, int b_kv_h)
        : seen(maps.seen_tiles), k_tile(k_tile), first(first_row_of(p, k_tile * BLOCK_K) / BLOCK_Q), end_bh((b_kv_h + 1) * (p.H / p.Hkv)) {
        bh = b_kv_h * (p.H / p.Hkv), tile = before_all(p);
        settle(p);
    }
    __device__ bool more() const { return bh < end_bh; }
    __device__ void advance(const AttentionParams& p) {
        ++n;
        if (!UP && word == 0) tile = tile / 32 * 32;
        settle(p);
    }
    __device__ Slot<STAGES> slot() const { return Slot<STAGES>(n); }

private:
    __device__ static int tiles(const AttentionParams& p) { return (p.Nq + BLOCK_Q - 1) / BLOCK_Q; }
    __device__ int before_all(const AttentionParams& p) const { return UP ? first / 32 * 32 - 32 : tiles(p); }
    // Moves to the visited tile that comes next, then on through the heads that follow.
    __device__ void settle(const AttentionParams& p) {
        while (word == 0) {
            const int base = UP ? tile / 32 * 32 + 32 : (tile - 1) / 32 * 32;  // of the next chunk
            if (UP ? base >= tiles(p) : tile <= first) {
                if (++bh == end_bh) return;
                tile = before_all(p);
                continue;
            }
            word = seen.word(p, bh / p.H, bh % p.H, k_tile, base / 32) & first_bits((UP ? tiles(p) : tile) - base) & ~first_bits(first - base);
            tile = base;
        }
        const int bit = UP ? __ffs(static_cast<int>(word)) - 1 : 31 - __clz(static_cast<int>(word));
        word ^= 1u << bit;
        tile = tile / 32 * 32 + bit;
    }
};
#endif

#if LISTED && STORES_FIRST
// The same visits for threads that only need to know the tile's number among those of all heads: the producer stores it beside each tile of Q.
struct ToldTile {
    const int* told;  // [STAGES], in shared memory; NO_TILE: there is no more
    uint32_t Q_full;  // barriers
    unsigned n = 0;
    int tile;

    __device__ ToldTile(const int* told, const uint64_t* Q_full) : told(told), Q_full(ptx::smem_address(Q_full)) { listen(); }
    __device__ bool more() const { return tile >= 0; }
    __device__ void advance() { ++n, listen(); }
    __device__ Slot<STAGES> slot() const { return Slot<STAGES>(n); }

private:
    __device__ void listen() {
        ptx::mbarrier_wait(Q_full + slot().stage * sizeof(uint64_t), slot().parity);
        tile = told[slot().stage];
    }
};
#endif

struct Visit {
    int begin, end, end_bh;
    int bh, tile, n = 0;

    __device__ Visit(const AttentionParams& p, const Maps&, int k_tile, int b_kv_h) {
        const int tiles = (p.Nq + BLOCK_Q - 1) / BLOCK_Q, group = p.H / p.Hkv;
        begin = CAUSAL ? tiles - 1 : 0;
        end = CAUSAL ? max(0, k_tile * BLOCK_K - diagonal(p)) / BLOCK_Q - 1 : tiles;
        end_bh = (b_kv_h + 1) * group;
        bh = begin == end || (CAUSAL && begin < end) ? end_bh : b_kv_h * group;
        tile = begin;
    }
    __device__ bool more() const { return bh < end_bh; }
    __device__ void advance(const AttentionParams&) {
        tile += CAUSAL ? -1 : 1;
        if (tile == end) tile = begin, ++bh;
        ++n;
    }
    __device__ Slot<STAGES> slot() const { return Slot<STAGES>(n); }
    __device__ int turn(const AttentionParams&, int k_tile) const { return k_tile; }
};
#endif

#if LISTED
// Stored in the block's entry of the order, which it reads in any case.
__device__ inline bool leaves_out(const Maps& maps) { return maps.seen_tiles.words != nullptr && maps.order.units[blockIdx.x] != NO_ORDER; }
template <bool LEAVES_OUT>
using VisitOf = std::conditional_t<LEAVES_OUT, ListedVisit, Visit>;
#else
template <bool>
using VisitOf = Visit;
#endif

// The forward of `hopper`, second part: which block computes what. Blocks are persistent: each takes one work item after another. The producer determines
// which, and writes it beside the tile of Q for the consumers.
#pragma once

#include "forward_4_tiles.cuh"

// A work item: a tile of Q, against the tiles of keys that it sees. They are visited from the last to the first: only the last need masking.
struct Work {
    int i0, h, b;  // first row, query head, batch
    int k_tiles;
#if INTERVAL
    int first_tile;
    Interval all;  // that every row sees

    __device__ int j0(const AttentionParams&, int n) const { return (first_tile + k_tiles - 1 - n) * BLOCK_K; }
#elif (SCORE & SCORE_ALIBI) && !CAUSAL
    // The first key of the n-th tile if the mask skips none: from the rows' diagonal down, then from the last tile down to it. The largest scores are near
    // the diagonal; after them few maxima rise.
    __device__ int j0(const AttentionParams& p, int n) const {
        const int tile = min(max(0, i0 + BLOCK_Q - 1 + diagonal(p)) / BLOCK_K, k_tiles - 1) - n;
        return (tile < 0 ? tile + k_tiles : tile) * BLOCK_K;
    }
#else
    // First key of the n-th tile, if the mask lets none be skipped.
    __device__ int j0(const AttentionParams&, int n) const { return (k_tiles - 1 - n) * BLOCK_K; }
#endif
};

// The LSE of row i of the work item's head, in global memory.
__device__ inline float& LSE_of(const AttentionParams& p, const Work& work, int i) {
    return p.lse[(static_cast<int64_t>(work.b) * p.H + work.h) * p.Nq + i];
}

// The number of tiles of keys, counted from the first, that some of `rows` rows from i0 on see. Tiles beyond are never visited.
__device__ inline int tiles_seen(const AttentionParams& p, int i0, int rows) {
    const int columns = i0 >= p.Nq ? 0 : CAUSAL ? max(0, stop_of_rows(p, i0, rows)) : p.Nk;
    return (columns + BLOCK_K - 1) / BLOCK_K;
}

#if INTERVAL
// Which block computes which tiles of Q. With spans, each block begins with the tile of its own number, and takes further tiles from a queue, the
// longest first (longest_first.cuh): the queue is filled while the first tiles are being computed.
//
// With only a window, most tiles take equally long, and a head's first tiles less: those of all heads are assigned last, the longest first, and fill the
// gaps that the others leave. Every other round reverses the order of the blocks, so that a block with a longer tile in one round has a shorter one in the
// next.
struct Schedule {
    int units, q_tiles;
    int short_tiles;  // tiles at the start of a head, whose rows see fewer columns than the others
    int mask_bytes;   
    Order order;

    // The block's m-th work item, except the first under spans. False if it has fewer.
    template <bool>
    __device__ bool get_work(const AttentionParams& p, int m, Work& work) const {
        const int blocks = gridDim.x;
        int unit = p.seen.spans == nullptr ? m * blocks + (m % 2 ? blocks - 1 - blockIdx.x : blockIdx.x) : order.take(units - blocks, units);
        if (unit >= units) return false;
        if (p.seen.spans == nullptr) unit = placed(unit);
        work = work_of(p, unit);
        return true;
    }
    // The first work item under spans, before there are summaries. A whole warp calls it.
    __device__ Work first_work(const AttentionParams& p) const {
        const int unit = blockIdx.x, bh = unit / q_tiles;
        return work_of(p, unit, read_bounds(p, bh / p.H, bh % p.H, unit % q_tiles * BLOCK_Q, BLOCK_Q));
    }
    // The work item of a unit. Units are numbered head by head.
    __device__ Work work_of(const AttentionParams& p, int unit) const {
        return work_of(p, unit, bounds_of_rows(p, reinterpret_cast<const Bounds*>(p.workspace), unit, unit % q_tiles * BLOCK_Q, BLOCK_Q));
    }

private:
    __device__ Work work_of(const AttentionParams& p, int unit, const Bounds& seen) const {
        const int bh = unit / q_tiles, i0 = unit % q_tiles * BLOCK_Q;
        const int first_tile = seen.some.start / BLOCK_K;
        return {i0, bh % p.H, bh / p.H, max(0, (seen.some.stop + BLOCK_K - 1) / BLOCK_K - first_tile), first_tile, seen.all};
    }
    // The unit at a position of the order for windows: each head from its last tile down, then all short tiles, the longest first.
    __device__ int placed(int place) const {
        const int heads = units / q_tiles, long_tiles = q_tiles - short_tiles;
        if (place < heads * long_tiles) return place / long_tiles * q_tiles + q_tiles - 1 - place % long_tiles;
        place -= heads * long_tiles;
        return place % heads * q_tiles + short_tiles - 1 - place / heads;
    }
};

// The number of tiles of keys that a tile of Q visits.
struct QueryTileLength {
    static constexpr bool SAYS_MOST = false, SAYS_WORTH = false;
    __device__ int operator()(const AttentionParams& p, int unit) const {
        const Interval some = reinterpret_cast<const Bounds*>(p.workspace)[unit].some;
        return (some.stop + BLOCK_K - 1) / BLOCK_K - some.start / BLOCK_K;
    }
};

inline Order order_of(const AttentionParams& p) { return Order(p.workspace + whole_chunks(Summaries::floats(p, BLOCK_Q, 1, false))); }

inline Schedule schedule_of(const AttentionParams& p, int mask_bytes) {
    const int q_tiles = static_cast<int>(tiles_of(p.Nq, BLOCK_Q));
    // The first row that sees the whole width of the window; rows before it see fewer columns.
    const int64_t full_row = p.seen.left < 0 ? 0 : int64_t{p.seen.left} - p.seen.diagonal;
    const int short_tiles = static_cast<int>(std::clamp<int64_t>(full_row, 0, p.Nq) / BLOCK_Q);
    return {q_tiles * p.H * p.B, q_tiles, short_tiles, mask_bytes, order_of(p)};
}

// Launches what computes the tables that the schedule reads.
inline cudaError_t prepare_schedule(const Schedule& schedule, const AttentionParams& p) {
    cudaError_t error = summarise(p, p.workspace, BLOCK_Q, 0);
    if (error == cudaSuccess && p.seen.spans != nullptr)
        error = put_longest_first(p, QueryTileLength{}, schedule.order, schedule.units, p.sm_count, std::min(schedule.units, p.sm_count));
    return error;
}
#else
// Which block computes which tiles of Q. Units are assigned head by head, so that at any time the K and V of few heads are read. A unit is one tile or, in
// a causal call, a pair, one tile from the end of the sequence and one from its start: pairs take equally long. (If the number of tiles is odd, the last
// has no partner: alone it takes as long as a pair.)
//
// Pairs that do not fill a round would leave most blocks idle for the time of a whole pair. So a causal call assigns the tiles of its last rounds one by
// one, the longest of all heads first, and reverses the order of the blocks every other round: a block with more work in one round has less in the next,
// and the shortest tiles come last (Graham, 1969; lengths are known, so no queue is needed).
struct Schedule {
    int units;
    int q_tiles, of_head;  // of one head: tiles, units
    int mask_bytes;        
    int paired;            // how many of a block's work items come in units; single tiles follow
    // The single tiles: those from `low` to `top` of head `first`, and all tiles of the `heads` heads that follow it. At positions `above` to `below` of
    // their order, each length has one tile of every head, elsewhere of all heads but `first`. `places` counts the positions.
    int first, heads, low, top, above, below, places;
#if LISTED
    // Where the mask has been scanned and lets some tile be skipped, tiles come from a queue, the longest first.
    SeenTiles seen;
    Order order;

    __device__ bool leaves_out() const { return seen.words != nullptr && !order.none(); }
#endif
    // The block's m-th work item. False if it has fewer. LEAVES_OUT: whether the mask lets some tile be skipped.
    template <bool LEAVES_OUT>
    __device__ bool get_work(const AttentionParams& p, int m, Work& work) const {
#if LISTED
        if constexpr (LEAVES_OUT) {
            const int tiles = p.B * p.H * q_tiles, tile = order.take(tiles, tiles);
            if (tile >= tiles) return false;
            work = work_of(p, tile);
            return true;
        }
#endif
        int bh, tile;
        if (CAUSAL && m >= paired) {
            const int round = m - paired, blocks = gridDim.x;
            if (!single(round * blocks + (round % 2 ? blocks - 1 - blockIdx.x : blockIdx.x), bh, tile)) return false;
        } else if (!of_unit(p, m, bh, tile)) {
            return false;
        }
        const int i0 = CAUSAL && tile < 0 ? p.Nq : tile * BLOCK_Q;
        work = {i0, bh % p.H, bh / p.H, tiles_seen(p, i0, BLOCK_Q)};
        return true;
    }
#if LISTED
    // The work item of a tile of Q. Tiles are numbered head by head.
    __device__ Work work_of(const AttentionParams& p, int tile) const {
        const int bh = tile / q_tiles, i0 = tile % q_tiles * BLOCK_Q;
        return {i0, bh % p.H, bh / p.H, seen.length(p, bh / p.H, bh % p.H, tile % q_tiles)};
    }
#endif

private:
    // The head, counted over all batches, and the tile of a block's m-th work item, while they come in units. Tile −1: the unit has no second tile.
    __device__ bool of_unit(const AttentionParams& p, int m, int& bh, int& tile) const {
        const int blocks = gridDim.x, unit = (CAUSAL ? m / 2 : m) * blocks + blockIdx.x;
        if (unit >= units) return false;
#if SCORE & SCORE_BIAS
        // Batches that share a bias read the same rows of it at about the same time, so that it comes from memory once.
        const int together = p.scoring.bias_b == 1 ? p.B : 1;
        bh = unit % together * (together > 1 ? p.H : 0) + unit / together / of_head;
        const int place = unit / together % of_head;
#else
        bh = unit / of_head;
        // Rotated by one each round: if the number of blocks is a multiple of a head's units, a block would otherwise get the same unit of every head,
        // and some units are shorter. Not in the head whose last units are assigned as single tiles: those must be the ones in the middle.
        const int place = (unit + (bh == first ? 0 : bh * of_head / blocks)) % of_head;
#endif
        tile = CAUSAL && m % 2 == 0 ? q_tiles - 1 - place : CAUSAL ? place - q_tiles % 2 : place;
        return true;
    }
    // The same for the single tile at a position of their order.
    __device__ bool single(int place, int& bh, int& tile) const {
        if (place >= places) return false;
        const bool of_all = place >= above && place < below;
        tile = place < above ? q_tiles - 1 : of_all ? top : low - 1;  // the longest in this range of positions
        place -= place < above ? 0 : of_all ? above : below;
        const int abreast = heads + of_all;
        bh = first + !of_all + place % abreast;
        tile -= place / abreast;
        return true;
    }
};

inline Schedule schedule_of(const AttentionParams& p, int mask_bytes) {
    const int64_t q_tiles = tiles_of(p.Nq, BLOCK_Q), of_head = CAUSAL ? (q_tiles + 1) / 2 : q_tiles, units = of_head * p.H * p.B;
    Schedule schedule = {static_cast<int>(units), static_cast<int>(q_tiles), static_cast<int>(of_head), mask_bytes, INT32_MAX, -1};
    const int64_t blocks = std::min<int64_t>(units, p.sm_count), rounds = units / blocks;
    // With few different lengths, single tiles balance no better than pairs.
    if (!CAUSAL || (SCORE & SCORE_BIAS) || q_tiles < 8 || units % blocks == 0) return schedule;
    // Single tiles replace the pairs that do not fill a round, and up to two rounds before: the more there are, the shorter are the last ones. But their
    // heads are all read at the same time. So they should fit in the L2 cache, unless they are so few that many blocks read the same keys together.
    const int64_t bytes_of_head = p.Nk * int64_t{2 * (HEAD_DIM + V_HEAD_DIM)} * p.Hkv / p.H;
    int64_t more = std::min<int64_t>(2, rounds);
    for (; more > 0; --more) {
        const int64_t tail_heads = (units % blocks + more * blocks) / of_head;
        if (tail_heads <= 8 || tail_heads * bytes_of_head <= 36 << 20) break;
    }
    const int64_t unit = (rounds - more) * blocks, place = unit % of_head;
    schedule.paired = static_cast<int>(2 * (rounds - more));
    schedule.first = static_cast<int>(unit / of_head);
    schedule.heads = p.H * p.B - 1 - schedule.first;
    schedule.top = static_cast<int>(q_tiles - 1 - place);
    schedule.low = static_cast<int>(std::max<int64_t>(0, place - q_tiles % 2));
    schedule.above = static_cast<int>(place) * schedule.heads;
    schedule.below = schedule.above + (schedule.top - schedule.low + 1) * (schedule.heads + 1);
    schedule.places = schedule.below + schedule.low * schedule.heads;
    return schedule;
}

#if LISTED
// The number of tiles of keys that a tile of Q visits.
struct QueryTileLength {
    static constexpr bool SAYS_MOST = true, SAYS_WORTH = false;
    SeenTiles seen;
    int lines;

    __device__ void measure(const AttentionParams& p) const {
        seen.measure(lines, [&](int tile) { return Interval{0, tiles_seen(p, tile * BLOCK_Q, BLOCK_Q)}; });
    }
    __device__ int most(const AttentionParams& p, int unit) const { return tiles_seen(p, unit % seen.tiles * BLOCK_Q, BLOCK_Q); }
    __device__ int operator()(const AttentionParams& p, int unit) const {
        const int bh = unit / seen.tiles;
        return seen.length(p, bh / p.H, bh % p.H, unit % seen.tiles);
    }
};

inline int64_t floats_of_schedule(const AttentionParams& p) {
    const int64_t q_tiles = tiles_of(p.Nq, BLOCK_Q);
    if (!worth_looking(p, BLOCK_Q, BLOCK_K)) return 0;
    return SeenTiles::floats(p, q_tiles, tiles_of(p.Nk, BLOCK_K)) + Order::floats(q_tiles * p.H * p.B);
}

// Launches what computes the tables that the schedule reads.
inline cudaError_t prepare_schedule(Schedule& schedule, const AttentionParams& p) {
    if (!worth_looking(p, BLOCK_Q, BLOCK_K)) return cudaSuccess;
    const int64_t k_tiles = tiles_of(p.Nk, BLOCK_K);
    const int units = p.B * p.H * schedule.q_tiles;
    schedule.seen = SeenTiles(p.workspace, p, schedule.q_tiles, k_tiles);
    schedule.order = Order(p.workspace + SeenTiles::floats(p, schedule.q_tiles, k_tiles));
    return look<BLOCK_Q, BLOCK_K>(p, schedule.seen, QueryTileLength{schedule.seen, static_cast<int>(schedule.seen.lines(p))}, schedule.order, units);
}
#endif
#endif

// The tiles of keys that a work item visits, from the last to the first.
template <bool LEAVES_OUT>
struct Walk {
    __device__ Walk(const AttentionParams&, const Work&) {}
    // First key of the n-th one.
    __device__ int next(const AttentionParams& p, const Schedule&, const Work& work, int n) const { return work.j0(p, n); }
};
#if LISTED
template <>
struct Walk<true> {
    int tile;       // the tiles before this one remain
    uint32_t word;  // one bit for each remaining tile of the chunk that is visited

    __device__ Walk(const AttentionParams& p, const Work& work) : tile(tiles_seen(p, work.i0, BLOCK_Q)), word(0) {}
    __device__ int next(const AttentionParams& p, const Schedule& schedule, const Work& work, int) {
        while (word == 0) {
            const int chunk = (tile - 1) / 32;
            word = schedule.seen.word(p, work.b, work.h, work.i0 / BLOCK_Q, chunk) & first_bits(tile - 32 * chunk);
            tile = 32 * chunk;
        }
        const int bit = 31 - __clz(word);
        word ^= 1u << bit;
        return (tile + bit) * BLOCK_K;
    }
};
#endif

// Whether consumers need to know which tile of keys has arrived. Where tiles are skipped, the producer tells them.
constexpr bool TELLS = CAUSAL || DROPOUT || SLOPED || BLOCK_K < BIT_COLUMNS;

// What the threads of a block share: tiles, barriers, and the work item of each tile of Q. An item without keys ends the loop.
struct Shared {
    uint32_t Q;     // Q_STAGES × [BLOCK_Q, HEAD_DIM]
    uint32_t K;     // STAGES × [BLOCK_K, HEAD_DIM]
    uint32_t V;     // STAGES × [BLOCK_K, V_HEAD_DIM]
    uint32_t O;     // [BLOCK_Q, 64 · O_PANELS]
    uint32_t bias;  // 4 · CONSUMERS × [16, BLOCK_K]
    uint8_t* mask;  // STAGES × [BLOCK_Q] BitRow
    Barriers& barriers;
    Work* works;    // [Q_STAGES]; then what the producer has next
    int* j0;        // [STAGES]: the first key of each tile, where the mask lets tiles be skipped

    __device__ Shared(uint8_t* smem, Barriers& barriers, Work* works, int* j0)
        : Q(ptx::smem_address(smem)),
          K(Q + Q_STAGES * Tile_Q::BYTES),
          V(K + STAGES * Tile_K::BYTES),
          O(V + STAGES * Tile_V::BYTES),
          bias(O + Tile_O::BYTES),
          mask(smem + SMEM_BYTES - STAGES * MASK_BYTES),
          barriers(barriers),
          works(works),
          j0(j0) {}

    // A copy whose values the compiler knows nothing about, for a second instance of the consumers' loop: values that it knew to be equal in both
// instances would stay in registers around both.
    __device__ Shared unknown() const {
        Shared other = *this;
        other.Q = ptx::unknown(Q), other.K = ptx::unknown(K), other.V = ptx::unknown(V), other.O = ptx::unknown(O);
        return other;
    }
};

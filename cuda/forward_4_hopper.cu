// Forward with Hopper's own instructions: FlashAttention-3 (Shah et al., 2024, arXiv:2407.08608), Algorithms 1 and 2.  sm_90a.
//
// The idea: three things that wait for each other least. One warp does nothing but copy: it asks for whole tiles of K and V, which arrive in
// shared memory without passing through a register. Groups of four warps ("warpgroups") compute; their matrix products (wgmma) read tiles
// straight from shared memory and run on while the group's other instructions do. So a group has three kinds of work under way: S of this tile,
// O of the tile before, and, while those run, its softmax; and while one group is at its exponentials, another has the tensor cores. A block takes
// one tile of Q after another, and the next one's S is under way while the last one's O leaves, which the copy engine does too.
//
// Change from forward_3e_ping_pong.cu: a block stays and takes one tile of Q after another; S and O of one group are under way together, under its
// softmax; O leaves by the copy engine; masks and dropout. Serves everything in the interface for float16 and bfloat16, head sizes up to 256 that are
// multiples of 8, positive scale.
#include <algorithm>

#include "keep_bits.cuh"
#include "longest_first.cuh"
#include "mask_start.cuh"
#include "ptx_hopper.cuh"
#include "swizzle.cuh"
#include "tensor_core.cuh"
#include "tensor_map.cuh"

#if DTYPE == FLOAT32 || (MASK && MASK != MASK_OF_BITS)
#error "this rung computes in 16-bit types, under masks of bits"
#endif

// ---- tile sizes. A warpgroup owns 64 rows of Q, and has as many registers as the block leaves it.
constexpr int GROUP = 128;  // threads
constexpr int CONSUMERS = HEAD_DIM <= 64 && !DROPOUT && !INTERVAL ? 3 : 2;  // dropout, two words at a time, takes the registers that three leave
constexpr int THREADS = GROUP * (1 + CONSUMERS);
// Registers of a thread: as many for all at the start; then the producer's group gives back what the others take.
constexpr int REGISTERS = 65536 / THREADS / 8 * 8;
constexpr int PRODUCER_REGISTERS = CONSUMERS == 3 ? 32 : 40;
constexpr int CONSUMER_REGISTERS = CONSUMERS == 3 ? 160 : 232;
static_assert(CONSUMERS * (CONSUMER_REGISTERS - REGISTERS) <= REGISTERS - PRODUCER_REGISTERS, "a group would wait for registers for ever");
constexpr int BLOCK_Q = 64 * CONSUMERS;
// As many keys as the registers beside O allow; above 128, as shared memory allows. A masked tile's bits lie in one BitRow, so there it divides 128.
constexpr int BLOCK_K = HEAD_DIM <= 128 ? 128 : HEAD_DIM > 192 || MASK ? 64 : V_HEAD_DIM <= 128 ? 128 : 96;
constexpr int STAGES = 2;                                 // pairs of K and V tiles in shared memory
constexpr int Q_STAGES = HEAD_DIM <= 128 ? 2 : 1;         // tiles of Q
constexpr bool AHEAD = Q_STAGES > 1;                      // the next Q arrives while this one is still in use
constexpr int V_PANELS = (V_HEAD_DIM + 63) / 64;          // of 64 columns of V and O; the last may be filled up with zeros
constexpr int O_PANELS = V_PANELS % 2 == 0 && HEAD_DIM == V_HEAD_DIM && !MASK ? 2 : 1;  // that leave together
static_assert(HEAD_DIM % 16 == 0 && V_HEAD_DIM % 16 == 0, "a product takes 16 columns of Q and K at a time, a store 16 of O");
// A group skips tiles of keys that only rows of other groups see. Two groups have next to none, and under a mask registers do not suffice.
constexpr bool SKIPS = CONSUMERS > 2 && !MASK && !INTERVAL;

using Tile_Q = SwizzledTile<BLOCK_Q, HEAD_DIM>;
using Tile_K = SwizzledTile<BLOCK_K, HEAD_DIM>;
using Tile_V = SwizzledTile<BLOCK_K, V_HEAD_DIM>;
using Tile_O = SwizzledTile<BLOCK_Q, 64 * O_PANELS>;
constexpr int O_ROWS = std::min(16, BOX_ROWS<Tile_O, RowOrder>);  // of a box of O: a warp's at most
constexpr int MASK_BYTES = MASK ? BLOCK_Q * static_cast<int>(sizeof(BitRow)) : 0;
constexpr int SMEM_BYTES = Q_STAGES * Tile_Q::BYTES + STAGES * (Tile_K::BYTES + Tile_V::BYTES + MASK_BYTES) + Tile_O::BYTES;
static_assert(SMEM_BYTES <= SMEM_KB * 1024 - 1024, "choose smaller tiles");

struct Maps {
    CUtensorMap q, k, v, o, mask;
};

// "full": the bytes have arrived, with those of K the mask's. "empty": the computing warps are done with them.
struct Barriers {
    uint64_t Q_full[Q_STAGES], Q_empty[Q_STAGES], K_full[STAGES], K_empty[STAGES], V_full[STAGES], V_empty[STAGES];
};

// ---- who computes what. A block stays on its multiprocessor and takes one work after another.

// A tile of Q, against the tiles of keys that it sees, from the last to the first, since those that are cut come last.
struct Work {
    int i0, h, b;  // first row, query head, batch
    int k_tiles;
#if INTERVAL
    int first_tile;
    Interval all;  // that every row sees

    __device__ int j0(int n) const { return (first_tile + k_tiles - 1 - n) * BLOCK_K; }
#else
    // First key of the n-th tile.
    __device__ int j0(int n) const { return (k_tiles - 1 - n) * BLOCK_K; }
#endif
};

// Where the LSE of row i of the work's head is kept.
__device__ inline float& LSE_of(const AttentionParams& p, const Work& work, int i) {
    return p.lse[(static_cast<int64_t>(work.b) * p.H + work.h) * p.Nq + i];
}

// Of the tiles of keys, from the first, those that some of `rows` rows from i0 on see. Tiles beyond are never visited.
__device__ inline int tiles_seen(const AttentionParams& p, int i0, int rows) {
    const int columns = i0 >= p.Nq ? 0 : CAUSAL ? max(0, stop_of_rows(p, i0, rows)) : p.Nk;
    return (columns + BLOCK_K - 1) / BLOCK_K;
}

#if INTERVAL
// How the tiles of Q are dealt out to blocks. With spans, from a queue, the longest first (longest_first.cuh). With a window alone most are equally long,
// and only a head's first ones are shorter: those of all heads come last, and fill what the others leave.
struct Schedule {
    int units, q_tiles;
    int short_tiles;  // of a head, that see fewer columns than the others
    int mask_bytes;   // that come with a tile of K; the producer has no registers left to find it out
    Order order;

    // The block's m-th work. False if there are not so many.
    __device__ bool take(const AttentionParams& p, int m, Work& work) const {
        int unit = p.seen.spans == nullptr ? m * gridDim.x + blockIdx.x : order.take(units);
        if (unit >= units) return false;
        if (p.seen.spans == nullptr) unit = placed(p, unit);
        work = work_of(p, unit);
        return true;
    }
    // That of a unit: of all heads one after another.
    __device__ Work work_of(const AttentionParams& p, int unit) const {
        const int bh = unit / q_tiles, i0 = unit % q_tiles * BLOCK_Q;
        const Bounds seen = bounds_of_rows(p, reinterpret_cast<const Bounds*>(p.workspace), unit, i0, BLOCK_Q);
        const int first_tile = seen.some.start / BLOCK_K;
        return {i0, bh % p.H, bh / p.H, max(0, (seen.some.stop + BLOCK_K - 1) / BLOCK_K - first_tile), first_tile, seen.all};
    }

private:
    // The unit at a place of a window's order: each head from its last tile down, then the short ones, the longest first.
    __device__ int placed(const AttentionParams& p, int place) const {
        const int heads = units / q_tiles, long_tiles = q_tiles - short_tiles;
        if (place < heads * long_tiles) return place / long_tiles * q_tiles + q_tiles - 1 - place % long_tiles;
        place -= heads * long_tiles;
        return place % heads * q_tiles + short_tiles - 1 - place / heads;
    }
};

// A tile of Q visits so many tiles of keys.
struct QueryTileLength {
    __device__ int operator()(const AttentionParams& p, int unit) const {
        const Interval some = reinterpret_cast<const Bounds*>(p.workspace)[unit].some;
        return (some.stop + BLOCK_K - 1) / BLOCK_K - some.start / BLOCK_K;
    }
};

inline Order order_of(const AttentionParams& p) { return Order(p.workspace + whole_chunks(Summaries::floats(p, BLOCK_Q, 1, false))); }

inline Schedule schedule_of(const AttentionParams& p, int mask_bytes) {
    const int q_tiles = static_cast<int>(tiles_of(p.Nq, BLOCK_Q));
    // The first row that sees as many columns before its own as the window has: those before see fewer.
    const int64_t full_row = p.seen.left < 0 ? 0 : int64_t{p.seen.left} - p.seen.diagonal;
    const int short_tiles = static_cast<int>(std::clamp<int64_t>(full_row, 0, p.Nq) / BLOCK_Q);
    return {q_tiles * p.H * p.B, q_tiles, short_tiles, mask_bytes, order_of(p)};
}

// What the schedule reads, put on the stream.
inline cudaError_t prepare_schedule(const Schedule& schedule, const AttentionParams& p) {
    cudaError_t error = summarise(p, p.workspace, BLOCK_Q, 0);
    if (error == cudaSuccess && p.seen.spans != nullptr) error = put_longest_first(p, QueryTileLength{}, schedule.order, schedule.units, p.sm_count);
    return error;
}
#else
// How the tiles of Q are dealt out to blocks: units, head by head, so that at any time few heads' K and V are read. A unit is a tile, or causal a pair,
// one from the end of the sequence and its mirror image from the start: nearly all pairs are equally long.
struct Schedule {
    int units;
    int q_tiles, of_head;  // of one head: tiles, units
    int mask_bytes;        // that come with a tile of K; the producer has no registers left to find it out

    // The block's m-th work. False if there are not so many.
    __device__ bool deal(const AttentionParams& p, int m, Work& work) const {
        const int blocks = gridDim.x, unit = (CAUSAL ? m / 2 : m) * blocks + blockIdx.x;
        if (unit >= units) return false;
        const int bh = unit / of_head, first = bh * of_head;
        // Turned by one place a round: where a head has 2, 3 or 4, a block would otherwise have the same one of every head, and some are shorter.
        const int place = (unit + first / blocks) % of_head;
        const bool from_end = CAUSAL && m % 2 == 0;
        // The middle one of an odd number of tiles is its own mirror image: the second time there is nothing to do.
        const bool again = CAUSAL && m % 2 && 2 * place + 1 == q_tiles;
        const int i0 = again ? p.Nq : (from_end ? q_tiles - 1 - place : place) * BLOCK_Q;
        work = {i0, bh % p.H, bh / p.H, tiles_seen(p, i0, BLOCK_Q)};
        return true;
    }
};
#endif

using Slot_Q = Slot<Q_STAGES>;
using Slot_KV = Slot<STAGES>;

__global__ void __launch_bounds__(THREADS, 1)
    forward_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Maps maps, const __grid_constant__ Schedule schedule) {
    extern __shared__ __align__(1024) uint8_t smem[];
    __shared__ __align__(8) Barriers barriers;
    __shared__ Work works[Q_STAGES];  // what each Q is for. One without keys says that there is no more.
    const uint32_t Q_smem = ptx::smem_address(smem);               // Q_STAGES × [BLOCK_Q, HEAD_DIM]
    const uint32_t K_smem = Q_smem + Q_STAGES * Tile_Q::BYTES;     // STAGES × [BLOCK_K, HEAD_DIM]
    const uint32_t V_smem = K_smem + STAGES * Tile_K::BYTES;       // STAGES × [BLOCK_K, V_HEAD_DIM]
    const uint32_t O_smem = V_smem + STAGES * Tile_V::BYTES;       // [BLOCK_Q, 64 · O_PANELS]
    uint8_t* mask_smem = smem + SMEM_BYTES - STAGES * MASK_BYTES;  // STAGES × [BLOCK_Q] BitRow
    auto barrier = [](uint64_t* of, int stage) { return ptx::smem_address(of + stage); };

    if (threadIdx.x == 0) {
        for (int stage = 0; stage < Q_STAGES; ++stage) {
            ptx::mbarrier_init(barrier(barriers.Q_full, stage), 1);
            ptx::mbarrier_init(barrier(barriers.Q_empty, stage), GROUP * CONSUMERS);
        }
        for (int stage = 0; stage < STAGES; ++stage) {
            ptx::mbarrier_init(barrier(barriers.K_full, stage), 1);
            ptx::mbarrier_init(barrier(barriers.V_full, stage), 1);
            ptx::mbarrier_init(barrier(barriers.K_empty, stage), 4 * CONSUMERS);
            ptx::mbarrier_init(barrier(barriers.V_empty, stage), 4 * CONSUMERS);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();

    const int group = uniform(threadIdx.x / GROUP);
    if (group == 0) {
        ptx::setmaxnreg_dec<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) {
            // ---- the producer: one thread hands out works and asks for every tile, in the order in which their places become empty
            int m = 0, q = 0, n = 0;  // of all works, tiles of Q, tiles of keys
            auto next_with_keys = [&] {
                Work work;
#if INTERVAL
                while (schedule.take(p, m++, work))
#else
                while (schedule.deal(p, m++, work))
#endif
                    if (work.k_tiles > 0) return work;
                return Work{};
            };
            // A wait for "empty" passes at once in a place's first round.
            auto hand_out = [&](const Work& work) {
                const Slot_Q slot(q++);
                const uint32_t full = barrier(barriers.Q_full, slot.stage);
                ptx::mbarrier_wait(barrier(barriers.Q_empty, slot.stage), slot.parity ^ 1);
                works[slot.stage] = work;  // seen by those who have waited for "full"
                if (work.k_tiles == 0) return ptx::mbarrier_arrive(full);
                ptx::mbarrier_arrive_expect_tx(full, Tile_Q::BYTES);
                load_boxes<Tile_Q, RowOrder>(Q_smem + slot.stage * Tile_Q::BYTES, maps.q, work.i0, work.h, work.b, full);
            };
            struct Keys {
                int j0, kv_h, b;
            };
            auto load = [&](auto tile, const Slot_KV& slot, uint32_t tiles, const CUtensorMap& map, uint64_t* full, uint64_t* empty, const Keys& keys,
                            int more_bytes) {
                using Tile = decltype(tile);
                ptx::mbarrier_wait(barrier(empty, slot.stage), slot.parity ^ 1);
                ptx::mbarrier_arrive_expect_tx(barrier(full, slot.stage), Tile::BYTES + more_bytes);
#pragma unroll
                for (int panel = 0; panel < Tile::PANELS; ++panel)
                    ptx::cp_async_bulk_tensor_4d(tiles + slot.stage * Tile::BYTES + panel * Tile::PANEL_BYTES, &map, panel * 64, keys.j0, keys.kv_h, keys.b,
                                                 barrier(full, slot.stage));
            };
            Keys keys{}, before;  // V is asked for a tile later than K: it is needed later, and its place is in use for longer
            auto load_V = [&] { load(Tile_V(), Slot_KV(n - 1), V_smem, maps.v, barriers.V_full, barriers.V_empty, before, 0); };
            Work work = next_with_keys();
            if (AHEAD) hand_out(work);
            while (work.k_tiles > 0) {
                const Work next = next_with_keys();
                for (int tile = 0; tile < work.k_tiles; ++tile, ++n) {
                    const Slot_KV slot(n);
                    before = keys, keys = {work.j0(tile), kv_head(p, work.h), work.b};
                    load(Tile_K(), slot, K_smem, maps.k, barriers.K_full, barriers.K_empty, keys, MASK ? schedule.mask_bytes : 0);
                    if (MASK)
                        ptx::cp_async_bulk_tensor_4d(ptx::smem_address(mask_smem + slot.stage * MASK_BYTES), &maps.mask, keys.j0 / BIT_COLUMNS * 4, work.i0,
                                                     work.h, work.b, barrier(barriers.K_full, slot.stage));
                    if (n > 0) load_V();
                    if (AHEAD && tile + 1 == work.k_tiles) hand_out(next);
                    if (!AHEAD && tile == 0) hand_out(work);
                }
                work = next;
            }
            before = keys;
            if (n > 0) load_V();
            if (!AHEAD) hand_out(work);
        } else if (threadIdx.x / 32 == 1) {
            // ---- another warp, otherwise idle: works without keys, whose O is 0
#if INTERVAL
            for (int unit = blockIdx.x; unit < schedule.units; unit += gridDim.x) {
                const Work work = schedule.work_of(p, unit);
#else
            Work work;
            for (int m = 0; schedule.deal(p, m, work); ++m) {
#endif
                for (int i = work.i0; work.k_tiles == 0 && i < min(p.Nq, work.i0 + BLOCK_Q); ++i) {
                    element* O = head_of(p.o, work.b, work.h) + i * p.o.stride_n;
                    for (int d = threadIdx.x % 32; d < p.Dv; d += 32) O[d] = element(0.0f);
                    if (p.lse && threadIdx.x % 32 == 0) LSE_of(p, work, i) = -CUDART_INF_F;
                }
            }
        }
    } else {
        // ---- the consumers: 64 rows each
        ptx::setmaxnreg_inc<CONSUMER_REGISTERS>();
        const int consumer = group - 1, lane = threadIdx.x % 32, t = lane % 4;
        // Of the tile, this thread has the rows at two places 8 apart: first_row and first_row + ROW_STEP.
        const int first_row = RowOrder::row((threadIdx.x - GROUP) / 32 * 16 + lane / 4);
        const int offset = diagonal(p);             // causal: row i sees columns j ≤ i + offset
        const float scale_log2 = p.scale * LOG2_E;  // exp(scale · x) = 2^(scale_log2 · x)

        float O_rmem[V_HEAD_DIM / 2];  // not yet divided by l
        float S_rmem[BLOCK_K / 2];
        uint32_t P_rmem[BLOCK_K / 16][4];
        float m_rmem[2], l_rmem[2], alpha[2];  // l is this lane's share of the sum

        // One lane of every warp arrives at an "empty" barrier, once its products that read the tile are over.
        auto release = [&](uint64_t* empty, int stage) {
            if (lane == 0) ptx::mbarrier_arrive(barrier(empty, stage));
        };
        // Q's by every thread, since every one has read which work it is for.
        auto release_Q = [&](const Slot_Q& slot) { ptx::mbarrier_arrive(barrier(barriers.Q_empty, slot.stage)); };
        // How many of the tile's columns, from its first, a row sees: r as in first_row + ROW_STEP·r.
        [[maybe_unused]] auto visible = [&](int i0, int j0, int r) { return (CAUSAL ? min(p.Nk, i0 + first_row + ROW_STEP * r + offset + 1) : p.Nk) - j0; };
        // Whether some row does not see the whole tile.
#if INTERVAL
        auto cut = [&](const Work& work, int j0) { return j0 < work.all.start || j0 + BLOCK_K > work.all.stop; };
        // Columns of the tile, from its first, of which row r sees those from the start on, before the stop.
        auto interval = [&](const Work& work, int j0, int r) {
            const Interval keys = keys_of_row(p, work.b, work.h, work.i0 + first_row + ROW_STEP * r);
            return Interval{keys.start - j0, keys.stop - j0};
        };
        // How many of a lane's columns, 0, 1, 8, 9, 16 … from its first, lie before this one.
        [[maybe_unused]] auto of_lane = [](int column) { return column <= 0 ? 0 : column / 8 * 2 + min(column % 8, 2); };
#else
        auto cut = [&](const Work& work, int j0) { return j0 + BLOCK_K > min(p.Nk, CAUSAL ? work.i0 + offset + 1 : p.Nk); };
#endif

        // Waits for K, and for the mask, from which S's sums start.
        auto await_K = [&](const Slot_KV& slot, const Work& work, int j0) {
            ptx::mbarrier_wait(barrier(barriers.K_full, slot.stage), slot.parity);
#if MASK
            const bool edge = LIMITED && cut(work, j0);
            const bool shared = one_row(p);
            start_S<BLOCK_K>(S_rmem, mask_smem + slot.stage * MASK_BYTES, j0 % BIT_COLUMNS, shared ? 0 : first_row, shared ? 0 : ROW_STEP, t,
#if INTERVAL
                             [&](int r, int w) {
                                 if (!edge) return 0u;
                                 const Interval keys = interval(work, j0, r);
                                 return ~first_bits(keys.stop - 32 * w) | first_bits(keys.start - 32 * w);
                             });
#else
                             [&](int r, int w) { return edge ? ~first_bits(visible(work.i0, j0, r) - 32 * w) : 0; });
#endif
#endif
        };
        // S = Q Kᵀ, under way.
        auto multiply_QK = [&](const Slot_Q& slot_Q, const Slot_KV& slot) {
            // Uniform, because a descriptor belongs in registers that the warp shares.
            const uint64_t Q_rows = ptx::descriptor(uniform(Q_smem + slot_Q.stage * Tile_Q::BYTES + consumer * 64 * ROW_BYTES));
            const uint64_t K_tile = ptx::descriptor(uniform(K_smem + slot.stage * Tile_K::BYTES));
            ptx::wgmma_fence();
#pragma unroll
            for (int d = 0; d < HEAD_DIM / 16; ++d)
                ptx::wgmma_ss<element, BLOCK_K>(S_rmem, ptx::advance(Q_rows, d / 4 * Tile_Q::PANEL_BYTES + d % 4 * 32),
                                                ptx::advance(K_tile, d / 4 * Tile_K::PANEL_BYTES + d % 4 * 32), MASK || d > 0);
            ptx::wgmma_commit_group();
        };
        // O += P V, under way. Every descriptor is made anew: advanced by an addition, as above, D 64 is 2 – 3 % slower.
        auto multiply_PV = [&](const Slot_KV& slot) {
            const uint32_t V_tile = uniform(V_smem + slot.stage * Tile_V::BYTES);
            ptx::wgmma_fence();
#pragma unroll
            for (int k = 0; k < BLOCK_K / 16; ++k)
                ptx::wgmma_rs<element, V_HEAD_DIM>(O_rmem, P_rmem[k], ptx::descriptor(V_tile + k * 16 * ROW_BYTES, Tile_V::PANEL_BYTES));
            ptx::wgmma_commit_group();
        };
        // S becomes 2^(scale_log2 · (S − m)); alpha is what O must be multiplied by.
        auto softmax = [&](const Work& work, int j0) {
            if (!MASK && cut(work, j0)) {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
#if INTERVAL
                    const Interval keys = interval(work, j0, r);
                    // A bit for each of this lane's columns, in their order: tested seven at a time, which two limits would not be.
                    const uint32_t seen = first_bits(of_lane(keys.stop - 2 * t)) & ~first_bits(of_lane(keys.start - 2 * t));
#pragma unroll
                    for (int n = 0; n < BLOCK_K / 4; ++n)
                        if (!(seen >> n & 1)) S_rmem[n / 2 * 4 + 2 * r + n % 2] = -CUDART_INF_F;
#else
                    const int columns = visible(work.i0, j0, r) - 2 * t;  // from this lane's first
#pragma unroll
                    for (int i = 0; i < BLOCK_K / 8; ++i)
#pragma unroll
                        for (int c = 0; c < 2; ++c)
                            if (8 * i + c >= columns) S_rmem[4 * i + 2 * r + c] = -CUDART_INF_F;
#endif
                }
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float m_new = m_rmem[r];
#pragma unroll
                for (int i = 0; i < BLOCK_K / 8; ++i) m_new = fmaxf(m_new, fmaxf(S_rmem[4 * i + 2 * r], S_rmem[4 * i + 2 * r + 1]));
                m_new = fmaxf(m_new, __shfl_xor_sync(0xffffffff, m_new, 1));  // the four lanes of a row
                m_new = fmaxf(m_new, __shfl_xor_sync(0xffffffff, m_new, 2));
                alpha[r] = ptx::ex2((m_rmem[r] - m_new) * scale_log2);
                m_rmem[r] = m_new;
                const float m_log2 = m_new * scale_log2;
                float sum = 0;
#pragma unroll
                for (int i = 0; i < BLOCK_K / 8; ++i)
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        float& x = S_rmem[4 * i + 2 * r + c];
                        x = ptx::ex2(fmaf(x, scale_log2, -m_log2));
                        sum += x;
                    }
                l_rmem[r] = l_rmem[r] * alpha[r] + sum;
            }
        };
        // Draws what dropout keeps of the tile.
        [[maybe_unused]] KeepBits<BLOCK_K> keep;
        auto draw = [&](const Work& work, int j0) {
            if (!DROPOUT) return;
            const int thread = ptx::tid_x() - GROUP;  // read anew, so that what follows from it takes no registers meanwhile
            const int row = RowOrder::row(thread / 32 * 16 + thread % 32 / 4);
            keep.draw_rows(p, work.b, work.h, work.i0 + row, j0, thread % 32);
        };
        // The accumulators of S, in pairs, are the A operand of O += P V as they lie.
        auto round_P = [&] {
#pragma unroll
            for (int k = 0; k < BLOCK_K / 16; ++k)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    P_rmem[k][e] = ptx::cvt_pair<element>(S_rmem[8 * k + 2 * e], S_rmem[8 * k + 2 * e + 1]);
                    if (DROPOUT) P_rmem[k][e] &= keep.pair(e % 2, 2 * k + e / 2);
                }
        };
        // Groups issue products in turns, so that one is at its exponentials while another's products run.
        auto my_turn = [&] { ptx::bar_sync(1 + consumer, 2 * GROUP); };
        auto your_turn = [&](int next) { ptx::bar_arrive(1 + next, 2 * GROUP); };

        int q = 0, n = 0;  // of all tiles of Q, of keys
        // The next work, once its Q is there.
        auto take = [&] {
            const Slot_Q slot(q);
            ptx::mbarrier_wait(barrier(barriers.Q_full, slot.stage), slot.parity);
            const Work& work = works[slot.stage];
#if INTERVAL
            return Work{uniform(work.i0),      uniform(work.h),          uniform(work.b),
                        uniform(work.k_tiles), uniform(work.first_tile), {uniform(work.all.start), uniform(work.all.stop)}};
#else
            return Work{uniform(work.i0), uniform(work.h), uniform(work.b), uniform(work.k_tiles)};
#endif
        };
        // How many tiles of keys this group skips. One at least it computes, so that every work goes the same way.
        auto skipped = [&](const Work& work) {
            return SKIPS ? max(0, min(work.k_tiles - 1, work.k_tiles - tiles_seen(p, work.i0 + consumer * 64, 64))) : 0;
        };
        auto skip = [&](int tiles) {
            for (const int end = n + tiles; n < end; ++n) {
                const Slot_KV slot(n);
                ptx::mbarrier_wait(barrier(barriers.K_full, slot.stage), slot.parity);
                __syncwarp();  // all lanes have seen that it came, before it may be replaced
                release(barriers.K_empty, slot.stage);
                my_turn();
                your_turn((consumer + 1) % CONSUMERS);
                ptx::mbarrier_wait(barrier(barriers.V_full, slot.stage), slot.parity);
                __syncwarp();
                release(barriers.V_empty, slot.stage);
            }
        };
        // A work's first S, under way.
        auto multiply_first = [&] {
            my_turn();
            multiply_QK(Slot_Q(q), Slot_KV(n));
            your_turn((consumer + 1) % CONSUMERS);
        };

        if (consumer == CONSUMERS - 1) your_turn(0);
        Work work = take();
        if (work.k_tiles > 0) {
            int tile = skipped(work);
            skip(tile);
            await_K(Slot_KV(n), work, work.j0(tile));
            multiply_first();
            while (true) {
                const Slot_Q slot_Q(q);
                // The first tile has no predecessor whose product could run under its softmax.
                draw(work, work.j0(tile));
                ptx::wgmma_wait_group<0>();
#pragma unroll
                for (int i = 0; i < V_HEAD_DIM / 2; ++i) O_rmem[i] = 0;
                m_rmem[0] = m_rmem[1] = p.lowest, l_rmem[0] = l_rmem[1] = 0;
                release(barriers.K_empty, Slot_KV(n).stage);
                if (tile + 1 == work.k_tiles) release_Q(slot_Q);
                softmax(work, work.j0(tile));
                round_P();
                ++tile, ++n;
                for (; tile < work.k_tiles; ++tile, ++n) {
                    const Slot_KV now(n), before(n - 1);
                    await_K(now, work, work.j0(tile));
                    my_turn();
                    multiply_QK(slot_Q, now);
                    ptx::mbarrier_wait(barrier(barriers.V_full, before.stage), before.parity);
                    multiply_PV(before);
                    your_turn((consumer + 1) % CONSUMERS);
                    draw(work, work.j0(tile));
                    ptx::wgmma_wait_group<1>();  // S is there
                    release(barriers.K_empty, now.stage);
                    if (tile + 1 == work.k_tiles) release_Q(slot_Q);
                    softmax(work, work.j0(tile));
                    // The compiler would put the wait for O before the exponentials that O's product should run under, but moves it over no branch:
                    // the condition, which always holds, gives D 256 15 % and D 128 2 %. At D 64 it costs 2 to 4 %.
                    if (HEAD_DIM == 64 || scale_log2 > 0) {
                        ptx::wgmma_wait_group<0>();
                        // Few tiles raise a maximum.
                        if (HEAD_DIM == 64 || __any_sync(0xffffffff, alpha[0] != 1 || alpha[1] != 1)) {
#pragma unroll
                            for (int i = 0; i < V_HEAD_DIM / 2; ++i) O_rmem[i] *= alpha[i >> 1 & 1];
                        }
                    }
                    ptx::wgmma_wait_group<0>();  // O is there
                    release(barriers.V_empty, before.stage);
                    round_P();
                }
                // The last product, and behind it the next work's first, which runs while O leaves. If there is no more work, it multiplies what lies
                // there, for nobody: the compiler would not let a product be under way on one of two branches.
                ++q;
                const Slot_KV last(n - 1);
                Work next;
                if (AHEAD) {
                    next = take();
                    tile = skipped(next);
                    if (tile == 0 && next.k_tiles > 0) await_K(Slot_KV(n), next, next.j0(0));
                }
                ptx::mbarrier_wait(barrier(barriers.V_full, last.stage), last.parity);
                multiply_PV(last);
                if (AHEAD) {
                    if (tile > 0) {
                        ptx::wgmma_wait_group<0>();
                        release(barriers.V_empty, last.stage);
                        skip(tile);
                        await_K(Slot_KV(n), next, next.j0(tile));
                    }
                    multiply_first();
                }
                ptx::wgmma_wait_group<AHEAD ? 1 : 0>();
                if (!AHEAD || tile == 0) release(barriers.V_empty, last.stage);

                // O /= l, and out through shared memory, each warp its own rows, which the copy engine takes from there.
                float LSE[2], factor[2];
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    float l = l_rmem[r];
                    l += __shfl_xor_sync(0xffffffff, l, 1);
                    l += __shfl_xor_sync(0xffffffff, l, 2);
                    LSE[r] = m_rmem[r] * p.scale + ptx::lg2(l) * LN_2;
                    factor[r] = factor_of_row(p, m_rmem[r], scale_log2, (DROPOUT ? p.keep_scale : 1.0f) * ptx::rcp(l));
                }
                const int warp = uniform(ptx::tid_x() / 32) - 4;  // read anew, so that what follows from it takes no registers meanwhile
                const uint32_t O_rows = O_smem + warp * 16 * ROW_BYTES, O_lane = O_smem + Tile_O::lane_a(warp * 16, lane);
#pragma unroll
                for (int panel = 0; panel < V_PANELS; panel += O_PANELS) {
                    if (lane == 0) ptx::cp_async_bulk_wait_group_read<0>();  // what was there has left
                    __syncwarp();
#pragma unroll
                    for (int k = 0; k < O_PANELS * 4; ++k) {
                        const float* O = O_rmem + 32 * panel + 8 * k;
                        uint32_t pairs[4] = {};  // beyond the last column: nothing in global memory, but the engine reads it
                        if (64 * panel + 16 * k < V_HEAD_DIM)
#pragma unroll
                            for (int e = 0; e < 4; ++e) pairs[e] = ptx::cvt_pair<element>(O[2 * e] * factor[e % 2], O[2 * e + 1] * factor[e % 2]);
                        ptx::stmatrix_x4(Tile_O::step(O_lane, k), pairs);
                    }
                    ptx::fence_proxy_async();  // of what this lane has stored
                    __syncwarp();
                    if (lane == 0) {
#pragma unroll
                        for (int more = 0; more < O_PANELS; ++more)
#pragma unroll
                            for (int row = 0; row < 16; row += O_ROWS)
                                ptx::cp_async_bulk_tensor_4d_store(&maps.o, (panel + more) * 64, work.i0 + RowOrder::row(warp * 16 + row), work.h, work.b,
                                                                   O_rows + more * Tile_O::PANEL_BYTES + row * ROW_BYTES);
                        ptx::cp_async_bulk_commit_group();
                    }
                }
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int i = work.i0 + first_row + ROW_STEP * r;
                    if (p.lse && t == 0 && i < p.Nq) LSE_of(p, work, i) = LSE[r];
                }

                if (!AHEAD) next = take();
                if (next.k_tiles == 0) break;
                if (!AHEAD) {
                    tile = 0;
                    await_K(Slot_KV(n), next, next.j0(0));
                    multiply_first();
                }
                work = next;
            }
            ptx::wgmma_wait_group<0>();
            if (lane == 0) ptx::cp_async_bulk_wait_group_read<0>();  // shared memory is the block's until then
        }
        if (consumer == 0) my_turn();  // meets the last group's last arrival, so that no barrier is left half full
    }
}

#if INTERVAL
extern "C" int64_t workspace_floats(const AttentionParams* params) {
    const AttentionParams& p = *params;
    return p.seen.spans == nullptr ? 0 : order_of(p).units - reinterpret_cast<int*>(p.workspace) + tiles_of(p.Nq, BLOCK_Q) * p.H * p.B;
}
// Only the schedule of a call with spans, in its workspace.
extern "C" int schedule_units(const AttentionParams* params) {
    DeviceGuard guard(params->device);
    return prepare_schedule(schedule_of(*params, 0), *params);
}
#else
extern "C" int64_t workspace_floats(const AttentionParams*) { return 0; }
#endif

extern "C" int attention(const AttentionParams* params) {
    const AttentionParams& p = *params;
    if (p.B == 0 || p.Nq == 0) return cudaSuccess;
    const int64_t q_tiles = tiles_of(p.Nq, BLOCK_Q), of_head = CAUSAL ? (q_tiles + 1) / 2 : q_tiles, units = of_head * p.H * p.B;
    if (!numbers_fit(p, {2 * units})) return cudaErrorInvalidConfiguration;  // the number of a block's next unit, too
    DeviceGuard guard(p.device);
    // Comes first, because it gives a thread that has not yet used the device its context, and making maps does not.
    cudaError_t error = cudaFuncSetAttribute(forward_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SMEM_BYTES);
    Maps maps;
    if (error == cudaSuccess) error = make_tensor_map(&maps.q, p.q, p.B, p.H, p.Nq, p.D, BOX_ROWS<Tile_Q, RowOrder>);
    if (error == cudaSuccess) error = make_tensor_map(&maps.o, p.o, p.B, p.H, p.Nq, p.Dv, O_ROWS);
    if (error == cudaSuccess && p.Nk > 0) error = make_tensor_map(&maps.k, p.k, p.B, p.Hkv, p.Nk, p.D, BLOCK_K);
    if (error == cudaSuccess && p.Nk > 0) error = make_tensor_map(&maps.v, p.v, p.B, p.Hkv, p.Nk, p.Dv, BLOCK_K);
    if (error == cudaSuccess && p.Nk > 0 && MASK) error = make_mask_map(&maps.mask, p, BLOCK_Q);
    const int mask_bytes = !MASK ? 0 : one_row(p) ? static_cast<int>(sizeof(BitRow)) : MASK_BYTES;
#if INTERVAL
    const Schedule schedule = schedule_of(p, mask_bytes);
    if (error == cudaSuccess) error = prepare_schedule(schedule, p);
#else
    const Schedule schedule = {static_cast<int>(units), static_cast<int>(q_tiles), static_cast<int>(of_head), mask_bytes};
#endif
    if (error != cudaSuccess) return error;
    const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(units, p.sm_count));
    launch_kernel(forward_kernel, blocks, THREADS, SMEM_BYTES, p.stream, p, maps, schedule);
    return cudaGetLastError();
}

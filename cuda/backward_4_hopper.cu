// Backward with Hopper's own instructions: FlashAttention-3 (Shah et al., 2024, arXiv:2407.08608), Algorithm 3.  sm_90a.
//
// The idea: as in forward_4_hopper.cu, one thread copies tiles of Q and dO while two warpgroups compute. A warpgroup owns 64 keys: Sᵀ = K Qᵀ and
// dPᵀ = V dOᵀ leave it with 64 rows of Pᵀ and dSᵀ, which in registers are already the A operands of dV += Pᵀ dO and dK += dSᵀ Q. Only dS goes
// through shared memory, for dQ = dS K, which sums over the keys of both groups. dQ is added up in global memory, as in backward_3_tensor_core.cu.
//
// A group issues no product while it issues its additions to dQ, so these should begin early, while products are in flight. Up to 64 columns a tile's
// dQ is computed between its dV and its dK, and the groups synchronise in each tile. Above 64, if registers suffice, a group computes dQ of the
// previous tile, whose dS has long been complete, before this tile's dV and dK, and adds it while those two run. Then a group waits for the other only
// if that is a whole tile behind.
//
// In plain calls the idle warps of the loading group round and store dQ of earlier heads, and their memory is used again (backward_hopper_slots.cuh).
//
// With intervals alone, blocks are persistent: a unit of work is a tile of keys, and while one is computed, the next one's K and V arrive. Tiles of Q flow
// through the same ring from one unit to the next; the message beside each tile says which unit it belongs to. The copy engine stores a unit's dK and dV while
// the next unit is computed.
//
// With intervals alone, and under a mask, blocks count the units of each head that have added to dQ, so that the kernel after this one can round dQ of
// complete heads as soon as some multiprocessors have no more work. In wide heads the first block that has something to add to a tile of dQ stores it instead
// (backward_hopper_claims.cuh).
//
// Serves float16 and bfloat16, everything in the interface, positive scale; head sizes up to 128 that are multiples of 8.
//
// One file because its kernel is one schedule; what the three hopper backwards share is in backward_hopper.cuh.
#include "common.cuh"

// Whether dQ is computed one tile late. With a mask, and with most changes of scores, there are too few registers.
#if HEAD_DIM > 64 && !MASK && \
    (!SCORE || (!DROPOUT && !INTERVAL && (SCORE == SCORE_ALIBI || SCORE == SCORE_BIAS || (SCORE == SCORE_SOFTCAP && !CAUSAL))))
#define DQ_LATE 1
#else
#define DQ_LATE 0
#endif

// Whether a block takes one unit after another. Not with other features: shared memory has no room for a second K and V, or registers do not suffice.
#define PERSISTENT (INTERVAL && !MASK && !SCORE && !DROPOUT)
// Whether the kernel after this one rounds dQ of complete heads while others are computed: where this kernel does not, and some blocks end early.
#define COUNTS_UNITS (PERSISTENT || LISTED)
#define COPIES_TILES LISTED
// Whether the first block that has something to add to a tile of dQ stores it; under a mask only where that leaves out tiles. Then nobody writes zeros before,
// 4 bytes an element, and nobody reads them. In small heads blocks would be slower, or have too few registers.
#define STORES_FIRST (COUNTS_UNITS && HEAD_DIM > 64)
constexpr int BLOCK_K = 128;                        // 64 for each of two groups
// The accumulators of Sᵀ, dPᵀ, dK and dV share a thread's registers with the values that intervals and the hook for scores need.
constexpr bool FEW_REGISTERS = (INTERVAL && !PERSISTENT) || (SCORE && (MASK || DROPOUT || (SCORE != SCORE_SOFTCAP && SCORE != SCORE_ALIBI)));
constexpr int BLOCK_Q = HEAD_DIM <= 64 && !FEW_REGISTERS ? 128 : 64;
constexpr int CONSUMERS = 2, HALVES = 1;
static_assert(HEAD_DIM <= 128 && HEAD_DIM % 16 == 0 && V_HEAD_DIM == HEAD_DIM, "wider heads: backward_4_hopper_wide.cu");
// Not with other features: the idle warps' registers would spill.
#define FINISHES_DQ (!MASK && !INTERVAL && !SCORE && !DROPOUT)
#include "backward_hopper.cuh"

constexpr int N_TILES = BLOCK_Q / 8;
// Addresses are computed before the waits for what they address, not after. Elsewhere the compiler's own order is up to 6 % faster.
constexpr bool EARLY = !MASK && !SCORE && !DROPOUT;
// Plain calls are 1 to 3 % faster with signed arithmetic, others slower.
using ThreadNumber = std::conditional_t<FINISHES_DQ, int, unsigned>;
// dS in shared memory: its rows are queries, as dQ = dS K reads them. In wide heads its rows are keys instead under a mask, which is 5 % faster there, and
// where the hook for scores leaves no registers for the first layout.
constexpr bool DS_BY_KEYS = HEAD_DIM > 64 && (MASK || SCORE == (SCORE_SOFTCAP | SCORE_BIAS | SCORE_ALIBI));
using Tile_dS = std::conditional_t<DS_BY_KEYS, SwizzledTile<BLOCK_K, BLOCK_Q>, SwizzledTile<BLOCK_Q, BLOCK_K>>;
// Causal, with intervals, and where a mask leaves out tiles, one group adds its part of dQ before it issues dK, the other group after: one adds while the
// other multiplies. Not when blocks take turns.
constexpr bool ALTERNATES = (CAUSAL || INTERVAL) && !DQ_LATE && !MASK && !DROPOUT && !SCORE;
// Whether blocks that need not take turns have a kernel of their own, without the code for turns.
constexpr bool ANY_ORDER_APART = ALTERNATES || PERSISTENT;
// A group computes 64 rows of dQ, or, if a tile has only 64 rows, half of the columns; columns beyond the head's last are 0.
constexpr bool BY_ROWS = BLOCK_Q == 128;
constexpr int COLUMNS = BY_ROWS || HEAD_DIM > 64 ? 64 : 32;
constexpr int SEEN_BYTES = INTERVAL ? BLOCK_Q * static_cast<int>(sizeof(uint2)) : 0;  // the interval that each row sees
using Tile_bias = SwizzledTile<BLOCK_Q, BLOCK_K>;
constexpr int BIAS_BYTES = BIASED ? Tile_bias::BYTES : 0;
#include "backward_hopper_bias.cuh"

constexpr int KV_BYTES = 2 * Tile_K::BYTES;
constexpr int SMEM_BYTES = KV_BUFFERS * KV_BYTES + STAGES * 2 * Tile_Q::BYTES + 2 * Tile_dS::BYTES + STAGES * (BIAS_BYTES + 2 * ROWS_BYTES + MASK_BYTES + SEEN_BYTES);
static_assert(SMEM_BYTES <= SMEM_KB * 1024 - 1024, "choose smaller tiles");

// "full": the bytes have arrived (Q's barrier counts the mask's too, dO's those that belong to its rows), or every computing thread has written its part.
// "empty": every computing thread has finished reading them, and other threads have read the message beside them. "unit_known": the next unit's numbers are in
// shared memory. "unit_wanted": all loads of the unit before have been issued. "unit_done", "dQ_added": every computing thread has added all that it adds to
// dQ; "unit_done" also: dK and dV are in shared memory. "decided": whether this block stores its part of dQ.
struct Barriers {
    uint64_t KV_full[KV_BUFFERS], Q_full[STAGES], dO_full[STAGES], empty[STAGES];
#if PERSISTENT
    uint64_t unit_known[KV_BUFFERS], unit_done[KV_BUFFERS], unit_wanted;
#endif
#if FINISHES_DQ
    uint64_t dQ_added;
#endif
#if DQ_LATE
    uint64_t dS_full[2], dS_empty[2];
#elif STORES_FIRST
    uint64_t decided[2];
#endif
};

// ANY_ORDER: blocks never take turns. LEAVES_OUT: whether the mask lets tiles be skipped. For false, the code is the same as without a scan of the mask.
template <bool ANY_ORDER, bool LEAVES_OUT>
__device__ inline void backward(const AttentionParams& p, const Maps& maps) {
    extern __shared__ __align__(1024) uint8_t smem[];
    __shared__ __align__(8) Barriers barriers;
    constexpr bool CLAIMS = STORES_FIRST && ANY_ORDER;  // blocks decide who is the first at a tile of dQ; if they take turns, they know
    static_assert(!LISTED || ANY_ORDER == LEAVES_OUT, "blocks claim tiles only where the mask leaves out some");
#if STORES_FIRST
    __shared__ int claimed_smem[CLAIMS_KEPT];
#if LISTED
    __shared__ int told_smem[STAGES];  // the number of the tile of dQ, or NO_TILE
#endif
#endif
    const uint32_t KV_smem = ptx::smem_address(smem);                // KV_BUFFERS × (K [BLOCK_K, HEAD_DIM], V [BLOCK_K, HEAD_DIM])
    const uint32_t QdO_smem = KV_smem + KV_BUFFERS * KV_BYTES;       // STAGES × (Q [BLOCK_Q, HEAD_DIM], dO [BLOCK_Q, HEAD_DIM])
    [[maybe_unused]] const uint32_t dS_smem = QdO_smem + STAGES * 2 * Tile_Q::BYTES;  // 2 × dS [BLOCK_Q, BLOCK_K], or transposed
    constexpr int BIAS_OFFSET = KV_BUFFERS * KV_BYTES + STAGES * 2 * Tile_Q::BYTES + 2 * Tile_dS::BYTES;  // STAGES × bias [BLOCK_Q, BLOCK_K]
    constexpr int ROWS_OFFSET = BIAS_OFFSET + STAGES * BIAS_BYTES;
    const float* rows_smem = reinterpret_cast<const float*>(smem + ROWS_OFFSET);  // STAGES × (LSE [BLOCK_Q], Delta [BLOCK_Q])
    [[maybe_unused]] uint8_t* mask_smem = smem + ROWS_OFFSET + STAGES * 2 * ROWS_BYTES;  // STAGES × [BLOCK_K] BitRow
#if INTERVAL
    __shared__ Told told_smem[STAGES];
#if PERSISTENT
    __shared__ Unit units_smem[KV_BUFFERS];
#endif
    constexpr int SEEN_OFFSET = ROWS_OFFSET + STAGES * (2 * ROWS_BYTES + MASK_BYTES);
    const uint2* seen_smem = reinterpret_cast<const uint2*>(smem + SEEN_OFFSET);  // STAGES × [BLOCK_Q]: each row's first column, and how many
#endif
    auto barrier = [](uint64_t* of, int stage) { return ptx::smem_address(of + stage); };
#if STORES_FIRST
#if DQ_LATE
    uint64_t* decided = barriers.dS_full;  // its phase also waits for the decision whether to store dQ
#else
    uint64_t* decided = barriers.decided;
#endif
    auto claims_of_block = [&] { return Claims{claimed_smem, workspace_of(p, maps).turns, barriers.empty, decided}; };
#endif

    // A unit of work is dK and dV of BLOCK_K keys.
    const int k_tiles = (p.Nk + BLOCK_K - 1) / BLOCK_K;
#if !PERSISTENT
    const uint32_t KV_full = ptx::smem_address(barriers.KV_full), K_smem = KV_smem, V_smem = K_smem + Tile_K::BYTES;
    const Unit its = unit_at<LEAVES_OUT>(p, maps, k_tiles, blockIdx.x);
    const int k_tile = its.k_tile, b_kv_h = its.b_kv_h, j0 = k_tile * BLOCK_K;
#endif
    [[maybe_unused]] const int offset = diagonal(p);  // causal: row i sees columns j ≤ i + offset

    if (threadIdx.x == 0) {
        for (int buffer = 0; buffer < KV_BUFFERS; ++buffer) ptx::mbarrier_init(barrier(barriers.KV_full, buffer), FINISHES_DQ ? 2 : 1);
#if PERSISTENT
        for (int buffer = 0; buffer < KV_BUFFERS; ++buffer) {
            ptx::mbarrier_init(barrier(barriers.unit_known, buffer), 1);
            ptx::mbarrier_init(barrier(barriers.unit_done, buffer), GROUP * CONSUMERS);
        }
        ptx::mbarrier_init(ptx::smem_address(&barriers.unit_wanted), 1 + CLAIMS);
#endif
#if FINISHES_DQ
        ptx::mbarrier_init(ptx::smem_address(&barriers.dQ_added), GROUP * CONSUMERS);
#endif
        for (int stage = 0; stage < STAGES; ++stage) {
            ptx::mbarrier_init(barrier(barriers.Q_full, stage), 1);
            ptx::mbarrier_init(barrier(barriers.dO_full, stage), 1);
            ptx::mbarrier_init(barrier(barriers.empty, stage), GROUP * CONSUMERS + (CLAIMS ? 2 : 0));
        }
#if DQ_LATE
        for (int buffer = 0; buffer < 2; ++buffer) {
            ptx::mbarrier_init(barrier(barriers.dS_full, buffer), GROUP * CONSUMERS + CLAIMS);
            ptx::mbarrier_init(barrier(barriers.dS_empty, buffer), GROUP * CONSUMERS);
        }
#elif STORES_FIRST
        for (int buffer = 0; buffer < 2; ++buffer) ptx::mbarrier_init(barrier(barriers.decided, buffer), 1);
#endif
        ptx::fence_mbarrier_init();
    }
    __syncthreads();

    const int group = uniform(threadIdx.x / GROUP);
    if (group == 0) {
        // ---- the producer: one thread issues all loads; the other warps finish dQ of an earlier head, or one of them takes units of work
        ptx::setmaxnreg_dec<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) {
#if PERSISTENT
            ptx::griddepcontrol_wait();  // LSE, Delta and the summaries are visible, and dQ is 0 or its tiles are untouched
            ptx::griddepcontrol_launch_dependents();  // not earlier: the kernel after this one reads counts that the kernel before sets to 0
#endif
            const Workspace& workspace = workspace_of(p, maps);
            // The tile of Q that `at` is at, and what belongs to it.
            auto load_tile = [&](const auto& at) {
                const Slot<STAGES> slot = at.slot();
                const int stage = slot.stage, i0 = at.tile * BLOCK_Q;
                const uint32_t rows = KV_smem + ROWS_OFFSET + stage * 2 * ROWS_BYTES;
                const int h = at.bh % p.H, b = at.bh / p.H;
                const uint32_t Q_tile = QdO_smem + stage * 2 * Tile_Q::BYTES;
                const uint32_t Q_full = barrier(barriers.Q_full, stage), dO_full = barrier(barriers.dO_full, stage);
#if COPIES_TILES
                const int of_dQ = workspace.tile_of_all(at.bh, at.tile);
                const bool dead = workspace.dead[of_dQ];
#endif
                if (EARLY) ptx::compute_now(b);
                ptx::mbarrier_wait(barrier(barriers.empty, stage), slot.parity ^ 1);  // returns immediately in the first round
                // From here on every cycle delays the next visit. So each tile is requested before its barrier is told how many bytes to expect, and what
                // belongs to its rows, which is needed only when S has been computed, comes last and counts as dO's.
                load_boxes<Tile_Q>(Q_tile, maps.q, i0, h, b, Q_full);
#if INTERVAL
                told_smem[stage] = at;  // visible to threads that have waited for "full"
#elif STORES_FIRST
                if (CLAIMS) told_smem[stage] = of_dQ;
#endif
#if SCORE & SCORE_BIAS
                const int bias_bytes = one_bias_row(p) ? Tile_bias::PANELS * ROW_BYTES : BIAS_BYTES;
#else
                constexpr int bias_bytes = 0;
#endif
                ptx::mbarrier_arrive_expect_tx(Q_full, Tile_Q::BYTES + MASK_BYTES + bias_bytes);
#if SCORE & SCORE_BIAS
                for (int panel = 0; panel < Tile_bias::PANELS; ++panel)
                    ptx::cp_async_bulk_tensor_4d(KV_smem + BIAS_OFFSET + stage * BIAS_BYTES + panel * Tile_bias::PANEL_BYTES, &maps.bias,
                                                 j0 + panel * BIAS_PANEL, one_bias_row(p) ? 0 : i0, h, b, Q_full);
#endif
#if MASK
                ptx::cp_async_bulk_tensor_4d(ptx::smem_address(mask_smem + stage * MASK_BYTES), &maps.mask, one_row(p) ? 0 : i0 / BIT_COLUMNS * 4, j0, h, b,
                                             Q_full);
#endif
#if COPIES_TILES
                const CUtensorMap& dO = dead ? maps.d_o_copy : maps.d_o;
#elif PERSISTENT
                const CUtensorMap& dO = at.cut == MAY_BE_BLIND ? maps.d_o_copy : maps.d_o;
#else
                const CUtensorMap& dO = maps.d_o;
#endif
                load_boxes<Tile_Q>(Q_tile + Tile_Q::BYTES, dO, i0, h, b, dO_full);
                const int64_t row = static_cast<int64_t>(at.bh) * workspace.rows + i0;
                ptx::mbarrier_arrive_expect_tx(dO_full, Tile_Q::BYTES + 2 * ROWS_BYTES + SEEN_BYTES);
                ptx::cp_async_bulk(rows, workspace.LSE + row, ROWS_BYTES, dO_full);
                ptx::cp_async_bulk(rows + ROWS_BYTES, workspace.Delta + row, ROWS_BYTES, dO_full);
#if INTERVAL
                ptx::cp_async_bulk(KV_smem + SEEN_OFFSET + stage * SEEN_BYTES, maps.seen + row, SEEN_BYTES, dO_full);
#endif
            };
#if INTERVAL
            // A message without a tile.
            auto tell = [&](int n, const Told& told) {
                const Slot<STAGES> slot(n);
                ptx::mbarrier_wait(barrier(barriers.empty, slot.stage), slot.parity ^ 1);
                told_smem[slot.stage] = told;
                ptx::mbarrier_arrive(barrier(barriers.Q_full, slot.stage));
            };
#endif
#if PERSISTENT
            IntervalVisit<CLAIMS> at;
            for (;; ++at.round) {
                const Slot<KV_BUFFERS> buffer(at.round);
                ptx::mbarrier_wait(barrier(barriers.unit_known, buffer.stage), buffer.parity);
                const Unit its = units_smem[buffer.stage];
                if (its.k_tile == NO_UNIT) break;
                at.begin_unit(p, maps, its.k_tile, its.b_kv_h);
                if (!at.more()) {
                    tell(at.n, {0, NO_TILE, 0, at.round});
                    ptx::mbarrier_arrive(barrier(barriers.dO_full, at.slot().stage));
                    ++at.n;
                }
                for (; at.more(); at.advance(maps)) load_tile(at);
                ptx::mbarrier_arrive(ptx::smem_address(&barriers.unit_wanted));
            }
            tell(at.n, {0, NO_UNIT, 0, at.round});
        } else if (threadIdx.x == 32) {
            // Takes units, loads their K and V, and stores their dK and dV when they are done.
            ptx::griddepcontrol_wait();  // the order is visible
            Unit before;
            int place = blockIdx.x;
            for (int round = 0;; ++round) {
                const Slot<KV_BUFFERS> buffer(round);
                const bool more = place < units_of(p, k_tiles);
                const Unit its = more ? unit_at<LEAVES_OUT>(p, maps, k_tiles, place) : Unit{NO_UNIT, 0};
                units_smem[buffer.stage] = its;
                ptx::mbarrier_arrive(barrier(barriers.unit_known, buffer.stage));
                if (more) {
                    const uint32_t K_smem = KV_smem + buffer.stage * KV_BYTES, full = barrier(barriers.KV_full, buffer.stage);
                    ptx::mbarrier_arrive_expect_tx(full, KV_BYTES);
                    load_boxes<Tile_K, RowOrder>(K_smem, maps.k, its.k_tile * BLOCK_K, its.b_kv_h % p.Hkv, its.b_kv_h / p.Hkv, full);
                    load_boxes<Tile_K, RowOrder>(K_smem + Tile_K::BYTES, maps.v, its.k_tile * BLOCK_K, its.b_kv_h % p.Hkv, its.b_kv_h / p.Hkv, full);
                }
                if (round > 0) {
                    const Slot<KV_BUFFERS> done(round - 1);
                    ptx::mbarrier_wait(barrier(barriers.unit_done, done.stage), done.parity);
                    const uint32_t dK_smem = KV_smem + done.stage * KV_BYTES;
#pragma unroll
                    for (int panel = 0; panel < Tile_K::PANELS; ++panel) {
                        auto store = [&](const CUtensorMap& map, uint32_t tile) {
                            ptx::cp_async_bulk_tensor_4d_store(&map, panel * 64, before.k_tile * BLOCK_K, before.b_kv_h % p.Hkv, before.b_kv_h / p.Hkv,
                                                               tile + panel * Tile_K::PANEL_BYTES);
                        };
                        store(maps.d_k, dK_smem), store(maps.d_v, dK_smem + Tile_K::BYTES);
                    }
                    ptx::cp_async_bulk_commit_group();
                    if (!CLAIMS && p.Nq > 0) ptx::red_release(workspace_of(p, maps).added + before.b_kv_h, 1);
                    ptx::cp_async_bulk_wait_group_read<0>();  // the next unit's K and V can take their place
                }
                if (!more) break;
                before = its;
                // Not earlier: what one block has taken, no other can take when it runs out of work.
                ptx::mbarrier_wait(ptx::smem_address(&barriers.unit_wanted), round & 1);
                place = take_place(p, workspace_of(p, maps), k_tiles);
            }
#else
            ptx::mbarrier_arrive_expect_tx(KV_full, KV_BYTES);
            load_boxes<Tile_K, RowOrder>(K_smem, maps.k, j0, b_kv_h % p.Hkv, b_kv_h / p.Hkv, KV_full);
            load_boxes<Tile_K, RowOrder>(V_smem, maps.v, j0, b_kv_h % p.Hkv, b_kv_h / p.Hkv, KV_full);
#if INTERVAL
            Visit at(p, maps, k_tile, b_kv_h);
            for (; at.more(); at.advance(maps)) load_tile(at);
            tell(at.n, {0, NO_TILE, 0});
#else
            VisitOf<LEAVES_OUT> at(p, maps, k_tile, b_kv_h);
            for (; at.more(); at.advance(p)) load_tile(at);
#if STORES_FIRST
            if (CLAIMS) {
                ptx::mbarrier_wait(barrier(barriers.empty, at.slot().stage), at.slot().parity ^ 1);
                told_smem[at.slot().stage] = NO_TILE;
                ptx::mbarrier_arrive(barrier(barriers.Q_full, at.slot().stage));
            }
#endif
#endif
#endif
#if STORES_FIRST
        } else if (CLAIMS && threadIdx.x == 64) {
            // Decides, for each visit, whether this block stores its part of dQ or adds it.
            const Claims claims = claims_of_block();
#if PERSISTENT
            ptx::griddepcontrol_wait();  // no tile has been touched
            for (ClaimedVisit now(told_smem, barriers.Q_full); now.tile != NO_UNIT; now.advance(p)) {
                claims.heard(now);
                if (now.tile != NO_TILE) claims.decide(now.n, workspace_of(p, maps).tile_of_all(now.bh, now.tile));
                claims.has_decided(now.n);
            }
#else
            for (ClaimedVisit now(told_smem, barriers.Q_full); now.more(); now.advance()) {
                claims.heard(now);
                claims.decide(now.n, now.tile);
                claims.has_decided(now.n);
            }
#endif
        } else if (CLAIMS && threadIdx.x == 96) {
            // Tells other blocks which tiles of dQ this one has stored, and the kernel after how many units are done. It reads a claim before it takes the next
            // message, as the claim may be replaced then. It tells after that, as the next load waits until the message has been taken.
            const Claims claims = claims_of_block();
            ClaimedVisit now(told_smem, barriers.Q_full);
            claims.heard(now);
#if PERSISTENT
            auto wants_unit = [&] { ptx::mbarrier_arrive(ptx::smem_address(&barriers.unit_wanted)); };
            wants_unit();
            for (int round = 0; now.begin_unit(round); ++round) {
                const Slot<KV_BUFFERS> buffer(round);
                const int b_kv_h = units_smem[buffer.stage].b_kv_h;
                const bool adds = now.tile != NO_TILE;
                if (!adds) now.advance(p), claims.heard(now);
                for (bool first = true; now.more(); first = false) {
                    claims.await_end(now);
                    const int tile = first ? -1 : claims.claimed(now.n - 1);  // dQ is added one visit late
                    now.advance(p), claims.heard(now);
                    claims.stored(tile);
                }
                ptx::mbarrier_wait(barrier(barriers.unit_done, buffer.stage), buffer.parity);
                wants_unit();
                if (adds) claims.stored(claims.claimed(now.n - 1));
                if (p.Nq > 0) ptx::red_release(workspace_of(p, maps).added + b_kv_h, 1);  // otherwise nothing has set the count to 0
            }
#else
            while (now.more()) {
                claims.await_end(now);
                const int tile = claims.claimed(now.n);
                now.advance(), claims.heard(now);
                claims.stored(tile);
            }
#endif
#endif
#if FINISHES_DQ
        } else if (threadIdx.x >= 32) {
            finish_earlier_head(p, maps.slots, maps.workspace, k_tile, k_tiles, b_kv_h, KV_full, ptx::smem_address(&barriers.dQ_added));
#endif
        }
    } else {
        // ---- the consumers: 64 keys each
        ptx::setmaxnreg_inc<CONSUMER_REGISTERS>();
        const int consumer = group - 1;
        const uint32_t group_rows = consumer * 64 * ROW_BYTES;  // the group's rows of K and V
#if PERSISTENT
        ToldVisit<> now(told_smem, barriers.Q_full);
        for (int round = 0; now.begin_unit(round); ++round) {
            const Slot<KV_BUFFERS> buffer(round);
            // As `base` is unknown to the compiler, it is not computed again for each tile.
            const uint32_t base = ptx::unknown(KV_smem), K_smem = base + buffer.stage * KV_BYTES, V_smem = K_smem + Tile_K::BYTES;
            const uint32_t QdO_smem = base + KV_BUFFERS * KV_BYTES, dS_smem = QdO_smem + STAGES * 2 * Tile_Q::BYTES;
            ptx::mbarrier_wait(barrier(barriers.KV_full, buffer.stage), buffer.parity);
            const int k_tile = units_smem[buffer.stage].k_tile, j0 = k_tile * BLOCK_K;
            const ThreadNumber thread = ptx::tid_x();  // read again for each unit, so that values derived from it occupy no registers across units
#else
        const ThreadNumber thread = threadIdx.x;
#endif
        const int warp = thread % GROUP / 32, lane = thread % 32, t = lane % 4;
        const int place = consumer * 64 + warp * 16 + lane / 4;  // in the tile of keys; this thread holds it and the row 8 further on,
        const int first_row = RowOrder::row(place);  // keys first_row and first_row + ROW_STEP
        [[maybe_unused]] const uint32_t dS_lane = Tile_dS::offset(lane % 8 + lane / 16 * 8, consumer * 8 + warp * 2 + lane / 8 % 2);  // for stmatrix
        const float scale_log2 = p.scale * LOG2_E;                   // exp(scale · x) = 2^(scale_log2 · x)

#if SCORE
        const float unit = unit_log2(p);
#endif
        // The bias of columns 8n … 8n + 15, which are rows of its tile.
        [[maybe_unused]] auto read_bias = [&](int stage, int n, uint32_t(&pairs)[4]) {
#if SCORE & SCORE_BIAS
            const uint8_t* tile = smem + BIAS_OFFSET + stage * BIAS_BYTES;
            const bool one_row = one_bias_row(p);
            if (!DROPOUT) {
                const int row = one_row ? 0 : 8 * n + lane % 8 + lane / 16 * 8;
                ptx::ldmatrix_x4_trans(pairs, ptx::smem_address(tile) + Tile_bias::offset(row, (consumer * 4 + warp) * 2 + lane / 8 % 2));
                return;
            }
            // The rows of an accumulator are keys, permuted.
            auto at = [&](int row, int key) {
                return static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(tile + Tile_bias::offset(one_row ? 0 : row, key / 8) + key % 8 * 2));
            };
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int row = 8 * (n + e / 2) + 2 * t, key = first_row + ROW_STEP * (e % 2);
                pairs[e] = at(row, key) | at(row + 1, key) << 16;
            }
#endif
        };

        float dK_rmem[HEAD_DIM / 2] = {}, dV_rmem[HEAD_DIM / 2] = {};
#if !PERSISTENT
        ptx::mbarrier_wait(KV_full, 0);
#if INTERVAL
        ToldVisit<> now(told_smem, barriers.Q_full);
#else
        VisitOf<LEAVES_OUT> now(p, maps, k_tile, slot_of(maps, b_kv_h));  // its heads are numbered by their slots
#endif
#endif
        // Issues the group's part of dQ = dS K for tile number n of the visit.
        auto start_dQ = [&](float(&dQ_rmem)[COLUMNS / 2], int n) {
            const uint64_t dS_part = ptx::descriptor(uniform(dS_smem + n % 2 * Tile_dS::BYTES + (BY_ROWS ? consumer * 64 * ROW_BYTES : 0)));
            const uint64_t K_part = ptx::descriptor(uniform(K_smem + (BY_ROWS ? 0 : consumer * (COLUMNS == 64 ? Tile_K::PANEL_BYTES : 64))));
            ptx::wgmma_fence();
#pragma unroll
            for (int k = 0; k < BLOCK_K / 16; ++k) {
                const uint64_t K_k = ptx::advance(K_part, k * 16 * ROW_BYTES);
                if constexpr (DS_BY_KEYS) ptx::wgmma_ss_transposed<element, COLUMNS>(dQ_rmem, ptx::advance(dS_part, k * 16 * ROW_BYTES), K_k, k > 0);
                else ptx::wgmma_ss_transposed_b<element, COLUMNS>(dQ_rmem, ptx::advance(dS_part, k / 4 * Tile_dS::PANEL_BYTES + k % 4 * 32), K_k, k > 0);
            }
            ptx::wgmma_commit_group();
        };
#if DQ_LATE
        // Of the previous tile: its first row in the workspace, and how many blocks add to it before this one.
        int64_t row_before = 0;
        int turn_before = k_tile;
        auto start_dQ_before = [&](float(&dQ_rmem)[COLUMNS / 2], int n) {
            ptx::mbarrier_wait(barrier(barriers.dS_full, n % 2), n / 2 & 1);  // of both groups
            start_dQ(dQ_rmem, n);
        };
        auto add_dQ_before = [&](const float(&dQ_rmem)[COLUMNS / 2], [[maybe_unused]] int n) {
            ptx::mbarrier_arrive(barrier(barriers.dS_empty, n % 2));
            const Workspace& workspace = workspace_of(p, maps);
            if (!ANY_ORDER) take_turn(p, workspace, row_before, turn_before);
#if STORES_FIRST
            const bool first = ANY_ORDER ? claims_of_block().stores(n) : turn_before == 0;
#else
            constexpr bool first = false;
#endif
            add_dQ<COLUMNS>(workspace, row_before, consumer * COLUMNS, dQ_rmem, first);
            if (!ANY_ORDER) end_turn(p, workspace, row_before, turn_before);
        };
        // One tile of Q. The first tile has its own copy of the code, because at a branch between products in flight the compiler waits for each of them.
        auto visit = [&](auto first) {
            constexpr bool FIRST = decltype(first)::value;
#else
        for (; now.more(); now.advance(p)) {
#endif
            const Slot<STAGES> slot = now.slot();
            const int stage = slot.stage, i0 = now.tile * BLOCK_Q;
            const uint32_t Q_tile = QdO_smem + stage * 2 * Tile_Q::BYTES, dO_tile = Q_tile + Tile_Q::BYTES;
            const uint32_t dS_tile = dS_smem + now.n % 2 * Tile_dS::BYTES;
            const float* LSE_smem = rows_smem + stage * 2 * BLOCK_Q + 2 * t;
            const float* Delta_smem = LSE_smem + BLOCK_Q;

            // Whether some key of the tile is not seen by all rows.
#if INTERVAL
            const bool cut = now.cut;
            const uint2* seen = seen_smem + stage * BLOCK_Q + 2 * t;
#else
            const bool cut = j0 + BLOCK_K > min(p.Nk, CAUSAL ? i0 + offset + 1 : p.Nk);
#endif

            // issue Sᵀ = K Qᵀ and dPᵀ = V dOᵀ
            float S_rmem[BLOCK_Q / 2], dP_rmem[BLOCK_Q / 2];
            auto multiply = [&](float(&C)[BLOCK_Q / 2], uint32_t A, uint32_t B, bool from_zero) {
                const uint64_t a = ptx::descriptor(uniform(A + group_rows)), b = ptx::descriptor(uniform(B));
                ptx::wgmma_fence();
#pragma unroll
                for (int d = 0; d < HEAD_DIM / 16; ++d)
                    ptx::wgmma_ss<element, BLOCK_Q>(C, ptx::advance(a, d / 4 * Tile_K::PANEL_BYTES + d % 4 * 32),
                                                    ptx::advance(b, d / 4 * Tile_Q::PANEL_BYTES + d % 4 * 32), !from_zero || d > 0);
                ptx::wgmma_commit_group();
            };
            if (EARLY) {
                for (const uint32_t address : {K_smem + group_rows, Q_tile, V_smem + group_rows, dO_tile}) ptx::compute_now(ptx::descriptor(uniform(address)));
            }
            ptx::mbarrier_wait(barrier(barriers.Q_full, stage), slot.parity);
#if MASK
            // Key j is seen by the rows from j − offset on.
            start_S<BLOCK_Q>(S_rmem, mask_smem + stage * MASK_BYTES, i0 % BIT_COLUMNS, first_row, ROW_STEP, t, [&](int r, int w) {
                const int j = j0 + first_row + ROW_STEP * r;
                return !cut || INTERVAL ? 0 : j >= p.Nk ? ~0u : CAUSAL ? first_bits(j - offset - i0 - 32 * w) : 0;
            });
#endif
            multiply(S_rmem, K_smem, Q_tile, !MASK);
            ptx::mbarrier_wait(barrier(barriers.dO_full, stage), slot.parity);
            multiply(dP_rmem, V_smem, dO_tile, true);

            // While these products run: which elements of the tile dropout keeps.
            [[maybe_unused]] KeepBits<BLOCK_Q> keep;
            if (DROPOUT) {
                const int thread = ptx::tid_x() - GROUP;  // re-read here, so that values derived from it occupy no registers before
                keep.draw_keys(p, now.bh / p.H, now.bh % p.H, j0 + RowOrder::row(thread / 32 * 16 + thread % 32 / 4), i0, thread % 32);
            }

            uint32_t P_rmem[BLOCK_Q / 16][4], dS_rmem[BLOCK_Q / 16][4];  // A operands of the products over 16 rows of Q at a time
            // P = exp(scale · S − LSE). Beyond the end of the rows LSE is ∞.
            [[maybe_unused]] auto make_P = [&](int n) {
                const float2 LSE = *reinterpret_cast<const float2*>(LSE_smem + 8 * n);
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    float &P0 = S_rmem[4 * n + 2 * r], &P1 = S_rmem[4 * n + 2 * r + 1];
                    P0 = ptx::ex2(fmaf(P0, scale_log2, -LSE.x));
                    P1 = ptx::ex2(fmaf(P1, scale_log2, -LSE.y));
                    P_rmem[n / 2][n % 2 * 2 + r] = ptx::cvt_pair<element>(P0, P1) & (DROPOUT ? keep.pair(r, n) : ~0u);
                }
            };
#if INTERVAL
            // Hides what rows do not see: their scores become −∞, so that P = 0. Where the hook changes scores, a cap would lose that: P becomes 0 after it.
            auto hide = [&] {
#pragma unroll
                for (int n = 0; n < N_TILES; ++n) {
                    const uint4 rows = *reinterpret_cast<const uint4*>(seen + 8 * n);  // two of them: first column, how many
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        const unsigned j = j0 + first_row + ROW_STEP * r;
                        const bool sees[2] = {j - rows.x < rows.y, j - rows.z < rows.w};  // unsigned: columns before the first are hidden too
#pragma unroll
                        for (int c = 0; c < 2; ++c)
                            if (!sees[c]) S_rmem[4 * n + 2 * r + c] = SCORE ? 0 : -CUDART_INF_F;
                        if (SCORE) P_rmem[n / 2][n % 2 * 2 + r] &= (sees[0] ? 0xffffu : 0) | (sees[1] ? 0xffff0000u : 0);
                    }
                }
            };
#endif
#if SCORE
            // P; S is overwritten with the factor of dS: P, or with softcap P times the derivative of the cap.
            const float slope = SLOPED ? slope_of_head(p, now.bh / p.H, now.bh % p.H) : 0;
            auto score_P = [&] {
                // Hidden scores are first set far below all others, as a mask does; the tanh would lose that.
                constexpr bool HIDES_FIRST = !INTERVAL && !MASK && CAUSAL;
                if (HIDES_FIRST && cut) {
#pragma unroll
                    for (int n = 0; n < N_TILES; ++n)
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            const int j = j0 + first_row + ROW_STEP * (e / 2), i = i0 + 8 * n + 2 * t + e % 2;
                            if (j >= p.Nk || j > i + offset) S_rmem[4 * n + e] = -CUDART_INF_F;
                        }
                }
                score_keys<BLOCK_Q>(
                    S_rmem, p, slope, i0, i0 + 2 * t, j0, j0 + first_row, [&](int n, uint32_t(&pairs)[4]) { read_bias(stage, n, pairs); },
                    [&](int n, int r, const float(&x)[2], const float(&capped)[2]) {
                        const float2 LSE = *reinterpret_cast<const float2*>(LSE_smem + 8 * n);
                        float P[2] = {ptx::ex2(fmaf(x[0], unit, -LSE.x)), ptx::ex2(fmaf(x[1], unit, -LSE.y))};
#pragma unroll
                        for (int c = 0; c < 2; ++c) {
                            float& S = S_rmem[4 * n + 2 * r + c];
                            if ((MASK || (HIDES_FIRST && CAPPED)) && S < p.lowest) P[c] = 0;
                            if (!INTERVAL && !MASK && !CAUSAL && cut && j0 + first_row + ROW_STEP * r >= p.Nk) P[c] = 0;
                            S = CAPPED ? P[c] * fmaf(-capped[c], capped[c], 1.0f) : P[c];
                        }
                        P_rmem[n / 2][n % 2 * 2 + r] = ptx::cvt_pair<element>(P[0], P[1]) & (DROPOUT ? keep.pair(r, n) : ~0u);
                    });
            };
#endif
            // dS = P∘(dP − Delta). With dropout, dS = P∘(keep_scale · kept dP − Delta); the factor keep_scale is applied at the end, as for dV.
            auto make_dS = [&](int n) {
                const float2 Delta = *reinterpret_cast<const float2*>(Delta_smem + 8 * n);
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    float dP0 = dP_rmem[4 * n + 2 * r], dP1 = dP_rmem[4 * n + 2 * r + 1];
                    if (DROPOUT) dP0 = keep.kept(dP0, r, n, 0), dP1 = keep.kept(dP1, r, n, 1);
                    const uint32_t dS = ptx::cvt_pair<element>(S_rmem[4 * n + 2 * r] * (dP0 - Delta.x), S_rmem[4 * n + 2 * r + 1] * (dP1 - Delta.y));
                    dS_rmem[n / 2][n % 2 * 2 + r] = dS;
                    if (DS_BY_KEYS) ptx::st_shared(dS_tile + Tile_dS::offset(place + 8 * r, n) + 4 * t, dS);
                }
                if (!DS_BY_KEYS && n % 2) ptx::stmatrix_x4_trans(dS_tile + dS_lane + n / 2 * 16 * ROW_BYTES, dS_rmem[n / 2]);
            };
            auto await_dS_empty = [&] {
#if DQ_LATE
                ptx::mbarrier_wait(barrier(barriers.dS_empty, now.n % 2), (now.n / 2 & 1) ^ 1);
#endif
            };
            if (DROPOUT) await_dS_empty();
            ptx::wgmma_wait_group<DROPOUT ? 0 : 1>();  // Sᵀ is there
#if INTERVAL && !SCORE
            if (cut) hide();
#endif
#if !INTERVAL && !MASK && !SCORE
            // Hidden scores become −∞, so that P = 2^−∞ = 0: one branch per tile, before the exponentials, which then have none.
            if (cut) {
#pragma unroll
                for (int n = 0; n < N_TILES; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int j = j0 + first_row + ROW_STEP * (e / 2), i = i0 + 8 * n + 2 * t + e % 2;
                        if (j >= p.Nk || (CAUSAL && j > i + offset)) S_rmem[4 * n + e] = -CUDART_INF_F;
                    }
            }
#endif
#if SCORE
            score_P();
#if INTERVAL
            if (cut) hide();
#endif
#endif
#pragma unroll
            for (int n = 0; n < N_TILES; ++n) {
#if !SCORE
                make_P(n);
#endif
                if (DROPOUT) make_dS(n);
            }
            if (!DROPOUT) await_dS_empty();
            ptx::wgmma_wait_group<0>();  // so is dPᵀ
#pragma unroll
            for (int n = 0; n < N_TILES; ++n)
                if (!DROPOUT) make_dS(n);

            // dV += Pᵀ dO and dK += dSᵀ Q: the summation index runs over the rows of dO and Q
            auto add = [&](float(&C)[HEAD_DIM / 2], const uint32_t(&A)[BLOCK_Q / 16][4], uint32_t B) {
                const uint64_t b = ptx::descriptor(uniform(B), Tile_Q::PANEL_BYTES);
#pragma unroll
                for (int k = 0; k < BLOCK_Q / 16; ++k) ptx::wgmma_rs<element, HEAD_DIM>(C, A[k], ptx::advance(b, k * 16 * ROW_BYTES));
                ptx::wgmma_commit_group();
            };
#if DQ_LATE
            float dQ_rmem[COLUMNS / 2];
            if constexpr (!FIRST) start_dQ_before(dQ_rmem, now.n - 1);
            ptx::wgmma_fence();
            add(dV_rmem, P_rmem, dO_tile);
            ptx::fence_proxy_async();  // what this thread stored of dS, for the next tile
            ptx::mbarrier_arrive(barrier(barriers.dS_full, now.n % 2));
            ptx::wgmma_fence();
            add(dK_rmem, dS_rmem, Q_tile);
            if constexpr (!FIRST) {
                ptx::wgmma_wait_group<2>();  // dQ is complete; dV and dK are still running
                add_dQ_before(dQ_rmem, now.n - 1);
            }
            row_before = static_cast<int64_t>(now.bh) * workspace_of(p, maps).rows + i0;
#if INTERVAL
            if (!ANY_ORDER) turn_before = now.turn(p, maps, k_tile);
#endif
#else
            ptx::wgmma_fence();
            add(dV_rmem, P_rmem, dO_tile);
            ptx::fence_proxy_async();  // this thread's part of dS
            meet();                    // dS is complete, and both groups have finished reading the other dS buffer
            float dQ_rmem[COLUMNS / 2];
            start_dQ(dQ_rmem, now.n);
            const Workspace& workspace = workspace_of(p, maps);
            const int64_t row = static_cast<int64_t>(now.bh) * workspace.rows + i0;
            if constexpr (ANY_ORDER) {
                auto is_first = [&] {
#if STORES_FIRST
                    ptx::mbarrier_wait(barrier(barriers.decided, now.n % 2), now.n / 2 & 1);
                    return claims_of_block().stores(now.n);
#else
                    return false;
#endif
                };
                if (consumer == 0) {
                    ptx::wgmma_wait_group<0>();  // both are there: dV and dQ
                    add_dQ<COLUMNS>(workspace, row, 0, dQ_rmem, is_first());
                    ptx::wgmma_fence();
                    add(dK_rmem, dS_rmem, Q_tile);
                    ptx::wgmma_wait_group<0>();
                } else {
                    add(dK_rmem, dS_rmem, Q_tile);
                    ptx::wgmma_wait_group<1>();
                    add_dQ<COLUMNS>(workspace, row + (BY_ROWS ? 64 : 0), BY_ROWS ? 0 : COLUMNS, dQ_rmem, is_first());
                    ptx::wgmma_wait_group<0>();
                }
            } else {
                add(dK_rmem, dS_rmem, Q_tile);
                ptx::wgmma_wait_group<1>();  // dV and dQ are there
#if INTERVAL
                const int turn = now.turn(p, maps, k_tile);
#else
                const int turn = k_tile;
#endif
                take_turn(p, workspace, row, turn);
                add_dQ<COLUMNS>(workspace, row + (BY_ROWS ? consumer * 64 : 0), BY_ROWS ? 0 : consumer * COLUMNS, dQ_rmem);
                end_turn(p, workspace, row, turn);
            }
#endif
            ptx::wgmma_wait_group<0>();  // dK too: done with Q and dO
            ptx::mbarrier_arrive(barrier(barriers.empty, stage));
#if DQ_LATE
        };
        if (now.more()) {
            visit(std::true_type());
            for (now.advance(p); now.more(); now.advance(p)) visit(std::false_type());
            float dQ_rmem[COLUMNS / 2];
            start_dQ_before(dQ_rmem, now.n - 1);
            ptx::wgmma_wait_group<0>();
            add_dQ_before(dQ_rmem, now.n - 1);
        }
#else
        }
#endif

#if PERSISTENT
        if (now.tile == NO_TILE && now.round == round) {
            // The unit has no tile. Its message takes part in the barriers as a tile would.
#if DQ_LATE
            ptx::mbarrier_arrive(barrier(barriers.dS_full, now.n % 2));
            ptx::mbarrier_wait(barrier(barriers.dS_full, now.n % 2), now.n / 2 & 1);
            ptx::mbarrier_arrive(barrier(barriers.dS_empty, now.n % 2));
#endif
            ptx::mbarrier_arrive(barrier(barriers.empty, now.slot().stage));
            now.advance(p);
        }
#endif
#if FINISHES_DQ
        ptx::mbarrier_arrive(ptx::smem_address(&barriers.dQ_added));
#endif

        // dK and dV are stored by way of the buffers of K and V, so that global stores are 16 bytes wide, or by the copy engine.
        meet();  // both groups are done with K
        const float dV_scale = DROPOUT ? p.keep_scale : 1.0f, dK_scale = p.scale * dV_scale;
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; ++n) {
                const uint32_t to = Tile_K::offset(place + 8 * r, n) + 4 * t;
                ptx::st_shared(K_smem + to, ptx::cvt_pair<element>(dK_rmem[4 * n + 2 * r] * dK_scale, dK_rmem[4 * n + 2 * r + 1] * dK_scale));
                ptx::st_shared(V_smem + to, ptx::cvt_pair<element>(dV_rmem[4 * n + 2 * r] * dV_scale, dV_rmem[4 * n + 2 * r + 1] * dV_scale));
            }
#if PERSISTENT
        ptx::fence_proxy_async();  // what this thread wrote
        ptx::mbarrier_arrive(barrier(barriers.unit_done, buffer.stage));
        }
#else
        __syncwarp();  // the warp's rows are written, by lanes other than those that read them next
        const int b = b_kv_h / p.Hkv, kv_h = b_kv_h % p.Hkv, warp_row = consumer * 64 + warp * 16;
        store_16_rows<Tile_K, RowOrder>(head_of(p.dk, b, kv_h), smem, p.dk.stride_n, warp_row, lane, j0, p.Nk, p.D);
        store_16_rows<Tile_K, RowOrder>(head_of(p.dv, b, kv_h), smem + Tile_K::BYTES, p.dv.stride_n, warp_row, lane, j0, p.Nk, p.Dv);
#if COUNTS_UNITS
        // Both groups had added to dQ when they met. Without rows nothing has set the count to 0.
        if (ptx::tid_x() == GROUP && p.Nq > 0) ptx::red_release(workspace_of(p, maps).added + b_kv_h, 1);
#endif
#endif
    }
}

template <bool ANY_ORDER>
__global__ void __launch_bounds__(THREADS, 1) backward_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Maps maps) {
#if LISTED
#if COUNTS_UNITS
    ptx::griddepcontrol_launch_dependents();
#endif
    if (leaves_out(maps)) return backward<true, true>(p, maps);  // if blocks take turns, they visit every tile
#endif
    backward<ANY_ORDER, false>(p, maps);
}

extern "C" int64_t workspace_floats(const AttentionParams* params) { return backward_floats(*params); }

extern "C" int attention(const AttentionParams* params) {
#if SCORE & SCORE_BIAS
    if (params->scoring.d_bias != nullptr) return launch_backward(backward_kernel<false>, SMEM_BYTES, *params, launch_dbias);
#endif
    return launch_backward(ANY_ORDER_APART && !params->deterministic ? backward_kernel<ANY_ORDER_APART> : backward_kernel<false>, SMEM_BYTES, *params);
}

// Backward for heads of 193 to 256 columns, plain calls: dS goes to memory, and dQ = dS K is a kernel of its own (stored_dS.cuh).  sm_90a.
//
// The idea: dK and dV of 64 keys would fill all registers of one group. So two groups share 64 keys, and each adds to half the head's columns:
//
//     dV += Pᵀ dO,  dK += dSᵀ Q    these products sum over all rows of the tile, so Pᵀ and dSᵀ go through shared memory
//     first group                  Sᵀ = K Qᵀ, and from it Pᵀ
//     second group                 dPᵀ = V dOᵀ, and with Pᵀ dSᵀ, which the copy engine stores in global memory
//
// A product of 64 × 64 reads both operands from shared memory as fast as it multiplies. If each group computed half of Sᵀ and of dPᵀ, as in
// backward_4_hopper_wide.cu, it would read K and V twice, and the tensor cores would wait.
//
// Products run in the order in which a group issues them, and issuing does not wait for the result:
//
//     products:       dK(n)   S(n+1), dP(n+1)   dV(n)              │ dK(n+1) …
//     meanwhile:                                P(n+1), dS(n+1)    │
//                                                        both groups meet
//
// A tile's Q is free after dK(n) and its dO after dV(n), so that the tile after next has a whole step to arrive.
//
// Serves float16 and bfloat16, dense and causal, grouped heads, any lengths, positive scale; head sizes that are multiples of 8.
// backward_4_hopper_wide.cu serves masks, intervals, dropout and changed scores.
//
// One file because its kernel is one schedule.
#include "stored_dS.cuh"

#if MASK || INTERVAL || DROPOUT || SCORE
#error "plain calls only: backward_4_hopper_wide.cu"
#endif

constexpr int COLUMNS = HEAD_DIM / CONSUMERS;  // of the head: a group's columns of dK and dV
constexpr int STAGES = 2;
static_assert(HEAD_DIM == 256 && V_HEAD_DIM == 256, "a group's columns are two panels");
using Tile = SwizzledTile<BLOCK, HEAD_DIM>;  // of K, V, Q or dO
constexpr int PAIR_BYTES = 2 * Tile::BYTES, ROWS_BYTES = BLOCK * 4;  // K and V, or Q and dO; LSE, and as much of Delta
constexpr int SMEM_BYTES = (1 + STAGES) * PAIR_BYTES + 2 * 2 * Tile_S::BYTES + STAGES * 2 * ROWS_BYTES;
static_assert(SMEM_BYTES <= SMEM_LIMIT, "choose smaller tiles");

struct Maps {
    CUtensorMap q, k, v, d_o, dS;
};

// "full": the bytes have arrived, those of LSE with Q and those of Delta with dO. "empty": every computing thread is done with them.
struct Barriers {
    uint64_t KV_full, Q_full[STAGES], Q_empty[STAGES], dO_full[STAGES], dO_empty[STAGES];
};

__global__ void __launch_bounds__(THREADS, 1) dKV_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Maps maps, Piece piece) {
    __shared__ __align__(8) Barriers barriers;
    const uint32_t K_smem = ptx::smem_address(smem);                // [BLOCK, HEAD_DIM]
    const uint32_t V_smem = K_smem + Tile::BYTES;                   // the same
    const uint32_t QdO_smem = K_smem + PAIR_BYTES;                  // STAGES × (Q, dO), each the same
    const uint32_t PdS_smem = QdO_smem + STAGES * PAIR_BYTES;       // 2 × (Pᵀ, dSᵀ), each [BLOCK keys, BLOCK queries]
    const uint32_t rows_smem = PdS_smem + 2 * 2 * Tile_S::BYTES;    // STAGES × (LSE [BLOCK], Delta [BLOCK])
    auto barrier = [](uint64_t& of) { return ptx::smem_address(&of); };

    // One block computes dK and dV of BLOCK keys. Causal: blocks of the first keys start first, because the most rows see them.
    const int head = blockIdx.x / piece.keys, j_tile = piece.first_key + blockIdx.x % piece.keys, j0 = j_tile * BLOCK;
    const int b_kv_h = piece.first_head + head, b = b_kv_h / p.Hkv, kv_h = b_kv_h % p.Hkv;

    if (threadIdx.x == 0) {
        ptx::mbarrier_init(barrier(barriers.KV_full), 1);
        for (int stage = 0; stage < STAGES; ++stage) {
            ptx::mbarrier_init(barrier(barriers.Q_full[stage]), 1);
            ptx::mbarrier_init(barrier(barriers.dO_full[stage]), 1);
            ptx::mbarrier_init(barrier(barriers.Q_empty[stage]), GROUP * CONSUMERS);
            ptx::mbarrier_init(barrier(barriers.dO_empty[stage]), GROUP * CONSUMERS);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();

    const int group = uniform(threadIdx.x / GROUP);
    if (group == 0) {
        // ---- the producer: one thread loads every tile
        ptx::setmaxnreg_dec<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) {
            const Workspace workspace(p);
            const uint32_t KV_full = barrier(barriers.KV_full);
            ptx::mbarrier_arrive_expect_tx(KV_full, PAIR_BYTES);
            load_boxes<Tile>(K_smem, maps.k, j0, kv_h, b, KV_full);
            load_boxes<Tile>(V_smem, maps.v, j0, kv_h, b, KV_full);
            for (QueryVisit<BLOCK> at(p, j0, kv_h); at.more(); at.advance()) {
                const Slot<STAGES> slot(at.n);
                const uint32_t Q_full = barrier(barriers.Q_full[slot.stage]), dO_full = barrier(barriers.dO_full[slot.stage]);
                const uint32_t Q_tile = QdO_smem + slot.stage * PAIR_BYTES, rows = rows_smem + slot.stage * 2 * ROWS_BYTES;
                const int64_t row = (static_cast<int64_t>(b) * p.H + at.h) * workspace.rows + at.i0;
                ptx::mbarrier_wait(barrier(barriers.Q_empty[slot.stage]), slot.parity ^ 1);  // returns immediately in the first round
                ptx::mbarrier_arrive_expect_tx(Q_full, Tile::BYTES + ROWS_BYTES);
                load_boxes<Tile>(Q_tile, maps.q, at.i0, at.h, b, Q_full);
                ptx::cp_async_bulk(rows, workspace.LSE + row, ROWS_BYTES, Q_full);
                ptx::mbarrier_wait(barrier(barriers.dO_empty[slot.stage]), slot.parity ^ 1);
                ptx::mbarrier_arrive_expect_tx(dO_full, Tile::BYTES + ROWS_BYTES);
                load_boxes<Tile>(Q_tile + Tile::BYTES, maps.d_o, at.i0, at.h, b, dO_full);
                ptx::cp_async_bulk(rows + ROWS_BYTES, workspace.Delta + row, ROWS_BYTES, dO_full);
            }
        }
    } else {
        // ---- the consumers
        ptx::setmaxnreg_inc<CONSUMER_REGISTERS>();
        const int consumer = group - 1, warp = threadIdx.x % GROUP / 32, lane = threadIdx.x % 32;
        const Lane mine(0);
        float dK_rmem[COLUMNS / 2] = {}, dV_rmem[COLUMNS / 2] = {};  // [BLOCK, COLUMNS]

        // Where tile number n of the visit is in shared memory
        auto Q_of = [&](int n) { return QdO_smem + n % STAGES * PAIR_BYTES; };
        auto dO_of = [&](int n) { return Q_of(n) + Tile::BYTES; };
        auto P_of = [&](int n) { return PdS_smem + n % 2 * 2 * Tile_S::BYTES; };
        auto dS_of = [&](int n) { return P_of(n) + Tile_S::BYTES; };
        auto LSE_of = [&](int n) { return reinterpret_cast<const float*>(smem + (rows_smem - K_smem) + n % STAGES * 2 * ROWS_BYTES); };
        auto Delta_of = [&](int n) { return LSE_of(n) + BLOCK; };
        auto wait_for = [&](uint64_t (&full)[STAGES], int n) { ptx::mbarrier_wait(barrier(full[n % STAGES]), n / STAGES & 1); };
        auto release = [&](uint64_t (&empty)[STAGES], int n) { ptx::mbarrier_arrive(barrier(empty[n % STAGES])); };

        // Issues Sᵀ = K Qᵀ or dPᵀ = V dOᵀ.
        auto multiply = [&](float(&C)[BLOCK / 2], uint32_t A, uint32_t B) {
            const uint64_t a = ptx::descriptor(uniform(A)), b = ptx::descriptor(uniform(B));
            ptx::wgmma_fence();
#pragma unroll
            for (int d = 0; d < HEAD_DIM / 16; ++d) {
                const int column = d / 4 * Tile::PANEL_BYTES + d % 4 * 32;
                ptx::wgmma_ss<element, BLOCK>(C, ptx::advance(a, column), ptx::advance(b, column), d > 0);
            }
            ptx::wgmma_commit_group();
        };
        // Issues dV += Pᵀ dO or dK += dSᵀ Q for the group's columns: the summation index runs over the rows of dO and Q
        auto add = [&](float(&C)[COLUMNS / 2], uint32_t A, uint32_t B) {
            const uint64_t a = ptx::descriptor(uniform(A)), b = ptx::descriptor(uniform(B + consumer * (Tile::BYTES / CONSUMERS)), Tile::PANEL_BYTES);
            ptx::wgmma_fence();
#pragma unroll
            for (int k = 0; k < BLOCK / 16; ++k)
                ptx::wgmma_ss_transposed_b<element, COLUMNS>(C, ptx::advance(a, k * 32), ptx::advance(b, k * 16 * ROW_BYTES), 1);
            ptx::wgmma_commit_group();
        };
        auto add_dV = [&](int n) { add(dV_rmem, P_of(n), dO_of(n)); };
        auto add_dK = [&](int n) { add(dK_rmem, dS_of(n), Q_of(n)); };

        ptx::mbarrier_wait(barrier(barriers.KV_full), 0);
        QueryVisit<BLOCK> at(p, j0, kv_h);
        // The first tile has no predecessor whose products could run under its exponentials.
        if (consumer == 0) {
            // ---- Sᵀ = K Qᵀ, and Pᵀ
            float S_rmem[BLOCK / 2];
            auto start_S = [&] {
                wait_for(barriers.Q_full, at.n);
                multiply(S_rmem, K_smem, Q_of(at.n));
            };
            auto to_P = [&] {
                const bool cut = is_cut(p, at.i0, j0, BLOCK);
#pragma unroll
                for (int i = 0; i < BLOCK / 8; ++i) make_P(S_rmem, p, LSE_of(at.n), mine, i, at.i0, j0, cut);
                write_P(P_of(at.n), S_rmem, mine);
                ptx::fence_proxy_async();  // this thread's part of Pᵀ
                ptx::bar_arrive(P_IS_THERE, CONSUMERS * GROUP);
            };
            if (at.more()) {
                start_S();
                ptx::wgmma_wait_group<0>();
                to_P();
                meet();
                add_dK(0);
                int n = 0;  // the tile before
                for (at.advance(); at.more(); at.advance(), ++n) {
                    start_S();
                    wait_for(barriers.dO_full, n);
                    add_dV(n);
                    ptx::wgmma_wait_group<1>();  // Sᵀ is there, and dK: done with Q
                    release(barriers.Q_empty, n);
                    to_P();
                    ptx::wgmma_wait_group<0>();  // dV is there: done with dO
                    release(barriers.dO_empty, n);
                    meet();  // dSᵀ is there
                    add_dK(at.n);
                }
                wait_for(barriers.dO_full, n);
                add_dV(n);
                ptx::wgmma_wait_group<0>();
            }
        } else {
            // ---- dPᵀ = V dOᵀ, and dSᵀ
            float dP_rmem[BLOCK / 2];
            const bool stores = threadIdx.x % GROUP == 0;
            auto start_dP = [&] {
                wait_for(barriers.dO_full, at.n);
                multiply(dP_rmem, V_smem, dO_of(at.n));
            };
            auto to_dS = [&] {
                ptx::bar_sync(P_IS_THERE, CONSUMERS * GROUP);
                write_dS(dS_of(at.n), smem + (P_of(at.n) - K_smem), dP_rmem, Delta_of(at.n), mine, [](float x, int, int, int) { return x; });
                ptx::fence_proxy_async();  // this thread's part of dSᵀ
                if (stores) ptx::cp_async_bulk_wait_group_read<0>();  // dS of the tile before has been stored: the next one is written in its place
            };
            auto store_dS = [&] {
                if (!stores) return;
                const int64_t tile = piece.tile(p, Tiles(p), head, at.h - kv_h * (p.H / p.Hkv), at.i0 / BLOCK, j_tile);
                ptx::cp_async_bulk_tensor_4d_store(&maps.dS, 0, static_cast<int>(tile) * BLOCK, 0, 0, dS_of(at.n));
                ptx::cp_async_bulk_commit_group();
            };
            if (at.more()) {
                start_dP();
                ptx::wgmma_wait_group<0>();
                to_dS();
                meet();
                wait_for(barriers.Q_full, 0);
                add_dK(0);
                store_dS();
                int n = 0;  // the tile before
                for (at.advance(); at.more(); at.advance(), ++n) {
                    start_dP();
                    add_dV(n);
                    ptx::wgmma_wait_group<1>();  // dPᵀ is there, and dK: done with Q
                    release(barriers.Q_empty, n);
                    to_dS();
                    ptx::wgmma_wait_group<0>();  // dV is there: done with dO
                    release(barriers.dO_empty, n);
                    meet();
                    wait_for(barriers.Q_full, at.n);
                    add_dK(at.n);
                    store_dS();
                }
                add_dV(n);
                ptx::wgmma_wait_group<0>();
            }
            if (stores) ptx::cp_async_bulk_wait_group_read<0>();  // the block must not end while the copy engine reads its shared memory
        }

        // dK and dV are stored by way of the buffers of K and V, so that global stores are 16 bytes wide.
        meet();  // both groups are done with K and V
        auto store = [&](const float(&C)[COLUMNS / 2], int offset, const Tensor4& to, int D, float scale) {
#pragma unroll
            for (int r = 0; r < 2; ++r)
#pragma unroll
                for (int c = 0; c < COLUMNS / 8; ++c)
                    ptx::st_shared(K_smem + offset + Tile::offset(mine.place + 8 * r, consumer * COLUMNS / 8 + c) + 4 * mine.t,
                                   ptx::cvt_pair<element>(C[4 * c + 2 * r] * scale, C[4 * c + 2 * r + 1] * scale));
            __syncwarp();  // the warp's rows are written, by lanes other than those that read them next
            store_16_rows<Tile, InOrder, COLUMNS>(head_of(to, b, kv_h), smem + offset, to.stride_n, warp * 16, lane, j0, p.Nk, D, consumer * COLUMNS);
        };
        store(dK_rmem, 0, p.dk, p.D, p.scale);
        store(dV_rmem, Tile::BYTES, p.dv, p.Dv, 1);
    }
}

extern "C" int64_t workspace_floats(const AttentionParams* params) { return floats_with_dS(*params); }

extern "C" int attention(const AttentionParams* params) {
    const AttentionParams& p = *params;
    const int64_t all_rows = Workspace::all_rows(p);
    if (!numbers_fit(p, {all_rows / PREPARE_ROWS}) || !pieces_fit(p)) return cudaErrorInvalidConfiguration;
    DeviceGuard guard(p.device);
    if (all_rows > 0) launch_kernel(prepare_kernel, static_cast<unsigned>(all_rows / PREPARE_ROWS), 32 * PREPARE_ROWS, 0, p.stream, p);
    cudaError_t error = cudaFuncSetAttribute(dKV_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SMEM_BYTES);
    Maps maps = {};
    if (error == cudaSuccess && p.Nk > 0) error = make_tensor_map(&maps.k, p.k, p.B, p.Hkv, p.Nk, p.D, BLOCK);
    if (error == cudaSuccess && p.Nk > 0) error = make_tensor_map(&maps.v, p.v, p.B, p.Hkv, p.Nk, p.Dv, BLOCK);
    if (error == cudaSuccess && p.Nq > 0) error = make_tensor_map(&maps.q, p.q, p.B, p.H, p.Nq, p.D, BLOCK);
    if (error == cudaSuccess && p.Nq > 0) error = make_tensor_map(&maps.d_o, p.d_o, p.B, p.H, p.Nq, p.Dv, BLOCK);
    if (error == cudaSuccess) error = make_dS_map(&maps.dS, p, BLOCK);
    if (error != cudaSuccess) return error;
    return launch_pieces(p, [&](const Piece& piece, unsigned blocks) { launch_kernel(dKV_kernel, blocks, THREADS, SMEM_BYTES, p.stream, p, maps, piece); });
}

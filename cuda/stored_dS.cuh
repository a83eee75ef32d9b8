// dS in memory, so that dQ is a matrix product of its own: for head sizes at which dQ, added up in global memory, would cost more.
//
// A backward kernel visits, for some keys, all queries that see them. It sums dK and dV in registers, but has only a small part of each row of dQ: adding
// these parts in memory takes 4 bytes for each of the head's columns and every tile, while no product runs. A row of dS takes 2 bytes for each key, and the
// copy engine stores it meanwhile. Then dQ += dS K, with all of a row's keys in one block, adds nothing in memory and repeats bit for bit.
//
// All of dS would take Nq · Nk elements. So keys are taken in pieces, as many as give every multiprocessor work: a piece's dK and dS, then its part of dQ.
#pragma once

#include "backward_split.cuh"

// A stage of a ring of N, and the parity of the barrier phase in which it is filled.
template <int N>
struct Place {
    int stage = 0, parity = 0;
    __device__ void advance() {
        if (++stage == N) stage = 0, parity ^= 1;
    }
    __device__ int before() const { return stage == 0 ? N - 1 : stage - 1; }
};

// ---- Pᵀ and dSᵀ in shared memory, through which two groups exchange them. Both are rounded to the element type.

constexpr int P_IS_THERE = 2;  // a named barrier: the first group has written Pᵀ, the second may read it

// Where this thread's pair lies in a tile: key `place` or, for r = 1, the one 8 further on; queries 8i + 2t and the next.
__device__ inline uint32_t pair_at(const Lane& mine, int r, int i) { return SwizzledTile<64, 64>::offset(mine.place + 8 * r, i) + 4 * mine.t; }

__device__ inline void write_P(uint32_t P_smem, const float (&P_rmem)[32], const Lane& mine) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r) ptx::st_shared(P_smem + pair_at(mine, r, i), ptx::cvt_pair<element>(P_rmem[4 * i + 2 * r], P_rmem[4 * i + 2 * r + 1]));
}

// dS = P∘(dP − Delta), which may overwrite P. kept(x, r, i, c): x, or 0 if dropout drops element c of the pair. With dropout this is dS / keep_scale.
template <class Kept>
__device__ inline void write_dS(uint32_t dS_smem, const uint8_t* P_smem, const float (&dP_rmem)[32], const float* Delta_smem, const Lane& mine, Kept kept) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float2 Delta = *reinterpret_cast<const float2*>(Delta_smem + 8 * i + 2 * mine.t);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const uint32_t P = *reinterpret_cast<const uint32_t*>(P_smem + pair_at(mine, r, i));
            const element* P_pair = reinterpret_cast<const element*>(&P);
            const float dP0 = kept(dP_rmem[4 * i + 2 * r], r, i, 0), dP1 = kept(dP_rmem[4 * i + 2 * r + 1], r, i, 1);
            const float dS0 = static_cast<float>(P_pair[0]) * (dP0 - Delta.x), dS1 = static_cast<float>(P_pair[1]) * (dP1 - Delta.y);
            ptx::st_shared(dS_smem + pair_at(mine, r, i), ptx::cvt_pair<element>(dS0, dS1));
        }
    }
}

// ---- pieces

constexpr int BLOCK = 64;  // keys and queries of a tile of dS
using Panel = SwizzledTile<BLOCK, 64>;
using Tile_S = SwizzledTile<BLOCK, BLOCK>;  // of Pᵀ and dSᵀ: rows are keys

// The tiles of a head's scores in which a query may see a key. Causal, query tile i sees key tiles up to i + shift.
struct Tiles {
    int queries, keys, shift;

    __host__ __device__ explicit Tiles(const AttentionParams& p)
        : queries((p.Nq + BLOCK - 1) / BLOCK), keys((p.Nk + BLOCK - 1) / BLOCK), shift(CAUSAL ? (p.Nk - p.Nq + BLOCK - 1) >> 6 : keys) {}
    // The first query tile that sees key tile j; the later ones do, too.
    __host__ __device__ int first_seeing(int j) const { return j < shift ? 0 : j - shift; }
    // How many key tiles, from the first on, query tile i sees.
    __host__ __device__ int seen_by(int i) const { return i + shift + 1 < 0 ? 0 : i + shift + 1 < keys ? i + shift + 1 : keys; }
    // The number of tiles with keys before key tile j.
    __host__ __device__ int64_t before(int j) const { return static_cast<int64_t>(j) * queries - (hidden(j - shift) - hidden(-shift)); }

  private:
    // 0 + 1 + … + (n − 1): one query tile less for each further key tile.
    __host__ __device__ static int64_t hidden(int n) { return n < 0 ? 0 : static_cast<int64_t>(n) * (n - 1) / 2; }
};

// The keys whose dS is in memory: `keys` tiles from `first_key` on, of `heads` heads of K from `first_head` on, counted through all batches.
struct Piece {
    int first_head, heads, first_key, keys;

    // The number of a tile in memory: [heads of Q][key tiles][query tiles that see them]. head: of K, in the piece. h: of Q, among those that share it.
    __device__ int64_t tile(const AttentionParams& p, const Tiles& tiles, int head, int h, int i, int j) const {
        const int64_t of_head = tiles.before(first_key + keys) - tiles.before(first_key);
        return (head * (p.H / p.Hkv) + h) * of_head + tiles.before(j) - tiles.before(first_key) + i - tiles.first_seeing(j);
    }
};

// How a call is cut into pieces: whole heads, or equal parts of one. dS of a piece takes 2 MB for each multiprocessor (256 tiles); more only where one
// key tile has more, and less where that would be more than 8 key tiles for each.
struct Pieces {
    int heads, keys;  // of a piece
    int64_t dS_tiles, dQ_floats;  // dQ: of a head whose keys are in several pieces, from one to the next

    explicit Pieces(const AttentionParams& p) {
        const Tiles tiles(p);
        const int group = p.H / p.Hkv;
        const int64_t of_head = group * tiles.before(tiles.keys), all = tiles.keys, least = p.sm_count;
        const int64_t wanted = of_head == 0 ? all : std::clamp(least * 256 * all / of_head, least, 8 * least);  // key tiles
        const int64_t parts = all == 0 ? 1 : tiles_of(all, wanted);
        keys = static_cast<int>(tiles_of(all, parts));
        heads = parts > 1 ? 1 : static_cast<int>(std::min<int64_t>(all == 0 ? p.B * p.Hkv : wanted / all, p.B * p.Hkv));
        dS_tiles = heads * group * tiles.before(keys);  // causal: the first keys are seen by the most rows
        dQ_floats = parts > 1 ? tiles_of(p.Nq, 128) * 128 * group * HEAD_DIM : 0;
    }
};

// ---- dQ

namespace of_q {

constexpr int BLOCK_Q = CONSUMERS * BLOCK, PARTS = HEAD_DIM > 256 ? 2 : 1, COLUMNS = HEAD_DIM / PARTS;  // a block computes a part of dQ's columns
constexpr int PANELS = (COLUMNS + 63) / 64;
using Tile_dQ = SwizzledTile<BLOCK_Q, 64 * PANELS>;
constexpr int K_BYTES = PANELS * Panel::BYTES, STAGE_BYTES = K_BYTES + CONSUMERS * Tile_S::BYTES;
constexpr int STAGES = SMEM_LIMIT / STAGE_BYTES, SMEM_BYTES = STAGES * STAGE_BYTES;
static_assert(STAGES >= 3 && Tile_dQ::BYTES <= SMEM_BYTES, "choose smaller tiles");

struct Maps {
    CUtensorMap k, dS;
};

// One block adds a piece's part to dQ of BLOCK_Q rows: dQ += dS K. A head's last piece rounds it; until then it is in `sums`, float32,
// as registers lie: [block][register][thread].
__global__ void __launch_bounds__(THREADS, 1)
    dQ_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Maps maps, Piece piece, float* sums) {
    __shared__ __align__(8) uint64_t full[STAGES], empty[STAGES];
    auto barrier = [](uint64_t& of) { return ptx::smem_address(&of); };
    const Tiles tiles(p);
    const int row_tiles = (p.Nq + BLOCK_Q - 1) / BLOCK_Q, share = p.H / p.Hkv, of_head = blockIdx.x / PARTS % row_tiles, part = blockIdx.x % PARTS;
    const int head_of_piece = blockIdx.x / PARTS / row_tiles, head = head_of_piece / share;
    const int b_kv_h = piece.first_head + head, b = b_kv_h / p.Hkv, kv_h = b_kv_h % p.Hkv, h = kv_h * share + head_of_piece % share;
    const int i_tile = (CAUSAL ? row_tiles - 1 - of_head : of_head) * CONSUMERS;  // causal: the rows that see the most start first
    const int steps = max(0, min(piece.keys, tiles.seen_by(i_tile + CONSUMERS - 1) - piece.first_key));  // key tiles that some of the block's rows see
    // Shared memory of a stage: K [BLOCK, COLUMNS] in panels, and dSᵀ [BLOCK keys, BLOCK queries] for each group
    auto stage_smem = [&](int stage) { return ptx::smem_address(smem) + stage * STAGE_BYTES; };

    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            ptx::mbarrier_init(barrier(full[stage]), 1);
            ptx::mbarrier_init(barrier(empty[stage]), GROUP * CONSUMERS);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();

    const int group = uniform(threadIdx.x / GROUP);
    if (group == 0) {
        // ---- the producer
        ptx::setmaxnreg_dec<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) {
            Place<STAGES> place;
            for (int n = 0; n < steps; ++n, place.advance()) {
                const uint32_t to = stage_smem(place.stage), arrived = barrier(full[place.stage]);
                const int j = piece.first_key + n;
                ptx::mbarrier_wait(barrier(empty[place.stage]), place.parity ^ 1);
                ptx::mbarrier_arrive_expect_tx(arrived, STAGE_BYTES);
                for (int panel = 0; panel < PANELS; ++panel)
                    ptx::cp_async_bulk_tensor_4d(to + panel * Panel::BYTES, &maps.k, part * COLUMNS + panel * 64, j * BLOCK, kv_h, b, arrived);
                for (int consumer = 0; consumer < CONSUMERS; ++consumer) {
                    // Of the causal tile that only the other group's rows see, zeros are loaded: it is outside of the tensor. Rows beyond the last one may get
                    // anything.
                    const int i = i_tile + consumer;
                    const int row = j < tiles.seen_by(i) ? static_cast<int>(piece.tile(p, tiles, head, head_of_piece % share, i, j)) * BLOCK : -BLOCK;
                    ptx::cp_async_bulk_tensor_4d(to + K_BYTES + consumer * Tile_S::BYTES, &maps.dS, 0, row, 0, 0, arrived);
                }
            }
        }
    } else {
        // ---- the consumers: 64 rows each
        ptx::setmaxnreg_inc<CONSUMER_REGISTERS>();
        const int consumer = group - 1, warp = threadIdx.x % GROUP / 32, lane = threadIdx.x % 32;
        const Lane mine(consumer * BLOCK);
        float dQ_rmem[COLUMNS / 2] = {};

        Place<STAGES> place;
        for (int n = 0; n < steps; ++n, place.advance()) {
            ptx::mbarrier_wait(barrier(full[place.stage]), place.parity);
            const uint64_t dS_columns = ptx::descriptor(uniform(stage_smem(place.stage) + K_BYTES + consumer * Tile_S::BYTES));
            const uint64_t K_columns = ptx::descriptor(uniform(stage_smem(place.stage)), Panel::BYTES);
            ptx::wgmma_fence();
#pragma unroll
            for (int k = 0; k < BLOCK / 16; ++k) {  // the summation index runs over the rows of both
                const int rows = k * 16 * ROW_BYTES;
                ptx::wgmma_ss_transposed<element, COLUMNS>(dQ_rmem, ptx::advance(dS_columns, rows), ptx::advance(K_columns, rows), 1);
            }
            ptx::wgmma_commit_group();
            ptx::wgmma_wait_group<1>();  // the step before has been added
            if (n > 0) ptx::mbarrier_arrive(barrier(empty[place.before()]));
        }
        ptx::wgmma_wait_group<0>();

        sums += static_cast<int64_t>(blockIdx.x) * (COLUMNS / 2) * CONSUMERS * GROUP + threadIdx.x - GROUP;
        if (piece.first_key > 0)
#pragma unroll
            for (int e = 0; e < COLUMNS / 2; ++e) dQ_rmem[e] += sums[e * CONSUMERS * GROUP];
        if (piece.first_key + piece.keys < tiles.keys) {
#pragma unroll
            for (int e = 0; e < COLUMNS / 2; ++e) sums[e * CONSUMERS * GROUP] = dQ_rmem[e];
            return;
        }
        meet();  // both groups are done with the stages: dQ goes through them, so that global stores are 16 bytes wide
        const float scale = DROPOUT ? p.scale * p.keep_scale : p.scale;
        const uint32_t dQ_smem = ptx::smem_address(smem);
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int c = 0; c < COLUMNS / 8; ++c)
                ptx::st_shared(dQ_smem + Tile_dQ::offset(mine.place + 8 * r, c) + 4 * mine.t,
                               ptx::cvt_pair<element>(dQ_rmem[4 * c + 2 * r] * scale, dQ_rmem[4 * c + 2 * r + 1] * scale));
        __syncwarp();  // the warp's rows are written, by lanes other than those that read them next
        store_16_rows<Tile_dQ, InOrder, COLUMNS>(head_of(p.dq, b, h) + part * COLUMNS, smem, p.dq.stride_n, consumer * BLOCK + warp * 16, lane,
                                                 i_tile * BLOCK, p.Nq, min(COLUMNS, p.D - part * COLUMNS));
    }
}

}  // namespace of_q

// ---- launching

inline float* workspace_for_dS(const AttentionParams& p) { return p.workspace + 2 * Workspace::all_rows(p); }
inline int64_t floats_with_dS(const AttentionParams& p) {
    const Pieces pieces(p);
    return 2 * Workspace::all_rows(p) + pieces.dS_tiles * Tile_S::BYTES / 4 + pieces.dQ_floats;
}

// Of dS as one matrix with BLOCK columns: a tile is BLOCK rows.
inline cudaError_t make_dS_map(CUtensorMap* map, const AttentionParams& p, int rows_of_box) {
    const int64_t rows = Pieces(p).dS_tiles * BLOCK;
    return rows == 0 ? cudaSuccess : make_tensor_map(map, {workspace_for_dS(p), 0, 0, BLOCK}, 1, 1, static_cast<int>(rows), BLOCK, rows_of_box);
}

// Whether the rows of dS can be numbered, and the blocks of dQ.
inline bool pieces_fit(const AttentionParams& p) {
    return numbers_fit(p, {Pieces(p).dS_tiles * BLOCK, tiles_of(p.Nq, of_q::BLOCK_Q) * p.H * p.B * of_q::PARTS});
}

// For each piece: launch_keys(piece, blocks), which launches the kernel that computes dK and stores dS, a block for each tile of keys; then dQ.
template <class LaunchKeys>
inline cudaError_t launch_pieces(const AttentionParams& p, LaunchKeys launch_keys) {
    const Tiles tiles(p);
    const Pieces pieces(p);
    const int heads = p.B * p.Hkv;
    float* sums = workspace_for_dS(p) + pieces.dS_tiles * Tile_S::BYTES / 4;
    of_q::Maps maps = {};
    cudaError_t error = cudaFuncSetAttribute(of_q::dQ_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, of_q::SMEM_BYTES);
    if (error == cudaSuccess && p.Nk > 0) error = make_tensor_map(&maps.k, p.k, p.B, p.Hkv, p.Nk, p.D, BLOCK);
    if (error == cudaSuccess) error = make_dS_map(&maps.dS, p, BLOCK);
    for (int head = 0; head < heads && error == cudaSuccess; head += pieces.heads) {
        int key = 0;
        do {  // once without keys, too: dQ is 0
            const Piece piece = {head, std::min(pieces.heads, heads - head), key, std::min(pieces.keys, tiles.keys - key)};
            const int64_t dQ_blocks = tiles_of(p.Nq, of_q::BLOCK_Q) * piece.heads * (p.H / p.Hkv) * of_q::PARTS;
            if (piece.keys > 0) launch_keys(piece, static_cast<unsigned>(piece.heads * piece.keys));
            if (dQ_blocks > 0) launch_kernel(of_q::dQ_kernel, static_cast<unsigned>(dQ_blocks), THREADS, of_q::SMEM_BYTES, p.stream, p, maps, piece, sums);
            error = cudaGetLastError();
            key += pieces.keys;
        } while (key < tiles.keys && error == cudaSuccess);
    }
    return error;
}

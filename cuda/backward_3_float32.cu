// Backward in float32 on tensor cores: FlashAttention-2, Algorithm 2, each product of float32 numbers made of three of float16 numbers (Ootomo and
// Yokota, 2022, arXiv:2203.03341).  sm_80 and newer.
//
// The idea: forward_3_float32.cu's, for the backward's products. Q, K, V and dO come as planes (planes.cuh). The same kernel runs twice: for rows of
// Q it computes dQ, for rows of K dK and dV. A warp owns rows of the gradients, so those are the rows of S (or Sᵀ) and dP in its accumulators; P and
// dS, split in registers, are the A operands of P dO and dS Q (or dS K) as they lie. Nothing but planes goes through shared memory, and nothing is
// summed in global memory, so gradients repeat bit for bit.
//
// Change from backward_3_tensor_core.cu: each product becomes three (planes_mma.cuh), and seven products are computed instead of five, because S and
// dP are computed for dQ once more. Sharing dS, of two planes, among warps and adding up dQ in global memory would cost about as much.
//
// Serves float32, everything in the interface but windows and spans, positive scale; head sizes up to 128 that are multiples of 4.
//
// One file because its kernel is one loop, for two sides of the scores, whose branches share the stages and the registers.
#include "planes_mma.cuh"

#if MASK && MASK != MASK_OF_BITS
#error "this rung reads masks of bits"
#endif

// Heads whose values the planes cannot represent are computed by the `simple` rung.
__device__ inline bool planes_have_served(const AttentionParams& p, int b, int h_kv) { return gradients_fit(p, range_before(p, b, h_kv)); }
#define HEAD_IS_DONE(p, b, h) planes_have_served(p, b, h)
#define attention exact_attention
#define workspace_floats exact_workspace_floats
namespace exact {
#include "backward_1_simple.cu"
}
#undef attention
#undef workspace_floats

// ---- tile sizes. A block owns OWN rows of gradients and meets OTHERS rows of the other side at a time. At D 64 a warp owns 32 rows, and two blocks
// share a multiprocessor; at D 128 there are registers for 16, and shared memory for one block, of 8 warps where it has room for them.
constexpr int M_TILES = HEAD_DIM <= 64 ? 2 : 1, WARP_ROWS = 16 * M_TILES;
constexpr int WARPS = HEAD_DIM > 64 && SMEM_KB >= 163 ? 8 : 4;
constexpr int THREADS = 32 * WARPS;
constexpr int OWN = WARPS * WARP_ROWS;
constexpr int OTHERS = 32;
constexpr int STAGES = SMEM_KB >= 227 || (HEAD_DIM <= 64 && SMEM_KB < 163) ? 2 : 1;  // tiles of others in shared memory

using Tile_Own = SwizzledTile<OWN, HEAD_DIM>;
using Tile_Other = SwizzledTile<OTHERS, HEAD_DIM>;
constexpr int OWN_BYTES = PLANES * Tile_Own::BYTES, OTHER_BYTES = PLANES * Tile_Other::BYTES;
constexpr int ROWS_BYTES = OTHERS * 4;  // of LSE, and as many of Delta
constexpr int STAGE_BYTES = 2 * OTHER_BYTES;
constexpr int ROWS_OFFSET = 2 * OWN_BYTES + STAGES * STAGE_BYTES;
constexpr int SMEM_BYTES = ROWS_OFFSET + STAGES * 2 * ROWS_BYTES;
static_assert(SMEM_BYTES <= SMEM_KB * 1024, "choose smaller tiles");

constexpr int P_EXPONENT = 15;  // P, at most 1, is multiplied by 2^15, to fill float16's range

// ---- workspace: planes, and LSE and Delta of every row, padded to whole tiles, of a part of the heads; the Ranges; the simple rung's own
struct Workspace {
    float *LSE, *Delta;  // [B·H·rows]
    First first;         // head of the part
    int rows;            // of one head

    static int64_t all_rows(const AttentionParams& p) { return tiles_of(p.Nq, OWN) * OWN * p.H * p.B; }
    static int64_t floats(const AttentionParams& p) { return 2 * all_rows(p); }
    Workspace(const AttentionParams& p, const Operands& all, First first) : first(first), rows(static_cast<int>(tiles_of(p.Nq, OWN) * OWN)) {
        LSE = p.workspace + all.floats, Delta = LSE + all_rows(p);
    }
};

// ---- the first kernel: Delta = rowsum(dO∘O) − dLSE (line 4), in the scale of dP; LSE

__global__ void __launch_bounds__(PREPARE_THREADS)
    delta_kernel(const __grid_constant__ AttentionParams p, Range* ranges, const __grid_constant__ Workspace workspace) {
    const int blocks_per_head = workspace.rows / ROWS_AT_ONCE;
    const int i = blockIdx.x % blocks_per_head * ROWS_AT_ONCE + threadIdx.x / ROW_LANES;
    const int bh = blockIdx.x / blocks_per_head, b = bh / p.H, h = bh % p.H;
    const int column = threadIdx.x % ROW_LANES * 8;
    Range& range = ranges[b * p.Hkv + kv_head(p, h)];

    float part_of_Delta = 0;
    const float* O_gmem = static_cast<const float*>(p.o.data) + b * p.o.stride_b + h * p.o.stride_h + i * p.o.stride_n + column;
    const float* dO_gmem = static_cast<const float*>(p.d_o.data) + b * p.d_o.stride_b + h * p.d_o.stride_h + i * p.d_o.stride_n + column;
#pragma unroll
    for (int half = 0; half < 2; ++half)
        if (i < p.Nq && column + 4 * half < p.Dv) {
            const float4 O = reinterpret_cast<const float4*>(O_gmem)[half], dO = reinterpret_cast<const float4*>(dO_gmem)[half];
            part_of_Delta += fmaf(O.x, dO.x, fmaf(O.y, dO.y, fmaf(O.z, dO.z, O.w * dO.w)));
        }
    const auto [LSE, Delta] = finish_row(p, range, bh, i, part_of_Delta);
    const int64_t row = static_cast<int64_t>(bh) * workspace.rows + i;
    if (column == 0) workspace.LSE[row] = LSE, workspace.Delta[row] = Delta;
}

// ---- the products

// The tiles of others that a block meets: tiles of keys, from the first, or tiles of Q that see some of the block's keys, of every query head that
// shares them.
template <bool OF_Q>
struct Visit {
    int h, end_h, begin, end;
    int tile, stage = 0;  // and where in shared memory the tile is

    __device__ Visit(const AttentionParams& p, int head, int row0) {
        const int group = p.H / p.Hkv;
        h = OF_Q ? head : head * group, end_h = OF_Q ? h + 1 : h + group;
        begin = OF_Q ? 0 : first_row_of(p, row0) / OTHERS;
        end = ((OF_Q ? stop_of_rows(p, row0, OWN) : p.Nq) + OTHERS - 1) / OTHERS;
        if (begin >= end) h = end_h;
        tile = begin;
    }
    __device__ bool more() const { return h < end_h; }
    __device__ void advance() {
        if (++tile == end) tile = begin, ++h;
        if (STAGES == 2) stage ^= 1;
    }
};

// One block computes OWN rows of a head's gradients, from row0 on. Causal: those that meet the most start first.
struct Rows {
    int row0, head, b, b_kv_h;  // head: of Q or of K; b_kv_h = b·Hkv + kv_h
};
template <bool OF_Q>
__device__ inline Rows rows_of_block(const AttentionParams& p) {
    const int block = ptx::ctaid_x(), heads = OF_Q ? p.H : p.Hkv, tiles = ((OF_Q ? p.Nq : p.Nk) + OWN - 1) / OWN;
    const int tile = CAUSAL && OF_Q ? tiles - 1 - block % tiles : block % tiles, head = block / tiles % heads, b = block / tiles / heads;
    return {tile * OWN, head, b, b * p.Hkv + (OF_Q ? kv_head(p, head) : head)};
}

// OF_Q: the block's rows are queries, it computes dQ, and meets keys. Otherwise they are keys, it computes dK and dV, and meets queries; then S, P,
// dP and dS below are transposed. X and Y are the operands of S, of the block's own rows and of the others; A and B are those of dP.
template <bool OF_Q>
__global__ void __launch_bounds__(THREADS, 1)
    gradient_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Operands all, const __grid_constant__ Workspace workspace) {
    extern __shared__ __align__(1024) uint8_t smem[];
    const uint32_t X_smem = ptx::smem_address(smem);             // PLANES × [OWN, HEAD_DIM]
    const uint32_t A_smem = X_smem + OWN_BYTES;                  // PLANES × [OWN, HEAD_DIM]
    const uint32_t stages_smem = A_smem + OWN_BYTES;             // STAGES × (PLANES × Y [OTHERS, HEAD_DIM], PLANES × B [OTHERS, HEAD_DIM])
    const float* rows_smem = reinterpret_cast<const float*>(smem + ROWS_OFFSET);  // STAGES × (LSE [OTHERS], Delta [OTHERS]), where others are queries
    enum { Q, K, V, DO };
    constexpr int X = OF_Q ? Q : K, A = OF_Q ? DO : V, Y = OF_Q ? K : Q, B = OF_Q ? V : DO;

    const Rows rows = rows_of_block<OF_Q>(p);
    const int row0 = rows.row0, head = rows.head, b = rows.b, b_kv_h = rows.b_kv_h;
    const int offset = p.Nk - p.Nq;  // causal: row i sees columns j ≤ i + offset
    const Range& range = all.ranges[b_kv_h];
    if (!scores_fit(p, range)) return;  // the simple rung's

    const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
    const int g = lane / 4, t = lane % 4;                      // this lane's row and column pair in an 8×8 fragment
    const int warp_row = warp * WARP_ROWS;                     // the warp's first row in the tile

    auto load_others = [&](const Visit<OF_Q>& at) {
        if (at.more()) {
            const int first = at.tile * OTHERS, bh = OF_Q ? b_kv_h : b * p.H + at.h;
            const uint32_t Y_smem = stages_smem + at.stage * STAGE_BYTES;
            load_planes<Tile_Other, THREADS>(Y_smem, all.of[Y], bh, first);
            load_planes<Tile_Other, THREADS>(Y_smem + OTHER_BYTES, all.of[B], bh, first);
            constexpr int CHUNKS = OTHERS / 4;  // of 16 bytes in LSE, and as many in Delta
            if (!OF_Q && threadIdx.x < 2 * CHUNKS) {
                const float* source = threadIdx.x < CHUNKS ? workspace.LSE : workspace.Delta;
                source += static_cast<int64_t>(bh) * workspace.rows + first + threadIdx.x % CHUNKS * 4;
                ptx::cp_async_16(X_smem + ROWS_OFFSET + at.stage * 2 * ROWS_BYTES + threadIdx.x * 16, source, true);
            }
        }
        ptx::cp_async_commit_group();
    };
    Visit<OF_Q> now(p, head, row0);
    if (now.more()) {
        load_planes<Tile_Own, THREADS>(X_smem, all.of[X], OF_Q ? b * p.H + head : b_kv_h, row0);
        load_planes<Tile_Own, THREADS>(A_smem, all.of[A], OF_Q ? b * p.H + head : b_kv_h, row0);
    }
    load_others(now);

    const float scale = scale_of_scores(p, range);
    const float dS_factor = scalbnf(1, exponent_of_dS(range) - P_EXPONENT);  // of P as it is scaled
    float LSE_rmem[M_TILES][2], Delta_rmem[M_TILES][2];            // of rows g and g + 8, where they are queries
    if (OF_Q) {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int64_t row = static_cast<int64_t>(b * p.H + head) * workspace.rows + row0 + warp_row + 16 * m + 8 * r + g;
                LSE_rmem[m][r] = workspace.LSE[row], Delta_rmem[m][r] = workspace.Delta[row];
            }
    }

    const bool always = p.scale > 0;  // planes_mma.cuh says what for

    constexpr int D_TILES = HEAD_DIM / 8;
    constexpr int PASS = !OF_Q && M_TILES == 2 ? 16 : OTHERS;  // others whose scores are computed at a time: with two gradients, registers are short
    constexpr int N_TILES = PASS / 8;
    float X_rmem[M_TILES][D_TILES][4] = {};                                        // dQ or dK
    [[maybe_unused]] float V_rmem[OF_Q ? 1 : M_TILES][OF_Q ? 1 : D_TILES][4] = {};  // dV
    const uint32_t X_lane = X_smem + Tile_Own::lane_a(warp_row, lane), A_lane = X_lane + OWN_BYTES;

    while (now.more()) {
        // The query head, and the first query and key of the warp's part of the tile.
        const int h = now.h, own = row0 + warp_row, other = now.tile * OTHERS, i0 = OF_Q ? own : other, j0 = OF_Q ? other : own;
        const uint32_t Y_smem = stages_smem + now.stage * STAGE_BYTES;
        const float* LSE_smem = rows_smem + now.stage * 2 * OTHERS;

        // Bits about the elements of S in this lane: element(m, n, r, e) is that of row 16·m + 8·r + g, column 8·n + 2·t + e.
        auto element = [](int m, int n, int r, int e) { return 1u << (((n * M_TILES + m) * 2 + r) * 2 + e); };
        auto for_each = [&](auto visit) {  // visit(element, row, column)
#pragma unroll
            for (int n = 0; n < OTHERS / 8; ++n)
#pragma unroll
                for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                    for (int r = 0; r < 2; ++r)
#pragma unroll
                        for (int e = 0; e < 2; ++e) visit(element(m, n, r, e), 16 * m + 8 * r + g, 8 * n + 2 * t + e);
        };
        uint32_t hidden = 0;
#if MASK
        // A lane loads the word of one query for 32 keys, and hands it to the lanes that have elements of this query.
        const int query = i0 + lane % (OF_Q ? WARP_ROWS : OTHERS);
        const uint32_t* mask_gmem = static_cast<const uint32_t*>(p.mask.data) + b * p.mask.stride_b + h * p.mask.stride_h;
        const uint32_t word = mask_gmem[min(query, p.Nq - 1) * p.mask.stride_i + j0 / 32];
        for_each([&](uint32_t bit, int row, int column) {
            const uint32_t of_query = __shfl_sync(0xffffffff, word, OF_Q ? row : column);
            if (of_query >> (OF_Q ? column : j0 % 32 + row) & 1) hidden |= bit;
        });
#endif
        // Whether the diagonal or the end of the keys cuts this part of the tile; beyond the end of the rows LSE is ∞.
        const bool cut = j0 + (OF_Q ? OTHERS : WARP_ROWS) > min(p.Nk, CAUSAL ? i0 + offset + 1 : p.Nk);
        if (cut)
            for_each([&](uint32_t bit, int row, int column) {
                const int i = i0 + (OF_Q ? row : column), j = j0 + (OF_Q ? column : row);
                if (j >= p.Nk || (CAUSAL && j > i + offset)) hidden |= bit;
            });
        uint32_t kept = ~0u;
#if DROPOUT
        // A call of Philox covers 32 queries and 32 keys, 8 apart: a word for each query, of which a byte for each key. Two calls serve the lane's
        // columns.
        kept = 0;
        const uint2 key = dropout_key(p);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int i = i0 / 32 * 32 + (OF_Q ? g : 2 * t + e), j = j0 / 32 * 32 + (OF_Q ? 2 * t + e : g);
            const uint4 words = dropout_bytes(key, workspace.first.b + b, workspace.first.h + h, i, j);
            const bool upper = (OF_Q ? i0 : j0) % 32 == 16;  // the warp has the last 16 of the 32 rows
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int r = 0; r < 2; ++r)
#pragma unroll
                    for (int n = 0; n < OTHERS / 8; ++n) {
                        const int of_query = OF_Q ? 2 * m + r : n, of_key = OF_Q ? n : 2 * m + r;
                        uint32_t x = of_query == 0 ? words.x : of_query == 1 ? words.y : of_query == 2 ? words.z : words.w;
                        if (OF_Q && upper) x = of_query == 0 ? words.z : words.w;
                        if (!OF_Q && upper) x >>= 16;
                        if ((x >> 8 * of_key & 0xff) >= static_cast<uint32_t>(p.drop_below)) kept |= element(m, n, r, e);
                    }
        }
#endif

        ptx::cp_async_wait_group<0>();
        __syncthreads();  // the tile is there for every thread, and every warp is done with the one before
        now.advance();
        if (STAGES == 2) load_others(now);

#pragma unroll 1
        for (int pass = 0; pass < OTHERS / PASS; ++pass) {
            const uint32_t Y_pass = Y_smem + pass * PASS * ROW_BYTES, B_pass = Y_pass + OTHER_BYTES;
            const uint32_t pass_hidden = hidden >> pass * 16, pass_kept = kept >> pass * 16;  // PASS columns have 16 bits, if they are not all
            float P_rmem[M_TILES][N_TILES][4] = {}, dS_rmem[M_TILES][N_TILES][4] = {};
            // Calls visit(x, hidden, kept, LSE, Delta) for each element's place in both arrays; of LSE and Delta those of its query.
            auto each = [&](auto visit) {
#pragma unroll
                for (int n = 0; n < N_TILES; ++n) {
                    float2 LSE = {}, Delta = {};
                    if (!OF_Q) {
                        LSE = *reinterpret_cast<const float2*>(LSE_smem + pass * PASS + 8 * n + 2 * t);
                        Delta = *reinterpret_cast<const float2*>(LSE_smem + OTHERS + pass * PASS + 8 * n + 2 * t);
                    }
#pragma unroll
                    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                        for (int r = 0; r < 2; ++r)
#pragma unroll
                            for (int e = 0; e < 2; ++e)
                                visit(P_rmem[m][n][2 * r + e], dS_rmem[m][n][2 * r + e], element(m, n, r, e),
                                      OF_Q ? LSE_rmem[m][r] : e == 0 ? LSE.x : LSE.y, OF_Q ? Delta_rmem[m][r] : e == 0 ? Delta.x : Delta.y);
                }
            };

            // P = exp(scale · S − LSE). The difference comes first: in base 2, score and LSE would each be rounded, relative to their size. The
            // product is rounded, as in LSE. S is the forward's to the last bit: there too, lo of Q comes first.
            if (always) multiply<Tile_Own, Tile_Other, OF_Q>(P_rmem, X_lane, Y_pass + Tile_Other::lane_b(0, lane));
            each([&](float& P, float&, uint32_t bit, float LSE, float) {
                P = ptx::ex2(fmaf(__fmul_rn(P, scale) - LSE, LOG2_E, P_EXPONENT));
                if ((MASK || cut) && pass_hidden & bit) P = 0;
            });
            // dS = P∘(dP − Delta). With dropout, dS = P∘(keep_scale · kept dP − Delta); the factor keep_scale is applied at the end, as for dV.
            if (always) multiply<Tile_Own, Tile_Other, true>(dS_rmem, A_lane, B_pass + Tile_Other::lane_b(0, lane));
            each([&](float& P, float& dS, uint32_t bit, float, float Delta) {
                const bool keep = !DROPOUT || pass_kept & bit;
                dS = P * dS_factor * ((keep ? dS : 0) - Delta);
                if (!keep) P = 0;
            });

            uint32_t planes[PLANES][PASS / 16][M_TILES][4];
            if constexpr (!OF_Q) {  // dV += Pᵀ dO
                split_fragments(planes, P_rmem);
                multiply_tile<Tile_Other>(always, planes, B_pass + Tile_Other::lane_b_trans(lane), [&](int m, int d, const float(&part)[4]) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) V_rmem[m][d][e] += part[e];
                });
            }
            split_fragments(planes, dS_rmem);  // dQ += dS K, or dK += dSᵀ Q
            multiply_tile<Tile_Other>(always, planes, Y_pass + Tile_Other::lane_b_trans(lane), [&](int m, int d, const float(&part)[4]) {
#pragma unroll
                for (int e = 0; e < 4; ++e) X_rmem[m][d][e] += part[e];
            });
        }

        if (STAGES == 1) {
            __syncthreads();  // every warp is done with the tile
            load_others(now);
        }
    }

    // Stores a gradient, two columns at a time: four lanes write 32 bytes of a row. `exponent` is that of the power of two by which the sum is too
    // large. Where the block's rows lie is computed anew, so that it need not be kept in registers.
    const Rows out = rows_of_block<OF_Q>(p);
    Range& of_head = all.ranges[out.b_kv_h];
    auto store = [&](const auto& sum, const Tensor4& to, int columns, int exponent, float factor, int* largest_of_head) {
        const int first = out.row0 + ptx::tid_x() / 32 * WARP_ROWS + ptx::tid_x() % 32 / 4;
        float* to_gmem = static_cast<float*>(to.data) + out.b * to.stride_b + out.head * to.stride_h;
        const PowerOfTwo unscaled(-exponent);
        float largest = 0;
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r)
#pragma unroll
                for (int d = 0; d < D_TILES; ++d) {
                    const float x0 = sum[m][d][2 * r], x1 = sum[m][d][2 * r + 1];
                    const int row = first + 16 * m + 8 * r, column = 8 * d + ptx::tid_x() % 4 * 2;
                    largest = fmaxf(largest, fmaxf(fabsf(x0), fabsf(x1)));
                    if (row < (OF_Q ? p.Nq : p.Nk) && column < columns)
                        *reinterpret_cast<float2*>(to_gmem + row * to.stride_n + column) =
                            make_float2(unscaled.times(x0 * factor), unscaled.times(x1 * factor));
                }
        join_maximum(largest_of_head, magnitude(largest));
    };
    const float keep_scale = DROPOUT ? p.keep_scale : 1.0f;
    const int of_dP = exponent_of(of_head.d_o) + exponent_of(of_head.v), of_other = exponent_of(OF_Q ? of_head.k : of_head.q);
    store(X_rmem, OF_Q ? p.dq : p.dk, p.D, exponent_of_dS(of_head) + of_dP + of_other, keep_scale * p.scale, OF_Q ? &of_head.dq : &of_head.dk);
    if constexpr (!OF_Q) store(V_rmem, p.dv, p.Dv, exponent_of(of_head.d_o) + P_EXPONENT, keep_scale, &of_head.dv);
}

// ---- launching

inline int64_t q_blocks(const AttentionParams& p) { return tiles_of(p.Nq, OWN) * p.H * p.B; }
inline int64_t k_blocks(const AttentionParams& p) { return tiles_of(p.Nk, OWN) * p.Hkv * p.B; }
inline int64_t part_floats(const AttentionParams& p) { return Operands(p, true, nullptr).floats + Workspace::floats(p); }
inline Parts parts_of(const AttentionParams& p) {
    const AttentionParams one = call_of(p, {0, 1, 0, 1});
    return Parts(p, part_floats(p) * 4, {q_blocks(one), k_blocks(one)});
}

extern "C" int64_t workspace_floats(const AttentionParams* params) {
    const AttentionParams& p = *params;
    return part_floats(call_of(p, parts_of(p).largest())) + Operands::range_floats(p) + exact::exact_workspace_floats(params);
}

static cudaError_t launch_part(const AttentionParams& p, Range* ranges, First first) {
    const Operands all(p, true, ranges);
    if (!planes_reachable(all, p.B)) return cudaErrorInvalidValue;
    const Workspace workspace(p, all, first);
    launch_planes(p, all);
    const unsigned rows = static_cast<unsigned>(Workspace::all_rows(p));
    const unsigned of_q = static_cast<unsigned>(q_blocks(p)), of_k = static_cast<unsigned>(k_blocks(p));
    if (rows > 0) launch_kernel(delta_kernel, rows / ROWS_AT_ONCE, PREPARE_THREADS, 0, p.stream, p, ranges, workspace);
    if (of_k > 0) launch_kernel(gradient_kernel<false>, of_k, THREADS, SMEM_BYTES, p.stream, p, all, workspace);
    if (of_q > 0) launch_kernel(gradient_kernel<true>, of_q, THREADS, SMEM_BYTES, p.stream, p, all, workspace);
    return cudaGetLastError();
}

extern "C" int attention(const AttentionParams* params) {
    const AttentionParams& p = *params;
    if (q_blocks(p) == 0 && k_blocks(p) == 0) return cudaSuccess;
    if (!numbers_fit(p, {Workspace::all_rows(p), k_blocks(p), prepare_blocks(p, Operands(p, true, nullptr))})) return cudaErrorInvalidConfiguration;
    DeviceGuard guard(p.device);
    cudaError_t error = cudaSuccess;
    for (const auto kernel : {gradient_kernel<true>, gradient_kernel<false>})
        if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SMEM_BYTES);
    if (error != cudaSuccess) return error;
    return launch_parts(p, parts_of(p), p.workspace + workspace_floats(params) - exact::exact_workspace_floats(params), launch_part, exact::exact_attention);
}

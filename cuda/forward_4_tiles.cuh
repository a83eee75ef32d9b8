// The forward of `hopper`, first part: the sizes of its tiles, their layout in shared memory, and the barriers that say who may access them.
#pragma once

#include <algorithm>

#include "keep_bits.cuh"
#include "mask_start.cuh"
#include "ptx_hopper.cuh"
#include "score_tile.cuh"
#include "seen_tiles.cuh"
#include "swizzle.cuh"
#include "tensor_core.cuh"
#include "tensor_map.cuh"

#if DTYPE == FLOAT32 || (MASK && MASK != MASK_OF_BITS)
#error "this rung computes in 16-bit types, under masks of bits"
#endif

#ifndef TALL
#define TALL 0  // whether tiles have 192 rows of Q and 96 keys (forward_4_hopper_tall.cu)
#endif
#if TALL && (HEAD_DIM > 96 || MASK || DROPOUT || INTERVAL || SCORE)
#error "registers for three groups are left in plain calls of up to 96 columns"
#endif

// ---- sizes. A warpgroup owns 64 rows of Q; its share of the block's registers limits the other sizes.
constexpr int GROUP = 128;  // threads
// Dropout takes the registers that three groups leave; so do changed scores, unless only one of softcap, bias and ALiBi applies.
constexpr bool THREE = HEAD_DIM <= 64 && !DROPOUT && !INTERVAL && (SCORE == 0 || (!MASK && (SCORE == SCORE_SOFTCAP || SCORE == SCORE_BIAS || SCORE == SCORE_ALIBI)));
constexpr int CONSUMERS = TALL || THREE ? 3 : 2;
constexpr int THREADS = GROUP * (1 + CONSUMERS);
// Registers of a thread: all threads start with equally many; then the producer's group returns some, and the others take them.
constexpr int REGISTERS = 65536 / THREADS / 8 * 8;
constexpr int PRODUCER_REGISTERS = CONSUMERS == 3 ? 32 : 40;
constexpr int CONSUMER_REGISTERS = CONSUMERS == 3 ? 160 : 232;
static_assert(CONSUMERS * (CONSUMER_REGISTERS - REGISTERS) <= REGISTERS - PRODUCER_REGISTERS, "a group would wait for registers for ever");
constexpr int BLOCK_Q = 64 * CONSUMERS;
// As many keys as the registers that O leaves allow; above 128 columns, as shared memory allows. A masked tile's bits lie in one BitRow: BLOCK_K divides 128.
constexpr int BLOCK_K = TALL ? 96 : HEAD_DIM <= 128 ? 128 : HEAD_DIM > 192 || MASK || BIASED ? 64 : V_HEAD_DIM <= 128 ? 128 : 96;
constexpr int STAGES = 2;                                                         // pairs of K and V tiles in shared memory
constexpr int Q_STAGES = HEAD_DIM <= 64 || (HEAD_DIM <= 128 && !BIASED) ? 2 : 1;  // tiles of Q
constexpr bool AHEAD = Q_STAGES > 1;              // the next Q is loaded while this one is in use
constexpr int V_PANELS = (V_HEAD_DIM + 63) / 64;  // of 64 columns of V and O; the last may be padded with zeros
constexpr int O_PANELS = V_PANELS % 2 == 0 && HEAD_DIM == V_HEAD_DIM && !MASK && !TALL && !(BIASED && HEAD_DIM > 128) ? 2 : 1;  // that are stored together
static_assert(HEAD_DIM % 16 == 0 && V_HEAD_DIM % 16 == 0, "a product takes 16 columns of Q and K at a time, a store 16 of O");

using Tile_Q = SwizzledTile<BLOCK_Q, HEAD_DIM>;
using Tile_K = SwizzledTile<BLOCK_K, HEAD_DIM>;
using Tile_V = SwizzledTile<BLOCK_K, V_HEAD_DIM>;
using Tile_O = SwizzledTile<BLOCK_Q, 64 * O_PANELS>;
constexpr int O_ROWS = std::min(16, BOX_ROWS<Tile_O, RowOrder>);  // of a box of O: at most a warp's rows
constexpr int MASK_BYTES = MASK ? BLOCK_Q * static_cast<int>(sizeof(BitRow)) : 0;
using Tile_bias = SwizzledTile<16, BLOCK_K>;  // of one warp, which issues the load itself
constexpr int BIAS_BYTES = BIASED ? 4 * CONSUMERS * Tile_bias::BYTES : 0;
constexpr int SMEM_BYTES = Q_STAGES * Tile_Q::BYTES + STAGES * (Tile_K::BYTES + Tile_V::BYTES + MASK_BYTES) + Tile_O::BYTES + BIAS_BYTES;
static_assert(SMEM_BYTES <= SMEM_KB * 1024 - 1024, "choose smaller tiles");

struct Maps {
    CUtensorMap q, k, v, o, mask;
#if SCORE & SCORE_BIAS
    CUtensorMap bias;
#endif
};

// ---- rings of stages: the one that the n-th tile of Q, or of K and V, is loaded into
using Slot_Q = Slot<Q_STAGES>;
using Slot_KV = Slot<STAGES>;
__device__ inline uint32_t barrier(uint64_t* of, int stage) { return ptx::smem_address(of + stage); }

// ---- barriers. "full": the bytes have arrived (K's barrier counts the mask's too). "empty": the computing warps have finished reading them.
struct Barriers {
    uint64_t Q_full[Q_STAGES], Q_empty[Q_STAGES], K_full[STAGES], K_empty[STAGES], V_full[STAGES], V_empty[STAGES];
#if SCORE & SCORE_BIAS
    uint64_t bias_full[4 * CONSUMERS];  // of each warp
#endif
#if INTERVAL
    uint64_t work_full, work_asked;
#endif
};

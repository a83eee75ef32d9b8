// The C interface between Python (flash_attention/backends/launch.py) and every kernel: one struct, one entry point a file.
//
// A .cu file is compiled once for each specialisation, into a shared library of its own. The constants that specialise it come from the
// command line: -DHEAD_DIM=64 -DDTYPE=1 -DCAUSAL=0 -DINTERVAL=0 -DMASK=0 -DDROPOUT=0, and where they are needed -DV_HEAD_DIM=… (V has another head
// size) and -DSCORE=…. So a kernel reads as one concrete kernel.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

// MASK: 0 without one, else its form.
#define MASK_OF_BITS 1
#define MASK_OF_BYTES 2
#define MASK_OF_KEY_BITS 3

// SCORE: what becomes of scores before the softmax (score.cuh), the sum of
#define SCORE_SOFTCAP 1
#define SCORE_BIAS 2
#define SCORE_ALIBI 4
#ifndef SCORE
#define SCORE 0
#endif

// DTYPE, the type of q, k, v, O and their gradients.
#define FLOAT32 0
#define FLOAT16 1
#define BFLOAT16 2

// A (B, H, N, D) tensor. The last dimension is contiguous; strides are in elements, and may be 0.
struct Tensor4 {
    void* data;
    int64_t stride_b, stride_h, stride_n;
};

// The mask, in one of three forms. Bytes: element (b, h, i, j) is a bool at data[b·stride_b + h·stride_h + i·stride_i + j·stride_j].
// Bits: bit j % 32 of the 32-bit word at data[b·stride_b + h·stride_h + i·stride_i + j / 32], strides in words, written by pack_mask.cu.
// Key bits: bit i % 32 of the word at data[b·stride_b + h·stride_h + j·stride_j + i / 32]; where stride_i is 0 all queries see the same keys, and
// a row has the words of 128 only. A true byte means "may attend", a set bit "hidden"; what lies beyond a row's end is set. Broadcast dimensions
// have stride 0.
struct Mask {
    const void* data;
    int64_t stride_b, stride_h, stride_i, stride_j;
};

// What the rows of an INTERVAL kernel see (visible.cuh); other kernels do not read it.
struct Seen {
    const int32_t* spans;  // start and stop of row (b, h, i) at spans[b·stride_b + h·stride_h + i·stride_i + {0, 1}·stride_e]; NULL without them
    int64_t stride_b, stride_h, stride_i, stride_e;
    int32_t left, right;         // limits of a window; −1: none
    int32_t diagonal;            // row i stands at column i + diagonal
    int32_t q_offset, k_offset;  // where the first row and column stand in a larger whole: dropout's bits and spans count from its beginning
};

// What happens to a score before the softmax (score.cuh). Only SCORE kernels have these fields, so that others compile as if there were no hook.
struct Scoring {
    const void* bias;  // element (b, h, i, j) at bias[b·stride_b + h·stride_h + i·stride_i + j·stride_j]; strides are 0 where it is broadcast
    int64_t stride_b, stride_h, stride_i, stride_j;
    const float* alibi;  // slope of head (b, h) at alibi[b·alibi_stride_b + h·alibi_stride_h]
    int64_t alibi_stride_b, alibi_stride_h;
    void* d_bias;                            // [bias_b, bias_h, bias_i, bias_j] contiguous, of the bias' type, backward only; NULL: not wanted
    int32_t bias_b, bias_h, bias_i, bias_j;  // the bias' own shape: each 1, or B, H, Nq, Nk
    int32_t bias_type;                       // FLOAT32, FLOAT16 or BFLOAT16
    float softcap;
    float scale_in_cap, cap_log2;  // scale / softcap, softcap · log2 e: constants, which take no registers
};

struct AttentionParams {
    Tensor4 q;             // [B, H, Nq, D]
    Tensor4 k;             // [B, Hkv, Nk, D]
    Tensor4 v;             // [B, Hkv, Nk, Dv]
    Tensor4 o;             // [B, H, Nq, Dv], written by the forward, read by the backward
    Tensor4 d_o;           // [B, H, Nq, Dv], backward only
    Tensor4 dq, dk, dv;    // as q, k, v, backward only
    Mask mask;             // data = NULL without one
    float* lse;            // [B, H, Nq] contiguous, natural log; −inf where a row may attend nothing. NULL: a forward need not write it
    const float* d_lse;    // [B, H, Nq] contiguous, or NULL; backward only
    float* workspace;      // its size is workspace_floats()
    const int64_t* seed;   // on the device; NULL without dropout
    int32_t B, H, Hkv, Nq, Nk;
    int32_t D, Dv;         // head sizes in memory, at most HEAD_DIM and V_HEAD_DIM
    float scale;           // of the scores
    int32_t drop_below;    // an element whose random byte is below this is dropped
    float keep_scale;      // 1 / (keep probability), exactly 256 / (256 − drop_below)
    float lowest;          // where a running maximum of unscaled scores starts: below every one that may be attended, above a masked one
    int32_t deterministic; // nonzero: gradients must repeat bit for bit
    int32_t device;        // CUDA device of every pointer
    int32_t sm_count;      // its number of multiprocessors
    cudaStream_t stream;
    Seen seen;
#if SCORE
    Scoring scoring;
#endif
};

// Follows AttentionParams in memory for forward_5_split_keys.cu: where the keys of each sequence are. The kernel reads it on the device, so that
// lengths may change between replays of a CUDA graph. All zero: each sequence has the Nk keys of k and v.
struct KeySource {
    const int32_t* lengths;      // [B]: keys of each sequence, at most Nk; NULL: Nk. Causal: its last query sees its last key
    const int32_t* starts;       // [B]: keys before these are padding; NULL: 0
    const int32_t* block_table;  // [B, pages of a sequence]: key j is row j % page_size of page block_table[b, j / page_size], and k and v are
                                 // [pages, Hkv, page_size, D]. NULL: they are [B, Hkv, Nk, D]
    int64_t block_table_stride;  // in elements
    int32_t page_size;           // a multiple of 16
    int32_t pages;               // of k and v
    const float* k_scale;        // [Hkv]: what float8 elements of k and v are multiplied by
    const float* v_scale;
};

// Defined by every kernel file. Each returns a cudaError_t; 0 is success. Nothing synchronises.
#ifdef __cplusplus
extern "C" {
#endif
int attention(const AttentionParams* params);                    // launch: the forward or the backward, whichever this file is
int64_t workspace_floats(const AttentionParams* params);         // floats of workspace that this launch needs
int64_t params_size(void);                                       // sizeof(AttentionParams): Python checks it against its own
const char* error_name(int error);                               // a cudaError_t in words
#ifdef __cplusplus
}
#endif

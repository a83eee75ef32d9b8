// Exercise 8: a forward of your own. softmax(scale · Q Kᵀ) V, dense and causal, in float16 and bfloat16, head size up to 64.
//
// To know: all of the ladder (cuda/README.md). To write: the kernel. It must be right for any lengths, heads that share keys and values, and rows that
// see nothing; then it is scored: bytes from global memory, shared-memory cycles and how many of them are conflicts, beside the rungs of cuda/.
// You have p (cuda/attention.h), head_of() and kv_head() (common.cuh), factor_of_row() for the end of a row, and whatever of cuda/*.cuh you include.
// The block is blockIdx.x of tiles × H × B: BLOCK_Q rows of one head. Store O (p.o), and LSE (p.lse) unless it is null.
// To check: python exercises/check.py 8
#include "mma_swizzled.cuh"

// ---- yours
constexpr int BLOCK_Q = 64, BLOCK_THREADS = 128;

__global__ void __launch_bounds__(BLOCK_THREADS) forward_kernel(const __grid_constant__ AttentionParams p) {}
// ---- end of yours

extern "C" int64_t workspace_floats(const AttentionParams*) { return 0; }

extern "C" int attention(const AttentionParams* params) {
    const AttentionParams& p = *params;
    const int64_t blocks = tiles_of(p.Nq, BLOCK_Q) * p.H * p.B;
    if (!numbers_fit(p, {blocks})) return cudaErrorInvalidConfiguration;
    DeviceGuard guard(p.device);
    return launch(forward_kernel, blocks, BLOCK_THREADS, p);
}

// Exercise 7: a producer. One thread copies, 128 others compute, and barriers that count stand between them.
//
// To know: lesson 7 and cuda/forward_3d_producer.cu. A ring of two stages. Phase 0 of a barrier is over when all that it counts has come, then phase 1
// begins. ptx::mbarrier_wait(barrier, parity) waits for the end of the phase with this parity: 0, 1, 0, 1, … The consumers wait for full(stage), whose
// phase the copy's bytes complete, then compute, then arrive at empty(stage), 128 arrivals. Tile n is in stage n % 2, in its round n / 2.
// ptx::mbarrier_arrive_expect_tx(barrier, bytes) arrives at "full" and announces bytes; ptx::cp_async_bulk(to, from, bytes, barrier) copies them.
// To write: the producer's loop over the tiles. In a stage's first round no group has to empty it: the phase "before the first" counts as over, and its
// parity is 1.
// To check: python exercises/check.py 7 (on a GPU: compute capability 9.0 and newer)
#include "exercise.cuh"
#include "ptx_hopper.cuh"

constexpr int CONSUMERS = 128, STAGES = 2, FLOATS = 256;  // of a tile
constexpr int TILE_BYTES = FLOATS * 4;

__global__ void sum_kernel(const float* X_gmem, float* sums_gmem, int tiles) {  // [tiles, 256] → [128]
    __shared__ __align__(128) float X_smem[STAGES][FLOATS];
    __shared__ __align__(8) uint64_t full_smem[STAGES], empty_smem[STAGES];
    auto full = [&](int stage) { return ptx::smem_address(full_smem + stage); };
    auto empty = [&](int stage) { return ptx::smem_address(empty_smem + stage); };
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) ptx::mbarrier_init(full(stage), 1), ptx::mbarrier_init(empty(stage), CONSUMERS);
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x == CONSUMERS) {  // the producer
        // ---- yours
        (void)X_gmem, (void)tiles;
        // ---- end of yours
    } else if (threadIdx.x < CONSUMERS) {
        float sum = 0;
        for (int tile = 0; tile < tiles; ++tile) {
            const int stage = tile % STAGES;
            ptx::mbarrier_wait(full(stage), tile / STAGES & 1);
            for (int n = 0; n < 2; ++n) sum += (tile + 1) * X_smem[stage][threadIdx.x + n * CONSUMERS];
            ptx::fence_proxy_async();  // an arrival does not wait for loads under way: what was read must be here before a copy replaces it
            ptx::mbarrier_arrive(empty(stage));
        }
        sums_gmem[threadIdx.x] = sum;
    }
}

extern "C" int exercise(const Problem* p) {  // n: tiles
    return start(sum_kernel, 1, CONSUMERS + 32, 0, *p, static_cast<const float*>(p->in[0]), static_cast<float*>(p->out), p->n[0]);
}

// Forward with Hopper's own instructions: FlashAttention-3 (Shah et al., 2024, arXiv:2407.08608), Algorithms 1 and 2.  sm_90a.
//
// The idea: three activities, copies, matrix products and softmax, overlapped so that each waits as little as possible. One warp only copies: it
// issues loads of whole tiles of K and V, which arrive in shared memory without passing through a register. Groups of four warps ("warpgroups")
// compute; their matrix products (wgmma) read tiles straight from shared memory and run asynchronously. So a group overlaps S of this tile, O of the
// previous tile and its softmax, and while one group computes exponentials, another uses the tensor cores. A block processes one tile of Q after
// another: S of the next one is computed while the copy engine stores O of the last one.
//
// Change from forward_3e_ping_pong.cu: blocks are persistent, each takes one tile of Q after another; the products for S and O of one group run together,
// under its softmax; a row's maximum, and with it O's scale, is left alone until a score exceeds it by a factor of 2⁸; the copy engine stores O; masks and
// dropout. Serves everything in the interface for float16 and bfloat16, head sizes up to 256 that are multiples of 8, positive scale.
//
// In parts, to be read in this order:
//   forward_4_tiles.cuh     sizes, shared memory, barriers
//   forward_4_schedule.cuh  which block computes what, and when
//   forward_4_producer.cuh  the thread that schedules the work and issues the loads of its tiles
//   forward_4_softmax.cuh   from S to P, in registers
//   forward_4_scores.cuh    the same where softcap, bias or ALiBi change scores
//   forward_4_epilogue.cuh  from O's sums to global memory
//   forward_4_consumer.cuh  the groups that compute: what they wait for, and the loop that puts the parts above together
#include "forward_4_consumer.cuh"
#include "forward_4_producer.cuh"

__global__ void __launch_bounds__(THREADS, 1)
    forward_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Maps maps, const __grid_constant__ Schedule schedule) {
    extern __shared__ __align__(1024) uint8_t smem[];
    __shared__ __align__(8) Barriers barriers;
#if LISTED
    __shared__ Work works[Q_STAGES + 2];  // of each tile of Q; then the producer's current and next item
    __shared__ int j0[STAGES];
#elif INTERVAL
    __shared__ Work works[Q_STAGES + 1];  // of each tile of Q; then the producer's next item
    int* const j0 = nullptr;
#else
    __shared__ Work works[Q_STAGES];  // of each tile of Q
    int* const j0 = nullptr;
#endif
    const Shared shared(smem, barriers, works, j0);
#if LISTED
    if (schedule.seen.words != nullptr) ptx::griddepcontrol_wait();  // the result of scanning the mask is visible
    const bool leaves_out = uniform(schedule.leaves_out());  // the loops for false compile to the same code as for a call whose mask is not scanned
#endif
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
#if SCORE & SCORE_BIAS
        for (int warp = 0; warp < 4 * CONSUMERS; ++warp) ptx::mbarrier_init(barrier(barriers.bias_full, warp), 1);
#endif
#if INTERVAL
        ptx::mbarrier_init(ptx::smem_address(&barriers.work_full), 1);
        ptx::mbarrier_init(ptx::smem_address(&barriers.work_asked), 1);
#endif
        ptx::fence_mbarrier_init();
    }
    __syncthreads();

    const int group = uniform(threadIdx.x / GROUP);
    if (group == 0) {
        ptx::setmaxnreg_dec<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) {
#if LISTED
            if (leaves_out) produce<true>(p, maps, schedule, shared);
            else
#endif
                produce<false>(p, maps, schedule, shared);
        } else if (threadIdx.x / 32 == 1)
            write_rows_without_keys(p, schedule);
#if INTERVAL
        else if (threadIdx.x / 32 == 2)
            determine_work(p, schedule, shared);
#endif
    } else {
        ptx::setmaxnreg_inc<CONSUMER_REGISTERS>();
#if LISTED
        if (TELLS && leaves_out) return consume<TELLS>(p, maps, shared.unknown(), ptx::unknown(group - 1));
#endif
        consume<false>(p, maps, shared, group - 1);
    }
}

#if INTERVAL
extern "C" int64_t workspace_floats(const AttentionParams* params) {
    const AttentionParams& p = *params;
    return p.seen.spans == nullptr ? 0 : order_of(p).units - reinterpret_cast<int*>(p.workspace) + tiles_of(p.Nq, BLOCK_Q) * p.H * p.B;
}
// Only writes the schedule of a call with spans to its workspace: for checks.
extern "C" int schedule_units(const AttentionParams* params) {
    DeviceGuard guard(params->device);
    return prepare_schedule(schedule_of(*params, 0), *params);
}
#elif LISTED
extern "C" int64_t workspace_floats(const AttentionParams* params) { return floats_of_schedule(*params); }
#else
extern "C" int64_t workspace_floats(const AttentionParams*) { return 0; }
#endif

extern "C" int attention(const AttentionParams* params) {
    const AttentionParams& p = *params;
    if (p.B == 0 || p.Nq == 0) return cudaSuccess;
    const int64_t q_tiles = tiles_of(p.Nq, BLOCK_Q), of_head = CAUSAL ? (q_tiles + 1) / 2 : q_tiles, units = of_head * p.H * p.B;
    if (!numbers_fit(p, {2 * units})) return cudaErrorInvalidConfiguration;  // including the number of a block's next unit
    DeviceGuard guard(p.device);
    // First, because it creates the CUDA context of a thread that has not used the device yet; making tensor maps does not.
    cudaError_t error = cudaFuncSetAttribute(forward_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SMEM_BYTES);
    Maps maps;
    if (error == cudaSuccess) error = make_tensor_map(&maps.q, p.q, p.B, p.H, p.Nq, p.D, BOX_ROWS<Tile_Q, RowOrder>);
    if (error == cudaSuccess) error = make_tensor_map(&maps.o, p.o, p.B, p.H, p.Nq, p.Dv, O_ROWS);
    if (error == cudaSuccess && p.Nk > 0) error = make_tensor_map(&maps.k, p.k, p.B, p.Hkv, p.Nk, p.D, BLOCK_K);
    if (error == cudaSuccess && p.Nk > 0) error = make_tensor_map(&maps.v, p.v, p.B, p.Hkv, p.Nk, p.Dv, BLOCK_K);
    if (error == cudaSuccess && p.Nk > 0 && MASK) error = make_mask_map(&maps.mask, p, BLOCK_Q);
#if SCORE & SCORE_BIAS
    if (error == cudaSuccess && p.Nk > 0) error = make_bias_map(&maps.bias, p, BOX_ROWS<Tile_bias, RowOrder>);
#endif
    const int mask_bytes = !MASK ? 0 : one_row(p) ? static_cast<int>(sizeof(BitRow)) : MASK_BYTES;
    Schedule schedule = schedule_of(p, mask_bytes);
#if INTERVAL || LISTED
    if (error == cudaSuccess) error = prepare_schedule(schedule, p);
#endif
    if (error != cudaSuccess) return error;
    const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(units, p.sm_count));
    // Early after the small kernels that write the schedule's tables, if there are any.
#if INTERVAL
    const bool early = p.seen.spans != nullptr;
#elif LISTED
    const bool early = schedule.seen.words != nullptr;
#else
    constexpr bool early = false;
#endif
    launch_early_if(early, forward_kernel, blocks, THREADS, SMEM_BYTES, p.stream, p, maps, schedule);
    return cudaGetLastError();
}

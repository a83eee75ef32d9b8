// The cost model behind traces: cycles of one Hopper multiprocessor. A model, not a measurement; every constant stands here, with where it comes from.
// All are multiples of a power of two, so that sums of times are exact.
//
//     known        published, or follows from what is
//     calibrated   chosen so that `hopper`'s measured cycles come out (LOG.md, "Between two tiles of Q")
//     assumed      plausible; nothing here was measured against it
#pragma once

namespace emulator {

// name, value, kind and unit, source
#define MODEL(X)                                                                                                                                              \
    X(TENSOR_FLOP, 4096, "known: FLOP a cycle, 16-bit", "H100 SXM: 989.4 TFLOP/s dense at 1.83 GHz on 132 multiprocessors (NVIDIA H100 white paper)")            \
    X(WGMMA_LATENCY, 108, "calibrated: cycles from a product's end until its registers may be read", "S of 64 × 128 × 128 takes 620, of which it multiplies 512") \
    X(WGMMA_DEPTH, 4, "calibrated: products of a group under way before it is held up", "16 that take 1024 are issued in 755")                                 \
    X(MMA_SLOWER, 1.625, "known: × the cycles of wgmma", "mma.sync reaches about 62 % of an H100's peak (Luo et al. 2024, arXiv:2402.13499)")                       \
    X(MMA_LATENCY, 24, "known: cycles from an mma.sync's end until its registers may be read", "about 32 with its own 6.5 (the same)")                         \
    X(EXPONENTIAL, 8, "known: cycles of a sub-partition's special function unit for a warp's ex2", "16 results a cycle (CUDA Programming Guide, arithmetic)")   \
    X(ARITHMETIC, 5, "known: issue cycles around an ex2", "fma 1, add 1, max 2, half a conversion 1 (the same table)")                                          \
    X(SOFTMAX_LATENCY, 5, "calibrated: further cycles around an ex2, of its own warp alone", "the softmax of 64 × 128 takes 1310")                              \
    X(SHUFFLE, 30, "assumed: cycles until a shuffle's or vote's result is used", "latency 23 and its use")                                                     \
    X(SHARED_BYTES, 128, "known: bytes of shared memory a cycle", "32 banks of 4 bytes (CUDA Programming Guide)")                                               \
    X(MULTIPLY_ADDS, 4, "calibrated: issue cycles around 4 bytes that a thread reads in shared memory", "`simple`: its multiply-adds are not seen")                            \
    X(STMATRIX, 16, "assumed: issue cycles around an stmatrix", "8 products and 4 conversions")                                                                 \
    X(L2_BYTES, 32, "assumed: bytes a cycle into a multiprocessor, and as many out", "half its port of 64; `hopper` at D 256 does get 29 (h200_cycles.json)")         \
    X(L2_LATENCY, 280, "known: cycles until a thread's load or cp.async arrives from L2", "about 270 (arXiv:2402.13499)")                                       \
    X(TMA_LATENCY, 500, "assumed: cycles until the copy engine's first byte arrives", "L2 and the engine's own work")                                          \
    X(STORE_LATENCY, 30, "assumed: cycles until the copy engine starts to read shared memory", "")                                                            \
    X(SYNC, 20, "assumed: cycles of an instruction on a barrier, of a fence, of a request to the copy engine", "")                                             \
    X(SIGNAL, 700, "assumed: cycles until a st.release is seen by another block's ld.acquire", "there and back through L2")

namespace model {
#define CONSTANT(NAME, VALUE, KIND, SOURCE) constexpr double NAME = VALUE;
MODEL(CONSTANT)
#undef CONSTANT
}  // namespace model

}  // namespace emulator

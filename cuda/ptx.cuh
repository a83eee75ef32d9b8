// One small function per PTX instruction, named after it. Sections are those of the PTX ISA, https://docs.nvidia.com/cuda/parallel-thread-execution/
#pragma once

#ifndef __CUDACC__
#include "emulator/ptx.h"  // the same functions for the emulator
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace ptx {

// The 32-bit address that instructions want for shared memory.
__device__ inline uint32_t smem_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// threadIdx.x and blockIdx.x, re-read each time (10.1, 10.5): values computed from them in a loop are recomputed, not kept in registers across the loop.
__device__ inline int tid_x() {
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}

// x, in a form about which the compiler can assume nothing.
template <class T>
__device__ inline T unknown(T x) {
    asm volatile("" : "+r"(x));
    return x;
}

// Computes x here, not where it is first used. Integers only.
template <class T>
__device__ inline void compute_now(T x) {
    if constexpr (sizeof(T) == 8) asm volatile("" ::"l"(x));
    else asm volatile("" ::"r"(x));
}

__device__ inline int ctaid_x() {
    int x;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
    return x;
}

// ---- asynchronous copies, sm_80 (9.7.9.25.3: cp.async)

// Copies N = 8 or 16 bytes from global to shared memory without going through registers (16 bytes bypass L1): the first `bytes` of them, then zeros.
// Nothing is read if `bytes` is 0. Both addresses are multiples of N.
template <int N>
__device__ inline void cp_async_first(uint32_t smem, const void* gmem, int bytes) {
    if (N == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(gmem), "r"(bytes) : "memory");
    else asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(smem), "l"(gmem), "n"(N), "r"(bytes) : "memory");
}

// 16 bytes, or zeros if `valid` is false.
__device__ inline void cp_async_16(uint32_t smem, const void* gmem, bool valid) { cp_async_first<16>(smem, gmem, valid ? 16 : 0); }

// A policy for lines of the L2 cache (9.7.9.18: createpolicy): evict them first.
__device__ inline uint64_t createpolicy_evict_first() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
    return policy;
}

// The same 16 bytes under such a policy.
__device__ inline void cp_async_16(uint32_t smem, const void* gmem, bool valid, uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(smem), "l"(gmem), "r"(valid ? 16 : 0), "l"(policy)
                 : "memory");
}

// N = 4 or 8 bytes, through L1.
template <int N>
__device__ inline void cp_async_small(uint32_t smem, const void* gmem) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(smem), "l"(gmem), "n"(N) : "memory");
}

// Commits this thread's copies since the last commit as a group.
__device__ inline void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N of this thread's groups are in flight. To see other threads' copies, a barrier must follow.
template <int N>
__device__ inline void cp_async_wait_group() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- a kernel launched before the one that it depends on has ended, sm_90 (9.7.13.13: griddepcontrol)

// As far as this block is concerned, dependent kernels may be launched; they see its writes only after their wait.
__device__ inline void griddepcontrol_launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Waits until the kernels before this one have ended and what they wrote is visible.
__device__ inline void griddepcontrol_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// ---- float8, sm_89 (9.7.9.21: cvt)

// The two e4m3 numbers in the low half of x as float16, exactly.
__device__ inline uint32_t halves_of_float8(uint32_t x) {
    uint32_t pair;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, low;}" : "=r"(pair) : "r"(x));
    return pair;
}

// ---- shared memory by its 32-bit address (9.7.9.12: st)

__device__ inline void st_shared(uint32_t smem, uint32_t x) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(smem), "r"(x) : "memory"); }

// ---- matrix fragments, sm_75 (9.7.14.5.15: ldmatrix)

// Four 8×8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8; of each matrix it receives the two
// elements (row l / 4, columns 2·(l % 4) and + 1).
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem)
                 : "memory");
}

// The same, each matrix transposed on the way: the lane receives (rows 2·(l % 4) and + 1, column l / 4).
__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem)
                 : "memory");
}

// ---- tensor cores, sm_80 (9.7.14.5.8: mma.m16n8k16)

// D (16×8, float32) += A (16×16) · B (16×8), one warp. In lane l, with g = l / 4 and t = l % 4,
//   A: a[0] = (g, 2t…), a[1] = (g + 8, 2t…), a[2] = (g, 2t + 8…), a[3] = (g + 8, 2t + 8…), each two columns;
//   B: b[0] = (2t…, g), b[1] = (2t + 8…, g), each two rows;
//   D: d[0], d[1] = (g, 2t), (g, 2t + 1);  d[2], d[3] = (g + 8, 2t), (g + 8, 2t + 1).
template <typename T>
__device__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ inline void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ inline void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- arithmetic

// 2^x, to about 2 units in the last place; −inf gives 0 (9.7.3.21: ex2).
__device__ inline float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// log2 x and 1 / x, to about 1 unit in the last place (9.7.3.20: lg2, 9.7.3.14: rcp).
__device__ inline float lg2(float x) {
    float y;
    asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ inline float rcp(float x) {
    float y;
    asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// tanh x, to 11 bits, in the unit that computes ex2 (9.7.3.22: tanh).
__device__ inline float tanh(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two floats rounded to a pair of 16-bit ones, the first in the low half (9.7.9.22: cvt).
template <typename T>
__device__ uint32_t cvt_pair(float low, float high);

template <>
__device__ inline uint32_t cvt_pair<__half>(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

template <>
__device__ inline uint32_t cvt_pair<__nv_bfloat16>(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// The reverse for float16.
__device__ inline float2 floats_of_pair(uint32_t pair) {
    float2 x;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}" : "=f"(x.x), "=f"(x.y) : "r"(pair));
    return x;
}

// Four bytes picked from the eight of a (numbers 0–3) and b (4–7), one for each hexadecimal digit of `selector`, lowest first; if 8 is added
// to the number, the byte's sign bit is repeated eight times instead (9.7.9.7: prmt).
__device__ inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
    return d;
}

// The product of two 32-bit numbers, low half in x, high half in y (9.7.1.3: mul). For a 64-bit product in C++ the compiler emits one more addition.
__device__ inline uint2 mul_wide(uint32_t a, uint32_t b) {
    uint2 d;
    asm("{.reg .b64 product; mul.wide.u32 product, %2, %3; mov.b64 {%0, %1}, product;}" : "=r"(d.x), "=r"(d.y) : "r"(a), "r"(b));
    return d;
}

// ---- reductions in global memory (9.7.13.14: red)

// *p, which may be anything: the caller decides after the load whether it has a value.
__device__ inline float4 ld_perhaps_unwritten(const float* p) {
    float4 x;
    asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(p) : "memory");
    return x;
}

// *p += x four times, each float atomically, with no value returned. One instruction from sm_90 on. p is 16-byte aligned.
__device__ inline void red_add_4(float* p, float x0, float x1, float x2, float x3) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(x0), "f"(x1), "f"(x2), "f"(x3) : "memory");
#else
    atomicAdd(p, x0);
    atomicAdd(p + 1, x1);
    atomicAdd(p + 2, x2);
    atomicAdd(p + 3, x3);
#endif
}

// *p = x four times if `store`, otherwise as red_add_4. Without a branch, at which the compiler would wait for products in flight. sm_90 on.
__device__ inline void store_or_add_4(bool store, float* p, float x0, float x1, float x2, float x3) {
    asm volatile(
        "{\n"
        ".reg .pred store;\n"
        "setp.ne.s32 store, %5, 0;\n"
        "@store st.global.v4.f32 [%0], {%1, %2, %3, %4};\n"
        "@!store red.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n"
        "}" ::"l"(p), "f"(x0), "f"(x1), "f"(x2), "f"(x3), "r"(int{store})
        : "memory");
}

// *p becomes the larger of itself and x, atomically.
__device__ inline void red_max(int* p, int x) { asm volatile("red.global.max.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory"); }

// ---- signals between blocks (9.7.9.8: ld, 9.7.9.12: st; chapter 8: memory consistency model)

// What the writer did before its release is visible after an acquire that reads the released value.
__device__ inline int ld_acquire(const int* p) {
    int x;
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}

// If *p is `from`, it becomes `to`. Returns what it was.
__device__ inline int cas_acquire(int* p, int from, int to) {
    int before;
    asm volatile("atom.acquire.gpu.global.cas.b32 %0, [%1], %2, %3;" : "=r"(before) : "l"(p), "r"(from), "r"(to) : "memory");
    return before;
}
// *p += x, atomically.
__device__ inline void red_release(int* p, int x) { asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory"); }

__device__ inline void st_release(int* p, int x) { asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(p), "r"(x) : "memory"); }

}  // namespace ptx

#endif

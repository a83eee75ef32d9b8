// The instructions of sm_90a that the `hopper` rung adds: barriers that count bytes, copies by tensor map, matrix products of four warps. Named
// after the instruction, with its section of the PTX ISA, as in ptx.cuh.
#pragma once

#ifndef __CUDACC__
#include "emulator/ptx_hopper.h"  // the same functions for the emulator
#else

#include <cuda.h>  // CUtensorMap

#include "ptx.cuh"

namespace ptx {

// ---- mbarrier (9.7.13.15): in shared memory, counts arrivals and bytes still to come. A phase completes when both reach 0, and the next begins.

__device__ inline void mbarrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine too.
__device__ inline void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void mbarrier_arrive(uint32_t barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }

// Arrives, and announces `bytes` that copies will deliver.
__device__ inline void mbarrier_arrive_expect_tx(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits until the phase of this parity has completed: 0 for the first, then 1, 0, …
__device__ inline void mbarrier_wait(uint32_t barrier, int parity) {
    asm volatile(
        "{\n"
        ".reg .pred over;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
        "@over bra done;\n"
        "bra again;\n"
        "done:\n"
        "}" ::"r"(barrier), "r"(parity)
        : "memory");
}

// ---- copies by tensor map (9.7.9.27.1.2: cp.async.bulk.tensor). One thread issues the copy of a whole box; bytes beyond the tensor arrive as zeros.

// Copies the box that begins at column d, row n, head h, batch b to shared memory. `barrier` counts its bytes.
__device__ inline void cp_async_bulk_tensor_4d(uint32_t smem, const CUtensorMap* map, int d, int n, int h, int b, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(smem), "l"(map),
                 "r"(d), "r"(n), "r"(h), "r"(b), "r"(barrier)
                 : "memory");
}

// The reverse: stores the box from shared memory. What lies beyond the tensor is not written.
__device__ inline void cp_async_bulk_tensor_4d_store(const CUtensorMap* map, int d, int n, int h, int b, uint32_t smem) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(map), "r"(d), "r"(n), "r"(h), "r"(b), "r"(smem)
                 : "memory");
}
__device__ inline void cp_async_bulk_commit_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's groups still read shared memory.
template <int N>
__device__ inline void cp_async_bulk_wait_group_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// Copies `bytes` contiguous bytes; both addresses and the size are multiples of 16 (9.7.9.25.4.1: cp.async.bulk).
__device__ inline void cp_async_bulk(uint32_t smem, const void* gmem, int bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(smem), "l"(gmem), "r"(bytes), "r"(barrier)
                 : "memory");
}

// Makes what this thread stored in shared memory visible to wgmma and the copy engine (9.7.13.4: fence.proxy).
__device__ inline void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- matrix fragments (9.7.14.5.16: stmatrix): the reverse of ldmatrix_x4. Lane l gives the address of row l % 8 of matrix l / 8.
__device__ inline void stmatrix_x4(uint32_t smem, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}

// The same, each matrix transposed on the way: the lane gives (rows 2·(l % 4) and + 1, column l / 4).
__device__ inline void stmatrix_x4_trans(uint32_t smem, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}

// ---- registers (9.7.19.5: setmaxnreg). A warpgroup returns registers, or waits until it gets more.
template <int N>
__device__ inline void setmaxnreg_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ inline void setmaxnreg_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// ---- named barriers (9.7.13.1: barrier): `threads` of the block meet at one of 16; bar_arrive does not wait for the others.
__device__ inline void bar_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ inline void bar_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// ---- wgmma (9.7.15): D (64×N, float32, registers) += A (64×16) · B (16×N), the 128 threads of a warpgroup together, asynchronously.
// B lies in shared memory, A there or in registers. D: thread l of warp w has rows 16·w + l / 4 (d[4i], d[4i + 1]) and 8 further (d[4i + 2],
// d[4i + 3]), columns 8·i + 2·(l % 4) and + 1; A in registers: as in mma_m16n8k16, each warp its 16 rows.

// Makes earlier writes to registers visible to the products that follow; required before the first product that reads them.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most N of the warpgroup's groups are in flight.
template <int N>
__device__ inline void wgmma_wait_group() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// A tile in shared memory as wgmma addresses it (9.7.15.5.1): 128-byte rows, swizzled (mode 1), groups of 8 rows 1024 bytes apart. `leading`
// matters only for an operand whose rows are the summation index (V): it is the distance in bytes from one panel of 64 columns to the next.
__device__ inline uint64_t descriptor(uint32_t smem, uint32_t leading = 16) {
    return uint64_t(1) << 62 | uint64_t(1024 / 16) << 32 | uint64_t(leading / 16) << 16 | (smem & 0x3ffff) / 16;
}

// The descriptor of the same tile from `bytes` further on: one addition, while building a descriptor takes several instructions.
__device__ inline uint64_t advance(uint64_t descriptor, int bytes) { return descriptor + bytes / 16; }

#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define E8(i) D4(i), D4(i + 4)
#define D8 E8(0)
#define D16 D8, E8(8)
#define D32 D16, E8(16), E8(24)
#define D40 D32, E8(32)
#define D48 D40, E8(40)
#define D56 D48, E8(48)
#define D64 D56, E8(56)
#define D80 D64, E8(64), E8(72)
#define D96 D80, E8(80), E8(88)
#define D128 D96, E8(96), E8(104), E8(112), E8(120)
#define LIST8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define LIST16 LIST8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define LIST32 LIST16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define LIST40 LIST32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define LIST48 LIST40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define LIST56 LIST48 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define LIST64 LIST56 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define LIST80 LIST64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define LIST96 LIST80 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define LIST128 \
    LIST96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111," \
           "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// Both operands from shared memory, with the summation index along the columns of both (Q and K). `accumulate` 0: D = A · B.
template <typename T, int N>
__device__ void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate);
// The same with the summation index along the rows of both (dSᵀ and K in dQ = dS K): tnspA = tnspB = 1.
template <typename T, int N>
__device__ void wgmma_ss_transposed(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate);
// The same with the summation index along the rows of B only (Pᵀ and dO in dV += Pᵀ dO): tnspB = 1.
template <typename T, int N>
__device__ void wgmma_ss_transposed_b(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate);
// A from registers, B with the summation index along its rows (V): tnspB = 1.
template <typename T, int N>
__device__ void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b);

#define WGMMA_SS(NAME, TRANSPOSED, T, TYPE, N, R, A, B, P)                                                                                                   \
    template <>                                                                                                                           \
    __device__ inline void NAME<T, N>(float (&d)[R], uint64_t a, uint64_t b, int accumulate) {                                        \
        asm volatile("{.reg .pred p; setp.ne.b32 p, " P ", 0;\n"                                                                          \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" LIST##R "}, " A ", " B ", p, 1, 1, " TRANSPOSED ";}"       \
                     : D##R                                                                                                               \
                     : "l"(a), "l"(b), "r"(accumulate)                                                                                    \
                     : "memory");                                                                                                         \
    }
#define WGMMA_RS(T, TYPE, N, R, A0, A1, A2, A3, B)                                                                                         \
    template <>                                                                                                                           \
    __device__ inline void wgmma_rs<T, N>(float (&d)[R], const uint32_t (&a)[4], uint64_t b) {                                            \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" LIST##R "}, {" A0 "," A1 "," A2 "," A3 "}, " B  \
                     ", 1, 1, 1, 1;"                                                                                                      \
                     : D##R                                                                                                               \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                                                                 \
                     : "memory");                                                                                                         \
    }
#define WGMMA(T, TYPE)                                                                 \
    WGMMA_SS(wgmma_ss, "0, 0", T, TYPE, 32, 16, "%16", "%17", "%18")                   \
    WGMMA_SS(wgmma_ss, "0, 0", T, TYPE, 64, 32, "%32", "%33", "%34")                   \
    WGMMA_SS(wgmma_ss, "0, 0", T, TYPE, 96, 48, "%48", "%49", "%50")                   \
    WGMMA_SS(wgmma_ss, "0, 0", T, TYPE, 128, 64, "%64", "%65", "%66")                  \
    WGMMA_SS(wgmma_ss_transposed, "1, 1", T, TYPE, 16, 8, "%8", "%9", "%10")           \
    WGMMA_SS(wgmma_ss_transposed, "1, 1", T, TYPE, 32, 16, "%16", "%17", "%18")        \
    WGMMA_SS(wgmma_ss_transposed, "1, 1", T, TYPE, 64, 32, "%32", "%33", "%34")        \
    WGMMA_SS(wgmma_ss_transposed, "1, 1", T, TYPE, 96, 48, "%48", "%49", "%50")        \
    WGMMA_SS(wgmma_ss_transposed, "1, 1", T, TYPE, 160, 80, "%80", "%81", "%82")       \
    WGMMA_SS(wgmma_ss_transposed, "1, 1", T, TYPE, 192, 96, "%96", "%97", "%98")       \
    WGMMA_SS(wgmma_ss_transposed, "1, 1", T, TYPE, 256, 128, "%128", "%129", "%130")   \
    WGMMA_SS(wgmma_ss_transposed_b, "0, 1", T, TYPE, 32, 16, "%16", "%17", "%18")      \
    WGMMA_SS(wgmma_ss_transposed_b, "0, 1", T, TYPE, 64, 32, "%32", "%33", "%34")      \
    WGMMA_SS(wgmma_ss_transposed_b, "0, 1", T, TYPE, 80, 40, "%40", "%41", "%42")      \
    WGMMA_SS(wgmma_ss_transposed_b, "0, 1", T, TYPE, 96, 48, "%48", "%49", "%50")      \
    WGMMA_SS(wgmma_ss_transposed_b, "0, 1", T, TYPE, 128, 64, "%64", "%65", "%66")     \
    WGMMA_SS(wgmma_ss_transposed_b, "0, 1", T, TYPE, 160, 80, "%80", "%81", "%82")     \
    WGMMA_SS(wgmma_ss_transposed_b, "0, 1", T, TYPE, 192, 96, "%96", "%97", "%98")     \
    WGMMA_SS(wgmma_ss_transposed_b, "0, 1", T, TYPE, 256, 128, "%128", "%129", "%130") \
    WGMMA_RS(T, TYPE, 64, 32, "%32", "%33", "%34", "%35", "%36")                       \
    WGMMA_RS(T, TYPE, 80, 40, "%40", "%41", "%42", "%43", "%44")                       \
    WGMMA_RS(T, TYPE, 96, 48, "%48", "%49", "%50", "%51", "%52")                       \
    WGMMA_RS(T, TYPE, 112, 56, "%56", "%57", "%58", "%59", "%60")                      \
    WGMMA_RS(T, TYPE, 128, 64, "%64", "%65", "%66", "%67", "%68")                      \
    WGMMA_RS(T, TYPE, 160, 80, "%80", "%81", "%82", "%83", "%84")                      \
    WGMMA_RS(T, TYPE, 192, 96, "%96", "%97", "%98", "%99", "%100")                     \
    WGMMA_RS(T, TYPE, 256, 128, "%128", "%129", "%130", "%131", "%132")
WGMMA(__half, "f16")
WGMMA(__nv_bfloat16, "bf16")
#undef WGMMA
#undef WGMMA_SS
#undef WGMMA_RS
#undef LIST128
#undef LIST96
#undef LIST80
#undef LIST64
#undef LIST56
#undef LIST48
#undef LIST40
#undef LIST32
#undef LIST16
#undef LIST8
#undef D128
#undef D96
#undef D80
#undef D64
#undef D56
#undef D48
#undef D40
#undef D32
#undef D16
#undef D8
#undef E8
#undef D4

}  // namespace ptx

#endif

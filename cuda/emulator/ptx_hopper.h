// ptx_hopper.cuh for the emulator: the same functions, in the same order, with the same sections of the PTX ISA.
#pragma once

#include <cuda.h>

#include "ptx.h"

namespace ptx {

// ---- mbarrier (9.7.13.15)

inline void mbarrier_init(uint32_t barrier, int arrivals) { emulator::mbarrier_init(barrier, arrivals); }
inline void fence_mbarrier_init() { emulator::mbarrier_init_fence(); }
inline void mbarrier_arrive(uint32_t barrier) { emulator::mbarrier_arrive(barrier, 0); }
inline void mbarrier_arrive_expect_tx(uint32_t barrier, int bytes) { emulator::mbarrier_arrive(barrier, bytes); }
inline void mbarrier_wait(uint32_t barrier, int parity) { emulator::mbarrier_wait(barrier, parity); }

// ---- copies by tensor map (9.7.9.27.1.2: cp.async.bulk.tensor) and of plain bytes (9.7.9.25.4.1: cp.async.bulk)

inline void cp_async_bulk_tensor_4d(uint32_t smem, const CUtensorMap* map, int d, int n, int h, int b, uint32_t barrier) {
    emulator::tensor_load(smem, map, {d, n, h, b}, barrier);
}
inline void cp_async_bulk_tensor_4d_store(const CUtensorMap* map, int d, int n, int h, int b, uint32_t smem) { emulator::tensor_store(map, {d, n, h, b}, smem); }
inline void cp_async_bulk_commit_group() { emulator::bulk_commit(); }
template <int N>
inline void cp_async_bulk_wait_group_read() {
    emulator::bulk_wait_read(N);
}
inline void cp_async_bulk(uint32_t smem, const void* gmem, int bytes, uint32_t barrier) { emulator::bulk_load(smem, gmem, bytes, barrier); }

// 9.7.13.4: fence.proxy; 9.7.14.5.16: stmatrix
inline void fence_proxy_async() { emulator::fence_proxy_async(); }
inline void stmatrix_x4(uint32_t smem, const uint32_t (&r)[4]) {
    const uint32_t x[4] = {r[0], r[1], r[2], r[3]};
    emulator::stmatrix_x4(smem, x, false);
}
inline void stmatrix_x4_trans(uint32_t smem, const uint32_t (&r)[4]) {
    const uint32_t x[4] = {r[0], r[1], r[2], r[3]};
    emulator::stmatrix_x4(smem, x, true);
}

// ---- registers (9.7.19.5: setmaxnreg), named barriers (9.7.13.1: barrier)

template <int N>
inline void setmaxnreg_dec() {
    static_assert(N >= 24 && N <= 256 && N % 8 == 0, "setmaxnreg takes 24 to 256, in steps of 8");
    emulator::set_registers(N);
}
template <int N>
inline void setmaxnreg_inc() {
    static_assert(N >= 24 && N <= 256 && N % 8 == 0, "setmaxnreg takes 24 to 256, in steps of 8");
    emulator::set_registers(N);
}
inline void bar_sync(int id, int threads) { emulator::barrier_sync(id, threads); }
inline void bar_arrive(int id, int threads) { emulator::barrier_arrive(id, threads); }

// ---- wgmma (9.7.15). The emulator gets the addresses of d and a, and reports whoever touches these registers while the product is in flight.

inline void wgmma_fence() { emulator::wgmma_fence(); }
inline void wgmma_commit_group() { emulator::wgmma_commit(); }
template <int N>
inline void wgmma_wait_group() {
    emulator::wgmma_wait(N);
}

inline uint64_t descriptor(uint32_t smem, uint32_t leading = 16) {
    return uint64_t(1) << 62 | uint64_t(1024 / 16) << 32 | uint64_t(leading / 16) << 16 | (smem & 0x3ffff) / 16;
}
inline uint64_t advance(uint64_t descriptor, int bytes) { return descriptor + bytes / 16; }

template <typename T, int N>
inline void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
    emulator::wgmma({type_of<T>, N, d, nullptr, a, b, accumulate != 0, false, false});
}
template <typename T, int N>
inline void wgmma_ss_transposed(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
    emulator::wgmma({type_of<T>, N, d, nullptr, a, b, accumulate != 0, true, true});
}
template <typename T, int N>
inline void wgmma_ss_transposed_b(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
    emulator::wgmma({type_of<T>, N, d, nullptr, a, b, accumulate != 0, false, true});
}
template <typename T, int N>
inline void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {
    emulator::wgmma({type_of<T>, N, d, a, 0, b, true, false, true});
}

}  // namespace ptx

// The emulator's runtime as the headers that replace CUDA's call it. A kernel's library is compiled with these declarations and linked with the runtime,
// which is compiled once for all kernels.
#pragma once

#include <stdint.h>

extern "C" const char* emulator_message();  // the message of this thread's last failed launch

namespace emulator {

constexpr int SHARED_MEMORY = 227 * 1024;   // that a block may have, on sm_90 (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability")
constexpr int FIRST_SHARED_ADDRESS = 1024;  // the system reserves 1 KB per block

// ---- launching (launch.cpp)

struct Index {
    unsigned x, y, z;
};
struct Grid {
    Index blocks;
    int threads, dynamic_bytes;
};
// Runs a grid: every thread calls thread(arguments). `dynamic` is the start of dynamic shared memory; `kernel` identifies the library.
void run(const Grid&, uint8_t* dynamic, void* kernel, void (*thread)(void*), void* arguments, long argument_bytes);
void next_launch_is_early(bool);  // it may begin before the one before it has ended
int last_error();  // a cudaError_t, reset when it is read
void* driver_function(const char* name);

// ---- this thread (block.cpp). For one thread they never change, and the compiler may call them once.

[[gnu::const]] unsigned thread_x();
[[gnu::const]] unsigned threads_of_block();
[[gnu::const]] Index block_index();
[[gnu::const]] Index grid_size();

// ---- launches that overlap (launch.cpp)

void launch_dependents();
void wait_for_launches_before();

// ---- collective instructions of a warp (warp.cpp, matrix.cpp): they return once all lanes of the mask have arrived

void warp_sync(uint32_t mask);
uint32_t shuffle(uint32_t mask, uint32_t x, int source_lane);
uint32_t ballot(uint32_t mask, bool x);
void ldmatrix_x4(uint32_t (&r)[4], uint32_t address, bool transposed);
void stmatrix_x4(uint32_t address, const uint32_t (&r)[4], bool transposed);
enum class Type { float16, bfloat16 };
void mma_m16n8k16(Type, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

// ---- arithmetic that is counted (counters.cpp)

float exponential_2(float x);
float exponential(float x);
float tangent(float x);  // the hyperbolic tangent, in the same unit

// ---- memory by instruction (memory.cpp, copies.cpp). Shared addresses have 32 bits.

uint32_t shared_address(const void*);
void store_shared(uint32_t address, uint32_t x);
float atomic_add(float* p, float x);
int atomic_add(int* p, int x);
void load_perhaps_unwritten(const void* p, void* to, int bytes);
void reduce_add(float* p, const float* x, int count);
void reduce_max(int* p, int x);
int load_acquire(const int* p);
int exchange_if(int* p, int from, int to);
void store_release(int* p, int x);
void add_release(int* p, int x);
void cp_async(uint32_t address, const void* source, int bytes, int first);  // copies this many bytes, then zeros
void cp_async_commit();
void cp_async_wait(int groups);

// ---- barriers (barrier.cpp, mbarrier.cpp)

void barrier_sync(int id, int threads);
bool barrier_or(int id, int threads, bool x);
void barrier_arrive(int id, int threads);
void mbarrier_init(uint32_t address, int arrivals);
void mbarrier_init_fence();
void mbarrier_arrive(uint32_t address, int expected_bytes);
void mbarrier_wait(uint32_t address, int parity);

// ---- the copy engine and the matrix units (bulk.cpp, wgmma.cpp)

void bulk_load(uint32_t address, const void* source, int bytes, uint32_t barrier);
void tensor_load(uint32_t address, const void* map, const int (&at)[4], uint32_t barrier);
void tensor_store(const void* map, const int (&at)[4], uint32_t address);
void bulk_commit();
void bulk_wait_read(int groups);
void fence_proxy_async();

struct Wgmma {
    Type type;
    int n;                // columns of D
    float* d;             // this thread's part of D, n / 2 numbers
    const uint32_t* a;    // this thread's part of A, or null if A lies in shared memory
    uint64_t a_descriptor, b_descriptor;
    bool accumulate, a_transposed, b_transposed;
};
void wgmma(const Wgmma&);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int groups);
void set_registers(int count);  // setmaxnreg

}  // namespace emulator

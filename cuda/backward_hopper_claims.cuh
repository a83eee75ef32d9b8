// Where STORES_FIRST: which block stores its part of a tile of dQ, so that the others can add theirs.
//
// dQ is summed in float32 in global memory. If all blocks add, a kernel before must write zeros, and the sums begin by reading them: 8 bytes an element, which
// is as much as the rest of that kernel reads and writes. So the block that comes first at a tile claims it and stores its part, and the others wait until that
// is there. In `turns` each tile has a Workspace::TileState.
//
// Two threads of a block do this for its visits, beside the others: one claims, ahead of the additions; one tells other blocks what has been stored. Both learn
// from the producer's messages which tile a visit is.
//
// Blocks that start together should not come to the same tiles at the same time, or most of them would wait. So they visit tiles from the first one up: with
// a diagonal, each tile of keys begins at another tile of Q, and is two visits behind the next one.
//
// Nobody waits in a circle. A block claims its tiles in the order of its visits, so it waits at a tile only for a claim that was made before it came there; and
// it tells of a tile that it has stored without waiting for any later one.
#pragma once

#include "backward_hopper_visit.cuh"

constexpr int CLAIMS_KEPT = 4;  // of the last visits: the number of the tile that this block stores, among those of all heads, or −1 if it adds

#if PERSISTENT
using ClaimedVisit = ToldVisit<true>;
#else
using ClaimedVisit = ToldTile;
#endif

// empty: the barriers of Q's tiles, at which both threads arrive for each message that they have read. decided: a barrier for each of two visits.
struct Claims {
    int* of_visit;  // [CLAIMS_KEPT], in shared memory
    int* states;    // Workspace::turns
    uint64_t *empty, *decided;

    __device__ void heard(const ClaimedVisit& now) const { ptx::mbarrier_arrive(ptx::smem_address(empty + now.slot().stage)); }

    // Decides for visit n at `tile` whether this block stores.
    __device__ void decide(unsigned n, int tile) const {
        const int before = ptx::cas_acquire(states + tile, Workspace::UNTOUCHED, Workspace::CLAIMED);
        of_visit[n % CLAIMS_KEPT] = before == Workspace::UNTOUCHED ? tile : -1;
        if (before == Workspace::CLAIMED) await(states + tile, Workspace::STORED);
    }
    __device__ void has_decided(unsigned n) const { ptx::mbarrier_arrive(ptx::smem_address(decided + n % 2)); }

    // For threads that have waited for `decided`.
    __device__ int claimed(unsigned n) const { return of_visit[n % CLAIMS_KEPT]; }
    __device__ bool stores(unsigned n) const { return claimed(n) >= 0; }

    // For the thread that tells. Waits until a visit has ended.
    __device__ void await_end(const ClaimedVisit& now) const { ptx::mbarrier_wait(ptx::smem_address(empty + now.slot().stage), now.slot().parity); }
    __device__ void stored(int tile) const {
        if (tile >= 0) ptx::st_release(states + tile, Workspace::STORED);
    }
};

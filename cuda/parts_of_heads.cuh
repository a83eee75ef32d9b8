// For rungs that write copies of their operands to the workspace (planes.cuh): a large call's heads are computed in parts, one after another in the same
// workspace.
//
// Such copies take as much memory as the operands. Heads do not depend on each other, so only those being computed need copies.
// A part is some heads of K and V and the query heads that share them, and is launched as a call of its own, whose tensors begin at its first head.
#pragma once

#include <algorithm>

#include "common.cuh"

constexpr int64_t LARGE_WORKSPACE = 128 << 20;  // bytes; beyond them, heads are computed in parts of about this size
// FLOP of Q Kᵀ and P V in a part: over a millisecond of work, so that the 10 to 20 µs of its launches are negligible.
constexpr double LEAST_WORK = 0x1p38;

// Part n of n parts of `total`: [begin, end).
struct Share {
    int begin, end;
    Share(int n, int parts, int total)
        : begin(static_cast<int>(static_cast<int64_t>(total) * n / parts)), end(static_cast<int>(static_cast<int64_t>(total) * (n + 1) / parts)) {}
    int size() const { return end - begin; }
};

// The heads of a part.
struct Part {
    int b, B;    // batches from b on
    int h, Hkv;  // of each, heads of K and V from h on
};

// A part's first batch and query head: dropout counts batches and heads of the whole call.
struct First {
    int b, h;
};

// The number of parts of a call: first its batches are divided and, if that is not enough, each batch's heads.
struct Parts {
    int B, Hkv;
    int of_batches = 1, of_heads = 1;

    // bytes: the workspace of the undivided call. blocks: of each kernel, those of one head of K and V and what shares it.
    Parts(const AttentionParams& p, int64_t bytes, std::initializer_list<int64_t> blocks) : B(p.B), Hkv(p.Hkv) {
        if (bytes <= LARGE_WORKSPACE) return;
        const double work = 4.0 * p.B * p.H * p.Nq * p.Nk * HEAD_DIM / (CAUSAL ? 2 : 1);
        // At the end of each part some multiprocessors are idle. That may take 1 % of the time.
        const int64_t heads = static_cast<int64_t>(B) * Hkv, undivided = half_rounds(p, blocks);
        for (int64_t count = std::min({heads, static_cast<int64_t>(work / LEAST_WORK), tiles_of(bytes, LARGE_WORKSPACE)}); count > 1; --count) {
            of_batches = static_cast<int>(std::min<int64_t>(count, B)), of_heads = static_cast<int>(std::max<int64_t>(1, count / B));
            if (100 * half_rounds(p, blocks) <= 101 * undivided) return;
        }
        of_batches = of_heads = 1;
    }

    int count() const { return of_batches * of_heads; }
    Part part(int n) const {
        const Share batches(n / of_heads, of_batches, B), heads(n % of_heads, of_heads, Hkv);
        return {batches.begin, batches.size(), heads.begin, heads.size()};
    }
    // The part with the most heads.
    Part largest() const { return {0, (B + of_batches - 1) / of_batches, 0, (Hkv + of_heads - 1) / of_heads}; }

private:
    // Twice the time of all parts, in units of a block's time. A multiprocessor computes one block at a time, so a few rounds count as whole rounds; after
    // many, blocks no longer end together, and half a round is lost.
    int64_t half_rounds(const AttentionParams& p, std::initializer_list<int64_t> blocks) const {
        int64_t sum = 0;
        for (const int64_t each : blocks) {
            const int64_t of_part = each * largest().B * largest().Hkv;
            sum += count() * std::min(2 * tiles_of(of_part, p.sm_count), tiles_of(2 * of_part, p.sm_count) + 1);
        }
        return sum;
    }
};

inline First first_of(const AttentionParams& p, const Part& part) { return {part.b, part.h * (p.H / p.Hkv)}; }

// The call of a part. Its tensors, LSE and mask begin at its first head; its workspace is the whole call's.
inline AttentionParams call_of(const AttentionParams& p, const Part& part) {
    AttentionParams call = p;
    const First first = first_of(p, part);
    call.B = part.B, call.Hkv = part.Hkv, call.H = part.Hkv * (p.H / p.Hkv);
    auto begin_at = [&](Tensor4& x, int h) {
        if (x.data) x.data = static_cast<element*>(x.data) + first.b * x.stride_b + h * x.stride_h;
    };
    for (Tensor4* x : {&call.q, &call.o, &call.d_o, &call.dq}) begin_at(*x, first.h);
    for (Tensor4* x : {&call.k, &call.v, &call.dk, &call.dv}) begin_at(*x, part.h);
    static_assert(MASK != MASK_OF_BYTES, "a mask's strides are in words");
    if (MASK) call.mask.data = static_cast<const uint32_t*>(p.mask.data) + first.b * p.mask.stride_b + first.h * p.mask.stride_h;
    const int64_t rows = (static_cast<int64_t>(first.b) * p.H + first.h) * p.Nq;
    if (call.lse) call.lse += rows;
    if (call.d_lse) call.d_lse += rows;
    return call;
}

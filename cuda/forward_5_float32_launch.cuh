// The launch of the two float32 forwards: planes, tensor maps and the kernel for each part of the heads. Each includes this file after its kernel, and
// defines the rows of a box of K (K_BOX_ROWS) and of V (V_BOX_ROWS).
#pragma once

inline int64_t blocks_of(const AttentionParams& p) { return tiles_of(p.Nq, BLOCK_Q) * p.H * p.B; }
inline int64_t planes_floats(const AttentionParams& p) { return Operands(p, false, nullptr).floats; }
inline Parts parts_of(const AttentionParams& p) { return Parts(p, planes_floats(p) * 4, {blocks_of(call_of(p, {0, 1, 0, 1}))}); }

extern "C" int64_t workspace_floats(const AttentionParams* params) {
    return planes_floats(call_of(*params, parts_of(*params).largest())) + Operands::range_floats(*params);
}

static cudaError_t launch_part(const AttentionParams& p, Range* ranges, First first) {
    const Operands all(p, false, ranges);
    Maps maps = {};
    cudaError_t error = make_planes_map(&maps.q, all.of[0], p.B, BOX_ROWS<Tile_Q, RowOrder>);
    if (error == cudaSuccess && p.Nk > 0) error = make_planes_map(&maps.k, all.of[1], p.B, K_BOX_ROWS);
    if (error == cudaSuccess && p.Nk > 0) error = make_planes_map(&maps.v, all.of[2], p.B, V_BOX_ROWS);
    if (error == cudaSuccess && p.Nk > 0 && MASK) error = make_mask_map(&maps.mask, p, BLOCK_Q);
    if (error != cudaSuccess) return error;
    launch_planes(p, all);
    launch_kernel(forward_kernel, static_cast<unsigned>(blocks_of(p)), THREADS, SMEM_BYTES, p.stream, p, maps, ranges, first);
    return cudaSuccess;
}

extern "C" int attention(const AttentionParams* params) {
    const AttentionParams& p = *params;
    if (p.B == 0 || p.Nq == 0) return cudaSuccess;
    if (!numbers_fit(p, {blocks_of(p), prepare_blocks(p, Operands(p, false, nullptr))})) return cudaErrorInvalidConfiguration;
    DeviceGuard guard(p.device);
    // First, because it creates the CUDA context of a thread that has not used the device yet; making tensor maps does not.
    cudaError_t error = cudaFuncSetAttribute(forward_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SMEM_BYTES);
    if (error != cudaSuccess) return error;
    return launch_parts(p, parts_of(p), p.workspace + workspace_floats(params), launch_part, exact::exact_attention);
}

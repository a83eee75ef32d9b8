// One of many: a warp has 16 rows, and a tile of 64 keys in swizzled shared memory serves the four warps of a block. Q stays in registers.
constexpr int BLOCK_Q = WARPS * WARP_ROWS, BLOCK_K = 64, BLOCK_THREADS = THREADS;
using Tile_KV = SwizzledTile<BLOCK_K, HEAD_DIM>;

// Rows from `first` on of one head, swizzled. What lies beyond `rows` or D becomes 0.
__device__ inline void load(uint8_t* X_smem, const element* X_gmem, int64_t stride, int first, int rows, int D) {
    for (int n = threadIdx.x; n < BLOCK_K * HEAD_DIM / 8; n += THREADS) {
        const int row = n / (HEAD_DIM / 8), chunk = n % (HEAD_DIM / 8);
        uint4 x = make_uint4(0, 0, 0, 0);
        if (first + row < rows && chunk * 8 < D) x = *reinterpret_cast<const uint4*>(X_gmem + (first + row) * stride + chunk * 8);
        *reinterpret_cast<uint4*>(X_smem + Tile_KV::offset(row, chunk)) = x;
    }
}

__global__ void __launch_bounds__(BLOCK_THREADS) forward_kernel(const __grid_constant__ AttentionParams p) {
    __shared__ __align__(128) uint8_t K_smem[Tile_KV::BYTES], V_smem[Tile_KV::BYTES];  // [BLOCK_K, HEAD_DIM]; first Q is where K will be
    const int tiles = (p.Nq + BLOCK_Q - 1) / BLOCK_Q, i0 = blockIdx.x % tiles * BLOCK_Q;
    const int h = blockIdx.x / tiles % p.H, b = blockIdx.x / tiles / p.H;
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * WARP_ROWS;

    load(K_smem, head_of(p.q, b, h), p.q.stride_n, i0, p.Nq, p.D);
    __syncthreads();  // Q is complete
    uint32_t Q_rmem[HEAD_DIM / 16][4];
    for (int d = 0; d < HEAD_DIM / 16; ++d) ptx::ldmatrix_x4(Q_rmem[d], Tile_KV::step(ptx::smem_address(K_smem) + Tile_KV::lane_a(warp_row, lane), d));

    float O_rmem[D_TILES][4] = {}, m_rmem[2] = {p.lowest, p.lowest}, l_rmem[2] = {};
    const float scale_log2 = p.scale * LOG2_E;
    const int columns = CAUSAL ? min(p.Nk, min(i0 + BLOCK_Q, p.Nq) + p.Nk - p.Nq) : p.Nk;
    for (int j0 = 0; j0 < columns; j0 += BLOCK_K) {
        __syncthreads();  // every warp has finished with Q, or with the tiles before
        load(K_smem, head_of(p.k, b, kv_head(p, h)), p.k.stride_n, j0, p.Nk, p.D);
        load(V_smem, head_of(p.v, b, kv_head(p, h)), p.v.stride_n, j0, p.Nk, p.Dv);
        __syncthreads();  // K and V are complete

        float S_rmem[BLOCK_K / 8][4] = {};
        const uint32_t K_lane = ptx::smem_address(K_smem) + Tile_KV::lane_b(0, lane);
        for (int d = 0; d < HEAD_DIM / 16; ++d)
            for (int n = 0; n < BLOCK_K / 8; n += 2) {
                uint32_t K_rmem[4];
                ptx::ldmatrix_x4(K_rmem, Tile_KV::step(K_lane, d) + n * 8 * ROW_BYTES);
                ptx::mma_m16n8k16<element>(S_rmem[n], Q_rmem[d], K_rmem[0], K_rmem[1]);
                ptx::mma_m16n8k16<element>(S_rmem[n + 1], Q_rmem[d], K_rmem[2], K_rmem[3]);
            }
        hide<false>(S_rmem, p, i0 + warp_row, j0);

        float alpha[2];
        for (int r = 0; r < 2; ++r) {
            float m = m_rmem[r], sum = 0;
            for (int n = 0; n < BLOCK_K / 8; ++n) m = fmaxf(m, fmaxf(S_rmem[n][2 * r], S_rmem[n][2 * r + 1]));
            m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, 1)), m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, 2));
            for (int n = 0; n < BLOCK_K / 8; ++n)
                for (int e = 2 * r; e < 2 * r + 2; ++e) sum += S_rmem[n][e] = ptx::ex2(S_rmem[n][e] * scale_log2 - m * scale_log2);
            alpha[r] = ptx::ex2((m_rmem[r] - m) * scale_log2), m_rmem[r] = m, l_rmem[r] = l_rmem[r] * alpha[r] + sum;
        }
        scale_rows(O_rmem, alpha[0], alpha[1]);
        add_product<Tile_KV>(O_rmem, S_rmem, ptx::smem_address(V_smem));
    }

    float factor[2];
    for (int r = 0; r < 2; ++r) {
        float l = l_rmem[r];
        l += __shfl_xor_sync(0xffffffff, l, 1), l += __shfl_xor_sync(0xffffffff, l, 2);
        factor[r] = factor_of_row(p, m_rmem[r], scale_log2, 1 / l);
        const int i = i0 + warp_row + 8 * r + lane / 4;
        if (p.lse && lane % 4 == 0 && i < p.Nq) p.lse[(static_cast<int64_t>(b) * p.H + h) * p.Nq + i] = m_rmem[r] * p.scale + logf(l);
    }
    scale_rows(O_rmem, factor[0], factor[1]);
    store_rows(head_of(p.o, b, h), p.o.stride_n, i0 + warp_row, p.Nq, p.Dv, O_rmem);
}

    ptx::fence_proxy_async();  // wgmma will see what this thread has stored
    __syncthreads();           // and what all have
    ptx::wgmma_fence();        // S_rmem is the product's from here on
#pragma unroll
    for (int d = 0; d < COLUMNS / 16; ++d) {
        const int at = d / 4 * PANEL_BYTES + d % 4 * 32;
        ptx::wgmma_ss<element, 64>(S_rmem, ptx::descriptor(Q_smem + at), ptx::descriptor(K_smem + at), d > 0);
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();

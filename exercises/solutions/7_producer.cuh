        for (int tile = 0; tile < tiles; ++tile) {
            const int stage = tile % STAGES, parity = tile / STAGES & 1;
            ptx::mbarrier_wait(empty(stage), parity ^ 1);  // the phase before this tile's; in the first round it is over
            ptx::mbarrier_arrive_expect_tx(full(stage), TILE_BYTES);
            ptx::cp_async_bulk(ptx::smem_address(X_smem[stage]), X_gmem + tile * FLOATS, TILE_BYTES, full(stage));
        }

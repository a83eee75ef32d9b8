    float sum = 0;
    for (int d0 = 0; d0 < D; d0 += TILE) {
        const int d = d0 + c;
        A_smem[r][c] = i0 + r < M && d < D ? A_gmem[(i0 + r) * D + d] : 0;
        B_smem[r][c] = j0 + r < N && d < D ? B_gmem[(j0 + r) * D + d] : 0;
        __syncthreads();  // both tiles are complete
        for (int k = 0; k < TILE; ++k) sum += A_smem[r][k] * B_smem[c][k];
        __syncthreads();  // every thread has finished with them; the next ones overwrite them
    }
    if (i0 + r < M && j0 + c < N) S_gmem[(i0 + r) * N + j0 + c] = sum;

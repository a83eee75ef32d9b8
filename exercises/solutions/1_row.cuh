    float m = -CUDART_INF_F;
    for (int j = lane; j < columns; j += 32) m = fmaxf(m, x[j]);
    for (int lanes = 16; lanes > 0; lanes /= 2) m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, lanes));
    float l = 0;
    for (int j = lane; j < columns; j += 32) l += expf(x[j] - m);
    for (int lanes = 16; lanes > 0; lanes /= 2) l += __shfl_xor_sync(0xffffffff, l, lanes);
    for (int j = lane; j < columns; j += 32) y[j] = expf(x[j] - m) / l;

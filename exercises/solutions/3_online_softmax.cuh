        const float m_new = fmaxf(m, max_of_warp(s));
        const float alpha = expf(m - m_new), probability = expf(s - m_new);
        l = alpha * l + sum_of_warp(probability);
        O = alpha * O;
        for (int n = 0; n < there; ++n) O += from(probability, n) * V[n * COLUMNS + lane];
        m = m_new;

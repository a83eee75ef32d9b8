// Forward on Hopper for plain heads of 72 to 96 columns: FlashAttention-3 (Shah et al., 2024, arXiv:2407.08608), Algorithm 1, in `hopper`'s kernel.  sm_90a.
//
// The idea: tiles of 192 rows of Q and 96 keys instead of 128 × 128. Three groups share each tile of K and V, so only two thirds of the copies remain.
// Rows of 72 or 88 columns begin at odd multiples of 16 bytes, and the copy engine loads those more slowly than the products consume them.
//
// Change from forward_4_hopper.cu: the sizes of tiles (forward_4_tiles.cuh). With three groups a thread has 160 registers instead of 232, into which S and O
// of 96 columns just fit. O is stored one panel at a time, because two panels do not fit into shared memory beside two tiles of Q.
//
// Measured on an H200, bfloat16, B 4 H 16, dense and causal, × forward_4_hopper.cu: N 4096 D 72 1.28 and 1.11, D 80 1.09 and 0.95, D 96 1.04 and 0.93.
// Few lengths are multiples of 192, so more blocks end half empty: N 512 D 96 0.89. So the caller decides by the number of rounds (`worth_tall` in
// flash_attention/backends/crossover.py).
//
// Serves float16 and bfloat16, dense and causal, without a mask, dropout, windows, spans or changed scores; head sizes 72, 80, 88 and 96.
#define TALL 1
#include "forward_4_hopper.cu"

"""Mistakes that a kernel's author could make, as data: a file of cuda/, the text before and after, and the case that must show the mistake.

check_mutations.py applies each to a copy and expects the emulator to report it, or the result to be wrong. One file because it is one list.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import Case


def case(**options) -> Case:
    return Case(**{"B": 1, "H": 2, "Nq": 150, "Nk": 300, "D": 64, "dtype": torch.float16, "seed": 1, **options})


PLAIN = case()
FLOAT32 = case(dtype=torch.float32)
CAUSAL = case(causal=True)
BLIND_ROWS = case(Nq=300, Nk=150, causal=True)  # the first rows see nothing
GROUPED = case(H=4, Hkv=2)
DROPOUT = case(dropout_p=0.25)
MASKED = case(mask="heads share", causal=True)
READ_ONCE = case(mask="full", Nk=304)  # each byte of the mask is read by one block, so it is not packed
SHARP = case(sharp=5)  # maxima grow
ONCE = case(dtype=torch.bfloat16)  # P is computed once, by the maxima of the tiles before
ONCE_GROWING = case(dtype=torch.bfloat16, sharp=1000, Nk=700)  # until it is too large
ONCE_WIDE = case(dtype=torch.bfloat16, D=128)
ONCE_AGAIN = case(dtype=torch.bfloat16, B=2, H=4, Nq=500)  # several work items a block
WIDE = case(D=128, Nq=400)
WIDE_MASKED = case(D=128, mask="heads share")
WIDEST = case(D=256, H=1)
WIDEST_MASKED = case(D=256, H=1, mask="heads share")
WIDEST_DROPPED = case(D=256, H=1, dropout_p=0.25)
WIDEST_LONG = case(D=256, H=1, Nq=300, Nk=130, causal=True)  # both buffers are used again
HEAD_96 = case(D=96, H=1)
HEAD_192 = case(D=192, H=1)
HEAD_192_DROPOUT = case(D=192, H=1, dropout_p=0.25)
HEAD_192_MASKED = case(D=192, H=1, mask="heads share")
HEAD_192_WINDOW = case(D=192, H=1, window=(70, 30))
HEAD_512 = case(D=512, H=1, Nq=130, Nk=200)
HEAD_512_CAUSAL = case(D=512, H=2, Nq=150, Nk=200, causal=True)
HEAD_512_MASKED = case(D=512, H=1, Nq=130, Nk=200, mask="heads share")
HEAD_320 = case(D=320, H=1, Nq=130, Nk=200)
HEAD_320_PIECES = case(D=320, H=1, Nq=70, Nk=1150)  # dS of so many keys is stored in two pieces
HEAD_320_BLIND_ROWS = case(D=320, H=2, Nq=300, Nk=130, causal=True)
ODD_HEAD = case(D=72, Nq=70, Nk=90)
MANY_TILES = case(Nk=700, H=3)  # every ring wraps
SINGLE_TILES = case(D=128, H=3, Nq=1030, Nk=300, causal=True)  # of the last head, whose pairs do not fill a round
ONE_QUERY = case(H=4, Hkv=2, Nq=1, Nk=1500)  # the keys are split
FEW_ROWS = case(H=4, Hkv=1, Nq=9, Nk=1537, causal=True, sharp=5)  # 36 packed rows, in a tile of 32 and one of 4
FEW_MASKED = case(H=4, Hkv=2, Nq=5, Nk=700, mask="full", dropout_p=0.25)
MANY_HEADS = case(B=3, H=4, Nk=200)  # so that slots are used again
MANY_GROUPED = case(B=4, H=6, Hkv=3)
MANY_TURNS = case(B=3, H=4, Nk=200, causal=True)  # deterministic
TURNS = case(Nk=700, causal=True)  # deterministic: shown by bits that change from seed to seed, or by a block that hangs

MANY_TILES_FLOAT32 = case(Nk=700, dtype=torch.float32)
DROPOUT_FLOAT32 = case(dropout_p=0.25, dtype=torch.float32)
SHARP_FLOAT32 = case(sharp=5, dtype=torch.float32)
WIDE_FLOAT32 = case(D=128, dtype=torch.float32)
HEAD_256_FLOAT32 = case(D=256, H=1, Nq=130, Nk=200, causal=True, dtype=torch.float32)
TURNS_FLOAT32 = case(Nk=700, causal=True, dtype=torch.float32)
# Computed under torch.set_float32_matmul_precision("high").
PLAIN_TF32 = case(dtype=torch.float32, seed=2)
DROPOUT_TF32 = case(dropout_p=0.25, dtype=torch.float32, seed=2)
HEAD_256_TF32 = case(D=256, H=1, Nq=70, Nk=600, dtype=torch.float32, seed=2)  # the ring wraps
AS_TF32 = PLAIN_TF32, DROPOUT_TF32, HEAD_256_TF32
# Computed with SMALL_PARTS: a batch and a key head at a time.
PARTS_FLOAT32 = case(B=2, H=4, Hkv=2, Nq=70, Nk=70, mask="full", dropout_p=0.25, dtype=torch.float32)
PARTS_256_FLOAT32 = case(B=1, Nq=70, Nk=70, D=256, dropout_p=0.25, dtype=torch.float32)
IN_PARTS = PARTS_FLOAT32, PARTS_256_FLOAT32
SMALL_PARTS = ("LARGE_WORKSPACE = 128 << 20", "LARGE_WORKSPACE = 1"), ("LEAST_WORK = 0x1p38", "LEAST_WORK = 1")  # in parts_of_heads.cuh
WINDOW = case(window=(70, 30))
WIDE_WINDOW = case(D=128, Nq=300, window=(170, 30))
WIDE_LONG_WINDOW = case(D=128, Nq=700, Nk=700, window=(500, 0))
UNTOUCHED_WINDOW = case(D=128, Nq=300, Nk=100, window=(0, 0))  # no block has anything to add to dQ of the first rows
TILE_START = case(Nk=150, window=(126, None))
TILE_STOP = case(Nk=150, window=(None, 126))
BLIND_SPANS = case(Nk=128, spans="some blind")
ANY_SPANS = case(Nk=150, spans="any")
WINDOW_TURNS = case(Nk=700, window=(200, 0))  # deterministic
WIDE_WINDOW_TURNS = case(D=128, Nk=700, window=(200, 0))  # deterministic
SHORT_DOCUMENTS = case(B=8, H=12, Nq=70, Nk=70, spans="causal documents")  # a backward leaves their tiles of keys in their own order
MANY_DOCUMENTS = case(Nq=500, Nk=500, spans="causal documents")
BLIND_FIRST = case(Nq=500, Nk=128, causal=True, spans="any")  # the first tiles of Q see nothing
UNSEEN_KEYS = case(Nk=700, window=(100, 0))  # no row sees the first tiles of keys
FEW_SEEN_KEYS = case(B=2, Nq=70, Nk=1150, window=(30, 0))  # a block has tiles of keys that no row sees after one that some rows see
LONG_WINDOW = case(Nq=500, Nk=500, window=(300, 0))
# dO is NaN in rows that attend nothing.
DEAD_ROWS = case(mask="dead rows")
DEAD_SPANS = case(Nk=130, spans="some blind")
DEAD_FIRST = case(Nk=90, window=(30, 0))
DEAD_CAUSAL = case(Nk=90, causal=True)
NAN_COMES_BACK = DEAD_ROWS, DEAD_SPANS, DEAD_FIRST, DEAD_CAUSAL
TRANSPOSED = case(mask="transposed")
MASKED_WINDOW = case(window=(70, 30), mask="heads share")

CAPPED = case(softcap=1.5, dtype=torch.float32)
BIASED = case(bias="batches share", Nk=90, dtype=torch.float32)
KEY_BIAS = case(bias="keys", B=2, Nk=90, dtype=torch.float32)
SLOPED = case(alibi=True, dtype=torch.float32)
HALF_CAPPED = case(softcap=1.5)
HALF_SLOPED = case(alibi=True)
HALF_BIASED = case(B=2, Nk=150, bias="batches share", bias_as_q=True)
HALF_KEY_BIAS = case(B=2, Nk=150, bias="keys", bias_as_q=True)

# hopper scans these masks for tiles that they hide entirely.
BAND = case(Nq=400, Nk=500, mask="band")
BLIND_BAND = case(Nq=500, Nk=150, mask="band")  # tiles of Q that see nothing
LONG_BAND = case(H=1, Nq=70, Nk=4300, mask="band")  # more tiles of keys than a word has bits
STRUCTURED = case(Nq=400, Nk=500, mask="structured")
WIDE_STRUCTURED = case(D=128, Nq=400, Nk=500, mask="structured")
FEW_WIDE_MASKED = case(D=128, H=1, Nq=70, Nk=90, mask="heads share")  # too few tiles to look which the mask leaves out
STRUCTURED_CAUSAL = case(Nq=600, Nk=600, mask="structured", causal=True)
STRUCTURED_GROUPED = case(H=4, Hkv=2, Nq=200, Nk=300, mask="structured")
SPECKS = case(Nq=400, Nk=500, mask="specks")  # what may be attended are single elements
NO_STRUCTURE = case(Nq=250, Nk=310, mask="full")
WIDE_NO_STRUCTURE = case(D=128, Nq=250, Nk=310, mask="full")
HALF_FROZEN = case(B=2, Nk=150, bias="batches share", bias_as_q=True, bias_frozen=True)
HALF_MASKED_CAP = case(softcap=1.5, mask="heads share")
FEW_CAPPED = case(H=4, Hkv=2, Nq=1, Nk=1500, softcap=1.5)
FEW_SLOPED = case(H=4, Hkv=1, Nq=9, Nk=700, causal=True, alibi=True)
FEW_BIASED = case(H=4, Hkv=2, Nq=3, Nk=301, bias="batches share", bias_as_q=True, bias_frozen=True)

NO_BARRIER, NO_WAIT = "", ""

# (rung, file): text before (which occurs once, or the number of occurrences before it is given), text after, the case
TABLE = {
    ("simple", "forward_1_simple.cu"): [
        ("__syncthreads();  // all threads have finished reading the previous chunks", "//", FLOAT32),
        ("__syncthreads();  // both chunks are complete", NO_BARRIER, FLOAT32),
        ("__syncthreads();  // all threads have finished reading the previous chunk of Kj or Vj", "//", FLOAT32),
        ("__syncthreads();  // the chunk is complete", NO_BARRIER, FLOAT32),
        ("O_rmem[c][r][e] *= alpha_rmem[r];", ";", FLOAT32),
        ("alpha_rmem[r] * l_rmem[r] + row_sum(sum)", "l_rmem[r] + row_sum(sum)", FLOAT32),
        ("row_sum(sum);", "sum;", FLOAT32),
    ],
    ("simple", "visible.cuh"): [
        ("min(i0 + size, p.Nq) + p.Nk - p.Nq)", "min(i0 + size, p.Nq) + p.Nk - p.Nq - 64)", CAUSAL),
        ("max(0, j0 + p.Nq - p.Nk)", "max(0, j0 + p.Nq - p.Nk + 64)", case(Nk=150, causal=True)),
        ("i + diagonal(p) - p.seen.left)", "i + diagonal(p) - p.seen.left + 1)", WINDOW),  # an interval is one short at its start
        ("i + diagonal(p) + p.seen.right + 1)", "i + diagonal(p) + p.seen.right)", WINDOW),  # and at its end
        ("max(0, j0 - p.seen.right - diagonal(p))", "max(0, j0 - p.seen.right - diagonal(p) + 64)", WINDOW),  # in the backward only
        ("min(j0 + size, p.Nk) + p.seen.left", "min(j0 + size, p.Nk) + p.seen.left - 64", WINDOW),
        ("all.start <= j0 &&", "all.start <= j0 + 1 &&", TILE_START),  # a tile of which one row misses one column is taken for whole
        ("j0 + size <= all.stop;", "j0 + size <= all.stop + 1;", TILE_STOP),
        ("max(span.start, -FAR)", "max(span.start + 1, -FAR)", ANY_SPANS),
        ("bounds.all = {p.Nk, 0};", ";", BLIND_SPANS),
    ],
    ("simple", "simple.cuh"): [
        ("j <= i + offset);", "j <= i + offset + 1);", CAUSAL),
        ("d0 + d < X.columns;", "d0 + d <= X.columns;", ODD_HEAD),
        ("i0 + warp + n * WARPS < X.rows &&", "i0 + warp + n * WARPS <= X.rows &&", FLOAT32),
        ("if (i < X.rows && d + e < X.columns)", "if (i <= X.rows && d + e < X.columns)", FLOAT32),
        ("may = *mask;", "may = mask[1];", case(mask="full")),
        ("word >> (j & 24)", "word >> (j & 16)", DROPOUT),
    ],
    ("simple", "common.cuh"): [
        ("return h / (p.H / p.Hkv);", "return h % p.Hkv;", GROUPED),
        ("0x9E3779B9u", "0x9E3779B8u", DROPOUT),
        ("(j0 >> 5) * 8 + (j0 & 7)", "(j0 >> 5) * 8 + (j0 & 7 ^ 1)", DROPOUT),
    ],
    ("simple", "backward_1_simple.cu"): [
        ("__syncthreads();  // the chunk is complete", NO_BARRIER, FLOAT32, 1),
        ("load_chunk<BLOCK_K>(KV_smem, K, j0, c * CHUNK, p.scale);", "load_chunk<BLOCK_K>(KV_smem, K, j0, c * CHUNK);", FLOAT32),
        ("P_rmem[r][c] = P * Z;", "P_rmem[r][c] = P;", DROPOUT),
        ("__syncthreads();  // all threads have finished reading the previous chunk of Vj or Kj", "//", FLOAT32),
        ("if (CAPPED) dS_rmem[r][c] *= derivative_rmem[r][c];", ";", CAPPED, 0),
        ("if (CAPPED) dS_rmem[r][c] *= derivative_rmem[r][c];", ";", CAPPED, 1),
        ("__syncthreads();  // the tile is complete; what follows reads other groups' rows", NO_BARRIER, KEY_BIAS),
        ("sum_rmem[r][c] += P *", "sum_rmem[r][c] = P *", KEY_BIAS),
        ("own_j + c >= bias.bias_j) continue;", "own_j + c > bias.bias_j) continue;", KEY_BIAS),
        ("h < (all_h ? p.H : own_h + 1)", "h < (all_h ? p.H - 1 : own_h + 1)", case(Nk=90, bias="heads share", dtype=torch.float32)),
        (
            "if (j0 >= stop_of_rows(p, i0, BLOCK_Q)) continue;",
            "if (j0 + BLOCK_K >= stop_of_rows(p, i0, BLOCK_Q)) continue;",
            case(Nk=150, bias="keys", causal=True, dtype=torch.float32),
        ),
    ],
    ("simple", "score.cuh"): [
        ("derivative = 1 - capped * capped;", "derivative = 1;", CAPPED),
        ("s = capped * p.scoring.softcap;", "s = capped;", CAPPED),
        ("s = bias < HIDES ? -CUDART_INF_F : s + bias;", "s += bias;", case(Nk=150, bias="hiding", dtype=torch.float32)),
        ("min(i, p.Nq - 1) * p.scoring.stride_i", "i * p.scoring.stride_i", BIASED),  # beyond the bias' last row
        ("h * p.scoring.stride_h", "h * p.scoring.stride_i", BIASED),
        ("abs(i + diagonal(p) - j)", "abs(i - j)", SLOPED),
        ("static_cast<float>(abs(i + diagonal(p) - j))", "static_cast<float>(i + diagonal(p) - j)", SLOPED),
        ("h * p.scoring.alibi_stride_h", "b * p.scoring.alibi_stride_h", SLOPED),
    ],
    ("mma", "forward_2_mma.cu"): [
        ("__syncthreads();  // all warps have finished reading the previous tiles", "//", PLAIN),
        ("__syncthreads();  // K, V and, in the first step, Q are complete", NO_BARRIER, PLAIN),
        ("m_new = fmaxf(m_new, __shfl_xor_sync(0xffffffff, m_new, 2));", ";", SHARP),
        ("l += __shfl_xor_sync(0xffffffff, l, 2);", ";", PLAIN),
        ("scale_rows(O_rmem, alpha[0], alpha[1]);", ";", SHARP),
        ("scale_rows(O_rmem, factor[0], factor[1]);", "scale_rows(O_rmem, factor[0], factor[0]);", PLAIN),
    ],
    ("mma", "mma.cuh"): [
        ("[n + lane / 16 * 8 + lane % 8][d + lane / 8 % 2 * 8]", "[n + lane / 8 % 2 * 8 + lane % 8][d + lane / 16 * 8]", PLAIN),
        ("ptx::ldmatrix_x4_trans(b_rmem,", "ptx::ldmatrix_x4(b_rmem,", PLAIN),
        ("j > i + offset)", "j > i + offset + 1)", CAUSAL),
        ("if (first + row < rows && column < D)", "if (first + row < rows)", ODD_HEAD),
        ("if (row < rows && column < D)", "if (row <= rows && column < D)", PLAIN),
    ],
    ("mma", "backward_2_mma.cu"): [
        ("__syncthreads();  // all warps have finished reading the previous tiles", "//", PLAIN, 0),
        ("__syncthreads();  // all warps have finished reading the previous tiles", "//", PLAIN, 1),
        ("__syncthreads();  // K, V and, in the first step, Q and dO are complete", NO_BARRIER, PLAIN),
        ("(dS_rmem[n][2 * r + e] - Delta);", "(dS_rmem[n][2 * r + e] + Delta);", PLAIN),
        ("add_product(dK_rmem, dS_rmem, Q_smem);", "add_product(dK_rmem, dS_rmem, dO_smem);", PLAIN),
        ("scale_rows(dQ_rmem, p.scale, p.scale);", ";", PLAIN),
    ],
    ("swizzle", "forward_2b_swizzle.cu"): [
        ("__syncthreads();  // K, V and, in the first step, Q are complete", NO_BARRIER, PLAIN),
        ("Tile::offset(row, chunk % CHUNKS)", "Tile::offset(row + 1, chunk % CHUNKS)", PLAIN),
        ("if (first + row < rows && column < D)", "if (first + row < rows)", ODD_HEAD),
    ],
    ("swizzle", "mma_swizzled.cuh"): [
        ("Tile_B::lane_b_trans(threadIdx.x % 32)", "Tile_B::lane_b(0, threadIdx.x % 32)", PLAIN),
        ("Tile_A::lane_a(warp_row, lane)", "Tile_A::lane_a(0, lane)", PLAIN),
    ],
    ("cp_async", "forward_2c_cp_async.cu"): [
        ("ptx::cp_async_wait_group<0>();  // this", "ptx::cp_async_wait_group<1>();  // this", PLAIN),
        ("__syncthreads();                // so have all threads'", "//", PLAIN),
        ("warp_row, K_smem + stage);", "warp_row, K_smem + (stage ^ Tile_KV::BYTES));", MANY_TILES),
        ("if (tile + 1 < k_tiles) load_KV(tile + 1);", "load_KV(tile + 1);", PLAIN),
    ],
    ("wgmma", "forward_3b_wgmma.cu"): [
        ("ptx::fence_proxy_async();       // wgmma will see them", NO_BARRIER, PLAIN),
        ("__syncthreads();                // so will it", "//", PLAIN),
        ("K_smem + stage);\n        ptx::wgmma_wait_group<0>();", "K_smem + stage);", PLAIN),
        ("V_smem + stage);\n        ptx::wgmma_wait_group<0>();", "V_smem + stage);", PLAIN),
    ],
    ("wgmma", "wgmma.cuh"): [
        ("ptx::wgmma_fence();  // earlier accesses", "//", PLAIN),
        ("d / 4 * Tile_B::PANEL_BYTES + d % 4 * 32), d > 0);", "d * 32), d > 0);", WIDE),
        ("d % 4 * 32), d > 0);", "d % 4 * 32), 1);", PLAIN),
        ("k * 16 * ROW_BYTES, Tile_B::PANEL_BYTES)", "k * 16 * ROW_BYTES)", WIDE),
    ],
    ("tensor_map", "forward_3c_tensor_map.cu"): [
        ("2 * Tile_KV::BYTES + more_bytes);", "2 * Tile_KV::BYTES);", PLAIN),
        ("tile / STAGES & 1);", "0);", MANY_TILES),
        ("if (tile + 1 < k_tiles && threadIdx.x == 0) load_KV", "if (tile + 1 < k_tiles && threadIdx.x < 2) load_KV", MANY_TILES),
        ("ptx::fence_mbarrier_init();", ";", PLAIN),
        ("&map, panel * 64, row, h, b, full);", "&map, 0, row, h, b, full);", WIDE),
    ],
    ("producer", "forward_3d_producer.cu"): [
        (
            "ptx::mbarrier_wait(barrier(K_empty, tile), parity(tile) ^ 1);",
            "ptx::mbarrier_wait(barrier(K_empty, tile), parity(tile));",
            PLAIN,
        ),
        ("ptx::mbarrier_wait(barrier(V_empty, tile), parity(tile) ^ 1);", NO_WAIT, MANY_TILES),
        ("release(K_empty, tile);", ";", MANY_TILES),
        ("barrier(V_empty, stage), CONSUMERS * WARPS);", "barrier(V_empty, stage), WARPS);", MANY_TILES),
        ("ptx::mbarrier_wait(barrier(V_full, tile), parity(tile));", NO_WAIT, PLAIN),
        ("ptx::setmaxnreg_dec<PRODUCER_REGISTERS>();", ";", PLAIN),
        ("Q_smem + consumer * 64 * ROW_BYTES", "Q_smem", PLAIN),
    ],
    ("ping_pong", "forward_3e_ping_pong.cu"): [
        ("if (consumer == CONSUMERS - 1) your_turn();", "", PLAIN),
        ("if (consumer == 0) my_turn();  // matches", "//", PLAIN),
        (
            "            issue_PV(tile - 1);\n            issue_QK(tile);",
            "            issue_QK(tile);\n            issue_PV(tile);",
            MANY_TILES,
        ),
        ("scale_rows(O_rmem, alpha[0], alpha[1]);", ";", SHARP),
        ("release(V_empty, tile - 1);", ";", MANY_TILES),
    ],
    ("tensor_core", "forward_3_tensor_core.cu"): [
        (
            "ptx::cp_async_wait_group<0>();\n        __syncthreads();  // K (and V)",
            "ptx::cp_async_wait_group<1>();\n        __syncthreads();  //",
            PLAIN,
        ),
        ("__syncthreads();  // K (and V) are there for every thread", "//", PLAIN),
        ("__syncwarp();  // every lane is done reading Q", NO_BARRIER, PLAIN),
        ("__syncwarp();  // the warp's rows are written", "//", PLAIN),
        ("if (k_tiles > first_tile) {  // if", "if (true) {  // if", BLIND_ROWS),
        ("if (__any_sync(0xffffffff, grew))", "if (false)", SHARP),
        ("i0 + warp_row + 16 * m + 8 * r + g + offset + 1) : p.Nk)", "i0 + warp_row + 16 * m + 8 * r + g + offset) : p.Nk)", CAUSAL),
        ("__syncthreads();  // V is there for every thread", "//", WIDEST),
        ("8 * n + c < from ||", "8 * n + c <= from ||", WINDOW),
        ("keep[m][r][(2 * k + half) % 4]", "keep[m][r ^ 1][(2 * k + half) % 4]", DROPOUT),
        ("m_rmem[m][r] * (SCORE ? LN_2 : p.scale)", "m_rmem[m][r] * p.scale", HALF_CAPPED),
        ("i, i + offset - j0 - 2 * t, slope);", "i, i - j0 - 2 * t, slope);", HALF_SLOPED),
    ],
    ("tensor_core", "visible.cuh"): [
        ("return k_tile - bounds(p, h, tile).some.start / block_k;", "return k_tile;", WINDOW_TURNS),
        ("first = min(first, q_tile), last = q_tile;", "first = min(first, q_tile + 1), last = q_tile;", ANY_SPANS),
    ],
    ("tensor_core", "swizzle.cuh"): [
        ("offset(first_row + lane % 8 + lane / 16 * 8, lane / 8 % 2)", "offset(first_row + lane % 8 + lane / 8 % 2 * 8, lane / 16)", PLAIN),
        ("offset(lane % 16, lane / 16)", "offset(lane % 8 + lane / 16 * 8, lane / 8 % 2)", PLAIN),
    ],
    ("tensor_core", "tensor_core.cuh"): [
        ("first + row + Order::distance(r) < rows &&", "first + row + Order::distance(r) <= rows &&", PLAIN),
        ("if (i < rows && chunk * 8 < D)", "if (i <= rows && chunk * 8 < D)", PLAIN),
        ("return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));", "return x;", SHARP),
        ("return x + __shfl_xor_sync(0xffffffff, x, 2);", "return x;", PLAIN),
    ],
    ("tensor_core", "mask_tile.cuh"): [
        ("hidden |= ~first_bits(visible - 32 * w);", "hidden |= ~first_bits(visible - 32 * w + 1);", MASKED),
        ("hidden |= first_bits(from - 32 * w);", "hidden |= first_bits(from - 32 * w - 1);", MASKED_WINDOW),
        ("const int there = min(max(p.Nk - j, 0), RUN);", "const int there = RUN;", READ_ONCE),
        ("r % 8 / 2 * RUN + r / 8 * 2 + r % 2", "r % 8 / 2 * RUN + r / 8 * 2 + 1 - r % 2", READ_ONCE),
    ],
    ("tensor_core", "common.cuh"): [
        ("hidden << (7 - 2 * t - c)", "hidden << (6 - 2 * t + c)", MASKED),
        ("keep[0] = ptx::prmt(first_02, second_02, 0xdd99);", "keep[0] = ptx::prmt(first_02, second_02, 0x99dd);", DROPOUT),
    ],
    ("tensor_core", "backward_3_tensor_core.cu"): [
        ("        __syncthreads();\n        if (ONE_BARRIER) load_q(2);", "        if (ONE_BARRIER) load_q(2);", PLAIN),
        ("if (ONE_BARRIER) load_q(2);", "if (ONE_BARRIER) load_q(3);", MANY_TILES),
        ("if (ONE_BARRIER) ptx::cp_async_wait_group<0>();", "if (ONE_BARRIER) ptx::cp_async_wait_group<1>();", PLAIN),
        ("while (ptx::ld_acquire(workspace.turns + row / BLOCK_Q) != my_turn()) {}", ";", TURNS),
        ("my_turn() + 1);", "my_turn() + 2);", TURNS),
        ("__syncthreads();  // every warp is done with K and V", NO_BARRIER, PLAIN),
        ("__syncthreads();  // whole rows are written", "//", PLAIN),
        ("if (ONE_BARRIER) dS_stage ^= dS_smem ^ (dS_smem + Tile_S::BYTES);", ";", PLAIN),
    ],
    ("tensor_core", "backward_3_scores.cuh"): [
        ("~first_bits(seen.stop - j) | first_bits(seen.start - j);", "~first_bits(seen.stop - j);", WINDOW),
        ("if (DROPOUT) dP0 = P0 < 0 ? 0 : dP0, dP1 = P1 < 0 ? 0 : dP1;", ";", DROPOUT),
        ("dS0 *= derivative.x, dS1 *= derivative.y;", "dS0 *= derivative.y, dS1 *= derivative.x;", HALF_CAPPED),
        ("pair.j0 - warp_k * K_ROWS - lane / 4, slope);", "pair.j0 - warp_k * K_ROWS, slope);", HALF_SLOPED),
        ("if (CAPPED && !BEFORE_CAP) {", "if (CAPPED) {", case(bias="full", softcap=1.5, bias_as_q=True)),
    ],
    ("tensor_core", "backward_3_bias.cuh"): [
        ("p.scoring.bias_b == 1 ? Interval{0, p.B}", "false ? Interval{0, p.B}", HALF_BIASED),
        ("kv_head(p, next.h) == kv_head(p, at.h) && next.j", "next.j", case(H=4, Hkv=2, bias="matrix", bias_as_q=True)),
        ("if (at.run < DBIAS_STAGES) {", "if (at.run < 1) {", HALF_KEY_BIAS),
        ("ptx::cp_async_wait_group<DBIAS_STAGES - 1>();", "ptx::cp_async_wait_group<DBIAS_STAGES>();", HALF_BIASED),
        ("__syncthreads();  // all warps have finished reading the pair", NO_BARRIER, HALF_KEY_BIAS),
        ("__syncthreads();  // all sums are there", NO_BARRIER, HALF_BIASED),
        ("sum_rmem[pass][m][n][2 * r] += dS0;", "sum_rmem[pass][m][n][2 * r] = dS0;", HALF_BIASED),
        ("DROPOUT ? p.keep_scale : 1;", "1;", case(bias="keys", dropout_p=0.5, bias_as_q=True)),
        ("|| j >= bias.bias_j ||", "||", HALF_BIASED),
        ("see_some(j0(), BLOCK_K); }", "see_whole(j0(), BLOCK_K); }", case(bias="keys", window=(70, 30), bias_as_q=True)),
        (
            "j0() < stop_of_rows(p, i0(), BLOCK_Q);",
            "j0() + BLOCK_K <= stop_of_rows(p, i0(), BLOCK_Q);",
            case(bias="full", causal=True, bias_as_q=True),
        ),
    ],
    ("tensor_core", "score_mma.cuh"): [
        ("ptx::cvt_pair<__half>(fmaf(-s0, s0, 1), fmaf(-s1, s1, 1));", "ptx::cvt_pair<__half>(1, 1);", HALF_CAPPED),
        ("s = MASK && s < units.lowest ? -CUDART_INF_F : decltype", "s = decltype", HALF_MASKED_CAP),
        ("fabsf(distance), x);", "distance, x);", HALF_SLOPED),
        ("row.distance - static_cast<float>(8 * n + 1)", "row.distance - static_cast<float>(8 * n)", HALF_SLOPED),
        ("second.distance - further", "first.distance - further", HALF_SLOPED),
        ("min(i, p.Nq - 1) * p.scoring.stride_i", "i * p.scoring.stride_i", HALF_FROZEN),  # beyond the bias' last row
        ("return lane[row / 2 + column / 2];", "return lane[row / 2];", HALF_FROZEN),
        ("return min(j, p.Nk - 1) * p.scoring.stride_j;", "return j * p.scoring.stride_j;", HALF_FROZEN),  # and its last column
        ("return bias.stride_j == 1 && odd % 2 == 0 &&", "return bias.stride_j == 1 &&", FEW_BIASED),
        ("bias_column(p, j + 16 * m + 8 * r);", "bias_column(p, j + 16 * m);", HALF_FROZEN),
    ],
    ("tensor_core", "score.cuh"): [
        ("-0.33065430f * factor", "-0.23065430f * factor", case(softcap=6.0)),
    ],
    ("tensor_core", "backward_workspace.cuh"): [
        ("= dead ? uint4{} : dO_rmem[n];", "= dO_rmem[n];", DEAD_ROWS),
        ("may_be_dead(p) && p.Dv > p.D;", "false;", case(mask="dead rows", D=24, Dv=64)),
        ("if (MASK || SCORE & SCORE_BIAS) return true;", "if (SCORE & SCORE_BIAS) return true;", DEAD_ROWS),
        ("return p.seen.spans != nullptr ||", "return", DEAD_SPANS),
        ("(p.seen.right >= 0 && first + p.seen.right < 0)", "false", DEAD_FIRST),
        ("return CAUSAL && p.Nq > p.Nk;", "return CAUSAL && p.Nq > p.Nk + 100;", DEAD_CAUSAL),
        ("__syncwarp();  // the warp's rows are written", "//", PLAIN),
        ("dQ[e] = make_float4(0, 0, 0, 0);", ";", PLAIN),
        ("int lanes = ROW_LANES / 2; lanes > 0", "int lanes = ROW_LANES / 4; lanes > 0", PLAIN),
        ("if (lane == n) Delta", "if (lane == 0) Delta", PLAIN),
        ("if (lane * 8 >= p.Dv) sum = 0;", ";", ODD_HEAD),
        ("min(first + n * ROWS_AT_ONCE, p.Nq - 1)", "first + n * ROWS_AT_ONCE", PLAIN),
    ],
    ("tensor_core", "pack_mask.cu"): [
        ("__shfl_down_sync(0xffffffff, hidden, 1) << 16", "__shfl_down_sync(0xffffffff, hidden, 2) << 16", MASKED),
    ],
    ("split_keys", "forward_5_split_keys.cu"): [
        ("if (LAUNCHED_EARLY) ptx::griddepcontrol_wait();", ";", ONE_QUERY),
        ("ptx::cp_async_wait_group<SLOTS - 2>();", "ptx::cp_async_wait_group<SLOTS - 1>();", ONE_QUERY),
        ("__syncwarp();  // the tile is visible to every lane", "//", ONE_QUERY),
        ("__syncthreads();  // Q is there for every thread", "//", ONE_QUERY),
        ("__syncthreads();  // every warp is done with Q, its ring", "//", FEW_ROWS),
        ("__syncthreads();  // all warps' sums are there", "//", ONE_QUERY, 0),
        ("return ptx::ex2((m - m_all) * s.m_to_log2());", "return 1;", FEW_ROWS),
        ("if (filled < 2 * count)", "if (filled < 2 * count - 1)", ONE_QUERY),
        ("filled, to_fill = to_fill + 1 == SLOTS ? 0 : to_fill + 1;", "filled, to_fill = to_fill == SLOTS ? 0 : to_fill + 1;", ONE_QUERY),
        (
            "const int i = (row0 + row) / group, h = h_kv * group + (row0 + row) % group;",
            "const int i = row / group, h = h_kv * group + row % group;",
            FEW_ROWS,
        ),
        ("min(limit, i_rmem[m][r] + offset + 1) : limit;", "min(limit, i_rmem[m][r] + offset + 2) : limit;", FEW_ROWS),
        ("min(limit, row0 / group + offset + 1) : limit;", "limit : limit;", FEW_ROWS),
        ("j0 + row + r < limit &&", "j0 + row + r <= limit &&", ONE_QUERY),
        ("{limit, first, count, (count + c.splits - 1) / c.splits};", "{limit, first, count, count / c.splits};", ONE_QUERY),
        ("steps.count ? (steps.count + steps.share - 1) / steps.share : 0;", "steps.count / steps.share;", ONE_QUERY),
        ("const int begin = split * steps.share,", "const int begin = split * (steps.share - 1),", ONE_QUERY),
        ("if (__any_sync(0xffffffff, grew))", "if (grew && false)", FEW_ROWS),
        ("l += factor * ml[s].y;", "l += ml[s].y;", FEW_ROWS),
        ("O[n][0] = fmaf(factor, x[s][n].x, O[n][0])", "O[n][0] += x[s][n].x", FEW_ROWS),
        ("+ tile) * c.splits * c.rows + row % c.rows;", "+ tile) * c.splits * c.rows;", ONE_QUERY),
        ("hidden_origin[m][r] + step_of(n + 1)];", "hidden_origin[m][r] + step_of(n) + 1];", FEW_MASKED),
        ("word = i % 32 / 8;", "word = i % 16 / 8;", case(H=1, Nq=30, dropout_p=0.25)),
        ("dropout_bytes(key, b, h, i, j0 + 2 * t)", "dropout_bytes(key, b, h_kv, i, j0 + 2 * t)", FEW_MASKED),
        ("const float factor = final_factor(c, scales, b, m_all, l);", "const float factor = 1 / l;", FEW_MASKED, 1),
        ("return SCORE ? 1 : score * LOG2_E;", "return score * LOG2_E;", FEW_CAPPED),
        ("return SCORE ? LN_2 : score;", "return score;", FEW_CAPPED),
        ("slope_rmem[m][r] = slope_log2(p, b, h_rmem[m][r]);", "slope_rmem[m][r] = slope_log2(p, b, h_kv);", FEW_SLOPED),
        ("i, i + offset - j0 - 2 * t, slope", "i, i - j0 - 2 * t, slope", FEW_SLOPED),
        ("scored_query(p, b, h, i, i", "scored_query(p, b, h_kv, i, i", FEW_BIASED),
    ],
    ("hopper", "forward_4_hopper.cu"): [
        ("if (schedule.seen.words != nullptr) ptx::griddepcontrol_wait();", ";", STRUCTURED),
        ("barriers.K_empty, stage), 4 * CONSUMERS);", "barriers.K_empty, stage), 4 * CONSUMERS + 1);", MANY_TILES),
        ("barriers.K_empty, stage), 4 * CONSUMERS);", "barriers.K_empty, stage), 4 * CONSUMERS - 1);", MANY_TILES),
        ("ptx::fence_mbarrier_init();", ";", PLAIN),
        (
            "    __syncthreads();\n\n    const int group = uniform(threadIdx.x / GROUP);",
            "    const int group = uniform(threadIdx.x / GROUP);",
            PLAIN,
        ),
        ("ptx::setmaxnreg_dec<PRODUCER_REGISTERS>();", ";", PLAIN),
    ],
    ("hopper", "forward_4_schedule.cuh"): [
        ("+ short_tiles - 1 - place / heads;", "+ short_tiles - place / heads;", LONG_WINDOW),
        ("if (unit >= units) return false;", "if (unit + 1 >= units) return false;", MANY_DOCUMENTS, 0),
        ("(first_tile + k_tiles - 1 - n)", "(k_tiles - 1 - n)", WINDOW),
        ("order.take(units - blocks, units)", "order.take(units, units)", MANY_DOCUMENTS),
        ("(m % 2 ? blocks - 1 - blockIdx.x : blockIdx.x)", "(m % 2 ? blocks - blockIdx.x : blockIdx.x)", LONG_WINDOW),
        ("chunk) & first_bits(tile - 32 * chunk);", "chunk);", STRUCTURED_CAUSAL),
        ("word ^= 1u << bit;", "word &= word - 1;", BAND),
        ("Interval{0, tiles_seen(p, tile * BLOCK_Q, BLOCK_Q)}", "Interval{1, tiles_seen(p, tile * BLOCK_Q, BLOCK_Q)}", STRUCTURED),
        ("tile -= place / abreast;", "tile -= 1 + place / abreast;", SINGLE_TILES),
    ],
    ("hopper", "seen_tiles.cuh"): [
        ("ptx::griddepcontrol_wait();  // the mask is packed", ";", STRUCTURED),
        ("(hidden[n].x & hidden[n].y) != ~0u;", "hidden[n].x != ~0u;", SPECKS),
        ("min(row + n * LOOK_WARPS, end - 1)", "row", SPECKS),
        ("all |= found_smem[w];", "all = found_smem[w];", SPECKS),
        ("other * (COLUMNS / 32))", "lane * (COLUMNS / 32))", LONG_BAND),
        ("__syncthreads();  // every warp has said what it found", NO_BARRIER, STRUCTURED),
        ("return head * tiles + tile;", "return tile;", STRUCTURED),
    ],
    ("hopper", "forward_4_producer.cuh"): [
        ("if (p.seen.spans != nullptr) ptx::griddepcontrol_wait();", ";", MANY_DOCUMENTS),
        ("(barrier(empty, slot.stage), slot.parity ^ 1);", "(barrier(empty, slot.stage), slot.parity);", PLAIN),
        ("ptx::mbarrier_wait(barrier(empty, slot.stage), slot.parity ^ 1);", NO_WAIT, MANY_TILES),
        ("Tile::BYTES + more_bytes);", "Tile::BYTES);", MASKED),
        ("if (work.k_tiles == 0) return ptx::mbarrier_arrive(full);", "if (work.k_tiles == 0) return;", PLAIN),
        ("shared.j0[slot.stage] = keys.j0;", "shared.j0[slot.stage] = work.j0(p, tile);", STRUCTURED_CAUSAL),
        (
            "ptx::mbarrier_wait(barrier(shared.barriers.K_empty, slot.stage), slot.parity ^ 1);\n                shared",
            "shared",
            STRUCTURED_CAUSAL,
        ),
        ("tile += gridDim.x) write(schedule.work_of(p, tile));", "tile += gridDim.x) ;", BLIND_BAND),
        ("ptx::mbarrier_wait(ptx::smem_address(&shared.barriers.work_asked), (n & 1) ^ 1);", NO_WAIT, MANY_DOCUMENTS),
        ("ptx::mbarrier_wait(ptx::smem_address(&shared.barriers.work_full), m++ & 1);", NO_WAIT, MANY_DOCUMENTS),
        ("if (tile == max(0, work.k_tiles - ASKED_BEFORE))", "if (tile == work.k_tiles - ASKED_BEFORE)", MANY_DOCUMENTS),
        ("    if (work.k_tiles > 0) put(work);\n", "    put(work);\n", BLIND_FIRST),
    ],
    ("hopper", "visible.cuh"): [
        ("ptx::griddepcontrol_wait();  // the rows' summaries are visible", ";", WINDOW),
        (
            "        ptx::griddepcontrol_wait();  // the rows' summaries are visible\n        ptx::griddepcontrol_launch_dependents();",
            "        ptx::griddepcontrol_launch_dependents();\n        ptx::griddepcontrol_wait();",
            DEAD_SPANS,
        ),
    ],
    ("hopper", "longest_first.cuh"): [
        ("order.units[counts[c] + __popc(same & first_bits(lane))] = unit;", "order.units[counts[c]] = unit;", MANY_DOCUMENTS),
        ("before += totals_smem[c];", ";", MANY_DOCUMENTS),
        ("begin = first + warp * stretch + lane;", "begin = warp * stretch + lane;", MANY_DOCUMENTS),
        ("if (threadIdx.x == 0) *order.queue = 0;", ";", MANY_DOCUMENTS),
        ("order.queue[1] = !shorter;", "order.queue[1] = 0;", NO_STRUCTURE),
        ("ptx::griddepcontrol_wait();  // the data that lengths are computed from is visible", ";", MANY_DOCUMENTS),
        ("order.units[unit - first] = unit;", "order.units[unit - first] = unit / 2;", SHORT_DOCUMENTS),
    ],
    ("hopper", "backward_workspace.cuh"): [  # the first two: an interval is one short, in the backward only
        ("max(0, keys.stop - keys.start)", "max(0, keys.stop - keys.start - 1)", WINDOW),
        ("make_uint2(keys.start, max(0", "make_uint2(keys.start + 1, max(0", WINDOW),
        ("const bool has_slot = bh < slots.count * group;", "const bool has_slot = true;", MANY_HEADS),
        ("const int bh = first + blockIdx.x / blocks_per_head;", "const int bh = blockIdx.x / blocks_per_head;", MANY_HEADS),
        ("return b_kv_h % count;", "return b_kv_h;", MANY_HEADS),
        ("workspace.added[bh / group] = workspace.zeroed[bh / group] = 0;", "workspace.added[bh / group] = 0;", MANY_HEADS),
        ("if (lane == 0) await(workspace.added + bh / group, (p.Nk + BLOCK_K - 1) / BLOCK_K);", ";", WINDOW),
        ("if (lane == 0) await(workspace.added + bh / group, (p.Nk + BLOCK_K - 1) / BLOCK_K);", ";", STRUCTURED),
        ("    if (blockIdx.x == gridDim.x - 1) ptx::griddepcontrol_wait();\n", "", MANY_DOCUMENTS),
        ("if (blockIdx.x == gridDim.x - 1) ptx::griddepcontrol_wait();  // so", "//", WINDOW),
        ("return bounds_of_rows(p, nullptr, 0, i / BLOCK_Q * BLOCK_Q, BLOCK_Q).may_be_blind();", "return false;", DEAD_FIRST),
        ("return Bounds{{}, {all.x, all.y}}.may_be_blind();", "return false;", DEAD_SPANS),
        ("workspace.dead[blockIdx.x] = copied;", "workspace.dead[blockIdx.x] = false;", DEAD_ROWS),
        ("STORES_FIRST && workspace.turns[row / BLOCK_Q] == Workspace::UNTOUCHED;", "false;", UNTOUCHED_WINDOW),
        ("zeros && !p.deterministic ? Workspace::STORED :", "false ? Workspace::STORED :", FEW_WIDE_MASKED),
    ],
    ("hopper", "forward_4_softmax.cuh"): [
        ("of_lane(keys.stop - 2 * t)", "of_lane(keys.stop - 2 * t - 1)", WINDOW),
        ("min(column % 8, 2)", "min(column % 8, 1)", WINDOW),
        ("| first_bits(keys.start - 32 * w);", ";", MASKED_WINDOW),
        ("span[r] = span_of_row(p, work.b, work.h, work.i0", "span[r] = span_of_row(p, 0, 0, work.i0", ANY_SPANS),
        ("m_rmem[r] = largest, l_rmem[r] *= alpha[r];", "m_rmem[r] = largest;", ONCE_GROWING),
        ("rescale_O([&] { return raised; });", ";", ONCE_GROWING),
        ("rescale_O([] { return true; });", ";", ONCE_GROWING),
        ("!(sum[0] + sum[1] <= MOST)", "false", ONCE_GROWING),
        ("if (FIRST) seekers = Seekers();", ";", ONCE_AGAIN),
        ("if (p.scale > 0) ptx::wgmma_wait_group<0>();\n            await_O();", ";", ONCE_WIDE),
    ],
    ("hopper", "lazy_softmax.cuh"): [
        ("l_rmem[r] = l_rmem[r] * alpha[r] + sum;", "l_rmem[r] = l_rmem[r] + sum;", SHARP),
        ("largest > m_rmem[r] + above);", "largest > m_rmem[r] + 100 * above);", case(sharp=20)),
    ],
    ("hopper", "forward_4_epilogue.cuh"): [
        ("if (64 * panel + 16 * k < V_HEAD_DIM)", "if (64 * panel + 16 * k + 16 < V_HEAD_DIM)", HEAD_96),
        ("ptx::fence_proxy_async();  // for what this lane has stored", NO_BARRIER, PLAIN),
        ("if (lane == 0) ptx::cp_async_bulk_wait_group_read<0>();  // the previous contents", "//", case(D=256, Nq=300)),
        ("(panel + more) * 64, work.i0", "panel * 64, work.i0", WIDE),
        ("ptx::lg2(l * TO_M)", "ptx::lg2(l)", ONCE),
    ],
    ("hopper", "forward_4_consumer.cuh"): [
        ("release(barriers.K_empty, now.stage);", ";", MANY_TILES),
        ("await_V(before);", NO_WAIT, PLAIN),
        ("ptx::wgmma_wait_group<1>();  // S is complete", "ptx::wgmma_wait_group<2>();", PLAIN),
        ("ptx::wgmma_wait_group<0>();\n                        multiply_O(raised);", "multiply_O(raised);", SHARP),
        ("if (raised()) {", "if (raised() && false) {", SHARP),
        (
            "ptx::wgmma_fence();\n#pragma unroll\n    for (int k = 0; k < BLOCK_K / 16; ++k)",
            "for (int k = 0; k < BLOCK_K / 16; ++k)",
            PLAIN,
        ),
        ("ptx::descriptor(V_tile + k * 16 * ROW_BYTES, Tile_V::PANEL_BYTES)", "ptx::descriptor(V_tile + k * 16 * ROW_BYTES)", WIDE),
        ("ptx::advance(K_tile, d / 4 * Tile_K::PANEL_BYTES + d % 4 * 32)", "ptx::advance(K_tile, d * 32)", WIDE),
        (
            "ptx::advance(Q_rows, d / 4 * Tile_Q::PANEL_BYTES + d % 4 * 32)",
            "ptx::advance(Q_rows, d / 4 * Tile_K::PANEL_BYTES + d % 4 * 64)",
            PLAIN,
        ),
        ("if (consumer == CONSUMERS - 1) your_turn(0);", ";", PLAIN),
        ("if (consumer == 0) my_turn();  // matches", "//", PLAIN),
        ("O_rmem[i] *= alpha[i >> 1 & 1];", ";", SHARP),
        ("d / 4 * Tile_K::PANEL_BYTES + d % 4 * 32), MASK", "d / 4 * Tile_Q::PANEL_BYTES + d % 4 * 32), MASK", HEAD_192),
    ],
    ("hopper", "keep_bits.cuh"): [
        ("push(r, upper ? from_other : mine[r], p);", "push(r, mine[r], p);", DROPOUT),
        ("(low & word) | (either & (low | word))", "(low & word)", DROPOUT),
        ("panel / OF_PART * PART + panel % OF_PART * 64;", "panel * 64;", HEAD_192_DROPOUT),
    ],
    ("hopper", "mask_start.cuh"): [
        ("S[4 * (4 * w + n) + 2 * r + c]", "S[4 * (4 * w + n) + 2 * r + 1 - c]", MASKED),
    ],
    ("hopper", "swizzle.cuh"): [
        ("((chunk % 8) ^ (row % 8)) * 16", "chunk % 8 * 16", PLAIN),
    ],
    ("hopper", "backward_4_hopper.cu"): [
        ("j - rows.z < rows.w}", "j - rows.x < rows.y}", WINDOW),
        ("const bool cut = now.cut;", "const bool cut = false;", WINDOW),
        ("told_smem[stage] = at;", ";", WINDOW),
        ("ptx::fence_proxy_async();  // this thread's part of dS", NO_BARRIER, PLAIN),
        ("meet();                    // dS is complete", "//", PLAIN),
        ("ptx::wgmma_wait_group<0>();  // dK too", "ptx::wgmma_wait_group<1>();  //", MANY_TILES),
        ("ptx::mbarrier_arrive(barrier(barriers.empty, stage));", ";", case(Nq=700)),
        ("ptx::wgmma_wait_group<DROPOUT ? 0 : 1>();", "ptx::wgmma_wait_group<2>();", PLAIN),
        ("ptx::wgmma_wait_group<1>();  // dV and dQ are there", "ptx::wgmma_wait_group<2>();", PLAIN),
        ("ptx::wgmma_wait_group<0>();  // both are there", "ptx::wgmma_wait_group<1>();  //", CAUSAL),
        ("row + (BY_ROWS ? 64 : 0), BY_ROWS ?", "row, BY_ROWS ?", CAUSAL),
        ("BY_ROWS ? 0 : COLUMNS, dQ_rmem", "0, dQ_rmem", case(D=128, Nq=400, Nk=500, mask="band")),
        ("dS_smem + now.n % 2 * Tile_dS::BYTES;", "dS_smem;", case(Nq=700)),
        ("ptx::mbarrier_wait(barrier(barriers.dS_full, n % 2), n / 2 & 1);", NO_WAIT, WIDE),
        ("ptx::mbarrier_wait(barrier(barriers.dS_empty, now.n % 2), (now.n / 2 & 1) ^ 1);", NO_WAIT, WIDE),
        ("ptx::mbarrier_arrive(barrier(barriers.dS_empty, n % 2));", ";", WIDE),
        ("ptx::fence_proxy_async();  // what this thread stored of dS, for the next tile", NO_BARRIER, WIDE),
        ("ptx::wgmma_wait_group<2>();  // dQ is complete", "ptx::wgmma_wait_group<3>();  //", WIDE),
        ("start_dQ_before(dQ_rmem, now.n - 1);\n            ptx::wgmma_fence();", "start_dQ_before(dQ_rmem, now.n - 1);", WIDE),
        ("row_before = static_cast<int64_t>(now.bh) * workspace_of(p, maps).rows + i0;", "row_before = i0;", WIDE),
        ("turn_before = now.turn(p, maps, k_tile);", ";", WIDE_WINDOW_TURNS),
        ("consumer * 8 + warp * 2 + lane / 8 % 2", "consumer * 8 + warp * 2 + lane / 16", PLAIN),
        ("k / 4 * Tile_dS::PANEL_BYTES + k % 4 * 32", "k * 32", PLAIN),
        ("ptx::advance(K_part, k * 16 * ROW_BYTES)", "ptx::advance(K_part, k * 32)", PLAIN),
        ("ptx::advance(dS_part, k * 16 * ROW_BYTES)", "ptx::advance(dS_part, k * 32)", WIDE_MASKED),
        ("ptx::mbarrier_wait(KV_full, 0);", NO_WAIT, PLAIN),
        ("Tile_Q::BYTES + 2 * ROWS_BYTES + SEEN_BYTES);", "Tile_Q::BYTES + ROWS_BYTES + SEEN_BYTES);", PLAIN),
        ("ptx::mbarrier_wait(barrier(barriers.unit_done, done.stage), done.parity);", NO_WAIT, WINDOW),
        ("ptx::mbarrier_wait(barrier(barriers.unit_done, buffer.stage), buffer.parity);", NO_WAIT, WIDE_WINDOW),
        ("ptx::mbarrier_arrive(barrier(barriers.unit_done, buffer.stage));", ";", WINDOW),
        ("ptx::fence_proxy_async();  // what this thread wrote\n", "\n", WINDOW),
        ("ptx::cp_async_bulk_wait_group_read<0>();", ";", UNSEEN_KEYS),
        ("tile + panel * Tile_K::PANEL_BYTES", "tile", WIDE_WINDOW),
        ("load_tile(at);\n                ptx::mbarrier_arrive(ptx::smem_address(&barriers.unit_wanted));", "load_tile(at);", WINDOW),
        ("wants_unit = [&] { ptx::mbarrier_arrive(ptx::smem_address(&barriers.unit_wanted)); };", "wants_unit = [&] {};", WIDE_WINDOW),
        ("ptx::mbarrier_wait(barrier(barriers.unit_known, buffer.stage), buffer.parity);", NO_WAIT, WINDOW),
        ("ptx::red_release(workspace_of(p, maps).added + before.b_kv_h, 1);", ";", WINDOW),
        ("ptx::red_release(workspace_of(p, maps).added + b_kv_h, 1);  // otherwise", ";  //", WIDE_WINDOW),
        ("== GROUP && p.Nq > 0) ptx::red_release(workspace_of(p, maps).added + b_kv_h, 1);", "== GROUP && p.Nq > 0) ;", STRUCTURED),
        (
            "ptx::griddepcontrol_wait();  // LSE, Delta and the summaries are visible",
            "ptx::griddepcontrol_launch_dependents(), ptx::griddepcontrol_wait();  //",
            WINDOW,
        ),  # the kernel after may find an earlier call's counts
        ("GROUP * CONSUMERS + CLAIMS);", "GROUP * CONSUMERS);", WIDE_WINDOW),
        ("const int tile = first ? -1 : claims.claimed(now.n - 1);", "const int tile = claims.claimed(now.n);", WIDE_WINDOW),  # too early
        ("if (adds) claims.stored(claims.claimed(now.n - 1));", ";", WIDE_WINDOW),
        ("claims_of_block().stores(n) : turn_before == 0;", "claims_of_block().stores(n) : false;", WIDE_WINDOW_TURNS),
        ("ptx::mbarrier_wait(barrier(barriers.decided, now.n % 2), now.n / 2 & 1);", NO_WAIT, WIDE_STRUCTURED),
        ("if (CLAIMS) told_smem[stage] = of_dQ;", ";", WIDE_STRUCTURED),
        ("const int tile = claims.claimed(now.n);", "const int tile = -1;", WIDE_STRUCTURED),
        ("dead ? maps.d_o_copy : maps.d_o;", "maps.d_o;", DEAD_ROWS),
        ("ptx::mbarrier_arrive(barrier(barriers.dO_full, at.slot().stage));", ";", UNSEEN_KEYS),
        ("ptx::mbarrier_arrive(barrier(barriers.empty, now.slot().stage));", ";", UNSEEN_KEYS),
        (
            "now.tile == NO_TILE && now.round == round",
            "now.tile == NO_TILE",
            FEW_SEEN_KEYS,
        ),  # the next unit's message
        ("at.cut == MAY_BE_BLIND ? maps.d_o_copy : maps.d_o", "maps.d_o", DEAD_SPANS),
        ("const uint32_t dK_smem = KV_smem + done.stage * KV_BYTES;", "const uint32_t dK_smem = KV_smem;", WINDOW),
        ("ptx::griddepcontrol_wait();  // the order is visible", ";", MANY_DOCUMENTS),
    ],
    ("hopper", "backward_hopper_claims.cuh"): [
        ("if (before == Workspace::CLAIMED) await(states + tile, Workspace::STORED);", ";", WIDE_WINDOW),
        ("if (before == Workspace::CLAIMED) await(states + tile, Workspace::STORED);", ";", WIDE_STRUCTURED),
        ("ptx::cas_acquire(states + tile, Workspace::UNTOUCHED, Workspace::CLAIMED);", "0;", WIDE_WINDOW),
        ("if (tile >= 0) ptx::st_release(states + tile, Workspace::STORED);", ";", WIDE_WINDOW),
        ("return claimed(n) >= 0;", "return false;", WIDE_WINDOW),
        ("CLAIMS_KEPT = 4;", "CLAIMS_KEPT = 2;", WIDE_LONG_WINDOW),
    ],
    ("hopper", "backward_hopper_visit.cuh"): [
        ("cut = bounds.see_whole(k_tile * BLOCK_K, BLOCK_K) ?", "cut = bounds.see_whole(k_tile * BLOCK_K + 1, BLOCK_K - 1) ?", TILE_START),
        ("cut = bounds.see_whole(k_tile * BLOCK_K, BLOCK_K) ?", "cut = bounds.see_whole(k_tile * BLOCK_K, BLOCK_K - 1) ?", TILE_STOP),
        ("tile = UP ? tiles.start : tiles.stop - 1", "tile = UP ? tiles.start : tiles.stop - 2", WINDOW),
        ("last = UP ? tiles.stop - 1", "last = UP ? tiles.stop - 2", WIDE_WINDOW),
        ("first_bits((UP ? tiles(p) : tile) - base)", "first_bits((UP ? tiles(p) : tile) - base - 1)", WIDE_STRUCTURED),
        ("UP ? first / 32 * 32 - 32", "UP ? first / 32 * 32", WIDE_STRUCTURED),
        ("return p.deterministic ? k_tile - maps", "return p.deterministic ? k_tile + 0 * maps", WINDOW_TURNS),
        ("max(0, k_tile * BLOCK_K - diagonal(p)) / BLOCK_Q - 1", "max(0, k_tile * BLOCK_K - (p.Nk - p.Nq)) / BLOCK_Q", CAUSAL),
        ("heads - last + block % last", "block % last", case(D=128, H=5, Nq=70, Nk=70, causal=True)),
        (
            "const int unit = maps.order != nullptr ? maps.order[place] : place;",
            "const int unit = place / 2;",
            MANY_DOCUMENTS,
        ),
        ("tile >= 0 && round == its_round", "tile >= 0", WINDOW),  # the next unit's tiles are taken for this one's
        ("blocks + atomicAdd(workspace.zeroed, 1)", "blocks + 2 * atomicAdd(workspace.zeroed, 1)", WINDOW),
        ("end_bh((b_kv_h + 1) * (p.H / p.Hkv))", "end_bh(b_kv_h * (p.H / p.Hkv) + 1)", STRUCTURED_GROUPED),
        ("if (LEAVES_OUT) unit = maps.order.units[unit];", "if (LEAVES_OUT) unit = maps.order.units[unit / 2];", STRUCTURED),
    ],
    ("hopper", "pack_mask.cu"): [
        ("__syncthreads();  // every column is there", "//", MASKED),
        ("if (i + n >= p.Nq) bytes[n] = uint4{};", "if (false) bytes[n] = uint4{};", MASKED),
        ("may[w] = may[w] >> 1 | nonzero;", "may[w] = may[w] << 1 | nonzero;", MASKED),
        ("part & bit ? low : high, bit * READERS);", "part & bit ? low : high, bit * 4);", MASKED),
        ("(part & bit ? low : high) = other;", "high = other;", MASKED),
        ("columns.x = ~ptx::prmt(first[0], last[0], 0x5410)", "columns.x = ~ptx::prmt(first[0], last[0], 0x1054)", MASKED),
        ("word / (4 * READERS) * 4 + word % 4;", "word / (4 * READERS) * 4;", MASKED),
        ("std::swap(p.stride_i, p.stride_j), std::swap(p.Nq, p.Nk);", "std::swap(p.stride_i, p.stride_j);", TRANSPOSED),
        ("p.by_keys = !p.by_keys;", "", TRANSPOSED),
    ],
    ("hopper", "backward_hopper.cuh"): [
        ("while (ptx::ld_acquire(workspace.turns + row / BLOCK_Q) != turn) {}", ";", TURNS),
        ("workspace.turns + row / BLOCK_Q, turn + 1);", "workspace.turns + row / BLOCK_Q, turn + 2);", TURNS),
        ("column + 8 * n < HEAD_DIM)", "column + 8 * n < 128)", HEAD_96),
        ("const bool zeros = order.none();", "const bool zeros = false;", WIDE_NO_STRUCTURE),
        ("zeros ? Workspace::STORED : Workspace::UNTOUCHED;", "Workspace::UNTOUCHED;", WIDE_NO_STRUCTURE),
    ],
    ("hopper", "backward_hopper_slots.cuh"): [
        ("if (zero) sums[column * 4] = sums[column * 4 + 32] = make_float4(0, 0, 0, 0);", ";", MANY_HEADS),
        ("const int right = odd * 8 + t / 2 * 4;", "const int right = t * 4;", MANY_HEADS),
        ("slots.of(its) * group + h", "slots.of(its) * group", MANY_GROUPED),
        ("its * group + h, strip * 16", "its * group, strip * 16", MANY_GROUPED),
        ("b_kv_h + slots.lag < heads) {", "b_kv_h + slots.lag + 1 < heads) {", MANY_HEADS),
        ("k_tile * share + warp - 1;", "k_tile * share + warp;", MANY_HEADS),
        ("ptx::mbarrier_arrive(KV_full);", ";", MANY_HEADS),
        ("if (used_again() && row % BLOCK_Q == 0)", "if (false)", MANY_TURNS),
        ("odd ? pairs[r][0] : pairs[r][1], 1);", "odd ? pairs[r][1] : pairs[r][0], 1);", MANY_HEADS),
    ],
    ("hopper", "backward_4_hopper_192.cu"): [
        ("ptx::wgmma_wait_group<1>();  // dQ is there", "ptx::wgmma_wait_group<2>();", HEAD_192),
        ("ptx::wgmma_wait_group<3>();  // dK is there: done with Q and dS", "ptx::wgmma_wait_group<4>();", HEAD_192),
        ("ptx::mbarrier_wait(barrier(barriers.Q_empty, n % STAGES), n / STAGES & 1);", NO_WAIT, HEAD_192),
        ("ptx::wgmma_wait_group<0>();  // dV is there: done with dO and P", "ptx::wgmma_wait_group<1>();", HEAD_192),
        ("ptx::fence_proxy_async();  // this thread's part of P and dS", NO_BARRIER, HEAD_192),
        ("meet();  // P and dS are whole", "//", HEAD_192),
        ("meet();  // both are whole", "//", HEAD_192),
        ("P_smem + n % 2 * Tile_P::BYTES;", "P_smem;", HEAD_192),
        ("consumer * 8 + warp * 2 + lane / 8 % 2", "consumer * 8 + warp * 2 + lane / 16", HEAD_192),
        ("start_of_sum(signs, warp % 2 * 2 + r)", "start_of_sum(signs, r)", HEAD_192_MASKED),
        ("const unsigned from = keys.x - j0,", "const unsigned from = keys.x,", HEAD_192_WINDOW),
    ],
    ("hopper", "backward_4_hopper_wide.cu"): [
        ("ptx::wgmma_wait_group<3>();  // S is there, and dK: done with Q", "ptx::wgmma_wait_group<4>();  //", WIDEST_DROPPED),
        ("ptx::wgmma_wait_group<2>();  // the first half of dQ is there", "ptx::wgmma_wait_group<3>();", WIDEST_DROPPED),
        ("ptx::fence_proxy_async();  // this thread's part of Pᵀ and dSᵀ", NO_BARRIER, WIDEST_DROPPED),
        ("meet();                      // Pᵀ and dSᵀ are whole", "//", WIDEST_DROPPED),
        ("if (MASK) ptx::mbarrier_arrive(mask_empty);", ";", WIDEST_MASKED),
        ("ptx::wgmma_wait_group<2>();  // dV is there: done with dO", "ptx::wgmma_wait_group<3>();", WIDEST_DROPPED),
        ("dS_of(next.n), Q_of(next.n), false);", "dS_of(n), Q_of(next.n), false);", WIDEST_DROPPED),
        ("adds_late) add_half(row_before, 1);\n            start_dQ(n, 0);", "adds_late) ;\n            start_dQ(n, 0);", WIDEST_DROPPED),
        ("d / STEPS * PANELS + d % STEPS / 4", "d / 4", HEAD_192_DROPOUT),
        ("p.D, consumer * COLUMNS,", "p.D, consumer * 128,", HEAD_192_DROPOUT),
    ],
    ("hopper", "backward_4_hopper_256.cu"): [
        ("ptx::wgmma_wait_group<1>();  // Sᵀ is there, and dK: done with Q", "ptx::wgmma_wait_group<2>();", WIDEST),
        ("ptx::wgmma_wait_group<1>();  // dPᵀ is there, and dK: done with Q", "ptx::wgmma_wait_group<2>();", WIDEST),
        ("ptx::fence_proxy_async();  // this thread's part of Pᵀ", NO_BARRIER, WIDEST),
        ("ptx::fence_proxy_async();  // this thread's part of dSᵀ", NO_BARRIER, WIDEST),
        ("meet();  // dSᵀ is there", "ptx::bar_arrive(1, CONSUMERS * GROUP);", WIDEST),
        ("ptx::bar_sync(P_IS_THERE, CONSUMERS * GROUP);", ";", WIDEST),
        ("if (stores) ptx::cp_async_bulk_wait_group_read<0>();  // dS of the tile before", ";  //", WIDEST_LONG),
        ("P_of(n) + Tile_S::BYTES;", "P_of(n);", WIDEST),
        ("add(dK_rmem, dS_of(n), Q_of(n));", "add(dK_rmem, dS_of(n), dO_of(n));", WIDEST),
        ("store(dV_rmem, Tile::BYTES, p.dv, p.Dv, 1);", "store(dV_rmem, Tile::BYTES, p.dv, p.Dv, p.scale);", WIDEST),
    ],
    ("hopper_wide", "stored_dS.cuh"): [
        ("i + shift + 1 < keys ? i + shift + 1 : keys;", "i + shift < keys ? i + shift : keys;", HEAD_512_CAUSAL),
        ("(hidden(j - shift) - hidden(-shift));", "hidden(j - shift);", HEAD_320_BLIND_ROWS),
        ("static_cast<int64_t>(n) * (n - 1) / 2", "static_cast<int64_t>(n) * (n + 1) / 2", HEAD_512_CAUSAL),
        ("(head * (p.H / p.Hkv) + h) * of_head", "(head + h) * of_head", case(D=320, H=4, Hkv=2, Nq=70, Nk=90)),
        ("dQ_rmem[e] += sums[", "dQ_rmem[e] = sums[", HEAD_320_PIECES),
        ("if (piece.first_key + piece.keys < tiles.keys) {", "if (false) {", HEAD_320_PIECES),
        ("j < tiles.seen_by(i) ? static_cast<int>(", "true ? static_cast<int>(", HEAD_512_CAUSAL),
        ("ptx::wgmma_wait_group<1>();  // the step before has been added", "ptx::wgmma_wait_group<2>();", HEAD_320_PIECES),
        ("part * COLUMNS + panel * 64,", "panel * 64,", HEAD_320),
        ("meet();  // both groups are done with the stages", "//", HEAD_512),
        ("static_cast<float>(P_pair[1]) * (dP1 - Delta.y);", "static_cast<float>(P_pair[1]) * (dP1 - Delta.x);", HEAD_320),
        ("dQ_floats = parts > 1 ?", "dQ_floats = parts > 2 ?", HEAD_320_PIECES),
    ],
    ("hopper_wide", "forward_5_wide.cu"): [
        ("ptx::wgmma_wait_group<1>();  // the panel before has been read", ";", HEAD_512),
        ("release(barriers.K_empty[before]);", ";", HEAD_512),
        ("if (++stage == RING) stage = 0, parity ^= 1;", "if (++stage == RING) stage = 0;", HEAD_512),
        ("ptx::mbarrier_wait(barrier(barriers.V_empty), n & 1 ^ 1);", NO_WAIT, HEAD_512),
        (
            "load_boxes<Tile_V>(V_smem, maps.v[work.part], work.j0(tile),",
            "load_boxes<Tile_V>(V_smem, maps.v[work.part], work.j0(0),",
            HEAD_512,
        ),
        (
            "for (Work work = next_with_keys(m); work.k_tiles > 0; work = next_with_keys(m)) {",
            "for (Work work = next_with_keys(m); work.k_tiles > 0; work = next_with_keys(++m)) {",
            HEAD_512_CAUSAL,
        ),
        ("columns_from(p.o, part * PART)", "columns_from(p.o, part * 128)", HEAD_512),
        ("ptx::mbarrier_arrive(barrier(barriers.mask_empty));", ";", HEAD_512_MASKED),
        ("work.part == 0 && t == 0 && i < p.Nq)", "work.part == 0 && t == 0 && i <= p.Nq)", HEAD_512),
        ("(K_PANELS < RING ? K_PANELS : RING) - 1) hand_out(work);", "K_PANELS - 1) hand_out(work);", HEAD_512),
        ("ptx::wgmma_wait_group<1>();  // S is there", "ptx::wgmma_wait_group<2>();", HEAD_512),
    ],
    ("hopper_wide", "lazy_softmax.cuh"): [
        ("largest > m_rmem[r] + above);", "largest > m_rmem[r] + 100 * above);", case(D=320, sharp=20)),
        ("m_rmem[r] = m_new;", ";", HEAD_512),
    ],
    ("hopper_wide", "backward_split.cuh"): [
        ("max(0, j0 - (p.Nk - p.Nq)) / BLOCK * BLOCK", "max(0, j0 - (p.Nk - p.Nq) + BLOCK) / BLOCK * BLOCK", HEAD_512_CAUSAL),
        ("column += 32 * 8)", "column += 64 * 8)", HEAD_512),
    ],
    ("hopper_wide", "backward_5_wide.cu"): [
        ("if (at.n > 0) ptx::bar_sync(PLACE_IS_FREE, CONSUMERS * GROUP);", ";", HEAD_512),
        ("if (stores) ptx::cp_async_bulk_wait_group_read<0>();\n", "", HEAD_512),
        ("* BLOCK + RowOrder::row(row), 0, 0, dS_smem", "* BLOCK + row, 0, 0, dS_smem", case(D=320, H=1, Nq=70, Nk=90, dropout_p=0.25)),
        ("ptx::bar_sync(P_IS_THERE, CONSUMERS * GROUP);", ";", HEAD_512),
        ("ptx::fence_proxy_async();  // this thread's part of dSᵀ", NO_BARRIER, HEAD_512),
        ("meet();  // dSᵀ is there", "ptx::bar_arrive(1, CONSUMERS * GROUP);", HEAD_512),
        ("ptx::wgmma_wait_group<1>();  // the last tile has been added", ";  //", HEAD_512),
        ("ptx::wgmma_wait_group<1>();  // Sᵀ is there", "ptx::wgmma_wait_group<2>();  //", HEAD_512),
        ("ptx::mbarrier_arrive(barrier(barriers.rows_empty[n % 2]));", ";", case(D=512, H=1, Nq=300, Nk=70)),
        ("? (HALF - panel % OF_HALF * 64) / 16 : 4;", "? 4 : 4;", HEAD_320),
    ],
    ("hopper_float32", "planes.cuh"): [
        ("if (DROPOUT) Delta /= p.keep_scale;", "", DROPOUT_FLOAT32),
        ("lo = ptx::cvt_pair<__half>(x0 - held.x, x1 - held.y);", "lo = 0;", FLOAT32),
        ("x0 - held.x, x1 - held.y);", "x0 - held.x, x1 - held.x);", FLOAT32),
        ("static_cast<__half*>(x.planes.data) + plane * x.planes.stride_b", "static_cast<__half*>(x.planes.data)", FLOAT32),
        ("2 * p.dv.stride_h, 2 * p.dv.stride_n};", "p.dv.stride_h, 2 * p.dv.stride_n};", case(D=256, Nq=70, Nk=70, dtype=torch.float32)),
        ("scalbnf(p.scale, -exponent_of(range.q) - exponent_of(range.k));", "scalbnf(p.scale, -2 * exponent_of(range.q));", SHARP_FLOAT32),
        ("PLANES == 1 ? 1 : 3;", "3;", PLAIN_TF32),
        ("return PLANES == 2 && product == 0;", "return product == 0;", PLAIN_TF32),
        ("HEAD_DIM * PLANES / 2;", "HEAD_DIM / 4;", PLAIN_TF32),
        ("if (PLANES == 2) return x;", "if (PLANES == 2) return x;\n    return make_float4(0, 0, 0, 0);", PLAIN_TF32),
    ],
    ("hopper_float32", "parts_of_heads.cuh"): [
        ("begin_at(*x, first.h);", "begin_at(*x, part.h);", PARTS_FLOAT32),
        ("first.b * x.stride_b + h * x.stride_h;", "h * x.stride_h;", PARTS_FLOAT32),
        ("first.b * p.mask.stride_b + first.h * p.mask.stride_h;", "first.h * p.mask.stride_h;", PARTS_FLOAT32),
        ("if (call.d_lse) call.d_lse += rows;", "", PARTS_FLOAT32),
        ("return {part.b, part.h * (p.H / p.Hkv)};", "return {part.b, 0};", PARTS_FLOAT32),
    ],
    ("hopper_float32", "forward_5_float32.cu"): [
        ("keep.draw_rows(p, first.b + b, first.h + h,", "keep.draw_rows(p, b, h,", PARTS_FLOAT32),
        ("plane_of_first(product) * Tile_Q::BYTES", "plane_of_second(product) * Tile_Q::BYTES", FLOAT32),
        ("P_rmem[plane_of_first(product)][k]", "P_rmem[0][k]", FLOAT32),
        ("O_tile_rmem[i] = 0;", ";", FLOAT32),
        ("(O_rmem[i] + O_tile_rmem[i]) * alpha[i >> 1 & 1];", "O_rmem[i] * alpha[i >> 1 & 1] + O_tile_rmem[i];", SHARP_FLOAT32),
        ("release(barriers.K_empty, Slot<STAGES>(n).stage);", ";", MANY_TILES_FLOAT32),
        ("ptx::wgmma_wait_group<1>();  // S is there", "ptx::wgmma_wait_group<2>();", FLOAT32),
        ("ptx::mbarrier_wait(barrier(barriers.V_full, slot.stage), slot.parity);", NO_WAIT, FLOAT32),
        ("if (MASK) __syncwarp();      // every lane has read", "//", case(Nk=700, mask="heads share", dtype=torch.float32)),
        ("pairs[plane] & kept;", "pairs[plane] & (plane == 0 ? kept : ~0u);", DROPOUT_FLOAT32),
        ("pairs[plane] & kept;", "pairs[plane] & (plane == 1 ? kept : ~0u);", DROPOUT_TF32),
    ],
    ("tensor_core_float32", "planes_mma.cuh"): [
        ("product == (LO_OF_A_FIRST ? 1 : 0);", "product == (LO_OF_A_FIRST ? 0 : 1);", FLOAT32),
        (
            "float(&to)[M][N][4] = product < 2 ? small : C;",
            "float(&to)[M][N][4] = product < 1 ? small : C;\nif (product == 1) continue;",
            FLOAT32,
        ),
        ("C[m][n][e] += small[m][n][e];", ";", FLOAT32),
        ("A[product == 0][k][m], b[product == 1]", "A[0][k][m], b[product == 1]", FLOAT32),
        ("Tile_B::step(B, n / 2) + plane * Tile_B::BYTES", "Tile_B::step(B, n / 2)", FLOAT32),
        ("const float(&x)[4] = C[m][2 * k + e / 2];", "const float(&x)[4] = C[m][2 * k + e % 2];", FLOAT32),
        ("second = scalbnf(1, max(-126, min(126, exponent - half)));", "second = first;", SHARP_FLOAT32),
    ],
    ("tensor_core_float32", "forward_3_float32.cu"): [
        ("fmaf(O_rmem[m][o][e], alpha[m][e / 2], part[e])", "fmaf(O_rmem[m][o][e], alpha[m][0], part[e])", SHARP_FLOAT32),
        ("__syncthreads();  // K (and V) are there", "//", MANY_TILES_FLOAT32),
        (
            "dropout_bytes(key, first.b + b, first.h + h, row_group, column_group);",
            "dropout_bytes(key, b, h, row_group, column_group);",
            PARTS_FLOAT32,
        ),
        ("const bool upper = warp_row % 32 == 16;", "const bool upper = false;", DROPOUT_FLOAT32),
        ("(CAUSAL ? min(p.Nk, i0 + warp_row + 16 * m + 8 * r + g", "(CAUSAL ? min(p.Nk, i0 + warp_row + 16 * m + g", TURNS_FLOAT32),
        (
            "load_V = [&](int j) { load_planes<Tile_KV, THREADS>(KV_smem + (stage(j)",
            "load_V = [&](int j) { load_planes<Tile_KV, THREADS>(KV_smem + (stage(j + 1)",
            FLOAT32,
        ),
    ],
    ("tensor_core_float32", "planes.cuh"): [
        ("if (DROPOUT) Delta /= p.keep_scale;", "", DROPOUT_FLOAT32),
    ],
    ("tensor_core_float32", "backward_3_float32.cu"): [
        ("((keep ? dS : 0) - Delta)", "(keep ? dS - Delta : 0)", DROPOUT_FLOAT32),
        ("if (STAGES == 2) stage ^= 1;", "", MANY_TILES_FLOAT32),
        ("__syncthreads();  // the tile is there for every thread", "//", FLOAT32),
        ("hidden >> pass * 16,", "hidden,", PARTS_FLOAT32),
        ("__shfl_sync(0xffffffff, word, OF_Q ? row : column);", "__shfl_sync(0xffffffff, word, row);", PARTS_FLOAT32),
        ("workspace.first.b + b, workspace.first.h + h, i, j)", "b, h, i, j)", PARTS_FLOAT32),
        ("if (!OF_Q && upper) x >>= 16;", "", case(D=128, dropout_p=0.25, dtype=torch.float32)),
        ("if (!keep) P = 0;", "", DROPOUT_FLOAT32),
        ("first_row_of(p, row0) / OTHERS;", "(first_row_of(p, row0) + OTHERS) / OTHERS;", TURNS_FLOAT32),
        ("if (j >= p.Nk || (CAUSAL && j > i + offset)) hidden |= bit;", "if (j >= p.Nk) hidden |= bit;", TURNS_FLOAT32),
        ("OF_Q ? of_head.k : of_head.q);", "of_head.q);", SHARP_FLOAT32),
    ],
    ("hopper_float32", "forward_5_float32_wide.cu"): [
        ("join(m_new, larger);", "", HEAD_256_FLOAT32),
        ("meet();                    // P is whole", "//", HEAD_256_FLOAT32),
        ("ptx::fence_proxy_async();  // this thread's part of P", NO_BARRIER, HEAD_256_FLOAT32),
        ("plane_of_first(product) * Tile_P::BYTES + k * 32", "k * 32", HEAD_256_FLOAT32),
        ("if (PLANES == 2) release(2);", "release(2);", HEAD_256_TF32),
        ("fmaf(O_rmem[32 * chunk + i], alpha[i >> 1 & 1], part_rmem[i])", "O_rmem[32 * chunk + i] + part_rmem[i]", HEAD_256_FLOAT32),
        ("ptx::wgmma_wait_group<1>();  // the piece before has been read", "//", HEAD_256_FLOAT32),
        ("join(l_rmem, [](float x, float y) { return x + y; });", "", HEAD_256_FLOAT32),
    ],
    ("hopper_float32", "backward_5_float32_wide.cu"): [
        ("keep.draw_keys(p, workspace.first.b + b, workspace.first.h + now.h,", "keep.draw_keys(p, b, now.h,", PARTS_256_FLOAT32),
        ("meet();  // both groups are done with the last tile's dS", "//", HEAD_256_FLOAT32),
        ("meet();                    // dS is whole", "//", HEAD_256_FLOAT32),
        ("ptx::fence_proxy_async();  // this thread's part of dS", NO_BARRIER, HEAD_256_FLOAT32),
        ("release(2), release_A(2);", "release(2), release_A(1);", HEAD_256_FLOAT32),
        (
            "begin = OF == OF_Q ? 0 : first_row_of(p, row0) / BLOCK;",
            "begin = OF == OF_Q ? 0 : (first_row_of(p, row0) + BLOCK) / BLOCK;",
            HEAD_256_FLOAT32,
        ),
        ("const int i1 = i + !BY_ROWS,", "const int i1 = i,", HEAD_256_FLOAT32),
        (
            "exponent_of(OF == OF_Q ? range.k : range.q)",
            "exponent_of(range.q)",
            case(D=256, H=1, Nq=70, Nk=100, sharp=5, dtype=torch.float32),
        ),
    ],
    ("hopper_float32", "backward_5_float32.cu"): [
        (
            "multiply(S_rmem, K_smem, Q_tile, !MASK);\n",
            "if (MASK) ptx::mbarrier_arrive(mask_empty);\nmultiply(S_rmem, K_smem, Q_tile, !MASK);\nif (false)\n",
            case(D=128, H=1, Nq=300, mask="heads share", dtype=torch.float32),
        ),
        ("meet();  // both groups are done with the last tile's", "//", case(Nq=700, dtype=torch.float32)),
        ("meet();                    // Pᵀ and dSᵀ are whole", "//", FLOAT32),
        ("ptx::fence_proxy_async();  // this thread's part of Pᵀ and dSᵀ", NO_BARRIER, FLOAT32),
        ("ptx::wgmma_wait_group<1>();  // the tile's part of dV or dK is there", "ptx::wgmma_wait_group<2>();", FLOAT32),
        ("ptx::mbarrier_arrive(barrier(barriers.empty, stage));", ";", case(Nq=700, dtype=torch.float32)),
        ("ptx::mbarrier_arrive(mask_empty);", ";", case(Nq=300, mask="heads share", dtype=torch.float32)),
        ("BY_ROWS ? 0 : consumer * Tile_K::PANEL_BYTES", "0", WIDE_FLOAT32),
        ("plane_of_second(product) * Tile_K::BYTES + k * 16 * ROW_BYTES", "k * 16 * ROW_BYTES", FLOAT32),
        ("while (ptx::ld_acquire(workspace.turns + row / BLOCK_Q) != k_tile) {}", ";", TURNS_FLOAT32),
        ("dQ[e] = make_float4(0, 0, 0, 0);", ";", FLOAT32),
    ],
}

# The hook for scores in files that have mistakes of their own above.
SCORED = {
    ("hopper", "score.cuh"): [
        ("return dead ? 0 : fabsf(m)", "return fabsf(m)", case(Nk=150, bias="hiding", bias_as_q=True)),
        ("return y * tanh_over(y);", "return tanh_over(y);", case(softcap=20.0, alibi=True)),
        ("0.11889755f * factor", "-0.11889755f * factor", case(Nk=460, softcap=6.0)),
    ],
    ("hopper", "score_tile.cuh"): [
        ("if (!CAUSAL && least < 0 && greatest > 0) keep", "if (false) keep", HALF_SLOPED),
        ("CAUSAL || greatest > 0 ? -slope : slope;", "-slope;", case(Nq=300, Nk=150, alibi=True)),
        ("further = c ? floats_of(pairs[n % 2 * 2 + r]).y", "further = c ? floats_of(pairs[n % 2 * 2 + r]).x", HALF_BIASED),
        ("fmaf(s * s, -0.32075847f", "fmaf(s * s, 0.32075847f", case(Nk=460, softcap=20.0)),
    ],
    ("hopper", "forward_4_scores.cuh"): [
        ("largest * p.scoring.scale_in_cap <= 1", "largest * p.scoring.scale_in_cap <= 4", case(softcap=1.5, alibi=True)),
        ("in_cap <= LARGEST_1 && has", "in_cap <= 4 && has", case(Nk=460, softcap=1.5)),
        ("all(in_cap <= 1)", "all(in_cap <= 4)", HALF_CAPPED),
        ("const bool near_m = fminf(", "const bool near_m = true || fminf(", case(Nk=256, softcap=20.0)),  # no tile is cut
        ("largest = row_max(largest);", ";", case(Nk=460, softcap=20.0, sharp=5)),
        ("l_rmem[r] = NEW_MAXIMUM ? l_rmem[r] * alpha[r] + sum :", "l_rmem[r] =", case(Nk=460, softcap=20.0, sharp=5)),
        ("if (!ONLY_CAPPED || MASK || rows.cut(work, j0)) return", "if (!ONLY_CAPPED || MASK) return", HALF_CAPPED),
        ("shift[r] = slopes.first[r] * LOG2_E;", "shift[r] = 0;", case(alibi=True, softcap=20.0, causal=True)),
        ("{slopes.first[0], slopes.first[1]}", "{0, 0}", case(alibi=True, causal=True)),
        ("return SLOPES ? shift[r] - m + first :", "return SLOPES ? shift[r] - m :", HALF_SLOPED),
        ("!(sum[r] <= MOST)", "!(sum[r] <= 0x1p60f)", case(alibi=True, sharp=20)),
        ("m_new = row_max(m_new);", ";", case(alibi=True, sharp=5)),
        ("l_rmem[r] = l_rmem[r] * alpha[r] + sum[r];", "l_rmem[r] = l_rmem[r] + sum[r];", case(alibi=True, sharp=5)),
        ("S = MASK && S < p.lowest ? -CUDART_INF_F : x[c];", "S = x[c];", case(softcap=1.5, mask="heads share")),
    ],
    ("hopper", "forward_4_consumer.cuh"): [
        ("ptx::mbarrier_wait(bias_full, n & 1);", NO_WAIT, HALF_BIASED),
        ("ask_bias(work, j0_of(work, tile + 1));", "ask_bias(work, j0_of(work, tile));", HALF_BIASED),
        ("        __syncwarp();\n        if (lane > 0) return;", "        if (lane > 0) return;", HALF_BIASED),
        ("            enter(work);", "            ;", case(H=4, alibi=True)),
        ("if (O_EARLY) O_is_there();", ";", HALF_SLOPED),
    ],
    ("hopper", "forward_4_schedule.cuh"): [
        ("return (tile < 0 ? tile + k_tiles : tile) * BLOCK_K;", "return tile * BLOCK_K;", case(Nq=300, alibi=True)),
        ("unit / together % of_head;", "unit % of_head;", case(B=2, Nq=300, Nk=70, bias="batches share", bias_as_q=True)),
    ],
    ("hopper", "forward_4_epilogue.cuh"): [
        ("(m_rmem[r] + ptx::lg2(l)) * LN_2;", "m_rmem[r] + ptx::lg2(l) * LN_2;", HALF_SLOPED),
    ],
    ("hopper", "backward_4_hopper.cu"): [
        ("S = CAPPED ? P[c] * fmaf(-capped[c], capped[c], 1.0f) : P[c];", "S = P[c];", HALF_CAPPED),
        ("MASK_BYTES + bias_bytes);", "MASK_BYTES + BIAS_BYTES);", HALF_KEY_BIAS),
        ("(consumer * 4 + warp) * 2 + lane / 8 % 2)", "(consumer * 4 + warp) * 2)", HALF_BIASED),
        (
            "P_rmem[n / 2][n % 2 * 2 + r] &= (sees[0] ? 0xffffu : 0)",
            "P_rmem[n / 2][n % 2 * 2 + r] &= 0xffffu",
            case(alibi=True, window=(70, 30)),
        ),
    ],
    ("hopper", "backward_4_hopper_wide.cu"): [
        ("S = CAPPED ? P[c] * fmaf(-capped[c], capped[c], 1.0f) : P[c];", "S = P[c];", case(D=256, H=1, softcap=1.5)),
    ],
    ("hopper", "backward_hopper_bias.cuh"): [
        (
            "first_row_of(p, part.j0) / DBIAS_ROWS)",
            "(first_row_of(p, part.j0) + DBIAS_ROWS) / DBIAS_ROWS)",
            case(Nk=150, bias="keys", bias_as_q=True, causal=True),
        ),
        ("p.scoring.bias_b == 1 ? p.B : part.b + 1", "part.b + 1", HALF_BIASED),
        ("            release(barrier(barriers.empty, of_dP.stage));", ";", HALF_KEY_BIAS),
        ("__syncwarp();  // every lane has read what was there", NO_BARRIER, HALF_KEY_BIAS),
        ("ptx::mbarrier_wait(bias_empty, parity ^ 1);", NO_WAIT, HALF_BIASED),
        ("ptx::bar_sync(1 + consumer, GROUP);  // the group's panel is written", NO_BARRIER, HALF_BIASED),
        ("multiply(dP_rmem, of_dP, first);", "multiply(dP_rmem, of_dP, 0);", HALF_BIASED),
        ("sum[0] = fmaf(S[e], dP_rmem[e] - Delta.x, sum[0]);", "sum[0] = S[e] * (dP_rmem[e] - Delta.x);", HALF_BIASED),
        ("n % ROW_PLACES * DBIAS_ROWS_BYTES;", "0;", HALF_KEY_BIAS),
        ("if (t == 0 && j0 + place + 8 * r < p.Nk) dBias", "if (t == 0) dBias", HALF_KEY_BIAS),
    ],
}


def replaced(path: Path, places: Iterable[tuple[str, str]]) -> None:
    """Replaces each text in the file, which must occur once."""
    text = path.read_text()
    for before, after in places:
        assert text.count(before) == 1, f"{path.name} has {before!r} {text.count(before)} times, not once"
        text = text.replace(before, after)
    path.write_text(text)


@dataclass(frozen=True)
class Mutation:
    """`before`, which occurs once in the file (or is occurrence number `place`, counted from 0), becomes `after`."""

    rung: str
    file: str
    before: str
    after: str
    case: Case
    place: int | None = None

    def __str__(self) -> str:
        first = self.before.strip().splitlines()[0].strip()
        return f"{self.rung}, {self.file}: {first[:70]} → {self.after.strip()[:40] or 'nothing'}"

    def apply(self, text: str) -> str:
        parts = text.split(self.before)
        if self.place is None:
            assert len(parts) == 2, f"{self.file} has {self.before!r} {len(parts) - 1} times, not once: mutations.py needs a new place"
        n = (self.place or 0) + 1
        assert len(parts) > n, f"{self.file} has {self.before!r} {len(parts) - 1} times: mutations.py needs a new place"
        return self.before.join(parts[:n]) + self.after + self.before.join(parts[n:])


MUTATIONS = [Mutation(rung, file, *each) for table in (TABLE, SCORED) for (rung, file), rows in table.items() for each in rows]

"""The pure-PyTorch backend: FlashAttention-2 from `reference/`, a few heads at a time so that their tiles stay in cache. Any device, any
dtype."""

from collections.abc import Iterator

from torch import Tensor

from flash_attention import allocate
from flash_attention.reference import Dropout, flash2, flash2_causal, second_derivative

# Elements that one step of the tile loop touches (10 MB in float32). Measured on 2 cores with 1 MB of L2 each: more falls out of cache,
# less leaves PyTorch's cost per call showing.
WORKING_SET = 5 << 19


def why_not(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout_p: float) -> str | None:
    """The reference serves every call."""
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    block_size: int | None = None,
):
    """→ O (B, H, Nq, Dv), LSE (B, H, Nq). block_size: rows and columns of a tile; the algorithm's own unless given."""
    run = flash2_causal.flash_attention2_causal_forward if causal else flash2.flash_attention2_forward
    O, LSE = allocate.forward_outputs(q, v)
    for b, h, h_kv in _parts(q, k, causal, block_size):
        part_mask = None if mask is None else mask[b, h]
        dropout = _dropout(seed, dropout_p, b, h)
        O[b, h], LSE[b, h] = run(
            q[b, h], k[b, h_kv], v[b, h_kv], part_mask, scale=scale, dropout=dropout, block_q=block_size, block_k=block_size
        )
    return O, LSE


def backward(
    dO: Tensor,
    dLSE: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    O: Tensor,
    LSE: Tensor,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    block_size: int | None = None,
):
    """→ dQ, dK, dV, shaped as q, k, v."""
    run = flash2_causal.flash_attention2_causal_backward if causal else flash2.flash_attention2_backward
    dQ, dK, dV = allocate.backward_outputs(q, k, v)
    for b, h, h_kv in _parts(q, k, causal, block_size):
        part_mask = None if mask is None else mask[b, h]
        part_dLSE = None if dLSE is None else dLSE[b, h]
        dQ[b, h], dK[b, h_kv], dV[b, h_kv] = run(
            q[b, h],
            k[b, h_kv],
            v[b, h_kv],
            part_mask,
            O[b, h],
            LSE[b, h],
            dO[b, h],
            part_dLSE,
            scale=scale,
            dropout=_dropout(seed, dropout_p, b, h),
            block_q=block_size,
            block_k=block_size,
        )
    return dQ, dK, dV


def second_backward(
    gQ: Tensor,
    gK: Tensor,
    gV: Tensor,
    dO: Tensor,
    dLSE: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    block_size: int | None = None,
):
    """Cotangents of dO, dLSE, q, k, v. block_size: rows of a block."""
    inputs = gQ, gK, gV, dO, dLSE, q, k, v
    return second_derivative.flash_attention_second_backward(*inputs, mask, **_options(q, seed, causal, scale, dropout_p, block_size))


def second_backward_vjp(cotangents, inputs, needed, mask, seed, causal, scale, dropout_p, _backend, block_size):
    """Cotangents of `inputs`, the eight tensors of `second_backward`, from those of its results."""
    options = _options(inputs[5], seed, causal, scale, dropout_p, block_size)
    return second_derivative.second_backward_vjp(cotangents, inputs, needed, mask, **options)


def _options(q: Tensor, seed: Tensor | None, causal: bool, scale: float, dropout_p: float, block_size: int | None) -> dict:
    dropout = _dropout(seed, dropout_p, slice(0, q.shape[0]), slice(0, q.shape[1]))
    return {"causal": causal, "scale": scale, "dropout": dropout, "block_q": block_size}


def _dropout(seed: Tensor | None, p: float, b: slice, h: slice) -> Dropout | None:
    return None if seed is None else Dropout(p, seed, range(b.start, b.stop), range(h.start, h.stop))


def _parts(q: Tensor, k: Tensor, causal: bool, block_size: int | None) -> Iterator[tuple[slice, slice, slice]]:
    """Batches, query heads and the key/value heads they read, for one run of the tile loop after another."""
    B, H, Nq, D = q.shape
    Hkv, Nk = k.shape[1:3]
    group = H // Hkv
    module = flash2_causal if causal else flash2
    rows, columns = min(block_size or module.BLOCK_Q, max(Nq, 1)), min(block_size or module.BLOCK_K, max(Nk, 1))
    per_head = rows * (columns + 2 * D)  # a tile of S, and the rows of Q and O beside it
    heads_kv = min(Hkv, max(1, WORKING_SET // (per_head * group)))
    batches = max(1, WORKING_SET // (per_head * H)) if heads_kv == Hkv else 1
    for b in range(0, B, batches):
        for h in range(0, Hkv, heads_kv):
            stop = min(h + heads_kv, Hkv)
            yield slice(b, min(b + batches, B)), slice(h * group, stop * group), slice(h, stop)

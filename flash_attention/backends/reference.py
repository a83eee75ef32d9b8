"""The pure-PyTorch backend: FlashAttention-2 from `reference/`, a few heads at a time so that their tiles stay in cache. Any device, any
dtype."""

from collections import deque
from collections.abc import Iterator
from threading import Lock

import torch
from torch import Tensor

from flash_attention import allocate
from flash_attention.backends import workers
from flash_attention.reference import Dropout, flash2, flash2_causal, second_derivative
from flash_attention.reference.tiles import blocks, sum_dtype

# Elements that one step of the tile loop touches (10 MB in float32). Measured on 2 cores with 1 MB of L2 each: more falls out of cache,
# less leaves PyTorch's cost per call showing. A worker, which has one core, takes a quarter.
WORKING_SET = 5 << 19
WORKER_SET = WORKING_SET // 4
# Rows of a worker's piece in the forward, columns in the backward.
SPAN = 1024
# A call is for workers from so many floating-point operations for each thread on: 50 ms. After an operation of PyTorch's own its threads
# stay awake for 5 ms, in which they take the workers' cores.
WORKER_FLOPS = 1 << 33
# And from so many elements in one step: Python's cost per step is paid by one worker at a time.
WORKER_STEP = 1 << 17
# Elements of K in a batch.
EVEN = 1 << 17


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
    Nq, Nk = q.shape[2], k.shape[2]
    columns = _columns(q, k, causal, seed is not None, block_size)
    O, LSE = allocate.forward_outputs(q, v)

    def piece(b: slice, h: slice, h_kv: slice, i: slice) -> None:
        j = slice(0, max(0, i.stop + Nk - Nq) if causal else Nk)  # up to the last column that rows i see, where they too are aligned
        O[b, h, i], LSE[b, h, i] = run(
            q[b, h, i],
            k[b, h_kv, j],
            v[b, h_kv, j],
            None if mask is None else mask[b, h, i, j],
            scale=scale,
            dropout=_dropout(seed, dropout_p, b, h, (i.start, 0)),
            block_q=block_size,
            block_k=columns,
        )

    large = _large(2, q, k, causal, block_size)
    rows = list(blocks(0, Nq, SPAN if large else max(Nq, 1)))[::-1]  # causal: the last rows see most
    each = workers.run if large else workers.in_turn
    each(piece, [(*heads, i) for heads in _heads(q, k, causal, block_size, large, columns) for i in rows])
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
    Nq, Nk = q.shape[2], k.shape[2]
    dQ, dK, dV = allocate.backward_outputs(q, k, v)

    def piece(b: slice, h: slice, h_kv: slice, dQ_sum: _Sum, j: slice) -> None:
        dQ_part, dK[b, h_kv, j], dV[b, h_kv, j] = run(
            q[b, h].to(sum_dtype(q)),  # so that dQ comes back in this dtype, to be summed
            k[b, h_kv, j],
            v[b, h_kv, j],
            None if mask is None else mask[b, h, :, j],
            O[b, h],
            LSE[b, h],
            dO[b, h],
            None if dLSE is None else dLSE[b, h],
            scale=scale,
            dropout=_dropout(seed, dropout_p, b, h, (0, j.start)),
            block_q=block_size,
            block_k=block_size,
            **({"offset": Nk - Nq - j.start} if causal else {}),
        )
        dQ_sum.add(j, dQ_part)

    large = _large(5, q, k, causal, block_size)
    columns = list(blocks(0, Nk, SPAN if large else max(Nk, 1))) or [slice(0, 0)]
    parts = [(b, h, h_kv, _Sum(dQ[b, h], columns)) for b, h, h_kv in _heads(q, k, causal, block_size, large)]
    # Neighbours in the list belong to different sums, so that few parts of dQ wait to be added; not too many sums are begun at a time.
    some = (parts[n : n + workers.MAX_WORKERS] for n in range(0, len(parts), workers.MAX_WORKERS))
    pieces = [(*part, j) for few in some for j in columns for part in few]
    each = workers.run if large else workers.in_turn
    each(piece, pieces)
    return dQ, dK, dV


class _Sum:
    """Parts that add up to `out`, one for each of `spans`. Added in the order of the spans, whichever comes first: the same result for any
    number of threads."""

    def __init__(self, out: Tensor, spans: list[slice]):
        self.out, self.spans, self.parts = out, deque(spans), {}
        self.total: Tensor | None = None
        self.lock = Lock()

    def add(self, span: slice, part: Tensor) -> None:
        with self.lock:
            self.parts[span.start] = part
            while self.spans and self.spans[0].start in self.parts:
                part = self.parts.pop(self.spans.popleft().start)
                if self.total is not None:
                    self.total.add_(part)
                else:  # `out` itself holds the sum, unless it would round it
                    self.total = self.out.copy_(part) if part.dtype == self.out.dtype else part
            if not self.spans and self.total is not self.out:
                self.out.copy_(self.total)
                self.total = None


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


def _dropout(seed: Tensor | None, p: float, b: slice, h: slice, corner: tuple[int, int] = (0, 0)) -> Dropout | None:
    return None if seed is None else Dropout(p, seed, range(b.start, b.stop), range(h.start, h.stop), corner)


def _columns(q: Tensor, k: Tensor, causal: bool, dropout: bool, block_size: int | None) -> int | None:
    """Columns of the forward's tiles; None: the algorithm's own.

    Where few rows share a key head, a tile of K is read once from memory whatever its size, and a tile of S is narrow: it gets as many
    columns as make it as large as for many rows, so that operations are few. Not where a tile of K and V is converted first, which must
    lie in cache, or where random bits are drawn, for 32 rows at least.
    """
    if block_size is not None or dropout or q.dtype != sum_dtype(q):
        return block_size
    module = flash2_causal if causal else flash2
    rows = max(1, q.shape[2] * (q.shape[1] // k.shape[1]))
    return max(module.BLOCK_K, module.BLOCK_Q * module.BLOCK_K // rows)


def _tile(q: Tensor, k: Tensor, causal: bool, block_size: int | None, columns: int | None = None) -> int:
    """Elements of a head that one step touches: a tile of S, and the rows of Q and O beside it."""
    module = flash2_causal if causal else flash2
    most = block_size or module.BLOCK_Q, columns or block_size or module.BLOCK_K
    rows, columns = (min(n, max(x.shape[2], 1)) for n, x in zip(most, (q, k), strict=True))
    return rows * (columns + 2 * q.shape[3])


def _large(matmuls: int, q: Tensor, k: Tensor, causal: bool, block_size: int | None) -> bool:
    """Whether workers are worthwhile. Not whether there are any: one thread computes the same pieces, and so the same result."""
    if q.device.type != "cpu":
        return False
    B, H, Nq, D = q.shape
    flops = 2 * matmuls * B * H * Nq * k.shape[2] * D
    step = min(B * H * _tile(q, k, causal, block_size), WORKER_SET)
    return flops >= WORKER_FLOPS * max(2, torch.get_num_threads()) and step >= WORKER_STEP


def _heads(
    q: Tensor, k: Tensor, causal: bool, block_size: int | None, large: bool, columns: int | None = None
) -> Iterator[tuple[slice, slice, slice]]:
    """Batches, query heads and the key/value heads they read, for one run of the tile loop after another."""
    B, H = q.shape[:2]
    Hkv = k.shape[1]
    group = H // Hkv
    per_head = _tile(q, k, causal, block_size, columns)
    working_set = WORKER_SET if large else WORKING_SET
    heads_kv = min(Hkv, max(1, working_set // (per_head * group)))
    batches = max(1, working_set // (per_head * H)) if heads_kv == Hkv else 1
    # Heads of several batches that do not lie at equal distances are copied for each product, which costs more than it saves from here on.
    if k.stride(0) != Hkv * k.stride(1) and k[0].numel() >= EVEN:
        batches = 1
    for b in range(0, B, batches):
        for h in range(0, Hkv, heads_kv):
            stop = min(h + heads_kv, Hkv)
            yield slice(b, min(b + batches, B)), slice(h * group, stop * group), slice(h, stop)

"""The pure-PyTorch backend: FlashAttention-2 from `reference/`, a few heads at a time so that their tiles stay in cache. Any device, any
dtype."""

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from threading import Lock

import torch
from torch import Tensor

from flash_attention import allocate
from flash_attention.backends import workers
from flash_attention.call import Call, Settings
from flash_attention.reference import Dropout, Score, Visible, flash2, flash2_causal, forward_mode, second_derivative
from flash_attention.reference.tiles import blocks, sum_dtype

# Elements that one step of the tile loop touches (10 MB in float32). Measured on 2 cores with 1 MB of L2 each: more does not stay in cache,
# with less PyTorch's cost per operation dominates. A worker, which has one core, takes a quarter.
WORKING_SET = 5 << 19
WORKER_SET = WORKING_SET // 4
# Rows of a worker's piece in the forward, columns in the backward.
SPAN = 1024
# A call is given to workers only if it has this many floating-point operations per thread, 50 ms: after each of its own operations,
# PyTorch's threads spin for 5 ms, during which they occupy the workers' cores.
WORKER_FLOPS = 1 << 33
# And this many elements in one step: each step has a part that holds Python's lock, which one worker at a time can run.
WORKER_STEP = 1 << 17
# Elements of K in a batch, from which copying heads that are unevenly spaced costs more than it saves.
EVEN = 1 << 17
# Rows and columns of a tile that windows or spans cut: 128 rows under a window of 512 see 640 columns.
NARROW_Q, NARROW_K = 128, 640


def why_not(call: Call) -> str | None:
    """The reference serves every call."""
    return None


def plan(which: int, call: Call) -> Callable:
    """The forward or backward below, with the call's settings."""
    return partial(backward, call.settings, call.to_bias) if which else partial(forward, call.settings)


def forward(
    settings: Settings,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    spans: Tensor | None,
    seed: Tensor | None,
    bias: Tensor | None = None,
    alibi: Tensor | None = None,
):
    """→ O (B, H, Nq, Dv), LSE (B, H, Nq)."""
    Nq, Nk = q.shape[2], k.shape[2]
    visible = settings.visible(Nq, Nk, spans)
    score = settings.score(Nq, Nk, bias, alibi)
    O, LSE = allocate.forward_outputs(q, v)
    sizes = block_q, block_k = _forward_block_sizes(q, k, visible, settings)

    def piece(b: slice, h: slice, h_kv: slice, i: slice) -> None:
        seen = visible.of_heads(b, h)
        j = seen.columns(i)
        O[b, h, i], LSE[b, h, i] = flash2.flash_attention2_forward(
            q[b, h, i],
            k[b, h_kv, j],
            v[b, h_kv, j],
            None if mask is None else mask[b, h, i, j],
            scale=settings.scale,
            dropout=_dropout(settings, seed, b, h, (i.start, j.start)),
            visible=seen.part(i, j),
            score=None if score is None else score.of_heads(b, h).part(i, j),
            block_q=block_q,
            block_k=block_k,
        )

    large = _large(2, q, k, visible, settings)
    rows = list(blocks(0, Nq, SPAN if large else max(Nq, 1)))[::-1]  # causal: the last rows see most
    each = workers.run if large else workers.in_turn
    each(piece, [(*heads, i) for heads in _heads(q, k, sizes, large) for i in rows])
    return O, LSE


def backward(
    settings: Settings,
    to_bias: bool,
    dO: Tensor,
    dLSE: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    spans: Tensor | None,
    O: Tensor,
    LSE: Tensor,
    seed: Tensor | None,
    bias: Tensor | None = None,
    alibi: Tensor | None = None,
):
    """→ dQ, dK, dV, shaped as q, k, v, and dBias if to_bias."""
    Nq, Nk = q.shape[2], k.shape[2]
    visible = settings.visible(Nq, Nk, spans)
    score = settings.score(Nq, Nk, bias, alibi)
    dQ, dK, dV = allocate.backward_outputs(q, k, v)
    sizes = block_q, block_k = _block_sizes(visible, settings)
    dBias = whole_dBias = None
    broadcast = False
    if to_bias:
        whole_dBias = allocate.bias_gradient(q, bias)
        broadcast = bias.shape != (*q.shape[:3], Nk)
        dBias = whole_dBias.to(sum_dtype(q)) if broadcast else whole_dBias  # an element that is written once is rounded once

    def piece(b: slice, h: slice, h_kv: slice, dQ_sum: _Sum, j: slice) -> None:
        seen = visible.of_heads(b, h)
        i = seen.rows(j)
        dQ_part, dK[b, h_kv, j], dV[b, h_kv, j] = flash2.flash_attention2_backward(
            q[b, h, i].to(sum_dtype(q)),  # so that dQ comes back in this dtype, to be summed
            k[b, h_kv, j],
            v[b, h_kv, j],
            None if mask is None else mask[b, h, i, j],
            O[b, h, i],
            LSE[b, h, i],
            dO[b, h, i],
            None if dLSE is None else dLSE[b, h, i],
            scale=settings.scale,
            dropout=_dropout(settings, seed, b, h, (i.start, j.start)),
            visible=seen.part(i, j),
            score=None if score is None else score.of_heads(b, h).part(i, j),
            dBias=None if dBias is None else Score(bias=dBias).of_heads(b, h).part(i, j).bias,
            block_q=block_q,
            block_k=block_k,
        )
        dQ_sum.add(j, i, dQ_part)

    large = _large(5, q, k, visible, settings) and not broadcast  # heads add to one dBias: in turn, so that the order is always the same
    columns = list(blocks(0, Nk, SPAN if large else max(Nk, 1))) or [slice(0, 0)]
    parts = [(b, h, h_kv, _Sum(dQ[b, h], columns)) for b, h, h_kv in _heads(q, k, sizes, large)]
    # Consecutive pieces belong to different sums, so that few parts of dQ wait to be added; the number of sums begun at a time is limited.
    some = (parts[n : n + workers.MAX_WORKERS] for n in range(0, len(parts), workers.MAX_WORKERS))
    pieces = [(*part, j) for few in some for j in columns for part in few]
    each = workers.run if large else workers.in_turn
    each(piece, pieces)
    if not to_bias:
        return dQ, dK, dV
    return dQ, dK, dV, whole_dBias if dBias is whole_dBias else whole_dBias.copy_(dBias)


class _Sum:
    """Adds up parts of `out`, one for each of `spans`, always in the order of the spans, whichever arrives first: the result is the same
    for any number of threads."""

    def __init__(self, out: Tensor, spans: list[slice]):
        self.out, self.spans = out, deque(spans)
        self.parts: dict = {}
        self.total: Tensor | None = None
        self.lock = Lock()

    def add(self, span: slice, rows: slice, part: Tensor) -> None:
        """Adds the part of one span, for these rows of `out`."""
        with self.lock:
            self.parts[span.start] = rows, part
            while self.spans and self.spans[0].start in self.parts:
                rows, part = self.parts.pop(self.spans.popleft().start)
                if self.total is not None:
                    self.total[:, :, rows].add_(part)
                elif part.dtype != self.out.dtype and part.shape == self.out.shape:
                    self.total = part
                else:  # `out` itself holds the sum, unless it would round it
                    self.total = self.out if part.dtype == self.out.dtype else torch.empty_like(self.out, dtype=part.dtype)
                    if part.shape != self.out.shape:
                        self.total.zero_()
                    self.total[:, :, rows] = part
            if not self.spans and self.total is not self.out:
                self.out.copy_(self.total)
                self.total = None


def jvp(settings: Settings, tQ, tK, tV, q, k, v, mask, spans, seed, O, LSE, tBias=None, bias=None, alibi=None) -> tuple[Tensor, Tensor]:
    """Tangents of O and LSE (the forward's results) from those of q, k, v and a bias."""
    Nq, Nk = q.shape[2], k.shape[2]
    visible = settings.visible(Nq, Nk, spans)
    score = settings.score(Nq, Nk, bias, alibi)
    tO, tLSE = torch.empty_like(O), torch.empty_like(LSE)
    sizes = block_q, block_k = _block_sizes(visible, settings)

    def piece(b: slice, h: slice, h_kv: slice, i: slice) -> None:
        seen = visible.of_heads(b, h)
        j = seen.columns(i)
        tO[b, h, i], tLSE[b, h, i] = forward_mode.flash_attention2_jvp(
            tQ[b, h, i],
            tK[b, h_kv, j],
            tV[b, h_kv, j],
            q[b, h, i],
            k[b, h_kv, j],
            v[b, h_kv, j],
            None if mask is None else mask[b, h, i, j],
            O[b, h, i],
            LSE[b, h, i],
            tB=None if tBias is None else Score(bias=tBias).of_heads(b, h).part(i, j).bias,
            scale=settings.scale,
            dropout=_dropout(settings, seed, b, h, (i.start, j.start)),
            visible=seen.part(i, j),
            score=None if score is None else score.of_heads(b, h).part(i, j),
            block_q=block_q,
            block_k=block_k,
        )

    large = _large(5, q, k, visible, settings)
    rows = list(blocks(0, Nq, SPAN if large else max(Nq, 1)))[::-1]
    each = workers.run if large else workers.in_turn
    each(piece, [(*heads, i) for heads in _heads(q, k, sizes, large) for i in rows])
    return tO, tLSE


def second_backward(settings: Settings, gQ, gK, gV, dO, dLSE, q, k, v, mask, spans, seed, gBias=None, bias=None, alibi=None):
    """Cotangents of dO, dLSE, q, k, v, and of a bias."""
    inputs = gQ, gK, gV, dO, dLSE, q, k, v
    return second_derivative.flash_attention_second_backward(*inputs, mask, gB=gBias, **_options(settings, q, k, spans, seed, bias, alibi))


def second_backward_vjp(settings: Settings, cotangents, inputs, needed, mask, spans, seed, alibi):
    """Cotangents of `inputs`, the tensors of `second_backward` (eight, and with a bias gBias and it), from those of its results."""
    bias = inputs[9] if len(inputs) > 8 else None
    options = _options(settings, inputs[5], inputs[6], spans, seed, bias, alibi)
    return second_derivative.second_backward_vjp(cotangents, inputs, needed, mask, **options)


def _options(settings: Settings, q: Tensor, k: Tensor, spans, seed, bias: Tensor | None, alibi: Tensor | None) -> dict:
    """The options of second_derivative.py's functions."""
    Nq, Nk = q.shape[2], k.shape[2]
    visible = settings.visible(Nq, Nk, spans)
    return {
        "visible": visible if visible.is_limited else None,
        "score": settings.score(Nq, Nk, bias, alibi),
        "scale": settings.scale,
        "dropout": _dropout(settings, seed, slice(0, q.shape[0]), slice(0, q.shape[1]), (0, 0)),
        "block_q": settings.block_size,
    }


def _dropout(settings: Settings, seed: Tensor | None, b: slice, h: slice, corner: tuple[int, int]) -> Dropout | None:
    """The dropout of a part of the call that begins at this row and column."""
    corner = corner[0] + settings.q_offset, corner[1] + settings.k_offset
    return None if seed is None else Dropout(settings.dropout_p, seed, range(b.start, b.stop), range(h.start, h.stop), corner)


def _block_sizes(visible: Visible, settings: Settings) -> tuple[int, int]:
    """Rows and columns of a tile. If windows, spans or causality cut tiles, a tile has fewer rows, so that fewer hidden scores are
    computed."""
    if settings.block_size is not None:
        return settings.block_size, settings.block_size
    if visible.hides_earlier:
        return NARROW_Q, NARROW_K
    return (flash2 if visible.right is None else flash2_causal).BLOCK_Q, flash2.BLOCK_K


def _forward_block_sizes(q: Tensor, k: Tensor, visible: Visible, settings: Settings) -> tuple[int, int]:
    """Rows and columns of the forward's tiles.

    If few rows share a key head, each tile of K is read from memory once, whatever its size. A tile of S then gets more columns, until
    it is as large as a tile of many rows, so that there are fewer operations. Not if tiles of K and V are converted first, because the
    result must stay in cache, nor with dropout, which draws for at least 32 rows.
    """
    block_q, block_k = _block_sizes(visible, settings)
    if settings.block_size is not None or settings.dropout_p or q.dtype != sum_dtype(q):
        return block_q, block_k
    rows = max(1, q.shape[2] * (q.shape[1] // k.shape[1]))
    return block_q, max(block_k, block_q * block_k // rows)


def _tile(q: Tensor, k: Tensor, sizes: tuple[int, int]) -> int:
    """Elements of a head that one step touches: a tile of S, and its rows of Q and O."""
    rows, columns = (min(most, max(x.shape[2], 1)) for most, x in zip(sizes, (q, k), strict=True))
    return rows * (columns + 2 * q.shape[3])


def _large(matmuls: int, q: Tensor, k: Tensor, visible: Visible, settings: Settings) -> bool:
    """Whether workers are worthwhile, regardless of whether there are any: one thread computes the same pieces, and so the same result."""
    if q.device.type != "cpu":
        return False
    B, H, Nq, D = q.shape
    flops = 2 * matmuls * B * H * Nq * k.shape[2] * D
    if visible.hides_earlier:
        flops *= _seen(visible)
    step = min(B * H * _tile(q, k, _block_sizes(visible, settings)), WORKER_SET)
    return flops >= WORKER_FLOPS * max(2, torch.get_num_threads()) and step >= WORKER_STEP


def _seen(visible: Visible) -> float:
    """About which fraction of the matrix of scores the tiles cover."""
    rows = list(blocks(0, visible.Nq, max(NARROW_Q, visible.Nq // 64)))
    visited = sum((i.stop - i.start) * (j.stop - j.start) for i in rows for j in [visible.columns(i)])
    return visited / max(1, visible.Nq * visible.Nk)


def _heads(q: Tensor, k: Tensor, sizes: tuple[int, int], large: bool) -> Iterator[tuple[slice, slice, slice]]:
    """Batches, query heads and the key/value heads that they read, for each run of the tile loop."""
    B, H = q.shape[:2]
    Hkv = k.shape[1]
    group = H // Hkv
    per_head = _tile(q, k, sizes)
    working_set = WORKER_SET if large else WORKING_SET
    heads_kv = min(Hkv, max(1, working_set // (per_head * group)))
    batches = max(1, working_set // (per_head * H)) if heads_kv == Hkv else 1
    # If heads of several batches are unevenly spaced, each product copies them, which costs more than it saves from here on.
    if k.stride(0) != Hkv * k.stride(1) and k[0].numel() >= EVEN:
        batches = 1
    for b in range(0, B, batches):
        for h in range(0, Hkv, heads_kv):
            stop = min(h + heads_kv, Hkv)
            yield slice(b, min(b + batches, B)), slice(h * group, stop * group), slice(h, stop)

"""The derivative of the backward pass, for gradient penalties, Hessian-vector products and gradgradcheck; and derivatives of that.

The backward is itself a function (dO, dLSE, Q, K, V, B) → (dQ, dK, dV, dB). Written out for a block of rows,

    S = f(scale · Q Kᵀ) + B     P = softmax(S)      T = P∘Z      dP = (dO Vᵀ)∘Z      dX = P∘(dP − D + dLSE),  D = rowsum(P∘dP)
    dS = dX∘f′      dQ = scale · dS K     dK = scale · dSᵀ Q     dV = Tᵀ dO     dB = dX, summed over what was broadcast

(Z is dropout's factor, f the softcap, B the bias: score.py), reverse mode through these lines from cotangents gQ, gK, gV, gB of dQ, dK, dV,
dB gives the lines of `_rows`. Rows of attention are independent, so every function here goes through blocks of rows: memory is linear in N,
as everywhere.

Derivatives of the third order and beyond are left to PyTorch: `_rows` is plain arithmetic, in which the softmax depends on Q and K.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial, reduce

import torch
from torch import Tensor
from torch.func import vjp

from .dropout import Dropout
from .score import Score
from .tiles import block_size, blocks, broadcast_mask, sum_dtype
from .visible import Visible

BLOCK_Q = 128
# Which part of a tensor belongs to a block of rows: ROWS: those rows; KEYS: all of it; BIAS: those rows, or all if it has only one.
ROWS, KEYS, BIAS = "rows", "keys", "bias"
INPUTS = ROWS, KEYS, KEYS, ROWS, ROWS, ROWS, KEYS, KEYS, BIAS, BIAS  # gQ, gK, gV, dO, dLSE, Q, K, V, and with a bias gB, B
RESULTS = ROWS, ROWS, ROWS, KEYS, KEYS, BIAS  # cotangents of dO, dLSE, Q, K, V, and with a bias B


def flash_attention_second_backward(
    gQ: Tensor,
    gK: Tensor,
    gV: Tensor,
    dO: Tensor,
    dLSE: Tensor,
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    mask: Tensor | None = None,
    *,
    gB: Tensor | None = None,
    visible: Visible | None = None,
    score: Score | None = None,
    scale: float | None = None,
    dropout: Dropout | None = None,
    block_q: int | None = None,
) -> tuple[Tensor, ...]:
    """Cotangents of dO (B, H, Nq, Dv), dLSE (B, H, Nq), Q, K and V, and of the score's bias if it has one, from gQ, gK, gV, gB shaped as Q,
    K, V and the bias. Differentiable, in N² memory."""
    inputs = gQ, gK, gV, dO, dLSE, Q, K, V
    if score is not None and score.bias is not None:
        inputs += (gB, score.bias)
    parts = (rows(*arguments(inputs, INPUTS)) for rows, arguments in _blocks(Q, K, mask, visible, score, scale, dropout, block_q))
    return _gather(parts, (*inputs[3:8], *inputs[9:]), RESULTS)


def second_backward_vjp(
    cotangents: Sequence[Tensor], inputs: Sequence[Tensor], needed: Sequence[bool], mask: Tensor | None, **options
) -> tuple[Tensor | None, ...]:
    """Cotangents of the inputs of `flash_attention_second_backward` (INPUTS), those that are `needed`, from cotangents of its results.

    A block of rows is recomputed, recorded by autograd. Differentiable if gradients are enabled.
    """
    wanted, create_graph = [n for n, need in enumerate(needed) if need], torch.is_grad_enabled()

    def part(rows, arguments):
        ours = arguments(cotangents, RESULTS)
        if torch._C._are_functorch_transforms_active():
            return [x for x, need in zip(vjp(rows, *arguments(inputs, INPUTS))[1](ours), needed, strict=True) if need]
        with torch.enable_grad():
            x = [y if y.requires_grad else y.requires_grad_(need) for y, need in zip(arguments(inputs, INPUTS), needed, strict=True)]
            results = rows(*x)
        return torch.autograd.grad(results, [x[n] for n in wanted], ours, create_graph=create_graph)

    parts = (part(*block) for block in _blocks(inputs[5], inputs[6], mask, **options))
    gathered = dict(zip(wanted, _gather(parts, [inputs[n] for n in wanted], [INPUTS[n] for n in wanted]), strict=True))
    return tuple(gathered.get(n) for n in range(len(inputs)))


def _blocks(
    Q: Tensor,
    K: Tensor,
    mask: Tensor | None,
    visible: Visible | None,
    score: Score | None,
    scale: float | None,
    dropout: Dropout | None,
    block_q: int | None,
) -> Iterator[tuple[Callable, Callable]]:
    """For each block of rows: `_rows` for that block, and a function that takes its arguments, or its results, from tensors of all rows."""
    B, H, Nq, D = Q.shape
    Nk = K.shape[2]
    scale = D**-0.5 if scale is None else scale
    mask = broadcast_mask(mask, B, H, Nq, Nk)
    columns = slice(0, Nk)
    rows = [slice(0, 0)] if Nq == 0 else blocks(0, Nq, block_size(block_q, BLOCK_Q))
    for i in rows:
        may = [] if mask is None else [mask[:, :, i]]
        if visible is not None:
            may.append(visible.dense(i, columns, Q.device))
        part = None if score is None else score.part(i, columns)
        if part is not None and part.bias is not None:
            may.append(part.sees(slice(0, i.stop - i.start), columns))
        Z = 1 if dropout is None else dropout.tile(i, columns, sum_dtype(Q))
        yield partial(_rows, reduce(torch.logical_and, may) if may else None, Z, scale, part), partial(_arguments, i, H)


def _arguments(i: slice, H: int, tensors: Sequence[Tensor], kinds: Sequence[str]) -> tuple[Tensor, ...]:
    """Views where possible; new ones, so that autograd distinguishes one tensor that is passed twice."""
    parts = []
    for x, kind in zip(tensors, kinds, strict=False):
        own_rows = kind == ROWS or (kind == BIAS and x.shape[2] != 1)
        x = x.narrow(2, i.start, i.stop - i.start) if own_rows else x.narrow(2, 0, x.shape[2])
        parts.append(_for_heads(x, H if kind == KEYS else x.shape[1]))
    return tuple(parts)


def _for_heads(X: Tensor, H: int) -> Tensor:
    """(B, H or Hkv, …) → (B, H, …) in the sum dtype."""
    X = X if X.dtype == sum_dtype(X) else X.to(sum_dtype(X))
    return X if X.shape[1] == H else X.repeat_interleave(H // X.shape[1], dim=1)


def _sum_groups(dX: Tensor, Hkv: int) -> Tensor:
    """(B, H, rows, D) → (B, Hkv, rows, D): a key/value head's gradient is the sum over the query heads that read it."""
    return dX if dX.shape[1] == Hkv else dX.unflatten(1, (Hkv, -1)).sum(2)


def _rows(
    may: Tensor | None, Z: Tensor | int, scale: float, score: Score | None, gQ, gK, gV, dO, dLSE, Q, K, V, gB=None, bias=None
) -> tuple[Tensor, ...]:
    """The formula for one block of rows, with K and V repeated for every query head. may: bool, broadcasts to (B, H, Bq, Nk)."""
    X, dLSE = Q @ K.mT * scale, dLSE.unsqueeze(-1)  # (B, H, Bq, Nk), (B, H, Bq, 1)
    S = X if score is None else replace(score, bias=bias)(X, slice(0, X.shape[2]), slice(0, X.shape[3]))
    if may is None:
        P = S.softmax(-1)
    else:
        dead = ~may.any(-1, keepdim=True)  # rows that attend nothing: P = 0, and a NaN gradient that arrives there goes no further
        P = S.masked_fill(~(may | dead), -math.inf).softmax(-1).masked_fill(dead, 0)
        gQ, dO, dLSE = (x.masked_fill(dead, 0) for x in (gQ, dO, dLSE))
    T, dP = P * Z, (dO @ V.mT) * Z
    inner = dP - (P * dP).sum(-1, keepdim=True) + dLSE  # dX = P∘inner
    dX = P * inner

    from_dS = scale * (gQ @ K.mT + Q @ gK.mT)  # the cotangent of dS, from dQ and dK
    from_dX, dS = from_dS, dX
    derivatives = None if score is None else score.derivatives(X)
    if derivatives is not None:
        first, second = derivatives  # f′ and f″
        from_dX, dS = from_dS * first, dX * first
    if bias is not None:
        from_dX = from_dX + (gB if may is None else torch.where(dead, 0, gB))
    weight = (P * from_dX).sum(-1, keepdim=True)  # the cotangent of D and of dLSE
    from_dP = P * (from_dX - weight) * Z
    from_P = from_dX * inner - weight * dP + (dO @ gV.mT) * Z
    through_softmax = P * (from_P - (P * from_P).sum(-1, keepdim=True))
    from_X = through_softmax
    if derivatives is not None:
        from_X = first * from_X + second * from_dS * dX
    from_X = scale * from_X

    to_dO, to_dLSE = T @ gV + from_dP @ V, weight.squeeze(-1)
    results = to_dO, to_dLSE, scale * dS @ gK + from_X @ K, scale * dS.mT @ gQ + from_X.mT @ Q, from_dP.mT @ dO
    return results if bias is None else (*results, through_softmax.sum_to_size(bias.shape))


def _gather(parts: Iterator[Sequence[Tensor]], like: Sequence[Tensor], kinds: Sequence[str]) -> tuple[Tensor, ...]:
    """Puts the blocks' results together, shaped as `like`: rows are concatenated, keys are summed over blocks and grouped heads."""
    gathered = [[] for _ in like]
    one_after_another = [kind == ROWS or (kind == BIAS and y.shape[2] != 1) for y, kind in zip(like, kinds, strict=False)]
    for part in parts:
        for sofar, x, append in zip(gathered, part, one_after_another, strict=True):
            if append or not sofar:
                sofar.append(x)
            else:
                sofar[0] = sofar[0] + x
    whole = [torch.cat(x, 2) if append else x[0] for x, append in zip(gathered, one_after_another, strict=True)]
    whole = [_sum_groups(x, y.shape[1]) if kind == KEYS else x for x, y, kind in zip(whole, like, kinds, strict=False)]
    return tuple(x.to(y.dtype) for x, y in zip(whole, like, strict=True))

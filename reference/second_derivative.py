"""The derivative of the backward pass, for gradient penalties, Hessian-vector products and gradgradcheck; and its own derivatives.

The backward is itself a function (dO, dLSE, Q, K, V) → (dQ, dK, dV). Written out for a block of rows,

    S = scale · Q Kᵀ      P = softmax(S)      T = P∘Z      dP = (dO Vᵀ)∘Z      dS = P∘(dP − D + dLSE),  D = rowsum(P∘dP)
    dQ = scale · dS K     dK = scale · dSᵀ Q     dV = Tᵀ dO

(Z is dropout's factor), reverse mode through these lines from cotangents gQ, gK, gV of dQ, dK, dV gives the lines of `_rows`. Rows of
attention do not see each other, so every function here goes through blocks of rows: memory is linear in N, as everywhere.

Derivatives of the third order and beyond are left to PyTorch: `_rows` is plain arithmetic, in which the softmax depends on Q and K.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.func import vjp

from .dropout import Dropout
from .tiles import block_size, blocks, broadcast_mask, sum_dtype
from .visible import Visible

BLOCK_Q = 128
BY_ROWS = True, False, False, True, True, True, False, False  # of gQ, gK, gV, dO, dLSE, Q, K, V: which have a row for each query


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
    visible: Visible | None = None,
    scale: float | None = None,
    dropout: Dropout | None = None,
    block_q: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Cotangents of dO (B, H, Nq, Dv), dLSE (B, H, Nq), Q, K and V, from gQ, gK, gV shaped as Q, K, V. Differentiable, in N² memory."""
    inputs = gQ, gK, gV, dO, dLSE, Q, K, V
    parts = (rows(*arguments(inputs)) for rows, arguments in _blocks(Q, K, mask, visible, scale, dropout, block_q))
    return _gather(parts, inputs[3:], BY_ROWS[3:])


def second_backward_vjp(
    cotangents: Sequence[Tensor], inputs: Sequence[Tensor], needed: Sequence[bool], mask: Tensor | None, **options
) -> tuple[Tensor | None, ...]:
    """Cotangents of the eight inputs of `flash_attention_second_backward`, those that are `needed`, from cotangents of its five results.

    A block of rows is computed again, with autograd watching. Differentiable if gradients are enabled.
    """
    wanted, create_graph = [n for n, need in enumerate(needed) if need], torch.is_grad_enabled()

    def part(rows, arguments):
        if torch._C._are_functorch_transforms_active():
            return [x for x, need in zip(vjp(rows, *arguments(inputs))[1](arguments(cotangents)), needed, strict=True) if need]
        with torch.enable_grad():
            x = [y if y.requires_grad else y.requires_grad_(need) for y, need in zip(arguments(inputs), needed, strict=True)]
            results = rows(*x)
        return torch.autograd.grad(results, [x[n] for n in wanted], arguments(cotangents), create_graph=create_graph)

    parts = (part(*block) for block in _blocks(inputs[5], inputs[6], mask, **options))
    gathered = dict(zip(wanted, _gather(parts, [inputs[n] for n in wanted], [BY_ROWS[n] for n in wanted]), strict=True))
    return tuple(gathered.get(n) for n in range(len(inputs)))


def _blocks(
    Q: Tensor, K: Tensor, mask: Tensor | None, visible: Visible | None, scale: float | None, dropout: Dropout | None, block_q: int | None
) -> Iterator[tuple[Callable, Callable]]:
    """For each block of rows: `_rows` there, and what takes its arguments, or its results, from tensors that hold all rows."""
    B, H, Nq, D = Q.shape
    Nk = K.shape[2]
    scale = D**-0.5 if scale is None else scale
    mask = broadcast_mask(mask, B, H, Nq, Nk)
    columns = slice(0, Nk)
    rows = [slice(0, 0)] if Nq == 0 else blocks(0, Nq, block_size(block_q, BLOCK_Q))
    for i in rows:
        may = None if mask is None else mask[:, :, i]
        if visible is not None:
            seen = visible.dense(i, columns, Q.device)
            may = seen if may is None else may & seen
        Z = 1 if dropout is None else dropout.tile(i, columns, sum_dtype(Q))
        yield partial(_rows, may, Z, scale), partial(_arguments, i, columns, H)


def _arguments(i: slice, columns: slice, H: int, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Views where that is possible, so that autograd tells even one and the same tensor in two places apart."""
    parts = (i if by_rows else columns for by_rows in BY_ROWS[-len(tensors) :])
    return tuple(_for_heads(x.narrow(2, part.start, part.stop - part.start), H) for x, part in zip(tensors, parts, strict=True))


def _for_heads(X: Tensor, H: int) -> Tensor:
    """(B, H or Hkv, …) → (B, H, …) in the sum dtype."""
    X = X if X.dtype == sum_dtype(X) else X.to(sum_dtype(X))
    return X if X.shape[1] == H else X.repeat_interleave(H // X.shape[1], dim=1)


def _sum_groups(dX: Tensor, Hkv: int) -> Tensor:
    """(B, H, rows, D) → (B, Hkv, rows, D): a key/value head's gradient is the sum over the query heads that read it."""
    return dX if dX.shape[1] == Hkv else dX.unflatten(1, (Hkv, -1)).sum(2)


def _rows(may: Tensor | None, Z: Tensor | int, scale: float, gQ, gK, gV, dO, dLSE, Q, K, V) -> tuple[Tensor, ...]:
    """The formula for one block of rows, with K and V repeated for every query head. may: bool, broadcasts to (B, H, Bq, Nk)."""
    S, dLSE = Q @ K.mT * scale, dLSE.unsqueeze(-1)  # (B, H, Bq, Nk), (B, H, Bq, 1)
    if may is None:
        P = S.softmax(-1)
    else:
        dead = ~may.any(-1, keepdim=True)  # rows that attend nothing: P = 0, and NaN that was sent to them goes no further
        P = S.masked_fill(~(may | dead), -math.inf).softmax(-1).masked_fill(dead, 0)
        gQ, dO, dLSE = (x.masked_fill(dead, 0) for x in (gQ, dO, dLSE))
    T, dP = P * Z, (dO @ V.mT) * Z
    inner = dP - (P * dP).sum(-1, keepdim=True) + dLSE  # dS = P∘inner
    dS = P * inner

    from_dS = scale * (gQ @ K.mT + Q @ gK.mT)  # what dQ and dK hand back to dS
    weight = (P * from_dS).sum(-1, keepdim=True)  # what D and dLSE hand back
    from_dP = P * (from_dS - weight) * Z
    from_P = from_dS * inner - weight * dP + (dO @ gV.mT) * Z
    from_S = scale * P * (from_P - (P * from_P).sum(-1, keepdim=True))  # through softmax

    to_dO, to_dLSE = T @ gV + from_dP @ V, weight.squeeze(-1)
    return to_dO, to_dLSE, scale * dS @ gK + from_S @ K, scale * dS.mT @ gQ + from_S.mT @ Q, from_dP.mT @ dO


def _gather(parts: Iterator[Sequence[Tensor]], like: Sequence[Tensor], by_rows: Sequence[bool]) -> tuple[Tensor, ...]:
    """The blocks' results put together, as the tensors `like`: rows one after another, keys summed over blocks and grouped heads."""
    gathered = [[] for _ in like]
    for part in parts:
        for sofar, x, rows in zip(gathered, part, by_rows, strict=True):
            if rows or not sofar:
                sofar.append(x)
            else:
                sofar[0] = sofar[0] + x
    whole = (torch.cat(x, 2) if rows else _sum_groups(*x, y.shape[1]) for x, y, rows in zip(gathered, like, by_rows, strict=True))
    return tuple(x.to(y.dtype) for x, y in zip(whole, like, strict=True))

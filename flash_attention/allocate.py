"""Allocates what a forward and a backward return. Shared by every backend and by the shape-only versions of the ops, so that all agree."""

import torch
from torch import Tensor

from flash_attention.reference.tiles import sum_dtype


def like(x: Tensor, rows: int, columns: int) -> Tensor:
    """An empty (B, H, rows, columns) in the layout of x (B, H, N, D): a (B, N, H, D) tensor that came in transposed goes out transposed."""
    if is_like(x, rows, columns):
        return torch.empty_like(x)  # the same, in half the time
    B, H, _, _ = x.shape
    _, stride_h, stride_n, _ = x.stride()
    if stride_h < stride_n:
        return x.new_empty((B, rows, H, columns)).transpose(1, 2)
    return x.new_empty((B, H, rows, columns))


def is_like(x: Tensor, rows: int, columns: int) -> bool:
    """Whether `like` is torch.empty_like."""
    return x.shape[2] == rows and x.shape[3] == columns and x.stride(3) == 1


def output(q: Tensor, v: Tensor) -> Tensor:
    """O (B, H, Nq, Dv)."""
    return like(q, q.shape[2], v.shape[3])


def lse(q: Tensor) -> Tensor:
    """LSE (B, H, Nq), or its gradient."""
    return q.new_empty(q.shape[:3], dtype=sum_dtype(q))


def forward_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """O and LSE."""
    return output(q, v), lse(q)


def backward_outputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV, shaped as q, k, v."""
    return like(q, *q.shape[2:]), like(k, *k.shape[2:]), like(v, *v.shape[2:])


def bias_gradient(q: Tensor, bias: Tensor | None) -> Tensor:
    """dBias, zeros shaped as the bias; an empty tensor without one, because an op always returns the same number of results."""
    return q.new_empty(0) if bias is None else torch.zeros(bias.shape, dtype=bias.dtype, device=bias.device)

"""What a forward and a backward return, allocated. Shared by every backend and by the shape-only versions of the ops, so that all agree."""

import torch
from torch import Tensor

from flash_attention.reference.tiles import sum_dtype


def like(x: Tensor, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
    """An empty (B, H, rows, columns) in the layout of x (B, H, N, D): a (B, N, H, D) tensor that came in transposed goes out transposed."""
    B, H, N, D = x.shape
    _, stride_h, stride_n, stride_d = x.stride()
    if rows == N and columns == D and stride_d == 1 and dtype is None:
        return torch.empty_like(x)  # the same, in half the time
    if stride_h < stride_n:
        return x.new_empty((B, rows, H, columns), dtype=dtype).transpose(1, 2)
    return x.new_empty((B, H, rows, columns), dtype=dtype)


def output(q: Tensor, v: Tensor) -> Tensor:
    """O (B, H, Nq, Dv)."""
    return like(q, q.shape[2], v.shape[3])


def forward_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """O and LSE (B, H, Nq)."""
    return output(q, v), q.new_empty(q.shape[:3], dtype=sum_dtype(q))


def backward_outputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV, shaped as q, k, v."""
    return like(q, *q.shape[2:]), like(k, *k.shape[2:]), like(v, *v.shape[2:])

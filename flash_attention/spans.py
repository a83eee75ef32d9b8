"""Which columns each row sees, as intervals for `flash_attention(q, k, v, spans=…)`; their memory is linear in the length.

Each function gives int32 (B or 1, 1, Nq, 2): row i sees columns spans[…, i, 0] ≤ j < spans[…, i, 1].
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def documents(
    lengths: Sequence[int] | Tensor,
    k_lengths: Sequence[int] | Tensor | None = None,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
) -> Tensor:
    """Documents packed one after another, each of which sees itself: (1, 1, sum of lengths, 2), on the lengths' device.

    lengths: numbers of queries of the documents, 0 allowed: a list or a 1-D integer tensor. k_lengths: numbers of keys, if different.
    causal, window: within each document, aligned to its last row and column, as `flash_attention()` aligns them for the whole.

    Raises:
        TypeError: lengths are not integers. ValueError: not one-dimensional, negative, or of different numbers of documents.

    >>> documents([2, 3], causal=True)[0, 0].tolist()
    [[0, 1], [0, 2], [2, 3], [2, 4], [2, 5]]
    """
    n = _lengths(lengths, "lengths")
    m = n if k_lengths is None else _lengths(k_lengths, "k_lengths").to(n.device)
    if len(n) != len(m):
        raise ValueError(f"there must be as many k_lengths as lengths, got {len(m)} and {len(n)}")
    left, right = window or (None, None)
    right = 0 if causal else right
    document = torch.repeat_interleave(torch.arange(len(n), device=n.device), n)  # of each row
    first_row, first_column = (n.cumsum(0) - n)[document], (m.cumsum(0) - m)[document]
    n, m = n[document], m[document]
    place = torch.arange(len(document), device=n.device) - first_row + m - n  # the column of its document at which a row stands
    start = torch.zeros_like(place) if left is None else (place - left).clamp(min=0)
    stop = m if right is None else torch.minimum(m, place + right + 1)
    return _spans(first_column + start, first_column + torch.maximum(stop, start))


def prefix(lengths: int | Sequence[int] | Tensor, Nq: int, Nk: int | None = None) -> Tensor:
    """The first columns are seen by every row, the others causally (a prefix language model): (B or 1, 1, Nq, 2).

    lengths: of the prefix, a number, or one for each batch entry.

    >>> prefix(2, 4)[0, 0].tolist()
    [[0, 2], [0, 2], [0, 3], [0, 4]]
    """
    Nk = Nq if Nk is None else Nk
    length = _lengths([lengths] if isinstance(lengths, int) else lengths, "lengths")[:, None]
    stop = torch.maximum(length, torch.arange(Nq, device=length.device) + Nk - Nq + 1).clamp(0, Nk)  # (B or 1, Nq)
    return _spans(torch.zeros_like(stop), stop)


def chunks(size: int, N: int, *, before: int = 0, causal: bool = False, device: torch.device | str | None = None) -> Tensor:
    """Chunks of `size` rows, each of which sees itself and the `before` chunks preceding it: (1, 1, N, 2).

    >>> chunks(2, 4, before=1)[0, 0].tolist()
    [[0, 2], [0, 2], [0, 4], [0, 4]]
    """
    if size < 1 or before < 0:
        raise ValueError(f"chunks must have at least one row, and see none or more before them, got size {size}, before {before}")
    row = torch.arange(N, device=device)
    first = row // size * size
    return _spans((first - before * size).clamp(min=0), row + 1 if causal else (first + size).clamp(max=N))


def _spans(start: Tensor, stop: Tensor) -> Tensor:
    """start and stop, (Nq) or (B, Nq) each → (1 or B, 1, Nq, 2)."""
    spans = torch.stack((start, stop), -1).int()
    return spans[None, None] if spans.dim() == 2 else spans[:, None]


def _lengths(lengths: Sequence[int] | Tensor, name: str) -> Tensor:
    """As an int64 tensor (n)."""
    x = lengths if isinstance(lengths, Tensor) else torch.tensor(lengths, dtype=None if len(lengths) else torch.int64)
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {x.dtype}")
    if x.dim() != 1 or bool((x < 0).any()):
        raise ValueError(f"{name} must be one-dimensional and not negative, got {x.tolist()}")
    return x.long()

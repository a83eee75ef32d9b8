"""What every tiled algorithm here needs: block ranges, tiles of Q, K, V and of the mask, and exp.

Shapes use the papers' letters. B batch, H query heads, Hkv key/value heads, Nq and Nk sequence lengths, D head size, Dv value head size.
A tile is named by two slices: `i` selects rows of Q (and of S, P, O), `j` selects rows of K and V (columns of S and P).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# exp(S − m) is computed as 2^(S·log2 e − m·log2 e): on a CPU, PyTorch's exp2 is four times as fast as its exp, and a GPU has only exp2 in
# hardware. The product Q Kᵀ includes the factor log2 e, so S and m are in base 2. If the factor were applied after the product, two large
# scores would each be rounded, and their small difference would be lost.
LOG2_E = math.log2(math.e)


def lowest(dtype: torch.dtype) -> float:
    """The papers start a running maximum at −∞. The code starts it here, at the lowest finite number: a row that has met only hidden scores
    would otherwise compute −∞ − (−∞) = NaN."""
    return torch.finfo(dtype).min


def blocks(start: int, stop: int, size: int) -> Iterator[slice]:
    """Cut start … stop into slices of `size`; the last one may be shorter.

    >>> list(blocks(0, 5, 2))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def sum_dtype(Q: Tensor) -> torch.dtype:
    """The dtype of scores, softmax and every sum: float64 for float64, float32 for all else."""
    return torch.float64 if Q.dtype == torch.float64 else torch.float32


def tile(X: Tensor, rows: slice) -> Tensor:
    """Rows of a (B, H or Hkv, N, D) tensor as a tile in the sum dtype."""
    X = X[:, :, rows]
    return X if X.dtype == sum_dtype(X) else X.to(sum_dtype(X))


def fast_memory(Q: Tensor, K: Tensor, block_q: int, block_k: int) -> Tensor:
    """Memory for one (B, H, block_q, block_k) tile of scores, allocated once and used for every tile, so that it stays in cache, a CPU's
    fast memory."""
    rows, columns = min(block_q, Q.shape[2]), min(block_k, K.shape[2])
    return Q.new_empty(Q.shape[0] * Q.shape[1] * rows * columns, dtype=sum_dtype(Q))


# The three products of a tile. Grouped-query attention: query head h reads key/value head h // (H / Hkv). K and V are never repeated: the
# query heads of a group are adjacent, so their rows form one taller matrix, which one product multiplies by their key head.


def matmul_into(memory: Tensor, A: Tensor, B: Tensor, factor: float = 1) -> Tensor:
    """factor · A (B, H, m, k) @ B (B, Hkv, k, n) → (B, H, m, n), written to the start of `memory`. The factor costs nothing."""
    shape = (*A.shape[:-1], B.shape[-1])
    out = memory[: math.prod(shape)].view(shape)
    Hkv = B.shape[1]
    product = fold(out, Hkv)
    torch.baddbmm(product, fold(A, Hkv), fold(B, Hkv), beta=0, alpha=factor, out=product)
    return out


def add_matmul_(X: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """X (B, H, m, n) += A (B, H, m, k) @ B (B, Hkv, k, n). X is contiguous or a block of rows of a contiguous tensor."""
    Hkv = B.shape[1]
    if X.shape[1] == Hkv or X.is_contiguous():
        _view(X, Hkv).baddbmm_(fold(A, Hkv), fold(B, Hkv))
    else:  # blocks of rows of several heads are not contiguous
        X.add_(torch.bmm(fold(A, Hkv), fold(B, Hkv)).view(X.shape))
    return X


def add_matmul_mT_(X: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """X (B, Hkv, m, n) += Aᵀ @ B, summed over the query heads of a group; A (B, H, k, m), B (B, H, k, n). X is contiguous."""
    Hkv = X.shape[1]
    _view(X, Hkv).baddbmm_(fold(A, Hkv).mT, fold(B, Hkv))
    return X


def fold(X: Tensor, Hkv: int) -> Tensor:
    """(B, H or Hkv, m, n) → (B·Hkv, m·H/Hkv, n), as torch.bmm takes it: the rows of the heads of a group one after another."""
    if X.shape[1] != Hkv:
        return X.reshape(X.shape[0] * Hkv, -1, X.shape[3])
    return X[0] if X.shape[0] == 1 else X.flatten(0, 1)  # one batch is indexed: cheaper than flatten, and Python's lock stays held


def _view(X: Tensor, Hkv: int) -> Tensor:
    """The same as a view, for adding in place: `flatten` may copy, and the sum would be lost; `view` raises instead."""
    return X[0] if X.shape[0] == 1 and X.shape[1] == Hkv else X.view(X.shape[0] * Hkv, -1, X.shape[3])


def exp2_minus(memory: Tensor, S: Tensor, m: Tensor) -> Tensor:
    """2^(S − m), written to the start of `memory` (which may be where S lies): one pass for the difference, one for the power."""
    return torch.sub(S, m, out=memory[: S.numel()].view_as(S)).exp2_()


def natural(x: Tensor) -> Tensor:
    """A score, a maximum or a logarithm of a sum from base 2 to base e. Divided by log2 e, so that multiplying by it gives x again."""
    return x / LOG2_E


def hide_dead(dead: Tensor, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients (B, H, Nq) or (B, H, Nq, D) become 0 in the rows that attend nothing, which are set in `dead` (B, H, Nq).

    There O = 0 and LSE = −∞, whatever the inputs. The gradient of O / |O|, or of a logaddexp of two such LSEs, is NaN, and 0·NaN is NaN.
    """
    return tuple(dX if dX is None else torch.where(dead if dX.dim() == 3 else dead[..., None], 0, dX) for dX in gradients)  # one pass


def broadcast_mask(mask: Tensor | None, B: int, H: int, Nq: int, Nk: int) -> Tensor | None:
    """View a mask as (B, H, Nq, Nk) without expanding it in memory (stride 0 along broadcast dimensions).

    A mask of shape (B, Nk) is a key mask; any other shape broadcasts to (B, H, Nq, Nk) from the right. True = may attend.

    Raises:
        TypeError: the mask is not a bool tensor.
        ValueError: its shape does not broadcast to (B, H, Nq, Nk).
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a torch.bool tensor (True = may attend) or None, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must have dtype torch.bool (True = may attend), got {mask.dtype}; for a 0/1 mask pass mask.bool()")
    shape = tuple(mask.shape)
    if mask.dim() == 2 and shape == (B, Nk):  # of more dimensions, no size is compared: torch.export would take it for a condition
        mask = mask.unsqueeze(1).unsqueeze(1)
    wanted = (B, H, Nq, Nk)
    fits = mask.dim() <= 4 and all(have in (1, want) for have, want in zip(reversed(mask.shape), reversed(wanted), strict=False))
    if not fits:
        raise ValueError(f"mask of shape {shape} is neither a key mask (B, Nk) = {(B, Nk)} nor broadcastable to (B, H, Nq, Nk) = {wanted}")
    return mask.expand(wanted)


def hide_(S: Tensor, mask: Tensor | None, i: slice, j: slice) -> Tensor:
    """In place: scores that `mask` (B, H, Nq, Nk) forbids become −inf."""
    return S if mask is None else S.masked_fill_(~mask[:, :, i, j], -math.inf)


def block_size(given: int | None, default: int) -> int:
    """The caller's block size, or the default."""
    if given is None:
        return default
    if given < 1:
        raise ValueError(f"a block size must be at least 1, got {given}")
    return given

"""What happens to a score before the softmax. Defined here once, for naive attention, the tiled algorithms and their derivatives.

    s = scale · q·k        x = softcap · tanh(s / softcap) + bias[b, h, i, j] − alibi[b, h] · |p − j|

in this order, each only if it is given; then come mask, window and spans. p = i + diagonal is the column at which row i stands, as in
visible.py, so that a part of the matrix gets the same values as in the whole.

    softcap   keeps scores between −softcap and softcap (Bello et al. 2016, arXiv:1611.09940, section 4.3; Gemma 2, arXiv:2408.00118)
    bias      relative positions (T5, arXiv:1910.10683, section 2.1; Swin, arXiv:2103.14030, equation 4), pair representations (AlphaFold 2)
    alibi     a slope a head (Press et al. 2021, arXiv:2108.12409); symmetric in distance, which under a causal mask is the paper's

The derivative: ∂x/∂s = 1 − tanh²(s / softcap), ∂x/∂bias = 1. cuda/score.cuh says the same for the kernels.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .tiles import LOG2_E

# A bias below this hides an element, as −∞ does. Code written for other attention functions hides with a dtype's lowest number, to which no
# score can be added and which overflows in base 2.
HIDES = -(2.0**126)


@dataclass(frozen=True)
class Score:
    """softcap: positive. bias: (B or 1, H or 1, Nq or 1, Nk or 1), any float. alibi: slopes (B or 1, H or 1). diagonal: `Visible`'s."""

    softcap: float | None = None
    bias: Tensor | None = None
    alibi: Tensor | None = None
    diagonal: int = 0

    @staticmethod
    def of(softcap: float | None, bias: Tensor | None, alibi: Tensor | None, diagonal: int) -> "Score | None":
        """None where scores stay as they are."""
        return None if softcap is None and bias is None and alibi is None else Score(softcap, bias, alibi, diagonal)

    @property
    def has_derivative(self) -> bool:
        """Whether ∂x/∂s is anything but 1."""
        return self.softcap is not None

    # ---- plain and differentiable, for naive attention and derivatives

    def __call__(self, S: Tensor, i: slice, j: slice) -> Tensor:
        """Changes the scores S (B, H, rows, columns) of rows i and columns j. Which elements the bias hides is said by `sees`."""
        if self.softcap is not None:
            S = (S / self.softcap).tanh() * self.softcap
        if self.bias is not None:
            bias = self._bias(i, j)
            S = S + bias.masked_fill(bias < HIDES, 0).to(S.dtype)  # the gradient of −∞ would be NaN
        if self.alibi is not None:
            S = S - self._slopes(S) * self._distance(S, i, j)
        return S

    def derivatives(self, S: Tensor) -> tuple[Tensor, Tensor] | None:
        """∂x/∂s and ∂²x/∂s² at scores S; None where they are 1 and 0."""
        if self.softcap is None:
            return None
        capped = (S / self.softcap).tanh()
        first = 1 - capped * capped
        return first, capped * first * (-2 / self.softcap)

    def sees(self, i: slice, j: slice) -> Tensor | None:
        """Rows i and columns j as a mask, True = the bias does not hide it; None without a bias."""
        return None if self.bias is None else ~(self._bias(i, j).detach() < HIDES)

    # ---- in place and in base 2 (tiles.py), for the tiled algorithms

    def apply_(self, S: Tensor, i: slice, j: slice, derivative: Tensor | None = None) -> Tensor | None:
        """In place: S (B, H, rows, columns), which is s · log2 e, becomes x · log2 e, −∞ where the bias hides. Returns ∂x/∂s, written to
        the start of `derivative`, or None if it is 1 everywhere or `derivative` is None."""
        if self.softcap is not None:
            cap = self.softcap * LOG2_E
            S.div_(cap).tanh_()
            if derivative is not None:
                derivative = torch.mul(S, S, out=derivative[: S.numel()].view_as(S)).neg_().add_(1)
            S.mul_(cap)
        if self.bias is not None:
            bias = self._bias(i, j)
            S.add_(bias.to(S.dtype).masked_fill(bias < HIDES, -math.inf), alpha=LOG2_E)
        if self.alibi is not None:
            S.addcmul_(self._slopes(S), self._distance(S, i, j), value=-LOG2_E)
        return derivative if self.has_derivative else None

    def add_gradient_(self, dBias: Tensor, dX: Tensor, i: slice, j: slice) -> None:
        """dBias, shaped as the bias, += dX (B, H, rows, columns), summed over what was broadcast."""
        part = _tile(dBias, i, j)
        summed = [dim for dim, n in enumerate(part.shape) if n != dX.shape[dim]]
        part.add_(dX.sum(summed, keepdim=True) if summed else dX)

    # ---- a part of the whole

    def part(self, i: slice, j: slice) -> "Score":
        """The same for rows i and columns j, both counted from 0."""
        bias = None if self.bias is None else _tile(self.bias, i, j)
        return replace(self, bias=bias, diagonal=self.diagonal + i.start - j.start)

    def of_heads(self, b: slice, h: slice) -> "Score":
        """The same for some batches and heads."""
        return replace(self, bias=of_heads(self.bias, b, h), alibi=of_heads(self.alibi, b, h))

    def _bias(self, i: slice, j: slice) -> Tensor:
        return _tile(self.bias, i, j)

    def _slopes(self, S: Tensor) -> Tensor:
        return self.alibi[:, :, None, None].to(S.dtype)

    def _distance(self, S: Tensor, i: slice, j: slice) -> Tensor:
        """|p − j| (rows, columns)."""
        row = torch.arange(i.start, i.stop, device=S.device)[:, None] + self.diagonal
        return (row - torch.arange(j.start, j.stop, device=S.device)).abs_().to(S.dtype)


def of_heads(x: Tensor | None, b: slice, h: slice) -> Tensor | None:
    """Some batches and heads of a (B or 1, H or 1, …) tensor."""
    return None if x is None else x[tuple(slice(None) if n == 1 else part for n, part in zip(x.shape[:2], (b, h), strict=True))]


def _tile(x: Tensor, i: slice, j: slice) -> Tensor:
    """Rows i and columns j of a (…, Nq or 1, Nk or 1) tensor."""
    rows, columns = (slice(None) if n == 1 else part for n, part in zip(x.shape[2:], (i, j), strict=True))
    return x[:, :, rows, columns]


def broadcast_bias(bias: Tensor, B: int, H: int, Nq: int, Nk: int) -> Tensor:
    """View a bias as (B or 1, H or 1, Nq or 1, Nk or 1).

    Raises:
        TypeError: it is not a float tensor. ValueError: its shape does not broadcast to (B, H, Nq, Nk).
    """
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a float tensor that broadcasts to (B, H, Nq, Nk) or None, got {type(bias).__name__}")
    if not bias.is_floating_point():
        instead = "; a bool mask goes in as mask" if bias.dtype == torch.bool else ""
        raise TypeError(f"bias must be a float tensor, which is added to the scores, got {bias.dtype}{instead}")
    wanted = (B, H, Nq, Nk)
    if bias.dim() > 4 or not all(have in (1, want) for have, want in zip(reversed(bias.shape), reversed(wanted), strict=False)):
        raise ValueError(f"bias of shape {tuple(bias.shape)} does not broadcast to (B, H, Nq, Nk) = {wanted}")
    return bias[(None,) * (4 - bias.dim())]


def broadcast_alibi(alibi: Tensor, B: int, H: int) -> Tensor:
    """View slopes (H,) or (B, H) as (B or 1, H).

    Raises:
        TypeError: they are not a float tensor. ValueError: their shape is another.
    """
    if not isinstance(alibi, Tensor) or not alibi.is_floating_point():
        got = alibi.dtype if isinstance(alibi, Tensor) else type(alibi).__name__
        raise TypeError(f"alibi must be a float tensor of slopes, (H,) or (B, H), or None, got {got}")
    if alibi.dim() not in (1, 2) or alibi.shape[-1] != H or (alibi.dim() == 2 and alibi.shape[0] not in (1, B)):
        raise ValueError(f"alibi must hold slopes of shape (H,) = ({H},) or (B, H) = ({B}, {H}), got {tuple(alibi.shape)}")
    return alibi if alibi.dim() == 2 else alibi[None]

"""The one trick that FlashAttention rests on: softmax over a row of which only one piece is available at a time.

A piece of a row is summarised by two numbers: m, its maximum, and l = Σ exp(x − m). Two summaries merge into the summary of both pieces
together (Milakov and Gimelshein 2018, arXiv:1805.02867), so one pass over the row, in any order and with any cut, gives what softmax
needs. The same rescaling carries over to anything that was summed with weights exp(x − m): attention's Σ exp(x − m)·v too.
"""

import torch
from torch import Tensor

from .tiles import blocks, lowest


def softmax_three_passes(x: Tensor) -> Tensor:
    """The textbook way, x (..., N) → (..., N): one pass for the maximum, one for the sum, one to divide. The whole row is read three times.

    Without the maximum exp overflows: float16 ends at 65504, about exp(11.09).
    """
    m = x.amax(-1, keepdim=True)  # pass 1
    l = (x - m).exp().sum(-1, keepdim=True)  # pass 2
    return (x - m).exp() / l  # pass 3


def summarise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., N) → m, l, each (..., 1)."""
    m = x.amax(-1, keepdim=True).clamp(min=lowest(x.dtype))
    return m, (x - m).exp().sum(-1, keepdim=True)


def merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The summary of two pieces from the summaries of each. Exact, associative and commutative, up to rounding.

    >>> whole = summarise(torch.tensor([1.0, 2.0, 3.0]))
    >>> parts = merge(summarise(torch.tensor([1.0])), summarise(torch.tensor([2.0, 3.0])))
    >>> bool(torch.allclose(torch.stack(whole), torch.stack(parts)))
    True
    """
    (m_a, l_a), (m_b, l_b) = a, b
    m = torch.maximum(m_a, m_b)
    return m, (m_a - m).exp() * l_a + (
        m_b - m
    ).exp() * l_b  # each sum was taken against its own maximum; exp(m_a − m) moves it to the common one


def softmax_online(x: Tensor, block: int = 1) -> Tensor:
    """x (..., N) → (..., N): one pass, `block` elements at a time, collects m and l; a second one divides."""
    summary = torch.full_like(x[..., :1], lowest(x.dtype)), torch.zeros_like(x[..., :1])
    for j in blocks(0, x.shape[-1], block):
        summary = merge(summary, summarise(x[..., j]))
    m, l = summary
    return (x - m).exp() / l


def attention_online(x: Tensor, V: Tensor, block: int = 1) -> Tensor:
    """softmax(x) @ V for scores x (..., N) and V (N, Dv) → (..., Dv), in one pass and never holding more than `block` weights.

    This is FlashAttention for a single row: O shrinks by the same factor as l whenever a larger score turns up.
    """
    m, l = torch.full_like(x[..., :1], lowest(x.dtype)), torch.zeros_like(x[..., :1])
    O = x.new_zeros(*x.shape[:-1], V.shape[-1])
    for j in blocks(0, x.shape[-1], block):
        m_new = torch.maximum(m, x[..., j].amax(-1, keepdim=True))
        P = (x[..., j] - m_new).exp()
        alpha = (m - m_new).exp()
        l, O, m = alpha * l + P.sum(-1, keepdim=True), alpha * O + P @ V[j], m_new
    return O / l

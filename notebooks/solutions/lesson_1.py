"""Answers to the exercises of lesson 1."""

import math

import torch
from torch import Tensor

from flash_attention.reference.online_softmax import merge, summarise
from flash_attention.reference.tiles import blocks


def largest_exponent(dtype: torch.dtype) -> float:
    return math.log(torch.finfo(dtype).max)


def logsumexp_online(x: Tensor, block: int) -> Tensor:
    first, *others = [summarise(x[..., j]) for j in blocks(0, x.shape[-1], block)]
    m, l = first
    for other in others:
        m, l = merge((m, l), other)
    return m + l.log()


def merge_with_values(a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    (m_a, l_a, O_a), (m_b, l_b, O_b) = a, b
    m = torch.maximum(m_a, m_b)
    alpha, beta = (m_a - m).exp(), (m_b - m).exp()
    return m, alpha * l_a + beta * l_b, alpha * O_a + beta * O_b

"""The comparison behind check_backward.py and check_backward_causal.py: three ways to the same gradients.

    jacrev through naive attention  ·  jacrev through flash_attention()  ·  the papers' hand-written backward passes (both papers')

each against the truth (naive attention in float64), and pairwise. With the loss sum(O), as in FlashAttention-PyTorch, and with a random dO:
under sum(O) every entry of dO is 1, and a backward that permutes dO's features would pass.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple

import torch
from harness import Case, Report, Target, limit
from torch import Tensor
from torch.func import jacrev


class Algorithms(NamedTuple):
    """One mask's implementations: naive(q, k, v, mask), flash(q, k, v, mask, backend=…), and each paper's forward and backward."""

    naive: Callable
    flash: Callable
    forward1: Callable
    backward1: Callable
    forward2: Callable
    backward2: Callable


def compare(case: Case, target: Target, algorithms: Algorithms, masks: tuple[str | None, ...]) -> None:
    """Fails if any two ways differ by more than their tolerances allow."""
    report = Report(f"backward: {case}")
    for mask_kind in masks:
        case = replace(case, mask=mask_kind)
        q, k, v, mask = case.inputs(target.device)
        O_shape = (*q.shape[:3], v.shape[3])
        random_dO = case.gradient(target.device, *O_shape)
        ones = torch.ones((), dtype=case.dtype, device=target.device).expand(O_shape)  # the gradient of sum(): stride 0 everywhere
        for loss, dO in (("sum(O)", ones), ("random dO", random_dO)):
            truth = through(algorithms.naive, q.double(), k.double(), v.double(), mask, dO.double())
            naive = through(algorithms.naive, q, k, v, mask, dO)
            O, l, m = algorithms.forward1(q, k, v, mask)
            O2, LSE = algorithms.forward2(q, k, v, mask)
            ways = {
                "jacrev of naive": naive,
                "jacrev of flash": through(algorithms.flash, q, k, v, mask, dO, backend=target.backend),
                "FlashAttention, Alg. 4": algorithms.backward1(q, k, v, mask, O, l, m, dO),
                "FlashAttention-2, Alg. 2": algorithms.backward2(q, k, v, mask, O2, LSE, dO),
            }
            names = ("dQ", "dK", "dV")
            allowed = [limit(n, t, x, case.dtype, case.D) for n, t, x in zip(names, truth, naive, strict=True)]
            for way, gradients in ways.items():
                for n, got, want, most in zip(names, gradients, truth, allowed, strict=True):
                    report.compare(f"{way} | float64", n, got, want, most, f"{loss}, mask: {mask_kind}")
            for a, b in combinations(ways, 2):  # each may be off by `most`, so two may differ by twice that
                for n, x, y, most in zip(names, ways[a], ways[b], allowed, strict=True):
                    report.compare(f"{a} | {b}", n, x, y, 2 * most, f"{loss}, mask: {mask_kind}")
    report.verdict()


def through(
    attention: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dO: Tensor, **options
) -> tuple[Tensor, Tensor, Tensor]:
    """jacrev of sum(O∘dO) with respect to q, k and v."""
    return jacrev(lambda q, k, v: (attention(q, k, v, mask, **options) * dO).sum(), argnums=(0, 1, 2))(q, k, v)

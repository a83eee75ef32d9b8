"""How accurate is float32 attention whose matrix products consist of 16-bit ones? An experiment in PyTorch, made before the kernels.

    python -m benchmarks.float32_planes [--n 512] [--d 64]

A float32 number is a sum of "planes", numbers with few bits: x = x0 + x1 (+ x2), each the rounded remainder of those before. A product of
two sums of planes is a sum of products of planes, of which the smallest are omitted. O, dQ, dK and dV of each variant are compared with the
same formulas in float64, and so is naive attention in float32: the largest error, relative to the result's largest entry.

"truncated" also models a tensor core: 16 products are added to a sum that keeps 24 bits and drops the rest (Fasi et al., 2021, "Numerical
behavior of NVIDIA tensor cores"). In a sum over all keys the loss grows with their number; "restarted" sums 64 keys at a time, the small
products first, and adds these sums in float32, as the kernels do.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def rounded(x: Tensor, kind: str) -> Tensor:
    """x rounded to the kind's 16 (or TF32's 19) bits, as float32."""
    if kind == "tf32":
        bits = x.view(torch.int32)
        return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)
    return x.to({"float16": torch.float16, "bfloat16": torch.bfloat16}[kind]).float()


def power_of_two(largest: Tensor) -> Tensor:
    """The power of two that scales a number of this size to between 2^14 and 2^15."""
    return torch.where(largest > 0, torch.exp2((14 - largest.double().log2().floor()).clamp(-120, 120)), 1).float()


class Planes(NamedTuple):
    """A way to multiply float32 matrices."""

    name: str
    kind: str
    count: int
    scaled: bool = False  # each head by a power of two, so that its largest entry fits
    truncated: bool = False
    restarted: bool = False

    def split(self, x: Tensor) -> list[Tensor]:
        planes = []
        for _ in range(self.count):
            planes.append(rounded(x, self.kind))
            x = x - planes[-1]
        return planes

    def matmul(self, A: Tensor, B: Tensor) -> Tensor:
        """A (H, M, K) · B (H, K, N)."""
        scales = [power_of_two(x.abs().amax((1, 2), keepdim=True)) if self.scaled else torch.ones(len(x), 1, 1) for x in (A, B)]
        A_planes, B_planes = (self.split(x * scale) for x, scale in zip((A, B), scales, strict=True))
        pairs = [(a, b) for a in range(self.count) for b in range(self.count) if a + b < self.count]
        pairs.sort(key=lambda pair: -sum(pair))  # the small products first
        add = self._truncated if self.truncated else lambda terms, start: start + sum(a @ b for a, b in terms)
        total = torch.zeros(A.shape[0], A.shape[1], B.shape[2])
        step = 64 if self.restarted or not self.truncated else A.shape[2]
        for k in range(0, A.shape[2], step):
            terms = [(A_planes[a][:, :, k : k + step], B_planes[b][:, k : k + step]) for a, b in pairs]
            total = add(terms, total) if step == A.shape[2] else total + add(terms, torch.zeros_like(total))
        return total / scales[0] / scales[1]

    @staticmethod
    def _truncated(terms: list[tuple[Tensor, Tensor]], start: Tensor) -> Tensor:
        total = start.double()
        steps = range(0, terms[0][0].shape[2], 16)
        for k, (a, b) in ((k, term) for k in steps for term in terms) if len(steps) > 4 else ((k, t) for t in terms for k in steps):
            total = total + a[:, :, k : k + 16].double() @ b[:, k : k + 16].double()
            mantissa, exponent = torch.frexp(total)
            total = torch.ldexp((mantissa * 2**24).trunc(), exponent - 24)
        return total.float()


WAYS = [
    Planes("2 float16, scaled", "float16", 2, scaled=True),
    Planes("  truncated", "float16", 2, scaled=True, truncated=True),
    Planes("  truncated, restarted", "float16", 2, scaled=True, truncated=True, restarted=True),
    Planes("3 bfloat16", "bfloat16", 3),
    Planes("  truncated, restarted", "bfloat16", 3, truncated=True, restarted=True),
    Planes("2 TF32", "tf32", 2),
    Planes("2 bfloat16", "bfloat16", 2),
]


def attention(q, k, v, dO, scale: float, matmul: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """→ O, dQ, dK, dV; (H, N, D) each. What is not a matrix product is computed in the inputs' dtype."""
    S = matmul(q, k.mT) * scale
    P = torch.softmax(S, -1)
    O = matmul(P, v)
    dP = matmul(dO, v.mT)
    dS = P * (dP - (dO * O).sum(-1, keepdim=True))
    return O, matmul(dS, k) * scale, matmul(dS.mT, q) * scale, matmul(P.mT, dO)


def in_range(q: Tensor, k: Tensor, scale: float) -> bool:
    """The kernels' test of q and k (scores_fit in planes.cuh): is what a pair of planes cannot represent negligible for every score?"""
    q_max, k_max = (x.abs().max() for x in (q, k))
    bound, scaled = q.shape[2] * scale * (q_max * k_max), scale / (power_of_two(q_max) * power_of_two(k_max))
    return bool(bound < 2**16 and 2**-90 < scaled < 2**60)


def inputs(n: int, d: int) -> dict[str, list[Tensor]]:
    """q, k, v, dO (2, n, d): inputs that show differences."""
    random = torch.Generator().manual_seed(0)
    plain = torch.randn(4, 2, n, d, generator=random)

    def changed(**factors) -> list[Tensor]:
        return [x * factors.get(name, 1) for x, name in zip(plain, ("q", "k", "v", "dO"), strict=True)]

    rows = 10 ** (4 * torch.rand(4, 2, n, 1, generator=random) - 2)
    columns = 10 ** (4 * torch.rand(d, generator=random) - 2)
    one = torch.ones(2, n, d)
    one[0, 3, 5] = 1e3
    cases = {
        "as drawn": changed(),
        "q × 5": changed(q=5),
        "q × 30": changed(q=30),
        "rows of v, dO × 1e-2 … 1e2": changed(v=rows[2], dO=rows[3]),
        "rows of all × 1e-2 … 1e2": changed(q=rows[0], k=rows[1], v=rows[2], dO=rows[3]),
        "columns of v × 1e-2 … 1e2": changed(v=columns),
        "columns of q × …, k / …": changed(q=columns, k=1 / columns),
        "an element of q × 1e3": changed(q=one),
        "an element of v × 1e3": changed(v=one),
        "an element of all × 1e3": changed(q=one, k=one, v=one, dO=one),
        "q, k, v, dO × 1e-5": changed(q=1e-5, k=1e-5, v=1e-5, dO=1e-5),
        "v, dO × 1e-18": changed(v=1e-18, dO=1e-18),
        "all × 1e-30": changed(q=1e-30, k=1e-30, v=1e-8, dO=1e-8),
        "q × 1e-38, k × 1e38": changed(q=1e-38, k=1e37),
        "v × 1e36, dO × 1e-36": changed(v=1e36, dO=1e-36),
    }
    cases["one key far from the rest in v"] = changed()
    cases["one key far from the rest in v"][2][:, 7] *= 3e4
    return cases


def errors(call: list[Tensor], scale: float, matmul: Callable[[Tensor, Tensor], Tensor]) -> str:
    """The largest error of O, dQ, dK and dV, each relative to its largest entry."""
    truth = attention(*(x.double() for x in call), scale, torch.matmul)
    found = attention(*call, scale, matmul)
    parts = ((got.double() - want).abs().max() / want.abs().max() for got, want in zip(found, truth, strict=True))
    return "  ".join(f"{error:8.1e}" for error in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description="float32 attention from 16-bit products: errors against float64.")
    parser.add_argument("--n", type=int, default=512, help="rows and keys")
    parser.add_argument("--d", type=int, default=64, help="head size")
    arguments = parser.parse_args()
    scale = arguments.d**-0.5
    for name, call in inputs(arguments.n, arguments.d).items():
        print(f"\n{name}{'' if in_range(call[0], call[1], scale) else ' (out of range)'}\n  {'O, dQ, dK, dV':24}")
        print(f"  {'float32':24}{errors(call, scale, torch.matmul)}")
        for way in WAYS:
            print(f"  {way.name:24}{errors(call, scale, way.matmul)}", flush=True)


if __name__ == "__main__":
    main()

"""Dropout whose random bits are a pure function of (seed, b, h, i, j): counter-based Philox-4x32-10.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A counter goes in, 128 random bits come out; there is
no state, so any tile, in any order, on any machine, in the forward or in the backward, draws the same mask. It is regenerated, never
stored.

One call gives 16 bytes: 16 elements of P get one byte each. The 16 are a 4 × 4 grid whose rows and columns lie 8 apart, because a GPU's
tensor cores hand each thread elements 8 apart, of S and of Sᵀ alike: a thread then uses most of each call it makes. With
i = 32·a + 8·w + r and j = 32·b + 8·y + c (r, c < 8; w, y < 4) element (i, j) takes byte y (lowest first) of word w of

    philox(counter = (8·b + c, 8·a + r, head, batch), key = (low, high 32 bits of seed))

and is dropped if that byte < round(256·p).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MULTIPLIER = (0xD2511F53, 0xCD9E8D57)  # the paper's constants for Philox-4x32
KEY_STEP = (0x9E3779B9, 0xBB67AE85)  # golden ratio and √3 − 1, as 32-bit fractions
LOW_32 = 0xFFFFFFFF


def philox_4x32_10(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox. Each word is a 32-bit number in an int64 tensor; words broadcast against each other.

    >>> zero = torch.tensor(0)
    >>> [hex(int(word)) for word in philox_4x32_10((zero, zero, zero, zero), (zero, zero))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0 = c0 * MULTIPLIER[0]  # int64 wraps around, which keeps all 64 bits of the unsigned product
        product1 = c2 * MULTIPLIER[1]
        c0, c1, c2, c3 = (
            (product1 >> 32 & LOW_32) ^ c1 ^ k0,
            product1 & LOW_32,
            (product0 >> 32 & LOW_32) ^ c3 ^ k1,
            product0 & LOW_32,
        )
        k0, k1 = (k0 + KEY_STEP[0]) & LOW_32, (k1 + KEY_STEP[1]) & LOW_32
    return c0, c1, c2, c3


def threshold(p: float) -> int:
    """How many of a byte's 256 values mean "drop": p rounded to 1/256, but never to 0 or 1 unless p is 0."""
    return 0 if p == 0 else min(max(round(256 * p), 1), 255)


@dataclass(frozen=True)
class Dropout:
    """Dropout for the batches and heads of one call.

    p: drop probability, rounded to a multiple of 1/256. seed: 0-dim int64 tensor. batches, heads: which of them the tensors at hand hold.
    corner: row and column of the whole matrix at which these tensors' first row and column lie.
    """

    p: float
    seed: Tensor
    batches: range
    heads: range
    corner: tuple[int, int] = (0, 0)

    def keep(self, i: slice, j: slice) -> Tensor:
        """Which elements of a tile survive: bool, (B, H, rows of i, columns of j)."""
        i, j = (slice(x.start + first, x.stop + first) for x, first in zip((i, j), self.corner, strict=True))
        a, r = _groups(i, self.seed.device)  # both (A, 1, 8, 1, 1): rows come in A groups of 32 = 4 words × 8
        b, c = (x.transpose(0, -2).transpose(2, -1) for x in _groups(j, self.seed.device))  # both (1, 1, 1, C, 8)
        batch, head = (torch.tensor(x, device=self.seed.device) for x in (self.batches, self.heads))
        batch, head = batch.view(-1, 1, 1, 1, 1, 1, 1), head.view(-1, 1, 1, 1, 1, 1)
        words = philox_4x32_10((8 * b + c, 8 * a + r, head, batch), (self.seed & LOW_32, self.seed >> 32 & LOW_32))
        words = torch.cat(torch.broadcast_tensors(*words), dim=3)  # (B, H, A, 4 words, 8, C, 8)
        byte = words.unsqueeze(6) >> (8 * torch.arange(4, device=words.device)).view(4, 1) & 0xFF  # (B, H, A, 4, 8, C, 4 bytes, 8)
        kept = byte.flatten(5, 7).flatten(2, 4) >= threshold(self.p)  # (B, H, 32·A, 32·C)
        return kept[:, :, i.start % 32 :, j.start % 32 :][:, :, : i.stop - i.start, : j.stop - j.start]

    def tile(self, i: slice, j: slice, dtype: torch.dtype) -> Tensor:
        """The factor Z on a tile of P: 0 where dropped, 1 / (exact keep probability) where kept. (B, H, rows of i, columns of j)."""
        return self.keep(i, j).to(dtype) * (256 / (256 - threshold(self.p)))


def _groups(rows: slice, device: torch.device) -> tuple[Tensor, Tensor]:
    """For the groups of 32 that cover `rows`: their numbers and the offsets 0 … 7 inside, shaped to broadcast as (A, 1, 8, 1, 1)."""
    numbers = torch.arange(rows.start // 32, -(-rows.stop // 32), device=device)
    return numbers.view(-1, 1, 1, 1, 1), torch.arange(8, device=device).view(1, 1, 8, 1, 1)

"""The derivative of attention in forward mode: tangents of Q, K, V (and of a bias) go in, those of O and LSE come out, in one tiled pass.

Written out for a row, with a dot for a tangent, f the softcap and B the bias (score.py), Z dropout's factor,

    s = scale · q Kᵀ      x = f(s) + B         ẋ = f′(s)∘ṡ + Ḃ,   ṡ = scale · (q̇ Kᵀ + q K̇ᵀ)
    LSE = log Σ exp(x)    P = exp(x − LSE)     LSĖ = Σ P∘ẋ,       Ṗ = P∘(ẋ − LSĖ)
    O = (P∘Z) V                                Ȯ = (Ṗ∘Z) V + (P∘Z) V̇ = (P∘ẋ∘Z) V + (P∘Z) V̇ − LSĖ · O

so that each tile adds (P∘ẋ∘Z) V + (P∘Z) V̇ to one sum and P∘ẋ to another, and −LSĖ · O is added at the end. P is recomputed from LSE, as
in the backward: no running maximum, nothing to rescale. A tile takes five products, where the forward takes two; memory is linear in N.

`second_derivative` computes the same differentiably; this is for tangents that are not differentiated again.
"""

import math

import torch
from torch import Tensor

from .dropout import Dropout
from .flash2 import BLOCK_K, BLOCK_Q
from .score import Score
from .tiles import (
    LOG2_E,
    add_matmul_,
    block_size,
    blocks,
    broadcast_mask,
    exp2_minus,
    fast_memory,
    hide_,
    matmul_into,
    sum_dtype,
    tile,
)
from .visible import Visible


@torch.no_grad()
def flash_attention2_jvp(
    tQ: Tensor,
    tK: Tensor,
    tV: Tensor,
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    mask: Tensor | None,
    O: Tensor,
    LSE: Tensor,
    *,
    tB: Tensor | None = None,
    scale: float | None = None,
    dropout: Dropout | None = None,
    visible: Visible | None = None,
    score: Score | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
) -> tuple[Tensor, Tensor]:
    """tQ, tK, tV shaped as Q, K, V, tB as the score's bias, O and LSE from the forward → tangents of O (B, H, Nq, Dv), LSE (B, H, Nq)."""
    B, H, Nq, D = Q.shape
    Nk, Dv = V.shape[2:]
    block_q, block_k = block_size(block_q, BLOCK_Q), block_size(block_k, BLOCK_K)
    scale = D**-0.5 if scale is None else scale
    mask = broadcast_mask(mask, B, H, Nq, Nk)
    visible = Visible(Nq, Nk) if visible is None else visible
    P_memory, tX_memory = fast_memory(Q, K, block_q, block_k), fast_memory(Q, K, block_q, block_k)
    derivative_memory = torch.empty_like(P_memory) if score is not None and score.has_derivative else None
    tO, tLSE = torch.empty_like(O), torch.empty_like(LSE)
    LSE = (LSE * LOG2_E).masked_fill_(LSE.isneginf(), math.inf)  # rows that attend nothing: P = 2^(S − ∞) = 0

    for i in blocks(0, Nq, block_q):
        Qi = tile(Q, i) * scale  # (B, H, Bq, D)
        both_Qi = torch.cat((tile(tQ, i) * scale, Qi), -1)  # (B, H, Bq, 2·D): q̇ Kᵀ + q K̇ᵀ is one product
        tOi = Qi.new_zeros(B, H, Qi.shape[2], Dv)
        tLSEi = Qi.new_zeros(B, H, Qi.shape[2], 1)

        for j in visible.tiles_of_columns(i, block_k):
            Kj, Vj = tile(K, j), tile(V, j)
            S = matmul_into(P_memory, Qi, Kj.mT, LOG2_E)  # in base 2; (B, H, Bq, Bk)
            derivative = None if score is None else score.apply_(S, i, j, derivative_memory)
            visible.hide_(hide_(S, mask, i, j), i, j)
            P = exp2_minus(P_memory, S, LSE[:, :, i, None])
            tX = matmul_into(tX_memory, both_Qi, torch.cat((Kj, tile(tK, j)), -1).mT)
            if derivative is not None:
                tX.mul_(derivative)
            if tB is not None:
                tX.add_(Score(bias=tB).part(i, j).bias)
            tX.mul_(P)
            tLSEi += tX.sum(-1, keepdim=True)
            if dropout is not None:
                Z = dropout.tile(i, j, sum_dtype(Q))
                P.mul_(Z), tX.mul_(Z)
            add_matmul_(tOi, tX, Vj)
            add_matmul_(tOi, P, tile(tV, j))

        tO[:, :, i] = tOi - tLSEi * tile(O, i)
        tLSE[:, :, i] = tLSEi.squeeze(-1)
    return tO, tLSE

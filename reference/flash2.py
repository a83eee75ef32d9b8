"""FlashAttention-2 (Dao 2023, arXiv:2307.08691), Algorithms 1 and 2, with any mask, window, packed documents or bias.

Compared with the first paper, Q blocks are the outer loop: O, m and l of a block of rows stay in fast memory until they are done, and O is
divided by l once, at the end. And the backward needs one vector, LSE = m + log l, instead of two. "line n" below is line n of the paper's
algorithm.

`score` is applied to each tile of scores before the softmax (softcap, bias, ALiBi). `visible` says which tiles the loops visit: a tile that
no row sees is never computed, and only a tile that is not seen whole is masked (section 3.1, "Causal masking", here for any interval of
columns).

S and P exist one tile at a time. `observe`, if given, is called after every tile with the variables below as keywords: that is how the
notebooks step through this very code. The tensors it gets are overwritten later, so it must copy what it keeps.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .dropout import Dropout
from .score import Score
from .tiles import (
    LOG2_E,
    add_matmul_,
    add_matmul_mT_,
    block_size,
    blocks,
    broadcast_mask,
    exp2_minus,
    fast_memory,
    hide_,
    hide_dead,
    lowest,
    matmul_into,
    natural,
    sum_dtype,
    tile,
)
from .visible import Visible

BLOCK_Q = 1024
BLOCK_K = 512


@torch.no_grad()
def flash_attention2_forward(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout: Dropout | None = None,
    visible: Visible | None = None,
    score: Score | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
    observe: Callable | None = None,
) -> tuple[Tensor, Tensor]:
    """Algorithm 1. Q (B, H, Nq, D), K (B, Hkv, Nk, D), V (B, Hkv, Nk, Dv) → O (B, H, Nq, Dv) in Q's dtype, LSE (B, H, Nq).

    mask: bool, (B, Nk) or broadcastable to (B, H, Nq, Nk), True = may attend. A row that may attend nothing gets O = 0, LSE = −inf.
    scale: 1/√D unless given. visible: which columns each row sees; all unless given. score: how scores are changed; not at all unless
        given.
    block_q, block_k: rows and columns of a tile.
    observe(i, j, S, P, m, l, O): slices i and j, S and P of this tile (B, H, Bq, Bk), and of rows i so far m, l (B, H, Bq, 1) and
    O (B, H, Bq, Dv), which is not yet divided by l.
    """
    B, H, Nq, D = Q.shape
    Nk, Dv = V.shape[2:]
    dtype = sum_dtype(Q)
    block_q, block_k = block_size(block_q, BLOCK_Q), block_size(block_k, BLOCK_K)
    scale = D**-0.5 if scale is None else scale
    mask = broadcast_mask(mask, B, H, Nq, Nk)
    visible = Visible(Nq, Nk) if visible is None else visible
    may_be_dead = mask is not None or visible.blinds or (score is not None and score.bias is not None)
    S_memory = fast_memory(Q, K, block_q, block_k)
    P_memory = S_memory if observe is None else torch.empty_like(S_memory)  # P overwrites S unless `observe` needs both
    O = Q.new_empty(B, H, Nq, Dv)
    LSE = Q.new_empty(B, H, Nq, dtype=dtype)

    for i in blocks(0, Nq, block_q):  # line 3
        Qi = tile(Q, i) * scale  # (B, H, Bq, D), scaled here once, not in every tile
        Oi = Qi.new_zeros(B, H, Qi.shape[2], Dv)  # line 5
        l = Qi.new_zeros(B, H, Qi.shape[2], 1)
        m = torch.full_like(l, lowest(dtype))

        for j in visible.tiles_of_columns(i, block_k):  # line 6
            Kj, Vj = tile(K, j), tile(V, j)  # (B, H, Bk, D), (B, H, Bk, Dv)
            S = matmul_into(S_memory, Qi, Kj.mT, LOG2_E)  # line 8, in base 2; (B, H, Bq, Bk)
            if score is not None:
                score.apply_(S, i, j)
            visible.hide_(hide_(S, mask, i, j), i, j)
            m_new = torch.maximum(m, S.amax(-1, keepdim=True))  # line 9
            P = exp2_minus(P_memory, S, m_new)
            alpha = (m - m_new).exp2()  # what was summed against the old maximum shrinks by this
            l = alpha * l + P.sum(-1, keepdim=True)  # before dropout: softmax is normalised over all that a row may attend
            if dropout is not None:
                P.mul_(dropout.tile(i, j, dtype))
            add_matmul_(Oi.mul_(alpha), P, Vj)  # line 10
            m = m_new
            if observe is not None:
                observe(i=i, j=j, S=natural(S), P=P, m=natural(m), l=l, O=Oi)

        LSE[:, :, i] = (natural(m) + l.log()).squeeze(-1)  # line 13; −inf where l = 0
        if may_be_dead:
            l = l.masked_fill(l == 0, 1)  # rows that may attend nothing: O = 0 already
        O[:, :, i] = Oi / l  # line 12
    return O, LSE


@torch.no_grad()
def flash_attention2_backward(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    mask: Tensor | None,
    O: Tensor,
    LSE: Tensor,
    dO: Tensor,
    dLSE: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout: Dropout | None = None,
    visible: Visible | None = None,
    score: Score | None = None,
    dBias: Tensor | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
    observe: Callable | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 2. O, LSE from the forward, dO (B, H, Nq, Dv), dLSE (B, H, Nq) or None → dQ, dK, dV, shaped and typed as Q, K, V.

    dBias: shaped as the score's bias, to which its gradient is added in place, summed over what was broadcast; in one fixed order.

    observe(i, j, S, P, dP, dS, dQ, dK, dV): four matrices of this tile (B, H, Bq, Bk), then of its rows and columns so far
    dQ (B, H, Bq, D), dK (B, Hkv, Bk, D), dV (B, Hkv, Bk, Dv).
    """
    B, H, Nq, D = Q.shape
    Nk = K.shape[2]
    dtype = sum_dtype(Q)
    block_q, block_k = block_size(block_q, BLOCK_Q), block_size(block_k, BLOCK_K)
    scale = D**-0.5 if scale is None else scale
    mask = broadcast_mask(mask, B, H, Nq, Nk)
    visible = Visible(Nq, Nk) if visible is None else visible
    S_memory, dP_memory = fast_memory(Q, K, block_q, block_k), fast_memory(Q, K, block_q, block_k)
    P_memory, dS_memory = (S_memory, dP_memory) if observe is None else (torch.empty_like(S_memory), torch.empty_like(dP_memory))
    derivative_memory = torch.empty_like(S_memory) if score is not None and score.has_derivative else None
    dQ = Q.new_zeros(Q.shape, dtype=dtype)  # line 3
    dK, dV = K.new_empty(K.shape), V.new_empty(V.shape)
    dead = LSE.isneginf()  # rows that attend nothing: P = 2^(S − ∞) = 0
    LSE = (LSE * LOG2_E).masked_fill_(dead, math.inf)
    if mask is not None or visible.blinds or (score is not None and score.bias is not None):
        dO, dLSE = hide_dead(dead, dO, dLSE)
    Delta = row_dots(O, dO, block_q)  # line 4: the paper's vector D, (B, H, Nq)
    if dLSE is not None:
        Delta = Delta - dLSE  # ∂LSE/∂S = P, so dS = P∘(dP − D) + P∘dLSE

    for j in blocks(0, Nk, block_k):  # line 5
        Kj, Vj = tile(K, j), tile(V, j)  # line 6
        dKj, dVj = Kj.new_zeros(Kj.shape), Vj.new_zeros(Vj.shape)  # line 7

        for i in visible.tiles_of_rows(j, block_q):  # line 8
            Qi, dOi = tile(Q, i) * scale, tile(dO, i)  # line 9
            S = matmul_into(S_memory, Qi, Kj.mT, LOG2_E)  # line 10, in base 2; (B, H, Bq, Bk)
            derivative = None if score is None else score.apply_(S, i, j, derivative_memory)
            visible.hide_(hide_(S, mask, i, j), i, j)
            P = exp2_minus(P_memory, S, LSE[:, :, i, None])  # line 11: the softmax again, from LSE alone
            dP = matmul_into(dP_memory, dOi, Vj.mT)  # line 13
            if dropout is None:
                add_matmul_mT_(dVj, P, dOi)  # line 12
            else:
                Z = dropout.tile(i, j, dtype)  # the forward's mask, drawn again from its counters
                add_matmul_mT_(dVj, P * Z, dOi)
                dP.mul_(Z)
            dS = torch.sub(dP, Delta[:, :, i, None], out=dS_memory[: dP.numel()].view_as(dP)).mul_(P)  # line 14
            if dBias is not None:
                score.add_gradient_(dBias, dS, i, j)
            if derivative is not None:
                dS.mul_(derivative)  # through softcap, from the changed score to the scaled product
            add_matmul_(dQ[:, :, i], dS, Kj * scale)  # line 15
            add_matmul_mT_(dKj, dS, Qi)  # line 16; Qi carries the scale
            if observe is not None:
                observe(i=i, j=j, S=natural(S), P=P, dP=dP, dS=dS, dQ=dQ[:, :, i], dK=dKj, dV=dVj)

        dK[:, :, j], dV[:, :, j] = dKj, dVj  # line 18
    return dQ.to(Q.dtype), dK, dV


def row_dots(O: Tensor, dO: Tensor, block_q: int) -> Tensor:
    """rowsum(dO∘O) (B, H, Nq) in the sum dtype, a block of rows at a time so that no third tensor of O's size appears."""
    dots = O.new_empty(O.shape[:3], dtype=sum_dtype(O))
    for i in blocks(0, O.shape[2], block_q):
        dots[:, :, i] = (tile(O, i) * tile(dO, i)).sum(-1)
    return dots

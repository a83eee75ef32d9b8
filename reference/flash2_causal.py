"""FlashAttention-2 (Dao 2023, arXiv:2307.08691), Algorithms 1 and 2, causal: row r sees columns c ≤ r + Nk − Nq (section 3.1, "Causal
masking").

The difference from flash2.py is which tiles the loops visit: those wholly in the future are never computed, in the forward or in the
backward; of the others only those that the diagonal cuts get a mask. Aligned bottom-right, so that the last row sees every column,
whatever Nq and Nk are: with Nq > Nk the first Nq − Nk rows attend nothing. A mask, if given, must allow too.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .dropout import Dropout
from .flash2 import row_dots
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
    hide_future_,
    lowest,
    matmul_into,
    natural,
    sum_dtype,
    tile,
)

BLOCK_Q = 256
BLOCK_K = 512


@torch.no_grad()
def flash_attention2_causal_forward(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout: Dropout | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
    observe: Callable | None = None,
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 over the tiles that the diagonal leaves. Arguments, result and observe as in `flash_attention2_forward`."""
    B, H, Nq, D = Q.shape
    Nk, Dv = V.shape[2:]
    offset = Nk - Nq
    dtype = sum_dtype(Q)
    block_q, block_k = block_size(block_q, BLOCK_Q), block_size(block_k, BLOCK_K)
    scale = D**-0.5 if scale is None else scale
    mask = broadcast_mask(mask, B, H, Nq, Nk)
    S_memory = fast_memory(Q, K, block_q, block_k)
    P_memory = S_memory if observe is None else torch.empty_like(S_memory)  # P overwrites S unless somebody is watching
    O = Q.new_empty(B, H, Nq, Dv)
    LSE = Q.new_empty(B, H, Nq, dtype=dtype)

    for i in blocks(0, Nq, block_q):  # line 3
        Qi = tile(Q, i) * scale  # (B, H, Bq, D), scaled here once, not in every tile
        Oi = Qi.new_zeros(B, H, Qi.shape[2], Dv)  # line 5
        l = Qi.new_zeros(B, H, Qi.shape[2], 1)
        m = torch.full_like(l, lowest(dtype))

        for j in blocks(0, min(Nk, i.stop + offset), block_k):  # line 6, up to the last column that the last of these rows sees
            Kj, Vj = tile(K, j), tile(V, j)  # (B, Hkv, Bk, D), (B, Hkv, Bk, Dv)
            S = matmul_into(S_memory, Qi, Kj.mT, LOG2_E)  # line 8, in base 2; (B, H, Bq, Bk)
            hide_(S, mask, i, j)
            hide_future_(S, i, j, offset)
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
        if mask is not None or offset < 0:
            l = l.masked_fill(l == 0, 1)  # rows that may attend nothing: O = 0 already
        O[:, :, i] = Oi / l  # line 12
    return O, LSE


@torch.no_grad()
def flash_attention2_causal_backward(
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
    offset: int | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
    observe: Callable | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 2 over the tiles that the diagonal leaves. Arguments, result and observe as in `flash_attention2_backward`.

    offset: row r sees columns c ≤ r + offset; Nk − Nq unless given, as it must be where K and V are some of the columns.
    """
    B, H, Nq, D = Q.shape
    Nk = K.shape[2]
    offset = Nk - Nq if offset is None else offset
    dtype = sum_dtype(Q)
    block_q, block_k = block_size(block_q, BLOCK_Q), block_size(block_k, BLOCK_K)
    scale = D**-0.5 if scale is None else scale
    mask = broadcast_mask(mask, B, H, Nq, Nk)
    S_memory, dP_memory = fast_memory(Q, K, block_q, block_k), fast_memory(Q, K, block_q, block_k)
    P_memory, dS_memory = (S_memory, dP_memory) if observe is None else (torch.empty_like(S_memory), torch.empty_like(dP_memory))
    dQ = Q.new_zeros(Q.shape, dtype=dtype)  # line 3
    dK, dV = K.new_empty(K.shape), V.new_empty(V.shape)
    dead = LSE.isneginf()  # rows that attend nothing: P = 2^(S − ∞) = 0
    LSE = (LSE * LOG2_E).masked_fill_(dead, math.inf)
    if mask is not None:
        dO, dLSE = hide_dead(dead, dO, dLSE)
    Delta = row_dots(O, dO, block_q)  # line 4: the paper's vector D, (B, H, Nq)
    if dLSE is not None:
        Delta = Delta - dLSE  # ∂LSE/∂S = P, so dS = P∘(dP − D) + P∘dLSE

    for j in blocks(0, Nk, block_k):  # line 5
        Kj, Vj = tile(K, j), tile(V, j)  # line 6
        dKj, dVj = Kj.new_zeros(Kj.shape), Vj.new_zeros(Vj.shape)  # line 7

        for i in blocks(max(0, j.start - offset), Nq, block_q):  # line 8, from the first row that sees the first of these columns
            Qi, dOi = tile(Q, i) * scale, tile(dO, i)  # line 9
            S = matmul_into(S_memory, Qi, Kj.mT, LOG2_E)  # line 10, in base 2; (B, H, Bq, Bk)
            hide_(S, mask, i, j)
            hide_future_(S, i, j, offset)
            P = exp2_minus(P_memory, S, LSE[:, :, i, None])  # line 11: the softmax again, from LSE alone
            dP = matmul_into(dP_memory, dOi, Vj.mT)  # line 13
            if dropout is None:
                add_matmul_mT_(dVj, P, dOi)  # line 12
            else:
                Z = dropout.tile(i, j, dtype)  # the forward's mask, drawn again from its counters
                add_matmul_mT_(dVj, P * Z, dOi)
                dP.mul_(Z)
            dS = torch.sub(dP, Delta[:, :, i, None], out=dS_memory[: dP.numel()].view_as(dP)).mul_(P)  # line 14
            add_matmul_(dQ[:, :, i], dS, Kj * scale)  # line 15
            add_matmul_mT_(dKj, dS, Qi)  # line 16; Qi carries the scale
            if observe is not None:
                observe(i=i, j=j, S=natural(S), P=P, dP=dP, dS=dS, dQ=dQ[:, :, i], dK=dKj, dV=dVj)

        dK[:, :, j], dV[:, :, j] = dKj, dVj  # line 18
    return dQ.to(Q.dtype), dK, dV

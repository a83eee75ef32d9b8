"""FlashAttention (Dao, Fu, Ermon, Rudra, Ré 2022, arXiv:2205.14135): Algorithms 1 and 4, causal: row r sees columns c ≤ r + Nk − Nq.

The difference from flash1.py is which tiles the loops visit: those wholly in the future are never computed, in the forward or in the
backward; of the others only those that the diagonal cuts get a mask. Aligned bottom-right, so that the last row sees every column,
whatever Nq and Nk are: with Nq > Nk the first Nq − Nk rows attend nothing. A mask, if given, must allow too.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .dropout import Dropout
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
def flash_attention_causal_forward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1 over the tiles that the diagonal leaves. Arguments, result and observe as in `flash_attention_forward`."""
    B, H, Nq, D = Q.shape
    Nk, Dv = V.shape[2:]
    offset = Nk - Nq
    dtype = sum_dtype(Q)
    block_q, block_k = block_size(block_q, BLOCK_Q), block_size(block_k, BLOCK_K)
    scale = D**-0.5 if scale is None else scale
    mask = broadcast_mask(mask, B, H, Nq, Nk)
    S_memory = fast_memory(Q, K, block_q, block_k)
    P_memory = S_memory if observe is None else torch.empty_like(S_memory)  # P overwrites S unless somebody is watching
    O = Q.new_zeros(B, H, Nq, Dv, dtype=dtype)  # line 2
    l = Q.new_zeros(B, H, Nq, 1, dtype=dtype)
    m = torch.full_like(l, lowest(dtype))

    for j in blocks(0, Nk, block_k):  # line 5
        Kj, Vj = tile(K, j), tile(V, j)  # line 6, (B, Hkv, Bk, D), (B, Hkv, Bk, Dv)

        for i in blocks(max(0, j.start - offset), Nq, block_q):  # line 7, from the first row that sees the first of these columns
            Qi = tile(Q, i) * scale  # line 8, (B, H, Bq, D)
            Oi, li, mi = O[:, :, i], l[:, :, i], m[:, :, i]  # line 8, (B, H, Bq, Dv), (B, H, Bq, 1), (B, H, Bq, 1)
            S = matmul_into(S_memory, Qi, Kj.mT, LOG2_E)  # line 9, in base 2; (B, H, Bq, Bk)
            hide_(S, mask, i, j)
            hide_future_(S, i, j, offset)
            m_tile = S.amax(-1, keepdim=True).clamp_(min=lowest(dtype))  # line 10
            P = exp2_minus(P_memory, S, m_tile)  # line 10
            l_tile = P.sum(-1, keepdim=True)  # line 10; before dropout: softmax is normalised over all that a row may attend
            m_new = torch.maximum(mi, m_tile)  # line 11
            old, new = (mi - m_new).exp2() * li, (m_tile - m_new).exp2()  # what the past and this tile weigh against the new maximum
            l_new = old + new * l_tile  # line 11
            if dropout is not None:
                P.mul_(dropout.tile(i, j, dtype))
            # l = 0 while a row has met only masked columns: O stays 0
            divisor = l_new if mask is None else l_new.masked_fill(l_new == 0, 1)
            O[:, :, i] = add_matmul_(Oi * (old / divisor), P * (new / divisor), Vj)  # line 12: O is divided by l in every step
            l[:, :, i], m[:, :, i] = l_new, m_new  # line 13
            if observe is not None:
                observe(i=i, j=j, S=natural(S), P=P, m=natural(m_new), l=l_new, O=O[:, :, i])
    return O.to(Q.dtype), l.squeeze(-1), natural(m).squeeze(-1)


@torch.no_grad()
def flash_attention_causal_backward(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    mask: Tensor | None,
    O: Tensor,
    l: Tensor,
    m: Tensor,
    dO: Tensor,
    dLSE: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout: Dropout | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
    observe: Callable | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 4 over the tiles that the diagonal leaves. Arguments, result and observe as in `flash_attention_backward`."""
    B, H, Nq, D = Q.shape
    Nk = K.shape[2]
    offset = Nk - Nq
    dtype = sum_dtype(Q)
    block_q, block_k = block_size(block_q, BLOCK_Q), block_size(block_k, BLOCK_K)
    scale = D**-0.5 if scale is None else scale
    mask = broadcast_mask(mask, B, H, Nq, Nk)
    S_memory, dP_memory = fast_memory(Q, K, block_q, block_k), fast_memory(Q, K, block_q, block_k)
    P_memory, dS_memory = (S_memory, dP_memory) if observe is None else (torch.empty_like(S_memory), torch.empty_like(dP_memory))
    dQ = Q.new_zeros(Q.shape, dtype=dtype)  # line 5
    dK, dV = K.new_empty(K.shape), V.new_empty(V.shape)
    dead = l == 0  # rows that attend nothing: every S is −∞, so P = 2^(−∞ − 0) / 1 = 0
    l, m = l.masked_fill(dead, 1), (m * LOG2_E).masked_fill_(dead, 0)
    if mask is not None:
        dO, dLSE = hide_dead(dead, dO, dLSE)

    for j in blocks(0, Nk, block_k):  # line 6
        Kj, Vj = tile(K, j), tile(V, j)  # line 7
        dKj, dVj = Kj.new_zeros(Kj.shape), Vj.new_zeros(Vj.shape)  # line 8

        for i in blocks(max(0, j.start - offset), Nq, block_q):  # line 9, from the first row that sees the first of these columns
            Qi, Oi, dOi = tile(Q, i) * scale, tile(O, i), tile(dO, i)  # line 10
            li, mi = l[:, :, i, None], m[:, :, i, None]  # (B, H, Bq, 1)
            S = matmul_into(S_memory, Qi, Kj.mT, LOG2_E)  # line 11, in base 2; (B, H, Bq, Bk)
            hide_(S, mask, i, j)  # line 12
            hide_future_(S, i, j, offset)
            P = exp2_minus(P_memory, S, mi).div_(li)  # line 13
            dP = matmul_into(dP_memory, dOi, Vj.mT)  # line 17
            if dropout is None:
                add_matmul_mT_(dVj, P, dOi)  # line 16
            else:
                Z = dropout.tile(i, j, dtype)  # line 14: the forward's mask, drawn again from its counters
                add_matmul_mT_(dVj, P * Z, dOi)  # lines 15, 16
                dP.mul_(Z)  # line 18
            Di = (dOi * Oi).sum(-1, keepdim=True)  # line 19: = rowsum(P∘dP), without needing the whole row of P
            if dLSE is not None:
                Di -= dLSE[:, :, i, None]  # ∂LSE/∂S = P, so dS = P∘(dP − D) + P∘dLSE
            dS = torch.sub(dP, Di, out=dS_memory[: dP.numel()].view_as(dP)).mul_(P)  # line 20
            add_matmul_(dQ[:, :, i], dS, Kj * scale)  # line 21
            add_matmul_mT_(dKj, dS, Qi)  # line 22; Qi carries the scale
            if observe is not None:
                observe(i=i, j=j, S=natural(S), P=P, dP=dP, dS=dS, dQ=dQ[:, :, i], dK=dKj, dV=dVj)

        dK[:, :, j], dV[:, :, j] = dKj, dVj  # line 24
    return dQ.to(Q.dtype), dK, dV

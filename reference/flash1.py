"""FlashAttention (Dao, Fu, Ermon, Rudra, Ré 2022, arXiv:2205.14135): Algorithms 1 and 4, with any mask, window or packed documents.

K and V blocks are the outer loop: each is loaded once, while O, l and m of every block of rows move back and forth between slow and fast
memory.
"line n" below is line n of the paper's algorithm; the paper's Algorithm 2 is Algorithm 1 with mask and dropout, which are included here.

S and P exist one tile at a time. `observe`, if given, is called after every tile with the variables below as keywords: that is how the
notebooks step through this very code. The tensors it gets are overwritten later, so it must copy what it keeps.
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
    lowest,
    matmul_into,
    natural,
    sum_dtype,
    tile,
)
from .visible import Visible

BLOCK_Q = 512
BLOCK_K = 512


@torch.no_grad()
def flash_attention_forward(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout: Dropout | None = None,
    visible: Visible | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
    observe: Callable | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1. Q (B, H, Nq, D), K (B, Hkv, Nk, D), V (B, Hkv, Nk, Dv) → O (B, H, Nq, Dv) in Q's dtype, l and m (B, H, Nq).

    mask: bool, (B, Nk) or broadcastable to (B, H, Nq, Nk), True = may attend. A row that may attend nothing gets O = 0, l = 0.
    scale: 1/√D unless given. visible: which columns each row sees; all unless given. block_q, block_k: rows and columns of a tile.
    observe(i, j, S, P, m, l, O): slices i and j, S and P of this tile (B, H, Bq, Bk), and of rows i so far m, l (B, H, Bq, 1) and
    O (B, H, Bq, Dv), which is the attention over the columns seen so far. P is relative to this tile's own maximum.
    """
    B, H, Nq, D = Q.shape
    Nk, Dv = V.shape[2:]
    dtype = sum_dtype(Q)
    block_q, block_k = block_size(block_q, BLOCK_Q), block_size(block_k, BLOCK_K)
    scale = D**-0.5 if scale is None else scale
    mask = broadcast_mask(mask, B, H, Nq, Nk)
    visible = Visible(Nq, Nk) if visible is None else visible
    S_memory = fast_memory(Q, K, block_q, block_k)
    P_memory = S_memory if observe is None else torch.empty_like(S_memory)  # P overwrites S unless `observe` needs both
    O = Q.new_zeros(B, H, Nq, Dv, dtype=dtype)  # line 2
    l = Q.new_zeros(B, H, Nq, 1, dtype=dtype)
    m = torch.full_like(l, lowest(dtype))

    for j in blocks(0, Nk, block_k):  # line 5
        Kj, Vj = tile(K, j), tile(V, j)  # line 6, (B, Hkv, Bk, D), (B, Hkv, Bk, Dv)

        for i in visible.tiles_of_rows(j, block_q):  # line 7
            Qi = tile(Q, i) * scale  # line 8, (B, H, Bq, D)
            Oi, li, mi = O[:, :, i], l[:, :, i], m[:, :, i]  # line 8, (B, H, Bq, Dv), (B, H, Bq, 1), (B, H, Bq, 1)
            S = matmul_into(S_memory, Qi, Kj.mT, LOG2_E)  # line 9, in base 2; (B, H, Bq, Bk)
            visible.hide_(hide_(S, mask, i, j), i, j)
            m_tile = S.amax(-1, keepdim=True).clamp_(min=lowest(dtype))  # line 10
            P = exp2_minus(P_memory, S, m_tile)  # line 10
            l_tile = P.sum(-1, keepdim=True)  # line 10; before dropout: softmax is normalised over all that a row may attend
            m_new = torch.maximum(mi, m_tile)  # line 11
            old, new = (mi - m_new).exp2() * li, (m_tile - m_new).exp2()  # what the past and this tile weigh against the new maximum
            l_new = old + new * l_tile  # line 11
            if dropout is not None:
                P.mul_(dropout.tile(i, j, dtype))
            # l = 0 while a row has met only hidden columns: O stays 0
            divisor = l_new if mask is None and visible.whole(i, j) else l_new.masked_fill(l_new == 0, 1)
            O[:, :, i] = add_matmul_(Oi * (old / divisor), P * (new / divisor), Vj)  # line 12: O is divided by l in every step
            l[:, :, i], m[:, :, i] = l_new, m_new  # line 13
            if observe is not None:
                observe(i=i, j=j, S=natural(S), P=P, m=natural(m_new), l=l_new, O=O[:, :, i])
    return O.to(Q.dtype), l.squeeze(-1), natural(m).squeeze(-1)


@torch.no_grad()
def flash_attention_backward(
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
    visible: Visible | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
    observe: Callable | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 4. O, l, m from the forward, dO (B, H, Nq, Dv), dLSE (B, H, Nq) or None → dQ, dK, dV, shaped and typed as Q, K, V.

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
    dQ = Q.new_zeros(Q.shape, dtype=dtype)  # line 5
    dK, dV = K.new_empty(K.shape), V.new_empty(V.shape)
    dead = l == 0  # rows that attend nothing: every S is −∞, so P = 2^(−∞ − 0) / 1 = 0
    l, m = l.masked_fill(dead, 1), (m * LOG2_E).masked_fill_(dead, 0)
    if mask is not None or visible.blinds:
        dO, dLSE = hide_dead(dead, dO, dLSE)

    for j in blocks(0, Nk, block_k):  # line 6
        Kj, Vj = tile(K, j), tile(V, j)  # line 7
        dKj, dVj = Kj.new_zeros(Kj.shape), Vj.new_zeros(Vj.shape)  # line 8

        for i in visible.tiles_of_rows(j, block_q):  # line 9
            Qi, Oi, dOi = tile(Q, i) * scale, tile(O, i), tile(dO, i)  # line 10
            li, mi = l[:, :, i, None], m[:, :, i, None]  # (B, H, Bq, 1)
            S = matmul_into(S_memory, Qi, Kj.mT, LOG2_E)  # line 11, in base 2; (B, H, Bq, Bk)
            visible.hide_(hide_(S, mask, i, j), i, j)  # line 12
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

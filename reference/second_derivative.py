"""The derivative of the backward pass, for gradient penalties, Hessian-vector products and gradgradcheck.

The backward is itself a function (dO, dLSE, Q, K, V) → (dQ, dK, dV). Written out for a block of rows,

    S = scale · Q Kᵀ      P = softmax(S)      T = P∘Z      dP = (dO Vᵀ)∘Z      dS = P∘(dP − D + dLSE),  D = rowsum(P∘dP)
    dQ = scale · dS K     dK = scale · dSᵀ Q     dV = Tᵀ dO

(Z is dropout's factor), reverse mode through these lines from cotangents gQ, gK, gV of dQ, dK, dV gives the lines of the loop below. Rows
of attention do not see each other, so the loop runs over blocks of rows: memory is linear in N, as everywhere.
"""

import torch
from torch import Tensor

from .dropout import Dropout
from .tiles import block_size, blocks, broadcast_mask, hide_, hide_dead, hide_future_, sum_dtype, sum_groups, tile

BLOCK_Q = 128


@torch.no_grad()
def flash_attention_second_backward(
    gQ: Tensor,
    gK: Tensor,
    gV: Tensor,
    dO: Tensor,
    dLSE: Tensor | None,
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    mask: Tensor | None,
    LSE: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout: Dropout | None = None,
    block_q: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Cotangents of dO (B, H, Nq, Dv), dLSE (B, H, Nq), Q, K and V, from gQ, gK, gV shaped as Q, K, V."""
    B, H, Nq, D = Q.shape
    Hkv, Nk = K.shape[1:3]
    dtype = sum_dtype(Q)
    scale = D**-0.5 if scale is None else scale
    mask = broadcast_mask(mask, B, H, Nq, Nk)
    block_q = block_size(block_q, BLOCK_Q)
    dead = LSE.isneginf()  # rows that attend nothing
    if mask is not None or (causal and Nq > Nk):
        gQ, dO, dLSE = hide_dead(dead, gQ, dO, dLSE)
    columns = slice(0, Nk)
    K_all, V_all, gK_all, gV_all = (tile(X, columns, H) for X in (K, V, gK, gV))
    to_dO, to_dLSE = dO.new_empty(dO.shape, dtype=dtype), LSE.new_empty(LSE.shape)
    to_Q, to_K, to_V = Q.new_empty(Q.shape, dtype=dtype), K_all.new_zeros(K_all.shape), V_all.new_zeros(V_all.shape)

    for i in blocks(0, Nq, block_q):
        Qi, dOi, gQi = tile(Q, i, H), tile(dO, i, H), tile(gQ, i, H)
        S = Qi @ K_all.mT * scale  # (B, H, Bq, Nk)
        hide_(S, mask, i, columns)
        if causal:
            hide_future_(S, i, columns, Nk - Nq)
        P = S.softmax(-1).masked_fill_(dead[:, :, i, None], 0)  # from the whole row, not from LSE, which large scores leave few digits
        Z = 1 if dropout is None else dropout.tile(i, columns, dtype)
        T, dP = P * Z, (dOi @ V_all.mT) * Z
        inner = dP - (P * dP).sum(-1, keepdim=True)  # dP − D + dLSE, so that dS = P∘inner
        if dLSE is not None:
            inner += dLSE[:, :, i, None]
        dS = P * inner

        from_dS = scale * (gQi @ K_all.mT + Qi @ gK_all.mT)  # what dQ and dK hand back to dS
        weight = (P * from_dS).sum(-1, keepdim=True)  # what D and dLSE hand back
        from_dP = P * (from_dS - weight) * Z
        from_P = from_dS * inner - weight * dP + (dOi @ gV_all.mT) * Z
        from_S = scale * P * (from_P - (P * from_P).sum(-1, keepdim=True))  # through softmax

        to_dO[:, :, i] = T @ gV_all + from_dP @ V_all
        to_dLSE[:, :, i] = weight.squeeze(-1)
        to_Q[:, :, i] = scale * dS @ gK_all + from_S @ K_all
        to_K += scale * dS.mT @ gQi + from_S.mT @ Qi
        to_V += from_dP.mT @ dOi
    return to_dO.to(dO.dtype), to_dLSE, to_Q.to(Q.dtype), sum_groups(to_K, Hkv).to(K.dtype), sum_groups(to_V, Hkv).to(V.dtype)

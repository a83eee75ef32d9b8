"""Attention by its definition: the whole N × N matrix of scores, softmax, times V. Everything else in this project is checked against
this file.

    S = score(scale · Q Kᵀ),  P = softmax(S) over the columns that a row may attend,  O = P V,  LSE = log Σ exp(S)

Memory grows with Nq · Nk. Plain differentiable PyTorch in the inputs' dtype: autograd and `torch.func` see every step.
"""

import math

from einops import einsum, repeat
from torch import Tensor

from .dropout import Dropout
from .score import Score, broadcast_alibi, broadcast_bias
from .tiles import broadcast_mask
from .visible import Visible


def normal_attention(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout: Dropout | None = None,
    visible: Visible | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    alibi: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Q (B, H, Nq, D), K (B, Hkv, Nk, D), V (B, Hkv, Nk, Dv) → O (B, H, Nq, Dv), and LSE (B, H, Nq) if asked for.

    mask: bool, (B, Nk) for keys or broadcastable to (B, H, Nq, Nk), True = may attend. A row that may attend nothing gets O = 0, LSE =
    −inf and zero gradients. visible: which columns each row sees; all unless given. scale: 1/√D unless given.
    softcap, bias (broadcasts to (B, H, Nq, Nk)), alibi (slopes, (H,) or (B, H)): score.py; a bias below −2¹²⁶ hides, as a mask does.
    """
    B, H, Nq, D = Q.shape
    Hkv, Nk = K.shape[1:3]
    if Hkv != H:  # grouped-query attention: query head h reads key/value head h // (H / Hkv)
        K, V = (repeat(X, "b h n d -> b (h group) n d", group=H // Hkv) for X in (K, V))
    S = einsum(Q * (D**-0.5 if scale is None else scale), K, "b h i d, b h j d -> b h i j")

    rows, columns = slice(0, Nq), slice(0, Nk)
    diagonal = Nk - Nq if visible is None else visible.place(0)
    bias = None if bias is None else broadcast_bias(bias, B, H, Nq, Nk)
    score = Score.of(softcap, bias, None if alibi is None else broadcast_alibi(alibi, B, H), diagonal)
    if score is not None:
        S = score(S, rows, columns)

    dead = None
    if mask is not None:
        # Checked here, then used in its own shape: a (B, 1, 1, Nk) mask costs B·Nk work, not B·H·Nq·Nk.
        broadcast_mask(mask, B, H, Nq, Nk)
        mask = mask[:, None, None, :] if mask.shape == (B, Nk) else mask
    if visible is not None:
        seen = visible.dense(rows, columns, Q.device)
        mask = seen if mask is None else mask & seen
    if bias is not None:
        mask = score.sees(rows, columns) if mask is None else mask & score.sees(rows, columns)
    if mask is not None:
        dead = ~mask.any(
            -1, keepdim=True
        )  # rows that attend nothing: their scores stay unmasked, which avoids NaN, and their result is set to zero below
        S = S.masked_fill(~(mask | dead), -math.inf)

    P = S.softmax(-1) if Nk else S
    if dropout is not None:
        P = P * dropout.tile(rows, columns, P.dtype)
    O = P @ V
    if dead is not None:
        O = O.masked_fill(dead, 0)
    if not return_lse:
        return O
    LSE = S.logsumexp(-1)
    return O, LSE if dead is None else LSE.masked_fill(dead.squeeze(-1), -math.inf)


def normal_attention_causal(Q: Tensor, K: Tensor, V: Tensor, mask: Tensor | None = None, **options) -> Tensor | tuple[Tensor, Tensor]:
    """Row r sees columns c ≤ r + Nk − Nq (aligned bottom-right), and only those that `mask`, if given, allows too. Otherwise as
    `normal_attention`."""
    return normal_attention(Q, K, V, mask, visible=Visible(Q.shape[2], K.shape[2], right=0), **options)

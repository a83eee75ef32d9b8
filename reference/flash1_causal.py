"""FlashAttention (Dao, Fu, Ermon, Rudra, Ré 2022, arXiv:2205.14135), Algorithms 1 and 4, causal: row r sees columns c ≤ r + Nk − Nq.

This file has no loop: it calls flash1.py's with `Visible(right=0)`. It exists so that causal attention has a name in checks and lessons,
and a default tile height of its own. visible.py decides which tiles the loops visit: a tile that lies wholly in the future is never
computed, in the forward or in the backward, and only tiles that the diagonal cuts are masked in part. The diagonal is aligned
bottom-right: the last row sees every column, whatever Nq and Nk are, and with Nq > Nk the first Nq − Nk rows attend nothing. A mask, if
given, hides further elements.
"""

from torch import Tensor

from .flash1 import flash_attention_backward, flash_attention_forward
from .visible import Visible

BLOCK_Q = 256  # shorter tiles than flash1.py's: fewer hidden scores are computed where the diagonal cuts a tile


def flash_attention_causal_forward(
    Q: Tensor, K: Tensor, V: Tensor, mask: Tensor | None = None, *, block_q: int | None = None, **options
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1 over the tiles that the diagonal leaves. Arguments, result and observe as in `flash_attention_forward`."""
    visible = Visible(Q.shape[2], K.shape[2], right=0)
    return flash_attention_forward(Q, K, V, mask, visible=visible, block_q=BLOCK_Q if block_q is None else block_q, **options)


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
    block_q: int | None = None,
    **options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 4 over the tiles that the diagonal leaves. Arguments, result and observe as in `flash_attention_backward`."""
    options["visible"] = Visible(Q.shape[2], K.shape[2], right=0)
    return flash_attention_backward(Q, K, V, mask, O, l, m, dO, dLSE, block_q=BLOCK_Q if block_q is None else block_q, **options)

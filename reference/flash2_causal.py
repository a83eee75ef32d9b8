"""FlashAttention-2 (Dao 2023, arXiv:2307.08691), Algorithms 1 and 2, causal: row r sees columns c ≤ r + Nk − Nq (section 3.1, "Causal
masking").

This file has no loop: it calls flash2.py's with `Visible(right=0)`. It exists so that causal attention has a name in checks and lessons,
and a default tile height of its own. visible.py decides which tiles the loops visit: a tile that lies wholly in the future is never
computed, in the forward or in the backward, and only tiles that the diagonal cuts are masked in part. The diagonal is aligned
bottom-right: the last row sees every column, whatever Nq and Nk are, and with Nq > Nk the first Nq − Nk rows attend nothing. A mask, if
given, hides further elements.
"""

from torch import Tensor

from .flash2 import flash_attention2_backward, flash_attention2_forward
from .visible import Visible

BLOCK_Q = 256  # shorter tiles than flash2.py's: fewer hidden scores are computed where the diagonal cuts a tile


def flash_attention2_causal_forward(
    Q: Tensor, K: Tensor, V: Tensor, mask: Tensor | None = None, *, block_q: int | None = None, **options
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 over the tiles that the diagonal leaves. Arguments, result and observe as in `flash_attention2_forward`."""
    visible = Visible(Q.shape[2], K.shape[2], right=0)
    return flash_attention2_forward(Q, K, V, mask, visible=visible, block_q=BLOCK_Q if block_q is None else block_q, **options)


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
    block_q: int | None = None,
    **options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 2 over the tiles that the diagonal leaves. Arguments, result and observe as in `flash_attention2_backward`."""
    options["visible"] = Visible(Q.shape[2], K.shape[2], right=0)
    return flash_attention2_backward(Q, K, V, mask, O, LSE, dO, dLSE, block_q=BLOCK_Q if block_q is None else block_q, **options)

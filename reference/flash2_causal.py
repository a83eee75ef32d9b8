"""FlashAttention-2 (Dao 2023, arXiv:2307.08691), Algorithms 1 and 2, causal: row r sees columns c ≤ r + Nk − Nq (section 3.1, "Causal
masking").

The algorithms are flash2.py's; what is causal about them is which tiles the loops visit, and visible.py says that: those wholly in the
future are never computed, in the forward or in the backward; of the others only those that the diagonal cuts are hidden in part. Aligned
bottom-right, so that the last row sees every column, whatever Nq and Nk are: with Nq > Nk the first Nq − Nk rows attend nothing. A mask,
if given, must allow too.
"""

from torch import Tensor

from .flash2 import flash_attention2_backward, flash_attention2_forward
from .visible import Visible

BLOCK_Q = 256  # fewer rows than without the diagonal: less of its tiles is computed in vain


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

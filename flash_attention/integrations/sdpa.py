"""`flash_attention()` in place of `torch.nn.functional.scaled_dot_product_attention`: same arguments, same results."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

from flash_attention.interface import DTYPES, flash_attention

_torch_attention = functional.scaled_dot_product_attention  # what calls fall back on
_lock = threading.Lock()
_open = 0  # how many `with` blocks are open now, in all threads


@contextmanager
def use_flash_attention() -> Iterator[None]:
    """Inside the `with`, `torch.nn.functional.scaled_dot_product_attention` runs on this project.

    Calls that `flash_attention()` has no counterpart for run on torch's own function as before: a float `attn_mask` (which is added to the
    scores), `attn_mask` together with `is_causal` (some versions of torch refuse it), nested tensors, other dtypes, dropout_p = 1.

    The function is replaced in its module, so every thread sees it for as long as any thread is inside; the last one to leave puts the
    original back, after an exception too. Blocks may be nested. Not reached: modules that imported the function by its name before, and
    what does not call it (nn.MultiheadAttention with need_weights=True, and its fused path for inference; its masks are float ones).
    Dropout draws this project's random bits. `torch.nn.attention.sdpa_kernel` has no effect on the calls that are served.

    >>> with use_flash_attention():
    ...     O = torch.nn.functional.scaled_dot_product_attention(*torch.randn(3, 2, 8, 100, 64), is_causal=True)
    """
    global _open, _torch_attention
    with _lock:
        if not _open:
            _torch_attention = functional.scaled_dot_product_attention
            functional.scaled_dot_product_attention = scaled_dot_product_attention
        _open += 1
    try:
        yield
    finally:
        with _lock:
            _open -= 1
            if not _open:
                functional.scaled_dot_product_attention = _torch_attention


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As `torch.nn.functional.scaled_dot_product_attention`, whose documentation holds.

    query (…, H, Lq, E), key (…, Hkv, Lk, E), value (…, Hkv, Lk, Ev) → (…, H, Lq, Ev). Any number of leading dimensions, none included;
    they broadcast, and so do the heads unless enable_gqa. attn_mask: bool, True = may attend, broadcasts to (…, H, Lq, Lk). is_causal is
    aligned top-left here, as torch has it: row i sees columns j ≤ i.

    Raises:
        RuntimeError: shapes do not broadcast. Otherwise as `flash_attention()`.
    """
    if not _served(query, key, value, attn_mask, dropout_p, is_causal):
        return _torch_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    Lq, Lk = query.shape[-2], key.shape[-2]
    if is_causal and Lk > Lq:  # no row sees a column from Lq on; without those, top-left and bottom-right are the same
        key, value = key[..., :Lq, :], value[..., :Lq, :]
    elif is_causal and Lk < Lq:
        attn_mask, is_causal = torch.ones(Lq, Lk, dtype=torch.bool, device=query.device).tril_(), False

    dims = max(x.dim() for x in (query, key, value))
    tensors = [x[(None,) * (4 - x.dim())] for x in (query, key, value)]  # at least 4 dimensions each
    batch = torch.broadcast_shapes(*(x.shape[:-3] for x in tensors))
    heads = [x.shape[-3] for x in tensors]
    if not enable_gqa:
        heads = torch.broadcast_shapes(*((h,) for h in heads)) * 3
    q, k, v = (x.expand(*batch, h, -1, -1).flatten(0, -4) for x, h in zip(tensors, heads, strict=True))  # (B, H or Hkv, L, E)
    # Always in four dimensions: `flash_attention()` would take a (Lq, Lk) mask with Lq = B for a key mask.
    mask = None if attn_mask is None else attn_mask.expand(*batch, heads[0], Lq, Lk).flatten(0, -4)  # (B, H, Lq, Lk)
    O = flash_attention(q, k, v, mask, causal=is_causal, scale=scale, dropout_p=dropout_p)  # (B, H, Lq, Ev)
    return O.unflatten(0, batch)[(0,) * (4 - dims)]


def _served(query, key, value, attn_mask, dropout_p, is_causal) -> bool:
    tensors = all(isinstance(x, Tensor) and not x.is_nested and x.dim() >= 2 and x.dtype in DTYPES for x in (query, key, value))
    mask = attn_mask is None or (attn_mask.dtype == torch.bool and not is_causal)
    return tensors and mask and dropout_p < 1

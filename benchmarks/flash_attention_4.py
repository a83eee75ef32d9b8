"""FlashAttention-4 (arXiv:2603.05451) as its authors publish it, where their package `flash-attn-4` is installed. It is written in Python
and compiled by NVIDIA's CUTLASS DSL at the first call of each kind, which takes about ten seconds."""

import importlib.util
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from benchmarks.case import Case

PLACE = "flash_attn.cute"


@cache
def function() -> Callable | None:
    """Its flash_attn_func: (B, N, H, D) → O of that shape, with gradients. None: it is not installed.

    Raises:
        ImportError: it is installed, but something that it needs is not.
    """
    if not (importlib.util.find_spec("flash_attn") and importlib.util.find_spec(PLACE)):
        return None
    from flash_attn.cute import flash_attn_func

    return flash_attn_func


def why_not(case: Case) -> str | None:
    """Why it is not measured here, or None."""
    if torch.device(case.device).type != "cuda" or torch.cuda.get_device_capability(case.device) < (9, 0):
        return "it runs from compute capability 9.0 on"
    if case.dtype == "float32":
        return "it takes float16 and bfloat16"
    if case.documents:
        return "documents are not measured with it"
    if reason := case.beyond_official_kernels():
        return reason
    return None if function() else f"{PLACE} is not installed"


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None = None) -> Tensor:
    """(B, H, N, D) → (B, H, N, Dv), with gradients; causal is aligned bottom-right. window: how many columns before its own a row sees."""
    options = {"causal": causal} if window is None else {"window_size": (window, 0 if causal else None)}
    O = function()(*(x.transpose(1, 2) for x in (q, k, v)), **options)
    return (O[0] if isinstance(O, tuple) else O).transpose(1, 2)

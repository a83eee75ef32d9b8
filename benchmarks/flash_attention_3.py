"""FlashAttention-3 as its authors build it, where it is installed: in their own package, in xformers' wheel, which contains it too, or in
the library that the environment variable FLASH_ATTN_3_LIBRARY names."""

import importlib.util
import os
from functools import cache
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.case import Case

PLACES = ("flash_attn_3", "xformers.flash_attn_3")  # packages that hold its library, _C*.so


@cache
def operators():
    """torch.ops.flash_attn_3, or None: it is not installed, or cannot be loaded here.

    Raises:
        OSError: the library that FLASH_ATTN_3_LIBRARY names cannot be loaded.
    """
    if named := os.environ.get("FLASH_ATTN_3_LIBRARY"):
        torch.ops.load_library(named)
        return torch.ops.flash_attn_3
    for place in PLACES:
        package, _, folder = place.partition(".")
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            for library in sorted((Path(root) / folder).glob("_C*.so")):
                try:
                    torch.ops.load_library(str(library))
                except OSError:
                    continue
                return torch.ops.flash_attn_3
    return None


def why_not(case: Case) -> str | None:
    """Why it is not measured here, or None."""
    if torch.device(case.device).type != "cuda" or torch.cuda.get_device_capability(case.device) != (9, 0):
        return "it runs on compute capability 9.0 alone"
    if reason := case.beyond_official_kernels():
        return reason
    return None if operators() else f"it was found in neither {' nor '.join(PLACES)}"


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """(B, H, N, D) → (B, H, Nq, Dv), without gradients; causal is aligned bottom-right."""
    return operators().fwd(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal)[0].transpose(1, 2)


class _Attention(torch.autograd.Function):
    """Its two operators take (B, N, H, D), or, with several sequences packed, (N, H, D)."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
        q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
        O, LSE, *_ = operators().fwd(q, k, v, **options)
        ctx.save_for_backward(q, k, v, O, LSE)
        ctx.options = options
        return O.transpose(-3, -2)

    @staticmethod
    def backward(ctx, dO: Tensor):
        q, k, v, O, LSE = ctx.saved_tensors
        gradients = tuple(torch.empty_like(x) for x in (q, k, v))
        dq, dk, dv = gradients
        operators().bwd(dO.transpose(-3, -2), q, k, v, O, LSE, dq=dq, dk=dk, dv=dv, **ctx.options)
        return (*(x.transpose(-3, -2) for x in gradients), None)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None = None, documents: tuple[int, ...] = ()) -> Tensor:
    """(B, H, N, D) → (B, H, N, Dv), with gradients; causal is aligned bottom-right. window: how many columns before its own a row sees.
    documents: lengths of the sequences packed one after another, of a batch of one."""
    options = {"is_causal": causal}
    if window is not None:
        options = {"is_causal": False, "window_size_left": window, "window_size_right": 0 if causal else -1}
    if not documents:
        return _Attention.apply(q, k, v, options)
    options |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), _ends(documents, q.device))
    options |= dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), max(documents))
    # Not q[0]: its backward would copy each gradient into a tensor of zeros, on FlashAttention-3's clock.
    return _Attention.apply(*(x.squeeze(0) for x in (q, k, v)), options).unsqueeze(0)


@cache
def _ends(documents: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each document begins, and the last one ends; on the device before the clock starts."""
    return torch.tensor((0, *accumulate(documents)), dtype=torch.int32, device=device)

"""A call like one before it: straight to its kernel.

On the host, most of a small call's time goes into checking it, choosing a backend and preparing the launch. Shapes, strides, dtypes
and settings determine all of that: for the plainest kind of call (no mask, no dropout, no gradients, nobody looking on) the launch is
kept, and the next such call only fills in addresses.
"""

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flash_attention import allocate
from flash_attention.backends import cuda
from flash_attention.backends.launch import Launch

CAPACITY = 1024  # of kept launches: where lengths grow without end, the table starts anew


class Kept(NamedTuple):
    launch: Launch
    O_is_like_q: bool  # allocate.is_like, not to be worked out again


_kept: dict[Hashable, Kept] = {}


def nobody_looks_on(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """No compiler, tracer or profiler, no functorch transform, no torch_dispatch mode, no subclass of Tensor, no meta device. Then a
    backend may be called without going through its op."""
    return (
        not torch.compiler.is_compiling()
        and type(q) is type(k) is type(v) is Tensor
        and not q.is_meta
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
        and not torch.autograd.profiler._is_profiler_enabled
    )


def signature(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, dropout_p: float, backend: str | None) -> Hashable | None:
    """What determines the launch of this call, or None if it is not of the plainest kind. Nothing has been checked yet."""
    plain = (
        nobody_looks_on(q, k, v)
        and q.is_cuda
        and q.layout is k.layout is v.layout is torch.strided
        and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cuda")
        # By type, because True == 1 and 0.0 == False, of which only one is a valid argument.
        and type(causal) is bool
        and (scale is None or type(scale) is float)
        and type(dropout_p) is float
        and dropout_p == 0
        and (backend is None or type(backend) is str)
    )
    if not plain:
        return None
    try:
        shapes, strides = (q.shape, k.shape, v.shape), (q.stride(), k.stride(), v.stride())
    except RuntimeError:  # of a nested tensor, which has no shape and is refused later
        return None
    dtypes = q.dtype, k.dtype, v.dtype
    return shapes, strides, dtypes, q.device, k.device, v.device, causal, scale, backend


def repeat(call: Hashable, q: Tensor, k: Tensor, v: Tensor, lse: bool) -> tuple[Tensor, Tensor | None] | None:
    """O and, if asked for, LSE of a call whose launch is kept, or None."""
    kept = _kept.get(call)
    addresses = q.data_ptr(), k.data_ptr(), v.data_ptr()
    if kept is None or (addresses[0] | addresses[1] | addresses[2]) % 16:
        return None
    O = torch.empty_like(q) if kept.O_is_like_q else allocate.output(q, v)
    LSE = allocate.lse(q) if lse else None
    kept.launch(q, (*addresses, O.data_ptr()), (LSE.data_ptr() if lse else 0, 0, 0, 0))
    return O, LSE


def keep(call: Hashable, q: Tensor, k: Tensor, v: Tensor, O: Tensor, causal: bool, scale: float, backend: str) -> None:
    """Prepares the launch of the next call like this one, which has been checked and served by `backend`."""
    launch = cuda.RUNGS[backend].prepare(q, k, v, O, causal, scale) if backend in cuda.RUNGS else None
    if launch is not None:
        if len(_kept) >= CAPACITY:
            _kept.clear()
        _kept[call] = Kept(launch, allocate.is_like(q, q.shape[2], v.shape[3]))

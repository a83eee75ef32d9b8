"""A repeated call goes straight to its kernel.

On the host, most of a small call's time goes into checking it, choosing a backend and making its plan. Shapes, strides, dtypes and settings
determine all of that, so plans are kept. An eager call without spans or changed scores (a mask and dropout are allowed) is recognised by
its arguments, before any check, and only fills in addresses. Any other call is checked first, and then looks up its plan.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flash_attention import backends
from flash_attention.backends import cuda
from flash_attention.call import Call, Settings, allows_tf32

CAPACITY = 1024  # of kept plans: when it is reached, the table is cleared
FEW = 16  # the same for the backwards that a forward's plan keeps


class Kept(NamedTuple):
    plan: cuda.Forward
    settings: Settings
    needs_nothing: bool  # except memory: no mask, no dropout, no copy
    has_backward: bool


_kept: dict[Hashable, Any] = {}  # `signature` → Kept, and (which, call) → plan


def is_eager_call(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a backend may be called without its op: the tensors are plain ones, not on the meta device, and no compiler, tracer,
    profiler, functorch transform or torch_dispatch mode is active."""
    return (
        not torch.compiler.is_compiling()
        and type(q) is type(k) is type(v) is Tensor
        and not q.is_meta
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
        and not torch.autograd.profiler._is_profiler_enabled
    )


def is_eager_backward(q: Tensor, k: Tensor, v: Tensor, *gradients: Tensor | None) -> bool:
    """Whether a backward may be computed without its op: like an eager call, of plain gradients, and not to be differentiated again."""
    return (
        not torch.is_grad_enabled()  # as it is only with create_graph=True, which torch.func always has
        and is_eager_call(q, k, v)
        and forward_ad._current_level < 0
        and all(x is None or _is_plain(x) for x in gradients)
    )


def _is_plain(x: Tensor) -> bool:
    """Whether a kernel may read x at its address: not a subclass, not to be negated by who reads it, and not mapped by
    is_grads_batched=True, whose vmap is older than functorch, so that only the tensors show it."""
    return type(x) is Tensor and not x.is_neg() and not torch._C._functorch.is_legacy_batchedtensor(x)


def signature(q: Tensor, k: Tensor, v: Tensor, mask, causal, scale, dropout_p, window, backend) -> Hashable | None:
    """Everything that determines the plan of this call, or None if the shortcut does not apply to it. Nothing has been checked yet."""
    plain = (
        is_eager_call(q, k, v)
        and q.is_cuda
        and q.layout is k.layout is v.layout is torch.strided
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cuda")
        # By type, because True == 1 and 0.0 == False, of which only one is a valid argument.
        and type(causal) is bool
        and (scale is None or type(scale) is float)
        and type(dropout_p) is float
        and (mask is None or (type(mask) is Tensor and mask.layout is torch.strided))
        and (window is None or type(window) is tuple)
        and (backend is None or type(backend) is str)
    )
    if not plain:
        return None
    try:
        shapes, strides = (q.shape, k.shape, v.shape), (q.stride(), k.stride(), v.stride())
        of_mask = () if mask is None else (mask.shape, mask.stride(), mask.dtype, mask.device, mask.data_ptr() % 16 == 0)
    except RuntimeError:  # a nested tensor has no shape, and is refused later
        return None
    dtypes = q.dtype, k.dtype, v.dtype
    tf32 = q.dtype is torch.float32 and allows_tf32()
    key = shapes, strides, dtypes, q.device, k.device, v.device, causal, scale, dropout_p, window, backend, of_mask, tf32
    return key if window is None else (*key, *map(type, window))


def kept(key: Hashable, q: Tensor, k: Tensor, v: Tensor) -> Kept | None:
    """What was kept from an earlier call like this one, if it serves this one too."""
    try:
        found = _kept.get(key)
    except TypeError:  # a window with unhashable contents, which is refused later
        return None
    if found is None or (found.needs_nothing and (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16):
        return None
    return found


def keep(key: Hashable, plan: Callable, settings: Settings) -> None:
    """Keeps the plan of a call that has been checked."""
    if isinstance(plan, cuda.Forward):
        _keep(key, Kept(plan, settings, plan.is_plain, backends.no_gradients(backends.BACKENDS.get(settings.backend)) is None))


def plan(which: int, call: Call) -> Callable:
    """The plan of the call's forward or backward (`backends.plan`), kept or made now."""
    key = which, call
    if (found := _kept.get(key)) is None:
        found = backends.plan(which, call)
        # Not an emulated one: its source files may change.
        if isinstance(found, (cuda.Forward, cuda.Backward)) and call.q.device.type == "cuda":
            _keep(key, found)
    return found


def plan_backward(arguments: tuple[Tensor | None, ...], settings: tuple, bias=None, alibi=None, to_bias: bool = False) -> Callable:
    """The plan of the backward op for these arguments."""
    dO, _, q, k, v, mask, spans, O, _, _ = arguments
    return plan(cuda.BACKWARD, Call.of(q, k, v, mask, spans, Settings(*settings), O, dO, bias, alibi, to_bias))


def plain_backward(forward: cuda.Forward, dO: Tensor, q: Tensor, k: Tensor, v: Tensor, O: Tensor, LSE: Tensor) -> tuple[Tensor, ...]:
    """dQ, dK and dV after a plain forward plan, which keeps the plans of its backwards. These differ only in strides: of dO, and of tensors
    that hooks have saved (torch.autograd.graph.saved_tensors_hooks).
    """
    key = dO.stride(), q.stride(), k.stride(), v.stride(), O.stride()
    known = forward.gradients.backwards
    if (found := known.get(key)) is None:
        settings = forward.call.settings
        made = plan(cuda.BACKWARD, Call.of(q, k, v, None, None, settings, O, dO))
        found = made, isinstance(made, cuda.Backward) and made.is_plain
        if len(known) >= FEW:
            known.clear()
        known[key] = found
    backward, is_plain = found
    if is_plain and LSE.is_contiguous():
        addresses = a, b, c, d, e = q.data_ptr(), k.data_ptr(), v.data_ptr(), O.data_ptr(), dO.data_ptr()
        if not (a | b | c | d | e) % 16:
            return backward.repeat(q, k, v, LSE, addresses)
    return backward(dO, None, q, k, v, None, None, O, LSE, None)


def _keep(key: Hashable, plan) -> None:
    if len(_kept) >= CAPACITY:
        _kept.clear()
    _kept[key] = plan

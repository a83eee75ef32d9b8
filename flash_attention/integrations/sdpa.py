"""`flash_attention()` in place of `torch.nn.functional.scaled_dot_product_attention`: same arguments, same results."""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode, has_torch_function

from flash_attention.backends import cuda
from flash_attention.interface import DTYPES, NUMBERS, _autocasts, flash_attention

TORCHS_OWN = torch._C._nn.scaled_dot_product_attention  # torch.nn.functional's function, before any patch


@contextmanager
def use_flash_attention() -> Iterator[None]:
    """Inside the `with`, `torch.nn.functional.scaled_dot_product_attention` runs on this project.

    Calls without a counterpart in `flash_attention()` reach torch's own function as if nothing were patched, and so do invalid calls, which
    get its exceptions: `attn_mask` together with `is_causal`, nested, sparse and empty tensors, other dtypes, dropout_p = 1, key and value
    with different numbers of heads; and on a GPU, a float `attn_mask` that only `simple` could add to the scores: torch's kernels are
    faster.

    Subclasses of Tensor with a `__torch_function__`, TorchFunctionModes, torch.fx and torch.jit.script see torch's own function, as ever;
    below all modes, a call without such tensors runs here. `torch.nn.attention.bias.causal_lower_right` and `causal_upper_left` are served.

    The function is replaced in its module, so every thread sees the replacement while any thread is inside, autograd's own threads included
    (they recompute checkpointed activations: run the backward inside the `with` too). The last thread to leave restores the original, after
    an exception too, unless other code has patched the function meanwhile: that patch stays, and if it calls this project's replacement,
    torch's own function runs from then on. Blocks may be nested and may be inside a compiled function; a function that was compiled outside
    is compiled again.

    Not reached: modules that imported the function by name before, and code that does not call it (nn.MultiheadAttention with
    need_weights=True, and its fused path for inference; its masks are float). Dropout draws this project's random bits.
    `torch.nn.attention.sdpa_kernel` has no effect on the calls that are served.

    >>> with use_flash_attention():
    ...     O = torch.nn.functional.scaled_dot_product_attention(*torch.randn(3, 2, 8, 100, 64), is_causal=True)
    """
    if torch.compiler.is_compiling():  # a graph can hold a mode but not a change to a module
        with _ServingMode():
            yield
        return
    _patch.update(depth=+1)
    try:
        yield
    finally:
        _patch.update(depth=-1)


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
    """As `torch.nn.functional.scaled_dot_product_attention`, whose documentation holds; on this project where `flash_attention()` has a
    counterpart, in a `with use_flash_attention()` or not.

    query (…, H, Lq, E), key (…, Hkv, Lk, E), value (…, Hkv, Lk, Ev) → (…, H, Lq, Ev). Any number of leading dimensions, none included;
    they broadcast, and so do the heads unless enable_gqa. attn_mask: bool, True = may attend, or float, added to the
    scores and differentiable, broadcasts to (…, H, Lq, Lk). is_causal is aligned top-left here, as torch has it: row i sees columns j ≤ i.
    A row whose float mask is below −2¹²⁶ throughout attends nothing and gives 0, where torch takes the mean for finite ones.

    Raises:
        What torch's own function raises.
    """
    arguments = query, key, value, attn_mask, dropout_p, is_causal
    O = None if has_torch_function(arguments) else _serve(*arguments, scale, enable_gqa)
    return functional.scaled_dot_product_attention(*arguments, scale=scale, enable_gqa=enable_gqa) if O is None else O


# ---- what is served


def _serve(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa) -> Tensor | None:
    """The result, or None if the call must go to torch's own function."""
    if isinstance(scale, Tensor) and scale.dim() == 0 and not scale.requires_grad and not torch.compiler.is_compiling():
        scale = scale.item()
    if not _are_served(query, key, value, dropout_p, is_causal, scale, enable_gqa):
        return None
    Lq, Lk = query.shape[-2], key.shape[-2]
    causal = is_causal  # bottom-right
    if isinstance(attn_mask, CausalBias):
        if type(attn_mask) is not CausalBias or is_causal:
            return None
        lengths, top_left = (attn_mask.seq_len_q, attn_mask.seq_len_kv), attn_mask.variant == CausalVariant.UPPER_LEFT
        is_causal = top_left or lengths[0] == lengths[1]  # as torch defines it, whatever the tensors' lengths
        if not is_causal and lengths != (Lq, Lk):
            return None
        attn_mask, causal = None, True
    if attn_mask is not None and (is_causal or not _is_mask(attn_mask, query, value)):
        return None
    if is_causal and Lk > Lq:  # no row sees a column from Lq on; without those, top-left and bottom-right are the same
        key, value = key[..., :Lq, :], value[..., :Lq, :]
    elif is_causal and Lk < Lq:
        attn_mask, causal = torch.ones(Lq, Lk, dtype=torch.bool, device=query.device).tril_(), False

    tensors = [x if x.dim() >= 4 else x[(None,) * (4 - x.dim())] for x in (query, key, value)]
    H, Hkv = (x.shape[-3] for x in tensors[:2])
    leading = [(*x.shape[:-3], H) if enable_gqa else x.shape[:-2] for x in tensors]
    try:
        of_scores = _broadcast(*leading[:2])  # to which torch broadcasts the mask
        *batch, H = _broadcast(of_scores, leading[2])
        mask = None if attn_mask is None else attn_mask.expand(*of_scores, Lq, key.shape[-2])
    except RuntimeError:  # they do not
        return None
    if mask is not None and attn_mask.dim() > max(query.dim(), key.dim()):
        return None
    q = _in_four_dimensions(tensors[0], batch, H)  # (B, H, Lq, E)
    k, v = (_in_four_dimensions(x, batch, Hkv if enable_gqa else H) for x in tensors[1:])
    # In four dimensions too: `flash_attention()` would take a (Lq, Lk) mask with Lq = B for a key mask.
    scored = {}
    if mask is not None and mask.dtype != torch.bool:
        bias = attn_mask if attn_mask.dim() <= 4 and len(batch) == 1 else _in_four_dimensions(mask, batch, H)  # its gradient has its shape
        scored, mask = {"bias": bias}, None
    mask = None if mask is None else _in_four_dimensions(mask, batch, H)
    O = flash_attention(q, k, v, mask, causal=causal, scale=scale, dropout_p=dropout_p, **scored)  # (B, H, Lq, Ev)
    dims = max(x.dim() for x in (query, key, value))
    return O if dims == 4 else O.unflatten(0, batch)[(0,) * (4 - dims)]  # type: ignore[union-attr]


def _are_served(query, key, value, dropout_p, is_causal, scale, enable_gqa) -> bool:
    """Whether `flash_attention()` takes this call, apart from its mask and how leading dimensions broadcast."""
    tensors = query, key, value
    if not all(isinstance(x, Tensor) and x.layout == torch.strided and not x.is_nested and x.dim() >= 2 for x in tensors):
        return False
    dtypes = query.dtype, key.dtype, value.dtype
    autocasts = query.device.type != "meta" and torch.is_autocast_enabled(query.device.type) and torch.float64 not in dtypes
    return (
        all(dtype in DTYPES for dtype in dtypes)
        and (autocasts or dtypes[0] == dtypes[1] == dtypes[2])
        and query.device == key.device == value.device
        and query.shape[-1] == key.shape[-1]
        and key.shape[-2] == value.shape[-2]
        and all(x.numel() for x in tensors)
        # torch accepts some types and refuses others: leave those to it.
        and isinstance(is_causal, bool)
        and isinstance(enable_gqa, bool)
        and not (enable_gqa and not _are_grouped(*tensors))
        and isinstance(dropout_p, NUMBERS)
        and 0 <= dropout_p < 1
        and (scale is None or (isinstance(scale, NUMBERS) and not isinstance(scale, bool) and -math.inf < scale < math.inf))
    )


def _are_grouped(query, key, value) -> bool:
    if any(x.dim() < 3 for x in (query, key, value)):
        return False
    return key.shape[-3] == value.shape[-3] and not query.shape[-3] % key.shape[-3]


def _is_mask(mask, query: Tensor, value: Tensor) -> bool:
    dense = isinstance(mask, Tensor) and mask.layout == torch.strided and not mask.is_nested
    if not (dense and mask.device == query.device and mask.dim() >= 2):
        return False
    if mask.dtype == torch.bool:
        return True
    added = mask.dtype == query.dtype and mask.dtype in DTYPES and not _autocasts(query.device.type)
    return added and cuda.adds_quickly(query, value)


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return a if a == b else torch.broadcast_shapes(a, b)


def _in_four_dimensions(x: Tensor, batch: list[int], heads: int) -> Tensor:
    """(*batch or less, heads or 1, L, E) → (B, heads, L, E), a view wherever there is one."""
    if x.dim() == 4 and x.shape[:2] == (*batch, heads):
        return x
    return x.expand(*batch, heads, -1, -1).flatten(0, -4)


# ---- replacing torch's own function


class _Patch:
    """Puts the replacement into torch.nn.functional while a `with` is open, except while a call is handed to `__torch_function__`s."""

    def __init__(self):
        self.lock = threading.Lock()
        self.depth = 0  # of `with` blocks, in all threads together
        self.shown = 0  # calls that some `__torch_function__` is handling; it must find torch's own function in the module
        self.open = False
        self.original = TORCHS_OWN

    def update(self, depth: int = 0, shown: int = 0) -> None:
        with nullcontext() if torch.compiler.is_compiling() else self.lock:
            self.depth, self.shown = self.depth + depth, self.shown + shown
            was_open, self.open = self.open, self.depth > 0
            if self.open != was_open:
                CausalBias.__torch_function__ = _causal_bias_beside_a_patch if self.open else _causal_bias
            current = functional.scaled_dot_product_attention
            if current is _replacement and (self.shown or not self.open):
                functional.scaled_dot_product_attention = self.original
                self.original = self.original if self.open else TORCHS_OWN
            elif self.open and not self.shown and current is not _replacement and (not was_open or current is self.original):
                self.original, functional.scaled_dot_product_attention = current, _replacement


_causal_bias = CausalBias.__dict__["__torch_function__"]


@classmethod  # type: ignore[misc]  # it becomes one of CausalBias
def _causal_bias_beside_a_patch(cls, func, types, args=(), kwargs=None):
    """It looks torch's own function up in the module. Code that imported the function by name still calls the original."""
    func = functional.scaled_dot_product_attention if func is TORCHS_OWN else func
    return _causal_bias.__func__(cls, func, types, args, kwargs)


_patch = _Patch()
_thread = threading.local()


def _replacement(*args, **kwargs) -> Tensor:
    if not _patch.open:  # code that has kept this function beyond the `with`
        return _torchs_own(*args, **kwargs)
    modes = torch.compiler.is_compiling() and torch._C._len_torch_function_stack()  # has_torch_function does not recognise them
    if modes or has_torch_function((*args, *kwargs.values())):
        return _show(*args, **kwargs)
    O = _try_to_serve(args, kwargs)
    return _torchs_own(*args, **kwargs) if O is None else O


torch.jit._builtins._register_builtin(_replacement, "aten::scaled_dot_product_attention")  # what torch.jit.script takes it to be


def _try_to_serve(args: tuple, kwargs: dict) -> Tensor | None:
    try:
        arguments = _arguments(*args, **kwargs)
    except TypeError:  # missing, unknown or too many
        return None
    return _serve(*arguments)


def _arguments(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False) -> tuple:
    return query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa


def _torchs_own(*args, **kwargs) -> Tensor:
    """The function that the `with` found in the module: torch's own, or another patch. If that patch leads back here, torch's own."""
    if _patch.original is TORCHS_OWN or getattr(_thread, "in_others_patch", False):
        return TORCHS_OWN(*args, **kwargs)
    _thread.in_others_patch = True
    try:
        return _patch.original(*args, **kwargs)
    finally:
        _thread.in_others_patch = False


def _show(*args, **kwargs) -> Tensor:
    """Makes the call as torch does, through every TorchFunctionMode and `__torch_function__`, which find torch's own function in its
    module; below the modes it may be served here."""
    _patch.update(shown=+1)
    try:
        with _at_the_bottom(_ServingMode()):
            return _torchs_own(*args, **kwargs)
    finally:
        _patch.update(shown=-1)


class _ServingMode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        O = _try_to_serve(args, kwargs) if func is TORCHS_OWN and all(t is CausalBias for t in types) else None
        return func(*args, **kwargs) if O is None else O


@contextmanager
def _at_the_bottom(mode: TorchFunctionMode) -> Iterator[None]:
    """Activates the mode below all modes that are already active, so that it sees a call last."""
    stack = [mode, *_pop_modes()]
    for each in stack:
        _push_mode(each)
    try:
        yield
    finally:
        for each in _pop_modes():
            if each is not mode:
                _push_mode(each)


def _pop_modes() -> list[TorchFunctionMode]:
    return [_pop_mode() for _ in range(torch._C._len_torch_function_stack())][::-1]

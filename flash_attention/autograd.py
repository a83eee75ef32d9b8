"""Gradients and transforms, once for every backend.

Two torch.library ops, `flash_attention::forward` and `flash_attention::backward`, take the backend's name as an argument; each has a
shape-only version (for torch.compile) and a rule for vmap. One thin autograd.Function calls them, a second one makes the backward
differentiable in its turn.
"""

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from flash_attention import allocate, build
from flash_attention.backends import BACKENDS, CHOSEN, choose
from flash_attention.backends.cuda import BACKWARD, FORWARD
from flash_attention.shortcut import nobody_looks_on

library = torch.library.Library("flash_attention", "DEF")
SETTINGS = "Tensor? seed, bool causal, float scale, float dropout_p, str backend, int? block_size=None"
library.define(f"forward(Tensor q, Tensor k, Tensor v, Tensor? mask, {SETTINGS}) -> (Tensor, Tensor)")
library.define(
    "backward(Tensor dO, Tensor? dLSE, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor O, Tensor LSE, "
    f"{SETTINGS}) -> (Tensor, Tensor, Tensor)"
)
library.define(
    "second_backward(Tensor gQ, Tensor gK, Tensor gV, Tensor dO, Tensor? dLSE, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor LSE, "
    f"{SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def attention(
    q, k, v, mask, seed, causal: bool, scale: float, dropout_p: float, backend: str, block_size: int | None
) -> tuple[Tensor, Tensor]:
    """O and LSE, differentiable, from checked arguments (`flash_attention.interface` checks them)."""
    arguments = q, k, v, mask, seed, causal, scale, dropout_p, backend, block_size
    differentiated = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    plain = nobody_looks_on(q, k, v)
    if differentiated or forward_ad._current_level >= 0:  # forward mode: the Function raises, where a bare op would give zeros
        return (PlainAttention if plain else Attention).apply(*arguments)
    return (_forward if plain else torch.ops.flash_attention.forward)(*arguments)


def _batched(*gradients: Tensor | None) -> bool:
    """Whether torch.autograd.grad(…, is_grads_batched=True) maps them: in a way older than functorch, which only the tensors show."""
    return any(x is not None and torch._C._functorch.is_legacy_batchedtensor(x) for x in gradients)


class Attention(Function):
    """(q, k, v) → (O, LSE)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, v, mask, seed, *settings):
        return torch.ops.flash_attention.forward(q, k, v, mask, seed, *settings)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, mask, seed, *ctx.settings = inputs
        ctx.save_for_backward(q, k, v, mask, seed, *output)
        ctx.set_materialize_grads(False)  # LSE is rarely differentiated: None tells the backward to skip its gradient

    @staticmethod
    def backward(ctx, dO, dLSE):
        q, k, v, mask, seed, O, LSE = ctx.saved_tensors
        if dO is None and dLSE is None:
            return (None,) * 10
        dO = torch.zeros_like(O) if dO is None else dO
        arguments = dO, dLSE, q, k, v, mask, O, LSE, seed, *ctx.settings
        if torch.is_grad_enabled():  # only create_graph=True, as torch.func always has it, leaves gradients enabled here
            backward = AttentionBackward.apply
        else:
            plain = nobody_looks_on(q, k, v) and type(dO) is Tensor and not _batched(dO, dLSE)
            backward = _backward if plain else torch.ops.flash_attention.backward
        return (*backward(*arguments), *(None,) * 7)


class PlainAttention(Function):
    """`Attention` where nobody looks on. A Function with a `setup_context` of its own, which functorch needs, binds its arguments by their
    names at every call: 40 µs."""

    @staticmethod
    def forward(ctx, *arguments):
        output = _forward(*arguments)
        Attention.setup_context(ctx, arguments, output)
        return output

    @staticmethod
    def backward(ctx, dO, dLSE):
        return Attention.backward(ctx, dO, dLSE)


class AttentionBackward(Function):
    """(dO, dLSE, q, k, v) → (dQ, dK, dV). O and LSE come along as what the forward already knows; they get no gradient, because
    `second_backward` differentiates the whole formula, in which they are functions of q, k and v."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dO, dLSE, q, k, v, mask, O, LSE, seed, *settings):
        return torch.ops.flash_attention.backward(dO, dLSE, q, k, v, mask, O, LSE, seed, *settings)

    @staticmethod
    def setup_context(ctx, inputs, output):
        dO, dLSE, q, k, v, mask, _, LSE, seed, *ctx.settings = inputs
        ctx.has_dLSE = dLSE is not None
        ctx.save_for_backward(dO, dLSE, q, k, v, mask, LSE, seed)

    @staticmethod
    def backward(ctx, gQ, gK, gV):
        to_dO, to_dLSE, to_q, to_k, to_v = torch.ops.flash_attention.second_backward(gQ, gK, gV, *ctx.saved_tensors, *ctx.settings)
        return to_dO, to_dLSE if ctx.has_dLSE else None, to_q, to_k, to_v, *(None,) * 9


# ---- the ops: real, shape-only, vmapped


def _backend(which, name, q, k, v, mask, causal, dropout_p, block_size):
    """A compiled graph leaves the choice to the op: an empty name means the fastest, "cuda" the fastest kernel. Who has chosen before
    (`as_chosen`) chooses again only where kernels could not be built."""
    if name in BACKENDS and block_size is None:
        return BACKENDS[name]
    if name in CHOSEN and not build.failures:
        return CHOSEN[name]
    return BACKENDS[choose(name.split("/")[0] or None, q, k, v, mask, causal, dropout_p, block_size, which)]


def _forward(q, k, v, mask, seed, causal, scale, dropout_p, backend, block_size=None):
    choice = FORWARD, backend, q, k, v, mask, causal, dropout_p, block_size
    arguments = q, k, v, mask, seed, causal, scale, dropout_p, *_given(block_size)
    try:
        return _backend(*choice).forward(*arguments)
    except build.BuildError:  # now it is known, and a choice passes over it; one asked for by name raises again
        return _backend(*choice).forward(*arguments)


def _backward(dO, dLSE, q, k, v, mask, O, LSE, seed, causal, scale, dropout_p, backend, block_size=None):
    choice = BACKWARD, backend, q, k, v, mask, causal, dropout_p, block_size
    arguments = dO, dLSE, q, k, v, mask, O, LSE, seed, causal, scale, dropout_p, *_given(block_size)
    try:
        return _backend(*choice).backward(*arguments)
    except build.BuildError:  # as in _forward
        return _backend(*choice).backward(*arguments)


def _second_backward(gQ, gK, gV, dO, dLSE, q, k, v, mask, LSE, seed, causal, scale, dropout_p, backend, block_size=None):
    chosen = _backend(BACKWARD, backend, q, k, v, mask, causal, dropout_p, block_size)
    if not hasattr(chosen, "second_backward"):
        raise NotImplementedError(
            "the backward of a CUDA kernel cannot be differentiated again; pass backend='reference' for second derivatives"
        )
    return chosen.second_backward(gQ, gK, gV, dO, dLSE, q, k, v, mask, LSE, seed, causal, scale, dropout_p, *_given(block_size))


def _given(block_size: int | None) -> tuple[int, ...]:
    """What a call that sets its tiles hands to the backend beyond the other arguments."""
    return () if block_size is None else (block_size,)


def _fake_forward(q, k, v, *_):
    return allocate.forward_outputs(q, v)


def _fake_backward(dO, dLSE, q, k, v, *_):
    return allocate.backward_outputs(q, k, v)


def _fake_second_backward(gQ, gK, gV, dO, dLSE, q, k, v, *_):
    shapes = (dO, allocate.lse(q), q, k, v)
    return tuple(x.new_empty(x.shape) for x in shapes)


def _fold(x: Tensor) -> Tensor:
    """(n, B, …) → (n·B, …), without expanding in memory the later dimensions that are broadcast (stride 0), as a mask's mostly are."""
    core = x[(slice(None), slice(None), *(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride()[2:]))]
    return core.flatten(0, 1).expand(-1, *x.shape[2:])


def _vmapped(op, tensors: int):
    """The vmap rule of an op whose first `tensors` arguments (then a seed, then settings) may be mapped.

    A mapped axis is folded into the batch, so that a vmapped call is one call. Not with dropout, whose random bits depend on the batch
    index: there each sample keeps the bits it would have alone, and the calls are made one by one.
    """

    def rule(info, in_dims, *arguments):
        n = info.batch_size
        seed, settings = arguments[tensors], arguments[tensors + 1 :]
        in_front = [x if dim is None else x.movedim(dim, 0) for x, dim in zip(arguments, in_dims, strict=True)]
        if seed is not None:
            calls = [op(*(x if dim is None else x[s] for x, dim in zip(in_front, in_dims, strict=True))) for s in range(n)]
            return tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True)), (0,) * len(calls[0])
        folded = [
            None if x is None else _fold(x.unsqueeze(0).expand(n, *x.shape) if dim is None else x)
            for x, dim in zip(in_front[:tensors], in_dims[:tensors], strict=True)
        ]
        outputs = op(*folded, None, *settings)
        return tuple(x.unflatten(0, (n, -1)) for x in outputs), (0,) * len(outputs)

    return rule


for _name, _real, _fake, _tensors in (
    ("forward", _forward, _fake_forward, 4),
    ("backward", _backward, _fake_backward, 8),
    ("second_backward", _second_backward, _fake_second_backward, 10),
):
    library.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flash_attention::{_name}", _fake, lib=library)
    torch.library.register_vmap(f"flash_attention::{_name}", _vmapped(getattr(torch.ops.flash_attention, _name), _tensors), lib=library)

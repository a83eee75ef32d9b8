"""Gradients and transforms, once for every backend.

Four torch.library ops take the backend's name as an argument: `flash_attention::forward`, its derivative `flash_attention::backward`, the
derivative of that, `flash_attention::second_backward`, and the forward's derivative in forward mode, `flash_attention::jvp`. To torch they
look like operators of its own: each has a shape-only version (for torch.compile), a rule for vmap and one for autograd, so that
torch.func's transforms nest in any order. The Functions below are the rules:

    op                 derivative         derivative in forward mode
    forward            backward           jvp
    backward           second_backward    backward, linear in dO, + second_backward's cotangents of q, k, v: a Hessian is symmetric
    second_backward    PyTorch's, of the arithmetic in reference/second_derivative.py, and so every higher order
    jvp                second_backward's: its cotangents of dO and dLSE are J · (gQ, gK, gV), which is what jvp computes

A bias and ALiBi's slopes come last, because most calls have none. Where a bias gets a gradient (`to_bias`), it is the fourth result of
`backward`, and its cotangent the sixth of `second_backward`; otherwise that result is an empty tensor.

An eager call (`shortcut.is_eager_call`) skips the ops: it goes from the Function, or without gradients from `attention`, to the backend.

One file because the ops' rules refer to each other: each is the derivative of another.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import Function, forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from flash_attention import allocate, backends, node, shortcut
from flash_attention.backends import BACKENDS, cuda, no_gradients, reference
from flash_attention.backends.cuda import BACKWARD, FORWARD
from flash_attention.call import SCHEMA, Call, Settings

library: torch.library.Library = torch.library.Library("flash_attention", "DEF")
ops = torch.ops.flash_attention
REST = f"Tensor? seed, {SCHEMA}"
LAST = "Tensor? bias=None, Tensor? alibi=None"
library.define(f"forward(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? spans, {REST}, {LAST}) -> (Tensor, Tensor)")
library.define(
    "backward(Tensor dO, Tensor? dLSE, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? spans, Tensor O, Tensor LSE, "
    f"{REST}, {LAST}, bool to_bias=False) -> (Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "second_backward(Tensor gQ, Tensor gK, Tensor gV, Tensor dO, Tensor dLSE, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? spans, "
    f"{REST}, Tensor? gBias=None, {LAST}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "jvp(Tensor tQ, Tensor tK, Tensor tV, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? spans, Tensor O, Tensor LSE, "
    f"{REST}, Tensor? tBias=None, {LAST}) -> (Tensor, Tensor)"
)
NOT_AGAIN = "the backward of a CUDA kernel cannot be differentiated again, nor the forward in forward mode; backend='reference' can"
COUNT = len(Settings._fields)
NO_SETTINGS = (None,) * COUNT  # their gradients
SETTINGS = 6  # where they begin among the forward op's arguments
BACKEND = SETTINGS + Settings._fields.index("backend")


def attention(plan: Callable | None, q, k, v, mask, spans, seed, settings: Settings, bias=None, alibi=None) -> tuple[Tensor, Tensor]:
    """O and LSE, differentiable, from checked arguments (`flash_attention.interface` checks them). plan: what computes the forward of an
    eager call (`is_eager_call`); None calls the op."""
    arguments = q, k, v, mask, spans, seed
    if plan is None:
        return ops.forward(*arguments, *settings, bias, alibi)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad or (bias is not None and bias.requires_grad)):
        _refuse_gradients(settings.backend)
        scored = () if bias is alibi is None else (bias, alibi)
        return Attention.apply(plan, *arguments, settings, *scored)
    return plan(*arguments) if bias is alibi is None else plan(*arguments, bias, alibi)


def _refuse_gradients(backend: str) -> None:
    """Raises NotImplementedError if this backend has a forward alone: before it runs, not when a backward is first wanted."""
    if reason := no_gradients(BACKENDS.get(backend)):
        raise NotImplementedError(
            f"backend {backend!r} gives no gradients: {reason}; call it under torch.no_grad(), or take another backend"
        )


class Attention(Function):
    """(q, k, v, bias) → (O, LSE). `compute` computes them: a backend's plan, or the op below its autograd rule. Settings come as one
    argument, bias and alibi where there are any: each costs a microsecond here."""

    @staticmethod
    def forward(ctx, compute, q, k, v, mask, spans, seed, settings, bias=None, alibi=None):
        is_op = isinstance(compute, _BelowAutograd)
        scored = () if bias is alibi is None else (bias, alibi)
        O, LSE = compute(q, k, v, mask, spans, seed, *settings, *scored) if is_op else compute(q, k, v, mask, spans, seed, *scored)
        ctx.settings = settings
        ctx.save_for_backward(q, k, v, mask, spans, seed, bias, alibi, O, LSE)
        if is_op:
            ctx.save_for_forward(q, k, v, mask, spans, seed, bias, alibi, O, LSE)  # for jvp, which plain calls do not need
        ctx.set_materialize_grads(False)  # LSE is rarely differentiated: None tells the backward to skip its gradient
        return O, LSE

    @staticmethod
    def backward(ctx, dO, dLSE):
        q, k, v, mask, spans, seed, bias, alibi, O, LSE = ctx.saved_tensors
        if dO is None and dLSE is None:
            return (None,) * len(ctx.needs_input_grad)
        dO = torch.zeros_like(O) if dO is None else dO
        backward = _backward if shortcut.is_eager_backward(q, k, v, dO, dLSE) else ops.backward
        if bias is alibi is None:
            dQ, dK, dV, _ = backward(dO, dLSE, q, k, v, mask, spans, O, LSE, seed, *ctx.settings)
            return None, dQ, dK, dV, *(None,) * (len(ctx.needs_input_grad) - 4)
        to_bias = ctx.needs_input_grad[8]
        dQ, dK, dV, dBias = backward(dO, dLSE, q, k, v, mask, spans, O, LSE, seed, *ctx.settings, bias, alibi, to_bias)
        return None, dQ, dK, dV, None, None, None, None, dBias if to_bias else None, None

    @staticmethod
    def jvp(ctx, _, *tangents):
        with _set_fwd_grad_enabled(True):  # for transforms around this one
            q, k, v, mask, spans, seed, bias, alibi, O, LSE = _primals(ctx)
            known = mask, spans, O, LSE, seed
            return ops.jvp(*_filled(tangents[:3], (q, k, v)), q, k, v, *known, *ctx.settings, tangents[-2], bias, alibi)


class PlainAttention(Function):
    """(q, k, v) → O: `Attention` for a plan that needs nothing but memory (`cuda.Forward.is_plain`), without LSE. A small
    call is bound by the host, and each argument, output and saved tensor of a Function costs it a microsecond. node.cpp is the same in
    C++, which replaces this once it is compiled."""

    @staticmethod
    def forward(ctx, plan, q, k, v):
        O, LSE = plan.repeat(q, k, v)
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, O, LSE)
        return O

    @staticmethod
    def backward(ctx, dO):
        q, k, v, O, LSE = ctx.saved_tensors
        if not shortcut.is_eager_backward(q, k, v, dO):
            dQ, dK, dV, _ = ops.backward(dO, None, q, k, v, None, None, O, LSE, None, *ctx.plan.call.settings)
            return None, dQ, dK, dV
        return None, *shortcut.plain_backward(ctx.plan, dO, q, k, v, O, LSE)


def plain_attention(plan: cuda.Forward, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """O, differentiable, of an eager call by a plain plan: in C++ where that is loaded."""
    if (in_cpp := plan.gradients.node) is None:
        in_cpp = node.plan(plan, q)
    if in_cpp is not None:
        return node.attend(q, k, v, in_cpp)
    # Not by Function.apply, which looks for transforms and for tensors left over from them: `is_eager_call` has excluded transforms, and
    # such tensors have no address.
    return super(Function, PlainAttention).apply(plan, q, k, v)


def _primals(ctx) -> list[Tensor | None]:
    """The tensors that a Function saved for its jvp, without their tangents."""
    return [None if x is None else forward_ad.unpack_dual(x).primal for x in ctx.saved_tensors]


def _is_dual(x) -> bool:
    return isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None


def _filled(tangents: Sequence[Tensor | None], primals: Sequence[Tensor]) -> list[Tensor]:
    """Tangents, zeros where there are none."""
    return [torch.zeros_like(x) if tangent is None else tangent for tangent, x in zip(tangents, primals, strict=True)]


class AttentionBackward(Function):
    """(dO, dLSE, q, k, v, bias) → (dQ, dK, dV, dBias). O and LSE are passed along because the forward has computed them; they get no
    gradient, because `second_backward` differentiates the whole formula, in which they are functions of q, k, v and bias."""

    @staticmethod
    def forward(ctx, compute, *arguments):
        dO, dLSE, q, k, v, mask, spans, O, LSE, seed, *ctx.settings, bias, alibi, ctx.to_bias = arguments
        ctx.save_for_backward(dO, dLSE, q, k, v, mask, spans, seed, bias, alibi)
        ctx.save_for_forward(dO, dLSE, q, k, v, mask, spans, O, LSE, seed, bias, alibi)
        return compute(*arguments)

    @staticmethod
    def backward(ctx, gQ, gK, gV, gBias):
        dO, dLSE, q, *rest, bias, alibi = ctx.saved_tensors
        to_dLSE = dLSE is not None
        dLSE = dLSE if to_dLSE else allocate.lse(q).zero_()
        gBias = gBias if ctx.to_bias else None
        *gradients, to_bias = ops.second_backward(gQ, gK, gV, dO, dLSE, q, *rest, *ctx.settings, gBias, bias, alibi)
        to_bias = None if bias is None else to_bias
        return None, gradients[0], gradients[1] if to_dLSE else None, *gradients[2:], *(None,) * 5, *NO_SETTINGS, to_bias, None, None

    @staticmethod
    def jvp(ctx, _, *tangents):
        with _set_fwd_grad_enabled(True):
            dO, dLSE, q, k, v, mask, spans, O, LSE, seed, bias, alibi = _primals(ctx)
            of_bias = tangents[-3]
            to_dO, to_q, to_k, to_v = _filled((tangents[0], *tangents[2:5]), (dO, q, k, v))
            last = bias, alibi, ctx.to_bias
            linear = ops.backward(to_dO, tangents[1], q, k, v, mask, spans, O, LSE, seed, *ctx.settings, *last)
            dLSE = allocate.lse(q).zero_() if dLSE is None else dLSE
            inputs = to_q, to_k, to_v, dO, dLSE, q, k, v, mask, spans, seed
            _, _, *curved = ops.second_backward(*inputs, *ctx.settings, of_bias, bias, alibi)
            summed = [x + y for x, y in zip(linear[:3], curved, strict=False)]
            return *summed, linear[3] + curved[3] if ctx.to_bias else torch.zeros_like(linear[3])


class AttentionSecondBackward(Function):
    """(gQ, gK, gV, dO, dLSE, q, k, v, gBias, bias) → cotangents of (dO, dLSE, q, k, v, bias)."""

    @staticmethod
    def forward(ctx, compute, *arguments):
        ctx.save_for_backward(*arguments[:11], *arguments[-3:])
        ctx.settings = Settings(*arguments[11:-3])
        return compute(*arguments)

    @staticmethod
    def backward(ctx, *cotangents):
        *inputs, mask, spans, seed, gBias, bias, alibi = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[1:9])
        if bias is None:
            cotangents = cotangents[:5]
        else:
            inputs += (_zeros(bias) if gBias is None else gBias), bias
            needed += ctx.needs_input_grad[-3:-1]
        gradients = reference.second_backward_vjp(ctx.settings, cotangents, inputs, needed, mask, spans, seed, alibi)
        scored = (None, None) if bias is None else gradients[8:]
        return None, *gradients[:8], None, None, None, *NO_SETTINGS, *scored, None


def _zeros(x: Tensor) -> Tensor:
    """Zeros of x's shape that take no memory."""
    return x.new_zeros(()).expand(x.shape)


# ---- the ops: real, shape-only, vmapped


def _forward(q, k, v, mask, spans, seed, *rest):
    settings, (bias, alibi) = _split(rest, FORWARD_LAST)
    call = Call.of(q, k, v, mask, spans, settings, bias=bias, alibi=alibi)
    scored = () if bias is alibi is None else (bias, alibi)
    return shortcut.plan(FORWARD, call)(q, k, v, mask, spans, seed, *scored)


def _backward(dO, dLSE, q, k, v, mask, spans, O, LSE, seed, *rest):
    settings, (bias, alibi, to_bias) = _split(rest, BACKWARD_LAST)
    arguments = dO, dLSE, q, k, v, mask, spans, O, LSE, seed
    scored = () if bias is alibi is None else (bias, alibi)
    gradients = shortcut.plan_backward(arguments, settings, bias, alibi, to_bias)(*arguments, *scored)
    return gradients if to_bias else (*gradients, allocate.bias_gradient(q, None))


def _second_backward(gQ, gK, gV, dO, dLSE, q, k, v, mask, spans, seed, *rest):
    settings, (gBias, bias, alibi) = _split(rest, SECOND_LAST)
    chosen = backends.resolve(BACKWARD, Call.of(q, k, v, mask, spans, settings, bias=bias, alibi=alibi))
    if not hasattr(chosen, "second_backward"):
        raise NotImplementedError(NOT_AGAIN)
    gBias = _zeros(bias) if gBias is None and bias is not None else gBias
    results = chosen.second_backward(settings, gQ, gK, gV, dO, dLSE, q, k, v, mask, spans, seed, gBias, bias, alibi)
    return results if bias is not None else (*results, allocate.bias_gradient(q, None))


def _jvp(tQ, tK, tV, q, k, v, mask, spans, O, LSE, seed, *rest):
    settings, (tBias, bias, alibi) = _split(rest, SECOND_LAST)
    chosen = backends.resolve(FORWARD, Call.of(q, k, v, mask, spans, settings, bias=bias, alibi=alibi))
    if not hasattr(chosen, "jvp"):
        raise NotImplementedError(NOT_AGAIN)
    return chosen.jvp(settings, tQ, tK, tV, q, k, v, mask, spans, seed, O, LSE, tBias, bias, alibi)


def _jvp_rule(keyset, *arguments):
    """Differentiating tangents means differentiating `second_backward`, which depends on q, k and v alone, not on O and LSE."""
    if not _differentiated(arguments):
        return _BelowAutograd(ops.jvp.default, keyset).call(*arguments)
    tQ, tK, tV, q, k, v, mask, spans, _, _, seed, *rest = arguments
    dO, dLSE = q.new_zeros(*q.shape[:3], v.shape[3]), allocate.lse(q).zero_()  # any values: the two results do not depend on them
    return ops.second_backward(tQ, tK, tV, dO, dLSE, q, k, v, mask, spans, seed, *rest)[:2]


def _differentiated(arguments: tuple) -> bool:
    """Whether the innermost transform differentiates one of these arguments, in either mode."""
    return _in_forward_mode(arguments) or (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments))


def _in_forward_mode(arguments: tuple) -> bool:
    return forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled() and any(map(_is_dual, arguments))


# Defaults of the arguments after the settings.
FORWARD_LAST = None, None  # bias, alibi
BACKWARD_LAST = None, None, False  # bias, alibi, to_bias
SECOND_LAST = None, None, None  # gBias, bias, alibi


def _split(rest: tuple, last: tuple) -> tuple[Settings, tuple]:
    """The settings, and the arguments after them: the dispatcher omits arguments that have their default value."""
    return Settings(*rest[:COUNT]), rest[COUNT:] + last[len(rest) - COUNT :]


def _fake_forward(q, k, v, *_):
    return allocate.forward_outputs(q, v)


def _fake_backward(dO, dLSE, q, k, v, mask, spans, O, LSE, seed, *rest):
    _, (bias, _, to_bias) = _split(rest, BACKWARD_LAST)
    return *allocate.backward_outputs(q, k, v), allocate.bias_gradient(q, bias if to_bias else None)


def _fake_jvp(tQ, tK, tV, q, k, v, mask, spans, O, LSE, *_):
    return torch.empty_like(O), torch.empty_like(LSE)


def _fake_second_backward(gQ, gK, gV, dO, dLSE, q, k, v, mask, spans, seed, *rest):
    _, (_, bias, _) = _split(rest, SECOND_LAST)
    shapes = (dO, allocate.lse(q), q, k, v)
    return *(x.new_empty(x.shape) for x in shapes), allocate.bias_gradient(q, bias)


def _fold(x: Tensor) -> Tensor:
    """(n, B, …) → (n·B, …). Later dimensions that are broadcast (stride 0), as a mask's often are, are not expanded in memory."""
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride()[2:])
    index = (slice(None), slice(None), *once)
    core = x[index]
    return core.flatten(0, 1).expand(-1, *x.shape[2:])


def _vmapped(op, tensors: int, last: tuple):
    """The vmap rule of an op whose first `tensors` arguments (then a seed, then settings, then `last`) may be mapped.

    A mapped axis is folded into the batch, so that a vmapped call is one call. There are two exceptions, in which calls are made one by
    one: dropout, whose random bits depend on the batch index (each sample keeps the bits that it would have alone), and a bias that
    batches share, which has a gradient for each sample.
    """

    def rule(info, in_dims, *arguments):
        n = info.batch_size
        arguments, in_dims = (x + y[len(x) - tensors - 1 - COUNT :] for x, y in ((arguments, last), (in_dims, (None,) * len(last))))
        settings = arguments[tensors + 1 : tensors + 1 + COUNT]
        in_front = [x if dim is None else x.movedim(dim, 0) for x, dim in zip(arguments, in_dims, strict=True)]
        scored = [(x, dim) for x, dim in zip(in_front[-len(last) :], in_dims[-len(last) :], strict=True) if isinstance(x, Tensor)]
        B = _batch(in_front[0], in_dims[0])  # of q, dO or gQ
        shared = any(_batch(x, dim) != B for x, dim in scored)
        if arguments[tensors] is not None or shared:
            calls = [op(*(x if dim is None else x[s] for x, dim in zip(in_front, in_dims, strict=True))) for s in range(n)]
            return tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True)), (0,) * len(calls[0])

        def folded(x, dim):
            return _fold(x.unsqueeze(0).expand(n, *x.shape) if dim is None else x) if isinstance(x, Tensor) else x

        front, back = (list(map(folded, in_front[part], in_dims[part])) for part in (slice(0, tensors), slice(-len(last), None)))
        outputs = op(*front, None, *settings, *back)
        return tuple(x.unflatten(0, (n, -1)) if x.dim() > 1 else x.new_empty(n, 0) for x in outputs), (0,) * len(outputs)

    return rule


def _batch(x: Tensor, dim: int | None) -> int:
    """The batch size of an argument whose mapped axis, if any, comes first."""
    return x.shape[0 if dim is None else 1]


class _BelowAutograd:
    """An op without its autograd rule."""

    def __init__(self, op, keyset):
        self.op, self.keys = op, keyset & torch._C._after_autograd_keyset

    def call(self, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return self.op.redispatch(self.keys, *arguments)

    def __call__(self, *arguments):
        """Called from a Function's forward, which has disabled both modes of differentiation for every transform around it: enables them
        again."""
        with torch.enable_grad(), _set_fwd_grad_enabled(True):
            return self.call(*arguments)


def _differentiable(op, function, tensors: int, last: tuple):
    """The autograd rule of an op. Like torch's own operators it records its derivative for the innermost transform of torch.func, then
    computes inside the next."""

    def rule(keyset, *arguments):
        arguments += last[len(arguments) - tensors - 1 - COUNT :]
        compute = _BelowAutograd(op, keyset)
        if not _differentiated(arguments):
            return compute.call(*arguments)
        if function is Attention:
            _refuse_gradients(arguments[BACKEND])
        if _in_forward_mode(arguments) and function is AttentionSecondBackward:
            return _second_backward(*arguments)  # plain arithmetic, of which PyTorch knows the derivatives
        if function is Attention:
            settings = arguments[SETTINGS : SETTINGS + COUNT]
            arguments = *arguments[:SETTINGS], settings, *arguments[SETTINGS + COUNT :]
        with enable_single_level_autograd_function():
            return super(Function, function).apply(compute, *arguments)

    return rule


for _name, _real, _fake, _tensors, _last, _function in (
    ("forward", _forward, _fake_forward, 5, FORWARD_LAST, Attention),
    ("backward", _backward, _fake_backward, 9, BACKWARD_LAST, AttentionBackward),
    ("second_backward", _second_backward, _fake_second_backward, 10, SECOND_LAST, AttentionSecondBackward),
):
    _op = getattr(ops, _name).default
    library.impl(_name, _real, "CompositeExplicitAutograd")
    library.impl(_name, _differentiable(_op, _function, _tensors, _last), "Autograd", with_keyset=True)
    torch.library.register_fake(f"flash_attention::{_name}", _fake, lib=library)
    torch.library.register_vmap(f"flash_attention::{_name}", _vmapped(_op, _tensors, _last), lib=library)
library.impl("jvp", _jvp, "CompositeExplicitAutograd")
library.impl("jvp", _jvp_rule, "Autograd", with_keyset=True)
torch.library.register_fake("flash_attention::jvp", _fake_jvp, lib=library)
torch.library.register_vmap("flash_attention::jvp", _vmapped(ops.jvp.default, 10, SECOND_LAST), lib=library)

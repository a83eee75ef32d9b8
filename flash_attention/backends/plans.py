"""Plans: a rung's forward or backward for tensors of one form, made once and then called with each call's tensors.

A plan copies the tensors that its kernels cannot read in place, allocates results and workspace, and launches. `repeat` is the path of a
plain call; it is kept short, because a small call is bound by the host.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from flash_attention import allocate
from flash_attention.backends.launch import BACKWARD, FORWARD, NO_KEYS, Addresses, Launch, address, positive, strides_of
from flash_attention.backends.masks import mask_fields
from flash_attention.call import Call, Form
from flash_attention.reference.tiles import hide_dead

if TYPE_CHECKING:
    from flash_attention.backends.rung import Rung


@dataclass
class Gradients:
    """What a forward's plan keeps for calls with gradients, if it is plain."""

    node: Tensor | None = None  # its plan in C++, where that is loaded: `flash_attention.node`
    backwards: dict = field(default_factory=dict)  # else: strides of a backward's inputs → (`Backward`, whether it is plain)


class Forward(NamedTuple):
    """A rung's forward for all calls with tensors and settings like these."""

    rung: "Rung"
    call: Call
    launch: Launch
    mask_form: str | None
    factor: float  # of q
    copied: tuple[bool, ...]  # of q, k, v: whether the kernel cannot read it in place
    O_is_like_q: bool  # allocate.is_like, computed once
    LSE_shape: tuple[int, ...]
    workspace: int  # floats
    gradients: Gradients

    @classmethod
    def of(cls, rung: "Rung", call: Call, copied: tuple[bool, ...] = (False,) * 3) -> "Forward":
        factor, scale = positive(call.settings.scale)
        inputs, copied = _as_read(rung, (call.q, call.k, call.v), copied)
        q, v = (x.empty() for x in (call.q, call.v))
        O_is_like_q = allocate.is_like(q, q.shape[2], v.shape[3])
        launch = rung.launch(FORWARD, call, (*inputs, Form.of(allocate.output(q, v))), scale)
        has_spans = call.spans is not None
        needs_workspace = has_spans or call.mask is not None or rung.forward_workspace
        workspace = launch.workspace_floats(has_spans) if needs_workspace else 0
        form, LSE_shape = rung._mask_form(FORWARD, call), tuple(q.shape[:3])
        return cls(rung, call, launch, form, factor, copied, O_is_like_q, LSE_shape, workspace, Gradients())

    @property
    def is_plain(self) -> bool:
        """Whether nothing but allocating memory comes before the launch, and nothing after it."""
        special = self.mask_form is not None or self.call.has_dropout or self.call.score
        return self.factor == 1 and not any(self.copied) and not special

    def repeat(self, q: Tensor, k: Tensor, v: Tensor, lse: bool = True, keys: bytes = NO_KEYS) -> tuple[Tensor, Tensor | None]:
        """O and, if asked for, LSE, by a plain plan, for tensors that begin at multiples of 16 bytes. keys: `struct KeySource`."""
        O = torch.empty_like(q) if self.O_is_like_q else allocate.output(q, v)
        LSE = torch.empty(self.LSE_shape, dtype=torch.float32, device=q.device) if lse else None  # allocate.lse, in a third of the time
        workspace = torch.empty(self.workspace, dtype=torch.float32, device=q.device) if self.workspace else None
        others = Addresses(LSE.data_ptr() if lse else 0, 0, address(workspace), keys=keys)
        self.launch(q, (q.data_ptr(), k.data_ptr(), v.data_ptr(), O.data_ptr()), others)
        return O, LSE

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        spans: Tensor | None,
        seed: Tensor | None,
        bias: Tensor | None = None,
        alibi: Tensor | None = None,
        keys: bytes = NO_KEYS,
    ) -> tuple[Tensor, Tensor]:
        """→ O (B, H, Nq, Dv), LSE (B, H, Nq). keys: `struct KeySource`."""
        tensors = (q if self.factor == 1 else q * self.factor), k, v
        if (copied := _to_copy(self.rung, tensors, self.copied)) != self.copied:
            return self.of(self.rung, self.call, copied)(q, k, v, mask, spans, seed, bias, alibi, keys)
        O, LSE = allocate.forward_outputs(q, v)
        tensors = *_as_contiguous(tensors, copied), O
        workspace = torch.empty(self.workspace, dtype=torch.float32, device=q.device) if self.workspace else None
        of_mask, _alive = mask_fields(self.rung, self.mask_form, mask)
        addresses = LSE.data_ptr(), 0, address(workspace), address(seed), address(spans)
        bias, bias_stride = _readable_bias(self.rung, bias)
        others = Addresses(*addresses, of_mask, keys, address(bias), address(alibi), bias_stride=bias_stride)
        self.launch(q, [x.data_ptr() for x in tensors], others)
        return O, LSE


class Backward(NamedTuple):
    """A rung's backward for tensors like a call's."""

    rung: "Rung"
    call: Call
    launch: Launch
    mask_form: str | None
    factor: float  # of q
    copied: tuple[bool, ...]  # of q, k, v, O, dO: whether the kernel cannot read it in place
    hides_dead: bool  # rows may attend nothing, and the kernels do not ignore their dO
    workspace: int  # floats
    outputs_are_like: bool  # allocate.is_like, of dQ, dK and dV

    @classmethod
    def of(cls, rung: "Rung", call: Call, copied: tuple[bool, ...] = (False,) * 5) -> "Backward":
        factor, scale = positive(call.settings.scale)
        hides_dead, dO = rung.must_hide_dead(call), call.dO
        if hides_dead:
            hidden = hide_dead(torch.empty(dO.shape[:3], dtype=torch.bool, device="meta"), dO.empty())[0]
            dO = dO._replace(stride=hidden.stride())
        inputs, copied = _as_read(rung, (call.q, call.k, call.v, call.O, dO), copied)
        qkv = [x.empty() for x in (call.q, call.k, call.v)]
        outputs = map(Form.of, allocate.backward_outputs(*qkv))
        launch = rung.launch(BACKWARD, call, (*inputs, *outputs), scale)
        workspace = launch.workspace_floats(call.spans is not None)
        outputs_are_like = all(allocate.is_like(x, *x.shape[2:]) for x in qkv)
        return cls(rung, call, launch, rung._mask_form(BACKWARD, call), factor, copied, hides_dead, workspace, outputs_are_like)

    @property
    def is_plain(self) -> bool:
        """Whether nothing but allocating memory comes before the launch, and nothing after it."""
        special = self.hides_dead or self.mask_form is not None or self.call.spans is not None or self.call.has_dropout or self.call.score
        return self.factor == 1 and not any(self.copied) and not special

    def repeat(self, q: Tensor, k: Tensor, v: Tensor, LSE: Tensor, addresses: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """dQ, dK and dV by a plain plan, if LSE gets no gradient. addresses: of q, k, v, O, dO, multiples of 16 bytes."""
        like = torch.empty_like
        dQ, dK, dV = (like(q), like(k), like(v)) if self.outputs_are_like else allocate.backward_outputs(q, k, v)
        workspace = torch.empty(self.workspace, dtype=torch.float32, device=q.device)
        tensors = *addresses, dQ.data_ptr(), dK.data_ptr(), dV.data_ptr()
        self.launch(q, tensors, Addresses(LSE.data_ptr(), 0, workspace.data_ptr()))
        return dQ, dK, dV

    def __call__(self, dO, dLSE, q, k, v, mask, spans, O, LSE, seed, bias=None, alibi=None):
        """→ dQ, dK, dV, shaped as q, k, v, and dBias if the call wants it."""
        if self.hides_dead:
            (dO,) = hide_dead(LSE.isneginf(), dO)
        tensors = (q if self.factor == 1 else q * self.factor), k, v, O, dO
        if (copied := _to_copy(self.rung, tensors, self.copied)) != self.copied:
            return self.of(self.rung, self.call, copied)(dO, dLSE, q, k, v, mask, spans, O, LSE, seed, bias, alibi)
        dQ, dK, dV = allocate.backward_outputs(q, k, v)
        tensors = *_as_contiguous(tensors, copied), dQ, dK, dV
        LSE, dLSE = LSE.contiguous(), None if dLSE is None else dLSE.contiguous()
        of_mask, _alive = mask_fields(self.rung, self.mask_form, mask)
        workspace = torch.empty(self.workspace, dtype=torch.float32, device=q.device)
        dBias = torch.empty(bias.shape, dtype=bias.dtype, device=q.device) if self.call.to_bias else None
        addresses = LSE.data_ptr(), address(dLSE), workspace.data_ptr(), address(seed), address(spans)
        bias, bias_stride = _readable_bias(self.rung, bias)
        others = Addresses(*addresses, of_mask, NO_KEYS, address(bias), address(alibi), address(dBias), bias_stride)
        self.launch(q, [x.data_ptr() for x in tensors], others)
        dQ = dQ if self.factor == 1 else dQ.mul_(self.factor)
        return (dQ, dK, dV, dBias) if self.call.to_bias else (dQ, dK, dV)


def _as_read(rung: "Rung", tensors: tuple[Form, ...], copied: tuple[bool, ...]) -> tuple[list[Form], tuple[bool, ...]]:
    """The forms in which kernels get these tensors, and which are copied: those marked in `copied`, and those that kernels cannot read."""
    copied = tuple(copy or not rung.reads(x) for x, copy in zip(tensors, copied, strict=True))
    return [x.contiguous() if copy else x for x, copy in zip(tensors, copied, strict=True)], copied


def _to_copy(rung: "Rung", tensors: tuple[Tensor, ...], copied: tuple[bool, ...]) -> tuple[bool, ...]:
    """`copied`, and also, where the kernel copies 16 bytes at a time, tensors that do not begin at a multiple of 16 bytes."""
    if rung.multiple_of == 1:
        return copied
    return tuple(copy or x.data_ptr() % 16 != 0 for x, copy in zip(tensors, copied, strict=True))


def _as_contiguous(tensors: tuple[Tensor, ...], copied: tuple[bool, ...]) -> list[Tensor]:
    return [x.clone(memory_format=torch.contiguous_format) if copy else x for x, copy in zip(tensors, copied, strict=True)]


def _readable_bias(rung: "Rung", bias: Tensor | None) -> tuple[Tensor | None, tuple[int, ...] | None]:
    """A bias that the rung's kernels can read: for a tensor map, rows begin at multiples of 16 bytes. Also its strides, if it is a copy."""
    if bias is None or rung.bias_up_to is None:
        return bias, None
    *outer, last = strides_of(bias.shape, bias.stride())
    if (last == 1 or bias.shape[3] == 1) and not any(stride % 8 for stride in outer) and bias.data_ptr() % 16 == 0:
        return bias, None
    rows = bias.new_empty((*bias.shape[:3], (bias.shape[3] + 7) // 8 * 8))
    copy = rows[..., : bias.shape[3]].copy_(bias)
    return copy, strides_of(copy.shape, copy.stride())

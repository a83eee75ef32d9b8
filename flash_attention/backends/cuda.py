"""The CUDA backends: each rung of `cuda/`, behind the same two functions as the reference.

Torch allocates every tensor; a kernel gets addresses, sizes and strides in one struct (cuda/attention.h), on the current stream of q's
device. Nothing synchronises, nothing is copied that the kernel can read where it is.

One long file, because a rung's description, its plans and the table RUNGS are read together when a rung is added.
"""

import ctypes
import functools
import math
import struct
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from flash_attention import allocate, build
from flash_attention.backends.launch import (
    INTERVAL,
    MASK,
    NO_INTERVAL,
    NO_KEYS,
    NO_MASK,
    NO_TENSOR,
    PARAMS,
    SCORING,
    SETTINGS,
    STRIDES,
    Addresses,
    Launch,
    Scoring,
    raise_on,
)
from flash_attention.call import Call, Form
from flash_attention.reference.dropout import threshold
from flash_attention.reference.tiles import LOG2_E, hide_dead

PACK_MASK = "pack_mask.cu"

PACK_PARAMS = struct.Struct("@q 4q q 4i 2i q")
DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
FORWARD, BACKWARD = 0, 1  # which of a rung's files
# Where a kernel's running maximum of unscaled scores starts, unless scale · log2 e times it would overflow. A masked score, which is
# summed from −2¹²⁷, lies below it.
LOWEST = -(2.0**126)
SMALLEST_SCALE = 2.0**-100


@dataclass(frozen=True, eq=False)  # compared and hashed as the one object that it is: a call looks its library up by it
class Rung:
    """One rung: which files, and what they serve. min_arch is a compute capability times ten."""

    name: str
    files: tuple[str, str | None]  # forward, backward; a step of the ladder may have a forward alone
    min_arch: int
    dtypes: tuple[str, ...]
    head_dims: tuple[int, ...]  # compiled sizes; a head size is padded to the next
    pairs: tuple[tuple[int, int], ...] = ()  # compiled sizes of Q and K beside others of V
    multiple_of: int = 1  # of which head sizes, and the alignment of rows in elements
    masks: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())  # forms (build.MASK_NUMBER) that its forward and its backward read
    dropout: bool = False
    intervals: bool = False  # rows that see an interval of their own: windows, spans, parts of a larger whole
    scores: tuple[str, ...] = ()  # which of softcap, bias and alibi its kernels apply
    bias_as_q: bool = False  # it reads a bias of q's dtype alone
    bias_up_to: int | None = None  # it copies tiles of a bias by tensor map, beside head sizes up to this
    sums_bias: bool = False  # its own backward gives a bias its gradient
    teaching: bool = False  # a step of the ladder, taken only by name
    only_min_arch: bool = False  # instructions that no other compute capability has
    device_type: ClassVar[str] = "cuda"  # of the tensors it takes
    wide_forward: tuple[int, str] | None = None  # above this head size the forward has a file of its own
    wide_backward: tuple[int, str] | None = None  # so has the backward
    plain_backward: tuple[int, str] | None = None  # and up to this size another, without dropout, changed scores or a mask over intervals
    tall_forward: tuple[tuple[int, ...], str] | None = None  # of plain calls: compiled sizes, and the file whose tiles have more rows
    min_rows: tuple[tuple[int, int, int], ...] = ()  # (max head size, most rows for which the rung below is faster, the same with dropout)
    packs_heads: bool = False  # a tile has all query heads of a key head: the rung for few queries
    min_scores: tuple[tuple[int, int], ...] = ()  # (max head size, most scores of all heads for which the rung below is faster)
    forward_workspace: bool = False  # whether its forward may need one
    float8_keys: bool = False  # whether K and V may be e4m3

    def why_not(self, call: Call) -> str | None:
        """Why this rung cannot serve the call, or None."""
        if call.q.device.type != self.device_type:
            return f"it needs tensors on {'a CUDA device' if self.device_type == 'cuda' else 'the CPU'}, got {call.q.device}"
        if not_served := [name for name in call.score if name not in self.scores]:
            return f"it serves no {', '.join(not_served)}"
        if reason := self._why_no_bias(call):
            return reason
        if call.alibi is not None and (call.alibi.dtype != torch.float32 or call.alibi.shape != call.q.shape[:2]):
            return f"it reads slopes (B, H) in float32, got {tuple(call.alibi.shape)} in {call.alibi.dtype}"
        if DTYPE_NAMES.get(call.q.dtype) not in self.dtypes:
            return f"it computes in {', '.join(self.dtypes)}, got {call.q.dtype}"
        D, Dv = call.q.shape[3], call.v.shape[3]
        if call.head_dim > self.head_dims[-1] or D % self.multiple_of or Dv % self.multiple_of:
            kind = f"multiples of {self.multiple_of} " if self.multiple_of > 1 else ""
            return f"it takes head sizes {kind}up to {self.head_dims[-1]}, got D = {D}, Dv = {Dv}"
        if call.has_dropout and not self.dropout:
            return f"it serves no dropout, got dropout_p = {call.settings.dropout_p}"
        if call.mask is not None and not self.masks[FORWARD]:
            return f"it serves no mask, got {tuple(call.mask.shape)}"
        if call.has_float8_keys and (reason := self._why_no_float8(call)):
            return reason
        if call.visible == "interval":
            return self._why_no_interval(call) or self._why_no_kernels(call.q.device.index or 0)
        return self._why_no_kernels(call.q.device.index or 0)

    def _why_no_bias(self, call: Call) -> str | None:
        if call.bias is None:
            return None
        if call.bias.dtype not in DTYPE_NAMES:
            return f"it reads a bias in {', '.join(DTYPE_NAMES.values())}, got {call.bias.dtype}"
        if self.bias_as_q and call.bias.dtype != call.q.dtype:
            return f"it reads a bias of q's dtype, {call.q.dtype}, got {call.bias.dtype}"
        if self.bias_up_to is None:
            return None
        if call.head_dim > self.bias_up_to:
            return f"it serves a bias beside head sizes up to {self.bias_up_to}, got {call.head_dim}"
        if call.bias.shape[-1:] != call.k.shape[2:3]:
            return f"it reads a bias with an element for every key, got {tuple(call.bias.shape)}"
        return None

    def _sums_bias(self, call: Call) -> bool:
        """Whether its own backward gives the call's bias its gradient; if not, that of `simple` does."""
        special = call.mask is not None or call.has_dropout or call.visible == "interval" or 0 in call.q.shape
        return self.sums_bias and (self.bias_up_to is None or not special)

    @property
    def _simple(self) -> "Rung":
        return RUNGS["simple"]

    def _why_no_interval(self, call: Call) -> str | None:
        settings = call.settings
        if not self.intervals:
            what = "spans" if call.spans is not None else "offsets" if not settings.is_whole else f"({settings.left}, {settings.right})"
            return f"it serves no windows or spans, got {what}"
        offsets = settings.q_offset, settings.k_offset
        if call.has_dropout and any(offset % 64 for offset in offsets):
            return f"with dropout it takes offsets that are multiples of 64, got {offsets}"
        Nq, Nk = call.q.shape[2], call.k.shape[2]
        if max(map(abs, (*offsets, settings.diagonal_of(Nq, Nk)))) >= 2**30 or Nq + Nk >= 2**30:
            return f"it numbers rows and columns up to 2³⁰, got Nq = {Nq}, Nk = {Nk}, offsets {offsets}"
        return None

    def _why_no_float8(self, call: Call) -> str | None:
        if not self.float8_keys:
            return f"it reads no float8 keys, got {call.k.dtype}"
        if call.k.shape[3] % 16 or call.v.shape[3] % 16:
            return f"it takes head sizes of float8 keys that are multiples of 16, got D = {call.k.shape[3]}, Dv = {call.v.shape[3]}"
        if call.q.device.type == "cuda" and torch.cuda.get_device_capability(call.q.device) < (8, 9):
            return f"float8 needs compute capability 8.9, {torch.cuda.get_device_name(call.q.device)} has less"
        return None

    def _why_no_kernels(self, device: int) -> str | None:
        return _why_no_kernels(self, device)

    def why_not_built(self, which: int, call: Call) -> str | None:
        """Why what its forward or backward needs for the call cannot be built, or None. Builds it if that has not been tried."""
        try:
            self._libraries(which, call)
        except build.BuildError as error:
            return str(error)[:2000]  # a compiler may have much to say
        return None

    def _libraries(self, which: int, call: Call) -> ctypes.CDLL:
        """The library that the call's forward or backward runs, and before it that which packs its mask."""
        device = call.q.device.index
        if self._mask_form(which, call) not in (None, "bytes"):
            _pack_mask_library(device)
        return _library(self, which, device, *self.kind(which, call))

    def kind(self, which: int, call: Call) -> tuple:
        """What `specialisation` is told of the call's forward or backward."""
        sizes, form = self.compiled(call), self._mask_form(which, call)
        tall = which == FORWARD and self.has_tall(sizes, call.visible, form, call.has_dropout, call.score) and _worth_tall(call)
        return DTYPE_NAMES[call.q.dtype], sizes, call.visible, form, call.has_dropout, call.has_float8_keys, call.score, tall

    def has_tall(self, sizes: tuple[int, int], visible: str, mask: str | None, dropout: bool, score: tuple[str, ...] = ()) -> bool:
        """Whether `tall_forward` serves such calls."""
        plain = visible != "interval" and mask is None and not dropout and not score
        return plain and self.tall_forward is not None and sizes[0] == sizes[1] and sizes[0] in self.tall_forward[0]

    def why_no_backward(self) -> str | None:
        """Why no call of this rung may ask for gradients, or None."""
        return None if self.files[BACKWARD] else "it is a step of the ladder and has a forward alone"

    def runs_on(self, arch: int) -> bool:
        """Whether its kernels can be compiled for this compute capability, times ten."""
        return arch == self.min_arch if self.only_min_arch else arch >= self.min_arch

    def compiled(self, call: Call) -> tuple[int, int]:
        """The compiled head sizes, of Q and K and of V, to which the call's are padded: the least that hold them."""
        sizes = (*((size, size) for size in self.head_dims), *self.pairs)
        return min((size for size in sizes if size[0] >= call.q.shape[3] and size[1] >= call.v.shape[3]), key=sum)

    def specialisation(
        self,
        which: int,
        arch: str,
        dtype: str,
        sizes: tuple[int, int],
        visible: str,
        mask: str | None,
        dropout: bool,
        float8: bool = False,
        score: tuple[str, ...] = (),
        tall: bool = False,
    ) -> build.Specialisation:
        """What its forward or backward for one kind of call is compiled from. sizes: compiled ones, of Q and K and of V. tall: by
        `tall_forward`."""
        D, Dv = sizes
        kind = dtype, visible == "causal", mask, dropout, visible == "interval"
        special = dropout or (visible == "interval" and mask is not None) or bool(score)
        file = self.tall_forward[1] if tall and self.tall_forward else self.file(which, D, special)
        return build.Specialisation(file, arch, D, *kind, None if Dv == D else Dv, float8, score)

    def file(self, which: int, head_dim: int, special: bool = False) -> str:
        """The source of its forward or backward for a compiled head size. special: not served by `plain_backward`."""
        wide = (self.wide_forward, self.wide_backward)[which]
        if not wide or head_dim <= wide[0]:
            return self.files[which]
        other = self.plain_backward if which == BACKWARD and not special else None
        return other[1] if other and head_dim <= other[0] else wide[1]

    def worthwhile(self, call: Call, which: int = FORWARD) -> bool:
        """Whether this rung is faster than those below it for the call's forward or backward."""
        if self.packs_heads:
            return which == FORWARD and _worth_packing(call)
        if call.score:
            return True  # below the rungs that change scores is `simple`
        if self.min_scores:
            B, H, Nq, _ = call.q.shape
            return B * H * Nq * call.k.shape[2] > next((scores for up_to, scores in self.min_scores if call.head_dim <= up_to), 0)
        few = next((kinds for up_to, *kinds in self.min_rows if call.head_dim <= up_to), (0, 0))
        plain = which == FORWARD and not call.has_dropout and call.mask is None and call.visible != "interval"
        return call.q.shape[2] > few[call.has_dropout] or (plain and call.k.shape[2] >= MANY_KEYS)

    def plan(self, which: int, call: Call) -> "Forward | Backward":
        """What computes the call's forward or backward.

        Raises:
            NotImplementedError: a backward is wanted and the rung has a forward alone.
        """
        if which == BACKWARD and (reason := self.why_no_backward()):
            raise NotImplementedError(f"backend {self.name!r} gives no gradients: {reason}")
        if which == BACKWARD and call.to_bias and not self._sums_bias(call):
            return self._simple.plan(which, call)
        return (Forward, Backward)[which].of(self, call)

    # ---- what the kernels can read in place

    def reads(self, x: Form) -> bool:
        """The last dimension is contiguous and, where the kernel copies 16 bytes at a time, rows begin at multiples of 16 bytes."""
        b, h, i, d = x.stride
        n = self.multiple_of
        return (d == 1 or x.shape[3] == 1) and (n == 1 or not (b | h | i) % n)

    def mask_forms(self, which: int, dropout: bool, score: tuple[str, ...] = ()) -> tuple[str, ...]:
        """The forms in which this rung's forward or backward reads a mask, the usual one first."""
        # Of two, dropout takes the first: a call of Philox covers columns that lie 8 apart, the bytes that a thread reads at once lie
        # side by side. So do scores that are changed, because bytes have keys in another order.
        return self.masks[which][:1] if dropout or score else self.masks[which]

    def _mask_form(self, which: int, call: Call) -> str | None:
        """The form in which the call's mask is best read."""
        if call.mask is None:
            return None
        forms = self.mask_forms(which, call.has_dropout, call.score)
        return "bytes" if "bytes" in forms and call.mask_is_aligned and _is_read_once(call.mask) else forms[0]

    def _pack_mask(self, mask: Tensor, by_keys: bool) -> Tensor:
        return pack_mask(mask, by_keys)

    def launch(self, which: int, call: Call, tensors: tuple[Form, ...], scale: float) -> Launch:
        """Of kernels that read and write tensors of these forms; `scale` is positive."""
        device = call.q.device.index
        return Launch(self._libraries(which, call), *_fields(call, tensors, scale), device, _sm_count(device), scoring=scoring(call))


class Forward(NamedTuple):
    """A rung's forward for tensors like a call's: made once, for all calls like it."""

    rung: Rung
    call: Call
    launch: Launch
    mask_form: str | None
    factor: float  # of q
    copied: tuple[bool, ...]  # of q, k, v: which the kernel cannot read as they are
    O_is_like_q: bool  # allocate.is_like, not to be worked out again
    LSE_shape: tuple[int, ...]
    workspace: int  # floats
    backwards: dict  # strides of a backward's inputs → `Backward`, and whether it is plain: `shortcut.plain_backward`

    @classmethod
    def of(cls, rung: Rung, call: Call, copied: tuple[bool, ...] = (False,) * 3) -> "Forward":
        factor, scale = _positive(call.settings.scale)
        inputs, copied = _as_read(rung, (call.q, call.k, call.v), copied)
        q, v = (x.empty() for x in (call.q, call.v))
        O_is_like_q = allocate.is_like(q, q.shape[2], v.shape[3])
        launch = rung.launch(FORWARD, call, (*inputs, Form.of(allocate.output(q, v))), scale)
        has_spans = call.spans is not None
        workspace = launch.workspace_floats(has_spans) if has_spans or rung.forward_workspace else 0
        return cls(rung, call, launch, rung._mask_form(FORWARD, call), factor, copied, O_is_like_q, tuple(q.shape[:3]), workspace, {})

    @property
    def is_plain(self) -> bool:
        """Nothing but memory is needed before the launch, and nothing after it."""
        special = self.mask_form is not None or self.call.has_dropout or self.call.score
        return self.factor == 1 and not any(self.copied) and not special

    def repeat(self, q: Tensor, k: Tensor, v: Tensor, lse: bool = True, keys: bytes = NO_KEYS) -> tuple[Tensor, Tensor | None]:
        """O and, if asked for, LSE, of a plain plan for tensors at multiples of 16 bytes. keys: `struct KeySource`."""
        O = torch.empty_like(q) if self.O_is_like_q else allocate.output(q, v)
        LSE = torch.empty(self.LSE_shape, dtype=torch.float32, device=q.device) if lse else None  # allocate.lse, in a third of the time
        workspace = torch.empty(self.workspace, dtype=torch.float32, device=q.device) if self.workspace else None
        others = Addresses(LSE.data_ptr() if lse else 0, 0, _address(workspace), keys=keys)
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
        mask_fields, _alive = _mask_fields(self.rung, self.mask_form, mask)
        addresses = LSE.data_ptr(), 0, _address(workspace), _address(seed), _address(spans)
        bias, bias_stride = _readable_bias(self.rung, bias)
        others = Addresses(*addresses, mask_fields, keys, _address(bias), _address(alibi), bias_stride=bias_stride)
        self.launch(q, [x.data_ptr() for x in tensors], others)
        return O, LSE


class Backward(NamedTuple):
    """A rung's backward for tensors like a call's."""

    rung: Rung
    call: Call
    launch: Launch
    mask_form: str | None
    factor: float  # of q
    copied: tuple[bool, ...]  # of q, k, v, O, dO: which the kernel cannot read as they are
    hides_dead: bool  # rows may attend nothing
    workspace: int  # floats
    outputs_are_like: bool  # allocate.is_like, of dQ, dK and dV

    @classmethod
    def of(cls, rung: Rung, call: Call, copied: tuple[bool, ...] = (False,) * 5) -> "Backward":
        factor, scale = _positive(call.settings.scale)
        visible = call.settings.visible(call.q.shape[2], call.k.shape[2], None)
        hides_dead = call.mask is not None or call.spans is not None or call.bias is not None or visible.blinds
        dO = call.dO
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
        """Nothing but memory is needed before the launch, and nothing after it."""
        special = self.hides_dead or self.call.spans is not None or self.call.has_dropout or self.call.score
        return self.factor == 1 and not any(self.copied) and not special

    def repeat(self, q: Tensor, k: Tensor, v: Tensor, LSE: Tensor, addresses: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """dQ, dK and dV of a plain plan, if LSE gets no gradient. addresses: of q, k, v, O, dO, multiples of 16 bytes."""
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
        mask_fields, _alive = _mask_fields(self.rung, self.mask_form, mask)
        workspace = torch.empty(self.workspace, dtype=torch.float32, device=q.device)
        dBias = torch.empty(bias.shape, dtype=bias.dtype, device=q.device) if self.call.to_bias else None
        addresses = LSE.data_ptr(), _address(dLSE), workspace.data_ptr(), _address(seed), _address(spans)
        bias, bias_stride = _readable_bias(self.rung, bias)
        others = Addresses(*addresses, mask_fields, NO_KEYS, _address(bias), _address(alibi), _address(dBias), bias_stride)
        self.launch(q, [x.data_ptr() for x in tensors], others)
        dQ = dQ if self.factor == 1 else dQ.mul_(self.factor)
        return (dQ, dK, dV, dBias) if self.call.to_bias else (dQ, dK, dV)


HOPPER = Rung(
    name="hopper",
    files=("forward_4_hopper.cu", "backward_4_hopper.cu"),
    min_arch=90,
    only_min_arch=True,
    dtypes=("float16", "bfloat16"),
    head_dims=(64, 80, 96, 112, 128, 160, 192, 256),
    pairs=((192, 128),),
    multiple_of=8,
    masks=(("bits",), ("key bits",)),
    dropout=True,
    intervals=True,
    scores=("softcap", "bias", "alibi"),
    bias_as_q=True,
    bias_up_to=128,
    sums_bias=True,
    wide_backward=(128, "backward_4_hopper_wide.cu"),
    plain_backward=(192, "backward_4_hopper_192.cu"),
    tall_forward=((80, 96), "forward_4_hopper_tall.cu"),
    min_rows=((64, 128, 384), (128, 64, 192), (256, 64, 256)),
)
HOPPER_WIDE = replace(
    HOPPER,
    name="hopper_wide",
    files=("forward_5_wide.cu", "backward_5_wide.cu"),
    head_dims=(320, 384, 512),
    pairs=(),
    intervals=False,
    scores=(),
    bias_as_q=False,
    bias_up_to=None,
    sums_bias=False,
    wide_backward=None,
    plain_backward=None,
    tall_forward=None,
    min_rows=(),
)
HOPPER_FLOAT32 = Rung(
    name="hopper_float32",
    files=("forward_5_float32.cu", "backward_5_float32.cu"),
    min_arch=90,
    only_min_arch=True,
    dtypes=("float32",),
    head_dims=(64, 128, 256, 512),
    multiple_of=4,
    masks=(("bits",), ("key bits",)),
    dropout=True,
    wide_forward=(128, "forward_5_float32_wide.cu"),
    wide_backward=(128, "backward_5_float32_wide.cu"),
    min_scores=((128, 1 << 22), (512, 1 << 18)),
    forward_workspace=True,
)

RUNGS: dict[str, Rung] = {
    rung.name: rung
    for rung in (
        Rung(
            name="split_keys",
            files=("forward_5_split_keys.cu", "backward_3_tensor_core.cu"),
            min_arch=80,
            dtypes=("float16", "bfloat16"),
            head_dims=(32, 64, 96, 128, 192, 256),
            multiple_of=8,
            masks=(("bits",), ("bits",)),
            dropout=True,
            scores=("softcap", "bias", "alibi"),
            bias_as_q=True,
            packs_heads=True,
            forward_workspace=True,
            float8_keys=True,
        ),
        HOPPER,
        Rung(
            name="tensor_core",
            files=("forward_3_tensor_core.cu", "backward_3_tensor_core.cu"),
            min_arch=80,
            dtypes=("float16", "bfloat16"),
            head_dims=(32, 64, 96, 128, 192, 256),
            multiple_of=8,
            masks=(("bits", "bytes"), ("bits",)),
            dropout=True,
            intervals=True,
            scores=("softcap", "bias", "alibi"),
            bias_as_q=True,
        ),
        HOPPER_WIDE,  # behind all that take narrower heads
        HOPPER_FLOAT32,
        Rung(
            name="simple",
            files=("forward_1_simple.cu", "backward_1_simple.cu"),
            min_arch=75,
            dtypes=("float32", "float16", "bfloat16"),
            head_dims=(32, 64, 96, 128, 192, 256, 512),
            masks=(("bytes",), ("bytes",)),
            dropout=True,
            intervals=True,
            scores=("softcap", "bias", "alibi"),
            sums_bias=True,
        ),
        Rung(
            name="mma",
            files=("forward_2_mma.cu", "backward_2_mma.cu"),
            min_arch=80,
            dtypes=("float16", "bfloat16"),
            head_dims=(32, 64, 96, 128),
            multiple_of=8,
            teaching=True,
        ),
        *(
            Rung(
                name=name,
                files=(file, None),
                min_arch=min_arch,
                only_min_arch=min_arch == 90,
                dtypes=("float16", "bfloat16"),
                head_dims=(64, 128),
                multiple_of=8,
                teaching=True,
            )
            for name, file, min_arch in (
                ("swizzle", "forward_2b_swizzle.cu", 80),
                ("cp_async", "forward_2c_cp_async.cu", 80),
                ("wgmma", "forward_3b_wgmma.cu", 90),
                ("tensor_map", "forward_3c_tensor_map.cu", 90),
                ("producer", "forward_3d_producer.cu", 90),
                ("ping_pong", "forward_3e_ping_pong.cu", 90),
            )
        ),
    )
}


# Cost of a tile of packed rows for each key, relative to a 128-row tile of one head in hopper, as timed on an H200:
# (max head size, (rows, cost) of each tile). PACKED_START and HEAD_START: prologue and epilogue of a tile, in keys.
PACKED_TILES = ((128, ((16, 0.5), (32, 0.8))), (256, ((16, 0.72),)))
PACKED_START, HEAD_START = 400, 200
MANY_KEYS = 256  # with at least as many keys, `min_rows` does not apply to a plain forward: it was timed with as few keys as rows
MOST_QUERIES = 256  # more have not been timed


def _worth_packing(call: Call) -> bool:
    """Whether tiles that pack the heads of a group, with keys split evenly over the multiprocessors, take less time than tiles of one head,
    which are spread over the multiprocessors whole."""
    (B, H, Nq, _), (_, Hkv, Nk, _) = call.q.shape, call.k.shape
    multiprocessors = _sm_count(call.q.device.index) if call.q.device.type == "cuda" else 132  # an H200's
    kinds = next((kinds for up_to, kinds in PACKED_TILES if call.head_dim <= up_to), PACKED_TILES[-1][1])
    packed = Nq * (H // Hkv)
    rows, cost = next((kind for kind in kinds if packed <= kind[0]), kinds[-1])
    whole_rounds = -(-B * H * -(-Nq // 128) // multiprocessors)
    time = cost * B * Hkv * -(-packed // rows) * (Nk + PACKED_START) / multiprocessors
    return Nq <= MOST_QUERIES and not call.has_dropout and time <= whole_rounds * (Nk + HEAD_START)


# Time of a tile of 192 rows relative to one of 128, dense and causal, as timed on an H200: of head sizes 72 and 88, of 80, of 96.
TALL_TILE = (1.22, 1.20), (1.36, 1.39), (1.41, 1.43)


def _worth_tall(call: Call) -> bool:
    """Whether tiles of 192 rows of Q take less time than tiles of 128: fewer copies, but also fewer tiles, which fill a round less well."""
    B, H, Nq, D = call.q.shape
    causal = call.visible == "causal"
    kind = 0 if D % 16 or call.v.shape[3] % 16 else 1 if call.head_dim <= 80 else 2
    multiprocessors = _sm_count(call.q.device.index) if call.q.device.type == "cuda" else 132  # an H200's

    def rounds(rows: int) -> int:
        tiles = -(-Nq // rows)
        units = B * H * ((tiles + 1) // 2 if causal else tiles)  # causal, a block takes a long tile and a short one together
        return -(-units // multiprocessors)

    return TALL_TILE[kind][causal] * rounds(192) < 0.98 * rounds(128)


def _as_read(rung: Rung, tensors: tuple[Form, ...], copied: tuple[bool, ...]) -> tuple[list[Form], tuple[bool, ...]]:
    """The forms in which kernels get these tensors, and which are copied for that: those of `copied`, and those that cannot be read."""
    copied = tuple(copy or not rung.reads(x) for x, copy in zip(tensors, copied, strict=True))
    return [x.contiguous() if copy else x for x, copy in zip(tensors, copied, strict=True)], copied


def _to_copy(rung: Rung, tensors: tuple[Tensor, ...], copied: tuple[bool, ...]) -> tuple[bool, ...]:
    """`copied`, and beside them those that begin between multiples of 16 bytes where the kernel copies 16 at a time."""
    if rung.multiple_of == 1:
        return copied
    return tuple(copy or x.data_ptr() % 16 != 0 for x, copy in zip(tensors, copied, strict=True))


def _as_contiguous(tensors: tuple[Tensor, ...], copied: tuple[bool, ...]) -> list[Tensor]:
    return [x.clone(memory_format=torch.contiguous_format) if copy else x for x, copy in zip(tensors, copied, strict=True)]


def _readable_bias(rung: Rung, bias: Tensor | None) -> tuple[Tensor | None, tuple[int, ...] | None]:
    """A bias that the rung's kernels can read: this one, or, where a tensor map cannot, a copy in its own shape, whose rows begin at
    multiples of 16 bytes, and that one's strides."""
    if bias is None or rung.bias_up_to is None:
        return bias, None
    *outer, last = _strides(bias.shape, bias.stride())
    if (last == 1 or bias.shape[3] == 1) and not any(stride % 8 for stride in outer) and bias.data_ptr() % 16 == 0:
        return bias, None
    rows = bias.new_empty((*bias.shape[:3], (bias.shape[3] + 7) // 8 * 8))
    copy = rows[..., : bias.shape[3]].copy_(bias)
    return copy, _strides(copy.shape, copy.stride())


def _strides(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    """0 where a dimension of size 1 may be broadcast."""
    return tuple(0 if n == 1 else s for n, s in zip(shape, stride, strict=True))


def _mask_fields(rung: Rung, form: str | None, mask: Tensor | None) -> tuple[bytes, Tensor | None]:
    """The mask's fields in the struct, and what must stay alive until the launch."""
    if form is None:
        return NO_MASK, None
    if form == "bytes":
        return MASK.pack(mask.data_ptr(), *mask.stride()), mask
    bits = rung._pack_mask(mask, form == "key bits")
    b, h, row, _ = (0 if n == 1 else s for n, s in zip(bits.shape, bits.stride(), strict=True))
    along_queries, along_keys = (row, 1) if form == "bits" else (int(mask.stride(2) != 0), row)
    return MASK.pack(bits.data_ptr(), b, h, along_queries, along_keys), bits


def _fields(call: Call, tensors: tuple[Form, ...], scale: float) -> tuple[tuple[int | bytes, ...], bytes, bytes]:
    """What a Launch keeps of the tensors, of the settings, and of what each row sees."""
    q, _, v, *_ = tensors
    (B, H, Nq, D), (_, Hkv, Nk, Dv) = q.shape, v.shape
    drop = threshold(call.settings.dropout_p)
    return (
        tuple(field for x in tensors for field in (0, STRIDES.pack(*x.stride[:3]))) + (8 - len(tensors)) * NO_TENSOR,
        SETTINGS.pack(B, H, Hkv, Nq, Nk, D, Dv, scale, drop, 256 / (256 - drop), LOWEST / max(1, scale * LOG2_E)),
        _interval(call) if call.visible == "interval" else NO_INTERVAL,
    )


def _interval(call: Call) -> bytes:
    """`struct Interval` of attention.h. A limit that no row reaches is none."""
    settings, Nq, Nk = call.settings, call.q.shape[2], call.k.shape[2]
    diagonal = settings.diagonal_of(Nq, Nk)
    left = -1 if settings.left is None or diagonal + Nq - 1 - settings.left <= 0 else settings.left
    right = -1 if settings.right is None or diagonal + settings.right >= Nk - 1 else settings.right
    strides = (0, 0, 0, 0) if call.spans is None else call.spans.stride
    return INTERVAL.pack(*strides, left, right, diagonal, settings.q_offset, settings.k_offset)


def scoring(call: Call) -> Scoring | None:
    """What its kernels are told about the scores of a call, beside addresses; None where they stay as they are."""
    if not call.score:
        return None
    fields = Scoring(softcap=call.settings.softcap or 0, scale=_positive(call.settings.scale)[1])
    if call.bias is not None:
        shape = tuple(call.bias.shape)
        stride = _strides(shape, call.bias.stride)
        number = build.DTYPE_NUMBER[DTYPE_NAMES[call.bias.dtype]]
        fields = fields._replace(bias_stride=stride, bias_shape=shape, bias_type=number)
    return fields if call.alibi is None else fields._replace(alibi_stride=call.alibi.stride)


def declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library, its functions of cuda/attention.h declared to ctypes."""
    library.attention.argtypes = library.workspace_floats.argtypes = [ctypes.c_char_p]
    library.workspace_floats.restype = ctypes.c_int64
    return library


@functools.cache
def _why_no_kernels(rung: Rung, device: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if not rung.runs_on(major * 10 + minor):
        needed = f"compute capability {rung.min_arch // 10}.{rung.min_arch % 10}{' and no other' if rung.only_min_arch else ''}"
        return f"it needs {needed}, {torch.cuda.get_device_name(device)} has {major}.{minor}"
    return None


def params_size(score: tuple[str, ...]) -> int:
    """Of the struct that a kernel takes."""
    return PARAMS.size + (SCORING.size if score else 0)


@functools.cache
def _library(
    rung: Rung,
    which: int,
    device: int,
    dtype: str,
    sizes: tuple[int, int],
    visible: str,
    mask: str | None,
    dropout: bool,
    float8: bool,
    score: tuple[str, ...],
    tall: bool,
) -> ctypes.CDLL:
    """The rung's forward (0) or backward (1) for one kind of call, compiled if it must be."""
    arch = build.arch_of(torch.cuda.get_device_capability(device))
    wanted = rung.specialisation(which, arch, dtype, sizes, visible, mask, dropout, float8, score, tall)
    return declared(build.load(wanted, params_size(score)))


def _positive(scale: float) -> tuple[float, float]:
    """scale as a factor of q times a scale that is positive and not tiny.

    Kernels take the maximum of unscaled scores, which a negative scale would turn into the minimum, and sum a hidden score from −2¹²⁷,
    which a tiny scale would bring up to the others."""
    if abs(scale) >= SMALLEST_SCALE:
        return math.copysign(1, scale), abs(scale)
    return (math.copysign(SMALLEST_SCALE, scale), max(abs(scale) / SMALLEST_SCALE, SMALLEST_SCALE)) if scale else (0, 1.0)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


@functools.cache
def _sm_count(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _pack_mask_library(device: int) -> ctypes.CDLL:
    arch = build.arch_of(torch.cuda.get_device_capability(device))
    library = build.load(build.Specialisation(PACK_MASK, arch), PACK_PARAMS.size)
    library.pack_mask.argtypes = [ctypes.c_char_p]
    return library


def _is_read_once(mask: Form) -> bool:
    """Whether a forward reads each byte of the mask once, and may read 16 at a time. Then packing, which reads them too, saves nothing."""
    b, h, i, j = mask.stride
    once = all(stride or n == 1 for n, stride in zip(mask.shape[:3], (b, h, i), strict=True))
    return once and j == 1 and not (b | h | i) % 16


def adds_quickly(q: Tensor, v: Tensor, trained: bool = False) -> bool:
    """Whether a bias of q's dtype, or `trained` one that needs a gradient, is added by a kernel on tensor cores. PyTorch's own are faster
    than `simple`, which adds all others."""
    if not q.is_cuda:
        return True
    device = torch.cuda.get_device_properties(q.device)
    for rung in (HOPPER, RUNGS["tensor_core"]):
        narrow = max(q.shape[-1], v.shape[-1]) <= (rung.bias_up_to or rung.head_dims[-1])
        sums = rung.sums_bias or not trained
        if narrow and sums and DTYPE_NAMES.get(q.dtype) in rung.dtypes and rung.runs_on(10 * device.major + device.minor):
            return True
    return False


def pack_mask(mask: Tensor, by_keys: bool = False, launch=None) -> Tensor:
    """bool (B, H, Nq, Nk), any strides → int32 (B or 1, H or 1, Nq or 1, words): what is broadcast is packed once.

    Bit c % 32 of word c / 32 is set if column c is hidden; rows are padded with ones to a multiple of 128 columns. With by_keys, the rows
    of the result are keys and its bits queries, (B or 1, H or 1, Nk, words); a mask that is the same for all queries gives words for 128.
    """
    B, H, Nq = (1 if stride == 0 else n for n, stride in zip(mask.shape[:3], mask.stride()[:3], strict=True))
    Nk = mask.shape[3]
    if by_keys and mask.stride(2) == 0:
        Nq = 128
    rows, columns = (Nk, Nq) if by_keys else (Nq, Nk)
    bits = torch.empty((B, H, rows, (columns + 127) // 128 * 4), dtype=torch.int32, device=mask.device)
    if bits.numel():
        (launch or _launch_pack_mask)(mask, bits, B, H, Nq, Nk, by_keys)
    return bits


def _launch_pack_mask(mask: Tensor, bits: Tensor, *settings: int) -> None:
    device = mask.device.index
    library = _pack_mask_library(device)
    stream = torch._C._cuda_getCurrentRawStream(device)
    params = PACK_PARAMS.pack(mask.data_ptr(), *mask.stride(), bits.data_ptr(), *settings, device, stream)
    raise_on(library.pack_mask(params), library, mask)

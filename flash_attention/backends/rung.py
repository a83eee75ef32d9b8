"""A rung of the ladder of kernels in `cuda/`: which files, which calls it serves and why not others, what is compiled for a call.

cuda.py has the table of them, RUNGS.
"""

import ctypes
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flash_attention import build
from flash_attention.backends import libraries
from flash_attention.backends.crossover import worth_packing, worth_tall
from flash_attention.backends.launch import BACKWARD, DTYPE_NAMES, FORWARD, Launch, fields, scoring
from flash_attention.backends.masks import is_read_once, pack_mask, pack_mask_library
from flash_attention.backends.plans import Backward, Forward
from flash_attention.call import Call, Form

MANY_KEYS = 256  # with at least as many keys, `min_rows` does not apply to a plain forward: it was timed with as few keys as rows


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: it is part of the key by which a call's library is found
class Rung:
    """One rung: its files, and what they serve. min_arch is a compute capability times ten."""

    name: str
    files: tuple[str, str | None]  # forward, backward; a step of the ladder may have a forward alone
    min_arch: int
    dtypes: tuple[str, ...]
    head_dims: tuple[int, ...]  # compiled sizes; a head size is padded to the next
    pairs: tuple[tuple[int, int], ...] = ()  # compiled pairs of sizes: of Q and K, and another of V
    multiple_of: int = 1  # head sizes are multiples of this, and rows begin at multiples of as many elements
    masks: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())  # forms (build.MASK_NUMBER) that its forward and its backward read
    dropout: bool = False
    intervals: bool = False  # whether each row may see its own interval: windows, spans, parts of a longer sequence
    scores: tuple[str, ...] = ()  # which of softcap, bias and alibi its kernels apply
    bias_as_q: bool = False  # a bias must have q's dtype
    bias_up_to: int | None = None  # if set, tiles of a bias are copied by tensor map, for head sizes up to this
    sums_bias: bool = False  # its own backward computes a bias' gradient
    drops_dead: bool = False  # its backward kernels ignore dO of rows that attend nothing
    teaching: bool = False  # a step of the ladder, taken only by name
    only_min_arch: bool = False  # instructions that no other compute capability has
    device_type: ClassVar[str] = "cuda"  # of the tensors it takes
    wide_forward: tuple[int, str] | None = None  # above this head size the forward has a file of its own
    wide_backward: tuple[int, str] | None = None  # the same for the backward
    # And others up to these head sizes: for calls without dropout, changed scores or a mask over intervals, and for plain ones, without
    # mask or intervals either.
    simpler_backward: tuple[int, str] | None = None
    plain_backward: tuple[int, str] | None = None
    tall_forward: tuple[tuple[int, ...], str] | None = None  # for plain calls: compiled sizes, and the file whose tiles have more rows
    min_rows: tuple[tuple[int, int, int], ...] = ()  # (max head size, most rows for which the rung below is faster, the same with dropout)
    packs_heads: bool = False  # a tile holds all query heads of a key head: the rung for few queries
    min_scores: tuple[tuple[int, int], ...] = ()  # (max head size, most scores of all heads for which the rung below is faster)
    slower_on: tuple[int, ...] = ()  # compute capabilities, times ten, on which the rung below is faster
    forward_workspace: bool = False  # whether its forward may need one
    float8_keys: bool = False  # whether K and V may be e4m3
    tf32: bool = False  # whether it has faster kernels for `Settings.tf32`

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
        """Whether its own backward computes the gradient of the call's bias; otherwise `_summing` another's does."""
        special = call.mask is not None or call.has_dropout or call.visible == "interval" or 0 in call.q.shape
        return self.sums_bias and (self.bias_up_to is None or not special)

    def _summing(self, call: Call) -> "Rung":
        """The rung whose backward computes the gradient of the call's bias where this one's does not."""
        fast = self._other("tensor_core")
        if fast.why_not(call) or (build.failures and fast.why_not_built(BACKWARD, call)):
            return self._other("simple")
        return fast

    def _other(self, name: str) -> "Rung":
        from flash_attention.backends.cuda import RUNGS  # which is made of rungs

        return RUNGS[name]

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
        return libraries.why_no_kernels(self, device)

    def why_not_built(self, which: int, call: Call) -> str | None:
        """Why a library that its forward or backward needs for the call cannot be built, or None. Builds it at the first attempt."""
        try:
            self._libraries(which, call)
        except build.BuildError as error:
            return str(error)[:2000]  # a compiler's message may be long
        return None

    def _libraries(self, which: int, call: Call) -> ctypes.CDLL:
        """The library of the call's forward or backward; the one that packs its mask is loaded first."""
        device = call.q.device.index
        if self._mask_form(which, call) not in (None, "bytes"):
            pack_mask_library(device)
        return libraries.library(self, which, device, *self.kind(which, call))

    def kind(self, which: int, call: Call) -> tuple:
        """The arguments of `specialisation` for the call's forward or backward."""
        sizes, form = self.compiled(call), self._mask_form(which, call)
        tall = which == FORWARD and self.has_tall(sizes, call.visible, form, call.has_dropout, call.score) and worth_tall(call)
        tf32 = self.tf32 and call.settings.tf32
        return DTYPE_NAMES[call.q.dtype], sizes, call.visible, form, call.has_dropout, call.has_float8_keys, call.score, tall, tf32

    def has_tall(self, sizes: tuple[int, int], visible: str, mask: str | None, dropout: bool, score: tuple[str, ...] = ()) -> bool:
        """Whether `tall_forward` serves such calls."""
        plain = visible != "interval" and mask is None and not dropout and not score
        return plain and self.tall_forward is not None and sizes[0] == sizes[1] and sizes[0] in self.tall_forward[0]

    def must_hide_dead(self, call: Call) -> bool:
        """Whether rows may attend nothing and its backward does not ignore their dO."""
        blinds = call.settings.visible(call.q.shape[2], call.k.shape[2], None).blinds
        return not self.drops_dead and (call.mask is not None or call.spans is not None or call.bias is not None or blinds)

    def why_no_backward(self) -> str | None:
        """Why this rung computes no gradients, or None."""
        return None if self.files[BACKWARD] else "it is a step of the ladder and has a forward alone"

    def runs_on(self, arch: int) -> bool:
        """Whether its kernels can be compiled for this compute capability, times ten."""
        return arch == self.min_arch if self.only_min_arch else arch >= self.min_arch

    def compiled(self, call: Call) -> tuple[int, int]:
        """The compiled head sizes, of Q and K and of V, to which the call's are padded: the smallest that are large enough."""
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
        tf32: bool = False,
    ) -> build.Specialisation:
        """The specialisation of its forward or backward for one kind of call. sizes: compiled ones, of Q and K and of V. tall: use
        `tall_forward`."""
        D, Dv = sizes
        kind = dtype, visible == "causal", mask, dropout, visible == "interval"
        file = (
            self.tall_forward[1]
            if tall and self.tall_forward
            else self.file(which, D, visible == "interval", mask is not None, dropout or bool(score))
        )
        return build.Specialisation(file, arch, D, *kind, None if Dv == D else Dv, float8, score, tf32)

    def file(self, which: int, head_dim: int, interval: bool, mask: bool, other: bool) -> str:
        """The source file of its forward or backward for a compiled head size. other: dropout, or changed scores."""
        wide = (self.wide_forward, self.wide_backward)[which]
        if not wide or head_dim <= wide[0]:
            return self.files[which]
        if which == BACKWARD and self.simpler_backward and head_dim <= self.simpler_backward[0] and not (other or (interval and mask)):
            return self.simpler_backward[1]
        if which == BACKWARD and self.plain_backward and head_dim <= self.plain_backward[0] and not (other or interval or mask):
            return self.plain_backward[1]
        return wide[1]

    def worthwhile(self, call: Call, which: int = FORWARD) -> bool:
        """Whether this rung is faster than those below it for the call's forward or backward."""
        if self.packs_heads:
            return which == FORWARD and worth_packing(call)
        if call.score:
            return True  # with scores changed, `hopper` is faster than `tensor_core` for few rows too
        if self.min_scores:
            B, H, Nq, _ = call.q.shape
            few_scores = next((scores for up_to, scores in self.min_scores if call.head_dim <= up_to), 0)
            return B * H * Nq * call.k.shape[2] > few_scores and not self._is_slower_on(call.q.device)
        few = next((kinds for up_to, *kinds in self.min_rows if call.head_dim <= up_to), (0, 0))
        plain = which == FORWARD and not call.has_dropout and call.mask is None and call.visible != "interval"
        return call.q.shape[2] > few[call.has_dropout] or (plain and call.k.shape[2] >= MANY_KEYS)

    def _is_slower_on(self, device: torch.device) -> bool:
        if not self.slower_on or device.type != "cuda":
            return False
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor in self.slower_on

    def plan(self, which: int, call: Call) -> "Forward | Backward":
        """The plan of the call's forward or backward.

        Raises:
            NotImplementedError: a backward is wanted and the rung has a forward alone.
        """
        if which == BACKWARD and (reason := self.why_no_backward()):
            raise NotImplementedError(f"backend {self.name!r} gives no gradients: {reason}")
        if which == BACKWARD and call.to_bias and not self._sums_bias(call):
            return self._summing(call).plan(which, call)
        return (Forward, Backward)[which].of(self, call)

    # ---- what the kernels can read in place

    def reads(self, x: Form) -> bool:
        """The last dimension is contiguous and, where the kernel copies 16 bytes at a time, rows begin at multiples of 16 bytes."""
        b, h, i, d = x.stride
        n = self.multiple_of
        return (d == 1 or x.shape[3] == 1) and (n == 1 or not (b | h | i) % n)

    def mask_forms(self, which: int, dropout: bool, score: tuple[str, ...] = ()) -> tuple[str, ...]:
        """The forms in which this rung's forward or backward reads a mask, the usual one first."""
        # With dropout, only the first form: one call of Philox covers columns 8 apart, but the bytes that a thread reads at once are
        # adjacent. With changed scores too: with bytes, the keys of a tile are permuted.
        return self.masks[which][:1] if dropout or score else self.masks[which]

    def _mask_form(self, which: int, call: Call) -> str | None:
        """The form in which the call's mask is best read."""
        if call.mask is None:
            return None
        forms = self.mask_forms(which, call.has_dropout, call.score)
        return "bytes" if "bytes" in forms and call.mask_is_aligned and is_read_once(call.mask) else forms[0]

    def _pack_mask(self, mask: Tensor, by_keys: bool) -> Tensor:
        return pack_mask(mask, by_keys)

    def launch(self, which: int, call: Call, tensors: tuple[Form, ...], scale: float) -> Launch:
        """The launch of kernels that read and write tensors of these forms; `scale` is positive."""
        device = call.q.device.index
        library, sm_count = self._libraries(which, call), libraries.sm_count(device)
        return Launch(library, *fields(call, tensors, scale), device, sm_count, scoring=scoring(call))

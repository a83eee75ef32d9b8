"""The CUDA backends: each rung of `cuda/`, behind the same two functions as the reference.

Torch allocates every tensor; a kernel gets addresses, sizes and strides in one struct (cuda/attention.h), on the current stream of q's
device. Nothing synchronises, nothing is copied that the kernel can read where it is.
"""

import ctypes
import functools
import math
import struct
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from flash_attention import allocate, build
from flash_attention.backends.launch import MASK, NO_MASK, NO_TENSOR, PARAMS, SETTINGS, STRIDES, Launch, raise_on
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
# Kernels that have run in the emulator but have not been timed on a GPU: a call has to name their rung. True, once they are known to be
# faster, lets `flash_attention()` choose them.
BETWEEN_IS_TIMED = False  # `hopper` for head sizes between 64, 128 and 256, until then `hopper_between`
WIDE_IS_TIMED = False  # `hopper_wide`


@dataclass(frozen=True, eq=False)  # compared and hashed as the one object that it is: a call looks its library up by it
class Rung:
    """One rung: which files, and what they serve. min_arch is a compute capability times ten."""

    name: str
    files: tuple[str, str]  # forward, backward
    min_arch: int
    dtypes: tuple[str, ...]
    head_dims: tuple[int, ...]  # compiled sizes; a head size is padded to the next
    pairs: tuple[tuple[int, int], ...] = ()  # compiled sizes of Q and K beside others of V
    multiple_of: int = 1  # of which head sizes, and the alignment of rows in elements
    masks: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())  # forms (build.MASK_NUMBER) that its forward and its backward read
    dropout: bool = False
    teaching: bool = False  # a step of the ladder, or not timed yet: taken only by name
    only_min_arch: bool = False  # instructions that no other compute capability has
    device_type: ClassVar[str] = "cuda"  # of the tensors it takes
    wide_backward: tuple[int, str] | None = None  # above this head size the backward has a file of its own
    few_rows: tuple[tuple[int, int, int], ...] = ()  # up to a head size: rows up to which a lower rung is faster, without and with dropout

    def why_not(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout_p: float) -> str | None:
        """Why this rung cannot serve the call, or None."""
        if q.device.type != self.device_type:
            return f"it needs tensors on {'a CUDA device' if self.device_type == 'cuda' else 'the CPU'}, got {q.device}"
        if DTYPE_NAMES.get(q.dtype) not in self.dtypes:
            return f"it computes in {', '.join(self.dtypes)}, got {q.dtype}"
        D, Dv = q.shape[3], v.shape[3]
        if max(D, Dv) > self.head_dims[-1] or D % self.multiple_of or Dv % self.multiple_of:
            kind = f"multiples of {self.multiple_of} " if self.multiple_of > 1 else ""
            return f"it takes head sizes {kind}up to {self.head_dims[-1]}, got D = {D}, Dv = {Dv}"
        if dropout_p and not self.dropout:
            return f"it serves no dropout, got dropout_p = {dropout_p}"
        if mask is not None and not self.masks[FORWARD]:
            return f"it serves no mask, got {tuple(mask.shape)}"
        return self._why_no_kernels(q.device.index or 0)

    def _why_no_kernels(self, device: int) -> str | None:
        return _why_no_kernels(self, device)

    def why_not_built(self, which: int, q: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout_p: float) -> str | None:
        """Why what its forward or backward needs for the call cannot be built, or None. Builds it if that has not been tried."""
        form = None if mask is None else self._mask_form(which, mask, dropout_p > 0)
        device = q.device.index
        try:
            if form not in (None, "bytes"):
                _pack_mask_library(device)
            _library(self, which, device, q.dtype, self.compiled(q.shape[3], v.shape[3]), causal, form, dropout_p > 0)
        except build.BuildError as error:
            return str(error)[:2000]  # a compiler may have much to say

    def runs_on(self, arch: int) -> bool:
        """Whether its kernels can be compiled for this compute capability, times ten."""
        return arch == self.min_arch if self.only_min_arch else arch >= self.min_arch

    def compiled(self, D: int, Dv: int) -> tuple[int, int]:
        """The compiled head sizes, of Q and K and of V, to which a call's are padded: the least that hold them."""
        sizes = (*((size, size) for size in self.head_dims), *self.pairs)
        return min((size for size in sizes if size[0] >= D and size[1] >= Dv), key=sum)

    def specialisation(
        self, which: int, arch: str, sizes: tuple[int, int], dtype: str, causal: bool, mask: str | None, dropout: bool
    ) -> build.Specialisation:
        """Its forward or backward for compiled head sizes."""
        D, Dv = sizes
        return build.Specialisation(self.file(which, D), arch, D, dtype, causal, mask, dropout, None if Dv == D else Dv)

    def file(self, which: int, head_dim: int) -> str:
        """The source of its forward or backward for a compiled head size."""
        if which == BACKWARD and self.wide_backward and head_dim > self.wide_backward[0]:
            return self.wide_backward[1]
        return self.files[which]

    def pays(self, q: Tensor, v: Tensor, dropout_p: float) -> bool:
        """Whether this rung, of those that can serve a call, is the one to choose."""
        head_dim, rows = max(q.shape[3], v.shape[3]), q.shape[2]
        few = next((kinds for up_to, *kinds in self.few_rows if head_dim <= up_to), (0, 0))
        return rows > few[dropout_p > 0]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor | None, causal: bool, scale: float, dropout_p: float
    ):
        """→ O (B, H, Nq, Dv), LSE (B, H, Nq)."""
        O, LSE = allocate.forward_outputs(q, v)
        factor, scale = _positive(scale)
        q, k, v = (self._readable(x) for x in (q if factor == 1 else q * factor, k, v))
        form, mask_fields, _alive = self._mask(FORWARD, mask, seed is not None)
        tensors = q, k, v, O
        launch = self._launch(FORWARD, tensors, form, seed, causal, scale, dropout_p)
        launch(q, [x.data_ptr() for x in tensors], (LSE.data_ptr(), 0, 0, _address(seed)), mask_fields)
        return O, LSE

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, O: Tensor, causal: bool, scale: float) -> Launch | None:
        """The launch of a forward without mask and dropout for tensors like these, wherever they begin at a multiple of 16 bytes. None if
        the kernel cannot read them as they are, or could not be built and another has taken its place."""
        if _positive(scale)[0] != 1 or not all(self._is_readable(x) for x in (q, k, v)):
            return None
        try:
            return self._launch(FORWARD, (q, k, v, O), None, None, causal, scale, 0.0)
        except build.BuildError:
            return None

    def backward(
        self,
        dO: Tensor,
        dLSE: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        O: Tensor,
        LSE: Tensor,
        seed: Tensor | None,
        causal: bool,
        scale: float,
        dropout_p: float,
    ):
        """→ dQ, dK, dV, shaped as q, k, v."""
        dQ, dK, dV = allocate.backward_outputs(q, k, v)
        factor, scale = _positive(scale)
        if mask is not None or (causal and q.shape[2] > k.shape[2]):  # rows may attend nothing
            (dO,) = hide_dead(LSE.isneginf(), dO)
        q, k, v, O, dO = (self._readable(x) for x in (q if factor == 1 else q * factor, k, v, O, dO))
        LSE, dLSE = LSE.contiguous(), None if dLSE is None else dLSE.contiguous()
        form, mask_fields, _alive = self._mask(BACKWARD, mask, seed is not None)
        tensors = q, k, v, O, dO, dQ, dK, dV
        launch = self._launch(BACKWARD, tensors, form, seed, causal, scale, dropout_p)
        workspace = torch.empty(launch.workspace_floats(), dtype=torch.float32, device=q.device)
        pointers = LSE.data_ptr(), _address(dLSE), workspace.data_ptr(), _address(seed)
        launch(q, [x.data_ptr() for x in tensors], pointers, mask_fields)
        return (dQ if factor == 1 else dQ.mul_(factor)), dK, dV

    # ---- what the kernels can read in place

    def _is_readable(self, x: Tensor) -> bool:
        """The last dimension is contiguous and, where the kernel copies 16 bytes at a time, rows begin at multiples of 16 bytes."""
        b, h, i, d = x.stride()
        n = self.multiple_of
        return (d == 1 or x.shape[3] == 1) and (n == 1 or not ((b | h | i) % n or x.data_ptr() % 16))

    def _readable(self, x: Tensor) -> Tensor:
        return x if self._is_readable(x) else x.clone(memory_format=torch.contiguous_format)

    def mask_forms(self, which: int, dropout: bool) -> tuple[str, ...]:
        """The forms in which this rung's forward or backward reads a mask, the usual one first."""
        # Of two, dropout takes the first: a call of Philox covers columns that lie 8 apart, the bytes that a thread reads at once lie
        # side by side.
        return self.masks[which][:1] if dropout else self.masks[which]

    def _mask_form(self, which: int, mask: Tensor, dropout: bool) -> str:
        """The form in which this mask is best read."""
        forms = self.mask_forms(which, dropout)
        return "bytes" if "bytes" in forms and _is_read_once(mask) else forms[0]

    def _mask(self, which: int, mask: Tensor | None, dropout: bool) -> tuple[str | None, bytes, Tensor | None]:
        """The mask's form, its fields in the struct, and what must stay alive until the launch."""
        if mask is None:
            return None, NO_MASK, None
        form = self._mask_form(which, mask, dropout)
        if form == "bytes":
            return "bytes", MASK.pack(mask.data_ptr(), *mask.stride()), mask
        bits = self._pack_mask(mask, form == "key bits")
        b, h, row, _ = (0 if n == 1 else s for n, s in zip(bits.shape, bits.stride(), strict=True))
        along_queries, along_keys = (row, 1) if form == "bits" else (int(mask.stride(2) != 0), row)
        return form, MASK.pack(bits.data_ptr(), b, h, along_queries, along_keys), bits

    def _pack_mask(self, mask: Tensor, by_keys: bool) -> Tensor:
        return pack_mask(mask, by_keys)

    def _launch(
        self,
        which: int,
        tensors: tuple[Tensor, ...],
        mask: str | None,
        seed: Tensor | None,
        causal: bool,
        scale: float,
        dropout_p: float,
    ) -> Launch:
        q, _, v, *_ = tensors
        device = q.device.index
        library = _library(self, which, device, q.dtype, self.compiled(q.shape[3], v.shape[3]), causal, mask, seed is not None)
        return Launch(library, *_fields(tensors, scale, dropout_p), device, _sm_count(device))


HOPPER = Rung(
    name="hopper",
    files=("forward_4_hopper.cu", "backward_4_hopper.cu"),
    min_arch=90,
    only_min_arch=True,
    dtypes=("float16", "bfloat16"),
    head_dims=(64, 128, 256),
    multiple_of=8,
    masks=(("bits",), ("key bits",)),
    dropout=True,
    wide_backward=(128, "backward_4_hopper_wide.cu"),
    few_rows=((64, 128, 384), (128, 64, 192), (256, 64, 256)),
)
HOPPER_BETWEEN = replace(HOPPER, name="hopper_between", head_dims=(64, 80, 96, 112, 128, 160, 192, 256), pairs=((192, 128),), teaching=True)
HOPPER_SPLIT = replace(  # another backward for the widest of them
    HOPPER_BETWEEN,
    name="hopper_split",
    files=("forward_4_hopper.cu", "backward_5_split.cu"),
    head_dims=(160, 192, 256),
    wide_backward=None,
)
HOPPER_WIDE = replace(
    HOPPER,
    name="hopper_wide",
    files=("forward_5_wide.cu", "backward_5_wide.cu"),
    head_dims=(320, 384, 512),
    wide_backward=None,
    few_rows=(),
    teaching=not WIDE_IS_TIMED,
)
RUNGS = {
    rung.name: rung
    for rung in (
        replace(HOPPER, head_dims=HOPPER_BETWEEN.head_dims, pairs=HOPPER_BETWEEN.pairs) if BETWEEN_IS_TIMED else HOPPER,
        Rung(
            name="tensor_core",
            files=("forward_3_tensor_core.cu", "backward_3_tensor_core.cu"),
            min_arch=80,
            dtypes=("float16", "bfloat16"),
            head_dims=(32, 64, 96, 128, 192, 256),
            multiple_of=8,
            masks=(("bits", "bytes"), ("bits",)),
            dropout=True,
        ),
        HOPPER_WIDE,  # behind all that take narrower heads
        Rung(
            name="simple",
            files=("forward_1_simple.cu", "backward_1_simple.cu"),
            min_arch=75,
            dtypes=("float32", "float16", "bfloat16"),
            head_dims=(32, 64, 96, 128, 192, 256, 512),
            masks=(("bytes",), ("bytes",)),
            dropout=True,
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
        HOPPER_BETWEEN,
        HOPPER_SPLIT,
    )
}


def _fields(tensors: tuple[Tensor, ...], scale: float, dropout_p: float) -> tuple[tuple[int | bytes, ...], bytes]:
    """What a Launch keeps of the tensors, and of the settings."""
    q, _, v, *_ = tensors
    (B, H, Nq, D), (_, Hkv, Nk, Dv) = q.shape, v.shape
    drop = threshold(dropout_p)
    return (
        tuple(field for x in tensors for field in (0, STRIDES.pack(*x.stride()[:3]))) + (8 - len(tensors)) * NO_TENSOR,
        SETTINGS.pack(B, H, Hkv, Nq, Nk, D, Dv, scale, drop, 256 / (256 - drop), LOWEST / max(1, scale * LOG2_E)),
    )


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


@functools.cache
def _library(
    rung: Rung, which: int, device: int, dtype: torch.dtype, sizes: tuple[int, int], causal: bool, mask: str | None, dropout: bool
) -> ctypes.CDLL:
    """The rung's forward (0) or backward (1) for one kind of call, compiled if it must be."""
    arch = build.arch_of(torch.cuda.get_device_capability(device))
    return declared(build.load(rung.specialisation(which, arch, sizes, DTYPE_NAMES[dtype], causal, mask, dropout), PARAMS.size))


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


def _is_read_once(mask: Tensor) -> bool:
    """Whether a forward reads each byte of the mask once, and may read 16 at a time. Then packing, which reads them too, saves nothing."""
    b, h, i, j = mask.stride()
    once = all(stride or n == 1 for n, stride in zip(mask.shape[:3], (b, h, i), strict=True))
    return once and j == 1 and not (b | h | i | mask.data_ptr()) % 16


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

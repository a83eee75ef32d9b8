"""The CUDA backends: each rung of `cuda/`, behind the same two functions as the reference.

Torch allocates every tensor; a kernel gets addresses, sizes and strides in one struct (cuda/attention.h), on the current stream of q's
device. Nothing synchronises, nothing is copied that the kernel can read where it is.
"""

import ctypes
import functools
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_attention import allocate, build
from flash_attention.reference.dropout import threshold

PACK_MASK = "pack_mask.cu"

# struct AttentionParams: q, k, v, o, d_o, dq, dk, dv (address and three strides each), the mask (address and four), lse, d_lse, workspace,
# seed, then B, H, Hkv, Nq, Nk, D, Dv, scale, drop_below, keep_scale, deterministic, device, sm_count, and the stream.
PARAMS = struct.Struct("@32q 5q 4q 7i f i f 3i q")
WORKSPACE = 8 * (32 + 5 + 2)  # byte offset of its address, which is known last
PACK_PARAMS = struct.Struct("@q 4q q 4i i q")
DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
NO_TENSOR = (0, 0, 0, 0)
NO_MASK = (0, 0, 0, 0, 0)


@dataclass(frozen=True, eq=False)  # compared and hashed as the one object that it is: a call looks its library up by it
class Rung:
    """One rung: which files, and what they serve. min_arch is a compute capability times ten."""

    name: str
    files: tuple[str, str]  # forward, backward
    min_arch: int
    dtypes: tuple[str, ...]
    head_dims: tuple[int, ...]  # compiled sizes; a head size is padded to the next
    multiple_of: int = 1  # of which head sizes, and the alignment of rows in elements
    packs_mask: bool = False
    plain_only: bool = False  # neither mask nor dropout: a step of the ladder, taken only by name

    def why_not(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout_p: float) -> str | None:
        """Why this rung cannot serve the call, or None."""
        if q.device.type != "cuda":
            return f"it needs tensors on a CUDA device, got {q.device}"
        if DTYPE_NAMES.get(q.dtype) not in self.dtypes:
            return f"it computes in {', '.join(self.dtypes)}, got {q.dtype}"
        D, Dv = q.shape[3], v.shape[3]
        if max(D, Dv) > self.head_dims[-1] or D % self.multiple_of or Dv % self.multiple_of:
            kind = f"multiples of {self.multiple_of} " if self.multiple_of > 1 else ""
            return f"it takes head sizes {kind}up to {self.head_dims[-1]}, got D = {D}, Dv = {Dv}"
        if self.plain_only and (mask is not None or dropout_p):
            got = f"dropout_p = {dropout_p}" if mask is None else f"a mask {tuple(mask.shape)}"
            return f"it serves neither a mask nor dropout, got {got}"
        return _why_no_kernels(q.device.index or 0, self.min_arch)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor | None, causal: bool, scale: float, dropout_p: float
    ):
        """→ O (B, H, Nq, Dv), LSE (B, H, Nq)."""
        O, LSE = allocate.forward_outputs(q, v)
        sign, scale = _positive(scale)
        q, k, v, out = self._readable(q if sign == 1 else q * sign), self._readable(k), self._readable(v), self._writable(O)
        mask_fields, _alive = self._mask(mask)
        library = self._library(0, q, v, causal, mask is not None, seed is not None)
        tensors = (*_fields(q), *_fields(k), *_fields(v), *_fields(out), *NO_TENSOR * 4)
        pointers = (LSE.data_ptr(), 0, 0, 0 if seed is None else seed.data_ptr())
        _launch(library, library.attention, q, _pack(tensors, mask_fields, pointers, q, k, v, scale, dropout_p))
        return (O if out is O else O.copy_(out)), LSE

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
        gradients = allocate.backward_outputs(q, k, v)
        sign, scale = _positive(scale)
        q, k, v, O, dO = (self._readable(x) for x in (q if sign == 1 else q * sign, k, v, O, dO))
        dQ, dK, dV = (self._writable(x) for x in gradients)
        LSE, dLSE = LSE.contiguous(), None if dLSE is None else dLSE.contiguous()
        mask_fields, _alive = self._mask(mask)
        library = self._library(1, q, v, causal, mask is not None, seed is not None)
        tensors = tuple(field for x in (q, k, v, O, dO, dQ, dK, dV) for field in _fields(x))
        pointers = (LSE.data_ptr(), 0 if dLSE is None else dLSE.data_ptr(), 0, 0 if seed is None else seed.data_ptr())
        params = _pack(tensors, mask_fields, pointers, q, k, v, scale, dropout_p)
        workspace = torch.empty(library.workspace_floats(params), dtype=torch.float32, device=q.device)
        _launch(
            library, library.attention, q, params[:WORKSPACE] + workspace.data_ptr().to_bytes(8, sys.byteorder) + params[WORKSPACE + 8 :]
        )
        dQ, dK, dV = (given if given is ours else given.copy_(ours) for given, ours in zip(gradients, (dQ, dK, dV), strict=True))
        return (dQ if sign == 1 else dQ.mul_(sign)), dK, dV

    # ---- what the kernels can read in place

    def _is_readable(self, x: Tensor) -> bool:
        """The last dimension is contiguous and, where the kernel copies 16 bytes at a time, rows begin at multiples of 16 bytes."""
        b, h, i, d = x.stride()
        n = self.multiple_of
        return (d == 1 or x.shape[3] == 1) and (n == 1 or not ((b | h | i) % n or x.data_ptr() % 16))

    def _readable(self, x: Tensor) -> Tensor:
        return x if self._is_readable(x) else x.clone(memory_format=torch.contiguous_format)

    def _writable(self, x: Tensor) -> Tensor:
        return x if self._is_readable(x) else x.new_empty(x.shape)

    def _mask(self, mask: Tensor | None) -> tuple[tuple[int, ...], Tensor | None]:
        """The mask's fields in the struct, and what must stay alive until the launch."""
        if mask is None:
            return NO_MASK, None
        if not self.packs_mask:
            return (mask.data_ptr(), *mask.stride()), mask
        bits = pack_mask(mask)
        strides = [0 if n == 1 else s for n, s in zip(bits.shape, bits.stride(), strict=True)]
        return (bits.data_ptr(), *strides[:3], 1), bits

    def _library(self, which: int, q: Tensor, v: Tensor, causal: bool, mask: bool, dropout: bool) -> ctypes.CDLL:
        return _library(self, which, q.device.index, q.dtype, max(q.shape[3], v.shape[3]), causal, mask, dropout)


RUNGS = {
    rung.name: rung
    for rung in (
        Rung(
            name="tensor_core",
            files=("forward_3_tensor_core.cu", "backward_3_tensor_core.cu"),
            min_arch=80,
            dtypes=("float16", "bfloat16"),
            head_dims=(32, 64, 96, 128, 192, 256),
            multiple_of=8,
            packs_mask=True,
        ),
        Rung(
            name="simple",
            files=("forward_1_simple.cu", "backward_1_simple.cu"),
            min_arch=75,
            dtypes=("float32", "float16", "bfloat16"),
            head_dims=(32, 64, 96, 128, 192, 256, 512),
        ),
        Rung(
            name="mma",
            files=("forward_2_mma.cu", "backward_2_mma.cu"),
            min_arch=80,
            dtypes=("float16", "bfloat16"),
            head_dims=(32, 64, 96, 128),
            multiple_of=8,
            plain_only=True,
        ),
    )
}


@functools.cache
def _why_no_kernels(device: int, min_arch: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if major * 10 + minor < min_arch:
        return f"it needs compute capability {min_arch // 10}.{min_arch % 10}, {torch.cuda.get_device_name(device)} has {major}.{minor}"
    if build.find_nvcc() is None:
        return "nvcc was not found (pip install 'flash_attention[cuda]' brings one)"
    return None


@functools.cache
def _library(rung: Rung, which: int, device: int, dtype: torch.dtype, D: int, causal: bool, mask: bool, dropout: bool) -> ctypes.CDLL:
    """The rung's forward (0) or backward (1) for one kind of call, compiled if it must be."""
    head_dim = next(size for size in rung.head_dims if size >= D)
    arch = build.arch_of(torch.cuda.get_device_capability(device))
    wanted = build.Specialisation(rung.files[which], arch, head_dim, DTYPE_NAMES[dtype], causal, mask, dropout)
    library = build.load(build.build(wanted.file, arch, wanted.defines(), str(wanted)))
    if library.params_size() != PARAMS.size:
        raise build.BuildError(
            f"AttentionParams has {library.params_size()} bytes in C and {PARAMS.size} in Python: attention.h has changed"
        )
    library.attention.argtypes = library.workspace_floats.argtypes = [ctypes.c_char_p]
    library.workspace_floats.restype = ctypes.c_int64
    return library


def _positive(scale: float) -> tuple[int, float]:
    """scale as sign · positive scale: kernels take the maximum of unscaled scores, which a negative scale would turn into the minimum."""
    return (1, scale) if scale > 0 else (-1, -scale) if scale < 0 else (0, 1.0)


def _fields(x: Tensor) -> tuple[int, int, int, int]:
    """struct Tensor4."""
    b, h, n, _ = x.stride()
    return x.data_ptr(), b, h, n


def _pack(tensors, mask, pointers, q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float) -> bytes:
    """struct AttentionParams."""
    B, H, Nq, D = q.shape
    drop = threshold(dropout_p)
    device = q.device.index
    return PARAMS.pack(
        *tensors,
        *mask,
        *pointers,
        B,
        H,
        k.shape[1],
        Nq,
        k.shape[2],
        D,
        v.shape[3],
        scale,
        drop,
        256 / (256 - drop),
        torch.are_deterministic_algorithms_enabled(),
        device,
        _sm_count(device),
        torch._C._cuda_getCurrentRawStream(device),
    )


@functools.cache
def _sm_count(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _launch(library: ctypes.CDLL, entry: Callable[[bytes], int], x: Tensor, params: bytes) -> None:
    error = entry(params)
    if error:
        raise RuntimeError(f"CUDA error {error} at launch on {x.device}, {tuple(x.shape)} {x.dtype}: {library.error_name(error).decode()}")


@functools.cache
def _pack_mask_library(device: int) -> ctypes.CDLL:
    arch = build.arch_of(torch.cuda.get_device_capability(device))
    library = build.load(build.build(PACK_MASK, arch, [], f"{PACK_MASK} sm_{arch}"))
    if library.params_size() != PACK_PARAMS.size:
        raise build.BuildError(
            f"PackParams has {library.params_size()} bytes in C and {PACK_PARAMS.size} in Python: pack_mask.cu has changed"
        )
    library.pack_mask.argtypes = [ctypes.c_char_p]
    return library


def pack_mask(mask: Tensor) -> Tensor:
    """bool (B, H, Nq, Nk), any strides → int32 (B or 1, H or 1, Nq or 1, words): what is broadcast is packed once.

    Bit c % 32 of word c / 32 is set if column c is hidden; rows are padded with ones to a multiple of 128 columns.
    """
    B, H, Nq = (1 if stride == 0 else n for n, stride in zip(mask.shape[:3], mask.stride()[:3], strict=True))
    Nk = mask.shape[3]
    bits = torch.empty((B, H, Nq, (Nk + 127) // 128 * 4), dtype=torch.int32, device=mask.device)
    if bits.numel():
        library = _pack_mask_library(mask.device.index)
        stream = torch._C._cuda_getCurrentRawStream(mask.device.index)
        params = PACK_PARAMS.pack(mask.data_ptr(), *mask.stride(), bits.data_ptr(), B, H, Nq, Nk, mask.device.index, stream)
        _launch(library, library.pack_mask, mask, params)
    return bits

"""From tensors to a kernel's launch: `struct AttentionParams` of cuda/attention.h, filled in.

The fields that shapes and settings determine are packed into bytes once; a call inserts its addresses between them.
"""

import ctypes
import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flash_attention import build
from flash_attention.call import Call, Form
from flash_attention.reference.dropout import threshold
from flash_attention.reference.tiles import LOG2_E

FORWARD, BACKWARD = 0, 1  # which of a rung's files
DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
STRIDES = struct.Struct("@3q")  # of a tensor's first three dimensions
MASK = struct.Struct("@5q")  # address, strides
SETTINGS = struct.Struct("@7i f i 2f")  # B, H, Hkv, Nq, Nk, D, Dv, scale, drop_below, keep_scale, lowest
INTERVAL = struct.Struct("@4q 5i 4x")  # strides of spans; left and right (−1: no limit), diagonal, q_offset, k_offset
# q, k, v, O, dO, dQ, dK, dV (address, strides), the mask, the addresses of lse, d_lse, workspace and seed, the settings, deterministic,
# device, sm_count, the stream, the address of spans, the interval.
PARAMS = struct.Struct("@" + 8 * "q 24s" + "40s 4q 44s 3i q q 56s")
NO_TENSOR = (0, bytes(STRIDES.size))
NO_MASK = bytes(MASK.size)
NO_INTERVAL = bytes(INTERVAL.size)
# `struct KeySource`, which follows: the addresses of lengths, starts and block table, the stride of the last, page_size, pages, the
# addresses of k_scale and v_scale.
KEYS = struct.Struct("@4q 2i 2q")
NO_KEYS = bytes(KEYS.size)
# `struct Scoring`, with which the struct of a SCORE kernel ends: a bias' address and strides; the slopes' address and two strides; the
# address of dBias; the bias' own shape and type; softcap, scale / softcap, softcap · log2 e.
SCORING = struct.Struct("@5q 3q q 5i 3f")

POINTERS = struct.Struct("@3q")  # what comes before it in node.cpp: the addresses of two functions, the floats of workspace

LARGEST = torch.finfo(torch.float32).max
# Where a kernel's running maximum of unscaled scores starts, unless its product with scale · log2 e would overflow. A masked score, whose
# accumulator starts from −2¹²⁷, lies below it.
LOWEST = -(2.0**126)
SMALLEST_SCALE = 2.0**-100


class Addresses(NamedTuple):
    """The addresses of a launch other than those of q, k, v, O and their gradients; 0 for what the call does not have."""

    lse: int = 0
    d_lse: int = 0
    workspace: int = 0
    seed: int = 0
    spans: int = 0
    mask: bytes = NO_MASK  # as the struct has it: address and strides
    keys: bytes = NO_KEYS  # `struct KeySource`
    bias: int = 0
    alibi: int = 0
    d_bias: int = 0
    bias_stride: tuple[int, ...] | None = None  # if a copy replaces the bias, the copy's


class Scoring(NamedTuple):
    """The numbers in `struct Scoring`; its addresses are in `Addresses`."""

    bias_stride: tuple[int, ...] = (0,) * 4  # 0 where it is broadcast
    alibi_stride: tuple[int, ...] = (0,) * 2
    bias_shape: tuple[int, ...] = (1,) * 4
    bias_type: int = 0
    softcap: float = 0
    scale: float = 0  # of the scores

    def pack(self, addresses: Addresses) -> bytes:
        bias, alibi = (addresses.bias, *(addresses.bias_stride or self.bias_stride)), (addresses.alibi, *self.alibi_stride)
        caps = self.softcap, self.scale / self.softcap if self.softcap else 0, self.softcap * LOG2_E
        return SCORING.pack(*bias, *alibi, addresses.d_bias, *self.bias_shape, self.bias_type, *map(_in_range, caps))


def _in_range(x: float) -> float:
    """x, limited to the range of float32."""
    return max(min(x, LARGEST), -LARGEST)


class Launch(NamedTuple):
    """A launch without its addresses: everything that the shapes, strides and settings of a call determine."""

    library: ctypes.CDLL
    tensors: tuple[int | bytes, ...]  # the first 16 fields of the struct, with 0 for each address
    settings: bytes
    interval: bytes
    device: int
    sm_count: int
    scoring: Scoring | None = None  # of a SCORE kernel

    def __call__(self, q: Tensor, tensors: Sequence[int], others: Addresses) -> None:
        """Enqueues the kernels on the current stream of q's device. `tensors` are the addresses of q, k, v, O and, of a backward, dO, dQ,
        dK, dV."""
        raise_on(self.library.attention(self._params(tensors, others)), self.library, q)

    def workspace_floats(self, has_spans: bool) -> int:
        """The floats of workspace that a launch needs, with spans or without."""
        return self.library.workspace_floats(self._params((), Addresses(spans=int(has_spans))))

    def packed(self, workspace: int) -> bytes:
        """`struct Launch` of node.cpp; workspace: floats."""
        functions = self.library.attention, self.library.error_name
        return POINTERS.pack(*(ctypes.cast(f, ctypes.c_void_p).value for f in functions), workspace) + self._params((), Addresses())

    def _params(self, addresses: Sequence[int], others: Addresses) -> bytes:
        tensors = list(self.tensors)
        tensors[: 2 * len(addresses) : 2] = addresses
        *pointers, spans, mask, keys, _, _, _, _ = others
        deterministic = torch.are_deterministic_algorithms_enabled()
        params = PARAMS.pack(
            *tensors, mask, *pointers, self.settings, deterministic, self.device, self.sm_count, self._stream(), spans, self.interval
        )
        if self.scoring is not None:
            params += self.scoring.pack(others)
        return params + keys

    def _stream(self) -> int:
        return torch._C._cuda_getCurrentRawStream(self.device)


def raise_on(error: int, library: ctypes.CDLL, x: Tensor) -> None:
    """Raises an error if `error`, returned by the launch of a kernel that reads x, is not 0."""
    if error:
        raise RuntimeError(f"CUDA error {error} at launch on {x.device}, {tuple(x.shape)} {x.dtype}: {library.error_name(error).decode()}")


def fields(call: Call, tensors: tuple[Form, ...], scale: float) -> tuple[tuple[int | bytes, ...], bytes, bytes]:
    """Three fields of a Launch: tensors, settings and interval."""
    q, _, v, *_ = tensors
    (B, H, Nq, D), (_, Hkv, Nk, Dv) = q.shape, v.shape
    drop = threshold(call.settings.dropout_p)
    return (
        tuple(field for x in tensors for field in (0, STRIDES.pack(*x.stride[:3]))) + (8 - len(tensors)) * NO_TENSOR,
        SETTINGS.pack(B, H, Hkv, Nq, Nk, D, Dv, scale, drop, 256 / (256 - drop), LOWEST / max(1, scale * LOG2_E)),
        _interval(call) if call.visible == "interval" else NO_INTERVAL,
    )


def _interval(call: Call) -> bytes:
    """`struct Seen` of attention.h, without the address of the spans. A limit that no row reaches counts as none."""
    settings, Nq, Nk = call.settings, call.q.shape[2], call.k.shape[2]
    diagonal = settings.diagonal_of(Nq, Nk)
    left = -1 if settings.left is None or diagonal + Nq - 1 - settings.left <= 0 else settings.left
    right = -1 if settings.right is None or diagonal + settings.right >= Nk - 1 else settings.right
    strides = (0, 0, 0, 0) if call.spans is None else call.spans.stride
    return INTERVAL.pack(*strides, left, right, diagonal, settings.q_offset, settings.k_offset)


def scoring(call: Call) -> Scoring | None:
    """The numbers of `struct Scoring` for a call; None if nothing changes its scores."""
    if not call.score:
        return None
    scored = Scoring(softcap=call.settings.softcap or 0, scale=positive(call.settings.scale)[1])
    if call.bias is not None:
        shape = tuple(call.bias.shape)
        stride = strides_of(shape, call.bias.stride)
        number = build.DTYPE_NUMBER[DTYPE_NAMES[call.bias.dtype]]
        scored = scored._replace(bias_stride=stride, bias_shape=shape, bias_type=number)
    return scored if call.alibi is None else scored._replace(alibi_stride=call.alibi.stride)


def positive(scale: float) -> tuple[float, float]:
    """scale split into a factor for q and a scale that is positive and not tiny.

    Kernels take the maximum of unscaled scores; under a negative scale that would be the minimum. And the accumulator of a hidden score
    starts at −2¹²⁷; under a tiny scale that would no longer lie far below the others."""
    if abs(scale) >= SMALLEST_SCALE:
        return math.copysign(1, scale), abs(scale)
    return (math.copysign(SMALLEST_SCALE, scale), max(abs(scale) / SMALLEST_SCALE, SMALLEST_SCALE)) if scale else (0, 1.0)


def strides_of(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, with 0 for dimensions of size 1, which are broadcast."""
    return tuple(0 if n == 1 else s for n, s in zip(shape, stride, strict=True))


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()

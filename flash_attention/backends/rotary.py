"""The kernel of `scores.rotary`, cuda/rotary.cu: what it reads in place, and its launch."""

import ctypes
import functools
import logging
import struct
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flash_attention import build
from flash_attention.backends.launch import DTYPE_NAMES, raise_on
from flash_attention.backends.libraries import helper_library
from flash_attention.shortcut import is_eager_call

ROTARY = "rotary.cu"
# `struct RotaryParams`: x and out (address, strides), the addresses of cos and sin and their batch stride, B, H, N, D, R, the dtype,
# interleaved, back, device, the stream.
PARAMS = struct.Struct("@q 3q q 3q 2q q 9i 4x q")

log = logging.getLogger("flash_attention")


def serves(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the kernel computes `scores.rotary` of these CUDA tensors: an eager call that does not differentiate the angles, with rows
    that begin at multiples of 16 bytes and chunks of 16 bytes that are rotated as a whole or not at all. Otherwise the formula does."""
    return (
        is_eager_call(x, cos, sin)
        and x.is_cuda
        and x.device == cos.device == sin.device
        and forward_ad._current_level < 0
        and not (torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad))
        and reads(x, cos.shape[-1])
        and _library(x.device.index) is not None
    )


def reads(x: Tensor, half: int) -> bool:
    """Whether the kernel can read x in place; its first 2 · half features are rotated, interleaved or not."""
    if x.dtype not in DTYPE_NAMES or x.layout is not torch.strided:
        return False
    chunk = 16 // x.element_size()
    (B, H, N, D), (*outer, last) = x.shape, x.stride()
    aligned = x.data_ptr() % 16 == 0 and not any(stride % chunk for stride in outer)
    fits = N * D < 2**32 and H < 2**17 and B < 2**16
    return last == 1 and aligned and fits and D % chunk == 0 and half % chunk == 0


class Rotary(torch.autograd.Function):
    """Rotates x (`back`: by the opposite angles), and its gradient the opposite way. Each is this Function again, so any derivative
    exists."""

    @staticmethod
    def forward(ctx, x, cos, sin, interleaved, back, turn):
        ctx.save_for_backward(cos, sin)
        ctx.options = interleaved, not back
        ctx.turn = turn
        return launch(x, cos, sin, interleaved, back)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.turn(gradient, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


def launch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool, run: Callable | None = None) -> Tensor:
    """x (B, H, N, D), cos and sin (N, R / 2) or (B, N, R / 2) → as x, in the same memory layout. run: calls the kernel."""
    out = torch.empty_like(x)
    cos, sin = (angles.to(torch.float32).contiguous() for angles in (cos, sin))
    _, N, half = (1, *cos.shape)[-3:]
    sizes = *x.shape, 2 * half, build.DTYPE_NUMBER[DTYPE_NAMES[x.dtype]], interleaved, back
    fields = x.data_ptr(), *x.stride()[:3], out.data_ptr(), *out.stride()[:3], cos.data_ptr(), sin.data_ptr(), (cos.dim() == 3) * N * half
    (run or _run)(x, out, cos, sin, (*fields, *sizes))
    return out


def _run(x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, fields: tuple) -> None:
    device = x.device.index
    library = _library(device)
    raise_on(library.rotary(PARAMS.pack(*fields, device, torch._C._cuda_getCurrentRawStream(device))), library, x)


@functools.cache
def _library(device: int) -> ctypes.CDLL | None:
    """The kernel's library; None if it cannot be built, which is logged once."""
    try:
        return helper_library(ROTARY, PARAMS.size, device)
    except build.BuildError as error:
        log.warning("flash_attention: rotary runs on PyTorch's operations: %s", str(error)[:2000])
        return None

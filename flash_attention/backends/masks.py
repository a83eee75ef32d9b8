"""A mask in the form that kernels read: its bytes in place, or bits packed by another kernel, cuda/pack_mask.cu."""

import ctypes
import functools
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flash_attention.backends.launch import MASK, NO_MASK, raise_on
from flash_attention.backends.libraries import helper_library
from flash_attention.call import Form

if TYPE_CHECKING:
    from flash_attention.backends.rung import Rung

PACK_MASK = "pack_mask.cu"
PACK_PARAMS = struct.Struct("@q 4q q 4i 2i q")


def mask_fields(rung: "Rung", form: str | None, mask: Tensor | None) -> tuple[bytes, Tensor | None]:
    """The mask's fields in the struct, and what must stay alive until the launch."""
    if form is None:
        return NO_MASK, None
    if form == "bytes":
        return MASK.pack(mask.data_ptr(), *mask.stride()), mask
    bits = rung._pack_mask(mask, form == "key bits")
    b, h, row, _ = (0 if n == 1 else s for n, s in zip(bits.shape, bits.stride(), strict=True))
    along_queries, along_keys = (row, 1) if form == "bits" else (int(mask.stride(2) != 0), row)
    return MASK.pack(bits.data_ptr(), b, h, along_queries, along_keys), bits


def is_read_once(mask: Form) -> bool:
    """Whether a forward reads each byte of the mask once, and can read 16 at a time. Then packing, which reads them too, saves nothing."""
    b, h, i, j = mask.stride
    once = all(stride or n == 1 for n, stride in zip(mask.shape[:3], (b, h, i), strict=True))
    return once and j == 1 and not (b | h | i) % 16


def pack_mask(mask: Tensor, by_keys: bool = False, launch: Callable | None = None) -> Tensor:
    """bool (B, H, Nq, Nk), any strides → int32 (B or 1, H or 1, Nq or 1, words): broadcast dimensions are packed once.

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
    library = pack_mask_library(device)
    stream = torch._C._cuda_getCurrentRawStream(device)
    params = PACK_PARAMS.pack(mask.data_ptr(), *mask.stride(), bits.data_ptr(), *settings, device, stream)
    raise_on(library.pack_mask(params), library, mask)


@functools.cache
def pack_mask_library(device: int) -> ctypes.CDLL:
    """The packing kernel, compiled if necessary."""
    return helper_library(PACK_MASK, PACK_PARAMS.size, device)

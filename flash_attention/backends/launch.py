"""From tensors to a kernel's launch: `struct AttentionParams` of cuda/attention.h, filled in.

What shapes and settings determine is packed into bytes once; a call puts its addresses between them.
"""

import ctypes
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

STRIDES = struct.Struct("@3q")  # of a tensor's first three dimensions
MASK = struct.Struct("@5q")  # address, strides
SETTINGS = struct.Struct("@7i f i 2f")  # B, H, Hkv, Nq, Nk, D, Dv, scale, drop_below, keep_scale, lowest
# q, k, v, O, dO, dQ, dK, dV (address, strides), the mask, the addresses of lse, d_lse, workspace and seed, the settings, deterministic,
# device, sm_count, the stream.
PARAMS = struct.Struct("@" + 8 * "q 24s" + "40s 4q 44s 3i q")
NO_TENSOR = (0, bytes(STRIDES.size))
NO_MASK = bytes(MASK.size)
NO_POINTERS = (0, 0, 0, 0)
# `struct KeySource`, which follows: the addresses of lengths, starts and block table, the stride of the last, page_size, pages.
KEYS = struct.Struct("@4q 2i")
NO_KEYS = bytes(KEYS.size)


class Launch(NamedTuple):
    """A launch but for the addresses: what the shapes, strides and settings of a call determine."""

    library: ctypes.CDLL
    tensors: tuple[int | bytes, ...]  # the first 16 fields of the struct, with 0 for each address
    settings: bytes
    device: int
    sm_count: int
    keys: bytes = NO_KEYS

    def __call__(self, q: Tensor, addresses: Sequence[int], pointers: Sequence[int], mask: bytes = NO_MASK) -> None:
        """Enqueues the kernels on the current stream of q's device.

        addresses are those of q, k, v, O and, of a backward, dO, dQ, dK, dV; pointers those of LSE, dLSE, the workspace and the seed, 0 for
        what there is not.
        """
        raise_on(self.library.attention(self._params(addresses, pointers, mask)), self.library, q)

    def workspace_floats(self) -> int:
        return self.library.workspace_floats(self._params((), NO_POINTERS, NO_MASK))

    def _params(self, addresses: Sequence[int], pointers: Sequence[int], mask: bytes) -> bytes:
        tensors = list(self.tensors)
        tensors[: 2 * len(addresses) : 2] = addresses
        deterministic = torch.are_deterministic_algorithms_enabled()
        params = PARAMS.pack(*tensors, mask, *pointers, self.settings, deterministic, self.device, self.sm_count, self._stream())
        return params + self.keys

    def _stream(self) -> int:
        return torch._C._cuda_getCurrentRawStream(self.device)


def raise_on(error: int, library: ctypes.CDLL, x: Tensor) -> None:
    """Raises what the launch of a kernel that reads x returned, unless it is 0."""
    if error:
        raise RuntimeError(f"CUDA error {error} at launch on {x.device}, {tuple(x.shape)} {x.dtype}: {library.error_name(error).decode()}")

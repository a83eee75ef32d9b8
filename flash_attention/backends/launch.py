"""From tensors to a kernel's launch: `struct AttentionParams` of cuda/attention.h, filled in."""

import ctypes
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# q, k, v, O, dO, dQ, dK, dV (address and three strides each), the mask (address and four), lse, d_lse, workspace, seed,
# then B, H, Hkv, Nq, Nk, D, Dv, scale, drop_below, keep_scale, deterministic, device, sm_count, and the stream.
PARAMS = struct.Struct("@32q 5q 4q 7i f i f 3i q")
NO_MASK = (0, 0, 0, 0, 0)
NO_POINTERS = (0, 0, 0, 0)


class Launch(NamedTuple):
    """A launch but for the addresses: what the shapes, strides and settings of a call determine."""

    library: ctypes.CDLL
    tensors: tuple[int, ...]  # the first 32 fields of the struct, without the addresses
    settings: tuple[int | float, ...]  # from B to keep_scale
    device: int
    sm_count: int

    def __call__(
        self,
        tensors: Sequence[Tensor],
        lse: Tensor | None,
        mask: tuple[int, ...] = NO_MASK,
        d_lse: Tensor | None = None,
        workspace: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> None:
        """Enqueues the kernels on the current stream of the tensors' device."""
        pointers = [0 if x is None else x.data_ptr() for x in (lse, d_lse, workspace, seed)]
        raise_on(self.library.attention(self._params([x.data_ptr() for x in tensors], mask, pointers)), self.library, tensors[0])

    def workspace_floats(self) -> int:
        return self.library.workspace_floats(self._params((), NO_MASK, NO_POINTERS))

    def _params(self, addresses: Sequence[int], mask: Sequence[int], pointers: Sequence[int]) -> bytes:
        tensors = list(self.tensors)
        tensors[: 4 * len(addresses) : 4] = addresses
        deterministic = torch.are_deterministic_algorithms_enabled()
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        return PARAMS.pack(*tensors, *mask, *pointers, *self.settings, deterministic, self.device, self.sm_count, stream)


def raise_on(error: int, library: ctypes.CDLL, x: Tensor) -> None:
    """Raises what the launch of a kernel that reads x returned, unless it is 0."""
    if error:
        raise RuntimeError(f"CUDA error {error} at launch on {x.device}, {tuple(x.shape)} {x.dtype}: {library.error_name(error).decode()}")

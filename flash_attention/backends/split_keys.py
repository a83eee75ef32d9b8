"""The split_keys rung on keys whose lengths, and perhaps pages, are known on the device only (struct KeySource of cuda/attention.h)."""

import torch
from torch import Tensor

from flash_attention import allocate
from flash_attention.backends.cuda import FORWARD, Rung, _address, _positive
from flash_attention.backends.launch import KEYS, SETTINGS

PAGE_MULTIPLE = 16  # of a page's keys: what a warp finds with one number


def why_not_readable(rung: Rung, k: Tensor, v: Tensor, block_table: Tensor | None) -> str | None:
    """Why the kernel cannot read these keys where they lie, or None: a cache is never copied."""
    if not all(rung._is_readable(x) for x in (k, v)):
        return f"it reads rows of 16-byte multiples, got strides {k.stride()} and {v.stride()}"
    if block_table is not None and k.shape[2] % PAGE_MULTIPLE:
        return f"it reads pages of a multiple of {PAGE_MULTIPLE} keys, got {k.shape[2]}"
    return None


def forward(
    rung: Rung,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    block_table: Tensor | None,
    most: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """→ O (B, H, Nq, Dv), LSE (B, H, Nq). Nothing is copied and nothing waits for the device.

    q (B, H, Nq, D). k and v (B, Hkv, N, D or Dv), or, with a block_table int32 (B, pages of a sequence), (pages, Hkv, page_size, D or Dv).
    lengths, starts: int32 (B,), the keys [start, length) of each sequence; causal: its last query sees its last key. most: no length is
    more; the number of splits depends on it.
    """
    O, LSE = allocate.forward_outputs(q, v)
    factor, scale = _positive(scale)
    q = rung._readable(q if factor == 1 else q * factor)
    tensors = q, k, v, O
    launch = rung._launch(FORWARD, tensors, None, None, causal, scale, 0.0)
    B, H, Hkv, Nq, _, *rest = SETTINGS.unpack(launch.settings)
    table = (_address(block_table), block_table.stride(0), k.shape[2], k.shape[0]) if block_table is not None else (0, 0, 0, 0)
    launch = launch._replace(
        settings=SETTINGS.pack(B, H, Hkv, Nq, most, *rest), keys=KEYS.pack(lengths.data_ptr(), _address(starts), *table)
    )
    workspace = torch.empty(launch.workspace_floats(), dtype=torch.float32, device=q.device)
    launch(q, [x.data_ptr() for x in tensors], (LSE.data_ptr(), 0, _address(workspace), 0))
    return O, LSE

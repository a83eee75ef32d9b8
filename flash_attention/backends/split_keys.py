"""The split_keys rung on keys whose lengths, and perhaps pages, are known on the device only (struct KeySource of cuda/attention.h)."""

import torch
from torch import Tensor

from flash_attention import allocate
from flash_attention.backends.cuda import FORWARD, Rung, _address, _positive
from flash_attention.backends.launch import KEYS, SETTINGS, Addresses
from flash_attention.call import Call, Form, Settings

PAGE_MULTIPLE = 16  # of a page's keys: what a warp finds with one number


def why_not(rung: Rung, q: Tensor, k: Tensor, v: Tensor, block_table: Tensor | None, causal: bool) -> str | None:
    """Why the kernel cannot serve the call, or cannot read these keys where they lie, or None: a cache is never copied."""
    if reason := rung.why_not(_call(q, k, v, causal, 1.0)):
        return reason
    if not all(rung.reads(Form.of(x)) and x.data_ptr() % 16 == 0 for x in (k, v)):
        return f"it reads rows of 16-byte multiples, got strides {k.stride()} and {v.stride()}"
    if block_table is not None and k.shape[2] % PAGE_MULTIPLE:
        return f"it reads pages of a multiple of {PAGE_MULTIPLE} keys, got {k.shape[2]}"
    return None


def _call(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Call:
    return Call.of(q, k, v, None, None, Settings(scale, right=0 if causal else None))


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
    q = q if factor == 1 else q * factor
    if not rung.reads(Form.of(q)) or q.data_ptr() % 16:
        q = q.clone(memory_format=torch.contiguous_format)
    tensors = q, k, v, O
    launch = rung.launch(FORWARD, _call(q, k, v, causal, scale), tuple(map(Form.of, tensors)), scale)
    B, H, Hkv, Nq, _, *rest = SETTINGS.unpack(launch.settings)
    table = (_address(block_table), block_table.stride(0), k.shape[2], k.shape[0]) if block_table is not None else (0, 0, 0, 0)
    launch = launch._replace(
        settings=SETTINGS.pack(B, H, Hkv, Nq, most, *rest), keys=KEYS.pack(lengths.data_ptr(), _address(starts), *table)
    )
    workspace = torch.empty(launch.workspace_floats(False), dtype=torch.float32, device=q.device)
    launch(q, [x.data_ptr() for x in tensors], Addresses(LSE.data_ptr(), 0, _address(workspace)))
    return O, LSE

"""The split_keys rung on keys whose lengths, and perhaps pages, are known on the device only (struct KeySource of cuda/attention.h)."""

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from flash_attention.backends.launch import FORWARD, KEYS, address
from flash_attention.backends.plans import Forward
from flash_attention.backends.rung import Rung
from flash_attention.call import Call, Form, Settings

PAGE_MULTIPLE = 16  # a page's keys are a multiple of this: a warp looks up the page of so many keys at once
CAPACITY = 1024  # of kept plans: when it is reached, the table is cleared


class Plan(NamedTuple):
    """The part of attention over such keys that shapes, strides and settings determine."""

    rung: Rung
    call: Call
    reason: str | None  # why the kernel cannot serve the call, or cannot read these keys in place: a cache is never copied
    forward: Forward | None  # None if there is a reason
    is_plain: bool = False  # `Forward.is_plain`
    worthwhile: bool = False  # whether a call should choose the rung

    @classmethod
    def of(
        cls,
        rung: Rung,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        paged: bool,
        most: int,
        causal: bool,
        scale: float,
        softcap: float | None = None,
        alibi: Tensor | None = None,
    ) -> "Plan":
        """q (B, H, Nq, D). k and v (B, Hkv, N, D or Dv), or in pages (pages, Hkv, page_size, D or Dv). causal: the last query of a sequence
        sees its last key. most: no sequence has more keys; the number of splits depends on it. alibi: float32 (B, H).

        Raises:
            BuildError: the kernel cannot be built.
        """
        key: Hashable = None
        if q.is_cuda:
            forms = (q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), q.dtype, k.dtype, q.device)
            key = rung, *forms, paged, most, causal, scale, softcap, None if alibi is None else alibi.stride()
            if (plan := _kept.get(key)) is not None:
                return plan
        B, settings = q.shape[0], Settings(scale, right=0 if causal else None, softcap=softcap)
        keys, values = (Form.of(x)._replace(shape=torch.Size((B, x.shape[1], most, x.shape[3]))) for x in (k, v))
        call = Call(Form.of(q), keys, values, None, None, settings, alibi=Form.of(alibi))
        reason = rung.why_not(call)
        if reason is None and any(not rung.reads(x) or any(n * x.dtype.itemsize % 16 for n in x.stride[:3]) for x in (keys, values)):
            reason = f"it reads rows of 16-byte multiples, got strides {k.stride()} and {v.stride()} of {k.dtype}"
        if reason is None and paged and k.shape[2] % PAGE_MULTIPLE:
            reason = f"it reads pages of a multiple of {PAGE_MULTIPLE} keys, got {k.shape[2]}"
        if reason:
            plan = cls(rung, call, reason, None)
        else:
            forward: Forward = rung.plan(FORWARD, call)  # type: ignore[assignment]  # of FORWARD
            plan = cls(rung, call, None, forward, q.is_cuda and forward.is_plain, rung.worthwhile(call))
        if key is not None:
            if len(_kept) >= CAPACITY:
                _kept.clear()
            _kept[key] = plan
        return plan

    def why_not(self, k: Tensor, v: Tensor) -> str | None:
        """Why the kernel cannot serve the call, or cannot read these keys in place, or None."""
        if self.reason is None and (k.data_ptr() | v.data_ptr()) % 16:
            return "it reads keys and values that begin at multiples of 16 bytes"
        return self.reason

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Tensor,
        starts: Tensor | None,
        block_table: Tensor | None,
        scales: Tensor | None = None,
        lse: bool = True,
        alibi: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """→ O (B, H, Nq, Dv), LSE (B, H, Nq) if asked for. k and v are not copied, and the host does not wait for the device.

        lengths, starts: int32 (B,), the keys [start, length) of each sequence. block_table: int32 (B, pages of a sequence) where keys lie
        in pages. scales: float32 (2, Hkv), of float8 keys and values. alibi: float32 (B, H), as the plan was made for.
        """
        table = (address(block_table), block_table.stride(0), k.shape[2], k.shape[0]) if block_table is not None else (0, 0, 0, 0)
        of_heads = (0, 0) if scales is None else (scales.data_ptr(), scales.data_ptr() + 4 * k.shape[1])
        keys = KEYS.pack(lengths.data_ptr(), address(starts), *table, *of_heads)
        if self.is_plain and q.data_ptr() % 16 == 0:
            return self.forward.repeat(q, k, v, lse, keys)
        return self.forward(q, k, v, None, None, None, alibi=alibi, keys=keys)


_kept: dict[Hashable, Plan] = {}

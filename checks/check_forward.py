"""The forward, general: both papers' algorithms and `flash_attention()` against naive attention in float64.

python checks/check_forward.py [--b 1 --h 1 --q_len 2048 --kv_len 2048 --d 512 --dtype float32 --device cpu --backend reference]
"""

from dataclasses import replace

import pytest
import torch
from harness import Case, Report, Target, limit, run_as_script, script_arguments, served

from flash_attention import flash_attention
from flash_attention.reference import flash_attention2_forward, flash_attention_forward, normal_attention


def compare(case: Case, target: Target) -> None:
    """O and LSE of every implementation against the truth, with and without a mask."""
    report = Report(f"forward: {case}")
    for mask_kind in (None, "key", "dead rows"):
        case = replace(case, mask=mask_kind)
        q, k, v, mask = case.inputs(target.device)
        options = {"scale": case.scale, "return_lse": True}
        truth = normal_attention(q.double(), k.double(), v.double(), mask, **options)
        naive = normal_attention(q, k, v, mask, **options)

        O1, l, m = flash_attention_forward(q, k, v, mask)
        implementations = {
            "FlashAttention, Algorithm 1": (O1, torch.where(l > 0, m + l.log(), -torch.inf)),
            "FlashAttention-2, Algorithm 1": flash_attention2_forward(q, k, v, mask),
            f"flash_attention, {target.backend or 'default'}": flash_attention(q, k, v, mask, return_lse=True, backend=target.backend),
        }
        for what, outputs in implementations.items():
            for name, got, want, in_dtype in zip(("O", "LSE"), outputs, truth, naive, strict=True):
                report.compare(f"{what}", name, got, want, limit(name, want, in_dtype, case.dtype, case.D), f"mask: {mask_kind}")
    report.verdict()


@pytest.mark.parametrize(
    "case", [Case(B=1, H=1, Nq=1024, Nk=1024, D=512), Case(Nq=113, Nk=203, D=59, Dv=24, H=4, Hkv=2)], ids=("wide heads", "ragged")
)
def check_forward(case, target):
    compare(served(target, case), target)


if __name__ == "__main__":
    run_as_script(compare, script_arguments(__doc__))

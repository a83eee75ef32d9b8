"""The backward, causal: jacrev through naive attention, jacrev through flash attention, and both papers' backward passes, pairwise.

python checks/check_backward_causal.py [--b 1 --h 1 --q_len 2048 --kv_len 2048 --d 512 --dtype float32 --device cpu --backend reference]
"""

from functools import partial

import pytest
from harness import Case, Target, run_as_script, script_arguments, served
from three_ways import Algorithms, compare

from flash_attention import flash_attention
from flash_attention.reference import (
    flash_attention2_causal_backward,
    flash_attention2_causal_forward,
    flash_attention_causal_backward,
    flash_attention_causal_forward,
    normal_attention_causal,
)

CAUSAL = Algorithms(
    naive=normal_attention_causal,
    flash=partial(flash_attention, causal=True),
    forward1=flash_attention_causal_forward,
    backward1=flash_attention_causal_backward,
    forward2=flash_attention2_causal_forward,
    backward2=flash_attention2_causal_backward,
)
CASES = [
    Case(B=1, H=1, Nq=1024, Nk=1024, D=512, causal=True),  # `make demo` runs 2048
    Case(Nq=113, Nk=203, D=59, Dv=24, H=4, Hkv=2, causal=True),
    Case(Nq=203, Nk=113, D=40, causal=True),
]


def run(case: Case, target: Target) -> None:
    compare(case, target, CAUSAL, masks=(None, "left padding", "dead rows"))


@pytest.mark.parametrize("case", CASES, ids=("wide heads", "ragged", "more rows than columns"))
def check_backward_causal(case, target):
    run(served(target, case), target)


if __name__ == "__main__":
    run_as_script(run, script_arguments(__doc__), causal=True)

"""The backward, general: jacrev through naive attention, jacrev through flash attention, and both papers' backward passes, pairwise.

python checks/check_backward.py [--b 1 --h 1 --q_len 2048 --kv_len 2048 --d 512 --dtype float32 --device cpu --backend reference]
"""

import pytest
from harness import Case, Target, run_as_script, script_arguments, served
from three_ways import Algorithms, compare

from flash_attention import flash_attention
from flash_attention.reference import (
    flash_attention2_backward,
    flash_attention2_forward,
    flash_attention_backward,
    flash_attention_forward,
    normal_attention,
)

GENERAL = Algorithms(
    naive=normal_attention,
    flash=flash_attention,
    forward1=flash_attention_forward,
    backward1=flash_attention_backward,
    forward2=flash_attention2_forward,
    backward2=flash_attention2_backward,
)


def run(case: Case, target: Target) -> None:
    compare(case, target, GENERAL, masks=(None, "key", "dead rows"))


@pytest.mark.parametrize(
    "case", [Case(B=1, H=1, Nq=1024, Nk=1024, D=512), Case(Nq=113, Nk=203, D=59, Dv=24, H=4, Hkv=2)], ids=("wide heads", "ragged")
)
def check_backward(case, target):
    run(served(target, case), target)


if __name__ == "__main__":
    run_as_script(run, script_arguments(__doc__))

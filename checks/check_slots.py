"""Where `hopper`'s backward uses dQ's memory again and finishes it on the way (cuda/backward_hopper_slots.cuh): calls of many heads, whose
slots are all used several times, as in few other checks.

python checks/check_slots.py
"""

import pytest
import torch
from harness import Case, Target, against_truth, call_of, flash, run_alone, skip_unless_served

from flash_attention.backends import BACKENDS
from flash_attention.backends.cuda import Backward
from flash_attention.call import Form

HALF = torch.float16  # as in most checks, so that the emulator has compiled them
# On a GPU blocks must be many and last a while, in the emulator, which has two multiprocessors, neither.
SMALL = [
    Case(B=3, H=4, Nq=150, Nk=200, D=64, dtype=HALF),
    Case(B=3, H=4, Nq=150, Nk=200, D=64, dtype=HALF, causal=True),
    Case(B=4, H=6, Hkv=3, Nq=70, Nk=130, D=128, dtype=HALF),
    Case(B=2, H=7, Nq=128, Nk=300, D=128, dtype=HALF, causal=True),
    Case(B=20, H=1, Nq=90, Nk=100, D=96, dtype=HALF, causal=True),  # one tile of keys a head: the last heads' blocks start in another order
    Case(B=2, H=7, Nq=300, Nk=140, D=72, dtype=HALF, causal=True),  # some rows attend nothing: a copy of dO lies in dQ's memory
]
LARGE = [
    Case(B=20, H=6, Nq=640, Nk=640, D=64, dtype=HALF),
    Case(B=20, H=6, Nq=700, Nk=700, D=64, dtype=HALF, causal=True),
    Case(B=10, H=12, Hkv=6, Nq=600, Nk=900, D=128, dtype=HALF),
    Case(B=13, H=6, Nq=1300, Nk=1290, D=128, dtype=HALF, causal=True),
]


def cases_of(target: Target) -> list[Case]:
    return LARGE if target.device == "cuda" else SMALL


def pytest_generate_tests(metafunc):
    targets = [Target("emulated:hopper", "cpu"), Target("hopper", "cuda")]
    pairs = [(target, case) for target in targets for case in cases_of(target)]
    metafunc.parametrize("where, case", pairs, ids=[f"{target}-{case}" for target, case in pairs])


def check_slots(where, case, repeatable):
    """As naive attention has it, and, with taking turns (repeatable), bit for bit again."""
    if reason := where.why_not():
        pytest.skip(reason)
    q, k, v, mask = case.inputs(where.device)
    skip_unless_served(where, q, k, v, mask, case.causal, 0.0)
    form = Form.of(q)
    workspace = Backward.of(BACKENDS[where.backend], call_of(q, k, v, mask, case.causal)._replace(O=form, dO=form)).workspace
    assert workspace < q.numel(), "every head has memory of its own: the case is no longer one of many heads"
    problem, answer = against_truth(case, where)
    again = flash(case, where, q, k, v, mask, problem.dO, problem.dLSE)
    for name, x, y in zip(answer._fields, answer, again, strict=True):
        assert torch.equal(x, y), f"{name} of the second run differs"


if __name__ == "__main__":
    run_alone(__file__)

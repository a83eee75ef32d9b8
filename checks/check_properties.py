"""Property tests: shapes, masks, heads and tile sizes that hypothesis comes up with, on the reference, in float64, against naive attention.

python checks/check_properties.py [--full]

Each check runs 60 examples, the same ones every time; with --full 600 of them. One that fails is made as small as it can be and printed.
"""

import torch
from harness import ALGORITHMS, CPU, MASKS, Case, Problem, Report, naive, run_alone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flash_attention import flash_attention
from flash_attention.reference import Dropout
from flash_attention.reference.tiles import blocks

SLACK = 1e3  # where a gradient is 0 by cancellation, as with a single column, its rounding errors are large beside it; a mistake is larger
LENGTH = st.one_of(st.integers(1, 12), st.integers(1, 90))
MASK = st.sampled_from([None, *MASKS])


@st.composite
def cases(draw, **fixed) -> Case:
    """Any attention problem of a size that naive attention solves in a millisecond."""
    Hkv = draw(st.integers(1, 3))
    return Case(
        **{
            "B": draw(st.integers(1, 3)),
            "H": Hkv * draw(st.integers(1, 3)),
            "Hkv": Hkv,
            "Nq": draw(LENGTH),
            "Nk": draw(LENGTH),
            "D": draw(st.integers(1, 20)),
            "Dv": draw(st.integers(1, 20)),
            "dtype": torch.float64,
            "causal": draw(st.booleans()),
            "mask": draw(MASK),
            "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.1, 0.7])),
            "scale": draw(st.sampled_from([None, 0.3, -1.0])),
            "seed": draw(st.integers(0, 1000)),
        }
        | fixed
    )


def properties(test):
    """The settings of every property here; --full is read when the check runs."""

    def check(full):
        count = 600 if full else 60
        few = settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
        few(test)()

    check.__name__, check.__doc__ = test.__name__, test.__doc__
    return check


@properties
@given(case=cases(), block_q=st.integers(1, 40), block_k=st.integers(1, 40))
def check_algorithms(case, block_q, block_k):
    """Both papers' forward and backward in tiles of any size."""
    for name, algorithm in ALGORITHMS.items():
        if algorithm.causal == case.causal:
            problem = Problem.of(case, CPU, dLSE=algorithm.paper == 2)
            report = Report(f"{case}, tiles of {block_q} × {block_k}")
            report.expect(name, algorithm.run(problem, block_q=block_q, block_k=block_k), problem, SLACK)
            report.verdict()


@properties
@given(case=cases())
def check_interface(case):
    """flash_attention(): the same, and always O of the right shape, and zeros where nothing is attended."""
    problem = Problem.of(case, CPU)
    result = problem.answer(CPU)
    report = Report(str(case))
    report.expect("flash_attention", result, problem, SLACK)
    report.verdict()
    dead = problem.truth.LSE.isneginf()
    assert torch.equal(result.LSE.isneginf(), dead)
    assert not result.O[dead].any()
    assert not result.dQ[dead].any()


@properties
@given(case=cases(causal=False, dropout_p=0.0), cut=st.floats(0, 1))
def check_merge(case, cut):
    """The keys cut anywhere, even at an end: both parts' O weighted by exp(LSE) make the whole, also where a part attends nothing."""
    q, k, v, mask = case.inputs("cpu")
    at = round(cut * case.Nk)
    if mask is not None:
        mask = (mask[:, None, None] if mask.shape == (case.B, case.Nk) else mask).expand(case.B, case.H, case.Nq, case.Nk)
    parts = [slice(0, at), slice(at, None)]
    options = {"scale": case.scale, "return_lse": True}
    halves = [flash_attention(q, k[:, :, j], v[:, :, j], None if mask is None else mask[..., j], **options) for j in parts]
    O, LSE = zip(*halves, strict=True)
    whole = torch.logaddexp(*LSE)
    weights = [(part - whole).exp().nan_to_num(0.0)[..., None] for part in LSE]
    merged = weights[0] * O[0] + weights[1] * O[1]
    truth = naive(case, q, k, v, mask, torch.ones_like(merged))
    report = Report(f"{case}, cut at {at}")
    report.compare("merged", "O", merged, truth.O, 1e-12)
    report.compare("merged", "LSE", whole, truth.LSE, 1e-12)
    report.verdict()


@properties
@given(case=cases(causal=True, mask=None, dropout_p=0.0), block_q=st.integers(1, 40), block_k=st.integers(1, 40))
def check_causal_tiles(case, block_q, block_k):
    """No causal algorithm visits a tile wholly in the future, and each visits every other one."""
    problem = Problem.of(case, CPU, dLSE=False)
    offset = case.Nk - case.Nq
    for name, algorithm in ALGORITHMS.items():
        if algorithm.causal:
            covered = torch.zeros(2, case.Nq, case.Nk, dtype=torch.int)  # by the forward; by forward and backward

            def watch(i, j, covered=covered, name=name, **shown):
                assert j.start <= i.stop - 1 + offset, f"{name} visits rows {i}, columns {j}, which are in their future"
                covered[1 if "dP" in shown else 0, i, j] += 1

            algorithm.run(problem, block_q=block_q, block_k=block_k, observe=watch)
            past = torch.ones(case.Nq, case.Nk, dtype=torch.bool).tril(offset)
            for direction, count in zip(("forward", "backward"), covered, strict=True):
                assert (count[past] == 1).all(), f"{name}, {direction}: {int((count[past] != 1).sum())} pairs were not visited once"


@properties
@given(
    seed=st.integers(0, 2**63 - 1), i=st.integers(0, 2**31), j=st.integers(0, 2**31), rows=st.integers(1, 70), columns=st.integers(1, 70)
)
def check_dropout_tiles(seed, i, j, rows, columns):
    """The bits of a tile anywhere are those of its elements one by one."""
    dropout = Dropout(0.5, torch.tensor(seed), range(1), range(1))
    tile = dropout.keep(slice(i, i + rows), slice(j, j + columns))[0, 0]
    assert tile.shape == (rows, columns)
    for r, c in ((0, 0), (rows - 1, 0), (0, columns - 1), (rows - 1, columns - 1), (rows // 2, columns // 2)):
        assert tile[r, c] == dropout.keep(slice(i + r, i + r + 1), slice(j + c, j + c + 1))[0, 0, 0, 0], f"element ({i + r}, {j + c})"


@properties
@given(start=st.integers(0, 100), length=st.integers(0, 100), size=st.integers(1, 120))
def check_blocks(start, length, size):
    """Blocks cover the range in order, each full but the last."""
    cuts = list(blocks(start, start + length, size))
    assert [n for cut in cuts for n in range(cut.start, cut.stop)] == list(range(start, start + length))
    assert all(cut.stop - cut.start == size for cut in cuts[:-1])
    assert all(cut.stop > cut.start for cut in cuts)


if __name__ == "__main__":
    run_alone(__file__)

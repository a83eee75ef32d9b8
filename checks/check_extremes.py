"""Extreme numbers: gradients of rows that attend nothing, scores of any size, scales of any size, scores that share an offset.

python checks/check_extremes.py [--backend reference]
"""

import math

import pytest
import torch
from harness import (
    ALGORITHMS,
    CPU,
    HALF,
    Case,
    Problem,
    Report,
    Result,
    against_truth,
    dtype_served,
    flash,
    naive,
    run_alone,
    serves_masks,
    skip_unless_masks,
    skip_unless_served,
)

from flash_attention import flash_attention
from flash_attention.call import Settings
from flash_attention.reference import normal_attention
from flash_attention.reference.online_softmax import attention_online, softmax_online

CAUSAL = pytest.mark.parametrize("causal", (False, True), ids=("general", "causal"))
ALGORITHM = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
BAD = pytest.mark.parametrize("bad", (math.nan, math.inf), ids=str)


# ---- rows that attend nothing


def dead_problem(target, causal: bool, dropout_p: float = 0.0) -> tuple[Problem, torch.Tensor]:
    """A problem with dead rows (rows that attend nothing), and which they are, (B, H, Nq). On a rung without masks, causality makes
    them."""
    masked = serves_masks(target)
    if not masked and not causal:
        pytest.skip(f"{target.backend} serves no mask: without causality every row attends something")
    case = Case(Nq=300, Nk=250, D=64, causal=causal, mask="dead rows" if masked else None, dropout_p=dropout_p, dtype=dtype_served(target))
    problem = Problem.of(case, target)
    dead = problem.truth.LSE.isneginf()
    assert dead.any() and not dead.all()
    return problem, dead


@BAD
@CAUSAL
def check_what_comes_back_to_dead_rows(target, causal, bad):
    """NaN or ∞ in dO and dLSE of rows that attend nothing, as from O / |O| or logaddexp(−∞, −∞): other gradients are unaffected, and those
    of these rows are 0. Through autograd, through the op, and in naive attention."""
    problem, dead = dead_problem(target, causal)
    case, call = problem.case, (problem.q, problem.k, problem.v, problem.mask)
    worse = problem.poisoned(bad)
    dO, dLSE = worse.dO, worse.dLSE
    report = Report(f"{target}: {bad} comes back to dead rows, {case}")
    result = flash(case, target, *call, dO, dLSE)
    report.expect("autograd", result, problem)
    mask = None if problem.mask is None else problem.mask.expand(*problem.q.shape[:3], problem.k.shape[2])
    op = torch.ops.flash_attention.backward
    settings = Settings(case.D**-0.5, right=0 if causal else None, backend=target.backend)
    *gradients, _ = op(dO, dLSE, problem.q, problem.k, problem.v, mask, None, result.O, result.LSE, None, *settings)
    report.expect("op", Result(result.O, result.LSE, *gradients), problem)
    report.expect("naive", naive(case, *call, dO, problem.dLSE)._replace(LSE=result.LSE), problem)  # its own LSE may be 16-bit
    report.verdict()
    assert not result.dQ[dead].any()


def check_with_dropout(target):
    """The same with dropout, which scales kept entries."""
    skip_unless_masks(target)
    problem, _ = dead_problem(target, True, dropout_p=0.2)
    report = Report(f"{target}: NaN comes back to dead rows, {problem.case}")
    report.expect("autograd", problem.poisoned(math.nan).answer(target), problem)
    report.verdict()


HIDING = {"dead rows": {"mask": "dead rows"}, "key": {"mask": "key", "causal": True}, "some blind": {"spans": "some blind"}}


@pytest.mark.parametrize("hiding", HIDING.values(), ids=HIDING)
@pytest.mark.parametrize("D", (64, 128, 192, 256))
@BAD
def check_in_each_kernel(target, bad, D, hiding):
    """The same for each way of hiding and for head sizes that have kernels of their own."""
    case = Case(B=4, Nq=300, Nk=300, D=D, dtype=dtype_served(target), seed=2, **hiding)
    against_truth(case, target, bad=bad)


@BAD
@ALGORITHM
def check_dead_rows_in_each_algorithm(algorithm, bad):
    """The same for the papers' functions, called directly."""
    problem, dead = dead_problem(CPU, algorithm.causal)
    if algorithm.paper == 1:
        problem = Problem.of(problem.case, CPU, dLSE=False)
    sizes = {"block_q": 32, "block_k": 24}
    call = problem.q, problem.k, problem.v, problem.mask
    O, *saved = algorithm.forward(*call, **sizes)
    dLSE = () if problem.dLSE is None else (problem.dLSE.masked_fill(dead, bad),)
    gradients = algorithm.backward(*call, O, *saved, problem.dO.masked_fill(dead[..., None], bad), *dLSE, **sizes)
    report = Report(f"{bad} comes back to dead rows, {problem.case}")
    report.expect("backward", Result(problem.truth.O, problem.truth.LSE, *gradients), problem)
    report.verdict()


@CAUSAL
def check_logaddexp_of_two_dead_parts(causal):
    """Two parts of the keys merged by their LSE, where some rows see neither: the gradient of torch.logaddexp(−∞, −∞) is NaN."""
    case = Case(Nq=60, Nk=40, D=16, causal=causal, mask="dead rows", dtype=torch.float64)
    problem = Problem.of(case, CPU)
    q, k, v = (x.clone().requires_grad_() for x in (problem.q, problem.k, problem.v))
    allowed = problem.mask.tril(case.Nk - case.Nq) if causal else problem.mask
    parts = slice(0, 15), slice(15, None)
    LSE = torch.logaddexp(*(flash_attention(q, k[:, :, j], v[:, :, j], allowed[..., j], return_lse=True)[1] for j in parts))
    got = torch.autograd.grad(LSE, (q, k, v), problem.dLSE)
    want = naive(case, problem.q, problem.k, problem.v, problem.mask, torch.zeros_like(problem.dO), problem.dLSE)
    for name, x, y in zip(("dQ", "dK", "dV"), got, want[2:], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@CAUSAL
def check_dead_rows_twice(causal):
    """The second derivative also ignores gradients of dead rows: in dO, in dLSE, and in the cotangent of dQ."""
    case = Case(B=1, H=2, Nq=30, Nk=20, D=8, causal=causal, mask="dead rows", dtype=torch.float64)
    q, k, v, mask = case.inputs("cpu")
    O, LSE = flash_attention(q, k, v, mask, causal=causal, return_lse=True)
    dead = LSE.isneginf()
    dO, dLSE = case.gradient("cpu", *O.shape), case.gradient("cpu", *LSE.shape)
    gQ, gK, gV = (case.gradient("cpu", *x.shape) for x in (q, k, v))
    second = torch.ops.flash_attention.second_backward
    settings = Settings(8**-0.5, right=0 if causal else None, backend="reference")
    wide = mask.expand(1, 2, 30, 20)

    def cotangents(bad: float):
        filled = (x.masked_fill(dead if x.dim() == 3 else dead[..., None], bad) for x in (gQ, dO, dLSE))
        return second(next(filled), gK, gV, *filled, q, k, v, wide, None, None, *settings)

    got, want = cotangents(math.nan)[:5], cotangents(0.0)[:5]  # the sixth is a bias'
    for name, x, y in zip(("dO", "dLSE", "Q", "K", "V"), got, want, strict=True):
        assert torch.equal(x, y), f"cotangent of {name} differs by {(x - y).abs().max()}"


# ---- large scores


def one_score(target, dtype, score: float, columns: int) -> tuple[torch.Tensor, ...]:
    """q, k, v with D = 64 and scale 1, of which one feature makes the scores `score` · [1, 2, …]; V counts 1, 2, …"""
    q, k, v = (torch.zeros(1, 1, n, 64, dtype=torch.float64, device=target.device) for n in (1, columns, columns))
    size = abs(score) ** 0.5
    counted = torch.arange(1, columns + 1, dtype=torch.float64)
    q[..., 0], k[..., 0], v[..., 0] = size, math.copysign(size, score) * counted, counted
    return tuple(x.to(dtype) for x in (q, k, v))


SCORES = (1.0, 1e3, 1e5, 3e6, 2e7, 1e10, 1e20, 1e30, 1.0001e32, 1e37, 1e150, 1e300)
LARGEST = 1.1e7  # float16 and bfloat16 kernels are correct up to this score; beyond, they give NaN


@pytest.mark.parametrize("masked", (False, True), ids=("", "masked"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, *HALF), ids=str)
@pytest.mark.parametrize("sign", (-1, 1))
def check_large_scores(target, dtype, sign, masked):
    """Scores of ±1 up to the dtype's limit: correct, or NaN beyond the range of a 16-bit kernel, but never a finite wrong number."""
    if masked:
        skip_unless_masks(target)
    mask = torch.tensor([[True] * 3 + [False] * 200], device=target.device) if masked else None
    for score in SCORES:
        q, k, v = (x.contiguous() for x in one_score(target, dtype, sign * score, 203 if masked else 3))
        if masked:
            k, v = (x.where(mask[:, None, :, None], 1) for x in (k, v))  # hidden; much larger than the others, if those are negative
        skip_unless_served(target, q, k, v, mask, False, 0.0)
        sum_dtype = torch.promote_types(dtype, torch.float32)
        S = (q.to(sum_dtype) @ k.to(sum_dtype).mT)[..., :3]
        if not (S.abs() < torch.finfo(sum_dtype).max / 2).all() or k.isinf().any():
            break
        O, LSE = flash_attention(q, k, v, mask, scale=1.0, return_lse=True, backend=target.backend)
        wanted = S.double().softmax(-1) @ v[:, :, :3].double(), S.double().logsumexp(-1)
        for name, got, want in (("O", O, wanted[0]), ("LSE", LSE, wanted[1])):
            if target.backend not in ("simple", "reference") and S.max().abs() > LARGEST and O.isnan().all():
                continue
            off = (got.double() - want).abs().max() / want.abs().max().clamp(min=1)
            assert off <= (1e-2 if name == "O" and dtype in HALF else 1e-6), (
                f"scores of {S.flatten().tolist()}: {name} {got.flatten()[0]}, not {want.flatten()[0]}"
            )


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@ALGORITHM
def check_the_lowest_scores(algorithm, dtype):
    """q = 1e16, k = −1e16 · [1, 2, 3]: O = 1, LSE = −1e32 and dV = (1, 0, 0), in each algorithm, in one tile and in three."""
    q, k, v = one_score(CPU, dtype, -1e32, 3)
    for block in (1, 3):
        O, *saved = algorithm.forward(q, k, v, scale=1.0, block_q=1, block_k=block)
        dQ, dK, dV = algorithm.backward(q, k, v, None, O, *saved, torch.ones_like(q), scale=1.0, block_q=1, block_k=block)
        l, m = saved if algorithm.paper == 1 else (torch.ones(1, dtype=dtype), saved[0])
        assert float(O[0, 0, 0, 0]) == 1 and float(l) == 1 and abs(float(m) / -1e32 - 1) < 1e-6
        assert dV[0, 0, :, 0].tolist() == [1, 0, 0] and not dQ.any() and not dK.any()


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, *HALF), ids=str)
def check_online_softmax(dtype):
    """Scores near the dtype's limit, one at a time."""
    lowest = torch.finfo(dtype).min
    x = torch.tensor([lowest, lowest / 2, -math.inf, lowest], dtype=dtype)
    assert softmax_online(x).tolist() == [0, 1, 0, 0]
    assert attention_online(x, torch.eye(4, dtype=dtype)).tolist() == [0, 1, 0, 0]


def check_every_score_overflows(target):
    """Scores that are all −∞ though nothing is hidden: NaN, as in normal attention, not 0."""
    q, k, v = one_score(target, torch.float32 if dtype_served(target) == torch.float32 else torch.bfloat16, 1.0, 3)
    q[..., 0], k[..., 0] = 1e38, -1e38
    assert normal_attention(q.float(), k.float(), v.float(), scale=1.0).isnan().all()
    assert flash_attention(q, k, v, scale=1.0, backend=target.backend)[..., 0].isnan().all()


@pytest.mark.parametrize("scale", (1e-300, 1e-40, 1e-36, 1e-30, -1e-20, 0.0, -0.3, 1e6, 1e30))
@CAUSAL
def check_scales(target, causal, scale):
    """Scales of any size and sign, with dead rows: for scales above 1, q is divided by the scale."""
    case = Case(
        Nq=90, Nk=70, D=64, causal=causal, mask="dead rows" if serves_masks(target) else None, dtype=dtype_served(target), scale=scale
    )
    q, k, v, mask = case.inputs(target.device)
    if abs(scale) > 1e4:
        case.dtype = case.dtype if case.dtype == torch.float32 else torch.bfloat16
        q, k, v = (x.to(case.dtype) for x in (q / abs(scale), k, v))
    skip_unless_served(target, q, k, v, mask, causal, 0.0)
    problem = Problem.of(case, target, inputs=(q, k, v, mask))
    report = Report(f"{target}: {case}")
    report.expect("flash_attention", problem.answer(target), problem)
    report.verdict()


# ---- scores that share an offset


@pytest.mark.parametrize("offset", (20, 60, 1000))
def check_one_hot_rows(target, offset):
    """Each query has one key with a score of `offset`, all others have 0: P = 1 to the last bits, forward and backward. If scores were
    multiplied by log2 e after rounding, dV would be off by 3e-6 at 60."""
    if dtype_served(target) != torch.float32:
        pytest.skip("rounds P to 16 bits")
    eye = torch.eye(64, device=target.device).expand(1, 2, 64, 64)
    q, k, v = offset * eye, eye.contiguous(), torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(0)).to(target.device)
    dO = v.flip(2)
    problem = Problem.solve(Case(B=1, H=2, Nq=64, Nk=64, D=64, scale=1.0), q, k, v, None, dO, None)
    result = problem.answer(target)
    for name in ("O", "dV"):
        got, want = (getattr(x, name).double() for x in (result, problem.truth))
        off = float((got - want).abs().max() / want.abs().max())
        assert off < 4e-7, f"{name} is off by {off:.1e} of its largest entry at scores of {offset}"


def check_centred_keys(target):
    """The documentation's advice: subtracting the keys' mean changes no result and no gradient, and restores the digits that a common
    offset of 1e5 costs."""
    if dtype_served(target) != torch.float32:
        pytest.skip("is about float32")
    case = Case(Nq=60, Nk=80, D=32)
    q, k, v, _ = case.inputs(target.device)
    q[..., 0], k[..., 0] = 1, 1e5 * 32**0.5
    problem = Problem.of(case, target, inputs=(q, k, v, None), dLSE=False)
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    O = flash_attention(q, k - k.mean(2, keepdim=True), v, backend=target.backend)
    gradients = torch.autograd.grad(O, (q, k, v), problem.dO)
    for name, got in zip(("O", "dQ", "dK", "dV"), (O, *gradients), strict=True):
        want = getattr(problem.truth, name)
        got, want = (got, want) if name != "dQ" else (x[..., 1:] for x in (got, want))  # the offset's own feature keeps only some digits
        off = float((got.detach().double() - want).abs().max() / want.abs().max())
        assert off < 1e-4, f"{name} is off by {off:.1e} of its largest entry"


if __name__ == "__main__":
    run_alone(__file__)

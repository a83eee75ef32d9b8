"""What must hold whatever the numbers: tiled = direct, causal = masked, merged halves = whole, permuted heads = permuted output, …

python checks/check_identities.py [--backend reference]

One file because the identities share inputs and tolerances.
"""

import doctest
import importlib
from dataclasses import replace

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
    run_alone,
    skip_unless_served,
)

from flash_attention import flash_attention
from flash_attention.reference import flash2, normal_attention, online_softmax, second_derivative, visible
from flash_attention.reference.tiles import lowest

ALGORITHM = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
CAUSAL = pytest.mark.parametrize("causal", (False, True), ids=("general", "causal"))
RAGGED = [(113, 203), (203, 113), (64, 64)]

# ---- the papers' algorithms: any tile size gives the definition's result, and every tile has the right contents and position


@pytest.mark.parametrize("blocks", [(7, 5), (16, 33), (64, 1), (1, 64), (113, 203), (1000, 1000)], ids=str)
@ALGORITHM
def check_tiled_is_direct(algorithm, blocks):
    report = Report(f"tiles of {blocks[0]} × {blocks[1]}")
    for (Nq, Nk), kind in zip(RAGGED, (None, "dead rows", "full"), strict=True):
        case = Case(B=1, H=2, Hkv=1, Nq=Nq, Nk=Nk, D=8, Dv=5, dtype=torch.float64, causal=algorithm.causal, mask=kind, scale=0.5)
        problem = Problem.of(case, CPU, dLSE=algorithm.paper == 2)
        report.expect(str(kind), algorithm.run(problem, block_q=blocks[0], block_k=blocks[1]), problem)
    report.verdict()


def tiles_of(algorithm, problem: Problem, block_q: int, block_k: int) -> tuple[list[dict], list[dict]]:
    """Copies of what the observer is shown, tile by tile, in the forward and in the backward."""
    seen = [], []
    sizes = {"block_q": block_q, "block_k": block_k, "scale": problem.case.scale}

    def watch(tiles):
        return lambda **shown: tiles.append({name: x if isinstance(x, slice) else x.clone() for name, x in shown.items()})

    call = problem.q, problem.k, problem.v, problem.mask
    O, *saved = algorithm.forward(*call, observe=watch(seen[0]), **sizes)
    algorithm.backward(*call, O, *saved, problem.dO, observe=watch(seen[1]), **sizes)
    return seen


@pytest.mark.parametrize(("Nq", "Nk", "block_q", "block_k"), [(96, 96, 12, 12), (113, 203, 16, 9), (203, 113, 10, 31), (50, 50, 64, 7)])
@ALGORITHM
def check_tiles_visited(algorithm, Nq, Nk, block_q, block_k):
    """Every pair of a row and a visible column is visited exactly once, and no tile that lies wholly in the future is visited."""
    problem = Problem.of(Case(B=1, H=1, Nq=Nq, Nk=Nk, D=4, causal=algorithm.causal), CPU)
    offset = Nk - Nq
    visible = torch.ones(Nq, Nk, dtype=torch.bool)
    visible = visible.tril(offset) if algorithm.causal else visible
    for direction, tiles in zip(("forward", "backward"), tiles_of(algorithm, problem, block_q, block_k), strict=True):
        visits = torch.zeros(Nq, Nk, dtype=torch.int)
        for tile in tiles:
            visits[tile["i"], tile["j"]] += 1
            assert visible[tile["i"], tile["j"]].any(), f"{direction} computes rows {tile['i']} × columns {tile['j']}: all in the future"
        wrong = (visits != 1) & visible
        assert not wrong.any(), f"{direction}: pair {wrong.nonzero()[0].tolist()} was visited {visits[wrong][0]} times"

        rows_outside = direction == "forward" and algorithm.paper == 2
        outer = [tile["i" if rows_outside else "j"].start for tile in tiles]
        assert outer == sorted(outer), f"{direction}: {'Q' if rows_outside else 'K and V'} blocks are not the outer loop"

        # The paper's count. Tiles start at the diagonal where the inner loop does, so the ragged count depends on which loop is outside.
        if not algorithm.causal:
            count = -(-Nq // block_q) * -(-Nk // block_k)
        elif rows_outside:
            ends = [min(start + block_q, Nq) + offset for start in range(0, Nq, block_q)]
            count = sum(-(-max(0, min(end, Nk)) // block_k) for end in ends)
        else:
            starts = [max(0, start - offset) for start in range(0, Nk, block_k)]
            count = sum(-(-max(0, Nq - start) // block_q) for start in starts)
        assert len(tiles) == count, f"{direction} visits {len(tiles)} tiles, not {count}"
        if algorithm.causal and Nq == Nk and block_q == block_k:
            n = Nq // block_q
            assert len(tiles) == n * (n + 1) // 2, f"{direction}: a causal square of {n} × {n} tiles needs n(n + 1)/2"


@pytest.mark.parametrize(("Nq", "Nk"), [(53, 70), (70, 53)])
@ALGORITHM
def check_tiles_shown(algorithm, Nq, Nk):
    """Observing changes nothing, and the observer gets what the docstrings say after every tile: S, P, O so far, dP, dS, the gradients."""
    case = Case(B=1, H=2, Nq=Nq, Nk=Nk, D=8, dtype=torch.float64, causal=algorithm.causal, mask="dead rows")
    problem = Problem.of(case, CPU, dLSE=False)
    q, k, v, mask, dO, truth = problem.q, problem.k, problem.v, problem.mask, problem.dO, problem.truth
    sizes = {"block_q": 16, "block_k": 12}
    plain, watched = algorithm.run(problem, **sizes), algorithm.run(problem, **sizes, observe=lambda **_: None)
    for name, x, y in zip(Result._fields, plain, watched, strict=True):
        assert torch.equal(x, y), f"{name} differs when it is observed"

    allowed = mask.tril(Nk - Nq) if algorithm.causal else mask
    S = (q @ k.mT * 8**-0.5).masked_fill(~allowed, -torch.inf)
    P = (S - truth.LSE[..., None]).exp().nan_to_num(0.0)
    dP = dO.masked_fill(truth.LSE.isneginf()[..., None], 0) @ v.mT  # the gradient of a row that attends nothing is ignored
    dS = P * (dP - (P * dP).sum(-1, keepdim=True))
    forward, backward = tiles_of(algorithm, problem, **sizes)
    assert forward and backward

    def same(what, got, want):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12, msg=lambda text: f"{what}: {text}")

    for tile in forward:
        i, j, m, l = tile["i"], tile["j"], tile["m"], tile["l"]
        same(f"S of tile {i}, {j}", tile["S"], S[:, :, i, j])
        so_far = allowed & (torch.arange(Nk) < j.stop)
        O, LSE = normal_attention(q, k, v, so_far, return_lse=True)
        same(f"m + log l after tile {i}, {j}", torch.where(l > 0, m + l.log(), -torch.inf)[..., 0], LSE[:, :, i])
        same(f"O after tile {i}, {j}", tile["O"] / l.masked_fill(l == 0, 1) if algorithm.paper == 2 else tile["O"], O[:, :, i])
        # The first paper's P is relative to the tile's own maximum, the second's to the running maximum.
        own = m if algorithm.paper == 2 else S[:, :, i, j].amax(-1, keepdim=True).clamp(min=lowest(q.dtype))
        same(f"P of tile {i}, {j}", tile["P"], (S[:, :, i, j] - own).exp())
    for n, tile in enumerate(backward):
        i, j = tile["i"], tile["j"]
        for name, want in (("S", S), ("P", P), ("dP", dP), ("dS", dS)):
            same(f"{name} of tile {i}, {j}, backward", tile[name], want[:, :, i, j])
        if j.stop == Nk:  # the last columns are the last to add to these rows
            same(f"dQ after tile {i}, {j}", tile["dQ"], truth.dQ[:, :, i])
        if n + 1 == len(backward) or backward[n + 1]["j"] != j:  # the last rows to add to these columns
            same(f"dK after tile {i}, {j}", tile["dK"], truth.dK[:, :, j])
            same(f"dV after tile {i}, {j}", tile["dV"], truth.dV[:, :, j])


# ---- flash_attention(), on any backend


@pytest.mark.parametrize(("Nq", "Nk"), RAGGED)
def check_causal_is_a_mask(target, Nq, Nk):
    case = Case(Nq=Nq, Nk=Nk, D=32, causal=True, dtype=dtype_served(target))
    problem = Problem.of(case, target)
    past = torch.ones(Nq, Nk, dtype=torch.bool, device=target.device).tril(Nk - Nq)
    report = Report(f"{target}: {case}, as a mask")
    for what, mask in (("(Nq, Nk)", past), ("(B, H, Nq, Nk)", past.expand(2, 2, Nq, Nk).contiguous())):
        masked = replace(problem, case=replace(case, causal=False), mask=mask)
        skip_unless_served(target, problem.q, problem.k, problem.v, mask.expand(2, 2, Nq, Nk), False, 0.0)
        report.expect(what, masked.answer(target), problem)
    report.verdict()


@pytest.mark.parametrize("cut", (64, 90, 1))
@CAUSAL
def check_halves_merge(target, causal, cut):
    """Attention over two parts of the keys, merged by LSE, equals attention over all; gradients flow through both LSEs."""
    case = Case(Nq=113, Nk=203, D=32, Dv=16, causal=causal, dtype=dtype_served(target))
    problem = Problem.of(case, target)
    q, k, v = (x.clone().requires_grad_() for x in (problem.q, problem.k, problem.v))
    # Every row sees all of the first keys (cut ≤ Nk − Nq); causality among the others, aligned bottom-right, is unchanged.
    parts = [(slice(0, cut), False), (slice(cut, None), causal)]
    (O1, LSE1), (O2, LSE2) = (
        flash_attention(q, k[:, :, j], v[:, :, j], causal=c, return_lse=True, backend=target.backend) for j, c in parts
    )
    LSE = torch.logaddexp(LSE1, LSE2)
    O = (LSE1 - LSE).exp()[..., None] * O1 + (LSE2 - LSE).exp()[..., None] * O2
    gradients = torch.autograd.grad((O, LSE), (q, k, v), (problem.dO.to(O.dtype), problem.dLSE))
    report = Report(f"{target}: keys cut at {cut}, merged, {case}")
    report.expect("merged", Result(O, LSE, *gradients), problem)
    report.verdict()


@pytest.mark.parametrize("Hkv", (1, 2))
@CAUSAL
def check_grouped_heads(target, causal, Hkv):
    """Grouped-query attention = every key/value head repeated for the query heads that read it, its gradients summed over them."""
    case = Case(H=6, Hkv=Hkv, Nq=113, Nk=203, D=32, causal=causal, mask="full", dtype=dtype_served(target))
    problem = Problem.of(case, target)
    repeated = replace(problem, k=problem.k.repeat_interleave(6 // Hkv, dim=1), v=problem.v.repeat_interleave(6 // Hkv, dim=1))
    O, LSE, dQ, dK, dV = repeated.answer(target)
    report = Report(f"{target}: {case}")
    report.expect("grouped", problem.answer(target), problem)
    report.expect("repeated", Result(O, LSE, dQ, dK.unflatten(1, (Hkv, -1)).sum(2), dV.unflatten(1, (Hkv, -1)).sum(2)), problem)
    report.verdict()


# Axes of everything in a problem: batch, head, query row, key row, feature of q and k, feature of v.
AXES = {"q": "bhid", "k": "bhjd", "v": "bhje", "mask": "bhij", "dO": "bhie", "dLSE": "bhi"}
RESULT_AXES = ("bhie", "bhi", "bhid", "bhjd", "bhje")


@pytest.mark.parametrize("axis", "bhijde")
def check_permutations(target, axis):
    """Permuting batches, heads, rows, keys or features permutes the result."""
    case = Case(B=3, H=4, Nq=113, Nk=203, D=32, Dv=16, mask="full", dtype=dtype_served(target))
    problem = Problem.of(case, target)
    size = {"b": 3, "h": 4, "i": 113, "j": 203, "d": 32, "e": 16}[axis]
    order = torch.randperm(size, generator=torch.Generator().manual_seed(8)).to(target.device)

    def permuted(x, axes):
        return x.index_select(axes.index(axis), order) if axis in axes else x

    results = {
        name: Result(*(permuted(x, axes) for x, axes in zip(getattr(problem, name), RESULT_AXES, strict=True)))
        for name in ("truth", "in_dtype")
    }
    other = replace(problem, **{name: permuted(getattr(problem, name), axes) for name, axes in AXES.items()}, **results)
    report = Report(f"{target}: axis {axis} permuted, {case}")
    report.expect("permuted", other.answer(target), other)
    report.verdict()


@CAUSAL
def check_translation(target, causal):
    """A constant added to all scores of a row changes neither O nor the gradients, and changes LSE by that constant.

    It is added by one more feature: the row's constant in q, 1 in k (and zeros up to a multiple of 8).
    """
    case = Case(Nq=113, Nk=203, D=24, causal=causal, dtype=dtype_served(target), scale=0.25)
    problem = Problem.of(case, target)
    constant = torch.randint(-8, 9, (2, 2, 113, 1), generator=torch.Generator().manual_seed(9)).to(problem.q)
    one = torch.ones_like(problem.k[..., :1])
    q = torch.cat([problem.q, constant / 0.25, torch.zeros_like(problem.q[..., :7])], -1)
    k = torch.cat([problem.k, one, torch.zeros_like(problem.k[..., :7])], -1)
    moved = Problem.solve(replace(case, D=32), q, k, problem.v, None, problem.dO, problem.dLSE)
    O, LSE, dQ, dK, dV = moved.answer(target)
    report = Report(f"{target}: rows translated, {case}")
    tolerance = Result(moved.in_dtype.O, problem.in_dtype.LSE, moved.in_dtype.dQ[..., :24], moved.in_dtype.dK[..., :24], moved.in_dtype.dV)
    got = Result(O, LSE - constant[..., 0], dQ[..., :24], dK[..., :24], dV)
    report.expect("translated", got, replace(problem, in_dtype=tolerance))
    report.verdict()


def check_one_hot(target):
    """Each row attends to one key, and V holds the keys' numbers: O says which key, dV says which row. A wrong layout is off by integers.

    Keys are the binary codes (±1) of their numbers, and a query is 32 times the code of the key that it selects.
    """
    case = Case(B=2, H=3, Nq=512, Nk=512, D=16, dtype=dtype_served(target), scale=0.5)
    number = torch.arange(512)
    codes = torch.zeros(512, 16)
    codes[:, :9] = 2.0 * (number[:, None] >> torch.arange(9) & 1) - 1
    wanted = torch.stack([torch.randperm(512, generator=torch.Generator().manual_seed(n)) for n in range(6)]).view(2, 3, 512)
    place = torch.arange(6).view(2, 3, 1)  # which batch and head
    columns = torch.stack([(number >> 5).expand(2, 3, 512), (number & 31).expand(2, 3, 512), place.expand(2, 3, 512)], -1)
    v = torch.cat([columns, torch.arange(5).expand(2, 3, 512, 5)], -1)  # exact in every dtype: key number in two digits, head, feature
    dO = v.flip(2) + 1
    q, k, v, dO = (x.to(case.dtype).to(target.device) for x in (32 * codes[wanted], codes.expand(2, 3, 512, 16), v, dO))
    O, LSE, dQ, _, dV = flash(case, target, q, k, v, None, dO)
    wanted = wanted.to(target.device)[..., None].expand_as(v)
    off = (O - v.gather(2, wanted)).abs()
    assert off.max() < 0.1, f"O[{tuple(off.flatten().argmax().unravel_index(off.shape))}]"
    expected = torch.zeros_like(dO).scatter_(2, wanted, dO)
    assert (dV - expected).abs().max() < 0.1
    assert (LSE - 144).abs().max() < 0.01, f"LSE should be the only score, 0.5 · 32 · 9 = 144, and is {LSE.flatten()[0]}"
    assert dQ.abs().max() < 0.01, "a softmax that is one-hot does not move"


@pytest.mark.parametrize("sharp", (1.0, 300.0))
@CAUSAL
def check_equal_keys(target, causal, sharp):
    """If all keys are equal every visible key has the same weight: O is a mean of V, LSE the score plus log of the count.

    With q × 300 some rows have only scores near −500, which are as good as any: exp of them is not.
    """
    case = Case(B=1, H=2, Nq=113, Nk=203, D=32, causal=causal, sharp=sharp, dtype=dtype_served(target))
    q, k, v, _ = case.inputs(target.device)
    problem = Problem.of(case, target, inputs=(q, k[:, :, :1].expand_as(k), v, None))
    visible = torch.arange(91, 204) if causal else torch.full((113,), 203)  # columns that each row sees
    visible = visible.to(target.device)
    score = (q.double() * k[:, :, :1].double()).sum(-1) * 32**-0.5
    assert sharp == 1 or score.min() < -400
    dO = problem.dO.double() / visible[:, None]
    truth = problem.truth._replace(
        O=v.double().cumsum(2)[:, :, visible - 1] / visible[:, None],
        LSE=score + visible.log(),
        dV=torch.stack([dO[:, :, visible > j].sum(2) for j in range(203)], 2),
    )
    report = Report(f"{target}: all keys equal, {case}")
    # A score of 500 is only known to 3e-5, and exp(S − LSE) in the backward shows it.
    report.expect("flash_attention", problem.answer(target), replace(problem, truth=truth), slack=1 if sharp == 1 else 50)
    report.verdict()


@pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=str)
@pytest.mark.parametrize("N", (1, 2, 5, 17, 128, 300))
@CAUSAL
def check_large_scores(target, causal, N, dtype):
    """q × 5 and q × 15: scores near 100, a softmax that is close to one-hot, where a backward overflows if anything does.

    A score of 100 is only known to 1e-5, and exp(S − LSE) inherits that error, while naive attention's exp(S − max) = 1 does not.
    """
    for sharp in (5.0, 15.0):
        against_truth(Case(Nq=N, Nk=N, D=32, causal=causal, dtype=dtype, sharp=sharp), target, slack=4)


@pytest.mark.parametrize("scale", (0.3, 0, -0.5, 2))
@CAUSAL
def check_scale(target, causal, scale):
    against_truth(Case(Nq=113, Nk=203, D=32, causal=causal, scale=scale, dtype=dtype_served(target)), target)


def check_default_scale(target, repeatable):
    """1/√D unless given."""
    case = Case(Nq=113, Nk=203, D=64, dtype=dtype_served(target))
    got, want = (Problem.of(replace(case, scale=scale), target).answer(target) for scale in (None, 0.125))
    assert torch.equal(got.O, want.O)
    assert torch.equal(got.dQ, want.dQ)


@CAUSAL
def check_block_size(causal, monkeypatch):
    """flash_attention(block_size=…): the same O, LSE and first and second derivatives in tiles of any size, and tiles are that size."""
    asked = {}
    for module in (flash2, visible, second_derivative):
        sizes = asked[module.__name__] = set()
        monkeypatch.setattr(
            module, "blocks", lambda start, stop, size, sizes=sizes, blocks=module.blocks: sizes.add(size) or blocks(start, stop, size)
        )
    case = Case(B=1, H=4, Hkv=2, Nq=33, Nk=41, D=8, Dv=5, dtype=torch.float64, causal=causal, mask="full", dropout_p=0.3, scale=0.5)
    leaves = [x.requires_grad_() for x in case.inputs("cpu")[:3]]
    mask = case.inputs("cpu")[3]

    def everything(block_size):
        torch.manual_seed(0)
        O, LSE = flash_attention(
            *leaves, mask, causal=causal, scale=0.5, dropout_p=0.3, return_lse=True, backend=None, block_size=block_size
        )
        first = torch.autograd.grad(O.square().sum() + LSE.square().sum(), leaves, create_graph=True)
        return O, LSE, *first, *torch.autograd.grad(sum(x.square().sum() for x in first), leaves)

    want = everything(None)
    for size in (1, 5, 16, 33, 10**9):
        for sizes in asked.values():
            sizes.clear()
        for n, (x, y) in enumerate(zip(everything(size), want, strict=True)):
            torch.testing.assert_close(
                x, y, rtol=1e-10, atol=1e-11, msg=lambda text, n=n, size=size: f"output {n} of blocks of {size}: {text}"
            )
        assert all(sizes == {size} for sizes in asked.values()), f"tiles of {asked}, not {size}"


@pytest.mark.parametrize(("D", "Dv"), [(64, 24), (16, 128), (8, 512), (256, 8)])
@CAUSAL
def check_value_size(target, causal, D, Dv):
    against_truth(Case(Nq=113, Nk=203, H=4, Hkv=2, D=D, Dv=Dv, causal=causal, dtype=dtype_served(target)), target)


LAYOUTS = {
    "(B, N, H, D) transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "one of packed (B, N, 3, H, D)": lambda x: torch.stack([x, x, x]).permute(1, 3, 0, 2, 4).contiguous()[:, :, 1].transpose(1, 2),
    "(N, B, H, D) permuted": lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "a slice of wider rows": lambda x: torch.cat([x, x, x], -1)[..., x.shape[3] : 2 * x.shape[3]],
    "at an odd address": lambda x: torch.cat([x[..., :3], x, x[..., :2]], -1)[..., 3:-2],
    "every second row": lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
    "features outermost": lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "every second feature": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("kv_heads", [2, 4])  # repeating grouped heads makes copies, which would hide effects of a layout
@CAUSAL
def check_layouts(target, causal, kv_heads, layout):
    """q, k, v and dO in any layout: the same result."""
    case = Case(Nq=113, Nk=203, H=4, Hkv=kv_heads, D=32, causal=causal, dtype=dtype_served(target))
    problem = Problem.of(case, target)
    views = {name: layout(getattr(problem, name)) for name in ("q", "k", "v", "dO")}
    assert not views["q"].is_contiguous()
    report = Report(f"{target}: {case}")
    for name, view in views.items():
        assert torch.equal(view, getattr(problem, name))
        report.expect(name, replace(problem, **{name: view}).answer(target), problem)
    report.expect("all", replace(problem, **views).answer(target), problem)
    report.verdict()


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (3,), (0, 1, 2, 3)], ids=str)
def check_stride_zero(target, axes):
    """Inputs and dO that repeat one value (from expand, or the gradient of sum()) have stride 0."""
    case = Case(Nq=113, Nk=203, D=32, dtype=dtype_served(target))

    def repeated(x):
        return x[tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(4))].expand_as(x)

    report = Report(f"{target}: axes {axes} expanded, {case}")
    problem = Problem.of(case, target)
    inputs = {name: getattr(problem, name) for name in ("q", "k", "v", "mask", "dO", "dLSE")}
    for name in ("q", "k", "v", "dO"):
        one_repeated = Problem.solve(case, **{**inputs, name: repeated(inputs[name])})
        report.expect(name, one_repeated.answer(target), one_repeated, slack=5)  # rounding errors that are all equal add up
    report.verdict()


# ---- online softmax alone, and the examples in the docstrings


@pytest.mark.parametrize("block", (1, 3, 7, 100, 128))
def check_online_softmax(block):
    x = 30 * torch.randn(5, 100, generator=torch.Generator().manual_seed(10), dtype=torch.float64)
    x[2, :40] = -torch.inf  # a row that starts with masked entries
    V = torch.randn(100, 6, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    want = torch.softmax(x, -1)
    torch.testing.assert_close(online_softmax.softmax_three_passes(x), want, rtol=1e-13, atol=0)
    torch.testing.assert_close(online_softmax.softmax_online(x, block), want, rtol=1e-13, atol=0)
    torch.testing.assert_close(online_softmax.attention_online(x, V, block), want @ V, rtol=1e-13, atol=1e-14)


def check_summaries_merge():
    """In any grouping and any order, and the empty piece changes nothing."""
    x = 30 * torch.randn(4, 90, generator=torch.Generator().manual_seed(12), dtype=torch.float64)
    a, b, c = (online_softmax.summarise(x[:, j]) for j in (slice(0, 20), slice(20, 21), slice(21, 90)))
    nothing = online_softmax.summarise(torch.full((4, 3), -torch.inf, dtype=torch.float64))
    merge, whole = online_softmax.merge, online_softmax.summarise(x)
    ways = {
        "(ab)c": merge(merge(a, b), c),
        "a(bc)": merge(a, merge(b, c)),
        "(ca)b": merge(merge(c, a), b),
        "with nothing": merge(nothing, whole),
    }
    for way, (m, l) in ways.items():
        assert torch.equal(m, whole[0]), f"{way}: m differs"
        torch.testing.assert_close(l, whole[1], rtol=1e-13, atol=0, msg=lambda text, way=way: f"{way}: {text}")
    torch.testing.assert_close((whole[0] + whole[1].log())[:, 0], x.logsumexp(-1))


@pytest.mark.parametrize("softmax", (online_softmax.softmax_three_passes, online_softmax.softmax_online), ids=("three passes", "online"))
def check_why_the_maximum(softmax):
    """Without its maximum subtracted, softmax overflows in float16 at a score of 12; with it, nothing does."""
    x = torch.tensor([[1.0, 5.0, 12.0], [-3.0, 30.0, 29.0]], dtype=torch.float16)
    assert (x.exp() / x.exp().sum(-1, keepdim=True)).isnan().any()
    torch.testing.assert_close(softmax(x).double(), torch.softmax(x.double(), -1), rtol=2e-3, atol=1e-7)


MODULES = ("reference.tiles", "reference.dropout", "reference.online_softmax", "interface")


@pytest.mark.parametrize("name", MODULES)
def check_doctests(name):
    result = doctest.testmod(importlib.import_module(f"flash_attention.{name}"))
    assert result.attempted, f"flash_attention.{name} has no example"
    assert not result.failed


if __name__ == "__main__":
    run_alone(__file__)

"""Dropout: the generator's known answers, its bits, their statistics, and attention with them, forward and backward.

python checks/check_dropout.py [--backend reference]
"""

import math
from dataclasses import replace

import pytest
import torch
from harness import ALGORITHMS, CPU, HALF, Case, Problem, Report, against_truth, dtype_served, flash, run_alone, skip_unless_served
from torch.utils.checkpoint import checkpoint

from flash_attention import flash_attention
from flash_attention.reference import Dropout
from flash_attention.reference.dropout import philox_4x32_10, threshold

CAUSAL = pytest.mark.parametrize("causal", (False, True), ids=("general", "causal"))
SEED = 0x0123456789ABCDEF  # both halves of the key in use


def dropout(p: float = 0.1, seed: int = SEED, batches: range = range(2), heads: range = range(3)) -> Dropout:
    return Dropout(p, torch.tensor(seed), batches, heads)


# ---- the generator

# From Random123 1.14's kat_vectors: counter, key, result.
KNOWN_ANSWERS = {
    "zeros": ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    "ones": ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    "digits of pi": (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
}


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS.values(), ids=KNOWN_ANSWERS)
def check_known_answers(counter, key, result):
    words = philox_4x32_10(tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))
    assert [int(word) for word in words] == result, [hex(int(word)) for word in words]


def philox_in_integers(counter: list[int], key: list[int]) -> list[int]:
    """The paper's generator in Python's unbounded integers: no wrap-around to get wrong."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 1 << 32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % (1 << 32), (k[1] + 0xBB67AE85) % (1 << 32)]
    return c


@pytest.mark.parametrize("seed", (0, SEED, 2**63 - 1, 1 << 32))
def check_bits_element_by_element(seed):
    """The module's docstring, written out for one element at a time: small positions, and ones far out."""
    p, batch, head = 0.3, 5, 70_000
    draw = Dropout(p, torch.tensor(seed), range(batch, batch + 1), range(head, head + 1))
    for row, column in ((0, 0), (31, 64), (100_003, 12_345_678), (2**31 + 11, 2**31 + 77)):
        kept = draw.keep(slice(row, row + 9), slice(column, column + 10))[0, 0]
        for i in range(row, row + 9):
            for j in range(column, column + 10):
                a, (w, r) = i // 32, divmod(i % 32, 8)
                b, (y, c) = j // 32, divmod(j % 32, 8)
                words = philox_in_integers([8 * b + c, 8 * a + r, head, batch], [seed % (1 << 32), seed >> 32])
                byte = words[w] >> 8 * y & 0xFF
                assert bool(kept[i - row, j - column]) == (byte >= round(256 * p)), f"element ({i}, {j})"


def check_any_tile():
    """A tile's bits depend on where its elements lie, not on where the tile starts or ends."""
    draw = dropout(0.5)
    whole = draw.keep(slice(0, 150), slice(0, 170))
    assert whole.shape == (2, 3, 150, 170)
    cuts = (0, 1, 7, 8, 31, 32, 33, 64, 100, 149)
    for first in cuts:
        for last in (x for x in (*cuts, 150) if x > first):
            tile = draw.keep(slice(first, last), slice(first + 13, last + 20))
            assert torch.equal(tile, whole[:, :, first:last, first + 13 : last + 20]), f"rows {first} … {last}"
    some = Dropout(0.5, draw.seed, range(1, 2), range(2, 3)).keep(slice(0, 150), slice(0, 170))
    assert torch.equal(some, whole[1:, 2:]), "batch 1, head 2 alone differs from the same among others"


@pytest.mark.parametrize("p", (0.001, 0.1, 0.25, 0.5, 0.9, 0.999))
def check_rate(p):
    """The fraction dropped is the rounded probability, to 5 standard deviations; kept entries are divided by its exact complement."""
    dropped = threshold(p) / 256
    assert abs(dropped - p) <= 1 / 256
    Z = dropout(p, heads=range(8)).tile(slice(0, 1000), slice(0, 500), torch.float64)
    n = Z.numel()
    rate = float((Z == 0).double().mean())
    assert abs(rate - dropped) < 5 * math.sqrt(dropped * (1 - dropped) / n), f"{rate:.5f} are dropped, not {dropped:.5f}"
    assert torch.equal(Z[Z != 0].unique(), torch.tensor([1 / (1 - dropped)], dtype=torch.float64))


def check_edges_of_p():
    """0 drops nothing; anything above 0 drops at least 1 in 256, anything below 1 keeps as much."""
    tile = slice(0, 512), slice(0, 512)
    assert dropout(0.0).keep(*tile).all()
    assert [threshold(p) for p in (0, 1e-9, 1 / 256, 0.5, 0.999, 1 - 1e-9)] == [0, 1, 1, 128, 255, 255]
    assert not dropout(1e-9).keep(*tile).all()
    assert dropout(0.999).keep(*tile).any()
    more, less = dropout(0.2).keep(*tile), dropout(0.6).keep(*tile)
    assert not (less & ~more).any(), "what a larger p keeps, a smaller one keeps too: both compare the same byte"


# Offsets between compared elements: inside a Philox call's 4 × 4 grid, in the next call, in the next group of 32, far away.
STEPS = (1, 2, 7, 8, 16, 24, 32, 64, 256)
LAGS = [*((0, n) for n in STEPS), *((n, 0) for n in STEPS), (1, 1), (8, 8), (1, -1), (32, 32)]


@pytest.mark.parametrize("p", (0.1, 0.5))
def check_uncorrelated(p):
    """No correlation, to 5 standard deviations, between rows, columns, heads, batches, seeds, or an element and its mirror image."""
    x = dropout(p).keep(slice(0, 512), slice(0, 512)).double()
    x = (x - x.mean()) / x.std()
    other = dropout(p, seed=SEED + 1).keep(slice(0, 512), slice(0, 512)).double()
    high = dropout(p, seed=SEED + (1 << 32)).keep(slice(0, 512), slice(0, 512)).double()

    pairs = {"heads": (x[:, :-1], x[:, 1:]), "batches": (x[:-1], x[1:]), "transposed": (x, x.mT), "next seed": (x, other - other.mean())}
    pairs["seed's high half"] = (x, high - high.mean())
    pairs["batch 0, head 1 and batch 1, head 0"] = (x[0, 1], x[1, 0])
    for down, right in LAGS:
        rows, left = 512 - down, slice(max(0, -right), 512 - max(0, right))
        pairs[f"lag ({down}, {right})"] = (x[:, :, :rows, left], x[:, :, down:, max(0, right) : 512 + min(0, right)])
    for what, (a, b) in pairs.items():
        a, b = a.flatten(), b.flatten()
        correlation = float((a * b).mean() / (a.std() * b.std()))
        assert abs(correlation) < 5 / math.sqrt(a.numel()), f"{what}: correlation {correlation:.5f} over {a.numel()} pairs"
    for axis, what in ((-1, "rows"), (-2, "columns")):
        deviation = x.mean(axis).abs().max() * math.sqrt(512)
        assert deviation < 6, f"the mean over one of the {what} is {deviation:.1f} standard deviations off"


# ---- attention with dropout


@pytest.mark.parametrize("kind", (None, "left padding", "dead rows"))
@pytest.mark.parametrize("p", (0.1, 0.5, 0.999))
@CAUSAL
def check_against_naive(target, causal, p, kind):
    """O, LSE and all gradients against naive attention with the same mask Z, whose seed comes from replaying torch's generator."""
    against_truth(
        Case(B=2, H=4, Hkv=2, Nq=113, Nk=203, D=32, Dv=16, causal=causal, mask=kind, dropout_p=p, dtype=dtype_served(target)), target
    )


@pytest.mark.parametrize("dtype", (*HALF, torch.float64), ids=str)
@pytest.mark.parametrize("D", (64, 128, 256))  # kernels have other tiles for each
@CAUSAL
def check_dtypes_and_head_sizes(target, causal, D, dtype):
    against_truth(Case(Nq=113, Nk=203, D=D, causal=causal, dropout_p=0.1, dtype=dtype), target)


@CAUSAL
def check_many_heads(target, causal):
    """More heads and batches than are computed at once, and longer than a tile: each gets the bits of its own index."""
    against_truth(Case(B=3, H=6, Nq=300, Nk=600, D=64, causal=causal, dropout_p=0.2, dtype=dtype_served(target)), target)


@pytest.mark.parametrize("blocks", [(16, 12), (33, 40), (500, 500)], ids=str)
@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def check_algorithms(algorithm, blocks):
    """Every algorithm, in tiles of any size, drops the same elements in the forward and in the backward."""
    case = Case(Nq=70, Nk=103, H=2, Hkv=1, D=8, dtype=torch.float64, causal=algorithm.causal, mask="full", dropout_p=0.3)
    problem = Problem.of(case, CPU, dLSE=algorithm.paper == 2)
    report = Report(f"dropout in tiles of {blocks}: {case}")
    report.expect("algorithm", algorithm.run(problem, block_q=blocks[0], block_k=blocks[1]), problem)
    report.verdict()


def dropped(target, x, p, n):
    torch.manual_seed(n)
    return flash_attention(x, x, x, dropout_p=p, backend=target.backend)


def check_reproducible(target):
    """torch.manual_seed fixes the mask; without it every call draws another; a call without dropout draws nothing."""
    case = Case(Nq=70, Nk=70, D=32, dtype=dtype_served(target), dropout_p=0.5)
    x = case.inputs(target.device)[0]
    skip_unless_served(target, x, x, x, None, False, 0.5)
    first, again, other = dropped(target, x, 0.5, 1), dropped(target, x, 0.5, 1), dropped(target, x, 0.5, 2)
    assert torch.equal(first, again), "the same seed gave another mask"
    assert not torch.equal(first, other), "another seed gave the same mask"
    torch.manual_seed(1)
    one, two = (flash_attention(x, x, x, dropout_p=0.5, backend=target.backend) for _ in range(2))
    assert torch.equal(one, first)
    assert not torch.equal(one, two), "two calls in a row drew the same mask"
    torch.manual_seed(1)
    plain = flash_attention(x, x, x, backend=target.backend)
    assert torch.equal(flash_attention(x, x, x, dropout_p=0.5, backend=target.backend), first), "a call without dropout moved the generator"
    assert torch.equal(flash_attention(x, x, x, dropout_p=0.0, backend=target.backend), plain), "p = 0 is no dropout"


def check_mask_read_off(target):
    """With all scores equal and V a one-hot of its row, O shows Z itself: the reference's Dropout, bit for bit."""
    case = Case(B=2, H=3, Nq=300, Nk=128, D=32, Dv=128, dropout_p=0.25, dtype=dtype_served(target))
    q = torch.zeros(2, 3, 300, 32, dtype=case.dtype, device=target.device)
    v = torch.eye(128, dtype=case.dtype, device=target.device).expand(2, 3, 128, 128)
    k = v[..., :32]
    skip_unless_served(target, q, k, v, None, False, 0.25)
    torch.manual_seed(case.seed)
    O = flash_attention(q, k, v, dropout_p=0.25, backend=target.backend)
    Z = case.dropout(target.device).tile(slice(0, 300), slice(0, 128), torch.float64)
    torch.testing.assert_close(O.double() * 128, Z, rtol=2e-3, atol=0)


@CAUSAL
def check_unbiased(target, causal):
    """The mean over many masks approaches attention without dropout, to 5 standard errors in every element; so does the gradient's."""
    p, B, rounds = 0.3, 64, 12
    case = Case(B=1, H=2, Nq=20, Nk=40, D=16, causal=causal, dtype=dtype_served(target))
    problem = Problem.of(case, target)
    q, k, v, dO = (x.expand(B, -1, -1, -1) for x in (problem.q, problem.k, problem.v, problem.dO))  # B draws a call
    skip_unless_served(target, q, k, v, None, causal, p)
    torch.manual_seed(3)
    results = [flash(replace(case, dropout_p=p), target, q, k, v, None, dO) for _ in range(rounds)]
    without = flash(case, target, problem.q, problem.k, problem.v, None, problem.dO)
    for name in ("O", "dQ", "dK", "dV"):
        draws = torch.cat([getattr(result, name) for result in results]).double()
        error = (draws.mean(0) - getattr(without, name)[0].double()).abs()
        standard_error = draws.std(0) / math.sqrt(len(draws))
        worst = (error / (standard_error + 1e-4)).max()
        assert worst < 5, f"the mean of {name} over {len(draws)} masks is {worst:.1f} standard errors off"
        assert draws.std(0).max() > 0.01, f"{name} does not vary: nothing is dropped"


@pytest.mark.parametrize("reentrant", (False, True))
def check_checkpoint(target, reentrant):
    """torch.utils.checkpoint runs the forward twice; both times it must drop the same."""
    case = Case(Nq=70, Nk=103, D=32, dropout_p=0.4, dtype=dtype_served(target))
    problem = Problem.of(case, target)
    q, k, v = (x.clone().requires_grad_() for x in (problem.q, problem.k, problem.v))
    torch.manual_seed(case.seed)
    options = {"dropout_p": 0.4, "return_lse": True, "backend": target.backend}
    O, LSE = checkpoint(lambda q, k, v: flash_attention(q, k, v, **options), q, k, v, use_reentrant=reentrant)
    torch.rand(5, device=target.device)  # random numbers drawn in between must not matter
    torch.autograd.backward((O, LSE), (problem.dO, problem.dLSE))
    report = Report(f"{target}: checkpoint, {case}")
    report.expect("checkpoint", type(problem.truth)(O, LSE, q.grad, k.grad, v.grad), problem)
    report.verdict()


if __name__ == "__main__":
    run_alone(__file__)

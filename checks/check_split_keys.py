"""The split_keys rung, emulated: any number of splits, packed heads, lengths and pages that only the device knows.

    python checks/check_split_keys.py

The number of splits follows from the sizes and the number of multiprocessors, so the emulated device gets from 1 to 264 of them.
"""

import pytest
import torch
from harness import Case, Problem, Report, Result, Target, run_alone

from flash_attention import flash_attention
from flash_attention.backends import BACKENDS, cuda, emulated, split_keys
from flash_attention.call import Call, Form, Settings
from flash_attention.reference import normal_attention
from flash_attention.reference.tiles import LOG2_E

RUNG = BACKENDS["emulated:split_keys"]
TARGET = Target("emulated:split_keys", "cpu")

if (reason := RUNG._why_no_kernels(0)) and __name__ != "__main__":
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(autouse=True)
def as_before():
    yield
    emulated.options.seed, emulated.SM_COUNT = 0, 2


def forward(problem: Problem) -> Result:
    """The forward; its gradients, which another rung computes, are taken as correct."""
    torch.manual_seed(problem.case.seed)
    options = {"causal": problem.case.causal, "scale": problem.case.scale, "dropout_p": problem.case.dropout_p, "backend": TARGET.backend}
    O, LSE = flash_attention(problem.q, problem.k, problem.v, problem.mask, return_lse=True, **options)
    return problem.truth._replace(O=O, LSE=LSE)


def expect(case: Case, multiprocessors: int) -> None:
    emulated.SM_COUNT = multiprocessors
    problem = Problem.of(case, TARGET)
    report = Report(f"{case}, {multiprocessors} multiprocessors")
    report.expect("split_keys", forward(problem), problem)
    report.verdict()


# Packed rows just below and above a tile of 16 or 32; keys just below and above a warp's step of 32 and four warps' 128.
SIZES = [
    *[(1, 1, 1), (1, 4, 127), (1, 4, 129), (4, 4, 257), (5, 4, 31), (3, 8, 640), (16, 1, 1000), (17, 1, 96), (33, 2, 300), (40, 4, 33)],
    *[(1, 16, 2000), (7, 7, 513)],
]


@pytest.mark.parametrize("multiprocessors", (1, 8, 132))
@pytest.mark.parametrize(("Nq", "group", "Nk"), SIZES)
def check_splits(Nq, group, Nk, multiprocessors):
    expect(Case(B=1, H=2 * group, Hkv=2, Nq=Nq, Nk=Nk, D=64, dtype=torch.float16, causal=Nq % 2 == 0), multiprocessors)


@pytest.mark.parametrize("multiprocessors", (1, 132))
@pytest.mark.parametrize(
    ("Nq", "Nk", "causal", "mask"),
    [
        (5, 400, False, "full"),
        (9, 300, True, "left padding"),
        (3, 500, True, "sparse"),
        (40, 70, True, "dead rows"),
        (2, 300, False, "nothing"),
    ],
)
def check_masks_and_dropout(Nq, Nk, causal, mask, multiprocessors):
    expect(Case(B=2, H=6, Hkv=2, Nq=Nq, Nk=Nk, D=64, dtype=torch.float16, causal=causal, mask=mask, dropout_p=0.25), multiprocessors)


@pytest.mark.parametrize("D", (32, 72, 128, 192, 256))
def check_head_sizes(D):
    expect(Case(B=1, H=4, Hkv=1, Nq=5, Nk=300, D=D, Dv=D - 8, dtype=torch.bfloat16, causal=True), 132)


def check_scores_that_grow_and_ends():
    """Maxima that differ between warps and splits by hundreds; queries that see nothing; no keys at all."""
    expect(Case(B=1, H=4, Hkv=1, Nq=3, Nk=700, D=64, dtype=torch.float16, sharp=20.0), 132)
    expect(Case(B=1, H=2, Hkv=1, Nq=40, Nk=7, D=64, dtype=torch.float16, causal=True), 132)
    q, k = torch.randn(1, 2, 3, 64, dtype=torch.float16), torch.randn(1, 1, 0, 64, dtype=torch.float16)
    O, LSE = flash_attention(q, k, k, scale=0.125, return_lse=True, backend=TARGET.backend)
    assert not O.any() and LSE.isneginf().all()


def check_scores_of_minus_infinity():
    """If nothing is hidden, a split whose scores are all −∞ has weight 0; if all splits are such, O is NaN, as in other kernels."""
    emulated.SM_COUNT = 132
    q, k, v = torch.ones(1, 1, 1, 64), torch.randn(1, 1, 400, 64), torch.randn(1, 1, 400, 64)
    k[:, :, :256, 0] = -torch.inf
    O = flash_attention(q.half(), k.half(), v.half(), scale=0.125, backend=TARGET.backend)
    want = normal_attention(q.double(), k.half()[:, :, 256:].double(), v.half()[:, :, 256:].double())
    torch.testing.assert_close(O.double(), want, rtol=0, atol=1e-3)
    k[:, :, :, 0] = -torch.inf
    assert flash_attention(q.half(), k.half(), v.half(), scale=0.125, backend=TARGET.backend).isnan().all()


def check_bits_do_not_depend_on_order():
    problem = Problem.of(Case(B=2, H=8, Hkv=2, Nq=3, Nk=900, D=64, dtype=torch.float16, causal=True), TARGET)
    emulated.SM_COUNT = 16
    results = []
    for seed in range(5):
        emulated.options.seed = seed
        results.append(forward(problem))
    for again in results[1:]:
        assert torch.equal(results[0].O, again.O) and torch.equal(results[0].LSE, again.LSE)


@pytest.mark.parametrize("multiprocessors", (1, 132))
@pytest.mark.parametrize("page_size", (None, 16, 48, 256))
@pytest.mark.parametrize("starts", (None, [0, 100, 0, 3, 300]))
@pytest.mark.parametrize("causal", (False, True))
def check_lengths_on_the_device(causal, starts, page_size, multiprocessors):
    """Sequences of 0 … 500 keys; memory that holds no key, and unused pages, are NaN; page numbers that no key needs lie outside the
    pool."""
    on_the_device([500, 129, 0, 2, 300], 512, causal, starts, page_size, multiprocessors)


def check_long_sequences_in_pages():
    """A warp fetches the pages of 16 steps, 2048 keys of a block, at once; here it comes back for more."""
    on_the_device([4500], 4608, True, [70], 48, 1)


@pytest.mark.parametrize("page_size", (None, 48))
def check_scores_of_lengths_on_the_device(page_size):
    """ALiBi counts from each sequence's own last key; the cap is applied before."""
    on_the_device([500, 129, 0, 2, 300], 512, True, [0, 100, 0, 0, 299], page_size, 132, softcap=1.5, alibi=True)


def on_the_device(lengths, N, causal, starts, page_size, multiprocessors, softcap=None, alibi=False):
    emulated.SM_COUNT = multiprocessors
    B, H, Hkv, Nq, D, Dv = len(lengths), 6, 2, 3, 64, 40
    random = torch.Generator().manual_seed(3)
    lengths = torch.tensor(lengths, dtype=torch.int32)
    q = torch.randn(B, H, Nq, D, generator=random).half()
    k, v = (torch.randn(B, Hkv, N, d, generator=random).half() for d in (D, Dv))
    first = torch.zeros(B, dtype=torch.int32) if starts is None else torch.tensor(starts, dtype=torch.int32)
    j = torch.arange(N)
    there = (j < lengths[:, None]) & (j >= first[:, None])  # (B, N)
    k, v = (x.masked_fill(~there[:, None, :, None], torch.nan) for x in (k, v))
    seen = there[:, None, None].expand(B, 1, Nq, N)
    if causal:
        seen = seen & (j < (lengths[:, None] - torch.arange(Nq - 1, -1, -1))[:, None, :, None])
    zeroed = (x.nan_to_num(0) for x in (k, v))
    want = [x.double() for x in (q, *zeroed)]
    slopes = bias = None
    if alibi:
        slopes = torch.rand(B, H, generator=random) / 4
        distance = (lengths[:, None, None] - torch.arange(Nq, 0, -1)[:, None] - j).abs()  # (B, Nq, N)
        bias = -slopes[:, :, None, None].double() * distance[:, None]
    truth, LSE_truth = normal_attention(*want, seen, softcap=softcap, bias=bias, return_lse=True)
    naive = normal_attention(q, k.nan_to_num(0), v.nan_to_num(0), seen, softcap=softcap, bias=bias)
    table = None
    if page_size is not None:
        columns = -(-N // page_size)
        pages = B * columns + 3
        table = torch.randperm(pages, generator=random)[: B * columns].view(B, columns).int()
        pools = []
        for x in (k, v):
            pool = torch.full((pages, Hkv, page_size, x.shape[3]), torch.nan).half()
            padded = torch.nn.functional.pad(x, (0, 0, 0, columns * page_size - N), value=torch.nan)
            pool[table.long()] = padded.unflatten(2, (columns, page_size)).transpose(1, 2)
            pools.append(pool)
        k, v = pools
        table[torch.arange(columns) * page_size >= lengths[:, None]] = 1 << 20
    plan = split_keys.Plan.of(RUNG, q, k, v, table is not None, N, causal, D**-0.5, softcap, slopes)
    assert plan.why_not(k, v) is None
    O, LSE = plan(q, k, v, lengths, None if starts is None else first, table, alibi=slopes)
    error, allowed = (O - truth).abs().max(), 2 * (naive - truth).abs().max() + 1e-3
    assert error <= allowed, f"error {error:.1e}, allowed {allowed:.1e}"
    assert torch.equal(LSE.isneginf(), LSE_truth.isneginf())
    exact = 1e-6 if softcap is None else 1e-3  # a tanh has 11 bits
    torch.testing.assert_close(LSE.double(), LSE_truth, rtol=exact, atol=exact)


def check_splits_follow_from_sizes():
    """One query against 8192 keys spreads over all multiprocessors; 64 sequences need no split; the workspace says which."""
    x = torch.empty(1, dtype=torch.float16)

    def splits(B: int, H: int, Hkv: int, Nq: int, Nk: int, multiprocessors: int) -> int:
        emulated.SM_COUNT = multiprocessors
        q, k = x.expand(B, H, Nq, 64), x.expand(B, Hkv, Nk, 64)
        rows = -(-Nq * H // Hkv // 16) * 16  # up to 16 packed rows a tile of 16, else tiles of 32
        rows = rows if rows == 16 else -(-rows // 32) * 32
        call = Call.of(q, k, k, None, None, Settings(LOG2_E))
        return RUNG.launch(cuda.FORWARD, call, tuple(map(Form.of, (q, k, k, q))), LOG2_E).workspace_floats(False) // (B * Hkv * rows * 66)

    assert splits(1, 32, 8, 1, 8192, 132) * 8 >= 0.9 * 2 * 132
    assert splits(64, 32, 8, 1, 4096, 132) <= 2
    assert splits(1, 32, 8, 1, 64, 132) == 0  # no split: O is written directly


if __name__ == "__main__":
    run_alone(__file__)

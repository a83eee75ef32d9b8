"""Every rung on the emulator, against naive attention in float64: how CI checks the kernels without a GPU.

Sizes are small, and chosen so that tiles are cut on every side and every ring in shared memory wraps. Each case has its own seed, and so
its own order of threads, copies and products. Each case compiles kernels, a second for each: those that add least run only with --full.
One file because it is one list of cases.
"""

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from harness import FORWARD_ALONE, Case, Problem, Report, Target, against_truth, call_of, run_alone

from flash_attention import flash_attention
from flash_attention.backends import BACKENDS, cuda, emulated, rung
from flash_attention.call import Call, Form, Settings
from flash_attention.reference import Visible

if reason := BACKENDS["emulated:simple"]._why_no_kernels(0):
    pytest.skip(reason, allow_module_level=True)

SERVE_EVERYTHING = ("simple", "tensor_core", "split_keys", "hopper", "hopper_float32", "tensor_core_float32")
RUNGS = ("mma", *SERVE_EVERYTHING, *FORWARD_ALONE)
HALF = dict.fromkeys(RUNGS, torch.float16) | dict.fromkeys(("simple", "hopper_float32", "tensor_core_float32"), torch.float32)
PLAIN_HALF = HALF | {"hopper": torch.bfloat16}  # hopper's forward has a softmax of its own for bfloat16, but not under dropout
only_full = partial(pytest.param, marks=pytest.mark.only_full)
PLAIN = [  # lengths, causal; D 64
    (65, 130, False),
    (130, 65, True),  # rows that see nothing
    (1, 300, False),
    (257, 1, True),
    (300, 460, True),
]
EVERYTHING = [  # lengths, causal, mask; dropout, grouped heads
    (130, 203, False, "full"),
    (203, 130, True, "left padding"),
    only_full(70, 150, False, "key, no batch"),
    only_full(150, 70, False, "dead rows"),
]
INTERVALS = [  # lengths, causal, window, spans, mask; grouped heads, dropout with the mask
    (300, 460, False, (70, 30), None, None),
    only_full(203, 130, True, (40, None), None, None),
    (130, 203, False, None, "documents", None),
    (150, 150, True, (64, None), "any", "full"),
    (70, 1150, False, (30, 0), None, None),  # hopper's blocks have tiles of keys that no row sees after one that some rows see
    only_full(150, 203, False, None, "any, transposed", None),
]


def target(name: str) -> Target:
    return Target(f"emulated:{name}", "cpu")


@pytest.fixture(autouse=True)
def another_seed(request):
    """Every case has its own random order."""
    emulated.options.seed = sum(map(ord, request.node.name))
    yield
    emulated.options.seed = 0


@pytest.mark.parametrize(("Nq", "Nk", "causal"), PLAIN)
@pytest.mark.parametrize("name", RUNGS)
def check_plain(name, Nq, Nk, causal):
    against_truth(Case(B=1, H=2, Nq=Nq, Nk=Nk, D=64, dtype=PLAIN_HALF[name], causal=causal), target(name))


@pytest.mark.parametrize(("Nq", "Nk", "causal", "mask"), EVERYTHING)
@pytest.mark.parametrize("name", SERVE_EVERYTHING)
def check_mask_dropout_and_grouped_heads(name, Nq, Nk, causal, mask):
    case = Case(B=2, H=4, Hkv=2, Nq=Nq, Nk=Nk, D=64, dtype=HALF[name], causal=causal, mask=mask, dropout_p=0.25)
    against_truth(case, target(name))


@pytest.mark.parametrize(("Nq", "Nk", "causal", "window", "spans", "mask"), INTERVALS)
@pytest.mark.parametrize("name", ("simple", "tensor_core", "hopper"))
def check_intervals(name, Nq, Nk, causal, window, spans, mask):
    case = Case(B=2, H=2, Hkv=1, Nq=Nq, Nk=Nk, D=64, dtype=PLAIN_HALF[name], causal=causal, window=window, spans=spans, mask=mask)
    against_truth(replace(case, dropout_p=0.25 if mask else 0.0), target(name))


def check_many_short_documents():
    """hopper's backward leaves tiles of keys in their own order where all of them are short beside what the kernel after it does."""
    against_truth(Case(B=8, H=12, Nq=70, Nk=70, D=64, dtype=torch.float16, spans="causal documents"), target("hopper"))


COMES_BACK = [  # rung, head size, what leaves rows that attend nothing
    ("tensor_core", 64, {"mask": "dead rows"}),
    only_full("tensor_core", 128, {"spans": "some blind"}),
    only_full("tensor_core", 64, {"causal": True}),
    ("hopper", 64, {"causal": True}),
    only_full("hopper", 64, {"mask": "dead rows", "dropout_p": 0.25}),
    ("hopper", 128, {"spans": "some blind"}),
    ("hopper", 72, {"spans": "some blind", "Dv": 120}),
    only_full("tensor_core", 40, {"mask": "dead rows", "Dv": 64}),
    only_full("hopper", 128, {"window": (30, 0)}),
    ("hopper", 192, {"mask": "dead rows"}),
    only_full("hopper", 256, {"mask": "dead rows"}),
]


@pytest.mark.parametrize(("name", "D", "hiding"), COMES_BACK)
def check_what_comes_back_to_dead_rows(name, D, hiding):
    """NaN in the gradients of rows that attend nothing is dropped by the kernels themselves."""
    case = Case(B=1, H=2, Hkv=1, Nq=150, Nk=90, D=D, dtype=torch.float16, **hiding)
    against_truth(case, target(name), bad=float("nan"))


@pytest.mark.parametrize("name", ("simple", "tensor_core", "hopper"))
def check_parts_of_a_whole(name):
    """Offsets: rows and columns that are part of a larger call see, and drop, the same elements as there."""
    q, k, v = (x.to(HALF[name]) for x in torch.randn(3, 1, 2, 192, 64).unbind())
    seed, settings = torch.tensor(5), Settings(0.125, 0.3, 90, 20)
    part = q[:, :, 64:], k[:, :, 128:], v[:, :, 128:], None, None, seed
    place = settings._replace(q_offset=64, k_offset=128, diagonal=0)
    got = torch.ops.flash_attention.forward(*part, *place._replace(backend=f"emulated:{name}"))
    want = torch.ops.flash_attention.forward(*(x.float() for x in part[:3]), *part[3:], *place._replace(backend="reference"))
    seen = Visible(192, 192, 90, 20).dense(slice(64, 192), slice(128, 192))[0, 0]
    assert torch.equal(got[1].isneginf()[0, 0], ~seen.any(1))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.float(), y, atol=4e-3, rtol=0)


def check_mma_refuses_intervals():
    x = torch.randn(1, 1, 8, 64, dtype=torch.float16)
    with pytest.raises(NotImplementedError, match=r"no windows or spans, got \(3, None\)"):
        flash_attention(x, x, x, window=(3, None), backend="emulated:mma")


@pytest.mark.parametrize("name", RUNGS)
def check_other_head_sizes(full, name):
    """D 72 and Dv 40 in kernels for 96 or 128; the largest that the rung has, up to 256 (of a step of the ladder, by --full alone)."""
    rung = BACKENDS[f"emulated:{name}"]
    dtype = torch.bfloat16 if "bfloat16" in rung.dtypes else torch.float32
    against_truth(Case(B=1, H=1, Nq=100, Nk=150, D=72, Dv=40, dtype=dtype), target(name))
    if full or name in SERVE_EVERYTHING:
        against_truth(Case(B=1, H=1, Nq=70, Nk=90, D=min(rung.head_dims[-1], 256), dtype=dtype, causal=True), target(name))


# Each size of hopper's between 64, 128 and 256, and hopper_wide's with panels that are not full, in part or not at all; D, Dv.
MORE_SIZES = {
    "hopper": [(72, 72), (96, 88), (112, 112), (160, 160), (192, 192), (192, 128), (184, 40)],
    "hopper_float32": [(320, 512), (256, 136), (256, 256), (136, 512)],
    "hopper_wide": [(512, 512), (384, 264), (296, 320), (512, 72)],
}
ONLY_FULL = {(112, 112), (192, 192), (184, 40), (256, 256), (136, 512), (296, 320), (512, 72)}
MORE = [  # alternately plain and with all features
    (only_full if sizes in ONLY_FULL else pytest.param)(name, *sizes, n % 2)
    for name, each in MORE_SIZES.items()
    for n, sizes in enumerate(each)
]


@pytest.mark.parametrize(("name", "D", "Dv", "kind"), MORE)
def check_sizes_between_and_wide(name, D, Dv, kind):
    """Tiles cut at the end and by the diagonal; with all features of a call."""
    dtypes = (torch.float32,) * 2 if "float32" in name else (torch.bfloat16, torch.float16)
    plain = Case(B=1, H=1, Nq=70, Nk=150, D=D, Dv=Dv, dtype=dtypes[0], causal=True)
    everything = Case(B=1, H=2, Hkv=1, Nq=150, Nk=70, D=D, Dv=Dv, dtype=dtypes[1], mask="dead rows", dropout_p=0.25)
    against_truth((plain, everything)[kind], target(name))


@pytest.mark.parametrize(("D", "Nq", "Nk", "causal"), [(72, 300, 230, False), (96, 200, 300, True)])
def check_tall_tiles(monkeypatch, D, Nq, Nk, causal):
    """Forwards of 72 to 96 columns by tiles of 192 rows and 96 keys, which calls of many rows take."""
    monkeypatch.setattr(rung, "worth_tall", lambda call: True)
    with emulated.counting() as counts:
        against_truth(Case(B=1, H=2, Hkv=1, Nq=Nq, Nk=Nk, D=D, dtype=torch.bfloat16, causal=causal), target("hopper"))
    assert [each.file for each in counts] == ["forward_4_hopper_tall.cu", "backward_4_hopper.cu"]


@pytest.mark.parametrize(
    ("B", "H", "N", "D", "causal", "tall"),
    [
        (4, 16, 4096, 72, False, True),  # 1.28 times as fast as tiles of 128 rows, measured
        (4, 16, 4096, 72, True, True),  # 1.11
        (1, 8, 2048, 88, True, False),  # 0.74
        (4, 16, 4096, 80, False, True),  # 1.09
        (4, 16, 4096, 80, True, False),  # 0.95
        (4, 16, 2048, 96, False, False),  # 0.92
        (2, 12, 3000, 96, False, True),  # 1.17
        (4, 16, 4096, 64, False, False),  # there are none
        (4, 16, 4096, 112, False, False),
    ],
)
def check_choice_of_tall_tiles(B, H, N, D, causal, tall):
    """Tiles of 192 rows are taken where they were faster on an H200."""
    x = Form(torch.Size((B, H, N, D)), (H * N * D, N * D, D, 1), torch.bfloat16, torch.device("cpu"))
    call = Call(x, x, x, None, None, Settings(1.0, right=0 if causal else None))
    wanted = BACKENDS["hopper"].specialisation(cuda.FORWARD, "90a", *BACKENDS["hopper"].kind(cuda.FORWARD, call))
    assert wanted.file == ("forward_4_hopper_tall.cu" if tall else "forward_4_hopper.cu")


@pytest.mark.parametrize(
    ("D", "Dv", "options"),
    [
        (192, 192, {"mask": "full", "Hkv": 1}),
        only_full(160, 160, {"window": (70, 30)}),
        (192, 128, {"spans": "documents", "mask": "left padding"}),
        (256, 256, {"window": (70, 30), "mask": "full"}),
    ],
)
def check_wide_heads_without_dropout(D, Dv, options):
    """Up to 192 columns the backward has another kernel, unless there is dropout, or a mask over intervals; so do plain calls above."""
    against_truth(Case(B=1, H=2, Nq=200, Nk=150, D=D, Dv=Dv, dtype=torch.bfloat16, **options), target("hopper"))


def same_in_any_order(case: Case, where: Target, orders: int) -> None:
    """Asserts that a case's results, with gradients in deterministic mode, have the same bits in several orders of threads and blocks."""
    problem, results = Problem.of(case, where), []
    torch.use_deterministic_algorithms(True)
    try:
        for seed in range(orders):
            emulated.options.seed, emulated.options.resident = seed, 1 + seed
            results.append(problem.answer(where))
    finally:
        torch.use_deterministic_algorithms(False)
        emulated.options.resident = 2
    for other in results[1:]:
        for first, again in zip(results[0], other, strict=True):
            assert first is again is None or torch.equal(first, again)


@pytest.mark.parametrize(
    ("D", "options"), [(160, {"causal": True}), only_full(192, {}), (256, {"causal": True}), (256, {"causal": True, "mask": "heads share"})]
)
def check_wide_heads_do_not_depend_on_order(D, options):
    """A deterministic backward above 128 columns gives the same bits in whatever order threads run."""
    case = Case(B=1, H=1, Nq=200, Nk=300, D=D, dtype=torch.float16, **options)
    same_in_any_order(case, target("hopper"), orders=3)


# Three, four and five tiles of keys: the last four, two and two heads of six.
@pytest.mark.parametrize(("D", "SMs", "dropout_p"), [(128, 6, 0), only_full(192, 6, 0), (256, 8, 0.25)])
def check_last_heads_start_together(D, SMs, dropout_p, monkeypatch):
    """A causal backward above D 64 assigns the last heads' tiles to blocks in another order: every tile of every head still has a block."""
    monkeypatch.setattr(emulated, "SM_COUNT", SMs)
    case = Case(B=2, H=3, Nq=130, Nk=300, D=D, dtype=torch.float16, causal=True, dropout_p=dropout_p)
    against_truth(case, target("hopper"))


# Key tiles: 18 of a head, in two parts, as two multiprocessors get at most 16 at a time; 3 of each of six heads, in two parts; causal, with
# rows that see nothing, and with more keys than rows.
@pytest.mark.parametrize(
    ("H", "Hkv", "Nq", "Nk", "causal"),
    [(2, 1, 70, 1150, False), only_full(6, 6, 70, 150, False), (2, 2, 300, 130, True), only_full(2, 1, 200, 1200, True)],
)
@pytest.mark.parametrize(("name", "D"), [("hopper", 256), ("hopper_wide", 320)])
def check_pieces_of_dS(name, D, H, Hkv, Nq, Nk, causal):
    """Where dS goes to memory, it does so for some keys at a time: dQ is the sum over all pieces, and all gradients repeat bit for bit."""
    case = Case(B=1, H=H, Hkv=Hkv, Nq=Nq, Nk=Nk, D=D, dtype=torch.bfloat16, causal=causal)
    problem, answer = against_truth(case, target(name))
    emulated.options.seed += 1
    for first, again in zip(answer, problem.answer(target(name)), strict=True):
        assert torch.equal(first, again)


@pytest.mark.parametrize(("name", "D"), [("hopper", 256), ("hopper_wide", 512)])
@pytest.mark.parametrize(("B", "H", "N"), [(1, 2, 16384), (16, 16, 1024), (2, 8, 8192), (1, 1, 65536), (4, 32, 128)])
@pytest.mark.parametrize("causal", (False, True))
def check_memory_of_dS(name, D, B, H, N, causal):
    """On 132 multiprocessors dS takes at most 2 MB for each, and where one tile of 64 keys has more queries than that, so much for each."""
    x = Form(torch.Size((B, H, N, D)), (H * N * D, N * D, D, 1), torch.bfloat16, torch.device("cpu"))
    call = Call(x, x, x, None, None, Settings(1.0, right=0 if causal else None, backend=f"emulated:{name}"), x, x)
    launch = BACKENDS[f"emulated:{name}"].plan(cuda.BACKWARD, call).launch._replace(sm_count=132)
    rows, floats = 2 * B * H * N, launch.workspace_floats(False)
    of_dS = 132 * max(2 << 20, N * 64 * 2) / 4
    assert rows < floats <= rows + of_dS + N * D


def check_last_tiles_come_one_by_one(monkeypatch):
    """A causal forward whose pairs of tiles do not fill a round: the tiles of its last rounds, here those in the middle of the first head
    and all of the others, are assigned one by one, and each once."""
    monkeypatch.setattr(emulated, "SM_COUNT", 4)  # nine tiles, so five units a head: of fifteen, one round in units, then 23 tiles
    case = Case(B=1, H=3, Hkv=1, Nq=1030, Nk=515, D=80, dtype=torch.bfloat16, causal=True)
    problem = Problem.of(case, target("hopper"))
    O, LSE = flash_attention(problem.q, problem.k, problem.v, causal=True, return_lse=True, backend="emulated:hopper")
    report = Report(f"single tiles: {case}")
    for name, got in (("O", O), ("LSE", LSE)):
        report.compare("emulated", name, got, getattr(problem.truth, name), 2e-2)
    report.verdict()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name, D", (("hopper", 64), ("hopper", 128), ("hopper_wide", 320)))
def check_maxima_that_rise_late(name, D, dtype):
    """Scores grow from the first tile of keys visited to the last, in some rows too little to raise m, in others enough, once or in each
    tile. A raise in one row must not change any bit of another row. So too where a bias or slopes change scores, in `hopper`."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 400, D).unbind()
    q, k = q[:, :, :200].abs(), torch.linspace(1, 0, 400)[:, None] * torch.rand(1, 1, 400, D)
    bias, slopes = torch.randn(1, 1, 200, 400, dtype=dtype), torch.tensor([0.02])
    distance = (torch.arange(200)[:, None] + 200 - torch.arange(400)).abs()
    kinds = [({}, 0), ({"bias": bias}, bias.double()), ({"alibi": slopes}, -0.02 * distance)]
    for growth, (scored, added) in product((0.5, 2.0, 20.0, 200.0), kinds if name == "hopper" else kinds[:1]):
        inputs = [x.to(dtype) for x in (growth * q, k, v)]
        O, LSE = flash_attention(*inputs, **scored, return_lse=True, backend=f"emulated:{name}")
        Q, K, V = (x.double() for x in inputs)
        S = Q @ K.mT / D**0.5 + added
        report = Report(f"scores that grow, {name}, D {D}, {dtype}, by {growth}, {[*scored]}")
        report.compare("emulated", "O", O, S.softmax(-1) @ V, 2e-2)
        report.compare("emulated", "LSE", LSE, S.logsumexp(-1), 1e-4 if growth < 200 else 1e-3)  # scores of 5000
        report.verdict()
        inputs[0][:, :, 1::2] *= 0 if growth >= 20 else 20
        assert torch.equal(flash_attention(*inputs, **scored, backend=f"emulated:{name}")[:, :, ::2], O[:, :, ::2])


@pytest.mark.parametrize("kind", range(2))
def check_wide_rings_wrap(kind):
    """More tiles than shared memory holds, more work items than blocks; forward and gradients do not depend on any order."""
    case = Case(B=1, H=3, Hkv=1, Nq=(300, 130)[kind], Nk=(130, 300)[kind], D=320, dtype=torch.float16, causal=kind == 1)
    problem, answer = against_truth(case, target("hopper_wide"))
    resident, emulated.options.resident = emulated.options.resident, 1
    emulated.options.seed += 1
    try:
        repeated = problem.answer(target("hopper_wide"))
    finally:
        emulated.options.resident = resident
    for first, again in zip(answer, repeated, strict=True):
        assert torch.equal(first, again), "all gradients of hopper_wide repeat bit for bit, in any mode"


@pytest.mark.parametrize("name", (*RUNGS, "hopper_wide"))
def check_strides(name):
    """(B, N, H, D) transposed and a stride-0 batch are read as they are."""
    dtype = HALF.get(name, torch.float16)
    q = torch.randn(2, 70, 2, 64, dtype=dtype).transpose(1, 2)
    k, v = torch.randn(2, 1, 2, 90, 64, dtype=dtype).expand(2, 2, 2, 90, 64)
    O = flash_attention(q, k, v, backend=f"emulated:{name}")
    assert O.stride() == q.stride()
    assert torch.equal(O, flash_attention(q.contiguous(), k.contiguous(), v.contiguous(), backend=f"emulated:{name}"))


@pytest.mark.parametrize("name", RUNGS)
def check_forward_does_not_depend_on_order(name):
    """Whatever the order of threads, copies and products: the forward's bits are the same, and so are a deterministic backward's."""
    same_in_any_order(Case(B=1, H=2, Nq=150, Nk=300, D=64, dtype=HALF[name], causal=True), target(name), orders=4)


@pytest.mark.parametrize("name", (*SERVE_EVERYTHING, "hopper_wide"))
def check_dropout_is_the_reference_s(name):
    """With V = identity, O shows P: it drops the same elements as the reference."""
    Nq, Nk, p = 70, 64, 0.3
    q, k = torch.randn(2, 1, 2, 100, 64, dtype=HALF.get(name, torch.float16)).unbind()
    q, k = q[:, :, :Nq], k[:, :, :Nk]
    v = torch.eye(Nk, dtype=q.dtype).expand(1, 2, Nk, Nk)
    torch.manual_seed(5)
    P = flash_attention(q, k, v, dropout_p=p, backend=f"emulated:{name}")
    torch.manual_seed(5)
    want = flash_attention(q.float(), k.float(), v.float(), dropout_p=p, backend="reference")
    assert torch.equal(P == 0, want == 0)


LISTED = [  # D, mask, causal, lengths
    (64, "structured", True, (400, 300)),  # rows that see nothing
    (128, "band", True, (300, 400)),
    only_full(64, "band", False, (500, 150)),  # tiles of Q that see nothing
    only_full(192, "structured", False, (200, 230)),
]


@pytest.mark.parametrize(("D", "mask", "causal", "lengths"), LISTED)
def check_tiles_that_a_mask_hides(D, mask, causal, lengths):
    """hopper multiplies exactly the tiles in which something may be attended, and the result is correct. Grouped heads."""
    Nq, Nk = lengths
    case = Case(B=1, H=4, Hkv=2, Nq=Nq, Nk=Nk, D=D, dtype=torch.float16, causal=causal, mask=mask)
    problem = Problem.of(case, target("hopper"))
    with emulated.counting() as counts:
        got = problem.answer(target("hopper"))
    report = Report(f"hopper, {case}")
    report.expect("emulated", got, problem)
    report.verdict()
    mask = problem.mask.expand(1, 4, Nq, Nk)
    below = torch.ones_like(mask).tril(Nk - Nq) if causal else torch.ones_like(mask)
    block_q, block_k = (192 if D == 64 else 128), (128 if D <= 128 else 64)
    forward, backward = (next(each for each in counts if each.file.startswith(which)) for which in ("forward_4", "backward_4"))
    visits, of_tile = int((tiles_of(mask, block_q, block_k) & tiles_of(below, block_q, block_k)).sum()), 2 * block_q * block_k * D
    beyond = emulated.SM_COUNT if D <= 128 else 0  # a block issues one more product, whose result is ignored, while its last O is stored
    assert forward.total["FLOP by wgmma"] == of_tile * (2 * visits + beyond), f"{visits} tiles may be attended"
    block_q, block_k = (128 if D == 64 else 64), (128 if D <= 128 else 96 if D <= 192 else 64)
    visits, of_tile = int((tiles_of(mask, block_q, block_k) & tiles_of(below, block_q, block_k)).sum()), 2 * block_q * block_k * D
    assert backward.total["FLOP by wgmma"] == of_tile * 5 * visits, f"{visits} tiles may be attended"


def tiles_of(seen: torch.Tensor, block_q: int, block_k: int) -> torch.Tensor:
    """Which tiles contain a True. seen: bool (B, H, Nq, Nk)."""
    Nq, Nk = seen.shape[2:]
    padded = torch.nn.functional.pad(seen, (0, -Nk % block_k, 0, -Nq % block_q))
    return padded.unflatten(3, (-1, block_k)).any(4).unflatten(2, (-1, block_q)).any(3)


def check_by_name_only_and_on_the_cpu():
    """None and "cuda" never choose the emulator; tensors on other devices are refused."""
    x = torch.randn(1, 1, 8, 64)
    assert flash_attention(x, x, x).isfinite().all()
    on_meta = x.to("meta")
    assert "on the CPU, got meta" in BACKENDS["emulated:simple"].why_not(call_of(on_meta, on_meta, on_meta))
    with pytest.raises(NotImplementedError, match=r"computes in float16, bfloat16, got torch.float32"):
        flash_attention(x, x, x, backend="emulated:hopper")


if __name__ == "__main__":
    run_alone(__file__)

"""float32 where float32 is hard: rows, columns and single elements of very different size, scores far apart, numbers near its ends.

A rung that multiplies 16-bit numbers may not be less accurate than PyTorch's own float32 attention on the same inputs, against float64:
O, dQ, dK and dV, each measured by its head's largest entry; and what it leaves to another rung is what those numbers cannot hold, no more.
"""

import functools
import shutil

import pytest
import torch
from harness import Case, Problem, Target, call_of, run_alone
from mutations import SMALL_PARTS, replaced
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.float32_planes import inputs
from flash_attention import build, flash_attention
from flash_attention.backends import BACKENDS, choose, cuda, emulated, libraries
from flash_attention.call import Call, Form, Settings

PLANES = "hopper_float32"
BOTH = (PLANES, "tensor_core_float32")
ALMOST = 1.25  # times PyTorch's error: the largest of many rounding errors is a matter of luck, too
SHARP = 128  # from this score on, one rounding of a score or of LSE to float32 is what changes P = exp(S − LSE) most: 2⁻²³ of the score
# Of the largest entry, below what design rules allow float32 (1e-6 forward, 2e-6 backward): luck again. The second adds dK and dV up
# 16 rows at a time, the first 128; each addition is rounded.
FLOOR = {"hopper_float32": 7e-7, "tensor_core_float32": 9e-7}
N, D = 130, 64
TARGETS = [target for name in BOTH for target in (Target(f"emulated:{name}", "cpu"), Target(name, "cuda"))]
# What computes the forward and the backward: tensor cores ("planes"), the rung they fall back on ("simple"), or of several heads both.
SERVED_BY = {
    "rows of all × 1e-2 … 1e2": ("simple", "simple"),
    "columns of q × …, k / …": ("simple", "simple"),
    "an element of all × 1e3": ("planes, simple", "planes, simple"),  # it is in one head
    "all × 1e-30": ("simple", "simple"),
    "q × 1e-38, k × 1e38": ("simple", "simple"),
    "v × 1e36, dO × 1e-36": ("planes", "planes, simple"),
}


@functools.cache
def drawn() -> dict[str, list[torch.Tensor]]:
    return inputs(N, D)


def gradients(attention, q, k, v, dO) -> list[torch.Tensor]:
    """→ O, dQ, dK, dV of (1, H, N, D) inputs."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    O = attention(q, k, v)
    return [O.detach(), *torch.autograd.grad(O, (q, k, v), dO)]


def subnormal_floor(truth) -> list[float]:
    """Of each tensor: N roundings to a multiple of 2⁻¹⁴⁹, as a fraction of its largest entry. It counts where float32 ends (q × 1e-38)."""
    return [N * 2**-150 / x.abs().max().item() for x in truth]


def errors(found, truth) -> list[float]:
    """Of each tensor the largest error, as a fraction of its head's largest entry."""
    worst = []
    for got, want in zip(found, truth, strict=True):
        size = want.abs().amax((2, 3), keepdim=True)
        worst.append(((got.double() - want).abs() / torch.where(size > 0, size, 1)).max().item())
    return worst


def served_by(counts: list[emulated.Counts]) -> tuple[str, ...]:
    """Which kernels computed each launch."""
    return tuple(
        ", ".join(
            ["planes"] * any(map(each.total.get, ("FLOP by wgmma", "FLOP by mma.sync")))
            + ["simple"] * any("simple" in place for place in each.shared)
        )
        for each in counts
    )


def against_torch(where: Target, call: list[torch.Tensor]) -> None:
    """Asserts that the backend is not less accurate than PyTorch, for each of O, dQ, dK and dV."""
    truth = gradients(sdpa, *(x.double() for x in call))
    ours = errors(gradients(lambda *qkv: flash_attention(*qkv, backend=where.backend), *call), truth)
    torch_s = errors(gradients(sdpa, *call), truth)
    largest = (call[0] @ call[1].mT).abs().max().item() * call[0].shape[3] ** -0.5
    floor = max(FLOOR[where.backend.removeprefix("emulated:")], 2**-23 * largest if SHARP < largest < 2**16 else 0)
    table = [f"{part} {a:.1e} (PyTorch's {b:.1e})" for part, a, b in zip(("O", "dQ", "dK", "dV"), ours, torch_s, strict=True)]
    print("", *table, sep="\n  ")
    assert all(a <= max(ALMOST * b, floor, end) for a, b, end in zip(ours, torch_s, subnormal_floor(truth), strict=True)), table


@pytest.mark.parametrize("name", inputs(8, 8))
@pytest.mark.parametrize("where", TARGETS, ids=str)
def check_never_worse_than_torch(where, name):
    if reason := where.why_not():
        pytest.skip(reason)
    call = [x[None].to(where.device) for x in drawn()[name]]
    if reason := BACKENDS[where.backend].why_not(call_of(*call[:3])):
        pytest.skip(reason)
    if where.device == "cuda":
        return against_torch(where, call)
    with emulated.counting() as counts:
        against_torch(where, call)
    assert served_by(counts) == SERVED_BY.get(name, ("planes", "planes"))


@pytest.mark.parametrize("name", ("as drawn", "q × 5", "rows of v, dO × 1e-2 … 1e2"))
def check_wide_heads(name):
    """The same of 256 columns, forward and backward."""
    against_torch(Target(f"emulated:{PLANES}", "cpu"), [x[None, :1] for x in inputs(70, 256)[name]])


@pytest.mark.parametrize("rung", BOTH)
def check_small_rows_of_O(rung):
    """A row that attends only to keys with tiny values: float16 next to large ones loses them, the kernel sees it."""
    q, k, v = torch.randn(3, 1, 1, N, D, generator=torch.Generator().manual_seed(0)).unbind()
    v[:, :, 0] *= 1e-9
    O = flash_attention(q, k, v, causal=True, backend=f"emulated:{rung}")
    assert torch.allclose(O[:, :, 0], v[:, :, 0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("rung", BOTH)
def check_infinities_and_nan(rung):
    """Neither is split: a head with one is computed as float32 has it."""
    q, k, v = torch.randn(3, 1, 2, 40, D, generator=torch.Generator().manual_seed(0)).unbind()
    q[:, 0, 3, 5], v[:, 1, 7, 9] = torch.inf, torch.nan
    O, want = (flash_attention(q, k, v, backend=backend) for backend in (f"emulated:{rung}", "emulated:simple"))
    assert torch.equal(O.isnan(), want.isnan()) and O.isnan().any()
    assert torch.equal(O.nan_to_num(), want.nan_to_num())


def answers(case: Case, rung: str):
    """→ O, LSE, dQ, dK and dV of the case on the emulator, gradients in deterministic mode; heads of V differ in size."""
    where = Target(f"emulated:{rung}", "cpu")
    q, k, v, mask = case.inputs("cpu")
    v[1] *= 1e-8  # each part has a power of two of its own
    v[:, 1] *= 1e-8
    torch.use_deterministic_algorithms(True)
    try:
        return Problem.of(case, where, inputs=(q, k, v, mask)).answer(where)
    finally:
        torch.use_deterministic_algorithms(False)


IN_PARTS = {"D": 64, "H": 4, "Hkv": 2, "mask": "full", "dropout_p": 0.25}


@pytest.mark.parametrize(
    ("rung", "options", "share"),  # of the undivided call's workspace: two parts or more, and what is not divided
    [
        (PLANES, IN_PARTS, 0.5),
        (PLANES, {"D": 256, "H": 2}, 0.5),
        (PLANES, {"D": 256, "Dv": 136, "H": 2}, 0.5),
        ("tensor_core_float32", IN_PARTS, 0.6),
    ],
    ids=("everything", "planes in dV", "planes beside dV", "mma.sync"),
)
def check_heads_in_parts(rung, options, share, tmp_path, monkeypatch):
    """A call whose heads are computed in parts, here as small as can be, has the bits of the undivided one and a part's workspace."""
    case = Case(**{"B": 2, "Nq": 70, "Nk": 70, "dtype": torch.float32, **options})
    call = call_of(*case.inputs("cpu")[:3], causal=case.causal)
    call = call._replace(O=call.q._replace(shape=(*call.q.shape[:3], call.v.shape[3])).contiguous())
    call = call._replace(dO=call.O)

    def workspaces():
        return [BACKENDS[f"emulated:{rung}"].plan(which, call).workspace for which in (cuda.FORWARD, cuda.BACKWARD)]

    whole, whole_floats = answers(case, rung), workspaces()
    sources = tmp_path / "cuda"
    shutil.copytree(build.SOURCES, sources)
    replaced(sources / "parts_of_heads.cuh", SMALL_PARTS)
    monkeypatch.setattr(emulated.options, "sources", sources)
    for first, again in zip(whole, answers(case, rung), strict=True):
        assert first is again is None or torch.equal(first, again)
    for floats, of_whole in zip(workspaces(), whole_floats, strict=True):
        assert floats < share * of_whole


@pytest.mark.parametrize(
    ("H", "N", "at_once"),
    [(4, 16384, 2), (8, 8448, 4), (8, 8512, 8), (4, 4096, 4)],
    ids=("two rounds and two", "whole rounds", "a block more than whole rounds", "small"),
)
def check_parts_that_cost_no_time(H, N, at_once):
    """On 132 multiprocessors: planes of as many heads at once as fit into 128 MB, unless that takes more rounds of blocks. V's planes
    lie in dV."""
    x = Form(torch.Size((1, H, N, 256)), (H * N * 256, N * 256, 256, 1), torch.float32, torch.device("cpu"))
    call = Call(x, x, x, None, None, Settings(1.0, backend=f"emulated:{PLANES}"), x, x)
    launch = BACKENDS[f"emulated:{PLANES}"].plan(cuda.BACKWARD, call).launch
    of_head, of_call = N * (3 * 256 + 2), H * (16 + N)  # planes, LSE and Delta; a Range, and the simple rung's Delta
    assert launch._replace(sm_count=132).workspace_floats(False) == at_once * of_head + of_call


def check_transposed_wide_heads():
    """(B, N, H, D) transposed: heads of several batches are at unequal distances, so that V's planes do not lie in dV."""
    shape = {"B": 2, "H": 2, "Nq": 40, "Nk": 40, "D": 256, "dtype": torch.float32}
    q, k, v = Case(**shape).inputs("cpu")[:3]
    attend = functools.partial(flash_attention, backend=f"emulated:{PLANES}")
    want = gradients(attend, q, k, v, torch.ones_like(q))
    got = gradients(attend, *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)), torch.ones_like(q))
    assert got[3].stride() != want[3].stride()
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize(
    ("capability", "serves"), [((9, 0), PLANES), ((8, 0), "tensor_core_float32"), ((8, 9), "simple"), ((7, 5), "simple")]
)
def check_who_serves(capability, serves, monkeypatch):
    """What a plain call takes on each GPU; a small one takes `simple`."""
    arch = 10 * capability[0] + capability[1]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(libraries, "sm_count", lambda device: 132)
    monkeypatch.setattr(libraries, "why_no_kernels", lambda rung, _: None if rung.runs_on(arch) else "another GPU")
    for length, wanted in ((2048, serves), (128, "simple")):
        x = Form.of(torch.empty(1, 2, 1, 64).expand(1, 2, length, 64))._replace(device=torch.device("cuda", 0))
        x = x._replace(stride=(2 * length * 64, length * 64, 64, 1))
        call = Call(x, x, x, None, None, Settings(1.0))
        assert [choose(None, call, which) for which in (cuda.FORWARD, cuda.BACKWARD)] == [wanted, wanted]


if __name__ == "__main__":
    run_alone(__file__)

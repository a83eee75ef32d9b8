"""float32 after `torch.set_float32_matmul_precision("high")` or `"medium"`: faster, as accurate as TF32 relative to a head's largest entry.

TF32 itself is modelled in PyTorch: each factor of a product is rounded to 11 bits. The setting counts when the forward is called; its
backward does the same. What one plane cannot hold is still computed by `simple`, and what PyTorch is told later changes nothing that was
computed before.
"""

import functools
from types import SimpleNamespace

import check_float32
import pytest
import torch
from check_float32 import PLANES, SERVED_BY, D, drawn, errors, gradients, served_by, subnormal_floor
from harness import Case, Problem, Report, Target, call_of, run_alone
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.float32_planes import Planes, attention, inputs
from flash_attention import flash_attention, shortcut
from flash_attention.backends import BACKENDS, cuda, emulated
from flash_attention.call import Settings, allows_tf32

EMULATED = Target(f"emulated:{PLANES}", "cpu")
ALMOST = 1.5  # times TF32's error: both are rounded to 11 bits, but not the same numbers
LESS = 5e-5  # of the largest entry: an error of O that float32 never has, and 11 bits always

attend = functools.partial(flash_attention, backend=EMULATED.backend)


@pytest.fixture(autouse=True)
def high():
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("name", inputs(8, 8))
@pytest.mark.parametrize("where", (EMULATED, Target(PLANES, "cuda")), ids=str)
def check_as_accurate_as_tf32(where, name):
    """O, dQ, dK and dV of hard inputs, against float64. The heads that planes compute are those that pairs of them compute."""
    if reason := where.why_not():
        pytest.skip(reason)
    call = [x[None].to(where.device) for x in drawn()[name]]
    if reason := BACKENDS[where.backend].why_not(call_of(*call[:3])):
        pytest.skip(reason)
    truth = gradients(sdpa, *(x.double() for x in call))
    with emulated.counting() as counts:
        ours = errors(gradients(lambda *qkv: flash_attention(*qkv, backend=where.backend), *call), truth)
    model = attention(*drawn()[name], D**-0.5, Planes("TF32", "tf32", 1).matmul)
    of_tf32 = errors([x[None].to(where.device) for x in model], truth)
    table = [f"{part} {a:.1e} (TF32's {b:.1e})" for part, a, b in zip(("O", "dQ", "dK", "dV"), ours, of_tf32, strict=True)]
    print("", *table, sep="\n  ")
    assert all(a <= max(ALMOST * b, end) for a, b, end in zip(ours, of_tf32, subnormal_floor(truth), strict=True)), table
    expected = SERVED_BY.get(name, ("planes", "planes"))
    assert (ours[0] > LESS) == ("planes" in expected[0])
    if where == EMULATED:
        assert served_by(counts) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"H": 4, "Hkv": 2, "causal": True},
        {"D": 128, "mask": "full", "dropout_p": 0.25},
        {"D": 256, "H": 2, "Hkv": 1, "causal": True, "dropout_p": 0.25},
        {"D": 512, "H": 1, "mask": "heads share"},
    ],
    ids=("causal, grouped", "mask, dropout", "wide, causal, dropout", "widest, mask"),
)
def check_everything(options):
    """O, LSE and gradients, at most four times as far from float64 as normal attention whose products are TF32's. With the setting taken
    back, the bits are those from before."""
    case = Case(**{"B": 1, "H": 2, "Nq": 70, "Nk": 130, "D": 64, "dtype": torch.float32, **options})
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for setting in ("highest", "high", "highest"):
            torch.set_float32_matmul_precision(setting)
            problem = Problem.of(case, EMULATED)
            results.append(problem.answer(EMULATED))
            report = Report(setting)
            report.expect(setting, results[-1], problem)
            assert not report.failures(), report.failures()
    finally:
        torch.use_deterministic_algorithms(False)
    exact, high, again = results
    assert all(map(torch.equal, exact, again))
    for part, other in zip(high, exact, strict=True):
        assert (part - other).abs().max() > LESS * other.abs().max().clamp(max=1), "the setting changed nothing"


@pytest.mark.parametrize("head_dim", (64, 256))
def check_a_backward_does_as_its_forward(head_dim):
    """The setting may change between them: P = exp(S − LSE) needs the S that LSE is of."""
    tensors = torch.randn(4, 1, 1, 70, head_dim, generator=torch.Generator().manual_seed(0)).unbind()
    found = {}
    for forward in ("high", "highest"):
        for backward in ("high", "highest"):
            *qkv, dO = (x.detach().requires_grad_() for x in tensors)
            torch.set_float32_matmul_precision(forward)
            O = attend(*qkv)
            torch.set_float32_matmul_precision(backward)
            found[forward, backward] = torch.autograd.grad(O, qkv, dO)
    for forward, other in (("high", "highest"), ("highest", "high")):
        assert all(map(torch.equal, found[forward, other], found[forward, forward]))
    assert not any(map(torch.equal, found["high", "high"], found["highest", "highest"]))


@pytest.mark.parametrize("head_dim", (64, 256))
def check_both_rungs_have_the_same_scores(head_dim):
    """Scores near 1000 differ by more than 1 in 11 bits and in 24. dV = Pᵀ dO does not depend on V, and is linear in dO; but tiny values of
    either send the forward or the backward to `simple`."""
    q, k, v, dO = torch.randn(4, 1, 1, 70, head_dim, generator=torch.Generator().manual_seed(0)).unbind()
    tiny_row = v.clone()
    tiny_row[:, :, 0] *= 1e-9
    found = []
    for V, factor, expected in (
        (v, 1, ("planes", "planes")),
        (v, 1e-32, ("planes", "planes, simple")),
        (tiny_row, 1, ("planes, simple", "planes")),
    ):
        call = functools.partial(attend, causal=True)
        with emulated.counting() as counts:
            found.append(gradients(call, q * 2400 * head_dim**-0.5, k, V, dO * factor)[3] / factor)
        assert served_by(counts) == expected
    for dV in found[1:]:
        assert (dV - found[0]).abs().max() < 2e-3 * found[0].abs().max()


def check_a_row_that_sees_one_key():
    """dP − Delta is 0 there, as it is in exact arithmetic: both are of the same rounded dO and V."""
    q, dO = torch.randn(2, 1, 1, 40, D, generator=torch.Generator().manual_seed(0)).unbind()
    k, v = torch.randn(2, 1, 1, 1, D, generator=torch.Generator().manual_seed(1)).unbind()
    O, dQ, dK, dV = gradients(attend, q, k, v, dO)
    assert (O - v).abs().max() > LESS  # so V was rounded
    assert dQ.abs().max() < 1e-5 and dK.abs().max() < 1e-5
    assert torch.allclose(dV, dO.sum(2, keepdim=True), rtol=1e-2, atol=1e-2)


def check_infinities_and_nan():
    """The same under this setting: a head with one is computed as float32 has it."""
    check_float32.check_infinities_and_nan(PLANES)


@pytest.mark.parametrize("head_dim", (64, 256))
def check_planes_take_half_the_workspace(head_dim):
    q = torch.empty(2, 4, 130, head_dim)
    floats = []
    for tf32 in (False, True):
        call = call_of(q, q, q, tf32=tf32)
        floats.append(BACKENDS[EMULATED.backend].plan(cuda.FORWARD, call).workspace)
    ranges = 2 * 4 * 16
    assert floats[0] - ranges == 3 * q.numel() and floats[1] - ranges == 3 * q.numel() / 2


def check_only_these_kernels_know_the_setting():
    """Other rungs compute as before, and 16-bit calls do not even read it."""
    for name, rung in cuda.RUNGS.items():
        x = torch.empty(1, 1, 64, 64, dtype=getattr(torch, rung.dtypes[0]))
        for which in (cuda.FORWARD, cuda.BACKWARD) if rung.files[1] else (cuda.FORWARD,):
            plain, fast = (rung.specialisation(which, "90a", *rung.kind(which, call_of(x, x, x, tf32=tf32))) for tf32 in (False, True))
            assert (plain != fast) == (name == PLANES)
            assert not any("PLANES" in define for define in plain.defines())
    assert "-DPLANES=1" in cuda.RUNGS[PLANES].specialisation(0, "90a", "float32", (64, 64), "all", None, False, tf32=True).defines()


def check_repeated_calls_are_told_apart(monkeypatch):
    """The key by which a repeated call finds its plan has the setting; that of 16-bit calls does not."""
    monkeypatch.setattr(shortcut, "is_eager_call", lambda *_: True)

    def key(dtype):
        x = SimpleNamespace(is_cuda=True, layout=torch.strided, shape=(1,), stride=lambda: (1,), dtype=dtype, device="cuda:0")
        return shortcut.signature(x, x, x, None, False, None, 0.0, None, None)

    high = key(torch.float32), key(torch.float16)
    torch.set_float32_matmul_precision("highest")
    assert key(torch.float32) != high[0] is not None and key(torch.float16) == high[1]


def check_every_name_of_the_setting():
    """PyTorch has three; read after both older and newer ones were used, the older raise an error."""
    matmul = torch.backends.cuda.matmul
    seen = []
    try:
        for allow in (True, False):
            matmul.allow_tf32 = allow
            seen.append(allows_tf32())
        for precision in ("tf32", "ieee"):
            matmul.fp32_precision = precision
            seen.append(allows_tf32())
        for precision in ("high", "highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            seen.append(allows_tf32())
        matmul.fp32_precision = "ieee"
        seen.append(allows_tf32())
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == [True, False, True, False, True, False, True, False]


def check_compiled():
    """A compiled function is traced again when the setting changes; an exported one keeps what it was traced with."""
    q, k, v = torch.randn(3, 1, 1, 20, D, generator=torch.Generator().manual_seed(0)).unbind()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(_Module(), (q, k, v)).module()
    high = attend(q, k, v)
    for setting in ("high", "highest", "high"):
        torch.set_float32_matmul_precision(setting)
        assert torch.equal(compiled(q, k, v), attend(q, k, v))
        assert torch.equal(exported(q, k, v), high)
        assert torch.equal(attend(q, k, v), high) == (setting == "high")


class _Module(torch.nn.Module):
    def forward(self, q, k, v):
        return attend(q, k, v)


def check_settings_travel():
    """Through the ops, which take settings one by one."""
    q, k, v = torch.randn(3, 1, 1, 20, D, generator=torch.Generator().manual_seed(0)).unbind()
    options = None, None, None, *Settings(D**-0.5, backend=EMULATED.backend, tf32=True)
    torch.set_float32_matmul_precision("highest")
    exact = attend(q, k, v)
    by_op = torch.ops.flash_attention.forward(q, k, v, *options)[0]
    torch.set_float32_matmul_precision("high")
    assert torch.equal(by_op, attend(q, k, v)) and not torch.equal(by_op, exact)


if __name__ == "__main__":
    run_alone(__file__)

"""Mistakes that other implementations of attention have made, one check for each.

python checks/check_mistakes.py [--backend reference]

Checked elsewhere: causality with left padding leaking the future, and rows that attend nothing (check_masks.py); a backward that takes dO
to be contiguous (check_identities.py); gradients checked with ones alone, which hides permuted features (three_ways.py); benches that do
not synchronise or that measure autograd's bookkeeping (check_bench.py); quadratic memory (check_memory.py).

One file because it is a list: each check stands alone.
"""

import runpy
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import (
    ALGORITHMS,
    CPU,
    Case,
    Problem,
    Report,
    Result,
    Target,
    against_truth,
    call_of,
    dtype_served,
    flash,
    run_alone,
    serves_dropout,
    skip_unless_masks,
    skip_unless_served,
)

from flash_attention import flash_attention, reference
from flash_attention.backends import BACKENDS
from flash_attention.backends.cuda import BACKWARD, FORWARD
from flash_attention.backends.launch import SETTINGS, STRIDES, Addresses
from flash_attention.call import Form
from flash_attention.reference import normal_attention, normal_attention_causal

CHECKS = Path(__file__).parent
CUDA = Path(reference.__file__).parents[1] / "cuda"
CAUSAL = pytest.mark.parametrize("causal", (False, True), ids=("general", "causal"))


def only_cuda(target: Target, why: str) -> None:
    if target.device != "cuda":
        pytest.skip(why)


# ---- wrong mathematics


@pytest.mark.parametrize(("Nq", "Nk"), [(40, 64), (64, 40), (1, 64), (64, 1), (64, 64)])
def check_causal_alignment(target, Nq, Nk):
    """Causal with Nq ≠ Nk, its sign: with V = identity O shows P, and row r sees exactly the columns c ≤ r + Nk − Nq."""
    dtype = dtype_served(target)
    q, k = (torch.zeros(1, 2, n, 16, dtype=dtype, device=target.device) for n in (Nq, Nk))
    v = torch.eye(Nk, 64, dtype=dtype, device=target.device).expand(1, 2, Nk, 64)
    sees = torch.tensor([[c <= r + Nk - Nq for c in range(Nk)] for r in range(Nq)], device=target.device)
    P = sees.double() / sees.sum(-1, keepdim=True).clamp(min=1)
    for what, O in (
        ("flash_attention", flash_attention(q, k, v, causal=True, backend=target.backend)),
        ("naive", normal_attention_causal(q, k, v)),
    ):
        wrong = ((O[..., :Nk] > 0) != sees).nonzero().tolist()
        assert not wrong, f"{what}: whether row {wrong[0][2]} sees column {wrong[0][3]} is wrong, and so are {len(wrong) - 1} others"
        torch.testing.assert_close(O[..., :Nk].double(), P.expand(1, 2, Nq, Nk), rtol=1e-3, atol=0)


@CAUSAL
def check_not_over_batches(target, causal):
    """Attending over the batch axis, or mixing heads: one batch and head must not affect another's result or gradient."""
    case = Case(B=3, H=4, Nq=33, Nk=65, D=16, causal=causal, dtype=dtype_served(target))
    q, k, v, _ = case.inputs(target.device)
    before = flash_attention(q, k, v, causal=causal, backend=target.backend)
    others = [x.clone() for x in (q, k, v)]
    for x in others:
        x[0, 1] = 7 - x[0, 1]
    after = flash_attention(*others, causal=causal, backend=target.backend)
    changed = (before != after).flatten(2).any(-1)
    expected = torch.zeros(3, 4, dtype=torch.bool, device=target.device)
    expected[0, 1] = True
    assert torch.equal(changed, expected), f"batch 0, head 1 was changed; the output changed in {changed.nonzero().tolist()}"
    dO = torch.zeros_like(before)
    dO[0, 1] = 1
    for name, x in zip(("dQ", "dK", "dV"), flash(case, target, q, k, v, None, dO)[2:], strict=True):
        reached = x.flatten(2).any(-1)
        assert torch.equal(reached, expected), f"{name} of batch 0, head 1 alone reaches {reached.nonzero().tolist()}"


def check_scale_is_there(target):
    """No scale: with D = 64 and scores of ±64 before it, softmax would be one-hot; 1/√64 makes them ±8."""
    q = torch.ones(1, 1, 1, 64, dtype=dtype_served(target), device=target.device)
    k = torch.cat([q, -q], dim=2)
    LSE = flash_attention(q, k, k, return_lse=True, backend=target.backend)[1]
    assert abs(float(LSE) - 8) < 1e-5, f"LSE is {float(LSE)}, should be log(e⁸ + e⁻⁸) = 8"


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
@CAUSAL
def check_hidden_scores_in_half_types(target, causal, dtype):
    """−1e10 used instead of −∞ is −∞ in float16, and −∞ − (−∞) is NaN: masks in half types, on rows that attend to all, some, one or
    none."""
    case = Case(Nq=70, Nk=90, D=16, causal=causal, dtype=dtype)
    q, k, v, _ = case.inputs(target.device)
    mask = torch.ones(1, 1, 70, 90, dtype=torch.bool, device=target.device)
    mask[..., 10:30, ::2] = False
    mask[..., 30:50, 1:] = False
    mask[..., 50:60, :] = False
    problem = Problem.of(case, target, inputs=(q, k, v, mask))
    naive = (normal_attention_causal if causal else normal_attention)(q, k, v, mask)
    assert naive.isfinite().all(), "naive attention"
    report = Report(f"{target}: hidden scores, {case}")
    report.expect("flash_attention", problem.answer(target), problem)
    report.verdict()


def ways_of_attending(target: Target, q, k, v, mask=None) -> dict:
    """Name → O, of everything that computes attention here; all of it if the target is the reference on the CPU."""
    results = {"flash_attention": flash_attention(q, k, v, mask, backend=target.backend), "naive": normal_attention(q, k, v, mask)}
    if target == CPU:
        for name, algorithm in ALGORITHMS.items():
            if not algorithm.causal:
                results[name] = algorithm.forward(q, k, v, mask, block_q=32, block_k=32)[0]
    return results


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def check_no_epsilon(target, dtype):
    """An epsilon added to the denominator biases the result, which float64 shows: the weights of a row sum to 1, to the last bits."""
    case = Case(Nq=70, Nk=90, D=16, dtype=dtype, mask="full")
    q, k, v, mask = case.inputs(target.device)
    skip_unless_served(target, q, k, v, mask, False, 0.0)
    for what, O in ways_of_attending(target, q, k, torch.ones_like(v), mask).items():
        off = float((O - 1).abs().max())
        assert off < 40 * torch.finfo(dtype).eps, f"{what}: the weights of a row sum to 1 ± {off:.1e}"


def check_no_mask_needed(target):
    """mask=None must not crash, in no function."""
    q, k, v, _ = Case(Nq=20, Nk=30, D=16, dtype=dtype_served(target)).inputs(target.device)
    for what, O in ways_of_attending(target, q, k, v).items():
        assert O.isfinite().all(), what


# ---- kernels


@CAUSAL
def check_repeats_bitwise(target, causal):
    """A missing barrier may be mistaken for "noise of the atomics". The forward must repeat bit for bit, a backward up to rounding."""
    on_cuda = target.device == "cuda"
    case = Case(B=2, H=8 if on_cuda else 1, Nq=300, Nk=530, D=64, causal=causal, dtype=dtype_served(target))
    problem = Problem.of(case, target)
    report = Report(f"{target}: repeated, {case}")
    first = problem.answer(target)
    for _ in range(50 if on_cuda else 3):
        again = problem.answer(target)
        assert torch.equal(first.O, again.O), f"O differs from run to run by up to {(first.O - again.O).abs().max()}"
        assert torch.equal(first.LSE, again.LSE), "LSE differs from run to run"
        report.expect("each run", again, problem)
    report.verdict()


LARGE = "needs a GPU: more than 2³¹ scores take minutes on a CPU"


@CAUSAL
def check_many_scores(target, causal):
    """Offsets beyond 2³¹: B·H·Nq·Nk = 2.1 · 2³¹ with small inputs; the last head of the last batch against a call of its own."""
    only_cuda(target, LARGE)
    skip_unless_masks(target)
    case = Case(B=2, H=33, Nq=8192, Nk=8448, D=16, causal=causal, dtype=dtype_served(target))
    q, k, v, _ = case.inputs(target.device)
    mask = torch.rand(2, 8448, generator=torch.Generator().manual_seed(1)).to(target.device) < 0.8
    dO = case.gradient(target.device, *q.shape)
    whole = flash(case, target, q, k, v, mask, dO)
    one = replace(case, B=1, H=1)
    last = Problem.solve(one, *(x[-1:, -1:] for x in (q, k, v)), mask[-1:], dO[-1:, -1:], None)
    report = Report(f"{target}: {case}")
    report.expect("last head", Result(*(x[-1:, -1:] for x in whole)), last)
    report.verdict()


def check_large_mask(target):
    """Offsets beyond 2³¹ in a mask of Nq × Nk = 1.1 · 2³¹ bytes, not broadcast: the last rows, and gradients from them alone."""
    only_cuda(target, LARGE)
    skip_unless_masks(target)
    Nq, Nk, rows = 48_000, 49_152, 64
    q, k, v, _ = Case(B=1, H=1, Nq=Nq, Nk=Nk, D=16, dtype=dtype_served(target)).inputs(target.device)
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GB of free GPU memory")
    mask = torch.empty(1, 1, Nq, Nk, dtype=torch.bool, device=target.device)
    for i in range(0, Nq, 4000):  # a random mask in pieces: drawn as a whole it would take four times its size
        mask[:, :, i : i + 4000] = torch.rand(1, 1, min(4000, Nq - i), Nk, device=target.device) < 0.5
    case = Case(B=1, H=1, Nq=rows, Nk=Nk, D=16, dtype=q.dtype)
    dO = torch.zeros_like(q)
    dO[:, :, -rows:] = case.gradient(target.device, 1, 1, rows, 16)
    O, LSE, dQ, dK, dV = flash(case, target, q, k, v, mask, dO)
    want = Problem.solve(case, q[:, :, -rows:], k, v, mask[:, :, -rows:], dO[:, :, -rows:], None)
    report = Report(f"{target}: mask of {Nq} × {Nk}")
    report.expect("last rows", Result(O[:, :, -rows:], LSE[:, :, -rows:], dQ[:, :, -rows:], dK, dV), want)
    report.verdict()


def check_strides_beyond_reach(target):
    """tensor_core reaches 64 GB from a tensor's start and refuses what lies beyond, before anything is launched. A dimension of size 1 may
    have any stride."""
    only_cuda(target, "needs a GPU: limits of a kernel")
    if target.backend != "tensor_core":
        pytest.skip("other kernels have 64-bit offsets")
    x = torch.randn(1, 1, 64, 64, dtype=torch.float16, device=target.device)
    want = flash_attention(x, x, x, backend=target.backend)
    anywhere = x.as_strided(x.shape, (2**36, 2**36, 64, 1))
    assert torch.equal(flash_attention(anywhere, anywhere, anywhere, backend=target.backend), want)
    # No GPU holds a second batch that far away, so its launch is forged.
    launch = BACKENDS[target.backend].plan(FORWARD, call_of(x, x, x)).launch
    two_batches = SETTINGS.pack(2, *SETTINGS.unpack(launch.settings)[1:])
    addresses = [each.data_ptr() for each in (x, x, x, want)]
    for strides in (1, 3, 5):  # of q, k and v among the fields
        fields = list(launch.tensors)
        fields[strides] = STRIDES.pack(2**36, *STRIDES.unpack(fields[strides])[1:])
        with pytest.raises(RuntimeError, match="invalid argument"):
            launch._replace(tensors=tuple(fields), settings=two_batches)(x, addresses, Addresses())


@CAUSAL
@pytest.mark.parametrize("D", (64, 128, 256))
def check_many_tiles(target, causal, D):
    """More tiles of rows than multiprocessors, an odd number in each head: persistent blocks take one after another."""
    only_cuda(target, "needs a GPU: thousands of tiles")
    for Nq, Nk in ((333, 333), (150, 420), (500, 200)):
        against_truth(Case(B=3, H=96, Hkv=48, Nq=Nq, Nk=Nk, D=D, causal=causal, dtype=dtype_served(target)), target)


def check_fresh_thread(target):
    """A thread whose first use of the GPU is a call, with memory that PyTorch has cached: nothing has created its context."""
    only_cuda(target, "needs a GPU: contexts")
    case = Case(Nq=113, Nk=203, D=64, dtype=dtype_served(target))
    problem = Problem.of(case, target)
    problem.answer(target)
    backend, results = BACKENDS[target.backend], []

    def call():
        q, k, v, dO = (x.detach() for x in (problem.q, problem.k, problem.v, problem.dO))
        O, LSE = backend.plan(FORWARD, call_of(q, k, v))(q, k, v, None, None, None)
        results.append((O, LSE, *backward(dO, q, k, v, O, LSE)))
        none = q[:, :, :0]
        results.append(backward(none, none, k, v, none, LSE[:, :, :0]))

    def backward(dO, q, k, v, O, LSE):
        call = call_of(q, k, v)._replace(O=Form.of(O), dO=Form.of(dO))
        return backend.plan(BACKWARD, call)(dO, None, q, k, v, None, None, O, LSE, None)

    call()
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert len(results) == 4, "the call in a thread of its own failed"
    for here, there in zip(results[0] + results[1], results[2] + results[3], strict=True):
        torch.testing.assert_close(here, there, rtol=1e-2, atol=1e-2)


def check_current_stream(target):
    """A kernel belongs on the current stream: on a side stream it waits for what that stream still has to write."""
    only_cuda(target, "needs a GPU: streams")
    case = Case(Nq=300, Nk=530, D=64, causal=True, dtype=dtype_served(target))
    problem = Problem.of(case, target)
    problem.answer(target)  # compiled and loaded before the race
    late = [torch.full_like(x, torch.nan) for x in (problem.q, problem.k, problem.v)]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # cycles: about 0.1 s, in which the default stream is free
        for x, value in zip(late, (problem.q, problem.k, problem.v), strict=True):
            x.copy_(value)
        result = flash(case, target, *late, None, problem.dO, problem.dLSE)
    side.synchronize()
    report = Report(f"{target}: on a side stream, {case}")
    report.expect("side stream", result, problem)
    report.verdict()


def check_other_device(target):
    """A kernel runs on its tensors' device, whichever is current."""
    only_cuda(target, "needs two GPUs")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = Case(Nq=113, Nk=203, D=64, mask="full", dropout_p=0.1 if serves_dropout(target) else 0.0, dtype=dtype_served(target))
    problem = Problem.of(case, target)
    report = Report(f"{target}: on cuda:1 while cuda:0 is current, {case}")
    moved = [x.to("cuda:1") for x in (problem.q, problem.k, problem.v, problem.mask, problem.dO, problem.dLSE)]
    torch.manual_seed(case.seed)
    result = flash(case, target, *moved)
    assert result.O.device == torch.device("cuda:1")
    report.expect("cuda:1", result, problem)
    report.verdict()


def check_quiet(target, capfd):
    """A call prints nothing, and on CUDA waits for nothing."""
    case = Case(Nq=113, Nk=203, D=64, mask="full", dtype=dtype_served(target))
    problem = Problem.of(case, target)
    problem.answer(target)  # the first call may compile, and say so
    capfd.readouterr()
    if target.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        problem.answer(target)
    finally:
        if target.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    printed = capfd.readouterr()
    assert not printed.out + printed.err


# ---- the repository


def check_cuda_folder():
    """cuda/ holds no Python: NVIDIA's `cuda` is a namespace package, which an `__init__.py` there would shadow."""
    if not CUDA.is_dir():
        pytest.skip("this copy has no cuda/")
    python = [str(path.relative_to(CUDA)) for path in CUDA.rglob("*.py*")]
    assert not python, f"cuda/ holds {python}"


# A script, and a function whose result is made 1 % too large.
BROKEN = [
    ("check_forward.py", None),
    ("check_forward.py", "flash_attention2_forward"),
    ("check_forward_causal.py", "flash_attention_causal_forward"),
    ("check_backward.py", "flash_attention_backward"),
    ("check_backward_causal.py", "flash_attention2_causal_backward"),
]


@pytest.mark.parametrize(("script", "broken"), BROKEN)
def check_scripts_exit(script, broken, monkeypatch, capsys):
    """Check scripts that print False and exit with 0: here they exit with 0 if all is right, and with 1 if one result is not."""
    size = ["--q_len", "40", "--kv_len", "50", "--d", "16"]
    monkeypatch.setattr(sys, "argv", [script, *size, "--device", "cpu", "--backend", "reference"])
    if broken:
        right = getattr(reference, broken)

        def wrong(*arguments, **options):
            first, *others = right(*arguments, **options)
            return 1.01 * first, *others

        monkeypatch.setattr(reference, broken, wrong)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(CHECKS / script), run_name="__main__")
    output = capsys.readouterr().out
    assert int(stopped.value.code) == bool(broken), f"exit code {stopped.value.code}\n{output}"
    assert ("FAILED" in output) == bool(broken)


@pytest.mark.parametrize(("body", "code"), [("pass", 0), ("assert 1 > 2", 1)])
def check_files_exit(tmp_path, body, code):
    """The same for the files that run alone under pytest."""
    file = tmp_path / "check_something.py"
    file.write_text(f"import harness\n\ndef check_something():\n    {body}\n\nif __name__ == '__main__': harness.run_alone(__file__)\n")
    program = f"import sys, runpy; sys.path.insert(0, {str(CHECKS)!r}); runpy.run_path({str(file)!r}, run_name='__main__')"
    options = ["-c", str(CHECKS.parent / "pyproject.toml"), "-p", "no:cacheprovider"]
    run = subprocess.run([sys.executable, "-c", program, *options], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.returncode == code, run.stdout + run.stderr
    assert ("1 passed" in run.stdout) == (code == 0)


if __name__ == "__main__":
    run_alone(__file__)

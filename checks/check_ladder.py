"""The steps of the ladder that have only a forward: correct on a GPU, refused wherever gradients are requested, and each a small change.

Their emulated checks are in check_emulated.py.
"""

import gc
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from harness import EDGE_LENGTHS, FEW_LENGTHS, FORWARD_ALONE, HALF, LENGTHS, Case, Target, against_truth, call_of, expect_error, run_alone
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks are not installed

from benchmarks.ladder import changed_from, code_of, ladder, lines_changed, parts_of
from flash_attention import build, flash_attention
from flash_attention.backends import BACKENDS, CHOSEN, DEFAULT, GROUPS, cuda, emulated
from flash_attention.call import Settings

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")


@on_gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("D", (64, 128, 72))
@pytest.mark.parametrize("causal", (False, True), ids=("dense", "causal"))
@pytest.mark.parametrize("name", FORWARD_ALONE)
def check_forward_on_a_gpu(name, causal, D, dtype, full):
    for Nq, Nk in (*LENGTHS, *EDGE_LENGTHS) if full else FEW_LENGTHS:
        against_truth(Case(B=2, H=4, Hkv=2, Nq=Nq, Nk=Nk, D=D, dtype=dtype, causal=causal), Target(name, "cuda"))


@on_gpu
@pytest.mark.parametrize("name", FORWARD_ALONE)
def check_repeats_on_a_gpu(name):
    """50 runs bit for bit: an error that moves is a race."""
    q, k, v, _ = Case(B=8, H=8, Nq=1000, Nk=1100, D=64, dtype=torch.bfloat16).inputs("cuda")
    if reason := BACKENDS[name].why_not(call_of(q, k, v, causal=True)):
        pytest.skip(reason)
    first, *others = [flash_attention(q, k, v, causal=True, backend=name) for _ in range(50)]
    assert all(torch.equal(first, other) for other in others)


def jvp_by_hand(f, x):
    with forward_ad.dual_level():
        f(forward_ad.make_dual(x, x))


WITH_GRADIENTS = {
    "eager": lambda f, x: f(x.requires_grad_()),
    "checkpoint": lambda f, x: checkpoint(f, x.requires_grad_(), use_reentrant=False),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(torch.stack((x, x))),
    "grad of vmap": lambda f, x: torch.func.grad(lambda x: torch.func.vmap(f)(x).sum())(torch.stack((x, x))),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "dual numbers": jvp_by_hand,
    "compile": lambda f, x: torch.compile(f, backend="aot_eager")(x.requires_grad_()),
    "meta": lambda f, x: f(x.to("meta").requires_grad_()),
}


@pytest.fixture
def launches(monkeypatch):
    """The launches of emulated kernels."""
    called = []
    real = emulated.EmulatedLaunch.__call__

    def launch(self, *arguments):
        called.append(self)
        return real(self, *arguments)

    monkeypatch.setattr(emulated.EmulatedLaunch, "__call__", launch)
    return called


@pytest.mark.parametrize("way", WITH_GRADIENTS)
@pytest.mark.parametrize("name", FORWARD_ALONE)
def check_gradients_are_refused(name, way, launches):
    """Before anything is launched, with the name and the reason."""
    x = torch.randn(1, 1, 8, 64, dtype=torch.float16)
    f = partial(attend, name=f"emulated:{name}")
    expect_error(lambda: WITH_GRADIENTS[way](f, x), NotImplementedError, [f"emulated:{name}", "forward alone"])
    assert not launches
    if way == "checkpoint":
        gc.collect()  # PyTorch 2.11 keeps its hooks until the traceback of a failure inside them is gone


def attend(x, name):
    k = torch.ones(1, 1, 8, 64, dtype=torch.float16, device=x.device)
    return flash_attention(x, k, k, backend=name)


def check_gradients_are_refused_in_a_whole_graph(launches):
    """torch.compile(fullgraph=True) may wrap the error, and says the same."""
    x = torch.randn(1, 1, 8, 64, dtype=torch.float16, requires_grad=True)
    with pytest.raises(Exception, match="forward alone") as caught:
        torch.compile(partial(attend, name="emulated:swizzle"), backend="aot_eager", fullgraph=True)(x)
    assert "NotImplementedError" in f"{type(caught.value).__name__}: {caught.value}" and not launches


def check_backward_is_refused():
    """Of the op, and of the rung itself."""
    x = torch.randn(1, 1, 8, 64, dtype=torch.float16)
    tensors = x, None, x, x, x, None, None, x, torch.zeros(1, 1, 8), None
    settings = Settings(1.0, backend="emulated:producer")
    expect_error(lambda: torch.ops.flash_attention.backward(*tensors, *settings), NotImplementedError, ["producer", "forward alone"])
    call = call_of(x, x, x)
    expect_error(lambda: cuda.RUNGS["producer"].plan(cuda.BACKWARD, call), NotImplementedError, ["producer", "forward alone"])


def check_without_gradients():
    """Under no_grad, in a compiled function and mapped: as usual."""
    if reason := BACKENDS["emulated:swizzle"]._why_no_kernels(0):
        pytest.skip(reason)
    x = torch.randn(1, 1, 8, 64, dtype=torch.float16)
    f = partial(attend, name="emulated:swizzle")
    want = f(x)
    with torch.no_grad():
        assert torch.equal(f(x.clone().requires_grad_()), want)
    assert torch.equal(torch.compile(f, backend="aot_eager", fullgraph=True)(x), want)
    assert torch.equal(torch.func.vmap(f)(torch.stack((x, x)))[1], want)


def check_taken_by_name_only():
    taken = {*DEFAULT, *GROUPS["cuda"], *(name.split("/")[1] for name in CHOSEN)}
    assert FORWARD_ALONE and not taken & {*FORWARD_ALONE, "mma"}


def check_each_is_a_small_change():
    """A step's header names the file that it changes, and predicts; the change is about 60 lines at most."""
    files = [cuda.RUNGS[name].files[0] for name in ladder()]
    assert files == sorted(files)
    for name in FORWARD_ALONE:
        file = cuda.RUNGS[name].files[0]
        before = changed_from(file)
        assert before in files and before < file, f"{file} does not say what it changes"
        assert "// Prediction, before any measurement:" in (build.SOURCES / file).read_text(encoding="utf-8")
        assert 5 < lines_changed(before, file) <= 60, f"{file} changes {lines_changed(before, file)} lines of {before}"
        assert len(code_of(file)) < 200


def check_a_kernel_in_parts_is_counted_whole():
    """Each part once, after the parts that it includes; none of another rung."""
    parts = parts_of("forward_4_hopper.cu")
    assert parts[-1] == "forward_4_hopper.cu" and len(set(parts)) == len(parts)
    assert set(parts[:-1]) == {file.name for file in build.SOURCES.glob("forward_4_*.cuh")}
    for n, part in enumerate(parts):
        included = [other for other in parts if f'#include "{other}"' in (build.SOURCES / part).read_text()]
        assert all(other in parts[:n] for other in included), f"{part} comes before a part that it includes"


if __name__ == "__main__":
    run_alone(__file__)

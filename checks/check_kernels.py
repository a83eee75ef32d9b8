"""Faults that only compiled kernels can have: unwritten outputs, races, CUDA graphs, determinism.

python checks/check_kernels.py [--backend tensor_core]
"""

from dataclasses import replace

import pytest
import torch
from harness import Case, Report, Target, dtype_served, flash, run_alone, serves_dropout, skip_unless_served

from flash_attention import build, flash_attention
from flash_attention.backends import cuda, libraries

CASES = [
    Case(Nq=203, Nk=330, D=64, H=4, Hkv=2),
    Case(Nq=203, Nk=330, D=72, causal=True),
    Case(Nq=330, Nk=203, D=128, causal=True, mask="dead rows"),
    Case(Nq=203, Nk=330, D=64, mask="full", dropout_p=0.2),
    Case(B=60, H=4, Nq=129, Nk=257, D=64, causal=True),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def inputs(case: Case, target):
    case = replace(case, dtype=dtype_served(target))
    q, k, v, mask = case.inputs(target.device)
    skip_unless_served(target, q, k, v, mask, case.causal, case.dropout_p)
    dO, dLSE = case.gradient(target.device, *q.shape[:3], v.shape[3]), torch.ones(q.shape[:3], device=target.device)
    return case, (q, k, v, mask, dO, dLSE)


def run(case: Case, target, arguments):
    torch.manual_seed(7)
    return flash(case, target, *arguments)


@cases
def check_every_element_is_written(target, case, repeatable):
    """Outputs, gradients and workspaces start as NaN; none of it reaches a result."""
    case, arguments = inputs(case, target)
    result = run(case, target, arguments)
    for name, x in zip(result._fields, result, strict=True):
        assert not x.isnan().any(), f"{name} has NaN at {x.isnan().nonzero()[0].tolist()}"


@cases
def check_repeats(target, case):
    """50 forward runs, and dK and dV of 10 backward runs, bit for bit: an error that moves is a race."""
    if target.device != "cuda":
        pytest.skip("races between threads of a kernel: needs a CUDA target")
    case, arguments = inputs(case, target)
    first = run(case, target, arguments)
    for repeat in range(50):
        torch.manual_seed(7)
        with torch.no_grad():
            O, LSE = flash_attention(*arguments[:4], causal=case.causal, dropout_p=case.dropout_p, return_lse=True, backend=target.backend)
        assert torch.equal(O, first.O) and torch.equal(LSE, first.LSE), f"forward run {repeat} differs"
    for repeat in range(10):
        again = run(case, target, arguments)
        assert torch.equal(again.dK, first.dK) and torch.equal(again.dV, first.dV), f"backward run {repeat} differs"


@cases
def check_deterministic(target, case, repeatable):
    """Under torch.use_deterministic_algorithms all gradients repeat bit for bit."""
    case, arguments = inputs(case, target)
    first = run(case, target, arguments)
    for repeat in range(10):
        for name, x, y in zip(first._fields, first, run(case, target, arguments), strict=True):
            assert torch.equal(x, y), f"{name} of run {repeat} differs"


def check_cuda_graph(target):
    """Captured and replayed on new inputs: the same as a plain call. Dropout draws new bits with every replay."""
    if target.device != "cuda":
        pytest.skip("CUDA graphs need a CUDA target")
    if target.backend == "reference":
        pytest.skip("the reference copies small tensors from the CPU as it goes, which a capture does not allow")
    case, (q, k, v, _, _, _) = inputs(Case(Nq=200, Nk=300, D=64), target)
    dropout_p = 0.5 if serves_dropout(target) else 0.0
    flash_attention(q, k, v, causal=True, backend=target.backend)  # compiles
    flash_attention(q, k, v, dropout_p=dropout_p, backend=target.backend)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        O = flash_attention(q, k, v, causal=True, backend=target.backend)
        dropped = flash_attention(q, k, v, dropout_p=dropout_p, backend=target.backend)
    for seed in range(2):
        for x, y in zip((q, k, v), replace(case, seed=seed + 5).inputs(target.device)[:3], strict=True):
            x.copy_(y)
        graph.replay()
        first = dropped.clone()
        assert torch.equal(O, flash_attention(q, k, v, causal=True, backend=target.backend)), f"replay {seed} differs from a plain call"
        graph.replay()
        assert torch.equal(first, dropped) == (not dropout_p), "two replays dropped the same elements"


def check_cuda_graph_of_a_training_step(target):
    """Forward and gradients, captured together and replayed on new inputs: the same as a plain step's."""
    if target.device != "cuda" or target.backend == "reference":
        pytest.skip("as above")
    case, (q, k, v, _, dO, _) = inputs(Case(Nq=200, Nk=300, D=64), target)

    def step():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        O = flash_attention(*leaves, causal=True, backend=target.backend)
        return O.detach(), *torch.autograd.grad(O, leaves, dO)

    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):  # compiles; the second call is the short one
            step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for seed in range(2):
            for x, y in zip((q, k, v), replace(case, seed=seed + 5).inputs(target.device)[:3], strict=True):
                x.copy_(y)
            graph.replay()
            assert all(map(torch.equal, captured, step())), f"replay {seed} differs from a plain step"
    finally:
        torch.use_deterministic_algorithms(False)


def check_other_stream(target):
    """Kernels run on the current stream: on a side stream they see what that stream wrote before, and do not wait for the default
    stream."""
    if target.device != "cuda":
        pytest.skip("streams need a CUDA target")
    case, arguments = inputs(Case(Nq=512, Nk=512, D=64), target)
    want = run(case, target, arguments)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel on another stream would read the inputs before they are written
        late = [x.clone() if x is not None else None for x in arguments]
        got = run(case, target, late)
    stream.synchronize()
    report = Report(f"{target}: a stream of its own")
    for name in ("O", "LSE", "dK", "dV"):
        report.compare("other stream", name, getattr(got, name), getattr(want, name), 0.0)
    report.verdict()


def check_next_rung(target, monkeypatch):
    """If kernels of higher rungs cannot be built, the next rung serves, forward and backward, with one warning for each."""
    if target != Target("simple", "cuda"):
        pytest.skip("needs a CUDA target, once")
    case = Case(Nq=203, Nk=330, D=64, H=4, Hkv=2, mask="full", dropout_p=0.2, dtype=torch.float16)
    q, k, v, mask = case.inputs("cuda")
    arguments = q, k, v, mask, case.gradient("cuda", *q.shape), torch.ones(q.shape[:3], device="cuda")
    want = run(case, Target("simple", "cuda"), arguments)
    real = build.build

    def broken(kernel, into=None):
        if "simple" not in kernel.file:
            raise build.BuildError(f"{kernel} is broken")
        return real(kernel, into)

    monkeypatch.setattr(build, "build", broken)
    monkeypatch.setattr(build, "failures", {})
    monkeypatch.setattr("flash_attention.backends._warned", set())
    libraries.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="runs on simple") as caught:
            for _ in range(2):
                got = run(case, Target(None, "cuda"), arguments)
        assert len(caught) == 2, f"one for the forward, one for the backward: {[str(w.message) for w in caught]}"
    finally:
        libraries.library.cache_clear()
    for name, x, y in zip(want._fields, got, want, strict=True):
        assert torch.equal(x, y), f"{name} is not that of simple"


@pytest.mark.parametrize("by_keys", (False, True), ids=("by queries", "by keys"))
def check_long_mask(target, by_keys):
    """A mask of more keys than a grid's second dimension has blocks for is packed to its end."""
    if target != Target("simple", "cuda"):
        pytest.skip("needs a CUDA target, once")
    Nk = 9_000_001 if by_keys else 140_000_001
    may = torch.rand(Nk, device="cuda") < 0.5
    bits = cuda.pack_mask(may.expand(1, 1, 2, Nk) if by_keys else may.expand(1, 1, 1, Nk), by_keys)
    if by_keys:  # a word of each key says the same for 128 queries
        assert torch.equal(bits, torch.where(may, 0, -1).int()[None, None, :, None].expand(1, 1, Nk, 4))
    else:
        hidden = torch.nn.functional.pad(~may, (0, bits.shape[3] * 32 - Nk), value=True).view(-1, 32)
        powers = torch.tensor([2**bit if bit < 31 else -(2**31) for bit in range(32)], device="cuda")
        assert torch.equal(bits.flatten(), (hidden * powers).sum(1).int())


if __name__ == "__main__":
    run_alone(__file__)

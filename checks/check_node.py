"""A small call with gradients in C++ (flash_attention/node.cpp) does what the same Function does in Python, and enters Python only where it
must. Its kernels are replaced by fake_attention.cpp, on a CPU; check_shortcut.py runs it with real ones, on a GPU.

python checks/check_node.py

One file because what the library does and how it comes about are checked with the same stand-in for kernels.
"""

import ctypes
import dataclasses
import io
import os
import subprocess
import threading
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from check_shortcut import TO_BE_DIFFERENTIATED, gradients_by
from harness import Case, run_alone
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from flash_attention import autograd, build, node, shortcut
from flash_attention.backends import BACKENDS, cuda, libraries
from flash_attention.backends.launch import Launch, fields
from flash_attention.build import BuildError, emulated
from flash_attention.build import node as library
from flash_attention.call import Call, Settings
from flash_attention.reference import normal_attention

pytestmark = pytest.mark.skipif(emulated.find_compiler() is None, reason="no C++ compiler")
FAKE = Path(__file__).with_name("fake_attention.cpp")


class FakeRung(cuda.Rung):
    """A rung for the CPU, whose kernels are fake_attention.cpp."""

    device_type: ClassVar[str] = "cpu"
    library: ClassVar[ctypes.CDLL]

    def _why_no_kernels(self, device):
        return None

    def launch(self, which, call, tensors, scale):
        return Launch(self.library, *fields(call, tensors, scale), 0, 1)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("fake")
    (folder / "cuda_runtime.h").write_text(library.CUDA_RUNTIME)
    command = [emulated.find_compiler(), "-shared", "-fPIC", f"-I{folder}", f"-I{build.SOURCES}", str(FAKE), "-o", f"{folder}/fake.so"]
    subprocess.run(command, check=True)
    library.compiled()
    return libraries.declared(build.loaded(folder / "fake.so"))


@pytest.fixture
def rung(kernels, monkeypatch):
    FakeRung.library = kernels
    real = {field.name: getattr(cuda.RUNGS["tensor_core"], field.name) for field in dataclasses.fields(cuda.Rung)}
    rung = FakeRung(**{**real, "name": "fake", "dtypes": ("float32",)})
    monkeypatch.setitem(BACKENDS, "fake", rung)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    return rung


@pytest.fixture
def entered(monkeypatch) -> list:
    """Gets an element for each backward that enters Python."""
    calls, asked = [], shortcut.is_eager_backward
    monkeypatch.setattr(shortcut, "is_eager_backward", lambda *arguments: calls.append(arguments) or asked(*arguments))
    return calls


@pytest.fixture
def inputs() -> list[torch.Tensor]:
    return [x.detach().requires_grad_() for x in Case(B=2, H=4, Hkv=2, Nq=9, Nk=7, D=16).inputs("cpu")[:3]]


def forward_of(rung, q, k, v) -> cuda.Forward:
    plan = rung.plan(cuda.FORWARD, Call.of(q, k, v, None, None, Settings(0.3, backend="fake")))
    assert plan.is_plain
    return plan


@pytest.fixture
def attend(rung, inputs):
    """(q, k, v) → O by one plan for tensors like the inputs."""
    plan = forward_of(rung, *inputs)
    attend = partial(autograd.plain_attention, plan)
    assert "PlainAttentionBackward" not in str(attend(*inputs).grad_fn), "this is the Function in Python"
    return attend


def in_python(plan, q, k, v):
    """O by the Function in Python."""
    return super(torch.autograd.Function, autograd.PlainAttention).apply(plan, q, k, v)


def close(got, want) -> bool:
    return all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) and x.stride() == y.stride() for x, y in zip(got, want, strict=True))


CASES = Case(B=2, H=4, Hkv=2, Nq=9, Nk=7, D=16), Case(B=1, H=2, Nq=3, Nk=20, D=8, Dv=24), Case(B=2, H=1, Nq=2, Nk=1, D=8)
COLUMNS = torch.ones_like, (lambda x: x, lambda x: x.mT.contiguous().mT if x.dim() == 4 else x)  # hooks that make columns contiguous
LAYOUTS = {  # of a tensor (B, H, N, D)
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "packed": lambda x: torch.stack([x, x, x], -2)[..., 1, :],  # as one of a projection to q, k and v
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def check_gradients(rung, entered, case, layout):
    """O and gradients are those of naive attention and lie as those of the Function in Python do; Python is entered once for each form of
    dO and of what was saved that kernels can read, or could if dO were copied."""
    tensors = [LAYOUTS[layout](x) for x in case.inputs("cpu")[:3]]
    plan = forward_of(rung, *tensors)
    for again in (False, True):
        for n, (dO, hooks) in enumerate((*TO_BE_DIFFERENTIATED, COLUMNS)):
            entered.clear()
            got = gradients_by(partial(autograd.plain_attention, plan), tensors, dO, hooks)
            if again:
                # dO does not begin at a multiple of 16 bytes; LSE comes back with gaps; q, k, v and O must be copied
                assert bool(entered) == (n in (3, 5, 6))
            assert close(got, gradients_by(partial(in_python, plan), tensors, dO, hooks))
            want = gradients_by(partial(normal_attention, scale=0.3), [x.double() for x in tensors], dO)
            assert all(torch.allclose(x.double(), y, rtol=1e-4, atol=1e-5) for x, y in zip(got, want, strict=True))


def check_one_column(rung, inputs):
    """The strides of a single column mean nothing: such a dO is read where it is, or else the kernel would be told of another one."""
    rung = BACKENDS["fake"] = dataclasses.replace(rung, multiple_of=1)
    tensors = [x[..., :1].contiguous() for x in inputs]
    plan = forward_of(rung, *tensors)
    dO = torch.rand(2, 4, 9, 5).as_strided((2, 4, 9, 1), (180, 45, 5, 3))
    for _ in range(2):
        got = gradients_by(partial(autograd.plain_attention, plan), tensors, lambda O: dO)
        assert close(got, gradients_by(partial(in_python, plan), tensors, lambda O: dO))


class Listening(TorchDispatchMode):
    """Lists the operators that are called."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.called.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("error:There is a performance drop")  # PyTorch, of an op without a rule for vmap
def check_what_enters_python(attend, inputs, entered):
    """Transforms, modes and profilers see the op `backward`, as they do from the Function in Python."""
    O = attend(*inputs)
    dO = torch.randn_like(O)
    gradients = partial(torch.autograd.grad, O, inputs, retain_graph=True)
    want = gradients(dO)
    entered.clear()
    assert close(gradients(dO), want) and not entered
    with Listening() as mode:
        assert close(gradients(dO), want) and entered
    assert "flash_attention.backward.default" in mode.called
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert close(gradients(dO), want)
    assert any(event.key == "flash_attention::backward" for event in profile.key_averages())
    first = [x[0] for x in gradients(torch.stack([dO, 2 * dO]), is_grads_batched=True)]
    assert close(first, want), "is_grads_batched"
    mapped = torch.func.vmap(lambda dO: gradients(dO))(torch.stack([dO, 2 * dO]))
    assert close([x[0] for x in mapped], want), "vmap"
    assert close(gradients(torch._neg_view(-dO)), want), "a tensor whose memory is to be negated when it is read"
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        gradients(forward_ad.make_dual(dO, dO))
    entered.clear()
    assert close(gradients(dO), want) and not entered, "afterwards"


def check_differentiated_again(attend, inputs):
    """With create_graph=True the gradients are right, and refuse to be differentiated: no kernel does that."""
    O = attend(*inputs)
    dO = torch.randn_like(O)
    want = torch.autograd.grad(O, inputs, dO, retain_graph=True)
    for _ in range(2):
        got = torch.autograd.grad(O, inputs, dO, create_graph=True)
        assert close(got, want)
        with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
            torch.autograd.grad(got[0].sum(), inputs)


def check_graphs(attend, inputs):
    """Graphs are retained, freed and guarded against modifications in place like those of PyTorch's own operators; a part of the inputs
    may need no gradient, and hooks run."""
    q, k, v = inputs
    O = attend(q, k, v)
    O.sum().backward(retain_graph=True)
    once = q.grad.clone()
    O.sum().backward()
    assert torch.equal(q.grad, 2 * once)
    with pytest.raises(RuntimeError, match="a second time"):
        O.sum().backward()
    for modified in (0, 3):
        tensors = [x.detach().clone() for x in inputs]
        tensors[1].requires_grad_()
        tensors.append(attend(*tensors))
        with torch.no_grad():
            tensors[modified].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            tensors[3].sum().backward()
    k = k.detach()
    (dQ,) = torch.autograd.grad(attend(q, k, v).sum(), q)
    assert torch.equal(dQ, once) and attend(q, k, v).requires_grad
    O, seen = attend(q, k, v), []
    O.grad_fn.register_hook(lambda inputs, outputs: seen.append((inputs[1], outputs[0])))
    O.sum().backward()
    assert len(seen) == 1 and seen[0][1].shape == O.shape


@pytest.mark.parametrize("use_reentrant", [False, True])
def check_checkpoint(attend, inputs, use_reentrant):
    want = torch.autograd.grad(attend(*inputs).sin().sum(), inputs)
    for x in inputs:
        x.grad = None
    checkpoint(lambda *x: attend(*x).sin(), *inputs, use_reentrant=use_reentrant).sum().backward()
    assert all(torch.equal(x.grad, y) for x, y in zip(inputs, want, strict=True))


def check_compiled_autograd(attend, inputs):
    want = torch.autograd.grad((attend(*inputs) * 3).sum(), inputs)
    for _ in range(2):
        for x in inputs:
            x.grad = None
        loss = (attend(*inputs) * 3).sum()
        with compiled_autograd._enable(torch.compile(backend="eager")):
            loss.backward()
        assert close([x.grad for x in inputs], want)


def check_launch(attend, inputs, kernels):
    """Kernels are told of deterministic mode; their errors are raised, in the forward and in the backward."""
    asked, error = (ctypes.c_int.in_dll(kernels, name) for name in ("fake_deterministic", "fake_error"))
    for mode in (True, False):
        torch.use_deterministic_algorithms(mode)
        O = attend(*inputs)
        assert asked.value == mode
        for _ in range(2):
            asked.value = 2
            O.sum().backward(retain_graph=True)
            assert asked.value == mode
    error.value = 3
    for call in (partial(attend, *inputs), O.sum().backward):
        with pytest.raises(RuntimeError, match=r"CUDA error 3 at launch on cpu, .*: made up"):
            call()
    error.value = 0


def with_gaps(n: int, O: torch.Tensor) -> torch.Tensor:
    """Ones like O, with n times 16 bytes between rows."""
    return torch.ones(*O.shape[:3], O.shape[3] + 4 * n)[..., : O.shape[3]]


def check_threads(attend, inputs):
    """Several threads may use one plan at once, while it learns and forgets forms of dO."""
    dOs = [*(dO for dO, _ in TO_BE_DIFFERENTIATED), *(partial(with_gaps, n) for n in range(2 * shortcut.FEW))]
    want = [gradients_by(attend, inputs, dO) for dO in dOs]
    wrong = []

    def work(n: int) -> None:
        for i in range(200):
            which = (7 * n + i) % len(dOs)
            try:
                right = all(map(torch.equal, gradients_by(attend, inputs, dOs[which]), want[which]))
            except Exception as error:
                right = error
            if right is not True:
                wrong.append(right)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def check_nothing_leaks(rung, inputs):
    """A plan lives as long as its forward or a graph that needs it, and is freed with all that it holds."""
    plan = forward_of(rung, *inputs)
    O = autograd.plain_attention(plan, *inputs)
    alive = StorageWeakRef(plan.gradients.node.untyped_storage())
    del plan
    assert not alive.expired()
    O.sum().backward(retain_graph=True)
    O.sum().backward()
    del O
    assert alive.expired()
    packed, before = forward_of(rung, *inputs).launch.packed(0), resident_bytes()
    for _ in range(500):
        node.ops.plain_plan(inputs[0], packed, 2**20 * " ")  # settings of a megabyte
    assert resident_bytes() < before + 200 * 2**20


def resident_bytes() -> int:
    """The memory of this process that is not swapped out."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def check_few_backwards_are_kept(attend, inputs, entered):
    """A plan forgets backwards, rather than keep one for every form that it has seen."""
    O = attend(*inputs)
    for n in 2 * tuple(range(2 * shortcut.FEW)):
        torch.autograd.grad(O, inputs, with_gaps(n, O), retain_graph=True)
    assert len(entered) > 2 * shortcut.FEW


def check_other_launches_stay_in_python(rung, inputs):
    """An emulated launch tells the emulator what memory it may access, which only its Python does."""
    plan = forward_of(rung, *inputs)
    launch = type("Other", (Launch,), {})(*plan.launch)
    assert node.plan(plan._replace(launch=launch), inputs[0]) is None


# ---- how the library comes about


class Compiling:
    """In place of the process that compiles."""

    def __init__(self, *_, **__):
        self.code, self.stderr = None, io.BytesIO(b"what went wrong")

    def poll(self):
        return self.code

    def communicate(self):
        return None, self.stderr.read()


@pytest.fixture
def unloaded(rung, monkeypatch) -> list[Compiling]:
    """A process that has not looked for the library. Gets the processes that compile it."""
    started = []
    for name, value in {"_loaded": None, "_compiling": None}.items():
        monkeypatch.setattr(node, name, value)
    monkeypatch.setattr(node, "attend", getattr(node, "attend", None), raising=False)
    monkeypatch.setattr(node._implemented, "impl", lambda *_: None)
    monkeypatch.setattr(node.subprocess, "Popen", lambda *arguments, **_: started.append(Compiling()) or started[0])
    return started


def check_python_serves_until_it_is_there(rung, inputs, unloaded, monkeypatch):
    plan, found = forward_of(rung, *inputs), library.find
    with monkeypatch.context() as nothing:
        nothing.setattr(library, "find", lambda: None)
        for _ in range(3):
            assert "PlainAttentionBackward" in str(autograd.plain_attention(plan, *inputs).grad_fn)
    assert len(unloaded) == 1, "one process compiles"
    unloaded[0].code = 0
    assert found() and "PlainAttentionBackward" not in str(autograd.plain_attention(plan, *inputs).grad_fn)


def check_python_serves_without_it(rung, inputs, unloaded, monkeypatch, caplog):
    """Where it cannot be compiled, one warning says why."""
    plan = forward_of(rung, *inputs)
    monkeypatch.setattr(library, "find", lambda: None)
    monkeypatch.setattr(Compiling, "poll", lambda process: 1)
    for _ in range(3):
        assert "PlainAttentionBackward" in str(autograd.plain_attention(plan, *inputs).grad_fn)
    assert len(unloaded) == 1
    assert [record.message for record in caplog.records] == [caplog.records[0].message] and "what went wrong" in caplog.text


def check_found(kernels, tmp_path, monkeypatch):
    """It is found in the cache and, first, in the folder of prebuilt kernels; another PyTorch needs another one; pruning keeps it."""
    cached = library.find()
    assert cached.parent == build.cache_folder()
    prebuilt = tmp_path / cached.name
    prebuilt.touch()
    with monkeypatch.context() as set_up:
        set_up.setenv("FLASH_ATTENTION_KERNELS", str(tmp_path))
        assert library.find() == prebuilt
    with monkeypatch.context() as set_up:
        set_up.setattr(torch, "__version__", "2.0.0")
        assert library.find() is None
        set_up.setenv("FLASH_ATTENTION_CACHE", str(tmp_path))
        assert build.prune() == [prebuilt]
    prebuilt.touch()
    monkeypatch.setenv("FLASH_ATTENTION_CACHE", str(tmp_path))
    assert build.prune() == [] and prebuilt.exists()


def check_not_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(emulated, "find_compiler", lambda: None)
    with pytest.raises(BuildError, match="no C\\+\\+ compiler"):
        library.compiled(tmp_path)
    monkeypatch.setattr(emulated, "find_compiler", lambda: "false")
    with pytest.raises(BuildError, match="could not compile small calls"):
        library.compiled(tmp_path)
    assert not list(tmp_path.iterdir())


if __name__ == "__main__":
    run_alone(__file__)

"""If a kernel cannot be built, or the system is not Linux, another rung or the reference serves, and a warning says why.

On the CPU, with rungs that look up libraries and then let the reference compute.

python checks/check_fallback.py
"""

import contextlib
import re
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from harness import run_alone

from flash_attention import build, flash_attention
from flash_attention.backends import choose, cuda, libraries, masks, reference
from flash_attention.backends.launch import PARAMS
from flash_attention.build import BuildError, Specialisation
from flash_attention.call import Call, Form, Settings


def forget() -> None:
    for function in (libraries.library, masks.pack_mask_library, libraries.why_no_kernels):
        function.cache_clear()


@pytest.fixture
def rungs(monkeypatch):
    """Lets hopper, tensor_core and simple serve tensors on the CPU, unless a file that they need is in `broken`. `tried`: files that were
    to be compiled; `served`: which rung has computed what."""
    state = SimpleNamespace(broken=set(), tried=[], served=[])

    def build_one(kernel: Specialisation):
        state.tried.append(kernel.file)
        if kernel.file in state.broken:
            raise BuildError(f"nvcc could not compile {kernel}")
        return SimpleNamespace(params_size=lambda: (masks.PACK_PARAMS if kernel.file == masks.PACK_MASK else PARAMS).size)

    def plan(rung, which: int, call):
        rung._libraries(which, call)
        compute = reference.plan(which, call)

        def served(*tensors):
            state.served.append(f"{rung.name} {('forward', 'backward')[which]}")
            return compute(*tensors)

        return served

    def no_library(*_):
        return SimpleNamespace(attention=SimpleNamespace(), workspace_floats=SimpleNamespace(), pack_mask=SimpleNamespace())

    monkeypatch.setattr(build, "failures", {})
    monkeypatch.setattr("flash_attention.backends._warned", set())
    monkeypatch.setattr(build, "build", build_one)
    monkeypatch.setattr(build, "loaded", lambda built: SimpleNamespace(params_size=built.params_size, **vars(no_library())))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a stand-in")
    for name, value in (
        ("why_not", lambda rung, call: libraries.why_no_kernels(rung, 0)),
        ("worthwhile", lambda rung, *call: rung.name in ("hopper", "tensor_core", "simple")),
        ("plan", plan),
    ):
        monkeypatch.setattr(cuda.Rung, name, value)
    forget()
    yield state
    forget()


def gradients(backend: str, q, k, v, **options) -> tuple:
    torch.manual_seed(0)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    O = flash_attention(q, k, v, backend=backend, **options)
    return O, *torch.autograd.grad(O.sum(), (q, k, v))


FORWARDS = ["forward_4_hopper.cu", "forward_3_tensor_core.cu", "forward_1_simple.cu"]
BACKWARDS = [file.replace("forward", "backward") for file in FORWARDS]


@contextlib.contextmanager
def warned(*texts: str):
    """Exactly these warnings, each of which holds its text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    caught = [str(warning.message) for warning in caught]
    assert len(caught) == len(texts), caught
    for text, got in zip(texts, caught, strict=True):
        assert text in got, got


OPTIONS = {"plain": {}, "causal, dropout": {"causal": True, "dropout_p": 0.3}, "mask": {"mask": torch.arange(40).reshape(2, 20) % 3 > 0}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    ("broken", "served"),
    [
        ([], ("hopper", "hopper")),
        (FORWARDS[:1], ("tensor_core", "hopper")),
        (FORWARDS[:2], ("simple", "hopper")),
        (BACKWARDS[:1], ("hopper", "tensor_core")),
        (BACKWARDS[:2], ("hopper", "simple")),
        (FORWARDS[:1] + BACKWARDS[1:2], ("tensor_core", "hopper")),
        (FORWARDS[:2] + BACKWARDS[:2], ("simple", "simple")),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else f"{len(x)} broken",
)
def check_next_rung(rungs, broken, served, options):
    """If a kernel cannot be built, the next rung serves, for forward and backward separately, with one warning that says why; the build is
    not tried again."""
    q, k, v = torch.randn(3, 2, 3, 20, 16).unbind()
    truth = gradients("reference", q, k, v, **options)
    rungs.broken.update(broken)
    failed = [kind for kind, name in zip((FORWARDS, BACKWARDS), served, strict=True) if name != "hopper"]
    with warned(*(f"flash_attention runs on {served[kind is BACKWARDS]}: hopper" for kind in failed)):
        for _ in range(3):
            rungs.served.clear()
            assert all(map(torch.equal, gradients("cuda", q, k, v, **options), truth))
            assert rungs.served == [f"{served[0]} forward", f"{served[1]} backward"]
    assert len(rungs.tried) == len(set(rungs.tried)), f"built again: {rungs.tried}"


def check_mask_cannot_be_packed(rungs):
    """Without pack_mask.cu, a rung that reads bytes serves a masked call; other calls are unaffected."""
    q, k, v = torch.randn(3, 2, 3, 20, 16).unbind()
    rungs.broken.add(masks.PACK_MASK)
    with warned("runs on simple: hopper, tensor_core: nvcc could not compile pack_mask.cu sm_90a"):
        for _ in range(2):
            flash_attention(q, k, v, OPTIONS["mask"]["mask"], backend="cuda")
    flash_attention(q, k, v, backend="cuda")
    assert rungs.served == ["simple forward", "simple forward", "hopper forward"]


def check_by_name(rungs):
    """A rung asked for by name is not replaced, in the backward either; a group with no rung left says why."""
    q, k, v = torch.randn(3, 2, 3, 20, 16).unbind()
    rungs.broken.update((FORWARDS[1], *BACKWARDS))
    for _ in range(2):
        with pytest.raises(BuildError, match=r"could not compile forward_3_tensor_core\.cu"):
            flash_attention(q, k, v, backend="tensor_core")
        with pytest.raises(BuildError, match=r"could not compile backward_4_hopper\.cu"):
            gradients("hopper", q, k, v)
    assert len(rungs.tried) == len(set(rungs.tried)) == 3
    with pytest.raises(NotImplementedError, match=r"hopper: .*backward_4_hopper.*tensor_core: .*backward_3.*simple: .*backward_1"):
        gradients("cuda", q, k, v)


def check_ops_and_transforms(rungs):
    """The ops, which compiled graphs call with the original name, and functorch use the next rung, too."""
    q, k, v = torch.randn(3, 2, 3, 20, 16).unbind()
    O, LSE = reference.forward(Settings(0.25), q, k, v, None, None, None)
    rungs.broken.update((FORWARDS[0], BACKWARDS[0]))
    with warned("runs on tensor_core: hopper"):
        for _ in range(2):
            results = torch.ops.flash_attention.forward(q, k, v, None, None, None, *Settings(0.25, backend="cuda"))
            assert torch.equal(results[0], O)
            assert torch.equal(results[1], LSE)
    with warned("runs on tensor_core: hopper"):
        torch.ops.flash_attention.backward(O, None, q, k, v, None, None, O, LSE, None, *Settings(0.25, backend="cuda"))
    with warned():
        torch.func.grad(lambda q: flash_attention(q, k, v, backend="cuda").sum())(q)
    assert {name.split()[0] for name in rungs.served} == {"tensor_core"}
    with pytest.raises(BuildError):
        torch.ops.flash_attention.forward(q, k, v, None, None, None, *Settings(0.25, backend="hopper"))


def check_none_takes_the_reference(rungs, monkeypatch):
    """None on a CUDA device, where no kernel can be built: the reference, one warning, and each reason once."""
    q = Form(torch.Size((2, 3, 20, 16)), (960, 320, 16, 1), torch.float16, torch.device("cuda:0"))
    call = Call(q, q, q, None, None, Settings(1.0))
    assert choose(None, call) == "hopper"

    def no_nvcc(kernel: Specialisation):
        rungs.tried.append(kernel.file)
        raise BuildError("nvcc was not found")

    monkeypatch.setattr(build, "build", no_nvcc)
    with contextlib.suppress(BuildError):
        build.load(Specialisation("forward_4_hopper.cu", "90a", 64, "float16"), PARAMS.size)
    with warned("flash_attention runs on the slow reference: hopper, tensor_core, simple: nvcc was not found"):
        assert [choose(None, call) for _ in range(3)] == ["reference"] * 3
    assert rungs.tried == FORWARDS


def check_another_system(rungs, monkeypatch):
    """On Windows a plain call runs on the reference, a kernel asked for by name is refused, and nothing is built; each says why."""
    monkeypatch.setattr(sys, "platform", "win32")
    q = Form(torch.Size((2, 3, 20, 16)), (960, 320, 16, 1), torch.float16, torch.device("cuda:0"))
    call = Call(q, q, q, None, None, Settings(1.0))
    reason = "the kernels need Linux (on Windows: WSL 2), this is win32"
    with pytest.warns(UserWarning, match="slow reference.*" + re.escape(reason)):
        assert choose(None, call) == "reference"
    with pytest.raises(NotImplementedError, match=re.escape(reason)):
        choose("hopper", call)
    monkeypatch.undo()
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(BuildError, match=re.escape(reason)):
        build.build(Specialisation("forward_1_simple.cu", "75", 64, "float16"))


if __name__ == "__main__":
    run_alone(__file__)

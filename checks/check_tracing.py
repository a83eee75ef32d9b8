"""Tools that inspect a call instead of computing it: compilers, exporters, tracers, shape inference, counters, TorchFunctionModes. Whatever
works with torch's own attention works with this one.

python checks/check_tracing.py [--backend reference]
"""

import math

import numpy
import pytest
import torch
from harness import Case, dtype_served, run_alone, skip_unless_masks
from torch._subclasses import FakeTensorMode
from torch.export import Dim, export
from torch.overrides import TorchFunctionMode
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

from flash_attention import FlashAttention, flash_attention
from flash_attention.backends import BACKENDS

SHAPE = {"B": 2, "H": 4, "Nq": 9, "Nk": 9, "D": 16}


def tensors(target, **settings):
    return Case(**{**SHAPE, "dtype": dtype_served(target)} | settings).inputs(target.device)[:3]


def close(got, want):
    torch.testing.assert_close(got, want, atol=1e-5 if want.dtype == torch.float32 else 1e-2, rtol=0)


# ---- arguments that change from call to call


@pytest.mark.parametrize("dynamic", (None, True), ids=("automatic", "dynamic"))
def check_compiled_scale(target, dynamic):
    """Another scale at each call, a float or an integer, with and without a gradient; one that is not finite is refused as ever."""
    torch.compiler.reset()
    q, k, v = tensors(target)
    q.requires_grad_(dynamic is None)

    def attend(scale):
        return flash_attention(q, k, v, scale=scale, backend=target.backend)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for scale in (0.1, -0.3, 2):
        close(compiled(scale), attend(scale))
    if dynamic is None:
        gradients = (torch.autograd.grad(f(-0.3).float().sin().sum(), q)[0] for f in (compiled, attend))
        close(*gradients)
    with pytest.raises(Exception, match="finite"):
        compiled(math.nan)


@pytest.mark.parametrize("name, dtype, D, words", (("mma", "float32", 64, "float32"), ("hopper_wide", "float16", 520, "up to 512")))
@pytest.mark.parametrize("gradients", (False, True))
def check_compiled_call_is_refused(name, dtype, D, words, gradients):
    """In a compiled graph the op raises a backend's refusals, as in an eager call, before anything is built."""
    torch.compiler.reset()
    q, k, v = (torch.randn(1, 2, 9, D, dtype=getattr(torch, dtype), requires_grad=gradients) for _ in range(3))

    def attend(q, k, v):
        return flash_attention(q, k, v, backend=f"emulated:{name}")

    for call in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        with pytest.raises(NotImplementedError, match=f"cannot serve this call: emulated:{name}: .*{words}"):
            call(q, k, v)


def check_compiled_masks(target):
    """dynamic=True: one graph for masks of all lengths, those equal to the number of heads or to the batch too."""
    skip_unless_masks(target)
    torch.compiler.reset()

    def attend(*arguments):
        return flash_attention(*arguments, backend=target.backend)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for N in (17, 9, 4, 2):
            mask = torch.rand(2, 4, N, N, generator=torch.Generator().manual_seed(0)).to(target.device) < 0.7
            arguments = *tensors(target, Nq=N, Nk=N), mask
            close(compiled(*arguments), attend(*arguments))


class Attend(torch.nn.Module):
    def forward(self, q, k, v, mask):
        return flash_attention(q, k, v, mask)


@pytest.mark.parametrize("strict", (False, True))
def check_exported_masks(strict):
    """Batch, heads and length of a (B, H, N, N) mask may have any sizes, also equal ones: tracing infers no condition between them."""
    B, H, N = (Dim(name, min=1 if name != "N" else 2, max=64) for name in "BHN")
    sizes = {0: B, 1: H, 2: N}
    q, mask = torch.randn(2, 3, 9, 8), torch.rand(2, 3, 9, 9) < 0.7
    program = export(Attend(), (q, q, q, mask), dynamic_shapes=(sizes, sizes, sizes, sizes | {3: N}), strict=strict).module()
    for b, h, n in ((2, 3, 9), (5, 5, 5), (1, 7, 7), (7, 1, 2)):
        q, mask = torch.randn(b, h, n, 8), torch.rand(b, h, n, n) < 0.7
        close(program(q, q, q, mask), flash_attention(q, q, q, mask))


def check_exported_causality():
    """A causality that depends on a length (SymBool)."""

    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return flash_attention(q, k, v, causal=q.shape[2] > 1)

    q = torch.randn(2, 3, 9, 8)
    program = export(Layer(), (q, q, q), dynamic_shapes=({2: Dim("N", min=2, max=64)},) * 3).module()
    for n in (2, 9, 33):
        x = torch.randn(2, 3, n, 8)
        close(program(x, x, x), flash_attention(x, x, x, causal=True))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def check_jit_trace(tmp_path):
    """A layer with trainable weights: the trace is the same twice, computes anew, has gradients, and can be saved."""
    layer = FlashAttention(32, heads=4, dim_head=8, causal=True)
    x = torch.randn(2, 9, 32)
    traced = torch.jit.trace(layer, x)  # torch.jit.trace traces twice and compares
    torch.jit.save(traced, tmp_path / "traced.pt")
    for call in (traced, torch.jit.load(tmp_path / "traced.pt")):
        for y in (2 * x, torch.randn(3, 12, 32)):
            close(call(y), layer(y))
    weights = tuple(layer.parameters())
    for got, want in zip(*(torch.autograd.grad(f(x).sin().sum(), weights) for f in (traced, layer)), strict=True):
        close(got, want)


# ---- shapes without data


def no_computation(monkeypatch):
    def forward(*_):
        raise AssertionError("a tensor without data reached the backend")

    monkeypatch.setattr(BACKENDS["reference"], "forward", forward)
    monkeypatch.setattr(BACKENDS["reference"], "backward", forward)


@pytest.mark.parametrize("backend", (None, "cuda", "reference"))
def check_meta(monkeypatch, backend):
    """Shape inference is fast, whichever backend will compute: nothing is allocated, no tile is computed."""
    no_computation(monkeypatch)
    q, k, v = (torch.empty(1, 8, 1 << 20, 64, device="meta", requires_grad=True) for _ in range(3))
    for dropout_p in (0.0, 0.1):
        O, LSE = flash_attention(q, k, v, causal=True, dropout_p=dropout_p, return_lse=True, backend=backend)
        assert (O.device.type, O.shape, LSE.shape) == ("meta", q.shape, q.shape[:3])
        assert all(x.shape == q.shape for x in torch.autograd.grad(O.sum(), (q, k, v)))
        with torch.no_grad():
            assert flash_attention(q, k, v, dropout_p=dropout_p, backend=backend).is_meta
    with pytest.raises(ValueError, match="warp9"):
        flash_attention(q, k, v, backend="warp9")
    with pytest.raises(ValueError, match="head size"):
        flash_attention(q, k[..., :8], v)


@pytest.mark.parametrize("backend", (None, "cuda", "hopper", "reference"))
def check_fake_cuda(monkeypatch, backend):
    """FakeTensors that stand for CUDA tensors, on a machine with a GPU or without: inside their mode, and outside."""
    no_computation(monkeypatch)
    with FakeTensorMode():
        q, k, v = (torch.empty(2, 4, 9, 16, dtype=torch.float16, device="cuda") for _ in range(3))
        mask = torch.ones(2, 9, dtype=torch.bool, device="cuda")
        inside = [flash_attention(q, k, v, mask, dropout_p=p, backend=backend) for p in (0.0, 0.1)]
    outside = [flash_attention(q, k, v, mask, dropout_p=p, backend=backend) for p in (0.0, 0.1)]
    for O in (*inside, *outside):
        assert (O.device.type, O.shape, O.dtype, type(O)) == ("cuda", q.shape, q.dtype, type(q))


# ---- counted


@pytest.mark.parametrize("device", ("cpu", "meta"))
@pytest.mark.parametrize(("Hkv", "Dv", "causal"), [(4, 16, False), (4, 16, True), (2, 16, False), (1, 24, False)])
def check_flops(device, Hkv, Dv, causal):
    """FlopCounterMode counts what torch's own formulas count for its own attention; the second derivative's are those of its products."""
    shapes = (2, 4, 9, 16), (2, Hkv, 13, 16), (2, Hkv, 13, Dv)
    q, k, v = (torch.randn(shape, device=device, requires_grad=True) for shape in shapes)
    many = [x if x[1] == 4 else (2, 4, *x[2:]) for x in shapes]  # not every version of torch's formulas knows grouped heads

    def counted(call):
        with FlopCounterMode(display=False) as counter:
            result = call()
        return counter.get_total_flops(), result

    flops, O = counted(lambda: flash_attention(q, k, v, causal=causal))
    assert flops == flop_counter.sdpa_flop_count(*many) > 0
    flops, _ = counted(lambda: torch.autograd.grad(O.sum(), (q, k, v), retain_graph=True))
    assert flops == flop_counter.sdpa_backward_flop_count(tuple(O.shape), *many) > 0
    if Dv == 16:
        alike = (torch.empty(shape, device="meta") for shape in many)
        assert (
            counted(lambda: torch.ops.aten._scaled_dot_product_flash_attention(*alike, 0.0, causal))[0]
            == counted(lambda: flash_attention(q, k, v, causal=causal))[0]
        )


def check_flops_of_the_second_derivative(monkeypatch):
    """The operations of its products, counted while they run."""
    q, k, v = (torch.randn(2, 4, n, d, requires_grad=True) for n, d in ((9, 16), (13, 16), (13, 24)))
    totals = []
    reference = BACKENDS["reference"].second_backward

    def second_backward(*arguments):
        with FlopCounterMode(display=False) as counter:
            results = reference(*arguments)
        totals.append(counter.get_total_flops())
        return results

    monkeypatch.setattr(BACKENDS["reference"], "second_backward", second_backward)
    first = torch.autograd.grad(flash_attention(q, k, v).sin().sum(), (q, k, v), create_graph=True)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(sum(x.sin().sum() for x in first), (q, k, v))
    (second,) = totals
    assert counter.get_flop_counts()["Global"][torch.ops.flash_attention.second_backward] == second > 0


# ---- modes and subclasses that intercept calls


def check_modes():
    """A TorchFunctionMode sees one call, with its arguments, and may answer it."""
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    mask = torch.ones(1, 5, dtype=torch.bool)
    calls = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.append((func, args, kwargs))
            return func(*args, **(kwargs or {}))

    with Mode(), Mode():
        O, LSE = flash_attention(q, k, v, mask, scale=0.3, return_lse=True)
    assert [func for func, *_ in calls] == [flash_attention] * 2
    assert all(x is y for x, y in zip(calls[0][1], (q, k, v, mask), strict=True))
    assert calls[0][2]["scale"] == 0.3 and calls[0][2]["return_lse"]
    for x, y in zip((O, LSE), flash_attention(q, k, v, mask, scale=0.3, return_lse=True), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("place", range(4))
def check_subclasses(place):
    """So does a subclass of Tensor with a `__torch_function__`, wherever it stands; one without is an ordinary tensor."""
    arguments = [*torch.randn(3, 1, 2, 5, 8), torch.ones(1, 5, dtype=torch.bool)]
    want = flash_attention(*arguments)
    seen = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    arguments[place] = arguments[place].as_subclass(Watched)
    O = flash_attention(*arguments)
    assert seen[0] is flash_attention and type(O) is Watched
    assert torch.equal(O.as_subclass(torch.Tensor), want)


def check_default_device():
    """torch.set_default_device is a TorchFunctionMode: under it, and compiled under it, the result is the same."""
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    want = flash_attention(q, k, v, causal=True)
    torch.compiler.reset()
    compiled = torch.compile(lambda q, k, v: flash_attention(q, k, v, causal=True), fullgraph=True, backend="aot_eager")
    with torch.device("meta"):  # the device of tensors created without one
        assert torch.equal(flash_attention(q, k, v, causal=True), want)
        assert flash_attention(q, k, v, dropout_p=0.5).device.type == "cpu"
        assert torch.equal(compiled(q, k, v), want)


@pytest.mark.parametrize("return_lse", (False, True))
def check_fx(return_lse):
    """torch.fx records one call of the function, which can be compiled and computes anew."""

    class Layer(torch.nn.Module):
        def forward(self, q, k, v, mask):
            if return_lse:
                O, LSE = flash_attention(2 * q, k, v, mask, return_lse=True)
                return O + LSE[..., None]
            return flash_attention(2 * q, k, v, mask, causal=True)

    traced = torch.fx.symbolic_trace(Layer())
    assert [node.target for node in traced.graph.nodes].count(flash_attention) == 1
    arguments = *torch.randn(3, 1, 2, 5, 8), torch.ones(1, 5, dtype=torch.bool)
    assert torch.equal(traced(*arguments), Layer()(*arguments))


# ---- numbers of other kinds


@pytest.mark.parametrize(
    "settings",
    [
        {"causal": numpy.bool_(True)},
        {"causal": numpy.array([1, 0]).any()},
        {"scale": numpy.float16(0.5)},
        {"scale": numpy.float64(0.5)},
        {"scale": numpy.int64(2)},
        {"scale": numpy.array(0.5)},
        {"dropout_p": numpy.float32(0.5)},
        {"dropout_p": numpy.int64(0)},
        {"block_size": numpy.int64(2)},
    ],
    ids=str,
)
def check_numpy_scalars(settings):
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    results = []
    for options in (settings, {name: x.item() for name, x in settings.items()}):
        torch.manual_seed(0)
        results.append(flash_attention(q, k, v, **options))
    assert torch.equal(*results)


if __name__ == "__main__":
    run_alone(__file__)

"""`use_flash_attention()` beside torch's own function: any call gives the same result or the same kind of error, and modes,
tracers and subclasses see torch's own function.

python checks/check_sdpa.py [--full]

One file because every check compares the same two outcomes, with the patch and without it.
"""

import math
import sys
from contextlib import ExitStack, nullcontext

import numpy
import pytest
import torch
from harness import run_alone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.overrides import TorchFunctionMode

from flash_attention import flash_attention
from flash_attention.integrations import sdpa
from flash_attention.integrations.sdpa import use_flash_attention

ORIGINAL = functional.scaled_dot_product_attention
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture
def served(monkeypatch) -> list:
    """One entry for each call that reached `flash_attention()`. Afterwards everything must be as it was."""
    calls = []
    monkeypatch.setattr(sdpa, "flash_attention", lambda *args, **options: calls.append(options) or flash_attention(*args, **options))
    yield calls
    assert functional.scaled_dot_product_attention is ORIGINAL, "torch's own function was not put back"
    assert not torch._C._len_torch_function_stack(), "a TorchFunctionMode was left behind"


def outcome(*args, **kwargs):
    """(O, gradients), or the type of the exception, of the current scaled_dot_product_attention, looked up as users do."""
    leaves = [x for x in (*args[:3], *kwargs.values()) if isinstance(x, torch.Tensor) and x.requires_grad]
    try:
        O = functional.scaled_dot_product_attention(*args, **kwargs)
    except Exception as error:
        return type(error)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(O.shape, generator=generator).to(O)
    return O.detach(), torch.autograd.grad((O * weights).sum(), leaves, allow_unused=True) if leaves and O.requires_grad else ()


def compare(*args, numbers: bool = True, **kwargs) -> None:
    """The same call on torch's own function and inside the `with`. numbers: False where dropout makes them random."""
    want = outcome(*args, **kwargs)
    with use_flash_attention():
        got = outcome(*args, **kwargs)
    if isinstance(want, type) or isinstance(got, type):
        assert got is want, f"{got} instead of {want}"
        return
    for x, y in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
        if x is None or y is None:
            assert x is y
            continue
        assert (x.shape, x.dtype, x.device, type(x)) == (y.shape, y.dtype, y.device, type(y))
        if numbers and not x.is_meta:
            size = max(1.0, float(y.nan_to_num().abs().max())) if y.numel() else 1.0
            torch.testing.assert_close(x, y, rtol=0, atol=TOLERANCE[y.dtype] * size, equal_nan=True)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + math.prod(shape)))


Q, K, V = (randn(2, 4, 9, 16, seed=n) for n in range(3))
K12 = randn(2, 4, 12, 16)
SOME = randn(9, 9) > 0
MANY = randn(2, 8, 9, 16)  # heads of grouped-query attention
# Positional arguments, keywords, whether flash_attention() serves the call.
CALLS = {
    "all by name": ((), {"value": V, "key": K, "query": Q}, True),
    "all by position": ((Q, K, V, SOME, 0.0, False), {}, True),
    "two dimensions": ((Q[0, 0], K[0, 0], V[0, 0], SOME), {}, True),
    "one dimension": ((Q[0, 0, 0],) * 3, {}, False),
    "no dimensions": ((Q[0, 0, 0, 0],) * 3, {}, False),
    "query without heads": ((Q[0, 0], K, V), {}, True),
    "keys without batch": ((Q, K[0], V[0]), {}, True),
    "batches that do not broadcast": ((Q, randn(3, 4, 9, 16), randn(3, 4, 9, 16)), {}, False),
    "heads that do not broadcast": ((Q, K[:, :2], V[:, :2]), {}, False),
    "key heads that divide, not asked for": ((MANY, K, V), {}, False),
    "head sizes differ": ((Q, K[..., :8], V), {}, False),
    "head size 0": ((Q[..., :0], K[..., :0], V), {}, False),
    "value size 0": ((Q, K, V[..., :0]), {}, False),
    "no heads": ((Q[:, :0], K[:, :0], V[:, :0]), {}, False),
    "no batch": ((Q[:0], K[:0], V[:0]), {}, False),
    "no batch of five": ((Q[None, :0], K[None, :0], V[None, :0]), {}, False),
    "no queries": ((Q[:, :, :0], K, V), {}, False),
    "no keys": ((Q, K[:, :, :0], V[:, :, :0]), {}, False),
    "no keys, causal": ((Q, K[:, :, :0], V[:, :, :0]), {"is_causal": True}, False),
    "grouped": ((MANY, K, V), {"enable_gqa": True}, True),
    "grouped, three dimensions": ((MANY[0], K[0], V[0], SOME), {"enable_gqa": True}, True),
    "grouped, five dimensions": ((MANY[None], K[None], V[None]), {"enable_gqa": True}, True),
    "grouped, two dimensions": ((Q[0, 0], K[0, 0], V[0, 0]), {"enable_gqa": True}, False),
    "grouped, a batch that broadcasts": ((MANY[:1], K, V), {"enable_gqa": True}, True),
    "grouped, 4 and 2 heads": ((MANY, K, V[:, :2]), {"enable_gqa": True}, False),
    "grouped, 3 heads": ((MANY, K[:, :3], V[:, :3]), {"enable_gqa": True}, False),
    "grouped, more key heads": ((K[:, :1], K, V), {"enable_gqa": True}, False),
    "mask and causal": ((Q, K, V, SOME, 0.0, True), {}, False),
    "mask without dimensions": ((Q, K, V, SOME[0, 0]), {}, False),
    "mask of one dimension": ((Q, K, V, SOME[0]), {}, False),
    "mask of a column": ((Q, K, V, SOME[:, :1]), {}, True),
    "mask of too many dimensions": ((Q, K, V, SOME[None, None, None]), {}, False),
    "mask of three dimensions for two": ((Q[0, 0], K[0, 0], V[0, 0], SOME[None]), {}, False),
    "mask of another batch": ((Q, K, V, SOME.expand(3, 1, 9, 9)), {}, False),
    "mask of the values' batch": ((Q[:1], K[:1], V, SOME.expand(2, 1, 9, 9)), {}, False),
    "mask of another length": ((Q, K, V, SOME[:5]), {}, False),
    "mask of nothing": ((Q, K, V, torch.zeros(9, 9, dtype=torch.bool)), {}, True),
    "mask of floats": ((Q, K, V, randn(9, 9)), {}, True),
    "mask of floats, heads share": ((Q, K, V, randn(2, 1, 9, 9).requires_grad_()), {}, True),
    "mask of floats that hides": ((Q, K, V, randn(9, 9).masked_fill(randn(9, 9) > 0.5, -math.inf)), {}, True),
    "mask of floats, two dimensions": ((Q[0, 0], K[0, 0], V[0, 0]), {"attn_mask": randn(9, 1).requires_grad_()}, True),
    "mask of floats, five dimensions": ((Q[None], K[None], V[None]), {"attn_mask": randn(2, 1, 1, 9).requires_grad_()}, True),
    "mask of floats of the values' batch": ((Q[:1], K[:1], V, randn(2, 1, 9, 9)), {}, False),
    "mask of floats and causal": ((Q, K, V, randn(9, 9), 0.0, True), {}, False),
    "mask of doubles": ((Q, K, V, randn(9, 9).double()), {}, False),
    "mask of ints": ((Q, K, V, SOME.long()), {}, False),
    "mask with a gradient": ((Q, K, V), {"attn_mask": randn(9, 9).requires_grad_()}, True),
    "mask that is a list": ((Q, K, V, SOME.tolist()), {}, False),
    "mask that is sparse": ((Q, K, V, SOME.to_sparse()), {}, False),
    "causal_lower_right": ((Q, K12, K12, causal_lower_right(9, 12)), {}, True),
    "causal_lower_right, more rows": ((K12, Q, Q), {"attn_mask": causal_lower_right(12, 9)}, True),
    "causal_lower_right, square": ((Q, K12, K12, causal_lower_right(9, 9)), {}, True),
    "causal_lower_right, other lengths": ((Q, K12, K12, causal_lower_right(12, 9)), {}, False),
    "causal_lower_right, grouped": ((MANY, K12, K12), {"attn_mask": causal_lower_right(9, 12), "enable_gqa": True}, True),
    "causal_lower_right, three dimensions": ((Q[0], K12[0], K12[0], causal_lower_right(9, 12)), {}, True),
    "causal_lower_right and causal": ((Q, K, V, causal_lower_right(9, 9)), {"is_causal": True}, False),
    "causal_upper_left": ((Q, K12, K12, causal_upper_left(9, 12)), {}, True),
    "causal_upper_left, more rows": ((K12, Q, Q, causal_upper_left(12, 9)), {}, True),
    "causal_upper_left, other lengths": ((Q, K12, K12, causal_upper_left(5, 5)), {}, True),
    "scale 0": ((Q, K, V), {"scale": 0.0}, True),
    "scale 1": ((Q, K, V), {"scale": 1}, True),
    "scale −1": ((Q, K, V), {"scale": -1.0}, True),
    "scale True": ((Q, K, V), {"scale": True}, False),
    "scale ∞": ((Q, K, V), {"scale": math.inf}, False),
    "scale NaN": ((Q, K, V), {"scale": math.nan}, False),
    "scale of NumPy": ((Q, K, V), {"scale": numpy.float64(0.3)}, True),
    "scale a tensor": ((Q, K, V), {"scale": torch.tensor(0.3)}, True),
    "scale a tensor of int": ((Q, K, V), {"scale": torch.tensor(1)}, True),
    "scale a tensor with a gradient": ((Q, K, V), {"scale": torch.tensor(0.3, requires_grad=True)}, False),
    "scale a tensor of one dimension": ((Q, K, V), {"scale": torch.tensor([0.3])}, False),
    "scale a word": ((Q, K, V), {"scale": "auto"}, False),
    "dropout 1": ((Q, K, V, None, 1.0), {}, False),
    "dropout −0.1": ((Q, K, V, None, -0.1), {}, False),
    "dropout 1.5": ((Q, K, V, None, 1.5), {}, False),
    "dropout NaN": ((Q, K, V, None, math.nan), {}, False),
    "dropout False": ((Q, K, V, None, False), {}, True),
    "dropout None": ((Q, K, V, None, None), {}, False),
    "dropout a word": ((Q, K, V), {"dropout_p": "x"}, False),
    "causal 1": ((Q, K, V), {"is_causal": 1}, False),
    "causal None": ((Q, K, V), {"is_causal": None}, False),
    "causal of NumPy": ((Q, K, V), {"is_causal": numpy.bool_(True)}, False),
    "causal a tensor": ((Q, K, V), {"is_causal": torch.tensor(True)}, False),
    "grouped 1": ((Q, K, V), {"enable_gqa": 1}, False),
    "dtypes differ": ((Q, K.half(), V), {}, False),
    "ints": ((Q.int(), K.int(), V.int()), {}, False),
    "complex": ((Q.cfloat(), K.cfloat(), V.cfloat()), {}, False),
    "sparse": ((Q.to_sparse(), K, V), {}, False),
    "meta": ((Q.to("meta"), K.to("meta"), V.to("meta")), {}, True),
    "devices differ": ((Q, K.to("meta"), V), {}, False),
    "None": ((None, K, V), {}, False),
    "a list": ((Q.tolist(), K, V), {}, False),
    "a parameter": ((torch.nn.Parameter(Q), K, V), {}, True),
    "two arguments": ((Q, K), {}, False),
    "too many": ((Q, K, V, None, 0.0, False, 1.0), {}, False),
    "twice": ((Q, K, V), {"query": Q}, False),
    "unknown": ((Q, K, V), {"window": 3}, False),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("args", "kwargs", "is_served"), CALLS.values(), ids=CALLS)
def check_odd_calls(served, args, kwargs, is_served):
    no_heads = args and isinstance(args[0], torch.Tensor) and args[0].dim() == 4 and not args[0].shape[1]
    if no_heads and torch.__version__ < "2.12":
        pytest.skip("torch's own function divides by the number of heads, and ends the process")
    compare(*args, **kwargs)
    assert len(served) == is_served


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtypes", ["float64 float32 float32", "float32 float64 float32", "float64", "float32 bfloat16 float16"])
def check_autocast(served, dtypes):
    """Under autocast, torch casts every tensor except float64; afterwards dtypes must agree."""
    names = (dtypes.split() * 3)[:3]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compare(*(x.to(getattr(torch, name)) for x, name in zip((Q, K, V), names, strict=True)))
    assert len(served) == (dtypes not in ("float64 float32 float32", "float32 float64 float32"))


@st.composite
def calls(draw) -> tuple[list, dict]:
    """q, k, v of 2 to 5 dimensions, mostly ones that fit; then every option, mostly a valid one."""
    mostly = st.sampled_from
    dims = draw(st.integers(2, 5))
    batch = draw(st.lists(mostly([1, 2, 2, 3, 3, 0]), min_size=max(dims - 3, 0), max_size=max(dims - 3, 0)))
    Hkv, group, E, Ev = (draw(st.integers(1, 3)) for _ in range(4))
    E, Lq, Lk = draw(mostly([E] * 9 + [0])), draw(st.integers(0, 6)), draw(st.integers(0, 6))

    def shape(heads: int, length: int, size: int) -> list[int]:
        own = [draw(mostly([n, n, n, 1])) for n in batch][draw(mostly([0, 0, 0, len(batch)])) :]
        return [*own, *([draw(mostly([*[heads] * 8, 1, 2]))] if dims > 2 else []), length, size]

    Ek = draw(mostly([E] * 9 + [E + 1]))  # one Lk for key and value: torch's own function reads beyond a shorter one
    shapes = shape(Hkv * group, Lq, E), shape(Hkv, Lk, Ek), shape(Hkv, Lk, Ev)
    dtype = draw(mostly([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    other = draw(mostly([dtype] * 15 + [torch.float32]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    q, k, v = (torch.randn(s, generator=generator).to(d) for s, d in zip(shapes, (dtype, other, dtype), strict=True))
    for x in (q, k, v):
        x.requires_grad_(draw(st.booleans()))
    options = {}
    mask = draw(mostly(["none", "none", "bool", "bool", "float", "lower right", "upper left"]))
    if mask in ("bool", "float"):
        full = [*batch, *([Hkv * group] if dims > 2 else []), Lq, Lk]
        size = [draw(mostly([n, n, 1])) for n in full][draw(st.integers(0, len(full) - 1)) :]
        numbers = torch.randn(size, generator=generator)
        options["attn_mask"] = numbers > 0 if mask == "bool" else numbers.to(dtype)
    elif mask != "none":
        options["attn_mask"] = (causal_lower_right if mask == "lower right" else causal_upper_left)(Lq, Lk)
    for name, values in (
        ("is_causal", [False, False, True, 1]),
        ("scale", [None, None, 0.5, -1.0, 0.0, torch.tensor(0.7)]),
        ("dropout_p", [0.0] * 8 + [0.25, 1.0, 1.5]),
        ("enable_gqa", [group > 1, group > 1, False, True]),
    ):
        if draw(st.booleans()):
            options[name] = draw(mostly(values))
    return [q, k, v], options


@pytest.mark.filterwarnings("ignore")
def check_any_call(served, full):
    """Calls generated by hypothesis: the same numbers and gradients, or the same kind of error."""

    examples = 3000 if full else 300

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    @given(call=calls())
    def check(call):
        tensors, options = call
        compare(*tensors, **options, numbers=not 0 < options.get("dropout_p", 0) < 1)

    check()
    assert len(served) > examples / 4, f"only {len(served)} of {examples} calls were served"


# ---- modes and subclasses that intercept calls


class Spy(TorchFunctionMode):
    """What a mode sees, and whether torch's own function is then the one in the module."""

    def __init__(self):
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, functional.scaled_dot_product_attention, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def saw_one_call(calls: list, args: tuple, kwargs: dict) -> None:
    ((func, in_module, got_args, got_kwargs),) = calls
    assert func is ORIGINAL
    assert in_module is ORIGINAL, "comparing with what stands in the module does not recognise the function"
    assert len(got_args) == len(args) and all(x is y for x, y in zip(got_args, args, strict=True))
    assert got_kwargs == kwargs


@pytest.mark.parametrize("where", ("inside", "outside", "both"))
@pytest.mark.parametrize("kind", ("served", "not served"))
def check_modes(served, where, kind):
    """Every TorchFunctionMode sees the call as it was written; below them it is served."""
    args, kwargs = ((Q, K, V), {"is_causal": True}) if kind == "served" else ((Q, K, V, None, 1.0), {})
    want = ORIGINAL(*args, **kwargs)
    before, within = [Spy()] if where != "inside" else [], [Spy(), Spy()] if where != "outside" else []
    with ExitStack() as stack:
        for context in (*before, use_flash_attention(), *within):
            stack.enter_context(context)
        got = functional.scaled_dot_product_attention(*args, **kwargs)
    for spy in (*before, *within):
        saw_one_call(spy.calls, args, kwargs)
    torch.testing.assert_close(got, want, atol=3e-6, rtol=0)
    assert len(served) == (kind == "served")


def check_default_device(served):
    """torch.device(…) as a context and torch.set_default_device are TorchFunctionModes too."""
    torch.set_default_device("cpu")
    try:
        with use_flash_attention(), torch.device("cpu"):
            functional.scaled_dot_product_attention(Q, K, V)
    finally:
        torch.set_default_device(None)
    assert len(served) == 1


@pytest.mark.parametrize("place", (0, 2, 3))
def check_subclasses(served, place):
    """A subclass with a `__torch_function__` gets the same as without the `with`, also in the calls that it makes itself."""
    calls = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is ORIGINAL:
                calls.append((func, functional.scaled_dot_product_attention, args, kwargs or {}))
            return super().__torch_function__(func, types, args, kwargs)

    args = [Q, K, V, SOME]
    args[place] = args[place].as_subclass(Watched)
    with use_flash_attention():
        got = functional.scaled_dot_product_attention(*args, scale=0.3)
    saw_one_call(calls, args, {"scale": 0.3})
    assert type(got) is Watched and not served
    assert torch.equal(got.as_subclass(torch.Tensor), ORIGINAL(Q, K, V, SOME, scale=0.3))


def check_a_handler_that_raises(served):
    """An exception in a `__torch_function__` leaves the `with` intact."""

    class Refusing(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            raise KeyError(func)

    with use_flash_attention():
        for _ in range(2):
            with pytest.raises(KeyError), Refusing():
                functional.scaled_dot_product_attention(Q, K, V)
        functional.scaled_dot_product_attention(Q, K, V)
    assert len(served) == 1


def check_causal_bias_under_the_old_name(served):
    """Code that imported torch's function by name runs on torch's own, and so does a CausalBias of torch's."""
    bias = causal_lower_right(9, 12)
    want = ORIGINAL(Q, K12, K12, bias)
    recognises = type(bias).__dict__["__torch_function__"]
    with use_flash_attention():
        torch.testing.assert_close(ORIGINAL(Q, K12, K12, bias), want, atol=3e-6, rtol=0)
    assert type(bias).__dict__["__torch_function__"] is recognises


def check_fx_and_script(served):
    """torch.fx and torch.jit.script record torch's own function inside the `with`."""

    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    with use_flash_attention():
        graph = torch.fx.symbolic_trace(Layer())
        assert ORIGINAL in {node.target for node in graph.graph.nodes}
        if sys.version_info < (3, 14):  # which torch.jit.script does not support
            scripted = torch.jit.script(Layer())
            assert "aten::scaled_dot_product_attention" in str(scripted.graph)
            assert torch.equal(scripted(Q, K, V), ORIGINAL(Q, K, V, is_causal=True))
    assert torch.equal(graph(Q, K, V), ORIGINAL(Q, K, V, is_causal=True))


# ---- compiled, exported


def holds_the_with(q, k, v, mask, bias):
    with use_flash_attention():
        O = functional.scaled_dot_product_attention(q, k, v, mask) + functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return O, functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def check_compiled_with(served):
    """A compiled function that contains the `with`, in one graph: calls inside are served, with a float mask too, calls after it are
    not."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    arguments = Q.clone().requires_grad_(), K, V, SOME, randn(9, 9)
    want = torch.compile(holds_the_with, fullgraph=True, backend="aot_eager")(*arguments)
    torch.compile(holds_the_with, fullgraph=True, backend=backend)(*arguments)
    assert [node.target for node in graphs[0].graph.nodes].count(ORIGINAL) == 1
    assert len(served) == 4  # twice for each compilation
    for x, y in zip(holds_the_with(*arguments), want, strict=True):
        torch.testing.assert_close(x, y, atol=3e-6, rtol=0)
        gradients = (torch.autograd.grad(z.sin().sum(), arguments[0], retain_graph=True)[0] for z in (x, y))
        torch.testing.assert_close(*gradients, atol=1e-5, rtol=0)


@pytest.mark.parametrize("strict", (False, True))
@pytest.mark.parametrize("where", ("inside", "outside"))
def check_exported(strict, where):
    """torch.export of a model inside the `with`, or that holds it."""

    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            with use_flash_attention() if where == "inside" else nullcontext():
                return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    with use_flash_attention() if where == "outside" else nullcontext():
        program = torch.export.export(Layer(), (Q, K, V), strict=strict)
    assert "flash_attention.forward" in str(program.graph)
    torch.testing.assert_close(program.module()(Q, K, V), ORIGINAL(Q, K, V, is_causal=True), atol=3e-6, rtol=0)


def check_compiled_under_a_mode(served):
    """Compiled inside the `with` while a mode is active, the mode still sees the call, and it is still served."""

    class Doubling(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            O = func(*args, **(kwargs or {}))
            return 2 * O if func is ORIGINAL else O

    torch.compiler.reset()
    attend = torch.compile(lambda q, k, v: functional.scaled_dot_product_attention(q, k, v), fullgraph=True, backend="aot_eager")
    with use_flash_attention(), Doubling():
        got = attend(Q, K, V)
    torch.testing.assert_close(got, 2 * ORIGINAL(Q, K, V), atol=6e-6, rtol=0)
    assert len(served) == 1


# ---- patches by others


def check_patches_of_others(served):
    """A patch made inside the `with` stays; one made before serves as the fallback and is restored; in no order do they recurse
    endlessly."""
    other = {"scale": True}  # which is not served
    one, scaled = ORIGINAL(Q, K, V), ORIGINAL(Q, K, V, **other)

    def close(got, want):
        torch.testing.assert_close(got, want, atol=6e-6, rtol=0)

    def attend(**options):
        return functional.scaled_dot_product_attention(Q, K, V, **options)

    try:
        with use_flash_attention():
            ours = functional.scaled_dot_product_attention
            theirs = functional.scaled_dot_product_attention = lambda *args, **kwargs: 2 * ours(*args, **kwargs)
            close(attend(), 2 * one)
            with use_flash_attention():
                close(attend(**other), 2 * scaled)
            assert functional.scaled_dot_product_attention is theirs
        assert len(served) == 1
        assert functional.scaled_dot_product_attention is theirs, "the other patch is lost"
        close(attend(), 2 * one)
        assert len(served) == 1, "served after the `with`"
        with use_flash_attention():
            close(attend(), one)  # served
            close(attend(**other), 2 * scaled)  # falls back on theirs, which calls ours
            with Spy() as spy:
                close(attend(**other), 2 * scaled)
            assert ORIGINAL in {func for func, *_ in spy.calls}
        assert functional.scaled_dot_product_attention is theirs
        functional.scaled_dot_product_attention = ours  # undoing theirs restores what it found
        close(attend(), one)
        assert len(served) == 2, "served after the `with`"
        with use_flash_attention():
            close(attend(), one)
        assert functional.scaled_dot_product_attention is ORIGINAL
    finally:
        functional.scaled_dot_product_attention = ORIGINAL


if __name__ == "__main__":
    run_alone(__file__)

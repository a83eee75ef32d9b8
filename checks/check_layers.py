"""The layers: outputs and gradients against attention written out. (Against torch.nn.MultiheadAttention: check_multihead.py.)

python checks/check_layers.py [--backend reference]

One file because most of its checks compare with one `naive` layer, which takes every option.
"""

import copy
import math
import pickle
import subprocess
import sys
from functools import partial

import pytest
import torch
from harness import (
    HALF,
    Case,
    Problem,
    Report,
    Target,
    compilers,
    dtype_served,
    expect_error,
    limit,
    run_alone,
    skip_unless_masks,
    skip_unless_served,
)
from torch import Tensor, nn

from flash_attention import FlashAttention, ScaledDotProduct, flash_attention, layers
from flash_attention.backends import BACKENDS
from flash_attention.reference import flash2, visible

B, NQ, NK, DIM, HEADS, DIM_HEAD = 2, 21, 34, 24, 4, 16  # heads · dim_head differs from dim
KEYS = ["to_q.weight", "to_k.weight", "to_v.weight", "to_out.weight"]
KEYS_WITH_BIAS = [f"{name}.{kind}" for name in ("to_q", "to_k", "to_v", "to_out") for kind in ("weight", "bias")]
CAUSAL = pytest.mark.parametrize("causal", (False, True), ids=("general", "causal"))


def random(target: Target, *shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in the dtype that the backend serves, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(target.device, dtype_served(target))


def coins(target: Target, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(7)).to(target.device) < 0.7


def dropped(target: Target, p: float, Nk: int) -> Tensor:
    """The factors by which a layer multiplies its weights right after torch.manual_seed(4), (B, H, Nq, Nk)."""
    return Case(B=B, H=HEADS, dropout_p=p, seed=4).dropout(target.device).tile(slice(0, NQ), slice(0, Nk), torch.float64)


@torch.no_grad()
def randomise(module: nn.Module) -> nn.Module:
    """Weights that keep unit variance, so that softmax is not flat, and biases that are not 0."""
    generator = torch.Generator().manual_seed(3)
    for x in module.parameters():
        x.copy_(torch.randn(x.shape, generator=generator) * DIM**-0.5)
    return module


def layer_on(target: Target, dtype: torch.dtype | None = None, **settings) -> FlashAttention:
    """A layer on one backend; skips if the backend does not serve it."""
    dtype = dtype or dtype_served(target)
    x = torch.empty(B, HEADS, NQ, DIM_HEAD, dtype=dtype, device=target.device)
    skip_unless_served(target, x, x, x, None, settings.get("causal", False), settings.get("dropout", 0.0))
    return randomise(FlashAttention(DIM, HEADS, dim_head=DIM_HEAD, **{"backend": target.backend, **settings})).to(target.device, dtype)


def with_mask(layer, mask: Tensor | None = None):
    """The layer as a function of one to three streams, which it takes by name."""
    return lambda query, key=None, value=None: layer(query, key, value=value, mask=mask)


def naive(layer: FlashAttention, query, key=None, value=None, *, mask=None, Z=None, attend_in=None) -> Tensor:
    """The layer written out with the whole matrix. mask broadcasts to (B, H, Nq, Nk), Z is dropout's factor for each weight."""
    key = query if key is None else key
    value = key if value is None else value
    q, k, v = (project(x).unflatten(-1, (-1, DIM_HEAD)) for project, x in ((layer.to_q, query), (layer.to_k, key), (layer.to_v, value)))
    k, v = (x.repeat_interleave(layer.heads // x.shape[2], dim=2) for x in (k, v))  # (B, N, H, D)
    dtype = q.dtype
    q, k, v = (x.to(attend_in or dtype) for x in (q, k, v))
    S = torch.einsum("bihd, bjhd -> bhij", q, k) / math.sqrt(DIM_HEAD)
    allowed = torch.ones(S.shape, dtype=torch.bool, device=S.device) if mask is None else mask.expand(S.shape)
    if layer.causal:
        allowed = allowed.tril(S.shape[3] - S.shape[2])
    P = S.masked_fill(~allowed, torch.finfo(S.dtype).min).softmax(-1) * allowed.any(-1, keepdim=True)
    O = torch.einsum("bhij, bjhd -> bihd", P if Z is None else P * Z.to(P.dtype), v)
    return layer.to_out(O.flatten(2).to(dtype))


def solve(module: nn.Module, call, streams: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Output, and gradients of every stream and every parameter for a random dO, by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in zip(("query", "key", "value"), streams, strict=False)}
    O = call(*leaves.values())
    dO = torch.randn(O.shape, generator=torch.Generator().manual_seed(5)).to(O)
    leaves |= dict(module.named_parameters())
    return {"O": O.detach()} | dict(zip(leaves, torch.autograd.grad(O, leaves.values(), dO), strict=True))


def against(report: Report, what: str, got: dict, truth: dict, in_dtype: dict) -> None:
    """Every tensor by the harness's rule for its dtype."""
    dtype = got["O"].dtype
    assert got.keys() == truth.keys()
    for name, x in got.items():
        assert x.dtype == dtype, f"{what}: {name} is {x.dtype}"
        size_of = "to_k.weight" if name == "to_k.bias" else name  # to_k.bias moves all scores of a row alike: its gradient is 0
        report.compare(what, name, x, truth[name], limit(name, truth[size_of], in_dtype[size_of], dtype, DIM_HEAD))


def against_naive(report: Report, what: str, layer: FlashAttention, *streams: Tensor, mask=None, four=None, Z=None, attend_in=None) -> None:
    """The layer's output and gradients against `naive` in float64. `four`: the mask with four dimensions, if `mask` has not."""
    double = copy.deepcopy(layer).double()
    four = mask if four is None else four
    got = solve(layer, with_mask(layer, mask), streams)
    truth = solve(double, partial(naive, double, mask=four, Z=Z), tuple(x.double() for x in streams))
    against(report, what, got, truth, solve(layer, partial(naive, layer, mask=four, Z=Z, attend_in=attend_in), streams))


# ---- outputs and gradients


@CAUSAL
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.float16, torch.bfloat16), ids=str)
def check_layer(target, dtype, causal):
    """Self-attention, cross-attention with another length, separate streams of their own widths, grouped heads, bias; each dtype."""
    x, context, wide, narrow = (random(target, B, n, d, seed=n).to(dtype) for n, d in ((NQ, DIM), (NK, DIM), (NK, 40), (NK, 8)))
    report = Report(f"{target}: layers, {dtype}")
    plain = layer_on(target, dtype, causal=causal)
    against_naive(report, "self", plain, x)
    against_naive(report, "context", plain, x, context)
    against_naive(report, "context, shorter", plain, context, x)
    against_naive(report, "key and value", plain, x, context, context.flip(1))
    against_naive(report, "bias", layer_on(target, dtype, causal=causal, bias=True), x, context)
    for kv_heads in (1, 2):
        against_naive(report, f"kv_heads {kv_heads}", layer_on(target, dtype, causal=causal, kv_heads=kv_heads), x, context)
    against_naive(report, "key_dim", layer_on(target, dtype, causal=causal, key_dim=40), x, wide)
    against_naive(report, "key_dim, value_dim", layer_on(target, dtype, causal=causal, key_dim=40, value_dim=8), x, wide, narrow)
    report.verdict()


@CAUSAL
def check_masks(target, causal):
    """A key mask, masks of two, three and four dimensions."""
    skip_unless_masks(target)
    x, context = random(target, B, NQ, DIM), random(target, B, NK, DIM, seed=1)
    layer = layer_on(target, causal=causal, bias=True, kv_heads=2)
    report = Report(f"{target}: masks of a layer")
    keys = coins(target, B, NK)
    against_naive(report, "(B, Nk)", layer, x, context, mask=keys, four=keys[:, None, None])
    for shape in ((NQ, NK), (HEADS, NQ, NK), (B, 1, NQ, NK), (B, HEADS, NQ, NK)):
        against_naive(report, str(shape), layer, x, context, mask=coins(target, *shape))
    report.verdict()


def check_dead_row(target):
    """A row that may attend nothing gives to_out's bias, and its query no gradient; with and without tiles of one's own."""
    skip_unless_masks(target)
    x = random(target, B, NQ, DIM).requires_grad_()
    mask = coins(target, B, 1, NQ, NK)
    mask[0, :, 3], mask[1] = False, False
    for block_size in (None, 8) if target.backend == "reference" else (None,):
        layer = layer_on(target, bias=True, block_size=block_size)
        O = layer(x, random(target, B, NK, DIM, seed=1), mask=mask)
        assert torch.equal(O[0, 3], layer.to_out.bias)
        assert torch.equal(O[1], layer.to_out.bias.expand(NQ, DIM))
        (dX,) = torch.autograd.grad(O.sum(), x)
        assert not dX[0, 3].any()
        assert not dX[1].any()
        assert dX[0, :3].isfinite().all()
        assert dX[0, :3].any()


# ---- block_size


def only_reference(target: Target) -> None:
    if target.backend != "reference":
        pytest.skip("block_size makes a call run on the reference")


@CAUSAL
def check_block_size(target, causal, monkeypatch):
    """The same result for every block size, whether or not it divides the lengths, with masks, grouped heads and dropout. Tiles have that
    size, given at construction or set later; and no size changes the table of backends."""
    only_reference(target)
    asked, blocks = [], flash2.blocks
    for module in (flash2, visible):
        monkeypatch.setattr(module, "blocks", lambda start, stop, size: asked.append(size) or blocks(start, stop, size))
    x, context = random(target, B, NQ, DIM), random(target, B, NK, DIM, seed=1)
    keys = coins(target, B, NK)
    settings = {"causal": causal, "kv_heads": 2, "dropout": 0.3, "bias": True}
    Z = dropped(target, 0.3, NK)
    report = Report(f"{target}: block sizes")
    names, set_later = list(BACKENDS), layer_on(target, **settings)
    for size in (1, 5, 16, NQ, 1000):
        layer = layer_on(target, **settings, block_size=size) if size % 2 else set_later
        layer.block_size = size
        asked.clear()
        against_naive(report, f"block_size {size}", layer.eval(), x, context, mask=keys, four=keys[:, None, None])
        assert asked, "the tiled algorithm did not run"
        assert set(asked) == {size}, f"tiles of {sorted(set(asked))}, not {size}"
        torch.manual_seed(4)
        against_naive(report, f"block_size {size}, dropout", layer.train(), x, context, mask=keys, four=keys[:, None, None], Z=Z)
    assert list(BACKENDS) == names
    report.verdict()


def check_block_size_transforms(target):
    """vmap is a loop, and second derivatives are those of the reference's usual tiles."""
    only_reference(target)
    chunked, usual = (layer_on(target, block_size=size, causal=True) for size in (8, None))
    x = random(target, 3, B, NQ, DIM)
    torch.testing.assert_close(torch.func.vmap(chunked)(x), torch.stack([usual(each) for each in x]), rtol=0, atol=1e-5)

    def second(layer):
        X = x[0].clone().requires_grad_()
        (dX,) = torch.autograd.grad(layer(X).square().sum(), X, create_graph=True)
        return torch.autograd.grad(dX.square().sum(), X)[0]

    want = second(usual)
    torch.testing.assert_close(second(chunked), want, rtol=0, atol=1e-5 * float(want.abs().max()))


# ---- dtypes


def check_mixed_precision(target):
    """Attention in bfloat16, projections and result in float32: exactly that, and within the half types' rule of the truth."""
    probe = torch.empty(B, HEADS, NQ, DIM_HEAD, dtype=torch.bfloat16, device=target.device)
    skip_unless_served(target, probe, probe, probe, None, True, 0.0)
    layer = FlashAttention(DIM, HEADS, dim_head=DIM_HEAD, causal=True, mixed_precision=True, backend=target.backend)
    layer = randomise(layer).to(target.device)
    x = random(target, B, NQ, DIM).float()
    got = solve(layer, layer, (x,))
    assert all(value.dtype == torch.float32 for value in got.values())

    q, k, v = (project(x).unflatten(-1, (HEADS, DIM_HEAD)).transpose(1, 2).bfloat16() for project in (layer.to_q, layer.to_k, layer.to_v))
    by_hand = layer.to_out(flash_attention(q, k, v, causal=True, backend=target.backend).float().transpose(1, 2).flatten(2))
    assert torch.equal(got["O"], by_hand)

    double = copy.deepcopy(layer).double()
    truth = solve(double, partial(naive, double), (x.double(),))
    in_bfloat16 = solve(layer, partial(naive, layer, attend_in=torch.bfloat16), (x,))
    report = Report(f"{target}: mixed precision")
    for name, value in got.items():
        report.compare("mixed precision", name, value, truth[name], limit(name, truth[name], in_bfloat16[name], torch.bfloat16, DIM_HEAD))
    report.verdict()
    layer.mixed_precision = False
    if dtype_served(target) == torch.float32:
        assert not torch.equal(layer(x), got["O"])


def check_mixed_precision_dtype(target, monkeypatch):
    """Half types stay what they are, and a GPU without bfloat16 gets float16."""
    x = random(target, B, NQ, DIM).half()
    assert torch.equal(*(layer_on(target, torch.float16, mixed_precision=mixed)(x) for mixed in (False, True)))
    for capability, dtype in (((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert layers._half(torch.device("cuda")) == dtype
        assert layers._half(torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize("dtype", HALF, ids=str)
def check_autocast(target, dtype):
    """A float32 layer under autocast gives what its linear layers give there, and float32 gradients."""
    layer_on(target, dtype)  # skips what is not served
    layer = layer_on(Target("reference", target.device), torch.float32)
    layer.backend = target.backend
    x = random(target, B, NQ, DIM).float().requires_grad_()
    with torch.autocast(target.device, dtype=dtype):
        O = layer(x)
    assert O.dtype == dtype
    torch.testing.assert_close(O.double(), naive(layer, x).double(), rtol=0, atol=30 * torch.finfo(dtype).eps)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(O.sum(), (x, *layer.parameters())))


# ---- dropout


def check_dropout(target):
    """Dropout acts only in training mode, on attention weights, with torch's generator: output and gradients match those with the same
    mask."""
    p, x = 0.25, random(target, B, NQ, DIM)
    layer, without = layer_on(target, dropout=p).eval(), layer_on(target)
    assert torch.equal(layer(x), without(x))
    layer.train()
    torch.manual_seed(0)
    first, second = layer(x), layer(x)
    torch.manual_seed(0)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    assert not torch.equal(first, without(x))

    Z = dropped(target, p, NQ)
    assert (Z == 0).any()
    torch.manual_seed(4)
    report = Report(f"{target}: dropout in a layer")
    against_naive(report, "dropout", layer, x, Z=Z)
    report.verdict()


# ---- other duties of a module


@pytest.mark.parametrize("bias", (False, True))
def check_state_dict(target, bias):
    """Its names and shapes are fixed, and it carries all that the output depends on."""
    settings = {"bias": bias, "kv_heads": 2, "key_dim": 40, "value_dim": 8, "block_size": 16 if target.backend == "reference" else None}
    layer, other = layer_on(target, **settings), layer_on(target, **settings)
    state = layer.state_dict()
    assert list(state) == (KEYS_WITH_BIAS if bias else KEYS)
    assert [name for name, _ in layer.named_parameters()] == list(state)
    shapes = [tuple(state[name].shape) for name in KEYS]
    assert shapes == [(HEADS * DIM_HEAD, DIM), (2 * DIM_HEAD, 40), (2 * DIM_HEAD, 8), (DIM, HEADS * DIM_HEAD)]
    x = random(target, B, NQ, DIM), random(target, B, NK, 40), random(target, B, NK, 8)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert not torch.equal(with_mask(layer)(*x), with_mask(other)(*x))
    other.load_state_dict(pickle.loads(pickle.dumps(state)), strict=True)
    assert torch.equal(with_mask(layer)(*x), with_mask(other)(*x))


def check_copies(target):
    """deepcopy and pickle; a copy's weights are its own. A layer that was pickled when block_size was called chunk_size loads."""
    x = random(target, B, NQ, DIM)
    for size in (None, 11) if target.backend == "reference" else (None,):
        layer = layer_on(target, causal=True, block_size=size)
        O = layer(x)
        older = copy.copy(layer)
        older.__dict__["chunk_size"] = older.__dict__.pop("block_size")
        for twin in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), pickle.loads(pickle.dumps(older))):
            assert twin.block_size == size and not hasattr(twin, "chunk_size")
            assert torch.equal(twin(x), O)
            with torch.no_grad():
                twin.to_q.weight.zero_()
            assert not torch.equal(twin(x), O)
        assert torch.equal(layer(x), O)


def check_another_process(tmp_path):
    """A layer with tiles of its own, pickled or exported here, gives the same there."""
    layer = randomise(FlashAttention(DIM, HEADS, dim_head=DIM_HEAD, causal=True, block_size=11)).eval()
    x = torch.randn(B, NQ, DIM)
    torch.save([layer, x, layer(x)], tmp_path / "layer.pt")
    torch.export.save(torch.export.export(layer, (x,)), tmp_path / "layer.pt2")
    program = """
import sys, torch, flash_attention
layer, x, O = torch.load(sys.argv[1] + "/layer.pt", weights_only=False)
exported = torch.export.load(sys.argv[1] + "/layer.pt2").module()
torch.testing.assert_close(layer(x), O, rtol=0, atol=1e-6)
torch.testing.assert_close(exported(x), O, rtol=0, atol=1e-6)
print("same")
"""
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.stdout == "same\n", run.stdout + run.stderr


@pytest.mark.parametrize("flat", (True, False), ids=("flat", "by head"))
def check_replaced_projections(target, flat):
    """Queries and keys normalised head by head: a Sequential in place of to_q and to_k, whose output has the heads apart or side by side.
    Output and every gradient, the norms' own included."""

    def normalised(projection: nn.Linear, heads: int) -> nn.Sequential:
        norm = nn.RMSNorm(DIM_HEAD, eps=1e-3, device=projection.weight.device, dtype=projection.weight.dtype)
        parts = projection, nn.Unflatten(2, (heads, DIM_HEAD)), norm
        return nn.Sequential(*parts, nn.Flatten(2)) if flat else nn.Sequential(*parts)

    layer = layer_on(target, kv_heads=2, causal=True)
    layer.to_q, layer.to_k = normalised(layer.to_q, HEADS), normalised(layer.to_k, 2)
    reference = copy.deepcopy(layer)
    reference.to_q, reference.to_k = (nn.Sequential(*project[:3], nn.Flatten(2)) for project in (reference.to_q, reference.to_k))
    x, context = random(target, B, NQ, DIM), random(target, B, NK, DIM, seed=1)
    double = copy.deepcopy(reference).double()
    got = solve(layer, layer, (x, context))
    assert {"to_q.2.weight", "to_k.2.weight"} < got.keys()
    report = Report(f"{target}: normalised queries and keys")
    truth = solve(double, partial(naive, double), (x.double(), context.double()))
    against(report, "QK-norm", got, truth, solve(reference, partial(naive, reference), (x, context)))
    report.verdict()


@pytest.mark.parametrize("compiler", compilers())
@pytest.mark.parametrize("block_size", (None, 8))
def check_compile(target, block_size, compiler):
    """torch.compile(fullgraph=True): no break, the same output and gradients, in training mode too."""
    if block_size:
        only_reference(target)
    x, context = random(target, B, NQ, DIM), random(target, B, NK, DIM, seed=1)
    mask = coins(target, B, NK)
    layer = layer_on(target, causal=True, kv_heads=2, dropout=0.2, block_size=block_size)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    for training in (False, True) if compiler == "aot_eager" else (False,):  # inductor draws random numbers of its own
        layer.train(training)
        answers = []
        for call in (compiled, layer):
            torch.manual_seed(0)
            answers.append(solve(layer, partial(call, mask=mask), (x, context)))
        for name, got in answers[0].items():
            torch.testing.assert_close(got, answers[1][name], msg=lambda text, name=name: f"{name}: {text}")


def check_compile_mixed_precision(target):
    """The choice of the half type does not break the graph."""
    half = torch.empty(B, HEADS, NQ, DIM_HEAD, dtype=torch.bfloat16, device=target.device)
    skip_unless_served(target, half, half, half)
    x = random(target, B, NQ, DIM)
    layer = layer_on(target, mixed_precision=True)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def check_symbolic_trace():
    """torch.fx traces a model that contains a layer; the traced graph serves other lengths too."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = FlashAttention(DIM, HEADS, dim_head=DIM_HEAD, causal=True)

        def forward(self, x: Tensor, context: Tensor, keep: Tensor) -> Tensor:
            return self.layer(x) + self.layer(x, context, mask=keep)

    model = Model()
    traced = torch.fx.symbolic_trace(model)
    for n in (NQ, NK):
        call = torch.randn(B, n, DIM), torch.randn(B, NK, DIM), torch.rand(B, NK) < 0.7
        torch.testing.assert_close(traced(*call), model(*call))


# ---- without projections


@CAUSAL
def check_scaled_dot_product(target, causal):
    """Its output and gradients are attention's; it has no parameters, and drops only in training mode."""
    problem = Problem.of(Case(B=B, H=HEADS, Nq=NQ, Nk=NK, D=DIM_HEAD, causal=causal, dtype=dtype_served(target), mask="full"), target)
    attend = ScaledDotProduct(DIM_HEAD, dropout=0.5, causal=causal).eval()
    assert not attend.state_dict()
    q, k, v = (x.clone().requires_grad_() for x in (problem.q, problem.k, problem.v))
    O = attend(q, k, v, problem.mask)
    got = {"O": O} | dict(zip(("dQ", "dK", "dV"), torch.autograd.grad(O, (q, k, v), problem.dO), strict=True))
    want = Problem.solve(problem.case, problem.q, problem.k, problem.v, problem.mask, problem.dO, None)
    report = Report(f"{target}: ScaledDotProduct")
    for name, x in got.items():
        truth = getattr(want.truth, name)
        report.compare("ScaledDotProduct", name, x, truth, limit(name, truth, getattr(want.in_dtype, name), x.dtype, DIM_HEAD))
    report.verdict()

    torch.manual_seed(0)
    dropped = attend.train()(q, k, v)
    torch.manual_seed(0)
    assert torch.equal(dropped, attend(q, k, v))
    torch.manual_seed(0)
    assert torch.equal(dropped, flash_attention(q, k, v, causal=causal, dropout_p=0.5))
    assert not torch.equal(dropped, attend.eval()(q, k, v))


# ---- errors


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def layer(**settings) -> FlashAttention:
    return FlashAttention(8, 2, dim_head=4, **settings)


def changed(**attributes) -> FlashAttention:
    """A layer whose attributes are set after construction."""
    changed = layer()
    for name, value in attributes.items():
        setattr(changed, name, value)
    return changed


X, CONTEXT = zeros(2, 5, 8), zeros(2, 7, 8)
HEADED = zeros(2, 3, 5, 16)
# What is wrong → a call that does it, the error, words that its message must contain.
BAD = {
    "query of another width": (lambda: layer()(zeros(2, 5, 9)), ValueError, ["query", "(B, N, 8)", "(2, 5, 9)"]),
    "context of another width": (lambda: layer()(X, zeros(2, 7, 9)), ValueError, ["key", "(B, N, 8)", "(2, 7, 9)"]),
    "value of another width": (lambda: layer()(X, CONTEXT, value=zeros(2, 7, 4)), ValueError, ["value", "(B, N, 8)", "(2, 7, 4)"]),
    "self-attention with key_dim": (lambda: layer(key_dim=6)(X), ValueError, ["key", "(B, N, 6)", "(2, 5, 8)"]),
    "query without batch": (lambda: layer()(zeros(5, 8)), ValueError, ["query", "(B, N, 8)", "(5, 8)"]),
    "query with heads": (lambda: layer()(zeros(2, 2, 5, 8)), ValueError, ["query", "(B, N, 8)", "(2, 2, 5, 8)"]),
    "context without batch": (lambda: layer()(X, zeros(7, 8)), ValueError, ["key", "(B, N, 8)", "(7, 8)"]),
    "query is a list": (lambda: layer()([1.0]), TypeError, ["query", "torch.Tensor", "list"]),
    "mask in key's place": (lambda: layer()(X, zeros(2, 5, dtype=torch.bool)), ValueError, ["key", "(B, N, 8)", "(2, 5)"]),
    "mask in value's place": (lambda: layer()(X, CONTEXT, value=zeros(2, 7, dtype=torch.bool)), ValueError, ["value", "(2, 7)"]),
    "three streams by position": (
        lambda: layer()(X, CONTEXT, CONTEXT),
        TypeError,
        ["mask", "third positional", "(2, 7, 8)", "layer(query, key=key, value=value)", "(values, keys, queries)", "ChunkedFlashAttention"],
    ),
    "mask of 0 and 1": (lambda: layer()(X, mask=zeros(2, 5, dtype=torch.int64)), TypeError, ["mask", "torch.int64", "mask.bool()"]),
    "mask is a list": (lambda: layer()(X, mask=[True]), TypeError, ["mask", "torch.bool", "list"]),
    "key and context": (lambda: layer()(X, X, context=CONTEXT), TypeError, ["context", "key"]),
    "batches differ": (lambda: layer()(X, zeros(3, 7, 8)), ValueError, ["batch", "(2, 2, 5, 4)", "(3, 2, 7, 4)"]),
    "lengths differ": (lambda: layer()(X, CONTEXT, value=zeros(2, 6, 8)), ValueError, ["length", "(2, 2, 7, 4)", "(2, 2, 6, 4)"]),
    "mask of floats": (lambda: layer()(X, CONTEXT, mask=zeros(2, 7)), TypeError, ["mask", "torch.bool", "torch.float32"]),
    "mask of queries": (
        lambda: layer()(X, CONTEXT, mask=zeros(2, 5, dtype=torch.bool)),
        ValueError,
        ["mask", "(2, 5)", "(2, 7)", "(2, 2, 5, 7)"],
    ),
    "mask (B, Nq, Nk)": (lambda: layer()(zeros(3, 5, 8), mask=zeros(3, 5, 5, dtype=torch.bool)), ValueError, ["(3, 5, 5)", "(3, 2, 5, 5)"]),
    "mask by position": (lambda: layer()(X, CONTEXT, CONTEXT, zeros(2, 7, dtype=torch.bool)), TypeError, ["positional"]),
    "kv_heads does not divide": (lambda: FlashAttention(8, 6, dim_head=4, kv_heads=4), ValueError, ["kv_heads", "divide", "6", "4"]),
    "more kv_heads than heads": (lambda: layer(kv_heads=4), ValueError, ["kv_heads 4", "heads 2"]),
    "no kv_heads": (lambda: layer(kv_heads=0), ValueError, ["kv_heads", "positive", "0"]),
    "no heads": (lambda: FlashAttention(8, 0), ValueError, ["heads", "positive", "0"]),
    "negative width": (lambda: FlashAttention(-8), ValueError, ["dim", "positive", "-8"]),
    "half a head": (lambda: FlashAttention(8, dim_head=1.5), ValueError, ["dim_head", "positive", "1.5"]),
    "chunk of nothing": (lambda: layer(block_size=0), ValueError, ["block_size", "positive", "0"]),
    "chunk is a word": (lambda: layer(block_size="64"), ValueError, ["block_size", "positive", "'64'"]),
    "chunks on a kernel": (lambda: layer(block_size=64, backend="cuda"), ValueError, ["block_size", "reference", "'cuda'", "64"]),
    "chunks on a rung": (lambda: layer(block_size=64, backend="simple"), ValueError, ["block_size", "reference", "'simple'", "64"]),
    "dropout of everything": (lambda: layer(dropout=1.0), ValueError, ["dropout", "[0, 1)", "1.0"]),
    "negative dropout": (lambda: layer(dropout=-0.5), ValueError, ["dropout", "[0, 1)", "-0.5"]),
    "unknown backend": (lambda: layer(backend="warp9"), ValueError, ["backend", "'warp9'", *map(repr, BACKENDS), "'cuda'"]),
    "backend is a number": (lambda: layer(backend=1), ValueError, ["backend", "got 1"]),
    "unknown backend, set later": (lambda: changed(backend="warp9")(X), ValueError, ["backend", "'warp9'"]),
    "block of nothing, set later": (lambda: changed(block_size=0)(X), ValueError, ["block_size", "0"]),
    "block on a kernel, set later": (lambda: changed(block_size=64, backend="cuda")(X), ValueError, ["block_size", "'cuda'", "64"]),
    "to_q of another width": (lambda: changed(to_q=nn.Sequential(nn.Linear(8, 4)))(X), ValueError, ["to_q", "(B, N, 8)", "(2, 5, 4)"]),
    "to_k of more heads": (lambda: changed(to_k=nn.Linear(8, 16))(X), ValueError, ["to_k", "(B, N, 2, 4)", "(2, 5, 16)"]),
    "q of another head size": (lambda: ScaledDotProduct(64)(HEADED, HEADED, HEADED), ValueError, ["q", "(B, H, N, 64)", "(2, 3, 5, 16)"]),
    "v of another head size": (
        lambda: ScaledDotProduct(16)(HEADED, HEADED, zeros(2, 3, 5, 8)),
        ValueError,
        ["v", "(B, H, N, 16)", "(2, 3, 5, 8)"],
    ),
    "k without heads": (lambda: ScaledDotProduct(16)(HEADED, HEADED[:, 0], HEADED), ValueError, ["k", "(B, H, N, 16)", "(2, 5, 16)"]),
    "v is None": (lambda: ScaledDotProduct(16)(HEADED, HEADED, None), TypeError, ["v", "torch.Tensor", "NoneType"]),
    "its mask of floats": (lambda: ScaledDotProduct(16)(HEADED, HEADED, HEADED, zeros(2, 5)), TypeError, ["mask", "torch.float32"]),
    "head size 0": (lambda: ScaledDotProduct(0), ValueError, ["head_dim", "positive", "0"]),
    "its dropout of everything": (lambda: ScaledDotProduct(16, dropout=1.0), ValueError, ["dropout", "[0, 1)", "1.0"]),
}


@pytest.mark.parametrize(("call", "error", "words"), BAD.values(), ids=BAD)
def check_errors(call, error, words):
    expect_error(call, error, words)


if __name__ == "__main__":
    run_alone(__file__)

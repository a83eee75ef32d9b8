"""torch.func, torch.compile, autocast, second derivatives and the registration of the ops.

python checks/check_transforms.py [--backend reference]

One file because each transform is applied to the same few functions and compared with the same truth.
"""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from harness import Case, Problem, Report, Result, Target, compilers, dtype_served, limit, run_alone, skip_unless_masks, skip_unless_served
from torch._subclasses import FakeTensorMode
from torch.func import grad, jacrev, vjp, vmap
from torch.utils.checkpoint import checkpoint

from flash_attention import flash_attention
from flash_attention.backends import BACKENDS
from flash_attention.call import Settings
from flash_attention.reference import normal_attention, normal_attention_causal

CAUSAL = pytest.mark.parametrize("causal", (False, True), ids=("general", "causal"))
SMALL = {"B": 2, "H": 2, "Nq": 5, "Nk": 7, "D": 8}


def served(target: Target, **settings) -> Case:
    """A case in a dtype that the backend has."""
    return Case(**{"dtype": dtype_served(target), **settings})


def both(target: Target, case: Case):
    """(q, k, v, mask) → O of the backend, of naive attention; the latter in float64."""
    naive = normal_attention_causal if case.causal else normal_attention
    flash = partial(flash_attention, causal=case.causal, backend=target.backend)
    return flash, lambda q, k, v, mask=None: naive(q.double(), k.double(), v.double(), mask)


def compare(report: Report, what: str, got, want, naive_value, case: Case) -> None:
    """Tuples of gradients, by the rule of the dtype."""
    for name, x, y, z in zip(("dQ", "dK", "dV"), got, want, naive_value, strict=True):
        report.compare(what, name, x, y, limit(name, y.double(), z, case.dtype, case.D))


# ---- torch.func


@CAUSAL
def check_grad(target, causal):
    """grad, jacrev of a scalar, vjp, with LSE in the loss too."""
    case = served(target, Nq=33, Nk=65, D=32, causal=causal, mask="full")
    p = Problem.of(case, target)

    def outputs(q, k, v):
        return flash_attention(q, k, v, p.mask, causal=causal, return_lse=True, backend=target.backend)

    def loss(q, k, v):
        O, LSE = outputs(q, k, v)
        return (O.float() * p.dO).sum() + (LSE * p.dLSE).sum()

    O, LSE = outputs(p.q, p.k, p.v)
    (O_vjp, LSE_vjp), pull = vjp(outputs, p.q, p.k, p.v)
    assert torch.equal(O, O_vjp)
    assert torch.equal(LSE, LSE_vjp)
    report = Report(f"{target}: {case}")
    report.expect("grad", Result(O, LSE, *grad(loss, argnums=(0, 1, 2))(p.q, p.k, p.v)), p)
    report.expect("jacrev", Result(O, LSE, *jacrev(loss, argnums=(0, 1, 2))(p.q, p.k, p.v)), p)
    report.expect("vjp", Result(O, LSE, *pull((p.dO, p.dLSE))), p)
    report.verdict()


@CAUSAL
def check_jacobian(target, causal):
    """jacrev of O itself, one backward for each of its elements, mapped: the Jacobian of naive attention."""
    skip_unless_masks(target)
    case = served(target, **SMALL, causal=causal, mask="full")
    q, k, v, mask = case.inputs(target.device)
    flash, naive = both(target, case)
    every = {"argnums": (0, 1, 2)}
    got = jacrev(flash, **every)(q, k, v, mask)
    want = jacrev(naive, **every)(q.double(), k.double(), v.double(), mask)
    in_dtype = jacrev(normal_attention_causal if causal else normal_attention, **every)(q, k, v, mask)
    report = Report(f"{target}: jacrev of O, {case}")
    compare(report, "jacrev", got, want, in_dtype, case)
    report.verdict()
    chunks = jacrev(flash, **every, chunk_size=7)(q, k, v, mask)
    for name, x, y in zip(("dQ", "dK", "dV"), chunks, got, strict=True):
        torch.testing.assert_close(x, y, msg=lambda text, name=name: f"{name} in chunks: {text}")


# Axes of q, k, v and the mask that are mapped; None: not mapped.
IN_DIMS = [
    *[(0, 0, 0, 0), (0, 0, 0, None), (0, None, None, None), (None, 0, None, None), (None, None, 0, None), (None, None, None, 0)],
    *[(None, 0, 0, None), (0, None, 0, None), (0, None, None, 0), (1, 2, 0, 3), (-1, 3, None, 0), (4, 1, 2, 2)],
]


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
@CAUSAL
def check_vmap(target, causal, in_dims):
    """vmap over any of q, k, v and the mask, at any axis, is a loop; so is vmap of the gradient."""
    skip_unless_masks(target)
    n = 3
    case = served(target, Nq=33, Nk=65, H=4, Hkv=2, D=16, causal=causal)
    q, k, v, _ = case.inputs(target.device)
    mask = torch.rand(2, 1, 33, 65, generator=torch.Generator().manual_seed(1)).to(target.device) < 0.7
    arguments = []
    for x, dim in zip((q, k, v, mask), in_dims, strict=True):
        samples = torch.stack([x.roll(s, -1) for s in range(n)])
        arguments.append(x if dim is None else samples.movedim(0, dim))
    dO = case.gradient(target.device, *q.shape)

    def call(q, k, v, mask):
        return flash_attention(q, k, v, mask, causal=causal, return_lse=True, backend=target.backend)

    def gradients(q, k, v, mask):
        return grad(lambda q, k, v: (call(q, k, v, mask)[0] * dO).sum(), argnums=(0, 1, 2))(q, k, v)

    for what, f in (("call", call), ("gradient", gradients)):
        got = vmap(f, in_dims=in_dims)(*arguments)
        loop = [f(*(x if dim is None else x.select(dim, s) for x, dim in zip(arguments, in_dims, strict=True))) for s in range(n)]
        for n_output, (x, *samples) in enumerate(zip(got, *loop, strict=True)):
            tolerance = {"rtol": 0, "atol": 2e-6 * float(x[x.isfinite()].abs().max()) if case.dtype == torch.float32 else 4e-3}
            torch.testing.assert_close(
                x, torch.stack(samples), **tolerance, msg=lambda text, n=n_output, w=what: f"output {n} of {w}: {text}"
            )


@pytest.mark.parametrize("shape", [(2, 17), (1, 1, 9, 17), (2, 1, 1, 17), (1, 2, 9, 1)], ids=str)
def check_vmap_keeps_masks_small(target, shape, monkeypatch):
    """Under vmap too, a mask that broadcasts reaches the backend as a view: at most one copy per sample."""
    skip_unless_masks(target)
    seen = []
    backend = BACKENDS[target.backend]

    def noting(which, call):
        f, place = backend.plan(which, call), (3, 5)[which]
        return lambda *arguments: (seen.append(arguments[place].untyped_storage().nbytes()), f(*arguments))[1]

    watched = SimpleNamespace(why_not=backend.why_not, plan=noting)
    monkeypatch.setitem(BACKENDS, target.backend, watched)
    q, k, v, _ = served(target, Nq=9, Nk=17, D=16).inputs(target.device)
    mask = torch.ones(shape, dtype=torch.bool, device=target.device)
    vmap(lambda q: flash_attention(q, k, v, mask, backend=target.backend))(torch.stack([q, q, q]))
    jacrev(lambda q: flash_attention(q, k, v, mask, backend=target.backend)[0, 0, 0, :3])(q)
    assert len(seen) == 3
    assert max(seen) <= 3 * mask.numel(), f"a mask of {mask.numel()} bytes took {max(seen)} for 3 samples"


def check_vmap_nested(target):
    """vmap in vmap, each over other arguments; out_dims; vmap of flash_attention over heads kept outside."""
    case = served(target, B=2, H=2, Nq=9, Nk=13, D=16)
    q, k, v, _ = case.inputs(target.device)
    qs = torch.stack([q, q.roll(1, 2), q.roll(2, 2)])
    kvs = torch.stack([k, k.roll(1, 2)]), torch.stack([v, v.roll(1, 2)])
    f = partial(flash_attention, backend=target.backend)
    got = vmap(lambda q: vmap(lambda k, v: f(q, k, v), out_dims=1)(*kvs))(qs)
    want = torch.stack([torch.stack([f(q, k, v) for k, v in zip(*kvs, strict=True)], 1) for q in qs])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-3 if case.dtype == torch.float16 else 1e-6)


def check_vmap_dropout(target):
    """randomness="same": every sample drops the same elements; "different": each its own; "error", the default: an error."""
    case = served(target, B=1, H=2, Nq=33, Nk=33, D=16)
    q, k, v, _ = case.inputs(target.device)
    skip_unless_served(target, q, k, v, None, False, 0.5)
    many = torch.stack([q, q, q])

    def f(q):
        return flash_attention(q, k, v, dropout_p=0.5, backend=target.backend)

    torch.manual_seed(0)
    alone = f(q)
    torch.manual_seed(0)
    same = vmap(f, randomness="same")(many)
    assert all(torch.equal(x, alone) for x in same), "randomness='same' differs from the call without vmap"
    torch.manual_seed(0)
    different = vmap(f, randomness="different")(many)
    assert not torch.equal(different[0], different[1])
    assert not torch.equal(different[1], different[2])
    torch.manual_seed(0)
    assert torch.equal(vmap(f, randomness="different")(many), different), "not reproducible under torch.manual_seed"
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(f)(many)

    def loss(q, k, v):
        return flash_attention(q, k, v, dropout_p=0.5, backend=target.backend).float().square().sum()

    torch.manual_seed(0)
    want = grad(loss, argnums=(0, 1, 2))(q, k, v)
    torch.manual_seed(0)
    got = vmap(grad(loss, argnums=(0, 1, 2)), in_dims=(0, None, None), randomness="same")(many, k, v)
    for name, x, y in zip(("dQ", "dK", "dV"), got, want, strict=True):
        torch.testing.assert_close(x, y.expand_as(x), msg=lambda text, name=name: f"{name} under vmap: {text}")


# ---- second derivatives, on the reference


def only_reference(target: Target) -> None:
    if not hasattr(BACKENDS[target.backend], "second_backward"):
        pytest.skip(f"{target.backend} has no second derivative")


@CAUSAL
def check_hessian(target, causal):
    """jacrev of jacrev, and of naive attention: all nine blocks."""
    only_reference(target)
    case = Case(B=1, H=2, Nq=3, Nk=4, D=2, dtype=torch.float64, causal=causal)
    q, k, v, _ = case.inputs(target.device)
    mask = torch.rand(1, 2, 3, 4, generator=torch.Generator().manual_seed(2)).to(target.device) < 0.8
    weight = case.gradient(target.device, 1, 2, 3, 2)
    got, want = (
        jacrev(jacrev(lambda q, k, v, f=f: (f(q, k, v, mask) * weight).sum(), argnums=(0, 1, 2)), argnums=(0, 1, 2))(q, k, v)
        for f in both(target, case)
    )
    for a, row in enumerate(got):
        for b, block in enumerate(row):
            torch.testing.assert_close(
                block, want[a][b], rtol=1e-10, atol=1e-12, msg=lambda text, a=a, b=b: f"d²/d{'qkv'[a]}d{'qkv'[b]}: {text}"
            )
    assert want[0][1].abs().max() > 1e-3


SECOND = {
    "general": {},
    "causal": {"causal": True},
    "causal, more rows": {"causal": True, "Nq": 3, "Nk": 2},
    "dead rows": {"mask": "dead rows"},
    "key mask": {"mask": "key"},
    "grouped heads": {"Hkv": 1, "Dv": 1},
    "dropout": {"dropout_p": 0.4},
    "everything": {"causal": True, "mask": "full", "Hkv": 1, "Dv": 1, "dropout_p": 0.4, "scale": 0.7},
}


@pytest.mark.parametrize("lse", (False, True), ids=("O", "O and LSE"))
@pytest.mark.parametrize("settings", SECOND.values(), ids=SECOND)
def check_gradcheck(target, settings, lse):
    """First and second derivatives against finite differences in float64."""
    only_reference(target)
    case = Case(**{"B": 1, "H": 2, "Nq": 2, "Nk": 3, "D": 2, "dtype": torch.float64, "seed": 3} | settings)
    q, k, v, mask = case.inputs(target.device)

    def f(q, k, v):
        torch.manual_seed(0)
        options = {"causal": case.causal, "scale": case.scale, "dropout_p": case.dropout_p, "return_lse": True, "backend": target.backend}
        O, LSE = flash_attention(q, k, v, mask, **options)
        return (O, LSE.masked_fill(LSE.isneginf(), 0)) if lse else O

    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def check_no_second_derivative(target, monkeypatch):
    """Where a backend's backward cannot be differentiated again, trying to is an error that says so, never a wrong number."""
    name = target.backend
    if hasattr(BACKENDS[name], "second_backward"):
        name = "without second derivative"
        monkeypatch.setitem(BACKENDS, name, SimpleNamespace(**{f: getattr(BACKENDS[target.backend], f) for f in ("why_not", "plan")}))
    x = served(target, **SMALL).inputs(target.device)[0].requires_grad_()
    (first,) = torch.autograd.grad(flash_attention(x, x, x, backend=name).float().square().sum(), x, create_graph=True)
    assert first.isfinite().all()
    with pytest.raises(NotImplementedError, match=r"again.*reference"):
        torch.autograd.grad(first.float().square().sum(), x)
    with pytest.raises(NotImplementedError, match=r"again.*reference"):
        jacrev(jacrev(lambda x: flash_attention(x, x, x, backend=name).float().square().sum()))(x.detach())


# ---- torch.compile


@pytest.mark.parametrize("compiler", compilers())
def check_compile(target, compiler):
    """torch.compile(fullgraph=True), forward and backward: with a mask, causal, LSE, and operations around it."""
    case = served(target, Nq=33, Nk=65, H=4, Hkv=2, D=16, causal=True, mask="full")
    p = Problem.of(case, target)

    def f(q, k, v, mask):
        O, LSE = flash_attention(q * 2, k / 2, v, mask, causal=True, return_lse=True, backend=target.backend)
        return O + 0, LSE + 0

    q, k, v = (x.clone().requires_grad_() for x in (p.q, p.k, p.v))
    torch.compiler.reset()
    O, LSE = torch.compile(f, fullgraph=True, backend=compiler)(q, k, v, p.mask)
    report = Report(f"{target}: {compiler}, {case}")
    report.expect(compiler, Result(O, LSE, *torch.autograd.grad((O, LSE), (q, k, v), (p.dO, p.dLSE))), p)
    report.verdict()


def check_compile_dynamic(target):
    """One compilation for every length."""
    f = torch.compile(partial(flash_attention, causal=True, backend=target.backend), fullgraph=True, backend="aot_eager", dynamic=True)
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for Nq, Nk in ((40, 56), (33, 90), (128, 128)):
            case = served(target, Nq=Nq, Nk=Nk, D=16, causal=True)
            p = Problem.of(case, target)
            q, k, v = (x.clone().requires_grad_() for x in (p.q, p.k, p.v))
            O = f(q, k, v)
            assert O.shape == (2, 2, Nq, 16)
            report = Report(f"{target}: dynamic, {case}")
            want = Problem.solve(case, p.q, p.k, p.v, None, p.dO, None)
            report.expect("compiled", Result(O, want.truth.LSE, *torch.autograd.grad(O, (q, k, v), p.dO)), want)
            report.verdict()


def check_compile_dropout(target):
    """A compiled call draws a new mask every time, and the same one under the same seed."""
    q, k, v, _ = served(target, Nq=32, Nk=32, D=32).inputs(target.device)
    skip_unless_served(target, q, k, v, None, False, 0.5)
    torch.compiler.reset()
    f = torch.compile(partial(flash_attention, dropout_p=0.5, backend=target.backend), fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    one, two = f(q, k, v), f(q, k, v)
    torch.manual_seed(0)
    again = f(q, k, v)
    assert not torch.equal(one, two), "two compiled calls dropped the same elements"
    assert torch.equal(one, again), "torch.manual_seed does not govern a compiled call"

    x, eye = q.clone().requires_grad_(), torch.eye(32, dtype=q.dtype, device=q.device).expand_as(v).clone().requires_grad_()
    O = f(x, k, eye)  # V = identity: O is P∘Z itself, and dV = Oᵀ dO if the backward drops what the forward dropped
    dO = torch.randn_like(O)
    torch.testing.assert_close(
        torch.autograd.grad(O, eye, dO)[0], O.detach().mT @ dO, rtol=1e-3, atol=1e-3 if q.dtype.itemsize == 2 else 1e-5
    )
    assert (O == 0).any()


# ---- autocast, meta tensors, what is saved, how the ops are registered


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def check_autocast(target, dtype):
    """Inputs are cast as torch casts them for its own attention; gradients arrive in the leaves' float32."""
    case = Case(Nq=33, Nk=65, D=16, dtype=dtype)
    q, k, v, _ = case.inputs(target.device)
    skip_unless_served(target, q, k, v, None, False, 0.0)
    leaves = [x.float().requires_grad_() for x in (q, k, v)]
    with torch.autocast(target.device, dtype=dtype):
        O, LSE = flash_attention(*leaves, return_lse=True, backend=target.backend)
        mixed = flash_attention(leaves[0], k, leaves[2], backend=target.backend)  # as after a linear layer under autocast
        sdpa = torch.nn.functional.scaled_dot_product_attention(*leaves)
    assert O.dtype == mixed.dtype == sdpa.dtype == dtype
    assert LSE.dtype == torch.float32
    assert torch.equal(O, mixed)
    p = Problem.of(case, target)
    gradients = torch.autograd.grad(O, leaves, p.dO)
    assert all(x.dtype == torch.float32 for x in gradients)
    want = Problem.solve(case, q, k, v, None, p.dO, None)
    report = Report(f"{target}: autocast, {case}")
    report.expect("autocast", Result(O, LSE, *gradients), want)
    report.verdict()
    with torch.autocast(target.device, enabled=False), pytest.raises(TypeError, match="one dtype"):
        flash_attention(leaves[0], k, leaves[2], backend=target.backend)


def check_autocast_leaves_float64(target):
    case = Case(Nq=33, Nk=65, D=16, dtype=torch.float64)
    q, k, v, _ = case.inputs(target.device)
    skip_unless_served(target, q, k, v, None, False, 0.0)
    with torch.autocast(target.device, dtype=torch.bfloat16):
        assert flash_attention(q, k, v, backend=target.backend).dtype == torch.float64


@pytest.mark.parametrize("kind", ("fake", "meta"))
@pytest.mark.parametrize("layout", ("as made", "transposed"))
def check_shapes_without_data(layout, kind):
    """Fake and meta tensors, as torch.compile and deferred initialisation use them, give the shapes, dtypes and strides of a real call."""

    def call(device):
        q = torch.empty(2, 9, 4, 16, dtype=torch.float16, device=device).transpose(1, 2)
        k, v = (torch.empty(2, 2, 7, n, dtype=torch.float16, device=device) for n in (16, 24))
        q, k, v = (x.requires_grad_() for x in (q if layout == "transposed" else q.contiguous(), k, v))
        O, LSE = flash_attention(q, k, v, causal=True, return_lse=True, backend="reference")
        return O, LSE, *torch.autograd.grad(O, (q, k, v), torch.empty_like(O))

    real = call("cpu")
    with FakeTensorMode() if kind == "fake" else nullcontext():
        shapes = call("cpu" if kind == "fake" else "meta")
    for name, x, y in zip(Result._fields, shapes, real, strict=True):
        assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride()), f"{name}: strides {x.stride()}, real {y.stride()}"


@pytest.mark.parametrize("settings", ({}, {"causal": True}, {"mask": "key"}, {"dropout_p": 0.2}), ids=str)
def check_saved_tensors(target, settings):
    """The forward saves nothing of size N × N for the backward, not even an expanded mask; without gradients it saves nothing."""
    N = 256
    case = served(target, B=2, H=2, Nq=N, Nk=N, D=16, **settings)
    q, k, v, mask = case.inputs(target.device)
    skip_unless_served(target, q, k, v, mask, case.causal, case.dropout_p)
    options = {"causal": case.causal, "dropout_p": case.dropout_p, "backend": target.backend}
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    sizes = []

    def pack(x):
        sizes.append(x.untyped_storage().nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        O = flash_attention(*inputs, mask, **options)
    limit = q.untyped_storage().nbytes()
    assert sizes, "nothing was saved"
    assert max(sizes) <= limit, f"a saved tensor has {max(sizes)} bytes; q has {limit}, an N × N tensor of bool {4 * N * N}"
    assert O.grad_fn is not None

    del sizes[:]
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        O = flash_attention(*inputs, mask, **options)
    detached = flash_attention(q, k, v, mask, **options)
    assert not sizes
    assert O.grad_fn is None
    assert detached.grad_fn is None


OPCHECK = {
    "plain": {},
    "causal, grouped heads": {"causal": True, "H": 4, "Hkv": 2, "Dv": 24},
    "key mask": {"mask": "key"},
    "everything": {"mask": "dead rows", "dropout_p": 0.25, "causal": True},
}


@pytest.mark.parametrize("settings", OPCHECK.values(), ids=OPCHECK)
def check_opcheck(target, settings):
    """torch.library.opcheck on all three ops: schema, fake tensors, autograd registration, and their use under torch.compile."""
    case = served(target, **{"B": 2, "H": 2, "Nq": 9, "Nk": 14, "D": 16} | settings)
    q, k, v, mask = case.inputs(target.device)
    skip_unless_served(target, q, k, v, mask, case.causal, case.dropout_p)
    dLSE = None
    if settings:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        dLSE = torch.randn(q.shape[:3], device=target.device)
    if mask is not None:
        mask = (mask[:, None, None] if mask.dim() == 2 else mask).expand(2, case.H, 9, 14)
    seed = torch.tensor(1234, device=target.device) if case.dropout_p else None
    options = (None, seed, *Settings(0.25, case.dropout_p, right=0 if case.causal else None, backend=target.backend))
    ops = torch.ops.flash_attention
    O, LSE = ops.forward(q, k, v, mask, *options)
    dO = torch.randn_like(O)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(ops.forward.default, (*leaves, mask, *options))
    torch.library.opcheck(ops.backward.default, (dO, dLSE, q, k, v, mask, None, O, LSE, *options[1:]))
    if hasattr(BACKENDS[target.backend], "second_backward"):
        g = (torch.randn_like(x) for x in (q, k, v))
        dLSE = torch.randn_like(LSE)
        torch.library.opcheck(ops.second_backward.default, (*g, dO, dLSE, q, k, v, mask, *options))


# ---- modes, tracers and profilers that intercept a call must see the op


@CAUSAL
def check_batched_gradients(target, causal):
    """Several dO in one backward, as torch.autograd.grad and torch.autograd.functional.jacobian map them."""
    case = served(target, **SMALL, causal=causal)
    p = Problem.of(case, target)
    q, k, v = (x.clone().requires_grad_() for x in (p.q, p.k, p.v))
    outputs = flash_attention(q, k, v, causal=causal, return_lse=True, backend=target.backend)
    for output, gradient in zip(outputs, (p.dO, torch.randn_like(outputs[1])), strict=True):
        several = torch.stack([gradient, 2 * gradient, gradient.flip(2)])
        one_by_one = [torch.autograd.grad(output, (q, k), each, retain_graph=True) for each in several]
        at_once = torch.autograd.grad(output, (q, k), several, is_grads_batched=True, retain_graph=True)
        for n, gradients in enumerate(one_by_one):
            for batched, alone in zip(at_once, gradients, strict=True):
                torch.testing.assert_close(batched[n], alone)


@pytest.mark.parametrize("dropout_p", (0.0, 0.25))
def check_checkpoint(target, dropout_p):
    """Activation checkpointing runs the forward again, with the same dropout."""
    case = served(target, **SMALL, dropout_p=dropout_p)
    p = Problem.of(case, target)
    q, k, v = (x.clone().requires_grad_() for x in (p.q, p.k, p.v))

    def attend(q, k, v):
        return flash_attention(q, k, v, dropout_p=dropout_p, backend=target.backend)

    gradients = []
    for call in (attend, partial(checkpoint, attend, use_reentrant=False)):
        torch.manual_seed(0)
        gradients.append(torch.autograd.grad(call(q, k, v), (q, k, v), p.dO))
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def check_tracers_see_the_op(target):
    """torch.jit.trace and torch.export record one op, which computes anew for other inputs, not the steps of this call."""
    case = served(target, **SMALL)
    p = Problem.of(case, target)

    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return flash_attention(q, k, v, backend=target.backend)

    inputs, others = (p.q, p.k, p.v), (2 * p.q, p.k, p.v)
    traced = torch.jit.trace(Layer(), inputs)
    assert "flash_attention::forward" in str(traced.graph)
    assert torch.equal(traced(*others), Layer()(*others))
    exported = torch.export.export(Layer(), inputs)
    assert "flash_attention.forward" in str(exported.graph)
    assert torch.equal(exported.module()(*others), Layer()(*others))


if __name__ == "__main__":
    run_alone(__file__)

"""Derivatives of any order, by each of PyTorch's interfaces, and of the ops themselves: correct, or an error.

python checks/check_derivatives.py [--backend reference]

One file because its checks share one table of calls and ways to ask for derivatives.
"""

import itertools

import pytest
import torch
from harness import CPU, Case, Target, call_of, run_alone
from torch.autograd import forward_ad
from torch.autograd.functional import hvp, jacobian, vhp
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils.checkpoint import checkpoint

from flash_attention import flash_attention
from flash_attention.backends import BACKENDS
from flash_attention.call import Settings
from flash_attention.reference import normal_attention, normal_attention_causal

ops = torch.ops.flash_attention
TINY = {"B": 1, "H": 2, "Nq": 3, "Nk": 2, "D": 2, "dtype": torch.float64, "seed": 3}
SETTINGS = {
    "general": {},
    "causal": {"causal": True, "Nq": 2, "Nk": 3},
    "dead rows": {"mask": "dead rows", "Nq": 4},
    "key mask": {"mask": "key", "Nk": 5},
    "grouped heads": {"Hkv": 1, "Dv": 1},
    "dropout": {"dropout_p": 0.4},
    "everything": {"causal": True, "mask": "full", "Hkv": 1, "Dv": 1, "dropout_p": 0.4, "scale": 0.7},
}
EACH = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def only_reference(target: Target) -> None:
    if target.backend != "reference":
        pytest.skip(f"{target.backend} has no second derivative")


def both(settings: dict, target: Target = CPU, **options):
    """(q, k, v) → a smooth number of O and LSE: by flash_attention() and by naive attention; and q, k, v."""
    case = Case(**TINY | settings)
    q, k, v, mask = case.inputs(target.device)
    naive = normal_attention_causal if case.causal else normal_attention

    def smooth(O, LSE):
        return O.sin().sum() + LSE.masked_fill(LSE.isneginf(), 0).square().sum()

    def flash(q, k, v):
        if case.dropout_p:
            torch.manual_seed(case.seed)
        options = {"causal": case.causal, "scale": case.scale, "dropout_p": case.dropout_p, "backend": target.backend}
        return smooth(*flash_attention(q, k, v, mask, return_lse=True, **options))

    def normal(q, k, v):
        return smooth(*naive(q, k, v, mask, scale=case.scale, dropout=case.dropout(target.device), return_lse=True))

    return flash, normal, (q, k, v)


def same(what: str, ask, flash, normal, nonzero: bool = True) -> None:
    """`ask`, a function of a function, gives the same result for both."""
    got, want = ask(flash), ask(normal)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10, msg=lambda text: f"{what}: {text}")
    tensors = want if isinstance(want, tuple) else (want,)
    assert not nonzero or max(float(x.detach().abs().max()) for x in tensors) > 1e-3, f"{what} is 0: nothing was compared"


# ---- orders


def chain(f, inputs, orders: int):
    """Nested gradients of f: of a smooth function of the gradient, and so on, by torch.autograd."""
    x = [each.clone().requires_grad_() for each in inputs]
    value = f(*x)
    for order in range(orders):
        gradients = torch.autograd.grad(value, x, create_graph=order < orders - 1)
        value = sum((each * (1 + each)).sum() for each in gradients)
    return gradients


@EACH
def check_orders(target, settings):
    """Gradients of gradients of gradients of gradients, with respect to q, k and v at once."""
    only_reference(target)
    flash, normal, inputs = both(settings, target)
    for orders in (1, 2, 3, 4):
        same(f"order {orders}", lambda f, orders=orders: chain(f, inputs, orders), flash, normal)


@pytest.mark.parametrize("ways", [*itertools.product((jacfwd, jacrev), repeat=3)], ids=lambda ways: " of ".join(f.__name__ for f in ways))
@pytest.mark.parametrize("settings", ({}, {"causal": True, "mask": "full", "dropout_p": 0.4}), ids=("general", "everything"))
def check_transforms_nest(settings, ways):
    """Forward and reverse mode in any order, up to the third, each of them mapped over a basis; q is used three times."""
    flash, normal, (q, *_) = both({"H": 1, "Nq": 2, "Nk": 2} | settings)

    def derivative(f):
        def g(q):
            return f(q, q * q, 1 + q)

        for way in ways:
            g = way(g, **({"randomness": "same"} if way is jacfwd else {}))
        return vmap(g, randomness="same")(torch.stack([q, 2 * q])) if ways == (jacrev,) * 3 and not settings else g(q)

    same("derivative", derivative, flash, normal)


@pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
def check_vmap_and_grad(compiled):
    """vmap inside grad, outside, and both, also compiled: an op without a rule would give zeros."""
    flash, normal, (q, k, v) = both({"causal": True, "Nq": 2, "Nk": 3})
    q3, k3 = (torch.stack([x, 2 * x, x.flip(-1)]) for x in (q, k))
    asked = {
        "grad": lambda f: grad(f, argnums=(0, 1, 2))(q, k, v),
        "grad of vmap": lambda f: grad(lambda q3: vmap(f, (0, None, None))(q3, k, v).sum())(q3),
        "grad of vmap over others": lambda f: grad(lambda q: vmap(f, (None, 0, None))(q, k3, v).sum())(q),
        "vmap of grad": lambda f: vmap(grad(f), (0, 0, None))(q3, k3, v),
        "grad of vmap of grad": lambda f: grad(lambda q3: vmap(grad(f), (0, None, None))(q3, k, v).square().sum())(q3),
        "vmap of hessian": lambda f: vmap(jacrev(jacrev(f)), (0, 0, None))(q3, k3, v),
    }
    for what, ask in [*asked.items()][: 2 if compiled else None]:  # compiling takes seconds
        torch.compiler.reset()
        if compiled:
            got = torch.compile(lambda ask=ask: ask(flash), fullgraph=True, backend="aot_eager")
            same(what, lambda f, ask=ask, got=got: got() if f is flash else ask(f), flash, normal)
        else:
            same(what, ask, flash, normal)


def check_named_ways():
    """PyTorch's named functions: Hessians, products with them, directional derivatives, in both modes."""
    flash, normal, (q, k, v) = both({"causal": True, "Nq": 2, "Nk": 3})
    u = torch.ones_like(q) / 3
    asked = {
        "hvp": lambda f: hvp(lambda q: f(q, k, v), q, u)[1],
        "hvp, strict": lambda f: hvp(lambda q: f(q, k, v), q, u, strict=True)[1],
        "vhp": lambda f: vhp(lambda q: f(q, k, v), q, u)[1],
        "jacobian of hvp": lambda f: jacobian(lambda x: hvp(lambda q: f(q, k, v), x, u, create_graph=True)[1], q),
        "hessian": lambda f: hessian(f)(q, k, v),
        "hessian, vectorized": lambda f: torch.autograd.functional.hessian(lambda q: f(q, k, v), q, vectorize=True),
        "hessian, forward over reverse": lambda f: torch.autograd.functional.hessian(
            lambda q: f(q, k, v), q, vectorize=True, outer_jacobian_strategy="forward-mode"
        ),
        "jvp": lambda f: jvp(f, (q, k, v), (u, k, q[:, :, :1].expand_as(v)))[1],
        "jvp by two backwards": lambda f: torch.autograd.functional.jvp(lambda q: f(q, k, v), q, u)[1],
        "linearize": lambda f: linearize(lambda q: f(q, k, v), q)[1](u),
        "vjp of a second derivative": lambda f: vjp(grad(lambda q: grad(lambda q: f(q, k, v))(q).square().sum()), q)[1](u)[0],
        "torch.autograd over torch.func": lambda f: chain(lambda *x: grad(f)(*x).square().sum(), (q, k, v), 2),
    }
    for what, ask in asked.items():
        same(what, ask, flash, normal)


def check_dual_numbers():
    """Forward mode by torch.autograd.forward_ad: of a value, and of a gradient."""
    flash, normal, (q, k, v) = both({})

    def ask(f):
        with forward_ad.dual_level():
            x = forward_ad.make_dual(q.clone().requires_grad_(), q.flip(-1))
            value = f(x, k, v)
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            return forward_ad.unpack_dual(value).tangent.detach(), forward_ad.unpack_dual(gradient).tangent.detach()

    same("tangents", ask, flash, normal)


@pytest.mark.parametrize("order", (1, 2, 3))
def check_batched_gradients(order):
    """torch.autograd.grad(…, is_grads_batched=True) at any order, and a gradient of what it gives."""
    flash, normal, (q, k, v) = both({"Hkv": 2})

    def ask(f):
        x = q.clone().requires_grad_()
        y = flash_attention(x, k, v) if f is flash else normal_attention(x, k, v)
        for _ in range(order - 1):
            (y,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        several = torch.stack([torch.ones_like(y), y.detach(), y.detach().flip(-1)])
        (mapped,) = torch.autograd.grad(y, x, several, is_grads_batched=True, create_graph=True)
        return mapped.detach(), torch.autograd.grad(mapped.square().sum(), x)[0]

    same(f"order {order}", ask, flash, normal)


# ---- the ops, called as they are


def op_arguments(settings: dict):
    """The tensors of each op that have derivatives, and the op as a function of them alone."""
    case = Case(**TINY | settings)
    q, k, v, mask = case.inputs("cpu")
    mask = None if mask is None else (mask[:, None, None] if mask.dim() == 2 else mask).expand(1, 2, case.Nq, case.Nk)
    rest = mask, None, torch.tensor(7) if case.dropout_p else None
    rest += Settings(0.5, case.dropout_p, right=0 if case.causal else None, backend="reference")
    random = torch.Generator().manual_seed(1)
    gQ, gK, gV, dO, dLSE = (
        torch.randn(shape, generator=random, dtype=torch.float64)
        for shape in (q.shape, k.shape, v.shape, (*q.shape[:3], v.shape[3]), q.shape[:3])
    )

    def forward(q, k, v):
        O, LSE = ops.forward(q, k, v, *rest)
        return O, LSE.masked_fill(LSE.isneginf(), 0)

    def backward(dO, dLSE, q, k, v):
        with torch.no_grad():
            O, LSE = ops.forward(q, k, v, *rest)
        return ops.backward(dO, dLSE, q, k, v, *rest[:2], O, LSE, *rest[2:])

    def second_backward(*inputs):
        return ops.second_backward(*inputs, *rest)

    return {
        "forward": (forward, (q, k, v)),
        "backward": (backward, (dO, dLSE, q, k, v)),
        "second_backward": (second_backward, (gQ, gK, gV, dO, dLSE, q, k, v)),
    }


@pytest.mark.parametrize("name", ("forward", "backward", "second_backward"))
@pytest.mark.parametrize("settings", (SETTINGS["dead rows"], SETTINGS["everything"]), ids=("dead rows", "everything"))
def check_ops(settings, name):
    """First and second derivatives of each op against finite differences: reverse, forward, and forward over reverse."""
    f, inputs = op_arguments(settings)[name]
    inputs = [x.requires_grad_() for x in inputs]
    # backward is given O, LSE without the inputs' tangents: its forward mode is checked through flash_attention().
    forward_mode = name != "backward"
    options = {"fast_mode": True, "atol": 1e-5}
    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=forward_mode, **options)
    if name != "second_backward":  # its second derivative is of fourth order: check_orders
        assert torch.autograd.gradgradcheck(f, inputs, check_fwd_over_rev=forward_mode, **options)


def check_ops_transformed():
    """An op called directly inside of transforms and of a compiled function."""
    _, _, (q, k, v) = both({})
    q3 = torch.stack([q, 2 * q])

    def flash(q):
        return ops.forward(q, k, v, None, None, None, *Settings(0.5, backend="reference"))[0]

    def normal(q):
        return normal_attention(q, k, v, scale=0.5)

    same("grad", lambda f: grad(lambda q: f(q).sin().sum())(q), flash, normal)
    same("jacrev", lambda f: jacrev(f)(q), flash, normal)
    same("jacfwd", lambda f: jacfwd(f)(q), flash, normal)
    same("grad of vmap", lambda f: grad(lambda q3: vmap(f)(q3).sin().sum())(q3), flash, normal)
    torch.compiler.reset()
    compiled = torch.compile(flash, fullgraph=True, backend="aot_eager")
    same("compiled", lambda f: chain(lambda x: (compiled if f is flash else f)(x).sin().sum(), (q,), 1), flash, normal)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def check_recorded_calls_learn():
    """Weights in front of a call that torch.jit.trace or torch.export recorded get their gradients."""
    _, _, (q, k, v) = both({})

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.eye(2, dtype=torch.float64) + 0.1)

        def forward(self, q):
            return flash_attention(q @ self.weight, k, v)

    layer = Layer()
    (want,) = torch.autograd.grad(layer(q).sin().sum(), layer.weight)
    for recorded in (torch.jit.trace(layer, (q,)), torch.export.export(layer, (q,)).module()):
        (weight,) = recorded.parameters()
        torch.testing.assert_close(torch.autograd.grad(recorded(q).sin().sum(), weight)[0], want)


# ---- what autograd promises around a node


def check_surroundings():
    """Checkpointing, anomaly detection and hooks on saved tensors leave the third derivative as it is."""
    flash, normal, inputs = both({"Hkv": 1})
    same("checkpoint", lambda f: chain(lambda *x: checkpoint(f, *x, use_reentrant=False), inputs, 3), flash, normal)
    for around in (
        torch.autograd.set_detect_anomaly(True),
        torch.autograd.graph.save_on_cpu(),
        torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x),
    ):
        with around:
            same(type(around).__name__, lambda f: chain(f, inputs, 3), flash, normal)


@pytest.mark.parametrize("changed", ("q", "k", "v", "O", "dO"))
@pytest.mark.parametrize("order", (1, 2, 3))
def check_changed_in_place(order, changed):
    """If a tensor that a derivative needs has been written to since, that is an error."""
    _, _, inputs = both({})
    x = [each.clone().requires_grad_() for each in (*inputs, torch.ones(1, 2, 3, 2, dtype=torch.float64))]
    q, k, v, dO = (each * 1 for each in x)
    y = O = flash_attention(q, k, v)
    for n in range(order):
        if n == order - 1:
            if {"O": order > 1, "dO": order == 1}.get(changed):
                pytest.skip(f"the derivative of order {order} does not need {changed}")
            with torch.no_grad():
                {"q": q, "k": k, "v": v, "O": O, "dO": dO}[changed].add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(y, (q, k, v), torch.ones_like(y), retain_graph=True)
            return
        y = sum(each.sum() for each in torch.autograd.grad(y, (q, k, v), dO if y is O else torch.ones_like(y), create_graph=True))


@pytest.mark.parametrize("order", (1, 2, 3))
def check_graph_is_freed(order):
    """Without retain_graph a graph is gone after its use, of whatever order."""
    _, _, (q, k, v) = both({})
    q = q.requires_grad_()
    y = flash_attention(q, k, v).sin().sum()
    for _ in range(order - 1):
        y = torch.autograd.grad(y, q, create_graph=True)[0].square().sum()
    torch.autograd.grad(y, q)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(y, q)


def check_memory_is_linear():
    """What the second derivative saves for a third is no larger than q, and a third takes blocks of rows one by one."""
    N, D = 512, 16
    q, k, v = (torch.randn(1, 1, N, D).requires_grad_() for _ in range(3))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        first = torch.autograd.grad(flash_attention(q, k, v).sum(), (q, k, v), create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), (q, k, v), create_graph=True)
        value = sum(x.square().sum() for x in second)
        assert max(sizes) <= N * D, f"{max(sizes)} numbers were saved at once; q has {N * D}, a matrix of scores {N * N}"
        sizes.clear()
        torch.autograd.grad(value, (q, k, v))
    assert max(sizes) <= 128 * N, f"{max(sizes)} numbers were saved at once; 128 rows of scores have {128 * N}"


def check_dead_rows_stop_nan():
    """A NaN gradient of a row that attends nothing goes no further: other gradients, of every order, are unaffected."""
    _, _, (q, k, v) = both({})
    x = [each.requires_grad_() for each in (q, k, v)]
    mask = torch.tensor([[True, True], [False, False], [True, False]])[None, None]
    dead = torch.tensor([False, True, False])

    def derivatives(sent: float):
        dO = torch.ones_like(v[:, :, :1].expand_as(q)).masked_fill(dead[:, None], sent)
        gradients = ops.second_backward(*(torch.ones_like(each) for each in x), dO, dO[..., 0], *x, mask.expand(1, 2, 3, 2),
                                        None, None, *Settings(0.5, backend="reference"))  # fmt: skip
        third = torch.autograd.grad(gradients, x, [y.detach().cos() for y in gradients])
        return *gradients, *third

    for n, (got, want) in enumerate(zip(derivatives(torch.nan), derivatives(1.0), strict=True)):
        torch.testing.assert_close(got, want, msg=lambda text, n=n: f"result {n}: {text}")
        assert want.isfinite().all()


@pytest.mark.parametrize("Nq, Nk", ((0, 3), (3, 0), (0, 0)))
def check_no_rows_no_columns(Nq, Nk):
    """Lengths of 0 have derivatives of the right shape, which are 0."""
    flash, _, inputs = both({"Nq": Nq, "Nk": Nk})
    for orders in (1, 2, 3):
        for x, y in zip(chain(flash, inputs, orders), inputs, strict=True):
            assert x.shape == y.shape
            assert not x.any()


def check_forward_mode(target):
    """Second derivatives are correct on the reference; a kernel raises an error, never a silent zero."""
    if target.backend == "reference":
        flash, normal, (q, k, v) = both({"causal": True, "Nq": 2, "Nk": 3}, target)
        for ask in (lambda f: jvp(f, (q, k, v), (2 * q, k, v))[1], lambda f: jacfwd(f)(q, k, v)):
            same("forward mode", ask, flash, normal)
        return
    q, k, v = torch.randn(3, 1, 2, 16, 64, dtype=torch.float16, device=target.device).unbind()
    if BACKENDS[target.backend].why_not(call_of(q, k, v)):
        pytest.skip(BACKENDS[target.backend].why_not(call_of(q, k, v)))
    for transform in (lambda f: jvp(f, (q,), (q,))[1], lambda f: jacfwd(f)(q)):
        with pytest.raises(NotImplementedError, match=r"forward mode.*reference"):
            transform(lambda q: flash_attention(q, k, v, backend=target.backend))


if __name__ == "__main__":
    run_alone(__file__)

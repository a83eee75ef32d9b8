"""A plain call like an earlier one goes straight to its kernel, and no other call does.

python checks/check_shortcut.py [--backend tensor_core]
"""

from functools import partial

import pytest
import torch
from harness import Case, call_of, dtype_served, half_served, run_alone, skip_unless_masks

from flash_attention import autograd, flash_attention, interface, node, shortcut
from flash_attention.backends import BACKENDS, cuda
from flash_attention.build import emulated
from flash_attention.build import node as library


@pytest.fixture
def slow_calls(monkeypatch):
    """Starts with an empty table, and lists every call that is checked and prepared."""
    monkeypatch.setattr(shortcut, "_kept", {})
    calls, whole = [], interface._attention
    monkeypatch.setattr(interface, "_attention", lambda *arguments: calls.append(arguments) or whole(*arguments))
    return calls


def inputs(target, *shape: int, dtype: torch.dtype | None = None):
    if target.device != "cuda" or target.backend == "reference":
        pytest.skip("launches are kept for kernels only")
    B, H, N, D = shape or (2, 4, 130, 64)
    return Case(B=B, H=H, Nq=N, Nk=N, D=D, dtype=dtype or dtype_served(target)).inputs(target.device)[:3]


def check_a_second_call(target, slow_calls):
    """The second call takes the shortcut. It gives the same O and LSE, also for other addresses and other numbers."""
    q, k, v = inputs(target)
    for causal in (False, True):
        for scale in (None, 0.3):
            slow_calls.clear()
            first = flash_attention(q, k, v, causal=causal, scale=scale, return_lse=True, backend=target.backend)
            assert len(slow_calls) == 1, "the first call was not checked"
            for arguments in ((q, k, v), (q.clone(), k.clone(), v.clone())):
                again = flash_attention(*arguments, causal=causal, scale=scale, return_lse=True, backend=target.backend)
                assert len(slow_calls) == 1, "the second call was not the short one"
                assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
            other = flash_attention(v, q, k, causal=causal, scale=scale, backend=target.backend)
            assert len(slow_calls) == 1
            shortcut._kept.clear()
            assert torch.equal(other, flash_attention(v, q, k, causal=causal, scale=scale, backend=target.backend))


def check_no_two_calls_are_confused(target, slow_calls):
    """Calls that differ in one shape, stride, dtype, address or setting, each made twice: every one computes what it would alone."""
    q, k, v = inputs(target)
    H, N = q.shape[1:3]
    tall = torch.cat((q, q, q), -1)
    others = [] if half_served(target) == torch.float32 else {torch.float16, torch.bfloat16} - {q.dtype}
    off = torch.empty(q.numel() + 1, dtype=q.dtype, device=q.device)[1:].view(q.shape).copy_(q)  # does not begin at a multiple of 16 bytes
    calls = [
        ((q, k, v), {}),
        ((q, k, v), {"causal": True}),
        ((q, k, v), {"scale": 0.5}),
        ((q, k, v), {"scale": -0.5}),
        ((q[:, :, :-1], k, v), {}),
        ((q, k[:, :, :-1], v[:, :, :-1]), {}),
        ((q, k[:, :2], v[:, :2]), {}),
        ((q.transpose(1, 2).contiguous().transpose(1, 2), k, v), {}),
        ((q, k, v.transpose(1, 2).contiguous().transpose(1, 2)), {}),
        ((tall[..., 64:128], k, v), {}),
        ((q, k.mT.contiguous().mT, v), {}),
        ((q[:1].expand_as(q), k, v), {}),
        ((off, k, v), {}),
        ((q, off, v), {}),
        ((q, k, off), {}),
        ((q.reshape(1, 2 * H, N, -1), k.reshape(1, 2 * H, N, -1), v.reshape(1, 2 * H, N, -1)), {}),
        *(((q.to(dtype), k.to(dtype), v.to(dtype)), {}) for dtype in others),
    ]
    want = []
    for arguments, settings in calls:
        shortcut._kept.clear()
        want.append(flash_attention(*arguments, **settings, return_lse=True, backend=target.backend))
    shortcut._kept.clear()
    for _ in range(2):
        for n, ((arguments, settings), expected) in enumerate(zip(calls, want, strict=True)):
            got = flash_attention(*arguments, **settings, return_lse=True, backend=target.backend)
            assert all(torch.equal(x, y) and x.stride() == y.stride() for x, y in zip(got, expected, strict=True)), f"call {n}"


def check_masks_and_dropout(target, slow_calls):
    """With a mask or dropout, the second call takes the shortcut too; masks of different shape, stride or alignment are distinguished."""
    q, k, v = (x.requires_grad_() for x in inputs(target))
    skip_unless_masks(target)
    B, H, N = q.shape[:3]
    full = torch.rand(B, H, N, N, device=q.device) < 0.7
    # The sixth does not begin at a multiple of 16 bytes.
    off = torch.empty(full.numel() + 1, dtype=torch.bool, device=q.device)[1:].view(full.shape).copy_(full)
    masks = full[:, 0, 0], full[:, :1, :1], full[:1, :1], full, full.mT, off, ~full, None

    def call(mask, dropout_p):
        torch.manual_seed(5)
        O, LSE = flash_attention(q, k, v, mask, dropout_p=dropout_p, return_lse=True, backend=target.backend)
        return O, LSE, *torch.autograd.grad(O, (q, k, v), torch.ones_like(O))

    calls = [(mask, dropout_p) for mask in masks for dropout_p in (0.0, 0.25)]
    want = []
    for arguments in calls:
        shortcut._kept.clear()
        want.append(call(*arguments))
    shortcut._kept.clear()
    for again in (False, True):
        slow_calls.clear()
        for n, (arguments, expected) in enumerate(zip(calls, want, strict=True)):
            got = call(*arguments)
            assert all(map(torch.equal, got[:2], expected[:2])), f"call {n}"
            close = (torch.allclose(a, b, atol=1e-2) for a, b in zip(got, expected, strict=True))  # gradients are summed in any order
            assert all(close), f"gradients of call {n}"
        assert len(slow_calls) == (0 if again else len(calls) - 2), "~full is told like full"
    for wrong, error in ((full.float(), TypeError), (full[..., :-1], ValueError), (full.cpu(), ValueError)):
        with pytest.raises(error):
            call(wrong, 0.0)


def gradients_by(attend, inputs, dO, hooks=None):
    """O, dQ, dK, dV of leaves like the inputs. hooks: of torch.autograd.graph.saved_tensors_hooks."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.autograd.graph.saved_tensors_hooks(*(hooks or (lambda x: x,) * 2)):
        O = attend(*leaves)
    return O.detach(), *torch.autograd.grad(O, leaves, dO(O))


def load_node(monkeypatch) -> None:
    """Loads node.cpp, compiled now if need be."""
    if emulated.find_compiler() is None:
        pytest.skip("no C++ compiler")
    library.compiled()
    monkeypatch.setattr(node, "_compiling", None)
    assert node._loaded or node._load()


TO_BE_DIFFERENTIATED = [  # dO of O, what saves tensors
    (torch.ones_like, None),
    (lambda O: torch.ones_like(O).mT.contiguous().mT, None),  # rows are not contiguous
    (lambda O: O.new_ones(()).expand_as(O), None),  # as of O.sum()
    (lambda O: torch.ones(O.numel() + 1, dtype=O.dtype, device=O.device)[1:].view(O.shape), None),  # not at a multiple of 16 bytes
    (torch.ones_like, (lambda x: x, lambda x: x.contiguous().clone())),  # other strides come back
    (torch.ones_like, (lambda x: x, lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]])),
]


@pytest.mark.parametrize("in_cpp", [False, True])
def check_plain_training(target, slow_calls, monkeypatch, in_cpp):
    """A repeated call with gradients gives the same as the first, whatever dO's layout and whatever hooks do to saved tensors."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(target))
    attend = partial(flash_attention, backend=target.backend)
    if in_cpp:
        load_node(monkeypatch)
    else:
        monkeypatch.setattr(node, "_loaded", False)
    first = gradients_by(attend, (q, k, v), torch.ones_like)
    for dO, hooks in 2 * TO_BE_DIFFERENTIATED:
        slow_calls.clear()
        again = gradients_by(attend, (q, k, v), dO, hooks)
        assert not slow_calls
        for x, y in zip(first, again, strict=True):
            torch.testing.assert_close(x, y, atol=1e-2, rtol=1e-2)  # gradients are summed in any order
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    O = attend(*leaves)
    assert in_cpp != ("PlainAttentionBackward" in str(O.grad_fn))
    if in_cpp:
        with monkeypatch.context() as python:
            python.setattr(shortcut, "is_eager_backward", None)  # a backward that enters Python would call it
            gradients_by(attend, (q, k, v), torch.ones_like)
    many = torch.autograd.grad(O, leaves, torch.ones_like(O).expand(3, *O.shape), is_grads_batched=True, retain_graph=True)
    for x, y in zip(first[1:], many, strict=True):
        torch.testing.assert_close(x, y[2], atol=1e-2, rtol=1e-2)
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        x = torch.autograd.grad(O, leaves, torch.ones_like(O), create_graph=True)[0]
        torch.autograd.grad(x, leaves, torch.ones_like(x))


@pytest.mark.parametrize(("name", "causal"), [("simple", False), ("simple", True), ("tensor_core", False)])
def check_plain_training_emulated(name, causal):
    """The same Function with emulated kernels, bit by bit against that of other calls; where rows see nothing, backwards are not plain."""
    case = Case(B=2, H=2, Nq=40, Nk=24, D=16, dtype=torch.float32 if name == "simple" else torch.float16)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.inputs("cpu")[:3])
    call = call_of(q, k, v, causal=causal, backend=f"emulated:{name}")
    if reason := BACKENDS[f"emulated:{name}"].why_not(call):
        pytest.skip(reason)
    plan = BACKENDS[f"emulated:{name}"].plan(cuda.FORWARD, call)
    assert plan.is_plain
    want = gradients_by(partial(flash_attention, causal=causal, scale=1.0, backend=f"emulated:{name}"), (q, k, v), torch.ones_like)
    for dO, hooks in 2 * TO_BE_DIFFERENTIATED:
        got = gradients_by(partial(autograd.plain_attention, plan), (q, k, v), dO, hooks)
        assert all(map(torch.equal, got, want))
    kept = {is_plain for _, is_plain in plan.gradients.backwards.values()}  # a gradient that must be copied is not plain
    assert len(plan.gradients.backwards) <= shortcut.FEW and kept == ({False} if causal else {True, False})


def check_what_is_not_plain_takes_the_long_way(target, slow_calls):
    q, k, v = inputs(target, dtype=half_served(target))
    attend = partial(flash_attention, backend=target.backend)

    def long_way(call) -> bool:
        slow_calls.clear()
        call()
        return len(slow_calls) > 0

    plain = partial(attend, q, k, v)
    plain()
    assert not long_way(plain)
    if q.dtype == torch.float16:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert long_way(plain), "autocast"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert long_way(plain), "a profiler"
    assert long_way(lambda: torch.func.vmap(attend)(q[None], k[None], v[None])), "vmap"
    for x in (q, k, v):
        x.requires_grad_()
        assert not long_way(plain), "gradients"
        assert plain().requires_grad
        with torch.no_grad():
            assert not long_way(plain), "no_grad"
        x.requires_grad_(False)
    parameter = torch.nn.Parameter(q, requires_grad=False)
    assert long_way(partial(attend, parameter, k, v)), "a subclass of Tensor"
    assert not long_way(plain)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"causal": 0}, TypeError),
        ({"causal": None}, TypeError),
        ({"scale": True}, TypeError),
        ({"scale": float("nan")}, ValueError),
        ({"dropout_p": 1.0}, ValueError),
        ({"dropout_p": "0"}, ValueError),
        ({"backend": "no such"}, ValueError),
        ({"backend": 1}, ValueError),
    ],
    ids=str,
)
def check_bad_settings_after_a_good_call(target, slow_calls, settings, error):
    """Arguments that compare equal to valid ones but have another type are still refused."""
    q, k, v = inputs(target)
    for scale in (None, 1.0):
        flash_attention(q, k, v, scale=scale, backend=target.backend)
    with pytest.raises(error):
        flash_attention(q, k, v, **{"backend": target.backend, **settings})


def check_bad_tensors_after_a_good_call(target, slow_calls):
    q, k, v = inputs(target)
    flash_attention(q, k, v, backend=target.backend)
    for arguments, error in (
        ((q, k, v.cpu()), ValueError),
        ((q, k, v.double()), TypeError),
        ((q, k.to_sparse(), v), TypeError),
        ((q, k[..., :-8], v), ValueError),
        ((q[0], k, v), ValueError),
        ((q.tolist(), k, v), TypeError),
    ):
        with pytest.raises(error):
            flash_attention(*arguments, backend=target.backend)


def check_the_table_stays_small(target, slow_calls, monkeypatch):
    monkeypatch.setattr(shortcut, "CAPACITY", 5)
    q, k, v = inputs(target)
    for n in range(1, 12):
        flash_attention(q, k[:, :, :n], v[:, :, :n], backend=target.backend)
        assert 1 <= len(shortcut._kept) <= 5


if __name__ == "__main__":
    run_alone(__file__)

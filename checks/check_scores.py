"""What happens to a score before the softmax: softcap, bias and ALiBi, each with its gradients, against naive attention.

python checks/check_scores.py

One file because softcap, bias and ALiBi combine: most checks take all three.
"""

import math
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
from harness import BIASES, CPU, MASKS, SPANS, Case, Problem, Report, Target, against_truth, expect_error, run_alone
from torch.func import grad, hessian, jvp, vmap

from flash_attention import build, flash_attention
from flash_attention.backends import BACKENDS, choose, emulated, libraries
from flash_attention.backends.launch import BACKWARD
from flash_attention.build import Specialisation
from flash_attention.call import Call, Form, Settings
from flash_attention.reference import Score, Visible, normal_attention
from flash_attention.reference.score import HIDES

EMULATED = [name for name in BACKENDS if name.startswith("emulated:")]
SCORES = {
    "softcap": {"softcap": 1.5},
    "bias": {"bias": "batches share"},
    "alibi": {"alibi": True},
    "all": {"softcap": 2.0, "bias": "heads share", "alibi": True},
}
CASES = [
    Case(Nq=113, Nk=203, H=4, Hkv=2, D=32),
    Case(Nq=203, Nk=113, H=2, D=16, causal=True),
    Case(B=1, Nq=65, Nk=65, H=3, D=24, Dv=40, causal=True, dropout_p=0.3),
    Case(Nq=1, Nk=239, H=4, Hkv=1, D=32),
    Case(Nq=90, Nk=130, H=2, D=32, window=(20, 7)),
    Case(Nq=64, Nk=128, H=2, D=32, dtype=torch.bfloat16, mask="dead rows"),
    Case(Nq=40, Nk=40, H=2, D=16, dtype=torch.float64, mask="key", dropout_p=0.5),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("scored", SCORES)
def check_scores(target, scored, case):
    against_truth(replace(case, **SCORES[scored]), target)


@pytest.mark.parametrize("bias", BIASES)
def check_biases(target, bias):
    """Every shape that broadcasts, with its gradient in that shape; −∞ hides, and rows all of whose elements it hides attend nothing."""
    against_truth(Case(Nq=150, Nk=90, H=4, Hkv=2, D=16, bias=bias, softcap=3.0), target)
    against_truth(Case(Nq=90, Nk=90, H=2, D=16, causal=True, bias=bias), target)


@pytest.mark.parametrize("name", [*MASKS, *SPANS])
def check_beside_masks(target, name):
    """Elements are hidden after the scores are changed, whatever hides them."""
    hides = {"mask": name} if name in MASKS else {"spans": name}
    for scored in ({"bias": "batches share", "alibi": True}, {"bias": "hiding", "softcap": 2.0}):
        against_truth(Case(Nq=70, Nk=70, H=2, D=16, causal=name == "key", **hides, **scored), target)


def check_tiles():
    """Any tile size gives the same; so do workers, which compute a long call in pieces."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 50, 8, dtype=torch.float64)
    bias = torch.randn(2, 50, 50, dtype=torch.float64, requires_grad=True)
    scored = {"softcap": 1.0, "bias": bias, "alibi": torch.tensor([0.25, 0.5])}
    want = flash_attention(q, k, v, causal=True, **scored)
    want_gradient = torch.autograd.grad(want.square().sum(), bias)[0]
    for size in (1, 7, 16, 64):
        got = flash_attention(q, k, v, causal=True, **scored, block_size=size)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got.square().sum(), bias)[0], want_gradient)


def check_long():
    """A call in pieces for workers, with a bias that heads share and with a full one: repeatable and correct."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 4, 2200, 64)
    for shape in ((1, 1, 1, 2200), (1, 4, 2200, 2200)):
        bias = torch.randn(shape, requires_grad=True)
        runs = []
        for _ in range(2):
            O = flash_attention(q, k, v, causal=True, bias=bias)
            runs.append((O.detach(), *torch.autograd.grad(O.square().sum(), bias)))
        assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True)), f"{shape}: two runs differ"
        O = normal_attention(q, k, v, bias=bias, visible=Visible(2200, 2200, right=0))
        report = Report(f"bias {shape}, 2200 rows")
        report.compare("O", "O", runs[0][0], O, 4e-6)
        want = torch.autograd.grad(O.square().sum(), bias)[0]
        report.compare("dBias", "dBias", runs[0][1], want, 1e-5 * float(want.abs().max()))
        report.verdict()


def check_memory_of_gradient():
    """No N² tensor: a key bias for 16,000 rows, with its gradient, takes a small fraction of one matrix of scores (1 GB)."""
    import resource

    N = 16_000
    q, k, v = torch.randn(3, 1, 1, N, 8)
    bias = torch.randn(N, requires_grad=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    flash_attention(q, k, v, bias=bias).sum().backward()
    used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert bias.grad.shape == (N,) and used < 250, f"{used:.0f} MiB"


@pytest.mark.parametrize("causal", (False, True))
def check_derivatives(causal):
    """Gradients, forward mode and their nestings, in float64: q, k, v and a broadcast bias, with softcap and ALiBi."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 4, 3, dtype=torch.float64).unbind()
    bias = torch.randn(2, 1, 4, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, bias)]

    def flash(q, k, v, bias):
        return flash_attention(q, k, v, causal=causal, softcap=1.5, bias=bias, alibi=SLOPES, return_lse=True)

    def normal(q, k, v, bias):
        visible = Visible(4, 4, right=0 if causal else None)
        return normal_attention(q, k, v, visible=visible, softcap=1.5, bias=bias, alibi=SLOPES, return_lse=True)

    assert torch.autograd.gradcheck(flash, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert torch.autograd.gradgradcheck(flash, inputs, check_fwd_over_rev=True)
    tangents = tuple(torch.randn_like(x) for x in inputs)
    for ask in (
        lambda f: jvp(f, tuple(inputs), tangents),
        lambda f: hessian(lambda bias: f(q, k, v, bias)[0].square().sum())(bias),
        lambda f: hessian(lambda q: f(q, k, v, bias)[1].square().sum())(q),
        lambda f: grad(lambda bias: grad(lambda k: f(q, k, v, bias)[0].sin().sum())(k).square().sum())(bias),
        lambda f: jvp(lambda *x: grad(lambda *y: f(*y)[0].sin().sum(), argnums=3)(*x), tuple(inputs), tangents),
        lambda f: _third(f, inputs),
    ):
        torch.testing.assert_close(ask(flash), ask(normal))


SLOPES = torch.tensor([0.3, 0.1])


def _third(f, inputs):
    """A third derivative, by plain autograd, with respect to q and the bias."""
    q, bias = inputs[0], inputs[3]
    first = torch.autograd.grad(f(*inputs)[0].sin().sum(), (q, bias), create_graph=True)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), (q, bias), create_graph=True)
    return torch.autograd.grad(sum(x.sin().sum() for x in second), (q, bias))


@pytest.mark.parametrize("shape", ((1, 2, 5, 5), (2, 2, 5, 5), (2, 1, 5)), ids=str)
def check_mapped(shape):
    """vmap over a bias, over everything but the bias, and over its gradient: as one by one."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 3, 2, 2, 5, 4, dtype=torch.float64)
    bias = torch.randn(3, *shape, dtype=torch.float64)

    def loss(q, k, v, bias):
        return flash_attention(q, k, v, bias=bias, alibi=SLOPES, softcap=2.0).square().sum()

    for dims in ((0, 0, 0, 0), (0, None, 0, None), (None, None, None, 0)):
        inputs = [x if dim == 0 else x[0] for x, dim in zip((q, k, v, bias), dims, strict=True)]
        got = vmap(grad(loss, argnums=(0, 3)), in_dims=dims)(*inputs)
        alone = [grad(loss, argnums=(0, 3))(*(x if dim is None else x[n] for x, dim in zip(inputs, dims, strict=True))) for n in range(3)]
        want = [torch.stack(x) for x in zip(*alone, strict=True)]
        torch.testing.assert_close(list(got), want)


@pytest.mark.parametrize("trained", (False, True))
def check_op(trained):
    """torch's own checks of the ops, and a compiled and an exported call."""
    q, k, v = torch.randn(3, 2, 2, 6, 8).unbind()
    bias = torch.randn(1, 2, 6, 6, requires_grad=trained)
    alibi = SLOPES.expand(2, 2)
    ops = torch.ops.flash_attention
    rest = None, None, None, *Settings(0.25, softcap=2.0, backend="reference")
    O, LSE = ops.forward(q, k, v, *rest, bias.detach(), alibi)
    torch.library.opcheck(ops.forward.default, (*(x.detach().requires_grad_() for x in (q, k, v)), *rest, bias, alibi))
    backward = (torch.randn_like(O), torch.randn_like(LSE), q, k, v, None, None, O, LSE, *rest[2:], bias, alibi, trained)
    torch.library.opcheck(ops.backward.default, backward)
    gBias = torch.randn_like(bias) if trained else None
    second = (*torch.randn(3, *q.shape).unbind(), torch.randn_like(O), torch.randn_like(LSE), q, k, v, *rest, gBias, bias, alibi)
    torch.library.opcheck(ops.second_backward.default, second)

    class Attends(torch.nn.Module):
        def forward(self, q, k, v, bias):
            return flash_attention(q, k, v, causal=True, softcap=2.0, bias=bias, alibi=SLOPES)

    want = Attends()(q, k, v, bias)
    torch.testing.assert_close(torch.export.export(Attends(), (q, k, v, bias)).module()(q, k, v, bias), want)
    compiled = torch.compile(Attends(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, bias), want)
    if trained:
        got, want = (torch.autograd.grad(f(q, k, v, bias).square().sum(), bias)[0] for f in (compiled, Attends()))
        torch.testing.assert_close(got, want)
    meta = flash_attention(*(x.to("meta") for x in (q, k, v)), bias=bias.to("meta"), softcap=1.0)
    assert meta.is_meta and meta.shape == q.shape


def check_parts_of_a_whole():
    """Parts of a larger call use its ALiBi distances: two halves of the keys, merged by LSE, give the whole result."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 128, 8, dtype=torch.float64)
    bias = torch.randn(1, 2, 128, 128, dtype=torch.float64)
    alibi, seed = SLOPES.expand(1, 2), torch.tensor(5)
    settings = Settings(0.3, 0.25, 40, 9, "reference", softcap=2.0)
    ops = torch.ops.flash_attention
    want, _ = ops.forward(q, k, v, None, None, seed, *settings, bias, alibi)
    for rows in (slice(0, 64), slice(64, 128)):
        parts = []
        for columns in (slice(0, 64), slice(64, 128)):
            place = settings._replace(q_offset=rows.start, k_offset=columns.start, diagonal=0)
            tensors = q[:, :, rows], k[:, :, columns], v[:, :, columns], None, None, seed
            parts.append(ops.forward(*tensors, *place, bias[:, :, rows, columns], alibi))
        weights = torch.stack([LSE for _, LSE in parts]).softmax(0)[..., None]
        torch.testing.assert_close(sum(w * O for w, (O, _) in zip(weights, parts, strict=True)), want[:, :, rows])


def check_definition():
    """softcap before bias, bias before ALiBi, ALiBi by distance from the row's own column; against scores written out here."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    bias, slopes = torch.randn(3, 5, 7), torch.tensor([0.5, 0.25, 0.125])
    distance = (torch.arange(5)[:, None] + 2 - torch.arange(7)).abs()
    scores = 1.2 * torch.tanh(q @ k.mT / 2 / 1.2) + bias - slopes[:, None, None] * distance
    for attention in (flash_attention, normal_attention):
        torch.testing.assert_close(attention(q, k, v, softcap=1.2, bias=bias, alibi=slopes), scores.softmax(-1) @ v)
    lowest = torch.finfo(torch.float32).min
    for hides in (-math.inf, lowest, 2 * HIDES):
        hiding = torch.where(torch.rand(5, 7) < 0.5, hides, torch.zeros(()))
        torch.testing.assert_close(flash_attention(q, k, v, bias=hiding), flash_attention(q, k, v, (hiding == 0)[None, None]))
    finite = torch.where(torch.rand(5, 7) < 0.5, -1e4, torch.zeros(()))  # for rows whose elements are all this low, the mean
    finite[2] = -1e4
    torch.testing.assert_close(flash_attention(q, k, v, bias=finite), (q @ k.mT / 2 + finite).softmax(-1) @ v, atol=1e-3, rtol=1e-3)


def check_arguments():
    """Error messages name what is wrong."""
    q, k, v = torch.randn(3, 2, 3, 5, 4)
    for options, error, words in (
        ({"softcap": 0.0}, ValueError, ["softcap", "positive", "0.0"]),
        ({"softcap": math.inf}, ValueError, ["softcap", "inf"]),
        ({"softcap": "2"}, TypeError, ["softcap", "str"]),
        ({"softcap": True}, TypeError, ["softcap", "bool"]),
        ({"bias": torch.zeros(5, 5, dtype=torch.bool)}, TypeError, ["bias", "bool", "mask"]),
        ({"bias": torch.zeros(5, 5, dtype=torch.int64)}, TypeError, ["bias", "int64"]),
        ({"bias": 3.0}, TypeError, ["bias", "float"]),
        ({"bias": torch.zeros(2, 5, 5)}, ValueError, ["bias", "(2, 5, 5)", "(2, 3, 5, 5)"]),
        ({"bias": torch.zeros(1, 1, 1, 5, 5)}, ValueError, ["bias", "(1, 1, 1, 5, 5)"]),
        ({"bias": torch.zeros(5, 5, device="meta")}, ValueError, ["bias", "meta"]),
        ({"alibi": torch.zeros(2)}, ValueError, ["alibi", "(2,)", "(3,)"]),
        ({"alibi": torch.zeros(3, 3)}, ValueError, ["alibi", "(3, 3)"]),
        ({"alibi": torch.zeros(3, dtype=torch.int32)}, TypeError, ["alibi", "int32"]),
        ({"alibi": [1.0, 2.0, 3.0]}, TypeError, ["alibi", "list"]),
        ({"alibi": torch.zeros(3, requires_grad=True)}, NotImplementedError, ["alibi", "gradient", "bias"]),
        ({"alibi": torch.zeros(3, device="meta")}, ValueError, ["alibi", "meta"]),
    ):
        expect_error(lambda options=options: flash_attention(q, k, v, **options), error, words)


def check_who_serves(monkeypatch):
    """A kernel without the hook refuses by name; a plain call takes `hopper` where it serves, else `tensor_core`, for few rows
    `split_keys`, and `simple` where there are no tensor cores."""
    monkeypatch.setattr(libraries, "sm_count", lambda device: 132)  # where there is no GPU to ask
    x = Form.of(torch.empty(1, 2, 64, 64, dtype=torch.bfloat16))._replace(device=torch.device("cuda", 0))
    many_rows = x._replace(shape=torch.Size((1, 2, 512, 64)))
    plain = Call(many_rows, x, x, None, None, Settings(1.0))
    bias = plain._replace(bias=x._replace(shape=torch.Size((1, 2, 1, 64))))
    capped = plain._replace(settings=Settings(1.0, softcap=3.0))
    slopes = x._replace(shape=torch.Size((1, 2)), stride=(2, 1), dtype=torch.float32)
    for call, word in ((bias, "bias"), (capped, "softcap"), (plain._replace(alibi=slopes), "alibi")):
        for name, rung in BACKENDS.items():
            if name != "reference" and not getattr(rung, "scores", False):
                reason = rung.why_not(call._replace(**{n: getattr(call, n)._replace(device=torch.device("cpu")) for n in "qkv"})
                                      if name in EMULATED else call)  # fmt: skip
                assert reason and word in reason, f"{name}: {reason}"
        for capability, serves in ((90, "hopper"), (80, "tensor_core"), (75, "simple")):
            with monkeypatch.context() as gpu:
                gpu.setattr(libraries, "why_no_kernels", lambda rung, _, arch=capability: None if rung.runs_on(arch) else "another GPU")
                one_row = call._replace(q=x._replace(shape=torch.Size((1, 2, 1, 64))))
                assert choose(None, call) == serves and choose(None, one_row) == ("split_keys" if capability > 75 else serves)
                assert choose(None, one_row, BACKWARD) == serves
                wide = x._replace(shape=torch.Size((1, 2, 512, 160)), stride=(163840, 81920, 160, 1))
                wide_bias = word == "bias" and serves == "hopper"
                assert choose(None, call._replace(q=wide, k=wide, v=wide)) == ("tensor_core" if wide_bias else serves)


# ---- kernels, emulated


EMULATED_CASES = [
    Case(H=4, Hkv=2, Nq=70, Nk=150, D=64, softcap=1.5),
    Case(Nq=90, Nk=70, D=32, alibi=True, causal=True),
    Case(H=4, Hkv=2, Nq=70, Nk=90, D=40, Dv=72, bias="keys", softcap=2.0, alibi=True, mask="dead rows", dropout_p=0.25),
    Case(Nq=150, Nk=70, D=64, bias="hiding", softcap=2.0),
    Case(Nq=70, Nk=90, D=32, bias="rows", alibi=True, window=(20, 7)),
    Case(Nq=70, Nk=90, D=32, bias="number", spans="any", softcap=2.0),
    Case(Nq=70, Nk=90, D=32, bias="bfloat16", alibi=True, dtype=torch.bfloat16, causal=True),
    Case(Nq=70, Nk=90, D=32, bias="transposed", scale=-0.3),
]


BF16 = {"dtype": torch.bfloat16, "bias_as_q": True}
HALF16 = {"dtype": torch.float16, "bias_as_q": True}
HOPPER_CASES = [
    Case(B=1, H=4, Hkv=2, Nq=150, Nk=300, D=64, softcap=1.5, **HALF16),
    Case(B=1, H=2, Nq=150, Nk=300, D=64, softcap=30.0, causal=True, **BF16),  # no score exceeds the cap
    Case(B=1, H=2, Nq=150, Nk=460, D=64, softcap=30.0, **BF16),  # nor a third of it: m needs no update in these tiles
    Case(B=1, H=1, Nq=150, Nk=384, D=128, softcap=6.0, **HALF16),  # some scores exceed a third of it; no tile is cut
    Case(B=1, H=4, Hkv=1, Nq=300, Nk=460, D=64, alibi=True, causal=True, **HALF16),
    Case(B=1, H=2, Nq=300, Nk=150, D=128, alibi=True, **BF16),
    Case(B=2, H=2, Nq=150, Nk=301, D=64, bias="batches share", **HALF16),  # rows at addresses that a tensor map cannot read
    Case(B=2, H=2, Nq=200, Nk=304, D=128, bias="keys", causal=True, **BF16),
    Case(B=1, H=2, Nq=150, Nk=208, D=64, bias="hiding", mask="dead rows", **BF16),
    Case(B=1, H=2, Nq=150, Nk=200, D=72, bias="full", softcap=2.0, alibi=True, dropout_p=0.25, **HALF16),
    Case(B=1, H=2, Nq=150, Nk=203, D=64, bias="matrix", alibi=True, window=(70, 30), **HALF16),
    Case(B=1, H=1, Nq=70, Nk=150, D=128, bias="transposed", scale=-0.1, **BF16),
    Case(B=1, H=2, Nq=150, Nk=203, D=64, softcap=2.0, alibi=True, spans="any", mask="full", **HALF16),
    Case(B=1, H=1, Nq=100, Nk=150, D=256, softcap=2.0, alibi=True, **HALF16),
    Case(B=1, H=1, Nq=100, Nk=150, D=192, alibi=True, window=(70, 30), **BF16),
]
SAMPLE = {0, 2, 4, 7, 9, 12, 13}  # softcap, slopes or a bias alone; all three; with a mask and spans; above 128 columns
FROZEN = {"bias_frozen": True}
EVERYTHING = {"softcap": 2.0, "alibi": True, "dropout_p": 0.25, **FROZEN}
SMALL_CASES = {
    "tensor_core": [
        Case(B=2, H=2, Hkv=1, Nq=70, Nk=90, D=24, bias="keys", mask="full", **EVERYTHING, **HALF16),
        Case(B=1, H=2, Nq=70, Nk=90, D=32, bias="matrix", alibi=True, window=(20, 7), **FROZEN, **BF16),
        Case(
            B=2, H=2, Hkv=1, Nq=70, Nk=150, D=32, bias="heads share", softcap=2.0, mask="full", dropout_p=0.25, **HALF16
        ),  # with its gradient
    ],
    "split_keys": [
        Case(B=1, H=4, Hkv=1, Nq=5, Nk=301, D=24, bias="hiding", mask="dead rows", **EVERYTHING, **BF16),
    ],
}
TENSOR_CORE_CASES = [
    Case(B=1, H=2, Nq=70, Nk=90, D=32, softcap=1.5, causal=True, **HALF16),
    Case(B=1, H=4, Hkv=2, Nq=150, Nk=203, D=64, softcap=1.5, **HALF16),
    Case(B=1, H=2, Nq=150, Nk=300, D=64, softcap=30.0, causal=True, **BF16),  # no score exceeds the cap
    Case(B=1, H=2, Nq=203, Nk=150, D=128, alibi=True, causal=True, **BF16),
    Case(B=1, H=2, Nq=150, Nk=203, D=64, alibi=True, **HALF16),
    Case(B=2, H=2, Nq=70, Nk=204, D=64, bias="batches share", **FROZEN, **HALF16),  # pairs of columns
    Case(B=1, H=2, Nq=100, Nk=150, D=192, bias="full", causal=True, **FROZEN, **BF16),
    Case(B=1, H=2, Nq=150, Nk=208, D=64, bias="hiding", mask="dead rows", **FROZEN, **BF16),
    Case(B=1, H=2, Nq=70, Nk=150, D=72, bias="keys", mask="full", **EVERYTHING, **HALF16),
    Case(B=1, H=2, Nq=150, Nk=203, D=64, bias="matrix", alibi=True, window=(70, 30), **FROZEN, **HALF16),
    Case(B=1, H=2, Nq=150, Nk=203, D=64, bias="rows", spans="any", mask="full", softcap=2.0, **FROZEN, **HALF16),
    Case(B=1, H=1, Nq=70, Nk=150, D=256, bias="transposed", scale=-0.1, **FROZEN, **BF16),
    Case(B=1, H=1, Nq=100, Nk=150, D=256, softcap=2.0, alibi=True, causal=True, **HALF16),
    Case(B=1, H=2, Nq=150, Nk=304, D=64, mask="full", alibi=True, **HALF16),  # of which each byte is read once
    Case(B=1, H=2, Nq=150, Nk=203, D=128, bias="full", **EVERYTHING, **HALF16),
    # With the bias' gradient.
    Case(B=2, H=2, Nq=100, Nk=300, D=64, bias="batches share", **HALF16),
    Case(B=2, H=4, Hkv=2, Nq=300, Nk=203, D=64, bias="keys", causal=True, **BF16),
    Case(B=2, H=4, Hkv=2, Nq=150, Nk=200, D=64, bias="matrix", softcap=2.0, alibi=True, **HALF16),
    Case(B=1, H=2, Nq=150, Nk=208, D=64, bias="hiding", mask="dead rows", **BF16),
    Case(B=1, H=2, Nq=150, Nk=203, D=128, bias="full", alibi=True, window=(70, 30), dropout_p=0.25, **BF16),
    Case(B=2, H=2, Nq=70, Nk=90, D=32, bias="number", spans="any", softcap=2.0, **HALF16),
    Case(B=1, H=2, Nq=150, Nk=150, D=192, bias="transposed", causal=True, **BF16),
    Case(B=2, H=2, Nq=70, Nk=150, D=256, bias="rows", dropout_p=0.25, scale=-0.1, **BF16),
]
SPLIT_KEYS_CASES = [
    Case(B=1, H=4, Hkv=2, Nq=3, Nk=300, D=32, alibi=True, causal=True, **BF16),
    Case(B=1, H=4, Hkv=2, Nq=1, Nk=600, D=64, softcap=1.5, **HALF16),
    Case(B=1, H=8, Hkv=2, Nq=5, Nk=300, D=64, alibi=True, causal=True, **BF16),
    Case(B=2, H=4, Hkv=2, Nq=3, Nk=304, D=64, bias="batches share", **FROZEN, **HALF16),
    Case(B=1, H=4, Hkv=1, Nq=9, Nk=301, D=72, bias="hiding", mask="dead rows", **EVERYTHING, **BF16),
    Case(B=1, H=2, Hkv=1, Nq=4, Nk=700, D=256, bias="keys", softcap=30.0, sharp=5.0, **FROZEN, **HALF16),
    Case(B=1, H=4, Hkv=1, Nq=20, Nk=300, D=128, bias="rows", alibi=True, scale=-0.1, **FROZEN, **BF16),
    Case(B=1, H=4, Hkv=1, Nq=20, Nk=260, D=128, bias="full", softcap=2.0, alibi=True, mask="full", **FROZEN, **HALF16),
]
ON_TENSOR_CORES = [("hopper", case, n in SAMPLE) for n, case in enumerate(HOPPER_CASES)]
ON_TENSOR_CORES += [(name, case, True) for name, cases in SMALL_CASES.items() for case in cases]
ON_TENSOR_CORES += [("tensor_core", case, False) for case in TENSOR_CORE_CASES]
ON_TENSOR_CORES += [("split_keys", case, False) for case in SPLIT_KEYS_CASES]


@pytest.fixture
def emulator():
    if reason := BACKENDS["emulated:simple"]._why_no_kernels(0):
        pytest.skip(reason)


@pytest.mark.parametrize("case", EMULATED_CASES, ids=str)
def check_emulated(emulator, case):
    cancels = case.bias == "number"  # its gradient is the sum of all scores' gradients, which nearly cancel
    against_truth(case, Target("emulated:simple", "cpu"), slack=4 if cancels else 1)


@pytest.mark.parametrize(("name", "case", "in_sample"), ON_TENSOR_CORES, ids=str)
def check_emulated_on_tensor_cores(emulator, full, name, case, in_sample):
    if not full and not in_sample:
        pytest.skip("one of the cases of --full, and of a GPU")
    against_truth(case, Target(f"emulated:{name}", "cpu"))


@pytest.mark.parametrize(("name", "case", "in_sample"), ON_TENSOR_CORES, ids=str)
def check_on_tensor_cores(name, case, in_sample):
    """The same on a GPU, each case 50 times with the same bits, gradients too in deterministic mode."""
    target = Target(name, "cuda")
    if reason := target.why_not():
        pytest.skip(reason)
    problem = Problem.of(case, target)
    report = Report(f"{target}: {case}")
    first = problem.answer(target)
    report.expect("flash_attention", first, problem)
    report.verdict()
    torch.use_deterministic_algorithms(True)
    try:
        first = problem.answer(target)
        for _ in range(50):
            assert all(torch.equal(x, y) for x, y in zip(first, problem.answer(target), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def check_who_sums_a_bias(emulator):
    """Where `hopper` cannot compute a bias' gradient, here with a mask, `tensor_core` computes the backward."""
    case, target = Case(B=1, H=1, Nq=20, Nk=40, D=64, bias="matrix", **BF16), Target("emulated:hopper", "cpu")
    for mask, file in ((None, "backward_4_hopper.cu"), ("full", "backward_3_tensor_core.cu")):
        with emulated.counting() as counts:
            Problem.of(replace(case, mask=mask), target).answer(target)
        assert [count.file for count in counts][-1] == file


def check_what_hopper_refuses():
    """A bias that the rung's kernels cannot copy is refused, with the reason, if the rung is asked for by name."""
    for options, words in (
        ({"D": 64, "dtype": torch.bfloat16, "bias": "matrix"}, "dtype"),
        ({"D": 64, "bias": "rows", **HALF16}, "an element for every key"),
        ({"D": 192, "bias": "matrix", **HALF16}, "up to 128"),
    ):
        with pytest.raises(pytest.skip.Exception, match=words):
            Problem.of(
                Case(B=1, H=1, Nq=16, Nk=32, **options), Target("emulated:hopper", "cpu")
            )  # asks the rung first, and skips with its words


@pytest.mark.parametrize("name", ("simple", "hopper"))
def check_emulated_repeats(emulator, name):
    """The gradient of a broadcast bias has the same bits in any order of threads and blocks."""
    target = Target(f"emulated:{name}", "cpu")
    dtype = torch.float32 if name == "simple" else torch.float16
    case = Case(B=2, H=2, Nq=150, Nk=90, D=32 if name == "simple" else 64, bias="keys", bias_as_q=True, alibi=True, dtype=dtype)
    problem = Problem.of(case, target)
    results = []
    torch.use_deterministic_algorithms(True)  # for dQ; the bias' gradient always is
    try:
        for seed in range(3):
            emulated.options.seed, emulated.options.resident = seed, 1 + seed
            results.append(problem.answer(target))
    finally:
        emulated.options.seed, emulated.options.resident = 0, 2
        torch.use_deterministic_algorithms(False)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def check_frozen_bias(emulator):
    """A bias that needs no gradient gets none, and its kernel is not launched."""
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 2, 40, 32).unbind())
    bias = torch.randn(2, 40, 40)
    work = []
    for trained in (False, True):
        O = flash_attention(q, k, v, bias=bias.clone().requires_grad_(trained), backend="emulated:simple")
        with emulated.counting() as counts:
            dQ = torch.autograd.grad(O.sum(), q)[0]
        work.append((counts[0].total, dQ))
    torch.testing.assert_close(work[0][1], work[1][1])
    assert sum(work[0][0].values()) < 0.8 * sum(work[1][0].values()), work


def _without_hook(text: str) -> str:
    """A source without the code between #if SCORE and its #endif."""
    kept, depth = [], 0
    for line in text.splitlines(True):
        if line.startswith("#if"):
            depth += bool(depth) or line.startswith("#if SCORE")
        if not depth:
            kept.append(line)
        elif line.startswith("#endif"):
            depth -= 1
    return "".join(kept).replace("|| BIASED", "")


@pytest.mark.parametrize("file", ("forward_1_simple.cu", "backward_1_simple.cu"))
def check_no_trace_in_others(tmp_path, file):
    """A kernel without any of the three compiles to the same instructions as if the hook did not exist."""
    nvcc = build.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc on this machine")
    without = tmp_path / "cuda"
    shutil.copytree(build.SOURCES, without)
    for path in (*without.glob("*.cu"), *without.glob("*.cuh"), without / "attention.h"):
        path.write_text(_without_hook(path.read_text()))
    (without / "score.cuh").write_text('#include "visible.cuh"\n')
    assert "scoring" not in (without / "simple.cuh").read_text() + (without / "attention.h").read_text()
    plain = Specialisation(file, "90a", 64, "float16", True, None, True)
    for kind in (plain, plain._replace(score=("alibi",))):
        ptx = []
        for folder in (build.SOURCES, without):
            out = tmp_path / "kernel.ptx"
            subprocess.run([nvcc, *kind.flags(), "-ptx", str(folder / file), "-o", str(out)], check=True, capture_output=True)
            ptx.append(out.read_text())
        assert ".entry" in ptx[0]
        assert (ptx[0] == ptx[1]) == (not kind.score), kind


@pytest.mark.parametrize("mistake", ("order", "sign", "diagonal", "slopes of the first head", "softcap's derivative", "broadcast", "hides"))
def check_sees_mistakes(monkeypatch, mistake):
    """These checks fail where the hook is wrong."""
    apply_, add_gradient_ = Score.apply_, Score.add_gradient_

    def wrong(self, S, i, j, derivative=None):
        if mistake == "order":
            apply_(replace(self, softcap=None), S, i, j)
            return apply_(replace(self, bias=None, alibi=None), S, i, j, derivative)
        if mistake == "sign":
            self = replace(self, alibi=None if self.alibi is None else -self.alibi)
        if mistake == "diagonal":
            self = replace(self, diagonal=self.diagonal - i.start)
        if mistake == "slopes of the first head":
            self = replace(self, alibi=None if self.alibi is None else self.alibi[:, :1])
        if mistake == "hides" and self.bias is not None:
            self = replace(self, bias=self.bias.clamp(min=-100))
        result = apply_(self, S, i, j, derivative)
        return None if mistake == "softcap's derivative" else result

    def wrong_gradient(self, dBias, dX, i, j):
        if mistake == "broadcast":
            dX = dX / dX.shape[1]
        add_gradient_(self, dBias, dX, i, j)

    monkeypatch.setattr(Score, "apply_", wrong)
    monkeypatch.setattr(Score, "add_gradient_", wrong_gradient)
    bias = "hiding" if mistake == "hides" else "heads share"
    case = Case(Nq=1100, Nk=70, H=2, D=8, softcap=2.0, bias=bias, alibi=True)
    with pytest.raises(AssertionError, match="is off by"):
        against_truth(case, CPU)


if __name__ == "__main__":
    run_alone(__file__)

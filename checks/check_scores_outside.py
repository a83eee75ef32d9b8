"""What flash_attention/scores.py does outside a kernel: sinks, ALiBi's slopes, rotary embedding, T5's buckets; and the layer's arguments.

python checks/check_scores_outside.py
"""

import copy
import io
import pickle
import shutil

import pytest
import torch
from harness import expect_error, run_alone
from torch.func import jvp, vmap

from flash_attention import FlashAttention, build, flash_attention
from flash_attention.backends import BACKENDS, emulated
from flash_attention.backends import rotary as kernel
from flash_attention.backends.emulated import EmulatorError
from flash_attention.reference import Visible, normal_attention
from flash_attention.scores import alibi_slopes, relative_position_buckets, rotary, rotary_angles, with_sinks


def check_slopes():
    """The paper's for a power of two; for 12 heads, those of 8 and every other one of 16, as the authors' code gives them."""
    torch.testing.assert_close(alibi_slopes(8), 2.0 ** -torch.arange(1, 9))
    assert alibi_slopes(1).tolist() == [2**-8]
    torch.testing.assert_close(alibi_slopes(12), 2.0 ** -torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]))
    for wrong in (0, -1, 2.0, True):
        expect_error(lambda wrong=wrong: alibi_slopes(wrong), ValueError, ["heads"])


def _attend_with_sinks(q, k, v, sinks, causal):
    """The definition: one more column of scores, whose value is 0."""
    B, H, Nq, _ = q.shape
    Nk = k.shape[2]
    S = q @ k.mT / q.shape[3] ** 0.5
    if causal:
        S = S.masked_fill(~Visible(Nq, Nk, right=0).dense(slice(0, Nq), slice(0, Nk)), -torch.inf)
    S = torch.cat((S, (sinks if sinks.dim() == 2 else sinks[None])[..., None, None].expand(B, H, Nq, 1)), -1)
    return S.softmax(-1)[..., :-1] @ v


@pytest.mark.parametrize("causal", (False, True))
def check_sinks(causal):
    """As the definition has them, with every gradient, a Hessian's part and forward mode; causal rows before the first key give 0."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64, requires_grad=True) for n in (7, 5, 5))
    for sinks in (torch.randn(3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)):
        inputs = q, k, v, sinks.requires_grad_()

        def flash(q, k, v, sinks):
            return with_sinks(*flash_attention(q, k, v, causal=causal, return_lse=True), sinks)

        def normal(q, k, v, sinks):
            return _attend_with_sinks(q, k, v, sinks, causal)

        got, want = flash(*inputs), normal(*inputs)
        torch.testing.assert_close(got, want)
        assert not causal or not got[:, :, :2].any()
        dO = torch.randn_like(got)
        gradients = [torch.autograd.grad((O * dO).sum(), inputs, create_graph=True) for O in (got, want)]
        torch.testing.assert_close(*gradients)
        torch.testing.assert_close(*(torch.autograd.grad(sum(x.sin().sum() for x in each), inputs) for each in gradients))
        tangents = tuple(torch.randn_like(x) for x in inputs)
        torch.testing.assert_close(*(jvp(f, inputs, tangents) for f in (flash, normal)))
    no_sink = torch.full((3,), -torch.inf, dtype=torch.float64)
    O, LSE = flash_attention(q, k, v, causal=causal, return_lse=True)
    torch.testing.assert_close(with_sinks(O, LSE, no_sink), O)
    mapped = vmap(lambda sinks: with_sinks(O, LSE, sinks))(torch.stack((no_sink, no_sink)))
    torch.testing.assert_close(mapped[1], O)
    for wrong, error, word in ((torch.zeros(2), ValueError, "(2,)"), (torch.zeros(3).int(), TypeError, "int32"), (0.0, TypeError, "float")):
        expect_error(lambda wrong=wrong: with_sinks(O, LSE, wrong), error, ["sinks", word])
    expect_error(lambda: with_sinks(O, LSE[..., None], no_sink), ValueError, ["LSE"])


@pytest.mark.parametrize("interleaved", (False, True))
def check_rotary(interleaved):
    """The same as rotation by complex numbers: products depend only on distances, lengths and features beyond R are unchanged, gradients
    rotate back."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 2, 3, 10, 12, dtype=torch.float64).unbind()
    cos, sin = rotary_angles(torch.arange(10), 8)
    turn = torch.complex(cos.double(), sin.double())
    got = rotary(x, cos, sin, interleaved=interleaved)
    pairs = x[..., :8].unflatten(-1, (4, 2)) if interleaved else torch.stack(x[..., :8].chunk(2, -1), -1)
    rotated = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    want = rotated.flatten(-2) if interleaved else torch.cat(rotated.unbind(-1), -1)
    torch.testing.assert_close(got, torch.cat((want, x[..., 8:]), -1))
    per_batch = [rotary(x, *angles, interleaved=interleaved) for angles in [tuple(a.expand(2, 10, 4) for a in (cos, sin))]]
    torch.testing.assert_close(per_batch[0], got)
    scores = [rotary(x, *a, interleaved=interleaved) @ rotary(y, *a, interleaved=interleaved).mT
              for a in (rotary_angles(torch.arange(10) + shift, 8) for shift in (0, 1000))]  # fmt: skip
    torch.testing.assert_close(*scores, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.norm(dim=-1), x.norm(dim=-1))
    leaf = x.clone().requires_grad_()
    back = torch.autograd.grad(rotary(leaf, cos, sin, interleaved=interleaved), leaf, y)[0]
    torch.testing.assert_close(back, rotary(y, cos, -sin, interleaved=interleaved))
    half = rotary(x.bfloat16(), cos, sin, interleaved=interleaved)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, rotary(x.bfloat16().double(), cos, sin, interleaved=interleaved).bfloat16(), atol=0, rtol=2**-7)
    for wrong in ((cos[:9], sin[:9]), (cos, sin[:, :2]), (torch.zeros(10, 7), torch.zeros(10, 7))):
        expect_error(lambda wrong=wrong: rotary(x, *wrong), ValueError, ["cos", str(tuple(wrong[0].shape))])
    expect_error(lambda: rotary_angles(torch.arange(3), 7), ValueError, ["even", "7"])


# What the kernel is asked for: B, N, H, D, R, in memory as (B, N, H, D) or (B, H, N, D), angles of each batch, dtype.
TURNED = [
    (2, 11, 6, 48, 32, "BNHD", False, torch.bfloat16),
    (1, 300, 2, 128, 128, "BHND", False, torch.float16),  # all features are rotated, more than one block
    (3, 7, 5, 64, 16, "a part", True, torch.float16),
    (2, 9, 3, 24, 16, "BNHD", True, torch.float32),
]


def _to_turn(B, N, H, D, R, memory, per_batch, dtype):
    """x, cos and sin."""
    torch.manual_seed(0)
    x = torch.randn(B, N, H, 2 * D if memory == "a part" else D)[..., :D].to(dtype).transpose(1, 2)
    x = x.contiguous() if memory == "BHND" else x
    positions = torch.arange(N) + (1000 * torch.arange(B)[:, None] if per_batch else 0)
    return x, *rotary_angles(positions, R)


def _formula(x, cos, sin, interleaved):
    """The same rotation in float64, rounded once."""
    return rotary(x.double(), cos, sin, interleaved=interleaved).to(x.dtype)


def _expect_turned(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape
    # One unit in the last place of what is stored, and float32's rounding of two products that may nearly cancel.
    torch.testing.assert_close(got, want, atol=1e-6, rtol=torch.finfo(want.dtype).eps)


@pytest.fixture
def emulator():
    if reason := BACKENDS["emulated:simple"]._why_no_kernels(0):
        pytest.skip(reason)


def _turned_by_emulator(case, interleaved, back=False):
    x, cos, sin = _to_turn(*case)
    assert kernel.reads(x, cos.shape[-1])
    got = kernel.launch(x, cos, sin, interleaved, back, emulated.run_rotary)
    assert got.stride() == torch.empty_like(x).stride()
    _expect_turned(got, _formula(x, cos, -sin if back else sin, interleaved))


@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize("case", TURNED, ids=str)
def check_rotary_kernel(emulator, case, interleaved):
    """The kernel, emulated, with the angles and with the opposite ones."""
    for back in (False, True):
        _turned_by_emulator(case, interleaved, back)


@pytest.mark.parametrize(
    ("before", "after", "interleaved"),
    [
        ("a * cos - b * sin", "a * cos + b * sin", False),
        ("of_first[2 * k], of_first[2 * k + 1], c, s", "of_first[2 * k + 1], of_first[2 * k], c, s", True),
        ("p.R + (chunk - rotating) * FEATURES, second", "p.R + chunk * FEATURES, second", False),
        ("b * p.angle_stride_b", "0", True),
        ("if (p.back) sin[k]", "if (false) sin[k]", True),
        ("if (first_head + h >= p.H) continue;\n        x[h][0]", "x[h][0]", False),
        ("if (n >= p.N) return;", "", False),
        ("INTERLEAVED ? first / 2 : first);", "first);", True),
    ],
)
def check_rotary_kernel_mistakes(emulator, tmp_path, before, after, interleaved):
    """The check above catches each of these mistakes: as a wrong number or as an access outside the call's memory."""
    copy_of_sources = tmp_path / "cuda"
    shutil.copytree(build.SOURCES, copy_of_sources)
    source = copy_of_sources / kernel.ROTARY
    text = source.read_text()
    assert text.count(before) == 1
    source.write_text(text.replace(before, after))
    emulated.options.sources = copy_of_sources
    try:
        with pytest.raises((AssertionError, EmulatorError)):
            for case in TURNED[::2]:
                _turned_by_emulator(case, interleaved, back=True)
    finally:
        emulated.options.sources = None


@pytest.mark.parametrize("interleaved", (False, True))
def check_rotary_on_cuda(interleaved):
    """On a GPU eager calls run the kernel, with gradients of any order; calls that it does not serve run the formula."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU on this machine")
    for case in TURNED:
        x, cos, sin = (y.cuda() for y in _to_turn(*case))
        x = torch.empty_like(x).copy_(x).requires_grad_()
        assert kernel.serves(x, cos, sin)
        got = rotary(x, cos, sin, interleaved=interleaved)
        assert type(got.grad_fn).__name__ == "RotaryBackward"
        _expect_turned(got, _formula(x, cos, sin, interleaved))
        gradient = torch.randn_like(x).requires_grad_()
        back = torch.autograd.grad(got, x, gradient, create_graph=True)[0]
        _expect_turned(back, _formula(gradient, cos, -sin, interleaved))
        _expect_turned(torch.autograd.grad(back, gradient, x)[0], got)
    x = x.detach()
    in_parts = x.new_empty(2, 9, 3, 25)[..., 1:].transpose(1, 2).copy_(x)  # rows that do not begin at multiples of 16 bytes
    assert not kernel.serves(in_parts, cos, sin)
    _expect_turned(rotary(in_parts, cos, sin, interleaved=interleaved), rotary(x, cos, sin, interleaved=interleaved))
    leaf = cos.clone().requires_grad_()
    assert not kernel.serves(x, leaf, sin) and torch.autograd.grad(rotary(x, leaf, sin, interleaved=interleaved).sum(), leaf)[0].any()
    _, tangent = jvp(lambda x: rotary(x, cos, sin, interleaved=interleaved), (x,), (x,))
    _expect_turned(tangent, rotary(x, cos, sin, interleaved=interleaved))
    mapped = vmap(lambda x: rotary(x, cos[0], sin[0], interleaved=interleaved))(x[None])
    _expect_turned(mapped[0, :1], rotary(x[:1], cos[0], sin[0], interleaved=interleaved))
    compiled = torch.compile(lambda x: rotary(x, cos, sin, interleaved=interleaved), fullgraph=True, backend="aot_eager")
    _expect_turned(compiled(x), rotary(x, cos, sin, interleaved=interleaved))


def check_angles_far_away():
    """The angle of position 2²⁰ + 1 is right to a float32's rounding, which float32 arithmetic cannot give."""
    cos, sin = rotary_angles(torch.tensor([2**20 + 1]), 2)
    want = torch.tensor(2**20 + 1, dtype=torch.float64)
    torch.testing.assert_close(torch.stack((cos, sin)).flatten().double(), torch.stack((want.cos(), want.sin())), atol=1e-7, rtol=0)


def check_buckets():
    """Buckets are exact near the diagonal, then logarithmic, the last one beyond max_distance; aligned bottom-right."""
    both = relative_position_buckets(300, 300)
    assert both[200, 200] == 0 and both[200, 193:200].tolist() == [7, 6, 5, 4, 3, 2, 1] and both[200, 201:204].tolist() == [17, 18, 19]
    assert both[200, 72] == both[299, 0] == 15 and both[0, 299] == 31 and both[200, 184] == 10  # 8 + ⌊8 · log 2 / log 16⌋
    past = relative_position_buckets(3, 300, bidirectional=False)
    assert past[0, 297] == 0 and past[0, 298] == 0 and past[2, 299] == 0 and past[2, 284] == 15 and past[2, 0] == 31
    assert (past.diff(dim=1) <= 0).all() and past.unique().numel() == 32
    for wrong in ({"buckets": 2}, {"max_distance": 8}):
        expect_error(lambda wrong=wrong: relative_position_buckets(2, 2, **wrong), ValueError, ["buckets"])


def check_layer():
    """softcap, alibi and score_bias reach the call; slopes stay float32, move with the layer, and are not in its state_dict."""
    torch.manual_seed(0)
    x, bias = torch.randn(2, 9, 32), torch.randn(4, 9, 9, requires_grad=True)
    layer = FlashAttention(32, heads=4, dim_head=8, causal=True, softcap=1.5, alibi=True)
    q, k, v = (projection(x).unflatten(2, (4, 8)).transpose(1, 2) for projection in (layer.to_q, layer.to_k, layer.to_v))
    scored = {"softcap": 1.5, "bias": bias, "alibi": alibi_slopes(4), "visible": Visible(9, 9, right=0)}
    want = layer.to_out(normal_attention(q, k, v, **scored).transpose(1, 2).flatten(2))
    got = layer(x, score_bias=bias)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(O.sum(), bias)[0] for O in (got, want)), atol=1e-5, rtol=1e-5)
    plain = FlashAttention(32, heads=4, dim_head=8, causal=True)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(layer.state_dict())
    assert not torch.allclose(plain(x), got)
    halved = copy.deepcopy(layer).bfloat16()
    assert halved.alibi.dtype == torch.float32 and halved.to_q.weight.dtype == torch.bfloat16
    assert copy.deepcopy(layer).to("meta").alibi.is_meta
    torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(x, score_bias=bias), want)
    old = copy.deepcopy(plain.__getstate__())
    old.pop("softcap"), old["_buffers"].pop("alibi")
    again = FlashAttention.__new__(FlashAttention)
    again.__setstate__(old)
    torch.testing.assert_close(again(x), plain(x))
    assert "softcap=1.5, alibi=True" in repr(layer) and "softcap" not in repr(plain)
    expect_error(lambda: FlashAttention(32, softcap=-1.0), ValueError, ["softcap"])
    torch.save(layer.state_dict(), io.BytesIO())


if __name__ == "__main__":
    run_alone(__file__)

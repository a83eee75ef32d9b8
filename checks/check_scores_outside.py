"""What flash_attention/scores.py does outside a kernel: sinks, ALiBi's slopes, rotary embedding, T5's buckets; and the layer's arguments.

python checks/check_scores_outside.py
"""

import copy
import io
import pickle

import pytest
import torch
from harness import expect_error, run_alone
from torch.func import jvp, vmap

from flash_attention import FlashAttention, flash_attention
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
    """By the definition: one more column of scores, one more value that is 0."""
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
    """A rotation by complex numbers: products depend on distances alone, lengths stay, features beyond R stay, gradients rotate back."""
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


def check_angles_far_away():
    """The angle of position 2²⁰ + 1 is right to a float32's rounding, which float32 arithmetic cannot give."""
    cos, sin = rotary_angles(torch.tensor([2**20 + 1]), 2)
    want = torch.tensor(2**20 + 1, dtype=torch.float64)
    torch.testing.assert_close(torch.stack((cos, sin)).flatten().double(), torch.stack((want.cos(), want.sin())), atol=1e-7, rtol=0)


def check_buckets():
    """Exact near the diagonal, then as the logarithm, the last beyond max_distance; the row's own column is aligned bottom-right."""
    both = relative_position_buckets(300, 300)
    assert both[200, 200] == 0 and both[200, 193:200].tolist() == [7, 6, 5, 4, 3, 2, 1] and both[200, 201:204].tolist() == [17, 18, 19]
    assert both[200, 72] == both[299, 0] == 15 and both[0, 299] == 31 and both[200, 184] == 10  # 8 + ⌊8 · log 2 / log 16⌋
    past = relative_position_buckets(3, 300, bidirectional=False)
    assert past[0, 297] == 0 and past[0, 298] == 0 and past[2, 299] == 0 and past[2, 284] == 15 and past[2, 0] == 31
    assert (past.diff(dim=1) <= 0).all() and past.unique().numel() == 32
    for wrong in ({"buckets": 2}, {"max_distance": 8}):
        expect_error(lambda wrong=wrong: relative_position_buckets(2, 2, **wrong), ValueError, ["buckets"])


def check_layer():
    """softcap, alibi and a bias of the scores reach the call; slopes stay float32, move along, and are in no state_dict."""
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

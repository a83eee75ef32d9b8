"""Code written for earlier FlashAttentions: with its import changed it runs, or raises and says what to write. It never means something
else.

python checks/check_earlier.py
"""

import copy

import pytest
import torch
from harness import expect_error, run_alone
from torch import Tensor, nn
from torch.nn import functional

from flash_attention import FlashAttention, ScaledDotProduct, flash_attention, reference
from flash_attention.integrations.earlier import ChunkedFlashAttention, PackedFlashAttention

B, N, M, DIM, HEADS = 2, 13, 19, 32, 4
X, CONTEXT = torch.randn(2, B, M, DIM, generator=torch.Generator().manual_seed(0))
X = X[:, :N]
KEEP = torch.arange(M) >= torch.tensor([[0], [7]])  # left padding
TOKENS = torch.arange(M) < torch.tensor([[M], [8]])  # right padding


def same(got: Tensor, want: Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(got, want, rtol=1e-6, atol=atol)


def truth(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, scale: float | None = None) -> Tensor:
    """torch's own attention, (B, H, N, D)."""
    allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2] if causal else k.shape[2])
    return functional.scaled_dot_product_attention(q, k, v, allowed if mask is None else allowed & mask, scale=scale)


# ---- FlashAttention2.0


def check_flash_attention_2_0():
    """Its constructor, its calls (context by name or position, the mask by name or position, bucket sizes anywhere) and its state_dict."""
    layer = FlashAttention(
        dim=DIM, heads=HEADS, dim_head=16, causal=True, q_bucket_size=512, k_bucket_size=1024, parallel=False, mixed_precision=False
    )
    to_q, to_kv, to_out = (torch.randn(n, DIM) * DIM**-0.5 for n in (64, 128, 64))
    layer.load_state_dict({"to_q.weight": to_q, "to_kv.weight": to_kv, "to_out.weight": to_out.T})

    def by_hand(x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (t.unflatten(2, (HEADS, 16)).transpose(1, 2) for t in (x @ to_q.T, *(context @ to_kv.T).chunk(2, dim=-1)))
        return truth(q, k, v, mask, causal=True).transpose(1, 2).flatten(2) @ to_out

    four, size = KEEP[:, None, None], 1e-5
    self_mask = KEEP[:, M - N :]
    alive = self_mask.cummax(1).values  # a causal row of nothing but padding is NaN in torch's attention and 0 here
    same(layer(X), by_hand(X, X), size)
    same(layer(X, mask=self_mask)[alive], by_hand(X, X, self_mask[:, None, None])[alive], size)
    assert not layer(X, None, self_mask)[~alive].any()
    same(layer(X, None, self_mask), layer(X, mask=self_mask))
    want = by_hand(X, CONTEXT, four)
    assert not torch.allclose(want, by_hand(X, CONTEXT), atol=0.1)
    for got in (
        layer(X, CONTEXT, KEEP),
        layer(X, CONTEXT, mask=KEEP),
        layer(X, context=CONTEXT, mask=four),
        layer(X, mask=KEEP, context=CONTEXT, q_bucket_size=4, k_bucket_size=8),
        layer(X, CONTEXT, KEEP, 4, 8),
    ):
        same(got, want, size)
    model = nn.Sequential(nn.Identity(), copy.deepcopy(layer))
    state = {"1.to_q.weight": to_q, "1.to_kv.weight": to_kv, "1.to_out.weight": 2 * to_out.T}
    model.load_state_dict(state)
    same(model(X), 2 * layer(X), size)
    assert "1.to_kv.weight" in state
    with pytest.raises(RuntimeError, match=r"Missing.*to_k\.weight"):
        model.load_state_dict({"1.to_q.weight": to_q, "1.to_out.weight": to_out.T})


# ---- the chunked module


def check_chunked():
    """Its constructor and the order of its call: values, keys, queries, by position or by name; its tiles; its state_dict's names."""
    layer = ChunkedFlashAttention(DIM, HEADS, 5)
    assert (layer.block_size, layer.dim_head, layer.kv_heads) == (5, DIM // HEADS, HEADS)
    values, keys, queries = CONTEXT, CONTEXT.cos(), X
    plain = FlashAttention(DIM, HEADS, dim_head=DIM // HEADS, bias=True)
    plain.load_state_dict(layer.state_dict())
    want = plain(queries, key=keys, value=values, mask=KEEP)
    same(layer(values, keys, queries, KEEP), want)
    same(layer(values=values, keys=keys, queries=queries, mask=KEEP), want)
    assert not torch.allclose(layer(values, keys, queries), layer(keys, values, queries), atol=1e-3)
    names = {"to_q": "queries", "to_k": "keys", "to_v": "values", "to_out": "fc_out"}
    old = {f"{names[name.split('.')[0]]}.{name.split('.')[1]}": x for name, x in plain.state_dict().items()}
    other = ChunkedFlashAttention(embed_size=DIM, heads=HEADS, chunk_size=3)
    assert not torch.allclose(other(values, keys, queries, KEEP), want, atol=1e-3)
    other.load_state_dict(old)
    same(other(values, keys, queries, KEEP), want)
    with pytest.raises(ValueError, match="heads 5 and embed_size 32"):
        ChunkedFlashAttention(DIM, 5, 4)


# ---- attention without projections: the CUDA implementation, the official package's first interface


def check_cuda_implementation():
    attend = ScaledDotProduct(head_dim=64, dropout=0)
    Q, K, V = torch.randn(3, B, HEADS, N, 64)
    same(attend(Q, K, V), truth(Q, K, V))


@pytest.mark.parametrize("causal", (False, True), ids=("general", "causal"))
def check_packed(causal):
    """Output and gradient of packed qkv, alone, with a key padding mask (padding gives 0) and as sequences one after another."""
    qkv = torch.randn(B, M, 3, HEADS, 16, dtype=torch.float64, requires_grad=True)
    attend, scale = PackedFlashAttention(softmax_scale=0.3), 0.3

    def by_hand(qkv: Tensor) -> Tensor:
        return truth(*(x.transpose(1, 2) for x in qkv.unbind(2)), causal=causal, scale=scale).transpose(1, 2)

    O, weights = attend(qkv, causal=causal)
    assert weights is None
    same(O, by_hand(qkv))

    lengths = TOKENS.sum(1).tolist()
    alone = [by_hand(sequence[None, :n])[0] for sequence, n in zip(qkv, lengths, strict=True)]
    O, _ = attend(qkv, key_padding_mask=TOKENS, causal=causal)
    same(O[TOKENS], torch.cat(alone))
    assert not O[~TOKENS].any()
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    packed, _ = attend(qkv[TOKENS], causal=causal, cu_seqlens=cu_seqlens, max_s=M)
    same(packed, torch.cat(alone))
    same(attend(qkv[TOKENS], None, causal, cu_seqlens)[0], packed)

    dO = torch.randn_like(packed)
    (want,) = torch.autograd.grad(torch.cat(alone), qkv, dO)
    for got in (O[TOKENS], packed):
        same(torch.autograd.grad(got, qkv, dO)[0], want)


def check_packed_dropout():
    attend, qkv = PackedFlashAttention(attention_dropout=0.5), torch.randn(B, M, 3, HEADS, 16)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    torch.manual_seed(0)
    want = flash_attention(q, k, v, dropout_p=0.5).transpose(1, 2)
    torch.manual_seed(0)
    assert torch.equal(attend(qkv)[0], want)
    same(attend.eval()(qkv)[0], flash_attention(q, k, v).transpose(1, 2))


# ---- FlashAttention-PyTorch


def check_flash_attention_pytorch():
    """Its functions, called as its scripts do: mask (B, kv_len), what a forward returns handed to its backward, gradients as autograd's."""
    Q, K, V = (torch.randn(B, HEADS, n, 16, requires_grad=True) for n in (N, M, M))
    O, l, m = reference.flash_attention_forward(Q, K, V, KEEP)
    dO = torch.randn_like(O)
    want = reference.normal_attention(Q, K, V, KEEP)
    same(O, want)
    gradients = reference.flash_attention_backward(Q, K, V, KEEP, O, l, m, dO)
    for got, right in zip(gradients, torch.autograd.grad(want, (Q, K, V), dO), strict=True):
        same(got, right, 1e-5)
    O, l, m = reference.flash_attention_causal_forward(Q, K, V)
    want = reference.normal_attention_causal(Q, K, V)
    same(O, want)
    gradients = reference.flash_attention_causal_backward(Q, K, V, None, O, l, m, dO)
    for got, right in zip(gradients, torch.autograd.grad(want, (Q, K, V), dO), strict=True):
        same(got, right, 1e-5)


# ---- arguments that would mean something else here

ZEROS = torch.zeros(B, HEADS, N, 64)
QKV = torch.zeros(B, N, 3, HEADS, 16)
CHUNKED = "integrations.earlier import ChunkedFlashAttention as FlashAttention"
PACKED = "integrations.earlier import PackedFlashAttention as FlashAttention"
ALONE = "from flash_attention import ScaledDotProduct as FlashAttention"
# Old code → the call, and what the message must name.
REFUSED = {
    "dim_head by position": (lambda: FlashAttention(256, 8, 16), TypeError, ["too many positional", "dim_head", "block_size", CHUNKED]),
    "chunk_size": (lambda: FlashAttention(256, 8, chunk_size=16), TypeError, ["chunk_size", "block_size", CHUNKED]),
    "embed_size": (lambda: FlashAttention(embed_size=256, heads=8, chunk_size=16), TypeError, [CHUNKED]),
    "head_dim": (lambda: FlashAttention(head_dim=64, dropout=0), TypeError, [ALONE]),
    "nothing": (lambda: FlashAttention(), TypeError, ["'dim'", ALONE]),
    "head_dim by position": (lambda: FlashAttention(64)(ZEROS, ZEROS, ZEROS), TypeError, ["mask", "(2, 4, 13, 64)"]),
    "head_dim and dropout by position": (lambda: FlashAttention(64, 0.1), ValueError, ["heads", "0.1"]),
    "softmax_scale": (lambda: FlashAttention(softmax_scale=0.1), TypeError, [PACKED]),
    "attention_dropout": (lambda: FlashAttention(attention_dropout=0.1), TypeError, [PACKED]),
    "a misspelt setting": (lambda: FlashAttention(64, causl=True), TypeError, ["causl"]),
    "values, keys, queries": (
        lambda: FlashAttention(DIM)(X, X, X),
        TypeError,
        ["(values, keys, queries)", CHUNKED, "key=key, value=value"],
    ),
    "and their mask": (lambda: FlashAttention(DIM)(X, X, X, KEEP), TypeError, ["(values, keys, queries)", CHUNKED]),
    "packed qkv": (lambda: ScaledDotProduct(16)(QKV), TypeError, ["'k'"]),
    "parallel": (lambda: FlashAttention(64, parallel=True), NotImplementedError, ["parallel", "DistributedDataParallel"]),
    "a bucket of nothing": (lambda: FlashAttention(64, q_bucket_size=0), ValueError, ["q_bucket_size", "0"]),
    "a bucket of nothing in a call": (lambda: FlashAttention(DIM)(X, k_bucket_size=-1), ValueError, ["k_bucket_size", "-1"]),
    "attn_mask": (
        lambda: PackedFlashAttention()(QKV, attn_mask=KEEP),
        NotImplementedError,
        ["attn_mask", "flash_attention(q, k, v, mask)"],
    ),
    "need_weights": (lambda: PackedFlashAttention()(QKV, need_weights=True), NotImplementedError, ["need_weights"]),
    "the mask third, as in 0.1": (lambda: PackedFlashAttention()(QKV, None, KEEP), TypeError, ["causal"]),
    "qkv of two": (lambda: PackedFlashAttention()(QKV[:, :, :2]), ValueError, ["(B, S, 3, H, D)", "(2, 13, 2, 4, 16)"]),
    "a mask of another length": (lambda: PackedFlashAttention()(QKV, KEEP), ValueError, ["(2, 13)", "(2, 19)"]),
    "a mask and cu_seqlens": (
        lambda: PackedFlashAttention()(QKV[0], KEEP[0], cu_seqlens=torch.tensor([0, 13])),
        ValueError,
        ["cu_seqlens", "key_padding_mask"],
    ),
    "cu_seqlens of fewer tokens": (lambda: PackedFlashAttention()(QKV[0], cu_seqlens=torch.tensor([0, 12])), ValueError, ["13", "[0, 12]"]),
    "cu_seqlens that fall": (lambda: PackedFlashAttention()(QKV[0], cu_seqlens=torch.tensor([0, 9, 6, 13])), ValueError, ["[0, 9, 6, 13]"]),
    "cu_seqlens past max_s": (lambda: PackedFlashAttention()(QKV[0], cu_seqlens=torch.tensor([0, 13]), max_s=12), ValueError, ["max_s 12"]),
    "a mask of 0 and 1": (lambda: reference.flash_attention_forward(*[X[:, None]] * 3, KEEP.long()), TypeError, ["mask.bool()"]),
    "no mask before O": (lambda: reference.flash_attention_causal_backward(*[ZEROS] * 7), TypeError, ["'dO'"]),
}


@pytest.mark.parametrize(("call", "error", "words"), REFUSED.values(), ids=REFUSED)
def check_refused(call, error, words):
    expect_error(call, error, words)


if __name__ == "__main__":
    run_alone(__file__)

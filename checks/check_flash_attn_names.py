"""The official package's functions: what they return, write and refuse.

python checks/check_flash_attn_names.py
"""

import inspect

import pytest
import torch
from harness import expect_error, run_alone

from flash_attention import flash_attention
from flash_attention.integrations import flash_attn
from flash_attention.integrations.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_with_kvcache,
)
from flash_attention.reference import normal_attention


def check_plain_and_packed():
    """(B, N, H, D) tensors, grouped heads, bottom-right; gradients arrive in the packed tensor."""
    q, kv = torch.randn(2, 5, 4, 16, dtype=torch.float64), torch.randn(2, 9, 2, 2, 16, dtype=torch.float64, requires_grad=True)
    k, v = kv.unbind(2)
    past = torch.ones(5, 9, dtype=torch.bool).tril(4)
    want, LSE = normal_attention(*(x.transpose(1, 2) for x in (q, k, v)), past[None, None], return_lse=True)
    O, lse, probabilities = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    torch.testing.assert_close(O, want.transpose(1, 2))
    torch.testing.assert_close(lse, LSE)
    assert probabilities is None
    packed = flash_attn_kvpacked_func(q, kv, causal=True)
    torch.testing.assert_close(packed, O)
    (got,) = torch.autograd.grad(packed.square().sum(), kv)
    (gradient,) = torch.autograd.grad(want.square().sum(), kv)
    torch.testing.assert_close(got, gradient)
    qkv = torch.randn(2, 7, 3, 4, 16, dtype=torch.float64)
    O = flash_attn_qkvpacked_func(qkv, softmax_scale=0.3, window_size=(-1, 0))
    want = flash_attention(*(x.transpose(1, 2) for x in qkv.unbind(2)), scale=0.3, causal=True)
    torch.testing.assert_close(O, want.transpose(1, 2))


def check_scores():
    """softcap and alibi_slopes, (H,) or (B, H), by the official definition: −slope · |i + Nk − Nq − j|; 0.0 is no cap."""
    q, k, v = torch.randn(2, 5, 4, 16), torch.randn(2, 9, 4, 16), torch.randn(2, 9, 4, 16)
    distance = (torch.arange(5)[:, None] + 4 - torch.arange(9)).abs()
    for slopes in (torch.rand(4), torch.rand(2, 4)):
        scores = 3 * torch.tanh(q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / 4 / 3) - slopes[..., None, None] * distance
        want = (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)
        torch.testing.assert_close(flash_attn_func(q, k, v, softcap=3.0, alibi_slopes=slopes), want)
    torch.testing.assert_close(flash_attn_func(q, k, v, softcap=0.0), flash_attn_func(q, k, v))


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("leftpad", (False, True))
@pytest.mark.parametrize("kind", ("plain", "int", "all", "batch index", "pages"))
def check_cache(kind, leftpad, causal):
    """Appends in place, at each sequence's own length, and nowhere else; attends over what is there."""
    B, Nq, H, Hkv, D, N, n = 3, 2, 4, 2, 16, 32, 2
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, m, h, D, dtype=torch.float64, generator=random) for m, h in ((Nq, H), (n, Hkv), (n, Hkv)))
    before = torch.tensor([5, 30, 0], dtype=torch.int32)
    pads = torch.tensor([1, 7, 0], dtype=torch.int32) if leftpad else None
    options = {"cache_seqlens": before}
    if kind == "int":
        before[:] = 9
        options = {"cache_seqlens": 9}
    if kind == "all":
        before[:] = N
        options, k, v, n = {}, None, None, 0
    held = torch.randn(2, B, N, Hkv, D, dtype=torch.float64, generator=random)  # each sequence's tokens, then filling
    if kind == "batch index":
        options["cache_batch_idx"] = torch.tensor([4, 0, 3], dtype=torch.int32)
        caches = torch.randn(2, 5, N, Hkv, D, dtype=torch.float64, generator=random)
        caches[:, options["cache_batch_idx"].long()] = held
    elif kind == "pages":
        table = torch.randperm(14, generator=random)[:12].view(B, 4).int()
        options["block_table"] = table
        caches = torch.randn(2, 14, 8, Hkv, D, dtype=torch.float64, generator=random)
        caches[:, table.long()] = held.unflatten(2, (4, 8))
    else:
        caches = held.clone()
    untouched = caches.clone()
    O, LSE = flash_attn_with_kvcache(
        q, caches[0], caches[1], k, v, cache_leftpad=pads, causal=causal, return_softmax_lse=True, num_splits=3, **options
    )
    for b in range(B):
        start, length = 0 if pads is None else int(pads[b]), int(before[b])
        for x, new in zip(held, (k, v), strict=True):
            if new is not None:
                x[b, length : length + n] = new[b]
        seen = torch.ones(Nq, length + n, dtype=torch.bool)
        if causal:
            seen = seen.tril(length + n - Nq)
        seen[:, :start] = False
        one = (x[b : b + 1, : length + n].transpose(1, 2) for x in held)
        want, lse = normal_attention(q[b : b + 1].transpose(1, 2), *one, seen[None, None], return_lse=True)
        torch.testing.assert_close(O[b], want[0].transpose(0, 1))
        torch.testing.assert_close(LSE[b], lse[0])
    if kind == "batch index":
        untouched[:, options["cache_batch_idx"].long()] = held
    elif kind == "pages":
        untouched[:, table.long()] = held.unflatten(2, (4, 8))
    else:
        untouched = held
    assert torch.equal(caches, untouched)


def check_what_is_not_served_is_named():
    x = torch.randn(1, 4, 2, 16)
    cu = torch.tensor([0, 4], dtype=torch.int32)
    for options, words in (
        ({"window_size": (3, 0)}, ["window_size", "(3, 0)"]),
        ({"window_size": (-1, 2)}, ["window_size"]),
        ({"softcap": 30.0}, ["softcap"]),
        ({"alibi_slopes": torch.ones(2)}, ["alibi_slopes"]),
    ):
        if "window_size" in options:
            expect_error(lambda options=options: flash_attn_func(x, x, x, **options), NotImplementedError, words)
        expect_error(lambda options=options: flash_attn_with_kvcache(x, x, x, **options), NotImplementedError, words)
    expect_error(lambda: flash_attn_func(x, x, x, 0.1, return_attn_probs=True), NotImplementedError, ["return_attn_probs", "dropout"])
    expect_error(lambda: flash_attn_with_kvcache(x, x, x, rotary_cos=x), NotImplementedError, ["rotary_cos"])
    expect_error(lambda: flash_attn.flash_attn_varlen_func(x[0], x[0], x[0], cu, cu, 4, 4), NotImplementedError, ["cu_seqlens"])
    expect_error(lambda: flash_attn.flash_attn_varlen_kvpacked_func(x[0], x, cu, cu, 4, 4), NotImplementedError, ["cu_seqlens"])
    expect_error(lambda: flash_attn.flash_attn_varlen_qkvpacked_func(x, cu, 4), NotImplementedError, ["cu_seqlens"])
    expect_error(lambda: flash_attn_with_kvcache(x.requires_grad_(), x, x), NotImplementedError, ["gradients", "no_grad"])


def check_errors_come_before_writing():
    q, new, cache = torch.randn(2, 1, 4, 16), torch.ones(2, 3, 2, 16), torch.zeros(2, 8, 2, 16)
    lengths = torch.tensor([2, 6], dtype=torch.int32)
    for call, error, words in (
        (lambda: flash_attn_with_kvcache(q, cache, cache, new, new, cache_seqlens=lengths), ValueError, ["2 … 6", "3", "8"]),
        (lambda: flash_attn_with_kvcache(q, cache, cache, new, new, cache_seqlens=6), ValueError, ["do not fit"]),
        (lambda: flash_attn_with_kvcache(q, cache, cache, new, new), ValueError, ["cache_seqlens"]),
        (lambda: flash_attn_with_kvcache(q, cache, cache, new), ValueError, ["together"]),
        (lambda: flash_attn_with_kvcache(q, cache, cache, new, new[:, :2], cache_seqlens=1), ValueError, ["(2, 2, 2, 16)"]),
        (lambda: flash_attn_with_kvcache(q, cache, cache, new, new, cache_seqlens=lengths.long()), TypeError, ["int32", "int64"]),
        (lambda: flash_attn_with_kvcache(q, cache, cache.half(), new, new, cache_seqlens=1), TypeError, ["v_cache", "float16"]),
        (lambda: flash_attn_with_kvcache(q, cache[:1], cache[:1], new, new, cache_seqlens=1), ValueError, ["batch size 2"]),
        (lambda: flash_attn_with_kvcache(q[:, :, :3], cache, cache, new, new, cache_seqlens=1), ValueError, ["divides"]),
    ):
        expect_error(call, error, words)
    assert not cache.any()


def check_signatures():
    """Names, order and defaults of flash-attn 2.8's parameters."""
    common = "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False"
    common += ", return_attn_probs=False"
    lengths = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
    wanted = {
        "flash_attn_func": f"(q, k, v, {common})",
        "flash_attn_kvpacked_func": f"(q, kv, {common})",
        "flash_attn_qkvpacked_func": f"(qkv, {common})",
        "flash_attn_varlen_func": f"(q, k, v, {lengths}, {common}, block_table=None)",
        "flash_attn_varlen_kvpacked_func": f"(q, kv, {lengths}, {common})",
        "flash_attn_varlen_qkvpacked_func": f"(qkv, cu_seqlens, max_seqlen, {common})",
    }
    for name, signature in wanted.items():
        assert str(inspect.signature(getattr(flash_attn, name))) == signature
    parameters = inspect.signature(flash_attn_with_kvcache).parameters
    wanted = "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad block_table"
    wanted += " softmax_scale causal window_size softcap rotary_interleaved alibi_slopes num_splits return_softmax_lse"
    assert list(parameters) == wanted.split()


if __name__ == "__main__":
    run_alone(__file__)

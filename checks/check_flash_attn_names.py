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


def turned(x: torch.Tensor, angles: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x (n, heads, D), its first 2 · angles.shape[1] features turned as complex numbers by angles (n, R / 2)."""
    half = angles.shape[1]
    pairs = (half, 2) if interleaved else (2, half)
    moved = x[..., : 2 * half].unflatten(-1, pairs)
    moved = (moved if interleaved else moved.mT).contiguous()
    moved = torch.view_as_real(torch.view_as_complex(moved) * torch.polar(torch.ones_like(angles), angles)[:, None])
    return torch.cat(((moved if interleaved else moved.mT).flatten(-2), x[..., 2 * half :]), -1)


@pytest.mark.parametrize("scored", (None, "interleaved", "halves"))
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("leftpad", (False, True))
@pytest.mark.parametrize("kind", ("plain", "int", "all", "batch index", "pages"))
def check_cache(kind, leftpad, causal, scored):
    """Appends in place, at each sequence's own length, and nowhere else; attends over what is there. scored: with softcap, ALiBi and rotary
    embeddings of the first 8 features, pairs interleaved or not."""
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
    held = torch.randn(2, B, N, Hkv, D, dtype=torch.float64, generator=random)  # each sequence's tokens, then filler
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
    softcap, slopes = None, [None] * B
    if scored:
        softcap, slopes, angles = 2.0, torch.rand(B, H, generator=random), torch.rand(N + 2, 4, dtype=torch.float64, generator=random)
        options |= {"softcap": softcap, "alibi_slopes": slopes, "rotary_interleaved": scored == "interleaved"}
        if n:
            options |= {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    O, LSE = flash_attn_with_kvcache(
        q, caches[0], caches[1], k, v, cache_leftpad=pads, causal=causal, return_softmax_lse=True, num_splits=3, **options
    )
    for b in range(B):
        start, length = 0 if pads is None else int(pads[b]), int(before[b])
        queries = q[b]
        for x, new in zip(held, (k, v), strict=True):
            if new is not None:
                keys_turn = scored and new is k
                x[b, length : length + n] = turned(new[b], angles[length : length + n], scored == "interleaved") if keys_turn else new[b]
        if scored and n:  # queries are rotated too: by their own positions if causal, else all by the first one's
            at = length + torch.arange(Nq) * causal
            queries = turned(queries, angles[at], scored == "interleaved")
        seen = torch.ones(Nq, length + n, dtype=torch.bool)
        if causal:
            seen = seen.tril(length + n - Nq)
        seen[:, :start] = False
        one = (x[b : b + 1, : length + n].transpose(1, 2) for x in held)
        scores = {"softcap": softcap, "alibi": slopes[b]}
        want, lse = normal_attention(queries[None].transpose(1, 2), *one, seen[None, None], return_lse=True, **scores)
        torch.testing.assert_close(O[b], want[0].transpose(0, 1))
        torch.testing.assert_close(LSE[b], lse[0])
    if kind == "batch index":
        untouched[:, options["cache_batch_idx"].long()] = held
    elif kind == "pages":
        untouched[:, table.long()] = held.unflatten(2, (4, 8))
    else:
        untouched = held
    assert torch.equal(caches, untouched)


def seen_by(n: int, m: int, causal: bool, window: tuple[int, int]) -> torch.Tensor:
    """Which of m keys each of n queries sees, True or False, by the package's words: bottom-right, -1 for no limit."""
    place, j = torch.arange(n)[:, None] + m - n, torch.arange(m)
    left, right = window[0], 0 if causal else window[1]
    return ((left < 0) | (j >= place - left)) & ((right < 0) | (j <= place + right))


WINDOWS = [(False, (3, 1)), (True, (2, 5)), (False, (-1, 2)), (True, (-1, -1)), (False, (-1, -1))]


@pytest.mark.parametrize(("causal", "window"), WINDOWS)
def check_windows(causal, window):
    q, k, v = torch.randn(2, 6, 4, 16, dtype=torch.float64), *torch.randn(2, 2, 9, 2, 16, dtype=torch.float64)
    want = normal_attention(*(x.transpose(1, 2) for x in (q, k, v)), seen_by(6, 9, causal, window)[None, None])
    torch.testing.assert_close(flash_attn_func(q, k, v, causal=causal, window_size=window), want.transpose(1, 2))
    for queries in (q, q[:, -1:]):
        O = flash_attn_with_kvcache(queries, k, v, cache_seqlens=torch.tensor([9, 7], dtype=torch.int32), causal=causal, window_size=window)
        for b, n in enumerate((9, 7)):
            one = (x[b : b + 1].transpose(1, 2) for x in (queries, k[:, :n], v[:, :n]))
            want = normal_attention(*one, seen_by(queries.shape[1], n, causal, window)[None, None])
            torch.testing.assert_close(O[b : b + 1], want.transpose(1, 2))


@pytest.mark.parametrize("k_lengths", ([4, 1, 7], [6, 3, 7]), ids=("as many", "more keys"))
def check_packed_scores(k_lengths):
    """softcap and slopes, one per head or also per sequence: every sequence gives the same as by itself, LSE and gradients too."""
    lengths = [4, 1, 7]
    cu, cu_k = (torch.tensor([0, *each]).cumsum(0).int() for each in (lengths, k_lengths))
    q = torch.randn(12, 4, 16, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(sum(k_lengths), 2, 16, dtype=torch.float64) for _ in range(2))
    for slopes in (None, torch.rand(4), torch.rand(3, 4)):
        options = {"causal": True, "window_size": (3, -1), "softcap": 2.0, "return_attn_probs": True}
        O, LSE, _ = flash_attn.flash_attn_varlen_func(q, k, v, cu, cu_k, 7, 7, alibi_slopes=slopes, **options)
        parts = zip(q.split(lengths), k.split(k_lengths), v.split(k_lengths), strict=True)
        alone = [
            flash_attn_func(*(x[None] for x in part), alibi_slopes=slopes if slopes is None or slopes.dim() == 1 else slopes[b], **options)
            for b, part in enumerate(parts)
        ]
        want, lse = torch.cat([x[0][0] for x in alone]), torch.cat([x[1][0] for x in alone], -1)
        torch.testing.assert_close(O, want)
        torch.testing.assert_close(LSE, lse)
        torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), q)[0] for x in (O, want)))


@pytest.mark.parametrize("paged", (False, True))
@pytest.mark.parametrize(("causal", "window"), WINDOWS)
def check_packed_sequences(causal, window, paged):
    """Each sequence gives the same as alone, including one without queries and one without keys; gradients too."""
    random = torch.Generator().manual_seed(1)
    lengths, k_lengths, size = [5, 0, 3, 2], [7, 4, 3, 0], 4
    q = torch.randn(sum(lengths), 4, 16, dtype=torch.float64, generator=random, requires_grad=True)
    kv = torch.randn(sum(k_lengths), 2, 2, 16, dtype=torch.float64, generator=random, requires_grad=True)
    starts, k_starts = ([sum(n[:b]) for b in range(5)] for n in (lengths, k_lengths))
    cu_seqlens, k_cu_seqlens = torch.tensor(starts, dtype=torch.int32), torch.tensor(k_starts, dtype=torch.int32)
    options = {"causal": causal, "window_size": window, "softmax_scale": 0.3, "return_attn_probs": True}
    if paged:
        table = torch.randperm(8, generator=random).view(4, 2).int()
        pools = torch.full((2, 8, size, 2, 16), torch.nan, dtype=torch.float64)
        for b, n in enumerate(k_lengths):
            for j in range(n):
                pools[:, table[b, j // size], j % size] = kv[k_starts[b] + j].detach()
        lengths_of_both = cu_seqlens, k_cu_seqlens, 5, 7
        O, LSE, _ = flash_attn.flash_attn_varlen_func(q, *pools, *lengths_of_both, block_table=table, **options)
    else:
        O, LSE, _ = flash_attn.flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens, k_cu_seqlens, 5, 7, **options)
    assert LSE.shape == (4, sum(lengths))
    wanted = []
    for b, (n, m) in enumerate(zip(lengths, k_lengths, strict=True)):
        one = q[starts[b] :][:n], *kv[k_starts[b] :][:m].unbind(1)
        seen = seen_by(n, m, causal, window)[None, None]
        wanted.append(normal_attention(*(x.transpose(0, 1)[None] for x in one), seen, scale=0.3)[0].transpose(0, 1))
    wanted = torch.cat(wanted)
    torch.testing.assert_close(O, wanted)
    if not paged:
        inputs, dO = (q, kv), torch.randn(O.shape, dtype=torch.float64, generator=random)
        for got, gradient in zip(torch.autograd.grad(O, inputs, dO), torch.autograd.grad(wanted, inputs, dO), strict=True):
            torch.testing.assert_close(got, gradient)
    qkv = torch.randn(6, 3, 2, 16, dtype=torch.float64, generator=random)
    packed = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, torch.tensor([0, 6], dtype=torch.int32), 6, causal=True)
    torch.testing.assert_close(packed, flash_attn_qkvpacked_func(qkv[None], causal=True)[0])


@pytest.mark.parametrize("scores", ({}, {"softcap": 1.5, "alibi_slopes": torch.tensor([0.3, 0.2, 0.1, 0.0])}), ids=("plain", "scores"))
def check_probabilities(scores):
    """The returned probabilities show what was dropped, and returning them does not advance the generator; packed sequences have their
    own."""
    q, k, v = (torch.randn(2, n, h, 16, dtype=torch.float64) for n, h in ((6, 4), (40, 2), (40, 2)))
    torch.manual_seed(5)
    O, LSE, P = flash_attn_func(q, k, v, 0.25, causal=True, **scores, return_attn_probs=True)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(flash_attn_func(q, k, v, 0.25, causal=True, **scores), O)
    assert torch.equal(torch.rand(1), after)
    assert 0.1 < float((P < 0).sum() / (P != 0).sum()) < 0.4
    values = v.transpose(1, 2).repeat_interleave(2, 1)
    torch.testing.assert_close(O.transpose(1, 2), P.clamp(min=0) / 0.75 @ values)
    torch.testing.assert_close(P.abs().sum(-1), torch.ones_like(LSE))
    cu_seqlens, k_cu_seqlens = (torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (6, 40))
    packed = (x.flatten(0, 1) for x in (q, k, v))
    O, _, P = flash_attn.flash_attn_varlen_func(*packed, cu_seqlens, k_cu_seqlens, 6, 40, 0.25, **scores, return_attn_probs=True)
    torch.testing.assert_close(O.unflatten(0, (2, 6)).transpose(1, 2), P.clamp(min=0) / 0.75 @ values)


def check_deterministic():
    """The same gradients; the setting that kernels look at is on only during the backward."""
    q, k, v = (torch.randn(1, n, 2, 16, dtype=torch.float64, requires_grad=n > 5) for n in (6, 5, 9))
    k = torch.randn(1, 9, 2, 16, dtype=torch.float64, requires_grad=True)
    v.requires_grad_(False)
    O, LSE, _ = flash_attn_func(q, k, v, causal=True, deterministic=True, return_attn_probs=True)
    seen = []
    O.register_hook(lambda x: seen.append(torch.are_deterministic_algorithms_enabled()))
    want = flash_attention(*(x.transpose(1, 2) for x in (q, k, v)), causal=True, return_lse=True)
    loss, wanted = (O.transpose(1, 2).square().sum() + LSE.sin().sum() for O, LSE in ((O, LSE), (want[0].transpose(1, 2), want[1])))
    for got, gradient in zip(torch.autograd.grad(loss, (q, k)), torch.autograd.grad(wanted, (q, k)), strict=True):
        torch.testing.assert_close(got, gradient)
    assert seen == [False]
    assert not torch.are_deterministic_algorithms_enabled()


def check_rotary_tables_and_gradients():
    x = torch.randn(1, 4, 2, 16)
    table = torch.zeros(3, 4)
    new, turn = x[:, :1], {"rotary_cos": table, "rotary_sin": table}
    for function, words in (
        (lambda: flash_attn_with_kvcache(x, x, x, **turn), ["rotary_cos", "k and v"]),
        (lambda: flash_attn_with_kvcache(x, x, x, new, new, rotary_sin=table, cache_seqlens=0), ["rotary_cos", "rotary_sin"]),
        (lambda: flash_attn_with_kvcache(x, x, x, new, new, rotary_cos=table, cache_seqlens=0), ["rotary_cos", "rotary_sin"]),
        (lambda: flash_attn_with_kvcache(x, x, x, new, new, cache_seqlens=3, **turn), ["3 positions", "4 tokens"]),
        (lambda: flash_attn_with_kvcache(x, x, x, new, new, table[0], table[0], 3), ["positions, R / 2"]),
    ):
        expect_error(function, ValueError, words)
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

"""The cache of keys and values: attention sees exactly what was appended, contiguous or in pages, padded or ragged; errors are raised
before anything is written.

python checks/check_cache.py
"""

import pytest
import torch
from harness import expect_error, run_alone

from flash_attention.backends import BACKENDS, emulated
from flash_attention.cache import KeyValueCache, attend
from flash_attention.reference import normal_attention
from flash_attention.scores import rotary

EMULATED = "emulated:split_keys"
WHY_NOT = BACKENDS[EMULATED]._why_no_kernels(0)
needs_emulator = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
BACKEND_DTYPES = [(None, torch.float64), (None, torch.float32), pytest.param(EMULATED, torch.float16, marks=needs_emulator)]
STEPS = ((45, None), (1, None), (5, [5, 0, 2]), (1, None), (100, [100, 1, 90]), (1, None), (3, None))  # n, counts


def truth(q, k, v, starts, causal):
    """The truth: each sequence by itself, by the definition in float64."""
    rows = []
    for b, (keys, values) in enumerate(zip(k, v, strict=True)):
        seen = torch.ones(q.shape[2], keys.shape[1], dtype=torch.bool)
        if causal:
            seen = seen.tril(keys.shape[1] - q.shape[2])
        if starts is not None:
            seen[:, : starts[b]] = False
        rows.append(normal_attention(q[b][None].double(), keys[None].double(), values[None].double(), seen[None, None]))
    return torch.cat(rows)


@pytest.mark.parametrize("starts", (None, [3, 40, 0]))
@pytest.mark.parametrize("page_size", (None, 16, 48))
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def check_appends_and_attends(backend, dtype, page_size, starts):
    """Two layers that grow independently; unwritten memory is NaN, and the kernel must not use it."""
    random = torch.Generator().manual_seed(0)
    B, H, Hkv, D, Dv = 3, 8, 2, 64, 40
    cache = KeyValueCache(2, B, Hkv, D, 200, Dv=Dv, dtype=dtype, page_size=page_size)
    if backend:
        cache.keys.fill_(torch.nan), cache.values.fill_(torch.nan)
    if starts:
        cache.pad_left(starts)
    held = [([torch.empty(Hkv, 0, D, dtype=dtype)] * B, [torch.empty(Hkv, 0, Dv, dtype=dtype)] * B) for _ in cache._layers]
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3}[dtype]
    for n, counts in STEPS:
        for layer, (keys, values) in zip((cache[0], cache[1]), held, strict=True):
            k, v = (torch.randn(B, n, Hkv, d, generator=random).to(dtype).transpose(1, 2) for d in (D, Dv))
            layer.append(k, v, None if counts is None else torch.tensor(counts))
            for b in range(B):
                meant = n if counts is None else counts[b]
                keys[b], values[b] = torch.cat((keys[b], k[b, :, :meant]), 1), torch.cat((values[b], v[b, :, :meant]), 1)
            assert layer.lengths.tolist() == [x.shape[1] for x in keys]
        for Nq, causal in ((1, True), (3, True), (3, False)):
            q = torch.randn(B, H, Nq, D, generator=random).to(dtype)
            O, LSE = attend(q, cache[1], causal=causal, return_lse=True, backend=backend)
            assert LSE.shape == (B, H, Nq)
            torch.testing.assert_close(O.double(), truth(q, *held[1], starts, causal), rtol=0, atol=tolerance)


def check_pages_are_taken_as_they_are_needed():
    """Pages are all free again after `clear`; if none is left, nothing is written in any layer."""
    cache = KeyValueCache(1, 2, 1, 8, 100, page_size=16, pages=5)
    k = torch.ones(2, 1, 16, 8)
    cache[0].append(k, k)
    assert cache.block_table.tolist() == [[0] + [5] * 6, [1] + [5] * 6]
    cache[0].append(k[:, :, :1], k[:, :, :1])
    assert cache.block_table[:, :3].tolist() == [[0, 2, 5], [1, 3, 5]]
    before = cache.keys.clone()
    expect_error(lambda: cache[0].append(k, k), MemoryError, ["2 more pages", "1 are left"])
    assert torch.equal(cache.keys, before) and cache[0].lengths.tolist() == [17, 17] and (cache.block_table[:, 2] == 5).all()
    cache.clear()
    cache[0].append(k[:, :, :3], k[:, :, :3])
    assert cache[0].lengths.tolist() == [3, 3] and cache.block_table[:, 0].tolist() == [0, 1]


def check_errors_come_before_writing():
    cache = KeyValueCache(2, 2, 2, 16, 10, dtype=torch.float32)
    layer, x, q = cache[1], torch.ones(2, 2, 3, 16), torch.ones(2, 4, 3, 16)
    layer.append(0 * x, 0 * x)
    many = torch.ones(2, 2, 8, 16)
    for call, error, words in (
        (lambda: layer.append(many, many), ValueError, ["8 tokens", "up to 3", "10"]),
        (lambda: layer.append(x, x[:, :, :2]), ValueError, ["v must have shape", "(2, 2, 3, 16)", "(2, 2, 2, 16)"]),
        (lambda: layer.append(x[:1], x[:1]), ValueError, ["k must have shape", "(1, 2, 3, 16)"]),
        (lambda: layer.append(x[0], x[0]), ValueError, ["k must have shape"]),
        (lambda: layer.append(x.half(), x.half()), TypeError, ["float32", "float16"]),
        (lambda: layer.append(x.to("meta"), x), ValueError, ["on cpu", "meta"]),
        (lambda: layer.append(x.clone().requires_grad_(), x), NotImplementedError, ["gradients", "no_grad"]),
        (lambda: layer.append(x, x, torch.tensor([1, 4])), ValueError, ["between 0 and n = 3", "[1, 4]"]),
        (lambda: layer.append(x, x, torch.tensor([1.0, 2])), TypeError, ["counts", "float32"]),
        (lambda: layer.append(x, x, torch.tensor([1])), ValueError, ["counts", "(2,)", "(1,)"]),
        (lambda: attend(q[:1], layer), ValueError, ["q must have shape", "(1, 4, 3, 16)"]),
        (lambda: attend(q[:, :3], layer), ValueError, ["a multiple of 2"]),
        (lambda: attend(q.half(), layer), TypeError, ["float32", "float16"]),
        (lambda: attend(q.clone().requires_grad_(), layer), NotImplementedError, ["gradients"]),
        (lambda: attend(q, layer, backend="warp9"), ValueError, ["warp9"]),
        (lambda: attend(q, layer, backend="split_keys"), NotImplementedError, ["CUDA device"]),
        (lambda: cache.pad_left([1]), ValueError, ["(2,)"]),
        (lambda: cache.reserve(11), ValueError, ["11", "10"]),
        (lambda: KeyValueCache(0, 2, 2, 16, 10), ValueError, ["layers", "0"]),
        (lambda: KeyValueCache(1, 2, 2, 16, 10, pages=3), ValueError, ["page_size"]),
        (lambda: KeyValueCache(1, 2, 2, 16, 10, dtype=torch.int8), TypeError, ["int8"]),
    ):
        expect_error(call, error, words)
    assert layer.lengths.tolist() == [3, 3] and not cache.keys.any() and not cache.values.any()
    assert len(cache) == 2 and cache[0].lengths.tolist() == [0, 0]


@needs_emulator
def check_pages_that_the_kernel_does_not_read():
    cache = KeyValueCache(1, 1, 1, 64, 40, page_size=20, dtype=torch.float16)
    x = torch.ones(1, 1, 1, 64, dtype=torch.float16)
    cache[0].append(x, x)
    expect_error(lambda: attend(x, cache[0], backend=EMULATED), NotImplementedError, ["multiple of 16", "20"])
    assert torch.equal(attend(x, cache[0]), x)


@needs_emulator
def check_kernel_sees_growth_without_the_host():
    """The kernel reads lengths on the device: it sees changes that the host does not know of, as from a replayed graph."""
    emulated.options.seed = 0
    cache = KeyValueCache(1, 2, 1, 64, 96, dtype=torch.float16)
    x = torch.randn(2, 1, 64, 64).half()
    cache[0].append(x, x)
    q = torch.randn(2, 2, 1, 64).half()
    cache[0].longest, cache[0].equal = None, False  # as after an append in a graph
    cache[0].lengths.copy_(torch.tensor([64, 33]))
    want = truth(q, [x[0], x[1, :, :33]], [x[0], x[1, :, :33]], None, True)
    torch.testing.assert_close(attend(q, cache[0], backend=EMULATED).double(), want, rtol=0, atol=2e-3)
    torch.testing.assert_close(attend(q, cache[0]).double(), want, rtol=0, atol=2e-3)


CUDA = pytest.param("split_keys", "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine"))


@pytest.mark.parametrize("page_size", (None, 16))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
@pytest.mark.parametrize(("backend", "device"), ((None, "cpu"), pytest.param(EMULATED, "cpu", marks=needs_emulator), CUDA))
def check_float8(backend, device, dtype, page_size):
    """Attention over the cached float8 numbers is as exact as usual, and these are close to the appended ones, whatever their size."""
    if backend and dtype == torch.float32:
        pytest.skip("the kernel computes in float16 and bfloat16")
    random = torch.Generator().manual_seed(0)
    B, H, Hkv, D, Dv = 2, 6, 2, 64, 96
    cache = KeyValueCache(1, B, Hkv, D, 200, Dv=Dv, dtype=dtype, device=device, page_size=page_size, float8=True)
    sizes = torch.tensor([0.25, 3.0])[:, None, None]
    k, v = ((torch.randn(B, Hkv, 180, d, generator=random) * sizes).to(device, dtype) for d in (D, Dv))
    for first, last in ((0, 150), (150, 177), (177, 180)):
        cache[0].append(k[:, :, first:last], v[:, :, first:last])
    kept = []
    for x, scale, kept_x in zip((k, v), cache[0].scales, (cache[0].keys, cache[0].values), strict=True):
        assert (scale * 448 / x.abs().amax((0, 2, 3))).sub(2).abs().max() < 0.5
        if page_size:
            pages = cache.block_table[:, :12].long()
            kept_x = kept_x.view(torch.uint8)[pages].transpose(1, 2).flatten(2, 3).view(torch.float8_e4m3fn)
        held = kept_x[:, :, :180].double() * scale.double()[:, None, None]
        assert ((held - x.double()).abs() <= x.double().abs() / 16 + scale.double()[:, None, None] / 512).all()
        kept.append(held.cpu())
    q = torch.randn(B, H, 3, D, generator=random).to(device, dtype)
    O, LSE = attend(q, cache[0], return_lse=True, backend=backend)
    want = truth(q.cpu(), *kept, None, True)
    error = 2 ** -{torch.float32: 18, torch.float16: 8, torch.bfloat16: 5}[dtype]
    torch.testing.assert_close(O.cpu().double(), want, rtol=0, atol=error * float(kept[1].abs().max()) / 4)
    past = torch.ones(3, 180, dtype=torch.bool).tril(177)[None, None]
    LSE_wanted = normal_attention(q.cpu().double(), *kept, past, return_lse=True)[1]
    torch.testing.assert_close(LSE.cpu().double(), LSE_wanted, rtol=0, atol=1e-4 if backend else error)
    cache.clear()
    cache[0].append(4 * k[:, :, :1], v[:, :, :1])
    torch.testing.assert_close(cache[0].scales[0] * 448, 8 * k[:, :, :1].abs().amax((0, 2, 3)).float())
    cache[0].append(1e4 * k[:, :, 1:2], v[:, :, 1:2])  # the largest that is kept
    assert cache[0].keys.float().isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("page_size", (None, 16))
def check_graph(page_size):
    """A replayed graph that appends a token and attends: lengths grow on the device, and each replay sees all tokens so far."""
    if reason := BACKENDS["split_keys"]._why_no_kernels(0):
        pytest.skip(reason)
    B, H, Hkv, D, prompt, tokens = 2, 8, 2, 64, 40, 30
    cache = KeyValueCache(1, B, Hkv, D, prompt + tokens + 2, dtype=torch.float16, device="cuda", page_size=page_size)
    cache.reserve(cache.capacity)
    keys, values = torch.randn(2, B, Hkv, prompt + tokens, D, device="cuda").half()
    queries = torch.randn(B, H, prompt + tokens, D, device="cuda").half()
    cache[0].append(keys[:, :, :prompt], values[:, :, :prompt])
    k, v, q = (x[:, :, :1].clone() for x in (keys, values, queries))
    attend(q, cache[0], backend="split_keys")  # builds and loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache[0].append(k, v)
        O = attend(q, cache[0])
    for n in range(prompt, prompt + tokens):
        for x, new in ((k, keys), (v, values), (q, queries)):
            x.copy_(new[:, :, n : n + 1])
        graph.replay()
        want = truth(q.cpu(), keys[:, :, : n + 1].cpu(), values[:, :, : n + 1].cpu(), None, True)
        torch.testing.assert_close(O.double().cpu(), want, rtol=0, atol=2e-3)
    assert cache[0].lengths.tolist() == [prompt + tokens] * B


@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize("starts", (None, [3, 8, 0]))
def check_rotary_and_scores(starts, interleaved):
    """Keys and queries are rotated by their own positions, not counting padding; softcap and ALiBi give what each sequence gives by
    itself."""
    B, H, Hkv, D, R, random = 3, 4, 2, 16, 8, torch.Generator().manual_seed(0)
    angles, slopes = torch.rand(64, R // 2, dtype=torch.float64, generator=random), torch.rand(B, H, generator=random)
    turn = {"rotary": (angles.cos(), angles.sin()), "interleaved": interleaved}
    cache = KeyValueCache(1, B, Hkv, D, 64, dtype=torch.float64, page_size=16)
    if starts:
        cache.pad_left(starts)
    keys, values = [[] for _ in range(B)], [[] for _ in range(B)]
    for n, counts in ((20, [20, 11, 9]), (1, None), (3, [0, 2, 3])):
        k, v = (torch.randn(B, Hkv, n, D, dtype=torch.float64, generator=random) for _ in range(2))
        cache[0].append(k, v, None if counts is None else torch.tensor(counts), **turn)
        for b in range(B):
            meant = n if counts is None else counts[b]
            keys[b].append(k[b, :, :meant]), values[b].append(v[b, :, :meant])
    Nq = 2
    q = torch.randn(B, H, Nq, D, dtype=torch.float64, generator=random)
    O, LSE = attend(q, cache[0], softcap=2.0, alibi=slopes, return_lse=True, **turn)
    for b in range(B):
        start = starts[b] if starts else 0
        k, v = (torch.cat(x[b], 1)[None, :, start:] for x in (keys, values))
        n = k.shape[2]
        cos, sin = (x[:n] for x in turn["rotary"])
        turned = [rotary(x, cos[-x.shape[2] :], sin[-x.shape[2] :], interleaved=interleaved) for x in (q[b, None], k)]
        seen = torch.ones(Nq, n, dtype=torch.bool).tril(n - Nq)[None, None]
        want, lse = normal_attention(*turned, v, seen, softcap=2.0, alibi=slopes[b], return_lse=True)
        torch.testing.assert_close(O[b, None], want)
        torch.testing.assert_close(LSE[b, None], lse)
    k = k[:, :, :1].expand(B, -1, -1, -1)
    before = cache.keys.clone()
    short = (angles[:20].cos(), angles[:20].sin())
    expect_error(lambda: cache[0].append(k, k, rotary=short), ValueError, ["20 positions", "22 tokens"])
    expect_error(lambda: cache[0].append(k, k, rotary=(angles[0], angles[0])), ValueError, ["positions, R / 2"])
    expect_error(lambda: attend(q, cache[0], softcap=-2.0), ValueError, ["softcap", "-2.0"])
    expect_error(lambda: attend(q, cache[0], alibi=slopes[:, :3]), ValueError, ["alibi", "(3, 3)"])
    assert torch.equal(cache.keys, before)


@pytest.mark.parametrize("float8", (False, True))
@pytest.mark.parametrize(("backend", "device"), (pytest.param(EMULATED, "cpu", marks=needs_emulator), CUDA))
def check_scores_by_the_kernel(backend, device, float8):
    """A cap and slopes mean the same with different lengths and float8 keys: results match the reference with a mask and a bias."""
    B, H, Hkv, D, random = 3, 8, 2, 64, torch.Generator().manual_seed(0)
    cache = KeyValueCache(1, B, Hkv, D, 200, dtype=torch.float16, device=device, page_size=16, float8=float8)
    k, v = (torch.randn(B, Hkv, 180, D, generator=random).half().to(device) for _ in range(2))
    cache[0].append(k, v, torch.tensor([180, 31, 1], device=device))
    q, slopes = torch.randn(B, H, 1, D, generator=random).half().to(device), torch.rand(B, H, generator=random).to(device) / 4
    for alibi in (slopes, slopes[0]):
        O, LSE = attend(q, cache[0], softcap=2.0, alibi=alibi, return_lse=True, backend=backend)
        want, LSE_wanted = attend(q, cache[0], softcap=2.0, alibi=alibi, return_lse=True, backend="reference")
        torch.testing.assert_close(O.float(), want.float(), rtol=0, atol=4e-3)
        torch.testing.assert_close(LSE.float(), LSE_wanted.float(), rtol=0, atol=2e-3)


if __name__ == "__main__":
    run_alone(__file__)

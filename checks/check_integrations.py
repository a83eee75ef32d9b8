"""`flash_attention()` inside other code: in place of PyTorch's scaled_dot_product_attention.

python checks/check_integrations.py

The truth is torch's own function in float64; tolerances are the harness's.
"""

import threading
from itertools import product

import pytest
import torch
from harness import HALF, Report, limit, run_alone
from torch.nn import functional

from flash_attention import flash_attention
from flash_attention.integrations import sdpa
from flash_attention.integrations.sdpa import use_flash_attention

ORIGINAL = functional.scaled_dot_product_attention
LENGTHS = [(33, 33), (17, 40), (40, 17), (5, 40)]
NAMES = "O", "dQ", "dK", "dV"


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """The (q, k, v, mask) shapes of every call that reached `flash_attention()` through the integrations."""
    seen = []

    def spy(q, k, v, mask=None, **options):
        seen.append((q.shape, k.shape, v.shape, None if mask is None else mask.shape))
        return flash_attention(q, k, v, mask, **options)

    monkeypatch.setattr(sdpa, "flash_attention", spy)
    return seen


def outputs(q, k, v, dO, **options) -> tuple[torch.Tensor, ...]:
    """O, dQ, dK and dV of the current scaled_dot_product_attention, patched or not."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    O = functional.scaled_dot_product_attention(q, k, v, **options)
    return O.detach(), *torch.autograd.grad(O, (q, k, v), dO)


def compare_sdpa(report: Report, what: str, q, k, v, **options) -> None:
    """One call on this project and on torch's own function, against torch's in float64."""
    wide = [x.double() for x in (q, k, v)]
    dO = torch.randn(ORIGINAL(*wide, **options).shape).to(q.dtype)
    truth = outputs(*wide, dO.double(), **options)
    in_dtype = outputs(q, k, v, dO, **options)
    with use_flash_attention():
        got = outputs(q, k, v, dO, **options)
    for name, value, want, torchs in zip(NAMES, got, truth, in_dtype, strict=True):
        report.compare(what, name, value, want, limit(name, want, torchs, q.dtype, q.shape[-1]))
        assert value.dtype == torchs.dtype, f"{what}: {name} has dtype {value.dtype}, torch's {torchs.dtype}"


def masks(batch: tuple[int, ...], H: int, Lq: int, Lk: int) -> dict[str, torch.Tensor]:
    some = torch.rand(*batch, H, Lq, Lk) < 0.6
    return {
        "rows and columns": some.flatten(0, -3)[0],
        "full": some,
        "keys": some[..., :1, :1, :],
        "heads": some.flatten(0, -4)[0] if batch else some[0],
        "dead rows": some & (torch.arange(Lq) % 3 > 0)[:, None],
    }


@pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=str)
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize(("Lq", "Lk"), LENGTHS)
def check_sdpa(calls, Lq, Lk, batch, dtype):
    """Dense, causal (top-left, whichever is longer) and every shape of bool mask; in 3, 4 and 5 dimensions; grouped heads or not."""
    torch.manual_seed(0)
    report = Report(f"scaled_dot_product_attention, {batch} Lq {Lq} Lk {Lk} {dtype}")
    H, E, Ev = 4, 16, 24
    variants = [("dense", {}), ("causal", {"is_causal": True}), ("scale", {"scale": 0.3})]
    variants += [(f"mask: {kind}", {"attn_mask": mask}) for kind, mask in masks(batch, H, Lq, Lk).items()]
    for (what, options), Hkv in product(variants, (H, 2)):
        q, k, v = (torch.randn(*batch, *size).to(dtype) for size in ((H, Lq, E), (Hkv, Lk, E), (Hkv, Lk, Ev)))
        compare_sdpa(report, f"{what}, Hkv {Hkv}", q, k, v, **options, enable_gqa=Hkv != H)
    assert len(calls) == 2 * len(variants), f"{len(calls)} of {2 * len(variants)} calls reached flash_attention"
    report.verdict()


def check_sdpa_shapes(calls):
    """No heads at all; lengths equal to the batch, where a (Lq, Lk) mask looks like a key mask; leading dimensions that broadcast."""
    torch.manual_seed(0)
    report = Report("scaled_dot_product_attention, shapes")
    compare_sdpa(report, "two dimensions", *(torch.randn(n, 16) for n in (9, 12, 12)), is_causal=True)
    compare_sdpa(report, "Lq = B", *torch.randn(3, 5, 2, 5, 16), attn_mask=torch.rand(5, 5) < 0.6)
    compare_sdpa(report, "one key/value head", torch.randn(2, 4, 9, 16), *torch.randn(2, 2, 1, 12, 16))
    compare_sdpa(report, "one query batch", torch.randn(1, 4, 9, 16), *torch.randn(2, 3, 4, 12, 16))
    compare_sdpa(report, "keys without batch", torch.randn(2, 4, 9, 16), *torch.randn(2, 4, 12, 16), is_causal=True)
    compare_sdpa(report, "strided", *(torch.randn(2, 9, 4, 16).transpose(1, 2) for _ in range(3)), is_causal=True)
    assert len(calls) == 6
    with use_flash_attention(), pytest.raises(RuntimeError, match="must match"):  # 4 heads on 2, without enable_gqa
        functional.scaled_dot_product_attention(torch.randn(2, 4, 9, 16), *torch.randn(2, 2, 2, 9, 16))
    report.verdict()


def check_sdpa_falls_back(calls):
    """Calls without a counterpart run on torch's function, bit for bit."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 9, 16)
    want = ORIGINAL(q, k, v, scale=True)  # a type that only torch accepts as a number
    nested = torch.nested.nested_tensor([torch.randn(n, 4, 16) for n in (5, 9)], layout=torch.jagged).transpose(1, 2)
    want_nested = ORIGINAL(nested, nested, nested)
    with use_flash_attention():
        got = functional.scaled_dot_product_attention(q, k, v, scale=True)
        got_nested = functional.scaled_dot_product_attention(nested, nested, nested)
        dropped = functional.scaled_dot_product_attention(q, k, v, dropout_p=1.0)
    assert not calls
    assert torch.equal(got, want) and torch.equal(got_nested.values(), want_nested.values()) and not dropped.any()


def check_sdpa_dropout(calls):
    """The same bits that `flash_attention()` draws from the same seed."""
    q, k, v = torch.randn(3, 2, 4, 40, 16)
    torch.manual_seed(1)
    want = flash_attention(q, k, v, causal=True, dropout_p=0.25)
    torch.manual_seed(1)
    with use_flash_attention():
        got = functional.scaled_dot_product_attention(q, k, v, dropout_p=0.25, is_causal=True)
    assert torch.equal(got, want) and not torch.equal(got, flash_attention(q, k, v, causal=True)) and len(calls) == 1


def check_sdpa_is_restored():
    """After nested blocks, after an exception, and after blocks of two threads that overlap without one holding the other."""
    with use_flash_attention():
        with use_flash_attention():
            pass
        assert functional.scaled_dot_product_attention is sdpa._replacement
    assert functional.scaled_dot_product_attention is ORIGINAL
    with pytest.raises(KeyError), use_flash_attention():
        raise KeyError
    assert functional.scaled_dot_product_attention is ORIGINAL

    entered, leave = threading.Event(), threading.Event()

    def other():
        with use_flash_attention():
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with use_flash_attention():
        thread.start()
        assert entered.wait(60)
    assert functional.scaled_dot_product_attention is sdpa._replacement  # the other thread is still inside
    leave.set()
    thread.join()
    assert functional.scaled_dot_product_attention is ORIGINAL


def check_sdpa_compiled():
    """One compiled function, called inside, outside and inside again: each call runs on the implementation active at that point."""
    q, k, v = torch.randn(3, 2, 4, 33, 16)
    compiled = torch.compile(lambda *x: functional.scaled_dot_product_attention(*x, is_causal=True), backend="aot_eager", fullgraph=True)

    def runs_here() -> bool:
        with torch.profiler.profile() as profile:
            torch.testing.assert_close(compiled(q, k, v), ORIGINAL(q, k, v, is_causal=True), atol=1e-6, rtol=1e-6)
        return "flash_attention::forward" in {event.key for event in profile.key_averages()}

    with use_flash_attention():
        assert runs_here()
    assert not runs_here()
    with use_flash_attention():
        assert runs_here()


def check_sdpa_in_a_layer(calls):
    """nn.TransformerEncoderLayer in training calls the function through its module."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    x = torch.randn(2, 9, 32)
    want = layer(x)
    with use_flash_attention():
        got = layer(x)
    assert len(calls) == 1
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


if __name__ == "__main__":
    run_alone(__file__)

"""A few queries against many keys, as for each generated token: how close to the speed of reading K and V once.

    python -m benchmarks.gpu_targets --only decode

bfloat16, (B, H, Nq, D) queries, causal bottom-right. Contenders: the split_keys rung, contiguous and from a KeyValueCache in pages or as
float8; what a plain call takes; PyTorch's SDPA, each of its kernels; FlashAttention-3, if it is installed (flash_attention_3.py).
Each is checked against normal attention, then they take turns, with the L2 cache flushed before every call.
"""

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import flash_attention_3
from benchmarks.compare import WrongResult
from benchmarks.contenders import SDPA_KERNELS
from benchmarks.measure import Clock
from flash_attention import flash_attention
from flash_attention.cache import KeyValueCache, attend
from flash_attention.reference import normal_attention

Call = Callable[[], Tensor]
SPLIT_KEYS = "split_keys"
FLOAT8, PAGES, PLAIN = f"{SPLIT_KEYS}, float8", f"{SPLIT_KEYS}, pages", "plain call"


class Shape(NamedTuple):
    B: int
    H: int
    Hkv: int
    Nq: int
    Nk: int
    D: int
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"B {self.B} H {self.H}/{self.Hkv} Nq {self.Nq} Nk {self.Nk} D {self.D} {self.dtype}"

    @property
    def key_bytes(self) -> int:
        """Bytes of K and V."""
        return 2 * self.B * self.Hkv * self.Nk * self.D * getattr(torch, self.dtype).itemsize

    def small(self) -> "Shape":
        return self._replace(
            B=min(self.B, 2), H=4, Hkv=4 * self.Hkv // self.H, Nq=min(self.Nq, 8), Nk=max(64, self.Nk // 128), dtype="float32"
        )


SHAPES = {  # and the pages to try there
    Shape(1, 32, 8, 1, 8192, 128): (),
    Shape(1, 32, 8, 1, 65536, 128): (),
    Shape(16, 32, 8, 1, 8192, 128): (16, 64, 256),
    Shape(64, 32, 8, 1, 4096, 128): (16, 64, 256),
    Shape(1, 32, 8, 4, 32768, 128): (),
    Shape(1, 16, 16, 1, 32768, 64): (),
    Shape(8, 32, 8, 512, 8192, 128): (),
}


def copy_bandwidth(device: str) -> float:
    """TB/s read and written while a tensor of 1 GB (a CPU's: 64 MB) is copied."""
    x = torch.empty((1 << 30) if torch.device(device).type == "cuda" else (1 << 26), dtype=torch.int8, device=device)
    y, clock, times = torch.empty_like(x), Clock(device), []
    for _ in range(8):
        clock.start()
        y.copy_(x)
        clock.mark()
        times += clock.stop()
    return 2 * x.numel() / (median(times[2:]) * 1e-3) / 1e12


def calls(shape: Shape, pages: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    """All contenders."""
    causal = shape.Nq > 1
    mask = causal_lower_right(shape.Nq, shape.Nk) if causal else None

    def sdpa(kernel: str | None) -> Tensor:
        if kernel is None:
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        with sdpa_kernel(SDPA_KERNELS[kernel]):
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    found: dict[str, Call] = {PLAIN: lambda: flash_attention(q, k, v, causal=causal)}
    if q.is_cuda:
        found[SPLIT_KEYS] = lambda: flash_attention(q, k, v, causal=causal, backend=SPLIT_KEYS)
    for size in pages:
        cache = KeyValueCache(1, shape.B, shape.Hkv, shape.D, shape.Nk, dtype=q.dtype, device=q.device, page_size=size)
        cache.reserve(shape.Nk)
        order = torch.randperm(cache.pages, device=q.device).view(cache.block_table.shape)  # as after many sequences have started and ended
        cache.block_table.copy_(order)
        cache[0].append(k, v)
        found[f"{PAGES} of {size}"] = partial(attend, q, cache[0], backend=SPLIT_KEYS if q.is_cuda else None)
    if q.is_cuda and shape.B >= 16:
        halves = KeyValueCache(1, shape.B, shape.Hkv, shape.D, shape.Nk, dtype=q.dtype, device=q.device, float8=True)
        halves[0].append(k, v)
        found[FLOAT8] = partial(attend, q, halves[0], backend=SPLIT_KEYS)
    found |= {f"sdpa ({kernel})" if kernel else "sdpa": partial(sdpa, kernel) for kernel in (None, *(SDPA_KERNELS if q.is_cuda else ()))}
    if q.is_cuda and flash_attention_3.operators():
        found["FA3"] = lambda: flash_attention_3.forward(q, k, v, causal=True)
    return found


def verified(shape: Shape, q: Tensor, k: Tensor, v: Tensor, O: Tensor) -> dict:
    """Compares the first and the last sequence, some heads and the last rows with the definition in float64; tolerance: twice the
    definition's own error in this dtype."""
    rows = min(shape.Nq, 4)
    past = torch.ones(rows, shape.Nk, dtype=torch.bool, device=q.device).tril(shape.Nk - rows)[None, None]
    error = allowed = 0.0
    group = shape.H // shape.Hkv
    for b in {0, shape.B - 1}:
        one = q[b : b + 1, -group:, -rows:], k[b : b + 1, -1:], v[b : b + 1, -1:]
        truth = normal_attention(*(x.double() for x in one), past)
        error = max(error, (O[b : b + 1, -group:, -rows:] - truth).abs().max().item())
        allowed = max(
            allowed,
            2 * (normal_attention(*one, past) - truth).abs().max().item() + 1e-6 + 2 * torch.finfo(q.dtype).eps * truth.abs().max().item(),
        )
    return {"of": "O", "error": error, "tolerance": allowed, "passed": error <= allowed}


def run(shape: Shape, pages: tuple[int, ...], place) -> list[dict]:
    """A row for each variant of this project, with ratios to the best of the others, to contiguous keys and to the speed of a copy."""
    shape = shape.small() if place.quick else shape
    pages = tuple(size for size in pages if size <= shape.Nk)
    random = torch.Generator(place.device).manual_seed(0)
    sizes = (shape.H, shape.Nq), (shape.Hkv, shape.Nk), (shape.Hkv, shape.Nk)
    q, k, v = (torch.randn(shape.B, *n, shape.D, generator=random, device=place.device).to(getattr(torch, shape.dtype)) for n in sizes)
    found, running = {}, {}
    with torch.no_grad():
        for name, call in calls(shape, pages, q, k, v).items():
            try:
                check = verified(shape, q, k, v, call())
            except (RuntimeError, NotImplementedError) as error:  # PyTorch has no such kernel here, or a build failed
                found[name] = {"skipped": str(error).splitlines()[0][:200]}
                continue
            found[name] = {"check": check}
            running[name] = call
            if name == FLOAT8:  # the cache keeps 4 bits of each number, which dominates the error
                check["passed"] = check["error"] <= 0.05
            if not check["passed"] and name.startswith((SPLIT_KEYS, "plain")):
                raise WrongResult(f"{name} is wrong, {shape}: error {check['error']:.1e}, tolerance {check['tolerance']:.1e}")
        times: dict[str, list[float]] = {name: [] for name in running}
        clock = Clock(place.device)
        for _ in range(place.repeats or 30):
            for name, call in running.items():
                clock.start(200.0)  # µs allowed for the host
                call()
                clock.mark()
                times[name] += clock.stop()
    bandwidth = copy_bandwidth(place.device)
    for name in running:
        found[name] |= {"ms": median(times[name]), "repeats": len(times[name])}
    rivals = [found[name]["ms"] for name in running if name.startswith(("sdpa", "FA3"))]
    rows = []
    for name in running:
        if name.startswith(("sdpa", "FA3")):
            continue
        ms = found[name]["ms"]
        row = {"label": str(shape), "part": "forward", "name": name, "case": shape._asdict(), "ms": ms, "copy_tb_per_s": bandwidth}
        row["tb_per_s"] = shape.key_bytes / (2 if name == FLOAT8 else 1) / (ms * 1e-3) / 1e12
        row["error"] = found[name]["check"]["error"]
        row["over copy"] = row["tb_per_s"] / bandwidth
        if rivals:
            row["over best"] = min(rivals) / ms
        if ("pages" in name or name == FLOAT8) and SPLIT_KEYS in running:
            row["over contiguous"] = found[SPLIT_KEYS]["ms"] / ms
        rows.append(row | {"measured": found})
    return rows

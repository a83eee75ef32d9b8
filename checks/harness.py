"""What every check shares: the targets to check, inputs, the truth, tolerances and the printed report.

A check is written once for all backends. `TARGETS` lists the (backend, device) pairs on which it runs; to add a backend, add its name
there. One file because a check then needs one import, and each tolerance is defined once.
"""

import argparse
import contextlib
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attention import command_line, reference, spans
from flash_attention.backends import BACKENDS, GROUPS, cuda, no_gradients
from flash_attention.call import Call, Settings, allows_tf32
from flash_attention.reference import Dropout, Visible, normal_attention
from flash_attention.reference.tiles import sum_dtype

# Steps of the ladder: check_ladder.py, check_emulated.py.
FORWARD_ALONE = tuple(name for name, rung in cuda.RUNGS.items() if no_gradients(rung))
ON_CUDA: tuple[str, ...] = tuple(name for name in cuda.RUNGS if name not in FORWARD_ALONE)  # backends that need a GPU
HALF = (torch.float16, torch.bfloat16)

# Lengths that have broken kernels before: ragged, tiny, unequal, either longer.
LENGTHS = [
    *[(1, 1), (1, 239), (3, 799), (64, 128), (113, 203), (128, 217), (108, 256), (256, 512), (384, 256), (640, 128)],
    *[(1023, 1024), (1024, 1023), (2048, 2048), (239, 1), (799, 3), (203, 113), (217, 128), (512, 256)],
]
FEW_LENGTHS = [(1, 1), (3, 799), (113, 203), (128, 217), (384, 256), (239, 1)]
# One less and one more than every tile size in use, for either length.
EDGE_LENGTHS = [pair for n in (16, 32, 64, 128, 256, 512, 1024) for pair in ((n - 1, n + 1), (n + 1, n - 1))]
HEAD_SIZES = [8, 16, 32, 40, 59, 64, 96, 111, 128, 192, 256, 512]


class Target(NamedTuple):
    """The backend and the device on which a check runs."""

    backend: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"

    def why_not(self) -> str | None:
        """Why this machine cannot run it."""
        return "no CUDA GPU on this machine" if self.device == "cuda" and not torch.cuda.is_available() else None


CPU = Target("reference", "cpu")
TARGETS = [CPU, Target("reference", "cuda"), *(Target(name, "cuda") for name in ON_CUDA)]


def call_of(q, k, v, mask=None, causal=False, dropout_p=0.0, window=None, spans=None, bias=None, alibi=None, **settings) -> Call:
    """A Call, to ask a backend about."""
    left, right = window or (None, None)
    spans = None if spans is None else spans.expand(*q.shape[:3], 2)
    settings = Settings(1.0, dropout_p, left, 0 if causal else right, **settings)
    return Call.of(q, k, v, mask, spans, settings, bias=bias, alibi=alibi)


def skip_unless_served(target: Target, *call, **scored) -> None:
    """Skips a call (the arguments of `call_of`) that the backend refuses, with the backend's own reason."""
    reason = BACKENDS[target.backend].why_not(call_of(*call, **scored))
    if reason:
        pytest.skip(f"{target.backend}: {reason}")


def serves_masks(target: Target) -> bool:
    """False for a rung that serves no masks."""
    return bool(getattr(BACKENDS[target.backend], "masks", ("any",))[0])


def serves_dropout(target: Target) -> bool:
    """False for a rung that serves no dropout."""
    return getattr(BACKENDS[target.backend], "dropout", True)


def skip_unless_masks(target: Target) -> None:
    """Skips a check of masks on a rung that serves none."""
    if not serves_masks(target):
        pytest.skip(f"{target.backend} serves no mask")


def dtype_served(target: Target) -> torch.dtype:
    """float32 if the backend has it, else float16: for checks of structure, for which one dtype is enough."""
    x = torch.empty(1, 1, 1, 64, device=target.device)
    return torch.float16 if BACKENDS[target.backend].why_not(call_of(x, x, x)) else torch.float32


def half_served(target: Target) -> torch.dtype:
    """float16 if the backend has it, else float32."""
    x = torch.empty(1, 1, 1, 64, device=target.device, dtype=torch.float16)
    return torch.float32 if BACKENDS[target.backend].why_not(call_of(x, x, x)) else torch.float16


def compilers() -> list:
    """Backends of torch.compile to check with; inductor is skipped, with the reason, where torch cannot build what it writes."""
    reason = None
    if not (shutil.which("g++") or shutil.which("clang++") or shutil.which("c++") or torch.cuda.is_available()):
        reason = "no C++ compiler for inductor"
    elif " " in torch.__file__:
        reason = "inductor's linker line does not quote torch's own folder, and its path has a space"
    return ["aot_eager", pytest.param("inductor", marks=[pytest.mark.skip(reason=reason)] if reason else [])]


def expect_error(call: Callable, error: type[Exception], words: list[str]) -> None:
    """call() must raise exactly `error`, with a message that contains all the words."""
    with pytest.raises(Exception) as caught:
        call()
    message = f"{type(caught.value).__name__}: {caught.value}"
    assert type(caught.value) is error, f"expected {error.__name__}, got {message}"
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"the message does not name {missing}: {message}"


@dataclass
class Case:
    """One attention problem. `mask` is None or one of MASKS; `sharp` multiplies q, so that softmax is close to one-hot."""

    B: int = 2
    H: int = 2
    Nq: int = 128
    Nk: int = 128
    D: int = 64
    Hkv: int | None = None
    Dv: int | None = None
    dtype: torch.dtype = torch.float32
    causal: bool = False
    mask: str | None = None
    window: tuple[int | None, int | None] | None = None
    spans: str | None = None  # one of SPANS
    dropout_p: float = 0.0
    scale: float | None = None
    sharp: float = 1.0
    seed: int = 0
    softcap: float | None = None
    bias: str | None = None  # one of BIASES
    bias_as_q: bool = False  # in q's dtype
    bias_frozen: bool = False  # it gets no gradient
    alibi: bool = False

    def __str__(self) -> str:
        """Sizes, then whatever differs from a plain dense call."""
        sizes = f"B {self.B} H {self.H} Nq {self.Nq} Nk {self.Nk} D {self.D} {str(self.dtype).removeprefix('torch.')}"
        others = (f for f in fields(self)[5:] if f.name not in ("dtype", "seed"))
        return " ".join([sizes, *(f"{f.name} {getattr(self, f.name)}" for f in others if getattr(self, f.name) != f.default)])

    def inputs(self, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v and the mask, drawn on the CPU so that every device sees the same numbers."""
        random = torch.Generator().manual_seed(self.seed)
        Hkv, Dv = self.Hkv or self.H, self.Dv or self.D
        shapes = (self.B, self.H, self.Nq, self.D), (self.B, Hkv, self.Nk, self.D), (self.B, Hkv, self.Nk, Dv)
        q, k, v = (torch.randn(shape, generator=random).to(self.dtype).to(device) for shape in shapes)
        mask = None if self.mask is None else MASKS[self.mask](self.B, self.H, self.Nq, self.Nk, random).to(device)
        return q * self.sharp, k, v, mask

    def make_spans(self, device: str) -> Tensor | None:
        random = torch.Generator().manual_seed(self.seed + 2)
        return None if self.spans is None else SPANS[self.spans](self.B, self.H, self.Nq, self.Nk, random).to(device)

    def scored(self, device: str) -> dict:
        """softcap, bias and alibi, those that the case has."""
        random = torch.Generator().manual_seed(self.seed + 3)
        bias = None if self.bias is None else BIASES[self.bias](self.B, self.H, self.Nq, self.Nk, random).to(device)
        if bias is not None and self.bias_as_q:
            bias = bias.to(self.dtype)
        alibi = torch.rand(self.B, self.H, generator=random).to(device) / 4 if self.alibi else None
        given = {"softcap": self.softcap, "bias": bias, "alibi": alibi}
        return {name: x for name, x in given.items() if x is not None}

    def visible(self, device: str) -> Visible:
        """What each row sees, before any mask."""
        left, right = self.window or (None, None)
        return Visible(self.Nq, self.Nk, left, 0 if self.causal else right, self.make_spans(device))

    def dropout(self, device: str) -> Dropout | None:
        """The dropout that `flash_attention()` draws right after torch.manual_seed(self.seed): torch's generator, replayed."""
        if not self.dropout_p:
            return None
        random = torch.Generator(device).manual_seed(self.seed)
        seed = torch.randint(torch.iinfo(torch.int64).max, (), dtype=torch.int64, device=device, generator=random)
        return Dropout(self.dropout_p, seed, range(self.B), range(self.H))

    def gradient(self, device: str, *shape: int) -> Tensor:
        """A random gradient of the given shape in the case's dtype."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.seed + 1)).to(self.dtype).to(device)


def _random(*shape: int, keep: float = 0.7):
    return lambda B, H, Nq, Nk, random: torch.rand([{"B": B, "H": H, "Nq": Nq, "Nk": Nk}.get(n, n) for n in shape], generator=random) < keep


def _left_padding(B, H, Nq, Nk, random):
    return torch.arange(Nk) >= torch.randint(Nk, (B, 1), generator=random)


def _dead_rows(B, H, Nq, Nk, random):
    """A random mask in which some rows, and a whole block of them, may attend nothing."""
    mask = torch.rand(B, 1, Nq, Nk, generator=random) < 0.5
    mask[:, :, ::3] = False
    mask[:, :, Nq // 2 : Nq // 2 + 130] = False
    return mask


def _transposed(B, H, Nq, Nk, random):
    return (torch.rand(B, H, Nk, Nq, generator=random) < 0.7).mT


def _structured(B, H, Nq, Nk, random):
    """Areas of 128 × 128 elements in which nothing, or everything, may be attended, and others whose 64 × 64 quarters allow nothing,
    everything, all but one corner, one corner only, or a mixture."""
    rows, columns = -(-Nq // 128), -(-Nk // 128)
    kinds = torch.randint(7, (B, H, 2 * rows, 2 * columns), generator=random)  # 0 nothing, 1, 2 all, 3, 4 all but one, 5 one, 6 mixed
    areas = _each(torch.rand(B, H, rows, columns, generator=random), 2)
    kinds[areas < 0.5], kinds[areas > 0.8] = 0, 1
    mask = _each((kinds > 0) & (kinds < 5), 64)
    mask |= _each(kinds == 6, 64) & (torch.rand(mask.shape, generator=random) < 0.5)
    corners = mask.new_zeros(64, 64)
    corners[0, 63] = True
    at_start = (_each(kinds == 3, 64) | _each(kinds == 5, 64)) & corners.repeat(2 * rows, 2 * columns)
    at_end = _each(kinds == 4, 64) & corners.flip(0, 1).repeat(2 * rows, 2 * columns)
    return (mask ^ at_start ^ at_end)[:, :, :Nq, :Nk]


def _each(tiles, size):
    """Repeats every element along the last two dimensions."""
    return tiles.repeat_interleave(size, 2).repeat_interleave(size, 3)


def _band(B, H, Nq, Nk, random):
    """Each row's own column and the 100 before."""
    distance = torch.arange(Nq)[:, None] + Nk - Nq - torch.arange(Nk)
    return (distance >= 0) & (distance <= 100)


MASKS = {
    "key": _random("B", "Nk"),
    "key, no batch": _random("Nk"),
    "left padding": _left_padding,
    "rows": _random("B", 1, "Nq", 1),
    "heads share": _random("B", 1, "Nq", "Nk"),
    "batches share": _random("H", "Nq", "Nk"),
    "full": _random("B", "H", "Nq", "Nk"),
    "sparse": _random("B", 1, "Nq", "Nk", keep=0.02),
    "transposed": _transposed,
    "dead rows": _dead_rows,
    "specks": _random("B", "H", "Nq", "Nk", keep=3e-5),
    "structured": _structured,
    "band": _band,
    "nothing": _random("B", "Nk", keep=-1.0),
}


def _normal(*shape):
    return lambda B, H, Nq, Nk, random: torch.randn([{"B": B, "H": H, "Nq": Nq, "Nk": Nk}.get(n, n) for n in shape], generator=random)


def _hiding(B, H, Nq, Nk, random):
    """Some elements hidden by −∞, some by a dtype's lowest number, some rows and a whole block of them throughout."""
    bias = torch.randn(B, 1, Nq, Nk, generator=random)
    bias[torch.rand(B, 1, Nq, Nk, generator=random) < 0.3] = -torch.inf
    bias[torch.rand(B, 1, Nq, Nk, generator=random) < 0.1] = torch.finfo(torch.float32).min
    bias[:, :, ::5] = -torch.inf
    bias[:, :, Nq // 2 : Nq // 2 + 70] = torch.finfo(torch.float32).min
    return bias


BIASES = {
    "full": _normal("B", "H", "Nq", "Nk"),
    "batches share": _normal(1, "H", "Nq", "Nk"),
    "heads share": _normal("B", 1, "Nq", "Nk"),
    "keys": _normal("H", 1, "Nk"),
    "rows": _normal("B", "H", "Nq", 1),
    "matrix": _normal("Nq", "Nk"),
    "number": _normal(1),
    "bfloat16": lambda *sizes: _normal(1, "H", "Nq", "Nk")(*sizes).bfloat16(),
    "transposed": lambda B, H, Nq, Nk, random: torch.randn(H, Nk, Nq, generator=random).mT,
    "hiding": _hiding,
}


def _documents(B, H, Nq, Nk, random):
    """Documents of random lengths, including 0 and 1."""

    def cut(N: int) -> Tensor:
        inner = torch.randint(N + 1, (5,), generator=random).sort().values.tolist()
        edges = [0, *inner, min(inner[2] + 1, N), N]
        return torch.tensor(sorted(edges)).diff()

    return spans.documents(cut(Nq), cut(Nk))


def _any_spans(B, H, Nq, Nk, random):
    """A random interval for each row, batch and head, some beyond the ends, some empty, some reversed."""
    bounds = torch.randint(-Nk // 4 - 1, Nk + Nk // 4 + 2, (B, H, Nq, 2), generator=random, dtype=torch.int32)
    turned = torch.rand(B, H, Nq, 1, generator=random) < 0.1
    return torch.where(turned, bounds.sort(-1, descending=True).values, bounds.sort(-1).values)


def _some_blind(B, H, Nq, Nk, random):
    """Every row sees all columns, except some rows that see nothing."""
    row = torch.arange(Nq)
    return torch.stack((torch.zeros_like(row), (row % 7 > 0) * Nk), -1).int()[None, None]


SPANS = {
    "some blind": _some_blind,
    "documents": _documents,
    "causal documents": lambda B, H, N, Nk, random: spans.documents(
        [0, 1, N // 3, 0, N - N // 3 - 1], [1, 0, Nk // 2, 0, Nk - Nk // 2 - 1], causal=True
    ),
    "prefix": lambda B, H, Nq, Nk, random: spans.prefix(torch.randint(Nk + 1, (B,), generator=random), Nq, Nk),
    "chunks": lambda B, H, Nq, Nk, random: spans.chunks(37, Nq, before=1),
    "any": _any_spans,
    "any, transposed": lambda B, H, Nq, Nk, random: _any_spans(H, 1, Nq, Nk, random).transpose(0, 1).mT.contiguous().mT,
}


def served(target: Target, case: Case) -> Case:
    """The case in a dtype that the backend serves, for a check that also uses masks; skips if the backend does not serve it."""
    skip_unless_masks(target)
    case = replace(case, dtype=dtype_served(target))
    q, k, v, mask = case.inputs(target.device)
    skip_unless_served(target, q, k, v, mask, case.causal, case.dropout_p)
    return case


class Result(NamedTuple):
    """Output and gradients of one way to compute attention; gradients are None for a rung that has only a forward."""

    O: Tensor
    LSE: Tensor
    dQ: Tensor | None
    dK: Tensor | None
    dV: Tensor | None


class BiasedResult(NamedTuple):
    """A Result where scores have a bias."""

    O: Tensor
    LSE: Tensor
    dQ: Tensor
    dK: Tensor
    dV: Tensor
    dBias: Tensor

    @classmethod
    def or_plain(cls, *tensors: Tensor) -> "BiasedResult | Result":
        return (cls if len(tensors) == 6 else Result)(*tensors)


def naive(case: Case, q, k, v, mask, dO, dLSE=None, *, dropout: Dropout | None = None, dtype: torch.dtype | None = None) -> Result:
    """Naive attention and its autograd gradients, computed in `dtype` (the inputs' unless given). In float64 this is the truth."""
    q, k, v = (x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, k, v))
    visible = replace(case, Nq=q.shape[2], Nk=k.shape[2]).visible(q.device.type)
    scored = case.scored(q.device.type)
    if "bias" in scored:
        scored["bias"] = scored["bias"].to(q.dtype if dtype else scored["bias"].dtype).requires_grad_()
    O, LSE = normal_attention(q, k, v, mask, visible=visible, scale=case.scale, dropout=dropout, **scored, return_lse=True)
    loss = (O * dO.to(O.dtype)).sum()
    if dLSE is not None:
        loss = loss + (LSE.masked_fill(LSE.isneginf(), 0) * dLSE.to(LSE.dtype)).sum()
    return BiasedResult.or_plain(O.detach(), LSE.detach(), *torch.autograd.grad(loss, (q, k, v, *_trained(case, scored))))


def _trained(case: Case, scored: dict) -> list[Tensor]:
    return [scored["bias"]] if "bias" in scored and not case.bias_frozen else []


def flash(case: Case, target: Target, q, k, v, mask, dO, dLSE=None) -> Result:
    """`flash_attention()` and its autograd gradients, if it has any, on one backend. With dropout, seed torch's generator first."""
    from flash_attention import flash_attention

    forward_alone = bool(no_gradients(BACKENDS.get(target.backend)))
    q, k, v = (x.detach().requires_grad_(not forward_alone) for x in (q, k, v))
    options = {"window": case.window, "spans": case.make_spans(q.device.type), "scale": case.scale, "dropout_p": case.dropout_p}
    scored = case.scored(q.device.type)
    if not forward_alone:
        for bias in _trained(case, scored):
            bias.requires_grad_()
    O, LSE = flash_attention(q, k, v, mask, causal=case.causal, **options, **scored, return_lse=True, backend=target.backend)
    if forward_alone:
        return Result(O, LSE, None, None, None)
    gradients = (dO,) if dLSE is None else (dO, dLSE)
    outputs = (O,) if dLSE is None else (O, LSE)
    return BiasedResult.or_plain(O.detach(), LSE.detach(), *torch.autograd.grad(outputs, (q, k, v, *_trained(case, scored)), gradients))


class AsTF32(TorchDispatchMode):
    """float32 matrix products are TF32's on any device, as on a GPU after `torch.set_float32_matmul_precision("high")`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            args = [self.rounded(x) if x.dtype == torch.float32 else x for x in args]
        return func(*args, **(kwargs or {}))

    @staticmethod
    def rounded(x: Tensor) -> Tensor:
        bits = x.contiguous().view(torch.int32)
        return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)


@dataclass
class Problem:
    """A case's inputs and random gradients, with the expected results: the truth (float64), and naive attention in the case's dtype, from
    which tolerances are derived."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    dO: Tensor
    dLSE: Tensor | None
    truth: Result
    in_dtype: Result

    @classmethod
    def of(cls, case: Case, target: Target, *, inputs: tuple | None = None, dLSE: bool = True) -> "Problem":
        """`inputs` replaces the case's own q, k, v and mask. dLSE=False: LSE gets no gradient. Skips if the backend does not serve it."""
        q, k, v, mask = inputs or case.inputs(target.device)
        call = q, k, v, mask, case.causal, case.dropout_p, case.window, case.make_spans(target.device)
        skip_unless_served(target, *call, **case.scored(target.device))
        dO = case.gradient(target.device, *q.shape[:3], v.shape[3])
        gradients = dO, case.gradient(target.device, 2, *q.shape[:3])[1].to(sum_dtype(q)) if dLSE else None  # [1]: numbers that dO has not
        return cls.solve(case, q, k, v, mask, *gradients)

    @classmethod
    def solve(cls, case: Case, q, k, v, mask, dO, dLSE) -> "Problem":
        call, dropout = (q, k, v, mask, dO, dLSE), case.dropout(q.device.type)
        truth = naive(case, *call, dropout=dropout, dtype=torch.float64)
        with AsTF32() if allows_tf32() else contextlib.nullcontext():
            return cls(case, *call, truth, naive(case, *call, dropout=dropout))

    def poisoned(self, bad: float) -> "Problem":
        """The same with `bad` in dO and dLSE wherever a row attends nothing."""
        dead = self.truth.LSE.isneginf()
        assert dead.any() and not dead.all()
        dLSE = None if self.dLSE is None else self.dLSE.masked_fill(dead, bad)
        return replace(self, dO=self.dO.masked_fill(dead[..., None], bad), dLSE=dLSE)

    def answer(self, target: Target) -> Result:
        """The backend's result."""
        if self.case.dropout_p:
            torch.manual_seed(self.case.seed)
        return flash(self.case, target, self.q, self.k, self.v, self.mask, self.dO, self.dLSE)


class Algorithm(NamedTuple):
    """One paper's forward and backward."""

    forward: Callable
    backward: Callable
    causal: bool
    paper: int

    def run(self, problem: Problem, **options) -> Result:
        """Its result; `options` go to the forward and to the backward."""
        options = {"scale": problem.case.scale, "dropout": problem.case.dropout(problem.q.device.type), **options}
        call = problem.q, problem.k, problem.v, problem.mask
        O, *saved = self.forward(*call, **options)
        if self.paper == 1:  # saves l and m; its backward knows no gradient of LSE
            l, m = saved
            LSE, dLSE = torch.where(l > 0, m + l.log(), -torch.inf), ()
        else:
            LSE, dLSE = saved[0], (problem.dLSE,)
        return Result(O, LSE, *self.backward(*call, O, *saved, problem.dO, *dLSE, **options))


ALGORITHMS = {
    "FlashAttention": Algorithm(reference.flash_attention_forward, reference.flash_attention_backward, False, 1),
    "FlashAttention, causal": Algorithm(reference.flash_attention_causal_forward, reference.flash_attention_causal_backward, True, 1),
    "FlashAttention-2": Algorithm(reference.flash_attention2_forward, reference.flash_attention2_backward, False, 2),
    "FlashAttention-2, causal": Algorithm(reference.flash_attention2_causal_forward, reference.flash_attention2_causal_backward, True, 2),
}


def against_truth(case: Case, target: Target, slack: float = 1.0, bad: float | None = None) -> tuple[Problem, Result]:
    """Compares O, LSE, dQ, dK and dV of one case on one backend, with random dO and dLSE, with the truth. → the problem and the result.
    bad: the value of dO and dLSE in rows that attend nothing."""
    problem = Problem.of(case, target)
    problem = problem if bad is None else problem.poisoned(bad)
    answer = problem.answer(target)
    report = Report(f"{target}: {case}")
    report.expect("flash_attention", answer, problem, slack)
    report.verdict()
    return problem, answer


def limit(name: str, truth: Tensor, naive_value: Tensor, dtype: torch.dtype, D: int) -> Tensor:
    """The largest error allowed in `name` ("O", "LSE", "dQ", …), a tensor that broadcasts against the truth.

    float32: 1e-6 · max(1, |value|) forward; gradients 2e-6 of the largest entry; both for D ≤ 128, growing with √D beyond, as rounding
    in a sum of D products does; or four times the error of naive attention in float32, where that is more: a score of 5 is itself only
    known to 3e-7, and the tiled algorithms, in base 2, round it otherwise than naive attention. float64: the same, times 1e-8. Half types:
    twice the error of naive attention in that dtype, plus the noise floor 2·max|(truth + 0.3 − 0.3) − truth| of the dtype itself.
    """
    if not truth.numel():
        return truth.sum()
    naive_error = (naive_value.double() - truth).abs().masked_fill(truth.isinf(), 0).max()
    if dtype in HALF and name != "LSE":
        rounded = truth.masked_fill(truth.isinf(), 0).to(dtype)
        return 2 * naive_error + 2 * ((rounded + 0.3 - 0.3) - rounded).double().abs().max()
    unit = (1e-14 if dtype == torch.float64 else 1e-6) * max(1.0, (D / 128) ** 0.5)
    size = truth.masked_fill(truth.isinf(), 0).abs()
    allowed = unit * size.clamp(min=1) if name in ("O", "LSE") else 2 * unit * size.max().clamp(min=1e-3)
    return allowed if dtype in HALF else torch.maximum(allowed, 4 * naive_error)  # the half types' LSE is a float32 that naive has not


class Worst(NamedTuple):
    """The comparison that came closest to its limit, or went furthest past it."""

    error: float
    allowed: float
    place: str

    def ok(self) -> bool:
        return self.error <= self.allowed  # written so that NaN fails

    def closeness(self) -> float:
        return self.error / max(self.allowed, 1e-300) if self.error < float("inf") else self.error


@dataclass
class Report:
    """Collects comparisons, keeps the worst of each kind, prints one aligned table, and fails if any is above its limit."""

    title: str
    cells: dict[str, dict[str, Worst]] = field(default_factory=dict)  # what was compared → name of the tensor → worst

    def compare(self, what: str, name: str, got: Tensor, want: Tensor, allowed: Tensor | float, case: str = "") -> None:
        """Compare `got` with `want`; `allowed` is the limit, per element or for all. −inf must meet −inf; NaN fails. `case` says which."""
        got, want = got.detach().double().cpu(), want.detach().double().cpu()
        assert got.shape == want.shape, f"{self.title}: {what} {name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        worst = Worst(0.0, 0.0, "empty")
        if got.numel():
            allowed = torch.as_tensor(allowed, dtype=torch.float64).cpu().expand_as(want)
            error = (got - want).abs().masked_fill(got == want, 0)  # equal infinities differ by 0, not by NaN
            error = torch.where(error.isnan(), torch.inf, error)
            at = int((error / allowed.clamp(min=1e-300)).argmax())
            index = ", ".join(str(int(n)) for n in torch.unravel_index(torch.tensor(at), error.shape))
            worst = Worst(float(error.flatten()[at]), float(allowed.flatten()[at]), f"{case} at ({index})".strip())
        seen = self.cells.setdefault(what, {}).get(name)
        if seen is None or worst.closeness() > seen.closeness():
            self.cells[what][name] = worst

    def expect(self, what: str, got: Result, problem: Problem, slack: float = 1.0) -> None:
        """Every field of `got` against the truth, by the rule of the problem's dtype; `slack` widens the limits."""
        case = problem.case
        for name, value, want, in_dtype in zip(got._fields, got, problem.truth, problem.in_dtype, strict=True):
            if value is None:
                continue
            # Kernels of half types compute a softcap's tanh to 11 bits; LSE is then as exact as O.
            rule = "O" if case.softcap and case.dtype in HALF else name
            self.compare(what, name, value, want, slack * limit(rule, want, in_dtype, case.dtype, case.D), str(case))

    def failures(self) -> list[str]:
        return [
            f"{what}: {name} is off by {worst.error:.2e}, allowed {worst.allowed:.2e}, {worst.place}"
            for what, row in self.cells.items()
            for name, worst in row.items()
            if not worst.ok()
        ]

    def print(self) -> None:
        width = max(len("largest error / tolerance"), *(len(what) for what in self.cells))
        names = list(dict.fromkeys(name for row in self.cells.values() for name in row))
        print(f"\n{self.title}\n  {'largest error / tolerance':{width}}", *(f"{name:^19}" for name in names))
        for what, row in self.cells.items():
            cells = [f"{row[n].error:.2e} / {row[n].allowed:.2e}" if n in row else " " * 19 for n in names]
            print(f"  {what:{width}}", *cells, "ok" if all(worst.ok() for worst in row.values()) else "FAILED")

    def verdict(self) -> None:
        """Print, then raise AssertionError if anything failed or nothing was compared."""
        assert self.cells, f"{self.title}: nothing was compared"
        self.print()
        assert not self.failures(), f"{self.title}:\n  " + "\n  ".join(self.failures())


def script_arguments(description: str) -> argparse.Namespace:
    """Flags of a check that runs as a script. The default size is FlashAttention-PyTorch's."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--b", type=command_line.positive, default=1, help="batch size")
    parser.add_argument("--h", type=command_line.positive, default=1, help="query heads")
    parser.add_argument("--kv_heads", type=command_line.positive, help="key/value heads, which divide --h (default: --h)")
    parser.add_argument("--q_len", type=command_line.positive, default=2048)
    parser.add_argument("--kv_len", type=command_line.positive, default=2048)
    parser.add_argument("--d", type=command_line.positive, help="head size (default: 512, or the largest that the backend takes)")
    parser.add_argument("--dtype", choices=("float32", "float64", "float16", "bfloat16"), default="float32")
    parser.add_argument("--backend", choices=(*BACKENDS, *GROUPS), help="default: the fastest that serves the call")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=command_line.device, default=default, help="cpu, cuda or cuda:N (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.kv_heads and arguments.h % arguments.kv_heads:
        parser.error(f"--kv_heads must divide --h, got {arguments.kv_heads} and {arguments.h}")
    if arguments.d is None:
        arguments.d = min(512, getattr(BACKENDS.get(arguments.backend), "head_dims", (512,))[-1])
    return arguments


def cases_for_script(arguments: argparse.Namespace, **settings) -> list[Case]:
    """The requested size, and a ragged one."""
    size = dict(B=arguments.b, H=arguments.h, Hkv=arguments.kv_heads, D=arguments.d, dtype=getattr(torch, arguments.dtype), **settings)
    return [Case(Nq=arguments.q_len, Nk=arguments.kv_len, **size), Case(Nq=113, Nk=203, seed=1, **size)]


def run_as_script(check, arguments: argparse.Namespace, **settings) -> None:
    """Run `check(case, target)` on the script's cases. Exit code 1: something differs; 2: a case could not be computed."""
    target = Target(arguments.backend, arguments.device)

    def every_case() -> int:
        failed = False
        for case in cases_for_script(arguments, **settings):
            try:
                check(case, target)
            except AssertionError as error:
                failed = True
                print(f"\nFAILED  {error}")
            except NotImplementedError as error:  # the backend says why it does not serve the case
                print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
                return 2
        print("\nFAILED" if failed else "\nall within tolerance")
        return failed

    command_line.run(every_case)


def run_alone(file: str) -> None:
    """Run one file of checks: `python checks/check_….py`."""
    sys.exit(pytest.main([file, "-rs", *sys.argv[1:]]))

"""Exercise 8: your own forward kernel, checked by the harness of checks/ and scored by the emulator's counts and its model's clock."""

import sys
from pathlib import Path

import torch
from tasks import FOLDER, Wrong
from torch import Tensor

from flash_attention.backends import BACKENDS, cuda, emulated
from flash_attention.backends.emulated import Counts, EmulatedRung, EmulatorError
from flash_attention.build import Specialisation
from flash_attention.build import emulated as emulator
from flash_attention.call import Call, Settings

sys.path.insert(0, str(FOLDER.parent / "checks"))

from harness import Case, Problem, Report, Result

FILE = FOLDER / "8_forward.cu"
SOLUTION = FOLDER / "solutions" / "8_forward.cuh"
HALF = torch.float16
# What is tried, in this order, and what is likely wrong if it is the first to fail.
CASES = (
    ("One tile of keys", "the products, the softmax or the store", Case(B=1, H=1, Nq=64, Nk=64, D=64, dtype=HALF)),
    ("Many tiles of keys", "O and l must shrink when a maximum grows", Case(B=1, H=1, Nq=64, Nk=512, D=64, dtype=HALF, sharp=3)),
    (
        "Lengths that fill no tile",
        "keys beyond the last must be hidden, rows beyond the last not stored",
        Case(B=1, H=1, Nq=70, Nk=131, D=64, dtype=HALF),
    ),
    ("Causal, more keys than rows", "row i sees keys up to i + Nk − Nq", Case(B=1, H=1, Nq=70, Nk=150, D=64, dtype=HALF, causal=True)),
    ("Rows that see nothing", "there O = 0 and LSE = −∞", Case(B=1, H=1, Nq=150, Nk=70, D=64, dtype=torch.bfloat16, causal=True)),
    (
        "Heads that share keys and values",
        "query head h reads head h // (H / Hkv): kv_head(p, h)",
        Case(B=2, H=4, Hkv=2, Nq=33, Nk=65, D=40, dtype=HALF),
    ),
)
BESIDE = ("simple", "mma", "swizzle", "tensor_core", "hopper")  # rungs whose scores are shown for comparison


def kernels(path: Path) -> list[Specialisation]:
    """The specialisations that check() compiles, in the order of its cases."""
    cases = [case for _, _, case in CASES]
    wanted = [Specialisation(str(path), emulator.ARCH, 64, cuda.DTYPE_NAMES[case.dtype], case.causal) for case in cases]
    return list(dict.fromkeys(wanted))


def forward(rung: EmulatedRung, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """O and LSE."""
    call = Call.of(q, k, v, None, None, Settings(q.shape[3] ** -0.5, right=0 if causal else None))
    return rung.plan(cuda.FORWARD, call)(q, k, v, None, None, None)


def check(path: Path) -> list[str]:
    """The lines of a score.

    Raises:
        Wrong: the kernel fails in a case; the message says in which, and what is likely.
    """
    rung = EmulatedRung(name="yours", files=(str(path), None), min_arch=80, dtypes=("float16", "bfloat16"), head_dims=(64,), multiple_of=8)
    for words, likely, case in CASES:
        q, k, v, _ = case.inputs("cpu")
        problem = Problem.solve(case, q, k, v, None, case.gradient("cpu", *q.shape[:3], v.shape[3]), None)
        try:
            O, LSE = forward(rung, q, k, v, case.causal)
        except EmulatorError as error:
            raise Wrong(f"{words} ({case}): {error}\n  If this case alone fails: {likely}.") from error
        report = Report(words)
        report.expect("yours", Result(O, LSE, None, None, None), problem)
        if failures := report.failures():
            raise Wrong(f"{words}: {'; '.join(failures)}.\n  Likely: {likely}.")
    return score(rung)


def score(rung: EmulatedRung) -> list[str]:
    """A table of what it moves and computes, with rungs of cuda/ for comparison."""
    q, k, v = torch.randn(3, 1, 1, 512, 64, dtype=HALF, generator=torch.Generator().manual_seed(0)).unbind()
    heads = "KB from global memory", "shared-memory cycles", "× the least", "exponentials", "cycles of the model"
    lines = [f"{'B 1 H 1 N 512 D 64, float16':30}" + "".join(f"{head:>24}" for head in heads)]
    for name, each in (("yours", rung), *((name, BACKENDS[f"emulated:{name}"]) for name in BESIDE if name in cuda.RUNGS)):
        with emulated.counting() as counts:
            forward(each, q, k, v, False)
        with emulated.tracing() as traces:
            forward(each, q, k, v, False)
        lines.append(f"  {name:28}{_figures(counts[0])}{traces[0].cycles:>24,.0f}")
    return [*lines, "  (The model's clock: one multiprocessor that gets the whole grid, cuda/emulator/model.h. A model, not a GPU.)"]


def _figures(counts: Counts) -> str:
    paths = ("read by threads", "by cp.async", "by tensor map, to shared memory", "by cp.async.bulk")
    kilobytes = sum(counts.total.get(f"global bytes {path}", 0) for path in paths) / 1024
    cycles, least = (sum(getattr(place, which) for place in counts.shared.values()) for which in ("cycles", "least"))
    return f"{kilobytes:>24,.0f}{cycles:>24,}{cycles / max(least, 1):>24.1f}{counts.total.get('exponentials', 0):>24,}"

"""Targets for flash attention in plain PyTorch on a CPU, against normal attention and PyTorch's own, measured here and now.

    python -m benchmarks.cpu_targets [--quick] [--json FILE]

float32, 2 threads, no mask. Each case runs in one process, the three taking turns; figures are medians of 9, at N = 16384 of 5, and there
of 3 for normal attention, one call of which takes tens of seconds. Forward cases record no gradients. Some cases run again beside a process
that keeps a core busy, without normal attention. Peak memory is that above the inputs, in a fresh process for each contender.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import NamedTuple

import torch
from tqdm import tqdm

from benchmarks import report
from benchmarks.case import Case, random_inputs
from benchmarks.compare import Row, speed
from benchmarks.contenders import Contender, Runner
from benchmarks.measure import time_alternating
from benchmarks.memory import peak_memory
from benchmarks.verify import verify
from flash_attention.command_line import output_file, run

THREADS = 2
NORMAL, SDPA, FLASH = Contender("normal"), Contender("sdpa"), Contender("flash", "reference")


class Speed(NamedTuple):
    """How many times the speed of normal attention and of PyTorch's SDPA flash attention must reach; None: no target."""

    case: Case
    over_normal: float | None
    over_sdpa: float | None
    busy: bool = False  # beside a process that keeps a core busy


class Memory(NamedTuple):
    """How many MB above the inputs flash attention may need."""

    case: Case
    mb: float


SMALL = Case(h=8, q_len=4096, kv_len=4096, d=64)
LARGE = Case(h=2, q_len=16384, kv_len=16384, d=512)
SPEEDS = [
    Speed(SMALL, 2.5, 0.85),
    Speed(replace(SMALL, causal=True), 4.5, 0.6),
    Speed(LARGE, 1.25, 0.9),
    Speed(replace(LARGE, causal=True), 2.3, 0.75),
    Speed(replace(SMALL, backward=True), 1.5, None),
    Speed(replace(SMALL, backward=True, causal=True), 2.5, None),
    *(Speed(replace(SMALL, backward=b, causal=c), None, 0.6, busy=True) for b in (False, True) for c in (False, True)),
]
MEMORIES = [Memory(LARGE, 150), Memory(replace(LARGE, backward=True), 400)]

SPEED_COLUMNS: list[report.Column] = [
    ("label", "case", ""),
    ("normal_ms", "normal ms", ".1f"),
    ("sdpa_ms", "SDPA ms", ".1f"),
    ("flash_ms", "flash ms", ".1f"),
    ("over_normal", "flash / normal", ".2f"),
    ("normal_target", "target", ""),
    ("over_sdpa", "flash / SDPA", ".2f"),
    ("sdpa_target", "target", ""),
    ("verdict", "", ""),
]
MEMORY_COLUMNS: list[report.Column] = [
    ("label", "case", ""),
    ("normal_mb", "normal MB", ".1f"),
    ("sdpa_mb", "SDPA MB", ".1f"),
    ("flash_mb", "flash MB", ".1f"),
    ("target", "target", ""),
    ("verdict", "", ""),
]


def repeats(case: Case) -> dict[Contender, int]:
    return {NORMAL: 3, SDPA: 5, FLASH: 5} if case.q_len >= LARGE.q_len else dict.fromkeys((NORMAL, SDPA, FLASH), 9)


def quick(case: Case) -> Case:
    """The same cases at lengths that take a second. Ratios grow with length, so the targets do not apply."""
    length = case.q_len // 8
    return replace(case, q_len=length, kv_len=length)


@contextmanager
def busy_process() -> Iterator[None]:
    """Another process that keeps one core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def run_speed(target: Speed, quickly: bool) -> Row:
    case = quick(target.case) if quickly else target.case
    inputs = random_inputs(case)
    check = verify(FLASH, case, inputs)
    if not check.passed:
        sys.exit(f"{FLASH} is wrong in {case.describe()}: error {check.error:.1e} in {check.of}, tolerance {check.tolerance:.1e}")
    contenders = (SDPA, FLASH) if target.busy else (NORMAL, SDPA, FLASH)
    runners = {contender: Runner(contender, case, inputs) for contender in contenders}
    with busy_process() if target.busy else nullcontext():
        results = {contender.type: speed(case, times) for contender, times in time_alternating(runners, repeats(case)).items()}
    ms = {type: results[type]["ms"] if type in results else None for type in ("normal", "sdpa", "flash")}
    over_normal = None if target.busy else ms["normal"] / ms["flash"]
    over_sdpa = ms["sdpa"] / ms["flash"]
    met = None if quickly else (over_normal or 0) >= (target.over_normal or 0) and over_sdpa >= (target.over_sdpa or 0)
    return {
        "label": _label(case) + (", beside a busy process" if target.busy else ""),
        **{f"{type}_ms": value for type, value in ms.items()},
        "over_normal": over_normal,
        "normal_target": None if target.over_normal is None else f"≥ {target.over_normal:g}",
        "over_sdpa": over_sdpa,
        "sdpa_target": None if target.over_sdpa is None else f"≥ {target.over_sdpa:g}",
        "met": met,
        "verdict": _verdict(met),
        "case": asdict(case),
        "results": results,
    }


def run_memory(target: Memory, quickly: bool) -> Row:
    case = quick(target.case) if quickly else target.case
    mb = {f"{contender.type}_mb": peak_memory(contender, case) for contender in (NORMAL, SDPA, FLASH)}
    met = None if quickly or mb["flash_mb"] is None else mb["flash_mb"] <= target.mb
    return {"label": _label(case), **mb, "target": f"≤ {target.mb:g}", "met": met, "verdict": _verdict(met), "case": asdict(case)}


def _label(case: Case) -> str:
    kind = "forward + backward" if case.backward else "forward"
    return f"{kind}{' causal' if case.causal else ''}, B {case.b} H {case.h} N {case.q_len} D {case.d}"


def _verdict(met: bool | None) -> str:
    return {True: "met", False: "NOT MET", None: "not judged"}[met]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_targets", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="an eighth of every length: seconds instead of minutes, judging nothing")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write device, versions and every figure")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    environment = report.environment("cpu")
    print(report.describe(environment), flush=True)

    speeds = [run_speed(target, args.quick) for target in tqdm(SPEEDS, desc="speed", disable=None)]
    memories = [run_memory(target, args.quick) for target in tqdm(MEMORIES, desc="memory", disable=None)]
    print("\nspeed, float32: median times, ratios of speeds (more is faster)\n")
    print(report.table(speeds, SPEED_COLUMNS))
    print("\npeak memory above the inputs, float32\n")
    print(report.table(memories, MEMORY_COLUMNS))
    if args.json:
        report.write_json(args.json, environment, {"quick": args.quick}, [*speeds, *memories])
        print(f"\nwritten: {args.json}")


if __name__ == "__main__":
    run(main)

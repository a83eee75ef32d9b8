"""Cycles and instructions of the rungs' kernels, and why their warps wait, as NVIDIA's profiler counts them on a GPU.

    python -m benchmarks.cycles --json results/h200_cycles.json

Runs itself under ncu (Nsight Compute, part of the CUDA toolkit), which needs permission to read the performance counters. Clocks are not
locked: cycles, unlike milliseconds, hardly depend on them. Each kernel is launched once, with a cold L2 cache.

    ladder   every rung's forward, B 4 H 16 N 4096 D 64, bfloat16
    hopper   forward, B 4 N 4096, H·D = 2048, D 64, 128, 256, bfloat16, and backward up to 128, where it is one kernel beside two short ones
"""

import argparse
import csv
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.ladder import ladder, takes_plain_calls
from flash_attention import command_line, flash_attention
from flash_attention.backends import cuda

REASONS = ("barrier", "long_scoreboard", "short_scoreboard", "mio_throttle", "math_pipe_throttle", "wait", "gmma")
METRICS = {
    "cycles": "sm__cycles_elapsed.max",
    "instructions": "sm__inst_executed.sum",
    "conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum",
    **{reason: f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio" for reason in REASONS},
}
COLUMNS: list[report.Column] = [
    ("rung", "rung", ""),
    ("part", "part", ""),
    ("d", "D", "d"),
    ("cycles", "thousand cycles", ",.0f"),
    ("instructions", "million warp instructions", ",.1f"),
    ("conflicts", "bank conflicts of loads, thousands", ",.0f"),
    *((reason, reason.replace("_", " "), ".2f") for reason in REASONS),
]
B, N = 4, 4096


def launches() -> list[tuple[str, str, int, int]]:
    """(rung, part, H, D) of each kernel that is profiled, in the order of their launches."""
    return [
        *((name, "forward", 16, 64) for name in ladder() if takes_plain_calls(cuda.RUNGS[name])),
        *(("hopper", part, 2048 // d, d) for d in (64, 128, 256) for part in ("forward", "backward") if part == "forward" or d <= 128),
    ]


def launch_all() -> None:
    """The launches that ncu profiles."""
    torch.manual_seed(0)
    for rung, part, h, d in launches():
        if part == "backward":
            continue  # together with its forward
        q, k, v = (x.requires_grad_(("hopper", "backward", h, d) in launches()) for x in inputs(h, d))
        O = flash_attention(q, k, v, backend=rung)
        if O.requires_grad:
            O.backward(torch.randn_like(O))
    torch.cuda.synchronize()


def inputs(h: int, d: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(3, B, h, N, d, device="cuda", dtype=torch.bfloat16).unbind()


def rows(lines: Iterable[str]) -> list[dict[str, Any]]:
    """Parses ncu's CSV: one row per kernel."""
    kernels: dict[int, dict[str, float]] = {}
    names = {metric: name for name, metric in METRICS.items()}
    for row in csv.DictReader(line for line in lines if line.startswith('"')):
        if name := names.get(row["Metric Name"]):
            kernels.setdefault(int(row["ID"]), {})[name] = float(row["Metric Value"].replace(",", ""))
    wanted = launches()
    if len(kernels) != len(wanted):
        raise ValueError(f"ncu has seen {len(kernels)} kernels, not {len(wanted)}")
    return [
        {"rung": rung, "part": part, "b": B, "h": h, "n": N, "d": d, **kernels[n]}
        for n, (rung, part, h, d) in zip(sorted(kernels), wanted, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cycles", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts there")
    parser.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here")
    if arguments.launch:
        return launch_all()
    ncu = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    if not Path(ncu).exists():
        parser.error("ncu, NVIDIA's profiler, is not on the PATH")
    command = [ncu, "--clock-control", "none", "--csv", "-k", "regex:^(forward|backward)_kernel", "--metrics", ",".join(METRICS.values())]
    done = subprocess.run([*command, sys.executable, "-m", "benchmarks.cycles", "--launch"], capture_output=True, text=True)
    if done.returncode:
        parser.error(f"ncu failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    found = rows(done.stdout.splitlines())
    print(
        report.table(
            [
                {**row, "cycles": row["cycles"] / 1e3, "instructions": row["instructions"] / 1e6, "conflicts": row["conflicts"] / 1e3}
                for row in found
            ],
            COLUMNS,
        )
    )
    if arguments.json:
        report.write_json(arguments.json, report.environment("cuda"), {"b": B, "n": N, "dtype": "bfloat16"}, found)


if __name__ == "__main__":
    command_line.run(main)

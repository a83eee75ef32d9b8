"""bench.py and bench_causal.py as a user runs them, at small sizes, and what they measure memory with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import run_alone

ROOT = Path(__file__).parents[1]
SMALL = ["--q_len", "70", "--kv_len", "90", "--d", "16", "--repeats", "2", "--device", "cpu"]
FIELDS = {"name", "type", "backend", "b", "h", "q_len", "kv_len", "d", "dtype", "causal", "mask", "ms", "tflops", "memory_mb", "all_ms"}


def python(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    # Whatever the other checks do on this machine at the same time, one thread does not have to wait for a second one.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False)


def check_bad_type_exits_2():
    run = python("bench.py", "--type", "fast")
    assert run.returncode == 2 and "invalid choice: 'fast'" in run.stderr, run.stderr


def check_small_runs(tmp_path):
    """Both scripts from another folder: exit code 0, one row a type, figures in the JSON, a trace for each type and mask, nothing else."""
    for script, types in (("bench.py", ["normal", "flash", "sdpa"]), ("bench_causal.py", ["flash"])):
        asked = "--type", "all" if len(types) > 1 else types[0], "--mask", "none", "--backward", "--profile", "--json", f"{script}.json"
        run = python(str(ROOT / script), *asked, *SMALL, folder=tmp_path)
        assert run.returncode == 0 and "flash_attention::forward" in run.stdout, run.stdout + run.stderr
        figures = json.loads((tmp_path / f"{script}.json").read_text(encoding="utf-8"))
        assert {"device", "cpu_threads", "torch", "cuda"} <= figures["environment"].keys()
        assert [row["type"] for row in figures["results"]] == types
        for row in figures["results"]:
            assert row.keys() >= FIELDS and row["causal"] == (script == "bench_causal.py") and row["ms"] > 0, row
            assert row["type"] == "normal" or row["check"]["passed"], row
            assert json.loads((tmp_path / row["trace"]).read_text())["traceEvents"]
        assert len(types) == 1 or figures["results"][1]["speedup"] == figures["results"][0]["ms"] / figures["results"][1]["ms"]

    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    folders = ("normal-none", "flash-none", "sdpa-none", "flash-causal")
    assert written == {"bench.py.json", "bench_causal.py.json", *(f"profiles/{folder}-backward/trace.json" for folder in folders)}


def check_wrong_result_exits_1():
    """A backend whose O is off by 1 in 10 000 is not timed."""
    program = """
import sys
import bench
from flash_attention.backends import reference
right = reference.forward
reference.forward = lambda *arguments: tuple(x * 1.0001 for x in right(*arguments))
sys.exit(bench.main())
"""
    run = python("-c", program, "--type", "flash", *SMALL)
    assert run.returncode == 1 and "WRONG" in run.stderr and "TFLOP/s" not in run.stdout, run.stdout + run.stderr


def check_memory_is_what_was_touched():
    """200 MB written, then given back: the peak saw them, to 10 %. A second, smaller rise is not hidden by the first peak."""
    program = """
import torch
from benchmarks.memory import peak_rise
torch.ones(10)
print(peak_rise(lambda: torch.ones(50_000_000).sum()), peak_rise(lambda: torch.ones(25_000_000)))
"""
    run = python("-c", program)
    assert run.returncode == 0, run.stderr
    first, second = (float(word) for word in run.stdout.split())
    assert first == pytest.approx(200, rel=0.1), run.stdout
    if sys.platform == "linux":
        assert second == pytest.approx(100, rel=0.1), run.stdout


if __name__ == "__main__":
    run_alone(__file__)

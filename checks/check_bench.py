"""bench.py, bench_causal.py and the GPU targets as a user runs them, at small sizes; what they measure memory with; the tables."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import geometric_mean

import pytest
import torch
from harness import run_alone

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks are not installed

from benchmarks import cycles, gpu_targets, report, tables
from benchmarks.case import Case, random_inputs
from benchmarks.verify import verify
from flash_attention.backends import cuda, libraries
from flash_attention.call import Call, Form, Settings

ROOT = Path(__file__).parents[1]
SMALL = ["--q_len", "70", "--kv_len", "90", "--d", "16", "--repeats", "2", "--device", "cpu"]
GROUPS = ["grid", "mask", "dropout", "bert", "float32", "host", "rungs"]
FIELDS = {"name", "type", "backend", "b", "h", "q_len", "kv_len", "d", "dtype", "causal", "mask", "ms", "tflops", "memory_mb", "all_ms"}


def python(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    # One thread, so that it never waits for a second one, whatever other checks run on this machine.
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
    """200 MB are written and freed: the peak includes them, to 10 %. A second, smaller rise is not hidden by the first peak."""
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


def check_gpu_targets_on_a_cpu(tmp_path):
    """Every group from end to end: ratios match the times beside them, contenders that cannot run here say why, nothing is judged."""
    arguments = "--device", "cpu", "--quick", "--only", *GROUPS, "--json", str(tmp_path / "targets.json")
    run = python("-m", "benchmarks.gpu_targets", *arguments)
    assert run.returncode == 0 and "grid, 7 cases without sdpa (cudnn): No viable backend" in run.stdout, run.stdout + run.stderr
    content = json.loads((tmp_path / "targets.json").read_text(encoding="utf-8"))
    assert {"driver", "ptxas", "matmul_tflops"} <= content["environment"].keys()
    rows = content["results"]
    assert list(dict.fromkeys(row["group"] for row in rows)) == GROUPS

    stages = {"forward": "forward", "backward": "backward", "forward + backward": "total"}
    for row in rows:
        assert row["name"] == "flash (reference)" and all(target["met"] is None for target in row["targets"]), row
        found = row.get("measured", {})
        assert all(figures["check"]["passed"] for name, figures in found.items() if name == row["name"]), row
        if row["group"] in ("grid", "mask", "dropout", "float32", "between", "wide", "rungs") and row["case"]:
            times = {name: figures[stages[row["part"]]] for name, figures in found.items() if "skipped" not in figures}
            assert row["ms"] == times.pop(row["name"]) and row["tflops"] > 0, row
            over = {key.removeprefix("over "): value for key, value in row.items() if key.startswith("over ")}
            assert row["group"] != "grid" or over.pop("best") == min(over.values()), row
            assert over == {name: ms / row["ms"] for name, ms in times.items()}, row
        if row["group"] == "mask":
            assert found["flex"] == {"skipped": "on a CPU it has no backward"}
        if row["group"] == "bert":
            assert row["over normal"] == found["normal"]["ms"] / row["ms"] and row["memory_mb"] >= 0, row
    for part in ("forward", "backward"):
        cells = [row for row in rows if row["group"] == "grid" and row["part"] == part]
        ratios = [row["over sdpa (flash)"] for row in cells if row["case"]]
        assert len(ratios) == 7 and cells[-1]["over sdpa (flash)"] == pytest.approx(geometric_mean(ratios)), cells[-1]


@pytest.mark.parametrize("mask", ("full", "key"))
def check_flex(mask, monkeypatch):
    """The rival that no benchmark calls on a CPU gets the same mask. Not compiled: that takes half a minute."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    case = Case(2, 3, 130, 200, 16, "float32", mask=mask)
    assert verify(gpu_targets.FLEX, case, random_inputs(case)).passed


def check_gpu_targets_reject_a_wrong_result():
    program = """
import sys
from benchmarks import gpu_targets
from flash_attention.backends import reference
right = reference.forward
reference.forward = lambda *arguments: tuple(x * 1.0001 for x in right(*arguments))
sys.exit(gpu_targets.main())
"""
    run = python("-c", program, "--device", "cpu", "--quick", "--only", "float32")
    assert run.returncode == 1 and run.stderr.count("flash (reference) is wrong") == 3, run.stdout + run.stderr


def check_targets_are_judged():
    """Targets are judged by the worst of several figures; a missing one is not judged; for times and memory, less is better."""
    place = gpu_targets.Place("cuda", False, {})
    targets = gpu_targets.Target("forward", "over flex", 1.2), gpu_targets.Target("forward", "memory_mb", 100)

    def verdicts(*figures: dict) -> list[tuple]:
        rows = [{"group": "mask", "label": str(n), "part": "forward", **each} for n, each in enumerate(figures)]
        lines = gpu_targets.summary([gpu_targets._judged(row, targets, place) for row in rows])
        return [(line["target"], line.get("worst"), line.get("label"), line["verdict"]) for line in lines]

    speed, memory = "≥ 1.2 × Flex", "≤ 100 MB"
    good, bad = {"over flex": 1.2, "memory_mb": 100}, {"over flex": 1.19, "memory_mb": 101}
    assert verdicts(good, good) == [(speed, 1.2, "0", "met"), (memory, 100, "0", "met")]
    assert verdicts(good, bad) == [(speed, 1.19, "1", "NOT MET"), (memory, 101, "1", "NOT MET")]
    assert verdicts(good, {"memory_mb": 90}) == [(speed, 1.2, "0", "not judged"), (memory, 100, "0", "met")]
    assert verdicts({}) == [(speed, None, None, "not judged"), (memory, None, None, "not judged")]


def check_tables_of_an_h200(tmp_path, monkeypatch):
    """Made-up results are written between their markers, and writing again changes nothing; markers without results are left unchanged."""
    environment = {
        "device": "A GPU",
        "device_type": "cuda",
        "cpu_threads": 1,
        "torch": "2",
        "cuda": "13.0",
        "python": "3",
        "system": "Linux",
    }
    environment |= {"driver": "580.1", "ptxas": None, "matmul_tflops": {"bfloat16": 700.0}}

    def cell(group: str, part: str, **figures) -> dict:
        label, case = "B 1", {"q_len": 512, "d": 64, "causal": False}
        return {"group": group, "label": label, "part": part, "name": "flash (first)", "backend": "first", "case": case, **figures}

    mean = cell("grid", "forward", **{"over sdpa (flash)": 1.5, "case": None, "label": "geometric mean of 1 cases"})
    grid = [
        cell("grid", "forward", **{"over sdpa (flash)": 1.25, "over sdpa (cudnn)": 0.75}),
        cell("grid", "backward", **{"over sdpa (flash)": 1.125}),
        mean,
        cell("grid", "forward", **{"over sdpa (flash)": 2.5, "over fa3": 1.125, "name": "flash (second)", "backend": "second"}),
    ]
    targets = [cell("mask", "forward", ms=2.0, **{"over flex": 3.0})]
    rungs = [
        cell("rungs", "forward", tflops=350.0, percent_of_matmul=50.0),
        cell("rungs", "backward", tflops=280.0, percent_of_matmul=40.0, **{"over sdpa (flash)": 0.5}),
    ]
    kept = {"h200_grid": grid, "h200_targets": targets, "h200_rungs": rungs}
    text = "".join(f"<!-- {name} -->\nold\n<!-- end of {name} -->\n" for name in kept)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.filled(text) == text
    for name, rows in kept.items():
        report.write_json(tmp_path / "results" / f"{name}.json", environment, {}, rows)
    filled = tables.filled(text)
    for line in (
        "A GPU; torch 2, CUDA 13.0, Python 3, Linux, driver 580.1, ptxas unknown; medians. × is how many times the speed of that one: "
        "above 1 is faster.",
        "| flash (first) forward × FA2 / × cuDNN / × FA3, N | D 64 |",
        "| flash (second) forward × FA2 / × cuDNN / × FA3, N | D 64 |",
        "| 512 | 2.50 / – / 1.12 |",
        "| 512 | 1.25 / 0.75 / – |",
        "Geometric mean of 1 cases: 1.50 / – / –.",
        "| 512 | 1.12 / – / – |",
        "| B 1 | forward | 2.000 | 3.00 |",
        "| first | B 1 | 350 | 50 | 280 | 40 | 0.50 |",
    ):
        assert line in filled.splitlines(), filled
    assert "old" not in filled and tables.filled(filled) == filled


if __name__ == "__main__":
    run_alone(__file__)


def check_what_the_profiler_watches(monkeypatch):
    """Each kernel that benchmarks.cycles launches serves its case: new rungs with other dtypes or head sizes are left out."""
    monkeypatch.setattr(libraries, "why_no_kernels", lambda rung, device: None)  # where there is no GPU to ask
    for name, _, h, d in cycles.launches():
        x = Form.of(torch.empty(4, h, 1, d, dtype=torch.bfloat16))._replace(device=torch.device("cuda", 0))
        assert not (reason := cuda.RUNGS[name].why_not(Call(x, x, x, None, None, Settings(1.0)))), f"{name}: {reason}"

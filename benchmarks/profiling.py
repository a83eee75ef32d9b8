"""One call under torch.profiler: where its time goes, operation by operation."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.contenders import Runner

FOLDER = Path("profiles")


def profile_call(runner: Runner) -> tuple[str, Path]:
    """The table of operations, longest first, and the trace (open it in https://ui.perfetto.dev or chrome://tracing).

    The trace lies in a folder of its own for each contender and kind of mask, so that one run does not overwrite another's:
    profiles/flash-causal/trace.json, profiles/normal-key-backward/trace.json.
    """
    runner()  # one-time work is not of interest
    cuda = torch.device(runner.case.device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, record_shapes=True, profile_memory=True) as profiler:
        runner()
        if cuda:
            torch.cuda.synchronize(runner.case.device)
    contender, case = runner.contender, runner.case
    several = contender.backend not in ("", "reference")
    parts = [contender.type, contender.backend if several else "", case.mask_kind, "backward" if case.backward else ""]
    trace = FOLDER / "-".join(part for part in parts if part) / "trace.json"
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=40), trace

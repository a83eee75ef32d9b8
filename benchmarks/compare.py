"""One case, all contenders side by side: each is checked, timed in alternation and measured for memory. One row of figures for each."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.case import Case, random_inputs, tera_operations
from benchmarks.contenders import Contender, Runner, contenders, refusal, why_not
from benchmarks.measure import host_time, time_alternating
from benchmarks.memory import peak_memory
from benchmarks.profiling import profile_call
from benchmarks.verify import Check, verify

Row = dict[str, Any]


class WrongResult(Exception):
    """Flash attention's result is wrong, so its time means nothing."""


def compare(
    case: Case,
    type: str,
    backend: str | None = None,
    repeats: int | None = None,
    *,
    matmul_tflops: float,
    profile: bool = False,
    say: Callable[[str], None] = print,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """A row for each contender that type and backend stand for (see `contenders`), with ms, TFLOP/s, MB and the ratios between them.

    matmul_tflops: what a matrix product reaches on this device. profile: also profile one call of each. say is called with lines to print,
    progress with the current step.

    Raises:
        WrongResult: flash attention differs from normal attention by more than the tolerance.
        NotImplementedError: the backend asked for cannot serve this case.
    """
    inputs = random_inputs(case)
    rows: dict[Contender, Row] = {}
    runners: dict[Contender, Runner] = {}
    for contender in contenders(type, backend, case, inputs):
        rows[contender] = {"name": str(contender), "type": contender.type, "backend": contender.backend, **asdict(case)}
        reason = why_not(contender, case)
        if reason is None:
            runner = Runner(contender, case, inputs)
            reason = refusal(runner)
        if reason is None:
            runners[contender] = runner
        else:
            rows[contender]["skipped"] = reason

    for contender in runners:
        if contender.type == "normal":  # the definition itself
            continue
        progress(f"{contender}, checking")
        check = verify(contender, case, inputs)
        if check is None:
            say(f"{contender}: not checked, PyTorch's dropout draws other random bits")
            continue
        rows[contender]["check"] = check._asdict() | {"passed": check.passed}
        if contender.type == "flash" and not check.passed:
            raise WrongResult(_describe(contender, check, case))
        say(_describe(contender, check, case))

    if runners:
        for contender, times in time_alternating(runners, repeats, progress).items():
            rows[contender].update(speed(case, times))
            rows[contender]["percent_of_matmul"] = 100 * rows[contender]["tflops"] / matmul_tflops
    for contender, runner in runners.items():
        progress(f"{contender}, memory")
        rows[contender]["host_us"] = host_time(runner, calls=50 if rows[contender]["ms"] < 20 else 5)
        rows[contender]["memory_mb"] = peak_memory(contender, case)
    _add_ratios(list(rows.values()))
    if profile:
        for contender, runner in runners.items():
            listing, trace = profile_call(runner)
            rows[contender]["trace"] = str(trace)
            say(f"\n{contender}, {case.describe()}\n{listing}\ntrace of {contender}: {Path(trace).resolve()}\n")
    return list(rows.values())


def speed(case: Case, times: dict[str, list[float]]) -> Row:
    """Medians in ms of what `time_alternating` measured, and the corresponding TFLOP/s."""
    ms = {stage: median(every) for stage, every in times.items()}
    row = {"ms": ms["total"], "repeats": len(times["total"]), "tflops": tera_operations(case, "total") / (1e-3 * ms["total"])}
    if case.backward:
        row |= {"forward_ms": ms["forward"], "backward_ms": ms["backward"]}
        row["backward_tflops"] = tera_operations(case, "backward") / (1e-3 * ms["backward"])
    kept = times if case.backward else {"total": times["total"]}
    return row | {"all_ms": {stage: [round(t, 4) for t in every] for stage, every in kept.items()}}


def _add_ratios(rows: list[Row]) -> None:
    """Ratios to normal attention and to the fastest of PyTorch's, if those were measured."""
    measured = [row for row in rows if "ms" in row]
    normal = next((row for row in measured if row["type"] == "normal"), None)
    sdpa = min((row["ms"] for row in measured if row["type"] == "sdpa"), default=None)
    for row in measured if len(measured) > 1 else []:
        if normal:
            row["speedup"] = normal["ms"] / row["ms"]
            if normal["memory_mb"] and row["memory_mb"]:
                row["memory_saving"] = normal["memory_mb"] / row["memory_mb"]
        if sdpa:
            row["relative_to_sdpa"] = sdpa / row["ms"]


def _describe(contender: Contender, check: Check, case: Case) -> str:
    rows = "" if check.rows == case.q_len else f", {check.rows} of {case.q_len} rows"
    verdict = "right" if check.passed else "WRONG"
    return (
        f"{contender}, q_len {case.q_len}: {verdict}, largest error against normal attention in float64{rows}: {check.error:.1e} "
        f"in {check.of}, tolerance {check.tolerance:.1e}"
    )

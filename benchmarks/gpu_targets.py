"""Targets for the kernels on an H200, against PyTorch's own attention and normal attention, measured here and now.

    python -m benchmarks.gpu_targets [--only GROUP ...] [--json FILE]
    python -m benchmarks.gpu_targets --only rungs --json results/h200_rungs.json

Every contender is checked, then they take turns in one process; the median counts. "forward" records no gradients, "backward" is that stage
alone. Kernels that are not compiled yet are compiled before the clock starts; `python -m flash_attention.build` does that in parallel.

    grid     bfloat16, 16384 tokens, H·D = 2048, causal and not: FlashAttention-2 and cuDNN, as PyTorch has them, FlashAttention-3 and -4
             where they are installed (flash_attention_3.py, flash_attention_4.py)
    mask     bfloat16 under a dense random mask, and a key mask: FlexAttention, cuDNN, memory-efficient and normal attention
    dropout  bfloat16: FlashAttention-2
    bert     float16, key mask and dropout, against length: normal attention, time and memory
    float32  the kernels that compute in float32: on tensor cores, and with head sizes up to 512
    host     the CPU's time for a call so small that the GPU waits for it
    between  bfloat16, head sizes between 64, 128 and 256: FlashAttention-3, if it is installed (flash_attention_3.py), and PyTorch's choice
    wide     bfloat16, D 512: normal and memory-efficient attention
    scores   bfloat16, softcap, ALiBi and biases: the kernels without them, FlexAttention, cuDNN and memory-efficient attention
    intervals  bfloat16, windows and documents, as such and as the dense mask that they stand for: FlashAttention-3, FlexAttention
    decode   a few queries against many keys (benchmarks/decode.py): the best of SDPA and FlashAttention-3, and the speed of a copy
    rungs    every rung of cuda/ (only when asked for: nothing to reach, it is the table of cuda/README.md)

`--device cpu --quick` runs all of this without a GPU: at small sizes, with the reference as flash attention, and without judging.

One file because a group's cases and targets are read beside the code that measures and judges them.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from statistics import geometric_mean, median
from typing import NamedTuple

import torch
from tqdm import tqdm

from benchmarks import decode as few_queries
from benchmarks import report
from benchmarks.case import Case, Inputs, call_of, random_inputs, tera_operations
from benchmarks.compare import Row, WrongResult, compare
from benchmarks.contenders import Contender, Runner, refusal, why_not
from benchmarks.ladder import ladder
from benchmarks.measure import host_time, matmul_limit, time_alternating
from benchmarks.memory import peak_memory
from benchmarks.verify import verify
from flash_attention import command_line
from flash_attention.backends import BACKENDS

NORMAL, SDPA, FLEX = Contender("normal"), Contender("sdpa"), Contender("flex")
FA2, CUDNN, EFFICIENT = Contender("sdpa", "flash"), Contender("sdpa", "cudnn"), Contender("sdpa", "efficient")
FA3, FA4 = Contender("fa3"), Contender("fa4")
WITHOUT = Contender("plain")
NAMES = {
    FA2: "FA2",
    FA3: "FA3",
    FA4: "FA4",
    CUDNN: "cuDNN",
    FLEX: "Flex",
    EFFICIENT: "efficient",
    NORMAL: "normal",
    SDPA: "SDPA",
    WITHOUT: "without",
}
GRID_RIVALS = (FA2, CUDNN, FA3, FA4)
HOPPER, TENSOR_CORE, SIMPLE, WIDE, SPLIT_KEYS = "hopper", "tensor_core", "simple", "hopper_wide", "split_keys"
CHOSEN = "cuda"  # the rung that flash_attention() chooses itself
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"

AT_MOST = ("ms", "memory_mb", "host_us")  # for all other figures more is better
FIGURES: list[report.Column] = [
    ("ms", "ms", ".3f"),
    ("tflops", "TFLOP/s", ".3g"),
    ("percent_of_matmul", "% of matmul", ".0f"),
    ("host_us", "µs on the host", ".1f"),
    *((f"over {rival}", f"× {name}", ".2f") for rival, name in NAMES.items()),
    ("tb_per_s", "TB/s of K and V", ".2f"),
    ("over copy", "× a copy's", ".2f"),
    ("over best", "× best of all", ".2f"),
    ("over contiguous", "× contiguous", ".2f"),
    ("memory_mb", "MB", ".1f"),
    ("memory_saving", "× less memory", ".1f"),
]
COLUMNS: list[report.Column] = [("label", "case", ""), ("part", "", ""), ("name", "", ""), *FIGURES, ("verdict", "", "")]
SUMMARY: list[report.Column] = [
    ("group", "group", ""),
    ("part", "", ""),
    ("target", "target", ""),
    ("worst", "worst", ".3g"),
    ("label", "where", ""),
    ("verdict", "", ""),
]


class Target(NamedTuple):
    """A target: what a figure of flash attention must reach, in one part of a call."""

    part: str
    figure: str  # a key of FIGURES
    bound: float

    def __str__(self) -> str:
        return f"{'≤' if self.figure in AT_MOST else '≥'} {self.bound:g} {_heading(self.figure)}"

    def met(self, value: float) -> bool:
        return value <= self.bound if self.figure in AT_MOST else value >= self.bound


class Task(NamedTuple):
    """One case, forward alone and, if the case has a backward, the stages of forward + backward."""

    case: Case
    rivals: tuple[Contender, ...]
    targets: tuple[Target, ...] = ()
    flash: tuple[str, ...] = (CHOSEN,)
    parts: tuple[str, ...] = (FORWARD, BACKWARD)
    one_mask: bool = False  # all heads share it


class Place(NamedTuple):
    """Where tasks run, and at which scale."""

    device: str
    quick: bool
    matmul: dict[str, float]  # TFLOP/s of a matrix product, by dtype

    def fit(self, case: Case) -> Case:
        case = replace(case, device=self.device)
        if not self.quick:
            return case
        documents = tuple(max(1, length // 32) for length in case.documents)
        q_len, kv_len = (sum(documents) or max(4, length // 32) for length in (case.q_len, case.kv_len))
        window = None if case.window is None else case.window // 32
        return replace(case, b=1, h=min(case.h, 2), q_len=q_len, kv_len=kv_len, window=window, documents=documents)

    def flash(self, backend: str) -> Contender:
        return Contender("flash", backend if self.device.startswith("cuda") else "reference")

    @property
    def repeats(self) -> int | None:
        return 2 if self.quick else None


Job = Callable[[Place], list[Row]]


# ---- the groups: cases and targets


def grid() -> list[Job]:
    jobs = []
    targets = Target(FORWARD, "over best", 0.97), Target(BACKWARD, "over best", 0.94)
    for d, lengths in ((64, (512, 1024, 2048, 4096, 8192, 16384)), (128, (512, 1024, 2048, 4096, 8192, 16384)), (256, (1024, 4096, 16384))):
        for n in lengths:
            for causal in (False, True):
                case = Case(16384 // n, 2048 // d, n, n, d, "bfloat16", causal=causal, backward=True)
                jobs.append(partial(run, Task(case, GRID_RIVALS, targets, (HOPPER, TENSOR_CORE))))
    return jobs


def grid_means(rows: Sequence[Row], place: Place) -> list[Row]:
    """Of the grid's ratios, where every cell has one."""
    means = []
    for backend, part in product(dict.fromkeys(row["backend"] for row in rows), (FORWARD, BACKWARD)):
        cells = [row for row in rows if row["backend"] == backend and row["part"] == part]
        named = {key: cells[0][key] if cells else None for key in ("name", "backend")}
        mean = {"case": None, "label": f"geometric mean of {len(cells)} cases", "part": part, **named}
        for figure in ("over best", *(f"over {rival}" for rival in GRID_RIVALS)):
            ratios = [row[figure] for row in cells if figure in row]
            if ratios and len(ratios) == len(cells):
                mean[figure] = geometric_mean(ratios)
        targets = (Target(part, "over best", 1.04 if part == FORWARD else 1.03),) if backend == rows[0]["backend"] else ()
        means.append(_judged(mean, targets, place))
    return means


def mask() -> list[Job]:
    targets = Target(FORWARD, f"over {FLEX}", 1.2), Target(BACKWARD, f"over {FLEX}", 1.1), Target(FORWARD, f"over {CUDNN}", 3)
    rivals = FLEX, CUDNN, EFFICIENT, NORMAL
    cases = [Case(b, h, 4096, 4096, d, "bfloat16", mask="full", backward=True) for b, h, d in ((8, 12, 64), (4, 16, 128))]
    dense = [partial(run, Task(case, rivals, targets, one_mask=one_mask)) for case in cases for one_mask in (False, True)]
    return dense + [partial(run, Task(replace(case, mask="key"), rivals)) for case in cases]


def dropout() -> list[Job]:
    case = Case(8, 12, 4096, 4096, 64, "bfloat16", dropout_p=0.1, backward=True)
    return [partial(run, Task(case, (FA2,), (Target(BOTH, f"over {FA2}", 1.0),), parts=(FORWARD, BOTH)))]


def bert() -> list[Job]:
    speed, memory = f"over {NORMAL}", "memory_saving"
    targets = {
        512: (Target(BOTH, speed, 4),),
        1024: (Target(BOTH, speed, 4),),
        2048: (Target(BOTH, memory, 20),),
        4096: (Target(BOTH, speed, 6), Target(BOTH, memory, 40)),
    }
    same = {"d": 64, "dtype": "float16", "mask": "key", "dropout_p": 0.1, "backward": True}
    return [partial(run_compare, Case(8, 12, n, n, **same), targets.get(n, ())) for n in (128, 256, 512, 1024, 2048, 4096)]


def float32() -> list[Job]:
    rivals = NORMAL, EFFICIENT
    small, large = Case(2, 8, 8192, 8192, 64, backward=True), Case(1, 2, 16384, 16384, 512, backward=True)
    speed = Target(FORWARD, "tflops", 8), Target(BACKWARD, "tflops", 6)
    times = [Target(part, f"over {rival}", least) for rival in rivals for part, least in ((FORWARD, 3), (BACKWARD, 2.5))]
    planes = [replace(small, q_len=n, kv_len=n, d=d, causal=causal) for d, n in ((64, 8192), (128, 4096)) for causal in (False, True)]
    tasks = [Task(case, rivals, tuple(times)) for case in planes]
    tasks += [Task(small, rivals, speed, (SIMPLE,))]
    for causal, forward, backward in ((False, 2, 1.2), (True, 4, 2.5)):
        over_normal = Target(FORWARD, f"over {NORMAL}", forward), Target(BACKWARD, f"over {NORMAL}", backward)
        tasks.append(Task(replace(large, causal=causal), rivals, (*over_normal, Target(FORWARD, "memory_mb", 400))))
    return [partial(run, task) for task in tasks]


def host() -> list[Job]:
    case = Case(1, 1, 128, 128, 64, "bfloat16")
    cases = [case, *(replace(case, backward=True, mask=mask, dropout_p=p) for mask in ("none", "key") for p in (0.0, 0.1))]
    # FlashAttention-2 takes no mask.
    return [partial(run_host, each, SDPA if each.mask == "key" else FA2) for each in cases]


def between() -> list[Job]:
    targets = Target(FORWARD, f"over {FA3}", 1.0), Target(BACKWARD, f"over {FA3}", 0.9)
    sizes = *((d, None) for d in (72, 80, 96, 112, 160, 192, 256)), (192, 128)
    cases = [Case(4, 16, 4096, 4096, d, "bfloat16", causal=causal, backward=True, dv=dv) for d, dv in sizes for causal in (False, True)]
    return [partial(run, Task(case, (FA3, SDPA), () if case.causal else targets, (HOPPER,))) for case in cases]


def wide() -> list[Job]:
    jobs = []
    for causal, forward, backward in ((False, 1.2, 0.6), (True, 5, 1.4)):
        case = Case(1, 2, 16384, 16384, 512, "bfloat16", causal=causal, backward=True)
        targets = [Target(FORWARD, f"over {NORMAL}", forward), Target(BACKWARD, f"over {NORMAL}", backward)]
        targets += [Target(part, f"over {EFFICIENT}", 3) for part in (FORWARD, BACKWARD)]
        jobs.append(partial(run, Task(case, (NORMAL, EFFICIENT), tuple(targets), (WIDE,))))
    more = (Case(4, 16, 2048, 2048, d, "bfloat16", causal=causal, backward=True) for d in (320, 384, 512) for causal in (False, True))
    return jobs + [partial(run, Task(case, (NORMAL, EFFICIENT), flash=(WIDE,))) for case in more]


def intervals() -> list[Job]:
    window = Case(1, 16, 16384, 16384, 128, "bfloat16", causal=True, backward=True)
    cases = [replace(window, window=left) for left in (512, 1024, 4096)]
    lists = (1024,) * 16, (4096,) * 4, (64, 4000, 320, 2000, 10000)
    cases += [replace(window, documents=lengths) for lengths in lists]
    jobs = []
    for case in cases:
        targets = Target(FORWARD, f"over {FA3}", 1.1 if case.documents else 1.05), Target(BACKWARD, f"over {FA3}", 1.0)
        targets += Target(FORWARD, f"over {FLEX}", 1.6), Target(BACKWARD, f"over {FLEX}", 1.6)
        jobs.append(partial(run, Task(case, (FA3, FLEX), targets, (HOPPER,))))
    as_mask = Target(FORWARD, f"over {FLEX}", 1.0), Target(BACKWARD, f"over {FLEX}", 1.2)
    return jobs + [partial(run, Task(replace(case, as_mask=True), (FLEX,), as_mask, (HOPPER,))) for case in cases]


def scores() -> list[Job]:
    jobs = []
    for d in (64, 128):
        case = Case(4, 16, 4096, 4096, d, "bfloat16", backward=True)
        for causal in (False, True):
            targets = [
                Target(part, figure, least)
                for part in (FORWARD, BACKWARD)
                for figure, least in ((f"over {WITHOUT}", 0.85), (f"over {FLEX}", 1.2))
            ]
            for scored in ({"softcap": 50.0}, {"alibi": True}):
                jobs.append(partial(run, Task(replace(case, causal=causal, **scored), (WITHOUT, FLEX), tuple(targets), (HOPPER,))))
        targets = [Target(FORWARD, f"over {rival}", 1.4) for rival in (CUDNN, FLEX)] + [Target(BACKWARD, f"over {CUDNN}", 1.3)]
        rivals = WITHOUT, FLEX, CUDNN, EFFICIENT
        for bias in ("batches share", "heads share", "keys"):
            jobs.append(partial(run, Task(replace(case, bias=bias), rivals, tuple(targets), (HOPPER,))))
        trained = replace(case, bias="batches share", bias_gradient=True)
        jobs.append(partial(run, Task(trained, (WITHOUT, EFFICIENT), (Target(BACKWARD, f"over {EFFICIENT}", 3),), (HOPPER,), (BACKWARD,))))
    wide = Case(4, 16, 4096, 4096, 256, "bfloat16", backward=True, bias="batches share")
    targets = [Target(part, f"over {EFFICIENT}", 1) for part in (FORWARD, BACKWARD)]
    jobs.append(partial(run, Task(wide, (WITHOUT, EFFICIENT), tuple(targets), (TENSOR_CORE,))))
    for scored in ({"softcap": 50.0}, {"alibi": True}, {"bias": "batches share"}):  # a generated token's
        case, target = Case(16, 16, 1, 8192, 128, "bfloat16"), Target(FORWARD, f"over {WITHOUT}", 0.95)
        jobs.append(partial(run, Task(replace(case, **scored), (WITHOUT,), (target,), (SPLIT_KEYS,), (FORWARD,))))
    return jobs


def decode() -> list[Job]:
    return [partial(run_decode, shape, pages) for shape, pages in few_queries.SHAPES.items()]


def rungs() -> list[Job]:
    jobs = []
    for dtype, rivals in (("bfloat16", (FA2, CUDNN)), ("float32", (EFFICIENT,))):
        for d in (64, 128):
            for causal in (False, True):
                case = Case(4, 16, 4096, 4096, d, dtype, causal=causal, backward=True)
                jobs.append(partial(run, Task(case, rivals, flash=tuple(ladder()))))
    return jobs


GROUPS: dict[str, Callable[[], list[Job]]] = {
    "grid": grid,
    "mask": mask,
    "dropout": dropout,
    "bert": bert,
    "float32": float32,
    "host": host,
    "between": between,
    "wide": wide,
    "scores": scores,
    "intervals": intervals,
    "decode": decode,
    "rungs": rungs,
}


# ---- measuring


def run(task: Task, place: Place) -> list[Row]:
    """A row for each part of each flash contender, with ratios to the rivals. The first contender, the fastest rung, is the one judged."""
    case = place.fit(task.case)
    inputs = _inputs(case, task.one_mask)
    call = call_of(case, inputs)
    # Not on CUDA, all names stand for the reference. Rungs that do not serve the case are left out.
    flash = [place.flash(name) for name in task.flash]
    flash = [each for each in dict.fromkeys(flash) if len(flash) == 1 or BACKENDS[each.backend].why_not(call) is None]
    label = _label(case) + ((", one mask" if task.one_mask else ", a mask a head") if case.mask == "full" else "")

    def measured(case: Case, inputs: Inputs) -> dict[Contender, Row]:
        if FLEX in task.rivals:
            torch.compiler.reset()  # otherwise the ninth case would exceed PyTorch's limit of compilations per function
        runners, found = ready([*flash, *task.rivals], case, inputs)
        for contender, times in time_alternating(runners, place.repeats).items() if runners else ():
            found[contender] |= {"repeats": len(times["total"]), **{stage: median(each) for stage, each in times.items()}}
        return found

    alone = measured(replace(case, backward=False), _without_gradients(inputs))
    staged = measured(case, inputs) if case.backward else {}
    rows = []
    for contender in flash:
        for part in task.parts:
            stage, found = {FORWARD: ("forward", alone), BACKWARD: ("backward", staged), BOTH: ("total", staged)}[part]
            row = {"label": label, "part": part, "name": str(contender), "backend": contender.backend, "case": asdict(case)}
            if stage in found[contender]:
                row["ms"] = ms = found[contender][stage]
                row["tflops"] = tera_operations(case, stage) / (1e-3 * ms)
                row["percent_of_matmul"] = 100 * row["tflops"] / place.matmul[case.dtype]
                ratios = {f"over {rival}": found[rival][stage] / ms for rival in task.rivals if stage in found[rival]}
                row |= ratios
                if ratios and any(target.figure == "over best" for target in task.targets):
                    row["over best"] = min(ratios.values())
            if any(target.figure == "memory_mb" for target in task.targets):
                row["memory_mb"] = peak_memory(contender, case)
            row["measured"] = {str(each): figures for each, figures in found.items()}
            rows.append(_judged(row, task.targets if contender is flash[0] else (), place))
    return rows


def run_compare(case: Case, targets: tuple[Target, ...], place: Place) -> list[Row]:
    """What bench.py measures at one length; flash attention's row is judged."""
    case = place.fit(case)
    flash = place.flash(CHOSEN)
    # Tensor cores multiply float16 as fast as bfloat16.
    rows = compare(case, "all", flash.backend, place.repeats, matmul_tflops=place.matmul["bfloat16"], say=lambda line: None)
    row = next(row for row in rows if row["name"].startswith(flash.type))
    figures = {key: row[key] for key in ("ms", "tflops", "percent_of_matmul", "host_us", "memory_mb", "memory_saving") if row.get(key)}
    figures |= {f"over {each}": other["ms"] / row["ms"] for each in NAMES for other in rows if other["name"] == str(each) and "ms" in other}
    kept = {other["name"]: {key: other[key] for key in other if key not in {*asdict(case), "all_ms", "name"}} for other in rows}
    found = {"label": _label(case), "part": BOTH, "name": row["name"], "case": asdict(case), **figures, "measured": kept}
    return [_judged(found, targets, place)]


def run_host(case: Case, rival: Contender, place: Place) -> list[Row]:
    """The CPU's time for one call: with gradients the forward and the backward."""
    case = place.fit(case)
    flash = place.flash(CHOSEN)
    runners, found = ready([flash, rival], case, random_inputs(case))
    for contender, runner in runners.items():
        found[contender]["host_us"] = host_time(runner, calls=10 if place.quick else 300)
    part = BOTH if case.backward else FORWARD
    row = {"label": _label(case), "part": part, "name": str(flash), "case": asdict(case), "host_us": found[flash]["host_us"]}
    if row["host_us"] and found[rival].get("host_us"):
        row[f"over {rival}"] = found[rival]["host_us"] / row["host_us"]
    row["measured"] = {str(each): figures for each, figures in found.items()}
    return [_judged(row, () if case.backward else (Target(part, "host_us", 15),), place)]


def run_decode(shape: few_queries.Shape, pages: tuple[int, ...], place: Place) -> list[Row]:
    """Judges a plain call against the best of the others and, if there is work for all multiprocessors, against a copy; pages and float8
    against contiguous keys."""
    rows = []
    for row in few_queries.run(shape, pages, place):
        targets = ()
        if row["name"] == few_queries.PLAIN:
            targets = (Target(FORWARD, "over best", 1.05), *([Target(FORWARD, "over copy", 0.85)] if shape.B >= 16 else []))
        elif row["name"] == few_queries.FLOAT8 and shape.B >= 64:
            targets = (Target(FORWARD, "over contiguous", 1.6),)
        elif row["name"].startswith(few_queries.PAGES):
            targets = (Target(FORWARD, "over contiguous", 0.95),)
        rows.append(_judged(row, targets, place))
    return rows


def ready(contenders: Sequence[Contender], case: Case, inputs: Inputs) -> tuple[dict[Contender, Runner], dict[Contender, Row]]:
    """The contenders that run and are correct; and for each contender its error, or why it was skipped.

    Raises:
        WrongResult: flash attention differs from normal attention by more than the tolerance.
    """
    runners, found = {}, {}
    for contender in contenders:
        reason = why_not(contender, case)
        if reason is None:
            runner = Runner(contender, case, inputs)
            reason = refusal(runner)
        if reason is not None:
            found[contender] = {"skipped": reason}
            continue
        runners[contender], found[contender] = runner, {}
        check = None if contender in (NORMAL, WITHOUT) else verify(contender, case, inputs)
        if check is None:  # the definition itself, or PyTorch's dropout, which draws other random bits
            continue
        found[contender]["check"] = check._asdict() | {"passed": check.passed}
        if contender.type == "flash" and not check.passed:
            raise WrongResult(
                f"{contender} is wrong, {case.describe()}: error {check.error:.1e} in {check.of}, tolerance {check.tolerance:.1e}"
            )
    return runners, found


def _inputs(case: Case, one_mask: bool) -> Inputs:
    inputs = random_inputs(case)
    return inputs._replace(mask=inputs.mask[:, :1].clone()) if one_mask else inputs


def _without_gradients(inputs: Inputs) -> Inputs:
    q, k, v = (x.detach() for x in inputs[:3])
    bias = None if inputs.bias is None else inputs.bias.detach()
    return inputs._replace(q=q, k=k, v=v, dO=None, bias=bias)


def _judged(row: Row, targets: tuple[Target, ...], place: Place) -> Row:
    """The row, with the verdict for each target of its part: met, not met, or not judged."""
    judged = []
    for target in targets:
        if target.part == row["part"]:
            value = row.get(target.figure)
            judged.append({**target._asdict(), "text": str(target), "met": None if place.quick or value is None else target.met(value)})
    return row | {"targets": judged, "verdict": ", ".join(f"{each['text']}: {_verdict([each['met']])}" for each in judged)}


def _verdict(met: list[bool | None]) -> str:
    return "NOT MET" if False in met else "not judged" if None in met else "met"


def _heading(figure: str) -> str:
    return next(heading for key, heading, _ in FIGURES if key == figure)


def _label(case: Case) -> str:
    options = [case.dtype, *(["causal"] if case.causal else []), *(["key mask"] if case.mask == "key" else [])]
    options += ["dense mask"] if case.mask == "full" else []
    options += [f"dropout {case.dropout_p:g}"] if case.dropout_p else []
    options += [f"window {case.window}"] if case.window is not None else []
    options += [f"documents {_written(case.documents)}"] if case.documents else []
    options += ["as a mask"] if case.as_mask else []
    options += case.scored()
    head = f"D {case.d}" + (f" Dv {case.dv}" if case.dv else "")
    return f"B {case.b} H {case.h} N {case.q_len} {head} {' '.join(options)}"


def _written(lengths: tuple[int, ...]) -> str:
    return f"{len(lengths)} × {lengths[0]}" if len(set(lengths)) == 1 else str(list(lengths))


# ---- the report


def summary(rows: Sequence[Row]) -> list[Row]:
    """One line for each target of each group: the worst figure, and the case that has it."""
    judged: dict[tuple, list[tuple[Row, Row]]] = {}
    for row in rows:
        for target in row["targets"]:
            judged.setdefault((row["group"], target["part"], target["figure"], target["text"]), []).append((row, target))
    lines = []
    for (group, part, figure, text), pairs in judged.items():
        line = {"group": group, "part": part, "target": text, "verdict": _verdict([target["met"] for _, target in pairs])}
        measured = [row for row, _ in pairs if row.get(figure) is not None]
        if measured:
            worst = (max if figure in AT_MOST else min)(measured, key=lambda row: row[figure])
            line |= {"worst": worst[figure], "label": worst["label"]}
        lines.append(line)
    return lines


def remarks(rows: Sequence[Row]) -> Iterator[str]:
    """Contenders that were skipped, in how many cases and why; contenders whose error exceeds the tolerance."""
    absent: dict[tuple, set[str]] = {}
    for row in rows:
        for name, figures in row.get("measured", {}).items():
            check = figures.get("check", {"passed": True})
            if "skipped" in figures:
                absent.setdefault((row["group"], name, figures["skipped"]), set()).add(row["label"])
            if not check["passed"]:
                yield f"{name}, {row['label']}: error {check['error']:.1e} in {check['of']}, tolerance {check['tolerance']:.1e}"
    for (group, name, reason), labels in absent.items():
        yield f"{group}, {len(labels)} case{'s' if len(labels) > 1 else ''} without {name}: {reason}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_targets", description=__doc__.splitlines()[0])
    targeted = [group for group in GROUPS if group != "rungs"]
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), metavar="GROUP", default=targeted, help=f"some of: {', '.join(GROUPS)}")
    parser.add_argument("--json", type=command_line.output_file, metavar="FILE", help="write device, versions and every figure")
    default = "cuda" if torch.cuda.is_available() else None
    parser.add_argument("--device", type=command_line.device, default=default, help="cuda, cuda:N, or with --quick cpu (default cuda)")
    parser.add_argument("--quick", action="store_true", help="a fifth of the cases, small: judging nothing")
    args = parser.parse_args()
    if args.device is None:
        parser.error("there is no CUDA GPU here; --device cpu --quick shows what is measured")
    if args.device == "cpu" and not args.quick:
        parser.error("--device cpu: the sizes are made for a GPU; for a CPU add --quick")
    environment = report.environment(args.device)
    # A CPU without bfloat16 instructions takes seconds for each large product.
    matmul = {dtype: matmul_limit(args.device, dtype, 128 if args.device == "cpu" else None) for dtype in ("float32", "bfloat16")}
    environment["matmul_tflops"] = matmul
    print(report.describe(environment), flush=True)

    place = Place(args.device, args.quick, matmul)
    rows: list[Row] = []
    wrong: list[str] = []
    for group in args.only:
        found: list[Row] = []
        jobs = GROUPS[group]()
        if args.quick:
            jobs = [job for n, job in enumerate(jobs) if n % 5 == 0 or n == len(jobs) - 1]
        for job in tqdm(jobs, desc=group, disable=None):
            try:
                found += job(place)
            except WrongResult as error:  # its time means nothing; the other cases may still be right
                wrong.append(str(error))
        if group == "grid":
            found += grid_means(found, place)
        rows += [{"group": group} | row for row in found]
        print(f"\n{group}\n\n{report.table(found, COLUMNS)}", flush=True)
        if args.json:  # after each group, so that an interrupted run keeps what it has measured
            report.write_json(args.json, environment, {"only": args.only, "quick": args.quick}, rows)

    if lines := list(dict.fromkeys(remarks(rows))):
        print("\nremarks\n\n" + "\n".join(lines))
    if lines := summary(rows):
        print(f"\ntargets: × is the speed of the other's, above 1 is faster; {'not judged' if args.quick else 'the worst counts'}\n")
        print(report.table(lines, SUMMARY))
    if args.json:
        print(f"\nwritten: {args.json}")
    for line in wrong:
        print(line, file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    command_line.run(main)

"""Writes the measured tables into the Markdown files, from kept results, between markers: no figure there is typed by hand.

    python -m benchmarks.tables            rewrite
    python -m benchmarks.tables --check    fail if a file is not what its results give

A marker pair `<!-- NAME -->` … `<!-- end of NAME -->` is filled from results/NAME.json; `summary` from all that `SUMMARY` names.
"""

import argparse
import json
import re
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.contenders import Contender
from benchmarks.cycles import COLUMNS as CYCLES
from benchmarks.decode import PLAIN
from benchmarks.gpu_targets import CUDNN, EFFICIENT, FA2, FA3, FA4, FIGURES, FLEX, GRID_RIVALS, NAMES, NORMAL, WITHOUT
from benchmarks.ladder import COLUMNS as LADDER
from flash_attention.command_line import run

ROOT = Path(__file__).resolve().parents[1]
FILES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "cuda" / "README.md")
PARTS = ("forward", "backward", "forward + backward")
Rows = list[dict[str, Any]]
MARKERS = re.compile(r"<!-- (\w+) -->\n.*?<!-- end of \1 -->", re.DOTALL)


def cpu_targets(content: dict[str, Any]) -> str:
    """Speed against normal attention and SDPA, then memory."""
    speeds = [row for row in content["results"] if "over_normal" in row]
    memories = [row for row in content["results"] if "flash_mb" in row]
    lines = [report.describe(content["environment"]) + "; float32, medians.", ""]
    lines += ["| case | normal | SDPA | flash | × normal | × SDPA |", "|---|---|---|---|---|---|"]
    for row in speeds:
        ms = [row[f"{kind}_ms"] for kind in ("normal", "sdpa", "flash")]
        cells = [
            *("–" if x is None else f"{x:.0f} ms" for x in ms),
            *("–" if x is None else f"{x:.2f}" for x in (row["over_normal"], row["over_sdpa"])),
        ]
        lines.append(f"| {row['label']} | {' | '.join(cells)} |")
    lines += ["", "| peak memory above the inputs | normal | SDPA | flash |", "|---|---|---|---|"]
    lines += [
        f"| {row['label']} | " + " | ".join(f"{row[f'{k}_mb']:.0f} MB" for k in ("normal", "sdpa", "flash")) + " |" for row in memories
    ]
    return "\n".join(lines)


def sweep(content: dict[str, Any]) -> str:
    """Time of each implementation against length, and the fastest kernel's speed and memory against normal attention."""
    rows = [row for row in content["results"] if "ms" in row and "reference" not in row["name"]]
    names = list(dict.fromkeys(row["name"] for row in rows))
    lines = [report.describe(content["environment"]) + "; forward + backward, ms, medians.", ""]
    lines += [f"| length | {' | '.join(names)} | speed-up | memory saving |", "|---" * (len(names) + 3) + "|"]
    for length in dict.fromkeys(row["q_len"] for row in rows):
        at = {row["name"]: row for row in rows if row["q_len"] == length}
        ms = " | ".join(f"{at[name]['ms']:.2f}" if name in at else "–" for name in names)
        kernel = min((row for name, row in at.items() if name.startswith("flash")), key=lambda row: row["ms"])
        lines.append(f"| {length} | {ms} | {kernel['speedup']:.2f} | {kernel['memory_saving']:.1f} |")
    return "\n".join(lines)


def one_size(content: dict[str, Any]) -> str:
    """Each implementation's forward and backward at one size, and their speed against normal attention."""
    rows = [row for row in content["results"] if "ms" in row and row["backend"] != "reference"]
    normal = next(row for row in rows if row["name"] == str(NORMAL))
    lines = [report.describe(content["environment"]) + "; medians; memory above the inputs, forward + backward.", ""]
    lines += ["| | forward | backward | × normal, forward | × normal, backward | memory |", "|---|---|---|---|---|---|"]
    for row in rows:
        stages = "forward_ms", "backward_ms"
        cells = [*(f"{row[ms]:.2f} ms" for ms in stages), *(f"{normal[ms] / row[ms]:.2f}" for ms in stages), f"{row['memory_mb']:.0f} MB"]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def h200_grid(content: dict[str, Any]) -> str:
    """The grid of each backend as ratios: a row for each N, a column for each D."""
    rows = [row for row in content["results"] if row["group"] == "grid"]
    blocks = [_gpu(content["environment"]) + "; medians. × is how many times the speed of that one: above 1 is faster."]
    for name, part in product(dict.fromkeys(row["name"] for row in rows), ("forward", "backward")):
        cells = [row for row in rows if (row["name"], row["part"]) == (name, part)]
        if not cells:
            continue
        kinds = {(row["case"]["d"], row["case"]["causal"]) for row in cells if row["case"]}
        rivals = [rival for rival in GRID_RIVALS if any(row.get(f"over {rival}") for row in rows)]
        columns = [("n", f"{name} {part} {' / '.join(f'× {NAMES[rival]}' for rival in rivals)}, N", "")]
        columns += [(f"{d} {causal}", f"D {d}{' causal' if causal else ''}", "") for d, causal in sorted(kinds)]
        lines: dict[int, dict[str, str]] = {}
        for row in cells:
            if case := row["case"]:
                lines.setdefault(case["q_len"], {"n": str(case["q_len"])})[f"{case['d']} {case['causal']}"] = _ratios(row, rivals)
        means = [f"{row['label'].capitalize()}: {_ratios(row, rivals)}." for row in cells if not row["case"]]
        blocks.append("\n\n".join([report.markdown([lines[n] for n in sorted(lines)], columns), *means]))
    return "\n\n".join(blocks)


def h200_targets(content: dict[str, Any]) -> str:
    """A table for each group but the grid."""
    blocks = [_gpu(content["environment"]) + "; medians."]
    figures = [column for column in FIGURES if column[0] != "percent_of_matmul"]
    for group in ("mask", "dropout", "bert", "float32", "wide", "host"):
        if chosen := [row for row in content["results"] if row["group"] == group]:
            blocks.append(report.markdown(chosen, [("label", group, ""), ("part", "", ""), *figures]))
    return "\n\n".join(blocks)


def h200_intervals(content: dict[str, Any]) -> str:
    """Windows and documents, one line per part: speed, and ratios to the other contenders."""
    figures = [column for column in FIGURES if column[0] in ("ms", "tflops", "over fa3", "over flex")]
    columns: list[report.Column] = [("label", "case", ""), ("part", "", ""), *figures]
    rows = [row | {"label": row["label"].removeprefix("B 1 H 16 N 16384 D 128 bfloat16 causal ")} for row in content["results"]]
    return f"{_gpu(content['environment'])}; B 1, H 16, N 16384, D 128, bfloat16, causal; medians.\n\n{report.markdown(rows, columns)}"


def h200_scores(content: dict[str, Any]) -> str:
    """Softcap, ALiBi and biases, one line per part: speed, and ratios to the same call without them and to the other contenders."""
    shown = ("ms", "tflops", *(f"over {each}" for each in (WITHOUT, CUDNN, FLEX, EFFICIENT)))
    figures = [column for column in FIGURES if column[0] in shown]
    columns: list[report.Column] = [("label", "case", ""), ("name", "", ""), ("part", "", ""), *figures]
    rows = [row | {"label": row["label"].replace(" bfloat16", "")} for row in content["results"]]
    return f"{_gpu(content['environment'])}; bfloat16; medians.\n\n{report.markdown(rows, columns)}"


def h200_decode(content: dict[str, Any]) -> str:
    """Few queries against many keys, a line for each case and way to keep the keys."""
    columns = [
        ("label", "case", ""),
        ("name", "", ""),
        ("us", "µs", ".0f"),
        ("tb_per_s", "TB/s of K and V", ".2f"),
        ("over copy", "× a copy's", ".2f"),
        ("over best", "× best of SDPA, FA3", ".2f"),
        ("over contiguous", "× contiguous", ".2f"),
    ]
    rows = [row | {"us": 1e3 * row["ms"]} for row in content["results"] if row["name"] != "split_keys"]
    rows = [row | {"label": row["label"].removesuffix(" bfloat16")} for row in rows]
    return f"{_gpu(content['environment'])}; bfloat16, causal; medians.\n\n{report.markdown(rows, columns)}"


def h200_rungs(content: dict[str, Any]) -> str:
    """A line for each rung and case: speed, share of what a matrix product reaches, and speed against FlashAttention-2."""
    lines: dict[tuple, dict[str, Any]] = {}
    for row in content["results"]:
        line = lines.setdefault((row["backend"], row["label"]), {"rung": row["backend"], "label": row["label"]})
        line |= {f"{row['part']} {key}": row.get(key) for key in ("tflops", "percent_of_matmul", f"over {FA2}")}
    columns: list[report.Column] = [("rung", "rung", ""), ("label", "case", "")]
    for part in ("forward", "backward"):
        columns += [
            (f"{part} tflops", f"{part} TFLOP/s", ".3g"),
            (f"{part} percent_of_matmul", "% of matmul", ".0f"),
            (f"{part} over {FA2}", "× FA2", ".2f"),
        ]
    matmul = ", ".join(f"{dtype} {tflops:.3g}" for dtype, tflops in content["environment"]["matmul_tflops"].items())
    return f"{_gpu(content['environment'])}. One large matrix product reaches, in TFLOP/s: {matmul}.\n\n" + report.markdown(
        list(lines.values()), columns
    )


def ladder_counts(content: dict[str, Any]) -> str:
    """What the emulator counts of each rung's forward."""
    size = content["settings"]
    case = f"Forward, B {size['b']} H {size['h']} N {size['n']} D {size['d']}, {size['dtype']}, counted by the emulator."
    return f"{case}\n\n{report.markdown(content['results'], LADDER)}"


def h200_cycles(content: dict[str, Any]) -> str:
    """What the profiler counts of each rung's forward, and of the last one's backward."""
    size, unit = content["settings"], {"cycles": 1e3, "instructions": 1e6, "conflicts": 1e3}
    lines = [{name: value / unit.get(name, 1) if name in unit else value for name, value in row.items()} for row in content["results"]]
    case = (
        f"{_gpu(content['environment'])}. B {size['b']} N {size['n']}, {size['dtype']}; H 16 for the ladder, H·D = 2048 for the last six."
    )
    return f"{case}\n\n{report.markdown(lines, CYCLES)}"


# The files from which the README's table is made.
SUMMARY = ("h200_grid", "h200_targets", "h200_intervals", "h200_scores", "h200_decode", "cpu_targets")


def summary(grid: Rows, targets: Rows, intervals: Rows, scores: Rows, decode: Rows, cpu: Rows) -> str:
    """Ratios of the kernels that a plain call uses to each rival, from the slowest to the fastest case of each kind."""
    hopper = [row for row in grid if row["case"] and row["backend"] == "hopper"]
    narrow, wide = ([row for row in hopper if (row["case"]["d"] > 128) == beyond] for beyond in (False, True))
    given = [row for row in intervals if not row["case"]["as_mask"]]
    scored = [row for row in scores if row["backend"] == "hopper" and not row["case"]["bias_gradient"]]
    biased, others = ([row for row in scored if (row["case"]["bias"] != "none") == has_bias] for has_bias in (True, False))
    masked = [row for row in targets if row["group"] == "mask" and row["case"]["mask"] == "full"]
    bert, float32, wider = ([row for row in targets if row["group"] == group] for group in ("bert", "float32", "wide"))
    cpu = [{f"over {NORMAL}": row["over_normal"], "over sdpa": row["over_sdpa"], **row} for row in cpu if "over_normal" in row]
    kinds = [
        ("dense and causal, D 64 and 128, N 512 to 16384", narrow, FA2, "FlashAttention-2"),
        ("", narrow, CUDNN, "cuDNN"),
        ("", narrow, FA3, "FlashAttention-3"),
        ("", narrow, FA4, "FlashAttention-4"),
        ("dense and causal, D 256, N 1024 to 16384", wide, FA2, "FlashAttention-2"),
        ("", wide, CUDNN, "cuDNN"),
        ("", wide, FA3, "FlashAttention-3"),
        ("", wide, FA4, "FlashAttention-4"),
        ("windows and documents, causal, D 128, N 16384", given, FA3, "FlashAttention-3"),
        ("", given, FLEX, "FlexAttention"),
        ("a dense mask, D 64 and 128, N 4096", masked, CUDNN, "cuDNN"),
        ("", masked, FLEX, "FlexAttention"),
        ("softcap and ALiBi, D 64 and 128, N 4096", others, FLEX, "FlexAttention"),
        ("a bias, D 64 and 128, N 4096", biased, CUDNN, "cuDNN"),
        ("BERT: key mask, dropout, float16, N 128 to 4096", bert, NORMAL, "normal attention"),
        ("", bert, CUDNN, "cuDNN"),
        ("float32, D 64 and 128, forward also 512", float32, EFFICIENT, "memory-efficient attention"),
        ("", float32, NORMAL, "normal attention"),
        ("D 320 to 512", wider, EFFICIENT, "memory-efficient attention"),
        ("", wider, NORMAL, "normal attention"),
        ("one to four queries a sequence, 8192 to 65536 keys", _few_queries(decode), "best", "the better of SDPA and FlashAttention-3"),
        ("on a CPU, float32, N 4096 to 16384", cpu, NORMAL, "normal attention"),
        ("", cpu, "sdpa", "PyTorch's own"),
    ]
    lines = ["| case | beside | forward | backward | both |", "|---|---|---|---|---|"]
    for case, rows, rival, name in kinds:
        if any(row.get(f"over {rival}") for row in rows):
            lines.append(f"| {case} | {name} | {' | '.join(_spread(rows, part, f'over {rival}') for part in PARTS)} |")
    return "\n".join(lines)


def _few_queries(rows: Rows) -> Rows:
    return [row for row in rows if row["name"] == PLAIN and row["case"]["Nq"] <= 4]


def _spread(rows: Rows, part: str, ratio: str) -> str:
    """The smallest and the largest ratio, or –."""
    found = [row[ratio] for row in rows if _part(row) == part and row.get(ratio)]
    return f"{min(found):.2f} – {max(found):.2f}" if found else "–"


def _part(row: dict[str, Any]) -> str:
    """A CPU row's part, which begins its label."""
    return row.get("part") or re.match(r"forward( \+ backward)?", row["label"])[0]


def _gpu(environment: dict[str, Any]) -> str:
    return f"{report.describe(environment)}, driver {environment['driver'] or 'unknown'}, ptxas {environment['ptxas'] or 'unknown'}"


def _ratios(row: dict[str, Any], rivals: list[Contender]) -> str:
    return " / ".join(f"{row[f'over {rival}']:.2f}" if row.get(f"over {rival}") else "–" for rival in rivals)


TABLES = {
    "cpu_targets": cpu_targets,
    "h200_bench": one_size,
    "h200_bench_causal": one_size,
    "h200_bert": sweep,
    "h200_bert_causal": sweep,
    "h200_grid": h200_grid,
    "h200_targets": h200_targets,
    "h200_decode": h200_decode,
    "h200_rungs": h200_rungs,
    "h200_cycles": h200_cycles,
    "h200_intervals": h200_intervals,
    "h200_scores": h200_scores,
    "ladder_counts": ladder_counts,
}


def filled(text: str) -> str:
    """The text, with every marker pair filled for which there are results."""

    def fill(found: re.Match) -> str:
        name = found.group(1)
        results = [ROOT / "results" / f"{each}.json" for each in (SUMMARY if name == "summary" else (name,))]
        if name not in (*TABLES, "summary") or not all(file.exists() for file in results):
            return found.group(0)
        contents = [json.loads(file.read_text(encoding="utf-8")) for file in results]
        table = summary(*(content["results"] for content in contents)) if name == "summary" else TABLES[name](*contents)
        return f"<!-- {name} -->\n{table}\n<!-- end of {name} -->"

    return MARKERS.sub(fill, text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a file would change")
    check = parser.parse_args().check
    stale = []
    for file in FILES:
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        if filled(text) != text:
            stale.append(file.relative_to(ROOT))
            if not check:
                file.write_text(filled(text), encoding="utf-8")
    for file in stale:
        print(f"{file} {'differs from its results: run python -m benchmarks.tables' if check else 'rewritten'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    run(main)

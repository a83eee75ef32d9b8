"""Time, speed-up over normal attention and memory, each against sequence length."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.case import Case

matplotlib.use("Agg")  # draw into a file, whether or not there is a screen
import matplotlib.pyplot as plt

# Okabe and Ito's palette, told apart with any kind of colour vision; markers and labels say the same again.
STYLES = {"normal": ("#D55E00", "s"), "flash": ("#0072B2", "o"), "sdpa": ("#009E73", "^")}
MORE_COLOURS = ("#CC79A7", "#56B4E9", "#E69F00", "#000000", "0.5")
MORE_MARKERS = ("D", "v", "P", "X", "<")


def plot_sweep(results: Sequence[dict[str, Any]], case: Case, machine: str, file: Path) -> None:
    """One line for each contender. `results` are rows of `benchmarks.compare`; `case` is the longest of them, `machine` goes below the
    title."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 5.2), layout="constrained")
    figure.get_layout_engine().set(wspace=0.05)
    panels = (
        ("ms", "time of one call (ms)"),
        ("speedup", "speed-up over normal attention (×)"),
        ("memory_mb", "peak memory above the inputs (MB)"),
    )
    styles = _styles(results)
    lengths = sorted({row["q_len"] for row in results})
    for ax, (key, label) in zip(axes, panels, strict=True):
        for name, (colour, marker) in styles.items():
            points = [(row["q_len"], row[key]) for row in results if row["name"] == name and row.get(key)]
            if points:
                ax.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=6, linewidth=2, label=name)
        ax.set_xscale("log", base=2)
        ax.set_xticks(lengths, [str(length) for length in lengths], rotation=45 if len(lengths) > 6 else 0)
        ax.set_xlabel("sequence length (queries = keys)")
        ax.set_ylabel(label)
        ax.grid(True, which="major", color="0.9")
        ax.spines[["top", "right"]].set_visible(False)
        if not ax.lines:
            ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color="0.5")
        elif key == "speedup":
            ax.set_ylim(bottom=0)
        else:
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter("{x:g}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=max(1, len(styles)), frameon=False)
    figure.suptitle(f"{case.describe(lengths=False)}\n", fontsize=13)
    figure.text(0.5, 0.93, machine, ha="center", fontsize=9, color="0.4")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _styles(results: Sequence[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """name → colour, marker, of what was measured: a type's own for its first contender, a further one for every other."""
    styles, taken, more = {}, set(), zip(MORE_COLOURS, MORE_MARKERS, strict=True)
    for row in results:
        if row["name"] not in styles and row.get("ms"):
            styles[row["name"]] = next(more, ("0.5", ".")) if row["type"] in taken else STYLES[row["type"]]
            taken.add(row["type"])
    return styles

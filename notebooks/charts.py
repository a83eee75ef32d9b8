"""Charts with units for lessons 4 to 6: kinds of tiles, traffic, curves, bars, rooflines, lanes and banks; and two sources side by side.

Colours are those of pictures.py. What is drawn comes from a run of the code, from a source file or from a kept result.

One file because the charts share colours, units and axes.
"""

import html
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from IPython.display import HTML
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from pictures import HATCHES, colour, draw_tiles
from record import matrix

import flash_attention.reference

ROOT = Path(flash_attention.reference.__file__).resolve().parents[1]  # where cuda/ and, in a clone, results/ are

# An algorithm has the colour of the matrix that it is about: naive attention stores S, FlashAttention carries O around or keeps it.
STYLES = {
    "naive": ("S", "s"),
    "FlashAttention": ("Q", "o"),
    "FlashAttention-2": ("P", "D"),
    "SDPA": ("V", "^"),
    "simple": ("Q", "o"),
    "mma": ("K", "v"),
    "tensor_core": ("P", "D"),
    "hopper": ("O", "P"),
    # Steps of the ladder between these: the colour of the rung that they lead to.
    "swizzle": ("P", "<"),
    "cp_async": ("P", ">"),
    "wgmma": ("O", "<"),
    "tensor_map": ("O", ">"),
    "producer": ("O", "^"),
    "ping_pong": ("O", "v"),
}
LANE_COLOURS = ("Q", "K", "V", "S")


def kept_result(name: str) -> dict[str, Any] | None:
    """results/<name>.json as the benches wrote it; None where this copy has none."""
    file = ROOT / "results" / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


# ---- tiles


def tile_kinds(steps: Iterable[SimpleNamespace], Nq: int, Nk: int, block_q: int, block_k: int) -> list[list[str]]:
    """The kind of each tile of the scores, from the observer's record: "skipped" if it was never computed, "masked" if some of its
    scores were hidden, "done" if none was."""
    kinds = [["skipped"] * math.ceil(Nk / block_k) for _ in range(math.ceil(Nq / block_q))]
    for step in steps:
        kinds[step.i.start // block_q][step.j.start // block_k] = "masked" if step.S.isneginf().any() else "done"
    return kinds


def draw_tile_kinds(ax: Axes, kinds: Sequence[Sequence[str]], title: str = "", **options) -> None:
    """The tiles of `tile_kinds`."""
    draw_tiles(ax, kinds, title=title, **options)


def tile_legend(where: Axes | Figure, **options) -> None:
    """What the colours of `draw_tile_kinds` mean."""
    meaning = {"done": "computed, nothing hidden", "masked": "computed, needs a mask", "skipped": "never computed"}
    handles = [Patch(facecolor=colour(state), hatch=HATCHES.get(state), edgecolor="#888888", label=text) for state, text in meaning.items()]
    where.legend(handles=handles, **{"frameon": False, "fontsize": 8, **options})


def draw_visits(ax: Axes, steps: Sequence[SimpleNamespace], visible: Any, name: str) -> tuple[int, int]:
    """What each row sees, and the tiles that the loop visited, outlined. → the number of visited tiles, and of all tiles."""
    seen = visible.dense(slice(0, visible.Nq), slice(0, visible.Nk))[0, 0]
    ax.imshow(seen, cmap="Greys", vmin=0, vmax=3, extent=(0, visible.Nk, visible.Nq, 0), interpolation="nearest")
    for step in steps:
        state = "masked" if step.S.isneginf().any() else "done"
        width, height = step.j.stop - step.j.start, step.i.stop - step.i.start
        face = to_rgba(colour(state), 0.45)
        ax.add_patch(
            Rectangle(
                (step.j.start, step.i.start), width, height, facecolor=face, hatch=HATCHES.get(state), edgecolor="#444444", linewidth=0.8
            )
        )
    rows, columns = (max(tile.stop - tile.start for tile in tiles) for tiles in zip(*((step.i, step.j) for step in steps), strict=True))
    whole = math.ceil(visible.Nq / rows) * math.ceil(visible.Nk / columns)
    ax.set_title(f"{name}: {len(steps)} of {whole} tiles", fontsize=9)
    _plain(ax)
    return len(steps), whole


# ---- quantities with units


def with_prefix(value: float, unit: str) -> str:
    """123456 bytes as "123 kB": three digits and a prefix."""
    if value == 0:
        return f"0 {unit}"
    power = min(max(math.floor(math.log10(abs(value)) / 3), -3), 5)
    return f"{value / 1000**power:.3g} {'nµm kMGTP'[power + 3].strip()}{unit}"


def axis_units(axis: Any, unit: str) -> None:
    """Label the ticks of a matplotlib axis with `with_prefix`."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: with_prefix(value, unit)))
    axis.set_minor_formatter(NullFormatter())


def draw_curves(
    ax: Axes,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str = "",
    x_label: str = "",
    y_label: str = "",
    y_unit: str | None = None,
    guides: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
) -> None:
    """Curves with markers, both axes logarithmic with the measured x as ticks; guides: curves to compare with, thin and without markers."""
    drawn: list[Sequence[float]] = []
    for name, (x, y) in curves.items():
        name_of_colour, marker = STYLES.get(name.split(",")[0], ("m", "."))
        # A curve that lies on one drawn before is dashed, with hollow markers: both are seen.
        hidden = any(len(y) == len(other) and all(abs(a - b) <= 0.02 * abs(b) for a, b in zip(y, other, strict=True)) for other in drawn)
        style = {"linestyle": (0, (2, 2)), "markersize": 8, "markerfacecolor": "none"} if hidden else {"markersize": 5}
        ax.plot(x, y, color=colour(name_of_colour), marker=marker, linewidth=1.8, label=name, **style)
        drawn.append(y)
    for (name, (x, y)), style in zip((guides or {}).items(), ("--", ":", "-."), strict=False):
        ax.plot(x, y, color="#444444", linewidth=1, linestyle=style, label=name)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ticks = sorted({x for xs, _ in curves.values() for x in xs})
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    if y_unit is not None:
        axis_units(ax.yaxis, y_unit)
    ax.set_title(title, fontsize=10)
    ax.set_xlabel(x_label, fontsize=9)
    ax.set_ylabel(y_label, fontsize=9)
    _plain(ax)
    ax.grid(True, which="major", color="#dddddd", linewidth=0.6)
    ax.legend(frameon=False, fontsize=8)


def draw_bars(
    ax: Axes, values: Mapping[str, float], *, unit: str, title: str = "", limit: float | None = None, limit_label: str = ""
) -> None:
    """A horizontal bar for each value, with its number; limit: a line that no bar can pass."""
    names = list(values)
    for row, name in enumerate(names):
        fill = colour(STYLES.get(name.split(" (")[0], ("m", ""))[0])
        ax.barh(row, values[name], height=0.6, color=fill, edgecolor="#444444", linewidth=0.6)
    largest = max([*values.values(), limit or 0])
    for row, name in enumerate(names):
        ax.text(values[name] + 0.01 * largest, row, f"{values[name]:.3g}", va="center", fontsize=8)
    if limit is not None:
        ax.axvline(limit, color="#444444", linestyle="--", linewidth=1)
        left = limit > largest / 2
        ax.text(limit * (0.99 if left else 1.01), -0.75, limit_label, ha="right" if left else "left", va="center", fontsize=8)
    ax.set_yticks(range(len(names)), names, fontsize=9)
    ax.set(ylim=(len(names) - 0.4, -1.1 if limit is not None else -0.6), xlim=(0, 1.12 * largest))
    ax.set_xlabel(unit, fontsize=9)
    ax.set_title(title, fontsize=10)
    _plain(ax)


def draw_traffic(ax: Axes, steps: Sequence[Mapping[str, Mapping[str, int]]], title: str = "", largest: int | None = None) -> None:
    """For each step a bar of the numbers read (upwards) and written (downwards), in the colours of the matrices they belong to."""
    for n, step in enumerate(steps):
        for direction, sign in (("read", 1), ("written", -1)):
            base = 0
            for name, amount in step[direction].items():
                ax.bar(n + 1, sign * amount, bottom=sign * base, width=0.75, color=colour(name[0]), edgecolor="black", linewidth=0.5)
                if amount:
                    ax.text(n + 1, sign * (base + amount / 2), name, ha="center", va="center", fontsize=7)
                base += amount
    ax.axhline(0, color="black", linewidth=0.8)
    if largest is not None:
        ax.set_ylim(-largest, largest)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):g}"))
    ax.set_xticks(range(1, len(steps) + 1))
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("step", fontsize=9)
    ax.set_ylabel("← written    numbers    read →", fontsize=9)
    _plain(ax)


def draw_roofline(
    ax: Axes,
    operations: tuple[float, str],
    bandwidth: tuple[float, str],
    points: Mapping[str, tuple[float, float]],
    *,
    title: str = "",
) -> None:
    """A roofline: bandwidth (bytes/s) times operations per byte, up to the machine's operations/s. Each ceiling comes with a label.

    points: name → (operations per byte, operations per second).
    """
    (peak, peak_label), (bytes_per_second, bandwidth_label) = operations, bandwidth
    ridge = peak / bytes_per_second
    intensities = [x for x, _ in points.values()]
    low, high = min([ridge, *intensities]) / 4, max([ridge, *intensities]) * 4
    ax.plot([low, ridge, high], [low * bytes_per_second, peak, peak], color="#444444", linewidth=1.8)
    ax.fill_between([low, ridge, high], [low * bytes_per_second, peak, peak], 3 * peak, color="#eeeeee")
    for name, (intensity, speed) in points.items():
        name_of_colour, marker = STYLES.get(name, ("m", "o"))
        style = {"marker": marker, "markersize": 8, "color": colour(name_of_colour), "markeredgecolor": "black", "linestyle": "none"}
        ax.plot(intensity, speed, label=f"{name}: {with_prefix(speed, 'FLOP/s')}", **style)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    lowest = min(low * bytes_per_second, *(speed for _, speed in points.values()))
    ax.set(xlim=(low, high), ylim=(lowest / 10, 3 * peak))
    ceilings = f"{with_prefix(peak, 'FLOP/s')} ({peak_label})\n{with_prefix(bytes_per_second, 'B/s')} ({bandwidth_label})"
    ax.text(0.03, 0.97, ceilings, transform=ax.transAxes, ha="left", va="top", fontsize=8)
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    ax.axvline(ridge, color="#444444", linewidth=0.6, linestyle=":")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis_units(ax.yaxis, "FLOP/s")
    ax.set_xlabel("operations per byte moved", fontsize=9)
    ax.set_title(title, fontsize=10)
    _plain(ax)


# ---- inside a GPU


def draw_owners(ax: Axes, owners: Mapping[tuple[int, int], tuple[int, int]], title: str, marked: int | None = None) -> None:
    """Which lane of a warp holds each element of a fragment: (row, column) → (lane, register). The number is the lane, the colour the
    register; the elements of lane `marked` are outlined."""
    for (row, column), (lane, register) in owners.items():
        face = to_rgba(colour(LANE_COLOURS[register % len(LANE_COLOURS)]), 0.45)
        ax.add_patch(Rectangle((column, row), 1, 1, facecolor=face, edgecolor="white", linewidth=0.4))
        ax.text(column + 0.5, row + 0.5, lane, ha="center", va="center", fontsize=6)
        if lane == marked:
            ax.add_patch(Rectangle((column + 0.05, row + 0.05), 0.9, 0.9, fill=False, edgecolor="black", linewidth=1.6, zorder=4))
    rows, columns = (1 + max(where[n] for where in owners) for n in (0, 1))
    _cells(ax, rows, columns, title)


def draw_banks(ax: Axes, place: Callable[[int, int], int], chosen: int, title: str) -> None:
    """Eight rows of 128 bytes of shared memory, as they lie in its 32 banks: in each 16-byte place the number of the chunk that is kept
    there. place(row, chunk) is that chunk's byte offset; chunk `chosen` of every row is what one ldmatrix reads."""
    for row in range(8):
        for chunk in range(8):
            offset = place(row, chunk)
            where = (offset % 128 // 16, offset // 128)
            face = colour("in fast memory") if chunk == chosen else "#eeeeee"
            ax.add_patch(Rectangle(where, 1, 1, facecolor=face, edgecolor="#888888", linewidth=0.6))
            weight = "bold" if chunk == chosen else "normal"
            ax.text(where[0] + 0.5, where[1] + 0.5, chunk, ha="center", va="center", fontsize=8, fontweight=weight)
    _cells(ax, 8, 8, title)
    ax.set_xticks([n + 0.5 for n in range(8)], [f"{4 * n}–{4 * n + 3}" for n in range(8)], fontsize=6)
    ax.set_xlabel("banks", fontsize=8)
    ax.set_ylabel("row", fontsize=8)


def draw_schedule(ax: Axes, pieces: Iterable[tuple[str, int, str, int, int]], until: int, title: str) -> None:
    """When each unit does what: (unit, group, name, first cycle, last cycle) of every piece of work, up to cycle `until`."""
    units: dict[str, int] = {}
    for unit, group, name, start, end in pieces:
        y = units.setdefault(unit, len(units))
        if start < until:
            face = to_rgba(colour(LANE_COLOURS[group % len(LANE_COLOURS)]), 0.55)
            ax.add_patch(Rectangle((start, y + 0.1), min(end, until) - start, 0.8, facecolor=face, edgecolor="white", linewidth=1.2))
            if end <= until:
                ax.text((start + end) / 2, y + 0.5, name, ha="center", va="center", fontsize=7)
    ax.set_xlim(0, until)
    ax.set_ylim(len(units), 0)
    ax.set_yticks([y + 0.5 for y in units.values()], list(units))
    ax.set_xlabel("cycles")
    ax.set_title(title, fontsize=10)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.tick_params(axis="y", length=0)


def draw_labels(ax: Axes, labels: Any, title: str = "", marked: Iterable[tuple[int, int]] = (), fontsize: float = 6) -> None:
    """A grid of whole numbers, coloured by their value modulo 8; cells in `marked` are outlined."""
    names = ("Q", "K", "V", "S", "P", "O", "m", "in fast memory")
    X = matrix(labels)
    for row in range(X.shape[0]):
        for column in range(X.shape[1]):
            value = int(X[row, column])
            face = to_rgba(colour(names[value % len(names)]), 0.35)
            ax.add_patch(Rectangle((column, row), 1, 1, facecolor=face, edgecolor="white", linewidth=0.3))
            ax.text(column + 0.5, row + 0.5, value, ha="center", va="center", fontsize=fontsize)
    for row, column in marked:
        ax.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor="black", linewidth=2, zorder=4))
    _cells(ax, *X.shape, title)


def draw_served(ax: Axes, number: Any, calls: Mapping[int, tuple[int, int]], title: str = "") -> None:
    """The cells of a grid that belong to each of these calls, one colour a call; a cell shows its row and column within the call.

    number: for each cell the number of its call. calls: number → the call's first cell.
    """
    X = matrix(number)
    for n in range(0, X.shape[0] + 1, 8):
        ax.axhline(n, color="#888888", linewidth=1.2)
        ax.axvline(n, color="#888888", linewidth=1.2)
    for (call, first), name in zip(calls.items(), ("P", "O", "V", "S"), strict=False):
        cells = [(int(row), int(column)) for row, column in X.eq(call).nonzero()]
        rows, columns = (sorted({cell[axis] for cell in cells}) for axis in (0, 1))
        for row, column in cells:
            ax.add_patch(Rectangle((column, row), 1, 1, facecolor=to_rgba(colour(name), 0.6), edgecolor="black", linewidth=0.8))
            text = f"{rows.index(row)},{columns.index(column)}"
            ax.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=7)
        label = f"call of weight {first}"
        ax.add_patch(Rectangle((0, 0), 0, 0, facecolor=to_rgba(colour(name), 0.6), edgecolor="black", linewidth=0.8, label=label))
    _cells(ax, *X.shape, title)
    ax.set_xticks([n + 0.5 for n in range(0, X.shape[1], 8)], range(0, X.shape[1], 8), fontsize=8)
    ax.set_yticks([n + 0.5 for n in range(0, X.shape[0], 8)], range(0, X.shape[0], 8), fontsize=8)
    ax.set_xlabel("key j", fontsize=9)
    ax.set_ylabel("query i", fontsize=9)
    ax.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=2)


# ---- two sources


def side_by_side(pairs: Iterable[tuple[str, tuple[int, str], tuple[int, str]]], titles: tuple[str, str]) -> HTML:
    """Two listings in two columns: (heading, (first line's number, text) of the left, the same of the right) for each row."""

    def listing(first: int, text: str) -> str:
        lines = text.rstrip("\n").split("\n")
        # What all have in common; #pragma stands in the first column wherever it is.
        indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip() and not line.startswith("#")), default=0)
        numbered = "\n".join(f"{first + n:4d}  {line if line.startswith('#') else line[indent:]}" for n, line in enumerate(lines))
        style = "font:11px/1.25 monospace; white-space:pre-wrap; word-break:normal; overflow-wrap:anywhere; margin:0; text-align:left"
        return f'<pre style="{style}">{html.escape(numbered)}</pre>'

    cell = '<td style="width:50%; vertical-align:top; text-align:left; border-top:1px solid #888; padding:4px 8px">'
    rows = "".join(
        f'<tr><td colspan="2" style="text-align:left; padding:10px 8px 2px"><b>{html.escape(heading)}</b></td></tr>'
        f"<tr>{cell}{listing(*left)}</td>{cell}{listing(*right)}</td></tr>"
        for heading, left, right in pairs
    )
    head = "".join(f'<th style="width:50%; text-align:left; padding:4px 8px">{html.escape(title)}</th>' for title in titles)
    return HTML(f'<table style="width:100%; table-layout:fixed; border-collapse:collapse"><tr>{head}</tr>{rows}</table>')


def _cells(ax: Axes, rows: int, columns: int, title: str) -> None:
    ax.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal")
    ax.set_xticks([n + 0.5 for n in range(columns)], range(columns), fontsize=6)
    ax.set_yticks([n + 0.5 for n in range(rows)], range(rows), fontsize=6)
    ax.tick_params(length=0, pad=2)
    ax.spines[:].set_visible(False)
    ax.set_title(title, fontsize=9)


def _plain(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)

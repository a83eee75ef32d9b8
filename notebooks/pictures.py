"""Everything the lessons draw: matrices with their numbers, tiles with their states, and the tile loops, frame by frame.

`watch` runs one of the reference algorithms and keeps what its `observe` callback is shown. All pictures of a loop are drawn from that
record: nothing here computes attention.
"""

import base64
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from matplotlib import patheffects
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image
from torch import Tensor

from flash_attention.reference import flash_attention2_forward, normal_attention

# Okabe and Ito's palette, told apart with any kind of colour vision. A gradient dX has the colour of X; states also differ by hatching.
COLOURS = {
    "Q": "#E69F00",
    "K": "#56B4E9",
    "V": "#009E73",
    "S": "#CC79A7",
    "P": "#0072B2",
    "O": "#D55E00",
    "m": "#999999",
    "l": "#999999",
    "waiting": "#FFFFFF",
    "in fast memory": "#F0E442",
    "done": "#BBBBBB",
    "masked": "#555555",
    "skipped": "#FFFFFF",
}
HATCHES = {"masked": "///", "skipped": "xx"}
STATES = ("waiting", "in fast memory", "done", "masked", "skipped")

CELL = 0.42  # inches, in the pictures of whole loops


def colour(name: str) -> str:
    """The colour of a matrix or of a state: "dQ", "Qi" and "Q tile" are all Q's."""
    if name in COLOURS:
        return COLOURS[name]
    return COLOURS.get(name.removeprefix("d")[:1], "#999999")


def watch(algorithm: Callable, *arguments, **options) -> tuple[Any, list[SimpleNamespace]]:
    """Run a reference algorithm; return its result and one record for each tile, in the order of the loop.

    A record has as attributes all that `observe` was shown: i, j and copies of the tensors.
    """
    steps: list[SimpleNamespace] = []

    def observe(**shown) -> None:
        steps.append(SimpleNamespace(**{name: x.clone() if isinstance(x, Tensor) else x for name, x in shown.items()}))

    return algorithm(*arguments, observe=observe, **options), steps


def traffic(steps: Sequence[SimpleNamespace], D: int, Dv: int) -> dict[str, int]:
    """Elements that cross between slow and fast memory, by the order in which a forward's run met its tiles.

    Fast memory holds one tile of each matrix. A tile of Q, K or V is read unless it is the one of the step before; a tile of O is written
    when another takes its place, and read when it comes back. O's first zeros are not counted, nor m, l and LSE (two numbers a row or one).
    """
    moved = {"Q read": 0, "K read": 0, "V read": 0, "O read": 0, "O written": 0}
    seen, i, j = set(), None, None
    for step in steps:
        rows, columns = step.i.stop - step.i.start, step.j.stop - step.j.start
        if step.i != i:
            moved["Q read"] += rows * D
            moved["O written"] += rows * Dv  # sooner or later it leaves
            moved["O read"] += rows * Dv * (step.i.start in seen)
        if step.j != j:
            moved["K read"] += columns * D
            moved["V read"] += columns * Dv
        i, j = step.i, step.j
        seen.add(i.start)
    return moved


def matrix(X: Any) -> Tensor:
    """X as a 2-dimensional float64 tensor: leading dimensions of size 1 (batch, head) are dropped, a vector becomes a column."""
    X = torch.as_tensor(X).detach().double().cpu()
    while X.dim() > 2:
        if X.shape[0] != 1:
            raise ValueError(f"one batch and one head can be drawn, got shape {tuple(X.shape)}")
        X = X[0]
    return X if X.dim() == 2 else X.reshape(-1, 1)


def number(value: float, fmt: str = "{:.2f}") -> str:
    """With a minus sign instead of a hyphen, and never minus zero."""
    text = "−∞" if value == -float("inf") else fmt.format(value).replace("-", "−")
    return text if text.strip("−0.") else text.removeprefix("−")


def draw_matrix(
    ax: Axes,
    X: Any,
    name: str,
    *,
    title: str | None = None,
    tile: tuple[int, int] | None = None,
    mark: Iterable[tuple[slice, slice]] = (),
    fmt: str = "{:.2f}",
    largest: float | None = None,
    row_label: str = "",
    column_label: str = "",
    row_names: Sequence[Any] | None = None,
    column_names: Sequence[Any] | None = None,
    fontsize: float = 8,
    ticks: bool = True,
) -> None:
    """A matrix with its numbers. The darker a cell, the larger its |value|; NaN is drawn empty (not computed yet), −∞ as masked.

    name chooses the colour and, unless given, the title. tile: rows and columns of a tile, separated by lines. mark: (rows, columns)
    to outline as "in fast memory". largest: the |value| of the full colour (the matrix's own unless given, so that frames compare).
    row_names, column_names: what the ticks say instead of 0, 1, 2 …; ticks=False: no ticks.
    """
    X = matrix(X)
    rows, columns = X.shape
    finite = X[X.isfinite()].abs()
    largest = largest or (float(finite.max()) if finite.numel() else 1.0) or 1.0
    full = torch.tensor(to_rgb(colour(name)), dtype=torch.float64)
    strength = (X.abs().nan_to_num(0, 0, 0) / largest).clamp(0, 1)[..., None] * 0.85
    ax.imshow((1 - strength + strength * full).numpy(), extent=(0, columns, rows, 0), aspect="equal", interpolation="nearest")
    for r in range(rows):
        for c in range(columns):
            value = float(X[r, c])
            if value == -float("inf"):
                ax.add_patch(Rectangle((c, r), 1, 1, facecolor=colour("masked"), hatch=HATCHES["masked"], edgecolor="#888888", linewidth=0))
            if value == value:
                shade = (1 - strength[r, c] + strength[r, c] * full) @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
                dark = value == -float("inf") or shade < 0.5
                text = number(value, fmt)
                ax.text(c + 0.5, r + 0.5, text, ha="center", va="center", fontsize=fontsize, color="white" if dark else "black")
    _grid(ax, rows, columns, tile or (rows, columns))
    for i, j in mark:
        outline(ax, i, j)
    ax.set_title(name if title is None else title, fontsize=fontsize + 2, family="DejaVu Sans Mono", pad=5)  # sans-serif l looks like I
    _label(ax, row_label, column_label, row_names or range(rows), column_names or range(columns), fontsize, ticks)


def draw_product(figure: Figure, *parts: str | tuple[str, Any], fmt: str = "{:.2f}") -> None:
    """A formula in numbers. Signs are strings, matrices are (name, X): draw_product(figure, ("P", P), "·", ("V", V), "=", ("O", O))."""
    parts = [part if isinstance(part, str) else (part[0], matrix(part[1])) for part in parts]
    rows = max(part[1].shape[0] for part in parts if not isinstance(part, str))
    widths = [0.8 + 0.3 * len(part) if isinstance(part, str) else part[1].shape[1] + 1.5 for part in parts]
    cells = Cells(figure, sum(widths) + 0.5, rows + 2.6)
    x = 0.3
    for part, width in zip(parts, widths, strict=True):
        if isinstance(part, str):
            figure.text((x + width / 2) / cells.width, 1 - (1.2 + rows / 2) / cells.height, part, fontsize=14, ha="center", va="center")
        else:
            name, X = part
            row_label, column_label = _axes_of(name)
            labels = {"column_label": column_label} if X.shape[1] > 1 else {"column_names": [""]}
            ax = cells(x + 1.2, 1.2 + (rows - X.shape[0]) / 2, X.shape[1], X.shape[0])
            draw_matrix(ax, X, name, row_label=row_label, fmt=fmt, fontsize=7, **labels)
        x += width


def _axes_of(name: str) -> tuple[str, str]:
    """What the rows and columns of Q, dKᵀ, P … count."""
    letter = name.removesuffix("ᵀ").removeprefix("d")
    labels = ("query i", "key j") if letter in ("S", "P") else ("key j", "feature") if letter in ("K", "V") else ("query i", "feature")
    return labels[::-1] if name.endswith("ᵀ") else labels


def draw_tiles(
    ax: Axes,
    states: Sequence[Sequence[str]],
    *,
    title: str = "",
    labels: Sequence[Sequence[Any]] | None = None,
    row_label: str = "block i of queries",
    column_label: str = "block j of keys",
    fontsize: float = 8,
) -> None:
    """A grid of tiles, one state of `STATES` (or the name of a matrix) for each; labels, if given, are written into them."""
    rows, columns = len(states), len(states[0])
    for r, row in enumerate(states):
        for c, state in enumerate(row):
            ax.add_patch(_swatch(state, Rectangle, (c, r), 1, 1))
            if labels is not None:
                dark = state == "masked"
                ax.text(c + 0.5, r + 0.5, labels[r][c], ha="center", va="center", fontsize=fontsize, color="white" if dark else "black")
    ax.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal")
    ax.set_title(title, fontsize=fontsize + 2)
    _label(ax, row_label, column_label, range(rows), range(columns), fontsize, True)


def draw_legend(where: Axes | Figure, states: Iterable[str] = STATES, **options) -> None:
    """What the colours of tiles mean; options go to matplotlib's legend."""
    where.legend(handles=[_swatch(s, Patch, label=s) for s in states], **{"frameon": False, "fontsize": 8, **options})


def outline(ax: Axes, i: slice, j: slice) -> None:
    """Outline rows i and columns j of a drawn matrix: this tile is in fast memory."""
    edge = Rectangle((j.start, i.start), j.stop - j.start, i.stop - i.start, fill=False, edgecolor=colour("in fast memory"), linewidth=2)
    edge.set(zorder=5, clip_on=False, path_effects=[patheffects.Stroke(linewidth=4, foreground="black"), patheffects.Normal()])
    ax.add_patch(edge)


def draw_forward(
    figure: Figure, steps: Sequence[SimpleNamespace], n: int, Q: Tensor, K: Tensor, V: Tensor, *, divide: bool, truth: Tensor | None = None
) -> None:
    """Step n of a forward: Q, K, V with the tiles in fast memory, S and P of this tile, and m, l, O as they stand.

    divide: O of the record is not yet divided by l (FlashAttention-2); it is drawn divided, to be compared with `truth`, of which the
    error of each step is drawn.
    """
    step, Nq, Nk, D, Dv = steps[n], Q.shape[2], K.shape[2], Q.shape[3], V.shape[3]
    block_q, block_k = block_sizes(steps)
    x_S = 1.6 + D + 1.4
    x_P = x_S + Nk + 1.4
    x_m = x_P + Nk + 1.1
    x_O = x_m + 3.4
    cells = Cells(figure, x_O + Dv + 0.8, 4.8 + Nq + 1.7)
    style = {"fmt": "{:.1f}", "fontsize": 7}
    over_keys = {"tile": (max(D, Dv), block_k), "row_label": "feature", **style}
    draw_matrix(cells(x_S, 1.6, Nk, D), K[0, 0].mT, "K", title="Kᵀ", mark=[(slice(0, D), step.j)], **over_keys)
    draw_matrix(cells(x_P, 1.6, Nk, Dv), V[0, 0].mT, "V", title="Vᵀ", mark=[(slice(0, Dv), step.j)], **over_keys)
    of_queries = {"tile": (block_q, max(D, Dv)), **style}
    draw_matrix(cells(1.6, 4.8, D, Nq), Q, "Q", mark=[(step.i, slice(0, D))], row_label="query i", column_label="feature", **of_queries)
    draw_tile_of(cells(x_S, 4.8, Nk, Nq), steps, n, "S", Nq, Nk, **style)
    draw_tile_of(cells(x_P, 4.8, Nk, Nq), steps, n, "P", Nq, Nk, **style)
    for x, name in ((x_m, "m"), (x_m + 1.7, "l")):
        X = rows_so_far(steps[: n + 1], name, Nq)
        draw_matrix(cells(x, 4.8, 1, Nq), X, name, mark=[(step.i, slice(0, 1))], ticks=False, **of_queries)
    draw_matrix(
        cells(x_O, 4.8, Dv, Nq),
        rows_so_far(steps[: n + 1], "O", Nq, divide),
        "O",
        title="O / l" if divide else "O",
        mark=[(step.i, slice(0, Dv))],
        largest=None if truth is None else float(matrix(truth).abs().max()),
        column_label="feature",
        **of_queries,
    )
    _say_where(cells(0.4, 1.2, x_S - 2, 2.4), steps, n)
    if truth is not None:
        draw_errors(cells(x_m + 1.4, 1.3, x_O + Dv - x_m - 1.4, 2), errors(steps, truth, divide), n)
    draw_legend(figure, ("in fast memory", "done", "waiting"), loc="lower center", ncols=3, fontsize=7)


def draw_backward(
    figure: Figure,
    steps: Sequence[SimpleNamespace],
    n: int,
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    dO: Tensor,
    LSE: Tensor,
    D_of_rows: Tensor,
) -> None:
    """Step n of a backward: on the left S, LSE → P with Q, Kᵀ and what P gives, dVᵀ; on the right dP, D → dS with dO, Vᵀ, and dKᵀ and dQ.

    LSE and D_of_rows, which the papers call D: one number a row of Q.
    """
    step, Nq, Nk, D, Dv = steps[n], Q.shape[2], K.shape[2], Q.shape[3], V.shape[3]
    block_q, block_k = block_sizes(steps)
    x_S = 1.6 + D + 0.9  # the tile of S, then LSE, then P
    x_P = x_S + block_k + 3.6
    x_dO = x_P + Nk + 1.4
    x_dP = x_dO + Dv + 0.9
    x_dS = x_dP + block_k + 3.6
    x_dQ = x_dS + Nk + 1.6
    y, y_d = 4.8, 4.8 + Nq + 2.0
    cells = Cells(figure, x_dQ + D + 0.8, y_d + max(D, Dv) + 1.6)
    style = {"fmt": "{:.2f}", "fontsize": 7}
    over_keys = {"tile": (max(D, Dv), block_k), **style}
    of_queries = {"tile": (block_q, max(D, Dv)), "column_label": "feature", **style}
    draw_matrix(cells(x_P, 1.6, Nk, D), K[0, 0].mT, "K", title="Kᵀ", mark=[(slice(0, D), step.j)], row_label="feature", **over_keys)
    draw_matrix(cells(x_dS, 1.6, Nk, Dv), V[0, 0].mT, "V", title="Vᵀ", mark=[(slice(0, Dv), step.j)], row_label="feature", **over_keys)
    draw_matrix(cells(1.6, y, D, Nq), Q, "Q", mark=[(step.i, slice(0, D))], row_label="query i", **of_queries)
    draw_matrix(cells(x_dO, y, Dv, Nq), dO, "dO", mark=[(step.i, slice(0, Dv))], **of_queries)
    draw_tile_of(cells(x_P, y, Nk, Nq), steps, n, "P", Nq, Nk, label=False, **style)
    draw_tile_of(cells(x_dS, y, Nk, Nq), steps, n, "dS", Nq, Nk, label=False, **style)
    sums = {name: columns_so_far(steps[: n + 1], name, Nk).mT for name in ("dK", "dV")}
    for x, name, rows in ((x_P, "dV", Dv), (x_dS, "dK", D)):
        draw_matrix(
            cells(x, y_d, Nk, rows),
            sums[name],
            name,
            title=f"{name}ᵀ",
            mark=[(slice(0, rows), step.j)],
            row_label="feature",
            column_label="key j",
            **over_keys,
        )
    dQ = rows_so_far(steps[: n + 1], "dQ", Nq)
    draw_matrix(cells(x_dQ, y, D, Nq), dQ, "dQ", mark=[(step.i, slice(0, D))], **of_queries)
    rows = step.i.stop - step.i.start
    for x, name, of_rows, X_of_rows in ((x_S, "S", "LSE", LSE), (x_dP, "dP", "D", D_of_rows)):
        X = matrix(getattr(step, name))
        draw_matrix(cells(x, y + step.i.start, X.shape[1], rows), X, name, ticks=False, **style)
        one_a_row = matrix(X_of_rows).reshape(-1, 1)
        mark = [(step.i, slice(0, 1))]
        draw_matrix(cells(x + block_k + 1.3, y, 1, Nq), one_a_row, of_rows, tile=(block_q, 1), mark=mark, ticks=False, **style)
    _say_where(cells(0.4, 1.2, x_S - 0.5, 2.4), steps, n)
    draw_legend(figure, ("in fast memory", "done", "waiting"), loc="lower left", fontsize=7)


def draw_tile_of(ax: Axes, steps: Sequence[SimpleNamespace], n: int, name: str, Nq: int, Nk: int, *, label: bool = True, **style) -> None:
    """S, P, dP or dS at step n: the numbers of the tile at hand, grey where a tile was computed, used and forgotten."""
    step, (block_q, block_k) = steps[n], block_sizes(steps)
    X = torch.full((Nq, Nk), float("nan"), dtype=torch.float64)
    X[step.i, step.j] = matrix(getattr(step, name))
    draw_matrix(ax, X, name, tile=(block_q, block_k), mark=[(step.i, step.j)], column_label="key j" if label else "", **style)
    for past in steps[:n]:
        i, j = past.i, past.j
        ax.add_patch(Rectangle((j.start, i.start), j.stop - j.start, i.stop - i.start, facecolor=colour("done"), edgecolor="#666666"))


def block_sizes(steps: Sequence[SimpleNamespace]) -> tuple[int, int]:
    """Rows and columns of a whole tile."""
    return max(s.i.stop - s.i.start for s in steps), max(s.j.stop - s.j.start for s in steps)


def _say_where(ax: Axes, steps: Sequence[SimpleNamespace], n: int) -> None:
    (block_q, block_k), (i, j) = block_sizes(steps), (steps[n].i.start, steps[n].j.start)
    ax.axis("off")
    ax.text(0, 0.85, f"step {n + 1} of {len(steps)}", fontsize=10, fontweight="bold", va="top")
    ax.text(0, 0.4, f"block i = {i // block_q} of queries\nblock j = {j // block_k} of keys", fontsize=8, va="top")


# How an event of an emulated kernel's trace is drawn: the colour's name, and what the legend says.
KINDS = {
    "exponentials": ("P", "softmax: P = exp(S − m)"),
    "arithmetic": ("done", "other work of the group"),
    "load": ("done", "other work of the group"),
    "product": ("S", "asks for products"),
    "store": ("O", "O to shared memory"),
    "issue": ("in fast memory", "held up: its products queue"),
    "wait": ("skipped", "waits"),
}
TENSORS = {"q": "Q", "k": "K", "v": "V", "o": "O", "d_o": "dO", "dq": "dQ", "dk": "dK", "dv": "dV"}


def timeline(trace: Any, *, width: float = 12, **options) -> Figure:
    """`draw_timeline` in a figure of its own, so many inches wide."""
    figure = Figure(
        figsize=(width, 0.52 * len(_lanes(trace, options.get("launch", 1), options.get("block", 0))[0]) + 1.5), layout="constrained"
    )
    draw_timeline(figure, trace, **options)
    return figure


def draw_timeline(
    figure: Figure,
    trace: Any,
    *,
    launch: int = 1,
    block: int = 0,
    start: float = 0,
    end: float | None = None,
    now: float | None = None,
    barriers: Mapping[str, str] | None = None,
) -> None:
    """What one block of an emulated kernel (`emulated.tracing()`) does between two times, in cycles of the model.

    Lanes: the copy engine, the tensor cores, then each warpgroup that computes, shown by its first warp (or each warp, where a kernel has
    no warpgroups), and the warp that asks for copies.

    now: what is later is pale, and beside each lane stands what it does at that time, and what for. barriers: names for those words, as
    {"mbarrier 64": "K_full[0]"}.
    """
    mine = [e for e in trace.events if (e.launch, e.block) == (launch, block) and e.end > e.start and e.end > start]
    end = max(e.end for e in mine) if end is None else end
    mine = [e for e in mine if e.start < end]
    lanes, names, producers = _lanes(trace, launch, block)
    ax, used = figure.subplots(), {}
    renderer_width = figure.get_figwidth() * 72 * (0.86 if now is None else 0.56) / (end - start)  # points a cycle
    for event in mine:
        lane = event.warp if event.actor == "warp" else event.actor
        if lane not in lanes:
            continue
        name, legend, text = _look(event, names, lane in producers)
        used.setdefault(legend, name)
        left, right = max(event.start, start), min(event.end, end)
        y = lanes.index(lane)
        hatch = {"hatch": "///", "edgecolor": "#BBBBBB"} if event.kind == "wait" else {"edgecolor": "white"}
        pale = {"alpha": 0.22} if now is not None and event.start > now else {}
        ax.add_patch(Rectangle((left, y - 0.38), right - left, 0.76, facecolor=colour(name), linewidth=0.6, **hatch, **pale))
        if (right - left) * renderer_width > 5.2 * len(text):
            shade = torch.tensor(to_rgb(colour(name))) @ torch.tensor([0.299, 0.587, 0.114])
            ink = "black" if shade > 0.5 or pale else "white"
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6} if event.kind == "wait" else None
            ax.text((left + right) / 2, y, text, ha="center", va="center", fontsize=7, color=ink, bbox=box, **pale)
    if now is not None:
        ax.axvline(now, color="black", linewidth=1.2)
        ax.set_title(f"cycle {now:,.0f}", fontsize=9, loc="left")
        right_axis = ax.secondary_yaxis("right")
        right_axis.set_yticks(range(len(lanes)), [_doing(trace, mine, lane, names, now, barriers or {}) for lane in lanes], fontsize=8)
        right_axis.tick_params(length=0)
        right_axis.spines[:].set_visible(False)
    title = {"copies in": "copy engine", **names, **dict.fromkeys(producers, "producer warp")}
    ax.set_yticks(range(len(lanes)), [title.get(lane, lane) for lane in lanes], fontsize=9)
    ax.set(xlim=(start, end), ylim=(len(lanes) - 0.45, -0.55))
    ax.set_xlabel("cycles of the model", fontsize=8)
    ax.tick_params(axis="x", labelsize=8)
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    for y in range(1, len(lanes)):
        ax.axhline(y - 0.5, color="#DDDDDD", linewidth=0.6, zorder=0)
    engines = sum(isinstance(lane, str) for lane in lanes)
    ax.axhline(engines - 0.5, color="#666666", linewidth=0.8)
    order = ("copy", "product", "softmax", "O to", "other", "asks", "held", "waits")
    used = dict(sorted(used.items(), key=lambda item: next((n for n, word in enumerate(order) if item[0].startswith(word)), len(order))))
    handles = [_swatch(name, Patch, label=legend) for legend, name in used.items() if legend]
    if now is None:
        figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    else:  # words differ from frame to frame, but nothing moves
        figure.legend(handles=handles, loc="lower center", ncols=6, frameon=False, fontsize=8)
        figure.subplots_adjust(left=0.1, right=0.8, top=0.92, bottom=0.25)


def play_timeline(trace: Any, times: Sequence[float], *, width: float = 12, dpi: int = 75, seconds: float = 1.5, **options) -> "Player":
    """`draw_timeline` with buttons: a frame for each time. Other options go there."""
    lanes, *_ = _lanes(trace, options.get("launch", 1), options.get("block", 0))

    def draw(figure: Figure, now: float) -> None:
        draw_timeline(figure, trace, now=now, **options)

    return animate(times, draw, figsize=(width, 0.52 * len(lanes) + 1.7), dpi=dpi, seconds=seconds)


def turning_points(
    trace: Any, *, start: float = 0, end: float = float("inf"), launch: int = 1, block: int = 0, least: float = 100
) -> list[float]:
    """The times between at which a product, a softmax or a wait of the groups that compute begins: what a timeline is stepped through by.
    least: what takes fewer cycles does not count, and of two times nearer than this the first does."""
    _, names, _ = _lanes(trace, launch, block)
    mine = [e for e in trace.events if (e.launch, e.block) == (launch, block) and e.cycles >= least and start <= e.start < end]
    times: list[float] = []
    for event in sorted(mine, key=lambda e: e.start):
        of_group = event.actor == "warp" and event.warp in names and event.kind in ("wait", "exponentials", "store")
        if (of_group or event.actor == "tensor cores") and (not times or event.start - times[-1] >= least):
            times.append(event.start)
    return times


def _lanes(trace: Any, launch: int, block: int) -> tuple[list[str | int], dict[int, str], list[int]]:
    """The lanes of a timeline, engines by name and warps by number; the names of the warps that compute; the warps that ask for copies."""
    roles = {warp: role for (of, at, warp), role in trace.roles().items() if (of, at) == (launch, block)}
    by_group = any(e.actor == "tensor cores" and (e.launch, e.block) == (launch, block) for e in trace.events)
    warps = sorted(w for w, role in roles.items() if role == "products" and (w % 4 == 0 or not by_group))
    names = {w: f"group {n + 1}" if by_group else f"warp {w}" for n, w in enumerate(warps)}
    engines = ["copies in", *(["tensor cores"] if by_group else [f"tensor core {n}" for n in sorted({w % 4 for w in warps})])]
    producers = sorted(w for w, role in roles.items() if role == "copies")
    return [*engines, *warps, *producers], names, producers


def _doing(trace: Any, events: Sequence[Any], lane: str | int, names: Mapping[int, str], now: float, barriers: Mapping[str, str]) -> str:
    """In words: what a lane does at that time."""
    at = [e for e in events if (e.warp if e.actor == "warp" else e.actor) == lane and e.start <= now < e.end]
    if not at:
        return "idle" if isinstance(lane, str) else ""
    event = max(at, key=lambda e: e.start)
    if event.kind == "copy":
        return f"brings {TENSORS.get(event.tensors[0], event.tensors[0])}"
    if event.kind == "product":
        return f"{event.name} of {names[event.warp]}" if isinstance(lane, str) else f"multiplies: {event.name}"
    if event.kind == "exponentials":
        return "softmax"
    if event.kind == "store":
        return "stores O"
    if event.kind != "wait":
        return "issues products" if event.kind == "issue" else "between two steps"
    what, _, which = event.about.partition(", ")
    if what.startswith("products"):
        found = sorted({e.name for e in trace.causes(event) if e.kind == "product"})
        return f"waits for {' and '.join(found) or 'products'}"
    if what.startswith("barrier"):
        return "waits for its turn"
    return f"waits: {barriers.get(what, what)}, {which}"


def _look(event: Any, groups: dict[int, str], producer: bool) -> tuple[str, str, str]:
    """An event's colour, its words in the legend, and in the picture."""
    tensor = TENSORS.get(event.tensors[0], event.tensors[0])
    if event.kind == "copy":
        return tensor or "done", f"copy of {tensor}" if tensor else "copy", tensor
    if event.kind == "product":
        name = event.name.removeprefix("product").strip()
        name = TENSORS.get(name, name)
        of = groups[event.warp].removeprefix("group") if event.actor == "tensor cores" else ""
        return name or "S", f"product {name}, of group 1, 2 …" if of else f"product {name}".rstrip(), f"{name}{of}"
    if event.kind == "wait":
        return "skipped", "waits", "waits"
    name, legend = KINDS[event.kind]
    if producer:
        return "done", "asks for copies", ""
    return name, legend, "softmax" if event.kind == "exponentials" else ""


class Cells:
    """Makes a figure of so many matrix cells and places axes in it in these units, from the top left: rows of matrices then line up."""

    def __init__(self, figure: Figure, width: float, height: float):
        figure.set_size_inches(width * CELL, height * CELL)
        self.figure, self.width, self.height = figure, width, height

    def __call__(self, x: float, y: float, columns: float, rows: float) -> Axes:
        return self.figure.add_axes((x / self.width, 1 - (y + rows) / self.height, columns / self.width, rows / self.height))


def rows_so_far(steps: Sequence[SimpleNamespace], name: str, N: int, divide: bool = False) -> Tensor:
    """m, l or O of all rows after the given steps: (N, columns), NaN where no tile has been seen. divide: O by l, where l > 0."""
    X = torch.full((N, matrix(getattr(steps[0], name)).shape[1]), float("nan"), dtype=torch.float64)
    for step in steps:
        value = matrix(getattr(step, name))
        X[step.i] = value / matrix(step.l).masked_fill(matrix(step.l) == 0, 1) if divide and name == "O" else value
    return X


def columns_so_far(steps: Sequence[SimpleNamespace], name: str, N: int) -> Tensor:
    """dK or dV of all keys after the given steps: (N, columns), NaN where no tile has been seen."""
    X = torch.full((N, matrix(getattr(steps[0], name)).shape[1]), float("nan"), dtype=torch.float64)
    for step in steps:
        X[step.j] = matrix(getattr(step, name))
    return X


def errors(steps: Sequence[SimpleNamespace], truth: Tensor, divide: bool) -> list[float]:
    """After each step: the largest |O − truth|; rows not yet reached count as 0, which is what O starts from."""
    truth = matrix(truth)
    return [float((rows_so_far(steps[: n + 1], "O", len(truth), divide).nan_to_num(0) - truth).abs().max()) for n in range(len(steps))]


def draw_errors(ax: Axes, values: Sequence[float], n: int | None = None) -> None:
    """The error of each step; n: the step at hand."""
    ax.plot(range(1, len(values) + 1), values, color=colour("O"), marker="o", markersize=3, linewidth=1.2)
    if n is not None:
        ax.plot(n + 1, values[n], marker="o", markersize=7, markerfacecolor="none", markeredgecolor="black", clip_on=False)
    ax.set_ylim(bottom=-0.03 * max(values))
    ax.set_title("largest |O − naive|", fontsize=8)
    ax.set_xlabel("step", fontsize=7, labelpad=1)
    ax.tick_params(labelsize=6, length=2, pad=1)
    ax.spines[["top", "right"]].set_visible(False)


class Player(FuncAnimation):
    """matplotlib's animation, shown in a notebook as a player that needs neither a kernel nor the network.

    The same frames give the same text: the player's id is a hash of them, where matplotlib's is random.
    """

    def to_jshtml(self, *arguments, **options) -> str:
        html = super().to_jshtml(*arguments, **options)
        html = re.sub(r"<link rel=\"stylesheet\"\s+href=\"https://maxcdn[^>]*>", "", html)  # icons from the network: text instead
        html = re.sub(r'base64,([^"]*)"', lambda frame: f'base64,{_fewer_colours(frame[1])}"', html)
        for icon, text in PLAYER_SIGNS.items():
            html = html.replace(f'<i class="fa {icon}"></i>', text)
        identity = re.search(r'id="_anim_img([0-9a-f]{32})"', html).group(1)
        html = html.replace(identity, hashlib.sha256(html.replace(identity, "").encode()).hexdigest()[:32])
        first = re.search(r'frames\[0\] = ("data:[^"]*")', html).group(1)  # shown by a viewer that runs no scripts
        return html.replace('<img id="_anim_img', f'<img alt="step by step" src={first} id="_anim_img')

    def _repr_html_(self) -> str:
        return self.to_jshtml()


PLAYER_SIGNS = {
    "fa-minus": "−",
    "fa-fast-backward": "|◀",
    "fa-step-backward": "◀|",
    "fa-play fa-flip-horizontal": "◀",
    "fa-pause": "||",
    "fa-play": "▶",
    "fa-step-forward": "|▶",
    "fa-fast-forward": "▶|",
    "fa-plus": "+",
}


def _fewer_colours(frame: str) -> str:
    """A PNG in base64 (in JavaScript's broken lines) with a palette instead of three bytes a pixel: half the size."""
    file = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(frame.replace("\\\n", "")))).convert("RGB").quantize(256).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def animate(
    frames: Sequence[Any],
    draw: Callable[[Figure, Any], None],
    *,
    figsize: tuple[float, float] = (6, 4),
    dpi: int = 80,
    seconds: float = 1.0,
) -> Player:
    """One picture for each frame: `draw(figure, frame)` is called with an empty figure. In a notebook: with buttons to step and play.

    figsize: inches (`draw` may set its own, the same for every frame). seconds: how long a frame lasts when played. Drawing takes longer
    than all else in some lessons; a check that only wants to see them run sets LESSON_FRAMES, the most frames that are drawn.
    """
    frames = list(frames)[: int(os.environ.get("LESSON_FRAMES", "0")) or None]
    figure = Figure(figsize=figsize, dpi=dpi)

    def redraw(frame: Any) -> None:
        figure.clear()
        draw(figure, frame)

    return Player(figure, redraw, frames=frames, init_func=lambda: None, interval=1000 * seconds, repeat=True)


def save_gif(animation: FuncAnimation, file: str | Path, seconds: float = 1.0) -> None:
    """Write the animation as a GIF that shows each frame for that long."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    animation.save(str(file), writer=PillowWriter(fps=1 / seconds))


def tile_loop_gif(file: str | Path) -> None:
    """The README's picture: FlashAttention-2's forward over 3 × 3 tiles, drawn from the run of the reference algorithm."""
    random = torch.Generator().manual_seed(0)
    Q, K, V = torch.randn(3, 1, 1, 6, 2, generator=random).unbind()  # (1, 1, 6, 2) each
    _, steps = watch(flash_attention2_forward, Q, K, V, block_q=2, block_k=2)
    truth = normal_attention(Q, K, V)
    frames = [*range(len(steps)), len(steps) - 1]  # the last one twice as long
    player = animate(frames, lambda figure, n: draw_forward(figure, steps, n, Q, K, V, divide=True, truth=truth), dpi=90)
    save_gif(player, file, seconds=1.2)


def _swatch(state: str, shape: type, *arguments, **options):
    return shape(*arguments, facecolor=colour(state), hatch=HATCHES.get(state), edgecolor="#888888", **options)


def _grid(ax: Axes, rows: int, columns: int, tile: tuple[int, int]) -> None:
    """Thin lines between cells, thick ones between tiles."""
    widths = [1.2 if r in (0, rows) or r % tile[0] == 0 else 0.2 for r in range(rows + 1)]
    ax.hlines(range(rows + 1), 0, columns, color="black", linewidth=widths, clip_on=False)
    widths = [1.2 if c in (0, columns) or c % tile[1] == 0 else 0.2 for c in range(columns + 1)]
    ax.vlines(range(columns + 1), 0, rows, color="black", linewidth=widths, clip_on=False)
    ax.set(xlim=(0, columns), ylim=(rows, 0))
    ax.spines[:].set_visible(False)


def _label(
    ax: Axes, row_label: str, column_label: str, row_names: Sequence[Any], column_names: Sequence[Any], fontsize: float, ticks: bool
) -> None:
    ax.set_xlabel(column_label, fontsize=fontsize, labelpad=2)
    ax.set_ylabel(row_label, fontsize=fontsize, labelpad=2)
    ax.set_xticks([c + 0.5 for c in range(len(column_names))] if ticks else [], column_names if ticks else [])
    ax.set_yticks([r + 0.5 for r in range(len(row_names))] if ticks else [], row_names if ticks else [])
    ax.tick_params(length=0, labelsize=fontsize - 1, pad=3)

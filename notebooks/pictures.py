"""Pictures of matrices with their numbers, of tiles with their states, and of the tile loops step by step, from a record made by `watch`.

See also: record.py (the record), player.py (animations with buttons), timeline.py (emulated kernels), charts.py (charts).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from player import animate, save_gif
from record import block_sizes, columns_so_far, errors, matrix, rows_so_far, watch
from torch import Tensor

from flash_attention.reference import flash_attention2_forward, normal_attention

# Okabe and Ito's palette, distinct with any kind of colour vision. A gradient dX has the colour of X; states also differ by hatching.
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
            ax.add_patch(swatch(state, Rectangle, (c, r), 1, 1))
            if labels is not None:
                dark = state == "masked"
                ax.text(c + 0.5, r + 0.5, labels[r][c], ha="center", va="center", fontsize=fontsize, color="white" if dark else "black")
    ax.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal")
    ax.set_title(title, fontsize=fontsize + 2)
    _label(ax, row_label, column_label, range(rows), range(columns), fontsize, True)


def draw_legend(where: Axes | Figure, states: Iterable[str] = STATES, **options) -> None:
    """What the colours of tiles mean; options go to matplotlib's legend."""
    where.legend(handles=[swatch(s, Patch, label=s) for s in states], **{"frameon": False, "fontsize": 8, **options})


def outline(ax: Axes, i: slice, j: slice) -> None:
    """Outline rows i and columns j of a drawn matrix: this tile is in fast memory."""
    edge = Rectangle((j.start, i.start), j.stop - j.start, i.stop - i.start, fill=False, edgecolor=colour("in fast memory"), linewidth=2)
    edge.set(zorder=5, clip_on=False, path_effects=[patheffects.Stroke(linewidth=4, foreground="black"), patheffects.Normal()])
    ax.add_patch(edge)


def draw_forward(
    figure: Figure, steps: Sequence[SimpleNamespace], n: int, Q: Tensor, K: Tensor, V: Tensor, *, divide: bool, truth: Tensor | None = None
) -> None:
    """Step n of a forward: Q, K, V with the tiles in fast memory, S and P of this tile, and m, l, O as they stand.

    divide: O of the record is not yet divided by l (FlashAttention-2); it is drawn divided, and so is its error against `truth` after
    each step.
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


def _say_where(ax: Axes, steps: Sequence[SimpleNamespace], n: int) -> None:
    (block_q, block_k), (i, j) = block_sizes(steps), (steps[n].i.start, steps[n].j.start)
    ax.axis("off")
    ax.text(0, 0.85, f"step {n + 1} of {len(steps)}", fontsize=10, fontweight="bold", va="top")
    ax.text(0, 0.4, f"block i = {i // block_q} of queries\nblock j = {j // block_k} of keys", fontsize=8, va="top")


class Cells:
    """Makes a figure of so many matrix cells and places axes in it in these units, from the top left: rows of matrices then line up."""

    def __init__(self, figure: Figure, width: float, height: float):
        figure.set_size_inches(width * CELL, height * CELL)
        self.figure, self.width, self.height = figure, width, height

    def __call__(self, x: float, y: float, columns: float, rows: float) -> Axes:
        return self.figure.add_axes((x / self.width, 1 - (y + rows) / self.height, columns / self.width, rows / self.height))


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


def tile_loop_gif(file: str | Path) -> None:
    """The README's picture: FlashAttention-2's forward over 3 × 3 tiles, drawn from the run of the reference algorithm."""
    random = torch.Generator().manual_seed(0)
    Q, K, V = torch.randn(3, 1, 1, 6, 2, generator=random).unbind()  # (1, 1, 6, 2) each
    _, steps = watch(flash_attention2_forward, Q, K, V, block_q=2, block_k=2)
    truth = normal_attention(Q, K, V)
    frames = [*range(len(steps)), len(steps) - 1]  # the last one twice as long
    player = animate(frames, lambda figure, n: draw_forward(figure, steps, n, Q, K, V, divide=True, truth=truth), dpi=90)
    save_gif(player, file, seconds=1.2)


def swatch(state: str, shape: type, *arguments, **options):
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

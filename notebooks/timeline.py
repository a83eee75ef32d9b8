"""A timeline of one block of an emulated kernel: a lane for each engine and warp, from the emulator's trace (`emulated.tracing()`)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from pictures import colour, swatch
from player import Player, animate

# How an event of an emulated kernel's trace is drawn: the colour's name, and what the legend says.
KINDS = {
    "exponentials": ("P", "softmax: P = exp(S − m)"),
    "arithmetic": ("done", "other work of the group"),
    "load": ("done", "other work of the group"),
    "product": ("S", "issues products"),
    "store": ("O", "O to shared memory"),
    "issue": ("in fast memory", "blocked: its products queue"),
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
    no warpgroups), and the warp that issues copies.

    now: later events are drawn pale, and a text beside each lane says what it does at that time, and what it waits for. barriers: names of
    mbarriers in these texts, as {"mbarrier 64": "K_full[0]"}.
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
    handles = [swatch(name, Patch, label=legend) for legend, name in used.items() if legend]
    if now is None:
        figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    else:  # texts differ in length from frame to frame: a fixed layout, so that nothing moves
        figure.legend(handles=handles, loc="lower center", ncols=6, frameon=False, fontsize=8)
        figure.subplots_adjust(left=0.1, right=0.8, top=0.92, bottom=0.25)


def play_timeline(trace: Any, times: Sequence[float], *, width: float = 12, dpi: int = 75, seconds: float = 1.5, **options) -> Player:
    """`draw_timeline` with buttons: a frame for each time. Other options are passed on to it."""
    lanes, *_ = _lanes(trace, options.get("launch", 1), options.get("block", 0))

    def draw(figure: Figure, now: float) -> None:
        draw_timeline(figure, trace, now=now, **options)

    return animate(times, draw, figsize=(width, 0.52 * len(lanes) + 1.7), dpi=dpi, seconds=seconds)


def turning_points(
    trace: Any, *, start: float = 0, end: float = float("inf"), launch: int = 1, block: int = 0, least: float = 100
) -> list[float]:
    """The times between `start` and `end` at which a product, softmax or wait of the computing groups begins: the steps of an animation.
    least: shorter events do not count, and of two times closer than this only the first counts."""
    _, names, _ = _lanes(trace, launch, block)
    mine = [e for e in trace.events if (e.launch, e.block) == (launch, block) and e.cycles >= least and start <= e.start < end]
    times: list[float] = []
    for event in sorted(mine, key=lambda e: e.start):
        of_group = event.actor == "warp" and event.warp in names and event.kind in ("wait", "exponentials", "store")
        if (of_group or event.actor == "tensor cores") and (not times or event.start - times[-1] >= least):
            times.append(event.start)
    return times


def _lanes(trace: Any, launch: int, block: int) -> tuple[list[str | int], dict[int, str], list[int]]:
    """The lanes of a timeline, engines by name and warps by number; the names of the warps that compute; the warps that issue copies."""
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
    """An event's colour, its text in the legend, and its text in the picture."""
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
        return "done", "issues copies", ""
    return name, legend, "softmax" if event.kind == "exponentials" else ""

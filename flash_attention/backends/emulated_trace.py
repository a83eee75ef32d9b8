"""The timeline of a launch by the emulator's cost model: what each warp and engine did, from when to when, in cycles of one multiprocessor.

A model, not a measurement: its constants, and where they come from, are in cuda/emulator/model.h.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from flash_attention.build import emulated

WORK = ("exponentials", "arithmetic", "load", "store", "product")  # activities of a warp; issue (being held up) and wait are not

# What a wgmma of these two tensors computes: A (rows), B (columns). An A that threads have computed has no name; a stored dS has one.
FORWARD = {("q", "k"): "S", ("", "k"): "S", ("", "v"): "O"}
BACKWARD = {("k", "q"): "S", ("v", "d_o"): "dP", ("", "d_o"): "dV", ("", "q"): "dK", ("", "k"): "dQ", ("the workspace", "k"): "dQ"}


class Event(NamedTuple):
    launch: int  # 1, 2 … of the call
    actor: str  # "warp", or an engine that all blocks of the multiprocessor share
    block: int  # in the grid; for an engine, the block whose request it serves
    warp: int
    kind: str  # exponentials, arithmetic, load, store, product, issue, wait, arrive; copy
    tensors: tuple[str, str]  # copied; or, of a product, A and B, where known
    about: str  # what a wait waits for; the group or phase that a product, a copy or an arrival belongs to
    amount: float  # bytes, FLOP, exponentials
    start: float  # cycles
    end: float
    place: str  # file:line
    name: str  # in a few words, for a picture: "S", "copy k" …

    @property
    def cycles(self) -> float:
        return self.end - self.start


@dataclass
class Trace:
    """One call of a launcher, forward or backward: the events of all its kernels."""

    file: str
    events: list[Event] = field(default_factory=list)

    @classmethod
    def read(cls, library: Path, report: str) -> "Trace":
        trace = cls(library.stem.partition("-")[0] + ".cu")
        for line in emulated.with_lines(report, library).splitlines():
            launch, actor, block, warp, kind, a, b, about, amount, start, end, place = line.split("\t")
            numbers = float(amount), float(start), float(end)
            name = f"{kind} {a}".rstrip()
            if kind == "wait":
                name = f"wait for {about}"
            elif kind == "product":  # of mma.sync, B alone is known
                products = BACKWARD if trace.file.startswith("backward") else FORWARD
                name = products.get((a, b), kind) if actor == "tensor cores" else f"{kind} {b}".rstrip()
            trace.events.append(Event(int(launch), actor, int(block), int(warp), kind, (a, b), about, *numbers, place, name))
        return trace

    @property
    def cycles(self) -> float:
        return max((event.end for event in self.events), default=0)

    def actors(self) -> dict[tuple[int, str], list[Event]]:
        """(launch, actor) → its events in order of time: "block 0 warp 4", "tensor cores" …"""
        found = defaultdict(list)
        for event in self.events:
            found[event.launch, f"block {event.block} warp {event.warp}" if event.actor == "warp" else event.actor].append(event)
        return {actor: sorted(found[actor], key=lambda event: event.start) for actor in sorted(found, key=_in_order)}

    def causes(self, wait: Event) -> list[Event]:
        """The copies, products or arrivals that a wait waited for."""
        anywhere = wait.about == "a number in global memory"
        same = [e for e in self.events if e.about == wait.about and e.launch == wait.launch and (anywhere or e.block == wait.block)]
        return [e for e in same if e.kind not in ("wait", "issue")]

    def roles(self) -> dict[tuple[int, int, int], str]:
        """(launch, block, warp) → "products" for warps whose warpgroup issues products, "copies" for those that issue copies."""
        roles = {}
        for event in self.events:
            key = event.launch, event.block, event.warp
            if event.kind == "product":
                for warp in range(event.warp, event.warp + (4 if event.actor == "tensor cores" else 1)):
                    roles[event.launch, event.block, warp] = "products"
            elif event.actor == "copies in" and event.about.startswith("mbarrier"):
                roles.setdefault(key, "copies")
        return roles


def _in_order(actor: tuple[int, str]) -> tuple:
    """Engines first, then warps by number."""
    launch, name = actor
    words = name.split()
    return (launch, 1, int(words[1]), int(words[3])) if words[0] == "block" else (launch, 0, name)


def summary(trace: Trace) -> list[str]:
    """One line for each actor: how busy it is, and what it waits for."""
    lines = []
    roles = trace.roles()
    span: dict[int, list[float]] = defaultdict(lambda: [float("inf"), 0.0])
    for event in trace.events:
        span[event.launch] = [min(span[event.launch][0], event.start), max(span[event.launch][1], event.end)]
    launch_before = None
    for (launch, name), events in trace.actors().items():
        if launch != launch_before:
            lines.append(f"kernel {launch}: {span[launch][1] - span[launch][0]:,.0f} cycles of the model")
            launch_before = launch
        whole = span[launch][1] - span[launch][0]
        if name.startswith("block"):
            by_kind: dict[str, float] = defaultdict(float)
            for event in events:
                by_kind[event.kind] += event.cycles
            busy, held, waits = sum(by_kind[kind] for kind in WORK), by_kind["issue"], by_kind["wait"]
            role = roles.get((launch, events[0].block, events[0].warp), "")
            lines.append(
                f"  {name:<22}{role:<10}{busy / whole:>6.0%} busy{held / whole:>6.0%} held up by its products{waits / whole:>6.0%} waiting"
            )
        else:
            lines.append(f"  {name:<32}{sum(event.cycles for event in events) / whole:>6.0%} busy")
    return lines


def chrome(traces: Iterable[Trace]) -> dict:
    """For Perfetto (https://ui.perfetto.dev) or chrome://tracing: the Trace Event Format. A microsecond there is a cycle.

    Processes are the multiprocessor's engines and each block; their threads are engines and warps. Arrows lead from copies and products to
    the waits that they end.
    """
    out = []
    offset = 0.0
    for number, trace in enumerate(traces):
        ids: dict[tuple[int, str], tuple[int, int]] = {}
        roles = trace.roles()
        for n, ((launch, name), events) in enumerate(trace.actors().items()):
            warp = name.startswith("block")
            process = 100_000 * number + 1000 * launch + (1 + events[0].block if warp else 0)
            ids[launch, name] = process, (events[0].warp if warp else n)
            title = f"{trace.file}, kernel {launch}: " + (f"block {events[0].block}" if warp else "engines")
            role = roles.get((launch, events[0].block, events[0].warp), "")
            track = f"warp {events[0].warp} {role}".rstrip() if warp else name
            out += [
                {"ph": "M", "name": "process_name", "pid": process, "args": {"name": title}},
                {"ph": "M", "name": "process_sort_index", "pid": process, "args": {"sort_index": process}},
                {"ph": "M", "name": "thread_name", "pid": process, "tid": ids[launch, name][1], "args": {"name": track}},
            ]
        causes = defaultdict(list)
        for event in trace.events:
            if event.about and event.actor != "warp":
                causes[event.launch, event.block, event.about].append(event)
        for (launch, name), events in trace.actors().items():
            process, thread = ids[launch, name]
            at = {"pid": process, "tid": thread, "cat": trace.file}
            for event in events:
                details = {"place": event.place, "about": event.about, "amount": event.amount}
                slot = {**at, "name": event.name, "ts": offset + event.start, "args": details}
                out.append({**slot, "ph": "i", "s": "t"} if event.kind == "arrive" else {**slot, "ph": "X", "dur": event.cycles})
                if event.kind == "wait" and (ended_by := causes[launch, event.block, event.about]):
                    cause = max(ended_by, key=lambda e: e.end)
                    source_process, source_thread = ids[launch, cause.actor]
                    arrow = {"name": "ends", "cat": trace.file, "id": len(out)}
                    source = {"pid": source_process, "tid": source_thread, "ts": offset + cause.start}
                    out += [
                        {**arrow, **source, "ph": "s"},
                        {**arrow, "ph": "f", "bp": "e", "pid": process, "tid": thread, "ts": offset + event.end},
                    ]
        offset += trace.cycles
    return {"traceEvents": out, "displayTimeUnit": "ns", "otherData": {"unit": "1 µs here is 1 cycle of the emulator's cost model"}}

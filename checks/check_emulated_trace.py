"""The emulator's traces are consistent: engines do one thing at a time, a wait ends when its cause does, and work takes as long as the
model says.

How close the model's cycles are to a GPU's is another question (LOG.md).
"""

import functools
import itertools
import json
from collections import defaultdict

import pytest
import torch
from check_emulator import run_fault
from harness import run_alone

from flash_attention import flash_attention
from flash_attention.backends import BACKENDS, emulated, emulated_trace, masks
from flash_attention.backends.emulated_trace import Trace

if reason := BACKENDS["emulated:simple"]._why_no_kernels(0):
    pytest.skip(reason, allow_module_level=True)

CASES = [("simple", 64), ("mma", 64), ("tensor_core", 64), ("hopper", 64), ("hopper", 128), ("hopper", 256)]
BOTH = [(name, D, part) for name, D in CASES for part in (0, 1)]


def traced(name: str, D: int, seed: int = 0, N: int = 136) -> tuple[list[Trace], list[emulated.Counts]]:
    """A forward and a backward at B 1 H 1 Nq 136 Nk 236, causal: several tiles, some cut."""
    random = torch.Generator().manual_seed(0)
    dtype = torch.float32 if name == "simple" else torch.float16
    q, k, v, dO = (torch.randn(1, 1, rows, D, dtype=dtype, generator=random) for rows in (N, N + 100, N + 100, N))
    emulated.options.seed = seed
    try:
        with emulated.tracing() as traces, emulated.counting() as counts:
            flash_attention(*(x.requires_grad_() for x in (q, k, v)), causal=True, backend=f"emulated:{name}").backward(dO)
    finally:
        emulated.options.seed = 0
    return traces, counts


once = functools.cache(traced)


@functools.cache
def model() -> dict[str, float]:
    """The constants of cuda/emulator/model.h."""
    library = emulated._helper_library(masks.PACK_MASK, masks.PACK_PARAMS.size, None)
    return {name: float(value) for name, value, *_ in (line.split("\t") for line in library.emulator_model().decode().splitlines())}


@pytest.mark.parametrize(("name", "D", "part"), BOTH)
def check_everybody_is_there(name, D, part):
    trace = once(name, D)[0][part]
    kinds = {event.kind for event in trace.events}
    assert kinds >= {"exponentials", "wait", "copy", "store", "arrive"} | ({"product"} if name != "simple" else set())
    assert all(event.end >= event.start >= 0 for event in trace.events)
    assert all(".cu" in event.place for event in trace.events), {event.place for event in trace.events if ".cu" not in event.place}
    tensors = {event.tensors[0] for event in trace.events if event.actor == "copies in"}
    assert tensors >= {"q", "k", "v"}, tensors
    if name == "hopper":
        roles = trace.roles()
        assert {"products", "copies"} <= set(roles.values())
        products = {event.name for event in trace.events if event.kind == "product"}
        assert products == ({"S", "dP", "dV", "dK", "dQ"} if part else {"S", "O"}), products


@pytest.mark.parametrize(("name", "D", "part"), BOTH)
def check_one_thing_at_a_time(name, D, part):
    """Neither an engine's events nor a warp's overlap; kernels of one call follow one another."""
    before = 0.0
    trace = once(name, D)[0][part]
    for launch in sorted({event.launch for event in trace.events}):
        assert min(event.start for event in trace.events if event.launch == launch) >= before
        before = max(event.end for event in trace.events if event.launch == launch)
    for actor, events in trace.actors().items():
        lasting = [event for event in events if event.kind != "arrive"]
        for first, second in itertools.pairwise(lasting):
            assert first.end <= second.start, f"{actor}: {first} and {second}"


@pytest.mark.parametrize(("name", "D", "part"), BOTH)
def check_waits_end_with_their_causes(name, D, part):
    trace = once(name, D)[0][part]
    later = {"product": model()["WGMMA_LATENCY"]}
    causes = defaultdict(list)
    for event in trace.events:
        if event.about and event.kind not in ("wait", "issue"):
            causes[event.launch, event.block, event.about].append(event.end + later.get(event.kind, 0))
    waits = [event for event in trace.events if event.kind == "wait"]
    assert waits
    for wait in waits:
        if wait.about.startswith("the other warps"):  # of those that arrive later, one ends an activity at that time
            group = range(wait.warp // 4 * 4, wait.warp // 4 * 4 + 4)
            ends = [e.end for e in trace.events if e.actor == "warp" and e.block == wait.block and e.warp in group and e.warp != wait.warp]
            assert wait.end in ends, wait
        else:
            assert wait.end == max(causes[wait.launch, wait.block, wait.about]), wait
            assert trace.causes(wait)


@pytest.mark.parametrize(("name", "D", "part"), BOTH)
def check_work_takes_its_time(name, D, part):
    """Products and copies take the time of the counted amounts at the model's rate."""
    traces, counts = once(name, D)
    events, total, constant = traces[part].events, counts[part].total, model()
    cycles, amount = defaultdict(float), defaultdict(float)
    for event in events:
        engine = event.actor.rstrip(" 0123")
        cycles[engine] += event.cycles
        amount[engine] += event.amount
    assert amount["tensor cores"] == total.get("FLOP by wgmma", 0)
    assert cycles["tensor cores"] == total.get("FLOP by wgmma", 0) / constant["TENSOR_FLOP"]
    assert amount["tensor core"] == total.get("FLOP by mma.sync", 0)
    assert cycles["tensor core"] == total.get("FLOP by mma.sync", 0) / (constant["TENSOR_FLOP"] / 4) * constant["MMA_SLOWER"]
    read = sum(
        total.get(f"global bytes {path}", 0)
        for path in ("read by threads", "by cp.async", "by tensor map, to shared memory", "by cp.async.bulk")
    )
    assert amount["copies in"] == read
    assert cycles["copies in"] == read / constant["L2_BYTES"]
    written = sum(
        total.get(f"global bytes {path}", 0) for path in ("written by threads", "added to by red", "by tensor map, from shared memory")
    )
    assert amount["copies out"] == written
    # A warp's exponentials count for all its lanes, and lanes that do not do them with the others do so one after another.
    assert total["exponentials"] <= amount["exponentials"] <= 1.5 * total["exponentials"]
    assert cycles["exponentials"] == amount["exponentials"] / 32 * constant["EXPONENTIAL"]


@pytest.mark.parametrize(("name", "D"), CASES)
def check_same_whatever_the_seed(name, D):
    """The emulator's order of threads is random, but a trace depends only on the model."""
    first, *others = (traced(name, D, seed)[0] if seed else once(name, D)[0] for seed in range(3))
    for other in others:
        for one, another in zip(first, other, strict=True):
            assert one.events == another.events


def check_turns():
    """Blocks that share the multiprocessor and wait for each other through global memory."""
    emulated.options.resident = 4
    try:
        with emulated.tracing() as traces:
            run_fault("turn_taken_twice", False, 0)
    finally:
        emulated.options.resident = 2
    signals = [event for event in traces[0].events if event.about == "a number in global memory"]
    waits = [event for event in signals if event.kind == "wait"]
    told = {event.start + model()["SIGNAL"] for event in signals if event.kind == "arrive"}
    assert waits and all(wait.end in told for wait in waits)


def check_hopper_overlaps():
    """The overlap for which `hopper` is built is visible: exponentials of one group under products of another, and copies under both."""
    (forward, _), _ = traced("hopper", 128, N=412)
    events = [event for event in forward.events if event.end > event.start]
    products = [event for event in events if event.actor == "tensor cores"]

    def under_products(chosen: list) -> float:
        """The fraction of these cycles that overlaps products of other warpgroups."""
        shared = sum(max(0, min(e.end, p.end) - max(e.start, p.start)) for e in chosen for p in products if p.warp // 4 != e.warp // 4)
        return shared / sum(e.cycles for e in chosen)

    assert under_products([e for e in events if e.actor == "warp" and e.kind == "exponentials"]) > 0.3
    assert under_products([e for e in events if e.actor == "copies in"]) > 0.3


def check_chrome_format():
    """Perfetto's: every slice has a length and a named thread, every arrow two ends."""
    traces, _ = once("hopper", 64)
    events = json.loads(json.dumps(emulated_trace.chrome(traces)))["traceEvents"]
    named = {(e["pid"], e["tid"]) for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    slices = [e for e in events if e["ph"] == "X"]
    assert len(slices) == sum(event.kind != "arrive" for trace in traces for event in trace.events)
    assert all(e["dur"] >= 0 and (e["pid"], e["tid"]) in named for e in slices)
    starts, ends = ({e["id"]: e for e in events if e["ph"] == which} for which in "sf")
    assert starts and starts.keys() == ends.keys()
    assert all(starts[n]["ts"] <= ends[n]["ts"] for n in starts)
    assert len({e["args"]["place"] for e in slices}) > 10
    assert all(emulated_trace.summary(trace) for trace in traces)


if __name__ == "__main__":
    run_alone(__file__)

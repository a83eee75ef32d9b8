"""Timing. The contenders take turns in one process, so that a temporary slowdown of the machine affects all of them."""

import math
import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

from benchmarks.contenders import Contender, Runner

LONG = 10.0  # seconds; a call that takes longer is repeated only as often as a median needs


FLUSHES = 16  # at least; they keep an H200 busy for about half a millisecond
FLUSH_US = 25.0  # that one takes at least


class Clock:
    """Time between marks, in ms: events on the current CUDA stream, the wall clock elsewhere.

    On CUDA the GPU is first kept busy while the host queues the call that is timed. So these are GPU times, as in a model whose host runs
    ahead of the GPU. `host_time` measures the host alone.
    """

    def __init__(self, device: str):
        self.cuda = torch.device(device).type == "cuda"
        if self.cuda:
            # Twice the size of the L2 cache: writing it evicts the inputs, as other layers do in a model.
            self.device = torch.device(device)
            size = torch.cuda.get_device_properties(self.device).L2_cache_size
            self.flush = torch.empty(2 * size, dtype=torch.int8, device=self.device)

    def start(self, host_us: float = 0.0) -> None:
        """host_us: what the host needs to queue what is timed; the GPU is busy for at least twice as long."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
            for _ in range(max(FLUSHES, math.ceil(2 * host_us / FLUSH_US))):
                self.flush.zero_()
        self.marks = [self._now()]

    def mark(self) -> None:
        self.marks.append(self._now())

    def stop(self) -> list[float]:
        """ms from each mark to the next."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if self.cuda:
            torch.cuda.synchronize(self.device)
            return [before.elapsed_time(after) for before, after in pairs]
        return [1e3 * (after - before) for before, after in pairs]

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


def time_once(runner: Runner, clock: Clock, host_us: float = 0.0) -> dict[str, float]:
    """ms of each stage of one call, and of all together as "total"."""
    with runner.context():
        result = None
        clock.start(host_us)
        for stage in runner.stages.values():
            result = stage(result)
            clock.mark()
        times = clock.stop()
    return {**dict(zip(runner.stages, times, strict=True)), "total": sum(times)}


def time_alternating(
    runners: Mapping[Contender, Runner],
    repeats: int | Mapping[Contender, int] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[Contender, dict[str, list[float]]]:
    """ms of every repeat of every stage, after one call each to warm up. `progress` is told what runs next.

    repeats: None takes as many as fit in about 2 s, at least 5 and at most 50; 3 if a call takes over 10 s. Warming up is a small part of
    such a long call, so the first call counts too.
    """
    clock = Clock(next(iter(runners.values())).case.device)
    times: dict[Contender, list[dict[str, float]]] = {}
    first, host_us = {}, {}
    for contender, runner in runners.items():
        progress(f"{contender}, warming up")
        first[contender] = time_once(runner, clock)
        longer = first[contender]["total"] >= 1e3  # the host runs ahead in any case
        host_us[contender] = 0.0 if longer else host_time(runner, calls=5) or 0.0
        times[contender] = [first[contender]] if first[contender]["total"] > 1e3 * LONG else []
    if repeats is None:
        # A repeat consists of the call and, before it, twice the host's time to flush.
        seconds = [1e-3 * first[each]["total"] + 2e-6 * host_us[each] for each in first]
        repeats = 3 if max(seconds) > LONG else min(max(5, round(2 / max(sum(seconds), 1e-6))), 50)
    wanted = dict.fromkeys(runners, repeats) if isinstance(repeats, int) else repeats
    rounds = max(wanted.values())
    progress("timing")
    for n in range(1, rounds + 1):
        for contender, runner in runners.items():
            if len(times[contender]) >= wanted[contender]:
                continue
            if first[contender]["total"] > 1e3:  # for shorter calls, messages would change too fast to be read
                progress(f"{contender}, round {n} of {rounds}")
            times[contender].append(time_once(runner, clock, host_us[contender]))
    return {contender: {stage: [each[stage] for each in calls] for stage in calls[0]} for contender, calls in times.items()}


def host_time(runner: Runner, calls: int) -> float | None:
    """µs of CPU time until one call returns, while the GPU still works; None without a GPU."""
    device = torch.device(runner.case.device)
    if device.type != "cuda":
        return None
    runner()
    with runner.context():
        times = []
        for _ in range(calls):
            torch.cuda.synchronize(device)  # an empty queue: a full one would make the call wait for the GPU
            start = time.perf_counter()
            result = None
            for stage in runner.stages.values():
                result = stage(result)
            times.append(time.perf_counter() - start)
        torch.cuda.synchronize(device)
    return 1e6 * median(times)


def matmul_limit(device: str, dtype: str, size: int | None = None) -> float:
    """TFLOP/s of one large square matrix product in this dtype: an upper bound for attention, which consists of matrix products.

    size: of each side; None takes one that is large enough for the device to reach its full rate.
    """
    size = size or (8192 if torch.device(device).type == "cuda" else 1024)
    A, B = torch.randn(2, size, size, device=device).to(getattr(torch, dtype))
    clock = Clock(device)
    times = []
    for _ in range(8):
        clock.start()
        A @ B
        clock.mark()
        times += clock.stop()
    return 2 * size**3 / (median(times[3:]) * 1e-3) / 1e12

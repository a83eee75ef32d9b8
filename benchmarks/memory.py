"""Peak memory above the inputs, in MB (1e6 bytes).

On CUDA the caching allocator's peak. On a CPU the rise in peak resident memory, in a fresh process for each contender: pages that an
earlier call left behind would hide what the next one needs. A small call goes first, so that libraries starting up are not counted.
"""

import ctypes
import gc
import multiprocessing
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.case import Case, random_inputs
from benchmarks.contenders import Contender, Runner

WARM_UP_LENGTH = 128
# Where the system can fork, a fresh process is a fork of one that has imported torch and done nothing else: importing takes seconds.
START = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
if START.get_start_method() == "forkserver":
    START.set_forkserver_preload(["torch", "flash_attention"])


def peak_memory(contender: Contender, case: Case) -> float | None:
    """MB above the inputs at the peak of a call; whatever the contender has to make first, such as a mask, counts. None if the system does
    not report it, or killed the process because memory ran out."""
    if torch.device(case.device).type == "cuda":
        return _cuda_peak(contender, case)
    ours, theirs = START.Pipe(duplex=False)
    child = START.Process(target=_measure, args=(theirs, contender, case, torch.get_num_threads()))
    child.start()
    theirs.close()  # the child has the only other end: if it is killed, recv() raises instead of waiting
    try:
        return ours.recv()
    except EOFError:
        return None
    finally:
        child.join()


def peak_rise(call: Callable[[], object]) -> float | None:
    """MB by which this process's peak resident memory during `call` exceeds its resident memory before; None where unknown."""
    gc.collect()
    _return_freed_pages()
    _forget_peak()
    before = _resident()
    result = call()  # kept until the peak is read: what a call returns is part of what it needs
    after = _peak_resident()
    del result
    return None if before is None or after is None else (after - before) / 1e6


def _cuda_peak(contender: Contender, case: Case) -> float:
    inputs = random_inputs(case)
    torch.cuda.synchronize(case.device)
    torch.cuda.reset_peak_memory_stats(case.device)
    before = torch.cuda.memory_allocated(case.device)
    Runner(contender, case, inputs)()
    torch.cuda.synchronize(case.device)
    return (torch.cuda.max_memory_allocated(case.device) - before) / 1e6


def _return_freed_pages() -> None:
    """glibc keeps some freed pages: if `call` reused them, they would not count as a rise."""
    with suppress(OSError, AttributeError, TypeError):  # other systems
        ctypes.CDLL(None).malloc_trim(0)


def _forget_peak() -> None:
    """Linux: resets the peak to what is resident now. If that is refused, a later peak below the old one cannot be seen."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _resident() -> int | None:
    """Bytes of this process in memory now."""
    return _status("VmRSS") or _peak_of_life()


def _peak_resident() -> int | None:
    """Bytes of this process in memory at most. Not ru_maxrss where it can be helped: on Linux a child inherits its parent's."""
    return _status("VmHWM") or _peak_of_life()


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def _peak_of_life() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _measure(result: Connection, contender: Contender, case: Case, threads: int) -> None:
    """In the fresh process."""
    torch.set_num_threads(threads)
    small = case.shortened(WARM_UP_LENGTH)
    Runner(contender, small, random_inputs(small))()
    inputs = random_inputs(case)
    result.send(peak_rise(lambda: Runner(contender, case, inputs)()))

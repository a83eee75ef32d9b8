"""Threads that each compute whole pieces of a CPU call.

PyTorch spreads each operation over its threads and waits at its end for the slowest. A tile loop is thousands of operations, so a core that
is busy elsewhere holds up the others thousands of times. Here each thread takes a piece, runs that piece's operations alone, and takes the
next: nobody waits before the last piece.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait

import torch

# Elsewhere the number of threads is one for the whole process, or can no longer be changed.
AVAILABLE = "backend: OpenMP" in torch.__config__.parallel_info()

_starting = threading.Lock()
_caller = threading.local()  # as in OpenMP, each calling thread has workers of its own


def run(work: Callable[..., None], pieces: Iterable[tuple]) -> None:
    """work(*piece) for every piece, on torch.get_num_threads() workers, or on the calling thread if that is 1.

    The first exception in a piece is raised here; pieces that have not started by then are dropped.
    """
    left = deque(pieces)
    threads = min(torch.get_num_threads(), len(left))
    if threads < 2 or not AVAILABLE:
        return _take(work, left)
    inference = torch.is_inference_mode_enabled()
    jobs = []
    try:
        pool = _workers(torch.get_num_threads())
        for _ in range(threads):
            jobs.append(pool.submit(_take_alone, work, left, inference))
    except RuntimeError:  # no thread can start any more: a limit of the system, or the interpreter is ending
        if not jobs:
            _take(work, left)
    try:
        wait(jobs)
        for job in jobs:
            job.result()
    finally:
        left.clear()
        jobs.clear()  # an exception's traceback holds this frame, and a job its exception


def _take(work: Callable[..., None], left: deque[tuple]) -> None:
    try:
        while left:
            try:
                piece = left.popleft()
            except IndexError:  # another worker took the last one
                return
            work(*piece)
    except BaseException:
        left.clear()
        raise


def _take_alone(work: Callable[..., None], left: deque[tuple], inference: bool) -> None:
    """`_take` in a worker, under the settings of PyTorch that each thread has for itself and that matter inside an op."""
    with torch.inference_mode(inference), torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        _take(work, left)


def _workers(threads: int) -> ThreadPoolExecutor:
    """The calling thread's, started when first needed and again when torch.set_num_threads changed their number."""
    if getattr(_caller, "threads", None) != threads:
        _caller.pool = ThreadPoolExecutor(threads, "flash_attention", _compute_alone)  # the previous one's threads end with it
        _caller.threads = threads
    return _caller.pool


def _compute_alone() -> None:
    """One thread for each operation of the worker that starts. torch.set_num_threads also sets what threads that start later begin with:
    another thread sets that back."""
    with _starting:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        other = threading.Thread(target=torch.set_num_threads, args=(before,))
        other.start()
        other.join()


def _after_fork() -> None:
    """A child process has none of its parent's threads."""
    global _starting, _caller
    _starting, _caller = threading.Lock(), threading.local()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

"""Threads that each compute whole pieces of a CPU call.

PyTorch spreads each operation over its threads and then waits for the slowest. A tile loop is thousands of operations, so a core that
is busy with another program delays the others thousands of times. Here a thread takes a piece, runs that piece's operations alone, and
takes
the next one: threads wait for each other only after the last piece.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait

import torch

# Thread pools other than OpenMP's have one number of threads for the whole process, or do not allow changing it.
AVAILABLE = "backend: OpenMP" in torch.__config__.parallel_info()
# Between operations a worker holds Python's lock: more workers than this would wait for it. Instead each uses more threads.
MAX_WORKERS = 8

_starting = threading.Lock()
_caller = threading.local()  # as in OpenMP, each calling thread has its own workers


def in_turn(work: Callable[..., None], pieces: Iterable[tuple]) -> None:
    """Calls work(*piece) for one piece after another; PyTorch spreads each over all threads."""
    for piece in pieces:
        work(*piece)


def run(work: Callable[..., None], pieces: Iterable[tuple]) -> None:
    """Calls work(*piece) for every piece, on workers that share torch.get_num_threads() threads; on the calling thread if that is 1.

    An exception in a piece is raised here; pieces that have not started by then are dropped.
    """
    left = deque(pieces)
    threads = torch.get_num_threads()
    if threads == 1 or len(left) < 2 or not AVAILABLE:
        return in_turn(work, left)
    inference = torch.is_inference_mode_enabled()
    jobs = []
    try:
        try:
            for worker in _workers(threads)[: len(left)]:
                jobs.append(worker.submit(_take, work, left, inference))
        except RuntimeError:  # no more threads can start: a limit of the system, or the interpreter is shutting down
            if not jobs:
                return in_turn(work, left)
        wait(jobs)
        for job in jobs:
            job.result()
    finally:  # also if an interrupt arrives before all workers have their job
        left.clear()
        jobs.clear()  # breaks a cycle: an exception's traceback keeps this frame alive, and a job keeps its exception


def _take(work: Callable[..., None], left: deque[tuple], inference: bool) -> None:
    """Takes pieces until none is left, under those thread-local settings of the caller that matter inside an op."""
    try:
        with torch.inference_mode(inference), torch._C.DisableTorchFunctionSubclass():
            while left:
                try:
                    piece = left.popleft()
                except IndexError:  # another worker took the last one
                    return
                work(*piece)
    except BaseException:
        left.clear()
        raise


def _workers(threads: int) -> list[ThreadPoolExecutor]:
    """The calling thread's workers, one thread each. When torch.set_num_threads has changed the number, they end and new ones start."""
    if getattr(_caller, "threads", None) != threads:
        count = min(threads, MAX_WORKERS)
        _caller.workers = [ThreadPoolExecutor(1, "flash_attention", _use_threads, (threads // count,)) for _ in range(count)]
        _caller.threads = threads
    return _caller.workers


def _use_threads(number: int) -> None:
    """Sets the number of threads for this thread's operations. torch.set_num_threads also changes what later threads start with: another
    thread restores that."""
    with _starting:
        before = torch.get_num_threads()
        torch.set_num_threads(number)
        other = threading.Thread(target=torch.set_num_threads, args=(before,))
        other.start()
        other.join()


def _after_fork() -> None:
    """A child process has none of its parent's threads."""
    global _caller
    _caller = threading.local()
    _starting.release()


if hasattr(os, "register_at_fork"):  # no fork while a worker starts: the child would keep the worker's number of threads
    os.register_at_fork(before=_starting.acquire, after_in_parent=_starting.release, after_in_child=_after_fork)

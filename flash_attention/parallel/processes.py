"""Processes on this machine as the ranks of one gloo group: each runs a function and returns its result. For trials and checks.

A process that hangs is killed: a fault must be an error on every rank within the group's timeout.
"""

import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

GROUP_SECONDS = 120
# Processes are forked from one that has already imported torch, so that they start quickly.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "flash_attention.parallel"])


class Raised(NamedTuple):
    """An exception on a rank."""

    kind: str
    message: str
    seconds: float  # since the group began


def run(ranks: int, function: Callable, *arguments, seconds: float = GROUP_SECONDS, dead: tuple[int, ...] = ()) -> list:
    """The results of `function(rank, *arguments)` on each rank of a gloo group with a timeout of `seconds`, or `Raised`; None for the ranks
    in `dead`, which may end in any way. A new process must be able to import the function."""
    with tempfile.TemporaryDirectory() as folder:
        return _run(ranks, function, arguments, Path(folder), seconds, dead)


def _run(ranks: int, function: Callable, arguments: tuple, folder: Path, seconds: float, dead: tuple[int, ...]) -> list:
    processes = [CONTEXT.Process(target=_main, args=(rank, ranks, seconds, str(folder), function, arguments)) for rank in range(ranks)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 60 + 2 * seconds
    try:
        for rank, process in enumerate(processes):
            if rank not in dead:
                process.join(max(0, deadline - time.monotonic()))
                if process.exitcode != 0:
                    how = "hangs" if process.exitcode is None else f"ended with exit code {process.exitcode}"
                    raise RuntimeError(f"rank {rank} {how}")
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [None if rank in dead else pickle.loads((folder / f"result_{rank}").read_bytes()) for rank in range(ranks)]


def results(ranks: int, function: Callable, *arguments, **options) -> list:
    """The same.

    Raises:
        RuntimeError: an exception on any rank.
    """
    found = run(ranks, function, *arguments, **options)
    for rank, result in enumerate(found):
        if isinstance(result, Raised):
            raise RuntimeError(f"rank {rank} raised {result.kind}: {result.message}")
    return found


def _main(rank: int, ranks: int, seconds: float, folder: str, function: Callable, arguments: tuple) -> None:
    """One rank."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=seconds))
    dist.barrier()
    began = time.monotonic()
    try:
        result = function(rank, *arguments)
    except Exception as error:
        result = Raised(type(error).__name__, str(error), time.monotonic() - began)
    partial = Path(folder, f"partial_{rank}")
    partial.write_bytes(pickle.dumps(result))
    partial.replace(Path(folder, f"result_{rank}"))
    if not isinstance(result, Raised):
        dist.barrier()  # a rank that exits closes its connections, which others may still need
    os._exit(0)  # without waiting for ranks that are dead

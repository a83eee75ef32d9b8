"""Several processes of one torch.distributed group, for checks: each runs a function, and hands back what it returns.

A process that hangs is killed, and fails the check: a fault must be an error on every rank within the group's timeout.
"""

import multiprocessing
import os
import pickle
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

GROUP_SECONDS = 60
# Processes are forked from one that has imported torch: they start at once.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "flash_attention.parallel"])


class Raised(NamedTuple):
    """An exception on a rank."""

    kind: str
    message: str
    seconds: float  # since the group began


def run(ranks: int, function: Callable, *arguments, folder: Path, seconds: float = GROUP_SECONDS, dead: tuple[int, ...] = ()) -> list:
    """What `function(rank, *arguments)` returns on each rank of a gloo group with a timeout of `seconds`, or `Raised`; None for the ranks
    in `dead`, which may end in any way."""
    processes = [CONTEXT.Process(target=_main, args=(rank, ranks, seconds, str(folder), function, arguments)) for rank in range(ranks)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 60 + 2 * seconds
    try:
        for rank, process in enumerate(processes):
            if rank not in dead:
                process.join(max(0, deadline - time.monotonic()))
                assert process.exitcode == 0, f"rank {rank} {'hangs' if process.exitcode is None else f'ended with {process.exitcode}'}"
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [None if rank in dead else pickle.loads((folder / f"result_{rank}").read_bytes()) for rank in range(ranks)]


def results(ranks: int, function: Callable, *arguments, **options) -> list:
    """The same; an exception on any rank is an error."""
    found = run(ranks, function, *arguments, **options)
    for rank, result in enumerate(found):
        assert not isinstance(result, Raised), f"rank {rank} raised {result.kind}: {result.message}"
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
        dist.barrier()  # who leaves closes the connections of the others
    os._exit(0)  # without waiting for ranks that a check has killed

"""The record of a tile loop: `watch` runs one of the reference algorithms and keeps everything that its `observe` callback is given.

All pictures of a loop are drawn from that record. Nothing here computes attention.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def watch(algorithm: Callable, *arguments, **options) -> tuple[Any, list[SimpleNamespace]]:
    """Run a reference algorithm; return its result and one record for each tile, in the order of the loop.

    A record has as attributes everything that `observe` was given: i, j and copies of the tensors.
    """
    steps: list[SimpleNamespace] = []

    def observe(**shown) -> None:
        steps.append(SimpleNamespace(**{name: x.clone() if isinstance(x, Tensor) else x for name, x in shown.items()}))

    return algorithm(*arguments, observe=observe, **options), steps


def matrix(X: Any) -> Tensor:
    """X as a 2-dimensional float64 tensor: leading dimensions of size 1 (batch, head) are dropped, a vector becomes a column."""
    X = torch.as_tensor(X).detach().double().cpu()
    while X.dim() > 2:
        if X.shape[0] != 1:
            raise ValueError(f"one batch and one head can be drawn, got shape {tuple(X.shape)}")
        X = X[0]
    return X if X.dim() == 2 else X.reshape(-1, 1)


def traffic(steps: Sequence[SimpleNamespace], D: int, Dv: int) -> dict[str, int]:
    """Elements that move between slow and fast memory, from the order in which a forward visited its tiles.

    Fast memory holds one tile of each matrix. A tile of Q, K or V is read unless the previous step used it too; a tile of O is written
    when another replaces it, and read when it is needed again. Not counted: O's initial zeros, and m, l and LSE (two numbers a row or one).
    """
    moved = {"Q read": 0, "K read": 0, "V read": 0, "O read": 0, "O written": 0}
    seen, i, j = set(), None, None
    for step in steps:
        rows, columns = step.i.stop - step.i.start, step.j.stop - step.j.start
        if step.i != i:
            moved["Q read"] += rows * D
            moved["O written"] += rows * Dv  # each visit of a tile of O ends with a write
            moved["O read"] += rows * Dv * (step.i.start in seen)
        if step.j != j:
            moved["K read"] += columns * D
            moved["V read"] += columns * Dv
        i, j = step.i, step.j
        seen.add(i.start)
    return moved


def block_sizes(steps: Sequence[SimpleNamespace]) -> tuple[int, int]:
    """Rows and columns of a whole tile."""
    return max(s.i.stop - s.i.start for s in steps), max(s.j.stop - s.j.start for s in steps)


def rows_so_far(steps: Sequence[SimpleNamespace], name: str, N: int, divide: bool = False) -> Tensor:
    """m, l or O of all rows after the given steps: (N, columns), NaN where no tile has been seen. divide: O by l, where l > 0."""
    X = torch.full((N, matrix(getattr(steps[0], name)).shape[1]), float("nan"), dtype=torch.float64)
    for step in steps:
        value = matrix(getattr(step, name))
        X[step.i] = value / matrix(step.l).masked_fill(matrix(step.l) == 0, 1) if divide and name == "O" else value
    return X


def columns_so_far(steps: Sequence[SimpleNamespace], name: str, N: int) -> Tensor:
    """dK or dV of all keys after the given steps: (N, columns), NaN where no tile has been seen."""
    X = torch.full((N, matrix(getattr(steps[0], name)).shape[1]), float("nan"), dtype=torch.float64)
    for step in steps:
        X[step.j] = matrix(getattr(step, name))
    return X


def errors(steps: Sequence[SimpleNamespace], truth: Tensor, divide: bool) -> list[float]:
    """After each step: the largest |O − truth|; rows not yet reached count as 0, O's initial value."""
    truth = matrix(truth)
    return [float((rows_so_far(steps[: n + 1], "O", len(truth), divide).nan_to_num(0) - truth).abs().max()) for n in range(len(steps))]

"""Which columns a row sees, before any mask: an interval [start, stop). Defined here once, for loops, masks, schedules and pictures.

Row i stands at column i + diagonal. Three things limit what it sees, and all must allow:

    left      columns from i + diagonal − left on         right     columns up to i + diagonal + right; 0 is causal
    spans     columns from spans[i, 0] on, before spans[i, 1]: documents packed one after another, prefixes, chunks

The diagonal is Nk − Nq unless these are rows and columns out of a larger whole: the last row stands at the last column. cuda/visible.cuh
says the same for the kernels.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .tiles import blocks


@dataclass(frozen=True)
class Visible:
    """What each of Nq rows sees of Nk columns. None is no limit. spans: integers (B or 1, H or 1, Nq, 2), start and stop."""

    Nq: int
    Nk: int
    left: int | None = None
    right: int | None = None
    spans: Tensor | None = None
    diagonal: int | None = None

    def place(self, i: int) -> int:
        """The column at which row i stands."""
        return i + (self.Nk - self.Nq if self.diagonal is None else self.diagonal)

    def interval(self, i: int) -> tuple[int, int]:
        """Start and stop for row i, without the spans. Neither decreases from one row to the next."""
        start = 0 if self.left is None else max(0, self.place(i) - self.left)
        stop = self.Nk if self.right is None else min(self.Nk, self.place(i) + self.right + 1)
        return start, stop

    # ---- which tiles

    def columns(self, i: slice) -> slice:
        """The columns that some of rows i see, from the first to the last."""
        if i.stop <= i.start:
            return slice(0, 0)
        start, stop = self.interval(i.start)[0], self.interval(i.stop - 1)[1]
        if self.spans is not None:
            first, last = _least_and_greatest(self.spans[:, :, i], self.Nk)
            start, stop = max(start, first), min(stop, last)
        return slice(start, stop) if start < stop else slice(0, 0)

    def rows(self, j: slice) -> slice:
        """The rows that see some of columns j, from the first to the last."""
        if j.stop <= j.start:
            return slice(0, 0)
        start = 0 if self.right is None else max(0, j.start - self.right - self.place(0))
        stop = self.Nq if self.left is None else min(self.Nq, j.stop + self.left - self.place(0))
        if self.spans is not None and start < stop:
            first, last = self.spans[:, :, start:stop].unbind(-1)
            seeing = ((first < j.stop) & (last > j.start) & (first < last)).flatten(0, 1).any(0).nonzero()
            start, stop = (start + int(seeing[0]), start + int(seeing[-1]) + 1) if len(seeing) else (0, 0)
        return slice(start, stop) if start < stop else slice(0, 0)

    def tiles_of_columns(self, i: slice, size: int) -> Iterator[slice]:
        """The tiles of columns that rows i visit."""
        j = self.columns(i)
        return blocks(j.start, j.stop, size)

    def tiles_of_rows(self, j: slice, size: int) -> Iterator[slice]:
        """The tiles of rows that visit columns j."""
        i = self.rows(j)
        return blocks(i.start, i.stop, size)

    def whole(self, i: slice, j: slice) -> bool:
        """Whether every one of rows i sees all of columns j."""
        start, stop = self.interval(i.stop - 1)[0], self.interval(i.start)[1]
        if start > j.start or stop < j.stop:
            return False
        return self.spans is None or bool(((self.spans[:, :, i, 0] <= j.start) & (self.spans[:, :, i, 1] >= j.stop)).all())

    # ---- which elements

    def dense(self, i: slice, j: slice, device: torch.device | str | None = None) -> Tensor:
        """Rows i and columns j as a mask, bool (B or 1, H or 1, rows, columns), True = sees. All methods above describe this mask."""
        device = device if self.spans is None else self.spans.device
        row = torch.arange(i.start, i.stop, device=device)[:, None] + self.place(0)
        column = torch.arange(j.start, j.stop, device=device)
        sees = torch.ones(len(row), len(column), dtype=torch.bool, device=device)
        if self.left is not None:
            sees = sees & (column >= row - self.left)
        if self.right is not None:
            sees = sees & (column <= row + self.right)
        if self.spans is None:
            return sees[None, None]
        start, stop = self.spans[:, :, i].unsqueeze(-2).unbind(-1)  # (B or 1, H or 1, rows, 1)
        return sees & (column >= start) & (column < stop)

    def hide_(self, S: Tensor, i: slice, j: slice) -> Tensor:
        """In place: scores of rows i and columns j that are not seen become −inf. A tile that is seen whole is left alone."""
        if self.whole(i, j):
            return S
        if self.spans is not None:
            return S.masked_fill_(~self.dense(i, j), -math.inf)
        # Only columns that some row does not see are touched: ∞ is subtracted where they are hidden, 0 elsewhere. On a CPU that is twice as
        # fast as masked_fill_. tril_ and triu_ come first, because ∞ − ∞ is NaN.
        if self.right is not None and (first := self.interval(i.start)[1]) < j.stop:
            ending = S[..., max(first - j.start, 0) :]
            diagonal = self.place(i.start) + self.right - max(first, j.start)
            ending.tril_(diagonal).sub_(ending.new_full(ending.shape[-2:], math.inf).triu_(diagonal + 1))
        if self.left is not None and (last := self.interval(i.stop - 1)[0]) > j.start:
            beginning = S[..., : last - j.start]
            diagonal = self.place(i.start) - self.left - j.start
            beginning.triu_(diagonal).sub_(beginning.new_full(beginning.shape[-2:], math.inf).tril_(diagonal - 1))
        return S

    @property
    def is_limited(self) -> bool:
        """Whether anything but the mask may hide an element."""
        return self.right is not None or self.hides_earlier

    @property
    def hides_earlier(self) -> bool:
        """Whether a row may not see columns before its own: then few tiles are seen whole."""
        return self.left is not None or self.spans is not None

    @property
    def blinds(self) -> bool:
        """Whether some row may see nothing at all."""
        if self.spans is not None or self.Nk == 0:
            return True
        if self.Nq == 0:
            return False
        (_, first_stop), (last_start, _) = self.interval(0), self.interval(self.Nq - 1)
        return first_stop <= 0 or last_start >= self.Nk

    # ---- a part of the whole

    def part(self, i: slice, j: slice) -> "Visible":
        """The same for rows i and columns j, both counted from 0."""
        spans = None if self.spans is None else self.spans[:, :, i] - j.start
        return Visible(i.stop - i.start, j.stop - j.start, self.left, self.right, spans, self.place(i.start) - j.start)

    def of_heads(self, b: slice, h: slice) -> "Visible":
        """The same for some batches and heads."""
        if self.spans is None:
            return self
        chosen = (slice(None) if n == 1 else x for n, x in zip(self.spans.shape, (b, h), strict=False))
        return Visible(self.Nq, self.Nk, self.left, self.right, self.spans[tuple(chosen)], self.diagonal)


def _least_and_greatest(spans: Tensor, Nk: int) -> tuple[int, int]:
    """The least start and the greatest stop of those spans (…, 2) that are not empty."""
    start, stop = spans.unbind(-1)
    empty = start >= stop
    return int(start.masked_fill(empty, Nk).amin()), int(stop.masked_fill(empty, 0).amax())

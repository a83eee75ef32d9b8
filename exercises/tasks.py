"""The exercises: the inputs of each, the expected output, and the symptoms of its typical mistakes.

A task passes tensors to a kernel and judges its output, what the emulator counted, and, in one case, the order of events.
The message of `Wrong` is what the learner reads.

One file because tasks share their judging functions; each task is a section of its own.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flash_attention.backends.emulated import Counts

FOLDER = Path(__file__).resolve().parent
UNWRITTEN = -777.0  # what an output holds before the kernel starts


class Wrong(Exception):
    """The answer is wrong; the message says how, in words."""


@dataclass
class Task:
    """One exercise: a file with a blank, its inputs, and how the result is judged."""

    number: int
    file: str
    inputs: Callable[[], tuple[Tensor, ...]]
    sizes: tuple[int, ...]  # Problem::n
    shape: tuple[int, ...]  # of the output, float32
    expected: Callable[..., Tensor]  # of the inputs, in float64
    alternatives: tuple[tuple[Callable[..., Tensor], str], ...] = ()  # the result of a typical mistake, and the message for it
    hints: tuple[tuple[str, str], ...] = ()  # pattern of the emulator's message → hint
    judge: Callable[[Counts, list[tuple[int, int]]], None] = lambda counts, log: None
    tolerance: float = 1e-4
    min_arch: int = 80

    @property
    def path(self) -> Path:
        return FOLDER / self.file

    @property
    def solution(self) -> Path:
        return FOLDER / "solutions" / f"{self.path.stem}.cuh"

    def compare(self, out: Tensor, inputs: tuple[Tensor, ...]) -> None:
        """
        Raises:
            Wrong: the output is not what it should be.
        """
        out, inputs = out.cpu().double(), tuple(x.cpu().double() for x in inputs)
        if (missing := out == UNWRITTEN).any():
            if missing.all():
                raise Wrong("The kernel has written no output.")
            raise Wrong(f"{int(missing.sum())} of {out.numel()} numbers of the output were not written, first {first(missing)}.")
        want = self.expected(*inputs)
        if close(out, want, self.tolerance):
            return
        for mistaken, words in self.alternatives:
            if close(out, mistaken(*inputs), self.tolerance):
                raise Wrong(words)
        if (bad := ~out.isfinite()).any():
            raise Wrong(f"The output has NaN or infinity, first at {first(bad)}. Has something overflowed, or was it divided by 0?")
        error = (out - want).abs()
        raise Wrong(
            f"{int((error > self.tolerance).sum())} of {out.numel()} numbers are wrong, by up to {error.max():.3g}; first at "
            f"{first(error > self.tolerance)}."
        )

    def explain(self, message: str) -> str:
        """The hint for the emulator's message, if it is a typical one."""
        for pattern, words in (*self.hints, *HINTS):
            if re.search(pattern, message, re.DOTALL):
                return words
        return "The kernel broke a rule of CUDA."


def first(which: Tensor) -> str:
    return f"[{', '.join(str(int(n)) for n in which.nonzero()[0])}]"


def close(x: Tensor, y: Tensor, tolerance: float) -> bool:
    return bool(((x - y).abs() <= tolerance * y.abs().clamp(min=1)).logical_or(x.isnan() & y.isnan()).logical_or(x == y).all())


# The emulator's message → a hint, for all exercises.
HINTS = (
    (r"cp\.async of thread .* writes .* cp\.async of thread .* writes", "Two copies write to the same stage, and nothing orders them."),
    (
        r"thread \d+ reads it.* and cp\.async of thread \d+ .* writes",
        "A copy overwrites a stage that other threads still read: a __syncthreads() is missing before it is issued.",
    ),
    (
        r"cp\.async of thread \d+ .* writes .* thread \d+ reads",
        "A thread reads data before their copy has arrived: wait for the copy's group, and, for other threads' copies, meet at a "
        "barrier after it.",
    ),
    (
        r"reads shared byte \d+, which no thread has written",
        "A thread reads shared memory before another has written it: a __syncthreads() is missing between the stores and the loads.",
    ),
    (
        r"nothing orders .*thread \d+ (reads|writes) it.* thread \d+ (reads|writes) it",
        "One thread reads shared memory while another writes it, at the lines named below. A __syncthreads() between the stores "
        "and the loads makes a tile complete, another after the loads keeps the next stores from overwriting it: one of the two "
        "is missing.",
    ),
    (r"reads \d+ bytes outside of all memory", "The kernel reads beyond the end of an input: a tile may reach further than the matrix."),
    (
        r"writes \d+ bytes outside of all memory",
        "The kernel writes beyond the end of the output: a tile may reach further than the matrix.",
    ),
    (r"outside of the block's|of dynamic shared memory, of which the launch asked", "An address lies beyond the block's shared memory."),
    (r"hangs", "The block hangs: a thread waits for something that never happens."),
    (
        r"ended without waiting for its cp\.async",
        "The kernel ends while copies are still in flight: the last groups must be waited for, or not be issued at all.",
    ),
)


# ---- 1: one row, one warp


def rows_of_every_size() -> tuple[Tensor, ...]:
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(1))
    x[1] *= 400  # overflows, unless the maximum is subtracted first
    x[2] -= 500  # underflows, unless it is
    return (x,)


def by_lanes(x: Tensor) -> Tensor:
    """[rows, 300] → [rows, 10, 32]: a lane's columns along dimension 1, padded with −∞."""
    return torch.nn.functional.pad(x, (0, 20), value=-torch.inf).unflatten(1, (10, 32))


def own_sums(x: Tensor) -> Tensor:
    e = (by_lanes(x) - x.amax(1)[:, None, None]).float().exp()
    return (e / e.sum(1, keepdim=True)).flatten(1)[:, :300].double()


def own_maxima(x: Tensor) -> Tensor:
    e = (by_lanes(x) - by_lanes(x).amax(1, keepdim=True)).float().exp()
    return (e / e.sum((1, 2), keepdim=True)).flatten(1)[:, :300].double()


def no_maximum(x: Tensor) -> Tensor:
    e = x.float().exp()
    return (e / e.sum(1, keepdim=True)).double()


ROW = Task(
    1,
    "1_row.cu",
    rows_of_every_size,
    (4, 300),
    (4, 300),
    lambda x: x.softmax(1),
    (
        (own_sums, "Each lane divides by the sum of its own columns: add the lanes' sums up, by shuffles, before the division."),
        (own_maxima, "Each lane subtracts the maximum of its own columns: all lanes need the row's, by shuffles, before exponentials."),
        (no_maximum, "Exponentials overflow, or are all 0, in rows with large scores: subtract the row's maximum first."),
    ),
)


# ---- 2: a tiled product


def matrices() -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(2)
    return torch.randn(40, 56, generator=random), torch.randn(50, 56, generator=random)


def tiles_transposed(a: Tensor, b: Tensor) -> Tensor:
    """The product with each 16 × 16 block of B transposed: B_smem[k][c] where B_smem[c][k] belongs."""
    b = torch.nn.functional.pad(b, (0, 8, 0, 14)).reshape(4, 16, 4, 16).permute(0, 3, 2, 1).reshape(64, 64)
    return (torch.nn.functional.pad(a, (0, 8)) @ b.T)[:, :50]


PRODUCT = Task(
    2,
    "2_tiled_product.cu",
    matrices,
    (40, 50, 56),
    (40, 50),
    lambda a, b: a @ b.T,
    (
        (
            tiles_transposed,
            "In every tile, rows and columns of B are exchanged: the sum runs over B_smem[c][k], a row of B, not over B_smem[k][c].",
        ),
    ),
)


# ---- 3: online softmax


def scores_and_values() -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(3)
    return 3 * torch.randn(6, 80, generator=random), torch.randn(80, 32, generator=random)


def online(
    scores: Tensor, v: Tensor, O_shrinks: bool = True, l_shrinks: bool = True, m_is_kept: bool = True, inverted: bool = False
) -> Tensor:
    """The loop, with one thing left out."""
    m, l, O = torch.full((6, 1), -torch.inf, dtype=torch.float64), 0, 0
    for s, vj in zip(scores.split(32, 1), v.split(32, 0), strict=True):
        m_new = torch.maximum(m, s.amax(1, keepdim=True))
        alpha = (m_new - m if inverted else m - m_new).exp()
        p = (s - m_new).exp()
        l = (alpha if l_shrinks else 1) * l + p.sum(1, keepdim=True)
        O = (alpha if O_shrinks else 1) * O + p @ vj
        m = m_new if m_is_kept else m
    return O / l


ONLINE = Task(
    3,
    "3_online_softmax.cu",
    scores_and_values,
    (6, 80),
    (6, 32),
    lambda s, v: s.softmax(1) @ v,
    (
        (
            lambda s, v: online(s, v, O_shrinks=False),
            "O is not rescaled: what was summed against the old maximum must shrink by alpha = exp(m − m_new) before a tile is added.",
        ),
        (
            lambda s, v: online(s, v, l_shrinks=False),
            "l is not rescaled: it was summed against the old maximum too, and must shrink by the same alpha as O.",
        ),
        (
            lambda s, v: online(s, v, m_is_kept=False),
            "Only the last tile counts: m must be kept, m = m_new, or alpha is exp(−∞) = 0 every time.",
        ),
        (
            lambda s, v: online(s, v, inverted=True),
            "Every number is NaN. Either l is still 0, and 0 was divided by 0, or alpha is upside down: exp(m − m_new) is at most 1, "
            "and 0 for the first tile.",
        ),
    ),
    hints=((r"reads \d+ bytes outside", "Row n of V is read though there is no key n: a tile's keys end at `there`."),),
)


# ---- 4: ldmatrix and the swizzle


def half_matrices(rows: int, keys: int, columns: int) -> Callable[[], tuple[Tensor, ...]]:
    def draw():
        random = torch.Generator().manual_seed(4)
        return tuple(torch.randn(n, columns, generator=random).half() for n in (rows, keys))

    return draw


def conflicts(counts: Counts, _) -> None:
    """
    Raises:
        Wrong: ldmatrix meets bank conflicts.
    """
    places = {name: place for name, place in counts.shared.items() if place.least == 4 * place.instructions}
    name, worst = max(places.items(), key=lambda item: item[1].cycles / item[1].least)
    if worst.cycles > worst.least:
        raise Wrong(
            f"The product is right, but at {name} ldmatrix takes {worst.cycles / worst.least:g} × the cycles of shared memory "
            f"that it needs, {worst.cycles} for "
            f"{worst.least}: some of the eight rows that it reads at once begin at the same banks. Let the position of a chunk "
            f"depend on its row."
        )


LDMATRIX = Task(
    4,
    "4_ldmatrix.cu",
    half_matrices(16, 32, 64),
    (),
    (16, 32),
    lambda q, k: q @ k.T,
    hints=(
        (
            r"shared byte|outside of the block's|of dynamic shared|waits|nothing orders",
            "Two chunks share a position, or one lies beyond its row: a row has the 128 bytes from row · 128 on, and its eight "
            "chunks take eight different positions there.",
        ),
    ),
    judge=conflicts,
    tolerance=2e-3,
)


# ---- 5: a pipeline

COPY, COMMIT, WAIT, PROCESS = 1, 2, 3, 4  # notes of 5_cp_async.cu
TILES = 5


def under_way(_, log: list[tuple[int, int]]) -> None:
    """
    Raises:
        Wrong: a tile is processed with no copy of the next one in flight.
    """
    open_tiles: list[int] = []
    groups: list[list[int]] = []
    for what, n in log:
        if what == COPY:
            open_tiles.append(n)
        elif what == COMMIT:
            groups.append(open_tiles)
            open_tiles = []
        elif what == WAIT:
            groups = groups[max(0, len(groups) - n) :]
        elif what == PROCESS and n + 1 < TILES and n + 1 not in (tile for group in groups for tile in group):
            issued = any(event == (COPY, n + 1) for event in log[: log.index((PROCESS, n))])
            why = "has been waited for already: one group may be in flight, wait_all_but(1)" if issued else "has not been issued yet"
            raise Wrong(f"The sums are right, but no copy is in flight while tile {n} is processed: that of tile {n + 1} {why}.")


def sums_of_tiles(x: Tensor) -> Tensor:
    at = (torch.arange(128)[:, None] + 128 * torch.arange(4) + 1) % 512
    return (x[:, at] * torch.arange(1, 5)).sum((0, 2))


PIPELINE = Task(
    5,
    "5_cp_async.cu",
    lambda: (torch.randn(TILES, 512, generator=torch.Generator().manual_seed(5)),),
    (TILES,),
    (128,),
    sums_of_tiles,
    (
        (lambda x: sums_of_tiles(x[:-1]), "The last tile is not processed."),
        (lambda x: sums_of_tiles(x[1:]), "The first tile is not processed."),
    ),
    hints=(
        (
            r"thread \d+ reads shared byte \d+, which no thread has written",
            "A thread reads data before their copy has arrived: wait for the copy's group, and, for other threads' copies, meet at a "
            "barrier after it.",
        ),
    ),
    judge=under_way,
)


# ---- 6: a product of a warpgroup

WGMMA = Task(
    6,
    "6_wgmma.cu",
    half_matrices(64, 64, 128),
    (),
    (64, 64),
    lambda q, k: q @ k.T,
    (
        (
            lambda q, k: q[:, :64] @ k[:, :64].T,
            "Only the first 64 columns are multiplied: after four products the next panel begins, PANEL_BYTES further.",
        ),
        (lambda q, k: q[:, -16:] @ k[:, -16:].T, "Only the last 16 columns are left: from the second product on, accumulate must be 1."),
        (lambda q, k: torch.zeros(64, 64, dtype=torch.float64), "No product was computed: S is still 0."),
    ),
    hints=(
        (
            r"no fence\.proxy\.async",
            "wgmma may not see what the threads stored: each needs ptx::fence_proxy_async() after its stores, before the barrier.",
        ),
        (
            r"a register that a product under way",
            "S is read while the product still writes it: commit the group and wait for it, ptx::wgmma_wait_group<0>().",
        ),
        (r"no wgmma\.fence since", "ptx::wgmma_fence() must come between the last use of S_rmem and the first product."),
        (
            r"begins within a swizzle's pattern|a product of warpgroup .* no thread has written|a product of warpgroup .* dynamic",
            "A descriptor points outside the tile: 32 bytes a step of 16 columns, four steps a panel, panels PANEL_BYTES apart.",
        ),
        (
            r"nothing orders two accesses.*a product of warpgroup",
            "The product reads the tiles before all threads have stored their part: a __syncthreads() is missing, after the proxy fence.",
        ),
    ),
    tolerance=2e-2,
    min_arch=90,
)


# ---- 7: a producer

RING = Task(
    7,
    "7_producer.cu",
    lambda: (torch.randn(6, 256, generator=torch.Generator().manual_seed(7)),),
    (6,),
    (128,),
    lambda x: (x.unflatten(1, (2, 128)).sum(1) * torch.arange(1, 7, dtype=x.dtype)[:, None]).sum(0),
    hints=(
        (
            r"hangs.*thread 128 waits for phase 0 of the mbarrier at shared byte \d+, which is in phase 0, where 128 of 128",
            "The producer waits until a stage is emptied that has never been filled. In the first round wait for the phase "
            "before it, which is over: its parity "
            "is that of the tile's round, xor 1.",
        ),
        (
            r"hangs.*threads 0–127 wait for phase \d+ of the mbarrier .* (1 of 1 arrivals|0 of 1 arrivals)",
            "The consumers wait for a stage that is never full: the producer must arrive at full(stage) for every tile, "
            "announcing exactly the bytes that it copies.",
        ),
        (
            r"-\d+ bytes",
            "More bytes arrived at a barrier than were announced: ptx::mbarrier_arrive_expect_tx(full(stage), TILE_BYTES) before the copy.",
        ),
        (
            r"arrives at the mbarrier",
            "The producer arrives at full(stage) again while the previous copy is still in flight: wait for empty(stage) first, "
            "the phase before this tile's.",
        ),
        (
            r"thread \d+ reads it.* and the copy engine.* writes it|copy engine.* and the copy engine",
            "A copy overwrites a stage that consumers still read, or that another copy is filling: wait for empty(stage) first, "
            "the phase before this tile's.",
        ),
        (
            r"the copy engine, for phase",
            "A consumer reads data that the copy engine has not delivered yet: the bytes must be announced, by "
            "mbarrier_arrive_expect_tx, before a thread can wait for them.",
        ),
        (r"hangs", "The block hangs: does every wait use the right parity? A wait passes when the phase of its parity is over."),
    ),
    min_arch=90,
)

TASKS = {task.number: task for task in (ROW, PRODUCT, ONLINE, LDMATRIX, PIPELINE, WGMMA, RING)}

"""The checks of the lessons' exercises. The exercise `name` of a lesson is checked by `check_name`; solutions/ holds the answers.

A blank answer (it returns None) is "not solved yet"; a right one is "solved"; a wrong one raises AssertionError and says what differs.

One file because lessons import all their checks from here; each check is an independent function.
"""

from collections.abc import Callable
from functools import wraps
from itertools import pairwise
from typing import Any

import torch
from record import traffic, watch
from sources import constants, fragment, functions
from tile_model import forward_step
from torch import Tensor

from flash_attention.reference import Dropout, flash_attention2_causal_forward, flash_attention2_forward, normal_attention
from flash_attention.reference.dropout import philox_4x32_10, threshold
from flash_attention.reference.online_softmax import attention_online, summarise
from flash_attention.reference.tiles import blocks


class NotSolvedError(Exception):
    """The answer is still blank."""


def exercise(check: Callable[[Callable], None]) -> Callable[[Callable], None]:
    """Decorates a check: calls `check(answer)`, which asserts, and prints the outcome."""

    @wraps(check)
    def checked(answer: Callable) -> None:
        try:
            check(answer)
        except NotSolvedError:
            print("not solved yet")
        else:
            print("solved")

    return checked


def result(answer: Callable, *arguments) -> Any:
    """What the answer returns for these arguments."""
    given = answer(*arguments)
    if given is None:
        raise NotSolvedError
    return given


def expect(name: str, got: Any, want: Any, tolerance: float = 1e-5) -> None:
    """Assert that two numbers or tensors agree."""
    got, want = torch.as_tensor(got), torch.as_tensor(want)
    assert got.shape == want.shape, f"{name}: the shape is {tuple(got.shape)}, it should be {tuple(want.shape)}"
    error = float((got.double() - want.double()).abs().max())
    assert error <= tolerance * max(1.0, float(want.abs().max())), f"{name} is off by {error:.3g}"


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Random float32 inputs, the same in every run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Lesson 1


@exercise
def check_largest_exponent(answer: Callable) -> None:
    """exp of the answer is finite in this dtype, exp of 0.1 more is not."""
    for dtype in (torch.float16, torch.float32, torch.float64):
        x = result(answer, dtype)
        x = torch.tensor(float(x), dtype=torch.float64)
        assert torch.exp(x - 1e-3).to(dtype).isfinite(), f"exp({x:.4f}) is already infinite in {dtype}"
        assert torch.exp(x + 0.1).to(dtype).isinf(), f"exp({x + 0.1:.4f}) is still finite in {dtype}"


@exercise
def check_logsumexp_online(answer: Callable) -> None:
    """log Σ exp(x) of rows that would overflow, in pieces of any size."""
    for scale in (1.0, 1000.0):
        x = scale * numbers(4, 10)
        for block in (1, 3, 10):
            expect(f"logsumexp in pieces of {block}", result(answer, x, block), x.logsumexp(-1, keepdim=True))


@exercise
def check_merge_with_values(answer: Callable) -> None:
    """(m, l, O) of two pieces of a row, in both orders."""
    x, V = 20 * numbers(3, 8), numbers(8, 2, seed=1)

    def summary(j: slice) -> tuple[Tensor, Tensor, Tensor]:
        m, l = summarise(x[:, j])
        return m, l, (x[:, j] - m).exp() @ V[j]

    left, right = summary(slice(0, 3)), summary(slice(3, 8))
    for a, b in ((left, right), (right, left)):
        m, l, O = result(answer, a, b)
        expect("m", m, x.amax(-1, keepdim=True))
        expect("l", l, summarise(x)[1])
        expect("O / l", O / l, attention_online(x, V, block=8))


# Lesson 2


@exercise
def check_next_state(answer: Callable) -> None:
    """(m, l, O) after each tile, against the run of the reference algorithm."""
    Q, K, V = 3 * numbers(3, 1, 1, 6, 2)
    _, steps = watch(flash_attention2_forward, Q, K, V, block_q=3, block_k=2)
    for i in (0, 3):
        rows = [s for s in steps if s.i.start == i]
        for before, after in pairwise(rows):
            state = result(answer, before.m, before.l, before.O, after.S, V[:, :, after.j])
            for name, got in zip(("m", "l", "O"), state, strict=True):
                expect(f"{name} after tile i = {after.i}, j = {after.j}", got, getattr(after, name))


@exercise
def check_elements_moved(answer: Callable) -> None:
    """Elements of Q, K, V and O that FlashAttention-2 moves, against a count over its run."""
    for Nq, Nk, D, block_q, block_k in ((6, 6, 2, 2, 2), (12, 8, 4, 3, 4), (12, 8, 4, 12, 2), (7, 8, 2, 1, 5)):
        Q, K, V = numbers(1, 1, Nq, D), numbers(1, 1, Nk, D), numbers(1, 1, Nk, D)
        _, steps = watch(flash_attention2_forward, Q, K, V, block_q=block_q, block_k=block_k)
        moved = sum(traffic(steps, D, D).values())
        given = result(answer, Nq, Nk, D, block_q, block_k)
        assert given == moved, f"Nq = {Nq}, Nk = {Nk}, D = {D}, tiles of {block_q} × {block_k}: {moved} elements are moved, not {given}"


# Lesson 3


@exercise
def check_softmax_backward(answer: Callable) -> None:
    """dS from P and dP, against autograd."""
    S, dP = numbers(5, 7).requires_grad_(), numbers(5, 7, seed=1)
    P = S.softmax(-1)
    expect("dS", result(answer, P.detach(), dP), torch.autograd.grad(P, S, dP)[0])


@exercise
def check_gradients_of_attention(answer: Callable) -> None:
    """dQ, dK and dV of attention from Q, K, V and dO, each (N, D), against autograd."""
    Q, K, V, dO = numbers(4, 5, 3)
    leaves = [x.clone().requires_grad_() for x in (Q, K, V)]
    O = normal_attention(*(x[None, None] for x in leaves))[0, 0]
    wanted = torch.autograd.grad(O, leaves, dO)
    for name, got, want in zip(("dQ", "dK", "dV"), result(answer, Q, K, V, dO), wanted, strict=True):
        expect(name, got, want)


@exercise
def check_softmax_backward_with_lse(answer: Callable) -> None:
    """dS when the loss uses LSE too, against autograd."""
    S, dP, dLSE = numbers(5, 7).requires_grad_(), numbers(5, 7, seed=1), numbers(5, 1, seed=2)
    P, LSE = S.softmax(-1), S.logsumexp(-1, keepdim=True)
    D = (P * dP).sum(-1, keepdim=True)
    wanted = torch.autograd.grad((P, LSE), S, (dP, dLSE))[0]
    expect("dS", result(answer, P.detach(), dP, D.detach(), dLSE), wanted)


# Lesson 4


@exercise
def check_tile_kind(answer: Callable) -> None:
    """Every tile of several causal runs, against what the observer saw."""
    for Nq, Nk, block_q, block_k in ((6, 6, 2, 2), (7, 12, 3, 4), (12, 7, 4, 3), (9, 9, 9, 2)):
        Q, K = numbers(1, 1, Nq, 2), numbers(1, 1, Nk, 2, seed=1)
        _, steps = watch(flash_attention2_causal_forward, Q, K, K, block_q=block_q, block_k=block_k)
        masked = {(s.i.start, s.j.start): bool(s.S.isneginf().any()) for s in steps}
        ends = {(s.i.start, s.j.start): s.j.stop for s in steps}  # the inner loop may end inside a tile: the rest of it is hidden
        for i in blocks(0, Nq, block_q):
            for j in blocks(0, Nk, block_k):
                tile = i.start, j.start
                kind = tile in masked, tile in masked and (masked[tile] or ends[tile] < j.stop)
                given = tuple(result(answer, i, j, Nq, Nk))
                where = f"Nq = {Nq}, Nk = {Nk}: rows {i.start} … {i.stop - 1}, columns {j.start} … {j.stop - 1}"
                assert given == kind, f"{where}: computed, masked are {kind}, not {given}"


@exercise
def check_same_call(answer: Callable) -> None:
    """Weights served by one call have the call's bytes; here each byte of each call is recognised over many seeds."""
    seeds = range(48)
    drawn = torch.stack([Dropout(0.5, torch.tensor(s), range(1), range(1)).keep(slice(0, 64), slice(0, 64))[0, 0] for s in seeds])
    for i, j in ((0, 0), (13, 30), (40, 5), (63, 63)):
        column, row = (n // 32 * 8 + n % 8 for n in (j, i))
        counter = tuple(torch.tensor(x) for x in (column, row, 0, 0))
        words = torch.stack([torch.stack(philox_4x32_10(counter, (torch.tensor(s), torch.tensor(0)))) for s in seeds])  # (seeds, 4)
        bytes_kept = (words[:, :, None] >> torch.arange(0, 32, 8) & 0xFF).flatten(1) >= threshold(0.5)  # (seeds, 16)
        served = (drawn[..., None] == bytes_kept[:, None, None]).all(0).any(-1)
        weights = {tuple(pair) for pair in served.nonzero().tolist()}
        given = set(map(tuple, result(answer, i, j)))
        assert given == weights, f"({i}, {j}): {len(given & weights)} of 16 right, {len(given - weights)} wrong"


@exercise
def check_tiles_of_window(answer: Callable) -> None:
    """Every block of rows of several windows, against the columns that its rows see, one by one."""
    for Nq, Nk, left, block_q, block_k in ((16, 16, 5, 4, 4), (9, 20, 3, 4, 8), (20, 9, 2, 4, 4), (12, 12, 0, 5, 3), (7, 7, 100, 2, 3)):
        for i in blocks(0, Nq, block_q):
            seen = {j for row in range(i.start, i.stop) for j in range(Nk) if row + Nk - Nq - left <= j <= row + Nk - Nq}
            wanted = sorted({j // block_k for j in seen})
            given = list(result(answer, i, Nq, Nk, left, block_k))
            where = f"Nq = {Nq}, Nk = {Nk}, left = {left}: rows {i.start} … {i.stop - 1}, tiles of {block_k} keys"
            assert given == wanted, f"{where}: tiles {wanted} are seen, not {given}"


@exercise
def check_key_head(answer: Callable) -> None:
    """The head whose number comes out of attention when each value head holds its own number."""
    for H, Hkv in ((6, 2), (4, 4), (8, 1), (12, 3)):
        Q, K = numbers(1, H, 2, 2), numbers(1, Hkv, 2, 2, seed=1)
        V = torch.arange(float(Hkv)).view(1, Hkv, 1, 1).expand(1, Hkv, 2, 2)
        read = flash_attention2_forward(Q, K, V)[0].mean((0, 2, 3)).round().long().tolist()
        for h in range(H):
            assert result(answer, h, H, Hkv) == read[h], f"H = {H}, Hkv = {Hkv}: query head {h} reads key/value head {read[h]}"


# Lesson 5


@exercise
def check_largest_tile(answer: Callable) -> None:
    """The tile fits, and one with a row and a column more does not. Sizes are those of the tensors that the observer gets."""

    def room(B: int, D: int) -> int:
        Q = numbers(1, 1, B, D)
        (step,) = watch(flash_attention2_forward, Q, Q, Q, block_q=B, block_k=B)[1]
        return 3 * Q.numel() + step.O.numel() + step.m.numel() + step.l.numel() + step.S.numel()

    for M, D in ((1000, 16), (4096, 32), (40_000, 64), (room(48, 64), 64)):
        B = result(answer, M, D)
        assert room(B, D) <= M, f"M = {M}, D = {D}: tiles of {B} × {B} need {room(B, D)} numbers"
        assert room(B + 1, D) > M, f"M = {M}, D = {D}: tiles of {B + 1} × {B + 1} would fit too"


@exercise
def check_causal_reads(answer: Callable) -> None:
    """Numbers of K and V that the causal loop reads, a tile only if it is not the previous step's, counted over its run."""
    for N, D, B in ((8, 2, 2), (12, 4, 3), (16, 8, 2), (6, 4, 6)):
        steps = watch(flash_attention2_causal_forward, *numbers(3, 1, 1, N, D), block_q=B, block_k=B)[1]
        tiles = [step.j for step in steps]
        read = sum(2 * D * (j.stop - j.start) for before, j in zip([None, *tiles], tiles, strict=False) if j != before)
        given = result(answer, N, D, B)
        assert given == read, f"N = {N}, D = {D}, tiles of {B} × {B}: {read} numbers are read, not {given}"


@exercise
def check_rows_for_ridge(answer: Callable) -> None:
    """Operations and bytes of a step, with the rows given and with one less."""
    D, block_k = 64, 32
    for flops, bandwidth, size in ((1e12, 1e10, 4), (989e12, 4.8e12, 2), (67e12, 4.8e12, 4), (1e14, 1e12, 2)):
        rows = result(answer, flops, bandwidth, size)

        def per_byte(rows: int, size: int = size) -> float:
            return 4 * rows * block_k * D / (2 * block_k * D * size)

        assert per_byte(rows) >= flops / bandwidth, f"{rows} rows: {per_byte(rows):.1f} operations per byte, ridge {flops / bandwidth:.1f}"
        assert per_byte(rows - 1) < flops / bandwidth, f"{rows - 1} rows would be enough"


# Lesson 6


@exercise
def check_thread_of_score(answer: Callable) -> None:
    """The scores that each thread stores, by the loops of simple.cuh with the constants found there."""
    known = constants("simple.cuh", "forward_1_simple.cu", HEAD_DIM=64)
    for thread in range(known["THREADS"]):
        group, lane = thread // known["LANES"], thread % known["LANES"]
        for r in range(known["ROWS"]):
            for c in range(known["COLUMNS"]):
                row, column = group + r * known["GROUPS"], lane + c * known["LANES"]
                given = result(answer, row, column)
                assert given == thread, f"row {row}, column {column}: thread {thread}, not {given}"


@exercise
def check_owner(answer: Callable) -> None:
    """Every element of D, against the comment in ptx.cuh."""
    for (row, column), owner in fragment("D").items():
        given = tuple(result(answer, row, column))
        assert given == owner, f"row {row}, column {column}: lane and register are {owner}, not {given}"


@exercise
def check_first_bank(answer: Callable) -> None:
    """Every chunk of a tile of 64 rows, against the formula in swizzle.cuh."""
    offset = functions("swizzle.cuh", **constants("swizzle.cuh", ROWS=64))["offset"]
    for row in range(64):
        for chunk in range(8):
            bank = offset(row, chunk) // 4 % 32
            given = result(answer, row, chunk)
            assert given == bank, f"row {row}, chunk {chunk}: bank {bank}, not {given}"


# Lesson 7


@exercise
def check_parities(answer: Callable) -> None:
    """The phases of a ring, counted tile by tile."""
    for stages in (1, 2, 3, 4):
        rounds = [0] * stages  # how often each stage has been filled before
        for n in range(14):
            stage = n % stages
            wanted = rounds[stage] % 2, (rounds[stage] - 1) % 2
            rounds[stage] += 1
            given = tuple(result(answer, n, stages))
            assert given == wanted, f"{stages} stages, tile {n}: the consumer's and the producer's parity are {wanted}, not {given}"


@exercise
def check_groups_left(answer: Callable) -> None:
    """The number of groups issued after the tile's own: so many may be in flight; one more would include the tile's own."""
    for tiles, ahead in ((5, 1), (6, 2), (7, 3), (1, 1), (3, 2)):
        for tile in range(tiles):
            issued = min(tiles, tile + ahead + 1)
            given = result(answer, tile, tiles, ahead)
            assert given == issued - tile - 1, f"{tiles} tiles, {ahead} ahead, tile {tile}: N = {issued - tile - 1}, not {given}"


@exercise
def check_stages_for_latency(answer: Callable) -> None:
    """A ring, cycle by cycle: with so many stages neither side waits in the long run, with one less one of them does."""

    def waits(stages: int, latency: int, cycles: int) -> bool:
        done: list[int] = []
        for n in range(40):
            arrives = (done[n - stages] if n >= stages else 0) + latency
            start = max(arrives, done[-1] if done else 0)
            if n > 20 and start > done[-1]:
                return True
            done.append(start + cycles)
        return False

    for latency, cycles in ((1700, 1000), (1000, 1000), (1, 1000), (3500, 500), (2001, 1000)):
        stages = result(answer, latency, cycles)
        assert not waits(stages, latency, cycles), f"latency {latency}, {cycles} cycles a tile: with {stages} stages the copies come late"
        assert stages == 1 or waits(stages - 1, latency, cycles), (
            f"latency {latency}, {cycles} cycles a tile: {stages - 1} stages are enough"
        )


# ---- lesson 8


@exercise
def check_units_busy(answer: Callable) -> None:
    """Cycles of the tensor cores and of the exponentials of a step, against the model's."""
    for D, groups, keys in ((64, 3, 128), (128, 2, 128), (256, 2, 64), (128, 1, 64)):
        busy = forward_step(D, groups, keys).busy
        tensor, exponentials = result(answer, D, groups, keys)
        assert tensor == busy["tensor cores"], (
            f"D {D}, {groups} groups, {keys} keys: the tensor cores need {busy['tensor cores']:.0f} cycles"
        )
        scores = groups * 64 * keys
        assert exponentials == scores / 16, f"D {D}, {groups} groups, {keys} keys: {scores} exponentials, 16 a cycle"


@exercise
def check_shared_unit(answer: Callable) -> None:
    """How long work of `need` cycles takes while others use the unit for `others` of each step's `cycles`."""
    for need, others, cycles in ((512, 0, 2000), (512, 1000, 2000), (100, 1500, 2000), (768, 1024, 2647)):
        expected, found = need / (1 - others / cycles), result(answer, need, others, cycles)
        assert abs(found - expected) < 1e-6 * expected, (
            f"{need} cycles, the others use {others} of {cycles}: {expected:.0f}, not {found:.0f}"
        )


@exercise
def check_idle_in_rounds(answer: Callable) -> None:
    """The share of the multiprocessors' time that is lost because the last round is not full."""
    for works, multiprocessors in ((2048, 132), (132, 132), (133, 132), (2816, 132), (5, 4)):
        rounds = -(-works // multiprocessors)
        expected, found = 1 - works / (rounds * multiprocessors), result(answer, works, multiprocessors)
        assert abs(found - expected) < 1e-9, f"{works} tiles on {multiprocessors}: {rounds} rounds, {expected:.1%} lost, not {found:.1%}"


# ---- lesson 9


@exercise
def check_zigzag_positions(answer: Callable) -> None:
    """The positions of a process' share, in the order in which it holds them."""
    for N, ranks in ((24, 3), (16, 4), (8, 1)):
        chunks = torch.arange(N).chunk(2 * ranks)
        for rank in range(ranks):
            expected = torch.cat((chunks[rank], chunks[2 * ranks - 1 - rank])).tolist()
            found = list(map(int, result(answer, N, ranks, rank)))
            assert found == expected, f"{N} positions, {ranks} processes: process {rank} has {expected}, not {found}"


@exercise
def check_bytes_sent(answer: Callable) -> None:
    """Bytes of K and V that a process sends in a forward in which every share visits every process."""
    for N, ranks, Hkv, D, itemsize in ((65536, 2, 8, 128, 2), (4096, 4, 2, 64, 4), (512, 1, 1, 8, 8)):
        expected = (ranks - 1) * 2 * (N // ranks) * Hkv * D * itemsize
        found = result(answer, N, ranks, Hkv, D, itemsize)
        assert found == expected, f"{N} positions, {ranks} processes, {Hkv} heads of {D}: {expected} bytes, not {found}"

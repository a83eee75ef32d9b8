"""Answers to the exercises of lesson 4."""


def tile_kind(i: slice, j: slice, Nq: int, Nk: int) -> tuple[bool, bool]:
    """The last row sees most, so it decides what is skipped; the first row sees least, so it decides what needs a mask."""
    offset = Nk - Nq
    computed = j.start <= i.stop - 1 + offset
    return computed, computed and j.stop - 1 > i.start + offset


def same_call(i: int, j: int) -> list[tuple[int, int]]:
    """Rows and columns of the same block of 32 with the same remainder modulo 8."""
    rows, columns = (range(n // 32 * 32 + n % 8, n // 32 * 32 + 32, 8) for n in (i, j))
    return [(row, column) for row in rows for column in columns]


def key_head(h: int, H: int, Hkv: int) -> int:
    return h // (H // Hkv)


def tiles_of_window(i: slice, Nq: int, Nk: int, left: int, block_k: int) -> list[int]:
    """The first row sees the first column, the last row the last one. Empty where they lie before the sequence."""
    offset = Nk - Nq
    start, stop = max(0, i.start + offset - left), min(Nk, i.stop + offset)
    return list(range(start // block_k, -(-stop // block_k))) if start < stop else []

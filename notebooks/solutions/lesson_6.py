"""Answers to the exercises of lesson 6."""


def thread_of_score(row: int, column: int) -> int:
    """Rows go round the 16 groups, columns round the 8 lanes of a group."""
    return row % 16 * 8 + column % 8


def owner(row: int, column: int) -> tuple[int, int]:
    """Row g or g + 8 and columns 2t, 2t + 1, with g = lane / 4 and t = lane % 4."""
    return row % 8 * 4 + column // 2, row // 8 * 2 + column % 2


def first_bank(row: int, chunk: int) -> int:
    """A chunk fills four banks, and a row all 32: only its place in the row counts."""
    return (chunk ^ row % 8) * 4

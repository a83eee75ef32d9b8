"""Answers to the exercises of lesson 5."""

import math


def largest_tile(M: int, D: int) -> int:
    """4·B·D + B² + 2·B ≤ M: the positive root of a quadratic, rounded down."""
    half = 2 * D + 1
    return math.isqrt(half**2 + M) - half


def causal_reads(N: int, D: int, B: int) -> int:
    """T tiles of rows visit 1, 2, … T tiles of columns, each 2·B·D numbers. Only the first of a tile of rows can be there already: tile
    0, when the tile of rows before it had no other. That happens once, unless there is one tile of rows only."""
    T = N // B
    return 2 * B * D * (T * (T + 1) // 2 - (T > 1))


def rows_for_ridge(flops: float, bandwidth: float, size: int) -> int:
    """A step does 4·Bq·Bk·D operations and reads 2·Bk·D numbers: 2·Bq / size operations per byte."""
    return math.ceil(flops / bandwidth * size / 2)

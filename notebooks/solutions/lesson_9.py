"""Answers to the exercises of lesson 9."""


def zigzag_positions(N: int, ranks: int, rank: int) -> list[int]:
    """Chunk `rank` from the front, and its mirror image from the back."""
    size = N // (2 * ranks)
    return [chunk * size + i for chunk in (rank, 2 * ranks - 1 - rank) for i in range(size)]


def bytes_sent(N: int, ranks: int, Hkv: int, D: int, itemsize: int) -> int:
    """K and V of N / ranks positions, in every step but the last."""
    return (ranks - 1) * 2 * (N // ranks) * Hkv * D * itemsize

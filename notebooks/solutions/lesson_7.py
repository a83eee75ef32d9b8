"""Answers to the exercises of lesson 7."""


def parities(n: int, stages: int) -> tuple[int, int]:
    """The consumer waits for the end of the tile's own round, the producer for the one before."""
    parity = n // stages % 2
    return parity, 1 - parity


def groups_left(tile: int, tiles: int, ahead: int) -> int:
    """The groups of the tiles after this one that have been issued."""
    return min(ahead, tiles - 1 - tile)


def stages_for_latency(latency: int, cycles: int) -> int:
    """A copy may take as long as all other stages are computed with."""
    return 1 + -(-latency // cycles)

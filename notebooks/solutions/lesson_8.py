"""Answers to the exercises of lesson 8."""


def units_busy(D: int, groups: int, keys: int) -> tuple[float, float]:
    """S and O are 2 · 64 · keys · D operations each, of every group; every score has one exponential."""
    return groups * 2 * (2 * 64 * keys * D) / 4096, groups * 64 * keys / 16


def shared_unit(need: float, others: float, cycles: float) -> float:
    """What the others leave is 1 − others / cycles of the unit."""
    return need / (1 - others / cycles)


def idle_in_rounds(works: int, multiprocessors: int) -> float:
    """The last round takes as long as any."""
    rounds = -(-works // multiprocessors)
    return 1 - works / (rounds * multiprocessors)

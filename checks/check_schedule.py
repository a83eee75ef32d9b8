"""The order in which hopper's forward takes tiles of Q under spans: longest first, so that blocks end at about the same time.

python checks/check_schedule.py
"""

import heapq
import random

import pytest
import torch
from harness import run_alone

from flash_attention import allocate
from flash_attention.backends import BACKENDS, emulated
from flash_attention.backends.cuda import Forward
from flash_attention.backends.launch import Addresses
from flash_attention.call import Call, Settings
from flash_attention.spans import documents

if reason := BACKENDS["emulated:hopper"]._why_no_kernels(0):
    pytest.skip(reason, allow_module_level=True)

BLOCK = 128  # rows of a tile of Q, and keys of a tile of K, at D 128
HEADS, BLOCKS = 4, 33  # a quarter of an H200 and of sixteen heads


def random_lengths(seed: int, total: int = 16384) -> list[int]:
    """Of documents from 16 to `total` rows, as many short ones as long ones."""
    draw, lengths = random.Random(seed), []
    while total:
        lengths.append(min(total, int(2 ** draw.uniform(4, 14))))
        total -= lengths[-1]
    return lengths


def order_of(spans: torch.Tensor) -> tuple[list[int], list[int]]:
    """The units in the order in which blocks take them, and how many tiles of keys each visits: what the launch writes to its workspace."""
    N = spans.shape[2]
    q = torch.empty(1, HEADS, N, 128, dtype=torch.float16)
    spans = spans.expand(1, HEADS, N, 2)
    plan = Forward.of(BACKENDS["emulated:hopper"], Call.of(q, q, q, None, spans, Settings(1.0)))
    launch = plan.launch._replace(sm_count=BLOCKS)
    workspace = torch.empty(plan.workspace, dtype=torch.float32)
    others = Addresses(0, 0, workspace.data_ptr(), 0, spans.data_ptr())
    O = allocate.output(q, q)
    tensors = [x.data_ptr() for x in (q, q, q, O)]
    memories = launch._tensors(tensors, 2, others.keys) + launch._others(others, backward=False)
    emulated.run(launch.library, launch.library.schedule_units, launch._params(tensors, others), memories)
    units = HEADS * -(-N // BLOCK)
    words = workspace.view(torch.int32)
    start, stop, *_ = words[: 4 * units].view(units, 4).T  # Bounds: first and last column that some row sees
    lengths = (stop + BLOCK - 1).div(BLOCK, rounding_mode="floor") - start.div(BLOCK, rounding_mode="floor")
    queue, order = words[4 * units], words[4 * units + 4 :][: units - BLOCKS]  # `struct Order`
    assert queue == 0
    return [*range(BLOCKS), *order.tolist()], lengths.tolist()  # each block begins with the unit of its number


def length_of_schedule(order: list[int], lengths: list[int]) -> int:
    """The time at which the last of BLOCKS blocks ends, if each takes the next unit as soon as it is free."""
    ends = [0] * BLOCKS
    for unit in order:
        heapq.heapreplace(ends, ends[0] + lengths[unit])
    return max(ends)


def check_balance():
    """Ten random lists of lengths: blocks end within 5 % of a lower bound for any schedule; in the units' own order they do not."""
    for seed in range(10):
        order, lengths = order_of(documents(random_lengths(seed), causal=True))
        assert sorted(order) == list(range(len(order))), "a unit is missing or twice there"
        bound = max(sum(lengths) / BLOCKS, max(lengths))
        ours, as_numbered = (length_of_schedule(each, lengths) for each in (order, range(len(order))))
        print(f"list {seed}: {ours / bound:.3f} of the bound; as they are numbered {as_numbered / bound:.3f}")
        assert ours <= 1.05 * bound, f"list {seed}: {ours} tiles, the bound is {bound:.0f}"


def check_units_that_share_keys_stay_together():
    """Short documents of equal length: there are few classes, and within a class units keep the order of heads."""
    order, lengths = order_of(documents([1024] * 16, causal=True))
    places = {unit: place for place, unit in enumerate(order)}
    jumps = sum(abs(places[unit] - places[unit + 1]) > 8 for unit in range(len(order) - 1))
    assert jumps < len(order) / 2, f"{jumps} of {len(order)} units lie far from the one before"
    assert length_of_schedule(order, lengths) <= 1.1 * sum(lengths) / BLOCKS


if __name__ == "__main__":
    run_alone(__file__)

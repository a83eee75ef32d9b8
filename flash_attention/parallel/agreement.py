"""Before anything is computed, the ranks exchange the arguments that they were called with: about 200 bytes.

Ranks with different shapes would wait for each other forever; ranks with different settings would silently compute something wrong. So each
call begins with one all-gather, after which all ranks continue or all raise the same error. A rank that refuses its own arguments tells the
others before it raises. If a rank has died, or makes another call, the others wait until the group's timeout.

The same message carries the seed of dropout, drawn by the group's first rank, and which shards each rank needs.
"""

import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from flash_attention.interface import DTYPES
from flash_attention.parallel.order import ORDERS

METHODS = ("ring", "all_to_all")


class Terms(NamedTuple):
    """What must be equal on all ranks."""

    B: int
    H: int
    Hkv: int
    Nq: int  # of the rank's own rows
    Nk: int
    D: int
    Dv: int
    dtype: torch.dtype
    causal: bool
    left: int | None
    right: int | None
    has_spans: bool
    scale: float
    dropout_p: float
    softcap: float | None
    alibi: int | None  # its `digest`
    order: str
    method: str
    has_gradients: bool  # else some ranks would wait for the others' backward


NONE = -(2**62)
WORDS = (*ORDERS, *METHODS)
DTYPE_NUMBER = {dtype: n for n, dtype in enumerate(DTYPES)}


def digest(x: Tensor | None) -> int | None:
    """A hash of a tensor's contents. The host waits for the device."""
    return None if x is None else zlib.crc32(x.detach().cpu().contiguous().view(torch.uint8).numpy())


def _number(value) -> int:
    """As 64 bits."""
    if value is None:
        return NONE
    if isinstance(value, float):
        return struct.unpack("q", struct.pack("d", value))[0]
    if isinstance(value, str):
        return WORDS.index(value)
    return DTYPE_NUMBER[value] if isinstance(value, torch.dtype) else int(value)


def _shown(name: str, number: int) -> str:
    """A number from `_number`, in words."""
    if number == NONE:
        return "None"
    hint = Terms.__annotations__[name]
    if hint in (float, float | None):
        return str(struct.unpack("d", struct.pack("q", number))[0])
    if hint is str:
        return repr(WORDS[number])
    return str(DTYPES[number]) if hint is torch.dtype else str(hint(number)) if hint is bool else str(number)


class Agreement(NamedTuple):
    needs: list[list[bool]]  # (ranks, ranks): [r][s], whether rank r needs the shard of rank s
    seed: Tensor | None


def refuse(group: ProcessGroup, device: torch.device) -> None:
    """Tells the other ranks, which are waiting in `agree`, that this rank raises."""
    _gather(group, device, [1] + [0] * (len(Terms._fields) + 1 + dist.get_world_size(group)), None)


def agree(group: ProcessGroup, device: torch.device, terms: Terms, needs: list[bool], draw_seed: Callable[[], Tensor] | None) -> Agreement:
    """What all ranks have agreed to compute. draw_seed: called on the first rank, if there is dropout.

    Raises:
        ValueError: on every rank, if they were called with different things. RuntimeError: on every other rank, if one refused its
        arguments, has died, or did not come within the group's timeout.
    """
    rank = dist.get_rank(group)
    seed = draw_seed() if draw_seed is not None and rank == 0 else None
    everyone, first_seed = _gather(group, device, [0, *map(_number, terms), 0, *map(int, needs)], seed)
    for other, (refused, *_) in enumerate(everyone):
        if refused:
            raise RuntimeError(f"rank {other} of the group refused its arguments; its own error says why")
    count = len(terms)
    for n, name in enumerate(Terms._fields):
        values = [_shown(name, one[1 + n]) for one in everyone]
        if len(set(values)) > 1:
            listed = ", ".join(f"{value} on rank {other}" for other, value in enumerate(values))
            hint = ": every rank's share must be equally long" if name in ("Nq", "Nk") else ""
            raise ValueError(f"the ranks of a group must be called alike{hint}, got {name} {listed}")
    return Agreement([list(map(bool, one[2 + count :])) for one in everyone], first_seed if draw_seed else None)


def _gather(group: ProcessGroup, device: torch.device, numbers: list[int], seed: Tensor | None) -> tuple[list[list[int]], Tensor]:
    """Every rank's numbers, and the first's seed, on the device."""

    def exchange() -> tuple[list[list[int]], Tensor]:
        mine = torch.tensor(numbers, device=device)
        if seed is not None:
            mine[1 + len(Terms._fields)] = seed
        everyone = mine.new_empty(dist.get_world_size(group), len(numbers))
        dist.all_gather(list(everyone.unbind()), mine, group)
        return everyone.tolist(), everyone[0, 1 + len(Terms._fields)].clone()

    if device.type != "cuda":
        return exchange()
    # On a separate stream: the host then waits only for the message, not for everything that is queued on the device.
    current, own = torch.cuda.current_stream(device), _stream(device)
    if seed is not None:
        own.wait_stream(current)
    with torch.cuda.stream(own):
        numbers_of_all, first_seed = exchange()
    current.wait_stream(own)
    first_seed.record_stream(current)
    return numbers_of_all, first_seed


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]

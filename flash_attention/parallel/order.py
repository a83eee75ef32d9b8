"""Which positions of a sequence each rank holds, and how a tensor is sharded and put together again.

A rank's shard is one run of positions, or two. Under causal attention later rows see more columns: in contiguous order the last of W ranks
computes 2W − 1 times what the first does. Zigzag (Brandon et al. 2023, "Striped Attention", has the problem; the order is Llama 3's and
Megatron's) cuts the sequence into 2W chunks and gives rank r the chunks r and 2W − 1 − r: every rank sees as much as every other.
"""

from itertools import pairwise
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed import DeviceMesh, ProcessGroup

ORDERS = ("zigzag", "contiguous")
Group: TypeAlias = ProcessGroup | DeviceMesh | None


def group_of(group: Group) -> ProcessGroup:
    """The process group that is meant: all ranks for None, a mesh's own group.

    Raises:
        RuntimeError: torch.distributed has not been initialised. TypeError: not a group. ValueError: a mesh of several dimensions, or a
        group that this rank is not in.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("torch.distributed is not initialised: start under torchrun and call torch.distributed.init_process_group()")
    if group is None:
        return dist.group.WORLD
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"a mesh must have one dimension here, take one by its name, got {group.ndim} of shape {tuple(group.shape)}")
        group = group.get_group()
    if not isinstance(group, ProcessGroup):
        raise TypeError(f"group must be a ProcessGroup, a DeviceMesh or None for all ranks, got {type(group).__name__}")
    if dist.get_rank(group) < 0:
        raise ValueError(f"rank {dist.get_rank()} is not in this group")
    return group


def runs(N: int, ranks: int, rank: int, order: str) -> list[range]:
    """The runs of positions, of N in all, that a rank holds, in the order in which it holds them.

    Raises:
        ValueError: there is no such order, or the ranks' shares would not be equal.

    >>> runs(16, 4, 1, "zigzag")
    [range(2, 4), range(12, 14)]
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(map(repr, ORDERS))}, got {order!r}")
    chunks = ranks if order == "contiguous" else 2 * ranks
    if N % chunks:
        raise ValueError(f"{order} order over {ranks} ranks needs a length that {chunks} divides, got {N}: pad the sequence")
    size = N // chunks
    first, last = (range(n * size, (n + 1) * size) for n in (rank, chunks - 1 - rank))
    if order == "contiguous":
        return [first]
    return [range(first.start, last.stop)] if first.stop == last.start else [first, last]  # the last rank's chunks are neighbours


def places(held: list[range]) -> list[slice]:
    """The offset of each run within the shard."""
    stops = torch.tensor([0, *map(len, held)]).cumsum(0).tolist()
    return [slice(start, stop) for start, stop in pairwise(stops)]


def positions(N: int, group: Group = None, *, order: str = "zigzag", device: torch.device | str | None = None) -> Tensor:
    """The positions, of N in all, of this rank's shard: int64 (N / ranks). For rotary and position embeddings.

    Raises: as `shard`.
    """
    group = group_of(group)
    held = runs(N, dist.get_world_size(group), dist.get_rank(group), order)
    return torch.cat([torch.arange(run.start, run.stop, device=device) for run in held])


def shard(x: Tensor, group: Group = None, dim: int = 2, *, order: str = "zigzag") -> Tensor:
    """This rank's share of a tensor that every rank holds whole, cut along `dim`: a copy. Differentiable; nothing is sent.

    Raises:
        ValueError: the ranks' shares would not be equal: zigzag needs a length that 2 · ranks divides, contiguous one that ranks divides.

    >>> shard(torch.arange(8), dim=0)  # on the first of two ranks
    tensor([0, 1, 6, 7])
    """
    group = group_of(group)
    held = runs(x.shape[dim], dist.get_world_size(group), dist.get_rank(group), order)
    return torch.cat([x.narrow(dim, run.start, len(run)) for run in held], dim)


def unshard(x: Tensor, group: Group = None, dim: int = 2, *, order: str = "zigzag") -> Tensor:
    """The whole tensor, on every rank, from the shares that `shard` gave: dim is ranks times as long.

    Differentiable. Gradients are summed over ranks, which is right for a loss that is the sum of the ranks' losses. If every rank computes
    the same loss from the whole tensor, divide it by the number of ranks.
    """
    return _Unshard.apply(x, group_of(group), dim, order)


class _Unshard(Function):
    @staticmethod
    def forward(ctx, x, group, dim, order):
        ctx.to_shard = group, dim, order
        ranks, n = dist.get_world_size(group), x.shape[dim]
        local = x.detach().movedim(dim, 0).contiguous()  # (n, …)
        gathered = local.new_empty(ranks, *local.shape)
        dist.all_gather(list(gathered.unbind()), local, group)
        whole = local.new_empty(ranks * n, *local.shape[1:])
        for rank in range(ranks):
            held = runs(ranks * n, ranks, rank, order)
            for run, place in zip(held, places(held), strict=True):
                whole[run.start : run.stop] = gathered[rank, place]
        return whole.movedim(0, dim)

    @staticmethod
    def backward(ctx, gradient):
        group, dim, order = ctx.to_shard
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=group)
        return shard(gradient, group, dim, order=order), None, None, None

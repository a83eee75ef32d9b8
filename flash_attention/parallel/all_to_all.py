"""All-to-all over heads (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv:2309.14509): each rank attends with some heads over all positions.

One all-to-all turns shares of the sequence with all heads into the whole sequence with a share of the heads; another one turns O back. In
between is one plain call. Each rank sends only (ranks − 1) / ranks of its Q, K, V and O, while a ring sends its K and V ranks − 1 times.
But nothing is computed meanwhile, and the number of ranks must divide the number of heads.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

from flash_attention.interface import flash_attention
from flash_attention.parallel.order import places, runs, unshard


def why_not(ranks: int, H: int, Hkv: int, dropout_p: float) -> str | None:
    """Why it cannot serve a call, or None."""
    if H % ranks or Hkv % ranks:
        return f"the {ranks} ranks must divide the heads, got H = {H}, Hkv = {Hkv}"
    if dropout_p:
        return "the bits of dropout depend on a head's number, which a kernel counts from the first head at hand"
    return None


def attention(q, k, v, spans: Tensor | None, alibi: Tensor | None, group: ProcessGroup, order: str, **options) -> tuple[Tensor, Tensor]:
    """O and LSE of this rank's rows, differentiable. alibi: (B, H). options: `flash_attention()`'s."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    heads = q.shape[1] // ranks
    own = slice(rank * heads, (rank + 1) * heads)
    if spans is not None:
        spans = unshard(spans, group, order=order)
        spans = spans if spans.shape[1] == 1 else spans[:, own]
    alibi = None if alibi is None else alibi[:, own]
    whole = (ToHeads.apply(x, group, order) for x in (q, k, v))  # (B, H / ranks, N, D)
    O, LSE = flash_attention(*whole, spans=spans, alibi=alibi, **options, return_lse=True)
    return ToPositions.apply(O, group, order), ToPositions.apply(LSE.unsqueeze(-1), group, order).squeeze(-1)


def to_heads(x: Tensor, group: ProcessGroup, order: str) -> Tensor:
    """(B, H, N / ranks, D), a share of the positions → (B, H / ranks, N, D), a share of the heads."""
    ranks = dist.get_world_size(group)
    sent = x.unflatten(1, (ranks, -1)).movedim(1, 0).contiguous()  # (ranks, B, H / ranks, N / ranks, D)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    n = x.shape[2]
    whole = x.new_empty(*sent.shape[1:3], ranks * n, x.shape[3])
    for other in range(ranks):
        held = runs(ranks * n, ranks, other, order)
        for run, place in zip(held, places(held), strict=True):
            whole[:, :, run.start : run.stop] = received[other, :, :, place]
    return whole


def to_positions(x: Tensor, group: ProcessGroup, order: str) -> Tensor:
    """(B, H / ranks, N, D) → (B, H, N / ranks, D)."""
    ranks = dist.get_world_size(group)
    shares = [runs(x.shape[2], ranks, other, order) for other in range(ranks)]
    sent = torch.stack([torch.cat([x[:, :, run.start : run.stop] for run in held], 2) for held in shares])
    received = torch.empty_like(sent)  # (ranks, B, H / ranks, N / ranks, D)
    dist.all_to_all_single(received, sent, group=group)
    return received.movedim(0, 1).flatten(1, 2)


class ToHeads(Function):
    @staticmethod
    def forward(ctx, x, group, order):
        ctx.how = group, order
        return to_heads(x, group, order)

    @staticmethod
    def backward(ctx, gradient):
        return ToPositions.apply(gradient, *ctx.how), None, None


class ToPositions(Function):
    @staticmethod
    def forward(ctx, x, group, order):
        ctx.how = group, order
        return to_positions(x, group, order)

    @staticmethod
    def backward(ctx, gradient):
        return ToHeads.apply(gradient, *ctx.how), None, None

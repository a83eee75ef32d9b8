"""One attention over a sequence that is spread over the ranks of a torch.distributed group: NCCL on GPUs, gloo on CPUs.

    q, k, v = (shard(x, group) for x in (q, k, v))      # or made from the shards of the input, as a model does
    O = parallel_attention(q, k, v, group=group, causal=True)
    O = unshard(O, group)                               # if the whole is needed anywhere

Every rank of the group calls with its own share, and runs the backward if there is one. The result is that of one device.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from flash_attention import interface
from flash_attention.backends import check_name
from flash_attention.call import Settings
from flash_attention.parallel import all_to_all, ring
from flash_attention.parallel.agreement import METHODS, Terms, agree, digest, refuse
from flash_attention.parallel.order import ORDERS, Group, group_of, positions, runs, shard, unshard

__all__ = ["ORDERS", "all_to_all_attention", "parallel_attention", "positions", "ring_attention", "shard", "unshard"]

# Rows on each rank, times H / Hkv, from which a ring's copies hide behind its arithmetic under causal attention. A step computes
# 2 · rows² · H · D operations and sends 4 · rows · Hkv · D bytes; an H100 computes about 600 · 10¹² while it sends 200 · 10⁹ by NVLink.
HIDDEN_ROWS = 6000


@torch.compiler.disable  # a compiled model runs it between two graphs
def parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    spans: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    softcap: float | None = None,
    alibi: Tensor | None = None,
    return_lse: bool = False,
    order: str = "zigzag",
    method: str | None = None,
    backend: str | None = None,
    observe: Callable[[ring.Step], None] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attention()` of the whole sequence, of which every rank of a group holds an equal share.

    Args:
        q: (B, H, Nq / ranks, D), k: (B, Hkv, Nk / ranks, D), v: (B, Hkv, Nk / ranks, Dv): this rank's shares, as `shard` cuts them.
        group: a ProcessGroup, a DeviceMesh of one dimension, or None for all ranks.
        causal, window, scale, softcap, return_lse, backend: as in `flash_attention()`, for the whole sequence.
        alibi: slopes (H,) or (B, H), the same on every rank; distances are those in the whole.
        spans: int32 (B or 1, H or 1, Nq / ranks, 2), of this rank's rows, `shard(documents(…), group)` for example: columns of the whole.
        dropout_p: as in `flash_attention()`. The seed is drawn by the group's first rank, from its generator.
        order: "zigzag", in which causal work is balanced, or "contiguous", in which a window has fewer neighbours.
        method: "ring": K and V go from rank to rank while each rank attends to those it holds. "all_to_all": each rank attends with its
            share of the heads over the whole sequence. None: the ring if its copies hide behind the arithmetic, else the method that sends
            less.
        observe: called after each step of a ring, forward and backward, with what this rank computed and what travelled meanwhile.

    Returns:
        O (B, H, Nq / ranks, Dv) of this rank's rows, and LSE (B, H, Nq / ranks) if asked for, both differentiable once.

    Raises:
        On this rank, TypeError and ValueError as `flash_attention()`; ValueError too for shares that are not equal.
        NotImplementedError: the method or backend asked for cannot serve the call.
        ValueError, on every rank: the ranks were called with different shapes, dtypes or settings.
        RuntimeError: torch.distributed is not initialised; another rank refused its arguments, died, or did not come within the group's
        timeout.

    On a GPU, kernels take dropout where each run of a share begins at a multiple of 64; other lengths run on the reference, which warns.
    """
    group = group_of(group)
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    try:
        interface._check(q, k, v, causal, scale, dropout_p, window, spans, None)
        softcap, _, alibi = interface._checked_scores(softcap, None, alibi, q, k)
        check_name(backend)
        if method not in (None, *METHODS):
            raise ValueError(f"method must be None or one of {', '.join(map(repr, METHODS))}, got {method!r}")
        (B, H, Nq, D), (_, Hkv, Nk, Dv) = q.shape, v.shape
        for N in (Nq, Nk):
            runs(N * ranks, ranks, rank, order)
        reason = all_to_all.why_not(ranks, H, Hkv, dropout_p)
        if method == "all_to_all" and reason:
            raise NotImplementedError(f"method 'all_to_all' cannot serve this call: {reason}")
    except Exception:
        refuse(group, _device(group, q))
        raise
    if method is None:
        method = "ring" if reason or _ring_is_better(ranks, H, Hkv, Nq, Nk, D, Dv) else "all_to_all"
    if interface._autocasts(q.device.type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    left, right = window or (None, None)
    settings = Settings(D**-0.5 if scale is None else float(scale), float(dropout_p), left, 0 if causal else right, softcap=softcap)
    share = ring.Share(Nq * ranks, Nk * ranks, ranks, rank, order, settings, spans, q.device, alibi)
    has_gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    shapes = B, H, Hkv, Nq, Nk, D, Dv
    of_scores = settings.scale, settings.dropout_p, softcap, digest(alibi)
    terms = Terms(*shapes, q.dtype, causal, left, right, spans is not None, *of_scores, order, method, has_gradients)
    needs, seed = agree(group, q.device, terms, share.needs, (lambda: interface._seed(q)) if dropout_p else None)
    if method == "ring":
        how = ring.Ring(share, group, ring.trips(needs), backend, observe)
        O, LSE = ring.RingAttention.apply(how, q, k, v, seed)
    else:
        options = {"causal": causal, "window": window, "scale": settings.scale, "softcap": softcap, "backend": backend}
        O, LSE = all_to_all.attention(q, k, v, spans, alibi, group, order, **options)
    return (O, LSE) if return_lse else O


def ring_attention(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor | tuple[Tensor, Tensor]:
    """`parallel_attention(…, method="ring")`."""
    return parallel_attention(q, k, v, method="ring", **options)


def all_to_all_attention(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor | tuple[Tensor, Tensor]:
    """`parallel_attention(…, method="all_to_all")`."""
    return parallel_attention(q, k, v, method="all_to_all", **options)


def _ring_is_better(ranks: int, H: int, Hkv: int, Nq: int, Nk: int, D: int, Dv: int) -> bool:
    """Whether the ring's copies hide behind its arithmetic, or are fewer bytes. Lengths are those of a share."""
    round_trip = (ranks - 1) * Hkv * Nk * (D + Dv)
    exchanged = (ranks - 1) * (H * Nq + Hkv * Nk) * (D + Dv) // ranks
    return Nq * H >= HIDDEN_ROWS * Hkv or round_trip <= exchanged


def _device(group: dist.ProcessGroup, q) -> torch.device:
    """A device for messages of this group: q's, or the group's own if q is not a tensor."""
    if isinstance(q, Tensor):
        return q.device
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend(group) else torch.device("cpu")

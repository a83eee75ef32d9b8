"""Ring attention (Liu, Zaharia, Abbeel 2023, arXiv:2310.01889): queries stay, keys and values go round.

Each rank holds its share of Q, K and V. In step t it attends from its rows to the K and V of the rank t places before it, while sending
these on to the next rank. A step gives O and LSE over some of the columns, and two such results merge into one:

    LSE = log(e^LSE₁ + e^LSE₂)      O = O₁ + w (O₂ − O₁),  w = e^(LSE₂ − LSE) = sigmoid(LSE₂ − LSE₁)

In the backward K and V go round once more. dK and dV are sums over all rows: they travel with K and V, each rank adds the contribution of
its rows, and the last one sends them home. dQ stays where its rows are.

Sums are in float32 (float64 for float64), in an order that does not depend on what arrives first. Everything that depends on positions
uses those in the whole sequence: the result equals that of one device, including which elements dropout drops.

One file because the forward and the backward take the same trips and divide the same shares.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from flash_attention import allocate, shortcut
from flash_attention.backends import as_chosen, choose
from flash_attention.backends.cuda import BACKWARD, FORWARD
from flash_attention.call import Call, Settings
from flash_attention.parallel.order import places, runs
from flash_attention.reference.tiles import sum_dtype
from flash_attention.reference.visible import Visible

# ---- what a rank computes in a step


class Part(NamedTuple):
    """One kernel call: some of the rank's rows with some of a shard's columns."""

    rows: slice
    columns: slice
    settings: Settings
    spans: Tensor | None  # (B or 1, H or 1, rows, 2)


@dataclass
class Share:
    """What one rank's rows see of the whole sequence, and the kernel calls that compute it."""

    Nq: int  # of the whole
    Nk: int
    ranks: int
    rank: int
    order: str
    settings: Settings
    spans: Tensor | None  # (B or 1, H or 1, this rank's rows, 2): columns of the whole
    device: torch.device
    alibi: Tensor | None = None  # slopes (B, H)
    held: list[range] = field(init=False)  # this rank's rows
    seen: list[list[list[bool]]] = field(init=False)  # [shard][run of rows][run of columns]: whether some row sees some column

    def __post_init__(self) -> None:
        self.held = runs(self.Nq, self.ranks, self.rank, self.order)
        shards = [self.columns_of(shard) for shard in range(self.ranks)]
        self.seen = [[[self._some(i, j) for j in columns] for i in self.held] for columns in shards]
        if self.spans is not None:
            by_spans = self._seen_by_spans(shards)
            self.seen = [
                [[a and b for a, b in zip(*rows, strict=True)] for rows in zip(*both, strict=True)]
                for both in zip(self.seen, by_spans, strict=True)
            ]

    def columns_of(self, shard: int) -> list[range]:
        return runs(self.Nk, self.ranks, shard, self.order)

    @property
    def by_position(self) -> bool:
        """Whether a kernel must know where its rows and columns stand in the whole sequence."""
        return self.settings.dropout_p > 0 or self.alibi is not None

    @property
    def needs(self) -> list[bool]:
        """The shards of which some row sees some column."""
        return [any(map(any, self.seen[shard])) for shard in range(self.ranks)]

    def parts(self, shard: int) -> list[Part]:
        """The fewest calls that compute what this rank's rows see of a shard's columns.

        A shard's runs are in the order of their positions, so an interval of the whole sequence is an interval of the shard too: one call
        computes any step. But for dropout and ALiBi a kernel counts positions from one offset: then each pair of runs is a separate call.
        """
        columns, seen = self.columns_of(shard), self.seen[shard]
        if not any(map(any, seen)):
            return []
        rows_at, columns_at = places(self.held), places(columns)
        if self.by_position:
            return [
                Part(rows_at[n], columns_at[m], self._at(self.held[n], columns[m]), self._spans_of(rows_at[n]))
                for n in range(len(self.held))
                for m in range(len(columns))
                if seen[n][m]
            ]
        seen_n = [n for n, row in enumerate(seen) if any(row)]
        seen_m = [m for m in range(len(columns)) if any(row[m] for row in seen)]
        ns, ms = range(seen_n[0], seen_n[-1] + 1), range(seen_m[0], seen_m[-1] + 1)
        held, columns = [self.held[n] for n in ns], [columns[m] for m in ms]
        rows, part = slice(rows_at[ns[0]].start, rows_at[ns[-1]].stop), slice(columns_at[ms[0]].start, columns_at[ms[-1]].stop)
        settings = self._without_spans(held, columns) if self.spans is None else None
        if settings is not None:
            return [Part(rows, part, settings, None)]
        return [Part(rows, part, self.settings._replace(left=None, right=None), self._local_spans(rows, columns))]

    def _without_spans(self, held: list[range], columns: list[range]) -> Settings | None:
        """The settings of one call for these runs, if limits and a diagonal can describe what all its rows see; else None."""
        settings = self.settings
        if all(self._visible(i, j).whole(slice(0, len(i)), slice(0, len(j))) for i in held for j in columns):
            return settings._replace(left=None, right=None)
        standing = [range(i.start + self.Nk - self.Nq, i.stop + self.Nk - self.Nq) for i in held]
        if standing == columns and settings.left is None and settings.right == 0:
            return settings  # causal, with runs that are consecutive as in the whole
        if len(held) > 1 or len(columns) > 1:
            return None
        diagonal = standing[0].start - columns[0].start
        return settings._replace(diagonal=None if diagonal == len(columns[0]) - len(held[0]) else diagonal)

    def _visible(self, i: range, j: range) -> Visible:
        """What a run of rows sees of a run of columns, before spans."""
        whole = Visible(self.Nq, self.Nk, self.settings.left, self.settings.right)
        return whole.part(slice(i.start, i.stop), slice(j.start, j.stop))

    def _some(self, i: range, j: range) -> bool:
        seen = self._visible(i, j).columns(slice(0, len(i)))
        return seen.start < seen.stop

    def _at(self, i: range, j: range) -> Settings:
        """The settings for a run of rows and a run of columns, with their positions in the whole."""
        return self.settings._replace(q_offset=i.start, k_offset=j.start, diagonal=self.Nk - self.Nq)

    def _spans_of(self, rows: slice) -> Tensor | None:
        return None if self.spans is None else self.spans[:, :, rows]

    def _intervals(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Start and stop, in columns of the whole sequence, of what these rows see: (B or 1, H or 1, rows) each."""
        place = torch.cat([torch.arange(i.start, i.stop, device=self.device) for i in self.held])[rows] + self.Nk - self.Nq
        left, right = self.settings.left, self.settings.right
        start = torch.zeros_like(place) if left is None else (place - left).clamp(min=0)
        stop = torch.full_like(place, self.Nk) if right is None else (place + right + 1).clamp(max=self.Nk)
        if self.spans is None:
            return start[None, None], stop[None, None]
        return torch.maximum(start, self.spans[:, :, rows, 0]), torch.minimum(stop, self.spans[:, :, rows, 1])

    def _local_spans(self, rows: slice, columns: list[range]) -> Tensor:
        """The same, in columns of these runs put one after another."""
        bounds = torch.stack(self._intervals(rows), -1)  # (B or 1, H or 1, rows, 2)
        return sum((bounds - run.start).clamp(0, len(run)) for run in columns).int()

    def _seen_by_spans(self, shards: list[list[range]]) -> list[list[list[bool]]]:
        """Computes `seen` from the rows' intervals. The host waits for the device once."""
        all_runs = torch.tensor([[run.start, run.stop] for columns in shards for run in columns], device=self.device)
        rows = []
        for place in places(self.held):
            start, stop = (x.flatten()[:, None] for x in self._intervals(place))  # (B · H · rows, 1)
            seen = (start < all_runs[:, 1]) & (stop > all_runs[:, 0]) & (start < stop)
            rows.append(seen.any(0))
        flat = torch.stack(rows).tolist()  # (runs of rows, all runs of columns)
        counts = places([range(len(columns)) for columns in shards])
        return [[row[count] for row in flat] for count in counts]


# ---- how K and V travel


class Trip(NamedTuple):
    """K and V travelling from rank to rank, in one direction."""

    direction: int  # 1: to the next rank; −1: to the one before
    hops: list[int]  # how far the shard of each rank goes

    def shard(self, rank: int, t: int) -> int | None:
        """Whose shard a rank holds after t hops; None if none comes that far."""
        owner = (rank - self.direction * t) % len(self.hops)
        return owner if self.hops[owner] >= t else None

    @property
    def steps(self) -> int:
        return max(self.hops)


def trips(needs: list[list[bool]]) -> list[Trip]:
    """The trips, with the fewest steps in total, on which every shard visits the ranks that need it. needs[r][s]: rank r needs rank s's.

    If all ranks need all shards, one trip goes all the way round; a window's few neighbours on both sides take two short trips.

    >>> trips([[True] * 3] * 3)
    [Trip(direction=1, hops=[2, 2, 2])]
    """
    ranks = len(needs)
    distances = [(s, (r - s) % ranks) for r, row in enumerate(needs) for s, needed in enumerate(row) if needed and r != s]

    def rest(forth: int) -> int:
        """How far trips in the other direction must go."""
        return max((ranks - d for _, d in distances if d > forth), default=0)

    forth = min(reversed(range(ranks)), key=lambda n: n + rest(n))
    there = [max((d for s, d in distances if s == owner and d <= forth), default=0) for owner in range(ranks)]
    back = [max((ranks - d for s, d in distances if s == owner and d > forth), default=0) for owner in range(ranks)]
    return [trip for trip in (Trip(1, there), Trip(-1, back)) if trip.steps]


class Message(NamedTuple):
    """A message from one rank to another. Between two ranks, messages of a step are ordered by their tags."""

    tag: int
    peer: int  # rank in the group
    tensor: Tensor  # flat
    sends: bool


class Step(NamedTuple):
    """What a rank did in one step: the argument of `observe`."""

    what: str  # "forward" or "backward"
    t: int
    computed: list[tuple[int, Part]]  # whose shard, and which part of it
    messages: list[Message]  # being sent meanwhile

    def sent(self) -> int:
        """Bytes."""
        return sum(m.tensor.numel() * m.tensor.itemsize for m in self.messages if m.sends)


def exchange(group: ProcessGroup, messages: list[Message]) -> list[dist.Work]:
    """Starts them all. NCCL runs them on a separate stream, after the work already enqueued on the current one."""
    operations = [
        dist.P2POp(dist.isend if m.sends else dist.irecv, m.tensor, group=group, tag=m.tag, group_peer=m.peer)
        for m in sorted(messages, key=lambda m: m.tag)
    ]
    return dist.batch_isend_irecv(operations) if operations else []


def pack(k: Tensor, v: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """K and V, or dK and dV, as one flat tensor: one message."""
    flat = torch.empty(k.numel() + v.numel(), dtype=dtype or k.dtype, device=k.device)
    for to, x in zip(unpack(flat, k, v), (k, v), strict=True):
        to.copy_(x)
    return flat


def unpack(flat: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Views, shaped as k and v."""
    return flat[: k.numel()].view(k.shape), flat[k.numel() :].view(v.shape)


class Traveller:
    """One trip's buffers on one rank: the K and V that it holds and, in a backward, the dK and dV that travel with them."""

    def __init__(self, number: int, trip: Trip, rank: int, k: Tensor, v: Tensor, first_dtype: torch.dtype | None = None):
        self.trip, self.rank, self.k, self.v = trip, rank, k, v
        self.tags = 2 * number, 2 * number + 1  # of K and V, of dK and dV
        self.at_hand, self.spare = pack(k, v), None
        # The first rank's contribution is usually a kernel's own result: sent in its dtype, it loses nothing.
        self.first_dtype = first_dtype
        self.gradient: Tensor | None = None  # to be sent
        self.incoming: Tensor | None = None  # of the shard that the rank holds
        self.homecoming: Tensor | None = None

    def neighbour(self, distance: int) -> int:
        return (self.rank + self.trip.direction * distance) % len(self.trip.hops)

    def move(self, t: int) -> list[Message]:
        """Sends and receives K and V, from step t to step t + 1."""
        messages = []
        owner = self.trip.shard(self.rank, t)
        if owner is not None and self.trip.hops[owner] > t:
            messages.append(Message(self.tags[0], self.neighbour(1), self.at_hand, True))
        if self.trip.shard(self.rank, t + 1) is not None:
            self.spare = torch.empty_like(self.at_hand) if self.spare is None else self.spare
            messages.append(Message(self.tags[0], self.neighbour(-1), self.spare, False))
        return messages

    def arrived(self) -> None:
        """Called when `move` is complete."""
        if self.spare is not None:
            self.at_hand, self.spare = self.spare, self.at_hand

    def move_gradients(self, t: int) -> list[Message]:
        """Sends dK and dV, complete up to step t − 1, to the rank that adds its part in step t, or home."""
        messages, tag, hops = [], self.tags[1], self.trip.hops
        owner = self.trip.shard(self.rank, t - 1) if t >= 2 else None
        if owner is not None:
            peer = self.neighbour(1) if hops[owner] >= t else owner
            messages.append(Message(tag, peer, self.gradient, True))
        self.incoming = self.homecoming = None
        if t >= 2 and self.trip.shard(self.rank, t) is not None:
            self.incoming = self._empty(t)
            messages.append(Message(tag, self.neighbour(-1), self.incoming, False))
        if t >= 2 and hops[self.rank] == t - 1:
            self.homecoming = self._empty(t)
            messages.append(Message(tag, self.neighbour(t - 1), self.homecoming, False))
        return messages

    def dtype_after(self, t: int) -> torch.dtype:
        """The dtype in which dK and dV travel to step t."""
        return self.first_dtype if t == 2 else sum_dtype(self.k)

    def _empty(self, t: int) -> Tensor:
        return torch.empty_like(self.at_hand, dtype=self.dtype_after(t))

    def add(self, t: int, terms: list[tuple[slice, Tensor, Tensor]]) -> None:
        """Adds this rank's contributions, each for some columns, to dK and dV of the shard that it holds in step t."""
        if len(terms) == 1 and self.incoming is None and terms[0][1].shape == self.k.shape:
            self.gradient = pack(*terms[0][1:], self.dtype_after(t + 1))
            return
        total = torch.zeros_like(self.at_hand, dtype=sum_dtype(self.k)) if self.incoming is None else self.incoming.to(sum_dtype(self.k))
        dK, dV = unpack(total, self.k, self.v)
        for columns, dK_part, dV_part in terms:
            dK[:, :, columns] += dK_part
            dV[:, :, columns] += dV_part
        self.gradient = total.to(self.dtype_after(t + 1))


# ---- the two passes


@dataclass
class Ring:
    """One call on one rank."""

    share: Share
    group: ProcessGroup
    trips: list[Trip]
    backend: str | None
    observe: Callable[[Step], None] | None = None

    @property
    def rank(self) -> int:
        return self.share.rank

    def travellers(self, k: Tensor, v: Tensor, first_dtype: torch.dtype | None = None) -> list[Traveller]:
        return [Traveller(n, trip, self.rank, k, v, first_dtype) for n, trip in enumerate(self.trips)]

    def at_hand(self, t: int, travellers: list[Traveller], k: Tensor, v: Tensor) -> Iterator[tuple[Traveller | None, int, Tensor, Tensor]]:
        """The rank whose K and V this rank holds in step t: itself (no traveller) in step 0."""
        if t == 0:
            yield None, self.rank, k, v
            return
        for traveller in travellers:
            owner = traveller.trip.shard(self.rank, t)
            if owner is not None:
                yield traveller, owner, *unpack(traveller.at_hand, k, v)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None) -> tuple[Tensor, Tensor]:
        """O and LSE of this rank's rows."""
        merged = Merged(q, v)
        travellers = self.travellers(k, v)
        for t in range(1 + max((trip.steps for trip in self.trips), default=0)):
            messages = [message for traveller in travellers for message in traveller.move(t)]
            works = exchange(self.group, messages)
            computed = []
            for _, owner, k_here, v_here in self.at_hand(t, travellers, k, v):
                for part in self.share.parts(owner):
                    inputs = q[:, :, part.rows], k_here[:, :, part.columns], v_here[:, :, part.columns]
                    merged.add(part.rows, *compute(part, self.backend, *inputs, seed, self.share.alibi))
                    computed.append((owner, part))
            self._finish(works, Step("forward", t, computed, messages))
            for traveller in travellers:
                traveller.arrived()
        return merged.result()

    def backward(self, dO, dLSE, q, k, v, O, LSE, seed) -> tuple[Tensor, Tensor, Tensor]:
        """dQ, dK, dV of this rank's shares."""
        dtype = sum_dtype(q)
        dQ = torch.zeros(q.shape, dtype=dtype, device=q.device)
        dK, dV = torch.zeros(k.shape, dtype=dtype, device=k.device), torch.zeros(v.shape, dtype=dtype, device=v.device)
        travellers = self.travellers(k, v, dtype if self.share.by_position else k.dtype)
        steps = max((trip.steps for trip in self.trips), default=-1)
        for t in range(2 + steps):
            messages = [message for traveller in travellers for message in traveller.move(t) + traveller.move_gradients(t)]
            works = exchange(self.group, messages)
            computed, of_traveller = [], []
            for traveller, owner, k_here, v_here in self.at_hand(t, travellers, k, v):
                terms = []
                for part in self.share.parts(owner):
                    rows, columns = part.rows, part.columns
                    dO_rows, dLSE_rows = (None if x is None else x[:, :, rows] for x in (dO, dLSE))
                    saved = O[:, :, rows], LSE[:, :, rows]
                    inputs = q[:, :, rows], k_here[:, :, columns], v_here[:, :, columns]
                    dQ_part, *term = compute_backward(part, self.backend, dO_rows, dLSE_rows, *inputs, *saved, seed, self.share.alibi)
                    dQ[:, :, rows] += dQ_part
                    terms.append((columns, *term))
                    computed.append((owner, part))
                of_traveller.append((traveller, terms))
            self._finish(works, Step("backward", t, computed, messages))
            for traveller, terms in of_traveller:
                if traveller is not None:
                    traveller.add(t, terms)
                    continue
                for columns, dK_part, dV_part in terms:
                    dK[:, :, columns] += dK_part
                    dV[:, :, columns] += dV_part
            for traveller in travellers:
                if traveller.homecoming is not None:
                    for total, part in zip((dK, dV), unpack(traveller.homecoming, k, v), strict=True):
                        total += part
                traveller.arrived()
        return tuple(allocate.like(x, *x.shape[2:]).copy_(dx) for x, dx in ((q, dQ), (k, dK), (v, dV)))

    def _finish(self, works: list[dist.Work], step: Step) -> None:
        for work in works:
            work.wait()
        if self.observe is not None:
            self.observe(step)


class Merged:
    """O and LSE over the columns seen so far."""

    def __init__(self, q: Tensor, v: Tensor):
        self.q, self.v = q, v
        self.O: Tensor | None = None  # the only result so far, unchanged, or the merged results, in sum_dtype
        self.LSE: Tensor | None = None

    def add(self, rows: slice, O: Tensor, LSE: Tensor) -> None:
        """Merges in O (B, H, rows, Dv) and LSE (B, H, rows) over other columns."""
        if self.O is None and O.shape[2] == self.q.shape[2]:
            self.O, self.LSE = O, LSE
            return
        if self.O is None:
            self.O = allocate.output(self.q, self.v).zero_()
            self.LSE = allocate.lse(self.q).fill_(-torch.inf)
        self.O = self.O.to(sum_dtype(self.q))
        O_sum, LSE_sum = self.O[:, :, rows], self.LSE[:, :, rows]
        weight = torch.sigmoid(LSE - LSE_sum).masked_fill_(LSE.isneginf(), 0)  # −∞ − −∞ is NaN
        O_sum.lerp_(O.to(O_sum.dtype), weight.unsqueeze(-1))
        LSE_sum.copy_(torch.logaddexp(LSE_sum, LSE))

    def result(self) -> tuple[Tensor, Tensor]:
        if self.O is None:  # no row sees anything
            return allocate.output(self.q, self.v).zero_(), allocate.lse(self.q).fill_(-torch.inf)
        return self.O.to(self.q.dtype), self.LSE


def _call(part: Part, backend: str | None, alibi: Tensor | None, q: Tensor, k: Tensor, v: Tensor, O=None, dO=None) -> tuple:
    """The call (of a backward, with O and dO), with the backend that serves it, and its spans."""
    spans = None if part.spans is None else part.spans.expand(*q.shape[:3], 2)
    call = Call.of(q, k, v, None, spans, part.settings, O, dO, alibi=alibi)
    return call._replace(settings=part.settings._replace(backend=as_chosen(backend, choose(backend, call)))), spans


def compute(part: Part, backend: str | None, q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None, alibi: Tensor | None = None):
    """O and LSE of a part. alibi: slopes (B, H)."""
    call, spans = _call(part, backend, alibi, q, k, v)
    return shortcut.plan(FORWARD, call)(q, k, v, None, spans, seed, *_slopes(alibi))


def compute_backward(part: Part, backend: str | None, dO, dLSE, q, k, v, O, LSE, seed, alibi: Tensor | None = None):
    """dQ, dK, dV of a part. O and LSE are those of whole rows, so P, dP and their row sums are the same as in the whole sequence."""
    call, spans = _call(part, backend, alibi, q, k, v, O, dO)
    return shortcut.plan(BACKWARD, call)(dO, dLSE, q, k, v, None, spans, O, LSE, seed, *_slopes(alibi))[:3]


def _slopes(alibi: Tensor | None) -> tuple:
    """A plan's last arguments: no bias, and the slopes."""
    return () if alibi is None else (None, alibi)


class RingAttention(Function):
    """(q, k, v) → (O, LSE), on local shards."""

    @staticmethod
    def forward(ctx, ring, q, k, v, seed):
        O, LSE = ring.forward(q, k, v, seed)
        ctx.ring = ring
        ctx.save_for_backward(q, k, v, O, LSE, seed)
        ctx.set_materialize_grads(False)
        return O, LSE

    @staticmethod
    @once_differentiable
    def backward(ctx, dO, dLSE):
        q, k, v, O, LSE, seed = ctx.saved_tensors
        dO = torch.zeros_like(O) if dO is None else dO  # even if no gradient arrives: the other ranks wait for this rank's part
        return None, *ctx.ring.backward(dO, dLSE, q, k, v, O, LSE, seed), None

"""Attention over several processes equals that of one: O, LSE and gradients, whatever the order, the method and the number of ranks.

python checks/check_parallel.py

One file because its checks share the inputs, and processes that take seconds to start.
"""

import importlib
import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from harness import Case, Report, expect_error, limit, naive, run_alone

from flash_attention import FlashAttention, flash_attention, parallel
from flash_attention.parallel import order as orders
from flash_attention.parallel import parallel_attention, positions, processes, ring, shard, unshard
from flash_attention.reference.visible import Visible
from flash_attention.spans import documents

N = 96  # divisible into 2 · 2, 2 · 3 and 2 · 4 chunks, none of which is as long as a tile
LENGTHS = [13, 30, 0, 25, 28]
SETTINGS = {
    "full": {},
    "causal": {"causal": True},
    "causal, scaled": {"causal": True, "scale": -0.7},
    "window": {"window": (20, 7)},
    "narrow window": {"window": (0, 0)},
    "causal window": {"causal": True, "window": (30, None)},
    "documents": {"spans": documents(LENGTHS, causal=True)},
    "documents and window": {"spans": documents(LENGTHS), "window": (17, 3)},
    "some rows blind": {"spans": torch.stack((torch.arange(N) // 2, torch.arange(N) // 2 + torch.arange(N) % 3), -1).int()[None, None]},
    "spans of each head": {"spans": torch.randint(-9, N + 9, (2, 4, N, 2), generator=torch.Generator().manual_seed(0)).sort(-1)[0].int()},
    "dropout": {"dropout_p": 0.2},
    "causal, dropout": {"causal": True, "dropout_p": 0.2},
    "softcap": {"softcap": 1.5},
    "ALiBi": {"alibi": torch.tensor([0.5, 0.25, 0.1, 0.02])},
    "causal, ALiBi of each sequence": {"causal": True, "alibi": torch.linspace(0.01, 0.4, 8).view(2, 4)},
    "everything and scores": {
        **{"causal": True, "dropout_p": 0.3, "spans": documents([50, 46])},
        **{"softcap": 2.0, "alibi": torch.tensor([0.3, 0.2, 0.1, 0.0])},
    },
    "everything": {"causal": True, "dropout_p": 0.3, "window": (40, None), "spans": documents([50, 46])},
}


class Found(NamedTuple):
    """Of a whole sequence."""

    O: torch.Tensor
    LSE: torch.Tensor
    dQ: torch.Tensor
    dK: torch.Tensor
    dV: torch.Tensor


NAMES = Found._fields


def inputs(dtype, Hkv: int, Nq: int = N) -> tuple:
    """q, k, v, dO, dLSE of the whole, the same on every rank."""
    random = torch.Generator().manual_seed(0)
    shapes = (2, 4, Nq, 16), (2, Hkv, N, 16), (2, Hkv, N, 24), (2, 4, Nq, 24), (2, 4, Nq)
    return tuple(torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for shape in shapes)


def one_device(settings: dict, q, k, v, dO, dLSE) -> Found:
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    torch.manual_seed(7)
    O, LSE = flash_attention(q, k, v, **settings, return_lse=True)
    seen = LSE.isfinite()
    return Found(O.detach(), LSE.detach(), *torch.autograd.grad((O, LSE[seen]), (q, k, v), (dO, dLSE[seen])))


def on_ranks(rank: int, settings: dict, whole: tuple, **options) -> Found:
    """The whole result, put together from what each rank computes of its shares."""
    q, k, v, dO, dLSE = (shard(x, order=options["order"]) for x in whole)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    if "spans" in settings:
        settings = {**settings, "spans": shard(settings["spans"], order=options["order"])}
    torch.manual_seed(7 + rank)  # the first rank's counts
    O, LSE = parallel_attention(q, k, v, **settings, **options, return_lse=True)
    seen = LSE.isfinite()
    gradients = torch.autograd.grad((O, LSE[seen]), (q, k, v), (dO, dLSE[seen]))
    return Found(*(unshard(x.detach(), order=options["order"]) for x in (O, LSE, *gradients)))


def exact(rank: int, dtype) -> list[tuple]:
    """(case, name, got, wanted) for every case: computed on all ranks, then on this one alone."""
    size = dist.get_world_size()
    compared = []
    for order in parallel.ORDERS:
        for method in ("ring", "all_to_all"):
            for name, settings in SETTINGS.items():
                Hkv = 4 if method == "all_to_all" and size == 4 else 2
                if method == "all_to_all" and (size == 3 or "dropout_p" in settings):
                    continue
                whole = inputs(dtype, Hkv)
                got = on_ranks(rank, settings, whole, order=order, method=method)
                if name in ("causal", "everything"):
                    again = on_ranks(rank, settings, whole, order=order, method=method)
                    assert all(map(torch.equal, got, again)), f"{order} {method} {name}: two runs differ"
                if rank == 0:
                    compared.append((f"{size} ranks, {order}, {method}", name, got))
    return compared


@pytest.mark.parametrize("size", (2, 3, 4))
def check_exact(size):
    """float64: within 1e-12 of one device; the same bits twice."""
    report = Report(f"{size} ranks beside one, float64")
    wanted = {}
    for what, name, got in processes.results(size, exact, torch.float64)[0]:
        Hkv = 4 if "all_to_all" in what and size == 4 else 2
        if (name, Hkv) not in wanted:
            wanted[name, Hkv] = one_device(SETTINGS[name], *inputs(torch.float64, Hkv))
        for field, value, want in zip(NAMES, got, wanted[name, Hkv], strict=True):
            report.compare(what, field, value, want, 1e-12, name)
    report.verdict()


def rounded(rank: int, dtype) -> list[tuple]:
    compared = []
    for order in parallel.ORDERS:
        for name in ("full", "causal", "causal window", "documents", "causal, dropout")[: 5 if dtype == torch.float32 else 2]:
            compared.append((order, name, on_ranks(rank, SETTINGS[name], inputs(dtype, 2), order=order, method="ring")))
    return compared


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def check_rounding(dtype):
    """Four ranks, by the rule for all backends: merging partial results rounds no more than one device does."""
    report = Report(f"4 ranks, {dtype}")
    whole = inputs(dtype, 2)
    for order, name, got in processes.results(4, rounded, dtype)[0]:
        truth = one_device(SETTINGS[name], *(x.double() for x in whole))
        in_dtype = truth  # then the tolerance has no share for naive attention's error
        if dtype == torch.bfloat16:
            case = Case(B=2, H=4, Hkv=2, Nq=N, Nk=N, D=16, Dv=24, causal=name == "causal", dtype=dtype)
            q, k, v, dO, dLSE = whole
            in_dtype = naive(case, q, k, v, None, dO, dLSE)[: len(NAMES)]
        for field, value, want, rough in zip(NAMES, got, truth, in_dtype, strict=True):
            report.compare(order, field, value, want, limit(field, want, rough, dtype, 16), name)
    report.verdict()


# ---- without processes: what each rank computes, and how shards travel


def shares(size: int, order: str, settings: dict, Nq: int = N) -> list[ring.Share]:
    """Every rank's."""
    left, right = settings.get("window") or (None, None)
    as_set = ring.Settings(1.0, settings.get("dropout_p", 0.0), left, 0 if settings.get("causal") else right)
    spans = settings.get("spans")

    def local(rank: int):
        return None if spans is None else torch.cat([spans[:, :, run.start : run.stop] for run in orders.runs(Nq, size, rank, order)], 2)

    device, alibi = torch.device("cpu"), settings.get("alibi")
    return [ring.Share(Nq, N, size, rank, order, as_set, local(rank), device, alibi) for rank in range(size)]


@pytest.mark.parametrize("Nq", (N, N // 2, 2 * N))
@pytest.mark.parametrize("order", parallel.ORDERS)
@pytest.mark.parametrize("size", (1, 2, 3, 4, 6))
def check_parts(size, order, Nq):
    """The calls of all ranks and steps together compute every visible element of the whole once; one call per step, and none without
    work."""
    for name, settings in SETTINGS.items():
        if "spans" in settings and Nq != N:
            continue
        left, right = settings.get("window") or (None, None)
        right = 0 if settings.get("causal") else right
        spans = settings.get("spans")
        wanted = Visible(Nq, N, left, right, spans).dense(slice(0, Nq), slice(0, N)).int()
        got = torch.zeros_like(wanted.expand(*(spans.shape[:2] if spans is not None else (1, 1)), Nq, N))
        for share in shares(size, order, settings, Nq):
            rows = torch.cat([torch.arange(run.start, run.stop) for run in share.held])
            for owner in range(size):
                columns = torch.cat([torch.arange(run.start, run.stop) for run in share.columns_of(owner)])
                sees = wanted[:, :, rows][..., columns]
                parts = share.parts(owner)
                assert share.needs[owner] == bool(sees.any()) == bool(parts), f"{name}: rank {share.rank}, shard of {owner}: {parts}"
                most = len(share.held) * len(share.columns_of(owner)) if share.by_position else 1
                assert len(parts) <= most, f"{name}: {len(parts)} calls in a step"
                for part in parts:
                    i, j = rows[part.rows], columns[part.columns]
                    if part.settings.q_offset or part.settings.k_offset:  # dropout needs positions: each run is a call
                        assert i.tolist() == list(range(part.settings.q_offset, part.settings.q_offset + len(i)))
                        assert j.tolist() == list(range(part.settings.k_offset, part.settings.k_offset + len(j)))
                    seen = part.settings.visible(len(i), len(j), part.spans).dense(slice(0, len(i)), slice(0, len(j)))
                    got[:, :, i[:, None], j] += seen.int()
        assert torch.equal(got, wanted.expand_as(got)), f"{name}: {(got != wanted).sum()} elements are not computed once"


@pytest.mark.parametrize("size", (2, 3, 4, 8))
def check_zigzag_is_balanced(size):
    """Causal: every rank computes the same number of scores, and no call needs an interval for each row, so that the plain kernels
    serve."""
    computed = {}
    for order in parallel.ORDERS:
        computed[order] = []
        for share in shares(size, order, {"causal": True}):
            parts = [part for owner in range(size) for part in share.parts(owner)]
            assert all(part.spans is None and part.settings.is_whole for part in parts), parts
            seen = 0
            for part in parts:
                Nq, Nk = part.rows.stop - part.rows.start, part.columns.stop - part.columns.start
                seen += int(part.settings.visible(Nq, Nk, None).dense(slice(0, Nq), slice(0, Nk)).sum())
            computed[order].append(seen)
    assert len(set(computed["zigzag"])) == 1, computed
    assert computed["contiguous"][-1] > 1.9 * computed["contiguous"][0], computed


def simulate(needs: list[list[bool]]) -> tuple[list[set], int]:
    """Which shards each rank has held, and the number of steps, as K and V travel."""
    size = len(needs)
    had, steps = [{rank} for rank in range(size)], 0
    for trip in ring.trips(needs):
        steps += trip.steps
        at_hand = list(range(size))  # whose shard each rank holds
        for t in range(trip.steps):
            sent = {}
            for rank in range(size):
                owner = trip.shard(rank, t)
                if owner is not None and trip.hops[owner] > t:
                    assert at_hand[rank] == owner, f"rank {rank} does not hold the shard of {owner} after {t} hops: {trip}"
                    sent[(rank + trip.direction) % size] = owner
            for rank in range(size):
                assert trip.shard(rank, t + 1) == sent.get(rank), f"rank {rank} waits for what is not sent, hop {t + 1}: {trip}"
            at_hand = [sent.get(rank) for rank in range(size)]
            for rank, owner in sent.items():
                had[rank].add(owner)
    return had, steps


def check_trips():
    """Every rank gets the shards that it needs; a window's neighbours are reached by short trips; no shard travels further than needed."""
    random = torch.Generator().manual_seed(0)
    for _ in range(500):
        size = int(torch.randint(1, 9, (), generator=random))
        needs = (torch.rand(size, size, generator=random) < torch.rand((), generator=random)).tolist()
        had, steps = simulate(needs)
        assert all(had[r] >= {s for s in range(size) if needs[r][s]} for r in range(size)), needs
        assert steps <= size - 1
    everyone = [[True] * 6 for _ in range(6)]
    assert ring.trips(everyone) == [ring.Trip(1, [5] * 6)]
    past = [[s in (r, r - 1) for s in range(6)] for r in range(6)]
    assert ring.trips(past) == [ring.Trip(1, [1, 1, 1, 1, 1, 0])]
    both = [[abs(s - r) < 2 for s in range(6)] for r in range(6)]
    assert [trip.steps for trip in ring.trips(both)] == [1, 1]
    alone = [[s == r for s in range(6)] for r in range(6)]
    assert ring.trips(alone) == []
    causal = [[s <= r for s in range(6)] for r in range(6)]
    assert ring.trips(causal) == [ring.Trip(1, [5, 4, 3, 2, 1, 0])]


# ---- other kinds of calls


def layers(mesh) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest differences of the outputs, and of the weights' gradients, between a layer on two ranks and on one."""
    torch.manual_seed(0)
    settings = {"heads": 4, "dim_head": 8, "kv_heads": 2, "causal": True, "dropout": 0.2, "softcap": 3.0, "alibi": True}
    one, two = (FlashAttention(32, **settings, **spread).double() for spread in ({}, {"parallel": mesh}))
    two.load_state_dict(one.state_dict())
    x = torch.randn(2, 48, 32, dtype=torch.float64)
    torch.manual_seed(1)
    whole = one(x)
    torch.manual_seed(1)
    share = two(shard(x, mesh, dim=1))
    whole.square().sum().backward()
    share.square().sum().backward()
    for parameter in two.parameters():
        dist.all_reduce(parameter.grad, group=mesh.get_group())
    gradients = [(a.grad - b.grad).abs().max() for a, b in zip(one.parameters(), two.parameters(), strict=True)]
    expect_error(lambda: two(share, score_bias=torch.zeros(4, 48, 48, dtype=torch.float64)), ValueError, ["score_bias"])
    expect_error(lambda: two(share, mask=torch.ones(2, 48, dtype=torch.bool)), ValueError, ["mask"])
    assert "parallel=" in repr(two)
    return (shard(whole, mesh, dim=1) - share).abs().max(), torch.stack(gradients).max()


def several(rank: int) -> dict:
    """Different numbers of queries and keys; groups of a mesh; unshard's gradient; the choice of method; the order of events."""
    found = {}
    for Nq in (N // 2, 2 * N):
        for name in ("causal", "window", "causal, dropout", "full"):
            for order in parallel.ORDERS:
                found[Nq, name, order] = on_ranks(rank, SETTINGS[name], inputs(torch.float64, 2, Nq), order=order, method="ring")
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    q, k, v, *_ = (x[rank // 2, None] for x in inputs(torch.float64, 2))  # each row of the mesh has a batch of its own
    local = (shard(x, mesh["context"]) for x in (q, k, v))
    found["mesh"] = unshard(parallel_attention(*local, group=mesh["context"], causal=True), mesh["context"])
    try:
        shard(q, mesh)
    except ValueError as error:
        found["two dimensions"] = str(error)
    found["layer"] = layers(mesh["context"])
    x = torch.arange(8.0)[:, None].requires_grad_()
    (shard(x, dim=0) * (rank + 1)).sum().backward()
    found["gradient of shard"] = x.grad
    y = torch.zeros(2, 3).requires_grad_()
    (unshard(y, dim=0) * torch.arange(8.0)[:, None] * (rank + 1)).sum().backward()
    found["gradient of unshard"] = y.grad
    found["positions"] = {order: positions(16, order=order) for order in parallel.ORDERS}
    assert torch.equal(shard(torch.arange(16), dim=0), positions(16))
    whole = inputs(torch.float64, 2)[0]
    assert all(torch.equal(unshard(shard(whole, order=order), order=order), whole) for order in parallel.ORDERS)

    methods, events = [], []
    real = ring.Ring.forward, parallel.all_to_all.attention, ring.exchange, ring.compute, ring.Ring._finish
    ring.Ring.forward = lambda *a: (methods.append("ring"), real[0](*a))[1]
    parallel.all_to_all.attention = lambda *a, **options: (methods.append("all_to_all"), real[1](*a, **options))[1]
    ring.exchange = lambda *a: (events.append("start"), real[2](*a))[1]
    ring.compute = lambda *a: (events.append("compute"), real[3](*a))[1]
    ring.Ring._finish = lambda *a: (events.append("wait"), real[4](*a))[1]
    for H, Hkv, p in ((8, 8, 0.0), (8, 1, 0.0), (8, 8, 0.1), (6, 6, 0.0)):
        q, k, v = (torch.randn(1, h, 8, 8) for h in (H, Hkv, Hkv))
        parallel_attention(q, k, v, dropout_p=p)
    found["methods"], found["events"] = methods, events[:12]
    return found


def check_several():
    found = processes.results(4, several)
    report = Report("other lengths of queries, 4 ranks")
    for key, got in found[0].items():
        if isinstance(got, Found):
            want = one_device(SETTINGS[key[1]], *inputs(torch.float64, 2, key[0]))
            for field, value, wanted in zip(NAMES, got, want, strict=True):
                report.compare(f"Nq {key[0]}, {key[2]}", field, value, wanted, 1e-12, key[1])
    q, k, v, *_ = inputs(torch.float64, 2)
    for rank in range(4):
        one = rank // 2
        want = flash_attention(q[one, None], k[one, None], v[one, None], causal=True)
        report.compare("mesh", "O", found[rank]["mesh"], want, 1e-12, f"rank {rank}")
        assert max(found[rank]["layer"]) < 1e-12, found[rank]["layer"]
        assert "one dimension" in found[rank]["two dimensions"]
        mine = {"zigzag": (2 * rank, 14 - 2 * rank), "contiguous": (4 * rank, 4 * rank + 2)}
        for order, starts in mine.items():
            assert found[rank]["positions"][order].tolist() == [start + n for start in starts for n in range(2)]
        ends = rank, 7 - rank
        assert found[rank]["gradient of shard"][:, 0].tolist() == [(n in ends) * (rank + 1) for n in range(8)]
        assert found[rank]["gradient of unshard"][:, 0].tolist() == [10 * n for n in ends], "10 is 1 + 2 + 3 + 4, over the ranks' losses"
        assert found[rank]["methods"] == ["all_to_all", "ring", "ring", "ring"]
        assert found[rank]["events"] == ["start", "compute", "wait"] * 4, (
            "a step's copies start before it is computed and are waited for after"
        )
    report.verdict()


# ---- faults: an error on every rank, in time


def call(**changed):
    """A call of 8 rows on this rank."""
    q, k, v = (changed.pop(name, torch.zeros(1, 6, 8, 8)) for name in "qkv")
    return parallel_attention(q, k, v, **changed)


MISMATCHES = {
    "Nq": lambda: call(q=torch.zeros(1, 6, 16, 8)),
    "Nk": lambda: call(k=torch.zeros(1, 6, 16, 8), v=torch.zeros(1, 6, 16, 8)),
    "B": lambda: call(**{x: torch.zeros(2, 6, 8, 8) for x in "qkv"}),
    "Hkv": lambda: call(k=torch.zeros(1, 3, 8, 8), v=torch.zeros(1, 3, 8, 8)),
    "Dv": lambda: call(v=torch.zeros(1, 6, 8, 16)),
    "dtype": lambda: call(**{x: torch.zeros(1, 6, 8, 8, dtype=torch.bfloat16) for x in "qkv"}),
    "causal": lambda: call(causal=True),
    "left": lambda: call(window=(3, None)),
    "right": lambda: call(window=(None, 3)),
    "spans": lambda: call(spans=torch.zeros(1, 1, 8, 2, dtype=torch.int32)),
    "scale": lambda: call(scale=0.1),
    "dropout_p": lambda: call(dropout_p=0.1),
    "softcap": lambda: call(softcap=2.0),
    "alibi": lambda: call(alibi=torch.ones(6)),
    "order": lambda: call(order="contiguous"),
    "method": lambda: call(method="ring"),
    "has_gradients": lambda: call(q=torch.zeros(1, 6, 8, 8, requires_grad=True)),
}
REFUSED = {
    "no tensor": lambda: call(q=None),
    "dtypes": lambda: call(q=torch.zeros(1, 6, 8, 8, dtype=torch.float64)),
    "dropout_p": lambda: call(dropout_p=1.5),
    "softcap": lambda: call(softcap=-1.0),
    "alibi": lambda: call(alibi=torch.ones(5)),
    "odd share": lambda: call(**{x: torch.zeros(1, 6, 7, 8) for x in "qkv"}),
    "order": lambda: call(order="any"),
    "method": lambda: call(method="any"),
    "heads": lambda: call(**{x: torch.zeros(1, 5, 8, 8) for x in "qkv"}, method="all_to_all"),
    "backend": lambda: call(backend="any"),
}


def outcomes(rank: int) -> dict[str, tuple[str, str]]:
    """What each call raises if rank 1 makes a different call from the others, and that the group still works afterwards."""
    found = {}
    for kind, calls in (("mismatch", MISMATCHES), ("refused", REFUSED)):
        for name, other in calls.items():
            try:
                (other if rank == 1 else call)()
                found[kind, name] = "nothing", ""
            except Exception as error:
                found[kind, name] = type(error).__name__, str(error)
    assert torch.equal(call(v=torch.ones(1, 6, 8, 8)), torch.ones(1, 6, 8, 8))
    return found


def check_mismatches():
    found = processes.results(3, outcomes)
    for name in MISMATCHES:
        for rank, one in enumerate(found):
            kind, message = one["mismatch", name]
            assert kind == "ValueError" and name in message and "on rank 1" in message, f"{name}, rank {rank}: {kind}: {message}"
    for name in REFUSED:
        for rank, one in enumerate(found):
            kind, message = one["refused", name]
            if rank == 1:
                assert kind in ("TypeError", "ValueError", "NotImplementedError"), f"{name}: {kind}: {message}"
            else:
                assert kind == "RuntimeError" and "rank 1" in message, f"{name}, rank {rank}: {kind}: {message}"
    assert "equally long" in found[0]["mismatch", "Nq"][1] and "pad" in found[1]["refused", "odd share"][1]


def fails(rank: int, how: str) -> None:
    """Rank 1 dies, or stays away, at some point of a call."""
    q, k, v = (torch.randn(1, 4, 64, 8, requires_grad=True) for _ in range(3))
    real, count = ring.exchange, 0

    def exchange(*arguments):
        nonlocal count
        count += 1
        if rank == 1 and count == {"dies in the forward": 2, "dies in the backward": 4}.get(how):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    ring.exchange = exchange
    if rank == 1 and how == "dies before":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and how == "stays away":
        time.sleep(60)
    O = parallel_attention(q, k, v, method="ring", causal=True)
    if rank == 1 and how == "runs no backward":
        time.sleep(60)
    O.sum().backward()


TIMEOUT = 4


@pytest.mark.parametrize("how", ("dies before", "dies in the forward", "dies in the backward", "stays away", "runs no backward"))
def check_dead_rank(how):
    """The others raise within the group's timeout, and no gradient is written."""
    found = processes.run(3, fails, how, seconds=TIMEOUT, dead=(1,))
    for rank in (0, 2):
        assert found[rank] is not None, f"rank {rank} noticed nothing"
        kind, message, seconds = found[rank]
        print(f"{how}: rank {rank}: {kind} after {seconds:.1f} s: {message[:120]}")
        assert kind in ("RuntimeError", "DistBackendError") and seconds < 2 * TIMEOUT + 10, found[rank]


def check_compiled(recwarn):
    """A compiled function that attends in shares: the same result and gradients, without a warning."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        q, k, v = torch.randn(3, 1, 4, 16, 8, dtype=torch.float64).unbind()
        q.requires_grad_()

        def function(q, k, v):
            return parallel_attention(q * 2, k, v, causal=True) * 3

        plain, compiled = function(q, k, v), torch.compile(function, backend="aot_eager")(q, k, v)
        assert torch.equal(plain, compiled)
        assert torch.equal(*(torch.autograd.grad(O.sum(), q)[0] for O in (plain, compiled)))
        assert not [warning for warning in recwarn if "flash_attention" in str(warning.message)]
    finally:
        dist.destroy_process_group()


def check_example(monkeypatch):
    """The output of examples/ring_on_a_laptop.py is right: one process's result, balanced work, and the traffic."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    laptop = importlib.import_module("ring_on_a_laptop")
    results = laptop.together(2, 32, "zigzag", causal=True)
    for name, got, want in zip(("O", "dQ", "dK", "dV"), results[0].tensors, laptop.alone(32, causal=True), strict=True):
        torch.testing.assert_close(got, want, atol=2e-6, rtol=0, msg=name)
    kv = 2 * 2 * 16 * 8 * 4  # two heads of 8, float32
    for result in results:
        scores = [len(did.scores) for did in result.steps if did.what == "forward"]
        assert scores == [16 * 17 // 2, 128], scores
        assert [did.sent["K, V"] for did in result.steps] == [kv, 0, kv, 0, 0]
        assert [did.sent["dK, dV"] for did in result.steps] == [0, 0, 0, 0, kv]


def check_without_a_group():
    x = torch.zeros(1, 6, 8, 8)
    expect_error(lambda: parallel_attention(x, x, x), RuntimeError, ["init_process_group", "torchrun"])
    expect_error(lambda: shard(x), RuntimeError, ["init_process_group"])


if __name__ == "__main__":
    run_alone(__file__)

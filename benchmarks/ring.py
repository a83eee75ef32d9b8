"""A ring of GPUs, compared with one GPU on its share of the work: speed, balance, traffic, memory, and when copies are no longer hidden.

    torchrun --nproc_per_node 2 -m benchmarks.ring --json results/h200_ring_2.json  # bfloat16, H 16 on 8, D 128
    torchrun --nproc_per_node 2 -m benchmarks.ring --device cpu --length 2048       # a trial by gloo, float32

Forward and backward. Contenders take turns on all ranks at once, and a call counts as long as its slowest rank: "ring" is the whole call,
"share" the same kernel calls of each rank alone, without copies, merging or agreement, "whole" the entire sequence on one device. The
project's target is share / ring ≥ 0.9. Where ring-flash-attn (PyPI) can be imported, its zigzag runs too, once over this project's kernels
and once over PyTorch's FlashAttention-2; in place of the package flash_attn that it calls stands `stand_in` below.

One file because every contender, the peer's stand-in included, is timed by the same few lines on all ranks at once.
"""

import argparse
import os
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import report
from flash_attention import command_line, flash_attention, parallel
from flash_attention.backends import as_chosen, choose
from flash_attention.backends.cuda import BACKWARD, FORWARD
from flash_attention.call import Call, Settings
from flash_attention.parallel import ring, shard, unshard
from flash_attention.reference import normal_attention, normal_attention_causal
from flash_attention.shortcut import plan

H, HKV, D = 16, 8, 128
ROUNDS = 5


def inputs(n: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """q, k, v, dO of n rows, of one sequence."""
    random = torch.Generator(device).manual_seed(seed)
    return [torch.randn(1, heads, n, D, generator=random, device=device, dtype=dtype) for heads in (H, HKV, HKV, H)]


def both_passes(call: Callable, q: Tensor, k: Tensor, v: Tensor, dO: Tensor) -> list[Tensor]:
    """O, dQ, dK, dV."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    O = call(q, k, v)
    return [O.detach(), *torch.autograd.grad(O, (q, k, v), dO)]


def share_alone(share: ring.Share, q: Tensor, k: Tensor, v: Tensor, dO: Tensor) -> None:
    """The kernel calls of this rank's steps, on its own K and V, one after another. The results are meaningless."""
    for which in (FORWARD, BACKWARD):
        for owner in range(share.ranks):
            for part in share.parts(owner):
                if which == FORWARD:
                    ring.compute(part, None, q[:, :, part.rows], k[:, :, part.columns], v[:, :, part.columns], None)
                    continue
                rows = (x[:, :, part.rows] for x in (dO, q))
                columns = (x[:, :, part.columns] for x in (k, v))
                (dO_rows, q_rows), (k_columns, v_columns) = rows, columns
                # LSE of more columns than these would be larger: P stays in range.
                LSE = torch.full(q_rows.shape[:3], 20.0, device=q.device)
                ring.compute_backward(part, None, dO_rows, None, q_rows, k_columns, v_columns, q_rows, LSE, None)


def timed(contenders: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """ms of each contender's calls on the slowest rank, in turns; one call each to warm up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for n in range(rounds + 1):
        for name, call in contenders.items():
            _wait(device)
            dist.barrier()
            start = time.perf_counter()
            call()
            _wait(device)
            mine = torch.tensor(1e3 * (time.perf_counter() - start), device=device, dtype=torch.float64)
            dist.all_reduce(mine, dist.ReduceOp.MAX)
            if n:
                times[name].append(mine.item())
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def operations(N: int, causal: bool, ranks: int = 1) -> float:
    """Of a forward and a backward, for each rank, as the field counts them."""
    return 3.5 * 4 * H * N * N * D / (2 if causal else 1) / ranks


# ---- correctness


def check(device: torch.device, dtype: torch.dtype, causal: bool, contenders: dict[str, Callable]) -> float:
    """The worst of error / allowed over contenders, O, dQ, dK and dV: twice what normal attention in this dtype is off by."""
    N = 2048 if device.type == "cuda" else 256
    whole = inputs(N, device, dtype)
    normal = normal_attention_causal if causal else normal_attention
    truth = both_passes(normal, *(x.double() for x in whole))
    rough = both_passes(normal, *whole)
    worst = 0.0
    for name, call in contenders.items():
        got = [unshard(x) for x in both_passes(call, *map(shard, whole))]
        for what, value, want, other in zip(("O", "dQ", "dK", "dV"), got, truth, rough, strict=True):
            allowed = 2 * (other.double() - want).abs().max() + 1e-6
            error = (value.double() - want).abs().max()
            if not error <= allowed:
                raise AssertionError(f"{name}, causal {causal}: {what} is off by {error:.1e}, allowed {allowed:.1e}")
            worst = max(worst, (error / allowed).item())
    return worst


# ---- memory


def planned_memory(n: int, ranks: int, itemsize: int) -> dict[str, int]:
    """Bytes at the peak of a forward and of a backward beside q, k, v, dO, for n rows on each rank.

    kv is one shard's K and V. Forward: two buffers of kv, O in float32, a step's O as its kernel wrote it and in float32. Backward: O
    and LSE; two buffers of kv; dQ, dK and dV in float32; a kernel's dQ, dK and dV and its float32 workspace for dQ; dK and dV that travel.
    """
    rows, kv = H * n * D, 2 * HKV * n * D
    first_hop, onward = kv * itemsize, kv * 4
    travelling = 2 * first_hop if ranks == 2 else first_hop + 2 * onward
    forward = 2 * kv * itemsize + rows * (4 + itemsize + 4) + 2 * 4 * H * n
    backward = rows * itemsize + 4 * H * n + 2 * kv * itemsize + 4 * (rows + kv) + itemsize * (rows + kv) + 4 * rows + travelling
    return {"forward": forward, "backward": backward}


def measured_memory(call: Callable, q: Tensor, k: Tensor, v: Tensor, dO: Tensor) -> dict[str, int]:
    """The same, measured."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    O = call(q, k, v)
    forward = torch.cuda.max_memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    gradients = torch.autograd.grad(O, (q, k, v), dO)
    backward = torch.cuda.max_memory_allocated() - before
    del gradients
    return {"forward": forward, "backward": backward}


# ---- traffic, and when it is no longer hidden


def link_speed(device: torch.device, count: int) -> float:
    """Bytes per second that each rank sends to the next while it receives from the one before."""
    group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    sent, received = (torch.zeros(count, dtype=torch.uint8, device=device) for _ in range(2))

    def once() -> None:
        messages = [ring.Message(0, (rank + 1) % ranks, sent, True), ring.Message(0, (rank - 1) % ranks, received, False)]
        for work in ring.exchange(group, messages):
            work.wait()

    return count / (1e-3 * median(timed({"link": once}, device, ROUNDS)["link"]))


def on_paper(ranks: int, n: int, causal: bool, flops: float, link: float, itemsize: int = 2) -> float:
    """The part of a ring's time in which its ranks compute: n rows each, kernels of `flops` FLOP/s, links of `link` bytes/s.

    A step takes as long as its kernels or its copies, whichever is longer. A forward's step sends K and V, a backward's K and V and, in
    float32, dK and dV; the last dK and dV come home with nothing to hide behind. Merging is left out.
    """
    kv = 2 * HKV * n * D * itemsize
    step = 4 * H * n * n * D / (2 if causal else 1) / flops
    forward = ranks * step if ranks == 1 else (ranks - 1) * max(step, kv / link) + step
    gradients = kv * 4 / itemsize
    backward = 2.5 * step + (ranks - 1) * max(2.5 * step, (kv + gradients) / link) + (gradients / link if ranks > 1 else 0)
    return 3.5 * ranks * step / (forward + backward)


def hidden_from(causal: bool, flops: float, link: float, itemsize: int = 2) -> int:
    """The least number of rows per rank that hides a forward's copies (a backward needs 3 / 2.5 times as many)."""
    return round(2 * HKV * D * itemsize / link * flops / (4 * H * D / (2 if causal else 1)))


# ---- ring-flash-attn, the public package


def stand_in(forward: Callable, backward: Callable) -> None:
    """Modules under the names that ring-flash-attn imports; tensors are (B, N, H, D)."""

    def _flash_attn_forward(q, k, v, dropout_p, softmax_scale, causal, window_size_left=-1, window_size_right=-1, **_):
        O, LSE = forward(q, k, v, softmax_scale, causal)
        return O, LSE, None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left=-1, window_size_right=-1, **_
    ):
        for to, x in zip((dq, dk, dv), backward(dout, q, k, v, out, softmax_lse, softmax_scale, causal), strict=True):
            to.copy_(x)

    # The package reads their argument names, and passes on what it finds there.
    interface = types.ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_forward, interface._flash_attn_backward = _flash_attn_forward, _flash_attn_backward
    interface._flash_attn_varlen_forward = interface._flash_attn_varlen_backward = None
    package = types.ModuleType("flash_attn")
    package.flash_attn_interface = interface
    for name in [name for name in sys.modules if name.startswith("ring_flash_attn")]:
        del sys.modules[name]
    # Its adapters for transformers, not needed here, do not import beside newer versions of that.
    adapters = types.ModuleType("ring_flash_attn.adapters")
    adapters.substitute_hf_flash_attn = adapters.update_ring_flash_attn_params = None
    sys.modules |= {module.__name__: module for module in (package, interface, adapters)}


def our_kernels() -> tuple[Callable, Callable]:
    def call_of(q, k, v, scale, causal, *others) -> Call:
        call = Call.of(q, k, v, None, None, Settings(scale, right=0 if causal else None), *others)
        return call._replace(settings=call.settings._replace(backend=as_chosen(None, choose(None, call))))

    def forward(q, k, v, scale, causal):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        O, LSE = plan(FORWARD, call_of(q, k, v, scale, causal))(q, k, v, None, None, None)
        return O.transpose(1, 2), LSE

    def backward(dO, q, k, v, O, LSE, scale, causal):
        dO, q, k, v, O = (x.transpose(1, 2) for x in (dO, q, k, v, O))
        gradients = plan(BACKWARD, call_of(q, k, v, scale, causal, O, dO))(dO, None, q, k, v, None, None, O, LSE, None)
        return [x.transpose(1, 2) for x in gradients]

    return forward, backward


def torch_kernels() -> tuple[Callable, Callable]:
    """FlashAttention-2 as PyTorch carries it."""
    aten = torch.ops.aten

    def forward(q, k, v, scale, causal):
        return aten._flash_attention_forward(q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=scale)[:2]

    def backward(dO, q, k, v, O, LSE, scale, causal):
        zero = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.zeros((), dtype=torch.uint64, device=q.device)
        lengths = q.shape[1], k.shape[1]
        return aten._flash_attention_backward(dO, q, k, v, O, LSE, None, None, *lengths, 0.0, causal, *zero, scale=scale)

    return forward, backward


def public_zigzag(kernels: Callable) -> Callable | None:
    """ring-flash-attn's zigzag, (B, H, N, D) in and out; None where it cannot be imported."""
    stand_in(*kernels())
    try:
        from ring_flash_attn.zigzag_ring_flash_attn import zigzag_ring_flash_attn_func
    except ImportError:
        return None
    return lambda q, k, v: zigzag_ring_flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True).transpose(1, 2)


# ---- the whole benchmark


def say(*words) -> None:
    if dist.get_rank() == 0:
        print(*words, flush=True)


def measure(N: int, causal: bool, device: torch.device, dtype: torch.dtype, peers: dict, link: float, args: argparse.Namespace) -> dict:
    """One length, causal or not; prints what it finds."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    whole = inputs(N, device, dtype) if args.whole >= N else None
    mine = inputs(N // ranks, device, dtype, seed=rank) if whole is None else [shard(x) for x in whole]
    share = ring.Share(N, N, ranks, rank, "zigzag", Settings(D**-0.5, right=0 if causal else None), None, device)
    in_ring, by_heads = (partial(f, causal=causal) for f in (parallel.ring_attention, parallel.all_to_all_attention))
    steps: list[ring.Step] = []
    both_passes(partial(in_ring, observe=steps.append), *mine)
    sent = sum(step.sent() for step in steps)
    steps.clear()
    contenders = {
        "ring": partial(both_passes, in_ring, *mine),
        "share": partial(share_alone, share, *mine),
        "all-to-all": partial(both_passes, by_heads, *mine),
    }
    if whole is not None:
        contenders["whole"] = partial(both_passes, partial(flash_attention, causal=causal), *whole)
    if causal:
        contenders |= {peer: partial(both_passes, zigzag, *mine) for peer, zigzag in peers.items()}
    times = {name: median(ms) for name, ms in timed(contenders, device, args.rounds).items()}
    alone = []
    for _ in range(args.rounds):  # each rank by itself: is the work balanced?
        _wait(device)
        start = time.perf_counter()
        share_alone(share, *mine)
        _wait(device)
        alone.append(1e3 * (time.perf_counter() - start))
    of_ranks = [torch.zeros((), dtype=torch.float64, device=device) for _ in range(ranks)]
    dist.all_gather(of_ranks, torch.tensor(median(alone), dtype=torch.float64, device=device))
    of_ranks = [x.item() for x in of_ranks]
    say(f"\nN {N}, causal {causal}: " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in times.items()))
    say(f"  {operations(N, causal, ranks) / times['ring'] / 1e9:.0f} TFLOP/s a rank; share / ring {times['share'] / times['ring']:.3f}")
    if "whole" in times:
        say(f"  whole / ({ranks} · ring) {times['whole'] / ranks / times['ring']:.3f}")
    for peer in peers if causal else ():
        say(f"  {peer} / ring {times[peer] / times['ring']:.3f}")
    say(f"  shares alone {', '.join(f'{ms:.1f}' for ms in of_ranks)} ms: longest / shortest {max(of_ranks) / min(of_ranks):.3f}")
    say(f"  each rank sends {sent / 1e9:.3f} GB: {1e3 * sent / link:.1f} ms of the link")
    case = {"N": N, "causal": causal, "ms": times, "shares alone, ms": of_ranks, "GB sent by each rank": sent / 1e9}
    if device.type == "cuda":
        case["memory"] = {"planned": planned_memory(N // ranks, ranks, dtype.itemsize), "measured": measured_memory(in_ring, *mine)}
        for kind, figures in case["memory"].items():
            say(f"  memory beside q, k, v, dO, {kind}: " + ", ".join(f"{what} {size / 1e9:.3f} GB" for what, size in figures.items()))
    return case


def print_on_paper(speeds: dict[bool, float], link: float) -> list[dict]:
    say(
        "\nOn paper, from these kernels' speed; 50 GB/s is a network port of 400 Gb/s for each GPU. The part of the time that is computing:"
    )
    rows = []
    for causal, flops in speeds.items():
        for speed in (link, 50e9):
            fewest = hidden_from(causal, flops, speed)
            say(f"  causal {causal}, {speed / 1e9:.0f} GB/s: a forward's copies hide from {fewest} rows a rank on")
            for ranks in (8, 64):
                row = {N: on_paper(ranks, N // ranks, causal, flops, speed) for N in (65536, 131072, 524288, 1 << 20)}
                say(f"    {ranks:2} ranks: " + ", ".join(f"N {N} {part:.2f}" for N, part in row.items()))
                rows.append({"ranks": ranks, "causal": causal, "GB/s": speed / 1e9, "hidden from": fewest, "computing": row})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, nargs="+", default=[65536, 131072], help="rows in all (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--whole", type=int, default=65536, help="the longest sequence that is timed on one device too")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=command_line.output_file, metavar="FILE", help="write device, versions and every figure")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it under torchrun")
    device, dtype = torch.device("cpu"), torch.float32
    if args.device == "cuda":
        device, dtype = torch.device("cuda", int(os.environ["LOCAL_RANK"])), torch.bfloat16
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    ranks = dist.get_world_size()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    say(f"{ranks} × {name}, torch {torch.__version__}, {dtype}, H {H} on {HKV}, D {D}; forward + backward, median of {args.rounds}")
    peers = {}
    for kind, kernels in {"these kernels": our_kernels, "torch's FlashAttention-2": torch_kernels}.items():
        # On float32, which has no rounding copies, the package adds into its own buffers.
        if device.type == "cuda" and (zigzag := public_zigzag(kernels)):
            peers[f"ring-flash-attn over {kind}"] = zigzag
    if not peers:
        say("ring-flash-attn is not installed: it is left out")
    for causal in (True, False):
        checked = {f: partial(getattr(parallel, f), causal=causal) for f in ("ring_attention", "all_to_all_attention")}
        say(f"causal {causal}: largest error / allowed {check(device, dtype, causal, checked):.2f}")
    for peer in list(peers):
        try:
            say(f"{peer}: largest error / allowed {check(device, dtype, True, {peer: peers[peer]}):.2f}")
        except Exception as error:  # the same on every rank
            say(f"{peer} is left out: {type(error).__name__}: {error}")
            del peers[peer]
    link = link_speed(device, 2 * HKV * max(args.length) // ranks * D * dtype.itemsize)
    say(f"each rank sends {link / 1e9:.1f} GB/s, and receives as much")
    cases = [measure(N, causal, device, dtype, peers, link, args) for N in args.length for causal in (True, False)]
    speeds = {case["causal"]: 1e3 * operations(case["N"], case["causal"], ranks) / case["ms"]["share"] for case in cases}
    paper = print_on_paper(speeds, link)
    if dist.get_rank() == 0 and args.json:
        settings = {"ranks": ranks, "dtype": str(dtype), "rounds": args.rounds, "link GB/s": link / 1e9}
        report.write_json(args.json, report.environment(str(device)), settings, cases, on_paper=paper)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

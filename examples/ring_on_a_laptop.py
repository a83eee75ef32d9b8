"""A ring on one machine: a few processes attend together to one sequence, and print what each of them computed and sent.

python examples/ring_on_a_laptop.py                              # 4 processes, causal, zigzag
python examples/ring_on_a_laptop.py --order contiguous --ranks 3
python examples/ring_on_a_laptop.py --window 20                  # steps that no row sees are skipped
"""

import argparse
from typing import NamedTuple

import torch
from torch import Tensor

from flash_attention import command_line, flash_attention
from flash_attention.parallel import ORDERS, processes, ring, ring_attention, shard, unshard
from flash_attention.parallel.order import runs


class Did(NamedTuple):
    """What one rank did in one step."""

    what: str  # "forward" or "backward"
    t: int
    shards: list[int]  # whose K and V it attended to
    scores: Tensor  # (computed, 2): row and column, in the whole sequence, of every score that it needed
    calls: int  # of a kernel
    sent: dict[str, int]  # bytes of "K, V" and of "dK, dV"
    to: list[int]  # which ranks


class Result(NamedTuple):
    """What one rank did, and the whole result."""

    steps: list[Did]
    tensors: list[Tensor]  # the whole O, dQ, dK, dV
    held: list[range]  # the positions of its rows


def inputs(N: int, H: int = 2, Hkv: int = 2, D: int = 8) -> list[Tensor]:
    """q, k, v and dO, the same wherever they are made."""
    random = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, N, D, generator=random) for heads in (H, Hkv, Hkv, H)]


def attend(rank: int, ranks: int, N: int, order: str, settings: dict) -> Result:
    """One rank's part: forward and backward, observed."""
    q, k, v, dO = (shard(x, order=order) for x in inputs(N))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    steps: list[Did] = []

    def positions(owner: int) -> Tensor:
        return torch.cat([torch.arange(run.start, run.stop) for run in runs(N, ranks, owner, order)])

    def observe(step: ring.Step) -> None:
        scores = [torch.zeros(0, 2, dtype=torch.int64)]
        for owner, part in step.computed:
            i, j = positions(rank)[part.rows], positions(owner)[part.columns]
            sees = part.settings.visible(len(i), len(j), part.spans).dense(slice(0, len(i)), slice(0, len(j)))[0, 0]
            row, column = sees.nonzero().unbind(1)
            scores.append(torch.stack((i[row], j[column]), 1))
        sent = {"K, V": 0, "dK, dV": 0}
        for message in step.messages:
            if message.sends:
                sent["dK, dV" if message.tag % 2 else "K, V"] += message.tensor.nbytes
        to = sorted({message.peer for message in step.messages if message.sends})
        shards = list(dict.fromkeys(owner for owner, _ in step.computed))
        steps.append(Did(step.what, step.t, shards, torch.cat(scores), len(step.computed), sent, to))

    torch.manual_seed(0)  # dropout's
    O = ring_attention(q, k, v, **settings, order=order, observe=observe)
    gradients = torch.autograd.grad(O, (q, k, v), dO)
    tensors = [unshard(x.detach(), order=order) for x in (O, *gradients)]
    return Result(steps, tensors, runs(N, ranks, rank, order))


def together(ranks: int, N: int, order: str, **settings) -> list[Result]:
    """What each of `ranks` processes did."""
    return processes.results(ranks, attend, ranks, N, order, settings)


def alone(N: int, **settings) -> list[Tensor]:
    """O, dQ, dK, dV from one process."""
    q, k, v, dO = inputs(N)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    torch.manual_seed(0)
    O = flash_attention(q, k, v, **settings)
    return [O.detach(), *torch.autograd.grad(O, (q, k, v), dO)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ranks", type=command_line.positive, default=4, help="processes")
    parser.add_argument("--length", type=command_line.positive, default=96, help="of the sequence; 2 · ranks divide it")
    parser.add_argument("--order", choices=ORDERS, default="zigzag")
    parser.add_argument("--window", type=command_line.positive, help="rows see so many columns before their own")
    args = parser.parse_args()
    if args.length % (2 * args.ranks):
        parser.error(f"--length must be a multiple of 2 · --ranks {2 * args.ranks}, got {args.length}")
    settings = {"causal": True, "window": args.window and (args.window, None)}
    results = together(args.ranks, args.length, args.order, **settings)
    print("rank  pass      step  K and V of   scores   calls  bytes sent: K, V    dK, dV")
    for rank, result in enumerate(results):
        for did in result.steps:
            shards = ", ".join(map(str, did.shards)) or "-"
            row = f"{rank:4}  {did.what:8}  {did.t:4}  {shards:>10}  {len(did.scores):7}  {did.calls:6}"
            print(f"{row}  {did.sent['K, V']:16,}  {did.sent['dK, dV']:8,}")
    worst = max((a - b).abs().max().item() for a, b in zip(results[0].tensors, alone(args.length, **settings), strict=True))
    print(f"O, dQ, dK and dV differ from one process's by at most {worst:.1e}")


if __name__ == "__main__":
    main()

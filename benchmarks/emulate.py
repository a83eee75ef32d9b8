"""What a kernel does, counted by the emulator: bytes by path, bank conflicts, products, exponentials, waits. No GPU needed.

python -m benchmarks.emulate --backend hopper --n 512
python -m benchmarks.emulate --backend hopper --n 512 --trace trace.json    a timeline of each warp, for https://ui.perfetto.dev
"""

import argparse
import json
from pathlib import Path

import torch

from flash_attention import flash_attention
from flash_attention.backends import BACKENDS, cuda, emulated, emulated_trace, no_gradients
from flash_attention.call import Call, Settings
from flash_attention.command_line import positive, run


def formulae(b: int, h: int, n: int, d: int, causal: bool, backward: bool) -> dict[str, float]:
    """The algorithm's minimum, independent of tiles: 2 products in the forward or 5 in the backward, one exponential per score, and each
    tensor read or written once (lesson 5)."""
    scores = b * h * n * (n + 1) / 2 if causal else b * h * n * n
    tensors = 8 if backward else 4  # q, k, v, O, and then dO, dQ, dK, dV
    return {"FLOP": (10 if backward else 4) * scores * d, "exponentials": scores, "bytes of 16-bit tensors": tensors * b * h * n * d * 2}


def write_trace(traces: list[emulated_trace.Trace], file: Path) -> None:
    """Prints a line for each engine and warp, and writes the file."""
    for trace in traces:
        print(f"\n{trace.file}: {trace.cycles:,.0f} cycles of the model, {len(trace.events):,} events")
        print(*emulated_trace.summary(trace), sep="\n")
    file.write_text(json.dumps(emulated_trace.chrome(traces)))
    print(f"\n{file}: open it in https://ui.perfetto.dev or chrome://tracing; a microsecond there is a cycle")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="hopper", choices=tuple(cuda.RUNGS), help="the rung (default %(default)s)")
    parser.add_argument("--b", type=positive, default=1, help="batch size (default %(default)s)")
    parser.add_argument("--h", type=positive, default=1, help="heads (default %(default)s)")
    parser.add_argument("--n", type=positive, default=512, help="length (default %(default)s)")
    parser.add_argument("--d", type=positive, default=64, help="head size (default %(default)s)")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument(
        "--places", type=positive, default=8, metavar="N", help="places with the most bank conflicts to show (default %(default)s)"
    )
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="instead of counting: write a timeline by the cost model of one multiprocessor, for Perfetto or chrome://tracing",
    )
    arguments = parser.parse_args()

    q, k, v, dO = torch.randn(4, arguments.b, arguments.h, arguments.n, arguments.d, dtype=torch.float16).unbind()
    if reason := BACKENDS[f"emulated:{arguments.backend}"].why_not(
        Call.of(q, k, v, None, None, Settings(1.0, right=0 if arguments.causal else None))
    ):
        parser.error(reason)
    backward_too = not no_gradients(BACKENDS[f"emulated:{arguments.backend}"])
    q, k, v = (x.requires_grad_(backward_too) for x in (q, k, v))
    watching = emulated.tracing() if arguments.trace else emulated.counting()
    with watching as seen:
        O = flash_attention(q, k, v, causal=arguments.causal, backend=f"emulated:{arguments.backend}")
        if backward_too:
            O.backward(dO)
    if arguments.trace:
        write_trace(seen, arguments.trace)
        return
    for of_call, backward in zip(seen, (False, True), strict=False):
        print(f"\n{of_call.file}: B {arguments.b} H {arguments.h} N {arguments.n} D {arguments.d}{' causal' * arguments.causal}, float16")
        for name, value in of_call.total.items():
            print(f"  {name:<50}{value:>16,}")
        print("  the algorithm needs")
        for name, value in formulae(arguments.b, arguments.h, arguments.n, arguments.d, arguments.causal, backward).items():
            print(f"    {name:<48}{value:>16,.0f}")
        accesses = sorted(of_call.shared.items(), key=lambda item: item[1].least - item[1].cycles)
        cycles, least = (sum(getattr(place, which) for _, place in accesses) for which in ("cycles", "least"))
        print(f"  shared memory, by threads: {cycles:,} cycles, {least:,} without bank conflicts; most conflicts:")
        for name, place in accesses[: arguments.places]:
            if place.cycles > place.least:
                print(f"    {name:<60}{place.instructions:>10,} instructions of a warp{place.cycles / place.least:>6.1f} × the cycles")
        print("  waits of a thread, by place")
        for name, times in of_call.waits.items():
            print(f"    {name:<60}{times:>10,}")


if __name__ == "__main__":
    run(main)

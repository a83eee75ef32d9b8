"""Time and memory of flash attention beside normal attention and PyTorch's own, for any mask. bench_causal.py is the same, causal.

    python bench.py --type all
    python bench.py --type flash --q_len 16384 --kv_len 16384
    python bench.py --type all --sweep --h 8 --d 64 --plot sweep.png

Each is checked against normal attention in float64, then timed in turn with the others in one process; the median counts. Exit code 1 if
flash attention is off by more than the tolerance. Nothing is written but what --json, --plot and --profile ask for.
"""

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import report
from benchmarks.case import DTYPES, MASKS, Case
from benchmarks.compare import Row, WrongResult, compare
from benchmarks.contenders import TYPES
from benchmarks.measure import matmul_limit
from flash_attention.backends import BACKENDS, GROUPS
from flash_attention.command_line import device, output_file, positive, probability, run, threads

SHORTEST = 128  # where a sweep begins
COLUMNS: list[report.Column] = [
    ("name", "type", ""),
    ("ms", "ms", ".2f"),
    ("forward_ms", "forward ms", ".2f"),
    ("backward_ms", "backward ms", ".2f"),
    ("tflops", "TFLOP/s", ".3g"),
    ("backward_tflops", "backward TFLOP/s", ".3g"),
    ("percent_of_matmul", "% of matmul", ".0f"),
    ("host_us", "host µs", ".0f"),
    ("memory_mb", "memory MB", ".1f"),
    ("speedup", "speed / normal", ".2f"),
    ("relative_to_sdpa", "speed / SDPA", ".2f"),
    ("memory_saving", "memory saving", ".1f"),
    ("skipped", "skipped", ""),
]


def main(causal: bool = False) -> int:
    """→ exit code: 0; 1 if flash attention is wrong or nothing could be measured; 2 if the arguments are wrong."""
    args = parse(causal)
    if args.threads:
        torch.set_num_threads(args.threads)
    environment = report.environment(args.device)
    environment["matmul_tflops"] = matmul_limit(args.device, args.dtype)
    print(report.describe(environment))

    todo = cases(args, causal)
    rows: list[Row] = []
    try:
        # Only on a terminal: elsewhere a progress bar writes many lines.
        style = {} if args.sweep else {"bar_format": "{elapsed}{postfix}", "leave": False}
        with tqdm(todo, disable=None, unit="length", **style) as bar:
            for case in bar:
                rows += compare(
                    case,
                    args.type,
                    args.backend,
                    args.repeats,
                    matmul_tflops=environment["matmul_tflops"],
                    profile=args.profile,
                    say=lambda line: tqdm.write(line, file=sys.stdout),
                    progress=lambda doing, bar=bar, case=case: bar.set_postfix_str(f"{case.q_len}: {doing}"),
                )
                if args.json:  # after each length, so that an interrupted run keeps what it has measured
                    report.write_json(args.json, environment, vars(args) | {"causal": causal}, rows)
    except WrongResult as wrong:
        print(wrong, file=sys.stderr)
        return 1
    except NotImplementedError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return 2

    print(f"\n{todo[-1].describe(lengths=not args.sweep)}\n")
    print(report.table(rows, [("q_len", "length", "d"), *COLUMNS] if args.sweep else COLUMNS))
    measured = any("ms" in row for row in rows)
    print("\n" + (legend(todo[-1], rows, environment) if measured else "nothing could be measured"))
    if args.json:
        print(f"written: {args.json}")
    if args.plot:
        from benchmarks.plot import plot_sweep  # matplotlib is slow to load

        plot_sweep(rows, todo[-1], report.describe(environment), args.plot)
        print(f"written: {args.plot}")
    return 0 if measured else 1


def parse(causal: bool) -> argparse.Namespace:
    kind = "causal attention" if causal else "attention under any mask"
    parser = argparse.ArgumentParser(description=f"Time and memory of {kind}: flash beside normal attention and PyTorch's SDPA.")
    add = parser.add_argument
    add("--type", required=True, choices=[*TYPES, "all"], help="what to measure; all: side by side, with ratios")
    add("--b", type=positive, default=1, metavar="N", help="batch size (default %(default)s)")
    add("--h", type=positive, default=2, metavar="N", help="heads (default %(default)s)")
    add("--q_len", type=positive, default=4096, metavar="N", help="queries; with --sweep the longest length (default %(default)s)")
    add("--kv_len", type=positive, metavar="N", help="keys and values (default 4096; with --sweep always as many as queries)")
    add("--d", type=positive, default=512, metavar="N", help="head size (default %(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="(default %(default)s)")
    mask = "none" if causal else "key"
    add("--mask", choices=MASKS, default=mask, help="key: hides half of the keys at random; full: half of each row's (default %(default)s)")
    add("--dropout_p", type=probability, default=0.0, metavar="P", help="dropout probability (default %(default)s)")
    add("--backward", action="store_true", help="measure forward + backward, from a random dO")
    add("--backend", choices=[*BACKENDS, *GROUPS], help="of flash attention (default: the fastest that can; with --type all each that can)")
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N (default %(default)s)")
    add("--threads", type=threads, metavar="N", help="CPU threads (default: PyTorch's choice)")
    add("--repeats", type=positive, metavar="N", help="the median counts (default: about 2 s' worth, 5 to 50; 3 if a call takes over 10 s)")
    add("--sweep", action="store_true", help=f"lengths {SHORTEST}, {2 * SHORTEST}, {4 * SHORTEST} … up to --q_len")
    add("--plot", type=output_file, metavar="FILE.png", help="with --sweep: draw time, speed-up and memory against length")
    add("--json", type=output_file, metavar="FILE", help="write device, versions, settings and every figure")
    add("--profile", action="store_true", help="then one call of each under torch.profiler: print its table, write a trace to profiles/")
    args = parser.parse_args()

    if args.backend and args.type in ("normal", "sdpa"):
        parser.error(f"--backend chooses between implementations of flash attention: it does not go with --type {args.type}")
    if args.plot and not args.sweep:
        parser.error("--plot draws against length: it needs --sweep")
    if args.plot and args.plot.suffix != ".png":
        parser.error(f"--plot: the file must end in .png, got {args.plot}")
    if args.sweep and args.profile:
        parser.error("--profile is for one length: leave out --sweep")
    if args.sweep and args.q_len < SHORTEST:
        parser.error(f"--sweep begins at length {SHORTEST}, got --q_len {args.q_len}")
    if args.sweep and args.kv_len not in (None, args.q_len):
        parser.error("--sweep has as many keys as queries: give --q_len alone")
    args.kv_len = args.kv_len or (args.q_len if args.sweep else 4096)
    return args


def cases(args: argparse.Namespace, causal: bool) -> list[Case]:
    """One case, or one for each length of the sweep."""
    lengths = [(args.q_len, args.kv_len)]
    if args.sweep:
        lengths = [(SHORTEST << n,) * 2 for n in range((args.q_len // SHORTEST).bit_length())]
    same = {name: getattr(args, name) for name in ("b", "h", "d", "dtype", "device", "mask", "dropout_p", "backward")}
    return [Case(q_len=q_len, kv_len=kv_len, causal=causal, **same) for q_len, kv_len in lengths]


def legend(case: Case, rows: list[Row], environment: dict) -> str:
    """The legend of this run's columns."""
    repeats = sorted({row["repeats"] for row in rows if "repeats" in row})
    half = ", halved because causal" if case.causal else ""
    backward = "; a backward counts 2.5 times as much" if case.backward else ""
    matmul = f"one large matrix product reaches {environment['matmul_tflops']:.3g}"
    fresh = "" if case.device.startswith("cuda") else ", in a fresh process for each"
    lines = [
        f"ms: median of {repeats[0]}{f' to {repeats[-1]}' if len(repeats) > 1 else ''}{', taking turns' if len(rows) > 1 else ''}.",
        f"TFLOP/s: 4·b·h·q_len·kv_len·d for a forward{half}{backward}; {matmul}.",
        f"memory: peak above the inputs{fresh}.",
    ]
    if any("speedup" in row for row in rows):
        lines.append("speed / …: above 1 is faster than that one. memory saving: normal's memory over this one's.")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)

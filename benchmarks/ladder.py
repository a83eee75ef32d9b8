"""What each rung's forward does, counted by the emulator on one small problem. These counts explain the steps of the ladder. No GPU needed.

python -m benchmarks.ladder --json results/ladder_counts.json
"""

import argparse
import difflib
import re
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from flash_attention import build, flash_attention
from flash_attention.backends import BACKENDS, cuda, emulated
from flash_attention.call import Call, Settings
from flash_attention.command_line import positive, run

COLUMNS: list[report.Column] = [
    ("rung", "rung", ""),
    ("from", "changed from", ""),
    ("lines", "lines changed", ",d"),
    ("threads_kb", "KB by threads", ",.0f"),
    ("copied_kb", "KB by cp.async or map", ",.0f"),
    ("matrix_cycles", "ldmatrix, stmatrix: cycles", ",d"),
    ("matrix_least", "without conflicts", ",d"),
    ("operands_kb", "KB read by wgmma", ",.0f"),
    ("exponentials", "exponentials", ",d"),
    ("waits", "waits of a thread, thousands", ",.1f"),
]


def ladder() -> list[str]:
    """The names of the ladder's rungs, lowest first: in the order of their files."""
    return [rung.name for rung in sorted(cuda.RUNGS.values(), key=lambda rung: rung.files[cuda.FORWARD])]


def takes_plain_calls(rung: cuda.Rung) -> bool:
    """Whether a rung can be compared with the others: 16 bits, a head size of 64, many queries. The last rungs are for other calls."""
    return 64 in rung.head_dims and "bfloat16" in rung.dtypes and not rung.packs_heads


def changed_from(file: str) -> str | None:
    """The file that a rung's header compares it with, or None for the lowest."""
    found = re.search(r"^// Change from (\S+\.cu)", (build.SOURCES / file).read_text(encoding="utf-8"), re.MULTILINE)
    return found and found.group(1)


def parts_of(file: str) -> list[str]:
    """A rung's parts, the headers with its number in the order in which they are included, and then its own file."""
    number = re.match(r"[a-z]+_\w+?_", file)[0]  # "forward_4_"
    files: list[str] = []

    def read(name: str) -> None:
        text = (build.SOURCES / name).read_text(encoding="utf-8")
        for part in re.findall(rf'^#include "({number}\w+\.cuh)"', text, re.MULTILINE):
            if part not in files:
                read(part)
        files.append(name)

    read(file)
    return files


def code_of(file: str) -> list[str]:
    """The lines of a file and of its parts, without its header and without those that are comments alone."""
    lines = [line for part in parts_of(file) for line in (build.SOURCES / part).read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if not line.lstrip().startswith("//")]


def lines_changed(before: str, after: str) -> int:
    """Lines of code in the second file that are not in the first."""
    return sum(line.startswith("+ ") for line in difflib.ndiff(code_of(before), code_of(after)))


def count(name: str, b: int, h: int, n: int, d: int) -> dict[str, Any]:
    """A row of the table: the forward of one rung, dense, float16."""
    q, k, v = torch.randn(3, b, h, n, d, dtype=torch.float16).unbind()
    with torch.no_grad(), emulated.counting() as counts:
        flash_attention(q, k, v, backend=f"emulated:{name}")
    (of_call,) = counts
    total = of_call.total
    file = cuda.RUNGS[name].files[cuda.FORWARD]
    before = changed_from(file)
    # Only a warp's ldmatrix and stmatrix, of 512 bytes, take at least 4 cycles.
    by_matrix = any(total.get(f"shared bytes by {instruction}") for instruction in ("ldmatrix", "stmatrix"))
    matrix = [place for place in of_call.shared.values() if by_matrix and place.least == 4 * place.instructions]
    copied = sum(total.get(f"global bytes by {path}", 0) for path in ("cp.async", "tensor map, to shared memory", "cp.async.bulk"))
    return {
        "rung": name,
        "from": before and before.removeprefix("forward_").removesuffix(".cu"),
        "lines": before and lines_changed(before, file),
        "threads_kb": total.get("global bytes read by threads", 0) / 1024,
        "copied_kb": copied / 1024 or None,
        "matrix_cycles": sum(place.cycles for place in matrix) or None,
        "matrix_least": sum(place.least for place in matrix) or None,
        "operands_kb": total.get("shared bytes by wgmma", 0) / 1024 or None,
        "exponentials": total["exponentials"],
        "waits": sum(of_call.waits.values()) / 1000,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ladder", description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=positive, default=512, help="length (default %(default)s)")
    parser.add_argument("--d", type=positive, choices=(64, 128), default=64, help="head size (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts there")
    arguments = parser.parse_args()
    x = torch.empty(1, 1, arguments.n, arguments.d, dtype=torch.float16)
    if reason := BACKENDS["emulated:mma"].why_not(Call.of(x, x, x, None, None, Settings(1.0))):
        parser.error(reason)
    torch.manual_seed(0)
    rows = [count(name, 1, 1, arguments.n, arguments.d) for name in ladder() if takes_plain_calls(cuda.RUNGS[name])]
    print(report.table(rows, COLUMNS))
    if arguments.json:
        report.write_json(arguments.json, {}, {"b": 1, "h": 1, "n": arguments.n, "d": arguments.d, "dtype": "float16"}, rows)


if __name__ == "__main__":
    run(main)

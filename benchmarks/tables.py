"""Writes the measured tables into the Markdown files, from kept results, between markers: no figure there is typed by hand.

    python -m benchmarks.tables            rewrite
    python -m benchmarks.tables --check    fail if a file is not what its results give

A marker pair `<!-- NAME -->` … `<!-- end of NAME -->` is filled from results/NAME.json.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks import report

ROOT = Path(__file__).resolve().parents[1]
FILES = (ROOT / "README.md", ROOT / "cuda" / "README.md")
MARKERS = re.compile(r"<!-- (\w+) -->\n.*?<!-- end of \1 -->", re.DOTALL)


def cpu_targets(content: dict[str, Any]) -> str:
    """Speed against normal attention and SDPA, then memory."""
    speeds = [row for row in content["results"] if "over_normal" in row]
    memories = [row for row in content["results"] if "flash_mb" in row]
    lines = [report.describe(content["environment"]) + "; float32, medians.", ""]
    lines += ["| case | normal | SDPA | flash | × normal | × SDPA |", "|---|---|---|---|---|---|"]
    for row in speeds:
        ms = " | ".join(f"{row[f'{kind}_ms']:.0f} ms" for kind in ("normal", "sdpa", "flash"))
        lines.append(f"| {row['label']} | {ms} | {row['over_normal']:.2f} | {row['over_sdpa']:.2f} |")
    lines += ["", "| peak memory above the inputs | normal | SDPA | flash |", "|---|---|---|---|"]
    lines += [
        f"| {row['label']} | " + " | ".join(f"{row[f'{k}_mb']:.0f} MB" for k in ("normal", "sdpa", "flash")) + " |" for row in memories
    ]
    return "\n".join(lines)


def sweep(content: dict[str, Any]) -> str:
    """Time of each implementation against length, and the kernel's speed and memory against normal attention."""
    rows = [row for row in content["results"] if "ms" in row and "reference" not in row["name"]]
    names = list(dict.fromkeys(row["name"] for row in rows))
    lines = [report.describe(content["environment"]) + "; forward + backward, ms, medians.", ""]
    lines += [f"| length | {' | '.join(names)} | speed-up | memory saving |", "|---" * (len(names) + 3) + "|"]
    for length in dict.fromkeys(row["q_len"] for row in rows):
        at = {row["name"]: row for row in rows if row["q_len"] == length}
        ms = " | ".join(f"{at[name]['ms']:.2f}" if name in at else "–" for name in names)
        kernel = at["flash (tensor_core)"]
        lines.append(f"| {length} | {ms} | {kernel['speedup']:.2f} | {kernel['memory_saving']:.1f} |")
    return "\n".join(lines)


TABLES = {"cpu_targets": cpu_targets, "h200_bert_causal": sweep}


def filled(text: str) -> str:
    """The text with every marker pair filled that has results."""

    def fill(found: re.Match) -> str:
        name = found.group(1)
        results = ROOT / "results" / f"{name}.json"
        if name not in TABLES or not results.exists():
            return found.group(0)
        return f"<!-- {name} -->\n{TABLES[name](json.loads(results.read_text(encoding='utf-8')))}\n<!-- end of {name} -->"

    return MARKERS.sub(fill, text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a file would change")
    check = parser.parse_args().check
    stale = []
    for file in FILES:
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        if filled(text) != text:
            stale.append(file.relative_to(ROOT))
            if not check:
                file.write_text(filled(text), encoding="utf-8")
    for file in stale:
        print(f"{file} {'differs from its results: run python -m benchmarks.tables' if check else 'rewritten'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())

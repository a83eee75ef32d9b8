"""How a run is reported: the machine and versions, aligned tables, JSON."""

import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flash_attention.build import find_nvcc

Column = tuple[str, str, str]  # a row's key, the column's heading, how a number is written (a format such as ".1f")


def environment(device: str) -> dict[str, Any]:
    """The device, the versions and the threads that a figure depends on."""
    cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "device_type": torch.device(device).type,
        "cpu_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "driver": _found(r"([\d.]+)", "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "ptxas": ptxas_version() if cuda else None,
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # well above 0: other programs were running
        "system": f"{platform.system()} {platform.machine()}",
    }


def describe(environment: dict[str, Any]) -> str:
    count = environment["cpu_threads"]
    threads = "" if environment["device_type"] == "cuda" else f", {count} thread{'s' if count > 1 else ''}"
    load = environment.get("load_average", 0)
    busy = f"; a busy machine, load average {load:.1f}" if load > count / 4 else ""
    versions = f"torch {environment['torch']}, CUDA {environment['cuda'] or 'none'}"
    return f"{environment['device']}{threads}; {versions}, Python {environment['python']}, {environment['system']}{busy}"


def table(rows: Sequence[dict[str, Any]], columns: Sequence[Column]) -> str:
    """Aligned text: words to the left, numbers to the right. A column that no row has a value for is left out."""
    columns, cells = _cells(rows, columns)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = [form == "" for _, _, form in columns]
    lines = ["  ".join(f"{c:{'<' if to_left else '>'}{w}}" for c, w, to_left in zip(line, widths, left, strict=True)) for line in cells]
    return "\n".join(line.rstrip() for line in (lines[0], "-" * len(lines[0]), *lines[1:]))


def markdown(rows: Sequence[dict[str, Any]], columns: Sequence[Column]) -> str:
    """The same as a Markdown table."""
    _, cells = _cells(rows, columns)
    head, *lines = [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([head, "|" + "---|" * len(cells[0]), *lines])


def write_json(file: Path, environment: dict[str, Any], settings: dict[str, Any], results: Sequence[dict[str, Any]], **more: Any) -> None:
    """The file of results of one run. more: further tables."""
    file.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        name: value for name, value in settings.items() if not isinstance(value, Path)
    }  # file names are not settings of the measurement
    file.write_text(one_row_a_line({"environment": environment, "settings": settings, "results": results, **more}), encoding="utf-8")


def one_row_a_line(content: dict[str, Any]) -> str:
    """The content as JSON with one line for each value and for each row of a list of rows, so that a diff shows the rows that changed."""
    entries = []
    for key, value in content.items():
        rows = isinstance(value, list | tuple) and value and all(isinstance(row, dict) for row in value)
        text = "[\n    " + ",\n    ".join(map(_one_line, value)) + "\n  ]" if rows else _one_line(value)
        entries.append(f"  {_one_line(key)}: {text}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _one_line(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


def _cells(rows: Sequence[dict[str, Any]], columns: Sequence[Column]) -> tuple[list[Column], list[list[str]]]:
    """The columns that have any value: the headings, then each row as text."""
    columns = [column for column in columns if any(row.get(column[0]) is not None for row in rows)]
    lines = [[_cell(row.get(key), form) for key, _, form in columns] for row in rows]
    return columns, [[heading for _, heading, _ in columns], *lines]


def _cell(value: Any, form: str) -> str:
    return "–" if value is None else value if isinstance(value, str) else format(value, form)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def ptxas_version() -> str | None:
    """The release of the assembler beside nvcc, which chooses registers and orders instructions: "13.0.88"."""
    nvcc = find_nvcc()
    return _found(r"V([\d.]+)", str(Path(nvcc).with_name("ptxas")), "--version") if nvcc else None


def _found(pattern: str, *command: str) -> str | None:
    """The part of a program's output that matches the pattern's group; None if the program is missing, fails or prints something else."""
    try:
        found = re.search(pattern, subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.group(1) if found else None

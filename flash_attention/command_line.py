"""What the scripts here share: types for argparse, whose errors become a message that names the argument, and exit code 2; and `run`, which
reserves exit code 1 for a script's own verdict, that results differ."""

import math
import os
import re
import sys
import traceback
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

import torch


def run(main: Callable[[], int | None]) -> None:
    """Exits with the code that `main` returns, or with 2 if it raises."""
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 2
    sys.exit(code)


def positive(text: str) -> int:
    """A size or a count."""
    return _whole(text, 1, 2**31 - 1)


def threads(text: str) -> int:
    """A number of CPU threads. PyTorch crashes beyond a few thousand."""
    return _whole(text, 1, 1024)


def seed(text: str) -> int:
    return _whole(text, 0, 2**63 - 1)


def positive_number(text: str) -> float:
    number = _number(text)
    if not 0 < number < math.inf:
        raise ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return number


def probability(text: str) -> float:
    """A dropout probability: below 1."""
    number = _number(text)
    if not 0 <= number < 1:
        raise ArgumentTypeError(f"must be a number in [0, 1), got {text!r}")
    return number


def device(text: str) -> str:
    """cpu, or a CUDA device of this machine."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}")
    try:
        torch.empty(1, device=text)
    except (RuntimeError, AssertionError) as error:  # PyTorch asserts that it was built with CUDA
        raise ArgumentTypeError(f"{text!r} is not available: {str(error).splitlines()[0]}") from error
    return text


def output_file(text: str) -> Path:
    """A file that can be written, checked before the run instead of after it. Parent folders may be missing."""
    file = Path(text)
    folder = next(parent for parent in file.absolute().parents if parent.exists())
    if file.is_dir() or not folder.is_dir() or not os.access(file if file.exists() else folder, os.W_OK):
        raise ArgumentTypeError(f"cannot be written: {text!r}")
    return file


def output_folder(text: str) -> Path:
    """A folder that exists and is writable, or can be created."""
    output_file(os.path.join(text, "a file"))
    return Path(text)


def _whole(text: str, least: int, most: int) -> int:
    # int() alone takes "1_000", " 7" and the digits of other scripts.
    if not re.fullmatch(r"\d+", text, re.ASCII) or not least <= int(text[:30]) <= most:
        raise ArgumentTypeError(f"must be a whole number from {least} to {most}, got {text!r}")
    return int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan  # NaN: every comparison is false

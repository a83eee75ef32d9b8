"""Reads the kernels' sources for lesson 6: the lines of the algorithm that their comments name, their constants and small formulas as
Python functions, and the layout of mma's fragments from the comment in ptx.cuh. So every picture shows the kernel as it is.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import flash_attention.reference

CUDA = Path(flash_attention.reference.__file__).resolve().parents[1] / "cuda"


def source(file: str) -> str:
    """The text of a file in cuda/."""
    return (CUDA / file).read_text(encoding="utf-8")


class Block(NamedTuple):
    """A piece of a source that implements some lines of the paper's algorithm."""

    lines: tuple[int, ...]  # of the algorithm
    first: int  # number of its first line in the file
    text: str


def blocks_by_line(text: str, first: int = 1) -> list[Block]:
    """Cut a source at its comments "line n" or "lines n and m": each begins a block, which ends before the next. `first` is the line number
    of the text's first line in its file."""
    lines = text.split("\n")
    marks = []
    for n, line in enumerate(lines):
        if found := re.search(r"(?://|#) lines? (\d+(?:(?:, | and | to )\d+)*)", line):
            numbers = [int(x) for x in re.findall(r"\d+", found[1])]
            marks.append((n, tuple(range(numbers[0], numbers[-1] + 1) if " to " in found[1] else numbers)))
    ends = [n for n, _ in marks[1:]] + [len(lines)]
    return [Block(numbers, first + n, "\n".join(lines[n:end])) for (n, numbers), end in zip(marks, ends, strict=True)]


def kernel(file: str, name: str) -> tuple[int, str]:
    """The number of a __global__ function's first line, and its text."""
    text = source(file)
    found = re.search(rf"^__global__ .*\b{name}\(.*?^}}", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"{file} has no kernel {name}")
    return text[: found.start()].count("\n") + 1, found[0]


def header(file: str, beginning: str) -> str:
    """The paragraph of a file's opening comment that begins with these words ("The idea", "Change from"), as one line."""
    opening = re.match(r"(?://.*\n)+", source(file))[0]
    for paragraph in re.split(r"^//\s*$", opening, flags=re.MULTILINE):
        text = " ".join(line.removeprefix("//").strip() for line in paragraph.strip().split("\n"))
        if text.startswith(beginning):
            return text
    raise ValueError(f"{file} has no paragraph that begins with {beginning!r}")


def _python(expression: str) -> str:
    """A C expression on non-negative integers, as Python."""
    expression = re.sub("!(?!=)", " not ", re.sub("/+", "//", expression).replace("&&", " and ").replace("||", " or "))
    choice = re.fullmatch(r"(.+?) \? (.+?) : (.+)", expression)
    return f"({choice[2]} if {choice[1]} else {_python(choice[3])})" if choice else expression


def constants(*files: str, **given: int) -> dict[str, int]:
    """The constants of some files, in order: `constexpr int NAME = …;`, or bool. Those that are given keep their value; one whose
    expression cannot be computed from the others is left out. The macros that select a kind of kernel (CAUSAL …) are 0 unless given."""
    values = {"CAUSAL": 0, "INTERVAL": 0, "MASK": 0, "DROPOUT": 0, "SCORE": 0, "BIASED": 0, "TALL": 0, **given}
    if "HEAD_DIM" in given:
        values.setdefault("V_HEAD_DIM", given["HEAD_DIM"])
    for file in files:
        for name, expression in re.findall(r"constexpr (?:int|bool) (\w+) = (.+?);", source(file)):
            try:
                values.setdefault(name, eval(_python(expression), {}, dict(values)))
            except (NameError, SyntaxError):
                continue
    return values


def functions(file: str, **known: int | Callable[..., int]) -> dict[str, Callable[..., int]]:
    """Functions of integers that consist of a return: `type name(int a, int b) { return …; }`. They may call each other. known: constants
    that they use, or functions that replace the file's own."""
    scope: dict = dict(known)
    pattern = r"(\w+)\(((?:u?int(?:32_t)? \w+(?:, )?)+)\) \{\s*return (.+?);\s*\}"
    found = re.findall(pattern, source(file))
    for name, parameters, expression in found:
        names = ", ".join(parameter.split()[-1] for parameter in parameters.split(", "))
        if name not in known:
            scope[name] = eval(f"lambda {names}: {_python(expression)}", scope)
    return {name: scope[name] for name, _, _ in found}


def fragment(operand: str) -> dict[tuple[int, int], tuple[int, int]]:
    """Where each element is in mma.m16n8k16, from the comment in ptx.cuh: (row, column) of A, B or D → (lane, register)."""
    comment = re.search(rf"^//   {operand}: (.+)$", source("ptx.cuh"), re.MULTILINE)[1]
    places = re.findall(r"\(([^,()]+), ([^,()]+)\)", comment)
    owners = {}
    for lane in range(32):
        for register, place in enumerate(places):
            row, column = (eval(x.replace("…", "").replace("2t", "2 * t"), {"g": lane // 4, "t": lane % 4}) for x in place)
            for step in range(2 if "…" in "".join(place) else 1):  # two 16-bit elements share a register
                owners[row + step * ("…" in place[0]), column + step * ("…" in place[1])] = lane, register
    return owners

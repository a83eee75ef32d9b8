"""Each mistake of mutations.py, applied to a copy of cuda/, is reported by the emulator or gives a wrong result.

    python checks/check_mutations.py                 all of them, as a table of what caught each
    python checks/check_mutations.py --jobs 8        the same, eight at a time
    python checks/check_mutations.py --only hopper   those whose description contains this

Under pytest, a sample that takes CI a minute; every mutation must still find its place.
"""

import argparse
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from harness import Problem, Report, Target
from mutations import (
    AS_TF32,
    IN_PARTS,
    MANY_TURNS,
    MUTATIONS,
    NAN_COMES_BACK,
    SMALL_PARTS,
    TURNS,
    TURNS_FLOAT32,
    WIDE_WINDOW_TURNS,
    WINDOW_TURNS,
    Mutation,
    replaced,
)

from flash_attention import build
from flash_attention.backends import BACKENDS, emulated

SEEDS = range(3)  # tried until one of them shows the mistake
SAMPLE = MUTATIONS[3 :: len(MUTATIONS) // 9]

if (reason := BACKENDS["emulated:simple"]._why_no_kernels(0)) and __name__ != "__main__":
    pytest.skip(reason, allow_module_level=True)


def caught_by(mutation: Mutation, folder: Path) -> str | None:
    """What shows the mistake: the emulator's message, a wrong tensor, or bits that change; None if nothing does."""
    copy = folder / "cuda"
    shutil.copytree(build.SOURCES, copy)
    path = copy / mutation.file
    path.write_text(mutation.apply(path.read_text()))
    if mutation.case in IN_PARTS:
        replaced(copy / "parts_of_heads.cuh", SMALL_PARTS)
    target = Target(f"emulated:{mutation.rung}", "cpu")
    torch.set_float32_matmul_precision("high" if mutation.case in AS_TF32 else "highest")
    problem = Problem.of(mutation.case, target)
    if mutation.case in NAN_COMES_BACK:
        problem = problem.poisoned(float("nan"))
    emulated.options.sources = copy
    taking_turns = mutation.case in (MANY_TURNS, TURNS, TURNS_FLOAT32, WINDOW_TURNS, WIDE_WINDOW_TURNS)
    torch.use_deterministic_algorithms(taking_turns)
    first = None
    try:
        for seed in SEEDS:
            emulated.options.seed = seed
            try:
                result = problem.answer(target)
            except emulated.EmulatorError as error:
                return str(error).replace("\n", " ")
            report = Report(str(mutation))
            report.expect("emulated", result, problem)
            if report.failures():
                return "a wrong result"
            if taking_turns and first and any(not torch.equal(a, b) for a, b in zip(first, result, strict=True)):
                return "gradients that change from seed to seed"
            first = first or result
    finally:
        emulated.options.seed, emulated.options.sources = 0, None
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")
    return None


def check_every_mutation_finds_its_place():
    assert len(MUTATIONS) >= 60
    for mutation in MUTATIONS:
        text = (build.SOURCES / mutation.file).read_text()
        assert mutation.apply(text) != text, f"{mutation} changes nothing"


@pytest.mark.parametrize("mutation", SAMPLE, ids=str)
def check_mutation_is_caught(mutation, tmp_path):
    by = caught_by(mutation, tmp_path)
    print(by)
    assert by, f"nothing shows: {mutation}"


def line_of(numbered: tuple[int, Mutation]) -> tuple[bool, str]:
    """Whether a mutation was caught, and the table's line that says by what. One that does not compile shows nothing."""
    n, mutation = numbered
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            by = caught_by(mutation, Path(folder))
            said = by or "MISSED"
        except build.BuildError as error:
            by, said = None, f"DOES NOT COMPILE: {' '.join(str(error).split())[-200:]}"
    took = time.perf_counter() - started
    return by is not None, f"{n:3d}  {mutation}\n     {said[:230]}  ({took:.0f} s)"


def main() -> int:
    parser = argparse.ArgumentParser(description="Make each mistake of mutations.py and say what catches it.")
    parser.add_argument("--only", default="", help="mutations whose description has this in it")
    parser.add_argument("--from", dest="start", type=int, default=0, metavar="N", help="from the N-th on (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default %(default)s)")
    arguments = parser.parse_args()

    chosen = [(n, each) for n, each in enumerate(MUTATIONS) if arguments.only in str(each) and n >= arguments.start]
    missed = 0
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for caught, line in pool.map(line_of, chosen):
            missed += not caught
            print(line, flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} mutations caught")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())

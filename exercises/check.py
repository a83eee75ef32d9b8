"""Checks what you have written in an exercise: compiled by a C++ compiler, run by the emulator, and on a GPU too if there is one.

    python exercises/check.py 3                 the third exercise, as it stands in its file
    python exercises/check.py 3 --solution      its solution, in the place of what you have written
    python exercises/check.py --solutions       every solution passes, and every blank fails
    python exercises/check.py --wrong_answers   every typical mistake of wrong_answers.py gets its message

Exit code 1: something is wrong.
"""

import argparse
import contextlib
import ctypes
import hashlib
import re
import shutil
import struct
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import forward_task
from tasks import FOLDER, TASKS, UNWRITTEN, Task, Wrong
from wrong_answers import WRONG_ANSWERS

from flash_attention import build
from flash_attention.backends import emulated
from flash_attention.build import BuildError, Specialisation
from flash_attention.build import emulated as compiler

PARAMS = struct.Struct("@3P 2P 5i P")  # Problem of exercise.cuh
BLANK = re.compile(r"^ *// ---- yours\n(.*?)^ *// ---- end of yours\n", re.DOTALL | re.MULTILINE)
NOTES = 256  # numbers of the log
FORWARD = 8
FILES = {**{number: task.path for number, task in TASKS.items()}, FORWARD: forward_task.FILE}


def filled(number: int, answer: str) -> str:
    """The exercise's file with this in its blank."""
    text = FILES[number].read_text(encoding="utf-8")
    blank = BLANK.search(text)
    if blank is None:
        raise Wrong(f"{FILES[number].name} has lost its lines “// ---- yours” and “// ---- end of yours”.")
    return text[: blank.start(1)] + answer + text[blank.end(1) :]


def solution(number: int) -> str:
    return (TASKS[number].solution if number in TASKS else forward_task.SOLUTION).read_text(encoding="utf-8")


def blank(number: int) -> str:
    """The content of the exercise's blank as it is handed out: it compiles, but computes nothing."""
    return BLANKS.get(number, "")


BLANKS = {
    4: "    return 0;\n",
    6: "    for (int n = 0; n < 32; ++n) S_rmem[n] = 0;\n",
    FORWARD: "constexpr int BLOCK_Q = 64, BLOCK_THREADS = 128;\n__global__ void forward_kernel(const __grid_constant__ "
    "AttentionParams p) {}\n",
}


@contextlib.contextmanager
def source(number: int, text: str) -> Iterator[Path]:
    """The text as a file with the exercise's name, in a folder with the files that it includes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILES[number].name
        header = (FOLDER / "exercise.cuh").read_text(encoding="utf-8")
        # A compiled file is kept by its text: what it includes from here belongs to that.
        path.write_text(f"{text}// {hashlib.sha256(header.encode()).hexdigest()}\n", encoding="utf-8")
        shutil.copy(FOLDER / "exercise.cuh", folder)
        yield path


def compile_ahead(answers: list[tuple[int, str]]) -> None:
    """Compiles several exercises' files at once. A file that does not compile is reported when it is checked."""

    def one(answer: tuple[int, str]) -> None:
        with source(*answer) as path, contextlib.suppress(BuildError):
            for kernel in forward_task.kernels(path) if answer[0] == FORWARD else (specialisation(path),):
                compiler.build_kernel(kernel)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, answers))


def specialisation(path: Path) -> Specialisation:
    return Specialisation(str(path), compiler.ARCH, 64, "float16")


def check(number: int, text: str) -> list[str]:
    """Compiles and runs an exercise's file. → for a right answer, lines with its counts.

    Raises:
        Wrong: what is wrong, in words.
    """
    with source(number, text) as path:
        try:
            if number == FORWARD:
                return forward_task.check(path)
            lines = on_emulator(TASKS[number], path)
            return lines + on_gpu(TASKS[number], path)
        except BuildError as error:
            raise Wrong(f"It does not compile.\n{compiler_errors(str(error), path)}") from error


def compiler_errors(message: str, path: Path) -> str:
    lines = [line.replace(f"{path.parent}/", "") for line in message.splitlines() if " error: " in line]
    return "\n".join(f"  {line}" for line in lines[:5]) or message


def on_emulator(task: Task, path: Path) -> list[str]:
    library = emulated._declared(build.loaded(compiler.build_kernel(specialisation(path))))
    library.exercise.argtypes = [ctypes.c_char_p]
    inputs, out, log = task.inputs(), torch.full(task.shape, UNWRITTEN), torch.zeros(NOTES, dtype=torch.int32)
    memories = [emulated.Memory(f"input {n + 1}", x.data_ptr(), x.nbytes) for n, x in enumerate(inputs)]
    memories += [
        emulated.Memory("the output", out.data_ptr(), out.nbytes, True, False),
        emulated.Memory("the log", log.data_ptr(), log.nbytes, True),
    ]
    try:
        with emulated.counting() as counts:
            emulated.run(library, library.exercise, packed(task, inputs, out, log, 0, 0), memories, poison=False)
    except emulated.EmulatorError as error:
        said = re.sub(r" \(block .*?seed \d+\)", "", str(error))
        raise Wrong(f"{task.explain(said)}\n  The emulator: {said}") from error
    task.compare(out, inputs)
    task.judge(counts[0], notes(log))
    return ["  on the emulator", *(f"    {name:<44}{value:>12,}" for name, value in counts[0].total.items())]


def on_gpu(task: Task, path: Path) -> list[str]:
    """Runs it on this machine's GPU, if it has one that can."""
    nvcc = build.find_nvcc()
    if not torch.cuda.is_available() or nvcc is None:
        return []
    capability = torch.cuda.get_device_capability()
    arch = build.arch_of(capability)
    if build.arch_number(arch) < task.min_arch or (task is TASKS[6] and arch != "90a"):
        return [f"  the GPU, {torch.cuda.get_device_name()}, cannot run it"]
    compiled = path.with_suffix(".so")
    build._nvcc(nvcc, specialisation(path)._replace(arch=arch), *build.LIBRARY_FLAGS, f"-I{build.SOURCES}", "-o", str(compiled))
    library = ctypes.CDLL(str(compiled))
    library.exercise.argtypes, library.error_name.restype = [ctypes.c_char_p], ctypes.c_char_p
    inputs, out = tuple(x.cuda() for x in task.inputs()), torch.full(task.shape, UNWRITTEN, device="cuda")
    log = torch.zeros(NOTES, dtype=torch.int32, device="cuda")
    stream = torch.cuda.current_stream()
    if error := library.exercise(packed(task, inputs, out, log, stream.device.index, stream.cuda_stream)):
        raise Wrong(f"The GPU refused it: {library.error_name(error).decode()}.")
    torch.cuda.synchronize()
    task.compare(out, inputs)
    return [f"  on {torch.cuda.get_device_name()}: right too"]


def packed(task: Task, inputs, out, log, device: int, stream: int) -> bytes:
    addresses = [x.data_ptr() for x in inputs] + [0] * (3 - len(inputs))
    sizes = [*task.sizes, *[0] * (4 - len(task.sizes))]
    return PARAMS.pack(*addresses, out.data_ptr(), log.data_ptr(), *sizes, device, stream)


def notes(log: torch.Tensor) -> list[tuple[int, int]]:
    """The kernel's notes, up to the first 0."""
    pairs = [(int(what), int(n)) for what, n in log.view(-1, 2)]
    return pairs[: next((n for n, pair in enumerate(pairs) if pair[0] == 0), len(pairs))]


# ---- what the command line asks for


def verdict(number: int, text: str) -> bool:
    try:
        lines = check(number, text)
    except Wrong as wrong:
        print(f"exercise {number}: not yet.\n{wrong}")
        return False
    print("\n".join([f"exercise {number}: right.", *lines]))
    return True


def check_solutions() -> bool:
    """Every solution passes, every blank fails."""

    good = True
    compile_ahead([(number, filled(number, answer(number))) for number in FILES for answer in (solution, blank)])
    for number in FILES:
        complaint = said(number, solution(number))
        complaint = f"the solution fails: {complaint}" if complaint else None if said(number, blank(number)) else "the blank passes"
        print(f"exercise {number}: {complaint or 'the solution passes, the blank does not'}", flush=True)
        good &= complaint is None
    return good


def said(number: int, answer: str) -> str | None:
    """The message for an answer; None if it is right."""
    try:
        check(number, filled(number, answer))
    except Wrong as wrong:
        return str(wrong)
    return None


def check_wrong_answers() -> bool:
    """Every typical mistake gets its message."""

    texts = [(each.exercise, each.apply(solution(each.exercise))) for each in WRONG_ANSWERS]
    compile_ahead([(number, filled(number, text)) for number, text in texts if number != FORWARD])  # whose first cases are enough
    good = True
    for each, answer in zip(WRONG_ANSWERS, texts, strict=True):
        words = said(*answer) or "it passes"
        found = each.words in words
        print(f"{'' if found else 'UNEXPECTED '}{each}\n    {words.splitlines()[0]}", flush=True)
        good &= found
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("exercise", type=int, nargs="?", choices=tuple(FILES), help="its number")
    parser.add_argument("--solution", action="store_true", help="check the solution in the place of what you have written")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--solutions", action="store_true", help="check that every solution passes and every blank fails")
    what.add_argument("--wrong_answers", action="store_true", help="check that every typical mistake gets its message")
    arguments = parser.parse_args()
    if (arguments.exercise is None) != (arguments.solutions or arguments.wrong_answers):
        parser.error("name one exercise, or --solutions, or --wrong_answers")
    if compiler.find_compiler() is None or sys.platform != "linux":
        parser.error("the emulator needs Linux and a C++ compiler (g++ or clang++)")
    build.log.setLevel("ERROR")  # do not report what is being compiled
    if arguments.solutions:
        return int(not check_solutions())
    if arguments.wrong_answers:
        return int(not check_wrong_answers())
    number = arguments.exercise
    text = filled(number, solution(number)) if arguments.solution else FILES[number].read_text(encoding="utf-8")
    return int(not verdict(number, text))


if __name__ == "__main__":
    sys.exit(main())

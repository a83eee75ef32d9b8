"""The exercises: solutions pass, blanks fail, typical mistakes get their messages, and every command line gets an answer.

python checks/check_exercises.py
"""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from harness import run_alone

from flash_attention import build
from flash_attention.backends import BACKENDS

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "exercises"))

from tasks import TASKS
from wrong_answers import TABLE, WRONG_ANSWERS

if reason := BACKENDS["emulated:simple"]._why_no_kernels(0):
    pytest.skip(reason, allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "exercises" / "check.py"
EXERCISES = 8


def check(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, cwd=ROOT)


def check_solutions_pass_and_blanks_fail():
    run = check("--solutions")
    assert run.returncode == 0 and run.stdout.count("the solution passes, the blank does not") == EXERCISES, run.stdout + run.stderr


def check_typical_mistakes_get_their_words():
    assert len(TABLE) == EXERCISES and all(len(rows) >= 3 for rows in TABLE.values())
    run = check("--wrong_answers")
    said = run.stdout.splitlines()
    assert run.returncode == 0 and "UNEXPECTED" not in run.stdout and len(said) == 2 * len(WRONG_ANSWERS), run.stdout + run.stderr


def check_as_handed_out():
    """An untouched exercise: exit code 1, and a message."""
    run = check("1")
    assert run.returncode == 1 and "not yet" in run.stdout and "The kernel has written no output" in run.stdout, run.stdout + run.stderr


def check_a_solution_by_itself():
    run = check("4", "--solution")
    assert run.returncode == 0 and "exercise 4: right." in run.stdout and "shared bytes by ldmatrix" in run.stdout, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("arguments", "words"), [((), "name one"), (("1", "--solutions"), "name one"), (("9",), "invalid choice"), (("x",), "invalid int")]
)
def check_command_line(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stopped.value.code == 2 and words in capsys.readouterr().err


def check_every_exercise_says_what_it_is_about():
    files = sorted((ROOT / "exercises").glob("*.cu"))
    index = (ROOT / "exercises" / "README.md").read_text(encoding="utf-8")
    assert len(files) == EXERCISES == len(TASKS) + 1
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert re.match(r"// Exercise \d: ", text) and "To know: " in text and "To write: " in text, file
        assert f"python exercises/check.py {file.name[0]}" in text and f"({file.name})" in index, file
        assert (ROOT / "exercises" / "solutions" / f"{file.stem}.cuh").exists()
    for link in re.findall(r"\]\(([^)]+)\)", index):
        assert (ROOT / "exercises" / link).exists(), link


@pytest.mark.skipif(build.find_nvcc() is None, reason="no nvcc")
@pytest.mark.parametrize("number", TASKS)
def check_nvcc_takes_the_solution(number, tmp_path):
    """nvcc compiles everything that the emulator runs."""
    text = TASKS[number].path.read_text(encoding="utf-8")
    start, end = text.index("// ---- yours\n") + len("// ---- yours\n"), text.index("// ---- end of yours")
    file = tmp_path / TASKS[number].file
    file.write_text(text[:start] + TASKS[number].solution.read_text(encoding="utf-8") + text[end:], encoding="utf-8")
    kernel = build.Specialisation(str(file), "90a", 64, "float16")
    includes = f"-I{build.SOURCES}", f"-I{SCRIPT.parent}"
    output = build._nvcc(build.find_nvcc(), kernel, *includes, "-Werror=all-warnings", "-cubin", "-o", str(tmp_path / "kernel.cubin"))
    assert not build.complaints(output), output


if __name__ == "__main__":
    run_alone(__file__)

"""The lessons: they run, their outputs match the present sources, their exercises can be solved, their animations can be stepped.

python checks/check_notebooks.py
"""

import importlib
import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from harness import run_alone
from PIL import Image, ImageSequence

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))  # as in a notebook's kernel, which starts in its folder
exercises, pictures = (importlib.import_module(name) for name in ("exercises", "pictures"))

LESSONS = sorted(NOTEBOOKS.glob("*.ipynb"))
MEGABYTE = 2**20
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
for_each_lesson = pytest.mark.parametrize("lesson", LESSONS, ids=lambda file: file.stem)


@pytest.fixture
def build() -> ModuleType:
    """notebooks/build.py. Imported when a check needs it: nbformat takes as long as PyTorch, and every worker imports this file."""
    return importlib.import_module("build")


def cells(lesson: Path, kind: str) -> list[dict[str, Any]]:
    """The cells of a lesson that are "code" or "markdown"."""
    return [cell for cell in json.loads(lesson.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def words_of(lesson: Path) -> str:
    return "\n".join("".join(cell["source"]) for cell in cells(lesson, "markdown"))


def exercises_of(lesson: Path) -> list[str]:
    """The names that the lesson leaves blank: in cells that end with check_name(name)."""
    sources = ("".join(cell["source"]) for cell in cells(lesson, "code"))
    return [name for source in sources for name in re.findall(r"^check_(\w+)\(\1\)$", source, re.MULTILINE)]


def solutions_of(lesson: Path) -> dict[str, Any]:
    return runpy.run_path(str(NOTEBOOKS / "solutions" / f"{re.match(r'lesson_[0-9]+', lesson.stem)[0]}.py"))


EXERCISES = [(lesson, name) for lesson in LESSONS for name in exercises_of(lesson)]
for_each_exercise = pytest.mark.parametrize(("lesson", "name"), EXERCISES, ids=[f"{lesson.stem[:8]}-{name}" for lesson, name in EXERCISES])


def check_there_are_lessons():
    assert LESSONS


@for_each_lesson
def check_runs(build, lesson, full, monkeypatch):
    """Lessons run from a clean kernel without an exception, with two pictures per animation. Without --full only three, which read the
    reference, kept results and the ring; for the others, `check_outputs_are_current` shows that they have run."""
    if not full and not lesson.stem.startswith(("lesson_1", "lesson_8", "lesson_9")):
        pytest.skip("run by --full, and by notebooks/build.py whenever its sources change")
    monkeypatch.setenv("LESSON_FRAMES", "2")
    notebook = build.execute(lesson)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


def check_exception_is_not_missed(build, tmp_path):
    """A lesson whose last cell asserts something false fails."""
    from nbclient.exceptions import CellExecutionError

    notebook = build.nbformat.v4.new_notebook(cells=[build.nbformat.v4.new_code_cell("assert 1 + 1 == 3")])
    build.nbformat.write(notebook, tmp_path / "wrong.ipynb")
    with pytest.raises(CellExecutionError, match="AssertionError"):
        build.execute(tmp_path / "wrong.ipynb")


@for_each_lesson
def check_outputs_are_current(build, lesson):
    """The committed outputs come from the present sources."""
    assert build.stale(lesson) is None, f"{build.stale(lesson)}; run: make notebooks"


def check_stale_outputs_are_noticed(build, tmp_path, monkeypatch):
    """A changed cell, output or reference is noticed; text cells may change."""
    file = tmp_path / LESSONS[0].name

    def reason(change: Callable) -> str:
        notebook = build.nbformat.read(LESSONS[0], as_version=4)
        notebook.metadata.made_from = build.hashes(notebook)
        change(notebook)
        build.nbformat.write(notebook, file)
        return build.stale(file) or "current"

    def cell(notebook, kind: str):
        return next(c for c in notebook.cells if c.cell_type == kind and (kind == "markdown" or c.outputs))

    assert reason(lambda n: None) == "current"
    assert reason(lambda n: cell(n, "markdown").update(source="other words")) == "current"
    assert "sources" in reason(lambda n: cell(n, "code").update(source="x = 1"))
    assert "edited" in reason(lambda n: cell(n, "code").update(outputs=[]))
    reason(lambda n: None)
    shutil.copytree(build.ROOT / "reference", tmp_path / "reference")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    assert build.stale(file) is None
    (tmp_path / "reference" / "flash2.py").write_text("another algorithm")
    assert "sources" in build.stale(file)


@for_each_lesson
def check_size(lesson):
    """A code host shows notebooks up to a few megabytes."""
    assert lesson.stat().st_size < 2 * MEGABYTE, f"{lesson.name} has {lesson.stat().st_size} bytes"


@for_each_lesson
def check_links(build, lesson, tmp_path):
    """Links of a lesson into the repository lead to files, from the notebook and from its HTML."""
    linked = [link for link in re.findall(r"\]\(([^)#\s]+)\)", words_of(lesson)) if "://" not in link]
    missing = [link for link in linked if not (NOTEBOOKS / link).exists()]
    assert not missing, missing
    page = build.export(lesson, tmp_path / "html").read_text(encoding="utf-8")
    targets = {(tmp_path / "html" / target).resolve() for target in re.findall(r'href="(?!\w+:|#)([^"]+)"', page)}  # outputs link too
    pages = {tmp_path.resolve() / "html" / f"{file.stem}.html" for file in build.lessons()}
    wrong = [str(target) for target in targets if target not in pages and not target.exists()]
    assert not wrong, wrong
    for link in linked:
        html = tmp_path.resolve() / "html" / f"{link.removesuffix('.ipynb')}.html"
        assert (html if link.endswith(".ipynb") else (NOTEBOOKS / link).resolve()) in targets


@for_each_lesson
def check_page_needs_no_network(build, lesson, tmp_path):
    """Formulas are MathML, in the page: no script comes from elsewhere, and no TeX is left for one."""
    if build.latex_to_mathml is None:
        pytest.skip("latex2mathml is not installed")
    page = build.export(lesson, tmp_path).read_text(encoding="utf-8")
    assert not re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(?:https?:)?//[^"]*"', page)
    words = re.sub(r"```.*?```|`[^`\n]*`", "", words_of(lesson), flags=re.DOTALL)
    assert page.count("<math ") == len(re.findall(r"\$\$.+?\$\$|\$[^$]+?\$", words, re.DOTALL)) > 0
    text = re.sub(r"<(script|style|pre)\b.*?</\1>|<[^>]*>", "", page, flags=re.DOTALL)
    assert "$" not in text and "FORMULA" not in text


@for_each_lesson
def check_has_exercises(lesson):
    """Two or more, and each has a check."""
    names = exercises_of(lesson)
    assert len(names) >= 2
    assert all(hasattr(exercises, f"check_{name}") for name in names), names


@for_each_exercise
def check_solution_passes(lesson, name, capsys):
    getattr(exercises, f"check_{name}")(solutions_of(lesson)[name])
    assert capsys.readouterr().out == "solved\n"


@for_each_exercise
def check_blank_is_not_solved(lesson, name, capsys):
    getattr(exercises, f"check_{name}")(lambda *arguments: None)
    assert capsys.readouterr().out == "not solved yet\n"


@for_each_exercise
def check_wrong_solution_fails(lesson, name, capsys):
    """The right answers, each number a little off."""
    solution = solutions_of(lesson)[name]
    with pytest.raises(AssertionError):
        getattr(exercises, f"check_{name}")(lambda *arguments: off(solution(*arguments)))
    assert capsys.readouterr().out == ""


def off(x: Any) -> Any:
    """A value like x, but different."""
    if isinstance(x, (tuple, list)):
        return type(x)(map(off, x))
    if isinstance(x, torch.Tensor) and not x.is_floating_point():
        return ~x if x.dtype == torch.bool else x + 1
    if isinstance(x, bool):
        return not x
    if isinstance(x, int):
        return x + 1
    return 1.01 * x + 0.01


@for_each_lesson
def check_animations_can_be_stepped(build, lesson, tmp_path):
    """In a browser without a kernel and without the network: each animation shows its first frame; its buttons go on and back."""
    players = [
        re.findall(r'frames\[\d+\] = "(data:[^"]*)"', html)
        for cell in cells(lesson, "code")
        for output in cell["outputs"]
        if "_anim_img" in (html := "".join(output.get("data", {}).get("text/html", "")))
    ]
    if not players:
        pytest.skip("no animation in this lesson")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    page = build.export(lesson, tmp_path)
    page.write_text(page.read_text(encoding="utf-8") + PRESS_THE_BUTTONS, encoding="utf-8")
    found = re.search(r"<html[^>]*>SEEN(.*?)SEEN", browse(page, tmp_path / "profile"), re.DOTALL)
    assert found, "the page's scripts did not run"
    seen = json.loads(found[1])
    for frames, pictures_seen in zip(players, seen, strict=True):
        assert len(set(frames)) > 1, "the frames are all the same picture"
        numbers = [frames.index(picture) if picture in frames else None for picture in pictures_seen]
        assert numbers == [0, 1, 0, frames.index(frames[-1])], f"frames at the start, after next, previous and last: {numbers}"


PRESS_THE_BUTTONS = """
<script>
  setTimeout(() => {
    const seen = [...document.querySelectorAll(".animation")].map(player => {
      const image = player.querySelector("img");
      const press = title => { player.querySelector(`button[title="${title}"]`).click(); return image.src; };
      return [image.src, press("Next frame"), press("Previous frame"), press("Last frame")];
    });
    document.documentElement.textContent = "SEEN" + JSON.stringify(seen) + "SEEN";
  }, 2000);
</script>
"""


def browse(page: Path, profile: Path) -> str:
    """The document in headless Chromium after the page's scripts have run."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    quiet = "--disable-component-update --disable-sync --virtual-time-budget=5000 --dump-dom"
    offline = "--host-resolver-rules=MAP * ~NOTFOUND"
    command = [CHROMIUM, *flags.split(), *quiet.split(), offline, f"--user-data-dir={profile}", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def check_gif_is_current(build, tmp_path):
    """docs/tile_loop.gif shows what the code draws now, in less than a megabyte."""
    assert build.GIF.stat().st_size < MEGABYTE
    pictures.tile_loop_gif(tmp_path / "fresh.gif")
    committed, fresh = (
        [np.asarray(frame.convert("RGB"), dtype=float) for frame in ImageSequence.Iterator(Image.open(file))]
        for file in (build.GIF, tmp_path / "fresh.gif")
    )
    assert [frame.shape for frame in committed] == [frame.shape for frame in fresh]
    for n, (old, new) in enumerate(zip(committed, fresh, strict=True)):
        assert np.abs(old - new).mean() < 0.005, f"frame {n} of {build.GIF.name} is another picture; run: make notebooks"


if __name__ == "__main__":
    run_alone(__file__)

"""The README and docs/: tables come from kept results, links lead somewhere, Python blocks run as they stand, parameters and counts agree.
A file of more than 350 lines says in its header why it is one file.

python -m pytest checks/check_readme.py
"""

import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import run_alone
from mutations import MUTATIONS

from flash_attention import FlashAttention, flash_attention
from flash_attention.backends import BACKENDS, GROUPS, cuda
from flash_attention.reference import normal_attention_causal

ROOT = Path(__file__).resolve().parents[1]
README, INTERFACE, USE, COMING, KERNELS = (
    ROOT / page for page in ("README.md", "docs/interface.md", "docs/use.md", "docs/coming_from.md", "docs/kernels.md")
)
PAGES = sorted(page for folder in (".", "docs", "cuda", "cuda/emulator", "exercises") for page in (ROOT / folder).glob("*.md"))


def blocks(page: Path) -> list[str]:
    """The Python blocks of a page, in their order."""
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def check_first_block_runs():
    """The README's, pasted into an empty session."""
    (block,) = blocks(README)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    torch.testing.assert_close(names["O"], normal_attention_causal(*(names[name] for name in "qkv")))


def check_blocks_run():
    """One after another in one namespace, as a reader pastes them."""
    torch.manual_seed(0)
    names: dict = {}
    ran = 0
    for block in blocks(USE):
        if "transformers import" in block and importlib.util.find_spec("transformers") is None:
            continue
        exec(compile(block, "docs/use.md", "exec"), names)
        ran += 1
    assert ran >= 4
    assert names["y"].shape == (2, 100, 512) and names["O"].shape == (2, 8, 100, 64)
    if "tokens" in names:
        assert names["tokens"].shape == (1, 8)


def check_earlier_systems():
    """Each row of the table has a block, in its order, that begins with the row's import; each runs alone, and gives attention's shape."""
    rows = re.findall(r"^\| (?!coming|---)(.*?) \| `(.*?)`", COMING.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == len(blocks(COMING)) == 6
    for (system, its_import), block in zip(rows, blocks(COMING), strict=True):
        assert block.startswith(its_import.removesuffix("…")), f"{system}: {block}"
        names: dict = {"torch": torch}
        exec(compile(block, f"docs/coming_from.md, {system}", "exec"), names)
        result, inputs = names.get("y", names.get("O")), names.get("x", names.get("queries", names.get("Q", names.get("qkv"))))
        assert result.isfinite().all() and result.shape[-1] == inputs.shape[-1] and len(result) == len(inputs)


def check_layer_options():
    """The options that the page names are those of the layer."""
    named = re.search(r"Options of the layer: (.*?)\. A projection", USE.read_text(encoding="utf-8"), re.DOTALL).group(1)
    assert set(re.findall(r"`(\w+)", named)) <= set(inspect.signature(FlashAttention).parameters)


def check_parameters():
    """The page gives the function's signature, and its table has a row for each parameter, in their order."""
    parameters = inspect.signature(flash_attention).parameters
    written = [str(p.replace(annotation=p.empty)) for p in parameters.values()]
    written.insert(next(n for n, p in enumerate(parameters.values()) if p.kind == p.KEYWORD_ONLY), "*")
    page = INTERFACE.read_text(encoding="utf-8")
    assert f"`flash_attention({', '.join(written)})`" in page, f"{INTERFACE.name} does not have {written}"
    rows = re.findall(r"^\| (\w+) \| ", page, re.MULTILINE)
    assert [row for row in rows if row in parameters] == list(parameters), rows


def check_backends_named():
    """The page on the interface names only backends that there are, and all that a plain call may choose."""
    named = set(re.findall(r'`"(\w+)"`', INTERFACE.read_text(encoding="utf-8")))
    assert named <= {*BACKENDS, *GROUPS}, named - {*BACKENDS, *GROUPS}
    assert {name for name, rung in cuda.RUNGS.items() if not rung.teaching} <= named


def check_emulated_block():
    """The page on kernels runs one without a GPU."""
    if reason := BACKENDS["emulated:hopper"]._why_no_kernels(0):
        pytest.skip(reason)
    names: dict = {}
    for block in blocks(KERNELS):
        exec(compile(block, "docs/kernels.md", "exec"), names)
    assert names["O"].isfinite().all()


def check_mutations_counted():
    (count,) = re.findall(r"applies (\d+) known mistakes", README.read_text(encoding="utf-8"))
    assert int(count) == len(MUTATIONS), f"the README says {count}, there are {len(MUTATIONS)}"


LONG = 350  # lines


def header(text: str, suffix: str) -> str:
    """A Python file's docstring; of a kernel, the comment at its top; of a page, what comes before its second heading."""
    pattern = {".py": r'"""(.*?)"""', ".md": r"(.*?)(?=\n## |\Z)"}.get(suffix, r"((?://.*\n)+)")
    found = re.match(pattern, text.removeprefix("#!/usr/bin/env python3\n"), re.DOTALL if suffix in (".py", ".md") else 0)
    return found[1] if found else ""


def check_long_files_say_why():
    """Logs grow by appending, and are left out."""
    folders = ("flash_attention", "reference", "cuda", "checks", "benchmarks", "notebooks", "exercises", "examples", "docs")
    found = [*ROOT.iterdir(), *(file for folder in folders for file in (ROOT / folder).rglob("*"))]
    kinds = (".py", ".cu", ".cuh", ".h", ".cpp", ".md")
    files = [file for file in found if file.suffix in kinds and file.name not in ("LOG.md", "CHANGELOG.md")]
    assert len(files) > 150
    for file in files:
        lines = (text := file.read_text(encoding="utf-8")).count("\n")
        reason = "One file because" in " ".join(header(text, file.suffix).replace("//", " ").split())
        assert lines <= LONG or reason, f"{file.relative_to(ROOT)} has {lines} lines: split it by subject, or say in its header why not"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def check_links(page):
    """Every relative link leads to a file and, after a #, to a heading of it."""
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", page.read_text(encoding="utf-8"))
    missing = [link for link, _ in links if not (page.parent / link).exists()]
    missing += [f"{link}#{anchor}" for link, anchor in links if anchor and anchor not in anchors(page.parent / link if link else page)]
    assert not missing, f"{page.name} links to {missing}"


def anchors(page: Path) -> list[str]:
    """Those that a code host gives to headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def check_tables():
    """No figure between the markers is typed by hand."""
    subprocess.run([sys.executable, "-m", "benchmarks.tables", "--check"], cwd=ROOT, check=True)


if __name__ == "__main__":
    run_alone(__file__)

"""The README: its tables come from kept results, its links lead somewhere, and the blocks of "Use it in your model" run as they stand.

python -m pytest checks/check_readme.py
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import run_alone

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "cuda" / "README.md"]


def blocks() -> list[str]:
    """The Python blocks of the section, in their order."""
    section = PAGES[0].read_text(encoding="utf-8").split("## Use it in your model", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def check_blocks_run():
    """One after another in one namespace, as a reader pastes them."""
    torch.manual_seed(0)
    names: dict = {}
    ran = 0
    for block in blocks():
        if "transformers import" in block and importlib.util.find_spec("transformers") is None:
            continue
        exec(compile(block, "README.md", "exec"), names)
        ran += 1
    assert ran >= 4
    assert names["y"].shape == (2, 100, 512) and names["O"].shape == (2, 8, 100, 64)
    if "tokens" in names:
        assert names["tokens"].shape == (1, 8)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def check_links(page):
    """Every relative link leads to a file."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert links
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing, f"{page.name} links to {missing}"


def check_tables():
    """No figure between the markers is typed by hand."""
    subprocess.run([sys.executable, "-m", "benchmarks.tables", "--check"], cwd=ROOT, check=True)


if __name__ == "__main__":
    run_alone(__file__)

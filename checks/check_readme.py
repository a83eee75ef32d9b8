"""The README: its tables come from kept results, its links lead somewhere, and the blocks of its sections on use run as they stand.

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

from flash_attention import FlashAttention

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "cuda" / "README.md"]


def section(title: str) -> str:
    return PAGES[0].read_text(encoding="utf-8").split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def blocks(title: str) -> list[str]:
    """The Python blocks of a section, in their order."""
    return re.findall(r"```python\n(.*?)```", section(title), re.DOTALL)


def check_blocks_run():
    """One after another in one namespace, as a reader pastes them."""
    torch.manual_seed(0)
    names: dict = {}
    ran = 0
    for block in blocks("Use it in your model"):
        if "transformers import" in block and importlib.util.find_spec("transformers") is None:
            continue
        exec(compile(block, "README.md", "exec"), names)
        ran += 1
    assert ran >= 4
    assert names["y"].shape == (2, 100, 512) and names["O"].shape == (2, 8, 100, 64)
    if "tokens" in names:
        assert names["tokens"].shape == (1, 8)


EARLIER = "Coming from another FlashAttention"


def check_earlier_systems():
    """Each row of the table has a block, in its order, that begins with the row's import; each runs alone, and gives attention's shape."""
    rows = re.findall(r"^\| (?!coming|---)(.*?) \| `(.*?)`", section(EARLIER), re.MULTILINE)
    assert len(rows) == len(blocks(EARLIER)) == 6
    for (system, its_import), block in zip(rows, blocks(EARLIER), strict=True):
        assert block.startswith(its_import.removesuffix("…")), f"{system}: {block}"
        names: dict = {"torch": torch}
        exec(compile(block, f"README.md, {system}", "exec"), names)
        result, inputs = names.get("y", names.get("O")), names.get("x", names.get("queries", names.get("Q", names.get("qkv"))))
        assert result.isfinite().all() and result.shape[-1] == inputs.shape[-1] and len(result) == len(inputs)


def check_layer_options():
    """The options that the README names are those of the layer."""
    named = re.search(r"Options of the layer: (.*?)\. A projection", section("Use it in your model"), re.DOTALL).group(1)
    assert set(re.findall(r"`(\w+)", named)) <= set(inspect.signature(FlashAttention).parameters)


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

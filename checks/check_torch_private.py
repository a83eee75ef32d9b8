"""The private functions of PyTorch in the sources are those of flash_attention/torch_private.py, and the installed PyTorch has them.

python checks/check_torch_private.py
"""

import ast
from pathlib import Path

from harness import run_alone

from flash_attention import torch_private

ROOT = Path(__file__).resolve().parents[1]


def private_names(source: str) -> set[str]:
    """Dotted names that begin with torch and have a part with a leading underscore, however they were imported."""
    tree = ast.parse(source)
    roots, found = {"torch": "torch"}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            roots |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    found |= {name for name in roots.values() if _is_private(name)}
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name) and node.id in roots:
            found.add(".".join((roots[node.id], *reversed(parts))))
    return {name for name in found if _is_private(name) and not any(other.startswith(f"{name}.") for other in found)}


def _is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def check_names_are_found():
    source = (
        "import torch\nfrom torch.a import _b\nfrom torch import c as d\nd._e(torch._C._f(), torch.g._h.i, torch.__version__, self._j)\n"
    )
    assert private_names(source) == {"torch.a._b", "torch.c._e", "torch._C._f", "torch.g._h.i"}


def check_table_is_complete():
    files = [file for folder in ("flash_attention", "reference") for file in (ROOT / folder).rglob("*.py")]
    used = set().union(*(private_names(file.read_text(encoding="utf-8")) for file in files))
    assert used - set(torch_private.PRIVATE) == set(), "to be added to flash_attention/torch_private.py"
    assert set(torch_private.PRIVATE) - used == set(), "no longer used: to be removed from flash_attention/torch_private.py"


def check_torch_has_them(monkeypatch):
    assert torch_private.missing() == []
    monkeypatch.setitem(torch_private.PRIVATE, "torch._C._lost", "")
    assert torch_private.missing() == ["torch._C._lost"]


if __name__ == "__main__":
    run_alone(__file__)

"""The API pages: one for each module that users import, no link in them is dead, and nothing public is without a docstring.

python -m pytest checks/check_api.py
"""

import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest
from harness import run_alone

pdoc = pytest.importorskip("pdoc", reason="pdoc, which makes the pages, is not installed")
ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("build_api", ROOT / "docs/build_api.py")
build_api = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(build_api)


def importable() -> list[str]:
    """The modules of build_api.MODULES whose own dependencies are installed."""
    return [name for name in build_api.MODULES if "hugging_face" not in name or importlib.util.find_spec("transformers")]


def dead_links(folder: Path) -> list[str]:
    """Every link in a folder of HTML pages to a page or an anchor that is not there, as "page → link"."""
    pages = {page: re.sub(r"(?s)<script>.*?</script>", "", page.read_text(encoding="utf-8")) for page in folder.rglob("*.html")}
    anchors = {page: set(re.findall(r'id="([^"]+)"', text)) for page, text in pages.items()}
    found = []
    for page, text in pages.items():
        for link in re.findall(r'href="(?!https?:|data:)([^"]*)"', text):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if target not in pages or (anchor and anchor not in anchors[target]):
                found.append(f"{page.name} → {link}")
    return found


def check_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(build_api, "MODULES", importable())
    build_api.build(tmp_path)
    for name in importable():
        assert (tmp_path / f"{name.replace('.', '/')}.html").stat().st_size > 50_000, name
    index = (tmp_path / "flash_attention.html").read_text(encoding="utf-8")
    assert all(f'href="flash_attention/{name}.html"' in index for name in ("cache", "scores", "spans", "parallel", "reference"))
    assert not dead_links(tmp_path)


def check_dead_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<a id="here" href="#here"></a><a href="#gone"></a><a href="b.html"></a><a href="https://x.org"></a>')
    assert dead_links(tmp_path) == ["a.html → #gone", "a.html → b.html"]


@pytest.mark.parametrize("name", importable())
def check_documented(name):
    module = importlib.import_module(name)
    public = getattr(module, "__all__", None) or [
        x for x, value in vars(module).items() if not x.startswith("_") and getattr(value, "__module__", None) == name
    ]
    assert module.__doc__ and public
    without = [x for x in public if callable(getattr(module, x)) and not inspect.getdoc(getattr(module, x))]
    assert not without, f"{name}: no docstring on {without}"


if __name__ == "__main__":
    run_alone(__file__)

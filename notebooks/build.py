"""Execute the lessons, keep what they print in the notebooks themselves, and export them as static HTML to build/notebooks/.

python notebooks/build.py            execute every lesson, write its outputs, the HTML and docs/tile_loop.gif
python notebooks/build.py --check    exit with 1 if any outputs are not those of the current sources

A notebook's metadata holds two hashes: of everything its outputs depend on (the reference, the modules in this folder, its own code; if it
reads them also the kernels, the kept results and the ring), and of the outputs themselves. Times and addresses are left out.
"""

import argparse
import hashlib
import json
import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from nbformat import NotebookNode

try:
    from latex2mathml.converter import convert as latex_to_mathml
except ImportError:
    latex_to_mathml = None

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
HTML = ROOT / "build" / "notebooks"
GIF = ROOT / "docs" / "tile_loop.gif"
RING = ROOT / "examples" / "ring_on_a_laptop.py"
LESSON_SECONDS = 300  # a cell that takes longer is taken to hang


def lessons() -> list[Path]:
    """The notebooks, in their order."""
    return sorted(HERE.glob("lesson_*.ipynb"))


def hashes(notebook: NotebookNode) -> dict[str, str]:
    """Two hashes: of everything that the outputs depend on, and of the outputs."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    text = json.dumps([cell.source for cell in code])
    modules = [file for file in HERE.glob("*.py") if file != Path(__file__).resolve()]
    kernels = [file for file in (ROOT / "cuda").iterdir() if file.is_file()] if "sources" in text else []
    results = (ROOT / "results").glob("*") if "results" in text else []
    ring = [*(ROOT / "flash_attention" / "parallel").glob("*.py"), RING] if RING.stem in text else []
    files = [*sorted(ring), *sorted(kernels), *sorted(modules), *sorted((ROOT / "reference").glob("*.py")), *sorted(results)]
    sources = hashlib.sha256(text.encode())
    for file in files:
        sources.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    outputs = hashlib.sha256(json.dumps([cell.outputs for cell in code], sort_keys=True).encode())
    return {"sources": sources.hexdigest(), "outputs": outputs.hexdigest()}


def execute(file: Path) -> NotebookNode:
    """The notebook with the outputs of a run from a clean kernel, in its own folder. Raises nbclient's CellExecutionError."""
    notebook = nbformat.read(file, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=LESSON_SECONDS,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],  # else every kernel warns that it talks over a local socket
        resources={"metadata": {"path": str(file.parent)}},
    )
    client.execute()
    for cell in notebook.cells:
        cell.metadata = NotebookNode({key: value for key, value in cell.metadata.items() if key == "tags"})
        for output in cell.get("outputs", []):
            if "text/plain" in output.get("data", {}):
                output.data["text/plain"] = re.sub(r" at 0x[0-9a-f]+", "", output.data["text/plain"])
    notebook.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"}, language_info={"name": "python"}
    )
    notebook.metadata["made_from"] = hashes(notebook)
    return notebook


def stale(file: Path) -> str | None:
    """Why the notebook's outputs are not those of the current sources; None if they are."""
    notebook = nbformat.read(file, as_version=4)
    made_from, present = notebook.metadata.get("made_from", {}), hashes(notebook)
    if made_from.get("sources") != present["sources"]:
        return f"{file.name}: its sources have changed since it was executed"
    if made_from.get("outputs") != present["outputs"]:
        return f"{file.name}: its outputs have been edited"
    return None


FORMULA = re.compile(r"```.*?```|`[^`\n]*`|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$]+?)\$", re.DOTALL)  # or code, in which $ is no formula
FROM_THE_NETWORK = re.compile(r'<script[^>]*\bsrc="https://[^"]*"[^>]*>\s*</script>')


def set_formulas_aside(notebook: NotebookNode) -> dict[str, str]:
    """Puts a word in the place of each formula of the notebook's text. → word: the formula in MathML, which browsers draw by themselves.

    Nothing is changed where latex2mathml is not installed: then pages draw their formulas with MathJax, from the network.
    """
    if latex_to_mathml is None:
        return {}
    formulas: dict[str, str] = {}

    def word(found: re.Match) -> str:
        tex = found["block"] or found["inline"]
        if tex is None:
            return found[0]
        mathml = latex_to_mathml(tex, display="block" if found["block"] else "inline")
        box = '<mrow style="border: 1px solid; padding: 0.35em">'  # browsers do not draw menclose
        mathml = mathml.replace('<menclose notation="box">', box).replace("</menclose>", "</mrow>")
        name = f"FORMULA{len(formulas)}X"
        formulas[name] = mathml
        return f"\n\n{name}\n\n" if found["block"] else name

    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = FORMULA.sub(word, cell.source)
    return formulas


def export(file: Path, folder: Path = HTML) -> Path:
    """The notebook as it stands, as static HTML. Links between lessons lead to the HTML, others to the files of the repository. Nothing is
    read from the network."""
    folder.mkdir(parents=True, exist_ok=True)
    notebook = nbformat.read(file, as_version=4)
    formulas = set_formulas_aside(notebook)
    html, _ = HTMLExporter().from_notebook_node(notebook, resources={"metadata": {"name": file.stem}})
    if formulas:
        html = FROM_THE_NETWORK.sub("", html)
        html = re.sub(r"FORMULA\d+X", lambda name: formulas[name[0]], html)

    def relink(link: re.Match) -> str:
        return link[1] + ".html" if link[2] == ".ipynb" else os.path.relpath(file.parent / (link[1] + link[2]), folder)

    html = re.sub(r'(?<=href=")(?!\w+:|#)([^"]+?)(\.\w+)(?=")', relink, html)
    target = folder / f"{file.stem}.html"
    target.write_text(html, encoding="utf-8")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description="Execute the lessons and export them as HTML.")
    parser.add_argument("--check", action="store_true", help="only tell whether the outputs are current")
    parser.add_argument("files", nargs="*", type=Path, help="notebooks (default: all)")
    arguments = parser.parse_args()
    files = [file.resolve() for file in arguments.files] or lessons()
    if arguments.check:
        reasons = [reason for reason in map(stale, files) if reason]
        sys.exit("\n".join([*reasons, "run: make notebooks"]) if reasons else 0)
    for file in files:
        nbformat.write(execute(file), file)
        print(export(file).relative_to(ROOT))
    if not arguments.files:
        from pictures import tile_loop_gif

        tile_loop_gif(GIF)
        print(GIF.relative_to(ROOT))


if __name__ == "__main__":
    main()

"""Builds the sdist and, from it, the wheel; installs the wheel in an empty environment and calls it.

    python checks/package.py              into a temporary folder: what CI runs
    python checks/package.py --release    into dist/, from a clean tree whose version the changelog has; says what is left to do

The environment contains only torch, in the version that requirements.txt pins. pip downloads `build`, setuptools and torch.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"flash_attention": "flash_attention", "reference": "flash_attention/reference", "cuda": "flash_attention/cuda"}
CALL = """
from pathlib import Path

import torch

import flash_attention
import flash_attention.build
import flash_attention.integrations.sdpa
import flash_attention.parallel
from flash_attention import reference

assert Path(flash_attention.__file__).is_relative_to(Path("venv").resolve()), flash_attention.__file__
q, k, v = torch.randn(3, 1, 2, 50, 16).unbind()
O = flash_attention.flash_attention(q, k, v)
assert torch.allclose(O, reference.normal_attention(q, k, v), atol=1e-6)
print(flash_attention.__version__, "in", flash_attention.__file__)
"""


def run(*command: str, folder: Path = ROOT) -> str:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout


def environment(folder: Path) -> str:
    """The interpreter of a new virtual environment."""
    venv.create(folder, with_pip=True)
    return str(folder / "bin" / "python")


def version() -> str:
    text = (ROOT / "flash_attention" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.*)"$', text, re.MULTILINE)[1]


def why_no_release() -> list[str]:
    """What is still missing for a release of this version."""
    missing = []
    if run("git", "status", "--porcelain"):
        missing.append("the tree has changes that are not committed")
    if f"\n## {version()}\n" not in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"):
        missing.append(f"CHANGELOG.md has no section {version()}")
    if run("git", "tag", "--list", f"v{version()}"):
        missing.append(f"v{version()} is tagged already: raise `__version__` in flash_attention/__init__.py")
    return missing


def left_out(wheel: Path) -> set[str]:
    """Files of the packages that git tracks but the wheel lacks."""
    tracked = run("git", "ls-files", *FOLDERS).splitlines()
    expected = {file.replace(folder, inside, 1) for file in tracked for folder, inside in FOLDERS.items() if file.startswith(f"{folder}/")}
    return expected - set(zipfile.ZipFile(wheel).namelist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--release", action="store_true", help="into dist/, after checking that this version can be released")
    release = parser.parse_args().release
    if release and (missing := why_no_release()):
        sys.exit("no release: " + "; ".join(missing))
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        dist = ROOT / "dist" if release else scratch / "dist"
        builder = environment(scratch / "builder")
        run(builder, "-m", "pip", "install", "--quiet", "--no-compile", "build")
        run(builder, "-m", "build", "--outdir", str(dist), str(ROOT))  # the wheel is built from the sdist: what that lacks would be missing
        sdist, wheel = dist / f"flash_attention-{version()}.tar.gz", dist / f"flash_attention-{version()}-py3-none-any.whl"
        assert sdist.exists(), sorted(dist.iterdir())
        missing = left_out(wheel)
        assert not missing, f"{wheel.name} lacks {sorted(missing)}"
        python = environment(scratch / "venv")
        torch = re.search(r"^torch==.*$", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)[0]
        run(python, "-m", "pip", "install", "--quiet", "--no-compile", torch, str(wheel))
        print(run(python, "-c", CALL, folder=scratch), end="")
        print(*(f"{file.name}: {file.stat().st_size // 1024} KB" for file in (sdist, wheel)), sep="\n")
    if release:
        print(f"left to do: git tag v{version()} && git push origin v{version()} && python -m twine upload {dist}/*{version()}*")


if __name__ == "__main__":
    main()

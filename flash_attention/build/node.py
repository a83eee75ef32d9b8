"""Compiles node.cpp, the C++ of small calls with gradients, with the machine's C++ compiler, into the same cache as the kernels.

The library depends on PyTorch's version, but neither on Python's nor on a GPU. `python -m flash_attention.build` compiles it too.
"""

import logging
import platform
import sys
from pathlib import Path

import torch

from flash_attention import build
from flash_attention.build import BuildError, emulated

SOURCE = Path(__file__).resolve().parents[1] / "node.cpp"
FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared", f"-D_GLIBCXX_USE_CXX11_ABI={torch.compiled_with_cxx11_abi():d}")
CUDA_RUNTIME = "typedef struct CUstream_st* cudaStream_t;\n"  # what attention.h takes from CUDA's header: so that need not be installed


def name() -> str:
    """The library's file name: what it is compiled from and for. Any compiler will do."""
    texts = SOURCE.read_text(encoding="utf-8"), (build.SOURCES / "attention.h").read_text(encoding="utf-8"), CUDA_RUNTIME
    return f"node-{build._hash(*FLAGS, torch.__version__, platform.machine(), *texts, digits=12)}.so"


def find() -> Path | None:
    """The library, prebuilt or from the cache, if it is there.

    Raises:
        BuildError: a folder is refused.
    """
    for folder in (build.prebuilt_folder(), build.cache_folder()):
        if folder and (library := folder / name()).exists():
            build.refuse_if_others_write(library)
            return library
    return None


def compiled(into: Path | None = None) -> Path:
    """The library in the folder `into`, or in the cache, compiled unless it is there.

    Raises:
        BuildError: there is no C++ compiler, or it failed (with its output).
    """
    compiler, installed = emulated._compiler(), Path(torch.__file__).parent
    headers = installed / "include", installed / "include" / "torch" / "csrc" / "api" / "include"

    def commands(out: Path) -> list[list[str]]:
        (out.parent / "cuda_runtime.h").write_text(CUDA_RUNTIME)
        include = (f"-I{out.parent}", f"-I{build.SOURCES}", *(f"-I{folder}" for folder in headers))
        return [[compiler, *FLAGS, *include, str(SOURCE), "-o", str(out), f"-L{installed / 'lib'}", "-ltorch_cpu", "-lc10"]]

    return emulated._cached(name(), "small calls with gradients in C++", commands, into or build.cache_folder())


def main() -> None:
    """What flash_attention/node.py starts in the background: says nothing, unless it fails."""
    build.log.setLevel(logging.ERROR)
    try:
        compiled()
    except (BuildError, OSError) as error:
        sys.exit(str(error)[:2000])  # a compiler's message may be long

"""Compiles the kernels: one shared library for each specialisation of each .cu file, when first used or ahead of time.

    python -m flash_attention.build                     the usual set, for this machine's GPU
    python -m flash_attention.build --arch 80 90a       for given architectures; no GPU needed

Libraries go to a folder of the user's own (FLASH_ATTENTION_CACHE, else ~/.cache/flash_attention), under a name that holds a hash of the
sources, the flags and the compiler's version. Several processes may build at once: one compiles, the others wait for its result.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from flash_attention import reference

SOURCES = Path(reference.__file__).resolve().parents[1] / "cuda"  # beside the reference, in a clone and in an installed wheel alike
FLAGS = ("-O3", "-std=c++17", "-shared", "-Xcompiler=-fPIC", "-Xptxas=-v", "-Werror=all-warnings")

# A kernel that spills registers, or whose asynchronous matrix products the compiler had to serialise, is a mistake, not a slow kernel.
SPILL = re.compile(r"([1-9]\d*) bytes spill")
WARNING = re.compile(r"C75(0[89]|1[0-7])")

DTYPE_NUMBER = {"float32": 0, "float16": 1, "bfloat16": 2}  # as in attention.h
MASK_NUMBER = {None: 0, "bits": 1, "bytes": 2, "key bits": 3}  # as in attention.h


class BuildError(RuntimeError):
    """A kernel could not be compiled or loaded; the message says why and what to do."""


class Specialisation(NamedTuple):
    """One kernel: a source file and the constants it is compiled with. arch is nvcc's, without "sm_"."""

    file: str
    arch: str
    head_dim: int
    dtype: str
    causal: bool
    mask: str | None  # its form
    dropout: bool

    def defines(self) -> list[str]:
        values = {
            "HEAD_DIM": self.head_dim,
            "DTYPE": DTYPE_NUMBER[self.dtype],
            "CAUSAL": int(self.causal),
            "MASK": MASK_NUMBER[self.mask],
            "DROPOUT": int(self.dropout),
            "SMEM_KB": shared_memory_kb(self.arch),
        }
        return [f"-D{name}={value}" for name, value in values.items()]

    def __str__(self) -> str:
        flags = {"causal": self.causal, f"mask of {self.mask}": self.mask, "dropout": self.dropout}
        return " ".join([self.file, f"sm_{self.arch}", f"D {self.head_dim}", self.dtype, *(name for name, on in flags.items() if on)])


def shared_memory_kb(arch: str) -> int:
    """The most shared memory a block may have (CUDA C++ Programming Guide, table of technical specifications)."""
    number = int(arch.rstrip("af"))
    return {75: 64, 80: 163, 87: 163}.get(number, 227 if 90 <= number < 120 else 99)


def arch_of(capability: tuple[int, int]) -> str:
    """nvcc's name of a compute capability. 9.0 takes the "a" features (wgmma, setmaxnreg), which nothing else has."""
    return "90a" if capability == (9, 0) else "{}{}".format(*capability)


@functools.cache
def find_nvcc() -> str | None:
    """nvcc's path: in CUDA_HOME, on the PATH, or from pip's packages."""
    candidates = [Path(os.environ[name]) / "bin" / "nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    for folder in sys.path:
        candidates += sorted(Path(folder or ".").glob("nvidia/cu*/bin/nvcc"), reverse=True)
    return next((str(path) for path in candidates if os.access(path, os.X_OK)), None)


@functools.cache
def _nvcc_version(nvcc: str) -> str:
    return subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout


@functools.cache
def _sources_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".cu", ".cuh", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where libraries are kept: readable and writable by the user alone, since what lies there is loaded and run."""
    chosen = os.environ.get("FLASH_ATTENTION_CACHE")
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flash_attention"
    folder = Path(chosen) if chosen else default
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise BuildError(f"the kernel cache {folder} belongs to another user; set FLASH_ATTENTION_CACHE to a folder of your own")
    return folder


def build(source: str, arch: str, defines: list[str], description: str, *, verbose: bool = True) -> Path:
    """Compile cuda/`source`, unless the cache has it, and return the library's path.

    Raises:
        BuildError: no nvcc, the compiler failed (with its output), a register spill, or a ptxas warning C7508 – C7517.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError(
            "nvcc, NVIDIA's CUDA compiler, was not found in CUDA_HOME, on the PATH or among pip's packages. "
            "Install the CUDA toolkit, or: pip install 'flash_attention[cuda]'"
        )
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}", *FLAGS, *defines]
    key = hashlib.sha256("\0".join([_sources_hash(), _nvcc_version(nvcc), source, *flags]).encode()).hexdigest()[:24]
    library = cache_folder() / f"{Path(source).stem}-{key}.so"
    if library.exists():
        return library
    with _lock(library.with_suffix(".lock")):
        if library.exists():  # another process built it while this one waited
            return library
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            temporary = Path(folder) / "kernel.so"
            command = [nvcc, *flags, str(SOURCES / source), "-o", str(temporary)]
            result = subprocess.run(command, capture_output=True, text=True)
            output = result.stdout + result.stderr
            if result.returncode:
                raise BuildError(f"nvcc could not compile {description}\n{' '.join(command)}\n{output}")
            if SPILL.search(output) or WARNING.search(output):
                raise BuildError(f"{description} spills registers or was serialised by ptxas, and is not used\n{output}")
            temporary.replace(library)  # atomic: a reader sees the whole library or none
        if verbose:
            print(f"flash_attention: compiled {description} in {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    return library


@contextlib.contextmanager
def _lock(path: Path):
    """Held by one process at a time."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def load(library: Path) -> ctypes.CDLL:
    """A library with the interface of cuda/attention.h."""
    try:
        loaded = ctypes.CDLL(str(library))
    except OSError as error:
        raise BuildError(f"{library} could not be loaded: {error}. Delete it to have it built again") from error
    loaded.error_name.restype = ctypes.c_char_p
    loaded.params_size.restype = ctypes.c_int64
    return loaded

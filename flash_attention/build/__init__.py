"""Compiles the kernels: one shared library for each specialisation of each .cu file, when first used or ahead of time.

    python -m flash_attention.build                                the usual set, for this machine's GPU
    python -m flash_attention.build --arch 80 90a --out DIR        for given architectures, into a folder for other machines; no GPU needed
    python -m flash_attention.build --check --json FILE            whether any kernel spills, on any architecture
    python -m flash_attention.build --prune                        deletes what this version and this compiler do not use

A kernel is looked for in FLASH_ATTENTION_KERNELS, a folder filled by --out, if that is set; then in the cache, a folder of the user's own
(FLASH_ATTENTION_CACHE, else ~/.cache/flash_attention); then it is compiled into the cache. A library's name says what it was compiled from
(hashes of the sources and of the constants) and by what (a hash of the compilers and of the environment that nvcc reads). A machine with
nvcc takes from its cache only what that nvcc compiled; one without takes what there is. Several processes may build at once: one compiles,
the others wait for its result.

What happens is logged under the name "flash_attention": `logging.getLogger("flash_attention").setLevel(logging.ERROR)` silences it.

One file because looking up, compiling and caching a library are three steps of one search.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import logging
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
FLAGS = ("-O3", "-std=c++17", "-Xptxas=-v")
LIBRARY_FLAGS = ("-shared", "-Xcompiler=-fPIC")
ENVIRONMENT = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN")  # that nvcc reads

DTYPE_NUMBER = {"float32": 0, "float16": 1, "bfloat16": 2}  # as in attention.h
MASK_NUMBER = {None: 0, "bits": 1, "bytes": 2, "key bits": 3}  # as in attention.h

log = logging.getLogger("flash_attention")


class BuildError(RuntimeError):
    """A kernel could not be compiled or loaded; the message says why and what to do."""


class Specialisation(NamedTuple):
    """One kernel: a source file and the constants it is compiled with. arch is nvcc's, without "sm_". Without a head size the file does not
    compute attention, and gets no other constants."""

    file: str
    arch: str
    head_dim: int | None = None
    dtype: str = "float32"
    causal: bool = False
    mask: str | None = None  # its form
    dropout: bool = False
    interval: bool = False  # each row sees an interval of its own
    v_head_dim: int | None = None  # of V and O, if it is another than Q's and K's
    float8_keys: bool = False  # K and V are e4m3
    score: tuple[str, ...] = ()  # which of softcap, bias and alibi the call has
    tf32: bool = False  # float32 with TF32's accuracy

    def defines(self) -> list[str]:
        values = {"ARCH": arch_number(self.arch), "SMEM_KB": shared_memory_kb(self.arch)}
        if self.head_dim is not None:
            values |= {
                "HEAD_DIM": self.head_dim,
                "DTYPE": DTYPE_NUMBER[self.dtype],
                "CAUSAL": int(self.causal),
                "MASK": MASK_NUMBER[self.mask],
                "DROPOUT": int(self.dropout),
                "INTERVAL": int(self.interval),
            }
        if self.v_head_dim is not None:
            values["V_HEAD_DIM"] = self.v_head_dim
        if self.float8_keys:
            values["KEYS_FLOAT8"] = 1
        if self.score:
            values["SCORE"] = sum(_score_bits()[name] for name in self.score)
        if self.tf32:
            values["PLANES"] = 1
        return [f"-D{name}={value}" for name, value in values.items()]

    def flags(self) -> list[str]:
        return [f"-gencode=arch=compute_{self.arch},code=sm_{self.arch}", *FLAGS, *self.defines()]

    def __str__(self) -> str:
        if self.head_dim is None:
            return f"{self.file} sm_{self.arch}"
        flags = {"causal": self.causal, "intervals": self.interval, f"mask of {self.mask}": self.mask, "dropout": self.dropout}
        flags |= {"float8 keys": self.float8_keys, **dict.fromkeys(self.score, True), "as TF32": self.tf32}
        size = f"D {self.head_dim}" + (f" Dv {self.v_head_dim}" if self.v_head_dim else "")
        return " ".join([self.file, f"sm_{self.arch}", size, self.dtype, *(name for name, on in flags.items() if on)])


@functools.cache
def _score_bits() -> dict[str, int]:
    """attention.h's SCORE_ constants, by the name of the argument."""
    text = (SOURCES / "attention.h").read_text(encoding="utf-8")
    return {name.lower(): int(bit) for name, bit in re.findall(r"#define SCORE_(\w+) (\d+)", text)}


def arch_number(arch: str) -> int:
    """A compute capability times ten."""
    return int(arch.rstrip("af"))


def shared_memory_kb(arch: str) -> int:
    """The most shared memory a block may have (CUDA C++ Programming Guide, table of technical specifications)."""
    number = arch_number(arch)
    return {75: 64, 80: 163, 87: 163}.get(number, 227 if 90 <= number < 120 else 99)


def arch_of(capability: tuple[int, int]) -> str:
    """nvcc's name of a compute capability. 9.0 takes the "a" features (wgmma, setmaxnreg), which nothing else has."""
    return "90a" if capability == (9, 0) else "{}{}".format(*capability)


# ---- the compilers


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
def _version(compiler: str) -> str:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.strip()
    except OSError as error:
        return f"{compiler}: {error}"


def host_compiler() -> str:
    """The C++ compiler that nvcc calls: named in the environment, or gcc."""
    named = re.findall(r"(?:-ccbin|--compiler-bindir)[= ]+(\S+)", " ".join(os.environ.get(name, "") for name in ENVIRONMENT[:2]))
    chosen = named[-1] if named else os.environ.get("NVCC_CCBIN") or "gcc"
    return str(Path(chosen) / "gcc") if Path(chosen).is_dir() else chosen


def compilers(nvcc: str) -> str:
    """A hash of everything that determines a library besides its sources and flags."""
    environment = [f"{name}={os.environ[name]}" for name in ENVIRONMENT if os.environ.get(name)]
    return "\n".join([_version(nvcc), _version(host_compiler()), *environment])


# ---- names of libraries


def _hash(*parts: str, digits: int) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:digits]


@functools.cache
def _hash_of_sources(folder: Path) -> str:
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".cu", ".cuh", ".h")]
    return _hash(*FLAGS, *LIBRARY_FLAGS, *(part for path in files for part in (path.name, path.read_bytes().hex())), digits=12)


def _by_what(nvcc: str) -> str:
    return _hash(compilers(nvcc), digits=12)


def _from_what(kernel: Specialisation) -> str:
    return f"{Path(kernel.file).stem}-{_hash_of_sources(SOURCES)}-{_hash(*kernel.flags(), digits=12)}"


def _built_before(folder: Path, kernel: Specialisation) -> Path | None:
    """The kernel's newest library in a folder, whichever compiler built it."""
    found = folder.glob(f"{_from_what(kernel)}-*.so")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


# ---- folders. What lies there is loaded and run.


def refuse_if_others_write(path: Path) -> None:
    if path.stat().st_mode & 0o022:
        raise BuildError(f"{path} holds programs, and its group or others may write to it: refused. Run: chmod go-w '{path}'")


def cache_folder() -> Path:
    """Where libraries are kept: a folder that belongs to the user, and that no other user may write to."""
    chosen = os.environ.get("FLASH_ATTENTION_CACHE")
    try:
        folder = Path(chosen or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flash_attention")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        raise BuildError(f"there can be no kernel cache: {error}. Set FLASH_ATTENTION_CACHE to a folder of your own") from error
    if folder.stat().st_uid != os.getuid():
        raise BuildError(f"the kernel cache {folder} belongs to another user; set FLASH_ATTENTION_CACHE to a folder of your own")
    refuse_if_others_write(folder)
    return folder


def prebuilt_folder() -> Path | None:
    """The folder that FLASH_ATTENTION_KERNELS names. It may be anyone's, since the user chose it, but its owner alone may write to it."""
    chosen = os.environ.get("FLASH_ATTENTION_KERNELS")
    if not chosen:
        return None
    if not Path(chosen).is_dir():
        raise BuildError(f"FLASH_ATTENTION_KERNELS must name a folder, got {chosen!r}")
    refuse_if_others_write(Path(chosen))
    return Path(chosen)


# ---- building


def why_not_here() -> str | None:
    """Why this system cannot build and load kernels, or None."""
    return None if sys.platform == "linux" else f"the kernels need Linux (on Windows: WSL 2), this is {sys.platform}"


def build(kernel: Specialisation, into: Path | None = None) -> Path:
    """The path of a kernel's library: prebuilt, from the cache, or compiled now; or, always by this machine's nvcc, in the folder `into`.

    A library whose kernel spills registers, or whose matrix products the assembler serialised, works, and is used; it is slower than it
    should be, which is logged when it is compiled and noted in a file beside it.

    Raises:
        BuildError: there is no such library and no nvcc, nvcc failed (with its output), a folder is refused, or this is not Linux.
    """
    if reason := why_not_here():
        raise BuildError(reason)
    if into is None and (prebuilt := prebuilt_folder()) and (library := _built_before(prebuilt, kernel)):
        refuse_if_others_write(library)
        return library
    folder, nvcc = into or cache_folder(), find_nvcc()
    if nvcc is None:
        if into is None and (library := _built_before(folder, kernel)):
            return library
        named = os.environ.get("FLASH_ATTENTION_KERNELS") or "not set"
        raise BuildError(
            "nvcc, NVIDIA's CUDA compiler, was not found in CUDA_HOME, on the PATH or among pip's packages, and neither "
            f"FLASH_ATTENTION_KERNELS ({named}) nor the cache ({folder}) holds the kernel. "
            "Install the CUDA toolkit, or: pip install 'flash_attention[cuda]'"
        )
    library = folder / f"{_from_what(kernel)}-{_by_what(nvcc)}.so"
    if not library.exists():
        with _lock(library.with_suffix(".lock")):
            if not library.exists():  # else another process built it while this one waited
                _compile(nvcc, kernel, library)
    return library


def _compile(nvcc: str, kernel: Specialisation, library: Path) -> None:
    # A warning, because Python shows no lower level by default, and a call that pauses for seconds should say why.
    log.warning("flash_attention: compiling %s", kernel)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="building-", dir=library.parent) as folder:
        compiled, record = Path(folder) / "kernel.so", Path(folder) / "kernel.json"
        output = _nvcc(nvcc, kernel, *LIBRARY_FLAGS, "-o", str(compiled))
        for line in (found := complaints(output)):
            log.warning("flash_attention: %s is slower than it should be: %s", kernel, line)
        record.write_text(json.dumps({"kernel": str(kernel), "compilers": compilers(nvcc), "complaints": found}, indent=1) + "\n")
        compiled.chmod(0o755)
        record.replace(library.with_suffix(".json"))
        compiled.replace(library)  # last, and atomic: a reader sees the whole library or none
    log.info("flash_attention: compiled %s in %.1f s", kernel, time.perf_counter() - started)


def _nvcc(nvcc: str, kernel: Specialisation, *more: str) -> str:
    """What nvcc and its assembler print."""
    command = [nvcc, *kernel.flags(), str(SOURCES / kernel.file), *more]
    result = subprocess.run(command, capture_output=True, text=True)
    output = result.stdout + result.stderr
    if result.returncode:
        raise BuildError(f"nvcc could not compile {kernel}\n{' '.join(command)}\n{output}")
    return output


def complaints(output: str) -> list[str]:
    """Complaints in the assembler's output: registers spilled to memory, any use of a stack, and warnings C7508 – C7517, which say that it
    had to serialise asynchronous matrix products."""
    properties = re.findall(r"Function properties for (\S+)\n\s*(.* stack frame, .*)", output)
    spills = [f"{_unmangled(name)}: {numbers}" for name, numbers in properties if re.search(r"[1-9]", numbers)]
    return spills + [line.strip() for line in output.splitlines() if re.search(r"C75(0[89]|1[0-7])", line)]


def _unmangled(name: str) -> str:
    """A C++ function's own name: forward_kernel of _Z14forward_kernel15AttentionParams."""
    length = re.match(r"_Z(\d+)", name)
    return name[length.end() : length.end() + int(length[1])] if length else name


def noted_complaints(library: Path) -> list[str]:
    """The complaints about the library's kernels when it was compiled, from the file beside it."""
    return json.loads(library.with_suffix(".json").read_text())["complaints"]


def inspect(kernel: Specialisation) -> list[str]:
    """Compiles a kernel's device code, for its `complaints` alone. Any warning of the compiler is an error.

    Raises:
        BuildError: no nvcc, or it failed.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("nvcc was not found")
    with tempfile.TemporaryDirectory() as folder:
        return complaints(_nvcc(nvcc, kernel, "-Werror=all-warnings", "-cubin", "-o", f"{folder}/kernel.cubin"))


@contextlib.contextmanager
def _lock(path: Path):
    """Held by one process at a time."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # waiting processes then find the library; later ones create a new lock file


# ---- loading

failures: dict[Specialisation, str] = {}  # specialisations that could not be built in this process, and why: they are not tried again


def load(kernel: Specialisation, params_size: int) -> ctypes.CDLL:
    """A kernel's library, with the interface of cuda/attention.h, built if necessary. `params_size`: bytes of the struct that it takes.

    Raises:
        BuildError: it cannot be built or loaded; the second time immediately, without another attempt.
    """
    if kernel in failures:
        raise BuildError(failures[kernel])
    try:
        library = loaded(build(kernel))
        if library.params_size() != params_size:
            raise BuildError(f"{kernel} takes a struct of {library.params_size()} bytes, Python makes one of {params_size}")
        return library
    except BuildError as error:
        failures[kernel] = str(error)
        raise
    except OSError as error:
        failures[kernel] = f"{kernel} could not be built: {error}"
        raise BuildError(failures[kernel]) from error


def loaded(path: Path) -> ctypes.CDLL:
    """The library in a file."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} could not be loaded: {error}. Delete it to have it built again") from error
    library.error_name.restype = ctypes.c_char_p
    library.params_size.restype = ctypes.c_int64
    return library


def prune() -> list[Path]:
    """Deletes from the cache what this version of the project, with this machine's compilers, does not use: libraries of other sources and
    other compilers, and leftovers of builds interrupted a day ago or earlier. Without nvcc, libraries of the present sources stay.
    The emulator's libraries all go: they are compiled in a second each.
    """
    from flash_attention.build import node  # which imports this file

    folder, nvcc = cache_folder(), find_nvcc()
    name = re.compile(rf".+-{_hash_of_sources(SOURCES)}-\w+-{_by_what(nvcc) if nvcc else '[0-9a-f]+'}|{Path(node.name()).stem}")
    yesterday = time.time() - 24 * 3600
    deleted = []
    for path in [*folder.iterdir(), *folder.glob("emulator/*")]:
        left_behind = path.name.startswith("building-") or path.suffix == ".lock"
        if path.stat().st_mtime < yesterday if left_behind else path.suffix in (".so", ".json") and not name.fullmatch(path.stem):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            deleted.append(path)
    return deleted

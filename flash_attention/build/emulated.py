"""Compiles the kernels for the emulator (cuda/emulator): with the machine's C++ compiler, into a folder of the same cache.

A kernel's library is linked with the emulator's runtime, which is compiled once. The compiler is told to instrument memory accesses for
ThreadSanitizer; ThreadSanitizer itself is not linked, the runtime answers instead (cuda/emulator/memory.cpp).
"""

import ctypes
import functools
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from flash_attention import build
from flash_attention.build import BuildError, Specialisation

FOLDER = "emulator"  # of the sources, and of the cache
COMMON = ("-g1", "-fPIC", "-march=native")
RUNTIME = ("-std=c++20", "-O2", "-fno-semantic-interposition", "-shared")
KERNEL = (
    "-std=c++17",  # nvcc's default; the standard library's headers take half as long again to parse as C++20
    "-O2",
    "-fsanitize=thread",
    "-ffp-contract=fast",
    "-fno-strict-aliasing",
)  # multiply-adds and aliasing as with nvcc
GCC = ("-fno-extern-tls-init",)  # otherwise it calls a function to initialise shared memory (extern thread_local), which needs none
# clang would tail-call the runtime, which could then not tell from where it was called; addr2line finds clang's inlined functions only
# in DWARF 4.
CLANG = ("-fno-optimize-sibling-calls", "-gdwarf-4")
WRAPPED = ("memcpy", "memmove", "memset")  # functions by which clang copies and clears memory without telling ThreadSanitizer
ARCH = "90a"  # what the emulated device is


@functools.cache
def find_compiler() -> str | None:
    """The path of $CXX, g++ or clang++, whichever is there first."""
    return next((path for name in (os.environ.get("CXX"), "g++", "clang++") if name and (path := shutil.which(name))), None)


def _compiler() -> str:
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler: neither $CXX nor g++ nor clang++ was found on the PATH")
    return compiler


@functools.cache
def _machine(compiler: str) -> str:
    """What the compiler, its version and this machine's processor determine: its predefined macros."""
    command = [compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _common(compiler: str) -> tuple[str, ...]:
    """A flag for g++, which would otherwise share inline variables across the process; each library must have its own."""
    return COMMON if _is_clang(compiler) else (*COMMON, "-fno-gnu-unique")


def _is_clang(compiler: str) -> bool:
    return "__clang__" in _machine(compiler)


def _contents(sources: Path, *patterns: str) -> list[str]:
    files = sorted(path for pattern in patterns for path in sources.glob(pattern))
    return [part for path in files for part in (str(path.relative_to(sources)), path.read_text())]


def runtime(sources: Path) -> Path:
    """The emulator's own library, compiled unless the cache has it."""
    compiler = _compiler()
    key = build._hash(_machine(compiler), *_common(compiler), *RUNTIME, *_contents(sources, f"{FOLDER}/*.cpp", f"{FOLDER}/*.h"), digits=24)
    source = str(sources / FOLDER / "runtime.cpp")
    return _cached(f"emulator-{key}.so", "the emulator", lambda out: [[compiler, *_common(compiler), *RUNTIME, source, "-o", str(out)]])


def _precompiled(sources: Path, compiler: str, flags: tuple[str, ...], headers: list[str]) -> list[str]:
    """Flags that make g++ read the headers that all kernels include precompiled from the cache, which saves a quarter of the time. Not for
    a copy of the sources, which is compiled only once or twice."""
    if _is_clang(compiler) or sources != build.SOURCES:
        return []
    key = build._hash(_machine(compiler), *flags, *headers, digits=24)
    compile_header = [compiler, *flags, "-x", "c++-header", str(sources / FOLDER / "ptx.h"), "-o"]
    header = _cached(f"headers-{key}.h.gch", "the emulator's headers", lambda out: [[*compile_header, str(out)]])
    return ["-include", str(header.with_suffix(""))]


def build_kernel(kernel: Specialisation, sources: Path | None = None) -> Path:
    """The path of a kernel's library for the emulator: from the cache, or compiled now. `sources` stands in place of cuda/.

    Raises:
        BuildError: there is no C++ compiler, or it failed (with its output).
    """
    sources = sources or build.SOURCES
    compiler, linked = _compiler(), runtime(sources)
    clang = _is_clang(compiler)
    include = (f"-I{sources / FOLDER / 'include'}", f"-I{sources}")
    general = (*_common(compiler), *KERNEL, *(CLANG if clang else GCC))
    flags = (*general, *kernel.defines())
    link = [f"-Wl,--wrap={name}" for name in WRAPPED] if clang else []
    headers = _contents(sources, "*.cuh", "*.h", f"{FOLDER}/*.h", f"{FOLDER}/include/*.h")
    text = (sources / kernel.file).read_text()
    included = [(sources / name).read_text() for name in re.findall(r'#include "(\w+\.cu)"', text)]  # a rung that includes its fallback
    key = build._hash(_machine(compiler), *flags, *link, linked.name, text, *included, *headers, digits=24)

    def commands(out: Path) -> list[list[str]]:
        compiled = str(out.with_suffix(".o"))
        first = _precompiled(sources, compiler, (*general, *include), headers)
        return [
            [compiler, *flags, *include, *first, "-x", "c++", "-c", str(sources / kernel.file), "-o", compiled],
            [compiler, "-shared", *link, compiled, str(linked), "-Wl,-rpath,$ORIGIN", "-o", str(out)],
        ]

    return _cached(f"{Path(kernel.file).stem}-{key}.so", f"{kernel} for the emulator", commands)


def _cached(name: str, description: str, commands: Callable[[Path], list[list[str]]], folder: Path | None = None) -> Path:
    """A file in the emulator's folder, or another: there already, or made now by commands, given where to write it."""
    folder = folder or build.cache_folder() / FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    build.refuse_if_others_write(folder)
    library = folder / name
    if library.exists():
        return library
    with build._lock(library.with_suffix(".lock")):
        if library.exists():  # another process built it while this one waited
            return library
        build.log.warning("flash_attention: compiling %s", description)
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="building-", dir=folder) as temporary:
            out = Path(temporary) / name
            for command in commands(out):
                result = subprocess.run(command, capture_output=True, text=True)
                if result.returncode:
                    raise BuildError(f"{command[0]} could not compile {description}\n{' '.join(command)}\n{result.stdout}{result.stderr}")
            out.chmod(0o755)
            out.replace(library)  # atomic: a reader sees the whole library or none
        build.log.info("flash_attention: compiled %s in %.1f s", description, time.perf_counter() - started)
    return library


def load(kernel: Specialisation, params_size: int, sources: Path | None = None) -> ctypes.CDLL:
    """A kernel's library for the emulator, as build.load() gives nvcc's.

    Raises:
        BuildError: it cannot be built or loaded.
    """
    library = build.loaded(build_kernel(kernel, sources))
    if library.params_size() != params_size:
        raise BuildError(f"{kernel} takes a struct of {library.params_size()} bytes, Python makes one of {params_size}")
    return library


def with_lines(message: str, library: Path) -> str:
    """The emulator's message, with each place in the library (@ and an offset) as file:line of the kernel."""
    places = sorted(set(re.findall(r"@([0-9a-f]+)", message)))
    lines = _lines(places, library)
    return re.sub(r"@([0-9a-f]+)", lambda match: lines.get(match[1], match[0]), message)


def _lines(places: list[str], library: Path) -> dict[str, str]:
    tool = shutil.which("addr2line")
    if not places or tool is None:
        return {}
    found = {}
    # -a: before each place's lines, its address; -i: its own line, then those of the functions that it is inlined in
    answer = subprocess.run([tool, "-a", "-i", "-e", str(library), *places], capture_output=True, text=True).stdout
    for place, part in zip(places, re.split(r"^0x[0-9a-f]+\n", answer, flags=re.MULTILINE)[1:], strict=True):
        frames = [Path(re.sub(r" \(discriminator \d+\)$", "", line)).name for line in part.splitlines()]
        frames = [frame for frame in frames if frame.partition(":")[0].endswith((".cu", ".cuh"))]  # others stand in for CUDA's headers
        if frames:
            found[place] = frames[0] + (f" (from {frames[-1]})" if frames[-1] != frames[0] else "")
    return found

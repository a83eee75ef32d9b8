"""Compiles the kernels for the emulator (cuda/emulator): with the machine's C++ compiler, into the cache that nvcc's libraries are in.

A kernel's library is linked with the emulator's runtime, which is compiled once. The compiler is told to instrument memory accesses for
ThreadSanitizer; ThreadSanitizer itself is not linked, the runtime answers instead (cuda/emulator/memory.cpp).
"""

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

from flash_attention import build
from flash_attention.build import BuildError, Specialisation

FOLDER = "emulator"  # of the sources
COMMON = ("-std=c++20", "-g1", "-fPIC", "-march=native", "-fno-gnu-unique")
RUNTIME = ("-O2", "-fno-semantic-interposition", "-shared")
KERNEL = ("-O2", "-x", "c++", "-fsanitize=thread", "-ffp-contract=fast", "-fno-strict-aliasing")  # as nvcc has it
ARCH = "90a"  # what the emulated device is


@functools.cache
def find_compiler() -> str | None:
    """The path of $CXX, g++ or clang++, whichever is there first."""
    return next((path for name in (os.environ.get("CXX"), "g++", "clang++") if name and (path := shutil.which(name))), None)


@functools.cache
def _machine(compiler: str) -> bytes:
    """What the compiler, its version and this machine's processor determine: its predefined macros."""
    return subprocess.run([compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, check=True).stdout


def _kernel_flags(compiler: str) -> tuple[str, ...]:
    # g++ would call a function to initialise an extern thread_local variable (shared memory) that needs none.
    return KERNEL if b"__clang__" in _machine(compiler) else (*KERNEL, "-fno-extern-tls-init")


def _hash(*parts: bytes | str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update((part.encode() if isinstance(part, str) else part) + b"\0")
    return digest.hexdigest()[:24]


def _contents(sources: Path, *patterns: str) -> list[bytes | str]:
    files = sorted(path for pattern in patterns for path in sources.glob(pattern))
    return [part for path in files for part in (str(path.relative_to(sources)), path.read_bytes())]


def runtime(sources: Path | None = None, *, verbose: bool = True) -> Path:
    """The emulator's own library, compiled unless the cache has it."""
    sources = sources or build.SOURCES
    compiler = _compiler()
    name = f"emulator-{_hash(_machine(compiler), *COMMON, *RUNTIME, *_contents(sources, f'{FOLDER}/*.cpp', f'{FOLDER}/*.h'))}.so"
    source = str(sources / FOLDER / "runtime.cpp")
    return _cached(name, "the emulator", lambda out: [[compiler, *COMMON, *RUNTIME, source, "-o", str(out)]], verbose)


def build_kernel(wanted: Specialisation, sources: Path | None = None, *, verbose: bool = True) -> Path:
    """Compile one specialisation for the emulator, unless the cache has it, and return the library's path.

    Raises:
        BuildError: there is no C++ compiler, or it failed (with its output).
    """
    return build_source(wanted.file, wanted.defines(), f"{wanted} for the emulator", sources, verbose=verbose)


def build_source(file: str, defines: list[str], description: str, sources: Path | None = None, *, verbose: bool = True) -> Path:
    """The same for any file of cuda/."""
    sources = sources or build.SOURCES
    compiler, linked = _compiler(), runtime(sources, verbose=verbose)
    headers = _contents(sources, "*.cuh", "*.h", f"{FOLDER}/*.h", f"{FOLDER}/include/*.h")
    flags = (*COMMON, *_kernel_flags(compiler), *defines)
    key = _hash(_machine(compiler), *flags, linked.name, (sources / file).read_bytes(), *headers)

    def commands(out: Path) -> list[list[str]]:
        compiled = str(out.with_suffix(".o"))
        include = [f"-I{sources / FOLDER / 'include'}", f"-I{sources}"]
        return [
            [compiler, *flags, *include, "-c", str(sources / file), "-o", compiled],
            [compiler, "-shared", compiled, str(linked), "-Wl,-rpath,$ORIGIN", "-o", str(out)],
        ]

    return _cached(f"{Path(file).stem}-emulated-{key}.so", description, commands, verbose)


def _compiler() -> str:
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("the emulator needs a C++ compiler: neither $CXX nor g++ nor clang++ was found on the PATH")
    return compiler


def _cached(name: str, description: str, commands, verbose: bool) -> Path:
    library = build.cache_folder() / name
    if library.exists():
        return library
    with build._lock(library.with_suffix(".lock")):
        if library.exists():  # another process built it while this one waited
            return library
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            temporary = Path(folder) / name
            for command in commands(temporary):
                result = subprocess.run(command, capture_output=True, text=True)
                if result.returncode:
                    raise BuildError(f"{command[0]} could not compile {description}\n{' '.join(command)}\n{result.stdout}{result.stderr}")
            temporary.replace(library)  # atomic: a reader sees the whole library or none
        if verbose:
            print(f"flash_attention: compiled {description} in {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
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
    # -a: each place's own line before those of the functions that are inlined there
    answer = subprocess.run([tool, "-a", "-i", "-e", str(library), *places], capture_output=True, text=True).stdout
    for place, part in zip(places, re.split(r"^0x[0-9a-f]+\n", answer, flags=re.MULTILINE)[1:], strict=True):
        output = part.split("\n")
        # The innermost frame of a kernel file: what stands in for CUDA's headers says nothing.
        frames = [Path(line.split(" ")[0]) for line in output if line and not line.startswith("??")]
        outside = [frame for frame in frames if frame.name.partition(":")[0].endswith((".cu", ".cuh"))]
        if outside:
            chain = [frame.name for frame in outside]
            found[place] = chain[0] + (f" (from {chain[-1]})" if len(chain) > 1 and chain[-1] != chain[0] else "")
    return found

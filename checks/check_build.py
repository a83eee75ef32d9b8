"""Kernels compile on a machine without a GPU: no spill, no warning; they load, agree with Python on the struct, and refuse politely.
Libraries are found, compiled, noted, refused and pruned as flash_attention/build says. (Where one cannot be built: check_fallback.py.)

python checks/check_build.py [--full]

One file because its two parts follow a library's life: it is compiled, and it is found again.
"""

import ctypes
import itertools
import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from harness import run_alone

from flash_attention import build
from flash_attention.backends import cuda, masks, rotary
from flash_attention.backends.launch import NO_INTERVAL, NO_KEYS, NO_MASK, NO_TENSOR, PARAMS, SETTINGS
from flash_attention.backends.rotary import ROTARY
from flash_attention.build import BuildError, Specialisation, node
from flash_attention.build.__main__ import ARCHS, main, specialisations, usual_set

needs_nvcc = pytest.mark.skipif(build.find_nvcc() is None, reason="no nvcc on this machine")


def at_once(function, arguments) -> list:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(function, arguments))


# ---- the kernels themselves


TEACHING = {file for rung in cuda.RUNGS.values() if rung.teaching for file in rung.files}
REGISTERS_TO_SPARE = {masks.PACK_MASK, ROTARY, "forward_1_simple.cu", *TEACHING}


def facts(kernel: Specialisation) -> set:
    """What a sample must cover of each file: every value of every constant, but not every architecture of a kernel with registers to
    spare."""
    constants = kernel._asdict()
    if kernel.file in REGISTERS_TO_SPARE:
        del constants["arch"]
    return {(kernel.file, name, value) for name, value in constants.items()}


# Kernels with the fewest registers to spare: each of these has spilled at some time.
SCARCE = (
    Specialisation("pack_mask.cu", "80"),
    Specialisation("forward_3_tensor_core.cu", "100", 64, "bfloat16", causal=True),
    Specialisation("forward_3_tensor_core.cu", "100", 64, "float16", causal=True, dropout=True),
    Specialisation("forward_3_tensor_core.cu", "100", 128, "bfloat16", causal=True, mask="bits"),
    Specialisation("forward_3_tensor_core.cu", "100", 128, "float16", causal=True, mask="bytes"),
    Specialisation("backward_3_tensor_core.cu", "100", 128, "bfloat16", causal=True, mask="bits", dropout=True),
    Specialisation("backward_3_tensor_core.cu", "100", 256, "bfloat16", causal=True, dropout=True),
    Specialisation("backward_3_tensor_core.cu", "120", 256, "float16", dropout=True),
    Specialisation("backward_1_simple.cu", "100", 256, "float32", causal=True, mask="bytes"),
    Specialisation("backward_1_simple.cu", "86", 64, "float16", causal=True, dropout=True),
    Specialisation("backward_1_simple.cu", "89", 64, "bfloat16", mask="bytes", dropout=True),
)


# Bytes that kernels for rare calls are known to spill. More is a fault, and so is an entry that spills nothing.
KNOWN_SPILLS = {
    Specialisation("backward_4_hopper.cu", "90a", 128, "float16", mask="key bits", interval=True): 4,
    Specialisation("backward_4_hopper.cu", "90a", 128, "bfloat16", mask="key bits", interval=True): 4,
    Specialisation("backward_5_float32_wide.cu", "90a", 512, "float32", causal=True, mask="key bits", dropout=True): 4,
    Specialisation("backward_5_float32_wide.cu", "90a", 256, "float32", mask="key bits", tf32=True): 20,  # in the rung it falls back on
    Specialisation("forward_5_split_keys.cu", "120", 128, "bfloat16", mask="bits", dropout=True): 32,
}


def beyond_what_is_known(kernel: Specialisation, found: list[str]) -> list[str]:
    """The complaints, but for a known spill."""
    if kernel not in KNOWN_SPILLS:
        return found
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", "; ".join(found))]
    known = KNOWN_SPILLS[kernel]
    return (
        [] if len(found) == len(spilled) == 1 and spilled[0] == known else [f"known to spill {known} bytes", *(found or ["spills nothing"])]
    )


def covering_sample() -> list[Specialisation]:
    """`SCARCE`, and nearly the fewest others that, with `LIBRARIES`, cover all `facts`: greedily the one that adds most."""
    everything = specialisations(list(ARCHS))
    random.Random(0).shuffle(everything)
    sample, missing = list(SCARCE), set().union(*map(facts, everything))
    missing.difference_update(*map(facts, (*SCARCE, *LIBRARIES)))  # check_libraries compiles the latter, and reads their complaints
    while missing:
        best = max(everything, key=lambda kernel: len(facts(kernel) & missing))
        sample.append(best)
        missing -= facts(best)
    return sample


INSPECTED = build.SOURCES.parent / "results" / "inspected.json"  # the sample's kernels that passed → their `made_from` at that time


def included(file: str) -> set[str]:
    """A source file and all that it includes."""
    names, todo = set(), [file]
    while todo:
        names.add(name := todo.pop())
        todo += set(re.findall(r'#include "([\w.]+)"', (build.SOURCES / name).read_text())) - names
    return names


def without_comments(source: str) -> str:
    return re.sub(r"\s*//[^\n]*", "", source).strip()


def made_from(kernel: Specialisation) -> str:
    """A hash of everything that the compiler's report on a kernel depends on: sources without comments, constants and compilers."""
    sources = (part for name in sorted(included(kernel.file)) for part in (name, without_comments((build.SOURCES / name).read_text())))
    return build._hash(*kernel.flags(), build.compilers(build.find_nvcc()), *sources, digits=16)


@needs_nvcc
def check_no_spill(full, keep):
    """No kernel spills registers (`KNOWN_SPILLS` aside), uses a stack, or has its matrix products serialised, and the compiler warns of
    nothing. Without --full, a sample that covers every architecture, less what results/inspected.json says of the same sources and the
    same compiler. With many cores: python -m flash_attention.build --check.
    """
    wanted = specialisations(list(ARCHS)) if full else covering_sample()
    assert {kernel.arch for kernel in wanted} == set(ARCHS)
    passed = {} if full else json.loads(INSPECTED.read_text())
    stale = [kernel for kernel in wanted if passed.get(str(kernel)) != made_from(kernel)]
    inspected = zip(stale, at_once(build.inspect, stale), strict=True)
    judged = ((kernel, beyond_what_is_known(kernel, found)) for kernel, found in inspected)
    complaints = [f"{kernel}: {'; '.join(found)}" for kernel, found in judged if found]
    print(f"{len(stale)} kernels inspected")
    assert not complaints, "\n".join(complaints)
    if keep:
        INSPECTED.write_text(json.dumps({str(kernel): made_from(kernel) for kernel in wanted}, indent=1) + "\n")


def check_inspections_are_of_the_present_sources(tmp_path, monkeypatch):
    """A kernel is inspected again once anything that it includes has changed."""
    kernel = Specialisation("forward_4_hopper.cu", "90a", 64, "bfloat16")
    monkeypatch.setattr(build, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(build, "_version", lambda compiler: "13.0")
    monkeypatch.setattr(build, "SOURCES", shutil.copytree(build.SOURCES, tmp_path / "cuda"))
    before = made_from(kernel)
    assert {"attention.h", "ptx_hopper.cuh", "visible.cuh"} < included(kernel.file)
    assert made_from(kernel._replace(causal=True)) != before
    (tmp_path / "cuda" / "forward_1_simple.cu").write_text("another kernel")
    assert made_from(kernel) == before
    for name in included(kernel.file):
        with (tmp_path / "cuda" / name).open("a") as file:
            file.write("\n// a remark\n")
            file.flush()
            assert made_from(kernel) == before
            file.write("#define ANOTHER\n")
        assert made_from(kernel) != before
        before = made_from(kernel)
    monkeypatch.setattr(build, "_version", lambda compiler: "13.1")
    assert made_from(kernel) != before


LIBRARIES = (
    Specialisation("forward_1_simple.cu", "75", 32, "float32"),
    Specialisation("backward_1_simple.cu", "89", 32, "float32", mask="bytes"),
    Specialisation("forward_2_mma.cu", "80", 32, "float16"),
    Specialisation("backward_2_mma.cu", "80", 32, "bfloat16", causal=True),
    Specialisation("forward_3_tensor_core.cu", "86", 64, "bfloat16", mask="bits"),
    Specialisation("backward_3_tensor_core.cu", "120", 64, "float16", dropout=True),
    Specialisation("forward_4_hopper.cu", "90a", 64, "bfloat16", causal=True, mask="bits"),
    Specialisation("forward_4_hopper_tall.cu", "90a", 96, "bfloat16", causal=True),
    Specialisation("backward_4_hopper.cu", "90a", 64, "bfloat16", mask="key bits"),
    Specialisation("backward_4_hopper_wide.cu", "90a", 256, "float16", mask="key bits"),
    Specialisation("backward_4_hopper_256.cu", "90a", 256, "float16"),
    Specialisation("backward_4_hopper_192.cu", "90a", 192, "bfloat16", v_head_dim=128),
    Specialisation("forward_5_wide.cu", "90a", 512, "bfloat16", causal=True),
    Specialisation("backward_5_wide.cu", "90a", 384, "float16", mask="key bits"),
    Specialisation("forward_5_float32.cu", "90a", 64, "float32", mask="bits"),
    Specialisation("forward_5_float32_wide.cu", "90a", 256, "float32", causal=True),
    Specialisation("backward_5_float32_wide.cu", "90a", 256, "float32"),
    Specialisation("backward_5_float32.cu", "90a", 128, "float32", causal=True),
    Specialisation("forward_5_float32_wide.cu", "90a", 512, "float32", mask="bits", tf32=True),
    Specialisation("backward_5_float32.cu", "90a", 64, "float32", causal=True, tf32=True),
    Specialisation("forward_3_float32.cu", "80", 64, "float32", mask="bits"),
    Specialisation("backward_3_float32.cu", "86", 128, "float32", causal=True),
    Specialisation("forward_5_split_keys.cu", "80", 64, "bfloat16", mask="bits"),
    *(Specialisation(f"forward_{step}.cu", "80", 64, "float16") for step in ("2b_swizzle", "2c_cp_async")),
    *(Specialisation(f"forward_{step}.cu", "90a", 64, "float16") for step in ("3b_wgmma", "3c_tensor_map", "3d_producer", "3e_ping_pong")),
)


def params(B=1, H=1, Nq=1, Nk=1) -> bytes:
    """The parameters of a call whose tensors all have address 0 and strides 0."""
    settings = SETTINGS.pack(B, H, H, Nq, Nk, 32, 32, 1.0, 0, 1.0, -1e30)
    return PARAMS.pack(*8 * NO_TENSOR, NO_MASK, 0, 0, 0, 0, settings, False, 0, 132, 0, 0, NO_INTERVAL) + NO_KEYS


@needs_nvcc
def check_libraries():
    """A library of every file loads, agrees with Python on its struct, and refuses a grid of more than 2³¹ blocks, and rows and columns
    that an int cannot count, before it does anything else. Without a GPU, a launch reports an error."""
    assert {kernel.file for kernel in LIBRARIES} == {path.name for path in build.SOURCES.glob("*ward_*.cu")}
    many = {"batches": {"B": 2**30, "H": 4}, "rows": {"Nq": 2**31 - 1}, "columns": {"Nk": 2**31 - 1}}
    for kernel, library in zip(LIBRARIES, at_once(lambda kernel: build.load(kernel, PARAMS.size), LIBRARIES), strict=True):
        complaints = build.noted_complaints(build.build(kernel))
        assert not complaints, f"{kernel}: {complaints}"
        library.attention.argtypes = [ctypes.c_char_p]
        for what, sizes in many.items():
            error = library.error_name(library.attention(params(**sizes)))
            assert error == b"invalid configuration argument", f"{kernel}, too many {what}: {error.decode()}"
        if not torch.cuda.is_available():
            error = library.attention(params())
            assert error and library.error_name(error), f"{kernel}: a launch without a GPU reported no error"
    library = build.load(Specialisation(masks.PACK_MASK, "80"), masks.PACK_PARAMS.size)
    for by_keys, sizes in itertools.product((0, 1), ((2**16, 2**15, 1, 1), (1, 1, 1, 2**31 - 1))):
        error = library.error_name(library.pack_mask(masks.PACK_PARAMS.pack(0, 0, 0, 0, 0, 0, *sizes, by_keys, 0, 0)))
        assert error == b"invalid configuration argument", f"{masks.PACK_MASK} by_keys={by_keys} {sizes}: {error.decode()}"
    library = build.load(Specialisation(ROTARY, "80"), rotary.PARAMS.size)
    library.rotary.argtypes = [ctypes.c_char_p]
    for interleaved, sizes in itertools.product((0, 1), ((2**16, 1, 1), (1, 2**18 - 1, 1), (1, 1, 2**29))):
        error = library.error_name(library.rotary(rotary.PARAMS.pack(*[0] * 11, *sizes, 64, 64, 2, interleaved, 0, 0, 0)))
        assert error == b"invalid configuration argument", f"{ROTARY} interleaved={interleaved} {sizes}: {error.decode()}"


# ---- building. Most of it with a stand-in for nvcc, which notes each run and writes what it is told to.

KERNEL = Specialisation("kernel.cu", "80")
STAND_IN = """#!/bin/sh
if [ "$1" = --version ]; then echo "stand-in $VERSION"; exit; fi
echo "$*" >> "$RUNS"
echo "$SAYS"
while [ $# -gt 1 ]; do [ "$1" = -o ] && echo library > "$2"; shift; done
exit ${RETURNS:-0}
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Sources, cache, and a stand-in for nvcc in folders with a space in their names. `runs()`: the stand-in's command lines so far."""
    folder = tmp_path / "a folder"
    (folder / "sources").mkdir(parents=True)
    (folder / "sources" / "kernel.cu").write_text("// version 1\n")
    (folder / "sources" / "attention.h").touch()
    nvcc = folder / "nvcc"
    nvcc.write_text(STAND_IN)
    nvcc.chmod(0o755)
    for name in (*build.ENVIRONMENT, "FLASH_ATTENTION_KERNELS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("RUNS", folder / "runs"), ("VERSION", "1"), ("SAYS", "ok"), ("FLASH_ATTENTION_CACHE", folder / "cache")):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(build, "SOURCES", folder / "sources")
    monkeypatch.setattr(build, "find_nvcc", lambda: str(nvcc))
    monkeypatch.setattr(build, "failures", {})
    forget(build._version, build._hash_of_sources)
    yield SimpleNamespace(folder=folder, cache=folder / "cache", runs=lambda: (folder / "runs").read_text().splitlines())
    forget(build._version, build._hash_of_sources)


def forget(*functions) -> None:
    for function in functions:
        function.cache_clear()


def check_built_once(place, caplog):
    """Compiled once, into a folder of the user's own, after a line that says so; programs can silence it."""
    first = build.build(KERNEL)
    assert first == build.build(KERNEL)
    assert first.parent == place.cache
    assert first.stat().st_mode & 0o777 == 0o755
    assert place.cache.stat().st_mode & 0o777 == 0o700
    assert len(place.runs()) == 1
    assert str(build.SOURCES / "kernel.cu") in place.runs()[0]
    assert "-DARCH=80" in place.runs()[0].split()
    assert [record.getMessage() for record in caplog.records] == ["flash_attention: compiling kernel.cu sm_80"]
    assert caplog.records[0].created < (place.folder / "runs").stat().st_mtime + 0.01, "the line comes after the compiler has run"
    assert sorted(path.suffix for path in place.cache.iterdir()) == [".json", ".so"], "a lock or a temporary folder is left"


def check_line_by_default(place):
    """A program that configures no logging shows the line on stderr; one that raises the level does not."""
    program = (
        "import logging, sys; from pathlib import Path; from flash_attention import build\n"
        "build.SOURCES, build.find_nvcc = Path(sys.argv[1]), lambda: sys.argv[2]\n"
        "build.build(build.Specialisation('kernel.cu', '80'))\n"
        "logging.getLogger('flash_attention').setLevel(logging.ERROR)\n"
        "build.build(build.Specialisation('kernel.cu', '86'))"
    )
    result = subprocess.run([sys.executable, "-c", program, str(build.SOURCES), build.find_nvcc()], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "flash_attention: compiling kernel.cu sm_80\n")
    assert len(place.runs()) == 2


PTXAS = """ptxas info    : Function properties for _Z14forward_kernel15AttentionParams
    {} bytes stack frame, {} bytes spill stores, {} bytes spill loads
ptxas info    : Used 255 registers"""


def check_complaints_are_logged(place, monkeypatch, caplog):
    """A library that spills is used; a line says so, and so does a file beside it."""
    monkeypatch.setenv("SAYS", PTXAS.format(16, 12, 20) + "\nptxas info : (C7510) Potential Performance Loss: wgmma serialized\n")
    library = build.build(KERNEL)
    spill, serialised = build.noted_complaints(library)
    assert spill == "forward_kernel: 16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads"
    assert "C7510" in serialised
    assert all(any(complaint in record.getMessage() for record in caplog.records) for complaint in (spill, serialised))
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    assert build.inspect(KERNEL) == [spill, serialised], "a check would not see it"
    assert not build.complaints(PTXAS.format(0, 0, 0))
    assert build.complaints(PTXAS.format(8, 0, 0)), "a stack without spills is one too"


@needs_nvcc
def check_spill_is_used(tmp_path, monkeypatch, caplog):
    """The real thing: a kernel that spills registers is compiled, noted and complained of."""
    (tmp_path / "spills.cu").write_text(
        'extern "C" __global__ void __launch_bounds__(1024, 2) spills(float* x) {\n'
        "    float r[64];\n"
        "    for (int i = 0; i < 64; ++i) r[i] = x[i * 1024 + threadIdx.x];\n"
        "    for (int k = 0; k < 99; ++k)\n"
        "        for (int i = 0; i < 64; ++i) r[i] = r[i] * r[(i + 7) % 64] + x[k];\n"
        "    for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = r[i];\n"
        "}\n".replace("    for (int i", "#pragma unroll\n    for (int i").replace(
            "        for (int i", "#pragma unroll\n        for (int i"
        )
    )
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    monkeypatch.setenv("FLASH_ATTENTION_CACHE", str(tmp_path / "a cache"))
    kernel = Specialisation("spills.cu", "80")
    library = build.build(kernel)
    ctypes.CDLL(str(library))
    assert "spills:" in build.noted_complaints(library)[0]
    assert "slower than it should be: spills:" in caplog.text
    assert build.inspect(kernel) == build.noted_complaints(library)


@needs_nvcc
def check_compiler_output_is_shown(tmp_path, monkeypatch):
    """A kernel that does not compile: the error holds the compiler's own words. Nor does a check take one that the compiler warns of."""
    (tmp_path / "wrong.cu").write_text("int f() { return undefined_name; }\n")
    (tmp_path / "unused.cu").write_text("__global__ void f() { int unused; }\n")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    monkeypatch.setenv("FLASH_ATTENTION_CACHE", str(tmp_path / "cache"))
    with pytest.raises(BuildError, match="undefined_name"):
        build.build(Specialisation("wrong.cu", "80"))
    assert not list((tmp_path / "cache").iterdir())
    with pytest.raises(BuildError, match="unused"):
        build.inspect(Specialisation("unused.cu", "80"))


def check_key(place, monkeypatch):
    """The name changes with the source, a constant, the compiler, the host compiler and nvcc's environment."""
    host = place.folder / "my g++"
    host.write_text("#!/bin/sh\necho $HOST_VERSION\n")
    host.chmod(0o755)
    names = [build.build(KERNEL).name]
    for name, value in (
        ("NVCC_APPEND_FLAGS", "-lineinfo"),
        ("NVCC_PREPEND_FLAGS", "-g"),
        ("NVCC_CCBIN", str(host)),
        ("HOST_VERSION", "9"),
        ("VERSION", "2"),
    ):
        monkeypatch.setenv(name, value)
        forget(build._version)
        names.append(build.build(KERNEL).name)
    names.append(build.build(KERNEL._replace(arch="86")).name)
    (build.SOURCES / "shared.cuh").write_text("// a header\n")
    forget(build._hash_of_sources)
    names.append(build.build(KERNEL).name)
    assert len(set(names)) == len(names) == len(place.runs())
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-ccbin=clang++ -g")
    assert build.host_compiler() == "clang++", "a flag comes before NVCC_CCBIN"


def check_without_nvcc(place, monkeypatch):
    """A machine without nvcc uses prebuilt kernels and its cache, whatever compiled them; the error says where nvcc was looked for."""
    prebuilt = place.folder / "prebuilt"
    prebuilt.mkdir(mode=0o755)
    theirs, other = build.build(KERNEL, into=prebuilt), build.build(KERNEL._replace(arch="86"))
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    assert build.build(KERNEL._replace(arch="86")) == other, "the cache is not used"
    with pytest.raises(BuildError, match=r"CUDA_HOME.*FLASH_ATTENTION_KERNELS \(not set\).*flash_attention\[cuda\]"):
        build.build(KERNEL)
    monkeypatch.setenv("FLASH_ATTENTION_KERNELS", str(prebuilt))
    assert build.build(KERNEL) == theirs
    (build.SOURCES / "kernel.cu").write_text("// version 2\n")
    forget(build._hash_of_sources)
    with pytest.raises(BuildError, match="holds the kernel"):  # those of other sources are not
        build.build(KERNEL)
    monkeypatch.setenv("FLASH_ATTENTION_KERNELS", str(place.folder / "nowhere"))
    with pytest.raises(BuildError, match=r"must name a folder.*nowhere"):
        build.build(KERNEL)


def check_prebuilt_before_all(place, monkeypatch):
    """With nvcc, too, a prebuilt kernel is used; a missing one is compiled into the cache, not into the folder of prebuilt ones."""
    prebuilt = place.folder / "prebuilt"
    prebuilt.mkdir(mode=0o755)
    theirs = build.build(KERNEL, into=prebuilt)
    monkeypatch.setenv("VERSION", "2")
    forget(build._version)
    monkeypatch.setenv("FLASH_ATTENTION_KERNELS", str(prebuilt))
    assert build.build(KERNEL) == theirs
    assert build.build(KERNEL._replace(arch="86")).parent == place.cache


@pytest.mark.parametrize("mode", (0o770, 0o777, 0o707), ids=oct)
def check_folders_of_others(place, monkeypatch, mode):
    """Files in a cache or a prebuilt folder are loaded and run: a folder or a library that group or others may write to is refused."""
    prebuilt = place.folder / "prebuilt"
    prebuilt.mkdir(mode=0o755)
    library = build.build(KERNEL, into=prebuilt)
    monkeypatch.setenv("FLASH_ATTENTION_KERNELS", str(prebuilt))
    for path in (library, prebuilt):
        path.chmod(mode)
        with pytest.raises(BuildError, match=f"{path.name}.*may write to it.*chmod go-w"):
            build.build(KERNEL)
    monkeypatch.delenv("FLASH_ATTENTION_KERNELS")
    place.cache.mkdir(exist_ok=True)
    place.cache.chmod(mode)
    with pytest.raises(BuildError, match=r"cache.*may write to it.*chmod go-w"):
        build.build(KERNEL)
    monkeypatch.setenv("FLASH_ATTENTION_CACHE", str(library / "beneath a file"))
    with pytest.raises(BuildError, match=r"there can be no kernel cache: .*beneath.*FLASH_ATTENTION_CACHE"):
        build.build(KERNEL)


def check_prune(place, monkeypatch):
    """Pruning deletes libraries of other sources or another compiler, and old remains of interrupted builds; nothing that is in use."""
    old_source = build.build(KERNEL)
    (build.SOURCES / "kernel.cu").write_text("// version 2\n")
    forget(build._hash_of_sources)
    old_compiler = build.build(KERNEL)
    monkeypatch.setenv("VERSION", "2")
    forget(build._version)
    kept, before_keys = build.build(KERNEL), place.cache / "forward_1_simple-0123456789abcdef01234567.so"
    before_keys.touch()
    remains = [place.cache / "building-1", place.cache / "x.lock"]
    new = [place.cache / "building-2", place.cache / "y.lock", place.cache / "notes.txt"]
    for path in (*remains, *new):
        path.mkdir() if "building" in path.name else path.touch()
    for path in remains:
        os.utime(path, (time.time() - 2 * 24 * 3600,) * 2)
    deleted = build.prune()
    gone = {old_source, old_source.with_suffix(".json"), old_compiler, old_compiler.with_suffix(".json"), before_keys, *remains}
    assert set(deleted) == gone
    assert set(place.cache.iterdir()) == {kept, kept.with_suffix(".json"), *new}
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    assert not build.prune(), "without nvcc, libraries of the present sources are kept, whatever compiled them"


def check_failures_are_remembered(place, monkeypatch):
    """A kernel that cannot be built is tried only once per process."""
    monkeypatch.setenv("RETURNS", "1")
    for _ in range(2):
        with pytest.raises(BuildError, match=r"nvcc could not compile kernel\.cu sm_80"):
            build.load(KERNEL, 8)
    assert len(place.runs()) == 1
    monkeypatch.setenv("RETURNS", "0")
    for _ in range(2):
        with pytest.raises(BuildError, match="could not be loaded"):  # the stand-in's output is not a library
            build.load(KERNEL._replace(arch="86"), 8)
    assert len(place.runs()) == 2
    shutil.rmtree(place.cache)
    (place.folder / "nvcc").unlink()
    with pytest.raises(BuildError, match=r"sm_89.*nvcc"):
        build.load(KERNEL._replace(arch="89"), 8)


@pytest.mark.parametrize(
    "arguments",
    ["--arch x", "--arch 80 --jobs 0", "--arch 80 --head_dim 33", "--prune --check", "--arch 80 --json x", "--arch 80 --out x --check"],
)
def check_wrong_arguments(arguments, monkeypatch, capsys):
    """On the command line, errors are argparse's, with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["build", *arguments.split()])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err


def check_command(place, monkeypatch, capsys):
    """--out fills a folder that a machine without nvcc can use; --check says which kernels spill, and keeps what its file says of other
    architectures."""
    for name in ("forward_1_simple.cu", "backward_1_simple.cu", masks.PACK_MASK, ROTARY):
        (build.SOURCES / name).write_text("// a kernel\n")

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["build", "--jobs", "2", "--arch", "75", "--head_dim", "32", *arguments])
        return main()

    out, found = place.folder / "out", place.folder / "found.json"
    monkeypatch.setattr(build, "loaded", lambda library: library)
    beside: list = []  # where node.cpp was compiled to
    monkeypatch.setattr(node, "compiled", beside.append)
    level = build.log.level
    assert run("--out", str(out)) == 0 and beside == [out]
    assert build.log.level == level
    assert len(list(out.glob("*.so"))) == len(set(usual_set(["75"], [32]))) == 2 + 2 * 3 * 4
    assert not place.cache.exists()
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    monkeypatch.setenv("FLASH_ATTENTION_KERNELS", str(out))
    for kernel in usual_set(["75"], [32]):
        assert build.build(kernel).parent == out
    monkeypatch.setattr(build, "find_nvcc", lambda: str(place.folder / "nvcc"))
    out.chmod(0o775)
    with pytest.raises(SystemExit):
        run("--out", str(out))
    assert "may write to it" in capsys.readouterr().err

    found.write_text('{"80": {"kernels": 1}}')
    assert run("--check", "--json", str(found)) == 0
    monkeypatch.setenv("SAYS", PTXAS.format(8, 4, 4))
    capsys.readouterr()
    assert run("--check", "--json", str(found)) == 1
    assert "forward_1_simple.cu sm_75 D 32 float16 causal dropout: forward_kernel: 8 bytes stack frame" in capsys.readouterr().out
    results = json.loads(found.read_text())
    assert results["80"] == {"kernels": 1}
    assert len(results["75"]["complaints"]) == results["75"]["kernels"] == len(specialisations(["75"], [32])) == 2 + 2 * 3 * 12
    monkeypatch.setenv("RETURNS", "1")
    assert run("--check") == 1
    assert "could not compile" in capsys.readouterr().out


if __name__ == "__main__":
    run_alone(__file__)

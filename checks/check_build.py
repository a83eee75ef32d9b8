"""Kernels compile on a machine without a GPU: no spill, no warning; they load, agree with Python on the struct, and refuse politely.

python checks/check_build.py [--full]
"""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from harness import run_alone

from flash_attention import build
from flash_attention.backends import cuda
from flash_attention.build.__main__ import usual_set

needs_nvcc = pytest.mark.skipif(build.find_nvcc() is None, reason="no nvcc on this machine")
FEW = {"simple": (64,), "tensor_core": (64, 128)}


@needs_nvcc
@pytest.mark.parametrize("arch", ("80", "90a"))
def check_kernels_compile(arch, full):
    """The usual set (a part of it without --full): `build.build` fails on a spill and on any warning."""
    wanted = usual_set([arch])
    if not full:
        wanted = [s for s in wanted if s.dtype in ("float32", "bfloat16") and (s.dtype == "float32") == ("simple" in s.file)]
        wanted = [s for s in wanted if s.head_dim in (FEW["simple"] if "simple" in s.file else FEW["tensor_core"])]
        wanted = [s for s in wanted if not s.causal or s.mask]  # dense; a mask; causal with mask and, where served, dropout
    assert len(wanted) >= 8
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        libraries = list(pool.map(lambda s: build.load(build.build(s.file, arch, s.defines(), str(s), verbose=False)), wanted))
    for specialisation, library in zip(wanted, libraries, strict=True):
        assert library.params_size() == cuda.PARAMS.size, f"{specialisation}: attention.h and Python disagree on the struct"
        if not torch.cuda.is_available():
            library.attention.argtypes = [ctypes.c_char_p]
            error = library.attention(bytes(cuda.PARAMS.size - 72) + b"\1\0\0\0" * 18)
            assert error and library.error_name(error), f"{specialisation}: a launch without a GPU reported no error"


@needs_nvcc
def check_spill_fails(tmp_path, monkeypatch):
    """A kernel that spills registers is not built."""
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
    monkeypatch.setenv("FLASH_ATTENTION_CACHE", str(tmp_path / "cache"))
    with pytest.raises(build.BuildError, match="spill"):
        build.build("spills.cu", "80", [], "a kernel that spills")


@needs_nvcc
def check_compiler_output_is_shown(tmp_path, monkeypatch):
    """A kernel that does not compile: the error holds the compiler's own words."""
    (tmp_path / "wrong.cu").write_text("int f() { return undefined_name; }\n")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    monkeypatch.setenv("FLASH_ATTENTION_CACHE", str(tmp_path / "cache"))
    with pytest.raises(build.BuildError, match="undefined_name"):
        build.build("wrong.cu", "80", [], "a wrong kernel")
    assert not list((tmp_path / "cache").glob("*.so"))


def check_no_nvcc(monkeypatch):
    """Without nvcc the error says where it was looked for and how to get one."""
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    with pytest.raises(build.BuildError, match=r"CUDA_HOME.*flash_attention\[cuda\]"):
        build.build("forward_1_simple.cu", "80", [], "a kernel")


if __name__ == "__main__":
    run_alone(__file__)

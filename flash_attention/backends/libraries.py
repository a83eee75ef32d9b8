"""Compiled libraries of kernels, one for each device and kind of call, with their C functions declared to ctypes."""

import ctypes
import functools
from typing import TYPE_CHECKING

import torch

from flash_attention import build
from flash_attention.backends.launch import PARAMS, SCORING

if TYPE_CHECKING:
    from flash_attention.backends.rung import Rung


@functools.cache
def library(
    rung: "Rung",
    which: int,
    device: int,
    dtype: str,
    sizes: tuple[int, int],
    visible: str,
    mask: str | None,
    dropout: bool,
    float8: bool,
    score: tuple[str, ...],
    tall: bool,
    tf32: bool,
) -> ctypes.CDLL:
    """The library of the rung's forward (0) or backward (1) for one kind of call, compiled if necessary."""
    arch = build.arch_of(torch.cuda.get_device_capability(device))
    wanted = rung.specialisation(which, arch, dtype, sizes, visible, mask, dropout, float8, score, tall, tf32)
    return declared(build.load(wanted, params_size(score)))


def helper_library(file: str, params_size: int, device: int) -> ctypes.CDLL:
    """The function of a kernel that is not attention, compiled if necessary: pack_mask.cu and rotary.cu have one, named like the file."""
    arch = build.arch_of(torch.cuda.get_device_capability(device))
    return helper_declared(build.load(build.Specialisation(file, arch), params_size), file)


def params_size(score: tuple[str, ...]) -> int:
    """The size of the struct that a kernel takes."""
    return PARAMS.size + (SCORING.size if score else 0)


def declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declares the functions of cuda/attention.h to ctypes; returns the library."""
    library.attention.argtypes = library.workspace_floats.argtypes = [ctypes.c_char_p]
    library.workspace_floats.restype = ctypes.c_int64
    return library


def helper_declared(library: ctypes.CDLL, file: str) -> ctypes.CDLL:
    """Declares the function of such a kernel to ctypes; returns the library."""
    getattr(library, file.removesuffix(".cu")).argtypes = [ctypes.c_char_p]
    return library


@functools.cache
def why_no_kernels(rung: "Rung", device: int) -> str | None:
    """Why the rung's kernels cannot run on this device, or None."""
    if reason := build.why_not_here():
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    if not rung.runs_on(major * 10 + minor):
        needed = f"compute capability {rung.min_arch // 10}.{rung.min_arch % 10}{' and no other' if rung.only_min_arch else ''}"
        return f"it needs {needed}, {torch.cuda.get_device_name(device)} has {major}.{minor}"
    return None


@functools.cache
def sm_count(device: int) -> int:
    """The number of its multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count

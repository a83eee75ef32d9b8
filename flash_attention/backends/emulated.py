"""The CUDA kernels on a CPU: each rung of `cuda/`, compiled by the machine's C++ compiler and run by the emulator in `cuda/emulator/`.

For learning, for checking, and for work on kernels without a GPU. It is thousands of times slower than a GPU and so used only by name,
as in `flash_attention(q, k, v, backend="emulated:hopper")`. Mistakes that a GPU may not notice raise an EmulatorError here.
"""

import contextlib
import ctypes
import dataclasses
import functools
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple

from torch import Tensor

from flash_attention.backends import cuda, libraries, masks, rotary
from flash_attention.backends.emulated_trace import Trace
from flash_attention.backends.launch import INTERVAL, KEYS, MASK, SETTINGS, STRIDES, Addresses, Launch, fields, scoring
from flash_attention.build import Specialisation, emulated
from flash_attention.call import Call, Form

SM_COUNT = 2  # multiprocessors of the emulated device: few, so that a persistent block gets several work items


class EmulatorError(RuntimeError):
    """A kernel broke a rule of CUDA, or touched memory that is not the call's. The message says which thread, what, and where."""


@dataclass
class Options:
    """How this process emulates kernels: `flash_attention.backends.emulated.options.seed = 3`."""

    seed: int = int(os.environ.get("FLASH_ATTENTION_EMULATOR_SEED", "0"))  # for the random order of threads, copies and products
    resident: int = 2  # blocks that are resident at a time and take turns; 1 to 8
    sources: Path | None = None  # a folder that replaces this package's cuda/
    counts: list["Counts"] | None = None  # collects each launch's counts, if set (`counting`)
    traces: list[Trace] | None = None  # and its trace (`tracing`)


options = Options()


class Place(NamedTuple):
    """Accesses to shared memory at one place of a kernel, counted as instructions of whole warps."""

    instructions: int
    cycles: int  # of shared memory that they take
    least: int  # without any bank conflict


@dataclass
class Counts:
    """What one call of a launcher did: forward or backward, all its kernels."""

    file: str
    total: dict[str, int] = field(default_factory=dict)
    shared: dict[str, Place] = field(default_factory=dict)  # place → accesses
    waits: dict[str, int] = field(default_factory=dict)  # place → how often a thread came there to wait

    @classmethod
    def read(cls, library: Path, report: str) -> "Counts":
        counts = cls(library.stem.partition("-")[0] + ".cu")
        for line in emulated.with_lines(report, library).splitlines():
            kind, name, *values = line.split("\t")
            numbers = [int(value) for value in values]
            if kind == "total":
                counts.total[name] = numbers[0]
            elif kind == "waits":
                counts.waits[name] = counts.waits.get(name, 0) + numbers[0]
            else:  # an unrolled loop is several places on one line
                before = counts.shared.get(name, (0, 0, 0))
                counts.shared[name] = Place(*(a + b for a, b in zip(before, numbers, strict=True)))
        return counts


@contextlib.contextmanager
def counting() -> Iterator[list[Counts]]:
    """Counts what the launches inside do.

    >>> with counting() as counts:
    ...     O = flash_attention(q, k, v, backend="emulated:hopper")
    >>> counts[0].total["FLOP by wgmma"]
    """
    options.counts = []
    try:
        yield options.counts
    finally:
        options.counts = None


@contextlib.contextmanager
def tracing() -> Iterator[list[Trace]]:
    """Traces the launches inside: a timeline of each warp, by a cost model of one Hopper multiprocessor that runs the whole grid.

    `options.resident` blocks at a time share it, or as many as its shared memory and threads allow. The trace does not depend on
    `options.seed`.

    >>> with tracing() as traces:
    ...     O = flash_attention(q, k, v, backend="emulated:hopper")
    >>> traces[0].cycles, traces[0].events[0]
    """
    options.traces = []
    try:
        yield options.traces
    finally:
        options.traces = None


class Memory(NamedTuple):
    """Memory that a launch may access. Unless `written`, it must be written before it is read. If two overlap, the first one counts."""

    name: str
    address: int
    bytes: int
    writable: bool = False
    written: bool = True


class EmulatedLaunch(Launch):
    """A launch that tells the emulator which memory belongs to the call."""

    mask_form: str | None = None
    key_bytes: int = 0  # of an element of k and v

    def __call__(self, q: Tensor, tensors, others: Addresses) -> None:
        backward = len(tensors) > 4
        memories = self._tensors(tensors, q.element_size(), others.keys) + self._others(others, backward)
        if self.mask_form:
            memories.append(self._mask(others.mask))
        memories += self._keys(others.keys)
        if self.scoring is not None:
            memories += self._scoring(others)
        run(self.library, self.library.attention, self._params(tensors, others), memories)

    def _stream(self) -> int:
        return 0

    def _tensors(self, addresses, element_size: int, keys: bytes) -> list[Memory]:
        B, H, Hkv, Nq, Nk, D, Dv, *_ = SETTINGS.unpack(self.settings)
        outputs = ("o",) if len(addresses) == 4 else ("dq", "dk", "dv")
        shapes = {"q": (H, Nq, D), "k": (Hkv, Nk, D), "v": (Hkv, Nk, Dv), "o": (H, Nq, Dv), "d_o": (H, Nq, Dv)}
        shapes |= {"dq": shapes["q"], "dk": shapes["k"], "dv": shapes["v"]}
        *_, page_size, pages, _, _ = KEYS.unpack(keys)
        if pages:
            shapes |= {"k": (Hkv, page_size, D), "v": (Hkv, page_size, Dv)}
        memories = []
        for n, (address, (name, shape)) in enumerate(zip(addresses, shapes.items(), strict=False)):
            is_key = name in ("k", "v")
            strides = STRIDES.unpack(self.tensors[2 * n + 1])  # type: ignore[arg-type]  # of the fields, every second one
            elements = extent((pages if pages and is_key else B, *shape), (*strides, 1))
            size = elements * (self.key_bytes if is_key else element_size)
            memories.append(Memory(name, address, size, name in outputs, name not in outputs))
        return memories

    def _others(self, others: Addresses, backward: bool) -> list[Memory]:
        B, H, _, Nq, *_ = SETTINGS.unpack(self.settings)
        workspace = 4 * self.workspace_floats(others.spans != 0) if others.workspace else 0
        spans = 4 * extent((B, H, Nq, 2), INTERVAL.unpack(self.interval)[:4]) if others.spans else 0
        return [
            Memory("lse", others.lse, 4 * B * H * Nq if others.lse else 0, not backward, backward),
            Memory("d_lse", others.d_lse, 4 * B * H * Nq if others.d_lse else 0),
            Memory("the workspace", others.workspace, workspace, True, False),
            Memory("the seed", others.seed, 8 if others.seed else 0),
            Memory("the spans", others.spans, spans),
        ]

    def _keys(self, keys: bytes) -> list[Memory]:
        B, _, Hkv, _, Nk, *_ = SETTINGS.unpack(self.settings)
        lengths, starts, block_table, stride, page_size, pages, k_scale, v_scale = KEYS.unpack(keys)
        columns = -(-Nk // page_size) if pages else 0
        return [
            Memory("the lengths", lengths, 4 * B if lengths else 0),
            Memory("the starts", starts, 4 * B if starts else 0),
            Memory("the keys' scales", k_scale, 4 * Hkv if k_scale else 0),
            Memory("the values' scales", v_scale, 4 * Hkv if v_scale else 0),
            Memory("the block table", block_table, 4 * extent((B, columns), (stride, 1)) if pages else 0),
        ]

    def _scoring(self, others: Addresses) -> list[Memory]:
        B, H, _, Nq, Nk, *_ = SETTINGS.unpack(self.settings)
        own, whole = self.scoring.bias_shape, (B, H, Nq, Nk)
        element_size = 4 if self.scoring.bias_type == 0 else 2
        shape = tuple(1 if n == 1 else most for n, most in zip(own, whole, strict=True))
        bias = extent(shape, others.bias_stride or self.scoring.bias_stride) * element_size if others.bias else 0
        return [
            Memory("the bias", others.bias, bias),
            Memory("the slopes", others.alibi, 4 * extent((B, H), self.scoring.alibi_stride) if others.alibi else 0),
            Memory("d_bias", others.d_bias, math.prod(own) * element_size if others.d_bias else 0, True, False),
        ]

    def _mask(self, mask: bytes) -> Memory:
        B, H, _, Nq, Nk, *_ = SETTINGS.unpack(self.settings)
        address, *strides = MASK.unpack(mask)
        if self.mask_form == "bytes":
            return Memory("the mask", address, extent((B, H, Nq, Nk), strides))
        b, h, i, j = strides
        rows, columns, stride = (Nq, Nk, i) if self.mask_form == "bits" else (Nk, Nq if i else 128, j)
        return Memory("the mask's bits", address, 4 * extent((B, H, rows, (columns + 127) // 128 * 4), (b, h, stride, 1)))


def extent(shape, strides) -> int:
    """Elements from a tensor's first to its last."""
    return sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1 if all(shape) else 0


def run(library: ctypes.CDLL, function, params: bytes, memories: list[Memory], *, poison: bool = True) -> None:
    """Calls a launcher of the library, whose kernels may access these memories; with `poison`, unwritten memory is filled with NaN.

    Raises:
        EmulatorError: what the emulator found; places in the kernel are given as file:line.
    """
    library.emulator_begin(options.seed, options.resident)
    for memory in memories:
        if memory.bytes:
            if poison and not memory.written:
                ctypes.memset(memory.address, 0xFF, memory.bytes)
            library.emulator_memory(memory.address, memory.bytes, memory.writable, memory.written, memory.name.encode())
    library.emulator_count(options.counts is not None)
    library.emulator_start_trace(options.traces is not None)
    error = function(params)
    if options.counts is not None:
        options.counts.append(Counts.read(Path(library._name), library.emulator_counters().decode()))
    if options.traces is not None:
        options.traces.append(Trace.read(Path(library._name), library.emulator_trace().decode()))
        library.emulator_start_trace(False)
    message = library.emulator_message().decode() or (library.error_name(error).decode() if error else "")
    if message:
        raise EmulatorError(emulated.with_lines(message, Path(library._name)))


@dataclass(frozen=True, eq=False)
class EmulatedRung(cuda.Rung):
    """A rung of cuda.RUNGS for tensors on the CPU."""

    device_type: ClassVar[str] = "cpu"

    def _why_no_kernels(self, device: int) -> str | None:
        if sys.platform != "linux":
            return f"the emulator needs Linux, this is {sys.platform}"
        return None if emulated.find_compiler() else "the emulator needs a C++ compiler (g++ or clang++), and none was found"

    def _other(self, name: str) -> cuda.Rung:
        return RUNGS[f"emulated:{name}"]

    def _pack_mask(self, mask: Tensor, by_keys: bool) -> Tensor:
        return masks.pack_mask(mask, by_keys, _launch_pack_mask)

    def launch(self, which: int, call: Call, tensors: tuple[Form, ...], scale: float) -> EmulatedLaunch:
        wanted = self.specialisation(which, emulated.ARCH, *self.kind(which, call))
        sm_count = SM_COUNT if options.traces is None else 1
        library = _library(wanted, options.sources)
        launch = EmulatedLaunch(library, *fields(call, tensors, scale), 0, sm_count, scoring=scoring(call))
        launch.mask_form, launch.key_bytes = self._mask_form(which, call), call.k.dtype.itemsize
        return launch


RUNGS: dict[str, "EmulatedRung"] = {
    f"emulated:{name}": EmulatedRung(**{f.name: getattr(rung, f.name) for f in dataclasses.fields(rung)} | {"name": f"emulated:{name}"})
    for name, rung in cuda.RUNGS.items()
}


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    library.emulator_begin.argtypes = [ctypes.c_uint64, ctypes.c_int]
    library.emulator_memory.argtypes = [ctypes.c_size_t, ctypes.c_int64, ctypes.c_int, ctypes.c_int, ctypes.c_char_p]
    for report in (library.emulator_message, library.emulator_counters, library.emulator_trace, library.emulator_model):
        report.restype = ctypes.c_char_p
    return library


@functools.cache
def _library(wanted: Specialisation, sources: Path | None) -> ctypes.CDLL:
    return libraries.declared(_declared(emulated.load(wanted, libraries.params_size(wanted.score), sources)))


@functools.cache
def _helper_library(file: str, params_size: int, sources: Path | None) -> ctypes.CDLL:
    library = _declared(emulated.load(Specialisation(file, emulated.ARCH), params_size, sources))
    return libraries.helper_declared(library, file)


def _launch_pack_mask(mask: Tensor, bits: Tensor, *settings: int) -> None:
    library = _helper_library(masks.PACK_MASK, masks.PACK_PARAMS.size, options.sources)
    memories = [
        Memory("the mask", mask.data_ptr(), extent(mask.shape, mask.stride())),
        Memory("the mask's bits", bits.data_ptr(), 4 * bits.numel(), True, False),
    ]
    params = masks.PACK_PARAMS.pack(mask.data_ptr(), *mask.stride(), bits.data_ptr(), *settings, 0, 0)
    run(library, library.pack_mask, params, memories)


def run_rotary(x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, params: tuple) -> None:
    """The `run` of `backends.rotary.launch` for tensors on the CPU."""
    library = _helper_library(rotary.ROTARY, rotary.PARAMS.size, options.sources)
    memories = [
        Memory("x", x.data_ptr(), extent(x.shape, x.stride()) * x.element_size()),
        Memory("out", out.data_ptr(), extent(out.shape, out.stride()) * out.element_size(), True, False),
        Memory("cos", cos.data_ptr(), 4 * cos.numel()),
        Memory("sin", sin.data_ptr(), 4 * sin.numel()),
    ]
    run(library, library.rotary, rotary.PARAMS.pack(*params, 0, 0), memories)

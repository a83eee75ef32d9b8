"""The emulator reports mistakes that a GPU may not show, and counts what a kernel does.

emulator_faults.cu has a small kernel for each rule, in a broken and in a correct version: the broken one must be reported, in these words
and at its own lines, the correct one must not, whatever the order of threads, copies and products.
"""

import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import run_alone

from flash_attention import build, flash_attention
from flash_attention.backends import BACKENDS, emulated
from flash_attention.build import Specialisation
from flash_attention.build import emulated as compiler

if reason := BACKENDS["emulated:simple"]._why_no_kernels(0):
    pytest.skip(reason, allow_module_level=True)

FAULTS = Path(__file__).with_name("emulator_faults.cu")
EARLY = "|reads shared byte .*, which no thread has written"  # if the reader runs before the writer


def race(one: str, other: str) -> str:
    """Two accesses that nothing orders, whichever came first."""
    return f"nothing orders .*({one}.* and {other}|{other}.* and {one})"


REPORTS = {
    "no_barrier": race("thread [0-9]+ writes", "thread [0-9]+ reads") + EARLY,
    "no_syncwarp": race("thread [0-9]+ writes", "thread [0-9]+ reads") + EARLY,
    "no_barrier_before_reuse": race("thread [0-9]+ writes", "thread [0-9]+ reads"),
    "lanes_missing": "waits in __shfl_sync .*which ha(s|ve) ended",
    "lanes_apart": "the lanes of a warp do different things: .* __s",
    "barrier_of_too_few": "hangs:\n  threads 0–63 wait in bar.sync for barrier 2, to which 64 of 96 threads have come",
    "barrier_half_full": "ended with barrier 3 half full: 32 of 64",
    "barrier_of_two_sizes": "comes to barrier 4 for (64|128) threads, others for (64|128)",
    "beyond_global": "writes 4 bytes outside of all memory that it was given.*; data ends at byte 16384, this is byte 16[0-9]+ of it",
    "far_beyond_global": "reads 4 bytes outside of all memory that it was given: ",
    "unwritten_global": "reads byte 4096 of data, which no thread has written|reads byte 4[0-9]+ of data",
    "beyond_shared": "writes byte 49155 of dynamic shared memory, of which the launch asked for 49152|writes byte .* of dynamic shared",
    "unwritten_shared": "thread 122 reads shared byte .*, which no thread has written",
    "misaligned": "at an address that is not a multiple of 16",
    "cp_async_not_awaited": race("cp.async of thread [0-9]+ .*writes", "thread [0-9]+ reads"),
    "cp_async_of_others": race("cp.async of thread [0-9]+ .*writes", "thread [0-9]+ reads") + EARLY,
    "cp_async_over_readers": race("cp.async of thread [0-9]+ .*writes", "thread [0-9]+ reads"),
    "cp_async_at_the_end": "ended without waiting for its cp.async",
    "bulk_not_awaited": race("the copy engine, for phase 0 .*writes", "thread [0-9]+ reads") + EARLY,
    "bulk_over_readers": race("the copy engine, for phase 1 .*writes", "thread [0-9]+ reads"),
    "released_before_it_is_read": "the copy engine, for phase 1 .*writes .*, which thread [0-9]+ reads at .*: it has arrived since, but",
    "bytes_too_many": "hangs:\n  threads 0–127 wait for phase 0 of the mbarrier .* where 1 of 1|0 of 1 arrivals and 16 bytes are missing",
    "arrivals_too_few": "hangs:\n  threads 0–127 wait for phase 0 of the mbarrier .* where 1 of 128 arrivals and 0 bytes are missing",
    "arrivals_too_many": race("the copy engine, for phase 1 .*writes", "thread [0-9]+ reads"),
    "barrier_not_fenced": "has not been made visible to the copy engine",
    "store_without_fence": "which thread .* wrote .* with no fence.proxy.async since",
    "store_not_awaited": race("a bulk store of warp 0 .*reads", "thread [0-9]+ writes"),
    "box_misplaced": "the copy engine at the shared address .* not a multiple of 128",
    "product_not_awaited": "reads a register that a product under way writes",
    "product_of_written_tile": race("a product of warpgroup 0 .*reads", "thread 9 writes"),
    "product_without_fence": "a product of warpgroup 0 .* which thread .* wrote .* with no fence.proxy.async since",
    "product_of_copied_tile": "a product of warpgroup 0 .* which cp.async of thread .* wrote .* with no fence.proxy.async between its wait",
    "product_of_touched_registers": "registers that the thread has touched with no wgmma.fence since",
    "product_of_wrong_rows": "begins within a swizzle's pattern",
    "product_beyond_shared": "a product of warpgroup 0 .* of dynamic shared memory, of which the launch asked for 49152",
    "product_of_three_warps": "the threads of a warpgroup do different things",
    "registers_beyond_the_block": "wait for 240 registers, of which the block has",
    "turn_taken_twice": "hangs:\n  thread 0 waits for a number in global memory to be other than [24]",
    "early_without_wait": "which launch 1 writes: this one, number 2, could begin before that has ended, and the block has not waited",
    "early_none_waits": "launch 2 ended with none of its blocks having waited for the launch before it",
    "early_after_early": "which launch 1 writes: this one, number 3, could begin before that has ended",
    "early_number_of_before": "launch 1 sets: this one, number 3, could begin before that has ended, and find an older number",
}
SEEDS = range(8)
CLANG = compiler._is_clang(compiler.find_compiler())
NOT_BY_CLANG = {  # it does not tell of these accesses as g++ does
    "misaligned": "a struct is copied by memcpy, which knows of no alignment",
    "product_not_awaited": "a thread's own arrays are not instrumented",
    "product_of_touched_registers": "a thread's own arrays are not instrumented",
}
NO_LINE_BY_CLANG = ("registers_beyond_the_block",)  # two calls merged into one have no line


@functools.cache
def faults() -> ctypes.CDLL:
    library = emulated._declared(build.loaded(compiler.build_kernel(Specialisation(str(FAULTS), compiler.ARCH, 64, "float16"))))
    library.fault.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    library.fault_names.restype = ctypes.c_char_p
    return library


def run_fault(name: str, broken: bool, seed: int) -> torch.Tensor:
    """The kernel's data [4096] after the launch; the first 1024 are its input."""
    data = torch.arange(4096, dtype=torch.float32)
    data[1024:] = torch.nan
    counter = torch.zeros(1, dtype=torch.int32)
    memories = [
        emulated.Memory("data", data.data_ptr(), 4096, True, True),
        emulated.Memory("data", data.data_ptr(), 4 * 4096, True, False),
        emulated.Memory("the counter", counter.data_ptr(), 4, True, True),
    ]
    emulated.options.seed = seed
    library = faults()
    try:
        emulated.run(
            library, lambda _: library.fault(name.encode(), data.data_ptr(), counter.data_ptr(), broken), b"", memories, poison=False
        )
    finally:
        emulated.options.seed = 0
    return data


def lines_of(name: str) -> range:
    """The kernel's lines in emulator_faults.cu."""
    text = FAULTS.read_text()
    start = text.index(f"void {name}(")
    end = text.index("\n}\n", start)
    return range(text[:start].count("\n") + 1, text[:end].count("\n") + 3)


@pytest.mark.parametrize("name", REPORTS)
def check_fault_is_reported(name):
    if CLANG and name in NOT_BY_CLANG:
        pytest.skip(f"clang: {NOT_BY_CLANG[name]}")
    for seed in SEEDS:
        with pytest.raises(emulated.EmulatorError) as error:
            run_fault(name, True, seed)
        message = str(error.value)
        assert re.search(REPORTS[name], message), f"seed {seed}: {message}"
        if "ended with" not in message and not (CLANG and name in NO_LINE_BY_CLANG):  # at the end of a block there is no line
            lines = [int(line) for line in re.findall(r"emulator_faults\.cu:(\d+)", message)]
            assert any(line in lines_of(name) for line in lines), f"{name} is in lines {lines_of(name)}: {message}"


def check_right_twins_are_not():
    names = faults().fault_names().decode().split()
    assert set(REPORTS) | {"depends_on_order", "box_read_as_unswizzled"} == set(names)
    for name in names:
        for seed in SEEDS:
            try:
                run_fault(name, False, seed)
            except emulated.EmulatorError as error:
                raise AssertionError(f"{name}, seed {seed}: {error}") from error


def check_order_is_drawn():
    """A result that depends on the order of threads differs from seed to seed; other results do not."""
    results = [{tuple(run_fault("depends_on_order", broken, seed)[:128].tolist()) for seed in range(16)} for broken in (False, True)]
    assert len(results[0]) == 1
    assert len(results[1]) > 1


def check_swizzled_box():
    """A box is written swizzled: read without the swizzle, rows come out in pieces."""
    data = (
        torch.arange(1024, dtype=torch.float32)
        .view(torch.float16)[: 4 * 128]
        .view(4, 128)[:, :64]
        .contiguous()
        .view(torch.float32)
        .flatten()
    )
    assert torch.equal(run_fault("box_read_as_unswizzled", False, 0)[1024:1152], data)
    assert not torch.equal(run_fault("box_read_as_unswizzled", True, 0)[1024:1152], data)


def check_half_types():
    """float16 and bfloat16 round as in PyTorch: every number of either type, ties between neighbours, and one bit above and below."""
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    bfloats = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    values = torch.cat([halves, bfloats])
    bits = values.view(torch.int32)
    x = torch.cat([bits + step for step in (0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001)]).view(torch.float32).contiguous()
    half, bfloat = torch.empty(2, len(x), dtype=torch.int16).unbind()
    from_half, from_bfloat = torch.empty(2, len(x)).unbind()
    faults().convert(
        *(ctypes.c_void_p(t.data_ptr()) if isinstance(t, torch.Tensor) else t for t in (x, len(x), half, bfloat, from_half, from_bfloat))
    )
    for got, back, dtype in ((half, from_half, torch.float16), (bfloat, from_bfloat, torch.bfloat16)):
        want = x.to(dtype)
        assert torch.equal(got.view(dtype).nan_to_num(nan=7.0), want.nan_to_num(nan=7.0)), dtype
        assert torch.equal(got.view(dtype).isnan(), x.isnan())
        assert torch.equal(back.nan_to_num(nan=7.0), want.float().nan_to_num(nan=7.0)), dtype


def counted(name: str, **options) -> list[emulated.Counts]:
    """What a forward and a backward of this rung do, at B 1 H 1 N 128 D 64 unless given."""
    shape = 1, 1, options.pop("N", 128), 64
    q, k, v, dO = torch.randn(4, *shape, dtype=torch.float32 if name == "simple" else torch.float16).unbind()
    with emulated.counting() as counts:
        O = flash_attention(*(x.requires_grad_() for x in (q, k, v)), backend=f"emulated:{name}", **options)
        O.backward(dO)
    return counts


@pytest.mark.parametrize("name", ("simple", "mma", "tensor_core", "hopper"))
def check_bank_conflicts(name):
    """The kernels' headers are right: ldmatrix on plain rows takes 8 times the cycles, on swizzled or padded rows the minimum."""
    for of_call in counted(name):
        for place, (_, cycles, least) in of_call.shared.items():
            if name == "mma" and "mma.cuh" in place:
                assert cycles in (4 * least, 8 * least) or (CLANG and cycles == least), (
                    f"{of_call.file}, {place}: {cycles} cycles, {least} at least"
                )
            elif name != "mma":
                assert cycles == least, f"{of_call.file}, {place}: {cycles} cycles, {least} at least"


@pytest.mark.parametrize(("name", "unit"), (("mma", "mma.sync"), ("tensor_core", "mma.sync"), ("hopper", "wgmma")))
def check_counts(name, unit):
    """Two products forward; five backward, or seven if S and dP are computed twice; one exponential per score. The tiles of `hopper` round
    N up, and it issues one product more than it needs, at the end of a block."""
    N = 256
    forward, backward = counted(name, N=N)
    product = 2 * N * N * 64
    assert backward.total[f"FLOP by {unit}"] == (7 if name == "mma" else 5) * product
    assert 2 * product <= forward.total[f"FLOP by {unit}"] <= (2 if name != "hopper" else 4) * product
    assert backward.total["exponentials"] == (2 if name == "mma" else 1) * N * N
    assert N * N <= forward.total["exponentials"] <= 1.4 * N * N  # and one per row and tile, to rescale O
    if name == "hopper":
        assert forward.total["global bytes by tensor map, from shared memory"] == 2 * N * 64


@pytest.mark.skipif(shutil.which("clang++") is None, reason="no clang++")
@pytest.mark.skipif(CLANG, reason="all other checks already ran with clang++")
def check_clang():
    """A sample with clang: faults that must be reported, and a kernel's result."""
    environment = os.environ | {"CXX": "clang++"}
    chosen = "no_barrier] or bulk_over_readers or store_without_fence or beyond_global or cp_async_not_awaited"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen]
    faults = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert faults.returncode == 0 and faults.stdout.startswith("......  "), faults.stdout + faults.stderr
    script = """
import torch
from flash_attention import flash_attention
q, k, v = torch.randn(3, 1, 1, 140, 64, dtype=torch.float16).unbind()
difference = flash_attention(q, k, v, backend="emulated:hopper") - flash_attention(q, k, v, backend="reference")
print(float(difference.abs().max()))
"""
    kernel = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert kernel.returncode == 0 and float(kernel.stdout) < 2e-3, kernel.stdout + kernel.stderr


if __name__ == "__main__":
    run_alone(__file__)

"""Memory is linear in the length, forward and backward, and no mask is expanded: measured, each call in a process of its own.

python checks/check_memory.py [--backend reference]

On a CPU: how far the peak of resident memory (VmHWM) rises above what was resident before the call. On CUDA: the allocator's peak.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from harness import Case, Target, dtype_served, run_alone, serves_masks, skip_unless_masks

from flash_attention import flash_attention
from flash_attention.parallel.processes import CONTEXT

H, N, D = 4, 4096, 32
MATRIX = H * N * N * 4  # bytes of an N × N matrix of float32 for each head: 256 MB
MB = 1 << 20
# The measured calls: length, with or without backward, causal or not, the mask's shape.
CALLS = {
    "forward, half the length": (N // 2, False, False, None),
    "forward": (N, False, False, None),
    "backward, half the length": (N // 2, True, False, None),
    "backward": (N, True, False, None),
    "causal backward": (N, True, True, None),
    "backward, mask (1, 1, 1, Nk)": (N, True, False, "row"),
    "backward, mask (1, 1, Nq, Nk)": (N, True, False, "matrix"),
}


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def measure_here(backend: str, device: str, N: int, backward: bool, causal: bool, mask_kind: str | None) -> int:
    """In a fresh process: the peak of bytes above the inputs, of a forward or of a forward and a backward."""
    target = Target(backend, device)
    torch.set_num_threads(1)  # more threads would have their own buffers

    def inputs(N: int):
        q, k, v, _ = Case(B=1, H=H, Nq=N, Nk=N, D=D, dtype=dtype_served(target)).inputs(device)
        mask = torch.ones(1, 1, N if mask_kind == "matrix" else 1, N, dtype=torch.bool, device=device) if mask_kind else None
        return [x.requires_grad_(backward) for x in (q, k, v)], mask, torch.randn_like(q)

    def call(qkv, mask, dO):
        O = flash_attention(*qkv, mask, causal=causal, backend=backend)
        return O, *(torch.autograd.grad(O, qkv, dO) if backward else ())

    call(*inputs(64))  # libraries and kernels are loaded before the measurement, not in it
    everything = inputs(N)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = call(*everything)
        after = torch.cuda.max_memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at what is resident now
        before = resident("VmRSS")
        results = call(*everything)
        after = resident("VmHWM")
    assert all(x.isfinite().all() for x in results)
    return after - before


def measure(target: Target, call: tuple) -> int:
    ours, theirs = CONTEXT.Pipe(duplex=False)
    child = CONTEXT.Process(target=send_measurement, args=(theirs, *target, *call))
    child.start()
    theirs.close()  # the child has the only other end: if it dies, recv() raises instead of waiting
    try:
        return ours.recv()
    finally:
        child.join()


def send_measurement(result: Connection, *call) -> None:
    result.send(measure_here(*call))


@cache
def needed(target: Target) -> dict[str, int]:
    """Bytes that each of CALLS needs above its inputs; without the masked calls if the backend serves no masks."""
    if target.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak resident memory is read from /proc/self, which this system does not have")
    calls = {name: call for name, call in CALLS.items() if serves_masks(target) or not call[-1]}
    with ThreadPoolExecutor(2) as pool:
        numbers = dict(zip(calls, pool.map(lambda call: measure(target, call), calls.values()), strict=True))
    print(*(f"\n  {call:32} {number / MB:7.1f} MB" for call, number in numbers.items()), sep="")
    return numbers


@pytest.mark.parametrize("call", ("forward", "backward"))
def check_growth(target, call):
    """Twice the length, at most about twice the memory, where an N × N matrix would need four times as much."""
    half, whole = needed(target)[f"{call}, half the length"], needed(target)[call]
    assert whole > H * N * D * 4 // 2, f"{whole} bytes is less than the output: nothing was measured"
    assert whole < 2.3 * half + MB, f"{call}: {half / MB:.1f} MB at N = {N // 2}, {whole / MB:.1f} MB at N = {N}"


@pytest.mark.parametrize("call", ("forward", "backward", "causal backward"))
def check_far_below_a_matrix(target, call):
    number = needed(target)[call]
    assert number < MATRIX / 6, f"{call} needs {number / MB:.1f} MB; the matrix of scores has {MATRIX / MB:.0f} MB"


@pytest.mark.parametrize("shape", ("(1, 1, 1, Nk)", "(1, 1, Nq, Nk)"))
def check_masks_are_not_expanded(target, shape):
    """A mask costs nothing that grows with Nq · Nk: not a copy per head, not even one copy."""
    skip_unless_masks(target)
    without, number = needed(target)["backward"], needed(target)[f"backward, mask {shape}"]
    copy = N * N  # bytes
    assert number < without + 0.8 * copy, (
        f"{number / MB:.1f} MB with the mask, {without / MB:.1f} MB without; a copy has {copy / MB:.0f} MB"
    )


if __name__ == "__main__":
    run_alone(__file__)

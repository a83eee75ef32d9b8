"""Every kernel under NVIDIA's compute-sanitizer: memcheck, racecheck, synccheck and initcheck over a small grid.

    python checks/sanitize.py [--backend NAME ...] [--tool NAME ...]

Exit code 1: a tool has reported something; 2: nothing could be run.

Needs a GPU and compute-sanitizer, a part of the CUDA toolkit. Instrumented kernels are slow, so lengths are small, but they cover more than
one tile, a ragged last tile, rows that see nothing, and head sizes that are padded.
"""

import argparse
import os
import shutil
import subprocess
import sys
from itertools import product

import torch
from harness import call_of

from flash_attention import flash_attention
from flash_attention.backends.cuda import RUNGS
from flash_attention.spans import documents

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
CLEAN = {"racecheck": "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"}  # the other tools say:
NO_ERRORS = "ERROR SUMMARY: 0 errors"

LENGTHS = ((130, 200), (200, 130), (1, 70))  # Nq, Nk; causal with Nq > Nk has rows that see nothing
# causal, mask (each head has its own: some rungs read it as bytes; all share one: packed to bits), dropout_p
FLAGS = ((False, None, 0.0), (True, None, 0.0), (False, "one", 0.0), (False, "each", 0.0), (True, "each", 0.0), (True, "one", 0.1))
HEAD_DIMS = (40, 64, 128, 256)  # above 128, hopper has another backward
# What rows see, each its own interval; with a mask and dropout in the last.
INTERVALS = (
    ({"window": (70, 9)}, None, 0.0),
    ({"spans": "documents"}, None, 0.0),
    ({"spans": "documents", "window": (20, None), "causal": True}, "one", 0.1),
)
MANY = 140  # heads: more tiles than multiprocessors. A hopper block then takes several, with one or two places for Q.


def run_grid(backend: str) -> None:
    """A forward and, if the backend has one, a backward of each case it serves, in its first dtype."""
    torch.manual_seed(0)
    rung = RUNGS[backend]
    dtype = getattr(torch, rung.dtypes[0])
    served = 0
    sizes = [(D, 2) for D in HEAD_DIMS] + [(D, MANY) for D in (128, 256)] * (backend == "hopper")
    for (Nq, Nk), (causal, masks, dropout_p), (D, H) in product(LENGTHS, FLAGS, sizes):
        gradients = not rung.why_no_backward()
        q = torch.randn(1, H, Nq, D, device="cuda", dtype=dtype, requires_grad=gradients)
        k, v = (torch.randn(1, 1, Nk, D, device="cuda", dtype=dtype, requires_grad=gradients) for _ in range(2))
        # Rows begin at multiples of 16 bytes, and the last few columns are padding.
        mask = (torch.rand(1, H if masks == "each" else 1, Nq, (Nk + 15) // 16 * 16, device="cuda") < 0.5)[..., :Nk] if masks else None
        if rung.why_not(call_of(q, k, v, mask, causal, dropout_p)):
            continue
        O, LSE = flash_attention(q, k, v, mask, causal=causal, dropout_p=dropout_p, return_lse=True, backend=backend)
        if backend == "hopper":
            # initcheck (2025.3) does not see stores of the copy engine, but it sees a copy from the host. The checks with poisoned outputs
            # verify that all of O is written.
            O.data.copy_(O.data.cpu())
        alive = ~LSE.isneginf()
        if gradients:
            torch.autograd.backward((O, LSE), (torch.randn_like(O), torch.randn_like(LSE).where(alive, 0)))
        torch.cuda.synchronize()
        served += 1
    assert served, f"{backend} served no case"
    if rung.intervals:
        served += run_intervals(backend)
    print(f"{backend}: {served} cases")


def run_intervals(backend: str) -> int:
    """The same for windows and spans; → how many cases."""
    dtype = getattr(torch, RUNGS[backend].dtypes[0])
    cases = list(product(LENGTHS, INTERVALS, HEAD_DIMS))
    for (Nq, Nk), (options, masks, dropout_p), D in cases:
        q = torch.randn(1, 4, Nq, D, device="cuda", dtype=dtype, requires_grad=True)
        k, v = (torch.randn(1, 2, Nk, D, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2))
        mask = torch.rand(1, 1, Nq, Nk, device="cuda") < 0.5 if masks else None
        if "spans" in options:
            lengths = ([Nq // 3, 0, Nq - Nq // 3], [Nk // 2, 3, Nk - Nk // 2 - 3])
            options = options | {"spans": documents(*lengths, causal=True).cuda()}
        O, LSE = flash_attention(q, k, v, mask, **options, dropout_p=dropout_p, return_lse=True, backend=backend)
        if backend == "hopper":
            O.data.copy_(O.data.cpu())  # as above
        torch.autograd.backward((O, LSE), (torch.randn_like(O), torch.randn_like(LSE).where(~LSE.isneginf(), 0)))
        torch.cuda.synchronize()
    return len(cases)


def sanitize(tool: str, backend: str) -> bool:
    command = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=1"]
    if tool == "initcheck" and backend == "hopper":
        command += ["--check-api-memory-access=no"]  # it would report the copy from the host above
    command += [sys.executable, __file__, "--grid", backend]
    # One allocation per tensor, so that an access beyond a tensor's end is one beyond an allocation.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    output = result.stdout + result.stderr
    clean = result.returncode == 0 and CLEAN.get(tool, NO_ERRORS) in output
    print(f"{tool:10} {backend:12} {'clean' if clean else 'REPORTS'}", flush=True)
    if not clean:
        print(output[-6000:])
    return clean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", nargs="+", choices=tuple(RUNGS), help="default: each that runs on this GPU")
    parser.add_argument("--tool", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--grid", choices=tuple(RUNGS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.grid:
        return run_grid(arguments.grid)
    if not torch.cuda.is_available():
        parser.error("it needs a CUDA GPU")
    if shutil.which("compute-sanitizer") is None:
        parser.error("compute-sanitizer was not found on the PATH; it comes with the CUDA toolkit")
    major, minor = torch.cuda.get_device_capability()
    here = [name for name, rung in RUNGS.items() if rung.runs_on(10 * major + minor)]
    backends = arguments.backend or here
    if elsewhere := [name for name in backends if name not in here]:
        parser.error(f"--backend: {', '.join(elsewhere)} does not run on a GPU of compute capability {major}.{minor}")
    for backend in backends:
        run_grid(backend)  # compiles what is missing, outside the sanitizer
    results = [sanitize(tool, backend) for tool, backend in product(arguments.tool, backends)]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()

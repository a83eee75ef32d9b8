"""`python -m flash_attention.build`: compiles the kernels that most models use ahead of time, in parallel."""

import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import torch
from tqdm import tqdm

from flash_attention.backends.cuda import BACKWARD, FORWARD, PACK_MASK, RUNGS
from flash_attention.build import BuildError, Specialisation, arch_of, build, cache_folder, load


def usual_set(archs: list[str], head_dims: list[int] | None = None) -> list[Specialisation]:
    """What most models use: each rung's common head sizes and dtypes, dense, causal, and with mask and dropout."""
    wanted = []
    for arch, rung in product(archs, RUNGS.values()):
        if not rung.runs_on(int(arch.rstrip("af"))):
            continue
        for head_dim, dtype in product(head_dims or rung.head_dims, rung.dtypes):
            for causal, mask, dropout in ((False, False, False), (True, False, False), (False, True, False), (True, True, rung.dropout)):
                if head_dim not in rung.head_dims:
                    continue
                for which in (FORWARD, BACKWARD):
                    file = rung.file(which, head_dim)
                    forms = rung.mask_forms(which, dropout) if mask else (None,)
                    wanted += [Specialisation(file, arch, head_dim, dtype, causal, form, dropout) for form in forms]
    return wanted


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m flash_attention.build", description="Compile the usual kernels ahead of time.")
    parser.add_argument("--arch", nargs="+", metavar="NN", help="architectures such as 80 or 90a (default: this machine's GPU)")
    parser.add_argument("--head_dim", nargs="+", type=int, metavar="D", help="head sizes (default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at once (default %(default)s)")
    arguments = parser.parse_args()
    if not arguments.arch and not torch.cuda.is_available():
        parser.error("there is no GPU here: name the architectures with --arch")
    archs = arguments.arch or [arch_of(torch.cuda.get_device_capability())]

    started = time.perf_counter()
    wanted = [(PACK_MASK, arch, [], f"{PACK_MASK} sm_{arch}") for arch in archs]
    wanted += [(s.file, s.arch, s.defines(), str(s)) for s in usual_set(archs, arguments.head_dim)]
    failures = []
    with ThreadPoolExecutor(arguments.jobs) as pool, tqdm(total=len(wanted), unit="kernel", disable=None) as bar:

        def one(job):
            try:
                load(build(*job, verbose=False))
            except BuildError as error:
                failures.append(str(error))
            bar.update()

        list(pool.map(one, wanted))
    for failure in failures:
        print(failure, file=sys.stderr)
    print(f"{len(wanted) - len(failures)} kernels in {cache_folder()}, {len(failures)} failed, {time.perf_counter() - started:.0f} s")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())

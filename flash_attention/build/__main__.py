"""`python -m flash_attention.build`: compiles kernels ahead of time, in parallel; checks them for spills; prunes the cache."""

import argparse
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

from flash_attention import build
from flash_attention.backends.cuda import BACKWARD, FORWARD, PACK_MASK, RUNGS
from flash_attention.backends.rotary import ROTARY
from flash_attention.build import BuildError, Specialisation, node

ARCHS = ("75", "80", "86", "89", "90a", "100", "120")  # architectures for which every release is checked
KINDS = tuple(product(("all", "causal", "interval"), (False, True), (False, True)))  # what a row sees, mask, dropout
USUAL = (("all", False, False), ("causal", False, False), ("all", True, False), ("causal", True, True))  # what most models use of them


def specialisations(archs: list[str], head_dims: list[int] | None = None, kinds=KINDS) -> list[Specialisation]:
    """Every specialisation of each rung, in every form in which it reads a mask."""
    wanted = [Specialisation(file, arch) for arch in archs for file in (PACK_MASK, ROTARY)]
    for arch, rung in product(archs, RUNGS.values()):
        if not rung.runs_on(build.arch_number(arch)):
            continue
        sizes = [*((head_dim, head_dim) for head_dim in rung.head_dims), *rung.pairs]
        for size, dtype, (visible, mask, dropout), which in product(sizes, rung.dtypes, kinds, (FORWARD, BACKWARD)):
            if (
                not rung.files[which]
                or (head_dims and size[0] not in head_dims)
                or (dropout and not rung.dropout)
                or (visible == "interval" and not rung.intervals)
            ):
                continue
            forms = rung.mask_forms(which, dropout) if mask else (None,)
            for form, tf32 in product(forms, (False, True) if rung.tf32 else (False,)):
                wanted.append(rung.specialisation(which, arch, dtype, size, visible, form, dropout, tf32=tf32))
            if which == FORWARD and not mask and rung.has_tall(size, visible, None, dropout):
                wanted.append(rung.specialisation(which, arch, dtype, size, visible, None, dropout, tall=True))
    return list(dict.fromkeys(wanted))  # two rungs may share some


def usual_set(archs: list[str], head_dims: list[int] | None = None) -> list[Specialisation]:
    """The specialisations that most models use: each rung's common head sizes and dtypes, dense, causal, and with mask and dropout."""
    return specialisations(archs, head_dims, USUAL)


def in_parallel(one: Callable[[Specialisation], list[str]], wanted: list[Specialisation], jobs: int):
    """Runs `one` for each kernel. → {kernel: what it returned, if anything}, and a list of what it raised."""
    found, failed = {}, []
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(wanted), unit="kernel", disable=None) as bar:

        def run(kernel: Specialisation) -> None:
            try:
                if complaints := one(kernel):
                    found[str(kernel)] = complaints
            except BuildError as error:
                failed.append(str(error))
            bar.update()

        list(pool.map(run, wanted))
    return dict(sorted(found.items())), failed


def check(archs: list[str], head_dims: list[int] | None, jobs: int, file: Path | None) -> bool:
    """Compiles every specialisation only to collect complaints. The file has one entry per architecture; entries of others are kept."""
    results = json.loads(file.read_text()) if file and file.exists() else {}
    good = True
    for arch in archs:
        started, wanted = time.perf_counter(), specialisations([arch], head_dims)
        found, failed = in_parallel(build.inspect, wanted, jobs)
        good &= not found and not failed
        for kernel, complaints in found.items():
            print(f"{kernel}: {'; '.join(complaints)}")
        print(*failed, sep="\n", end="\n" if failed else "")
        took = time.perf_counter() - started
        print(f"sm_{arch}: {len(wanted)} kernels, {len(found)} with complaints, {len(failed)} failed, {took:.0f} s", flush=True)
        compilers = build.compilers(build.find_nvcc() or "nvcc").splitlines()
        results[arch] = {"kernels": len(wanted), "complaints": found, "failed": failed, "compilers": compilers}
        if file:
            rows = (f"{json.dumps(arch)}: {json.dumps(result)}" for arch, result in results.items())  # one row a line
            file.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    return good


def compile_set(wanted: list[Specialisation], into: Path | None, jobs: int) -> bool:
    """Compiles libraries into the cache, or into a folder for other machines: the kernels, and node.cpp for the PyTorch installed here."""
    started = time.perf_counter()
    if into:
        into.mkdir(mode=0o755, parents=True, exist_ok=True)
        build.refuse_if_others_write(into)

    def one(kernel: Specialisation) -> list[str]:
        library = build.build(kernel, into)
        build.loaded(library)
        return build.noted_complaints(library)

    found, failed = in_parallel(one, wanted, jobs)
    for kernel, complaints in found.items():
        print(f"{kernel} is slower than it should be: {'; '.join(complaints)}", file=sys.stderr)
    kernels = len(wanted) - len(failed)
    try:
        node.compiled(into)
    except BuildError as error:
        failed.append(str(error))
    print(*failed, sep="\n", end="\n" if failed else "", file=sys.stderr)
    took = time.perf_counter() - started
    print(f"{kernels} kernels in {into or build.cache_folder()}, {len(failed)} failed, {took:.0f} s")
    return not failed


def _arch(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d+[af]?", text):
        raise argparse.ArgumentTypeError(f"an architecture is a number such as 80 or 90a, got {text!r}")
    return text


def _jobs(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"at least 1, got {text!r}")
    return int(text)


def main() -> int:
    head_dims = sorted({head_dim for rung in RUNGS.values() for head_dim in rung.head_dims})
    parser = argparse.ArgumentParser(prog="python -m flash_attention.build", description="Compile kernels ahead of time.")
    parser.add_argument("--arch", nargs="+", type=_arch, metavar="NN", help="such as 80 or 90a (default: this machine's GPU; --check: all)")
    parser.add_argument("--head_dim", nargs="+", type=int, choices=head_dims, metavar="D", help="head sizes (default: all)")
    parser.add_argument("--all", action="store_true", help="every specialisation, not only what most models use")
    parser.add_argument("--jobs", type=_jobs, default=os.cpu_count(), help="compilers at once (default %(default)s)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--out", type=Path, metavar="DIR", help="write to DIR, for machines where FLASH_ATTENTION_KERNELS names it")
    what.add_argument("--check", action="store_true", help="keep no library: say which kernels of the whole set spill; exit 1 if any does")
    what.add_argument("--prune", action="store_true", help="delete from the cache what this version and this compiler do not use")
    parser.add_argument("--json", type=Path, metavar="FILE", help="with --check: the result")
    arguments = parser.parse_args()
    if arguments.json and not arguments.check:
        parser.error("--json is for --check")
    try:
        return _run(arguments, parser)
    except (BuildError, OSError) as error:
        parser.error(str(error))


def _run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if arguments.prune:
        deleted = build.prune()
        print(f"{len(deleted)} files deleted from {build.cache_folder()}")
        return 0
    if not (arguments.arch or arguments.check or torch.cuda.is_available()):
        parser.error("there is no GPU here: name the architectures with --arch")
    if arguments.check:
        return not check(arguments.arch or list(ARCHS), arguments.head_dim, arguments.jobs, arguments.json)
    archs = arguments.arch or [build.arch_of(torch.cuda.get_device_capability())]
    chosen = specialisations if arguments.all else usual_set
    level = build.log.level
    build.log.setLevel(logging.ERROR)  # the progress bar already shows this
    try:
        return not compile_set(chosen(archs, arguments.head_dim), arguments.out, arguments.jobs)
    finally:
        build.log.setLevel(level)


if __name__ == "__main__":
    sys.exit(main())

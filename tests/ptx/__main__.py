"""Executes the kernels' PTX on the CPU and compares them with eager: a row for each case.

    python -m tests.ptx --arch sm_75 sm_80 sm_90            the op table at all its shapes
    python -m tests.ptx --set sample --arch sm_75           every op once
    python -m tests.ptx --set strides tuned --only gelu
    python -m tests.ptx --order descending --mma hardware --noise 2

The exit code is 1 if an error exceeds the tolerance or an access was wrong.
"""

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before anything imports Triton

import torch

from tests.ptx import cases
from tests.ptx.cases import Case, Result

SETS = ("sample", "table", "edges", "strides", "tuned")


def chosen(which: str, arch: int, dtypes: list[str], every: int) -> Iterator[Case]:
    if which == "tuned":
        yield from cases.tuned(arch, every)
        return
    for dtype in dtypes or cases.dtypes(arch):
        if which == "table":
            yield from cases.shape_table(dtype, arch)
        else:
            yield from getattr(cases, which)(dtype)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.ptx",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", nargs="+", default=["sm_75"], help="sm_75, sm_80, sm_90")
    parser.add_argument("--set", nargs="+", default=["table", "edges"], choices=SETS)
    parser.add_argument("--dtype", nargs="+", default=[], help="default: all of the architecture")
    parser.add_argument("--only", default="", help="cases whose name contains this text")
    parser.add_argument("--every", type=int, default=1, help="of so many tuned tiles run one")
    parser.add_argument(
        "--order", default="lockstep", help="of warps: lockstep, ascending, descending"
    )
    parser.add_argument("--mma", default="exact", help="sums of tensor cores: exact, hardware")
    parser.add_argument(
        "--noise", type=int, default=0, help="error of approximate instructions, in last places"
    )
    parser.add_argument("--json", type=Path, help="writes the rows to this file")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start, results = time.perf_counter(), list[Result]()
    print(cases.HEADING)
    for arch in (int(name.removeprefix("sm_")) for name in args.arch):
        for which in args.set:
            for case in chosen(which, arch, args.dtype, args.every):
                if args.only not in case.name:
                    continue
                options = dict(order=args.order, mma=args.mma, noise=args.noise)
                results.append(cases.execute(case, arch, **options))
                print(results[-1].line(), flush=True)
                for problem in results[-1].problems[:6]:
                    print(f"    {problem}", flush=True)
    faults = sum(not r.ok for r in results)
    seconds = time.perf_counter() - start
    instructions = sum(r.instructions for r in results)
    print(f"{len(results)} cases, {faults} faults, {instructions:,} instructions, {seconds:.0f} s")
    if args.json:
        rows = [
            dict(case=r.case.name, arch=f"sm_{r.arch}", dtype=r.case.dtype, ok=r.ok)
            | dict(share=r.share, problems=r.problems, launches=r.launches)
            | dict(instructions=r.instructions, seconds=round(r.seconds, 2))
            for r in results
        ]
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if faults or not results else 0


if __name__ == "__main__":
    sys.exit(main())

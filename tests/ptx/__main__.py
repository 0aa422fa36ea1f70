"""Executes the kernels' PTX on the CPU and compares them with eager: a row for each case.

    python -m tests.ptx --arch sm_75 sm_80 sm_90            all code (table), odd sizes (edges)
    python -m tests.ptx --set sample --arch sm_75           every op once
    python -m tests.ptx --set strides tuned --only gelu
    python -m tests.ptx --set sample --order ascending descending --mma hardware --noise 1

With --rows, a run that was stopped continues after the last row. The exit code is 1 if an error
exceeds the tolerance or an access was wrong.
"""

import argparse
import itertools
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before anything imports Triton

import torch
import triton

from tests.ptx import cases

HEADING = f"{'case':66} arch  dtype    order      error / tolerance, instructions, seconds"


def line(row: dict[str, Any]) -> str:
    facts = f"{row['arch']} {row['dtype']:9}{row['order']:10}{row['share']:5.2f}"
    facts += f"{row['instructions']:12,}{row['seconds']:7.1f}"
    problems = "".join(f"\n    {problem}" for problem in row["problems"][:6])
    return f"{row['case']:66} {facts}  {'FAULT' if row['problems'] else 'ok'}{problems}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.ptx",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    help = "architectures: sm_75, sm_80, sm_90 [sm_75]"
    parser.add_argument("--arch", nargs="+", metavar="SM", default=["sm_75"], help=help)
    help = f"sets of cases: {', '.join(cases.SETS)} [table edges]"
    usual = ["table", "edges"]
    parser.add_argument(
        "--set", nargs="+", metavar="NAME", choices=cases.SETS, default=usual, help=help
    )
    help = "dtypes of the inputs [all that the architecture has]"
    parser.add_argument("--dtype", nargs="+", metavar="NAME", default=[], help=help)
    help = "run the cases whose name contains this text [all cases]"
    parser.add_argument("--only", metavar="TEXT", default="", help=help)
    help = "orders in which the warps run: lockstep, ascending, descending [lockstep]"
    parser.add_argument("--order", nargs="+", metavar="NAME", default=["lockstep"], help=help)
    help = "how tensor cores add: exact, or truncated as in hardware [exact]"
    parser.add_argument("--mma", choices=("exact", "hardware"), default="exact", help=help)
    help = "error of approximate instructions, as a share of what the PTX ISA allows: 0 to 1 [0]"
    parser.add_argument("--noise", type=float, default=0.0, help=help)
    help = "add the rows to this file (JSON lines), and skip the cases that it has"
    parser.add_argument("--rows", metavar="FILE", type=Path, help=help)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    known = [json.loads(x) for x in args.rows.read_text().splitlines()] if (
        args.rows and args.rows.exists()) else []  # fmt: skip
    start, rows = time.perf_counter(), list[dict[str, Any]]()
    print(HEADING)
    for name, which in itertools.product(args.arch, args.set):
        arch = int(name.removeprefix("sm_"))
        for dtype in args.dtype or cases.dtypes(arch):
            for case in cases.SETS[which](dtype, arch):
                for order in args.order if args.only in case.name else ():
                    options = dict(order=order, mma=args.mma, noise=args.noise)
                    key = dict(case=case.name, set=which, arch=name, dtype=dtype, **options)
                    key |= dict(triton=triton.__version__)
                    row = next((r for r in known if r.items() >= key.items()), None)
                    if row is None:
                        row = key | vars(cases.execute(case, arch, **options))
                        if args.rows:
                            with args.rows.open("a") as file:
                                file.write(json.dumps(row) + "\n")
                    rows.append(row)
                    print(line(row), flush=True)
    faults = sum(len(row["problems"]) > 0 for row in rows)
    instructions = sum(row["instructions"] for row in rows)
    seconds = time.perf_counter() - start
    print(f"{len(rows)} cases, {faults} faults, {instructions:,} instructions, {seconds:.0f} s")
    return 1 if faults or not rows else 0


if __name__ == "__main__":
    sys.exit(main())

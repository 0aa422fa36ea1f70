"""
Ranks tiles for the attention kernels on sm_75 by what they compile to, without a GPU.

    python -m irongpt_kernels.candidates [--d 64 128] [--p 0.2] [--json]

A candidate is BLOCK_M queries by BLOCK_N keys on a number of warps, 16 or 32 rows of the scores a
warp, as long as what each thread must hold can fit its 255 registers. Each is compiled, and its
inner loop is charged to the units of an SM by `sass.clocks`. What spills or does not fit comes
last, then what leaves an SM fewer than 8 warps (too few to keep its tensor cores fed), then it is
clocks per query-key pair. `attention_tiles.table` is chosen from the head of these lists, a tile
that stays clear of spills at every head dimension and without dropout too.

Limits of the model: a bound from below. It charges no latency, no bank conflict and no dependence;
it sees neither the masked tiles on the diagonal, of which large tiles have more, nor DRAM, which
binds at short contexts; there more programs of smaller tiles are better than it says.
"""

import argparse
import itertools
import json
import sys
from typing import Any
from unittest.mock import patch

from irongpt_kernels import aot, attention_tiles, launch, shapes, turing

KERNELS = {
    "forward": "attention._forward_kernel",
    "query": "attention_backward._query_kernel",
    "key": "attention_backward._key_kernel",
}
FEW_WARPS = 8
Tile = tuple[int, int, int]  # BLOCK_M, BLOCK_N, num_warps


def tiles(kernel: str, BLOCK_D: int) -> list[Tile]:
    """Candidates. A warp owns rows of the scores; of the key kernel's, rows are keys."""
    # By row and column of D: accumulators of 4 bytes, operands of 2 that stay for all tiles.
    wide = {"forward": 1 + 0.5, "query": 1 + 1, "key": 2 + 1}[kernel] * BLOCK_D
    scores = 1 if kernel == "forward" else 2  # tiles of float32 at a time
    found = []
    for num_warps, a_warp in itertools.product((1, 2, 4, 8), (16, 32)):
        for columns in (16, 32, 64, 128):
            rows = num_warps * a_warp
            if rows <= 128 and a_warp * (wide + scores * columns) <= 32 * 230:
                M, N = (columns, rows) if kernel == "key" else (rows, columns)
                found.append((M, N, num_warps))
    return found


def rank(D: int, p: float) -> list[dict[str, Any]]:
    """Every candidate of every kernel at float16, best first by kernel."""
    case = next(
        c for c in shapes.every(turing.ARCH) if c.shape == f"D={D} p={p} T={shapes.CONTEXT} float16"
    )
    rows = []
    lists = {kernel: tiles(kernel, launch.block(D)) for kernel in KERNELS}
    for i in range(max(map(len, lists.values()))):
        tried = {kernel: found[min(i, len(found) - 1)] for kernel, found in lists.items()}

        def table(kernel: str, *_: Any, tried: dict[str, Tile] = tried) -> dict[str, int]:
            M, N, num_warps = tried[kernel]
            return dict(BLOCK_M=M, BLOCK_N=N, num_warps=num_warps, num_stages=1)

        with patch.object(attention_tiles, "table", table):
            made = aot.report(turing.ARCH, [case])
        for kernel, name in KERNELS.items():
            for row in made["kernels"]:
                if row["kernel"] == name and i < len(lists[kernel]):
                    M, N, _ = tried[kernel]
                    row |= dict(D=D, tile=f"{M} x {N}", per_pair=row["clocks"] / (M * N))
                    rows.append(row)
    return sorted(rows, key=_order)


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    unfit = row["stack"] > 0 or row["warps_per_sm"] == 0
    few = row["warps_per_sm"] < FEW_WARPS
    return list(KERNELS.values()).index(row["kernel"]), unfit, few, row["per_pair"]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m irongpt_kernels.candidates")
    parser.add_argument("--d", type=int, nargs="+", default=[64, 128], help="head dimensions")
    parser.add_argument("--p", type=float, choices=[0.0, 0.2], default=0.2, help="dropout")
    parser.add_argument("--json", action="store_true", help="JSON, with the clocks of every unit")
    args = parser.parse_args()
    if launch.INTERPRETED:
        parser.error("unset TRITON_INTERPRET: the interpreter compiles nothing")
    rows = [row for D in args.d for row in rank(D, args.p)]
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    print("kernel                            D   BM x BN  warps regs spill shared w/SM clk/1k by")
    for r in rows:
        print(
            f"{r['kernel']:33} {r['D']:3} {r['tile']:>9} {r['warps']:5} {r['registers']:5}"
            f" {r['stack']:5} {r['shared']:6} {r['warps_per_sm']:4} {1000 * r['per_pair']:6.0f}"
            f" {r['bound']}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

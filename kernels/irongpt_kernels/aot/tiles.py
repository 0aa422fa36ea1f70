"""
Compiles candidate tiles of the attention kernels, without a GPU, and sorts them by a clock model.

    python -m irongpt_kernels.aot.tiles [--arch sm_90] [--d 64 128] [--p 0.2] [--dtype X] [--json]

A candidate is a tile of BLOCK_M queries by BLOCK_N keys and a number of warps, each with 16 or 32
rows of the scores. Tiles whose values cannot fit the 255 registers of a thread are left out. In the
kernel with one program per head (`attention_head_backward`) a tile has BLOCK_N keys and all
queries, with 32 or 64 rows per warp. From sm_80 on a candidate also has one or two pipeline stages
(with two, the next tile is copied while the current one is computed), and some have a limit of
registers per thread. Each candidate is compiled, and `sass.clocks` estimates the clocks of its
inner loop on the units of an SM. First come the candidates that let an SM hold at least 8 warps,
sorted by clocks; then those with fewer warps, which cannot keep an SM busy; last those that spill
or do not fit an SM.

The clocks by which candidates are sorted are, on sm_75, those per query-key pair. From sm_80 on
they are the clocks for one head of 256 positions: each tile that intersects the lower triangle
counts completely, although a part of it may be masked. The clocks for a head are the largest of
three: those of the busiest unit of an SM, of the L2 traffic, and of the DRAM traffic, which is the
same for all tiles. Keys and values are read from L2 once per query tile (in the kernel of dK and
dV: queries and dout once per key tile).

Like `sass.clocks`, the model ignores latency, bank conflicts and dependences. The rates of L2, and
of HMMA on sm_90, are guesses. If the clocks of two tiles differ by less than a fifth, their order
on a GPU may be another; `irongpt tune` measures them.
"""

import argparse
import itertools
import json
import sys
from typing import Any, NamedTuple
from unittest.mock import Mock, patch

from irongpt_kernels.aot import __main__ as aot
from irongpt_kernels.aot import sass, shapes
from irongpt_kernels.fused import attention_tiles
from irongpt_kernels.runtime import launch, launch_table, turing

KERNELS = {
    "forward": "attention._fwd_kernel",
    "query": "attention_backward._bwd_dq_kernel",
    "key": "attention_backward._bwd_dkdv_kernel",
    "head": "attention_head_backward._bwd_head_kernel",
}
# TILES_PER_PROGRAM: how many tiles a program loads or stores outside its loop; for "head", whose
# loop covers all keys, also inside it. TENSORS: how many (B, H, T, D) tensors the launch reads from
# or writes to DRAM.
TILES_PER_PROGRAM = {"forward": 2, "query": 4, "key": 4, "head": 9}
TENSORS = {"forward": 4, "query": 6, "key": 6, "head": 8}
COLUMNS = {
    "kernel": ("kernel", 41), "D": ("D", 3), "BM x BN": ("tile", 9), "warps": ("warps", 5),
    "st": ("stages", 2), "regs": ("registers", 4), "spill": ("stack", 5), "shared": ("shared", 6),
    "w/SM": ("warps_per_sm", 4), "clk/1k": ("per_1000", 6), "head": ("slowest", 6),
    "by": ("bound", 9),
}  # fmt: skip
MIN_WARPS_PER_SM = 8
OTHER_REGISTERS = 64  # registers per thread, at least, for everything but the tiles
# Bytes per clock and SM. L2: 5,120 as in an A100, over the SMs of an A100 and of an H100.
# DRAM: A100 40 GB, H200.
L2 = {80: 5120 / 108, 90: 5120 / 132}
DRAM = {80: 10.2, 90: 20.7}


class Tile(NamedTuple):
    """A launch of an attention kernel."""

    BLOCK_M: int  # queries
    BLOCK_N: int  # keys
    num_warps: int
    num_stages: int = 1
    maxnreg: int = 0  # limit of registers per thread; 0: ptxas decides

    def __str__(self) -> str:
        return f"{self.BLOCK_M} x {self.BLOCK_N}"

    def options(self, kernel: str) -> launch_table.Options:
        """The options of a launch."""
        by_name = launch_table.OPTION_NAMES
        names = by_name[launch_table.HEADS[0] if kernel == "head" else f"attention {kernel}"]
        return {name: value for name, value in self._asdict().items() if value and name in names}


def tiles(kernel: str, BLOCK_D: int, arch: int = turing.ARCH, itemsize: int = 2) -> list[Tile]:
    """The candidates. The rows of the scores are divided among the warps. The kernel "key" (dK, dV)
    computes scores transposed, so its rows are keys."""
    if kernel == "head":
        fits = arch >= 80 and itemsize == 2 and BLOCK_D <= 64
        sizes = itertools.product((16, 32, 64), (4, 8), (1, 2)) if fits else ()
        return [Tile(shapes.CONTEXT, *size) for size in sizes]
    if itemsize == 4:  # scalar FMAs: larger tiles take minutes to compile, and spill
        return [Tile(*sizes) for sizes in itertools.product((16, 32), (16, 32), (2, 4, 8))]
    # Registers per row that stay through the loop: float32 accumulators and 16-bit operands.
    kept = {"forward": 1 + 0.5, "query": 1 + 1, "key": 2 + 1}[kernel] * BLOCK_D
    scores = 1 if kernel == "forward" else 2  # tiles of float32 at a time
    new = arch >= 80
    found = []
    for num_warps, rows_per_warp in itertools.product((2, 4, 8) if new else (1, 2, 4, 8), (16, 32)):
        for columns in (16, 32, 64, 128):
            rows = num_warps * rows_per_warp
            # Registers per thread, without addresses and masks.
            held = rows_per_warp * (kept + scores * columns) / 32
            if rows > 128 or held > 230:
                continue
            M, N = (columns, rows) if kernel == "key" else (rows, columns)
            found += [
                Tile(M, N, num_warps, stages, limit)
                for stages in ((1, 2) if new else (1,))
                for limit in (0, 168, 128)
                # A limit lets an SM hold more programs, but the kernel may spill.
                if not limit or (new and num_warps >= 4 and held + OTHER_REGISTERS <= limit)
            ]
    return found


def launches(key: launch_table.Key, arch: int) -> list[launch_table.Options]:
    """The candidate launch options of any kernel in `launch_table.OPTION_NAMES`."""
    kernel, size, itemsize = key
    if kernel.startswith("attention"):
        name = kernel.split()[1]
        return [tile.options(name) for tile in tiles(name, launch.block(size), arch, itemsize)]
    found = []
    gelu = kernel.startswith("gelu")
    for M, N, num_warps in itertools.product((1, 2, 4, 8), (256, 512), (1, 2, 4, 8)):
        elements_per_thread = M * (N if gelu else launch.block(size)) // (32 * num_warps)
        tile = dict(BLOCK_M=M, BLOCK_N=N, num_warps=num_warps)
        if not 8 <= elements_per_thread <= (16 if gelu else 32):
            continue  # too few loads in flight, or too many registers
        for more in (4, 8, 16) if kernel == "norm backward" else (1,):
            tile |= dict(warps_per_sm=more)
            found.append({name: tile[name] for name in launch_table.OPTION_NAMES[kernel]})
    return [x for i, x in enumerate(found) if x not in found[:i]]


def visited_tiles(tile: Tile, T: int) -> int:
    """In the kernels "forward", "query" and "key": the number of tiles of scores that the programs
    of one head visit, which are those that intersect the lower triangle. T is a multiple of BLOCK_M
    and of BLOCK_N."""
    return sum(-(-(m + tile.BLOCK_M) // tile.BLOCK_N) for m in range(0, T, tile.BLOCK_M))


def masked_tiles(kernel: str, tile: Tile, T: int) -> int:
    """How many of `visited_tiles` are in the masked loop: those that the diagonal crosses."""
    own, other = tile.BLOCK_M, tile.BLOCK_N
    if kernel == "key":
        own, other = other, own
    return sum(-(-(x + own) // other) - x // other for x in range(0, T, own))


def clocks_per_head(
    kernel: str, tile: Tile, loops: list[dict[str, float]], arch: int, D: int, size: int
) -> dict[str, float]:
    """Clocks by unit for a head of CONTEXT positions, from those of one pass of each inner loop.

    loops: in the order of the kernel's code. The compiler unrolls a masked loop that has a single
    pass, and `loops` lacks it; the clocks of an unmasked pass are then used for it. size: bytes of
    an element.
    """
    T = shapes.CONTEXT
    n = visited_tiles(tile, T)
    one = T * D * size  # bytes of a tensor of the head
    dram = TENSORS[kernel] * one / DRAM[arch]
    if kernel == "head":  # half of the keys with all rows, half with half of the rows
        each = T // 2 // tile.BLOCK_N
        return {unit: each * (loops[0][unit] + loops[-1][unit]) for unit in loops[0]} | dict(
            l2=TILES_PER_PROGRAM[kernel] * one / L2[arch], dram=dram
        )
    swept = tile.BLOCK_M if kernel == "key" else tile.BLOCK_N
    masked, plain = (loops[0], loops[-1]) if kernel == "key" else (loops[-1], loops[0])
    crossed = masked_tiles(kernel, tile, T)
    return {unit: crossed * masked[unit] + (n - crossed) * plain[unit] for unit in plain} | dict(
        l2=(TILES_PER_PROGRAM[kernel] * one + 2 * n * swept * D * size) / L2[arch],
        dram=dram,
    )


def rank(arch: int, D: int, p: float, dtype: str) -> list[dict[str, Any]]:
    """All candidates by kernel, the best first."""
    wanted = f"D={D} p={p} T={shapes.CONTEXT} {dtype}"
    case = next(c for c in shapes.every(arch) if c.shape == wanted)
    size = shapes.DTYPES[dtype].itemsize
    rows = []
    lists = {kernel: tiles(kernel, launch.block(D), arch) for kernel in KERNELS}
    for i in range(max(map(len, lists.values()))):
        tried = {kernel: found[min(i, len(found) - 1)] for kernel, found in lists.items() if found}

        def default_tiles(kernel: str, *_: Any, tried: dict[str, Tile] = tried) -> dict[str, int]:
            return tried[kernel].options(kernel)

        made: dict[str, dict[str, Any]] = {}
        for head in [None, *(tile.options("head") for tile in lists["head"][i : i + 1])]:
            chosen = Mock(return_value=head)
            with (
                patch.object(attention_tiles, "default_tiles", default_tiles),
                patch.object(attention_tiles, "head_options", chosen),
            ):
                made |= {row["kernel"]: row for row in aot.report(arch, [case])["kernels"]}
        for kernel, name in KERNELS.items():
            if i < len(lists[kernel]):
                row, tile = made[name], tried[kernel]
                row |= dict(D=D, tile=str(tile), stages=tile.num_stages, limit=tile.maxnreg)
                row["per_pair"] = row["clocks"] / (tile.BLOCK_M * tile.BLOCK_N)
                row["per_1000"] = round(1000 * row["per_pair"])
                if arch >= 80:
                    row["head"] = clocks_per_head(kernel, tile, row["loops"], arch, D, size)
                    row["bound"] = max(row["head"], key=row["head"].__getitem__)
                    row["slowest"] = round(row["head"][row["bound"]])
                rows.append(row)
    return sorted(rows, key=_order)


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    unfit = row["stack"] > 0 or row["warps_per_sm"] == 0
    few = row["warps_per_sm"] < MIN_WARPS_PER_SM
    cost: tuple[float, ...] = (row["per_pair"],)
    if "head" in row:  # DRAM may limit all tiles equally; then the rest of the work decides
        cost = max(row["head"].values()), sum(row["head"].values())
    return list(KERNELS.values()).index(row["kernel"]), unfit, few, *cost


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m irongpt_kernels.aot.tiles",
        description="Compile candidate tiles of attention, and rank them by a cost model.",
    )
    arches = [f"sm_{a}" for a in sass.SMS]
    parser.add_argument("--arch", choices=arches, default="sm_75", help="architecture [sm_75]")
    parser.add_argument(
        "--d", type=int, nargs="+", default=[64, 128], help="head dimensions [64 128]"
    )
    parser.add_argument("--p", type=float, choices=[0.0, 0.2], default=0.2, help="dropout [0.2]")
    dtypes = ["float16", "bfloat16"]
    parser.add_argument("--dtype", choices=dtypes, default="float16", help="of q, k, v [float16]")
    parser.add_argument("--json", action="store_true", help="JSON, with the clocks of every unit")
    args = parser.parse_args()
    arch = int(args.arch.removeprefix("sm_"))
    if launch.INTERPRETED:
        parser.error("unset TRITON_INTERPRET: the interpreter compiles nothing")
    if arch < 80 and args.dtype == "bfloat16":
        parser.error(f"{args.arch} has no bfloat16")
    rows = [row for D in args.d for row in rank(arch, D, args.p, args.dtype)]
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    print(aot.table(rows, {k: x for k, x in COLUMNS.items() if arch >= 80 or k != "head"}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

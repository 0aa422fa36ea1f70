"""
Compiles every kernel as its launcher launches it, without a GPU, and reports the results.

    python -m irongpt_kernels.aot --arch sm_75 [--json] [--dump DIR] [--only attention] [--stock]

The ops are called on CPU tensors. Each launch compiles its kernel as on a GPU: for the default
tiles, and for the dtypes, constants and alignment of the arguments. It does not run the kernel, so
the ops return uninitialized tensors.

| column | |
|---|---|
| regs, spill | registers per thread; bytes per thread in local memory, where registers spill to |
| shared, w/SM | bytes of shared memory per program; warps that an SM holds at a time |
| HMMA, FFMA, MUFU, local | tensor-core, scalar multiply-add, special-function and local-memory |
| | instructions of one innermost loop: that with the most HMMA, or if none has HMMA, the most |
| | FFMA (without a loop: of the kernel). local: the most of any such loop |
| MB, GFLOP | least traffic and FLOPs of the op (from `op_specs`), not of this kernel alone. If |
| | the kernel's name has "fwd", they are those of the complete forward, else of the complete |
| | backward, or of the whole op if it has no backward. The batch is that of the GPT's preset |
| | iron (16,384 rows, or 64 x 6 heads of 256 positions), whatever shape the kernel is compiled |
| | at. For ops of a decoding step the batch is one sequence; for their linear layers only the |
| | bytes of the weight count, and GFLOP is 0 |
| clk, by | kernels with a matmul: `sass.clocks` of the loop whose instructions are counted, and |
| | the unit that is busy longest |
| el/call | attention with dropout: `sass.elements_per_call`, an estimate of how many elements |
| | share a call of the random generator; if several loops have most HMMA, the smallest |
"""

import argparse
import contextlib
import json
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import triton
from triton.runtime.jit import JITFunction

from irongpt_kernels import fused
from irongpt_kernels.aot import sass, shapes
from irongpt_kernels.runtime import fake_driver, launch

Columns = dict[str, tuple[str, int]]  # heading: key of a row, width
COLUMNS: Columns = {
    "kernel": ("kernel", 36), "shape": ("shape", 30), "warps": ("warps", 5),
    "regs": ("registers", 5), "spill": ("stack", 6), "shared": ("shared", 7),
    "w/SM": ("warps_per_sm", 5), "HMMA": ("HMMA", 5), "FFMA": ("FFMA", 5), "MUFU": ("MUFU", 5),
    "local": ("LOCAL", 6), "MB": ("megabytes", 7), "GFLOP": ("gigaflops", 6),
    "clk": ("clocks", 6), "by": ("bound", 8), "el/call": ("per_call", 7),
}  # fmt: skip


@contextlib.contextmanager
def compiling(arch: int, done: Any, failed: Any, stock: bool = False) -> Iterator[None]:
    """A context in which a launch compiles for `arch` and runs nothing.

    done(function, compiled kernel) or failed(function, exception) is called for each launch.
    stock: compile as an unmodified Triton does, without the hook of `runtime.turing`. The context
    is not thread-safe, because it replaces Triton's launch function.
    """
    original = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        try:
            kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception as e:  # every kernel is tried, and the report names all that fail
            failed(self, e)
        else:
            done(self, kernel)

    with (
        fake_driver.gpu(arch, device=arch, stock=stock),
        patch.object(JITFunction, "run", compile_only),
        patch.object(launch, "architecture", lambda device: arch),
    ):
        yield


def report(
    arch: int, cases: list[shapes.Case], stock: bool = False, dump: Path | None = None,
    quick: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Compiles every kernel that the cases launch. Returns "kernels", a dict of facts for each;
    "failed", a line for each that does not compile; and "warnings" about tensor cores.

    quick: do not disassemble kernels that have no matmul and no local memory. Disassembling takes
    longer than all else if the kernel is in Triton's cache and its SASS is not.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    failed: dict[str, None] = {}
    case, clock = cases[0], time.perf_counter()

    def done(function: JITFunction, kernel: Any) -> None:
        nonlocal clock
        name = f"{function.fn.__module__.split('.')[-1]}.{function.fn.__name__}"
        if (name, kernel.hash) in rows:
            return
        seconds = time.perf_counter() - clock
        row = dict(kernel=name, op=case.op, shape=case.shape, dtype=case.dtype, seconds=seconds)
        cost = case.cost(backward="fwd" not in name)
        rows[name, kernel.hash] = row | _facts(arch, kernel, cost, quick)
        if dump:
            _dump(dump / f"{name}-{case.shape.replace(' ', '-')}", kernel)
        clock = time.perf_counter()

    def broken(function: JITFunction, e: Exception) -> None:
        failed[f"{function.fn.__name__} in {case.op} {case.shape}: {type(e).__name__}: {e}"] = None

    with warnings.catch_warnings(record=True) as caught, compiling(arch, done, broken, stock):
        warnings.simplefilter("always")
        for case in cases:  # the functions above read it
            clock = time.perf_counter()
            try:
                case.results(fused, case.inputs())
            except Exception:
                failed[f"{case.op} {case.shape}: {traceback.format_exc()[-500:]}"] = None
    warned = sorted({str(w.message) for w in caught if "tensor cores" in str(w.message)})
    found = dict(kernels=list(rows.values()), failed=list(failed), warnings=warned)
    return dict(arch=arch, triton=triton.__version__, **found)


def _facts(arch: int, kernel: Any, cost: tuple[float, float], quick: bool) -> dict[str, Any]:
    """The facts of a compiled kernel by the keys of COLUMNS, and some more."""
    registers, stack = sass.usage(kernel.asm["cubin"])
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    dot = "tt.dot" in kernel.asm["ttir"]
    facts = dict(
        warps=warps,
        registers=registers,
        stack=stack,
        shared=shared,
        warps_per_sm=sass.warps_per_sm(arch, registers, shared, warps),
        megabytes=cost[0] / 1e6,
        gigaflops=cost[1] / 1e9,
        dot=dot,
        bf16="bf16" in kernel.asm["ttir"] or "bf16" in kernel.asm["ptx"],
    )
    if quick and not dot and not stack:
        return facts
    instructions = sass.read(kernel.asm["cubin"])
    loops, whole = sass.hot_loops(instructions), sass.count(instructions)
    shortest = min(loops, key=len)
    inner = sass.count(shortest)
    facts |= {x: inner[x] for x in ("HMMA", "FFMA", "MUFU")}
    facts["LOCAL"] = max(sass.count(loop)["LOCAL"] for loop in loops)
    facts |= {f"kernel_{x}": whole[x] for x in ("HMMA", "FFMA", "LOCAL")}
    if dot:
        inner_loops = sass.inner_loops(instructions)  # in order of address
        matmul_loops = [x for x in inner_loops if sass.count(x)["HMMA"]] or loops
        every = [sass.clocks(loop, warps, arch) for loop in matmul_loops]
        units = sass.clocks(shortest, warps, arch)
        bound = max(units, key=lambda unit: units[unit])
        facts |= dict(clocks=units[bound], bound=bound, units=units, loops=every)
        names = kernel.src.fn.arg_names
        constants = {names[at[0]]: x for at, x in kernel.src.constants.items() if len(at) == 1}
        if constants.get("THRESHOLD"):  # with SPLIT `loops` has only that over all BLOCK_M rows
            elements = constants["BLOCK_M"] * constants["BLOCK_N"] // (32 * warps)
            facts["per_call"] = min(sass.elements_per_call(x, elements) for x in loops)
    return facts


def _dump(stem: Path, kernel: Any) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    cubin = kernel.asm["cubin"]
    stem.with_name(stem.name + ".cubin").write_bytes(cubin)
    stem.with_name(stem.name + ".ptx").write_text(kernel.asm["ptx"])
    stem.with_name(stem.name + ".sass").write_text(sass.disassembled(cubin))


def table(rows: list[dict[str, Any]], columns: Columns = COLUMNS) -> str:
    """The rows as text, a line each under the headings."""
    lines = [" ".join(_cell(name, width) for name, (_, width) in columns.items())]
    for row in rows:
        cells = (_cell(row.get(key, ""), width) for key, width in columns.values())
        lines.append(" ".join(cells))
    return "\n".join(line.rstrip() for line in lines)


def _cell(x: Any, width: int) -> str:
    if isinstance(x, str):
        return x.ljust(width) if width > 8 else x.rjust(width)
    return (f"{x:.1f}" if isinstance(x, float) else str(x)).rjust(width)


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 1 if a kernel did not compile."""
    parser = argparse.ArgumentParser(
        prog="python -m irongpt_kernels.aot",
        description="Compile every kernel without a GPU, and report the results.",
    )
    help, arches = "architecture to compile for [sm_75]", [f"sm_{a}" for a in sass.SMS]
    parser.add_argument("--arch", choices=arches, default="sm_75", help=help)
    parser.add_argument("--json", action="store_true", help="JSON in place of the table")
    parser.add_argument("--dump", type=Path, metavar="DIR", help="write cubin, PTX and SASS there")
    only = "compile only ops and shapes whose name contains TEXT"
    parser.add_argument("--only", default="", metavar="TEXT", help=only)
    quick = "compile only the shapes of the tests; disassemble only kernels with a matmul or spills"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--dtype", choices=list(shapes.DTYPES), help="only inputs of this dtype")
    stock = "compile as unmodified Triton does, on sm_75 without tensor cores"
    parser.add_argument("--stock", action="store_true", help=stock)
    args = parser.parse_args(argv)
    if launch.INTERPRETED:
        parser.error("unset TRITON_INTERPRET: the interpreter compiles nothing")
    arch = int(args.arch.removeprefix("sm_"))
    cases = [
        c
        for c in (shapes.representative if args.quick else shapes.every)(arch)
        if args.only in f"{c.op} {c.shape}" and (args.dtype is None or c.dtype == args.dtype)
    ]
    if not cases:
        parser.error(f"no op and shape for {args.arch} contains {args.only!r} in such a dtype")
    made = report(arch, cases, args.stock, args.dump, args.quick)
    if args.json:
        print(json.dumps(made, indent=1))
    else:
        print(f"{args.arch}, Triton {triton.__version__}: compiled, not run\n")
        print(table(made["kernels"]))
    for line in made["warnings"] + made["failed"]:
        print(line, file=sys.stderr)
    return 1 if made["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())

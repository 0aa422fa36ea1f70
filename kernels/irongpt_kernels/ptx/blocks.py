"""A `Program`'s basic blocks as Python functions over NumPy arrays.

Between blocks the value of a register is an array in the list R. Within a block the value is in
local variables, up to three views of one array: as unsigned (u), signed (s) and floating-point (f)
numbers. A predicate has a single view, of booleans (b). When a block ends, it stores registers in
R for the threads in its mask, but only registers that some block reads before writing them.

The function of a block takes (S, R, m): S is the batch of CTAs, R the registers, and m the mask of
the threads that run the block (None: all). It returns the next block: its number (-1 at the end of
the kernel), or (predicate, block if true, block if false) for a branch.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from irongpt_kernels.ptx import arithmetic as arith
from irongpt_kernels.ptx.instructions import Instructions
from irongpt_kernels.ptx.operands import Unsupported
from irongpt_kernels.ptx.parse import Instruction, Location, Program

_DTYPES = {1: np.bool_, 16: arith.u2, 32: arith.u4, 64: arith.u8}  # by bits


class Code:
    """The functions of a program's blocks. dtypes: of each register that R has to hold. barriers:
    for each block that ends with a barrier, by its number, the location of the barrier. granule:
    see `Operands`."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.sizes = [len(block) for block in program.blocks]
        self.barriers: dict[int, Location] = {}
        code = Instructions(program)
        parts = [self._translated(code, b, block) for b, block in enumerate(program.blocks)]
        self.granule = code.granule
        self.dtypes = {code.ids[r]: _DTYPES[program.regs[r]] for r in code.loaded}
        source = []
        for b, (lines, written, follows) in enumerate(parts):
            kept = [(f"R[{code.ids[r]}]", x) for r, x in written.items() if r in code.loaded]
            if kept:
                lines += ["if m is None:", *(f"    {place} = {x}" for place, x in kept)]
                lines += [
                    "else:",
                    *(f"    {place} = np.where(m, {x}, {place})" for place, x in kept),
                ]
            source += [f"def block{b}(S, R, m):", *(f"    {x}" for x in lines)]
            source.append(f"    return {follows}")
        exec(compile("\n".join(source), f"<{program.name}>", "exec"), code.names)
        count = len(program.blocks)
        self.functions: list[Callable[..., Any]] = [code.names[f"block{b}"] for b in range(count)]

    def _translated(
        self, code: Instructions, b: int, block: list[Instruction]
    ) -> tuple[list[str], dict[str, str], str]:
        """The lines of a block, what it assigns to each register, and the block that follows."""
        code.begin()
        follows = str(b + 1)
        for ins in block:
            if ins.is_barrier:
                self.barriers[b] = ins.location
            if ins.name in ("bra", "ret"):
                to = self.program.labels[ins.args[0]] if ins.name == "bra" else -1
                follows = f"({code.guard(ins)}, {to}, {b + 1})" if ins.pred else str(to)
                continue
            try:
                code.emit(ins)
            except (KeyError, IndexError, ValueError) as error:
                raise Unsupported(f"line {ins.line}: {ins}: {error!r}") from error
        return code.lines, {r: code.home(r) for r in code.written}, follows

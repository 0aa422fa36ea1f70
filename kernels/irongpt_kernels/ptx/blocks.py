"""A `Program`'s basic blocks as Python functions over NumPy arrays.

Between blocks the value of a register is an array in the list R. Within a block local variables
hold it, up to three views of the same array: as unsigned (u), signed (s) and floating-point (f)
numbers. A predicate has a single view, of booleans (b). Only registers that another block reads are
written back, under the mask of the block's threads.

The function of a block takes (S, R, m): S is the batch of CTAs, R the registers, and m the mask of
the threads that run the block (None: all). It returns the next block: its number (-1 at the end of
the kernel); (predicate, block if true, block if false) for a branch; or (None, block) at a barrier,
if the code was made with `split`.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from irongpt_kernels.ptx import arithmetic as arith
from irongpt_kernels.ptx.instructions import Instructions
from irongpt_kernels.ptx.operands import Unsupported
from irongpt_kernels.ptx.parse import Instruction, Program

_WORD = re.compile(r"%?[\w$]+")
_NO_RESULT = ("st", "stmatrix", "bar", "bra", "cp", "fence", "ret")
_DTYPES = {"pred": np.bool_, "b16": arith.u2, "b32": arith.u4, "b64": arith.u8}


class Code:
    """The functions of a program's blocks. split: a block ends at each barrier, so that warps can
    run one after the other."""

    def __init__(self, program: Program, split: bool = False) -> None:
        self.program = program = _split(program) if split else program
        self.ids = {r: i for i, r in enumerate(program.regs)}
        self.cross = _registers_between_blocks(program)
        self.dtypes = {self.ids[r]: _DTYPES[program.regs[r]] for r in self.cross}
        self.sizes = [len(block) for block in program.blocks]
        # The names in the code: functions of `arithmetic`, constants, locations of instructions.
        self.names: dict[str, Any] = {k: v for k, v in vars(arith).items() if k[0] != "_"}
        source = [
            line
            for b, block in enumerate(program.blocks)
            for line in self._function(b, block, split)
        ]
        self.source = "\n".join(source)
        exec(compile(self.source, f"<{program.name}>", "exec"), self.names)
        count = len(program.blocks)
        self.functions: list[Callable[..., Any]] = [self.names[f"block{b}"] for b in range(count)]

    def _function(self, b: int, block: list[Instruction], split: bool) -> list[str]:
        code = Instructions(self.program, self.ids, self.names)
        follows: str = str(b + 1)
        for ins in block:
            if ins.name in ("bra", "ret"):
                to = self.program.labels[ins.args[0]] if ins.name == "bra" else -1
                follows = f"({code.guard(ins)}, {to}, {b + 1})" if ins.pred else str(to)
            elif split and _is_barrier(ins):
                follows = f"(None, {b + 1})"
            else:
                try:
                    code.emit(ins)
                except (KeyError, IndexError, ValueError) as error:
                    raise Unsupported(f"line {ins.line}: {ins}: {error!r}") from error
        back = [r for r in code.written if r in self.cross]
        values = [code.read(r, "b" if self.program.regs[r] == "pred" else "u") for r in back]
        lines = [*code.lines]
        if back:
            places = [f"R[{self.ids[r]}]" for r in back]
            pairs = list(zip(places, values, strict=True))
            lines += ["if m is None:", *(f"    {place} = {x}" for place, x in pairs)]
            lines += ["else:", *(f"    {place} = np.where(m, {x}, {place})" for place, x in pairs)]
        return [f"def block{b}(S, R, m):", *(f"    {x}" for x in lines), f"    return {follows}"]


def _is_barrier(ins: Instruction) -> bool:
    return ins.op.startswith("bar.sync")


def _split(program: Program) -> Program:
    blocks: list[list[Instruction]] = []
    moved: dict[int, int] = {}
    for b, block in enumerate(program.blocks):
        moved[b] = len(blocks)
        blocks.append([])
        for ins in block:
            blocks[-1].append(ins)
            if _is_barrier(ins):
                blocks.append([])
    labels = {name: moved[b] for name, b in program.labels.items()}
    return replace(program, blocks=blocks, labels=labels)


def _registers_between_blocks(program: Program) -> set[str]:
    """Registers that more than one block uses, or that a block reads before it writes them."""
    cross: set[str] = set()
    home: dict[str, int] = {}
    for b, block in enumerate(program.blocks):
        defined: set[str] = set()
        for ins in block:
            reads, writes = _reads_and_writes(program, ins)
            cross |= reads - defined
            defined |= writes
            cross |= {r for r in reads | writes if home.setdefault(r, b) != b}
    return cross


def _reads_and_writes(program: Program, ins: Instruction) -> tuple[set[str], set[str]]:
    reads = {ins.pred} if ins.pred else set()
    writes: set[str] = set()
    for i, arg in enumerate(ins.args):
        found = {w for w in _WORD.findall(arg) if w in program.regs}
        if i == 0 and ins.name not in _NO_RESULT:
            writes |= found
            reads |= found if ins.name == "wgmma" or ins.pred else set()
        else:
            reads |= found
    return reads, writes

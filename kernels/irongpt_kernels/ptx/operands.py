"""Operands of instructions as Python expressions, and assignments to registers."""

import re
from typing import Any

import numpy as np

from irongpt_kernels.ptx import arithmetic
from irongpt_kernels.ptx.parse import Instruction, Program

NUMPY = {  # names of dtypes in `arithmetic`, by form and bits
    "u": {8: "u1", 16: "u2", 32: "u4", 64: "u8"},
    "s": {8: "i1", 16: "i2", 32: "i4", 64: "i8"},
    "f": {16: "f2", 32: "f4", 64: "f8"},
}
SPECIAL = {
    "%tid.x": "S.tid",
    **dict.fromkeys(("%tid.y", "%tid.z"), "S.const(0, u4)"),
    **{f"%ctaid.{c}": f"S.ctaid[{i}]" for i, c in enumerate("xyz")},
    **{f"%nctaid.{c}": f"S.const(S.launch.grid[{i}], u4)" for i, c in enumerate("xyz")},
    "%ntid.x": "S.const(S.cta_threads, u4)",
    "%laneid": "S.lane.astype(u4)",
}
_TYPE = re.compile(r"([busf])(\d+)$")


class Unsupported(NotImplementedError):  # noqa: N818
    """An instruction that the emulator does not know."""


class Operands:
    """Generates the Python lines of a program, block by block.

    names: the global names that the lines may use: functions of `arithmetic`, constants, locations.
    form: the view of a register, u, s, f or b (see `blocks`). loaded: registers that a block reads
    before it writes them. granule: for each space of memory, a number of bytes that divides the
    size of every access to it.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.ids = {reg: i for i, reg in enumerate(program.regs)}
        self.names: dict[str, Any] = {k: v for k, v in vars(arithmetic).items() if k[0] != "_"}
        self.loaded: set[str] = set()
        self.granule = {"param": 8, "global": 8, "shared": 4}
        self.begin()

    def begin(self) -> None:
        """Begins a block."""
        self.lines: list[str] = []
        self.forms: dict[str, set[str]] = {}  # register: the forms that exist as local variables
        self.written: dict[str, None] = {}
        self.temporaries = 0

    def put(self, line: str) -> None:
        self.lines.append(line)

    def temporary(self, expression: str) -> str:
        self.temporaries += 1
        self.put(f"t{self.temporaries} = {expression}")
        return f"t{self.temporaries}"

    def is_register(self, a: str) -> bool:
        return a in self.program.regs

    def local(self, reg: str, form: str) -> str:
        return f"v{self.ids[reg]}{form}"

    def at(self, ins: Instruction) -> str:
        """The guard, the mask, and the name of the instruction's `Location`, for reports."""
        place = f"place{len(self.names)}"
        self.names[place] = ins.location
        return f"({self.guard(ins)}, m, {place})"

    def guard(self, ins: Instruction) -> str:
        if ins.pred is None:
            return "None"
        return ("~" if ins.negated else "") + self.read(ins.pred, "b")

    def typed(self, suffix: str) -> tuple[str, int]:
        """("s", 32) for s32. b counts as u."""
        found = _TYPE.match(suffix)
        if not found:
            raise Unsupported(f"an operation on {suffix}")
        kind, bits = found.groups()
        return "u" if kind == "b" else kind, int(bits)

    def vector(self, a: str) -> list[str]:
        return [x.strip() for x in a[1:-1].split(",")] if a.startswith("{") else [a]

    def packed(self, words: list[str], bits: int) -> str:
        """Packs words into one of `bits` bits, the first into the lowest bits."""
        if len(words) == 1:
            return words[0]
        each, t = bits // len(words), NUMPY["u"][bits]
        return " | ".join(f"({x}.astype({t}) << {t}({i * each}))" for i, x in enumerate(words))

    def unpacked(self, word: str, bits: int, count: int) -> list[str]:
        """The `count` parts of a word of `bits` bits, the lowest first."""
        if count == 1:
            return [word]
        each, t = bits // count, NUMPY["u"][bits]
        return [f"({word} >> {t}({i * each})).astype({NUMPY['u'][each]})" for i in range(count)]

    # Reading ------------------------------------------------------------------------------------

    def read(self, reg: str, form: str) -> str:
        """A register in its declared width."""
        bits = self.program.regs[reg]
        if reg not in self.forms:
            self.loaded.add(reg)
            home = "b" if bits == 1 else "u"
            self.put(f"{self.local(reg, home)} = R[{self.ids[reg]}]")
            self.forms[reg] = {home}
        have = self.forms[reg]
        if form not in have:
            dtype = NUMPY[form][bits]
            self.put(f"{self.local(reg, form)} = {self.local(reg, max(have))}.view({dtype})")
            have.add(form)
        return self.local(reg, form)

    def value(self, a: str, form: str, bits: int) -> str:
        """An operand as an expression of this form and width: a register, or a scalar constant."""
        if a in SPECIAL:
            return self._as(SPECIAL[a], form, bits)
        if not self.is_register(a):
            n, unsigned = self.number(a, bits), NUMPY["u"][bits]
            name = f"k{form}{bits}_{n:x}"
            raw = np.array(n, dtype=self.names[unsigned])
            self.names[name] = raw.view(self.names[NUMPY[form][bits]])[()]
            return name
        have = self.program.regs[a]
        if have == 1:
            return self.read(a, "b")
        if have == bits:
            return self.read(a, form)
        return self._as(f"{self.read(a, 'u')}.astype({NUMPY['u'][bits]})", form, bits)

    def array(self, a: str, form: str, bits: int) -> str:
        """As `value`, but a constant is an array too."""
        if self.is_register(a) or a in SPECIAL:
            return self.value(a, form, bits)
        n = self.number(a, bits)
        return self._as(f"S.const({n}, {NUMPY['u'][bits]})", form, bits)

    def _as(self, unsigned: str, form: str, bits: int) -> str:
        return unsigned if form == "u" else f"{unsigned}.view({NUMPY[form][bits]})"

    def number(self, a: str, bits: int) -> int:
        """A constant as the bits of an unsigned number; a symbol is its address."""
        if a[:2].lower() in ("0f", "0d"):
            n = int(a[2:], 16)
        elif a in self.program.params:
            n = self.program.params[a][0]
        elif a == "global_smem":  # all of a CTA's shared memory
            n = 0
        else:
            n = int(a.rstrip("U"), 0)
        return n & ((1 << bits) - 1)

    def immediate(self, a: str) -> int:
        """An operand that has to be a constant."""
        if self.is_register(a):
            raise Unsupported(f"{a} in place of a constant")
        return int(a, 0)

    def predicate(self, a: str) -> str:
        if a.startswith("!"):
            return f"~{self.predicate(a[1:])}"
        if self.is_register(a):
            return self.read(a, "b")
        return f"S.const({bool(int(a, 0))}, np.bool_)"

    def address(self, a: str) -> str:
        """[register + n] or [symbol + n] as an int64 array."""
        found = re.fullmatch(r"([^+-]+)\+?(-?\w+)?", a[1:-1].replace(" ", ""))
        assert found, a
        base, offset = found.group(1), int(found.group(2) or "0", 0)
        if not self.is_register(base):
            return f"S.const({self.number(base, 64) + offset}, i8)"
        wide = self.program.regs[base] == 64
        x = self.read(base, "s") if wide else f"{self.read(base, 'u')}.astype(i8)"
        return f"{x} + {offset}" if offset else x

    # Writing ------------------------------------------------------------------------------------

    def home(self, reg: str) -> str:
        """The value of a register that the block has written, in the form in which R holds it."""
        have, bits = self.forms[reg], self.program.regs[reg]
        form = "b" if bits == 1 else "u"
        if form in have:
            return self.local(reg, form)
        return f"{self.local(reg, max(have))}.view({NUMPY['u'][bits]})"

    def set(self, reg: str, expression: str, form: str, ins: Instruction) -> None:
        """Assigns a value of the register's width, where the instruction's guard is true."""
        if reg == "_":
            return
        if self.program.regs[reg] == 1:
            form = "b"
        if ins.pred is not None:
            p, old = self.guard(ins), self.read(reg, form)
            expression = f"np.where({p}, {expression}, {old})"
        self.put(f"{self.local(reg, form)} = {expression}")
        self.forms[reg] = {form}
        self.written[reg] = None

    def widen(self, reg: str, expression: str, form: str, bits: int, ins: Instruction) -> None:
        """Assigns an integer of `bits` bits to a register of any width. form s extends the sign."""
        if reg == "_":
            return
        have = self.program.regs[reg]
        if have != bits:
            expression = f"({expression}).astype({NUMPY[form][have]})"
        self.set(reg, expression, form, ins)

"""PTX instructions that compute within one thread, as lines of Python: a method op_NAME each.

A method takes the instruction, its suffixes (`mods`) and its operands. What it does not know raises
`Unsupported`.
"""

from irongpt_kernels.ptx.operands import NUMPY, WIDTH, Operands, Unsupported
from irongpt_kernels.ptx.parse import Instruction

_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_COMPARE |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
_ROUND = {"rzi": "np.trunc", "rni": "np.rint", "rmi": "np.floor", "rpi": "np.ceil"}
_LOGIC = {"and": "&", "or": "|", "xor": "^"}
_FUNCTIONS = {"ex2": "np.exp2({})", "lg2": "np.log2({})", "tanh": "np.tanh({})"}
_FUNCTIONS |= {"sqrt": "np.sqrt({})", "rsqrt": "1.0 / np.sqrt({})", "rcp": "1 / {}"}
_HALVES = {  # dtype: to float64, from float64, the places of its values in a word
    "f16": ("half_to_f8", "half_of_f8", (0,)),
    "bf16": ("bf16_to_f8", "bf16_of_f8", (0,)),
    "f16x2": ("half_to_f8", "half_of_f8", (0, 16)),
    "bf16x2": ("bf16_to_f8", "bf16_of_f8", (0, 16)),
}
Mods = list[str]
Args = list[str]


class Arithmetic(Operands):
    """Instructions whose result depends on registers of the thread alone."""

    def require(self, condition: bool, ins: Instruction) -> None:
        if not condition:
            raise Unsupported(str(ins))

    # Arithmetic ---------------------------------------------------------------------------------

    def floats(self, mods: Mods, args: Args, bits: int) -> list[str]:
        values = [self.array(args[0], "f", bits)]
        values += [self.value(x, "f", bits) for x in args[1:]]
        return [f"ftz({x})" for x in values] if "ftz" in mods else values

    def set_float(self, ins: Instruction, mods: Mods, reg: str, expression: str) -> None:
        self.set(reg, f"ftz({expression})" if "ftz" in mods else expression, "f", ins)

    def halves(self, ins: Instruction, mods: Mods, a: Args, expression: str) -> None:
        """16-bit floats, one or two in a register: in float64, rounded once."""
        self.require(not {*mods[:-1]} - {"rn"}, ins)
        widen, narrow, shifts = _HALVES[mods[-1]]
        bits = 16 * len(shifts)
        t, parts = NUMPY["u"][bits], []
        for at in shifts:
            for name, x in zip("xyz", a[1:], strict=False):
                self.put(f"{name} = {widen}(({self.array(x, 'u', bits)} >> {t}({at})).astype(u2))")
            parts.append(self.temporary(f"{narrow}({expression}).astype({t}) << {t}({at})"))
        self.set(a[0], " | ".join(parts), "u", ins)

    def op_add(self, ins: Instruction, mods: Mods, a: Args) -> None:
        sign = {"add": "+", "sub": "-", "mul": "*"}[ins.name]
        if mods[-1] in _HALVES:
            return self.halves(ins, mods, a, f"x {sign} y")
        if mods[-1] in ("s16x2", "u16x2"):
            x, y = self.array(a[1], "u", 32), self.array(a[2], "u", 32)
            return self.set(a[0], f"({x}.view(u2) {sign} {y}.view(u2)).view(u4)", "u", ins)
        form, bits = self.typed(mods[-1])
        if form == "f":
            x, y = self.floats(mods, a[1:3], bits)
            return self.set_float(ins, mods, a[0], f"{x} {sign} {y}")
        x, y = self.array(a[1], "u", bits), self.value(a[2], "u", bits)
        return self.set(a[0], f"{x} {sign} {y}", "u", ins)

    op_sub = op_add

    def op_mul(self, ins: Instruction, mods: Mods, a: Args) -> None:
        if mods[-1] in _HALVES or mods[-1][0] == "f":
            return self.op_add(ins, mods, a)
        return self.multiply(ins, mods, a)

    def op_mad(self, ins: Instruction, mods: Mods, a: Args) -> None:
        if mods[-1][0] == "f":
            return self.op_fma(ins, mods, a)
        return self.multiply(ins, mods, a)

    def multiply(self, ins: Instruction, mods: Mods, a: Args) -> None:
        """Integers: the lower half of the product, the upper one, or all of it; a[3] is added."""
        form, bits = self.typed(mods[-1])

        def added(form: str, bits: int) -> str:
            return f" + {self.value(a[3], form, bits)}" if len(a) > 3 else ""

        if mods[0] == "lo":
            x, y = self.array(a[1], "u", bits), self.value(a[2], "u", bits)
            return self.set(a[0], f"{x} * {y}{added('u', bits)}", "u", ins)
        if bits == 64:
            self.require(mods[0] == "hi" and form == "u", ins)
            x, y = self.array(a[1], "u", 64), self.value(a[2], "u", 64)
            return self.set(a[0], f"mulhi_u8({x}, {y}){added('u', 64)}", "u", ins)
        t = NUMPY[form][2 * bits]
        x, y = self.array(a[1], form, bits), self.value(a[2], form, bits)
        product = f"({x}.astype({t}) * {y}.astype({t}))"
        if mods[0] == "wide":
            return self.set(a[0], f"{product}{added(form, 2 * bits)}", form, ins)
        upper = f"({product} >> {t}({bits})).astype({NUMPY[form][bits]})"
        return self.set(a[0], f"{upper}{added(form, bits)}", form, ins)

    def op_fma(self, ins: Instruction, mods: Mods, a: Args) -> None:
        if mods[-1] in _HALVES:
            return self.halves(ins, mods, a, "x * y + z")
        self.require(mods[-1] == "f32", ins)
        values = ", ".join(self.floats(mods, a[1:4], 32))
        return self.set_float(ins, mods, a[0], f"fma32({values})")

    def op_div(self, ins: Instruction, mods: Mods, a: Args) -> None:
        form, bits = self.typed(mods[-1])
        if form != "f":
            x, y = self.array(a[1], form, bits), self.array(a[2], form, bits)
            return self.set(a[0], f"{form}{ins.name}({x}, {y})", form, ins)
        x, y = self.floats(mods, a[1:3], bits)
        if "full" not in mods and "approx" not in mods:
            return self.set_float(ins, mods, a[0], f"{x} / {y}")
        x, y = self.temporary(x), self.temporary(y)
        seed = f"{x}.view(u4) ^ ({y}.view(u4) << u4(1))"
        true = f"{x}.astype(f8) / {y}"
        return self.set_float(ins, mods, a[0], f"approximate('div', {x}, {true}, {seed}, S.noise)")

    op_rem = op_div

    def op_ex2(self, ins: Instruction, mods: Mods, a: Args) -> None:
        """sqrt and rcp can be exact (rn). An approximation is the true value, rounded, unless there
        is noise."""
        (x,) = self.floats(mods, a[1:2], self.typed(mods[-1])[1])
        if "rn" in mods:
            return self.set_float(ins, mods, a[0], _FUNCTIONS[ins.name].format(x))
        x = self.temporary(x)
        wide = self.temporary(f"{x}.astype(f8)")
        true, seed = _FUNCTIONS[ins.name].format(wide), f"{x}.view(u4)"
        return self.set_float(
            ins, mods, a[0], f"approximate('{ins.name}', {wide}, {true}, {seed}, S.noise)"
        )

    op_lg2 = op_tanh = op_rsqrt = op_sqrt = op_rcp = op_ex2

    def op_abs(self, ins: Instruction, mods: Mods, a: Args) -> None:
        form, bits = self.typed(mods[-1])
        x = self.floats(mods, a[1:2], bits)[0] if form == "f" else self.array(a[1], "s", bits)
        function = "np.abs" if ins.name == "abs" else "np.negative"
        self.set(a[0], f"{function}({x})", "f" if form == "f" else "s", ins)

    op_neg = op_abs

    def op_max(self, ins: Instruction, mods: Mods, a: Args) -> None:
        form, bits = self.typed(mods[-1])
        if form == "f":
            x, y = self.floats(mods, a[1:3], bits)
            name = f"np.{ins.name}imum" if "NaN" in mods else f"{ins.name}f"
            return self.set_float(ins, mods, a[0], f"{name}({x}, {y})")
        x, y = self.array(a[1], form, bits), self.value(a[2], form, bits)
        return self.set(a[0], f"np.{ins.name}imum({x}, {y})", form, ins)

    op_min = op_max

    # Bits --------

    def op_and(self, ins: Instruction, mods: Mods, a: Args) -> None:
        sign = _LOGIC[ins.name]
        if mods[-1] == "pred":
            x, y = self.predicate(a[1]), self.predicate(a[2])
            return self.set(a[0], f"{x} {sign} {y}", "b", ins)
        bits = self.typed(mods[-1])[1]
        x, y = self.array(a[1], "u", bits), self.value(a[2], "u", bits)
        return self.set(a[0], f"{x} {sign} {y}", "u", ins)

    op_or = op_xor = op_and

    def op_not(self, ins: Instruction, mods: Mods, a: Args) -> None:
        if mods[-1] == "pred":
            return self.set(a[0], f"~{self.predicate(a[1])}", "b", ins)
        return self.set(a[0], f"~{self.array(a[1], 'u', self.typed(mods[-1])[1])}", "u", ins)

    def op_shl(self, ins: Instruction, mods: Mods, a: Args) -> None:
        left = ins.name == "shl"
        form, bits = self.typed(mods[-1])
        form = "u" if left else form
        t, x = NUMPY[form][bits], self.array(a[1], form, bits)
        if self.is_register(a[2]) or self.number(a[2], 32) >= bits:
            return self.set(a[0], f"shift({x}, {self.array(a[2], 'u', 32)}, {left})", form, ins)
        sign = "<<" if left else ">>"
        return self.set(a[0], f"{x} {sign} {t}({self.number(a[2], 32)})", form, ins)

    op_shr = op_shl

    def op_shf(self, ins: Instruction, mods: Mods, a: Args) -> None:
        x, y, n = (self.array(q, "u", 32) for q in a[1:4])
        call = f"funnel({x}, {y}, {n}, {mods[0] == 'l'}, {mods[1] == 'wrap'})"
        self.set(a[0], call, "u", ins)

    def op_bfe(self, ins: Instruction, mods: Mods, a: Args) -> None:
        form, bits = self.typed(mods[-1])
        x, at, length = self.array(a[1], "u", bits), self.immediate(a[2]), self.immediate(a[3])
        self.set(a[0], f"bfe({x}, {at}, {length}, {form == 's'})", "u", ins)

    def op_bfi(self, ins: Instruction, mods: Mods, a: Args) -> None:
        bits = self.typed(mods[-1])[1]
        at, length = self.immediate(a[3]), self.immediate(a[4])
        every = (1 << bits) - 1
        mask = ((1 << length) - 1) << at & every
        t = NUMPY["u"][bits]
        x, y = self.array(a[1], "u", bits), self.array(a[2], "u", bits)
        self.set(
            a[0], f"({y} & {t}({mask ^ every})) | (({x} << {t}({at})) & {t}({mask}))", "u", ins
        )

    def op_prmt(self, ins: Instruction, mods: Mods, a: Args) -> None:
        x, y, selector = self.array(a[1], "u", 32), self.array(a[2], "u", 32), a[3]
        self.set(a[0], f"prmt({x}, {y}, {self.value(selector, 'u', 32)})", "u", ins)

    def op_lop3(self, ins: Instruction, mods: Mods, a: Args) -> None:
        words = ", ".join(self.array(q, "u", 32) for q in a[1:4])
        self.set(a[0], f"lop3({words}, {self.immediate(a[4])})", "u", ins)

    def op_popc(self, ins: Instruction, mods: Mods, a: Args) -> None:
        x = self.array(a[1], "u", self.typed(mods[-1])[1])
        self.set(a[0], f"np.bitwise_count({x}).astype(u4)", "u", ins)

    # Comparison and conversion --------------------------------------------------------------------

    def op_setp(self, ins: Instruction, mods: Mods, a: Args) -> None:
        compare, joins, results = mods[0], mods[1:-1], a[0].split("|")
        if mods[-1] in _HALVES:  # with f16x2, a predicate for each half
            widen, _, shifts = _HALVES[mods[-1]]
            self.require(not joins and compare in ("eq", "lt", "le", "gt", "ge"), ins)
            bits = 16 * len(shifts)
            t, words = NUMPY["u"][bits], [self.array(q, "u", bits) for q in a[1:3]]
            for reg, at in zip(results, shifts, strict=True):
                x, y = (f"{widen}(({w} >> {t}({at})).astype(u2))" for w in words)
                self.set(reg, f"{x} {_COMPARE[compare]} {y}", "b", ins)
            return
        form, bits = self.typed(mods[-1])
        x, y = self.array(a[1], form, bits), self.value(a[2], form, bits)
        if form == "f":
            x, y = self.floats(mods, a[1:3], bits)
            nan = f"np.isnan({x}) | np.isnan({y})"
            if compare in ("num", "nan"):
                expression = f"~({nan})" if compare == "num" else f"({nan})"
            elif compare == "ne":
                expression = f"(({x} != {y}) & ~({nan}))"
            elif len(compare) == 3:  # ltu, equ: true for NaN too
                expression = f"(({x} {_COMPARE[compare[:2]]} {y}) | {nan})"
            else:
                expression = f"({x} {_COMPARE[compare]} {y})"
        else:
            expression = f"({x} {_COMPARE[compare]} {y})"
        result = self.temporary(expression)
        joined = [f" {_LOGIC[w]} {self.predicate(a[3])}" for w in joins if w in _LOGIC]
        self.set(results[0], result + "".join(joined), "b", ins)
        if len(results) > 1:
            self.set(results[1], f"~{result}" + "".join(joined), "b", ins)

    def op_cvt(self, ins: Instruction, mods: Mods, a: Args) -> None:
        *mods, to, source = mods
        rounding = next((x for x in mods if x[0] == "r" and x != "relu"), "")
        self.require("relu" not in mods, ins)
        if to in ("f16x2", "bf16x2"):
            self.require(rounding == "rn" and source == "f32", ins)
            high, low = self.array(a[1], "f", 32), self.array(a[2], "f", 32)
            narrow = "half_of_f8({})" if to == "f16x2" else "bf16_of({})"
            word = f"({narrow}.astype(u4) << u4(16)) | {narrow}.astype(u4)"
            return self.set(a[0], word.format(high, low), "u", ins)
        if to == "bf16":
            self.require(rounding == "rn" and source == "f32", ins)
            return self.set(a[0], f"bf16_of({self.array(a[1], 'f', 32)})", "u", ins)
        if source == "bf16":
            self.require(to == "f32", ins)
            return self.set(a[0], f"{self.array(a[1], 'u', 16)}.astype(u4) << u4(16)", "u", ins)
        (form, bits), (from_form, from_bits) = self.typed(to), self.typed(source)
        if from_form == "f":
            x = self.floats(mods if from_bits == 32 else [], a[1:2], from_bits)[0]
            if form != "f":
                call = f"to_int({x}, {NUMPY[form][bits]}, {rounding!r})"
                return self.widen(a[0], call, form, bits, ins)
            if bits == from_bits:
                return self.set(a[0], f"{_ROUND[rounding]}({x})" if rounding else x, "f", ins)
            self.require(bits > from_bits or rounding == "rn", ins)
            return self.set(a[0], f"{x}.astype({NUMPY['f'][bits]})", "f", ins)
        if from_bits < 16:
            whole = self.array(a[1], "u", WIDTH[self.program.regs[a[1]]])
            x = f"{whole}.astype({NUMPY[from_form][from_bits]})"
        else:
            x = self.array(a[1], from_form, from_bits)
        if form == "f":
            self.require(rounding == "rn", ins)
            return self.set(a[0], f"{x}.astype({NUMPY['f'][bits]})", "f", ins)
        # Integers are extended as the source's sign says; a shorter result keeps the low bits.
        x = f"{x}.astype({NUMPY[from_form][bits]})"
        x = x if form == from_form else f"{x}.view({NUMPY[form][bits]})"
        return self.widen(a[0], x, form, bits, ins)

    def op_selp(self, ins: Instruction, mods: Mods, a: Args) -> None:
        form, bits = self.typed(mods[-1])
        form = "f" if form == "f" else "u"
        x, y = self.value(a[1], form, bits), self.value(a[2], form, bits)
        self.set(a[0], f"np.where({self.predicate(a[3])}, {x}, {y})", form, ins)

"""PTX instructions that compute within one thread, as lines of Python.

`_RULES` has the instructions that are an expression of their operands. The others are methods
op_NAME, which take the instruction, its suffixes (`mods`) and its operands. An unknown instruction
raises `Unsupported`.
"""

from irongpt_kernels.ptx.operands import NUMPY, Operands, Unsupported
from irongpt_kernels.ptx.parse import Instruction

# By the name of an instruction: the kinds of operands that it takes, and its expression for each.
# The kinds are f for float32 and float64, h for 16-bit floats (computed in float64 and rounded
# once), u for integers taken as unsigned, s for integers taken as signed, i for integers of the
# type that the instruction names, and p for predicates.
_RULES = {
    "add": dict.fromkeys("fhu", "{x} + {y}"),
    "sub": dict.fromkeys("fhu", "{x} - {y}"),
    "mul": dict.fromkeys("fh", "{x} * {y}"),
    "mul.lo": {"u": "{x} * {y}"},
    "mad.lo": {"u": "{x} * {y} + {z}"},
    "fma": {"f": "fma32({x}, {y}, {z})", "h": "{x} * {y} + {z}"},
    "div": {"i": "div({x}, {y})"},
    "rem": {"i": "rem({x}, {y})"},
    "abs": dict.fromkeys("fhs", "np.abs({x})"),
    "neg": dict.fromkeys("fhs", "np.negative({x})"),
    "max": {"f": "maxf({x}, {y})", "h": "maxf({x}, {y})", "i": "np.maximum({x}, {y})"},
    "min": {"f": "minf({x}, {y})", "h": "minf({x}, {y})", "i": "np.minimum({x}, {y})"},
    "max.NaN": dict.fromkeys("fh", "np.maximum({x}, {y})"),
    "min.NaN": dict.fromkeys("fh", "np.minimum({x}, {y})"),
    "and": dict.fromkeys("up", "{x} & {y}"),
    "or": dict.fromkeys("up", "{x} | {y}"),
    "xor": dict.fromkeys("up", "{x} ^ {y}"),
    "not": dict.fromkeys("up", "~{x}"),
    "popc": {"u": "np.bitwise_count({x}).astype(u4)"},
    "prmt": {"u": "prmt({x}, {y}, {z})"},
}
_COMPARE = {"eq": "{x} == {y}", "ne": "{x} != {y}", "lt": "{x} < {y}", "le": "{x} <= {y}"}
_COMPARE |= {"gt": "{x} > {y}", "ge": "{x} >= {y}"}
_COMPARE_FLOATS = _COMPARE | {  # ne is false for NaN, and what ends in u is true
    "ne": "({x} < {y}) | ({x} > {y})",
    "num": "({x} == {x}) & ({y} == {y})",
    "nan": "({x} != {x}) | ({y} != {y})",
    "equ": "~(({x} < {y}) | ({x} > {y}))",
    "neu": "{x} != {y}",
    "ltu": "~({x} >= {y})",
    "leu": "~({x} > {y})",
    "gtu": "~({x} <= {y})",
    "geu": "~({x} < {y})",
}
_ROUND = {"rzi": "np.trunc", "rni": "np.rint", "rmi": "np.floor", "rpi": "np.ceil"}
_FUNCTIONS = {"ex2": "np.exp2({x})", "sqrt": "np.sqrt({x})", "rsqrt": "1 / np.sqrt({x})"}
_FUNCTIONS |= {"div": "{x} / {y}"}
_HALVES = {  # dtype: to float64, from float64, how many values a register has
    "f16": ("half_to_f8", "half_of_f8", 1),
    "bf16": ("bf16_to_f8", "bf16_of_f8", 1),
    "f16x2": ("half_to_f8", "half_of_f8", 2),
    "bf16x2": ("bf16_to_f8", "bf16_of_f8", 2),
}
_KINDS = {"pred": ("p", 1), **dict.fromkeys(_HALVES, ("h", 16))}
Mods = list[str]
Args = list[str]


class Arithmetic(Operands):
    """Instructions whose result depends on registers of the thread alone."""

    def require(self, condition: bool, ins: Instruction) -> None:
        if not condition:
            raise Unsupported(str(ins))

    def by_rule(self, ins: Instruction, mods: Mods, a: Args) -> bool:
        """Emits an instruction of `_RULES`; returns False for any other."""
        kept = "".join(f".{x}" for x in mods if x in ("NaN", "lo"))
        rule = _RULES.get(ins.name + kept)
        if rule is None:
            return False
        kind, bits = _KINDS.get(mods[-1]) or self.typed(mods[-1])
        form = kind
        if kind in ("u", "s"):
            kind = next((k for k in "ius" if k in rule), "")
            form = form if kind == "i" else kind
        if kind not in rule:
            return False
        self.require(ins.name != "fma" or bits < 64, ins)
        if kind == "h":
            self.halves(ins, mods, a, rule[kind])
            return True
        if kind == "p":
            operands = [self.predicate(x) for x in a[1:]]
        else:
            operands = self.operands(mods, a[1:], form, bits)
        names = dict(zip("xyz", operands, strict=False))
        self.set_value(ins, mods, a[0], rule[kind].format(**names), form)
        return True

    def operands(self, mods: Mods, args: Args, form: str, bits: int) -> list[str]:
        """The first one as an array, the others as arrays or constants."""
        values = [self.array(args[0], form, bits)]
        values += [self.value(x, form, bits) for x in args[1:]]
        return [f"ftz({x})" for x in values] if "ftz" in mods else values

    def set_value(
        self, ins: Instruction, mods: Mods, reg: str, expression: str, form: str = "f"
    ) -> None:
        self.set(reg, f"ftz({expression})" if "ftz" in mods else expression, form, ins)

    def halves(self, ins: Instruction, mods: Mods, a: Args, expression: str) -> None:
        """Emits an instruction on 16-bit floats, one or two in a register: it computes in float64
        and rounds once."""
        self.require(not {*mods[:-1]} - {"rn", "NaN"}, ins)
        _, narrow, count = _HALVES[mods[-1]]
        parts = []
        for values in zip(*(self.widened(x, mods[-1]) for x in a[1:]), strict=True):
            found = expression.format(**dict(zip("xyz", values, strict=False)))
            parts.append(f"{narrow}({found})")
        self.set(a[0], self.packed(parts, 16 * count), "u", ins)

    def widened(self, x: str, dtype: str) -> list[str]:
        """The 16-bit floats in a register, in float64."""
        widen, _, count = _HALVES[dtype]
        words = self.unpacked(self.array(x, "u", 16 * count), 16 * count, count)
        return [self.temporary(f"{widen}({word})") for word in words]

    # Arithmetic ---------------------------------------------------------------------------------

    def op_mul(self, ins: Instruction, mods: Mods, a: Args) -> None:
        """mul and mad, wide and hi, of integers: the complete product or its upper half, plus the
        addend of mad."""
        form, bits = self.typed(mods[-1])
        self.require(bits < 64 and mods[0] in ("wide", "hi"), ins)
        t = NUMPY[form][2 * bits]
        x, y = self.operands([], a[1:3], form, bits)
        found, width = f"({x}.astype({t}) * {y}.astype({t}))", 2 * bits
        if mods[0] == "hi":
            found, width = f"({found} >> {t}({bits})).astype({NUMPY[form][bits]})", bits
        added = f" + {self.value(a[3], form, width)}" if len(a) > 3 else ""
        self.set(a[0], f"{found}{added}", form, ins)

    op_mad = op_mul

    def op_approximate(self, ins: Instruction, mods: Mods, a: Args) -> None:
        """ex2, sqrt, rsqrt and div. With the suffix rn the result is correctly rounded. Without it
        PTX allows an error, which `approximate` adds if there is noise."""
        operands = self.operands(mods, a[1:], *self.typed(mods[-1]))
        function = _FUNCTIONS[ins.name]
        if "rn" in mods:
            exact = function.format(**dict(zip("xy", operands, strict=False)))
            return self.set_value(ins, mods, a[0], exact)
        operands = [self.temporary(x) for x in operands]
        wide = [self.temporary(f"{x}.astype(f8)") for x in operands]
        true = function.format(**dict(zip("xy", wide, strict=False)))
        seed = " ^ ".join(f"({x}.view(u4) << u4({i}))" for i, x in enumerate(operands))
        call = f"approximate({ins.name!r}, {wide[0]}, {true}, {seed}, S.noise)"
        return self.set_value(ins, mods, a[0], call)

    op_ex2 = op_sqrt = op_rsqrt = op_div = op_approximate

    # Bits ---------------------------------------------------------------------------------------

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

    def op_bfe(self, ins: Instruction, mods: Mods, a: Args) -> None:
        form, bits = self.typed(mods[-1])
        at, length = self.immediate(a[2]), self.immediate(a[3])
        length = min(length & 0xFF, bits - at)
        self.require(length > 0, ins)
        u, t = NUMPY["u"][bits], NUMPY[form][bits]
        top = f"({self.array(a[1], 'u', bits)} << {u}({bits - at - length})).view({t})"
        self.set(a[0], f"{top} >> {t}({bits - length})", form, ins)

    # Comparison and conversion --------------------------------------------------------------------

    def op_setp(self, ins: Instruction, mods: Mods, a: Args) -> None:
        """setp writes one or two predicates. With f16x2 and bf16x2 they are the results of the two
        halves; with f16 and bf16 there is one. Else the second is the negation of the first."""
        compare, *more, dtype = mods
        if dtype in _HALVES:
            self.require(not more, ins)
            pairs = zip(*(self.widened(x, dtype) for x in a[1:3]), strict=True)
            found = [_COMPARE_FLOATS[compare].format(x=x, y=y) for x, y in pairs]
        else:
            self.require(not {*more} - {"ftz"}, ins)
            form, bits = self.typed(dtype)
            x, y = self.operands(more, a[1:3], form, bits)
            table = _COMPARE_FLOATS if form == "f" else _COMPARE
            found = [self.temporary(table[compare].format(x=x, y=y))]
            found.append(f"~{found[0]}")
        results = a[0].split("|")
        self.require(len(results) == len(found) or dtype not in _HALVES, ins)
        for reg, expression in zip(results, found, strict=False):
            self.set(reg, expression, "b", ins)

    def op_cvt(self, ins: Instruction, mods: Mods, a: Args) -> None:
        *mods, to, source = mods
        rounding = next((x for x in mods if x[0] == "r" and x != "relu"), "")
        self.require("relu" not in mods, ins)
        if to in ("bf16", "f16x2", "bf16x2"):
            self.require(rounding == "rn" and source == "f32", ins)
            narrow = "half_of_f8" if to == "f16x2" else "bf16_of"
            words = [f"{narrow}({self.array(x, 'f', 32)})" for x in reversed(a[1:])]
            return self.set(a[0], self.packed(words, 16 * len(words)), "u", ins)
        if source == "bf16":
            self.require(to == "f32", ins)
            return self.set(a[0], f"{self.array(a[1], 'u', 16)}.astype(u4) << u4(16)", "u", ins)
        (form, bits), (from_form, from_bits) = self.typed(to), self.typed(source)
        if from_form == "f":
            x = self.operands(mods if from_bits == 32 else [], a[1:2], "f", from_bits)[0]
            if form != "f":
                call = f"to_int({_ROUND[rounding]}({x}), {NUMPY[form][bits]})"
                return self.widen(a[0], call, form, bits, ins)
            if bits == from_bits:
                return self.set(a[0], f"{_ROUND[rounding]}({x})" if rounding else x, "f", ins)
            self.require(bits > from_bits or rounding == "rn", ins)
            return self.set(a[0], f"{x}.astype({NUMPY['f'][bits]})", "f", ins)
        self.require(from_bits >= 16, ins)
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

"""PTX instructions that move data, use memory, or need a whole warp. See `compute` for the others.

Cache hints and memory fences have no effect here, because a store is visible to all threads
immediately. All other instructions of our kernels are executed; an unknown one raises
`Unsupported`.
"""

import re

from irongpt_kernels.ptx.compute import Args, Arithmetic, Mods
from irongpt_kernels.ptx.operands import Unsupported
from irongpt_kernels.ptx.parse import Instruction


class Instructions(Arithmetic):
    """The instructions of one block."""

    def emit(self, ins: Instruction) -> None:
        name, *mods = ins.op.split(".")
        self.require(not {"sat", "cc"} & {*mods}, ins)
        if name in ("ldmatrix", "stmatrix", "wgmma"):
            self.granule["shared"] = min(self.granule["shared"], 2)
        if not self.by_rule(ins, mods, ins.args):
            handler = getattr(self, f"op_{name}", None)
            if handler is None:
                raise Unsupported(str(ins))
            handler(ins, mods, ins.args)

    # Moves --------------------------------------------------------------------------------------

    def op_mov(self, ins: Instruction, mods: Mods, a: Args) -> None:
        if mods[0] == "pred":
            return self.set(a[0], self.predicate(a[1]), "b", ins)
        bits = self.typed(mods[-1])[1]
        if a[0].startswith("{"):  # unpack
            parts = self.vector(a[0])
            words = self.unpacked(self.array(a[1], "u", bits), bits, len(parts))
            for part, word in zip(parts, words, strict=True):
                self.set(part, word, "u", ins)
        elif a[1].startswith("{"):  # pack
            parts = self.vector(a[1])
            words = [self.array(part, "u", bits // len(parts)) for part in parts]
            self.set(a[0], self.packed(words, bits), "u", ins)
        elif self.is_register(a[1]) and a[0] != a[1] and ins.pred is None:
            self.read(a[1], next(iter(self.forms.get(a[1], "u"))))
            for form in sorted(self.forms[a[1]]):  # its views stay views of the copy
                self.put(f"{self.local(a[0], form)} = {self.local(a[1], form)}")
            self.forms[a[0]] = {*self.forms[a[1]]}
            self.written[a[0]] = None
        else:
            self.widen(a[0], self.array(a[1], "u", bits), "u", bits, ins)
        return None

    # Memory -------------------------------------------------------------------------------------

    def op_ld(self, ins: Instruction, mods: Mods, a: Args) -> None:
        form, bits = self.typed(mods[-1])
        parts, size = self.vector(a[0]), bits // 8
        form = "s" if form == "s" else "u"
        vec, at = len(parts), self.at(ins)
        x = self.temporary(f"S.ld({self._space(ins, mods, a[1], size)}, {size}, {vec}, {at})")
        for i, part in enumerate(parts):
            self.widen(part, self._as(f"{x}[{i}]", form, bits), form, bits, ins)

    def op_st(self, ins: Instruction, mods: Mods, a: Args) -> None:
        bits = self.typed(mods[-1])[1]
        words = ", ".join(self.array(x, "u", max(16, bits)) for x in self.vector(a[1]))
        float32 = bits == 32 and all("f" in self.forms.get(x, "") for x in self.vector(a[1]))
        tail = f"{bits // 8}, {float32}, {self.at(ins)}"
        self.require(mods[0] != "param", ins)
        self.put(f"S.st({self._space(ins, mods, a[0], bits // 8)}, [{words}], {tail})")

    def _space(self, ins: Instruction, mods: Mods, a: str, size: int) -> str:
        """The text of two arguments of a call: the space of memory, and the address in it. size:
        bytes of an element."""
        space = mods[0].removesuffix("::cta")
        self.require(space in self.granule, ins)
        self.granule[space] = min(self.granule[space], size)
        return f"{space!r}, {self.address(a)}"

    def op_ldmatrix(self, ins: Instruction, mods: Mods, a: Args) -> None:
        parts, address = self.vector(a[0]), self.address(a[1])
        tail = f"{'trans' in mods}, {self.at(ins)}"
        self.set_all(a[0], f"S.ldmatrix({address}, {len(parts)}, {tail})", "u", ins)

    def op_stmatrix(self, ins: Instruction, mods: Mods, a: Args) -> None:
        address = self.address(a[0])
        words = ", ".join(self.array(x, "u", 32) for x in self.vector(a[1]))
        tail = f"{'trans' in mods}, {self.at(ins)}"
        self.put(f"S.stmatrix({address}, [{words}], {tail})")

    def op_cp(self, ins: Instruction, mods: Mods, a: Args) -> None:
        self.require(mods[0] == "async", ins)
        if mods[1] == "commit_group":
            self.put("S.cp_commit(m)")
        elif mods[1] == "wait_group":
            self.put(f"S.cp_wait({int(a[0], 0)}, m)")
        else:
            self.require(mods[1] in ("ca", "cg"), ins)
            to, source = self.address(a[0]), self.address(a[1])
            count = self.array(a[3], "u", 32) if len(a) > 3 else "None"
            tail = f"{count}, {self.at(ins)}"
            self.put(f"S.cp_async({to}, {source}, {int(a[2], 0)}, {tail})")

    def op_fence(self, ins: Instruction, mods: Mods, a: Args) -> None:
        pass

    def op_bar(self, ins: Instruction, mods: Mods, a: Args) -> None:
        if mods[0] == "warp":
            return self.put(f"S.whole_warps({self.at(ins)})")
        # A barrier ends its block, see `blocks`.
        return self.require(mods[0] == "sync" and a == ["0"] and ins.pred is None, ins)

    # Warps --------------------------------------------------------------------------------------

    def op_shfl(self, ins: Instruction, mods: Mods, a: Args) -> None:
        x, lane = self.array(a[1], "u", 32), self.value(a[2], "u", 32)
        tail = f"{self.immediate(a[3])}, {self.at(ins)}"
        results = f"{{{a[0].replace('|', ',')}}}"  # the value, and whether its lane is inside
        self.set_all(results, f"S.shfl({mods[1]!r}, {x}, {lane}, {tail})", "u", ins)

    def op_redux(self, ins: Instruction, mods: Mods, a: Args) -> None:
        form, bits = self.typed(mods[-1])
        x = self.array(a[1], form, bits)
        self.set(a[0], self.temporary(f"S.redux({mods[1]!r}, {x}, {self.at(ins)})"), form, ins)

    def set_all(self, registers: str, call: str, form: str, ins: Instruction) -> None:
        """Assigns the results of a call to the registers of a list."""
        found = self.temporary(call)
        for i, reg in enumerate(self.vector(registers)):
            self.set(reg, f"{found}[{i}]", form, ins)

    def _list(self, a: str, form: str) -> str:
        return f"[{', '.join(self.array(x, form, 32) for x in self.vector(a))}]"

    def op_mma(self, ins: Instruction, mods: Mods, a: Args) -> None:
        dtype = mods[6]
        self.require(mods[2] in ("m16n8k8", "m16n8k16") and mods[3:5] == ["row", "col"], ins)
        self.require(mods[5:] == ["f32", dtype, dtype, "f32"] and dtype in ("f16", "bf16"), ins)
        A, B, C = self._list(a[1], "u"), self._list(a[2], "u"), self._list(a[3], "f")
        self.set_all(a[0], f"S.mma({dtype!r}, {A}, {B}, {C}, {self.at(ins)})", "f", ins)

    def op_wgmma(self, ins: Instruction, mods: Mods, a: Args) -> None:
        if mods[0] == "fence":
            return None
        if mods[0] == "commit_group":
            return self.put("S.wgmma_commit(m)")
        if mods[0] == "wait_group":
            return self.put(f"S.wgmma_wait({int(a[0], 0)}, m)")
        shape = re.fullmatch(r"m64n(\d+)k16", mods[3])
        self.require(shape is not None and mods[4] == "f32" and mods[5] in ("f16", "bf16"), ins)
        self.require(a[4:6] == ["1", "1"], ins)  # operands that are not negated
        registers = a[1].startswith("{")
        A = self._list(a[1], "u") if registers else self.array(a[1], "u", 64)
        transposed = (0, int(a[6])) if registers else (int(a[6]), int(a[7]))
        head = f"{shape.group(1) if shape else ''}, {mods[5]!r}, {self._list(a[0], 'f')}, {A}"
        middle = f"{self.array(a[2], 'u', 64)}, {self.predicate(a[3])}, {transposed}"
        return self.set_all(a[0], f"S.wgmma({head}, {middle}, {self.at(ins)})", "f", ins)

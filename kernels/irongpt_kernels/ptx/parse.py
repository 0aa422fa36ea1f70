"""PTX text as a `Program`: parameters with their offsets, registers, and basic blocks."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

SIZES = {
    **dict.fromkeys(("pred", "b8", "u8", "s8"), 1),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), 2),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2"), 4),
    **dict.fromkeys(("b64", "u64", "s64", "f64"), 8),
}

_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+\.\w+\s+\.align\s+\d+\s+)?"
    r"(\w+)(?:\[(\d+)\])?"
)
_OPERANDS = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
# Of an instruction: its line number in the PTX, its line in the Python source, its text.
Location = tuple[int, str, str]


@dataclass
class Instruction:
    op: str  # with its suffixes, as in the text
    args: list[str]
    pred: str | None  # the predicate register, if it is guarded
    negated: bool
    line: int  # in the PTX text, counted from 1
    where: str  # the line in the Python source, from the .loc directive

    @property
    def name(self) -> str:
        return self.op.split(".")[0]

    @property
    def is_barrier(self) -> bool:
        return self.op.startswith("bar.sync")

    @property
    def location(self) -> Location:
        return self.line, self.where, str(self)[:90]

    def __str__(self) -> str:
        guard = f"@{'!' if self.negated else ''}{self.pred} " if self.pred else ""
        return f"{guard}{self.op} {', '.join(self.args)}"


@dataclass
class Program:
    """One kernel. regs: the bits of each register, 1 for a predicate."""

    name: str
    threads: int = 0  # those of a CTA
    params: dict[str, tuple[int, str]] = field(default_factory=dict)  # name: offset, type
    param_bytes: int = 0
    regs: dict[str, int] = field(default_factory=dict)
    blocks: list[list[Instruction]] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # label: index of a block

    def close_block(self) -> None:
        if not self.blocks or self.blocks[-1]:
            self.blocks.append([])


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def parse(ptx: str) -> Program:
    """Raises SyntaxError for a text that is not the PTX of one kernel as Triton prints it."""
    entry = re.search(r"\.entry\s+(\w+)\s*\(", ptx)
    if not re.search(r"\.target\s+sm_\w+", ptx) or not entry:
        raise SyntaxError("the PTX has no .target or no .entry")
    p = Program(entry.group(1))
    head_end = ptx.index(")", entry.end())
    for align, kind, name, count in _PARAM.findall(ptx[entry.end() : head_end]):
        offset = _round_up(p.param_bytes, max(SIZES[kind], int(align or 1)))
        p.params[name] = (offset, kind)
        p.param_bytes = offset + SIZES[kind] * int(count or 1)
    start = ptx.index("{", head_end)
    if threads := re.search(r"\.reqntid\s+(\d+)", ptx[head_end:start]):
        p.threads = int(threads.group(1))
    body = ptx[start + 1 : ptx.index("\n}", start)]
    first_line = ptx.count("\n", 0, start + 1) + 1
    p.close_block()
    for text, line, where in _statements(body, first_line):
        _add(p, text, line, where)
    if not p.blocks[-1]:  # a label may be the last statement
        p.blocks[-1].append(Instruction("ret", [], None, False, first_line, ""))
    return p


def _statements(body: str, first_line: int) -> Iterator[tuple[str, int, str]]:
    """(text, line of the PTX, line of the kernel's Python source) of each statement or label,
    without comments."""
    where, pending, start = "", "", 0
    for n, raw in enumerate(body.split("\n"), first_line):
        if ".loc" in raw:
            found = re.search(r"//\s*(.*)$", raw)
            where = found.group(1) if found else raw.strip()
            continue
        text = raw.split("//", 1)[0].strip()
        if text.startswith((".file", ".pragma")):
            continue
        if not pending:
            start = n
            if text.endswith(":"):
                yield text, n, where
                continue
        *ended, pending = (part.strip() for part in f"{pending} {text}".split(";"))
        for one in ended:
            yield one, start, where
            start = n
    if pending:
        raise SyntaxError(f"a statement has no end: {pending!r}")


def _add(p: Program, text: str, line: int, where: str) -> None:
    """Adds one statement to the program."""
    if text.endswith(":"):
        if not text.startswith(("$L__tmp", "$L__func")):  # these mark lines for debuggers
            p.close_block()
            p.labels[text[:-1]] = len(p.blocks) - 1
        return
    while text.startswith(("{", "}")) and not text.startswith("{%"):  # a scope of registers
        text = text[1:].strip()
    if text.startswith(".reg"):
        _declare(p, text)
    elif text.startswith("."):
        raise SyntaxError(f"line {line}: unknown directive {text!r}")
    elif text:
        negated, pred = False, None
        if guard := re.match(r"@(!?)\s*([%\w$]+)\s+(.*)", text, re.S):
            negated, pred, text = bool(guard.group(1)), guard.group(2), guard.group(3)
        op, _, rest = text.replace("\t", " ").partition(" ")
        args = [a.strip() for a in _OPERANDS.findall(rest.strip())]
        ins = Instruction(op, args, pred, negated, line, where)
        p.blocks[-1].append(ins)
        if ins.name in ("bra", "ret") or ins.is_barrier:
            p.close_block()


def _declare(p: Program, text: str) -> None:
    """A `.reg` statement: single names, or %r<9> for %r0 to %r8."""
    found = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S)
    assert found, text
    bits = 1 if found.group(1) == "pred" else 8 * SIZES[found.group(1)]
    for one in found.group(2).split(","):
        many = re.match(r"(.*)<(\d+)>", one.strip())
        names = [f"{many.group(1)}{i}" for i in range(int(many.group(2)))] if many else [one]
        p.regs.update((name.strip(), bits) for name in names)

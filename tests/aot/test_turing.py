"""Tensor cores for sm_75: how an instruction is split. turing_checks.py compiles kernels."""

from pathlib import Path

import pytest
import torch
from irongpt_kernels.runtime import turing
from run_helpers import compiling

from tests.ptx.text import run

CHECKS = Path(__file__).parents[1] / "helpers" / "turing_checks.py"
D, A, B, C = ([f"%r{at + i}" for i in range(n)] for at, n in ((20, 4), (30, 4), (40, 2), (50, 4)))


def braced(registers: list[str]) -> str:
    return "{" + ", ".join(registers) + "}"


def instruction(d: list[str], a: list[str], b: list[str], c: list[str], acc: str = "f32") -> str:
    operands = ", ".join(map(braced, (d, a, b, c)))
    return f"\tmma.sync.aligned.m16n8k16.row.col.{acc}.f16.f16.{acc} {operands};\n"


def test_compiled() -> None:
    """All of turing_checks.py in one process. Each worker of pytest-xdist that ran a part would
    compile all kernels."""
    done = compiling("-m", "pytest", "-p", "no:cacheprovider", CHECKS)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("d", [D, C], ids=["own registers", "in place"])
def test_two_m16n8k8_equal_one_m16n8k16(d: list[str]) -> None:
    """As the emulator executes them, which test_ptx_matrices.py compares with the fragment tables
    of the PTX ISA."""
    generator = torch.Generator().manual_seed(0)
    a, b, c = (  # whole numbers, whose sums are exact in any order
        torch.randint(-8, 9, (32, n), generator=generator).to(dtype)
        for n, dtype in ((8, torch.float16), (4, torch.float16), (4, torch.float32))
    )
    load, store = "ld.global.v{n}.b32 {regs}, [%rd{at}];", "st.global.v{n}.b32 [%rd{at}], {regs};"

    def moved(op: str, at: int, registers: list[str]) -> str:
        n, regs = len(registers), braced(registers)
        step = f"mul.wide.u32 %rd30, %r0, {4 * n}; add.s64 %rd{20 + at}, %rd{at}, %rd30;"
        return step + op.format(n=n, regs=regs, at=20 + at)

    text = instruction(d, A, B, C)
    split = turing.split_mma(text)
    assert split.count("m16n8k8") == 2
    assert "m16n8k16" not in split
    before, after = torch.zeros(32, 4), torch.zeros(32, 4)
    for mma, out in ((text, before), (split, after)):
        loads = "".join(moved(load, i, x) for i, x in enumerate((A, B, C)))
        assert run(f"{loads} {mma} {moved(store, 3, d)}", a, b, c, out, arch="80").counts == {}
    assert before.abs().max() > 0
    assert torch.equal(before, after)


def test_fp16_accumulators_are_split_too() -> None:
    split = turing.split_mma(instruction(D[:2], A, B, C[:2], "f16"))
    op = "\tmma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16"
    assert split == (
        f"{op} {{%r20, %r21}}, {{%r30, %r31}}, {{%r40}}, {{%r50, %r51}};\n"
        f"{op} {{%r20, %r21}}, {{%r32, %r33}}, {{%r41}}, {{%r20, %r21}};\n"
    )


@pytest.mark.parametrize(
    "text",
    [
        instruction([A[2], *D[1:]], A, B, C),
        instruction([*D[:3], B[1]], A, B, C),
        instruction(D, A, B, C).replace("mma", "@%p1 mma"),
        instruction(D, A, B, C).replace(".f16.f16.", ".bf16.bf16."),
        instruction(D, A, B, C, "f32").replace("k16.row", "k8.row"),
    ],
    ids=["overwrites a2", "overwrites b1", "predicated", "bfloat16", "of 8 already"],
)
def test_other_instructions_are_not_split(text: str) -> None:
    assert turing.split_mma(text) == text


def test_split_instructions_are_not_split_again() -> None:
    split = turing.split_mma(instruction(D, A, B, C) * 3)
    assert split.count("mma.sync") == 6
    assert turing.split_mma(split) == split

"""Tensor cores for sm_75: how an instruction is split. turing_checks.py compiles kernels."""

import re
from pathlib import Path

import pytest
import torch
from irongpt_kernels.runtime import turing
from run_helpers import compiling
from torch import Tensor

CHECKS = Path(__file__).parents[1] / "helpers" / "turing_checks.py"
D, A, B, C = (
    [f"%{name}{i}" for i in range(n)] for name, n in (("d", 4), ("a", 4), ("b", 2), ("c", 4))
)


def instruction(d: list[str], a: list[str], b: list[str], c: list[str], acc: str = "f32") -> str:
    braced = ", ".join("{" + ", ".join(registers) + "}" for registers in (d, a, b, c))
    return f"\tmma.sync.aligned.m16n8k16.row.col.{acc}.f16.f16.{acc} {braced};\n"


def test_compiled() -> None:
    """All of turing_checks.py in one process. Each worker of pytest-xdist that ran a part would
    compile all kernels."""
    done = compiling("-m", "pytest", "-p", "no:cacheprovider", CHECKS)
    assert done.returncode == 0, done.stdout[-3000:]


# The fragment tables of the PTX ISA: (row, column) of the element in half e of a lane's register r.
def a_at(r: int, e: int, lane: int) -> tuple[int, int]:
    return lane // 4 + 8 * (r % 2), lane % 4 * 2 + e + 8 * (r // 2)


def b_at(r: int, e: int, lane: int) -> tuple[int, int]:
    return lane % 4 * 2 + e + 8 * r, lane // 4


def d_at(r: int, lane: int) -> tuple[int, int]:
    return lane // 4 + 8 * (r // 2), lane % 4 * 2 + r % 2


def mma(K: int, a: list[Tensor], b: list[Tensor], c: list[Tensor]) -> list[Tensor]:
    """mma.m16n8kK of one warp: registers in, a and b (32 lanes, 2 halves) each, c (32,) each."""
    left, right, out = torch.zeros(16, K), torch.zeros(K, 8), torch.zeros(16, 8)
    for lane in range(32):
        for r, register in enumerate(a):
            for e in range(2):
                left[a_at(r, e, lane)] = register[lane, e]
        for r, register in enumerate(b):
            for e in range(2):
                right[b_at(r, e, lane)] = register[lane, e]
        for r, register in enumerate(c):
            out[d_at(r, lane)] = register[lane]
    out += left @ right
    return [torch.stack([out[d_at(r, lane)] for lane in range(32)]) for r in range(4)]


def run(ptx: str, registers: dict[str, Tensor]) -> dict[str, Tensor]:
    """The registers after the mma instructions of a text."""
    registers = dict(registers)
    for K, operands in re.findall(r"mma\.sync\.aligned\.m16n8k(\d+)\S+ (.*);", ptx):
        d, a, b, c = (re.findall(r"%\w+", group) for group in re.findall(r"\{(.*?)\}", operands))
        assert (len(a), len(b)) == (int(K) // 4, int(K) // 8)
        out = mma(int(K), *([registers[x] for x in group] for group in (a, b, c)))
        registers |= dict(zip(d, out, strict=True))
    return registers


@pytest.mark.parametrize("d", [D, C], ids=["own registers", "in place"])
def test_two_m16n8k8_equal_one_m16n8k16(d: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> Tensor:  # their sums are exact in any order
        return torch.randint(-8, 9, shape, generator=generator).float()

    registers = {x: integers(32, 2) for x in A + B} | {x: integers(32) for x in C}
    text = instruction(d, A, B, C)
    split = turing.split_mma(text)
    assert split.count("m16n8k8") == 2
    assert "m16n8k16" not in split
    before, after = run(text, registers), run(split, registers)
    assert all(torch.equal(before[x], after[x]) for x in before)
    assert any(before[x].abs().max() > 0 for x in d)


def test_fp16_accumulators_are_split_too() -> None:
    split = turing.split_mma(instruction(D[:2], A, B, C[:2], "f16"))
    op = "\tmma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16"
    assert split == (
        f"{op} {{%d0, %d1}}, {{%a0, %a1}}, {{%b0}}, {{%c0, %c1}};\n"
        f"{op} {{%d0, %d1}}, {{%a2, %a3}}, {{%b1}}, {{%d0, %d1}};\n"
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

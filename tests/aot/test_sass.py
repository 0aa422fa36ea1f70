"""Loops, counts, occupancy and clocks, which are read from a disassembly."""

import pytest
from irongpt_kernels.aot import sass
from irongpt_kernels.aot.sass import Instruction


def listing(*names: str) -> list[Instruction]:
    """Instructions 16 bytes apart. `BRA 2` jumps to the third."""
    found = []
    for i, name in enumerate(names):
        name, _, target = name.partition(" ")
        found.append(Instruction(16 * i, name, 16 * int(target) if target else None))
    return found


KERNEL = listing(
    "S2R",
    "LDG",  # 1: the outer loop
    "FFMA",  # 2: an inner one, of scalars
    "BRA 2",
    "HMMA.1688.F32",  # 4: another, of tensor cores
    "STL",
    "HMMA.1688.F32",
    "BRA 4",
    "BRA 1",
    "EXIT",
    "BRA 10",  # the endless loop after the end
)


def test_inner_loops_contain_no_other_loop() -> None:
    bodies = [[x.name for x in loop] for loop in sass.inner_loops(KERNEL)]
    assert bodies == [["FFMA", "BRA"], ["HMMA.1688.F32", "STL", "HMMA.1688.F32", "BRA"]]


def test_the_hot_loop_is_that_of_the_tensor_cores() -> None:
    assert [x.address // 16 for x in min(sass.hot_loops(KERNEL), key=len)] == [4, 5, 6, 7]
    assert sass.hot_loops(listing("FFMA", "EXIT")) == [listing("FFMA", "EXIT")]


def test_loops_of_equal_work_are_both_hot() -> None:
    masked = ["HMMA", "IMAD.WIDE.U32", "IMAD.HI.U32", "ISETP", "BRA 0"]
    both = listing(*masked, "HMMA", "IMAD.WIDE.U32", "BRA 5", "EXIT")
    assert sass.hot_loops(both) == [both[:5], both[5:8]]
    assert min(sass.hot_loops(both), key=len) == both[5:8]
    assert [sass.elements_per_call(x, 16) for x in sass.hot_loops(both)] == [112, 224]


def test_counts_without_modifiers() -> None:
    n = sass.count(KERNEL)
    assert (n["HMMA"], n["FFMA"], n["LOCAL"]) == (2, 1, 1)


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "wanted"),
    [
        (75, 128, 4096, 4, 16),  # 65,536 registers of an SM over 128 x 32
        (75, 255, 0, 4, 8),
        (75, 64, 32_768, 4, 8),  # two programs' shared memory
        (75, 16, 0, 1, 16),  # programs
        (75, 16, 0, 4, 32),  # warps
        (75, 64, 65_537, 4, 0),
        (80, 64, 65_536, 4, 8),  # each program takes 1,024 bytes more
        (90, 64, 65_536, 4, 12),
    ],
)
def test_warps_of_an_sm(arch: int, registers: int, shared: int, warps: int, wanted: int) -> None:
    assert sass.warps_per_sm(arch, registers, shared, warps) == wanted


@pytest.mark.parametrize(
    ("arch", "name", "unit", "wanted"),
    [
        (75, "HMMA.1688.F32", "tensor", 2),  # 2,048 of 1,024 FLOPs a clock
        (75, "LDSM.16.M88.4", "shared", 8),  # 512 of 64 bytes a clock
        (75, "LDSM.16.M88", "shared", 2),  # one matrix
        (75, "LDS.128", "shared", 8),
        (75, "STS", "shared", 2),
        (75, "MUFU.EX2", "special", 2),
        (75, "FFMA", "fma", 0.5),
        (75, "ISETP.GT.AND", "alu", 0.5),
        (80, "HMMA.16816.F32.BF16", "tensor", 2),  # 4,096 of 2,048 FLOPs a clock
        (90, "HGMMA.64x32x16.F32.BF16", "tensor", 4),  # a quarter of 65,536 of 4,096
        (80, "LDSM.16.M88.4", "shared", 4),  # 512 of 128 bytes a clock
        (90, "STSM.16.M88.4", "shared", 4),
        (80, "FFMA", "fma", 0.5),
        (90, "FFMA", "fma", 0.25),
        (90, "IMAD.MOV.U32", "fma", 0.5),
        (90, "LDGSTS.E.128", "issue", 0.25),  # a copy from global memory costs only its issue
    ],
)
def test_clocks_of_a_unit(arch: int, name: str, unit: str, wanted: float) -> None:
    busy = sass.clocks(listing(name), 4, arch)
    assert busy.pop("issue") == 1
    assert unit == "issue" or busy.pop(unit) == 4 * wanted
    assert set(busy.values()) == {0}

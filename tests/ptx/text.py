"""Small PTX programs as text, and their execution on tensors."""

from typing import Any

import torch
from irongpt_kernels.ptx.execute import Options, execute
from irongpt_kernels.ptx.threads import Report
from torch import Tensor

HEADER = ".version 8.4\n.target sm_{arch}\n.address_size 64\n"


def program(body: str, params: int, threads: int = 32, shared: int = 0, arch: str = "75") -> str:
    """A kernel `k` with `params` pointers, in %rd0, %rd1, ..., and the thread's number in %r0.

    Registers: %p, %rs, %r and %rd, of which the body may use those from 20 on.
    """
    names = [f"k_param_{i}" for i in range(params + 2)]  # Triton passes two more, which are unused
    declared = ",\n".join(f".param .u64 .ptr .global .align 1 {name}" for name in names)
    loads = "\n".join(f"ld.param.b64 %rd{i}, [{name}];" for i, name in enumerate(names[:-2]))
    memory = ".extern .shared .align 16 .b8 global_smem[];\n" if shared else ""
    return (
        f"{HEADER.format(arch=arch)}{memory}.visible .entry k(\n{declared}\n)\n"
        f".reqntid {threads}\n{{\n.reg .pred %p<99>;\n.reg .b16 %rs<99>;\n.reg .b32 %r<299>;\n"
        f".reg .b64 %rd<99>;\n{loads}\nmov.u32 %r0, %tid.x;\n{body}\nret;\n}}\n"
    )


def run(
    body: str,
    *tensors: Tensor,
    threads: int = 32,
    shared: int = 0,
    grid: tuple[int, int, int] = (1, 1, 1),
    arch: str = "75",
    **options: Any,
) -> Report:
    """Executes the program on the tensors, which become its parameters."""
    report = Report()
    text = program(body, len(tensors), threads, shared, arch)
    chosen = Options(int(arch.removesuffix("a")), **options)
    execute(text, grid, [("*i8", x) for x in tensors], shared, chosen, report)
    return report


def compute(op: str, result: torch.dtype, *operands: Tensor, noise: float = 0.0) -> Tensor:
    """What an instruction computes, a value for each of 32 lanes.

    op: with $d for the result's register and $a, $b, $c for those of the operands.
    """
    out = torch.zeros(32, dtype=result)
    registers, lines = {2: "%rs", 4: "%r", 8: "%rd"}, list[str]()
    for i, x in enumerate([*operands, out]):
        register, place = f"{registers[x.itemsize]}{20 + i}", f"[%rd{10 + i}]"
        lines.append(f"mul.wide.u32 %rd9, %r0, {x.itemsize}; add.s64 %rd{10 + i}, %rd{i}, %rd9;")
        lines.append(f"ld.global.b{8 * x.itemsize} {register}, {place};")
        op = op.replace("$d" if x is out else f"${'abc'[i]}", register)
    lines += [op, f"st.global.b{8 * out.itemsize} {place}, {register};"]
    report = run("\n".join(lines), *operands, out, noise=noise)
    assert report.counts == {}
    return out


def lanes(values: list[Any], dtype: torch.dtype) -> Tensor:
    """The values over and over, one for each of 32 lanes."""
    return torch.tensor([values[i % len(values)] for i in range(32)], dtype=dtype)

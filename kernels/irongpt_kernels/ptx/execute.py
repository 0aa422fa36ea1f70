"""Executes a kernel's PTX: all CTAs of a grid, on the memory of CPU tensors."""

import functools
import itertools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from irongpt_kernels.ptx.arithmetic import Array, accumulate_exact, accumulate_like_hardware
from irongpt_kernels.ptx.blocks import Code
from irongpt_kernels.ptx.parse import SIZES, Program, parse
from irongpt_kernels.ptx.regions import Regions
from irongpt_kernels.ptx.tensor_cores import Batch
from irongpt_kernels.ptx.threads import NO_NAN, Launch, Report

SIDE_BY_SIDE = 2048  # threads of the CTAs that are executed together
PARAMETER_LIMIT = 4096  # bytes
INFINITY = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80}
# Of the tensor cores: products that are added at a time, and extra bits of the accumulator.
TENSOR_CORES = {75: (4, 0), 80: (8, 1), 90: (16, 2)}

Grid = tuple[int, int, int]
Argument = tuple[str, Any]  # its type for Triton (*fp16, i32, fp32), and a tensor or a number


@dataclass(frozen=True)
class Options:
    """How to execute.

    order: how the warps of a CTA run between two barriers: all at once ("lockstep"), or one after
        another ("ascending", "descending"). A kernel without barriers always runs in lockstep.
        Without barriers the order cannot change a result: if a warp read what another wrote, that
        would be a race, which is reported.
    mma: "exact" rounds the sums of an instruction once; "hardware" truncates them as tensor cores
        do.
    noise: the errors of approximate instructions, from 0 (none) to 1 (the bounds of the PTX ISA).
    change: a function of the kernel's name and its PTX that returns the PTX to execute. Tests
        inject bugs with it.
    """

    arch: int = 75
    order: str = "lockstep"
    mma: str = "exact"
    noise: float = 0.0
    change: Callable[[str, str], str] | None = None

    def __post_init__(self) -> None:
        assert self.order in ("lockstep", "ascending", "descending"), self.order
        assert self.mma in ("exact", "hardware"), self.mma

    def accumulate(self) -> Callable[[Array, Array, Array], Array]:
        if self.mma == "exact":
            return accumulate_exact
        return accumulate_like_hardware(*TENSOR_CORES[self.arch])


@functools.lru_cache(maxsize=512)
def _code(ptx: str) -> Code:
    return Code(parse(ptx))


def execute(
    ptx: str,
    grid: Grid,
    arguments: list[Argument],
    shared_bytes: int,
    options: Options,
    report: Report,
) -> None:
    """Raises `Unsupported` for an unknown instruction."""
    code = _code(ptx)
    program = code.program
    tensors = [x for _, x in arguments if isinstance(x, torch.Tensor)]
    granule = min([code.granule["global"], *(t.itemsize for t in tensors)])
    if program.param_bytes > PARAMETER_LIMIT:
        report.add("too many parameters", 1, program.name)
    launch = Launch(
        name=program.name,
        grid=grid,
        threads=program.threads,
        shared_bytes=shared_bytes,
        shared_granule=code.granule["shared"],
        regions=Regions(tensors, granule),
        infinity=min((INFINITY[t.dtype] for t in tensors if t.dtype in INFINITY), default=NO_NAN),
        params=_pack(program, arguments),
        accumulate=options.accumulate(),
        noise=options.noise,
        report=report,
    )
    report.launches += 1
    ctas = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    step = max(1, SIDE_BY_SIDE // program.threads)
    with np.errstate(all="ignore"):
        for i in range(0, len(ctas), step):
            batch = Batch(launch, ctas[i : i + step])
            registers: list[Any] = [None] * len(program.regs)
            for r, dtype in code.dtypes.items():
                registers[r] = np.zeros(batch.n, dtype=dtype)
            if code.barriers and options.order != "lockstep":
                _run_warps(code, batch, registers, options.order == "descending")
            else:
                _run_together(code, batch, registers)
            batch.finish()


def _pack(program: Program, arguments: list[Argument]) -> bytes:
    """The parameters as a driver lays them out. The last two are pointers to scratch memory."""
    out = bytearray(-(-program.param_bytes // 8) * 8)
    params = list(program.params.values())[:-2]
    if len(arguments) != len(params):
        raise TypeError(f"{program.name}: {len(arguments)} arguments, {len(params)} parameters")
    for (kind, x), (offset, dtype) in zip(arguments, params, strict=True):
        if isinstance(x, torch.Tensor) != kind.startswith("*"):
            raise TypeError(f"{program.name}: {type(x)} for {kind}")
        size = SIZES[dtype]
        if dtype in ("f32", "f64"):
            raw = struct.pack("<f" if size == 4 else "<d", x)
        else:
            number = int(x.data_ptr() if isinstance(x, torch.Tensor) else x)
            signed = kind[0] == "i" and kind != "i1"  # the PTX declares it as unsigned
            raw = number.to_bytes(size, "little", signed=signed)  # OverflowError if it is too large
        out[offset : offset + size] = raw
    return bytes(out)


def _run_together(code: Code, batch: Batch, registers: list[Any]) -> None:
    """Runs all warps at once. If threads diverge, those at the block with the lowest number run
    first."""
    block, mask = 0, None
    position: Any = np.zeros(batch.n, dtype=np.int64)
    while block >= 0:
        follows = _run_block(code, batch, registers, block, mask)
        if block in code.barriers:
            batch.bar((None, mask, code.barriers[block]))
        if mask is None and isinstance(follows, tuple) and (p := follows[0]).all() == p.any():
            follows = follows[1] if p.all() else follows[2]
        if isinstance(follows, tuple):
            follows = np.where(*follows)
        elif mask is None:
            block = follows
            continue
        position = follows if mask is None else np.where(mask, follows, position)
        batch.alive = position >= 0
        if not batch.alive.any():
            return
        block = int(position[batch.alive].min())
        mask = position == block
        mask = None if mask.all() else mask


def _run_warps(code: Code, batch: Batch, registers: list[Any], descending: bool) -> None:
    """Runs the warps of a CTA one after another, each up to the next barrier. The four warps of a
    wgmma run together."""
    instructions = itertools.chain.from_iterable(code.program.blocks)
    together = 128 if any(i.name == "wgmma" for i in instructions) else 32
    unit = batch.tid // together
    units = sorted(set(unit.tolist()), reverse=descending)
    position: Any = np.zeros(batch.n, dtype=np.int64)
    while batch.alive.any():
        for u in units:
            waiting = unit != u
            while (ready := (position >= 0) & ~waiting).any():
                block = int(position[ready].min())
                mask = ready & (position == block)
                follows = _run_block(code, batch, registers, block, mask)
                if block in code.barriers:
                    waiting = waiting | mask
                if isinstance(follows, tuple):
                    follows = np.where(*follows)
                position = np.where(mask, follows, position)
        batch.alive = position >= 0
        if batch.alive.any():
            batch.bar((None, batch.alive, (0, "", "bar.sync")))


def _run_block(code: Code, batch: Batch, registers: list[Any], block: int, mask: Any) -> Any:
    batch.report.instructions += code.sizes[block] * len(batch.warps(mask))
    return code.functions[block](batch, registers, mask)

"""
Reads registers, spills, instructions and innermost loops from a cubin, and estimates how many warps
an SM holds and how long its units are busy. The disassembler comes with Triton. No GPU is needed.

The limits of an SM (warps, registers, shared memory) and the rates of its units are published or
were measured by others (CUDA Programming Guide, arithmetic instructions; for sm_75 Jia et al.,
"Dissecting the NVidia Turing T4 GPU via Microbenchmarking", 2019, and instruction tables of TU102;
tensor cores of sm_80 and sm_90: NVIDIA's white papers). On sm_90 the rate of HMMA is not published;
it is taken to be that of HGMMA (wgmma), which is too high.
"""

import hashlib
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import triton
from triton import knobs
from triton.runtime.cache import get_cache_manager

from irongpt_kernels.runtime import emulate


class Instruction(NamedTuple):
    """One line of SASS. target: the address that a branch may jump to, else None."""

    address: int
    name: str  # with its modifiers: HMMA.1688.F32
    target: int | None


class SM(NamedTuple):
    """Limits and rates of one multiprocessor. Each program takes `reserved` bytes of shared memory
    more than it requests."""

    warps: int
    programs: int
    shared: int  # bytes
    reserved: int
    flops: int  # of the tensor cores per clock
    bandwidth: int  # bytes of shared memory per clock
    float: float  # clocks that a warp's float32 instruction takes


SMS = {
    75: SM(32, 16, 65_536, 0, 1024, 64, 0.5),
    80: SM(64, 32, 167_936, 1024, 2048, 128, 0.5),
    # The FLOPs are those of HGMMA; HMMA is slower, by an unpublished factor.
    90: SM(64, 32, 233_472, 1024, 4096, 128, 0.25),
}
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*);")
_SPILLS = ("LDL", "STL")
_NO_ALU = {"LDG", "STG", "BRA", "BAR", "NOP", "EXIT", "WARPSYNC", *_SPILLS}
_NO_ALU |= {"LDGSTS", "LDGDEPBAR", "DEPBAR", "WARPGROUP", "SYNCS", "FENCE"}


def disassembled(cubin: bytes) -> str:
    """The SASS of a cubin. It is kept in Triton's cache. Raises RuntimeError if the tool fails."""
    cache = get_cache_manager(hashlib.sha256(triton.__version__.encode() + cubin).hexdigest())
    if kept := cache.get_file("kernel.sass"):
        return Path(kept).read_text()
    text = _cuobjdump("--dump-sass", cubin)
    cache.put(text, "kernel.sass", binary=False)
    return text


def read(cubin: bytes) -> list[Instruction]:
    """The instructions of a cubin of one kernel."""
    found = []
    for address, name, rest in _LINE.findall(disassembled(cubin)):
        jump = re.search(r"0x([0-9a-f]+)", rest) if name.split(".")[0] in ("BRA", "BRX") else None
        found.append(Instruction(int(address, 16), name, int(jump[1], 16) if jump else None))
    return found


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of its stack in local memory, where registers spill to."""
    text = _cuobjdump("--dump-resource-usage", cubin)
    numbers = {n: int(x) for n, x in re.findall(r"(REG|STACK):(\d+)", text)}
    return numbers["REG"], numbers["STACK"]


def _cuobjdump(flag: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [os.fspath(knobs.nvidia.cuobjdump.path), flag, file.name]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cuobjdump failed: {done.stderr.strip()[-300:]}")
    return done.stdout


def inner_loops(instructions: list[Instruction]) -> list[list[Instruction]]:
    """The bodies of the loops that hold no other loop, in order of address.

    A loop reaches from the target of a backward branch to that branch. The branch to itself that
    follows a kernel's EXIT does not count.
    """
    spans = [(x.target, x.address) for x in instructions if x.target is not None]
    spans = [(a, b) for a, b in spans if a < b]
    inner = [s for s in spans if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    return [[x for x in instructions if a <= x.address <= b] for a, b in sorted(inner)]


def hot_loops(instructions: list[Instruction]) -> list[list[Instruction]]:
    """The innermost loops that have the most HMMA, or the most FFMA if no loop has HMMA. Loops with
    equal numbers are all returned, in order of address. A kernel without a loop gives all of its
    instructions."""

    def work(loop: list[Instruction]) -> tuple[int, int]:
        n = count(loop)
        return n["HMMA"], n["FFMA"] if not n["HMMA"] else 0

    loops = inner_loops(instructions) or [instructions]
    most = max(map(work, loops))
    return [loop for loop in loops if work(loop) == most]


def elements_per_call(loop: Iterable[Instruction], elements: int) -> float:
    """An estimate of how many of a thread's elements share a call of Philox4x32-7, which has 14
    wide multiplies. It is too high if the compiler moves some of them out of the loop, and too low
    if the loop has others, for addresses."""
    wide = sum(x.name.startswith(("IMAD.WIDE.U32", "IMAD.HI.U32")) for x in loop)
    return 14 * elements / wide if wide else 0.0


def count(instructions: Iterable[Instruction]) -> Counter[str]:
    """How many of each opcode, without modifiers. HMMA counts every tensor-core instruction,
    LOCAL every access to local memory, which is where registers spill to."""
    n = Counter(x.name.split(".")[0] for x in instructions)
    n["HMMA"] += n["HGMMA"] + n["IMMA"]
    n["LOCAL"] = sum(n[x] for x in _SPILLS)
    return n


def warps_per_sm(arch: int, registers: int, shared: int, warps: int) -> int:
    """Warps that an SM holds at a time, for `warps` warps per program; 0 if no program fits."""
    sm = SMS[arch]
    if shared > emulate.SHARED[arch]:
        return 0
    registers_per_warp = -(-registers * 32 // 256) * 256  # registers come to a warp in units of 256
    by_registers = 16_384 // registers_per_warp * 4 // warps  # each quarter of an SM has 16,384
    by_shared = sm.shared // (shared + sm.reserved) if shared + sm.reserved else sm.programs
    return warps * min(by_registers, by_shared, sm.programs, sm.warps // warps)


def clocks(loop: Iterable[Instruction], warps: int, arch: int = 75) -> dict[str, float]:
    """The clocks for which one pass of a program through a loop keeps each unit of an SM busy.

    The units work in parallel, so the busiest one gives a lower bound. Latency, bank conflicts and
    dependences are ignored, and an access to global memory costs only the clocks in which it is
    issued.
    """
    sm = SMS[arch]
    busy = dict(tensor=0.0, shared=0.0, special=0.0, alu=0.0, fma=0.0, issue=0.0)
    for x in loop:
        name = x.name.split(".")[0]
        busy["issue"] += 1 / 4
        if name in ("HMMA", "HGMMA"):
            busy["tensor"] += _flops(x.name) / sm.flops
        elif name.startswith("HFMA2") or name in ("HADD2", "HMUL2", "HSET2", "HSETP2"):
            busy["tensor"] += 0.5
        elif name in ("LDS", "STS", "LDSM", "STSM"):
            busy["shared"] += _shared_bytes(x.name) / sm.bandwidth
        elif name in ("SHFL", "MUFU", "F2F", "F2I", "I2F"):
            busy["special" if name != "SHFL" else "shared"] += 2
        elif name in ("FFMA", "FADD", "FMUL"):
            busy["fma"] += sm.float
        elif name == "IMAD":
            busy["fma"] += 0.5
        elif name not in _NO_ALU:
            busy["alu"] += 0.5
    return {unit: t * warps for unit, t in busy.items()}


def _flops(name: str) -> int:
    """FLOPs of one warp in HMMA.1688, HMMA.16816, or HGMMA.64x32x16, which four warps share."""
    if name.startswith("HGMMA"):
        m, n, k = (int(x) for x in re.findall(r"\.(\d+)x(\d+)x(\d+)", name)[0])
        return 2 * m * n * k // 4
    return 2048 if "1688" in name else 4096


def _shared_bytes(name: str) -> int:
    """Bytes that a shared-memory instruction of one warp moves."""
    if name.startswith(("LDSM", "STSM")):
        matrices = re.search(r"\.(\d)$", name)  # LDSM.16.M88.4, or LDSM.16.M88 for one
        return 128 * int(matrices[1] if matrices else 1)
    bits = [int(x) for x in name.split(".") if x in ("64", "128")]
    return 4 * (bits[0] if bits else 32)

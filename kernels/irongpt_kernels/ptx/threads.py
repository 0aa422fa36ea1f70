"""The threads of several CTAs side by side, their reports, barriers and shuffles.

A register is an array with a value for each thread, warp after warp, CTA after CTA. An instruction
runs for the threads that a mask m names (None: all) and whose guard p is true (None: no guard).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from irongpt_kernels.ptx.arithmetic import Array, i4, i8, u4
from irongpt_kernels.ptx.parse import Location
from irongpt_kernels.ptx.regions import Regions

Site = tuple["Array | None", "Array | None", Location]  # guard, mask, location
NO_NAN = 0x7FFF  # as an infinity: no 15 bits are above it, so words of 16 bits are never NaN


@dataclass
class Report:
    """The errors of all launches: how many of each kind there were, and the first of each."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    launches: int = 0
    instructions: int = 0  # executed, one for each warp

    def add(self, kind: str, count: int, example: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + count
        self.examples.setdefault(kind, example)

    def lines(self) -> list[str]:
        """A line for each kind, with its example."""
        return [f"{kind}, {n} times: {self.examples[kind]}" for kind, n in self.counts.items()]


@dataclass
class Launch:
    """One launch of a kernel. regions: its global memory. params: bytes of its parameters."""

    name: str
    grid: tuple[int, int, int]
    threads: int  # those of a CTA
    shared_bytes: int
    shared_granule: int  # bytes; every access to shared memory covers whole granules
    regions: Regions
    infinity: int  # its bits in the 16-bit dtype of the arguments; NO_NAN if they have none
    params: bytes
    accumulate: Callable[[Array, Array, Array], Array]  # C, A, B: C + A B^T
    noise: float  # see `execute.Options`
    report: Report


class Pending:
    """Asynchronous operations in flight (cp.async by warp, wgmma by four warps): those not yet
    committed (`open`), and the committed groups, the oldest first."""

    def __init__(self, count: int) -> None:
        self.open: list[list[Any]] = [[] for _ in range(count)]
        self.groups: list[list[list[Any]]] = [[] for _ in range(count)]

    def commit(self, indices: Array) -> None:
        for i in indices:
            self.groups[i].append(self.open[i])
            self.open[i] = []

    def wait(self, indices: Array, left: int) -> list[Any]:
        """Removes and returns the oldest work, so that each warp has `left` groups or fewer."""
        done = []
        for i in indices:
            n = max(0, len(self.groups[i]) - left)
            done += [one for group in self.groups[i][:n] for one in group]
            del self.groups[i][:n]
        return done


class Threads:
    """The threads of some CTAs that run at once; `Memory` adds their memory. A thread's number is
    its index in the arrays that are registers."""

    def __init__(self, launch: Launch, ctas: list[tuple[int, int, int]]) -> None:
        self.launch, self.report, self.noise = launch, launch.report, launch.noise
        self.n_cta, self.cta_threads = len(ctas), launch.threads
        self.n = n = self.cta_threads * self.n_cta
        self.thread = np.arange(n, dtype=i8)
        self.lane = self.thread % 32
        self.first_of_warp = self.thread - self.lane
        self.cta = np.repeat(np.arange(self.n_cta), self.cta_threads)
        self.tid = (np.arange(n) % self.cta_threads).astype(u4)
        self.warp_bit = (u4(1) << (self.tid // u4(32))).astype(u4)
        xyz = np.array(ctas, dtype=u4).T
        self.ctaid = [np.repeat(c, self.cta_threads) for c in xyz]
        x, y, z = xyz.astype(i8)
        gx, gy, _ = launch.grid
        self.cta_number = np.repeat(x + gx * (y + gy * z), self.cta_threads).astype(i4)
        self.barriers = np.zeros(self.n_cta, dtype=i8)  # passed so far
        self.alive = np.ones(n, dtype=bool)
        self._constants: dict[tuple[int, Any], Array] = {}

    def const(self, value: int, dtype: Any) -> Array:
        key = (value, dtype)
        if key not in self._constants:
            self._constants[key] = np.full(self.n, value, dtype=dtype)
        return self._constants[key]

    def active(self, at: Site) -> Array:
        """Indices of the threads that execute an instruction."""
        p, m, _ = at
        both = p if m is None else m if p is None else p & m
        return self.thread if both is None or both.all() else np.flatnonzero(both)

    def spread(self, x: Array, threads: Array) -> Array:
        """Values of some threads as a register, which is 0 in the others."""
        if len(threads) == self.n:
            return np.ascontiguousarray(x)
        out = np.zeros(self.n, dtype=x.dtype)
        out[threads] = x
        return out

    def report_error(
        self, kind: str, bad: Array, threads: Array, at: Site, detail: str = ""
    ) -> None:
        """Reports an error of an instruction. threads: those that executed it. bad: a mask of those
        at fault."""
        if not bad.any():
            return
        t = int(threads[np.flatnonzero(bad)[0]])
        line, where, text = at[2]
        example = f"{self.launch.name} line {line} `{text}` [{where}] "
        example += f"CTA {self.cta_number[t]} thread {self.tid[t]} {detail}"
        self.report.add(kind, int(np.count_nonzero(bad)), example)

    # Warps and CTAs ---------------------------------------------------------------------------

    def whole_warps(self, at: Site) -> Array:
        """The threads that execute an instruction which needs complete warps. Incomplete warps are
        reported and left out."""
        threads = self.active(at)
        if len(threads) == self.n:
            return threads
        active = np.zeros(self.n, dtype=bool)
        active[threads] = True
        warps = active.reshape(-1, 32)
        broken = warps.any(1) & ~warps.all(1)
        self.report_error("incomplete warp", np.repeat(broken, 32), self.thread, at)
        return np.flatnonzero(np.repeat(warps.all(1), 32))

    def warps(self, m: Array | None) -> Array:
        """The warps that are at an instruction."""
        return np.arange(self.n // 32) if m is None else np.flatnonzero(m.reshape(-1, 32).any(1))

    def shfl(self, mode: str, a: Array, b: Any, c: int, at: Site) -> tuple[Array, Array]:
        """Values of other lanes, and whether the lane that each asks for is in its segment."""
        self.whole_warps(at)
        lane, b = self.lane, np.asarray(b).astype(i8) & 31
        segment, clamp = (c >> 8) & 31, c & 31
        low = lane & segment
        high = low | (clamp & ~segment & 31)
        source = {
            "bfly": lane ^ b,
            "up": lane - b,
            "down": lane + b,
            "idx": low | (b & ~segment & 31),
        }[mode]
        inside = source >= high if mode == "up" else source <= high
        source = self.first_of_warp + np.where(inside, source, lane)
        return a[source], inside

    def redux(self, what: str, a: Array, at: Site) -> Array:
        threads = self.whole_warps(at)
        logic = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
        function = (logic | dict(add=np.add, min=np.minimum, max=np.maximum))[what]
        found = function.reduce(a[threads].reshape(-1, 32), axis=1, dtype=a.dtype)
        return self.spread(np.repeat(found, 32), threads)

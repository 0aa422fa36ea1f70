"""Microseconds of a kernel on this GPU: CUDA events, inputs out of the L2 cache, no host in it."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from unittest.mock import patch

import torch

COLD = 2  # what a round of launches touches is so many times the L2
COPIES = 16  # of the inputs at most
CYCLES_PER_S = 2e9  # no clock of a GPU is faster: the wait is rather too long
BEYOND = 0.02  # of the time: what is gained less is not worth other sums


@dataclass(frozen=True)
class Launch:
    """A kernel's launch, with its arguments, that can be repeated. spilled: bytes a thread."""

    again: Callable[[], object]
    spilled: int
    bytes: int  # of the tensors that it was given


class Clock(Protocol):
    """What `irongpt tune` asks of a device; the tests have one of their own."""

    def record(self, run: Callable[[], object], kernel: str) -> Launch:
        """The launch of `kernel`, module._function, that `run` makes. Raises what `run` raises."""

    def copies(self, touched: int) -> int:
        """How many copies of the inputs leave the caches cold, where a launch touches so much."""

    def seconds(self, launches: list[Launch]) -> float:
        """Of one launch: a sample."""


class Gpu:
    def __init__(self, device: torch.device, calls: int) -> None:
        self.device, self.calls = device, calls
        self.cache = torch.cuda.get_device_properties(device).L2_cache_size

    def record(self, run: Callable[[], object], kernel: str) -> Launch:
        from irongpt_kernels.aot import sass

        with _launched() as made:
            run()
        compiled, again, args = next(launch[1:] for launch in made if launch[0] == kernel)
        touched = {x.data_ptr(): x.nbytes for x in args if isinstance(x, torch.Tensor)}
        return Launch(again, sass.read(compiled.asm["cubin"]).stack, sum(touched.values()))

    def copies(self, touched: int) -> int:
        return min(COPIES, max(2, -(-COLD * self.cache // max(1, touched))))

    def seconds(self, launches: list[Launch]) -> float:
        with torch.cuda.device(self.device):
            host = self._issue(launches)  # warm, and how long Python takes
            torch.cuda.synchronize()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(int((2 * host + 1e-4) * CYCLES_PER_S))
            start.record()
            self._issue(launches)
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / self.calls

    def _issue(self, launches: list[Launch]) -> float:
        start = time.perf_counter()
        for i in range(self.calls):
            launches[i % len(launches)].again()
        return time.perf_counter() - start


@contextmanager
def _launched() -> Iterator[list[tuple[str, Any, Callable[[], object], tuple[Any, ...]]]]:
    """Every launch within: the kernel's name, what was compiled, how to repeat it, its tensors."""
    from triton.runtime.jit import JITFunction

    made = []
    original = JITFunction.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        compiled = original(self, *args, **kwargs)
        name = f"{self.fn.__module__.split('.')[-1]}.{self.fn.__name__}"
        made.append((name, compiled, lambda: original(self, *args, **kwargs), args))
        return compiled

    with patch.object(JITFunction, "run", run):
        yield made


def in_turns(
    clock: Clock, launches: dict[int, list[Launch]], rounds: int
) -> dict[int, list[float]]:
    """Samples by candidate. Each round begins with another: heat and clocks are for all alike."""
    samples: dict[int, list[float]] = {name: [] for name in launches}
    names = list(launches)
    for r in range(rounds):
        first = r % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(clock.seconds(launches[name]))
    return samples


def beats(candidate: list[float], shipped: list[float]) -> bool:
    """Whether a gain stands out of the noise: three quarters of the candidate's samples are below
    three quarters of the other's, and the medians are BEYOND apart."""
    faster = statistics.median(candidate) < (1 - BEYOND) * statistics.median(shipped)
    return (
        faster and statistics.quantiles(candidate, n=4)[2] < statistics.quantiles(shipped, n=4)[0]
    )

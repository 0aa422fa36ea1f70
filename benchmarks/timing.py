"""Seconds of a call, so that two of them can be compared.

On a GPU a provider's calls are captured in a CUDA graph, and CUDA events time its replays: what is
measured is the device's work, not Python's. Each call of a graph takes another copy of its inputs,
so many that together they do not fit in the L2 cache; a training step finds its inputs cold too.
What cannot be captured is timed by events around plain calls, and says so.

Providers take turns, a sample each, in an order that rotates: a card that gets hot or a neighbour
on the same CPU slows all of them alike. Reported are the median of the samples and the distance
of their quartiles.
"""

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

SAMPLE = 1e-3  # seconds that a sample takes at least
CALLS = 200  # in a graph at most, but for the copies of the inputs
COLD = 2  # inputs together are so many times the L2
COPIES = 32  # of the inputs at most
WARM = 3

Call = Callable[[int], object]  # of copy i of the inputs


@dataclass(frozen=True)
class Timing:
    """samples: seconds a call. host: seconds that Python takes to issue one; None on a CPU."""

    samples: list[float]
    graph: bool
    host: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def iqr(self) -> float:
        """Distance of the quartiles; 0 where there are too few samples."""
        if len(self.samples) < 4:
            return max(self.samples) - min(self.samples)
        low, _, high = statistics.quantiles(self.samples, n=4)
        return high - low


class Sampler(Protocol):
    @property
    def graph(self) -> bool: ...

    @property
    def host(self) -> float | None: ...

    def sample(self) -> float: ...


def stream(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Where calls are prepared and measured: a graph cannot be captured on the default stream."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(aside)


def copies(input_bytes: int, device: torch.device) -> int:
    """How many copies of the inputs it takes so that a call finds its own out of the L2 cache."""
    if device.type != "cuda":
        return 1
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return min(COPIES, max(2, -(-COLD * l2 // max(1, input_bytes))))


def measure(
    calls: dict[str, Call], sets: int, device: torch.device, rounds: int
) -> dict[str, Timing | str]:
    """Timings by provider; for one that cannot run, why."""
    samplers: dict[str, Sampler] = {}
    results: dict[str, Timing | str] = {}
    for name, call in calls.items():
        try:
            samplers[name] = prepare(call, sets, device)
        except Exception as e:  # a provider that cannot run here is a result
            results[name] = reason(e)
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    names = list(samplers)
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)] if names else []:
            samples[name].append(samplers[name].sample())
    for name, s in samplers.items():
        results[name] = Timing(samples[name], s.graph, s.host)
    return {name: results[name] for name in calls}


def reason(e: Exception) -> str:
    if isinstance(e, torch.cuda.OutOfMemoryError):
        return "out of memory"
    return " ".join(f"{type(e).__name__}: {e}".split())[:200]


def prepare(call: Call, sets: int, device: torch.device) -> Sampler:
    """Warms a call up and makes it ready to be timed. Raises what the call raises."""
    for i in range(WARM):
        call(i % sets)
    if device.type != "cuda":
        return Wall(call, sets)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for i in range(WARM):
        call(i % sets)
    host = (time.perf_counter() - start) / WARM
    torch.cuda.synchronize(device)
    events = Events(call, sets, host)
    try:
        return Replay(call, sets, host, events.sample())
    except Exception:  # not every call can be captured
        torch.cuda.synchronize(device)
        return events


class Wall:
    graph, host = False, None

    def __init__(self, call: Call, sets: int) -> None:
        self.call, self.sets, self.n = call, sets, 1
        self.n = max(1, min(CALLS, round(SAMPLE / self.sample())))

    def sample(self) -> float:
        start = time.perf_counter()
        for i in range(self.n):
            self.call(i % self.sets)
        return (time.perf_counter() - start) / self.n


class Events:
    """Plain calls between two events: where Python is slower than the device, Python's time."""

    graph = False

    def __init__(self, call: Call, sets: int, host: float | None) -> None:
        self.call, self.sets, self.host, self.n = call, sets, host, sets
        self.n = sets * max(1, min(CALLS // sets, round(SAMPLE / (self.sample() * sets))))

    def sample(self) -> float:
        return _between(lambda: [self.call(i % self.sets) for i in range(self.n)]) / self.n


class Replay:
    """A graph of calls, captured on the current stream; see `stream`."""

    graph = True

    def __init__(self, call: Call, sets: int, host: float | None, seconds: float) -> None:
        self.host = host
        self.n = sets * max(1, min(CALLS // sets, round(SAMPLE / (seconds * sets))))
        self.captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.captured, stream=torch.cuda.current_stream()):
            for i in range(self.n):
                call(i % sets)
        for _ in range(2):
            self.captured.replay()

    def sample(self) -> float:
        return _between(self.captured.replay) / self.n


def _between(work: Callable[[], object]) -> float:
    """Seconds of device time."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Memory that a call takes at its peak, on top of what is there; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call(0)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before

"""Seconds per call of several functions, measured so that they can be compared.

On a GPU the calls of a provider (one implementation of an op) are captured in a CUDA graph
(`Replay`), and CUDA events time replays of it, so the device's work is measured and not Python's.
The device waits a little before them, so that all of them are queued when the first one begins.
Each call of a graph uses a different copy of its inputs and outputs. Together the copies exceed the
L2 cache, because in a training step the inputs are not in the cache either; inputs of a few
kilobytes are too small for that, see `cold`. A call that cannot be captured is timed by events
around plain calls, and its result has the reason.

Samples of the providers are interleaved in an order that rotates: a GPU that gets hot or another
process on the same CPU slows all of them alike. Providers that do not fit in memory together are
measured in groups, one group after the other.
"""

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from irongpt.cuda_graph import capture
from irongpt.errors import UserError, one_line

CPU_SAMPLE = 4e-3  # seconds that a sample on a CPU takes at least
SAMPLE = 5e-3  # the same on a GPU, unless that is too many calls
GRAPH = 1e-3  # seconds of a graph: the gap between two of them is a thousandth of it
MAX_CALLS = 200  # in a graph or a sample of plain calls, unless there are more copies of the inputs
MAX_REPLAYS = 64  # the most replays of a graph in a sample
HEAD_START_CLOCKS = 2_000_000  # that the device waits, about a millisecond, while the host queues
L2_MULTIPLE = 2  # size of all copies of the inputs together, in L2 caches
MAX_COPIES = 1024  # the most copies of the inputs: a graph holds a call of each
SMALL_INPUT_COPIES = 16  # copies of inputs that are too small to exceed the L2 cache
WARMUP_CALLS = 3

Call = Callable[[int], object]  # its argument: the number of a copy of the inputs
Sampler = Callable[[], float]  # seconds per call
T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """A function to be timed. call(i) uses copy i of the inputs. around: a context for all calls.

    first: an untimed part, such as the forward before a backward; then call(first(i), i) is timed.
    In a graph `first` is captured too, because PyTorch's attention otherwise keeps the dropout
    state on the host, which a captured backward cannot use.
    """

    call: Callable[..., object]
    first: Call | None = None
    around: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext

    def begin(self, sets: int) -> Call:
        """The call, after `first` has run for every copy of the inputs."""
        if self.first is None:
            return self.call
        made = [self.first(i) for i in range(sets)]
        return lambda i: self.call(made[i], i)


def free(device: torch.device) -> None:
    """Frees the memory that no tensor uses."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def reason(e: Exception) -> str:
    """An exception in one line."""
    if isinstance(e, UserError):
        return str(e)
    return "out of memory" if isinstance(e, torch.cuda.OutOfMemoryError) else one_line(e)[:200]


@dataclass(frozen=True)
class Timing:
    """samples: seconds per call. host: seconds that Python takes to issue one; None on a CPU.

    no_graph_reason: why there is no graph, on a GPU. group: providers with the same number were
    measured together.
    """

    samples: list[float]
    graph: bool
    host: float | None = None
    no_graph_reason: str | None = None
    group: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def iqr(self) -> float:
        """Distance of the quartiles; of 3 samples the range; NaN (left out of a file) for fewer."""
        if len(self.samples) < 3:
            return math.nan
        if len(self.samples) == 3:
            return max(self.samples) - min(self.samples)
        low, _, high = statistics.quantiles(self.samples, n=4)
        return high - low


def stream(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The stream of all calls: a graph cannot be captured on the default stream."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(aside)


def copies(used_bytes: int, device: torch.device) -> int:
    """How many copies of the inputs are needed so that a call finds none in the L2 cache;
    SMALL_INPUT_COPIES if not even MAX_COPIES are enough. used_bytes: the inputs of one call."""
    if device.type != "cuda":
        return 1
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    if MAX_COPIES * used_bytes <= l2:
        return SMALL_INPUT_COPIES
    return min(MAX_COPIES, max(2, -(-L2_MULTIPLE * l2 // used_bytes)))


def cold(used_bytes: int, device: torch.device) -> bool | None:
    """Whether a call does not find its inputs in the L2 cache, because all copies exceed it. None,
    unknown, on a CPU. used_bytes: those of all copies."""
    if device.type != "cuda":
        return None
    return used_bytes > torch.cuda.get_device_properties(device).L2_cache_size


def measure(
    calls: Mapping[str, Call | Work], sets: int, device: torch.device, rounds: int
) -> dict[str, Timing | str]:
    """Timings by provider; the reason for one that cannot run. sets: copies of the inputs."""
    works = {name: _work(call) for name, call in calls.items()}
    results: dict[str, Timing | str] = {}

    def start(name: str) -> tuple[Sampler, Timing]:
        with works[name].around():
            return prepare(works[name], sets, device)

    def sample(name: str, started: tuple[Sampler, Timing]) -> None:
        sampler, timing = started
        with works[name].around():
            timing.samples.append(sampler())

    def failed(name: str, e: Exception) -> None:
        results[name] = reason(e)

    groups = interleaved(works, start, sample, failed, rounds, device)
    for number, ready in enumerate(groups):
        results |= {name: replace(timing, group=number) for name, (_, timing) in ready.items()}
    return {name: results[name] for name in calls}


def _work(call: Call | Work) -> Work:
    return call if isinstance(call, Work) else Work(call)


def interleaved(
    names: Iterable[str],
    start: Callable[[str], T],
    sample: Callable[[str, T], None],
    failed: Callable[[str, Exception], None],
    rounds: int,
    device: torch.device,
) -> Iterator[dict[str, T]]:
    """Starts as many as fit in memory together, samples each of them once in every round, and
    yields those that did not fail; then the others in the same way."""
    waiting = list(names)
    while waiting:
        ready: dict[str, T] = {}
        for name in list(waiting):
            full = False
            try:
                ready[name] = start(name)
            except Exception as e:  # the others continue
                full = bool(ready) and isinstance(e, torch.cuda.OutOfMemoryError)
                if not full:
                    failed(name, e)
            if name not in ready:
                free(device)  # the exception, which refers to the call's tensors, is gone by now
            if full:
                break
            waiting.remove(name)
        for r in range(rounds):
            order = list(ready)
            first = r % max(1, len(order))
            for name in order[first:] + order[:first]:
                try:
                    sample(name, ready[name])
                except Exception as e:
                    del ready[name]
                    failed(name, e)
        yield ready
        ready.clear()
        free(device)


def prepare(work: Work, sets: int, device: torch.device) -> tuple[Sampler, Timing]:
    """Warms a call up. Returns its sampler and a timing without samples yet. Raises what the call
    raises."""
    call = work.begin(sets)
    _repeat(call, sets, WARMUP_CALLS)
    if device.type != "cuda":
        return plain_calls(call, sets, CPU_SAMPLE, host_seconds), Timing([], graph=False)
    torch.cuda.synchronize(device)
    host = host_seconds(lambda: _repeat(call, sets, WARMUP_CALLS)) / WARMUP_CALLS
    why = waits(lambda: call(0), device)
    if why is None:
        del call  # its memory is for the graph
        try:
            return Replay(work, sets).sample, Timing([], graph=True, host=host)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as e:  # not every call can be captured
            why = reason(e)
        free(device)
        call = work.begin(sets)
    # If Python is the slower side, the time between the events is Python's.
    return plain_calls(call, sets, SAMPLE, device_seconds), Timing([], False, host, why)


def plain_calls(
    call: Call, sets: int, seconds: float, clock: Callable[[Callable[[], None]], float]
) -> Sampler:
    """A sampler of as many plain calls as take `seconds`, timed by the clock."""

    def sample(n: int) -> float:
        return clock(lambda: _repeat(call, sets, n)) / n

    n = _calls(seconds, sample(sets), sets)
    return lambda: sample(n)


def _repeat(call: Call, sets: int, n: int) -> None:
    for i in range(n):
        call(i % sets)


class Replay:
    """Times replays of a graph of calls, captured on the current stream, which is `stream`'s.

    Outputs are kept until their copy of the inputs is used again, so that no call writes to memory
    that the cache still holds.
    """

    def __init__(self, work: Work, sets: int) -> None:
        self.repeats = 1
        self.before = torch.cuda.CUDAGraph()
        if work.first is None:
            call = work.begin(sets)
        else:
            with capture(self.before):
                call = work.begin(sets)
            self.before.replay()
        self._capture(call, sets, sets)
        n = _calls(GRAPH, self.sample(), sets)
        if n > sets:
            self._capture(call, sets, n)
        self.repeats = max(1, min(MAX_REPLAYS, round(SAMPLE / (self.sample() * self.n))))

    def _capture(self, call: Call, sets: int, n: int) -> None:
        self.n, self.graph = n, torch.cuda.CUDAGraph()
        self.kept: list[object] = [None] * sets
        with capture(self.graph):
            for i in range(n):
                self.kept[i % sets] = call(i % sets)
        for _ in range(2):
            self.graph.replay()

    def sample(self) -> float:
        def replays() -> None:
            for _ in range(self.repeats):
                self.graph.replay()

        return device_seconds(replays) / (self.n * self.repeats)


def _calls(seconds: float, of_one: float, sets: int) -> int:
    """How many calls, a multiple of `sets`, take `seconds`; bounded."""
    passes = round(seconds / max(1e-9, of_one * sets))
    return sets * max(1, min(MAX_CALLS // sets, passes))


def peak_bytes(call: Call | Work, device: torch.device) -> int | None:
    """Peak memory of a call beyond what is allocated before; None on a CPU and if it does not
    fit."""
    if device.type != "cuda":
        return None
    work = _work(call)
    try:
        with work.around():
            begun = work.begin(1)
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            begun(0)
            torch.cuda.synchronize(device)
    except torch.cuda.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated(device) - before


def host_seconds(work: Callable[[], object]) -> float:
    """Seconds by the host's clock."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def device_seconds(work: Callable[[], object]) -> float:
    """Seconds of device time. The device waits a little first, for the host to get ahead."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START_CLOCKS)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def waits(call: Callable[[], object], device: torch.device) -> str | None:
    """The reason why a call cannot be captured: the host waits for the device in it, as for an
    `.item()`. None if it does not.

    PyTorch's own check finds it before a capture is tried, because a failed one leaves traces.
    """
    torch.cuda.synchronize(device)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as e:
        return reason(e)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.synchronize(device)
    return None

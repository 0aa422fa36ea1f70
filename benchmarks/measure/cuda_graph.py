"""Samples of a GPU's time: replays of a CUDA graph between two events, or plain calls."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.measure.work import Call, Work, reason

SAMPLE = 5e-3  # seconds that a sample takes at least, unless that is too many calls
GRAPH = 1e-3  # seconds of a graph: the gap between two of them is a thousandth of it
CALLS = 200  # in a graph or a sample of plain calls at most, but for the copies of the inputs
REPEATS = 64  # of a graph in a sample, at most
AHEAD = 2_000_000  # clocks that the device waits, about a millisecond: by then the host is ahead


class Events:
    """Plain calls between two events: where Python is slower than the device, Python's time."""

    def __init__(self, call: Call, sets: int) -> None:
        self.call, self.sets, self.n = call, sets, sets
        self.n = _calls(SAMPLE, self.sample(), sets)

    def sample(self) -> float:
        return between(lambda: [self.call(i % self.sets) for i in range(self.n)]) / self.n


class Replay:
    """Replays of a graph of calls, captured on the current stream; see `timing.stream`.

    Outputs are kept until their copy's turn comes again, so that no call writes to memory that the
    cache still holds.
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
        sample = self.sample() * self.n
        self.repeats = max(1, min(REPEATS, round(SAMPLE / sample)))

    def _capture(self, call: Call, sets: int, n: int) -> None:
        self.n, self.graph = n, torch.cuda.CUDAGraph()
        self.kept: list[object] = [None] * sets
        with capture(self.graph):
            for i in range(n):
                self.kept[i % sets] = call(i % sets)
        for _ in range(2):
            self.graph.replay()

    def sample(self) -> float:
        return between(self._replays) / (self.n * self.repeats)

    def _replays(self) -> None:
        for _ in range(self.repeats):
            self.graph.replay()


def _calls(seconds: float, of_one: float, sets: int) -> int:
    """How many calls, a multiple of `sets`, take so long; bounded."""
    turns = round(seconds / max(1e-9, of_one * sets))
    return sets * max(1, min(CALLS // sets, turns))


@contextlib.contextmanager
def capture(graph: Any) -> Iterator[None]:
    """On the current stream: what autograd has recorded there runs its backward there.

    Raises what the captured code raises, and leaves a process that can go on.
    """
    pool, broken = torch.cuda.graph_pool_handle(), None
    try:
        with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
            try:
                yield
            except Exception as e:
                broken = e
                raise
    except Exception as e:
        recover(pool)
        if broken is None or e is broken:
            raise
        raise broken from None  # the end of a broken capture raises another error, and tells less


def recover(pool: Any = None) -> None:
    """After a capture that broke. PyTorch then goes on allocating from the graph's pool, and the
    default generator believes that it is captured and refuses to draw. pool: if it is known."""
    device = torch.cuda.current_device()
    if pool is not None:
        with contextlib.suppress(RuntimeError):  # where it has ended that itself
            torch._C._cuda_endAllocateToPool(device, pool)
    fresh = torch.Generator(torch.device("cuda", device)).manual_seed(0)
    torch.cuda.default_generators[device].graphsafe_set_state(fresh)


def between(work: Callable[[], object]) -> float:
    """Seconds of device time. The device waits a little first, for the host to get ahead."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(AHEAD)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def waits(call: Callable[[], object], device: torch.device) -> str | None:
    """Why a call can be in no graph: the host waits for the device in it, as for an `.item()`.

    Found by PyTorch's own check before a capture is tried, because one that breaks leaves traces.
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

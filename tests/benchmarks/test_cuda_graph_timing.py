"""Samples of a GPU's time, on a simulated GPU: graphs, and calls that cannot be captured."""

import contextlib
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from irongpt import cuda_graph, timing


class Clock:
    """A stream of a GPU: the host queues a call in `LAUNCH` seconds, and the device runs it."""

    LAUNCH = 1e-5

    def __init__(self) -> None:
        self.host = self.device = 0.0
        self.capturing: list[float] | None = None
        self.waits: list[float] = []

    def queue(self, seconds: float) -> None:
        if self.capturing is not None:
            self.capturing.append(seconds)
            return
        self.host += self.LAUNCH
        self.device = max(self.device, self.host) + seconds


@pytest.fixture
def gpu(monkeypatch) -> Clock:
    """CUDA's events and graphs on such a clock."""
    clock = Clock()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            pass

        def record(self) -> None:
            clock.queue(0.0)
            self.at = clock.device

        def synchronize(self) -> None:
            clock.host = max(clock.host, self.at)

        def elapsed_time(self, end: "Event") -> float:
            return 1e3 * (end.at - self.at)

    class Graph:
        nodes: list[float]

        def replay(self) -> None:
            clock.queue(sum(self.nodes))

    @contextlib.contextmanager
    def graph(made: Graph, pool: object, stream: object) -> Iterator[None]:
        made.nodes = clock.capturing = []
        try:
            yield
        finally:
            clock.capturing = None

    def sleep(cycles: int) -> None:
        clock.waits.append(cycles / 2e9)
        clock.queue(cycles / 2e9)

    def synchronize(device: object) -> None:
        clock.host = max(clock.host, clock.device)

    fakes = dict(Event=Event, CUDAGraph=Graph, graph=graph, current_stream=lambda: None)
    fakes |= dict(synchronize=synchronize, _sleep=sleep, graph_pool_handle=lambda: (0, 1))
    fakes |= dict(get_sync_debug_mode=lambda: 0, set_sync_debug_mode=lambda mode: None)
    fakes |= dict(empty_cache=lambda: None, get_rng_state=lambda: None)
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return clock


CUDA = torch.device("cuda")


@pytest.mark.parametrize("busy", [1e-6, 3e-5, 4e-3, 0.1])
def test_a_sample_is_the_time_of_the_device(gpu, busy: float) -> None:
    """It contains neither the launch latency nor the time of the host."""
    found = timing.measure({"": lambda i: gpu.queue(busy)}, 3, CUDA, rounds=4)[""]
    assert found.graph
    assert found.no_graph_reason is None
    assert found.host >= 0
    assert found.samples == pytest.approx([busy] * 4, rel=1e-3)
    assert all(wait > 50 * Clock.LAUNCH for wait in gpu.waits)


def test_a_sample_takes_5_ms_unless_that_is_too_many_calls(gpu) -> None:
    work = timing.Work(lambda i: gpu.queue(1e-5))
    made = timing.Replay(work, 4)
    assert made.n * made.repeats * 1e-5 == pytest.approx(timing.SAMPLE, rel=0.2)
    assert made.n * 1e-5 == pytest.approx(timing.GRAPH, rel=0.2)
    assert timing.Replay(work, 500).n == 500
    tiny = timing.Replay(timing.Work(lambda i: gpu.queue(1e-9)), 2)
    assert (tiny.n, tiny.repeats) == (timing.MAX_CALLS, timing.MAX_REPLAYS)
    assert timing.Replay(timing.Work(lambda i: gpu.queue(1.0)), 2).repeats == 1


def test_a_graph_uses_all_copies_and_keeps_their_outputs(gpu) -> None:
    class Output:
        pass

    captured: list[int] = []
    alive: weakref.WeakSet[Output] = weakref.WeakSet()
    most = 0

    def call(i: int) -> Output:
        nonlocal most
        gpu.queue(1e-4)
        out = Output()
        if gpu.capturing is not None:
            captured.append(i)
            alive.add(out)
            most = max(most, len(alive))
        return out

    timing.measure({"": call}, 3, CUDA, rounds=2)
    assert captured == [0, 1, 2] + [0, 1, 2] * 3  # the second graph takes a millisecond
    assert most == 4  # that of each copy, and the new one


def test_the_forward_of_a_backward_is_captured_too(gpu) -> None:
    """A backward in a graph starts from a forward in a graph; one outside from one outside."""
    seen: list[tuple[bool, bool]] = []

    def backward(made: bool, i: int) -> None:
        seen.append((made, gpu.capturing is not None))
        gpu.queue(1e-5)

    work = timing.Work(backward, lambda i: gpu.capturing is not None)
    assert timing.measure({"": work}, 2, CUDA, rounds=2)[""].graph
    assert set(seen) == {(False, False), (True, True)}


def test_a_call_that_waits_for_the_device_is_not_captured(gpu, monkeypatch) -> None:
    mode: list[object] = [0]
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda m: mode.__setitem__(0, m))

    def call(i: int) -> None:
        gpu.queue(1e-5)
        assert gpu.capturing is None
        if mode[0] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    found = timing.measure({"": call}, 2, CUDA, rounds=4)[""]
    assert not found.graph
    assert "synchronizing" in found.no_graph_reason
    assert len(found.samples) == 4
    assert mode == [0]


def test_a_failed_capture_is_recovered_from_and_has_a_reason(gpu, monkeypatch) -> None:
    recovered: list[object] = []
    monkeypatch.setattr(cuda_graph, "recover", lambda pool, state: recovered.append(pool))

    def call(i: int) -> None:
        if gpu.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        gpu.queue(1e-5)

    calls = {"breaks": call, "works": lambda i: gpu.queue(1e-5)}
    found = timing.measure(calls, 2, CUDA, rounds=4)
    assert not found["breaks"].graph
    assert "not permitted" in found["breaks"].no_graph_reason
    assert len(found["breaks"].samples) == 4
    assert found["works"].graph
    assert recovered == [(0, 1)]


@pytest.mark.gpu
def test_a_broken_capture_leaves_the_process_usable() -> None:
    """The host looks at a value within a capture; then a graph with dropout is captured."""
    x = torch.ones(1000, device="cuda")
    with timing.stream(CUDA):
        with pytest.raises(RuntimeError), cuda_graph.capture(torch.cuda.CUDAGraph()):
            F.dropout(x, 0.5).sum().item()
        torch.rand(3, device="cuda")
        torch.cuda.empty_cache()
        calls = {"waits": lambda i: x.sum().item(), "drops": lambda i: F.dropout(x, 0.5)}
        found = timing.measure(calls, 2, CUDA, rounds=3)
    assert not found["waits"].graph
    assert "synchronizing" in found["waits"].no_graph_reason
    assert found["drops"].graph, found["drops"].no_graph_reason


@pytest.mark.gpu
def test_attentions_backward_with_dropout_is_captured_with_its_forward() -> None:
    def forward(i: int) -> torch.Tensor:
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION]):
            return F.scaled_dot_product_attention(x, x, x, dropout_p=0.2, is_causal=True)

    def backward(y: torch.Tensor, i: int) -> object:
        return torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)

    with timing.stream(CUDA):
        x = torch.randn(2, 2, 64, 64, device="cuda", dtype=torch.float16, requires_grad=True)
        found = timing.measure({"": timing.Work(backward, forward)}, 2, CUDA, rounds=3)[""]
    assert found.graph, found.no_graph_reason

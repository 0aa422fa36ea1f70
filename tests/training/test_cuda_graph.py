"""The training step as a CUDA graph would replay it, by a stand-in that runs on a CPU."""

import contextlib
import functools
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from cpu_graph import CpuGraph
from irongpt_kernels import eager
from test_trainer import assert_same_params, train, trainer

from irongpt import cuda_graph
from irongpt.cuda_graph import WARMUP, Graph


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_replays_are_the_steps_bitwise(dtype: torch.dtype, optimizer: str) -> None:
    options = dict(
        ops=eager, dtype=dtype, dropout=0.2, optimizer=optimizer, grad_accum=2, decay="cosine"
    )
    plain, graphed = trainer(**options), trainer(**options)
    graphed.run_step = CpuGraph(graphed._run_step, "step")
    found = []
    for t in (plain, graphed):
        rows = train(t, WARMUP + 2)
        t.optimizer.scale *= 2**6  # gradients in float16 overflow
        found.append(torch.cat((rows, train(t, 6))))
    assert graphed.run_step.events == ["capture", *["replay"] * 8]
    assert found[0][:, 1].isfinite().all() == (dtype == torch.float32)
    assert found[0][-1].isfinite().all()
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)
    assert_same_params(plain, graphed)


def test_a_cpu_has_no_graph() -> None:
    assert not isinstance(trainer().run_step, Graph)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("operation not permitted\nwhen stream is capturing"), "not permitted when"),
        (torch.cuda.OutOfMemoryError("tried to allocate"), "out of memory: OutOfMemoryError"),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"), "out of memory: RuntimeError"),
    ],
)
def test_a_run_whose_capture_fails_goes_on_launching(error, said, capsys) -> None:
    options = dict(ops=eager, dropout=0.2)
    plain, graphed = trainer(**options), trainer(**options)
    graphed.run_step, failures = CpuGraph(graphed._run_step, "step", error), Graph.failures
    assert torch.equal(train(plain, WARMUP + 4), train(graphed, WARMUP + 4))
    assert Graph.failures == failures + 1
    assert_same_params(plain, graphed)
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "--no-graph" in line
    assert said in line


class _Cuda:
    """Stands in for torch.cuda: notes what is called, and on which stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, end: Exception | None = None) -> None:
        self.current, self.end, self.made, self.used = "default", end, [], []
        self.graphs: list[weakref.ref] = []  # that were made
        fakes = dict(Stream=self.new_stream, stream=self.stream, current_stream=self.current_stream)
        fakes |= dict(CUDAGraph=self.new_graph, graph=self.graph)
        fakes |= dict(device=contextlib.nullcontext, graph_pool_handle=lambda: "pool")
        fakes |= dict(get_rng_state=lambda: "state")
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(cuda_graph, "recover", lambda *given: self.used.append(given))
        side_stream = functools.cache(cuda_graph.side_stream.__wrapped__)
        monkeypatch.setattr(cuda_graph, "side_stream", side_stream)

    def new_stream(self, device: torch.device) -> SimpleNamespace:
        self.made.append(device)
        return SimpleNamespace(device=device, wait_stream=lambda other: None)

    @contextlib.contextmanager
    def stream(self, stream: object):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph: object, pool: object, stream: object):
        self.used.append(stream)
        assert not gc.isenabled()
        yield
        if self.end:
            raise self.end

    def current_stream(self, device: object = None) -> object:
        return SimpleNamespace(wait_stream=lambda s: None) if device else self.current

    def new_graph(self) -> "_Recorded":
        graph = _Recorded()
        self.graphs.append(weakref.ref(graph))
        return graph


class _Recorded:
    def replay(self) -> None:
        pass

    reset = replay


class _Owner:
    def __init__(self, index: int = 0, error: Exception | None = None) -> None:
        self.calls, self.error = 0, error
        self.graph = Graph(self.step, torch.device("cuda", index), 1)

    def step(self) -> None:
        self.calls += 1
        if self.error and not gc.isenabled():
            raise self.error


def replaying(index: int = 0) -> _Owner:
    owner = _Owner(index)
    for _ in range(3):
        owner.graph()
    return owner


def test_a_capture_is_on_the_one_side_stream_of_its_device(monkeypatch) -> None:
    cuda = _Cuda(monkeypatch)
    for index in (0, 0, 1):
        replaying(index)
    assert cuda.made == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert [stream.device.index for stream in cuda.used] == [0, 0, 1]
    assert gc.isenabled()


@pytest.mark.parametrize("where", ["within", "at the end"])
def test_a_broken_capture_is_recovered_from_and_its_first_error_shown(
    where, monkeypatch, capsys
) -> None:
    cuda = _Cuda(monkeypatch, None if where == "within" else ValueError("invalidated"))
    owner = _Owner(0, ValueError("a sync") if where == "within" else None)
    owner.graph()
    with monkeypatch.context() as patch:
        patch.setattr(gc, "collect", lambda: None)
        owner.graph()
        owner.graph()
        owner.error = cuda.end = None
    assert cuda.used[1:] == [("pool", "state")]
    assert [graph() for graph in cuda.graphs] == [None]  # no cycle keeps it
    assert gc.isenabled()
    assert cuda.current == "default"
    assert ("a sync" if where == "within" else "invalidated") in capsys.readouterr().err


def test_a_closed_graph_is_launched(monkeypatch) -> None:
    cuda = _Cuda(monkeypatch)
    owner = replaying()
    owner.graph.close()
    assert [graph() for graph in cuda.graphs] == [None]
    before = owner.calls
    owner.graph()
    assert owner.calls == before + 1
    assert len(cuda.graphs) == 1


def test_the_graph_of_an_object_dies_with_it(monkeypatch) -> None:
    _Cuda(monkeypatch)
    owner = replaying()
    gone = weakref.ref(owner.graph)
    gc.disable()
    try:
        del owner
        assert gone() is None
    finally:
        gc.enable()

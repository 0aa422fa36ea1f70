"""How seconds are measured: turns, graphs, copies of the inputs, and where no graph can be had."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import timing

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def test_providers_take_turns() -> None:
    order: list[str] = []
    calls = {name: lambda i, name=name: order.append(name) for name in "abc"}
    found = timing.measure(calls, 1, CPU, rounds=3)
    turns = "".join(name for i, name in enumerate(order) if i == 0 or name != order[i - 1])
    assert turns.endswith("abcbcacab")  # abc, bca, cab
    assert [len(t.samples) for t in found.values()] == [3, 3, 3]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """CUDA's events and graphs, played by a clock. Counts what is captured and replayed."""
    count = {"captured": 0, "replayed": 0, "capturing": 0}

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            pass

        def record(self) -> None:
            self.at = time.perf_counter()

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: "Event") -> float:
            return 1e3 * (end.at - self.at)

    class Graph:
        def replay(self) -> None:
            count["replayed"] += 1

    @contextlib.contextmanager
    def graph(made: Graph, stream: object) -> Iterator[None]:
        count["capturing"] = 1
        try:
            yield
        finally:
            count["capturing"] = 0

    fakes = dict(Event=Event, CUDAGraph=Graph, graph=graph, current_stream=lambda: None)
    fakes["synchronize"] = lambda device: None
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return count


def test_a_graph_takes_all_copies_of_the_inputs_in_turn(gpu: dict[str, int]) -> None:
    captured: list[int] = []
    plain: list[int] = []

    def call(i: int) -> None:
        (captured if gpu["capturing"] else plain).append(i)

    found = timing.measure({"": call}, 3, torch.device("cuda"), rounds=4)[""]
    assert found.graph
    assert found.host >= 0
    assert len(found.samples) == 4
    assert gpu["replayed"] == 2 + 4
    assert len(captured) % 3 == 0
    assert captured == [i % 3 for i in range(len(captured))]


def test_what_cannot_be_captured_is_timed_and_says_so(gpu: dict[str, int]) -> None:
    def call(i: int) -> None:
        if gpu["capturing"]:
            raise RuntimeError("operation not permitted when stream is capturing")

    found = timing.measure({"": call}, 2, torch.device("cuda"), rounds=4)[""]
    assert not found.graph
    assert len(found.samples) == 4


def test_copies_of_the_inputs_pass_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(L2_cache_size=60 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    device = torch.device("cuda")
    assert timing.copies(38 << 20, device) == 4
    assert timing.copies(1 << 30, device) == 2
    assert timing.copies(1, device) == timing.COPIES
    assert timing.copies(1, CPU) == 1


def test_nothing_is_needed_but_torch_triton_and_numpy() -> None:
    """make gpu, where nothing can be installed."""
    blocked = ["matplotlib", "tqdm", "safetensors", "pytest_benchmark", "pynvml", "transformers"]
    modules = ["gpu", "kernels", "train", "decode", "runs"]
    code = f"import sys; sys.modules |= dict.fromkeys({blocked!r})\n"
    code += "\n".join(f"import benchmarks.{name}" for name in modules)
    code += "\nimport irongpt.compare, irongpt.doctor, irongpt.cli"
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = {**os.environ, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


def test_median_and_spread() -> None:
    t = timing.Timing([1.0, 2.0, 3.0, 4.0, 100.0], False)
    assert t.median == 3.0
    assert t.iqr == pytest.approx(50.5)  # the quartiles are 1.5 and 52

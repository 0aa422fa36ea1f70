"""How seconds are measured: interleaved, in groups, with copies of the inputs; and their spread."""

import math
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from benchmarks.suite import __main__ as suite
from irongpt import timing

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def test_providers_are_interleaved() -> None:
    order: list[str] = []
    calls = {name: lambda i, name=name: order.append(name) for name in "abc"}
    found = timing.measure(calls, 1, CPU, rounds=3)
    sampled = "".join(name for i, name in enumerate(order) if i == 0 or name != order[i - 1])
    assert sampled.endswith("abcbcacab")  # abc, bca, cab
    assert [len(t.samples) for t in found.values()] == [3, 3, 3]


def test_providers_that_do_not_fit_together_are_measured_in_groups() -> None:
    """There is memory for two units."""
    held: weakref.WeakSet = weakref.WeakSet()

    class Held:
        def __init__(self, size: int) -> None:
            if size + sum(other.size for other in held) > 2:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            self.size = size
            held.add(self)

    def provider(size: int) -> timing.Work:
        return timing.Work(lambda made, i: None, lambda i: Held(size))

    works = {name: provider(size) for name, size in dict(a=1, b=1, c=1, huge=3, d=1).items()}
    found = timing.measure(works, 1, CPU, rounds=2)
    assert found.pop("huge") == "out of memory"
    assert {name: t.group for name, t in found.items()} == dict(a=0, b=0, c=1, d=2)
    assert all(len(t.samples) == 2 for t in found.values())


def test_memory_is_freed_after_a_failure_and_a_group_alone(monkeypatch) -> None:
    """It would take memory from those that are ready, which they would allocate again in a sample,
    and the time of a garbage collection for each of hundreds of candidates."""
    free = Mock()
    monkeypatch.setattr(timing, "free", free)
    good = {"a": lambda i: None, "b": lambda i: None}
    timing.measure(good, 1, CPU, rounds=1)
    assert free.call_count == 1
    timing.measure(good | {"c": Mock(side_effect=RuntimeError)}, 1, CPU, rounds=1)
    assert free.call_count == 3


def test_copies_of_the_inputs_exceed_the_cache(monkeypatch) -> None:
    properties = SimpleNamespace(L2_cache_size=60 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    device = torch.device("cuda")
    assert timing.copies(38 << 20, device) == 4
    assert timing.copies(1 << 30, device) == 2
    small = 2048 * 104 * 2  # logits of 8 sequences: all copies together exceed the cache
    assert timing.copies(small, device) * small > 2 * (60 << 20)
    assert (
        timing.copies(0, device) == timing.copies(1, device) == timing.SMALL_INPUT_COPIES
    )  # no number of copies would exceed it
    least = (60 << 20) // timing.MAX_COPIES
    assert timing.copies(least, device) == timing.SMALL_INPUT_COPIES
    assert timing.copies(least + 1, device) == timing.MAX_COPIES  # slightly more than the cache
    assert timing.copies(1, CPU) == 1
    assert timing.cold(timing.copies(small, device) * small, device)
    assert not timing.cold(timing.copies(500, device) * 500, device)
    assert timing.cold(1 << 40, CPU) is None


def test_only_torch_triton_numpy_and_regex_are_needed() -> None:
    """By the GPU suite, where nothing can be installed, and by the tests that it runs."""
    blocked = ["matplotlib", "tqdm", "safetensors", "pytest_benchmark", "pynvml", "transformers"]
    blocked += ["hypothesis", "xdist"]
    modules = ["suite.__main__", "ops.__main__", "training.__main__", "decode", "train_runs"]
    code = f"import sys; sys.modules |= dict.fromkeys({blocked!r})\n"
    code += "\n".join(f"import benchmarks.{name}" for name in modules)
    code += "\nimport irongpt.compare.command, irongpt.doctor, irongpt.cli\n"
    files = suite.test_files("emulated", gpu=True)[0]
    assert len(files) > 20
    code += f"\nimport pytest, contextlib\nfor name in {[f.stem for f in files]}:\n"
    code += "    with contextlib.suppress(pytest.skip.Exception):\n        __import__(name)"
    folders = [ROOT, *(ROOT / name for name in ("kernels", "tests", "tests/helpers"))]
    path = os.pathsep.join(map(str, folders + [f.parent for f in files]))
    env = {**os.environ, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


@pytest.mark.parametrize(
    ("samples", "median", "iqr"),
    [
        ([1.0, 2.0, 3.0, 4.0, 100.0], 3.0, 50.5),  # the quartiles are 1.5 and 52
        ([1.0, 2.0, 4.0], 2.0, 3.0),
        ([1.0, 1.0], 1.0, math.nan),
        ([1.0], 1.0, math.nan),
    ],
)
def test_median_and_spread(samples: list[float], median: float, iqr: float) -> None:
    t = timing.Timing(samples, False)
    assert t.median == median
    assert t.iqr == pytest.approx(iqr, nan_ok=True)

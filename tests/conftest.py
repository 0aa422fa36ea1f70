import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from poison import poison

from irongpt.cli import main
from irongpt.device import reserve_workspace

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton
os.environ["IRONGPT_TUNED"] = "off"  # what this user's GPU measured is no part of a test
reserve_workspace()  # a run in the command line's tests asks for determinism

# A run of a second: 2 layers, 30 steps, an evaluation every 10.
TINY = [
    "--preset",
    "nano",
    "--n-layer",
    "2",
    "--n-head",
    "2",
    "--n-embd",
    "16",
    "--context",
    "16",
    "--batch-size",
    "4",
    "--iters",
    "30",
    "--eval-every",
    "10",
    "--warmup",
    "2",
    "--lr",
    "0.01",
    "--device",
    "cpu",
    "--data",
    "text.txt",
]


class Result(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Result]


def pytest_runtest_setup(item: pytest.Item) -> None:
    torch.set_num_threads(1)  # tensors here are small, and two processes may run at a time
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def _determinism() -> Iterator[None]:
    """A run asks for it, for the whole process, and other tests share this one."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """What nobody has written is NaN, in every test: in the kernels' outputs, and in a KV cache."""
    with poison():
        yield


@pytest.fixture(autouse=True)
def _products() -> Iterator[None]:
    if not (os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton")):
        yield
        return
    from interpreter_matmul import repeatable  # imports Triton

    with repeatable():
        yield


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys) -> Cli:
    """The command line in an empty folder that has a text.txt of 6,000 characters."""
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text.txt")

    def run(*args: object) -> Result:
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def run(cli: Cli) -> str:
    assert cli("train", *TINY, "--out", "run").code == 0
    return "run"


def assert_mistake(result: Result, message: str) -> None:
    assert result.code == 2
    assert message in result.err
    assert result.err.startswith("irongpt: error: ")
    assert result.err.count("\n") == 1
    assert len(result.err) <= 400


def write_text(path: Path) -> None:
    words = [
        "all",
        "happy",
        "families",
        "are",
        "alike",
        "every",
        "unhappy",
        "family",
        "is",
        "unhappy",
        "in",
        "its",
        "own",
        "way",
    ]
    text = "".join(words[i * i % len(words)] + (" \n"[i % 11 == 10]) for i in range(2000))
    path.write_text(text[:6000])

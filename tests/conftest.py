import contextlib
import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from fake_gpu import fake_gpu
from poison import poison

from irongpt import files
from irongpt.cli import main
from irongpt.config import PRESETS
from irongpt.data.download import cache_folder
from irongpt.device import reserve_workspace

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton
# Tests read the downloaded corpus, if there is one, and write what they cache elsewhere.
_cache = tempfile.TemporaryDirectory(prefix="irongpt-tests-")
for _file in cache_folder().glob("*.txt"):
    os.symlink(_file.resolve(), Path(_cache.name) / _file.name)
os.environ["IRONGPT_DATA"] = _cache.name
os.environ["IRONGPT_TUNED"] = "off"  # tests do not use a launch table measured on this GPU
reserve_workspace()  # runs turn on determinism
# A job in the background ignores Ctrl-C, and nohup SIGHUP; a run keeps a signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if find_spec("hypothesis"):  # the same examples in every run, however slow the machine is
    from hypothesis import HealthCheck, settings

    slow = [HealthCheck.too_slow]
    settings.register_profile(
        "repeatable", derandomize=True, deadline=None, suppress_health_check=slow
    )
    settings.load_profile("repeatable")

# A run of half a second: 2 layers, 30 steps, an evaluation every 10.
TINY = (
    "--preset nano --n-layer 2 --n-head 2 --n-embd 16 --context 16 --batch-size 4 --iters 30 "
    "--eval-every 10 --warmup 2 --lr 0.01 --device cpu --data text.txt"
).split()
WORDS = "all happy families are alike every unhappy family is unhappy in its own way".split()


class Result(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Result]


def pytest_collection_finish() -> None:
    """Collections of garbage no longer look at the imported modules, which takes 0.3 s each."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    torch.set_num_threads(1)  # tensors here are small, and two processes may run at a time
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    """Memory that was never written, such as a kernel's output, is NaN. The interpreter is faster,
    and the bits of its matmuls are independent of the layout. Resets what a run turns on for the
    process."""
    interpreter = contextlib.nullcontext
    if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
        from interpreter_matmul import repeatable as interpreter  # imports Triton
    with poison(), interpreter():
        yield
    torch.set_deterministic_debug_mode("default")


def make_quick(patch: pytest.MonkeyPatch, plots: bool = False) -> None:
    """Runs evaluate on few sequences, sample few tokens, measure no peak FLOP/s, draw no plot."""
    patch.setitem(PRESETS["nano"].train, "eval_windows", 8)
    patch.setitem(PRESETS["nano"].train, "sample_tokens", 20)  # more than a context of TINY
    patch.setattr("irongpt.device.peak_flops", lambda *_: (1e11, "not measured"))
    if not plots and find_spec("matplotlib"):
        patch.setattr("irongpt.runs.plots.loss_png", lambda *_: b"not drawn")


@pytest.fixture
def real_plots() -> None:
    """Requested by a test that looks at loss.png."""


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys, request) -> Cli:
    """The command line, in a folder that has only a text.txt of 6,000 characters. It has to end
    with the exit code `code`."""
    monkeypatch.chdir(tmp_path)
    make_quick(monkeypatch, plots="real_plots" in request.fixturenames)
    write_text(tmp_path / "text.txt")

    def run(*args: object, code: int = 0) -> Result:
        capsys.readouterr()
        result = Result(main([str(arg) for arg in args]), *capsys.readouterr())
        assert result.code == code, result.err or result.out
        return result

    return run


def train_in(folder: Path, *args: str) -> None:
    """A run in `folder` / run, before any test's own fixtures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_quick(patch)
        assert main(["train", *args, "--out", "run"]) == 0


def copy_run(run: Path, to: Path, data: object) -> None:
    """Copies a run folder, and makes its configuration name the data's copy."""
    shutil.copytree(run, to)
    values = files.unsealed((to / "config.json").read_bytes(), to / "config.json")
    (to / "config.json").write_bytes(files.sealed({**values, "data": data}))


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory) -> Path:
    """A finished run of TINY, which is trained once and copied by `run`."""
    folder = tmp_path_factory.mktemp("trained")
    write_text(folder / "text.txt")
    train_in(folder, *TINY)
    return folder / "run"


@pytest.fixture
def run(cli, trained_run, tmp_path) -> str:
    """A copy of the trained run, in the folder of `cli`."""
    copy_run(trained_run, tmp_path / "run", str(tmp_path / "text.txt"))
    return "run"


@pytest.fixture
def h200(tmp_path, monkeypatch) -> SimpleNamespace:
    """Fakes an H200, and an empty folder for measured options, which are used."""
    monkeypatch.setenv("IRONGPT_DATA", str(tmp_path / "cache"))
    monkeypatch.delenv("IRONGPT_TUNED")
    return fake_gpu(monkeypatch, "NVIDIA H200", (9, 0))


def assert_mistake(cli: Cli, message: str, *args: object) -> Result:
    result = cli(*args, code=2)
    assert message in result.err
    assert result.err.startswith("irongpt: error: ")
    assert result.err.count("\n") == 1
    assert len(result.err) <= 400
    return result


def assert_refused(cli: Cli, message: str, *args: object) -> None:
    """A mistake that changes nothing in the working directory."""
    before = contents(Path())
    assert_mistake(cli, message, *args)
    assert contents(Path()) == before


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file, and None for every folder."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


def write_text(path: Path) -> None:
    words = (WORDS[i * i % len(WORDS)] + (" \n"[i % 11 == 10]) for i in range(2000))
    path.write_text("".join(words)[:6000])

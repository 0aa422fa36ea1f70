"""`irongpt train` in several processes: signals, deaths, restarts, and mistakes of one line."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import assert_mistake, assert_refused, write_text
from fake_gpu import fake_gpu
from processes import FLAGS, KILL, TERM, command, launch, send, shown
from run_helpers import assert_same, state

from irongpt.config import PRESETS
from irongpt.training import distributed
from irongpt.training.distributed import (
    ENDED,
    FAILED,
    HEARTBEAT,
    HEARTBEAT_TIMEOUT,
    Torchrun,
    World,
)
from irongpt.training.trainer import Trainer

SHARDED = ["train", *FLAGS, "--optimizer", "muon", "--dropout", "0.1", "--ops", "eager"]
RESUME = ["train", "--resume", "run"]
DIED = "irongpt: error: process 1 of 2 has died: the others end; continue with --resume"


@pytest.fixture
def folder(tmp_path) -> Path:
    write_text(tmp_path / "text.txt")
    return tmp_path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """The run of one process that computes both shards."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    write_text(folder / "text.txt")
    assert launch(1, command, folder, [*SHARDED, "--shards", "2"]) == [0]
    return folder / "run"


def test_a_run_in_two_one_and_two_processes_is_the_run_of_one(
    cli, folder, uninterrupted, monkeypatch
) -> None:
    """A signal to one process, the death of one, and a signal to the only one end the first three
    parts."""
    codes = launch(2, command, folder, SHARDED, {1: (9, TERM)})
    assert codes == [128 + TERM] * 2
    assert "saved; continue" in shown(folder, 0)
    assert shown(folder, 1) == ""
    assert state(folder / "run")["step"] == 12  # the next step whose results are read

    assert launch(2, command, folder, RESUME, {1: (20, KILL)}) == [1, -KILL]
    assert shown(folder, 0).splitlines()[-1] == DIED
    assert state(folder / "run")["step"] == 18

    monkeypatch.setitem(PRESETS["nano"].train, "sample_tokens", 4)
    monkeypatch.setattr(Trainer, "_fill_inputs", Trainer._fill_inputs)  # restored at the end
    send(27, TERM)
    cli(*RESUME, code=128 + TERM)
    assert state(folder / "run")["step"] == 28

    assert launch(2, command, folder, RESUME) == [0, 0]
    assert_same(folder / "run", uninterrupted)

    target = ["--target-loss", "9", "--eval-every", "36", "--out", "target"]
    assert launch(2, command, folder, [*SHARDED, *target]) == [0, 0]
    assert "target loss reached at step 20" in shown(folder, 0)


@pytest.fixture
def watch(monkeypatch) -> Torchrun:
    """The first of two processes, which hangs in an exchange. The second writes to its store."""
    monkeypatch.setattr(distributed, "HEARTBEAT", 0.01)
    monkeypatch.setattr(os, "_exit", sys.exit)
    world = Torchrun.__new__(Torchrun)
    world.rank, world.size, world.timeout, world.last = 0, 2, 0.1, ENDED
    world.watch, world.ended = dist.HashStore(), threading.Event()
    return world


@pytest.mark.parametrize(("last", "code", "line"), [("7", 1, f"{DIED}\n"), (f"{FAILED}2", 2, "")])
def test_a_process_that_hangs_or_has_failed_ends_the_others_within_a_minute(
    watch, capsys, last: str, code: int, line: str
) -> None:
    watch.watch.set("1", last)
    with pytest.raises(SystemExit) as ended:
        watch._watch()
    assert (ended.value.code, capsys.readouterr().err) == (code, line)
    assert HEARTBEAT_TIMEOUT + 10 * HEARTBEAT < 60


def fails_to_connect(rank: int, folder: Path, dies: bool, refused: bool) -> int:
    """dies: process 1 ends while process 0 connects. refused: process 0 gets an error then."""

    def refuse(*args: object, **options: object) -> None:
        raise RuntimeError("connection refused")

    distributed.HEARTBEAT_TIMEOUT = 1.0
    if rank == 1 and dies:
        dist.init_process_group = lambda *args, **options: os._exit(3)
    if rank == 0 and refused:
        dist.init_process_group = refuse
    return command(rank, folder, SHARDED)


@pytest.mark.parametrize(
    ("dies", "refused", "codes", "line"),
    [
        (True, False, [1, 3], DIED),
        (True, True, [1, 3], DIED),
        (False, True, [2, 2], "cannot connect the processes: RuntimeError: connection refused"),
    ],
)
def test_an_error_while_the_processes_connect_ends_all(
    folder, dies: bool, refused: bool, codes: list[int], line: str
) -> None:
    assert launch(2, fails_to_connect, folder, dies, refused) == codes
    assert shown(folder, 0).splitlines()[-1].endswith(line)


def test_a_process_that_has_not_begun_has_more_time(watch, monkeypatch, capsys) -> None:
    threading.Timer(0.5, watch.ended.set).start()
    watch._watch()
    monkeypatch.setattr(distributed, "START_TIMEOUT", 0.1)
    watch.ended.clear()
    with pytest.raises(SystemExit):
        watch._watch()
    message = "irongpt: error: process 1 of 2 has not started within 0 s: the others end\n"
    assert capsys.readouterr().err == message


def test_a_process_that_has_ended_well_is_not_dead(watch) -> None:
    watch.watch.set("1", ENDED)
    threading.Timer(0.3, watch.ended.set).start()
    watch._watch()
    assert watch.watch.get("0") == ENDED.encode()


def restarted(folder: Path) -> None:
    """A process of torchrun, the second of which kills itself in the first attempt."""
    distributed.HEARTBEAT = 0.1
    torch.set_num_threads(1)
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    signals = {1: (20, KILL)} if first else None
    assert command(int(os.environ["RANK"]), folder, RESUME, signals) == 0


@pytest.fixture
def _handlers() -> Iterator[None]:
    """The signal handlers that torchrun replaces."""
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT]
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers")
def test_torchrun_restarts_a_run_that_has_died(folder, uninterrupted) -> None:
    """As `torchrun --standalone --nproc-per-node 2 --max-restarts 1 -m irongpt train --resume`."""
    from processes import server
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    server()
    assert launch(2, command, folder, SHARDED, {0: (9, TERM)}) == [128 + TERM] * 2
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=1, start_method="forkserver",
    )  # fmt: skip
    elastic_launch(config, restarted)(folder)
    lines = shown(folder, 0).splitlines()
    assert lines.count(DIED) == 1
    assert [line for line in lines if line.startswith("run ")][1:] == [
        "run       run, from step 12",
        "run       run, from step 18",
    ]
    assert_same(folder / "run", uninterrupted)


@pytest.mark.parametrize(
    ("own", "differ"),
    [("--iters 7", "--iters: 36 and 7; use the same for all"), ("--data other.txt", "text: ")],
)
def test_what_differs_between_processes_is_one_line(folder, own: str, differ: str) -> None:
    (folder / "other.txt").write_text((folder / "text.txt").read_text()[::-1])
    assert launch(2, command, folder, ["train", *FLAGS], None, {1: own.split()}) == [2, 2]
    (line,) = (shown(folder, 0) + shown(folder, 1)).splitlines()
    assert line.startswith(f"irongpt: error: processes 0 and 1 differ in {differ}")
    assert not (folder / "run").exists()


class Two(World):
    """The first of two processes, without the other."""

    size = 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shards", "1"], "2 processes cannot share 1 shards evenly"),
        (["--batch-size", "5"], "--batch-size (5) must be divisible by --shards (2)"),
        (["--data", "-"], "several processes cannot read standard input"),
    ],
)
def test_a_wrong_world_is_one_line(cli, monkeypatch, flags: list[str], message: str) -> None:
    monkeypatch.setattr(distributed, "join", Two)
    assert_refused(cli, message, "train", *FLAGS, *flags)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "2 processes, but 1 GPUs: two processes cannot share one; use --nproc-per-node 1"),
        ("cuda:1", "--device cuda:1: torchrun gives each process its own GPU; leave the flag out"),
    ],
)
def test_two_processes_on_one_gpu_are_one_line(cli, monkeypatch, device: str, message: str) -> None:
    fake_gpu(monkeypatch, count=1 if device == "cuda" else 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(Two, "check_device", Torchrun.check_device, raising=False)
    monkeypatch.setattr(distributed, "join", Two)
    assert_refused(cli, message, "train", *FLAGS, "--device", device)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", None, "WORLD_SIZE is set, but RANK is not a number: use torchrun"),
        ("LOCAL_RANK", "one", "WORLD_SIZE is set, but LOCAL_RANK is not a number: use torchrun"),
        ("MASTER_ADDR", None, "cannot connect the processes: ValueError: "),
    ],
)
def test_a_wrong_environment_is_one_line(
    cli, monkeypatch, name: str, value: str | None, message: str
) -> None:
    numbers = dict(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_PORT="1")
    for known, number in (numbers | {"MASTER_ADDR": "127.0.0.1", name: value or ""}).items():
        monkeypatch.setenv(known, number)
    if value is None:
        monkeypatch.delenv(name)
    assert_mistake(cli, message, "train", *FLAGS)


def test_a_wrong_number_of_processes_is_one_line(cli, monkeypatch) -> None:
    fake_gpu(monkeypatch, count=2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "two")
    monkeypatch.setattr(Two, "check_device", Torchrun.check_device, raising=False)
    monkeypatch.setattr(distributed, "join", Two)
    message = "WORLD_SIZE is set, but LOCAL_WORLD_SIZE is not a number: use torchrun"
    assert_refused(cli, message, "train", *FLAGS, "--device", "cuda")

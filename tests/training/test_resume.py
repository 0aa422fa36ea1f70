"""A run that is stopped, however, and taken up again is the run that was left alone, to the bit."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import TINY, Cli, write_text
from run_helpers import assert_same, history, state

from irongpt.cli import main

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["irongpt.training.start", "torch._dynamo", "matplotlib.figure"])

# With dropout of both kinds of ops, windows of several epochs, and the state between two records.
FLAGS = [*TINY, "--dropout", "0.1", "--iters", "320", "--eval-every", "8"]


def start(folder: Path, *args: object) -> ForkServerProcess:
    """The command in a process of its own, forked from one that has imported torch and no more."""
    process = SERVER.Process(target=command, args=(folder, [str(arg) for arg in args]))
    process.start()
    return process


def command(folder: Path, args: list[str]) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    os._exit(main(args))


def wait_until(condition: Callable[[], bool], process: ForkServerProcess) -> None:
    while process.is_alive() and not condition():
        time.sleep(0.001)


@pytest.fixture(scope="module", params=["builtin", "eager"])
def alone(request, tmp_path_factory) -> Path:
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("alone")
    write_text(folder / "text.txt")
    process = start(folder, "train", *FLAGS, "--ops", request.param, "--out", "run")
    process.join()
    assert process.exitcode == 0
    return folder / "run"


def flags_of(run: Path) -> list[str]:
    ops = json.loads((run / "config.json").read_text())["train"]["ops"]
    return [*FLAGS, "--ops", ops, "--out", "run"]


def begun(run: Path) -> Callable[[], bool]:
    """Says whether the process started next has begun to train: it rewrites the metrics then."""
    metrics = run / "metrics.jsonl"
    before = metrics.stat().st_ino if metrics.exists() else None
    return lambda: metrics.exists() and metrics.stat().st_ino != before


def test_twenty_kills_at_random_moments_change_nothing(cli: Cli, tmp_path, alone):
    """SIGKILL in the set-up, and in steps, evaluations and saves after 0 to 3 new records."""
    run, rng = tmp_path / "run", random.Random(2026)
    steps = []
    for kill in range(20):
        flags = ["--resume", "run"] if run.exists() else flags_of(alone)
        has_begun = begun(run)
        process = start(tmp_path, "train", *flags)
        if kill % 5:
            wait_until(has_begun, process)
            lines = len(history(run)) + rng.randrange(4)
            wait_until(lambda lines=lines: len(history(run)) >= lines, process)
        time.sleep(rng.uniform(0, 0.05 if kill % 5 else 1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        steps.append(state(run)["step"] if run.exists() else None)
    assert len(set(steps)) > 3, "most kills fell before the first checkpoint"
    assert cli("train", "--resume", "run").code == 0
    assert_same(run, alone)
    assert not list(run.glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_leaves(cli: Cli, tmp_path, alone, number):
    """Five times in a row, wherever between two records or evaluations it strikes."""
    run, rng = tmp_path / "run", random.Random(int(number))
    steps = []
    for stop in range(5):
        seen = len(history(run))
        process = start(tmp_path, "train", *(["--resume", "run"] if stop else flags_of(alone)))
        wait_until(lambda seen=seen: len(history(run)) > seen, process)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(process.pid, number)
        process.join()
        assert process.exitcode == 128 + number
        steps.append(state(run)["step"])
    assert steps == sorted(steps)
    assert len(set(steps)) >= 3
    assert cli("train", "--resume", "run").code == 0
    assert_same(run, alone)


def test_a_second_signal_does_not_wait(tmp_path, alone):
    """Between two evaluations of a run whose first one takes long."""
    (tmp_path / "text.txt").write_bytes((alone.parent / "text.txt").read_bytes())
    slow = ["--batch-size", "1000", "--grad-accum", "1000"]  # a step of minutes
    process = start(tmp_path, "train", *flags_of(alone), *slow)
    wait_until((tmp_path / "run").exists, process)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.3)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(10)
    assert process.exitcode == -signal.SIGINT
    assert state(tmp_path / "run")["step"] == 0


def test_ops_can_change_when_a_run_is_resumed(cli: Cli, tmp_path):
    """Without dropout builtin and eager differ by rounding alone."""
    short = [*TINY, "--iters", "20"]
    assert cli("train", *short, "--ops", "eager", "--out", "a").code == 0
    assert cli("train", *short, "--iters", "10", "--decay", "constant", "--out", "b").code == 0
    assert cli("train", *short, "--decay", "constant", "--out", "c").code == 0
    assert cli("train", "--resume", "b", "--ops", "eager", "--iters", "20").code == 0
    changed, same = history(tmp_path / "b")[-1], history(tmp_path / "c")[-1]
    assert changed["step"] == same["step"] == 20
    assert changed["val_loss"] == pytest.approx(same["val_loss"], rel=1e-5)


def test_how_often_a_run_is_evaluated_changes_no_weight(cli: Cli, tmp_path):
    flags = [*FLAGS, "--iters", "24"]
    assert cli("train", *flags, "--eval-every", "24", "--out", "a").code == 0
    assert cli("train", *flags, "--eval-every", "5", "--out", "b").code == 0
    x, y = (safetensors.torch.load_file(f"{run}/last/model.safetensors") for run in "ab")
    assert all(x[k].equal(y[k]) for k in x)

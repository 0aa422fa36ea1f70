"""A run that is stopped and resumed is bitwise the run that was never interrupted."""

import os
import random
import signal
import time
from collections.abc import Callable
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from conftest import TINY, write_text
from processes import command, forks
from run_helpers import assert_same, assert_same_tensors, history, state

from irongpt.runs.run_folder import open_run
from irongpt.training.trainer import Trainer

# With dropout, batches of several epochs, and evaluations between two log lines.
FLAGS = [*TINY, *"--dropout 0.1 --batch-size 8 --iters 160 --eval-every 4".split()]
SHORT = [*TINY, "--iters", "12", "--eval-every", "12"]


def start(folder: Path, *args: object, stuck: bool = False) -> BaseProcess:
    """The command in a separate process, forked from one that has only imported torch.

    stuck: its first step never ends.
    """
    process = forks().Process(target=run_command, args=(folder, [str(arg) for arg in args], stuck))
    process.start()
    return process


def run_command(folder: Path, args: list[str], stuck: bool) -> None:
    torch.set_num_threads(1)
    if stuck:
        Trainer.train_step = endless_step
    os._exit(command(0, folder, args))


def endless_step(self: Trainer) -> None:
    """Creates the file `began`, and `noted` once a signal has arrived."""
    Path("began").touch()
    while True:
        time.sleep(0.01)
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
            Path("noted").touch()


def wait_until(condition: Callable[[], bool], process: BaseProcess) -> None:
    while process.is_alive() and not condition():
        time.sleep(0.002)


def lines(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Callable[[str], Path]:
    """The run with the given ops, trained once."""

    @cache
    def train(ops: str) -> Path:
        folder = tmp_path_factory.mktemp("uninterrupted")
        write_text(folder / "text.txt")
        process = start(folder, "train", *FLAGS, "--ops", ops, "--out", "run")
        process.join()
        assert process.exitcode == 0
        return folder / "run"

    return train


def new_or_resumed(run: Path, ops: str) -> list[str]:
    return (
        ["--resume", "run"]
        if (run / "config.json").exists()
        else [*FLAGS, "--ops", ops, "--out", "run"]
    )


def has_begun(run: Path) -> Callable[[], bool]:
    """Whether the process started next has begun to train: it rewrites the metrics then."""
    metrics = run / "metrics.jsonl"
    before = metrics.stat().st_ino if metrics.exists() else None
    return lambda: metrics.exists() and metrics.stat().st_ino != before


@pytest.mark.parametrize("ops", ["builtin", "eager"])
def test_ten_kills_at_random_moments_change_nothing(cli, tmp_path, uninterrupted, ops):
    """SIGKILL in the setup, and in steps, evaluations and saves after 0 to 3 new records."""
    run, rng = tmp_path / "run", random.Random(2026)
    steps = []
    for kill in range(10):
        begun = has_begun(run)
        process = start(tmp_path, "train", *new_or_resumed(run, ops))
        if kill % 5:
            wait_until(begun, process)
            wanted = lines(run) + rng.randrange(4)
            wait_until(lambda wanted=wanted: lines(run) >= wanted, process)
        time.sleep(rng.uniform(0, 0.05 if kill % 5 else 1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        steps.append(state(run)["step"] if (run / "config.json").exists() else None)
    assert len(set(steps)) > 3, "most kills fell before the first checkpoint"
    cli("train", "--resume", "run")
    assert_same(run, uninterrupted(ops))
    assert not list(run.glob(".*"))


@pytest.mark.parametrize(
    ("ops", "number"),
    [("builtin", signal.SIGINT), ("eager", signal.SIGTERM), ("builtin", signal.SIGHUP)],
)
def test_a_signal_saves_and_leaves(cli, tmp_path, uninterrupted, ops, number):
    """Five times in a row, at random moments between two records or evaluations."""
    run, rng = tmp_path / "run", random.Random(int(number))
    steps = []
    for _ in range(5):
        seen = lines(run)
        process = start(tmp_path, "train", *new_or_resumed(run, ops))
        wait_until(lambda seen=seen: lines(run) > seen, process)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(process.pid, number)
        process.join()
        assert process.exitcode == 128 + number
        steps.append(state(run)["step"])
    assert steps == sorted(steps)
    assert len(set(steps)) >= 3
    cli("train", "--resume", "run")
    assert_same(run, uninterrupted(ops))


def test_a_second_signal_does_not_wait(tmp_path):
    write_text(tmp_path / "text.txt")
    process = start(tmp_path, "train", *TINY, "--out", "run", stuck=True)
    wait_until((tmp_path / "began").exists, process)
    os.kill(process.pid, signal.SIGINT)
    wait_until((tmp_path / "noted").exists, process)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == -signal.SIGINT
    assert state(tmp_path / "run")["step"] == 0


def test_ops_and_graph_can_change_when_a_run_is_resumed(cli, tmp_path):
    """Without dropout builtin and eager differ by rounding alone."""

    def settings() -> tuple[str, bool]:
        recipe = open_run(tmp_path / "changed").config.train
        return recipe.ops, recipe.graph

    constant = [*SHORT, "--decay", "constant"]
    cli("train", *constant, "--out", "same")
    cli("train", *constant, "--iters", 4, "--out", "changed")
    assert settings() == ("builtin", True)
    change = "--ops eager --no-graph --iters 8".split()
    cli("train", "--resume", "changed", *change)
    cli("train", "--resume", "changed", "--iters", 12)
    assert settings() == ("eager", False)
    changed, same = (history(tmp_path / name)[-1] for name in ("changed", "same"))
    assert changed["step"] == same["step"] == 12
    assert changed["val_loss"] == pytest.approx(same["val_loss"], rel=1e-5)


def test_how_often_a_run_is_evaluated_changes_no_weight(cli, tmp_path):
    flags = [*SHORT, "--dropout", "0.1"]
    cli("train", *flags, "--out", "a")
    cli("train", *flags, "--eval-every", "5", "--out", "b")
    assert_same_tensors(tmp_path / "a/last", tmp_path / "b/last")

"""A run that is stopped, however, and taken up again is the run that was left alone, to the bit."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import TINY, Cli, write_text

from irongpt.cli import main

# With dropout of both kinds of ops, windows of several epochs, and the state between two records.
FLAGS = [*TINY, "--dropout", "0.1", "--iters", "120", "--eval-every", "8"]
SECONDS = ("seconds", "tokens_per_s", "mfu")  # what two runs need not share


def history(run: Path) -> list[dict]:
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return [{k: v for k, v in record.items() if k not in SECONDS} for record in records]


def state(run: Path) -> dict:
    state = json.loads((run / "last/state.json").read_text())
    return {k: v for k, v in state.items() if k not in ("seconds", "sha256")}


def assert_same(a: Path, b: Path) -> None:
    assert history(a) == history(b)
    for name in ("last", "best"):
        for file in ("model.safetensors", "optimizer.safetensors"):
            x, y = (safetensors.torch.load_file(run / name / file) for run in (a, b))
            assert x.keys() == y.keys()
            assert [k for k in x if not x[k].equal(y[k])] == []
    assert state(a) == state(b)
    assert (a / "sample.txt").read_text() == (b / "sample.txt").read_text()


def start(*args: object) -> int:
    """The command in a process of its own, forked so that it need not import torch again."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        code = 70
        try:
            code = main([str(arg) for arg in args])
        finally:
            os._exit(code)
    return child


def wait_for(condition, child: int) -> int | None:
    """Until the condition holds (None), or the process is gone (its exit code)."""
    while not condition():
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def code_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture(scope="module", params=["builtin", "eager"])
def alone(request, tmp_path_factory) -> Path:
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("alone")
    write_text(folder / "text.txt")
    before = os.getcwd()
    os.chdir(folder)
    assert code_of(start("train", *FLAGS, "--ops", request.param, "--out", "run")) == 0
    os.chdir(before)
    return folder / "run"


def flags_of(run: Path) -> list[str]:
    ops = json.loads((run / "config.json").read_text())["train"]["ops"]
    return [*FLAGS, "--ops", ops, "--out", "run"]


def test_twenty_kills_at_random_moments_change_nothing(cli: Cli, tmp_path, alone):
    """SIGKILL at any moment from the start of the process on, so in the midst of saves too."""
    run = tmp_path / "run"
    rng = random.Random(2026)
    kills = 0
    while True:
        command = ["--resume", "run"] if run.exists() else flags_of(alone)
        begun = time.monotonic()
        child = start("train", *command)
        if kills < 20:
            # Some moments in the set-up, most between the first steps and the third checkpoint.
            end = begun + rng.uniform(0, 1.5)
            code = wait_for(lambda end=end: time.monotonic() > end, child)
            if code is None:
                os.kill(child, signal.SIGKILL)
                code = code_of(child)
                kills += code == -signal.SIGKILL
        else:
            code = code_of(child)
        assert code in (0, -signal.SIGKILL)
        if code == 0:
            break
    assert_same(run, alone)
    assert not list(run.glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves(cli: Cli, tmp_path, alone, number):
    """Five times in a row, wherever between two records or evaluations it strikes."""
    run, rng = tmp_path / "run", random.Random(int(number))
    stops = []
    for stop in range(5):
        command = ["--resume", "run"] if stop else flags_of(alone)
        seen = len(history(run))
        child = start("train", *command)
        code = wait_for(lambda seen=seen: len(history(run)) > seen, child)
        assert code is None
        time.sleep(rng.uniform(0, 0.05))
        os.kill(child, number)
        assert code_of(child) == 128 + number
        stops.append(state(run)["step"])
    assert stops == sorted(stops)
    assert len(set(stops)) >= 3
    assert main(["train", "--resume", "run"]) == 0
    assert_same(run, alone)


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

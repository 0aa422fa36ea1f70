"""Starts the processes of one training as torchrun does, without a GPU as forks of one process."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import TINY, make_quick

from irongpt.cli import main
from irongpt.config import PRESETS
from irongpt.training import distributed
from irongpt.training.trainer import Trainer

FLAGS = [*TINY, *"--iters 36 --eval-every 6 --out run".split()]
PRELOADED = "processes irongpt.training.start matplotlib.figure tqdm".split()


@cache
def forks() -> Any:
    """The context of the fork server, which starts in a folder that stays, with this path."""
    context, before = multiprocessing.get_context("forkserver"), os.environ.get("PYTHONPATH")
    context.set_forkserver_preload(PRELOADED)
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    forkserver.ensure_running()
    os.environ["PYTHONPATH"] = before or ""
    return context


def server() -> Any:
    """A process that was forked cannot use CUDA, so with a GPU every process is a new
    interpreter."""
    return multiprocessing.get_context("spawn") if torch.cuda.is_available() else forks()


def launch(size: int, task: Callable[..., int | None], *args: Any) -> list[Any]:
    """Runs the task with its rank and `args` in so many processes, whose exit codes it returns.

    The store is the parent's, at a port that the system picks.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = dict(
        WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )  # fmt: skip
    made = [
        server().Process(
            target=_worker,
            args=(address | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)), task, args),
        )
        for rank in range(size)
    ]
    for process in made:
        process.start()
    for process in made:
        process.join()
    return [process.exitcode for process in made]


def _worker(
    address: dict[str, str], task: Callable[..., int | None], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ |= address
    distributed.HEARTBEAT = 0.1
    os._exit(task(int(os.environ["RANK"]), *args) or 0)


def command(
    rank: int,
    folder: Path,
    args: list[str],
    signals: dict[int, tuple[int, int]] | None = None,
    own: dict[int, list[str]] | None = None,
) -> int:
    """`irongpt`, whose output goes to a file for each process.

    signals: (step, signal) that a rank sends to itself before that step. own: more arguments of a
    rank. Returns the exit code.
    """
    os.chdir(folder)
    make_quick(pytest.MonkeyPatch())
    PRESETS["nano"].train["sample_tokens"] = 4
    if signals and rank in signals:
        send(*signals[rank])
    with open(f"{rank}.txt", "a") as file:
        sys.stdout = sys.stderr = file
        return main([*args, *(own or {}).get(rank, [])])


def send(step: int, number: int) -> None:
    """Makes this process send itself a signal before it trains that step."""
    fill = Trainer._fill_inputs

    def filled(self: Trainer) -> None:
        if self.step == step:
            os.kill(os.getpid(), number)
        fill(self)

    Trainer._fill_inputs = filled  # type: ignore[method-assign]


def shown(folder: Path, rank: int) -> str:
    return (folder / f"{rank}.txt").read_text()


TERM, KILL = signal.SIGTERM, signal.SIGKILL


def tiny() -> None:
    """Makes nano a model of a few thousand weights, whose steps take a millisecond."""
    small = dict(n_layer=1, n_head=2, n_embd=32, context=16, dropout=0.1)
    recipe = {**PRESETS["nano"].train, "batch_size": 4}
    PRESETS["nano"] = PRESETS["nano"].__class__("", small, recipe)

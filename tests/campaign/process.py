"""Commands of irongpt in processes forked from this one, with limits of time and memory."""

import faulthandler
import importlib
import multiprocessing
import os
import resource
import shutil
import sys
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import make_quick

from irongpt.cli import main
from irongpt.generation import sample
from irongpt.training import command as train_command
from irongpt.config import PRESETS

FORK = multiprocessing.get_context("fork")
SECONDS = 300.0  # of a command: a hang, also on a machine that is busy with other work
MEMORY = 1 << 30  # bytes of address space beyond those of this process
BROKEN = 70  # exit code of a command that raised
# A model of 3,500 parameters, 8 steps and two evaluations: a tenth of a second.
TINY = (
    "--preset nano --n-layer 1 --n-head 1 --n-embd 16 --context 8 --batch-size 4 --iters 8 "
    "--eval-every 4 --warmup 2 --lr 0.01 --dropout 0.1 --device cpu --data text.txt "
    "--sample-tokens 4"
).split()
for name in ("torch._inductor", "matplotlib.backends.backend_agg", "PIL.PngImagePlugin", "tqdm"):
    importlib.import_module(name)  # once, and not in every process
torch.set_num_threads(1)


class Ended(NamedTuple):
    """A command that has ended. code: minus the signal, if one has ended it."""

    code: int
    out: str
    err: str


def start(folder: Path, *args: object, before: Callable[[], Any] | None = None,
          memory: int = MEMORY, name: str = "output", **variables: str) -> ForkProcess:  # fmt: skip
    """Starts the command in `folder`; its output goes to the files NAME.out and NAME.err above.

    before: called in the new process. variables: of its environment.
    """
    streams = [folder.parent / f"{name}.{end}" for end in ("out", "err")]
    args = (folder, [str(arg) for arg in args], before, memory, streams, variables)
    process = FORK.Process(target=_run, args=args)
    process.start()
    return process


def _run(folder: Path, args: list[str], before: Any, memory: int, streams: Any, more: Any) -> None:
    code = BROKEN
    try:
        os.environ.update(more)
        os.chdir(folder)
        for fd, stream in enumerate(streams, 1):
            os.dup2(os.open(stream, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), fd)
        sys.stdin = None  # type: ignore[assignment]
        sys.stdout, sys.stderr = (os.fdopen(fd, "w") for fd in (1, 2))
        faulthandler.enable()
        make_quick(pytest.MonkeyPatch())
        PRESETS["nano"].train["eval_windows"] = 8
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        if before is not None:
            before()
        code = main(args)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc(file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)


def end(folder: Path, process: ForkProcess, name: str = "output") -> Ended:
    """Waits for the command. A crash, a traceback, or a hang is a fault."""
    process.join(SECONDS)
    hangs = process.exitcode is None
    process.kill()
    process.join()
    out, err = ((folder.parent / f"{name}.{e}").read_bytes().decode("utf-8", "surrogateescape")
                for e in ("out", "err"))  # fmt: skip
    assert not hangs, f"it does not end:\n{err[-2000:]}"
    assert process.exitcode != BROKEN, f"it raised\n{err[-3000:]}"
    return Ended(int(process.exitcode or 0), out, err)


def command(folder: Path, *args: object, **options: Any) -> Ended:
    """The command, which has to end by itself."""
    ended = end(folder, start(folder, *args, **options))
    assert ended.code >= 0, f"a crash, signal {-ended.code}\n{ended.err[-3000:]}"
    return ended


def assert_mistake(ended: Ended) -> str:
    """A mistake of the user: the exit code is 2, and one line says why. Returns the reason."""
    lines = [x for x in ended.err.splitlines() if not x.startswith("irongpt: ") or "error" in x[:16]]
    assert ended.code == 2, f"exit code {ended.code}: {ended.err[-2000:]}"
    assert len(lines) == 1, ended.err[-2000:]
    assert lines[0].startswith("irongpt: error: "), lines
    assert len(lines[0]) <= 400, lines
    return lines[0].removeprefix("irongpt: error: ")


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file, and None for every folder."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


def fill(folder: Path, files: dict[str, Any]) -> None:
    """Makes the folder anew with these files. A value may be a function that makes one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        if callable(data):
            data(path)
        elif data is not None:
            path.write_bytes(data)

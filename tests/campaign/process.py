"""Commands of irongpt in processes forked from this one, with limits of time and memory."""

import faulthandler
import importlib
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result, make_quick, write_text

from irongpt.cli import main

FORK = multiprocessing.get_context("fork")
SECONDS = 1200.0  # of a command: a hang, also on a machine that is busy with other work
MEMORY = 1 << 30  # bytes of address space beyond those of a new process
BROKEN = 70  # exit code of a command that raised
# A model of 3,500 parameters, 8 steps and two evaluations: a tenth of a second.
TINY = (
    "--preset nano --n-layer 1 --n-head 1 --n-embd 16 --context 8 --batch-size 4 --iters 8 "
    "--eval-every 4 --warmup 2 --lr 0.01 --dropout 0.1 --device cpu --data text.txt "
    "--sample-tokens 4"
).split()
PRELOADED = """irongpt.training.command irongpt.generation.command torch._inductor tqdm
matplotlib.backends.backend_agg PIL.PngImagePlugin"""


class Worker:
    """A process that runs commands in `folder`, one after the other.

    Its output goes to NAME.out and NAME.err above the folder. before: called in it at first.
    memory: bytes that it may take. variables: of its environment.
    """

    def __init__(self, folder: Path, before: Callable[[], Any] | None = None,
                 memory: int = MEMORY, name: str = "output", **variables: str) -> None:  # fmt: skip
        for module in PRELOADED.split():
            importlib.import_module(module)  # once, and not in every process
        self.streams = [folder.parent / f"{name}.{end}" for end in ("out", "err")]
        self.pipe, theirs = FORK.Pipe()
        args = (theirs, folder, before, memory, self.streams, variables)
        self.process = FORK.Process(target=_serve, args=args)
        self.process.start()
        theirs.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def start(self, *args: object) -> None:
        self.pipe.send([str(arg) for arg in args])

    def end(self) -> Result:
        """Waits for the command. A traceback and a hang are faults. A signal that has ended its
        process is a negative code."""
        code, ended = 0, self.pipe.poll(SECONDS)
        try:
            code = self.pipe.recv() if ended else 0
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = int(self.process.exitcode or 0)
        out, err = (p.read_bytes().decode("utf-8", "surrogateescape") for p in self.streams)
        assert ended, f"it does not end:\n{err[-2000:]}"
        assert code != BROKEN, f"it raised\n{err[-3000:]}"
        return Result(code, out, err)

    def __call__(self, *args: object) -> Result:
        """Runs the command, whose process has to survive it."""
        self.start(*args)
        ended = self.end()
        assert ended.code >= 0, f"a crash, signal {-ended.code}\n{ended.err[-3000:]}"
        return ended


def command(folder: Path, *args: object, **options: Any) -> Result:
    """The command in a separate process."""
    with Worker(folder, **options) as worker:
        return worker(*args)


def _serve(pipe: Any, folder: Path, before: Any, memory: int, streams: Any, more: Any) -> None:
    os.environ.update(more)
    os.chdir(folder)
    torch.set_num_threads(1)
    for fd, stream in enumerate(streams, 1):
        os.dup2(os.open(stream, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND), fd)
    sys.stdin = None  # type: ignore[assignment]
    sys.stdout, sys.stderr = (os.fdopen(fd, "w") for fd in (1, 2))
    faulthandler.enable()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the campaign has a handler
    make_quick(pytest.MonkeyPatch())
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    if before is not None:
        before()
    while True:
        args, code = pipe.recv(), BROKEN
        for fd in (1, 2):
            os.ftruncate(fd, 0)
        try:
            code = main(args)
        except BaseException:
            traceback.print_exc(file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        pipe.send(code)


def assert_mistake(ended: Result) -> None:
    """A mistake of the user: the exit code is 2, and one line says what is wrong."""
    lines = [
        x for x in ended.err.splitlines() if not x.startswith("irongpt: ") or "error" in x[:16]
    ]
    assert ended.code == 2, f"exit code {ended.code}: {ended.err[-2000:]}"
    assert len(lines) == 1, ended.err[-2000:]
    assert lines[0].startswith("irongpt: error: "), lines
    assert len(lines[0]) <= 400, lines


class Commands:
    """A campaign of commands in a folder with a text. stack: ends what it starts."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.stack = folder / "work", stack
        self.folder.mkdir()
        write_text(self.folder / "text.txt")


def fill(folder: Path, files: dict[str, Any]) -> None:
    """Makes the folder again, with these files. A value may be a function that makes one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        if callable(data):
            data(path)
        elif data is not None:
            path.write_bytes(data)

"""Commands with a time limit, whose output is shown and logged."""

import contextlib
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

GRACE = 8.0  # seconds to end after an interrupt


@dataclass
class Done:
    """status: ok, failed, timed out or skipped. says: the last line, or what there is to tell."""

    status: str
    seconds: float
    says: str = ""
    lines: list[str] = field(default_factory=list)


def run(
    command: list[str],
    env: dict[str, str],
    limit: float,
    log: Path,
    folder: Path,
    show: bool = True,
) -> Done:
    """Runs a command, for `limit` seconds at most: then it is interrupted, and killed if need be.

    What it writes goes to the terminal, if `show`, and to the end of `log`.
    """
    start = time.perf_counter()
    child = subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # what it has started itself ends with it
    )
    lines: list[str] = []

    def read() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            lines.append(line.rstrip("\n"))
            if show:
                print(line, end="", flush=True)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    timed_out = False
    try:
        child.wait(limit)
    except subprocess.TimeoutExpired:
        timed_out = True
        _signal(child, signal.SIGINT)  # a benchmark writes what it has, pytest its summary
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE)
    finally:
        _signal(child, signal.SIGKILL)
        child.wait()
    reader.join(GRACE)
    with open(log, "a", encoding="utf-8") as f:
        f.write("\n".join([f"$ {' '.join(command)}", *lines, ""]) + "\n")
    status = "timed out" if timed_out else "failed" if child.returncode else "ok"
    says = next((line for line in reversed(lines) if line.strip()), "")
    return Done(status, time.perf_counter() - start, says[:200], lines)


def run_many(
    commands: dict[str, list[str]],
    env: dict[str, str],
    limit: float,
    log: Path,
    folder: Path,
    at_once: int,
    finished: Callable[[str, Done], None],
) -> Done:
    """Several commands, `at_once` of them at a time, within `limit` seconds for all."""
    start = time.perf_counter()
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in commands:
        waiting.put(name)
    lock, statuses = threading.Lock(), []

    def work() -> None:
        while True:
            try:
                name = waiting.get_nowait()
            except queue.Empty:
                return
            left = limit - GRACE - (time.perf_counter() - start)
            done = Done("timed out", 0.0, "no time was left")
            if left > 1:
                done = run(commands[name], env, left, log, folder, show=False)
            with lock:
                statuses.append(done.status)
                finished(name, done)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(at_once)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    worst = next((s for s in ("failed", "timed out") if s in statuses), "ok")
    return Done(worst, time.perf_counter() - start)


def _signal(child: "subprocess.Popen[str]", number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)

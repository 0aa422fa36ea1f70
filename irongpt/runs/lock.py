"""One process at a time trains a run: the file .lock in its folder names it, and since when.

If that process belongs to this machine, the process table shows whether it still runs. A process on
another machine or in a container proves it by rewriting the file every HEARTBEAT seconds, because
file locks are unreliable on network drives. If the file stays the same for TIMEOUT seconds, the
process has ended.
"""

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from irongpt.console import say
from irongpt.errors import UserError
from irongpt.files import reported

NAME = ".lock"
HEARTBEAT, TIMEOUT = 20.0, 90.0  # seconds


class Lock:
    """The right to train in `folder`. Raises UserError if another process has it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self.owner = {
            "process": os.getpid(),
            "machine": platform.node(),
            "since": since,
            "id": uuid.uuid4().hex,
            **_identity(os.getpid()),
        }
        with reported(f"cannot write to {folder}", disk=folder):
            self._acquire()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._beat, name=self.owner["id"], daemon=True)
        self.thread.start()

    def _acquire(self) -> None:
        try:
            self._write("x")
            return
        except FileExistsError:
            if _lives(self.path):
                raise UserError(_refusal(self.path)) from None
        except OSError:
            self.path.unlink(missing_ok=True)
            raise
        self._write("w")
        time.sleep(0.1)  # of two processes that take over the lock, the later one has it
        self.check()

    def _write(self, mode: str) -> None:
        """mode: x or w, or r+ to overwrite the file with as many bytes, so that a process that is
        killed meanwhile, or whose disk is full, leaves no empty file."""
        with open(self.path, mode, encoding="utf-8") as f:
            f.write(json.dumps({**self.owner, "beat": time.time_ns()}))

    def _beat(self) -> None:
        while not self.ended.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                if _read(self.path).get("id") == self.owner["id"]:
                    self._write("r+")

    def check(self) -> None:
        """Raises UserError if another process has taken over, as after a long sleep of this one."""
        other = _read(self.path)
        if other and other["id"] != self.owner["id"]:
            raise UserError(_refusal(self.path))

    def release(self) -> None:
        self.ended.set()
        self.thread.join(TIMEOUT)
        with contextlib.suppress(OSError):
            if _read(self.path).get("id") == self.owner["id"]:
                self.path.unlink()


def _refusal(path: Path) -> str:
    other = _read(path)
    return (
        f"{path.parent} is trained by process {other.get('process')} on {other.get('machine')} "
        f"since {other.get('since')}: wait for it or stop it"
    )


def _read(path: Path) -> dict[str, Any]:
    """The content of the file; {} if it is missing or incomplete."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) and "id" in values else {}


def _identity(process: int) -> dict[str, Any]:
    """Distinguishes a process from a later one with the same number; {} if there is no /proc."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except (OSError, ValueError):
        return {}
    return {"boot": f"{boot} {namespace}", "started": fields[18] if state not in "ZX" else None}


def _lives(path: Path) -> bool:
    """Whether the process that wrote the file still runs. This may take up to TIMEOUT seconds."""
    other, own = _read(path), _identity(os.getpid())
    if own and other.get("boot") == own["boot"]:
        if other.get("process") == os.getpid():
            return any(thread.name == other["id"] for thread in threading.enumerate())
        return other.get("started") == _identity(int(other["process"])).get("started", "")
    try:
        age = time.time() - path.stat().st_mtime
    except OSError:
        return False
    longest = TIMEOUT if other else HEARTBEAT  # a living process completes its file at once
    rest = longest - min(max(age, 0.0), longest)
    if rest:
        why = _refusal(path) if other else f"{path} is incomplete"
        say(f"waiting   up to {rest:.0f} s to see whether that process still runs: {why}")
    end = time.monotonic() + rest
    while time.monotonic() < end:
        time.sleep(min(1.0, HEARTBEAT))
        if not path.exists():
            return False
        now = _read(path)
        if now and now != other:  # {} is read while the process rewrites the file
            return True
    return False

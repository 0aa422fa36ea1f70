"""A disk that fails at every write of a run, new or resumed: nothing is lost, and a line says why.

From write N on the disk is full, has no inode left or is read-only, one flush fails, or the disk is
slow and a signal comes meanwhile. Then it works again: the run, resumed or started again, is
bitwise the one that had no fault. Where a file system may be mounted, as root, runs also fill a
real one of every size and number of inodes that are too small.
"""

import builtins
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from conftest import Result, contents
from run_helpers import assert_same, state

from irongpt import files
from irongpt.runs import lock, run_folder
from tests.campaign.process import FORK, TINY, Commands, Worker, assert_mistake, command, fill

NEW, RESUMED = ("train", *TINY, "--out", "run"), ("train", "--resume", "run", "--iters", "8")
FAULTS = {"full": errno.ENOSPC, "no inode": errno.ENOSPC, "read-only": errno.EROFS,
          "broken": errno.EIO, "slow": 0}  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
PAGE = 4096


class Disk:
    """The writes of this process below `folder`: counts them, and lets them fail from `at` on."""

    def __init__(self, folder: Path, fault: str = "", at: int = 0) -> None:
        self.folder, self.fault, self.at = f"{folder}{os.sep}", fault, at
        self.writes = FORK.Value("i", 0)  # which the parent sees

    def install(self) -> None:
        sys.addaudithook(self.hook)
        self.fsync, self.exchange = os.fsync, files.exchange
        os.fsync, files.exchange = self.flush, self.swap
        for module in (files, lock, run_folder):
            module.open = self.opened  # type: ignore[attr-defined]

    def hook(self, event: str, args: Any) -> None:
        if event == "open" and not args[2] & WRITES:
            return
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            self.write(event, args[0])

    def flush(self, fd: int) -> None:
        self.write("fsync", os.readlink(f"/proc/self/fd/{fd}"))
        self.fsync(fd)

    def swap(self, a: Path, b: Path) -> bool:
        self.write("os.rename", a)
        return self.exchange(a, b)

    def opened(self, path: Any, mode: str = "r", **options: Any) -> Any:
        """A file, of which half is written if the disk is full."""
        file = builtins.open(path, mode, **options)  # noqa: SIM115
        if self.fault == "full" and self.writes.value >= self.at and mode != "r":

            def write(data: Any) -> None:
                type(file).write(file, data[: len(data) // 2])
                file.flush()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            file.write = write
        return file

    def write(self, event: str, path: Any) -> None:
        path = os.path.abspath(os.fsdecode(path)) if not isinstance(path, int) else ""
        if not f"{path}{os.sep}".startswith(self.folder):
            return
        deletes = event in ("os.remove", "os.rmdir")
        self.writes.value += not deletes
        now = self.writes.value
        if self.fault == "slow" and now == self.at and not deletes:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
        fails = {
            "no inode": event == "os.mkdir" or (event == "open" and not os.path.exists(path)),
            "read-only": event != "fsync",
            "broken": event == "fsync" and now == self.at,
        }
        if now >= self.at and fails.get(self.fault, False):
            raise OSError(FAULTS[self.fault], os.strerror(FAULTS[self.fault]), path)


class Case(Commands):
    """Trains on a faulty disk, and again when it works."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        super().__init__(folder, stack)
        self.run = self.folder / "run"
        self.cases: list[tuple[tuple[str, ...], str, int]] = []
        self.half: dict[str, Any] = {}
        for args in (NEW, RESUMED):
            writes = self.count_writes(args)
            self.cases += [(args, fault, n) for fault in FAULTS for n in range(1, writes + 1)]
            shutil.copytree(self.run, self.folder / f"reference{args[1]}")
            if args == NEW:
                shutil.rmtree(self.run)
                assert command(self.folder, *NEW, "--iters", "4").code == 0
                self.half = contents(self.run)
        if self.fits_a_mounted_disk():
            self.cases += [(NEW, "size", n * PAGE) for n in range(1, 60)]
            self.cases += [(NEW, "nr_inodes", n) for n in range(2, 30)]
        self.count = len(self.cases)

    def count_writes(self, args: tuple[str, ...]) -> int:
        self.begin(args)
        disk = Disk(self.run)
        assert command(self.folder, *args, before=disk.install).code == 0
        return disk.writes.value

    def fits_a_mounted_disk(self) -> bool:
        """False where no file system can be mounted."""
        self.begin(NEW)
        if not self.mounted("size=10M"):
            return False
        try:
            assert command(self.folder, *NEW).code == 0
        finally:
            self.unmount()
        return True

    def mounted(self, options: str) -> bool:
        self.run.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.run)]
        try:
            return subprocess.run(mount, capture_output=True).returncode == 0
        except OSError:
            return False
        finally:
            if not self.run.is_mount():
                self.run.rmdir()

    def unmount(self) -> None:
        subprocess.run(["umount", str(self.run)], check=True, capture_output=True)

    def begin(self, args: tuple[str, ...]) -> None:
        shutil.rmtree(self.run, ignore_errors=True)
        if args == RESUMED:
            fill(self.run, self.half)

    def __call__(self, rng: random.Random, number: int) -> str:
        args, fault, at = self.cases[number]
        self.begin(args)
        mounts = fault not in FAULTS
        try:
            if mounts:
                assert self.mounted(f"{fault}={at}")
                ended = command(self.folder, *args)
                grow = "remount,size=10M,nr_inodes=1000"
                subprocess.run(["mount", "-o", grow, str(self.run)], check=True)
            else:
                with Worker(self.folder, Disk(self.run, fault, at).install) as worker:
                    worker.start(*args)
                    ended = worker.end()
            outcome = self.check(ended, fault)
            begun = (self.run / "config.json").exists()
            again = RESUMED if begun else NEW
            done = command(self.folder, *again)
            assert done.code == 0, done.err
            assert_same(self.run, self.folder / f"reference{args[1]}")
            left = [p.name for p in self.run.glob(".*")]
            assert not left, left
        except AssertionError as e:
            raise AssertionError(f"{args[1]}, {fault} at {at}: {e}") from e
        finally:
            if mounts:
                self.unmount()
        return f"{fault}: {outcome}"

    def check(self, ended: Result, fault: str) -> str:
        """What a run may say and leave behind when the disk has a fault."""
        if fault == "slow":
            assert ended.code in (0, 143, -signal.SIGTERM), ended
        elif ended.code:
            assert_mistake(ended)
            reason = os.strerror(FAULTS.get(fault, errno.ENOSPC))
            assert reason in ended.err, ended.err
        saved = [int(line.split()[1][:-1]) for line in ended.out.splitlines()
                 if line.startswith("step ") and "validation" in line]  # fmt: skip
        if saved:
            assert state(self.run)["step"] >= saved[-1], f"step {saved[-1]} is lost"
        return "no harm" if ended.code == 0 else "stopped"

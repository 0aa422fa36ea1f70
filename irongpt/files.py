"""Atomic file writes, and JSON with a checksum."""

import contextlib
import ctypes
import errno
import hashlib
import json
import math
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from irongpt.errors import UserError, short_reason

FULL = (errno.ENOSPC, errno.EDQUOT)


def sealed(values: dict[str, Any]) -> bytes:
    """JSON that includes a digest of its values, so that a changed or truncated file is noticed."""
    return (json.dumps({**values, "sha256": _seal(values)}, indent=1) + "\n").encode()


def unsealed(data: bytes, path: Path) -> dict[str, Any]:
    """The values that `sealed` was given. Raises UserError, with `path`, if they were changed."""
    try:
        values: dict[str, Any] = json.loads(data)
        intact = values.pop("sha256") == _seal(values)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise damaged(path)
    return values


def finite(value: Any, digits: int = 17) -> Any:
    """The value for JSON: NaN and infinities become None. digits: significant ones; 17 are all."""
    if isinstance(value, dict):
        return {k: finite(v, digits) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v, digits) for v in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def _seal(values: dict[str, Any]) -> str:
    return digest(json.dumps(values, sort_keys=True).encode())


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged: it is truncated, or was changed after it was saved")


def read(path: Path) -> bytes:
    """The bytes of a file. Raises UserError, also for a pipe or a device, which may have no end."""
    with reported(f"cannot read {path}"):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"cannot read {path}: it is not a file")
        return path.read_bytes()


@contextlib.contextmanager
def reported(failure: str, disk: Path | None = None) -> Iterator[None]:
    """Turns an OSError into a UserError: the failure, and the reason. disk: a path on the disk that
    is named if it is full."""
    try:
        yield
    except OSError as e:
        reason = write_error_reason(e, disk) if disk else short_reason(e)
        raise UserError(f"{failure}: {reason}") from e


def write_error_reason(error: OSError, path: Path) -> str:
    """The reason why a write failed. For a full disk it names the disk.

    path: the file, as far as it is known: the error of a write has no file name, and the full disk
    may be that of Triton's cache or of temporary files.
    """
    reason = error.strerror or str(error)
    if error.errno in FULL:
        cache = os.environ.get("TRITON_CACHE_DIR") or "~/.triton"
        named = os.fsdecode(error.filename) if error.filename else path
        temporary = os.environ.get("TMPDIR") or "/tmp"
        places = map(Path, (named, os.path.expanduser(cache), temporary))
        with contextlib.suppress(OSError, AttributeError, RuntimeError):
            disks = {mount: os.statvfs(mount) for mount in map(_mount, places)}
            full = [m for m, d in disks.items() if d.f_bavail * d.f_frsize < 1e6 or not d.f_favail]
            mount = next(iter(full or disks))
            disk = disks[mount]
            free = f"{disk.f_bavail * disk.f_frsize / 1e6:,.0f} MB"
            reason += f" ({mount} has {free} and {disk.f_favail:,} files free)"
    return reason


def _mount(path: Path) -> Path:
    """The root of the file system that has the path."""
    path = path.resolve()
    while not path.is_mount():
        path = path.parent
    return path


def write(path: Path, data: bytes) -> None:
    """Writes a file and flushes it to the disk."""
    with open(path, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def temporary_path(path: Path) -> Path:
    """A new name in the folder of `path`, for a file that will replace it."""
    return path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a name for a file that replaces `path` atomically, unless an error occurs first."""
    temporary = temporary_path(path)
    try:
        yield temporary
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def replace_file(path: Path, data: bytes) -> None:
    """Writes `data` to `path` atomically: a reader sees the old file or the new one."""
    with replacing(path) as temporary:
        write(temporary, data)


def check_result(*paths: Path | None) -> None:
    """Raises UserError if a later `write_result` to one of the paths would fail."""
    for path in filter(None, paths):
        with reported(f"cannot write {path}"):
            if path.is_dir():
                raise UserError(f"{path} is a folder: name a file")
            if not path.absolute().parent.is_dir():
                raise UserError(f"cannot write {path}: its folder does not exist")


def write_result(path: Path, data: bytes) -> None:
    """`replace_file` for a path given by the user. Raises UserError."""
    with reported(f"cannot write {path}", disk=path):
        replace_file(path.absolute(), data)


def check_free(path: Path, kind: str, message: str) -> None:
    """Raises UserError with the message unless `path` does not exist or is an empty folder."""
    with reported(f"cannot write a {kind} at {path}"):
        taken = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    if taken:
        raise UserError(message)


def new_folder(path: Path, kind: str, fill: Callable[[Path], None]) -> None:
    """Makes the folder `path`, which may exist if it is empty, with what `fill` writes into it.

    A new folder is complete as soon as it exists; one that exists gets its config.json last. Raises
    UserError, and leaves nothing, if it cannot be written.
    kind: what the message calls it.
    """
    moved: list[Path] = []
    missing = [p for p in path.parents if not p.exists()]
    inside = path.is_dir()  # the working directory or a mount point cannot be replaced
    temporary = temporary_path(path.absolute() / "new" if inside else path.absolute())
    with reported(f"cannot write a {kind} at {path}", disk=path):
        try:
            temporary.mkdir(parents=True)
            fill(temporary)
            sync_folder(temporary)
            if inside:
                for file in sorted(temporary.iterdir(), key=lambda p: p.name == "config.json"):
                    moved.append(path / file.name)  # first: a signal may come while it is renamed
                    os.rename(file, moved[-1])
                temporary.rmdir()
            else:
                os.rename(temporary, path)
            sync_folder(path if inside else path.parent)
        except BaseException:
            remove(temporary, *moved)
            for folder in missing:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise


def remove(*paths: Path) -> None:
    """Deletes files and folders, as far as they exist and can be deleted."""
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            path.unlink()


def sync_folder(folder: Path) -> None:
    """Flushes a folder's entries. Does nothing on systems that cannot, such as Windows."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def backup(folder: Path) -> Path:
    """The name of the old contents while a save replaces a folder, where `exchange` is missing."""
    return folder.with_name(f".{folder.name}.old")


def exchange(a: Path, b: Path) -> bool:
    """Swaps two folders atomically (renameat2). Returns False if that is not supported."""
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if libc is None or not hasattr(libc, "renameat2"):
        return False
    cwd, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return libc.renameat2(cwd, os.fsencode(a), cwd, os.fsencode(b), swap) == 0

"""The files of a folder as documents: found by suffix, without duplicates, split by file.

Hidden files and folders, virtual environments, and links to a folder that was visited already are
skipped. Files that are binary, in another encoding, unreadable or without text are left out, and so
are exact duplicates. A file is for validation if the hash of its path is in the first tenth of the
hash's range, so a file stays in its split when others are added.
"""

import hashlib
import os
import re
import stat
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from irongpt.data.text import Say, Text, Utf8, check_encoding, decoded, unpacked
from irongpt.errors import UserError, short_reason

VAL_SHARE = 0.1
INCLUDE = ("*.py",)
MAX_BYTES = 2 * 10**9  # the limit for a corpus: its text and its ids take several times this size
PACKAGE_BYTES = 10**6  # a package with less code is not part of python-packages


class Kept:
    """The texts of a corpus so far, by digest."""

    def __init__(self) -> None:
        self.digests: set[str] = set()
        self.n_bytes = 0

    def add(self, utf8: Utf8) -> str | None:
        """The text's digest, or None if the same text was added before."""
        digest = hashlib.sha256(utf8).hexdigest()
        if digest in self.digests:
            return None
        self.digests.add(digest)
        self.n_bytes += len(utf8)
        return digest


@dataclass(frozen=True)
class Reader:
    """Reads the texts of one corpus, all in one encoding. Raises UserError if that is unknown."""

    say: Say
    encoding: str | None = None
    errors: str = "strict"
    kept: Kept = field(default_factory=Kept)

    def __post_init__(self) -> None:
        if self.encoding is not None:
            check_encoding(self.encoding)

    def read(self, path: str | Path, name: str) -> Text:
        """The text of a regular file. Raises UserError, and OSError."""
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # reading from a pipe or a device might never end
            raise UserError(
                f"{name} is not a regular file: give a text file, or pipe it to --data -"
            )
        self._check_size(status.st_size, name)
        return self.decode(Path(path).read_bytes(), name)

    def decode(self, raw: bytes, name: str) -> Text:
        """The text of these bytes, unpacked if they are in gzip's format. Raises UserError."""
        content = unpacked(raw, name, MAX_BYTES - self.kept.n_bytes)
        self._check_size(len(content), name)
        return decoded(content, name, self.encoding, self.errors)

    def _check_size(self, size: int, name: str) -> None:
        if self.kept.n_bytes + size > MAX_BYTES:
            what = f"the text up to {name}" if self.kept.n_bytes else name
            raise UserError(f"{what} is larger than {MAX_BYTES / 1e9:g} GB: use a part of it")


def val_files(paths: Sequence[str]) -> set[str]:
    """The paths for validation. With two files or more, both splits have at least one."""

    def share(path: str) -> float:
        digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest()
        return int.from_bytes(digest[:6], "big") / 2**48

    ordered = sorted(paths, key=share)
    count = sum(share(path) < VAL_SHARE for path in ordered)
    return set(ordered[: min(max(count, 1), len(ordered) - 1)])


def folder_files(
    folder: Path, include: Sequence[str], *, say: Say, exclude: Path | None = None
) -> list[tuple[str, Path]]:
    """The files of a folder that match one of the patterns. Raises UserError if there are none.

    include: patterns of a file's name, or of its path in the folder if they have a slash; empty is
    INCLUDE. exclude: the folder of the run, which must not be in the text that it is trained on.
    """
    shown = repr(str(folder))
    if exclude and exclude.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"{shown} contains the run's own folder {str(exclude)!r}: give a folder of --data "
            "without it, or another --out"
        )
    patterns = [f"*{p}" if re.fullmatch(r"\.\w+(\.\w+)?", p) else p for p in include or INCLUDE]
    found, suffixes = [], Counter[str]()
    for relative, path in _walk(folder, say):
        suffixes[path.suffix] += 1
        name = relative.rpartition("/")[2]
        if any(fnmatchcase(relative if "/" in p else name, p) for p in patterns):
            found.append((relative, path))
    if not found:
        others = [f"'*{s}' finds {n:,}" for s, n in suffixes.most_common(4) if s]
        hint = f"--include {', '.join(others)}" if others else "no other file has a suffix"
        raise UserError(f"{shown} has no file {' or '.join(patterns)}: {hint}")
    return found


def _walk(root: Path, say: Say) -> Iterator[tuple[str, Path]]:
    """(relative path with slashes, path) of each file that is not hidden."""

    def unreadable(e: OSError) -> None:
        if e.filename == str(root):
            raise UserError(f"cannot read {e.filename!r}: {short_reason(e)}") from None
        say(f"not reading {e.filename!r}: {short_reason(e)}")

    visited: set[tuple[int, int]] = set()
    for folder, below, names in os.walk(str(root), onerror=unreadable, followlinks=True):
        status, path = os.stat(folder), Path(folder)
        identity = status.st_dev, status.st_ino
        if identity in visited or (path != root and "pyvenv.cfg" in names):
            below.clear()
            continue
        visited.add(identity)
        below[:] = sorted(name for name in below if not name.startswith("."))
        for file in (path / name for name in sorted(names) if not name.startswith(".")):
            if os.path.isfile(file):  # not a pipe, a device or a link that leads nowhere
                yield file.relative_to(root).as_posix(), file


# Tables, tests, the data of an editor, and pydoc_data, which is another corpus.
_NOT_CODE = {"encodings", "idlelib", "pydoc_data", "lib2to3", "test", "tests", "idle_test"}


def standard_library() -> list[tuple[str, Path]]:
    """Its Python files, without tests: the same in all installations of one version of Python."""
    root = Path(os.__file__).parent
    paths: list[Path] = []
    for name in sorted(sys.stdlib_module_names - _NOT_CODE):
        paths += [root / f"{name}.py"] if (root / f"{name}.py").is_file() else []
        paths += sorted((root / name).rglob("*.py"))
    paths = [p for p in paths if not _NOT_CODE & set(p.relative_to(root).parts)]
    if not paths:
        raise UserError(f"{str(root)!r} has no source of the standard library: use --data FILE")
    return [(p.relative_to(root).as_posix(), p) for p in paths]


def packages(say: Say) -> list[tuple[str, Path]]:
    """The source of the larger packages that are installed next to torch, without tests."""
    roots = dict.fromkeys(Path(sysconfig.get_path(name)) for name in ("purelib", "platlib"))
    found: list[tuple[str, Path]] = []
    sizes: dict[str, int] = {}
    for root in roots:
        for folder in sorted(root.iterdir()) if root.is_dir() else []:
            if not (folder / "__init__.py").is_file() or folder.name in sizes:
                continue
            files = [
                (f"{folder.name}/{relative}", path)
                for relative, path in _walk(folder, say)
                if path.suffix == ".py" and not _is_test(relative)
            ]
            size = sum(path.stat().st_size for _, path in files)
            if size >= PACKAGE_BYTES:
                sizes[folder.name], found = size, found + files
    if not found:
        raise UserError("python-packages: no package is installed: use --data python-code")
    largest = sorted(sizes.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in largest)
    say(f"packages  {listed}: {sum(sizes.values()) / 1e6:.1f} MB in total")
    return found


def _is_test(relative: str) -> bool:
    *folders, name = relative.split("/")
    test = name == "conftest.py" or name.startswith("test_") or name.endswith("_test.py")
    return test or bool({"test", "tests"} & set(folders))

"""The training text: War and Peace, a text file, or the docs and the source of Python itself.

war-and-peace   downloaded once, verified, and stored in the cache folder
python-docs     the language reference that every Python contains (pydoc_data.topics)
python-code     the source of the standard library
"""

import hashlib
import http.client
import os
import re
import socket
import stat
import sys
import tempfile
import urllib.error
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from irongpt.errors import UserError
from irongpt.files import replace_file

BUILT_IN = ("war-and-peace", "python-docs", "python-code")

MAX_FILE_BYTES = 2 * 10**9  # as text and as int64 ids a file takes about 10 times its size
TIMEOUT_S = 15.0  # of each wait for the server

Say = Callable[[str], None]


@dataclass(frozen=True)
class Corpus:
    """A text whose line breaks are \\n. The name is valid as the name of a folder."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        """Hexadecimal digest of the text in UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Source:
    """A copy of War and Peace. Gutenberg's own copy changes, so that its digest is unknown."""

    url: str
    filename: str
    sha256: str | None = None


SOURCES = (
    Source(
        "https://raw.githubusercontent.com/GITenberg/War-and-Peace_2600/"
        "fa22ab90f00f627e83d14acabe32d91602d2365d/2600-0.txt",
        "war-and-peace-2600-0.txt",
        "6cbcc5ca5e590fb9ace161a5b93e4ecf280d7118104be0d63b686c004cfa70ae",
    ),
    Source("https://www.gutenberg.org/cache/epub/2600/pg2600.txt", "war-and-peace-pg2600.txt"),
)


def load(data: str | None, *, say: Say) -> Corpus:
    """The text called `data`: one of BUILT_IN, or the path of a file. Raises UserError.

    None is War and Peace, or python-docs if it cannot be downloaded. `say` receives lines for the
    user about downloads and about problems that were worked around.
    """
    if data is None:
        try:
            return _war_and_peace(say)
        except UserError as error:
            say(f"warning: using python-docs, the text of Python's manual, instead: {error}")
            data = "python-docs"
    if data == "war-and-peace":
        return _war_and_peace(say)
    if data == "python-docs":
        return _python_docs()
    return _python_code() if data == "python-code" else _file(data, say)


# One match per book in the file. Its group is the book from its first line that is not blank.
_BOOK = re.compile(
    r"(?ms)^\*\*\* ?START OF TH(?:E|IS) PROJECT GUTENBERG EBOOK[^\n]*\n(?:[ \t]*\n)*"
    r"(.*?)^\*\*\* ?END OF TH(?:E|IS) PROJECT GUTENBERG EBOOK"
)


def _without_license(text: str) -> str:
    """The text between Project Gutenberg's markers, or all of it if there are none."""
    return "\n\n".join(book.rstrip() + "\n" for book in _BOOK.findall(text)) or text


def _unix_lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def cache_folder() -> Path:
    """IRONGPT_DATA, or the user's cache folder of this operating system. It may not exist."""
    if folder := os.environ.get("IRONGPT_DATA"):
        return Path(folder)
    try:
        home = Path.home()
    except RuntimeError:
        raise UserError(
            "the home folder is unknown: set IRONGPT_DATA to a folder for the corpus"
        ) from None
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or home / ".cache"
    return Path(base) / "irongpt"


def _war_and_peace(say: Say) -> Corpus:
    folder = cache_folder()
    for source in SOURCES:
        path = folder / source.filename
        try:
            if path.is_file():
                return _verified(source, path.read_bytes())
        except (OSError, ValueError) as error:
            say(f"not using {str(path)!r}: {_brief(error)}")
    reasons = []
    for source in SOURCES:
        say(f"downloading War and Peace (3.4 MB) from {source.url} to {str(folder)!r}")
        try:
            raw = _download(source.url)
            corpus = _verified(source, raw)
        except (OSError, ValueError, http.client.HTTPException) as error:
            reasons.append(f"{source.url.split('/')[2]}: {_brief(error)}")
            say(f"the download failed: {reasons[-1]}")
            continue
        _keep(folder / source.filename, raw, say)
        return corpus
    raise UserError(
        f"cannot download War and Peace ({'; '.join(reasons)}): save it as "
        f"{str(folder / SOURCES[0].filename)!r}, or use --data FILE or --data python-docs"
    )


def _verified(source: Source, raw: bytes) -> Corpus:
    """The book in a source's bytes. Raises ValueError if they are anything else."""
    if source.sha256 and hashlib.sha256(raw).hexdigest() != source.sha256:
        raise ValueError(f"wrong checksum (SHA-256 of {len(raw):,} bytes)")
    text = _unix_lines(raw.decode("utf-8-sig"))
    if not _BOOK.search(text):
        raise ValueError("no START and END marker of Project Gutenberg")
    return Corpus("war-and-peace", _without_license(text))


def _download(url: str) -> bytes:
    """The content at a URL. It is written to the cache only after it has been verified."""
    from torch.hub import download_url_to_file

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_S)  # the function has no such argument
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "download"
            download_url_to_file(url, str(path), progress=sys.stderr.isatty())
            return path.read_bytes()
    finally:
        socket.setdefaulttimeout(before)


def _keep(path: Path, raw: bytes, say: Say) -> None:
    """Stores the file. A folder that cannot be written to is not an error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, raw)
    except OSError as error:
        say(f"cannot store War and Peace as {str(path)!r} for the next run: {_brief(error)}")


def _brief(error: Exception) -> str:
    """The reason for an error, in one short line."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code}"
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        error = error.reason
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(reason).split())[:80]


def _python_docs() -> Corpus:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("this Python has no pydoc_data.topics: use --data FILE") from None
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return Corpus("python-docs", text)


# Tables, tests, the data of an editor, and pydoc_data, which is the other corpus.
_NOT_CODE = {"encodings", "idlelib", "pydoc_data", "lib2to3", "test", "tests", "idle_test"}


def _python_code() -> Corpus:
    """About 8 MB, the same for every installation of one Python version.

    The few files that are not ASCII are left out, to keep rare characters out of the vocabulary.
    """
    root = Path(os.__file__).parent
    paths: list[Path] = []
    for name in sorted(sys.stdlib_module_names - _NOT_CODE):
        paths += [root / f"{name}.py"] if (root / f"{name}.py").is_file() else []
        paths += sorted((root / name).rglob("*.py"))
    files = [p.read_bytes() for p in paths if not _NOT_CODE & set(p.relative_to(root).parts)]
    text = "\n".join(_unix_lines(raw.decode()) for raw in files if raw.isascii())
    if not text:
        raise UserError(f"{str(root)!r} has no source of the standard library: use --data FILE")
    return Corpus("python-code", text)


def _file(data: str, say: Say) -> Corpus:
    try:
        status = os.stat(data)
        if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_FILE_BYTES:
            raw = Path(data).read_bytes()
    except (FileNotFoundError, ValueError):  # a name with a NUL in it is a ValueError
        raise UserError(f"no file {data!r}; the built-in texts are {', '.join(BUILT_IN)}") from None
    except OSError as error:
        raise UserError(f"cannot read {data!r}: {_brief(error)}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise UserError(f"{data!r} is {kind}: give a text file")
    if status.st_size > MAX_FILE_BYTES:
        raise UserError(f"{data!r} is larger than {MAX_FILE_BYTES / 1e9:g} GB: use a part of it")
    complete = _unix_lines(_decoded(data, raw, say))
    text = _without_license(complete)
    if text is not complete:
        say(f"removed Project Gutenberg's licence from {data!r}: {len(text):,} characters remain")
    if not text.strip():
        raise UserError(f"{data!r} is empty: give a file that contains text")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(data).stem)[:64].strip("-.")
    return Corpus(name or "text", text)


def _decoded(data: str, raw: bytes, say: Say) -> str:
    utf16 = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = raw.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        try:
            text = raw.decode("utf-16" if utf16 else "cp1252")
        except UnicodeDecodeError:
            raise UserError(f"{data!r} is not UTF-8 text: convert it") from None
        say(f"warning: {data!r} is not UTF-8: reading it as Windows-1252 (Latin-1)")
    controls = sum(text.count(chr(code)) for code in range(1, 32) if chr(code) not in "\t\n\f\r")
    if "\0" in text or controls > len(text) / 100:
        raise UserError(f"{data!r} looks binary: give a text file, preferably in UTF-8")
    return text

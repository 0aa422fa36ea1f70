"""Where the training text comes from: War and Peace, a file of the user's, or Python itself.

    war-and-peace   downloaded once, verified, and kept in the cache folder
    python-docs     the language reference that every Python carries (pydoc_data.topics)
    python-code     the standard library's own source

The download is urllib's: it follows the proxy of the environment (https_proxy, no_proxy). What
comes back is checked before it is written, so no other file is ever found in the cache.
"""

import hashlib
import http.client
import os
import re
import stat
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from irongpt import __version__
from irongpt.errors import UserError
from irongpt.files import replace_file

BUILT_IN = ("war-and-peace", "python-docs", "python-code")

MAX_FILE_BYTES = 2 * 10**9  # a file is held as text and as int64 ids, some 10 times its size
TIMEOUT_S = 15.0  # of one wait for the server
DEADLINE_S = 300.0  # of one whole download: a server may trickle

Say = Callable[[str], None]


@dataclass(frozen=True)
class Corpus:
    """A text whose line ends are \\n. The name is fit for a folder's."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        """Hexadecimal digest of the text in UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Source:
    """A copy of War and Peace. Without a digest its size and Gutenberg's markers must do."""

    url: str
    filename: str
    size_min: int  # bytes
    size_max: int
    sha256: str | None = None


SOURCES = (
    Source(
        "https://raw.githubusercontent.com/GITenberg/War-and-Peace_2600/"
        "fa22ab90f00f627e83d14acabe32d91602d2365d/2600-0.txt",
        "war-and-peace-2600-0.txt",
        3_359_542,
        3_359_542,
        "6cbcc5ca5e590fb9ace161a5b93e4ecf280d7118104be0d63b686c004cfa70ae",
    ),
    Source(
        "https://www.gutenberg.org/cache/epub/2600/pg2600.txt",
        "war-and-peace-pg2600.txt",
        3_000_000,
        3_600_000,
    ),
)


def load(data: str | None, *, say: Say) -> Corpus:
    """The text that `data` names: one of BUILT_IN, else the path of a file.

    None is War and Peace, and python-docs where that cannot be had. `say` gets lines for the
    user: what is downloaded, what was wrong and is worked around. Raises UserError.
    """
    if data is None:
        try:
            return _war_and_peace(say)
        except UserError as error:
            say(f"warning: falling back to python-docs, the text of Python's manual: {error}")
            data = "python-docs"
    if data == "war-and-peace":
        return _war_and_peace(say)
    if data == "python-docs":
        return _python_docs()
    return _python_code() if data == "python-code" else _file(data, say)


# One match per book in the file; its group is the book from the first line that is not blank.
_BOOK = re.compile(
    r"(?ms)^\*\*\* ?START OF TH(?:E|IS) PROJECT GUTENBERG EBOOK[^\n]*\n(?:[ \t]*\n)*"
    r"(.*?)^\*\*\* ?END OF TH(?:E|IS) PROJECT GUTENBERG EBOOK"
)


def _without_license(text: str) -> str:
    """What lies between Project Gutenberg's markers, or the text as it is if it has none."""
    return "\n\n".join(book.rstrip() + "\n" for book in _BOOK.findall(text)) or text


def _unix_lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def cache_folder() -> Path:
    """IRONGPT_DATA, else this user's cache folder on this system. It may not exist."""
    if folder := os.environ.get("IRONGPT_DATA"):
        return Path(folder)
    try:
        home = Path.home()
    except RuntimeError:
        raise UserError("there is no home folder to cache in: set IRONGPT_DATA") from None
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
                with path.open("rb") as file:
                    return _verified(source, file.read(source.size_max + 1))
        except (OSError, ValueError) as error:
            say(f"not using {str(path)!r}: {_brief(error)}")
    reasons = []
    for source in SOURCES:
        host = source.url.split("/")[2]
        size = f"{source.size_max / 1e6:.1f} MB"
        say(f"downloading War and Peace ({size}) from {source.url} to {str(folder)!r}")
        try:
            raw = _download(source)
            corpus = _verified(source, raw)
        except (OSError, ValueError, http.client.HTTPException) as error:
            reasons.append(f"{host}: {_brief(error)}")
            say(f"no War and Peace from {reasons[-1]}")
            continue
        _keep(folder / source.filename, raw, say)
        return corpus
    raise UserError(
        f"no War and Peace ({'; '.join(reasons)}): save it as "
        f"{str(folder / SOURCES[0].filename)!r}, or use --data FILE or --data python-docs"
    )


def _verified(source: Source, raw: bytes) -> Corpus:
    """The book in a source's bytes. Raises ValueError if they are anything else."""
    if len(raw) > source.size_max:
        raise ValueError(f"more than {source.size_max:,} bytes")
    if len(raw) < source.size_min:
        raise ValueError(f"only {len(raw):,} bytes")
    if source.sha256 and hashlib.sha256(raw).hexdigest() != source.sha256:
        raise ValueError("not the known text (sha256 differs)")
    text = _unix_lines(raw.decode("utf-8-sig"))
    if not _BOOK.search(text):
        raise ValueError("no START and END marker of Project Gutenberg")
    return Corpus("war-and-peace", _without_license(text))


def _download(source: Source) -> bytes:
    """What the server sends, up to one byte more than the source may have."""
    headers = {"User-Agent": f"irongpt/{__version__}"}  # some sites refuse urllib's own
    request = urllib.request.Request(source.url, headers=headers)
    end = time.monotonic() + DEADLINE_S
    raw = bytearray()
    opener = urllib.request.build_opener()  # urlopen's is made once, with the proxies of that time
    with opener.open(request, timeout=TIMEOUT_S) as response:
        while len(raw) <= source.size_max and (chunk := response.read1(1 << 16)):
            raw += chunk
            if time.monotonic() > end:
                raise TimeoutError(f"not done after {DEADLINE_S:g} s")
    return bytes(raw)


def _keep(path: Path, raw: bytes, say: Say) -> None:
    """A folder that cannot be written to is no error: the text is in memory."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, raw)
    except OSError as error:
        say(f"cannot keep War and Peace as {str(path)!r} for the next time: {_brief(error)}")


def _brief(error: Exception) -> str:
    """The reason of an error, in one short line."""
    if isinstance(error, urllib.error.HTTPError):
        return "redirects in a loop" if 300 <= error.code < 400 else f"HTTP {error.code}"
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


# Tables, tests, an editor's data, and pydoc_data, which is the other corpus.
_NOT_CODE = {"encodings", "idlelib", "pydoc_data", "lib2to3", "test", "tests", "idle_test"}


def _python_code() -> Corpus:
    """The same 8 MB or so for one Python, whatever is installed beside the standard library.

    The few files with other characters than ASCII are left out, for a vocabulary without rarities.
    """
    root = Path(os.__file__).parent
    paths: list[Path] = []
    for name in sorted(sys.stdlib_module_names - _NOT_CODE):
        paths += [root / f"{name}.py"] if (root / f"{name}.py").is_file() else []
        paths += sorted((root / name).rglob("*.py"))
    files = [p.read_bytes() for p in paths if not _NOT_CODE & set(p.relative_to(root).parts)]
    text = "\n".join(_unix_lines(raw.decode()) for raw in files if raw.isascii())
    if not text:
        raise UserError(f"no source of the standard library in {str(root)!r}: use --data FILE")
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
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise UserError(f"{data!r} is {kind}: give a text file")
    if status.st_size > MAX_FILE_BYTES:
        raise UserError(f"{data!r} is larger than {MAX_FILE_BYTES / 1e9:g} GB: give a part of it")
    whole = _unix_lines(_decoded(data, raw, say))
    text = _without_license(whole)
    if text is not whole:
        say(f"cut Project Gutenberg's licence off {data!r}: {len(text):,} characters are left")
    if not text.strip():
        raise UserError(f"{data!r} is empty: give a file with text in it")
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
            raise UserError(f"{data!r} is not text in UTF-8: convert it") from None
        say(f"warning: {data!r} is not UTF-8: reading it as Windows-1252 (Latin-1)")
    controls = sum(text.count(chr(code)) for code in range(1, 32) if chr(code) not in "\t\n\f\r")
    if "\0" in text or controls > len(text) / 100:
        raise UserError(f"{data!r} looks binary: give a text file, in UTF-8 best")
    return text

"""War and Peace, downloaded once, verified, and stored in the cache folder."""

import hashlib
import http.client
import os
import sys
import threading
import time
import urllib.request
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from irongpt.data.text import Say, Utf8, decoded, without_license
from irongpt.errors import UserError, short_reason
from irongpt.files import replace_file

TIMEOUT_S = 15.0  # of each wait for the server
DEADLINE_S = 300.0  # of a download
MAX_DOWNLOAD = 20 * 10**6  # bytes; the book has 3.4 million


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


def war_and_peace(say: Say) -> Utf8:
    """The book in UTF-8, from the cache folder or from the network. Raises UserError."""
    folder = cache_folder()
    for source in SOURCES:
        path = folder / source.filename
        try:
            if path.is_file():
                return _verified(source, path.read_bytes())
        except (OSError, ValueError, UserError) as error:
            say(f"not using {str(path)!r}: {short_reason(error)}")
    reasons = []
    for source in SOURCES:
        say(f"downloading War and Peace (3.4 MB) from {source.url} to {str(folder)!r}")
        try:
            raw = _download(source.url)
            book = _verified(source, raw)
        except (OSError, ValueError, UserError, http.client.HTTPException) as error:
            reasons.append(f"{source.url.split('/')[2]}: {short_reason(error)}")
            say(f"the download failed: {reasons[-1]}")
            continue
        path = folder / source.filename
        try:
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, raw)
        except OSError as error:
            reason = short_reason(error)
            say(f"cannot store War and Peace as {str(path)!r} for the next run: {reason}")
        return book
    raise UserError(
        f"cannot download War and Peace ({'; '.join(reasons)}): save it as "
        f"{str(folder / SOURCES[0].filename)!r}, or use --data FILE or --data python-docs"
    )


def _verified(source: Source, raw: bytes) -> Utf8:
    """The book in a source's bytes. Raises ValueError or UserError if they are anything else."""
    if source.sha256 and hashlib.sha256(raw).hexdigest() != source.sha256:
        raise ValueError(f"wrong checksum (SHA-256 of {len(raw):,} bytes)")
    text = decoded(raw, "the file").utf8
    book = without_license(text)
    if book is text:
        raise ValueError("no START and END marker of Project Gutenberg")
    return book


def _download(url: str) -> bytes:
    """The content at a URL, in memory. Raises OSError and HTTPException.

    A thread downloads it, because some waits, such as that for the server's name, have no timeout.
    """
    result: Future[bytes] = Future()
    stop = time.monotonic() + DEADLINE_S

    def download() -> None:
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
                content = bytearray()
                while chunk := response.read1(1 << 16):
                    content += chunk
                    if len(content) > MAX_DOWNLOAD:
                        raise OSError(f"more than {MAX_DOWNLOAD / 1e6:g} MB")
                    if time.monotonic() > stop:  # the caller has timed out already
                        return
                result.set_result(bytes(content))
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=download, daemon=True)
    thread.start()
    thread.join(DEADLINE_S)
    if not result.done():
        raise TimeoutError(f"not complete after {DEADLINE_S:g} seconds")
    return result.result()

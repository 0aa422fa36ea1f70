"""War and Peace from the cache and from the network: only the right book is stored or returned."""

import hashlib
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from book_server import BOOK, TEXT, Lines, book_server, refused

from irongpt.config import WAR_AND_PEACE_VOCAB
from irongpt.data import download
from irongpt.data.corpus import load
from irongpt.data.download import Source

REAL_FILE = download.cache_folder() / download.SOURCES[0].filename  # before `cache` replaces it
REAL_SOURCES = download.SOURCES
CLOSED_PORT = "http://127.0.0.1:9/good"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with book_server() as address:
        yield address


def pinned(url: str) -> Source:
    return Source(url, "first.txt", hashlib.sha256(BOOK).hexdigest())


def unpinned(url: str) -> Source:
    return Source(url, "second.txt")


@pytest.fixture
def sources(monkeypatch) -> Callable[..., None]:
    return lambda *new: monkeypatch.setattr(download, "SOURCES", new)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path, sources) -> Path:
    """A cache folder that does not exist yet, and no source that can be reached."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("IRONGPT_DATA", str(tmp_path / "new/cache"))
    sources(pinned(CLOSED_PORT))
    return tmp_path / "new/cache"


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*")) if folder.exists() else []


def test_the_book_is_downloaded_once_and_stored(
    server, cache, sources, monkeypatch, tmp_path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))  # it needs no such folder
    sources(pinned(f"{server}/good"))
    lines = Lines()
    first = load("war-and-peace", say=lines)
    assert (first.name, first.text, first.files) == ("war-and-peace", TEXT, {})
    assert first.sha256 == hashlib.sha256(TEXT.encode()).hexdigest()
    assert (cache / "first.txt").read_bytes() == BOOK
    assert files_in(cache) == ["first.txt"]
    [line] = lines
    assert f"{server}/good" in line
    assert str(cache) in line
    assert "3.4 MB" in line

    sources(pinned(CLOSED_PORT))
    lines = Lines()
    assert load("war-and-peace", say=lines).text == load(None, say=lines).text == TEXT
    assert not lines


@pytest.mark.parametrize(
    ("kind", "way", "reason"),
    [
        (pinned, "unavailable", "HTTP 503"),
        (pinned, "html", "wrong checksum"),
        (pinned, "truncated", "wrong checksum"),
        (pinned, "wrong", "wrong checksum"),
        (pinned, "stall", "timed out"),
        (pinned, "endless", "more than 0.1 MB"),
        (unpinned, "html", "no START and END marker"),
        (unpinned, "truncated", "no START and END marker"),
    ],
)
def test_a_failed_download_stores_nothing_and_reports_the_reason(
    server, cache, sources, monkeypatch, kind, way: str, reason: str
) -> None:
    monkeypatch.setattr(download, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(download, "MAX_DOWNLOAD", 100_000)
    sources(kind(f"{server}/{way}"))
    start = time.monotonic()
    message = refused("war-and-peace", "127.0.0.1", reason, "--data FILE", "--data python-docs")
    assert time.monotonic() - start < 5
    assert socket.getdefaulttimeout() is None
    assert download.SOURCES[0].filename in message
    assert len(message) - len(str(cache)) < 200
    assert not files_in(cache)


def test_without_a_network_both_sources_and_reasons_are_named(cache, sources, monkeypatch) -> None:
    def no_name(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    sources(*REAL_SOURCES)
    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    message = refused(
        "war-and-peace",
        "raw.githubusercontent.com: Temporary failure in name resolution; "
        "www.gutenberg.org: Temporary failure in name resolution",
        str(cache / "war-and-peace-2600-0.txt"),
    )
    assert len(message) - len(str(cache)) < 280
    assert not files_in(cache)


def test_the_second_source_is_used_when_the_first_fails(server, cache, sources) -> None:
    sources(pinned(f"{server}/wrong"), unpinned(f"{server}/good"))
    lines = Lines()
    assert load("war-and-peace", say=lines).text == TEXT
    assert "wrong checksum" in lines[1]
    assert files_in(cache) == ["second.txt"]
    sources(pinned(CLOSED_PORT), unpinned(CLOSED_PORT))
    assert load("war-and-peace", say=Lines()).text == TEXT


@pytest.mark.parametrize("stored", [b"", BOOK[:-1], BOOK + b"\n", BOOK.replace(b"Anna", b"Anne")])
def test_a_wrong_file_in_the_cache_is_reported_and_replaced(
    server, cache, sources, stored: bytes
) -> None:
    cache.mkdir(parents=True)
    (cache / "first.txt").write_bytes(stored)
    refused("war-and-peace")
    assert (cache / "first.txt").read_bytes() == stored
    sources(pinned(f"{server}/good"))
    lines = Lines()
    assert load("war-and-peace", say=lines).text == TEXT
    assert lines[0].startswith(f"not using '{cache / 'first.txt'}': ")
    assert (cache / "first.txt").read_bytes() == BOOK


@pytest.mark.parametrize("obstacle", ["file in place of the folder", "folder in place of the file"])
def test_a_cache_that_cannot_be_written_is_reported(server, cache, sources, obstacle: str) -> None:
    if obstacle.startswith("file"):
        cache.parent.write_text("here already")
    else:
        (cache / "first.txt/full").mkdir(parents=True)
    before = files_in(cache)
    sources(pinned(f"{server}/good"))
    lines = Lines()
    assert load("war-and-peace", say=lines).text == TEXT
    assert lines[-1].startswith(f"cannot store War and Peace as '{cache / 'first.txt'}'")
    assert files_in(cache) == before


def test_a_server_name_that_is_never_resolved_ends_at_the_deadline(sources, monkeypatch) -> None:
    """No timeout of a socket covers this wait."""
    monkeypatch.setattr(download, "DEADLINE_S", 0.1)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(3))
    sources(pinned("http://nowhere.invalid/good"))
    refused("war-and-peace", "not complete after 0.1 seconds")


@pytest.mark.parametrize("name", ["urllib.request.urlopen", "os.fsync"])
def test_an_interrupt_leaves_nothing(server, cache, sources, monkeypatch, name: str) -> None:
    """During the download, and while the file is flushed, before it has its name."""
    sources(pinned(f"{server}/good"))
    seen = []

    def interrupted(*args: object, **kwargs: object) -> None:
        seen.extend(files_in(cache))
        raise KeyboardInterrupt

    monkeypatch.setattr(name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        load("war-and-peace", say=Lines())
    assert "first.txt" not in seen
    assert not files_in(cache)


def test_the_cache_folder_follows_the_system_and_the_environment(
    monkeypatch, cache, tmp_path
) -> None:
    assert download.cache_folder() == cache
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for system, variable, value, folder in [
        ("linux", "XDG_CACHE_HOME", None, ".cache/irongpt"),
        ("linux", "XDG_CACHE_HOME", "xdg", "xdg/irongpt"),
        ("darwin", "XDG_CACHE_HOME", None, "Library/Caches/irongpt"),
        ("win32", "LOCALAPPDATA", None, "AppData/Local/irongpt"),
        ("win32", "LOCALAPPDATA", "local", "local/irongpt"),
    ]:
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setenv("IRONGPT_DATA", "")
        monkeypatch.setenv(variable, str(tmp_path / value) if value else "")
        assert download.cache_folder() == tmp_path / folder


@pytest.mark.skipif(not REAL_FILE.is_file(), reason=f"IRONGPT_DATA has no {REAL_FILE.name}")
def test_the_real_book(monkeypatch, sources) -> None:
    monkeypatch.setattr(download, "_download", lambda url: pytest.fail("the file is not used"))
    monkeypatch.setenv("IRONGPT_DATA", str(REAL_FILE.parent))
    sources(*REAL_SOURCES)
    book = load(None, say=Lines())
    assert book.name == "war-and-peace"
    assert book.text.startswith("An Anonymous Volunteer, and David Widger\n")
    assert book.text.endswith(
        "End of the Project Gutenberg EBook of War and Peace, by Leo Tolstoy\n"
    )
    assert len(book.text) == 3_208_360
    assert len(set(book.text)) == WAR_AND_PEACE_VOCAB
    assert not re.search("\r|\ufeff|license|trademark", book.text, re.IGNORECASE)

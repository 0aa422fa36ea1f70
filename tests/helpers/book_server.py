"""What was said, what was refused, and a server that sends a book in all the ways that go wrong."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from irongpt.data.corpus import load
from irongpt.errors import UserError

TEXT = "WAR AND PEACE\n\n" + "“Well, Prince,” said naïve Anna.\n" * 100
BOOK = (
    "\r\n\r\nLicensed to you.\r\n*** START OF THIS PROJECT GUTENBERG EBOOK WAR AND PEACE ***\r\n"
    + "\r\n \r\n\r\n"
    + TEXT.replace("\n", "\r\n")
    + "\r\n\r\n\r\n*** END OF THIS PROJECT GUTENBERG EBOOK WAR AND PEACE ***\r\nLicense.\r\n"
).encode("utf-8-sig")
ENDLESS_BYTES = 50_000_000


class Lines(list[str]):
    """What was said to the user, each a line."""

    def __call__(self, line: str) -> None:
        assert len(line.splitlines()) == 1
        self.append(line)


def refused(data: str | None, *parts: str) -> str:
    """The message of a refusal: one line that holds the parts."""
    with pytest.raises(UserError) as error:
        load(data, say=Lines())
    message = str(error.value)
    assert len(message.splitlines()) == 1
    for part in parts:
        assert part in message
    return message


class _Handler(BaseHTTPRequestHandler):
    server: "BookServer"

    def do_GET(self) -> None:
        path = urlsplit(self.path).path  # a proxy is asked for the whole address
        with suppress(OSError):  # the client hangs up, as it should where there is no end
            known = self.headers["User-Agent"].startswith("irongpt/")
            getattr(self, path[1:], self.missing)() if known else self.answer(BOOK, status=403)

    def answer(self, body: bytes, status: int = 200, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def good(self) -> None:
        self.answer(BOOK)

    def missing(self) -> None:
        self.answer(BOOK, status=404)  # only the status tells

    def unavailable(self) -> None:
        self.answer(BOOK, status=503)

    def html(self) -> None:
        self.answer(b"<html>Please log in to this network.</html>")

    def html_of_right_size(self) -> None:
        self.answer(b"<html>".ljust(len(BOOK)))

    def truncated(self) -> None:
        self.answer(BOOK[:-500], length=len(BOOK))

    def wrong(self) -> None:
        self.answer(BOOK.replace(b"Prince", b"Prints"))

    def long(self) -> None:
        self.answer(BOOK + b"x")

    def loop(self) -> None:
        self.send_response(302)
        self.send_header("Location", self.path)
        self.end_headers()

    def moved(self) -> None:
        self.send_response(301)
        self.send_header("Location", "/good")
        self.end_headers()

    def stall(self) -> None:
        self.answer(BOOK[:1000], length=len(BOOK))
        self.server.closing.wait(20)

    def trickle(self) -> None:
        self.answer(b"", length=len(BOOK))
        for byte in BOOK[:300]:  # for 6 s
            self.wfile.write(bytes([byte]))
            time.sleep(0.02)

    def endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        while self.server.sent < ENDLESS_BYTES:
            self.server.sent += self.wfile.write(b"x" * 100_000)

    def log_message(self, *args: object) -> None:
        pass


class BookServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.sent = 0  # bytes of /endless
        self.closing = threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def book_server() -> Iterator[BookServer]:
    with BookServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.closing.set()
        server.shutdown()

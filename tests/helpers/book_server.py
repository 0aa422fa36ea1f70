"""A server that sends a book in right and wrong ways, and the messages of `corpus.load`."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

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
ANSWERS = {
    "/good": (200, BOOK),
    "/unavailable": (503, BOOK),
    "/html": (200, b"<html>Please log in to this network.</html>"),
    "/truncated": (200, BOOK[:-500]),  # with the Content-Length of the full book
    "/wrong": (200, BOOK.replace(b"Prince", b"Prints")),
    "/stall": (200, BOOK[:1000]),
    "/endless": (200, BOOK[:1000]),
}


class Lines(list[str]):
    """Collects the lines that are printed for the user."""

    def __call__(self, line: str) -> None:
        assert len(line.splitlines()) == 1
        self.append(line)


def refused(data: Sequence[str] | str | None, *parts: str, **options: Any) -> str:
    """The message of the UserError from `load`: one line that contains the parts."""
    with pytest.raises(UserError) as error:
        load(data, say=Lines(), **options)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    assert all(part in message for part in parts), message
    return message


@contextmanager
def book_server() -> Iterator[str]:
    """Yields the address of a server that answers as in ANSWERS."""
    closing = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = ANSWERS[self.path]
            self.send_response(status)
            if self.path != "/endless":
                self.send_header("Content-Length", str(max(len(body), len(BOOK))))
            self.end_headers()
            self.wfile.write(body)
            if self.path == "/stall":
                closing.wait(20)
            with contextlib.suppress(OSError):  # the client has left
                while self.path == "/endless" and not closing.is_set():
                    self.wfile.write(BOOK)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        closing.set()
        server.shutdown()

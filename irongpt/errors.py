"""The exceptions that the command line prints as one line on stderr, with an exit code."""

import errno
import re
import urllib.error


class UserError(Exception):
    """A user's mistake, or a request that this machine cannot fulfil. The exit code is 2.

    The message is one line: what is wrong, then what to do. `irongpt.cli` prints it as
    `irongpt: error: <message>`, without a traceback.
    """


class DivergenceError(Exception):
    """The gradients stay non-finite. This is not a user's mistake, and the exit code is 1."""


def short_reason(error: Exception) -> str:
    """The reason for an error of the system or of the network, in one short line."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code}"
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        error = error.reason
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(reason).split())[:80]


def shortened(text: str, most: int = 380) -> str:
    """The text without its middle, if it is longer: a name in it may have any length."""
    return text if len(text) <= most else f"{text[: most - 140]} ... {text[-135:]}"


def one_line(e: BaseException) -> str:
    """An exception in one line of at most 300 characters."""
    return " ".join(f"{type(e).__name__}: {e}".split())[:300]


def out_of_memory(e: BaseException) -> bool:
    """Whether memory, of the host or of a GPU, was too short."""
    if isinstance(e, OSError):
        return e.errno == errno.ENOMEM
    known = "OutOfMemoryError|out of memory|allocate memory|bad_alloc|ALLOC_FAILED"
    full = isinstance(e, RuntimeError) and re.search(known, f"{type(e).__name__}: {e}")
    return isinstance(e, MemoryError) or bool(full)

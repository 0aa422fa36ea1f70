"""The exceptions that the command line prints as one line on stderr, with an exit code."""


class UserError(Exception):
    """A user's mistake, or a request that this machine cannot fulfil. The exit code is 2.

    The message is one line: what is wrong, then what to do. `irongpt.cli` prints it as
    `irongpt: error: <message>`, without a traceback.
    """


class DivergenceError(Exception):
    """The gradients stay non-finite. This is not a user's mistake, and the exit code is 1."""


def one_line(e: BaseException) -> str:
    """An exception in one line of at most 300 characters."""
    return " ".join(f"{type(e).__name__}: {e}".split())[:300]

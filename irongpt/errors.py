"""The exceptions that the command line turns into one line on stderr and an exit code."""


class UserError(Exception):
    """A user's mistake, or a machine that cannot do what was asked.

    The message is one line: what is wrong, then what to do about it. `irongpt.cli` prints it as
    `irongpt: error: <message>` and leaves with exit code 2; a traceback never reaches the user.
    """


class DivergenceError(Exception):
    """The gradients stay non-finite. One line too, but no mistake of the user's: exit code 1."""

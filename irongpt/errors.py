"""The one exception that the command line turns into a line on stderr and exit code 2."""


class UserError(Exception):
    """A user's mistake, or a machine that cannot do what was asked.

    The message is one line: what is wrong, then what to do about it. `irongpt.cli` prints it as
    `irongpt: error: <message>` and leaves with exit code 2; a traceback never reaches the user.
    """

"""matplotlib with its default settings, whatever the user's are."""

import contextlib
import io
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from irongpt.errors import UserError, one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def png(figure: "Figure") -> bytes:
    """The figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


@contextlib.contextmanager
def default_style() -> Iterator[None]:
    """Imports matplotlib, or raises UserError, and draws in its default style.

    Programs that Jupyter starts get its backend in MPLBACKEND, and matplotlib cannot be imported
    where they do not have that backend. Settings of the user may need programs such as LaTeX.
    """
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib import style
    except Exception as e:  # for one, a file of settings that is not UTF-8
        raise UserError(f"cannot import matplotlib: {one_line(e)}") from e
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    with style.context("default"):
        yield

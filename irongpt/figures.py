"""matplotlib with its default settings, whatever the user's are."""

import contextlib
import io
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def png(figure: "Figure") -> bytes:
    """The figure as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


@contextlib.contextmanager
def default_style() -> Iterator[None]:
    """Imports matplotlib, and draws in its default style.

    Programs that Jupyter starts get its backend in MPLBACKEND, and matplotlib cannot be imported
    where they do not have that backend. Settings of the user may need programs such as LaTeX.
    """
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib import style
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    with style.context("default"):
        yield

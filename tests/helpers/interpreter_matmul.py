"""Two changes to Triton's interpreter under test: matmuls like a GPU's, and fast device functions.

The matmuls are those of `irongpt_kernels.runtime.interpreter`.

The interpreter patches all of triton.language again at every call of a device function (a jitted
function that a kernel calls), which took most of the tests' time. The launch has patched it
already, except `triton.language.core`, whose patches stay until the process ends.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import triton.language as tl
from irongpt_kernels.runtime.interpreter import repeatable_matmuls
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpretedFunction

_patched: set[int] = set()  # modules of device functions whose language has been patched


@contextmanager
def repeatable() -> Iterator[None]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        variables = self.fn.__globals__
        if id(variables) not in _patched:
            if not any(x is tl for x in variables.values()):
                interpreter._patch_lang(self.fn)
            _patched.add(id(variables))
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as e:
            raise InterpreterError(repr(e)) from e

    with repeatable_matmuls(), patch.object(InterpretedFunction, "__call__", call):
        yield

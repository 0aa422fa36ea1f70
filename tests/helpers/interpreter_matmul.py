"""Two changes to Triton's interpreter under test: matmuls like a GPU's, and fast device functions.

A GPU sums a float32 dot product along its inner dimension in one fixed order. The interpreter
leaves the order to NumPy's BLAS, and some BLAS sum a transposed product in another order. The
attention kernels compute scores twice, the second time transposed, and rely on equal bits where
scores are large. Here matmuls are summed in float64 and rounded once, so the order has no effect.

The interpreter patches all of triton.language again at every call of a device function (a jitted
function that a kernel calls), which took most of the tests' time. The launch has patched it
already, except `triton.language.core`, whose patches stay until the process ends.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

PLAIN = InterpreterBuilder.create_dot
DTYPES = (np.float32, np.float16)  # bfloat16 is stored as raw bits: see test_interpreter
_patched: set[int] = set()  # modules of device functions whose language has been patched


@contextmanager
def repeatable() -> Iterator[None]:
    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if a.data.dtype not in DTYPES or b.data.dtype not in DTYPES:
            return PLAIN(self, a, b, d, *rest)
        product = a.data.astype(np.float64) @ b.data.astype(np.float64)
        return TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

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

    with (
        patch.object(InterpreterBuilder, "create_dot", create_dot),
        patch.object(InterpretedFunction, "__call__", call),
    ):
        yield

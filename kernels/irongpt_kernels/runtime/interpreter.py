"""Makes matmuls in Triton's interpreter independent of their operands' layout, as on a GPU.

A GPU adds up a float32 dot product along its inner dimension in one fixed order. The interpreter
leaves the order to NumPy's BLAS, and some BLAS libraries sum in another order if an operand is
transposed. The attention kernels compute scores several times, some of them transposed, and rely on
equal bits if scores are large. Here a matmul is summed in float64 and then rounded to float32,
which hides the order in all but very rare cases. Matmuls of bfloat16 are left to Triton.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

PLAIN = InterpreterBuilder.create_dot
DTYPES = ("float32", "float16")  # bfloat16 is stored as raw bits


def _create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
    if a.data.dtype.name not in DTYPES or b.data.dtype.name not in DTYPES:
        return PLAIN(self, a, b, d, *rest)
    result = a.data.astype("float64") @ b.data.astype("float64")
    return TensorHandle(result.astype(d.data.dtype) + d.data, d.dtype.scalar)


@contextmanager
def repeatable_matmuls() -> Iterator[None]:
    """A context in which `tl.dot` of float32 or float16 in the interpreter does not depend on
    NumPy's BLAS."""
    with patch.object(InterpreterBuilder, "create_dot", _create_dot):
        yield

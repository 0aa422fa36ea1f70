"""The interpreter's matrix products, with the same bits in any layout, as a GPU's are.

A GPU sums a float32 product along its inner dimension in one order. The interpreter leaves the
order to NumPy's BLAS, and some add up a transposed product in another. The attention kernels take
scores twice, the second time transposed, and rely on the same bits where scores are large. Summed
in float64 and rounded once, products do not depend on the order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

PLAIN = InterpreterBuilder.create_dot
TYPES = (np.float32, np.float16)  # bfloat16 stands there as bits: see test_interpreter


@contextmanager
def repeatable() -> Iterator[None]:
    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if a.data.dtype not in TYPES or b.data.dtype not in TYPES:
            return PLAIN(self, a, b, d, *rest)
        product = a.data.astype(np.float64) @ b.data.astype(np.float64)
        return TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    with patch.object(InterpreterBuilder, "create_dot", create_dot):
        yield

"""Triton's interpreter with the errors of a GPU's approximate instructions.

A kernel's `/` is compiled to div.full, `tl.exp` and `tl.exp2` to ex2.approx (the first of them of
x log2 e, rounded) and `tl.rsqrt` to rsqrt.approx. Whatever else the kernels call is rounded
correctly, or computed by code of the compiler.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
from irongpt_kernels.ptx.arithmetic import approximate
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

LOG2E = np.float32(math.log2(math.e))


@contextmanager
def gpu_errors(share: float = 1.0) -> Iterator[None]:
    """float32 results of these functions err by up to `share` of what the PTX ISA allows."""

    def inexact(name: str, exact: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any) -> Any:
            x, *rest = [arg.data for arg in args]
            if x.dtype != np.float32:
                return plain(self, *args)
            with np.errstate(all="ignore"):
                if name == "exp":
                    x = x * LOG2E
                seed = x.view(np.uint32)
                for other in rest:
                    seed = seed ^ (other.view(np.uint32) << np.uint32(1))
                wide = x.astype(np.float64)
                kind = {"exp": "ex2", "exp2": "ex2", "fdiv": "div"}.get(name, name)
                y = approximate(kind, wide, exact(wide, *rest), seed, share)
            return TensorHandle(y, args[0].dtype.scalar)

        plain = getattr(InterpreterBuilder, f"create_{name}")
        return call

    functions: dict[str, Callable[..., Any]] = {
        "exp": np.exp2,
        "exp2": np.exp2,
        "fdiv": np.divide,
        "rsqrt": lambda x: 1 / np.sqrt(x),
    }
    patched = {f"create_{name}": inexact(name, f) for name, f in functions.items()}
    with patch.multiple(InterpreterBuilder, **patched):
        yield

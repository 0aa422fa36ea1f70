"""Every op with the errors that a GPU's approximate instructions may have: a margin is left.

A kernel's `/` is compiled to div.full, `tl.exp` and `tl.exp2` to ex2.approx (the first of them of
x log2 e, rounded) and `tl.rsqrt` to rsqrt.approx. Whatever else the kernels call is rounded
correctly, or computed by code of the compiler.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from irongpt_kernels.op_inputs import RowShape
from irongpt_kernels.op_specs import SPECS
from irongpt_kernels.ptx.arithmetic import approximate
from irongpt_kernels.runtime import launch

if not launch.INTERPRETED:
    pytest.skip("puts the errors into Triton's interpreter", allow_module_level=True)

from irongpt_kernels import fused
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tests.ptx import cases

LOG2E = np.float32(math.log2(math.e))
MARGIN = 0.8  # of the tolerance
FEW = "19 columns"
SHAPES = {  # a row of few elements, a partial tile, and a long row
    "3 columns": RowShape(1, 2, 3, 16, V=3, M=1, N=3),
    "19 columns": RowShape(1, 2, 19, 16, V=19, L=1, M=20, N=19),
    "1000 columns": RowShape(1, 2, 90, 16, V=1000, M=4, N=1000),
}


@contextmanager
def gpu_errors() -> Iterator[None]:
    """float32 results of these functions err by up to what the PTX ISA allows."""

    def inexact(name: str, kind: str, exact: Callable[..., Any]) -> Callable[..., Any]:
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
                y = approximate(kind, wide, exact(wide, *rest), seed, 1.0)
            return TensorHandle(y, args[0].dtype.scalar)

        plain = getattr(InterpreterBuilder, f"create_{name}")
        return call

    functions = (
        ("exp", "ex2", np.exp2),
        ("exp2", "ex2", np.exp2),
        ("fdiv", "div", np.divide),
        ("rsqrt", "rsqrt", lambda x: 1 / np.sqrt(x)),
    )
    patched = {f"create_{name}": inexact(name, *function) for name, *function in functions}
    with patch.multiple(InterpreterBuilder, **patched):
        yield


def share(name: str, at: RowShape) -> float:
    """The largest error over the tolerance."""
    spec, options = SPECS[name], dict[str, int]()
    if name == "embed_layer_norm":  # a program for each token looks at every row
        at = replace(at, V=3, T=min(at.T, at.M))
    elif spec.kind == "optimizer":  # its weights begin at multiples of 16 bytes
        at, options = replace(at, N=24), dict(growth_interval=4)
    case = cases.Case(spec, "", "float32", at, 1.0 if name == "sample_tokens" else 0.2, options)
    inputs = case.inputs()
    with gpu_errors():
        found = case.run(fused, inputs)
    result = cases.Result()
    cases.compare(case, result, found, inputs)
    assert not result.problems
    return result.share


@pytest.mark.parametrize(
    ("name", "shape"),
    [(n, s) for n, spec in SPECS.items() for s in SHAPES if spec.kind != "optimizer" or s == FEW],
)
def test_a_fifth_of_the_tolerance_is_left(name: str, shape: str) -> None:
    assert share(name, SHAPES[shape]) <= MARGIN


def test_division_is_inexact_and_div_rn_exact() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x_ptr, quotient_ptr, exact_ptr):
        at = tl.arange(0, 64)
        x = tl.load(x_ptr + at)
        tl.store(quotient_ptr + at, 1.0 / x)
        tl.store(exact_ptr + at, tl.div_rn(1.0, x))

    x, quotient, exact = torch.arange(3.0, 67.0), torch.zeros(64), torch.zeros(64)
    with gpu_errors():
        kernel[(1,)](x, quotient, exact)
    assert torch.equal(exact, 1 / x)
    off = (quotient.double() * x.double() - 1).abs()
    assert 2.0**-23.5 < off.max() <= 2.0**-22

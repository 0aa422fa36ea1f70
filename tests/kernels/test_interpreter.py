"""Canaries: errors of Triton's interpreter, because of which some tests run only on a GPU.

If one of these tests fails after an update of Triton, the suite can test more: bfloat16 in the
kernel tests, NaN among the extreme values, and so on.
"""

import pytest
import torch
import triton
import triton.language as tl
from irongpt_kernels.runtime import launch
from numerics import randn
from torch import Tensor

if not launch.INTERPRETED:
    pytest.skip("about Triton's interpreter", allow_module_level=True)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    out = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision="ieee")
    tl.store(out_ptr + at, out)


@triton.jit
def _cast_kernel(x_ptr, y_ptr, N: tl.constexpr, DOUBLE: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, (x + x if DOUBLE else x).to(y_ptr.dtype.element_ty))


@triton.jit
def _max_kernel(x_ptr, y_ptr, N: tl.constexpr):
    tl.store(y_ptr, tl.max(tl.load(x_ptr + tl.arange(0, N)), axis=0))


def test_dot_is_right_in_float32_and_float16_and_wrong_in_bfloat16() -> None:
    for dtype, right in [(torch.float32, True), (torch.float16, True), (torch.bfloat16, False)]:
        a, b = (randn(16, 16, dtype=dtype, seed=i) for i in range(2))
        out = torch.zeros(16, 16)
        _dot_kernel[(1,)](a, b, out, 16)
        error = (out.double() - a.double() @ b.double()).abs().max()
        assert error < 1e-5 if right else not error < 1


@pytest.mark.parametrize("n", [16, 64])
def test_a_matmul_and_its_transpose_have_the_same_bits(n: int) -> None:
    a, b = (randn(n, n, dtype=torch.float32, seed=i) for i in range(2))
    found = torch.zeros(2, n, n)
    _dot_kernel[(1,)](a, b, found[0], n)
    _dot_kernel[(1,)](b.t().contiguous(), a.t().contiguous(), found[1], n)
    assert torch.equal(found[0], found[1].t())


def _elementwise(x: Tensor, dtype: torch.dtype, double: bool = False) -> Tensor:
    y = torch.zeros(x.shape, dtype=dtype)
    _cast_kernel[(1,)](x, y, len(x), double)
    return y


def test_casts_of_float16_are_right_and_to_bfloat16_round_differently() -> None:
    x = randn(4096, dtype=torch.float32)
    assert torch.equal(_elementwise(x, torch.float16), x.half())
    assert torch.equal(_elementwise(x.half(), torch.float32), x.half().float())
    assert not torch.equal(_elementwise(x, torch.bfloat16), x.bfloat16())


def test_arithmetic_is_wrong_in_bfloat16() -> None:
    x = randn(64, dtype=torch.bfloat16)
    assert not torch.equal(_elementwise(x, torch.bfloat16, double=True), x + x)


def test_max_drops_a_nan() -> None:
    y = torch.zeros(1)
    _max_kernel[(1,)](torch.tensor([1, float("nan"), 2, 3]), y, 4)
    assert y.item() == 3


def test_autotune_with_several_configurations_does_not_run() -> None:
    tuned = triton.autotune([triton.Config({"N": 4}), triton.Config({"N": 8})], key=[])
    with pytest.raises(RuntimeError, match="0 active drivers"):
        tuned(_cast_kernel)[(1,)](torch.ones(8), torch.ones(8), DOUBLE=True)


def test_an_access_out_of_bounds_goes_unnoticed() -> None:
    """The sanitizer catches it."""
    x = torch.zeros(16)
    _cast_kernel[(1,)](torch.ones(16), x[:8], 16, True)
    assert x.tolist() == [2] * 16


def test_int32_arithmetic_overflows_unnoticed() -> None:
    x = torch.tensor([2**31 - 1, 1, 1, 1], dtype=torch.int32)
    assert _elementwise(x, torch.int32, double=True)[0] == -2

"""The GELU kernels within the tolerance of eager."""

import importlib
import math

import pytest
import torch
from numerics import (
    DEVICE,
    EPS32,
    GRADIENTS,
    OUTPUTS,
    assert_op,
    assert_rule,
    each_dtype,
    run,
    values,
)

kernel = importlib.import_module("irongpt_kernels.fused.gelu")

with_and_without = pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])


@each_dtype
@with_and_without
@pytest.mark.parametrize(
    ("M", "N"), [(1, 19), (33, 19), (4, 1), (4, 19), (4, 255), (4, 256), (4, 257)], ids=str
)
def test_gelu(M: int, N: int, with_bias: bool, dtype: torch.dtype) -> None:
    bias = dict(bias=values(N, dtype=dtype, seed=1)) if with_bias else {}
    assert_op(kernel, "gelu", dict(x=values(M, N, dtype=dtype) * 2) | bias)


@with_and_without
@pytest.mark.parametrize("programs", [1, 3, 200])
def test_any_share_of_the_rows(programs: int, with_bias: bool, monkeypatch) -> None:
    monkeypatch.setattr(kernel, "PROGRAMS_PER_SM", programs)
    bias = dict(bias=values(300, seed=1)) if with_bias else {}
    assert_op(kernel, "gelu", dict(x=values(33, 300)) | bias)


@each_dtype
@pytest.mark.parametrize("sign", [-1, 1])
def test_extreme_values(sign: int, dtype: torch.dtype) -> None:
    top = [65504.0] if dtype == torch.float16 else [65504.0, 1e20, 3e38]
    some = [0.0, 1e-7, 1e-3, 0.5, 3, 5, 5.5, 8, 10, 13, 29.9, 30.1, 88, 100, 1e3, *top]
    x = sign * torch.tensor(some, dtype=torch.float64).to(dtype).to(DEVICE)
    dy = torch.ones_like(x)
    (y,), (dx,) = run(kernel.gelu, dict(x=x), (dy,))
    assert y.isfinite().all()
    assert dx.isfinite().all()
    # Each by itself, so that no large value hides the error of a small one, and in a formula that
    # does not lose z << 0 as 1 + tanh u does. There y is all exponential, whose error is its
    # argument in roundings of float32.
    z = x.double().requires_grad_()
    u2 = 2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)
    exact = z * torch.sigmoid(u2)
    (exact_dx,) = torch.autograd.grad(exact.sum(), z)
    for i in range(len(some)):
        if abs(some[i]) <= 65504:
            argument = abs(float(u2[i].detach())) if sign < 0 else 0.0
            for factor, a, b in [(OUTPUTS, y[i], exact[i]), (GRADIENTS, dx[i], exact_dx[i])]:
                b = b.detach()
                assert_rule(factor, a, b.to(dtype), b, b.abs() * argument * EPS32)
    assert torch.equal(y[-1], x[-1] if sign > 0 else torch.zeros_like(x[-1]))
    assert dx[-1] == (sign > 0)


def test_a_half_x_with_a_float32_bias() -> None:
    x, bias = values(9, 19), values(19, seed=1)
    for inputs in (dict(x=x.half(), bias=bias), dict(x=x, bias=bias.half())):
        assert_op(kernel, "gelu", inputs)

"""The GELU kernels, held to the rule of `numerics`."""

import importlib
import math

import pytest
import torch
from numerics import (
    DEVICE,
    EPS32,
    GRADIENTS,
    LAYOUTS,
    OUTPUTS,
    Inputs,
    assert_op,
    assert_rule,
    assert_same_bits,
    each_dtype,
    run,
    values,
)
from torch import Tensor

kernel = importlib.import_module("irongpt_kernels.fused.gelu")

with_and_without = pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])


def hold(x: Tensor, bias: Tensor | None = None) -> None:
    inputs: Inputs = dict(x=x, bias=bias)
    assert_op(kernel, "gelu", inputs, (values(*x.shape, dtype=x.dtype, seed=9),))


@each_dtype
@with_and_without
@pytest.mark.parametrize("N", [1, 19, 255, 256, 257])
@pytest.mark.parametrize("M", [1, 4, 33])
def test_gelu(M: int, N: int, with_bias: bool, dtype: torch.dtype) -> None:
    hold(values(M, N, dtype=dtype) * 2, values(N, dtype=dtype, seed=1) if with_bias else None)


@with_and_without
@pytest.mark.parametrize("programs", [1, 3, 200])
def test_any_share_of_the_rows(programs: int, with_bias: bool, monkeypatch) -> None:
    monkeypatch.setattr(kernel, "PROGRAMS_PER_SM", programs)
    bias = values(300, dtype=torch.float32, seed=1) if with_bias else None
    hold(values(33, 300, dtype=torch.float32), bias)


@with_and_without
@pytest.mark.parametrize("shape", [(19,), (3, 19), (2, 3, 19), (2, 1, 3, 19)])
def test_any_rank(shape: tuple[int, ...], with_bias: bool) -> None:
    bias = values(19, dtype=torch.float32, seed=1) if with_bias else None
    hold(values(*shape, dtype=torch.float32), bias)


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


def test_what_is_not_finite_shows() -> None:
    x = torch.tensor([math.nan, math.inf, 1.0], device=DEVICE)
    (y,), (dx,) = run(kernel.gelu, dict(x=x), (torch.ones_like(x),))
    assert y[0].isnan()
    assert dx[0].isnan()
    assert y[1] == math.inf
    assert y[2].isfinite()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 5), (0,)])
@with_and_without
def test_nothing_at_all(shape: tuple[int, ...], with_bias: bool) -> None:
    x = values(*shape, dtype=torch.float16)
    inputs = dict(x=x) | (dict(bias=torch.ones(shape[-1], device=DEVICE)) if with_bias else {})
    (y,), (dx, *db) = run(kernel.gelu, inputs, (x.clone(),))
    assert y.shape == dx.shape == shape
    assert all(torch.equal(g, torch.zeros(shape[-1], device=DEVICE)) for g in db)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(11, 19), (4, 5, 19)], ids=["read by strides", "copied"])
def test_layouts_change_nothing(shape: tuple[int, ...], layout: str) -> None:
    x, dy = (LAYOUTS[layout](values(*shape, dtype=torch.float32, seed=i)) for i in range(2))
    bias = values(19, 3, dtype=torch.float32, seed=2)[:, 1]
    before = [t.clone() for t in (x, dy, bias)]
    leaves = [t.detach().requires_grad_() for t in (x, bias)]
    y = kernel.gelu(*leaves)
    gradients = torch.autograd.grad(y, leaves, dy)
    straight = dict(x=x.contiguous(), bias=bias.contiguous())
    wanted = run(kernel.gelu, straight, (dy.contiguous(),))
    assert_same_bits(y, wanted[0][0])
    for laid, plain in zip(gradients, wanted[1], strict=True):
        assert_same_bits(laid, plain)
    assert_op(kernel, "gelu", dict(x=x, bias=bias), (dy,))
    assert all(map(torch.equal, before, (x, dy, bias)))


def test_the_gradient_of_a_sum_reaches_the_bias() -> None:
    x, bias = (values(*s, dtype=torch.float32).requires_grad_() for s in [(9, 19), (19,)])
    dx, db = torch.autograd.grad(kernel.gelu(x, bias).sum(), (x, bias))  # expanded, strides 0
    torch.testing.assert_close(db, dx.sum(0))


@pytest.mark.parametrize("frozen", ["x", "bias"])
def test_either_input_may_be_frozen(frozen: str) -> None:
    inputs = dict(x=values(9, 19, dtype=torch.float32), bias=values(19, dtype=torch.float32))
    dy = values(9, 19, dtype=torch.float32, seed=1)
    _, both = run(kernel.gelu, inputs, (dy,))
    wanted = dict(zip(inputs, both, strict=True))
    (free,) = set(inputs) - {frozen}
    leaf = inputs[free].requires_grad_()
    y = kernel.gelu(**inputs)
    (gradient,) = torch.autograd.grad(y, leaf, dy)
    assert torch.equal(gradient, wanted[free])
    y = kernel.gelu(**inputs)
    y.backward(dy)
    assert inputs[frozen].grad is None
    with torch.no_grad():
        assert not kernel.gelu(**inputs).requires_grad


def test_a_half_x_with_a_float32_bias() -> None:
    hold(values(9, 19, dtype=torch.float16), values(19, dtype=torch.float32, seed=1))
    hold(values(9, 19, dtype=torch.float32), values(19, dtype=torch.float16, seed=1))


@with_and_without
def test_the_custom_op_keeps_its_promises(with_bias: bool) -> None:
    x = values(3, 2, 5, dtype=torch.float32).requires_grad_()
    bias = torch.ones(5, device=DEVICE, requires_grad=True) if with_bias else None
    torch.library.opcheck(kernel._op, (x, bias))
    torch.library.opcheck(kernel._op, (x.transpose(0, 2), None))
    dy, bias = torch.ones_like(x), None if bias is None else bias.detach()
    torch.library.opcheck(kernel._backward_op, (dy, x.detach(), bias, with_bias))


X, B = torch.zeros(2, 3), torch.zeros(3)


@pytest.mark.parametrize(
    ("x", "bias", "error", "message"),
    [
        (1.0, B, TypeError, "x must be a tensor, got float"),
        (X.double(), B, TypeError, "x must be .* got torch.float64"),
        (X.int(), B, TypeError, "x must be .* got torch.int32"),
        (X.sum(), None, ValueError, r"x must have .* got shape \(\)"),
        (X, B.double(), TypeError, "bias must be .* got torch.float64"),
        (X, B[:2], ValueError, r"bias must have shape \(3,\), got \(2,\)"),
        (X, X, ValueError, r"bias must have shape \(3,\), got \(2, 3\)"),
        (X, B.to("meta"), ValueError, "bias is on meta, but x is on cpu"),
    ],
)
def test_bad_arguments_are_named(x, bias, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        kernel.gelu(x, bias)

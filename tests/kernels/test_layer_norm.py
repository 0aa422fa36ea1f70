"""Layer norm by Triton kernels within the tolerance of eager."""

import importlib

import pytest
import torch
from irongpt_kernels import builtin, fused
from irongpt_kernels.runtime import launch
from numerics import (
    DEVICE,
    GRADIENTS,
    OUTPUTS,
    Inputs,
    assert_op,
    assert_rule,
    each_dtype,
    randn,
    references,
    run,
    values,
)
from torch import Tensor
from torch.nn import functional as F

NAME = "layer_norm"
layer_norm = importlib.import_module("irongpt_kernels.fused.layer_norm")

# Row counts by N: around the 32 and the 2 rows of a program, which cost the interpreter as much.
ROWS = {17: [1, 2, 3, 5, 16, 31, 32, 33, 100], 384: [1, 2, 3, 33]}


def given(
    *shape: int, dtype: torch.dtype = torch.float32, params: torch.dtype | None = None
) -> Inputs:
    N = shape[-1]
    weight, bias = (values(N, dtype=params or dtype, seed=seed) for seed in (1, 2))
    return dict(x=values(*shape, dtype=dtype), weight=weight, bias=bias)


def hold(inputs: Inputs, dy: Tensor | None = None, **options: object) -> None:
    x = inputs["x"]
    upstream = values(*x.shape, dtype=x.dtype, seed=3) if dy is None else dy
    assert_op(layer_norm, NAME, inputs, (upstream,), **options)


@each_dtype
@pytest.mark.parametrize("N", [1, 3, 17, 384, 1000, 5000])
def test_small_and_partial_tiles(dtype: torch.dtype, N: int) -> None:
    inputs = given(2, 5, N, dtype=dtype)
    hold(inputs)
    del inputs["bias"]
    hold(inputs, eps=0.1)


@each_dtype
def test_parameters_in_float32_as_in_training(dtype: torch.dtype) -> None:
    hold(given(7, 384, dtype=dtype, params=torch.float32))
    hold(given(7, 384, dtype=torch.float32, params=dtype))


@pytest.mark.parametrize("sms", [1, 2, 3, 40])
@pytest.mark.parametrize("N", ROWS)
def test_any_number_of_rows_and_of_programs(monkeypatch, N: int, sms: int) -> None:
    monkeypatch.setattr(launch, "num_sms", lambda device: sms)
    for M in ROWS[N]:
        hold(given(M, N))


def test_the_longest_rows() -> None:
    hold(given(1, layer_norm.MAX_N))


def test_rows_are_read_where_they_lie() -> None:
    x = values(4, 6, 19)
    for view in [x, x[:, :, 2:9], x[:, 1], x[1:, 2], x[0, 0], x[:1, 0].expand(4, 19)]:
        assert launch.contiguous_rows(view).data_ptr() == view.data_ptr()


@pytest.mark.parametrize("N", [3, 384, 1000])  # of programs with 32, 2 and 1 rows
@pytest.mark.parametrize("spread", [1e-3, 1.0])
@pytest.mark.parametrize("mean", [1e2, 1e6 / 3, 1e6])
def test_rows_far_from_zero(mean: float, spread: float, N: int) -> None:
    x, weight = (mean + spread * randn(8, N)).float().to(DEVICE), torch.ones(N, device=DEVICE)
    dy = values(8, N, seed=3)
    hold(dict(x=x, weight=weight), dy)
    results, gradients = run(layer_norm.layer_norm, dict(x=x), (dy,), weight=weight)
    torchs, torchs_gradients = run(lambda x: F.layer_norm(x, (N,)), dict(x=x), (dy,))
    oracle, gradient = run(lambda x: F.layer_norm(x, (N,)), dict(x=x.double()), (dy.double(),))
    assert_rule(OUTPUTS, results[0], torchs[0], oracle[0])
    assert_rule(GRADIENTS, gradients[0], torchs_gradients[0], gradient[0])


@each_dtype
@pytest.mark.parametrize("value", [0.0, 2.5, -3e4])
def test_rows_of_equal_values(dtype: torch.dtype, value: float) -> None:
    inputs = given(3, 384, dtype=dtype) | dict(
        x=torch.full((3, 384), value, dtype=dtype, device=DEVICE)
    )
    (y,), gradients = run(layer_norm.layer_norm, inputs, (values(3, 384, dtype=dtype),))
    assert torch.equal(y, inputs["bias"].expand(3, 384))
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("size", [1e-6, 1e15])
def test_values_at_the_ends_of_the_range(size: float) -> None:
    inputs = given(3, 384)
    hold(inputs | dict(x=inputs["x"] * size))


@pytest.mark.parametrize("ops", [builtin, layer_norm], ids=["builtin", "fused"])
def test_a_result_of_another_dtype_is_the_float32_one_rounded(ops) -> None:
    """The gradient is that of the rounded result, widened. Compiled, they are two kernels, whose
    bits may differ."""
    x, weight, bias = (values(*s, seed=i) for i, s in enumerate([(9, 19), (19,), (19,)]))
    dy = values(9, 19, dtype=torch.float16, seed=4)
    inputs = dict(x=x, weight=weight, bias=bias)
    (y,), gradients = run(ops.layer_norm, inputs, (dy,), dtype=torch.float16)
    (wide,), wanted = run(ops.layer_norm, inputs, (dy.float(),))
    if launch.INTERPRETED or ops is builtin:
        assert torch.equal(y, wide.half())
        assert all(map(torch.equal, gradients, wanted))
    ((base,), bases), ((exact,), exacts) = references(NAME, inputs, (dy.float(),))
    assert_rule(OUTPUTS, y, base.half(), exact)
    for tensors in zip(gradients, bases, exacts, strict=True):
        assert_rule(GRADIENTS, *tensors)


def test_too_long_rows_are_refused() -> None:
    x, message = torch.zeros(1, 8193), "must have a last dimension of at most 8192, got 8193$"
    with pytest.raises(ValueError, match=f"^x {message}"):
        fused.layer_norm(x, torch.ones(4))
    with pytest.raises(ValueError, match=f"^branch {message}"):
        fused.dropout_add_layer_norm(x, x, torch.ones(4))

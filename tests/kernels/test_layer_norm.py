"""Layer norm by Triton: the rule of `numerics`, any layout, and what autograd and compile ask."""

import importlib
import itertools

import pytest
import torch
from irongpt_kernels import builtin, eager
from irongpt_kernels.fused import layer_norm_backward
from irongpt_kernels.runtime import launch
from numerics import (
    DEVICE,
    DTYPES,
    GRADIENTS,
    LAYOUTS,
    OUTPUTS,
    Inputs,
    assert_op,
    assert_rule,
    each_dtype,
    randn,
    run,
    values,
)
from torch import Tensor
from torch.nn import functional as F

NAME = "layer_norm"
layer_norm = importlib.import_module("irongpt_kernels.fused.layer_norm")
each_layout = pytest.mark.parametrize("layout", LAYOUTS)

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
    assert x is not None
    upstream = values(*x.shape, dtype=x.dtype, seed=3) if dy is None else dy
    assert_op(layer_norm, NAME, inputs, (upstream,), **options)


@each_dtype
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("N", [1, 3, 17, 384, 1000, 5000])
def test_small_and_partial_tiles(dtype: torch.dtype, N: int, with_bias: bool) -> None:
    inputs = given(2, 5, N, dtype=dtype)
    hold(inputs if with_bias else inputs | dict(bias=None))
    hold(inputs, eps=0.1)


@each_dtype
def test_parameters_in_float32_as_in_training(dtype: torch.dtype) -> None:
    hold(given(7, 384, dtype=dtype, params=torch.float32))
    hold(given(7, 384, dtype=torch.float32, params=dtype))


@pytest.mark.parametrize("shape", [(19,), (1, 19), (2, 3, 2, 2, 19)], ids=str)
def test_any_rank(shape: tuple[int, ...]) -> None:
    hold(given(*shape))


@pytest.mark.parametrize("sms", [1, 2, 3, 40])
@pytest.mark.parametrize("N", ROWS)
def test_any_number_of_rows_and_of_programs(monkeypatch, N: int, sms: int) -> None:
    monkeypatch.setattr(launch, "num_sms", lambda device: sms)
    for M in ROWS[N]:
        hold(given(M, N))


def test_long_rows() -> None:
    hold(given(2, 5000))
    hold(given(1, layer_norm.MAX_N))


@each_layout
@pytest.mark.parametrize("name", ["x", "weight", "bias", "dy"])
def test_layouts(name: str, layout: str) -> None:
    inputs = given(4, 5, 19) | dict(dy=values(4, 5, 19, seed=3))
    inputs[name] = LAYOUTS[layout](inputs[name])
    hold(inputs, inputs.pop("dy"))


def test_rows_are_read_where_they_lie() -> None:
    x = values(4, 6, 19)
    for view in [x, x[:, :, 2:9], x[:, 1], x[1:, 2], x[0, 0], x[:1, 0].expand(4, 19)]:
        assert launch.contiguous_rows(view).data_ptr() == view.data_ptr()


@pytest.mark.parametrize("N", [3, 17, 384, 1000])
@pytest.mark.parametrize("spread", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4, 1e6 / 3, 1e6])
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


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_spoils_itself_alone(bad: float) -> None:
    inputs = given(5, 19)
    clean = layer_norm.layer_norm(**inputs)
    inputs["x"][2, 7] = bad
    y = layer_norm.layer_norm(**inputs)
    assert y[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("shape", [(0, 19), (3, 0, 19), (3, 0)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    inputs = given(*shape)
    (y,), gradients = run(layer_norm.layer_norm, inputs, (values(*shape),))
    assert y.shape == shape
    for g, x in zip(gradients, inputs.values(), strict=True):
        assert torch.equal(g, torch.zeros_like(x))


@pytest.mark.parametrize("frozen", list(itertools.product([False, True], repeat=3)), ids=str)
def test_frozen_inputs_get_no_gradient_and_the_others_theirs(frozen: tuple[bool, ...]) -> None:
    inputs, dy = given(5, 19), values(5, 19, seed=3)
    _, wanted = run(layer_norm.layer_norm, inputs, (dy,))
    leaves = [x.clone().requires_grad_(not f) for x, f in zip(inputs.values(), frozen, strict=True)]
    y = layer_norm.layer_norm(*leaves)
    assert y.requires_grad == (not all(frozen))
    if y.requires_grad:
        y.backward(dy)
    for leaf, f, g in zip(leaves, frozen, wanted, strict=True):
        assert leaf.grad is None if f else torch.equal(leaf.grad, g)


@each_dtype
def test_opcheck(dtype: torch.dtype) -> None:
    inputs = given(3, 5, 19, dtype=dtype, params=torch.float32)
    for bias in (inputs["bias"], None):
        args = [inputs["x"], inputs["weight"], bias]
        leaves = [None if x is None else x.clone().requires_grad_() for x in args]
        torch.library.opcheck(layer_norm._op, (*leaves, 1e-5, torch.float16))
    _, mean, rstd = layer_norm.layer_norm_fwd(**inputs, eps=1e-5, dtype=dtype)
    saved = inputs["x"], inputs["weight"], mean, rstd, None, 0.0, dtype
    for wanted in ([True, True, True], [True, False, False], [False, True, False]):
        arguments = None, values(3, 5, 19, dtype=dtype), *saved, [False, *wanted]
        torch.library.opcheck(layer_norm_backward.layer_norm_backward, arguments)


@each_dtype
@pytest.mark.parametrize("params", DTYPES, ids=str)
def test_types_are_eagers_under_autocast_and_without(dtype, params) -> None:
    inputs, dy = given(5, 19, dtype=dtype, params=params), values(5, 19, dtype=dtype)
    for enabled in (False, True):
        with torch.autocast(DEVICE, torch.float16, enabled=enabled):
            results, gradients = run(layer_norm.layer_norm, inputs, (dy,))
            wanted, wanted_gradients = run(eager.layer_norm, inputs, (dy,))
        assert [x.dtype for x in results] == [x.dtype for x in wanted]
        assert [x.dtype for x in gradients] == [x.dtype for x in wanted_gradients]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=[1.0]), TypeError, "x must be a tensor, got list"),
        (dict(x=torch.zeros(2, 4).double()), TypeError, "x must be .*float64"),
        (dict(weight=torch.ones(4).long()), TypeError, "weight must be .*int64"),
        (dict(bias=torch.ones(4).double()), TypeError, "bias must be .*float64"),
        (dict(x=torch.tensor(1.0)), ValueError, r"x must have 1 to 64 dimensions, got shape \(\)"),
        (dict(weight=torch.ones(5)), ValueError, r"weight must have shape \(4,\), got \(5,\)"),
        (dict(weight=torch.ones(1, 4)), ValueError, r"weight must have shape \(4,\)"),
        (dict(bias=torch.ones(1)), ValueError, r"bias must have shape \(4,\), got \(1,\)"),
        (dict(x=torch.zeros(1, 8193)), ValueError, "x must .* at most 8192, got 8193"),
        (dict(weight=torch.ones(4, device="meta")), ValueError, "weight is on meta, but x is on"),
    ],
)
def test_bad_arguments_are_named(change: dict, error: type[Exception], message: str) -> None:
    inputs = dict(x=torch.zeros(2, 4), weight=torch.ones(4), bias=torch.ones(4))
    with pytest.raises(error, match=message):
        layer_norm.layer_norm(**inputs | change)


@pytest.mark.parametrize("ops", [builtin, layer_norm], ids=["builtin", "fused"])
def test_a_result_of_another_type_is_the_float32_one_rounded(ops) -> None:
    """And so is the gradient that of the rounded one, widened."""
    x, weight, bias = (values(*s, seed=i) for i, s in enumerate([(9, 19), (19,), (19,)]))
    dy = values(9, 19, dtype=torch.float16, seed=4)
    inputs = dict(x=x, weight=weight, bias=bias)
    (y,), gradients = run(ops.layer_norm, inputs, (dy,), dtype=torch.float16)
    (wide,), wanted = run(ops.layer_norm, inputs, (dy.float(),))
    assert torch.equal(y, wide.half())
    assert all(map(torch.equal, gradients, wanted))

"""Layer norm, and residual + dropout + layer norm: the kernels within the tolerance of eager."""

import importlib

import pytest
import torch
from irongpt_kernels import builtin, dropout, eager, fused
from irongpt_kernels.runtime import launch
from numerics import (
    DEVICE,
    GRADIENTS,
    HALVES,
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

layer_norm = importlib.import_module("irongpt_kernels.fused.layer_norm")
NORM, SUM = "layer_norm", "dropout_add_layer_norm"
DROP = dict(dropout_p=0.3, seed=1337)
OPTIONS: dict[str, dict[str, float]] = {NORM: {}, SUM: DROP}
STREAM = {NORM: "x", SUM: "residual"}
F32 = torch.float32
KINDS = [  # dtypes of x or the branch, of the residual, of the parameters
    pytest.param(F32, F32, F32, id="float32"),
    *(pytest.param(h, F32, F32, id=f"{h} branch") for h in HALVES),
    *(pytest.param(F32, F32, h, id=f"{h} parameters") for h in HALVES),
    *(pytest.param(h, h, h, id=f"all {h}") for h in HALVES),
]
# Row counts by N: around the 32 and the 2 rows of a program, which cost the interpreter as much.
ROWS = {17: [1, 2, 3, 5, 16, 31, 32, 33, 100], 384: [1, 2, 3, 33]}

each_op = pytest.mark.parametrize("op", [NORM, SUM])


def given(
    op: str, *shape: int, dtype: torch.dtype = F32, residual: torch.dtype = F32,
    params: torch.dtype = F32,
) -> Inputs:  # fmt: skip
    inputs: Inputs = {"x" if op == NORM else "branch": values(*shape, dtype=dtype)}
    if op == SUM:
        inputs["residual"] = values(*shape, dtype=residual, seed=1)
    weight, bias = (values(shape[-1], dtype=params, seed=seed) for seed in (2, 3))
    return inputs | dict(weight=weight, bias=bias)


def gradients_of(inputs: Inputs) -> tuple[Tensor, ...]:
    """Upstream: of the sum, and of the norm."""
    return tuple(
        values(*inputs[n].shape, dtype=inputs[n].dtype, seed=seed)
        for seed, n in enumerate(["residual", "branch"], 4)
    )


@each_op
@pytest.mark.parametrize(("dtype", "residual", "params"), KINDS)
@pytest.mark.parametrize("N", [1, 3, 17, 384, 1000, 5000])
def test_small_and_partial_tiles(op: str, dtype, residual, params, N: int) -> None:
    inputs = given(op, 2, 5, N, dtype=dtype, residual=residual, params=params)
    assert_op(fused, op, inputs, **OPTIONS[op])
    del inputs["bias"]
    assert_op(fused, op, inputs, eps=0.1)


@each_op
@pytest.mark.parametrize("sms", [1, 2, 3, 40])
@pytest.mark.parametrize("N", ROWS)
def test_any_number_of_rows_and_of_programs(monkeypatch, op: str, N: int, sms: int) -> None:
    monkeypatch.setattr(launch, "num_sms", lambda device: sms)
    for M in ROWS[N]:
        assert_op(fused, op, given(op, M, N), **OPTIONS[op])


def test_the_longest_rows() -> None:
    assert_op(fused, NORM, given(NORM, 1, layer_norm.MAX_N))


def test_rows_are_read_where_they_lie() -> None:
    x = values(4, 6, 19)
    for view in [x, x[:, :, 2:9], x[:, 1], x[1:, 2], x[0, 0], x[:1, 0].expand(4, 19)]:
        assert launch.contiguous_rows(view).data_ptr() == view.data_ptr()


@each_op
@pytest.mark.parametrize("N", [3, 384, 1000])  # of programs with 32, 2 and 1 rows
@pytest.mark.parametrize("spread", [1e-3, 1.0])
@pytest.mark.parametrize("mean", [1e2, 1e4, 1e6 / 3, 1e6])
def test_rows_far_from_zero(op: str, mean: float, spread: float, N: int) -> None:
    x = (mean + spread * randn(8, N)).float().to(DEVICE)
    assert_op(fused, op, given(op, 8, N) | {STREAM[op]: x})
    if op == NORM:
        dy, weight = values(8, N, seed=3), torch.ones(N, device=DEVICE)
        assert_op(fused, op, dict(x=x, weight=weight), (dy,))
        results, gradients = run(fused.layer_norm, dict(x=x), (dy,), weight=weight)
        torchs, torchs_gradients = run(lambda x: F.layer_norm(x, (N,)), dict(x=x), (dy,))
        oracle, exact = run(lambda x: F.layer_norm(x, (N,)), dict(x=x.double()), (dy.double(),))
        assert_rule(OUTPUTS, results[0], torchs[0], oracle[0])
        assert_rule(GRADIENTS, gradients[0], torchs_gradients[0], exact[0])


@each_op
@each_dtype
@pytest.mark.parametrize("value", [0.0, 2.5, -3e4])
def test_rows_of_equal_values(op: str, dtype: torch.dtype, value: float) -> None:
    x = torch.full((3, 384), value, dtype=dtype, device=DEVICE)
    parts = dict(x=x) if op == NORM else dict(branch=x / 2, residual=x / 2)
    inputs = given(op, 3, 384, params=dtype) | parts
    outputs, gradients = run(
        getattr(fused, op), inputs, (values(3, 384, dtype=dtype),) * len(parts)
    )
    assert torch.equal(outputs[-1], inputs["bias"].expand(3, 384))
    assert op == NORM or torch.equal(outputs[0], x)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("size", [1e-6, 1e15])
def test_values_at_the_ends_of_the_range(size: float) -> None:
    inputs = given(NORM, 3, 384)
    assert_op(fused, NORM, inputs | dict(x=inputs["x"] * size))


@pytest.mark.parametrize("ops", [builtin, fused], ids=["builtin", "fused"])
def test_a_result_of_another_dtype_is_the_float32_one_rounded(ops) -> None:
    """The gradient is that of the rounded result, widened. Compiled, they are two kernels, whose
    bits may differ."""
    inputs, dy = given(NORM, 9, 19), values(9, 19, dtype=torch.float16, seed=4)
    (y,), gradients = run(ops.layer_norm, inputs, (dy,), dtype=torch.float16)
    (wide,), wanted = run(ops.layer_norm, inputs, (dy.float(),))
    if launch.INTERPRETED or ops is builtin:
        assert torch.equal(y, wide.half())
        assert all(map(torch.equal, gradients, wanted))
    ((base,), bases), ((exact,), exacts) = references(NORM, inputs, (dy.float(),))
    assert_rule(OUTPUTS, y, base.half(), exact)
    for tensors in zip(gradients, bases, exacts, strict=True):
        assert_rule(GRADIENTS, *tensors)


@pytest.mark.parametrize(
    ("shape", "p"),
    [((5, 1), 0.2), ((33, 3), 0.9), ((2, 3, 17), 0.2), ((7, 384), 0.001), ((3, 1000), 0.2)],
    ids=str,
)
def test_the_mask_is_eagers_forward_and_backward(shape: tuple[int, ...], p: float) -> None:
    inputs = given(SUM, *shape) | dict(branch=torch.ones(shape, device=DEVICE))
    N = shape[-1]
    M = inputs["branch"].numel() // N
    for seed in (-7, 2**40 + 3):
        keep = dropout.row_keep(seed, M, N, p, DEVICE).view(shape)
        kept = torch.where(keep, dropout.keep_scale(p), 0.0)
        leaf = inputs["branch"].clone().requires_grad_()
        tensors = inputs | dict(branch=leaf, residual=0 * leaf)
        total, norm = fused.dropout_add_layer_norm(**tensors, dropout_p=p, seed=seed)
        assert torch.equal(total, kept)
        (alone,) = torch.autograd.grad(total.sum(), leaf, retain_graph=True)
        assert torch.equal(alone, kept)
        (both,) = torch.autograd.grad([total, norm], leaf, gradients_of(inputs))
        assert torch.equal(both != 0, keep)


@pytest.mark.parametrize("options", [{}, DROP], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("used", ["sum", "norm"])
def test_one_output_used(used: str, options: dict) -> None:
    """The other's upstream gradient is absent; given as zeros it must make no difference, but in
    the last bits of compiled kernels, which are two."""
    inputs = given(SUM, 5, 19, dtype=torch.float16)
    k = ["sum", "norm"].index(used)
    upstream = gradients_of(inputs)
    zeros = tuple(g if i == k else torch.zeros_like(g) for i, g in enumerate(upstream))
    assert_op(fused, SUM, inputs, zeros, **options)
    _, wanted = run(fused.dropout_add_layer_norm, inputs, zeros, **options)
    leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
    output = fused.dropout_add_layer_norm(**leaves, **options)[k]
    gradients = torch.autograd.grad(output, [*leaves.values()], upstream[k], allow_unused=True)
    (_, bases), (_, exacts) = references(SUM, inputs, zeros, **options)
    for name, g, w, base, exact in zip(inputs, gradients, wanted, bases, exacts, strict=True):
        if used == "sum" and name in ("weight", "bias"):
            assert g is None
        else:
            assert not launch.INTERPRETED or torch.equal(g, w)
            assert_rule(GRADIENTS, g, base, exact)


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("mean", [0.0, 1e3, 3e4])
def test_the_norm_is_that_of_the_sum_as_it_was_rounded(mean: float, half: torch.dtype) -> None:
    """Far from zero a half type keeps little of the branch, and none at all in the end."""
    inputs = given(SUM, 8, 384, dtype=half, residual=half)
    inputs["residual"] = (mean + values(8, 384, seed=1)).to(half)
    total, norm = fused.dropout_add_layer_norm(**inputs, **DROP)
    weight, bias = inputs["weight"], inputs["bias"]
    oracle = eager.layer_norm(total.double(), weight.double(), bias.double())
    assert_rule(OUTPUTS, norm, eager.layer_norm(total, weight, bias), oracle)

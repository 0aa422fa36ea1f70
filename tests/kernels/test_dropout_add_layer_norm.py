"""Residual + dropout + layer norm by one Triton kernel: the rule of `numerics`, eager's mask bit by
bit, any layout, and what autograd and compile ask."""

import importlib
import itertools

import pytest
import torch
from irongpt_kernels import dropout, eager
from irongpt_kernels.fused.layer_norm_backward import layer_norm_backward
from irongpt_kernels.runtime import launch
from numerics import DEVICE, HALVES, LAYOUTS, OUTPUTS, Inputs, assert_op, assert_rule, run, values
from torch import Tensor

NAME = "dropout_add_layer_norm"
fused = importlib.import_module("irongpt_kernels.fused.dropout_add_layer_norm")
OP = fused.dropout_add_layer_norm
DROP = dict(dropout_p=0.3, seed=1337)
TYPES = [  # of branch, residual, parameters
    pytest.param(torch.float32, torch.float32, torch.float32, id="float32"),
    *(pytest.param(h, torch.float32, torch.float32, id=f"{h} branch") for h in HALVES),
    *(pytest.param(h, h, h, id=f"all {h}") for h in HALVES),
]

# Row counts by N: around the 32 and the 2 rows of a program, which cost the interpreter as much.
ROWS = {17: [1, 2, 3, 5, 16, 31, 32, 33, 100], 384: [1, 2, 3, 33]}


def given(
    *shape: int,
    branch: torch.dtype = torch.float32,
    residual: torch.dtype = torch.float32,
    params: torch.dtype = torch.float32,
) -> Inputs:
    weight, bias = (values(shape[-1], dtype=params, seed=seed) for seed in (2, 3))
    return dict(
        branch=values(*shape, dtype=branch),
        residual=values(*shape, dtype=residual, seed=1),
        weight=weight,
        bias=bias,
    )


def gradients_of(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Upstream: of the sum, and of the norm."""
    branch, residual = inputs["branch"], inputs["residual"]
    return tuple(
        values(*x.shape, dtype=x.dtype, seed=seed) for seed, x in enumerate([residual, branch], 4)
    )


def hold(inputs: Inputs, upstream: tuple[Tensor, ...] | None = None, **options: object) -> None:
    assert_op(fused, NAME, inputs, upstream or gradients_of(inputs), **options)


@pytest.mark.parametrize(("branch", "residual", "params"), TYPES)
@pytest.mark.parametrize("options", [{}, DROP], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("N", [1, 3, 17, 384, 1000])
def test_small_and_partial_tiles(branch, residual, params, N: int, options: dict) -> None:
    inputs = given(2, 5, N, branch=branch, residual=residual, params=params)
    hold(inputs, **options)
    hold(inputs | dict(bias=None), eps=0.1, **options)


@pytest.mark.parametrize("shape", [(19,), (1, 19), (2, 3, 2, 2, 19)], ids=str)
def test_any_rank(shape: tuple[int, ...]) -> None:
    hold(given(*shape), **DROP)


@pytest.mark.parametrize("sms", [1, 2, 3, 40])
@pytest.mark.parametrize("N", ROWS)
def test_any_number_of_rows_and_of_programs(monkeypatch, N: int, sms: int) -> None:
    monkeypatch.setattr(launch, "num_sms", lambda device: sms)
    for M in ROWS[N]:
        hold(given(M, N), **DROP)


@pytest.mark.parametrize("p", [0.001, 0.2, 0.9])
@pytest.mark.parametrize("shape", [(5, 1), (33, 3), (2, 3, 17), (7, 384), (3, 1000)], ids=str)
def test_the_mask_is_eagers_forward_and_backward(shape: tuple[int, ...], p: float) -> None:
    inputs = given(*shape) | dict(branch=torch.ones(shape, device=DEVICE))
    N = shape[-1]
    M = inputs["branch"].numel() // N
    for seed in (0, -7, 2**40 + 3, torch.tensor(5, device=DEVICE)):
        keep = dropout.row_keep(seed, M, N, p, DEVICE).view(shape)
        kept = torch.where(keep, dropout.keep_scale(p), 0.0)
        leaf = inputs["branch"].clone().requires_grad_()
        total, norm = OP(**inputs | dict(branch=leaf, residual=0 * leaf), dropout_p=p, seed=seed)
        assert torch.equal(total, kept)
        (alone,) = torch.autograd.grad(total.sum(), leaf, retain_graph=True)
        assert torch.equal(alone, kept)
        (both,) = torch.autograd.grad([total, norm], leaf, gradients_of(inputs))
        assert torch.equal(both != 0, keep)


def test_the_row_of_the_mask_counts_over_all_leading_dimensions_and_layouts() -> None:
    inputs = given(4, 3, 17)
    flat = {k: v.view(12, 17) if v.dim() == 3 else v for k, v in inputs.items()}
    turned = inputs | dict(branch=LAYOUTS["transposed"](inputs["branch"]))
    total, norm = OP(**inputs, **DROP)
    for other in (flat, turned):
        other_total, other_norm = OP(**other, **DROP)
        assert torch.equal(total, other_total.view_as(total))
        assert torch.equal(norm, other_norm.view_as(norm))


def test_nothing_is_dropped_at_0_whatever_the_seed() -> None:
    inputs = given(5, 19)
    total, _ = OP(**inputs, dropout_p=0.0, seed=3)
    assert torch.equal(total, inputs["branch"] + inputs["residual"])


@pytest.mark.parametrize("options", [{}, DROP], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("used", ["sum", "norm"])
def test_one_output_used(used: str, options: dict) -> None:
    """The other's upstream gradient is absent; given as zeros it must make no difference."""
    inputs = given(5, 19, branch=torch.float16)
    k = ["sum", "norm"].index(used)
    upstream = gradients_of(inputs)
    zeros = tuple(g if i == k else torch.zeros_like(g) for i, g in enumerate(upstream))
    hold(inputs, zeros, **options)
    _, wanted = run(OP, inputs, zeros, **options)
    leaves = [x.clone().requires_grad_() for x in inputs.values()]
    output = OP(**dict(zip(inputs, leaves, strict=True)), **options)[k]
    gradients = torch.autograd.grad(output, leaves, upstream[k], allow_unused=True)
    for name, g, w in zip(inputs, gradients, wanted, strict=True):
        if used == "sum" and name in ("weight", "bias"):
            assert g is None
        else:
            assert torch.equal(g, w)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["branch", "residual", "weight", "bias", "dsum", "dnorm"])
def test_layouts(name: str, layout: str) -> None:
    inputs = given(4, 5, 19)
    inputs["dsum"], inputs["dnorm"] = gradients_of(inputs)
    inputs[name] = LAYOUTS[layout](inputs[name])
    upstream = inputs.pop("dsum"), inputs.pop("dnorm")
    hold(inputs, upstream, **DROP)


@pytest.mark.parametrize("spread", [1e-3, 1.0])
@pytest.mark.parametrize("mean", [1e2, 1e4, 1e6])
def test_sums_far_from_zero(mean: float, spread: float) -> None:
    inputs = given(8, 384)
    hold(inputs | dict(residual=mean + spread * values(8, 384)))


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("mean", [0.0, 1e3, 3e4])
def test_the_norm_is_that_of_the_sum_as_it_was_rounded(mean: float, half: torch.dtype) -> None:
    """Far from zero a half type keeps little of the branch, and none at all in the end."""
    inputs = given(8, 384, branch=half, residual=half)
    inputs["residual"] = (mean + values(8, 384, seed=1)).to(half)
    total, norm = OP(**inputs, **DROP)
    weight, bias = inputs["weight"], inputs["bias"]
    oracle = eager.layer_norm(total.double(), weight.double(), bias.double())
    assert_rule(OUTPUTS, norm, eager.layer_norm(total, weight, bias), oracle)


def test_rows_of_equal_values() -> None:
    x = torch.full((3, 384), 2.5, device=DEVICE)
    inputs = given(3, 384) | dict(branch=x, residual=x)
    (total, norm), gradients = run(OP, inputs, (x, x))
    assert torch.equal(total, x + x)
    assert torch.equal(norm, inputs["bias"].expand(3, 384))
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("shape", [(0, 19), (3, 0, 19), (3, 0)], ids=str)
@pytest.mark.parametrize("options", [{}, DROP], ids=["no dropout", "dropout"])
def test_empty(shape: tuple[int, ...], options: dict) -> None:
    inputs = given(*shape)
    outputs, gradients = run(OP, inputs, gradients_of(inputs), **options)
    assert [x.shape for x in outputs] == [shape, shape]
    for g, x in zip(gradients, inputs.values(), strict=True):
        assert torch.equal(g, torch.zeros_like(x))


@pytest.mark.parametrize("frozen", list(itertools.product([False, True], repeat=4)), ids=str)
def test_frozen_inputs_get_no_gradient_and_the_others_theirs(frozen: tuple[bool, ...]) -> None:
    inputs = given(5, 19, branch=torch.float16)
    _, wanted = run(OP, inputs, gradients_of(inputs), **DROP)
    leaves = {
        name: x.clone().requires_grad_(not f)
        for (name, x), f in zip(inputs.items(), frozen, strict=True)
    }
    outputs = OP(**leaves, **DROP)
    if not all(frozen):
        torch.autograd.backward(outputs, gradients_of(inputs))
    for leaf, f, g in zip(leaves.values(), frozen, wanted, strict=True):
        assert leaf.grad is None if f else torch.equal(leaf.grad, g)


def test_a_seed_bumped_between_forward_and_backward_is_refused() -> None:
    inputs, seed = given(5, 19), torch.tensor(3, device=DEVICE)
    total, _ = OP(inputs.pop("branch").requires_grad_(), **inputs, dropout_p=0.3, seed=seed)
    seed += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.sum().backward()


@pytest.mark.parametrize(("branch", "residual", "params"), TYPES[:2])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_opcheck(branch, residual, params, p: float) -> None:
    inputs = given(3, 5, 19, branch=branch, residual=residual, params=params)
    seed = torch.tensor(3, device=DEVICE) if p else None
    leaves = [x.clone().requires_grad_() for x in inputs.values()]
    torch.library.opcheck(fused._op, (*leaves, seed, p, 1e-5))
    total, _, mean, rstd = fused.dropout_add_layer_norm_fwd(*inputs.values(), seed, p, 1e-5)
    saved = total, inputs["weight"], mean, rstd, seed, p, branch
    upstream = gradients_of(inputs)
    for dsum, dnorm, wanted in [
        (*upstream, [True] * 4),
        (upstream[0], None, [True, False, False, False]),
        (None, upstream[1], [False, True, True, False]),
    ]:
        torch.library.opcheck(layer_norm_backward, (dsum, dnorm, *saved, wanted))


@pytest.mark.parametrize(("branch", "residual", "params"), TYPES)
def test_types_are_eagers_under_autocast_and_without(branch, residual, params) -> None:
    inputs = given(5, 19, branch=branch, residual=residual, params=params)
    upstream = gradients_of(inputs)
    for enabled in (False, True):
        with torch.autocast(DEVICE, torch.float16, enabled=enabled):
            results = run(OP, inputs, upstream, **DROP)
            wanted = run(eager.dropout_add_layer_norm, inputs, upstream, **DROP)
        for tensors, wanted_tensors in zip(results, wanted, strict=True):
            assert [x.dtype for x in tensors] == [x.dtype for x in wanted_tensors]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(residual=torch.zeros(2, 4).double()), TypeError, "residual must be .*float64"),
        (dict(weight=[1.0]), TypeError, "weight must be a tensor, got list"),
        (dict(bias=torch.ones(4).long()), TypeError, "bias must be .*int64"),
        (dict(residual=torch.zeros(4)), ValueError, r"residual must have shape \(2, 4\), got"),
        (dict(branch=torch.tensor(1.0)), ValueError, "branch must have 1 to 64 dimensions"),
        (dict(weight=torch.ones(5)), ValueError, r"weight must have shape \(4,\), got \(5,\)"),
        (dict(bias=torch.ones(1)), ValueError, r"bias must have shape \(4,\), got \(1,\)"),
        (dict(branch=torch.zeros(2, 8193)), ValueError, "branch must .* 8192, got 8193"),
        (dict(residual=torch.zeros(2, 4, device="meta")), ValueError, "residual is on meta"),
        (dict(dropout_p=1.0, seed=1), ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        (dict(dropout_p=-0.1), ValueError, r"dropout_p must be in \[0, 1\), got -0.1"),
        (dict(dropout_p=0.1), ValueError, "dropout_p > 0 needs a seed"),
        (dict(dropout_p=0.1, seed=torch.tensor(1.0)), TypeError, "seed must be .*float32"),
        (dict(dropout_p=0.1, seed=torch.tensor([1])), TypeError, "seed must be"),
    ],
)
def test_bad_arguments_are_named(change: dict, error: type[Exception], message: str) -> None:
    x, ones = torch.zeros(2, 4), torch.ones(4)
    inputs = dict(branch=x, residual=x, weight=ones, bias=ones)
    with pytest.raises(error, match=message):
        OP(**inputs | change)

"""Residual + dropout + layer norm by one Triton kernel: the tolerance, and the bits of the mask."""

import importlib

import pytest
import torch
from irongpt_kernels import dropout, eager
from irongpt_kernels.runtime import launch
from numerics import (
    DEVICE,
    GRADIENTS,
    HALVES,
    OUTPUTS,
    Inputs,
    assert_op,
    assert_rule,
    references,
    run,
    values,
)
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
# `test_layer_norm` goes through more of them: the backward kernel is the same.
ROWS = {17: [1, 33, 100], 384: [1, 3, 33]}


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
@pytest.mark.parametrize("N", [1, 3, 17, 384, 1000])
def test_small_and_partial_tiles(branch, residual, params, N: int) -> None:
    inputs = given(2, 5, N, branch=branch, residual=residual, params=params)
    hold(inputs, **DROP)
    del inputs["bias"]
    hold(inputs, eps=0.1)


@pytest.mark.parametrize("sms", [1, 3, 40])
@pytest.mark.parametrize("N", ROWS)
def test_any_number_of_rows_and_of_programs(monkeypatch, N: int, sms: int) -> None:
    monkeypatch.setattr(launch, "num_sms", lambda device: sms)
    for M in ROWS[N]:
        hold(given(M, N), **DROP)


@pytest.mark.parametrize(
    ("shape", "p"),
    [((5, 1), 0.2), ((33, 3), 0.9), ((2, 3, 17), 0.2), ((7, 384), 0.001), ((3, 1000), 0.2)],
    ids=str,
)
def test_the_mask_is_eagers_forward_and_backward(shape: tuple[int, ...], p: float) -> None:
    inputs = given(*shape) | dict(branch=torch.ones(shape, device=DEVICE))
    N = shape[-1]
    M = inputs["branch"].numel() // N
    for seed in (-7, 2**40 + 3):
        keep = dropout.row_keep(seed, M, N, p, DEVICE).view(shape)
        kept = torch.where(keep, dropout.keep_scale(p), 0.0)
        leaf = inputs["branch"].clone().requires_grad_()
        total, norm = OP(**inputs | dict(branch=leaf, residual=0 * leaf), dropout_p=p, seed=seed)
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
    inputs = given(5, 19, branch=torch.float16)
    k = ["sum", "norm"].index(used)
    upstream = gradients_of(inputs)
    zeros = tuple(g if i == k else torch.zeros_like(g) for i, g in enumerate(upstream))
    hold(inputs, zeros, **options)
    _, wanted = run(OP, inputs, zeros, **options)
    leaves = [x.clone().requires_grad_() for x in inputs.values()]
    output = OP(**dict(zip(inputs, leaves, strict=True)), **options)[k]
    gradients = torch.autograd.grad(output, leaves, upstream[k], allow_unused=True)
    (_, bases), (_, exacts) = references(NAME, inputs, zeros, **options)
    for name, g, w, base, exact in zip(inputs, gradients, wanted, bases, exacts, strict=True):
        if used == "sum" and name in ("weight", "bias"):
            assert g is None
        else:
            assert not launch.INTERPRETED or torch.equal(g, w)
            assert_rule(GRADIENTS, g, base, exact)


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

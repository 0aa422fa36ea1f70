"""The promises that every differentiable fused op makes, once for all of them.

Compilation without a graph break, determinism, unchanged inputs, eager's dtypes under autocast, and
an error for second derivatives. The sanitizer adds that the order of programs changes no bit.
"""

from typing import Any

import pytest
import torch
from irongpt_kernels import eager, fused
from numerics import DEVICE, OPS, Inputs, each_dtype, run, values
from torch import Tensor

DROPOUT = dict(dropout_p=0.3, seed=5)
OPTIONS: dict[str, dict[str, Any]] = {
    "causal_attention": DROPOUT,
    "causal_attention_packed": DROPOUT,
    "dropout_add_layer_norm": DROPOUT,
    "softmax": dict(scale=0.3, causal=True),
}
each_op = pytest.mark.parametrize("name", OPS)


def inputs_of(name: str, dtype: torch.dtype = torch.float32) -> Inputs:
    """Sizes that no tile divides; attention with two tiles of queries."""
    x, y = values(5, 19, 19, dtype=dtype), values(5, 19, 19, dtype=dtype, seed=1)
    parameters = dict(weight=values(19, seed=2), bias=values(19, seed=3))
    qkv = values(1, 37, 3, 2, 16, dtype=dtype)
    return {
        "causal_attention": dict(zip("qkv", qkv.permute(2, 0, 3, 1, 4), strict=True)),
        "causal_attention_packed": dict(qkv=qkv),
        "layer_norm": dict(x=x, **parameters),
        "softmax": dict(x=x),
        "cross_entropy": dict(
            logits=x[0], targets=torch.arange(19, device=DEVICE).masked_fill(x[0, 0] > 1, -100)
        ),
        "gelu": dict(x=x, bias=parameters["bias"].to(dtype)),
        "dropout_add_layer_norm": dict(branch=x, residual=y, **parameters),
    }[name]


def upstream_of(name: str, inputs: Inputs) -> tuple[Tensor, ...]:
    outputs, _ = run(getattr(fused, name), inputs, **OPTIONS.get(name, {}))
    return tuple(values(*y.shape, dtype=y.dtype, seed=7 + i) for i, y in enumerate(outputs))


def results(op: Any, name: str, inputs: Inputs, upstream: tuple[Tensor, ...]) -> list[Tensor]:
    outputs, gradients = run(op, inputs, upstream, **OPTIONS.get(name, {}))
    return [*outputs, *gradients]


@each_op
def test_an_op_compiles_without_a_graph_break(name: str) -> None:
    op, inputs = getattr(fused, name), inputs_of(name)
    upstream = upstream_of(name, inputs)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    expected = results(op, name, inputs, upstream)
    assert all(map(torch.equal, results(compiled, name, inputs, upstream), expected))


@each_op
@each_dtype
def test_two_runs_give_the_same_bits_and_leave_inputs_unchanged(name: str, dtype) -> None:
    leaves = {
        n: x.detach().requires_grad_(x.is_floating_point())
        for n, x in inputs_of(name, dtype).items()
    }
    upstream = upstream_of(name, leaves)
    tensors = [*leaves.values(), *upstream]
    before = [x.detach().clone() for x in tensors]
    found = []
    for _ in range(2):
        outputs = getattr(fused, name)(**leaves, **OPTIONS.get(name, {}))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = [x for x in leaves.values() if x.requires_grad]
        found += [  # the backward runs twice on each graph
            [*outputs, *torch.autograd.grad(outputs, wanted, upstream, retain_graph=True)]
            for _ in range(2)
        ]
    assert all(all(map(torch.equal, found[0], other)) for other in found[1:])
    assert all(map(torch.equal, tensors, before))


@each_op
def test_a_second_derivative_raises(name: str) -> None:
    leaves = {n: x.requires_grad_(x.is_floating_point()) for n, x in inputs_of(name).items()}
    first = next(x for x in leaves.values() if x.requires_grad)
    outputs = getattr(fused, name)(**leaves, **OPTIONS.get(name, {}))
    loss = sum(y.square().sum() for y in (outputs if isinstance(outputs, tuple) else (outputs,)))
    (gradient,) = torch.autograd.grad(loss, first, create_graph=True)
    with pytest.raises(RuntimeError, match=r"_backward.*no autograd formula"):
        gradient.sum().backward()


@each_op
@each_dtype
@pytest.mark.parametrize("enabled", [False, True], ids=["no autocast", "autocast"])
def test_dtypes_are_those_of_eager(name: str, dtype, enabled: bool) -> None:
    inputs = inputs_of(name, dtype)
    found = []
    for ops in (fused, eager):
        with torch.autocast(DEVICE, torch.float16, enabled=enabled):
            outputs, _ = run(getattr(ops, name), inputs, **OPTIONS.get(name, {}))
            upstream = tuple(torch.ones_like(y) for y in outputs)
            found.append([x.dtype for x in results(getattr(ops, name), name, inputs, upstream)])
    assert found[0] == found[1]

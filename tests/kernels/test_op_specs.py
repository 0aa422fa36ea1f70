"""The op table: every row runs, and costs are those counted by hand."""

from typing import Any

import pytest
import torch
from irongpt_kernels import eager, op_inputs
from irongpt_kernels.op_costs import adamw_bytes, muon_bytes, optimizer_bytes
from irongpt_kernels.op_inputs import SEED, RowShape, Shape
from irongpt_kernels.op_specs import SPECS, OpSpec

ROWS = RowShape(V=20, M=10, N=384)


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_row_describes_its_op(spec: OpSpec, dtype: torch.dtype) -> None:
    """Eager takes the inputs and options, with the optional ones and without, and returns the
    outputs that are named."""
    shape = Shape(B=2, H=2, T=8, D=16, V=13, L=1)
    kinds = op_inputs.dtypes(dtype)
    given = op_inputs.random_inputs(spec.inputs(shape), kinds, torch.device("cpu"))
    optional = {n: x for n, x in spec.inputs(shape).items() if x.optional}
    more = {n: torch.zeros(x.size, dtype=kinds[x.role]) for n, x in optional.items()}
    for inputs in (given, given | more):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32 and spec.differentiable):
            out = spec.run(eager, shape, inputs, **spec.options(shape, 0.5, SEED))
        if spec.call is None:
            assert len(out) == len(spec.outputs) + len(spec.changes)
        assert all(x.isfinite().all() for x in out)
    for backward in (False, True)[: 1 + spec.differentiable]:
        assert spec.cost(shape, dtype.itemsize, 4, backward).bytes > 0


@pytest.mark.parametrize(
    ("op", "shape", "itemsize", "backward", "wanted"),
    [
        ("causal_attention", Shape(1, 1, 2, 16), 2, False, (2 * (4 * 32 + 8), 3 * 16 * 4)),
        ("causal_attention", Shape(1, 1, 2, 16), 2, True, (2 * (8 * 32 + 8), 3 * 16 * 10)),
        ("causal_attention", Shape(2, 3, 2, 16), 2, True, (12 * (8 * 32 + 8), 18 * 16 * 10)),
        ("layer_norm", ROWS, 2, False, 10 * (2 * 384 * 4 + 8)),
        ("layer_norm", ROWS, 2, True, 10 * (3 * 384 * 4 + 8)),
        ("dropout_add_layer_norm", ROWS, 2, False, 10 * (384 * (4 + 8) + 8)),
        ("dropout_add_layer_norm", ROWS, 2, True, 10 * (384 * (4 + 12) + 8)),
        ("embed_layer_norm", Shape(2, 1, 3, 5, V=7), 2, False, 6 * (2 * 5 * 4 + 16)),
        ("embed_layer_norm", Shape(2, 1, 3, 5, V=7), 2, True, 6 * (3 * 5 * 4 + 16) + 10 * 5 * 4),
        ("softmax", Shape(1, 1, 4), 2, False, (10 + 16) * 2),
        ("softmax, full rows", ROWS, 2, False, 2 * 10 * 20 * 2),
        ("softmax, full rows", ROWS, 4, True, 3 * 10 * 20 * 4),
        ("norm_linear, full rows", Shape(3, 1, 1, 5, V=7), 2, False, (35 * 2, 2 * 3 * 35)),
        ("cross_entropy", ROWS, 2, False, 10 * (20 * 2 + 16)),
        ("cross_entropy", ROWS, 4, True, 10 * (2 * 20 * 4 + 16)),
        ("linear_cross_entropy", ROWS, 2, False, (30 * 384 * 2 + 80, 2 * 200 * 384)),
        ("linear_cross_entropy", ROWS, 4, True, (30 * 384 * 8 + 80, 4 * 200 * 384)),
        ("gelu", ROWS, 2, False, 2 * 10 * 4 * 384 * 2),
        ("gelu", ROWS, 4, True, 3 * 10 * 4 * 384 * 4),
        ("decode_attention", Shape(2, 3, 11, 16), 2, False, (192 * 26, 4 * 6 * 11 * 16)),
        ("linear_add", Shape(3, 1, 1, 5), 2, False, (4 * 25 * 2, 2 * 3 * 4 * 25)),
        ("embed_tokens", Shape(3, 1, 1, 5), 2, False, 3 * 3 * 5 * 4),
        ("sample_tokens", Shape(3, V=7), 2, False, 3 * 7 * 2),
        ("sum_shards", Shape(1, 1, 3, 2, V=5, L=1), 2, False, (12 * 4 + (5 + 3 + 3) * 2) * 8),
    ],
)
def test_least_bytes_and_flops(
    op: str, shape: Shape, itemsize: int, backward: bool, wanted: Any
) -> None:
    name, _, full = op.partition(", ")
    spec = SPECS[name].full_rows if full else SPECS[name]
    assert spec is not None
    cost = spec.cost(shape, itemsize, 4, backward)
    assert cost == (wanted if isinstance(wanted, tuple) else (wanted, 0))


def test_the_head_has_a_row_for_each_token_of_the_vocabulary() -> None:
    head = SPECS["norm_linear"].for_sweep("V")
    assert head is not None
    assert head.inputs(Shape(3, 1, 1, 5, V=7))["weight"].size == (7, 5)
    over = {name for name, spec in SPECS.items() if spec.for_sweep("V")}
    embeddings = {"embed_layer_norm", "embed_tokens"}
    heads = {"cross_entropy", "linear_cross_entropy", "norm_linear", "sample_tokens"}
    assert over == heads | embeddings


def test_bytes_of_the_optimizer() -> None:
    assert (adamw_bytes(10, 2, 2), adamw_bytes(10, 4, 0)) == (300, 320)
    assert (muon_bytes(10, 2, 2, 2), muon_bytes(10, 4, 4, 0)) == (300, 360)
    assert optimizer_bytes("adamw", 10, 5, 2) == 300 + 160
    assert optimizer_bytes("muon", 10, 5, 2) == 300 + 20 + 160

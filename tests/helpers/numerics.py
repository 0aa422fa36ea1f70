"""The tolerance of `irongpt_kernels.tolerance` as an assertion, and inputs to test it on.

`eager` itself is held in float64 against other formulas, to `EXACT`.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from irongpt_kernels import eager, tolerance
from irongpt_kernels.op_inputs import Input, RowShape, Shape, indices, normal, widened
from irongpt_kernels.op_inputs import Tensors as Inputs
from irongpt_kernels.op_specs import LAYERS, OPTIMIZERS, SPECS
from irongpt_kernels.runtime import emulate
from irongpt_kernels.tolerance import GRADIENTS, OUTPUTS
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter computes bfloat16 wrongly, and a T4 emulates it.
HALVES = [torch.float16]
if DEVICE == "cuda" and emulate.capability(torch.device(DEVICE)) >= (8, 0):
    HALVES.append(torch.bfloat16)
DTYPES = [torch.float32, *HALVES]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

# Two float64 formulas of one function differ by the rounding of some thousand operations.
EXACT = 1e-12
EPS32 = 2.0**-23


def assert_rule(
    factor: int,
    candidate: Tensor,
    baseline: Tensor,
    oracle: Tensor,
    slack: Tensor | None = None,
) -> None:
    """e(candidate) <= factor e(baseline) + rounding error, by maximum and by root mean square.

    slack: for a baseline that is not eager but the rounded oracle, the additional error of float32,
    such as that of an exponential, which is its argument in roundings.
    """
    assert candidate.shape == baseline.shape == oracle.shape
    assert candidate.dtype == baseline.dtype
    if oracle.numel() == 0:
        return
    finite = oracle.isfinite()
    for x in (candidate, baseline):
        torch.testing.assert_close(x[~finite].double(), oracle[~finite], equal_nan=True)
        assert x[finite].isfinite().all(), "not finite where the oracle is"
    for name, e in tolerance.errors(factor, candidate, baseline, oracle).items():
        bound = e.bound + (0.0 if slack is None else float(tolerance.NORMS[name](slack)))
        found = f"{name} error {e.candidate:.3g}, eager's {e.eager:.3g}, bound {bound:.3g}"
        assert e.candidate <= bound, found


def assert_exact(x: Any, y: Any) -> None:
    """Equal but for float64 rounding. Tensors, or tuples of them."""
    torch.testing.assert_close(x, y, rtol=EXACT, atol=EXACT, equal_nan=True)


Results = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


def run(
    op: Callable[..., Any], inputs: Inputs, upstream: tuple[Tensor, ...] = (), **options: Any
) -> Results:
    """The op's outputs, and the gradients of its floating inputs where `upstream` is given."""
    leaves = {
        name: x.detach().requires_grad_(bool(upstream) and x.is_floating_point())
        for name, x in inputs.items()
    }
    out = op(**leaves, **options)
    outputs = out if isinstance(out, tuple) else (out,)
    if not upstream:
        return outputs, ()
    wanted = [x for x in leaves.values() if x.requires_grad]
    pairs = [(x, g) for x, g in zip(outputs, upstream, strict=True) if x.requires_grad]
    gradients = torch.autograd.grad([x for x, _ in pairs], wanted, [g for _, g in pairs])
    return tuple(x.detach() for x in outputs), gradients


def references(
    name: str, inputs: Inputs, upstream: tuple[Tensor, ...], **options: Any
) -> tuple[Results, Results]:
    """Outputs and gradients of eager in the inputs' dtype and in float64."""
    op, wide = getattr(eager, name), tuple(g.double() for g in upstream)
    return run(op, inputs, upstream, **options), run(op, widened(inputs), wide, **options)


def assert_op(
    module: ModuleType,
    name: str,
    inputs: Inputs,
    upstream: tuple[Tensor, ...] | None = None,
    **options: Any,
) -> None:
    """Asserts the tolerance of an op of `module`, forward and backward, in the inputs' dtype.

    upstream: random unless given.
    """
    if upstream is None:
        outputs, _ = run(getattr(eager, name), inputs, **options)
        made = (randn(*x.shape, seed=i) for i, x in enumerate(outputs, 90))
        upstream = tuple(g.to(x) for g, x in zip(made, outputs, strict=True))
    results = run(getattr(module, name), inputs, upstream, **options)
    baseline, oracle = references(name, inputs, upstream, **options)
    for tensors in zip(results[0], baseline[0], oracle[0], strict=True):
        assert_rule(OUTPUTS, *tensors)
    for tensors in zip(results[1], baseline[1], oracle[1], strict=True):
        assert_rule(GRADIENTS, *tensors)


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return normal(shape, seed).to(dtype)


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """`randn` where kernels run."""
    return randn(*shape, dtype=dtype, seed=seed).to(DEVICE)


SMALL = RowShape(2, 3, 7, 5, V=17, M=20, N=19)  # sizes that no tile divides


def inputs_of(
    name: str,
    dtype: torch.dtype,
    shape: Shape = SMALL,
    lead: tuple[int, ...] = (4, 5),
    causal: bool = False,
    **roles: torch.dtype,
) -> Inputs:
    """Inputs of an op with a gradient. lead: the dimensions that make up M, except of a softmax's
    rows and where there are targets. roles: dtypes of the residual stream and of weights, if they
    differ."""
    spec, kinds = SPECS[name], dict.fromkeys(("compute", "stream", "weight"), dtype) | roles
    inputs = (spec if causal else spec.full_rows or spec).inputs(shape)

    def made(i: int, x: Input) -> Tensor:
        if x.role == "integer":
            return indices(x, ignored=True)
        value = randn(*x.size, dtype=kinds[x.role], seed=i)
        rows = len(x.size) == 2 and "N" in vars(shape) and x.size[-1] != shape.V
        rows = rows and x.role != "weight" and "targets" not in inputs  # an embedding, a head
        return value.view(*lead, x.size[1]) if rows else value

    return {name: made(i, x) for i, (name, x) in enumerate(inputs.items())}


OPS = [spec.name for spec in LAYERS]
FUNCTIONS = [name for spec in SPECS.values() for name in spec.names]  # all of `Ops`
UPDATES = [name for spec in OPTIMIZERS for name in spec.names]  # they have no gradient


# Layouts of a tensor. Memory between its elements is NaN.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every second value": lambda x: torch.stack([x, x * float("nan")], -1)[..., 0],
    "slice of a wider tensor": lambda x: F.pad(x, (3, 5), value=float("nan"))[..., 3:-5],
    "one value expanded": lambda x: x.flatten()[0].expand(x.shape),  # the gradient of a sum
    "first row expanded": lambda x: x[:1].expand_as(x),
}

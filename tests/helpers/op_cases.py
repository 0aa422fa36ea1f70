"""Every op with a gradient with each of its options and each of its paths, from the op table."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from irongpt_kernels import eager, op_inputs
from irongpt_kernels.op_inputs import RowShape, Shape, Tensors
from irongpt_kernels.op_specs import SPECS, OpSpec
from numerics import DEVICE, OPS, Inputs, inputs_of, values
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

ROWS = RowShape(B=1, H=1, T=9, D=16, V=17, M=20, N=19)  # sizes that no tile divides
SHORT = RowShape(B=2, H=1, T=7, V=7, M=6)  # for blocks of 4 columns


@dataclass(frozen=True)
class Case:
    """An op, its options, and the constants of its module that select a path through the kernel."""

    op: str
    options: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, int] = field(default_factory=dict)
    shape: RowShape = ROWS
    lead: tuple[int, ...] = (4, 5)  # the dimensions that make up M

    def inputs(
        self,
        dtype: torch.dtype = torch.float32,
        shape: Shape | None = None,
        lead: tuple[int, ...] | None = None,
        **roles: torch.dtype,
    ) -> Inputs:
        """q, k and v are views of one projection."""
        name = "causal_attention_packed" if self.op == "causal_attention" else self.op
        causal, lead = self.options.get("causal", False), self.lead if lead is None else lead
        found = inputs_of(name, dtype, shape or self.shape, lead, causal=causal, **roles)
        found = {n: x.to(DEVICE) for n, x in found.items()}
        if self.op == "causal_attention":
            return dict(zip("qkv", found["qkv"].permute(2, 0, 3, 1, 4), strict=True))
        return found

    @contextmanager
    def path(self) -> Iterator[None]:
        module = f"irongpt_kernels.fused.{self.op}"
        with ExitStack() as stack:
            for name, value in self.constants.items():
                stack.enter_context(patch.object(import_module(module), name, value))
            yield

    def outputs(self, ops: Any, inputs: Inputs) -> tuple[Tensor, ...]:
        torch.manual_seed(0)  # builtin's dropout uses PyTorch's generator
        out = getattr(ops, self.op)(**inputs, **self.options)
        return out if isinstance(out, tuple) else (out,)

    def upstream(self, inputs: Inputs) -> tuple[Tensor, ...]:
        with torch.no_grad():
            outputs = self.outputs(eager, inputs)
        return tuple(values(*y.shape, dtype=y.dtype, seed=80 + i) for i, y in enumerate(outputs))

    def results(self, ops: Any, inputs: Inputs, upstream: tuple[Tensor, ...]) -> list[Tensor]:
        """Outputs, and the gradients of the floating inputs."""
        leaves = leaves_of(inputs)
        outputs = self.outputs(ops, leaves)
        return [*outputs, *self.gradients(leaves, outputs, upstream)]

    def gradients(
        self,
        leaves: Inputs,
        outputs: tuple[Tensor, ...],
        upstream: tuple[Tensor, ...],
        retain: bool = False,
    ) -> tuple[Tensor, ...]:
        """Those of the floating inputs. retain: the graph, for another backward."""
        wanted = [x for x in leaves.values() if x.requires_grad]
        return torch.autograd.grad(outputs, wanted, upstream, retain_graph=retain)


DROPOUT = dict(dropout_p=0.3, seed=5)
BLOCKS = dict(MAX_BLOCK=16, TILE=32, PARTS=2)  # several blocks of columns, several tiles of rows
ONLINE = dict(MAX_BLOCK=0, ONLINE_BLOCK=4)
CASES = {
    **{name: Case(name) for name in OPS},
    "causal_attention with dropout": Case("causal_attention", DROPOUT),
    "causal_attention_packed with dropout": Case("causal_attention_packed", DROPOUT),
    "dropout_add_layer_norm with dropout": Case("dropout_add_layer_norm", DROPOUT),
    "causal softmax": Case("softmax", dict(causal=True, scale=0.3)),
    "online softmax": Case("softmax", dict(scale=0.3), ONLINE, SHORT),
    "online causal softmax": Case("softmax", dict(causal=True, scale=0.3), ONLINE, SHORT),
    "cross_entropy in blocks": Case("cross_entropy", {}, BLOCKS, replace(ROWS, M=11)),
    "linear_cross_entropy in blocks": Case(
        "linear_cross_entropy", {}, BLOCKS | dict(LONG_BLOCK=16), replace(ROWS, M=11)
    ),
}
# Each op once, with its options.
OP_CASES = {case.op: case for case in CASES.values() if not case.constants}


def leaves_of(inputs: Inputs) -> Inputs:
    return {n: x.detach().requires_grad_(x.is_floating_point()) for n, x in inputs.items()}


def spec_run(
    spec: OpSpec,
    ops: Any,
    shape: Shape,
    x: Tensors,
    place: Callable[[Tensor], Tensor] = torch.clone,
    **options: Any,
) -> tuple[Tensor, ...]:
    """The outputs of an op without a gradient, and what it changes of copies of its inputs, which
    `place` makes of those with more than one dimension."""
    if spec.call is None:
        options = spec.options(shape, 0.8, op_inputs.SEED) | options
    wide = {n: t.dim() > 1 and t.is_floating_point() for n, t in x.items()}
    x = {n: place(t) if wide[n] else t.clone() for n, t in x.items()}
    return spec.run(ops, shape, x, **options)


def spec_inputs(name: str, shape: Shape, dtype: torch.dtype) -> Tensors:
    """Inputs of an op without a gradient, with the optional ones."""
    inputs = {n: replace(x, optional=False) for n, x in SPECS[name].inputs(shape).items()}
    return op_inputs.random_inputs(inputs, op_inputs.dtypes(dtype), torch.device(DEVICE))


class Calls(TorchDispatchMode):
    """Records each custom op that runs, with copies of the arguments of its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Any, Any] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "irongpt" and op not in self.found:
            learns = not op._schema.name.endswith("_backward")
            self.found[op] = tree_map_only(
                Tensor,
                lambda x: x.detach().clone().requires_grad_(learns and x.requires_grad),
                (args, kwargs),
            )
        return op(*args, **(kwargs or {}))

    def check(self, kind: str = "") -> None:
        for op, (args, kwargs) in self.found.items():
            if kind in op._schema.name:
                torch.library.opcheck(op, args, kwargs)

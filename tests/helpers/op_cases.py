"""Every op with each of its options and each of its paths, from the op table."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from irongpt_kernels import eager, op_inputs
from irongpt_kernels.op_inputs import RowShape
from irongpt_kernels.op_specs import OPTIMIZERS, SPECS, TOKEN, OpSpec
from numerics import DEVICE, OPS, Inputs, inputs_of, values
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

ROWS = RowShape(B=1, H=1, T=9, D=16, V=17, M=20, N=19)  # sizes that no tile divides
SHORT = RowShape(B=2, H=1, T=7, V=7, M=6)  # for blocks of 4 columns
ONE_TOKEN = RowShape(B=3, H=2, T=34, D=48, V=11, N=37)  # two tiles of keys
# Weights begin at multiples of 16 bytes, and are matrices of one block and of more.
WEIGHTS = replace(ROWS, N=24, V=56, L=1)


@dataclass(frozen=True)
class Case:
    """An op, its options, and the constants of its module that select a path through the kernel."""

    op: str
    options: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, int] = field(default_factory=dict)
    shape: RowShape = ROWS
    lead: tuple[int, ...] = (4, 5)  # the dimensions that make up M

    @property
    def spec(self) -> OpSpec:
        return SPECS[self.op]

    def inputs(self, dtype: torch.dtype = torch.float32, **roles: torch.dtype) -> Inputs:
        """All inputs, also optional ones. q, k and v are views of one projection."""
        if not self.spec.differentiable:
            table = self.spec.inputs(self.shape)
            wanted = {n: replace(x, optional=False) for n, x in table.items()}
            return op_inputs.random_inputs(wanted, op_inputs.dtypes(dtype), torch.device(DEVICE))
        name = "causal_attention_packed" if self.op == "causal_attention" else self.op
        causal = self.options.get("causal", False)
        found = inputs_of(name, dtype, self.shape, self.lead, causal=causal, **roles)
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
        """The outputs. An op without a gradient gets copies of the inputs, and after its outputs
        come those that it changes in place."""
        if not self.spec.differentiable:
            options = {} if self.spec.call else self.spec.options(self.shape, 0.8, op_inputs.SEED)
            copies = copy.deepcopy(inputs)  # with their strides
            return self.spec.run(ops, self.shape, copies, **options | self.options)
        torch.manual_seed(0)  # builtin's dropout uses PyTorch's generator
        out = getattr(ops, self.op)(**inputs, **self.options)
        return out if isinstance(out, tuple) else (out,)

    def upstream(self, inputs: Inputs) -> tuple[Tensor, ...]:
        if not self.spec.differentiable:
            return ()
        with torch.no_grad():
            outputs = self.outputs(eager, inputs)
        return tuple(values(*y.shape, dtype=y.dtype, seed=80 + i) for i, y in enumerate(outputs))

    def results(self, ops: Any, inputs: Inputs, upstream: tuple[Tensor, ...]) -> list[Tensor]:
        """Outputs, and the gradients of the floating inputs if the op has any."""
        if not self.spec.differentiable:
            return [*self.outputs(ops, inputs)]
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
WITHOUT_GRADIENT = {
    **{spec.name: Case(spec.name, shape=ONE_TOKEN) for spec in TOKEN},
    **{spec.name: Case(spec.name, shape=WEIGHTS) for spec in OPTIMIZERS},
    "linear": Case("norm_linear", dict(gelu=False), shape=ONE_TOKEN),
    "sample_tokens of a few": Case("sample_tokens", dict(top_k=5, top_p=0.7), shape=ONE_TOKEN),
    "muon": Case("muon", shape=replace(WEIGHTS, L=2)),  # in groups of two matrices
    "sum_shards": Case("sum_shards", shape=replace(WEIGHTS, N=19)),
}


def leaves_of(inputs: Inputs) -> Inputs:
    return {n: x.detach().requires_grad_(x.is_floating_point()) for n, x in inputs.items()}


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

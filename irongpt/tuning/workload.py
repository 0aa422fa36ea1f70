"""What `irongpt tune` runs: the ops of a model at a preset's shape, and whether they are right."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from irongpt_kernels import Ops, eager, tolerance
from irongpt_kernels.runtime import launch_table
from torch import Tensor

from irongpt.config import GPTConfig

SEED = (5 << 32) + 7
OPS = {
    "attention": "causal_attention_packed",
    "norm": "dropout_add_layer_norm",
    "gelu": "gelu",
}
FUNCTIONS = {  # what is timed of an op's launches
    "attention forward": "attention._forward_kernel",
    "attention query": "attention_backward._query_kernel",
    "attention key": "attention_backward._key_kernel",
    "norm forward": "dropout_add_layer_norm._forward_kernel",
    "norm backward": "layer_norm_backward._kernel",
    "gelu forward": "gelu._fwd_kernel",
    "gelu backward": "gelu._bwd_kernel",
}
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Work:
    """A kernel of `tuned.KNOBS` in the training of a model. dtype: of the matrix products."""

    kernel: str
    model: GPTConfig
    batch: int
    dtype: torch.dtype
    device: torch.device

    @property
    def op(self) -> str:
        return OPS[self.kernel.split()[0]]

    @property
    def key(self) -> launch_table.Key:
        C = self.model.n_embd
        by_op = {"attention": C // self.model.n_head, "norm": C, "gelu": 4 * C}
        return self.kernel, by_op[self.kernel.split()[0]], self.dtype.itemsize

    def inputs(self, batch: int, seed: int = 0) -> Tensors:
        """As a training has them: the residual stream and weights in float32. Those that begin
        with `above` are the gradients of the outputs."""
        generator = torch.Generator(self.device).manual_seed(seed)
        T, C, H = self.model.context, self.model.n_embd, self.model.n_head
        half, rows, heads = self.dtype, (batch, T, C), (H, C // H)
        stream, branch = (rows, torch.float32), (rows, half)
        wide = ((batch, T, 4 * C), half)
        sizes: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {
            "causal_attention_packed": {
                "qkv": ((batch, T, 3, *heads), half),
                "above": ((batch, T, *heads), half),
            },
            "dropout_add_layer_norm": {
                "branch": branch,
                "residual": stream,
                "weight": ((C,), torch.float32),
                "above sum": stream,
                "above norm": branch,
            },
            "gelu": {"x": wide, "above": wide},
        }
        return {
            name: torch.randn(size, generator=generator, device=self.device).to(dtype)
            for name, (size, dtype) in sizes[self.op].items()
        }

    def run(self, ops: Ops, inputs: Tensors) -> Tensors:
        """The op's outputs, and its gradients as `d x`."""
        above = [x for name, x in inputs.items() if name.startswith("above")]
        leaves = {
            name: x.detach().requires_grad_()
            for name, x in inputs.items()
            if not name.startswith("above")
        }
        drops = self.op != "gelu" and self.model.dropout > 0
        options: dict[str, Any] = dict(dropout_p=self.model.dropout, seed=SEED) if drops else {}
        out = getattr(ops, self.op)(**leaves, **options)
        outputs = out if isinstance(out, tuple) else (out,)
        gradients = torch.autograd.grad(outputs, list(leaves.values()), above)
        return {f"out {i}": x.detach() for i, x in enumerate(outputs)} | {
            f"d {name}": g for name, g in zip(leaves, gradients, strict=True)
        }


class Gate:
    """Holds an op to the one rule, at the model's shape and a batch of two."""

    def __init__(self, work: Work) -> None:
        self.work, self.inputs = work, work.inputs(2, seed=1)
        self.baseline = work.run(eager, self.inputs)
        self.oracle = work.run(eager, {n: x.double() for n, x in self.inputs.items()})

    def wrong(self, ops: Ops) -> list[str]:
        """The tensors beyond the rule."""
        return list(self._beyond(self.work.run(ops, self.inputs)))

    def _beyond(self, results: Tensors) -> Iterator[str]:
        for name, x in results.items():
            factor = tolerance.GRADIENTS if name.startswith("d ") else tolerance.OUTPUTS
            found = tolerance.errors(factor, x, self.baseline[name], self.oracle[name])
            if not all(e.ok for e in found.values()):
                yield name

"""The accuracy check: a provider is compared with eager in float64 before it is timed.

Our kernels have to stay within the tolerance. A baseline may exceed it by up to 16 times, as
PyTorch does where it sums many rows in float32; it is timed, and its error is shown next to its
time, because leaving out a faster baseline would flatter us.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from irongpt_kernels import eager, tolerance
from torch import Tensor

from benchmarks.measure.rows import Accuracy
from benchmarks.ops import cases
from benchmarks.ops.cases import Case, Inputs
from benchmarks.ops.providers import Outputs, by, providers

BASELINES = 16.0  # times the tolerance


def passes(name: str, found: Accuracy) -> bool:
    """Whether a provider with this accuracy is timed."""
    return found.ok or (name != "fused" and found.share <= BASELINES)


class AccuracyCheck:
    """Compares the providers of a case with float64. The reference is computed once."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case.small(), device
        self.known: dict[float, tuple[list[Tensor], list[Tensor]]] = {}

    def __call__(self, name: str, own_masks: bool) -> Accuracy:
        """own_masks: check it without dropout. Raises what the provider raises."""
        case = replace(self.case, p=0.0) if own_masks else self.case
        baseline, oracle = self._wanted(case)
        provider = providers(case, self.device, (name,))[name]
        with provider.around():
            inputs = case.inputs(self.device)
            found = _run(provider.function, inputs, case.dtype)
        n_outputs = len(found) - sum(x.requires_grad for x in inputs.values())
        share, ok = 0.0, True
        for i, tensors in enumerate(zip(found, baseline, oracle, strict=True)):
            factor = tolerance.OUTPUTS if i < n_outputs else tolerance.GRADIENTS
            for e in tolerance.errors(factor, *tensors).values():
                ok &= e.ok
                part = e.candidate / e.bound if e.bound else float(not e.ok)
                share = max(share, math.inf if math.isnan(part) else part)
        return Accuracy(ok, share, case.size, case.p)

    def _wanted(self, case: Case) -> tuple[list[Tensor], list[Tensor]]:
        if case.p not in self.known:
            inputs = case.inputs(self.device)
            wide = {
                name: x.detach().double().requires_grad_(x.requires_grad)
                if x.is_floating_point()
                else x.clone()
                for name, x in inputs.items()
            }
            op = by(eager, case, self.device)

            def run(x: Inputs) -> list[Tensor]:
                return _run(op, x, case.dtype)

            self.known[case.p] = run(inputs), run(wide)
        return self.known[case.p]


def _run(function: Any, inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """Outputs, then gradients. Upstream gradients are values of `dtype` whatever the inputs are.
    Whole numbers have to be equal."""
    outputs = tensors_of(function(inputs))
    leaves = [x for x in inputs.values() if x.requires_grad]
    if not leaves:
        return [x if x.is_floating_point() else x.double() for x in outputs]
    upstream = [
        g.to(dtype).to(x.dtype)
        for g, x in zip(cases.upstream(tuple(outputs)), outputs, strict=True)
    ]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


def tensors_of(out: Outputs) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)

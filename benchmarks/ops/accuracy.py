"""The accuracy check: a provider is compared with eager in float64 before it is timed.

Our kernels have to stay within the tolerance. The error of a baseline may be up to 16
times the tolerance, as PyTorch's is if it sums many rows in float32; it is timed, and its error is
shown next to its time, because leaving out a faster baseline would flatter us.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from irongpt_kernels import eager, op_inputs, tolerance
from irongpt_kernels.op_inputs import Tensors
from torch import Tensor

from benchmarks.measure.rows import Accuracy
from benchmarks.ops.cases import Case, Inputs
from benchmarks.ops.providers import Outputs, by, providers
from irongpt.compare.ops import factor

BASELINE_FACTOR = 16.0  # the largest error of a baseline, in tolerances


def passes(name: str, accuracy: Accuracy) -> bool:
    """Whether a provider with this accuracy is timed."""
    return accuracy.ok or (name != "fused" and accuracy.share <= BASELINE_FACTOR)


class AccuracyCheck:
    """Compares the providers of a case with float64. The reference is computed once."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case.small(), device
        self.known: dict[float, tuple[Tensors, Tensors]] = {}

    def __call__(self, name: str, own_masks: bool) -> Accuracy:
        """own_masks: check it without dropout. Raises what the provider raises."""
        case = replace(self.case, p=0.0) if own_masks else self.case
        if case.p not in self.known:
            inputs = case.inputs(self.device)
            op, wide = by(eager, case, self.device), op_inputs.widened(inputs)
            self.known[case.p] = _results(op, case, inputs), _results(op, case, wide)
        baseline, oracle = self.known[case.p]
        provider = providers(case, self.device, (name,))[name]
        with provider.around():
            results = _results(provider.function, case, case.inputs(self.device))
        assert results.keys() == oracle.keys(), list(results)
        errors = [
            e
            for tensor, x in results.items()
            for e in tolerance.errors(factor(tensor), x, baseline[tensor], oracle[tensor]).values()
        ]
        share = max(e.share for e in errors)
        return Accuracy(all(e.ok for e in errors), share, case.size, case.p)


def _results(function: Any, case: Case, inputs: Inputs) -> Tensors:
    """Outputs, and gradients as `d x`. Upstream gradients are values of the case's dtype whatever
    the inputs are. Whole numbers have to be equal."""
    if case.spec.differentiable:
        upstream = partial(op_inputs.upstream, dtype=case.dtype)
        return op_inputs.results(function, inputs, case.spec.outputs, upstream)
    outputs = enumerate(tensors_of(function(inputs)))
    return {str(i): x if x.is_floating_point() else x.double() for i, x in outputs}


def tensors_of(out: Outputs) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)

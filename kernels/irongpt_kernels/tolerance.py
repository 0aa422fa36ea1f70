"""
The one rule of how near a result has to be.

The oracle is `eager` in float64 on the very values that the candidate got. With
e(x) = max |x - oracle|, and likewise the root mean square,

    e(candidate) <= 2 e(eager in the same dtype) + floor    for outputs,
    e(candidate) <= 3 e(eager in the same dtype) + floor    for gradients.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

OUTPUTS, GRADIENTS = 2, 3

NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda x: x.abs().amax(),
    "rms": lambda x: x.square().mean().sqrt(),
}


class Errors(NamedTuple):
    """Distances from the oracle by one norm, and what the rule allows the candidate."""

    candidate: float
    eager: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.candidate <= self.bound  # False where either is NaN

    @property
    def ratio(self) -> float:
        """The candidate's error in units of eager's; 1 where both are exact."""
        if self.eager:
            return self.candidate / self.eager
        return float("inf") if self.candidate else 1.0


def floor(dtype: torch.dtype, size: Tensor) -> Tensor:
    """One rounding of a value of the oracle's size, and below fp16's normal range one step.

    Eager can be exact by luck (one position, equal rows), and whoever rounds a result once cannot
    be held to less. eps is 2^-23 for float32, 2^-10 for float16, 2^-7 for bfloat16.
    """
    info = torch.finfo(dtype)
    return info.eps * size + info.smallest_normal * info.eps


def errors(factor: int, candidate: Tensor, eager: Tensor, oracle: Tensor) -> dict[str, Errors]:
    """By norm. The tensors have one shape and are not empty; where the oracle is not finite, they
    do not count.

    factor: OUTPUTS or GRADIENTS.
    """
    finite = oracle.isfinite()
    found = {}
    for name, norm in NORMS.items():
        e, e_eager = (norm((x.double() - oracle).where(finite, 0.0)) for x in (candidate, eager))
        size = norm(oracle.where(finite, 0.0))
        bound = factor * e_eager + floor(candidate.dtype, size)
        found[name] = Errors(float(e), float(e_eager), float(bound))
    return found

"""The tolerance of every comparison with the reference.

The candidate is the implementation under test. The oracle is `eager` in float64 on the same input
values. With e(x) = max |x - oracle|, and likewise for the root mean square,

    e(candidate) <= 2 e(eager in the same dtype) + rounding error    for outputs,
    e(candidate) <= 3 e(eager in the same dtype) + rounding error    for gradients.
"""

import math
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
    """Distances from the oracle in one norm, and the largest that the candidate may have."""

    candidate: float
    eager: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.candidate <= self.bound  # False if either is NaN

    @property
    def ratio(self) -> float:
        """The candidate's error divided by eager's, and 1 if both are exact."""
        if self.eager:
            return self.candidate / self.eager
        return float("inf") if self.candidate else 1.0

    @property
    def share(self) -> float:
        """The candidate's error divided by the largest allowed; infinite if it is not a number."""
        share = self.candidate / self.bound if self.bound else float(not self.ok)
        return math.inf if math.isnan(share) else share


def rounding_error(dtype: torch.dtype, magnitude: Tensor) -> Tensor:
    """eps times the magnitude, plus the smallest subnormal number.

    Eager can be exact by chance, for example at T = 1, but a candidate has to round its result at
    least once. eps is 2^-23 in float32, 2^-10 in float16, 2^-7 in bfloat16.
    """
    info = torch.finfo(dtype)
    return info.eps * magnitude + info.smallest_normal * info.eps


def errors(factor: int, candidate: Tensor, eager: Tensor, oracle: Tensor) -> dict[str, Errors]:
    """The errors in each norm. Elements whose oracle is not finite are left out.

    factor: OUTPUTS or GRADIENTS. The tensors have the same shape and are not empty.
    """
    finite = oracle.isfinite()
    result = {}
    for name, norm in NORMS.items():
        e, e_eager = (norm((x.double() - oracle).where(finite, 0.0)) for x in (candidate, eager))
        magnitude = norm(oracle.where(finite, 0.0))
        bound = factor * e_eager + rounding_error(candidate.dtype, magnitude)
        result[name] = Errors(float(e), float(e_eager), float(bound))
    return result

"""What follows from the norm of scaled gradients, in PyTorch: for `eager` and for `builtin`."""

import torch
from torch import Tensor


def finish(
    scaled_norm: Tensor,
    scale: Tensor,
    good_steps: Tensor,
    steps: Tensor,
    max_norm: float,
    calm: int,
) -> Tensor:
    """`unscale` from the norm of the scaled gradients on."""
    norm = scaled_norm / scale
    bad = ~norm.isfinite()
    divisor = scale * ((norm + 1e-6) / max_norm).clamp(min=1.0)
    steps += (~bad).float()
    if calm:
        good = (good_steps + 1).masked_fill(bad, 0)
        grow = good >= calm
        factor = torch.ones_like(scale).masked_fill(grow, 2.0).masked_fill(bad, 0.5)
        scale.copy_((scale * factor).clamp(1.0, 2.0**24))
        good_steps.copy_(good.masked_fill(grow, 0))
    return torch.stack((norm, divisor, bad.to(norm.dtype)))

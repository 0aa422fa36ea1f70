"""Muon: momentum whose update is made orthogonal, for matrices (Jordan et al. 2024).

The momentum U S V^T of a weight becomes the update U V^T: every direction moves alike, not only the
few that most gradients share. A Newton-Schulz iteration finds it by matrix products alone. Matrices
of one shape go through it together.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from types import ModuleType

import torch
from irongpt_kernels import builtin
from torch import Tensor

STEPS = 5  # of the iteration
RMS = 0.2  # of an update, about AdamW's (Liu et al. 2025): one learning rate serves both


class Muon:
    """Updates `params`, matrices, from their gradients. `momentum` is its state."""

    def __init__(
        self,
        params: Iterable[Tensor],
        beta: float,
        weight_decay: float,
        dtype: torch.dtype = torch.float32,
        ops: ModuleType = builtin,
    ) -> None:
        """dtype: of the iteration's products; see `products_type`."""
        self.beta, self.weight_decay, self.dtype, self.ops = beta, weight_decay, dtype, ops
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for p in params:
            by_shape[p.shape].append(p)
        self.momentum: dict[Tensor, Tensor] = {}  # each a part of its group's
        self.groups: list[tuple[list[Tensor], Tensor]] = []  # and momentum (n, rows, columns)
        for group in by_shape.values():
            momentum = group[0].new_zeros(len(group), *group[0].shape)
            self.groups.append((group, momentum))
            self.momentum |= zip(group, momentum, strict=True)

    @torch.no_grad()
    def step(
        self,
        lr: Tensor,
        unscaled: Tensor,
        gradients: Mapping[Tensor, Tensor],
        copies: Mapping[Tensor, Tensor],
    ) -> None:
        """lr: 0-d. unscaled: of the op `unscale`. gradients, 16-bit copies: by their weights."""
        for params, momentum in self.groups:
            grads = [gradients[p] for p in params]
            y = self.ops.muon_momentum(grads, momentum, unscaled, beta=self.beta, dtype=self.dtype)
            self.ops.muon_update(
                params,
                [copies[p] for p in params if p in copies],
                orthogonal(y),
                lr,
                unscaled,
                # An orthogonal matrix has a mean square of 1 / its longer side.
                scale=RMS * max(momentum.shape[1:]) ** 0.5,
                weight_decay=self.weight_decay,
            )


def products_type(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """That of the iteration where a training step multiplies in `dtype`.

    float16 for bfloat16 on a GPU, where it is as fast and ten times as exact: errors of 0.2 to
    2.5 % for 1.3 to 20 % (LOG.md). No value comes near its limit.
    """
    return torch.float16 if device.type == "cuda" and dtype.itemsize == 2 else dtype


def orthogonal(x: Tensor) -> Tensor:
    """U V^T of matrices U S V^T, roughly: singular values end between 0.7 and 1.2.

    x: (n, rows, columns), each of Frobenius norm 1. Products and result are of its type. The
    polynomial, odd and of fifth order, has Jordan's coefficients, which grow small singular values
    fastest. Those far below the largest stay small.
    """
    tall = x.shape[1] > x.shape[2]
    for _ in range(STEPS):
        gram = x.mT @ x if tall else x @ x.mT  # the smaller of the two
        gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, *((x, gram) if tall else (gram, x)), beta=3.4445)
    return x

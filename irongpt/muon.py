"""Muon: momentum whose update is made orthogonal, for matrices (Jordan et al. 2024).

The momentum U S V^T of a weight becomes the update U V^T: every direction moves alike, not only the
few that most gradients share. A Newton-Schulz iteration finds it by matrix products alone, float32
here, where others take bfloat16, which a T4 and most CPUs lack. Matrices of one shape go through it
together.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

STEPS = 5  # of the iteration
RMS = 0.2  # of an update, about AdamW's (Liu et al. 2025): one learning rate serves both


class Muon:
    """Updates `params`, matrices, from their gradients. `momentum` is its state."""

    def __init__(self, params: Iterable[Tensor], beta: float, weight_decay: float) -> None:
        self.beta, self.weight_decay = beta, weight_decay
        self.momentum = {p: torch.zeros_like(p) for p in params}
        self.by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for p in self.momentum:
            self.by_shape[p.shape].append(p)

    @torch.no_grad()
    def step(
        self, lr: Tensor, divisor: Tensor, overflow: Tensor, gradients: Mapping[Tensor, Tensor]
    ) -> None:
        """Gradients are divided by `divisor`; nothing changes if `overflow` is 1. All are 0-d.

        gradients: by their weights, of any type.
        """
        keep = overflow > 0
        for shape, params in self.by_shape.items():
            weights = torch.stack(params)  # (n, rows, columns), and so are the others
            grads = torch.stack([gradients[p] for p in params]).to(weights.dtype) / divisor
            old = torch.stack([self.momentum[p] for p in params])
            new = old.lerp(grads, 1 - self.beta)
            update = orthogonal(grads.lerp(new, self.beta))  # Nesterov's look ahead
            size = RMS * max(shape) ** 0.5  # an orthogonal matrix has a mean square of 1/max(shape)
            moved = weights * (1 - lr * self.weight_decay) - lr * size * update
            new, moved = old.where(keep, new), weights.where(keep, moved)
            for p, m, w in zip(params, new, moved, strict=True):
                self.momentum[p].copy_(m)
                p.copy_(w)


def orthogonal(x: Tensor) -> Tensor:
    """U V^T of matrices U S V^T, roughly: singular values end between 0.7 and 1.2.

    x: (n, rows, columns). The polynomial, odd and of fifth order, has Jordan's coefficients, which
    grow small singular values fastest. Those far below the largest stay small.
    """
    tall = x.shape[1] > x.shape[2]
    y = x.mT if tall else x  # the Gram matrix is the smaller one
    y = y / (y.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(STEPS):
        gram = y @ y.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        y = torch.baddbmm(y, gram, y, beta=3.4445)
    return y.mT if tall else y

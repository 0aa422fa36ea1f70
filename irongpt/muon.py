"""Muon: momentum whose update is made orthogonal, for matrices (Jordan et al. 2024).

The momentum U S V^T of a weight becomes the update U V^T: every direction moves alike, not only the
few that most gradients share. A Newton-Schulz iteration finds it by matrix products alone. Matrices
of one shape go through it together, those that are each other's transpose in shape too.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
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
    ) -> None:
        """dtype: of the iteration's products; see `products_type`."""
        self.beta, self.weight_decay, self.dtype = beta, weight_decay, dtype
        self.momentum: dict[Tensor, Tensor] = {}  # each a part of its group's
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for p in params:
            by_shape[p.shape].append(p)
        self.groups = []  # the weights of a shape, and their momentum (n, rows, columns)
        for group in by_shape.values():
            momentum = group[0].new_zeros(len(group), *group[0].shape)
            self.groups.append((group, momentum))
            self.momentum |= zip(group, momentum, strict=True)

    @torch.no_grad()
    def step(
        self, lr: Tensor, divisor: Tensor, overflow: Tensor, gradients: Mapping[Tensor, Tensor]
    ) -> None:
        """Gradients are divided by `divisor`; nothing changes if `overflow` is 1. All are 0-d.

        gradients: by their weights, of any type.
        """
        bad, good = overflow > 0, 1 - overflow
        ahead = []
        for params, momentum in self.groups:
            grads = torch.stack([gradients[p] for p in params])
            grads = grads / divisor.view(1, 1, 1)  # of three dimensions, which makes it float32
            grads.masked_fill_(bad, 0)
            momentum.lerp_(grads, (1 - self.beta) * good)
            ahead.append(grads.lerp_(momentum, self.beta))  # Nesterov's look
        weights = [p for params, _ in self.groups for p in params]
        torch._foreach_mul_(weights, 1 - lr * self.weight_decay * good)
        updates = []
        for x, update in zip(ahead, orthogonal_all(ahead, self.dtype), strict=True):
            size = RMS * max(x.shape[1:]) ** 0.5  # that of an orthogonal one is 1/sqrt(longer side)
            updates += (update.masked_fill(bad, 0) * (lr * -size).view(1, 1, 1)).unbind()
        torch._foreach_add_(weights, updates)


def products_type(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """That of the iteration where a training step multiplies in `dtype`.

    float16 for bfloat16 on a GPU, where it is as fast and ten times as exact: 0.2 to 2.5 %
    for 1.3 to 20 % (LOG.md). No value comes near its limit.
    """
    return torch.float16 if device.type == "cuda" and dtype.itemsize == 2 else dtype


def orthogonal_all(groups: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """`orthogonal` of each, at once of those whose shapes are the same or transposed."""
    wide = [x.mT if x.shape[1] > x.shape[2] else x for x in groups]
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for i, x in enumerate(wide):
        by_shape[x.shape[1:]].append(i)
    found = dict[int, Tensor]()
    for members in by_shape.values():
        y = orthogonal(torch.cat([wide[i] for i in members]), dtype)
        found |= zip(members, y.split([len(wide[i]) for i in members]), strict=True)
    turned = ((found[i].mT if wide[i] is not x else found[i]) for i, x in enumerate(groups))
    return [x.contiguous() for x in turned]


def orthogonal(x: Tensor, dtype: torch.dtype) -> Tensor:
    """U V^T of matrices U S V^T, roughly: singular values end between 0.7 and 1.2.

    x: (n, rows, columns), float32 or float64, no more rows than columns, or the Gram matrix is the
    larger one. dtype: of the products and the result. The polynomial, odd and of fifth order, has
    Jordan's coefficients, which grow small singular values fastest. Those far below the largest
    stay small.
    """
    y = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(STEPS):
        gram = y @ y.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        y = torch.baddbmm(y, gram, y, beta=3.4445)
    return y

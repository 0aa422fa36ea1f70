"""Muon: momentum whose update is made orthogonal, for matrices (Jordan et al. 2024).

The momentum U S V^T of a weight becomes the update U V^T: every direction moves alike, not only the
few that most gradients share. A Newton-Schulz iteration finds it by matrix products alone.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from irongpt_kernels import Ops, builtin
from torch import Tensor

STEPS = (3, 2)  # of the iteration, with a fresh Gram matrix for each number
RMS = 0.2  # of an update, about AdamW's (Liu et al. 2025): one learning rate serves both


class Muon:
    """Updates `params`, matrices, from their gradients. `momentum` is its state."""

    def __init__(
        self,
        params: Iterable[Tensor],
        beta: float,
        weight_decay: float,
        dtype: torch.dtype = torch.float32,
        ops: Ops = builtin,
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
        stats: Tensor,
        gradients: Mapping[Tensor, Tensor],
        copies: Mapping[Tensor, Tensor],
    ) -> None:
        """lr: 0-d. stats: of the op `grad_norm`. gradients, 16-bit copies: by their weights."""
        ahead = [
            self.ops.muon_momentum(
                [gradients[p] for p in params],
                momentum,
                stats,
                beta=self.beta,
                dtype=self.dtype,
            )
            for params, momentum in self.groups
        ]
        for (params, momentum), update in zip(self.groups, orthogonal(ahead), strict=True):
            self.ops.muon_update(
                params,
                [copies[p] for p in params if p in copies],
                update,
                lr,
                stats,
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


def orthogonal(groups: list[Tensor]) -> list[Tensor]:
    """U V^T of matrices U S V^T, roughly: singular values end between 0.7 and 1.2.

    groups: (n, rows, columns) each, of matrices of Frobenius norm 1. Products and result are of
    their type. Those far below the largest singular value stay small.

    The iteration works on Gram matrices, which are as large as the smaller side: all groups with
    one such side go together, and a matrix itself is multiplied twice for each of STEPS, where the
    usual form does so at every step. Taking the Gram matrix once only would lose half the digits.
    """
    sides: dict[int, list[int]] = defaultdict(list)
    for i, x in enumerate(groups):
        sides[min(x.shape[1:])].append(i)
    found = list(groups)
    for members in sides.values():
        for steps in STEPS:
            xs = [found[i] for i in members]
            gram = torch.cat([x.mT @ x if _tall(x) else x @ x.mT for x in xs])
            factors = _factor(gram, steps).split([len(x) for x in xs])
            for i, x, q in zip(members, xs, factors, strict=True):
                found[i] = x @ q if _tall(x) else q @ x
    return found


def _tall(x: Tensor) -> bool:
    return x.shape[1] > x.shape[2]


def _factor(gram: Tensor, steps: int) -> Tensor:
    """By what so many Newton-Schulz steps multiply matrices of these Gram matrices, (n, m, m).

    A step multiplies by p(G) = a + b G + c G^2 with Jordan's coefficients, which grow small
    singular values fastest, and the next Gram matrix is p G p.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    q = None
    for left in reversed(range(steps)):
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=1, dim2=2).add_(a)
        q = p if q is None else p @ q
        if left:
            gram = p @ gram @ p
    assert q is not None
    return q

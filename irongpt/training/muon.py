"""Muon: momentum with orthogonalized updates, for matrices (Jordan et al. 2024).

The momentum U S V^T of a weight becomes the update U V^T: all directions move equally, not only the
few that most gradients share. A Newton-Schulz iteration computes it with matmuls alone.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from irongpt_kernels import Ops
from torch import Tensor

from irongpt.config import TrainConfig
from irongpt.training.distributed import World

SHARE_FROM_SIDE = 512  # the least side for which GPUs share the iteration; computed for a T4
STEPS = (3, 2)  # Newton-Schulz steps with a first Gram matrix, then with a new one
RMS = 0.2  # that of an update, about AdamW's (Liu et al. 2025), so that both use one learning rate


class Muon:
    """Updates matrices from their gradients. `momentum`, by parameter, is its state."""

    def __init__(
        self,
        params: Iterable[Tensor],
        config: TrainConfig,
        dtype: torch.dtype,
        ops: Ops,
        world: World,
    ) -> None:
        """dtype: that of the iteration's matmuls, see `matmul_dtype`."""
        self.config, self.dtype, self.ops, self.world = config, dtype, ops, world
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for p in params:
            by_shape[p.shape].append(p)
        self.momentum: dict[Tensor, Tensor] = {}  # views of the groups' tensors
        self.groups: list[tuple[list[Tensor], Tensor]] = []  # n params, momentum (n, rows, columns)
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
        low_precision_params: Mapping[Tensor, Tensor],
    ) -> None:
        """Updates the matrices and their 16-bit copies in place. lr: 0-d. stats: the result of
        `grad_norm`. gradients, low_precision_params: by parameter."""
        beta = self.config.momentum
        directions = [
            self.ops.muon_momentum(
                [gradients[p] for p in params], momentum, stats, beta=beta, dtype=self.dtype
            )
            for params, momentum in self.groups
        ]
        for (params, momentum), update in zip(self.groups, self._updates(directions), strict=True):
            self.ops.muon_update(
                params,
                [low_precision_params[p] for p in params if p in low_precision_params],
                update,
                lr,
                stats,
                # An orthogonal matrix has a mean square of 1 / its longer side.
                scale=RMS * max(momentum.shape[1:]) ** 0.5,
                weight_decay=self.config.weight_decay,
            )

    def _updates(self, directions: list[Tensor]) -> list[Tensor]:
        """Applies `orthogonal` to each shard's part of every group.

        If sharing is worth it, each process computes some parts and the results are gathered; else
        each computes all. Neither this decision nor the bits depend on the number of processes.
        """
        S = self.config.shards
        if S == 1 or not directions or not self._worth_sharing(directions):
            return orthogonal(directions)
        cuts = [[len(d) * s // S for s in range(S + 1)] for d in directions]
        parts = [
            [d[c[s] : c[s + 1]] for d, c in zip(directions, cuts, strict=True)] for s in range(S)
        ]
        if self.world.size == 1:
            updates = [orthogonal(part) for part in parts]
        else:
            width = max(sum(x.numel() for x in part) for part in parts)
            rows = directions[0].new_zeros(S, width)
            for s in self.world.own_range(S):
                own = torch.cat([x.flatten() for x in orthogonal(parts[s])])
                rows[s, : len(own)] = own
            self.world.all_gather(rows)
            updates = []
            for row, part in zip(rows, parts, strict=True):
                sizes = [x.numel() for x in part]
                flat = row[: sum(sizes)].split(sizes)
                updates.append([x.view_as(y) for x, y in zip(flat, part, strict=True)])
        return [torch.cat(group) for group in zip(*updates, strict=True)]

    def _worth_sharing(self, directions: list[Tensor]) -> bool:
        """Whether sharing the iteration saves time: always on a CPU; on GPUs from a smaller side of
        SHARE_FROM_SIDE on, because the FLOPs per exchanged byte grow with it (docs/LOG.md)."""
        side = min(min(d.shape[1:]) for d in directions)
        return directions[0].device.type != "cuda" or side >= SHARE_FROM_SIDE


def matmul_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The iteration's dtype if a training step's matmuls have `dtype`.

    On a GPU float16 replaces bfloat16: it is as fast, and its errors are 0.4 to 2.5 %. The usual
    form in bfloat16 has 1.3 to 20 % (docs/LOG.md). All values are far below float16's maximum.
    """
    return torch.float16 if device.type == "cuda" and dtype.itemsize == 2 else dtype


def orthogonal(groups: list[Tensor]) -> list[Tensor]:
    """Approximately U V^T of matrices U S V^T: singular values become 0.7 to 1.2, except that those
    far below the largest one stay small.

    groups: (n, rows, columns) each, of matrices of Frobenius norm 1. Matmuls and results have their
    dtype.

    The iteration works on Gram matrices, whose size is the smaller side, so all groups with the
    same smaller side are batched. A matrix itself is multiplied twice for each number in STEPS,
    not at every step as in the usual form. With one Gram matrix for all steps, half the digits
    would be lost.
    """
    sides: dict[int, list[int]] = defaultdict(list)
    for i, x in enumerate(groups):
        if len(x):
            sides[min(x.shape[1:])].append(i)
    results = list(groups)
    for members in sides.values():
        for steps in STEPS:
            xs = [results[i] for i in members]
            gram = torch.cat([x.mT @ x if _tall(x) else x @ x.mT for x in xs])
            factors = _factor(gram, steps).split([len(x) for x in xs])
            for i, x, q in zip(members, xs, factors, strict=True):
                results[i] = x @ q if _tall(x) else q @ x
    return results


def _tall(x: Tensor) -> bool:
    return x.shape[1] > x.shape[2]


def _factor(gram: Tensor, steps: int) -> Tensor:
    """The factor by which `steps` Newton-Schulz steps multiply a matrix; gram: (n, m, m).

    A step multiplies by p(G) = a + b G + c G^2 with Jordan's coefficients, which enlarge small
    singular values most, and the next Gram matrix is p G p.
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

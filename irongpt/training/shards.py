"""The gradients of a step that is split into shards, and their exchange.

A shard has batch_size / shards sequences of every forward pass. Its sequences and its dropout seed
depend only on (seed, step, shard), and the gradients are summed in the order of the shards. So the
result has the same bits for every number of processes that divides the number of shards. A process
computes its shards one after another.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from irongpt.training.distributed import World

REDUCE_SCATTER_FROM = 5  # with so many processes or more, each sums a slice of the gradients
ALIGNED = 8  # elements: every gradient begins at a multiple of 16 bytes
NUMBERS = 4  # float32 values after the gradients of a shard: its loss, a signal's number, 0, 0


class Shards:
    """One row per shard: the gradients of all parameters, and the shard's numbers.

    The rows have the dtype of the matmuls, so 16-bit training exchanges 16 bits.
    """

    def __init__(
        self, params: Sequence[Tensor], count: int, dtype: torch.dtype, world: World
    ) -> None:
        """params: on the device. count: the number of shards, a multiple of world.size."""
        self.params, self.world, self.own = list(params), world, world.own_range(count)
        self.sizes = [-(-p.numel() // ALIGNED) * ALIGNED for p in self.params]
        n, tail = sum(self.sizes), NUMBERS * 4 // dtype.itemsize
        self.rows = torch.zeros(count, n + tail, dtype=dtype, device=self.params[0].device)
        self.gradients = self.rows[:, :n]
        self.numbers = self.rows[:, n:].view(torch.float32)  # (count, NUMBERS)

    def views(self, flat: Tensor) -> list[Tensor]:
        """Views of a row of gradients, in the shapes of the parameters."""
        parts = flat.split(self.sizes)
        return [part[: p.numel()].view(p.shape) for part, p in zip(parts, self.params, strict=True)]

    def put(self, k: int, grads: list[Tensor], loss: Tensor) -> None:
        """Writes the row of this process's shard k, from 0."""
        shard = self.own[k]
        torch._foreach_copy_(self.views(self.gradients[shard]), grads)
        self.numbers[shard, 0].copy_(loss)

    def exchange(self) -> Tensor:
        """Returns the gradients of all shards, which are still to be summed, (count, n).

        With many processes it returns their sum, (1, n): a reduce-scatter and an all-gather give
        the same bits and move fewer bytes.
        """
        if self.world.size < REDUCE_SCATTER_FROM:
            self.world.all_gather(self.rows)
            return self.gradients
        numbers = self.numbers.contiguous()
        self.world.all_gather(numbers)
        self.numbers.copy_(numbers)
        return self.world.reduce_rows(self.gradients)[None]

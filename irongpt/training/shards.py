"""The gradients of a step that is cut into shards, and their exchange.

A shard has batch_size / shards windows of every forward pass. Its windows and its dropout seed
depend on (seed, step, shard) alone, and the sum adds the shards in their order, so a world of any
size that divides the number of shards computes the same bits: each process does its shards in turn.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from irongpt.training.distributed import World

ALIGNED = 8  # elements: every gradient begins at a multiple of 16 bytes
NUMBERS = 4  # float32 numbers after the gradients of a shard: its loss, a signal's number, 0, 0


class Shards:
    """One row per shard: the gradients of all weights, and the shard's numbers.

    The rows have the dtype of the training's matmuls, so 16-bit training exchanges 16 bits.
    """

    def __init__(
        self, params: Sequence[Tensor], count: int, dtype: torch.dtype, world: World
    ) -> None:
        """params: the weights on the device. count: of shards, a multiple of the world's size."""
        self.params, self.world, self.mine = list(params), world, world.mine(count)
        self.sizes = [-(-p.numel() // ALIGNED) * ALIGNED for p in self.params]
        n, tail = sum(self.sizes), NUMBERS * 4 // dtype.itemsize
        self.rows = torch.zeros(count, n + tail, dtype=dtype, device=self.params[0].device)
        self.gradients = self.rows[:, :n]
        self.numbers = self.rows[:, n:].view(torch.float32)  # (count, NUMBERS)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parts of a row of gradients, in the shapes of the weights."""
        parts = flat.split(self.sizes)
        return [part[: p.numel()].view(p.shape) for part, p in zip(parts, self.params, strict=True)]

    def put(self, k: int, grads: list[Tensor], loss: Tensor) -> None:
        """Writes the row of this process's shard k, from 0."""
        shard = self.mine[k]
        torch._foreach_copy_(self.views(self.gradients[shard]), grads)
        self.numbers[shard, 0].copy_(loss)

    def exchange(self) -> Tensor:
        """Gives every process all rows. Returns the gradients to add, (count or 1, n).

        In a large world each process adds a part of all shards instead and then gets the other
        parts: the same bits, and fewer bytes.
        """
        if not self.world.adds_parts():
            self.world.gather(self.rows)
            return self.gradients
        numbers = self.numbers.contiguous()
        self.world.gather(numbers)
        self.numbers.copy_(numbers)
        return self.world.add_rows(self.gradients)[None]

"""Batches of training and validation sequences, as a pure function of (seed, batch number).

Nothing here has state, so that a resumed run gets the same batches.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from irongpt.config import check

TRAIN_SHARE = 0.9


@dataclass(frozen=True)
class Tokens:
    """The ids of a corpus: (N,) integers for training and for validation.

    before_val: the id that precedes `val` in the text; empty if `val` starts with a new document,
    whose first id is not a target. val_bytes: the size of the validation text in UTF-8.
    """

    train: Tensor
    val: Tensor
    before_val: Tensor
    val_bytes: int = 0

    @classmethod
    def of(cls, ids: Tensor) -> "Tokens":
        """One text: the first 90 % of its ids are for training, the rest for validation."""
        cut = int(TRAIN_SHARE * len(ids))
        return cls(ids[:cut], ids[cut:], ids[:cut][-1:])

    def check(self, context: int) -> None:
        """Raises UserError if a part is too short for one sequence and its targets."""
        total = len(self.train) + len(self.val)
        parts = ("training", self.train, "--data"), ("validation", self.val, "--val or --data")
        for name, part, flags in parts:
            check(
                len(part) > context,
                f"the corpus has {total:,} tokens, {len(part):,} of them for {name}, but one "
                f"sequence needs {context + 1:,}: use a longer text ({flags}) "
                "or a shorter --context",
            )

    @property
    def val_targets(self) -> int:
        """Tokens of the validation text that are predicted from those before them."""
        return len(self.val) - 1 + len(self.before_val)

    def bits_per_byte(self, loss: float) -> float:
        """A validation loss in nats per token, in bits per byte of text, which compares tokenizers.

        NaN if the size of the text is not known.
        """
        nats = loss * self.val_targets
        return nats / (math.log(2) * self.val_bytes) if self.val_bytes else math.nan


class TrainBatches:
    """Sequences sampled without replacement: a token is a target at most once per epoch.

    In each epoch adjacent sequences from a random offset on, which leave out fewer than two
    contexts of tokens, are shuffled. Over many epochs, sequences start at every position.
    """

    def __init__(self, ids: Tensor, context: int, batch_size: int, seed: int) -> None:
        """ids: (N,) integers on the device that trains, N > context."""
        self.ids, self.context, self.batch_size = ids, context, batch_size
        self.count = max(1, (len(ids) - 1) // context - 1)  # one less, to leave room for the offset
        self.starts = lru_cache(maxsize=2)(self._starts)
        self.seed = seed
        self.offsets = input_and_target(context, ids.device)

    def _starts(self, epoch: int) -> Tensor:  # (count,) int64; copied to the device once per epoch
        rng = np.random.default_rng([self.seed, epoch])
        offset = rng.integers(len(self.ids) - self.count * self.context)
        starts = rng.permutation(self.count) * self.context + offset
        return torch.from_numpy(starts).to(self.ids.device)

    def __call__(self, number: int) -> tuple[Tensor, Tensor]:
        """Batch `number`, from 0: inputs and targets, (B, T) int64 each."""
        return self.sequences_from(self.first_positions(number))

    def first_positions(self, number: int) -> Tensor:
        """First positions of the sequences in batch `number`: (B,) int64."""
        parts = []
        at, end = number * self.batch_size, (number + 1) * self.batch_size
        while at < end:
            epoch, first = divmod(at, self.count)
            parts.append(self.starts(epoch)[first : first + end - at])
            at += len(parts[-1])
        return torch.cat(parts)

    def sequences_from(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The batch of the sequences that start at these positions."""
        return sequences(self.ids, positions, self.offsets)


def evenly_spaced(
    ids: Tensor, context: int, batch_size: int, most: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of at most `most` sequences, the same each time, in order, without overlap.

    ids: (N,) integers on the device that evaluates, N > context. The last batch may be smaller.
    """
    count = (len(ids) - 1) // context
    used = min(count, most)
    starts = torch.arange(used, device=ids.device) * count // used * context
    offsets = input_and_target(context, ids.device)
    for first in range(0, used, batch_size):
        yield sequences(ids, starts[first : first + batch_size], offsets)


def every_target(ids: Tensor, context: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in which every id but the first is a target once, in order.

    The sequences do not overlap, so that the first targets of each one have little context. The
    last one is shorter than the others if the ids do not fill it.
    """
    yield from evenly_spaced(ids, context, batch_size, most=len(ids))
    if rest := (len(ids) - 1) % context:
        start = torch.tensor([len(ids) - 1 - rest], device=ids.device)
        yield sequences(ids, start, input_and_target(rest, ids.device))


def input_and_target(context: int, device: torch.device) -> Tensor:
    """Positions of the inputs and of the targets in a sequence: 0 to T - 1, 1 to T. (2, 1, T)"""
    positions = torch.arange(context, device=device)
    return torch.stack((positions, positions + 1))[:, None]


def sequences(ids: Tensor, starts: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """ids (N,), starts (B,), `input_and_target` -> inputs and targets, (B, T) int64, contiguous."""
    inputs, targets = ids[starts[:, None] + offsets].long()  # (2, B, T)
    return inputs, targets

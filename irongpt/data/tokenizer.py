"""A character tokenizer: text to token ids and back, one token per character."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from irongpt.errors import UserError


@dataclass(frozen=True)
class CharTokenizer:
    """The id of a character is its index in `chars`, distinct code points in ascending order."""

    chars: str

    def __post_init__(self) -> None:
        if not self.chars or list(self.chars) != sorted(set(self.chars)):
            raise UserError(
                "a vocabulary must be distinct characters in ascending order, at least one"
            )
        if any("\ud800" <= char <= "\udfff" for char in self.chars):
            raise UserError("a vocabulary cannot contain half of a surrogate pair")

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """A vocabulary of all characters in a text, which must not be empty."""
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        return len(self.chars)

    def encode(self, text: str) -> torch.Tensor:
        """(len(text),) int64. Raises UserError on a character outside the vocabulary."""
        ids = self._id_of[_code_points(text)]
        if ids.size and ids.min() < 0:
            unknown = sorted(set(text) - set(self.chars), key=text.index)
            first, others = unknown[0], len(unknown) - 1
            raise UserError(
                f"the character {first!r} (U+{ord(first):04X}) "
                + (f"and {others} other{'s' * (others > 1)} are" if others else "is")
                + f" not among the {self.vocab_size} of the vocabulary: "
                "use only characters of the training text"
            )
        return torch.from_numpy(ids)

    def decode(self, ids: Sequence[int] | torch.Tensor) -> str:
        """The text of (N,) ids. Raises IndexError on an id outside [0, vocab_size)."""
        values = ids.tolist() if isinstance(ids, torch.Tensor) else ids
        if any(i < 0 for i in values):  # Python would index from the end
            raise IndexError(f"token id {min(values)} is negative")
        return "".join([self.chars[i] for i in values])

    def to_json(self) -> dict[str, str]:
        return {"kind": "char", "chars": self.chars}

    @classmethod
    def from_json(cls, value: Any) -> "CharTokenizer":
        """Inverse of `to_json`. Raises UserError on anything else."""
        if not isinstance(value, dict) or set(value) != {"kind", "chars"}:
            raise UserError("the fields of a tokenizer must be kind and chars")
        if value["kind"] != "char" or not isinstance(value["chars"], str):
            raise UserError("the kind of a tokenizer must be char, and chars must be a string")
        return cls(value["chars"])

    @cached_property
    def _id_of(self) -> np.ndarray:  # (0x110000,) the id of each code point, -1 for none
        table = np.full(0x110000, -1, dtype=np.int64)
        table[_code_points(self.chars)] = np.arange(self.vocab_size)
        return table


def _code_points(text: str) -> np.ndarray:  # (len(text),)
    # Bytes of a prompt that are not UTF-8 arrive as lone surrogates, which `encode` reports.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")

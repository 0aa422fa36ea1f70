"""Tokenizers: text to token ids and back, one token per character or by byte pair encoding.

Both are stored as the tokenizer.json of Hugging Face's `tokenizers`, which reads the files. Both
have

    vocab_size    the number of ids
    end           the id between documents; None if the vocabulary has none
    token_bytes   the bytes of each token; for `end` those of its name
    encode(text)  (N,) int64, never with `end`; UserError if the vocabulary lacks a character
    decode(ids)   the text of (N,) ids; IndexError on an id outside [0, vocab_size)
    to_json()     tokenizer.json as Hugging Face reads it
"""

import codecs
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from irongpt.data import bpe
from irongpt.errors import UserError

END = "<|endoftext|>"  # the token between documents, whose id is the last one
MAX_VOCAB = 1 << 16  # ids are stored in 16 bits
Ids = Sequence[int] | torch.Tensor


@dataclass(frozen=True)
class CharTokenizer:
    """One token per character. An id is an index in `chars`: distinct code points, ascending.

    documents: whether the vocabulary has `END` as well, because the text has several documents.
    """

    chars: str
    documents: bool = False

    def __post_init__(self) -> None:
        if not self.chars or list(self.chars) != sorted(set(self.chars)):
            raise UserError(
                "a vocabulary must be distinct characters in ascending order, at least one"
            )
        if any("\ud800" <= char <= "\udfff" for char in self.chars):
            raise UserError("a vocabulary cannot contain half of a surrogate pair")
        if self.vocab_size > MAX_VOCAB:
            raise UserError(
                f"the text has {len(self.chars):,} distinct characters, more than {MAX_VOCAB:,}: "
                "use --tokenizer bpe"
            )

    @classmethod
    def from_text(cls, text: str | Iterable[str], documents: bool = False) -> "CharTokenizer":
        """A vocabulary of all characters of a text, or of its parts. It must not be empty."""
        chars: set[str] = set()
        for part in [text] if isinstance(text, str) else text:
            chars.update(part)
        return cls("".join(sorted(chars)), documents)

    @property
    def vocab_size(self) -> int:
        return len(self.chars) + self.documents

    @property
    def end(self) -> int | None:
        return len(self.chars) if self.documents else None

    @cached_property
    def token_bytes(self) -> list[bytes]:
        return [*(char.encode() for char in self.chars), *[END.encode()] * self.documents]

    def encode(self, text: str) -> torch.Tensor:
        ids = self.ids(text)
        if ids.size and ids.min() < 0:
            unknown = sorted(set(text) - set(self.chars), key=text.index)
            first, others = unknown[0], len(unknown) - 1
            raise UserError(
                f"the character {first!r} (U+{ord(first):04X}) "
                + (f"and {others} other{'s' * (others > 1)} are" if others else "is")
                + f" not among the {len(self.chars)} of the vocabulary: "
                "use only characters of the training text"
            )
        return torch.from_numpy(ids.astype(np.int64))

    def ids(self, text: str) -> np.ndarray:
        """(len(text),) int32: the id of each character, -1 for one outside the vocabulary."""
        return self._id_of[_code_points(text)]

    def decode(self, ids: Ids) -> str:
        return _bytes(self.token_bytes, ids).decode()

    def to_json(self) -> dict[str, Any]:
        vocab = {char: i for i, char in enumerate(self.chars)}
        return _hugging_face(vocab, [], None, {"type": "Fuse"}, self.end)

    @cached_property
    def _id_of(self) -> np.ndarray:  # (0x110000,) the id of each code point, -1 for none
        table = np.full(0x110000, -1, dtype=np.int32)
        table[_code_points(self.chars)] = np.arange(len(self.chars))
        return table


@dataclass(frozen=True)
class BPETokenizer:
    """Byte pair encoding: 256 bytes, then a token for each merge, then `END`.

    Every text has an encoding, and decoding inverts it.
    gpt2: whether the pre-tokens and the order of the 256 bytes are those of GPT-2.
    """

    merges: tuple[bpe.Pair, ...]
    gpt2: bool = False

    def __post_init__(self) -> None:
        if len(set(self.token_bytes)) < self.vocab_size or self.vocab_size > MAX_VOCAB:
            raise UserError(f"tokens must be distinct, and at most {MAX_VOCAB:,}")

    @property
    def vocab_size(self) -> int:
        return 256 + len(self.merges) + 1

    @property
    def end(self) -> int:
        return self.vocab_size - 1

    @cached_property
    def token_bytes(self) -> list[bytes]:
        tokens = bpe.token_bytes(self.merges)
        return [*(b.translate(_GPT2_BYTES if self.gpt2 else None) for b in tokens), END.encode()]

    @cached_property
    def ranks(self) -> dict[bpe.Pair, int]:
        return {pair: i for i, pair in enumerate(self.merges)}

    def encode(self, text: str) -> torch.Tensor:
        known: dict[str, list[int]] = {}
        ids: list[int] = []
        for word in bpe.pre_tokens(text, self.gpt2):
            if word not in known:
                known[word] = self.encode_word(word)
            ids += known[word]
        return torch.tensor(ids, dtype=torch.int64)

    def encode_word(self, word: str) -> list[int]:
        """The ids of a pre-token."""
        try:  # a byte of a shell's argument that is not UTF-8 is a lone surrogate in Python
            data = word.encode(errors="surrogateescape")
        except UnicodeEncodeError:
            raise UserError(f"{word!r} contains half of a surrogate pair") from None
        return bpe.encode_word(data.translate(_GPT2_IDS if self.gpt2 else None), self.ranks)

    def decode(self, ids: Ids) -> str:
        """Bytes that are not UTF-8 become U+FFFD."""
        return _bytes(self.token_bytes, ids).decode(errors="replace")

    def to_json(self) -> dict[str, Any]:
        names = ["".join(map(_BYTE_CHARS.__getitem__, b)) for b in self.token_bytes[:-1]]
        split = {
            "type": "Split",
            "pattern": {"Regex": bpe.PATTERN},
            "behavior": "Isolated",
            "invert": False,
        }
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        }
        ours = {"type": "Sequence", "pretokenizers": [split, byte_level]}
        return _hugging_face(
            {name: i for i, name in enumerate(names)},
            [[names[left], names[right]] for left, right in self.merges],
            {**byte_level, "use_regex": True} if self.gpt2 else ours,
            {**byte_level, "add_prefix_space": True, "use_regex": True},
            self.end,
        )


Tokenizer = CharTokenizer | BPETokenizer


def from_json(value: Any) -> Tokenizer:
    """Inverse of `to_json`. Raises UserError on anything else.

    It also reads the format of IronGPT 0.1: {"kind": "char", "chars": "..."}.
    """
    try:
        if value.keys() == {"kind", "chars"} and value["kind"] == "char":
            return CharTokenizer("" + value["chars"])
        model, documents = value["model"], bool(value["added_tokens"])
        vocab = sorted(model["vocab"], key=model["vocab"].__getitem__)
        names = vocab[:-1] if documents else vocab
        tokenizer: Tokenizer
        if value["pre_tokenizer"] is None:
            tokenizer = CharTokenizer("".join(names), documents)
        else:
            ids, gpt2 = model["vocab"], value["pre_tokenizer"]["type"] == "ByteLevel"
            tokenizer = BPETokenizer(tuple((ids[a], ids[b]) for a, b in model["merges"]), gpt2)
        if tokenizer.to_json() == value:
            return tokenizer
    except (LookupError, TypeError, ValueError, AttributeError):
        pass
    raise UserError("this is not the file of a tokenizer that IronGPT has made")


def stream(tokenizer: Tokenizer, ids: Iterable[int], skip: int = 0) -> Iterator[str]:
    """Yields the text that each id adds, without the first `skip` bytes of the first id.

    A character is yielded once all of its bytes are known. Joined, the texts equal `decode(ids)`.
    Bytes that are not UTF-8 become U+FFFD, at the end also those of an incomplete character.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for i in ids:
        yield decoder.decode(_bytes(tokenizer.token_bytes, [i])[skip:])
        skip = 0
    if rest := decoder.decode(b"", final=True):
        yield rest


def _bytes(tokens: Sequence[bytes], ids: Ids) -> bytes:
    values = ids.tolist() if isinstance(ids, torch.Tensor) else ids
    if any(i < 0 for i in values):  # Python would index from the end
        raise IndexError(f"token id {min(values)} is negative")
    return b"".join([tokens[i] for i in values])


def _code_points(text: str) -> np.ndarray:  # (len(text),)
    # Bytes of a prompt that are not UTF-8 arrive as lone surrogates, which `encode` reports.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


# GPT-2's byte-level vocabularies write each byte as a character that can be shown, and have the
# bytes in the order of these characters.
_SHOWN = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_GPT2_BYTES = bytes((*_SHOWN, *sorted({*range(256)} - {*_SHOWN})))  # the byte of each id
_GPT2_IDS = bytes(map(_GPT2_BYTES.index, range(256)))  # the id of each byte
_BYTE_CHARS = [chr(b if b in _SHOWN else 256 + _GPT2_IDS[b] - len(_SHOWN)) for b in range(256)]


def _hugging_face(
    vocab: Mapping[str, int],
    merges: list[list[str]],
    pre_tokenizer: dict[str, Any] | None,
    decoder: dict[str, Any],
    end: int | None,
) -> dict[str, Any]:
    """tokenizer.json of a BPE model. One without merges has a token for each character."""
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [] if end is None else [{"id": end, "content": END, **flags}],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {**vocab} if end is None else {**vocab, END: end},
            "merges": merges,
        },
    }

"""A corpus as token ids: trains the tokenizer on it, encodes it, and caches the ids of BPE."""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from irongpt.config import check
from irongpt.data import bpe
from irongpt.data.batches import Tokens
from irongpt.data.corpus import Corpus
from irongpt.data.download import cache_folder
from irongpt.data.pre_tokens import CHUNK, PreTokens, pieces
from irongpt.data.text import length
from irongpt.data.tokenizer import MAX_VOCAB, BPETokenizer, CharTokenizer, Tokenizer
from irongpt.errors import UserError
from irongpt.files import temporary_path

MULTIPLE = 64  # BPE vocabularies are rounded up to it, because the head's matmul is then fastest
SMALL, LARGE = 4096, 8192  # default vocabularies of BPE
LARGE_FROM = 30 * 10**6  # bytes of text
CACHED, CACHED_FROM = 8, 10**6  # the most corpora in the cache; the fewest bytes of text in one
ARRAYS = ("train", "val", "before_val")


def check_vocab_size(kind: str, vocab_size: int | None) -> int | None:
    """The size of a BPE vocabulary, rounded up to a multiple of 64. Raises UserError."""
    if vocab_size is None:
        return None
    check(kind == "bpe", "--vocab-size is for --tokenizer bpe: a text determines its characters")
    check(
        257 <= vocab_size <= MAX_VOCAB,
        f"--vocab-size must be from 257 to {MAX_VOCAB:,}, got {vocab_size:,}",
    )
    return vocab_size + -vocab_size % MULTIPLE


def tokenize(corpus: Corpus, kind: str, vocab_size: int | None = None) -> tuple[Tokenizer, Tokens]:
    """Makes a tokenizer for a corpus, and encodes the corpus.

    kind: char, with the characters of the entire text, or bpe, which is trained on the training
    text. vocab_size: that of BPE, by default 4,096, or 8,192 for 30 MB of text or more.
    """
    if kind == "char":
        parts = pieces(corpus.train + corpus.val, marked=False)
        chars = CharTokenizer.from_text(filter(None, parts), documents=bool(corpus.files))
        return chars, encode(corpus, chars)
    size = vocab_size or (SMALL if corpus.n_bytes < LARGE_FROM else LARGE)
    if cached := _Cache(corpus, size).read():
        return cached
    pre_tokens = _pre_tokens(corpus)
    tokenizer = _train_bpe(corpus, size, pre_tokens)
    return tokenizer, _encode_bpe(corpus, tokenizer, pre_tokens)


def encode(corpus: Corpus, tokenizer: Tokenizer) -> Tokens:
    """The ids of a corpus by an existing tokenizer. Raises UserError on an unknown character."""
    if isinstance(tokenizer, CharTokenizer):
        several = max(len(corpus.train), len(corpus.val)) > 1  # one text may have its own --val
        check(
            bool(corpus.files) if tokenizer.documents else not several,
            "the vocabulary was made for a single text and this one has several documents, or the "
            "reverse: start a new run",
        )
        train, val = (_chars(documents, tokenizer) for documents in (corpus.train, corpus.val))
        return _tokens(corpus, tokenizer, train, val)
    cached = _Cache(corpus, tokenizer.vocab_size, tokenizer.gpt2).read()
    if cached and cached[0] == tokenizer:
        return cached[1]
    return _encode_bpe(corpus, tokenizer, _pre_tokens(corpus, tokenizer.gpt2))


def _pre_tokens(corpus: Corpus, gpt2: bool = False) -> PreTokens:
    return PreTokens(corpus.train, corpus.val, bool(corpus.files), gpt2)


def _encode_bpe(corpus: Corpus, tokenizer: BPETokenizer, pre_tokens: PreTokens) -> Tokens:
    ids = chain([[tokenizer.end]], map(tokenizer.encode_word, list(pre_tokens.words)[1:]))
    tokens = _tokens(corpus, tokenizer, *pre_tokens.replace(ids))
    _Cache(corpus, tokenizer.vocab_size, tokenizer.gpt2).write(tokenizer, tokens)
    return tokens


def _train_bpe(corpus: Corpus, size: int, pre_tokens: PreTokens) -> BPETokenizer:
    merges = bpe.train(pre_tokens.counts(), size - 257)
    most = (len(merges) + 257) // MULTIPLE * MULTIPLE
    check(
        len(merges) == size - 257,
        f"the text has {len(merges):,} pairs to merge, and a vocabulary of {size:,} tokens needs "
        f"{size - 257:,}: use a longer text, "
        + (f"or --vocab-size {most}" if most > 257 else "or --tokenizer char"),
    )
    return BPETokenizer(tuple(merges))


def _tokens(corpus: Corpus, tokenizer: Tokenizer, train: np.ndarray, val: np.ndarray) -> Tokens:
    n_bytes = sum(map(len, corpus.val))
    lengths = np.array([len(b) for b in tokenizer.token_bytes])
    if tokenizer.end is not None:
        lengths[tokenizer.end] = 0
    total = sum(int(lengths[part].sum()) for part in np.array_split(val, 1 + len(val) // CHUNK))
    if total != n_bytes:
        raise AssertionError(f"the tokens have {total:,} bytes, and the text has {n_bytes:,}")
    ids, val_ids = torch.from_numpy(train), torch.from_numpy(val)
    before = ids[:0] if corpus.files else ids[-1:].clone()
    return Tokens(ids, val_ids, before, n_bytes)


def _chars(documents: Sequence[bytes], tokenizer: CharTokenizer) -> np.ndarray:
    """The ids of the documents, uint16, each after `tokenizer.end` if there are several."""
    size = sum(length(utf8) + tokenizer.documents for utf8 in documents)
    ids, at = np.empty(size, dtype=np.uint16), 0
    for piece in pieces(documents, tokenizer.documents):
        some = tokenizer.ids(piece) if piece else np.array([tokenizer.end])
        if some.min() < 0:
            tokenizer.encode(piece)  # raises UserError
        ids[at : at + len(some)] = some
        at += len(some)
    return ids


class _Cache:
    """A file in the cache folder: the tokenizer and the ids of a corpus at a vocabulary size."""

    def __init__(self, corpus: Corpus, vocab_size: int, gpt2: bool = False) -> None:
        self.worthwhile, self.gpt2 = corpus.n_bytes >= CACHED_FROM, gpt2
        kind = " gpt2" * gpt2
        key = hashlib.sha256(f"3 {corpus.sha256} {vocab_size}{kind}".encode()).hexdigest()
        try:
            self.path = cache_folder() / "tokens" / f"{key[:32]}.npz"
        except UserError:  # no home folder
            self.path, self.worthwhile = Path(os.devnull) / key, False

    def read(self) -> tuple[BPETokenizer, Tokens] | None:
        """None if there is no such file, or if it is damaged."""
        try:
            with np.load(self.path) as file:
                metadata = json.loads(str(file["metadata"]))
                arrays = {name: file[name] for name in ARRAYS}
            tokenizer = BPETokenizer(tuple((a, b) for a, b in metadata["merges"]), self.gpt2)
            ids = {name: torch.from_numpy(array) for name, array in arrays.items()}
            return tokenizer, Tokens(**ids, val_bytes=metadata["val_bytes"])
        except Exception:  # a damaged file: each part of an npz has a checksum
            return None

    def write(self, tokenizer: BPETokenizer, tokens: Tokens) -> None:
        """A folder that cannot be written to is no error. Only the newest files are kept."""
        if not self.worthwhile:
            return
        arrays = {name: getattr(tokens, name).numpy() for name in ARRAYS}
        metadata = {"merges": tokenizer.merges, "val_bytes": tokens.val_bytes}
        temporary = temporary_path(self.path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                np.savez(file, metadata=json.dumps(metadata), **arrays)
            os.replace(temporary, self.path)
            files = self.path.parent.glob("*.npz")
            for old in sorted(files, key=lambda f: f.stat().st_mtime)[:-CACHED]:
                old.unlink()
        except OSError:
            pass
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

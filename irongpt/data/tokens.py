"""A corpus as token ids: trains the tokenizer on it, encodes it, and caches the ids of BPE."""

import contextlib
import hashlib
import json
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
from irongpt.data.pre_tokens import PreTokens, pieces
from irongpt.data.text import length
from irongpt.data.tokenizer import MAX_VOCAB, BPETokenizer, CharTokenizer, Tokenizer
from irongpt.errors import UserError
from irongpt.files import replacing

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
    return _by_bpe(corpus, size)


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
        return _tokens(corpus, train, val)
    return _by_bpe(corpus, tokenizer.vocab_size, tokenizer)[1]


def _by_bpe(
    corpus: Corpus, vocab_size: int, tokenizer: BPETokenizer | None = None
) -> tuple[BPETokenizer, Tokens]:
    """The ids of a corpus, from the cache if they are there. tokenizer: None trains one."""
    gpt2 = tokenizer is not None and tokenizer.gpt2
    file = _cache_file(corpus, vocab_size, gpt2)
    cached = _read(file, gpt2)
    if cached and tokenizer in (None, cached[0]):
        return cached
    pre_tokens = PreTokens(corpus.train, corpus.val, bool(corpus.files), gpt2)
    tokenizer = tokenizer or _train_bpe(vocab_size, pre_tokens)
    ids = chain([[tokenizer.end]], map(tokenizer.encode_word, list(pre_tokens.words)[1:]))
    tokens = _tokens(corpus, *pre_tokens.replace(ids))
    _write(file, tokenizer, tokens)
    return tokenizer, tokens


def _train_bpe(size: int, pre_tokens: PreTokens) -> BPETokenizer:
    merges = bpe.train(pre_tokens.counts(), size - 257)
    most = (len(merges) + 257) // MULTIPLE * MULTIPLE
    check(
        len(merges) == size - 257,
        f"the text has {len(merges):,} pairs to merge, and a vocabulary of {size:,} tokens needs "
        f"{size - 257:,}: use a longer text, "
        + (f"or --vocab-size {most}" if most > 257 else "or --tokenizer char"),
    )
    return BPETokenizer(tuple(merges))


def _tokens(corpus: Corpus, train: np.ndarray, val: np.ndarray) -> Tokens:
    ids, val_ids = torch.from_numpy(train), torch.from_numpy(val)
    before = ids[:0] if corpus.files else ids[-1:].clone()
    return Tokens(ids, val_ids, before, sum(map(len, corpus.val)))


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


def _cache_file(corpus: Corpus, vocab_size: int, gpt2: bool) -> Path | None:
    """The file with the tokenizer and the ids of a corpus. A small text is not cached."""
    if corpus.n_bytes < CACHED_FROM:
        return None
    kind = " gpt2" * gpt2
    key = hashlib.sha256(f"3 {corpus.sha256} {vocab_size}{kind}".encode()).hexdigest()
    try:
        return cache_folder() / "tokens" / f"{key[:32]}.npz"
    except UserError:  # no home folder
        return None


def _read(path: Path | None, gpt2: bool) -> tuple[BPETokenizer, Tokens] | None:
    """What `_write` stored. None if there is no such file, or if it is damaged."""
    if path is None:
        return None
    try:
        with np.load(path) as file:
            metadata = json.loads(str(file["metadata"]))
            arrays = {name: torch.from_numpy(file[name]) for name in ARRAYS}
        tokenizer = BPETokenizer(tuple((a, b) for a, b in metadata["merges"]), gpt2)
        return tokenizer, Tokens(**arrays, val_bytes=metadata["val_bytes"])
    except Exception:  # a damaged file: each part of an npz has a checksum
        return None


def _write(path: Path | None, tokenizer: BPETokenizer, tokens: Tokens) -> None:
    """A folder that cannot be written to is no error. Only the newest files are kept."""
    if path is None:
        return
    arrays = {name: getattr(tokens, name).numpy() for name in ARRAYS}
    metadata = {"merges": tokenizer.merges, "val_bytes": tokens.val_bytes}
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, metadata=json.dumps(metadata), **arrays)
        files = path.parent.glob("*.npz")
        for old in sorted(files, key=lambda f: f.stat().st_mtime)[:-CACHED]:
            old.unlink()

"""A corpus as indices into its distinct pre-tokens, for BPE: each text is split only once.

Merges are trained on the counts of the pre-tokens. Afterwards each index is replaced by the ids of
its pre-token. Splitting a text takes most of the time, so it runs on all cores. The worker
processes import this file, so it must not import torch.

A text of code has a pre-token for every three or four bytes. An index has 16 bits: it refers to the
distinct pre-tokens of one part of the text. The token ids overwrite the indices in place.
"""

import codecs
import os
import signal
import threading
from array import array
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from typing import NamedTuple

import numpy as np
import regex

from irongpt.data import bpe

CHUNK = 1 << 20  # bytes that a process splits at a time
PARALLEL_FROM = 8 * CHUNK  # for less text it takes longer to start the processes
TAIL = 1 << 12  # characters at the end of a chunk among which a place to cut is looked for first
MOST_WORDS = 1 << 18  # distinct pre-tokens, the most frequent ones, that merges are trained on
MOST_INDICES = 1 << 16  # distinct pre-tokens of a part
END = 0  # the index of "", which precedes each document


class Group(NamedTuple):
    """Adjacent pieces of the training or of the validation text, of `n_bytes` in all."""

    val: bool
    gpt2: bool  # whether the pre-tokens are those of GPT-2
    pieces: list[str]
    n_bytes: int


Indexed = tuple[list[str], np.ndarray]  # distinct pre-tokens, and (N,) uint16 indices into them


class Part(NamedTuple):
    """Pre-tokens `first` to `end` of a corpus. Their entries in `PreTokens.buffer` are indices into
    `numbers`, (M,) uint32, whose values are indices into `PreTokens.words`."""

    numbers: np.ndarray
    first: int
    end: int


# Places where a pre-token always ends: no alternative of the pattern continues after a digit, from
# a letter to a non-letter, or from a line break to anything other than white space.
_SAFE_CUT = regex.compile(r"\n(?=\S)|\p{N}|\p{L}(?=\P{L})")
# GPT-2's pattern needs a character before the line break too.
_SAFE_CUT_GPT2 = regex.compile(r"(?<=\S)\n(?=\S)")


def pieces(documents: Sequence[bytes], marked: bool, gpt2: bool = False) -> Iterator[str]:
    """The documents in pieces of about CHUNK bytes. "" comes before each one if `marked`."""
    safe_cut = _SAFE_CUT_GPT2 if gpt2 else _SAFE_CUT
    for utf8 in documents:
        if marked:
            yield ""
        decoder = codecs.getincrementaldecoder("utf-8")()
        held: list[str] = []  # the text since the last cut
        for first in range(0, len(utf8), CHUNK):
            text = decoder.decode(utf8[first : first + CHUNK])
            near_end = max(0, len(text) - TAIL)
            if cut := safe_cut.search(text, near_end) or safe_cut.search(text):
                yield "".join([*held, text[: cut.end()]])
                held, text = [], text[cut.end() :]
            held.append(text)
        if rest := "".join(held):
            yield rest


class PreTokens:
    """The training and the validation text of a corpus. words: the distinct pre-tokens.

    train, val: parts of about a megabyte of text, whose indices are in `buffer`.
    """

    def __init__(
        self, train: Sequence[bytes], val: Sequence[bytes], marked: bool, gpt2: bool = False
    ) -> None:
        """train, val: documents. marked: whether END precedes each one. gpt2: see `bpe`."""
        from tqdm import tqdm

        self.words = _Numbers({"": END})
        self.train: list[Part] = []
        self.val: list[Part] = []
        n_bytes, end = sum(map(len, (*train, *val))), 0
        # Room for an id for every byte; the system gives memory only to what is written.
        self.buffer = np.empty(n_bytes + (len(train) + len(val)) * marked, dtype=np.uint16)
        groups = chain(_groups(False, train, marked, gpt2), _groups(True, val, marked, gpt2))
        bar = tqdm(total=n_bytes, desc="tokenizing", unit="B", unit_scale=True, disable=None)
        with bar, closing(_index_all(groups, _cores(n_bytes))) as indexed:
            for group, parts in indexed:
                for words, indices in parts:
                    numbers = np.fromiter(map(self.words.__getitem__, words), dtype=np.uint32)
                    first, end = end, end + len(indices)
                    self.buffer[first:end] = indices
                    (self.val if group.val else self.train).append(Part(numbers, first, end))
                bar.update(group.n_bytes)

    def indices(self, part: Part) -> np.ndarray:
        """(N,) uint32 indices of a part into `words`."""
        return part.numbers[self.buffer[part.first : part.end]]

    def counts(self) -> dict[bytes, int]:
        """How often the most frequent pre-tokens occur in the training text."""
        counts = np.zeros(len(self.words), dtype=np.int64)
        for numbers, first, end in self.train:
            counts[numbers] += np.bincount(self.buffer[first:end], minlength=len(numbers))
        counts[END] = 0
        words = list(self.words)
        frequent = np.argsort(-counts, kind="stable")[:MOST_WORDS]
        return {words[i].encode(): int(counts[i]) for i in frequent if counts[i]}

    def replace(self, ids: Iterable[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Training and validation text with each index replaced by the ids of its word: uint16.

        ids: of each word, in order. They overwrite the indices, from the end to the start. A word
        has at least one id, so they never reach an index that is still needed.
        """
        flat, lengths = array("H"), array("I")
        for one in ids:
            flat.extend(one)
            lengths.append(len(one))
        sizes = np.array(lengths, dtype=np.int64)
        starts, table = np.cumsum(sizes) - sizes, np.array(flat, dtype=np.uint16)

        parts, n_train = self.train + self.val, len(self.train)
        ends = np.cumsum([int(sizes[self.indices(part)].sum()) for part in parts], dtype=np.int64)
        self.train, self.val = [], []
        for i in reversed(range(len(parts))):
            indices = self.indices(parts.pop())
            n = sizes[indices]
            first = np.cumsum(n) - n  # positions of the first id of each pre-token
            replaced = table[np.arange(n.sum()) + np.repeat(starts[indices] - first, n)]
            self.buffer[ends[i] - len(replaced) : ends[i]] = replaced
        cut, end = (int(ends[n - 1]) if n else 0 for n in (n_train, len(ends)))
        return self.buffer[:cut], self.buffer[cut:end]


class _Numbers(dict[str, int]):
    """Numbers strings in the order in which they are first asked for."""

    def __missing__(self, word: str) -> int:
        self[word] = number = len(self)
        return number


def _groups(val: bool, documents: Sequence[bytes], marked: bool, gpt2: bool) -> Iterator[Group]:
    """Pieces in groups of at least CHUNK bytes, except the last."""
    group: list[str] = []
    size = 0
    for piece in pieces(documents, marked, gpt2):
        group.append(piece)
        size += len(piece.encode())
        if size >= CHUNK:
            yield Group(val, gpt2, group, size)
            group, size = [], 0
    if group:
        yield Group(val, gpt2, group, size)


def _index(group: Group) -> list[Indexed]:
    """A group in parts of at most MOST_INDICES distinct pre-tokens."""
    numbers = _Numbers({"": END})
    found = chain.from_iterable(bpe.pre_tokens(p, group.gpt2) or [""] for p in group.pieces)
    indices = np.fromiter(map(numbers.__getitem__, found), dtype=np.uint32)
    words = list(numbers)
    if len(words) <= MOST_INDICES:
        return [(words, indices.astype(np.uint16))]
    parts = []
    for first in range(0, len(indices), MOST_INDICES):
        own, part = np.unique(indices[first : first + MOST_INDICES], return_inverse=True)
        parts.append(([words[i] for i in own], part.astype(np.uint16)))
    return parts


def _cores(n_bytes: int) -> int:
    """The number of processes for a text."""
    if n_bytes < PARALLEL_FROM:
        return 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _begin() -> None:
    """Lets a worker process ignore Ctrl-C, which is for its parent, and end with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _index_all(groups: Iterator[Group], cores: int) -> Generator[tuple[Group, list[Indexed]]]:
    """Each group with its `_index`, in order. They are sent to the processes a few at a time."""
    try:
        pool = ProcessPoolExecutor(cores, get_context("spawn"), _begin) if cores > 1 else None
    except (OSError, ImportError, NotImplementedError):  # no semaphores, for one without /dev/shm
        pool = None
    sent: deque[Group] = deque()
    futures: deque[Future[list[Indexed]]] = deque()
    try:
        while pool:
            for group in islice(groups, 2 * cores + 1 - len(sent)):
                sent.append(group)
                futures.append(pool.submit(_index, group))
            if not sent:
                return
            parts = futures.popleft().result()
            yield sent.popleft(), parts
    except BrokenProcessPool:  # a process was killed; this one can do without
        pass
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    yield from ((group, _index(group)) for group in chain(sent, groups))

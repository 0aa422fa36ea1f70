"""A corpus as indices into its distinct pre-tokens, for BPE: each text is cut up only once.

The counts of the pre-tokens are what merges are trained on, and afterwards each index is replaced
by the ids of its pre-token. Cutting up a text takes most of the time, so that all cores do it.
The processes import this file, which therefore does without torch.
"""

import os
import signal
import threading
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from multiprocessing import get_context, parent_process
from typing import NamedTuple

import numpy as np
import regex

from irongpt.data import bpe

CHUNK = 1 << 20  # characters that a process cuts up at a time
PARALLEL_FROM = 8 * CHUNK  # for less text it takes longer to start the processes
MOST_WORDS = 1 << 18  # distinct pre-tokens, the most frequent ones, that merges are trained on
END = 0  # the index that precedes each document

Piece = str | None  # None: a document begins


class Group(NamedTuple):
    """Adjacent pieces of the training or of the validation text."""

    val: bool
    gpt2: bool  # whether the pre-tokens are those of GPT-2
    pieces: list[Piece]


class Indexed(NamedTuple):
    """A group as (N,) uint32 indices into its own distinct pre-tokens."""

    val: bool
    n_chars: int
    words: list[str]
    indices: np.ndarray


# In any text a pre-token ends here: no alternative of its pattern goes on after a digit, or from a
# letter to anything else, or after a line break to anything but white space.
_SAFE_CUT = regex.compile(r"\n(?=\S)|\p{N}|\p{L}(?=\P{L})")
# GPT-2's pattern needs a character before the line break too.
_SAFE_CUT_GPT2 = regex.compile(r"(?<=\S)\n(?=\S)")


def pieces(documents: Sequence[str], marked: bool, gpt2: bool = False) -> Iterator[Piece]:
    """The documents in pieces of about CHUNK characters. None comes before each one if `marked`."""
    safe_cut = _SAFE_CUT_GPT2 if gpt2 else _SAFE_CUT
    for text in documents:
        if marked:
            yield None
        at = 0
        while at < len(text):
            cut = safe_cut.search(text, min(at + CHUNK, len(text)))
            end = cut.end() if cut else len(text)
            yield text[at:end]
            at = end


class PreTokens:
    """The training and the validation text of a corpus. words: the distinct pre-tokens.

    train, val: arrays of uint32 indices into `words`, one for about a megabyte of text.
    """

    def __init__(
        self, train: Sequence[str], val: Sequence[str], marked: bool, gpt2: bool = False
    ) -> None:
        """train, val: documents. marked: whether END precedes each one. gpt2: see `bpe`."""
        from tqdm import tqdm

        self.words = _Numbers({"": END})
        self.train: list[np.ndarray] = []
        self.val: list[np.ndarray] = []
        n_chars = sum(map(len, (*train, *val)))
        groups = chain.from_iterable(
            _groups(is_val, gpt2, pieces(documents, marked, gpt2))
            for is_val, documents in ((False, train), (True, val))
        )
        bar = tqdm(total=n_chars, desc="tokenizing", unit="char", unit_scale=True, disable=None)
        with bar:
            for found in _index_all(groups, _cores(n_chars)):
                numbers = np.fromiter(map(self.words.__getitem__, found.words), dtype=np.uint32)
                (self.val if found.val else self.train).append(numbers[found.indices])
                bar.update(found.n_chars)

    def counts(self) -> dict[bytes, int]:
        """How often the most frequent pre-tokens occur in the training text."""
        counts = np.zeros(len(self.words), dtype=np.int64)
        for indices in self.train:
            counts += np.bincount(indices, minlength=len(counts))
        counts[END] = 0
        words = list(self.words)
        frequent = np.argsort(-counts, kind="stable")[:MOST_WORDS]
        return {words[i].encode(): int(counts[i]) for i in frequent if counts[i]}

    def replace(self, ids: Iterable[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Training and validation text with each index replaced by the ids of its word: uint16.

        ids: of the words, in order. The arrays of indices are released on the way.
        """
        flat, lengths = array("H"), array("I")
        for one in ids:
            flat.extend(one)
            lengths.append(len(one))
        sizes = np.array(lengths, dtype=np.int64)
        starts, table = np.cumsum(sizes) - sizes, np.array(flat, dtype=np.uint16)
        found = []
        for chunks in (self.train, self.val):
            chunks.reverse()
            parts = [np.zeros(0, dtype=np.uint16)]
            while chunks:
                indices = chunks.pop()
                n = sizes[indices]
                first = np.cumsum(n) - n  # positions of the first id of each pre-token
                parts.append(table[np.arange(n.sum()) + np.repeat(starts[indices] - first, n)])
            found.append(np.concatenate(parts))
        return found[0], found[1]


class _Numbers(dict[str, int]):
    """Numbers strings in the order in which they are first asked for."""

    def __missing__(self, word: str) -> int:
        self[word] = number = len(self)
        return number


def _groups(val: bool, gpt2: bool, pieces: Iterable[Piece]) -> Iterator[Group]:
    """Pieces in groups of at least CHUNK characters, except the last."""
    group = Group(val, gpt2, [])
    size = 0
    for piece in pieces:
        group.pieces.append(piece)
        size += len(piece or "")
        if size >= CHUNK:
            yield group
            group, size = Group(val, gpt2, []), 0
    if group.pieces:
        yield group


def _index(group: Group) -> Indexed:
    numbers = _Numbers({"": END})
    parts = [
        np.fromiter(map(numbers.__getitem__, bpe.pre_tokens(piece, group.gpt2)), dtype=np.uint32)
        if piece is not None
        else np.array([END], dtype=np.uint32)
        for piece in group.pieces
    ]
    n_chars = sum(len(piece or "") for piece in group.pieces)
    return Indexed(group.val, n_chars, list(numbers), np.concatenate(parts))


def _cores(n_chars: int) -> int:
    """The number of processes for a text."""
    if n_chars < PARALLEL_FROM:
        return 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _begin() -> None:
    """In a process of the pool: ignores Ctrl-C, which is for its parent, and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _index_all(groups: Iterable[Group], cores: int) -> Iterator[Indexed]:
    """`_index` of all groups, in order. They are sent to the processes a few at a time."""
    if cores == 1:
        yield from map(_index, groups)
        return
    try:
        pool = ProcessPoolExecutor(cores, get_context("spawn"), _begin)
    except (OSError, ImportError, NotImplementedError):  # no semaphores, for one without /dev/shm
        yield from map(_index, groups)
        return
    with pool:
        sent: deque[Group] = deque()
        futures: deque[Future[Indexed]] = deque()
        groups = iter(groups)
        try:
            for group in groups:
                sent.append(group)
                futures.append(pool.submit(_index, group))
                if len(sent) > 2 * cores:
                    found = futures.popleft().result()
                    sent.popleft()
                    yield found
            while futures:
                found = futures.popleft().result()
                sent.popleft()
                yield found
        except BrokenProcessPool:  # a process was killed; this one can do without
            yield from map(_index, (*sent, *groups))

"""Byte pair encoding (BPE) on bytes: how a text becomes tokens that are longer than a character.

A regular expression first cuts the text into pre-tokens, about a word each, and no token crosses
their borders. Training starts with one token for each of the 256 bytes. Again and again it takes
the pair of adjacent tokens that is most frequent in the text and makes it a new token. The list
of these merges, in order, is the vocabulary.

An example by hand: the text "low low lower lowest" has the pre-tokens "low", " low", " lower" and
" lowest", once each. Every pair inside of them and how often it occurs:

    l o: 4   o w: 4   " " l: 3   w e: 2   e r: 1   e s: 1   s t: 1

Each merge takes the most frequent pair, or of equally frequent ones that with the lower ids ("l" is
byte 108, "o" is 111):

    256 = "l" "o"          l o and o w occur 4 times each
    257 = "lo" "w"         lo w occurs 4 times
    258 = " " "low"        3 times
    259 = " low" "e"       2 times
    260 = "s" "t"          once, as do " lowe" r and " lowe" s, whose ids are higher

To encode " lower", the merges are applied in the same order, which gives 259 and "r".

Sources: Gage 1994 (the algorithm), Sennrich et al. 2016 (words from merges), Radford et al. 2019
(on bytes, so that every text has an encoding). The pre-tokens are those of Qwen2.
"""

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise

import regex

# A contraction; a word with the space, bracket or dot before it; one digit; punctuation; line
# breaks; spaces, all but the last of those before a word.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The same on ASCII text, where the standard library can express it, which is faster.
ASCII_PATTERN = (
    r"'(?:[stmd]|re|ve|ll|[STMD]|RE|Re|rE|VE|Ve|vE|LL|Ll|lL)|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]"
    r"| ?[^ \t\n\v\f\rA-Za-z0-9]+[\r\n]*|[ \t\n\v\f\r]*[\r\n]+"
    r"|[ \t\n\v\f\r]+(?![^ \t\n\v\f\r])|[ \t\n\v\f\r]+"
)
# GPT-2's pattern: numbers are not cut into digits, and line breaks are white space like any other.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_find_gpt2 = regex.compile(GPT2_PATTERN).findall
_find, _find_ascii = regex.compile(PATTERN).findall, re.compile(ASCII_PATTERN).findall
LONGEST = 4096  # bytes of a pre-token that is trained on as a whole; longer ones are split

Pair = tuple[int, int]


def pre_tokens(text: str, gpt2: bool = False) -> list[str]:
    """The pre-tokens of a text, in order, or those of GPT-2. Joined they are the text again."""
    if gpt2:
        return _find_gpt2(text)
    return _find_ascii(text) if text.isascii() else _find(text)


def train(counts: Mapping[bytes, int], n_merges: int) -> list[Pair]:
    """The merges of a text. Merge number i makes token 256 + i out of a pair of earlier tokens.

    counts: how often each pre-token occurs. Of pairs that are equally frequent the one with the
    lower ids is merged first, so that the result does not depend on the order of `counts`. There
    are fewer than `n_merges` if no pair is left.
    """
    pieces: Counter[bytes] = Counter()
    for word, n in counts.items():
        for at in range(0, len(word), LONGEST):
            pieces[word[at : at + LONGEST]] += n
    words = [list(piece) for piece in pieces]
    frequencies = list(pieces.values())
    pairs: Counter[Pair] = Counter()
    found_in: defaultdict[Pair, list[int]] = defaultdict(list)  # indices of words, some out of date
    for i, ids in enumerate(words):
        for pair in pairwise(ids):
            pairs[pair] += frequencies[i]
        for pair in set(pairwise(ids)):
            found_in[pair].append(i)
    # After a pair was pushed, its count only decreases. The entry is updated when it reaches the
    # top of the heap.
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    merges: list[Pair] = []
    while heap and len(merges) < n_merges:
        n, pair = heapq.heappop(heap)
        if -n != pairs[pair]:
            if pairs[pair] > 0:
                heapq.heappush(heap, (-pairs[pair], pair))
            continue
        token = 256 + len(merges)
        merges.append(pair)
        created: set[Pair] = set()
        for i in found_in.pop(pair):
            changes = _merge(words[i], pair, token)
            for neighbour, change in changes:
                pairs[neighbour] += change * frequencies[i]
            new = {neighbour for neighbour, change in changes if change > 0}
            for neighbour in new:
                found_in[neighbour].append(i)
            created |= new
        del pairs[pair]
        for neighbour in created:
            if pairs[neighbour] > 0:
                heapq.heappush(heap, (-pairs[neighbour], neighbour))
    return merges


def _merge(word: list[int], pair: Pair, token: int) -> list[tuple[Pair, int]]:
    """Replaces a pair by `token` wherever it occurs, in place. Returns the pairs that appeared (+1)
    and disappeared (-1), without the pair itself."""
    left, right = pair
    changes = []
    at = 0
    while at < len(word) - 1:
        if word[at] == left and word[at + 1] == right:
            if at > 0:
                changes += [((word[at - 1], left), -1), ((word[at - 1], token), 1)]
            if at + 2 < len(word):
                changes += [((right, word[at + 2]), -1), ((token, word[at + 2]), 1)]
            word[at : at + 2] = [token]
        at += 1
    return changes


def encode_word(word: bytes, ranks: Mapping[Pair, int]) -> list[int]:
    """The tokens of a pre-token. ranks: the number of each merge; lower ones are applied first.

    The tokens are a linked list and the possible merges are on a heap, so that a pre-token of n
    bytes takes O(n log n) even if it is megabytes long.
    """
    n = len(word)
    tokens = list(word)  # -1 where a token was merged into the one before it
    after, before = list(range(1, n + 1)), list(range(-1, n - 1))
    heap = [(ranks[pair], i) for i, pair in enumerate(pairwise(word)) if pair in ranks]
    heapq.heapify(heap)
    while heap:
        rank, i = heapq.heappop(heap)
        j = after[i]
        if j == n or ranks.get((tokens[i], tokens[j])) != rank:
            continue  # a token of this pair has been merged with another one
        tokens[i], tokens[j] = 256 + rank, -1
        after[i] = j = after[j]
        if j < n:
            before[j] = i
        for left, right in ((before[i], i), (i, j)):
            if left >= 0 and right < n:
                pair = tokens[left], tokens[right]
                if pair in ranks:
                    heapq.heappush(heap, (ranks[pair], left))
    return [token for token in tokens if token >= 0]


def token_bytes(merges: Iterable[Pair]) -> list[bytes]:
    """The bytes that each token stands for."""
    tokens = [bytes([i]) for i in range(256)]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    return tokens

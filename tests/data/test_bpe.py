"""BPE against other implementations: rustbpe trains, tokenizers and tiktoken encode."""

import json
import random
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import regex
import rustbpe
import tiktoken
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from irongpt.data import bpe, corpus
from irongpt.data.tokenizer import END, BPETokenizer, stream

CODE = Path(json.__file__).parent.joinpath("decoder.py").read_text()
V = 4096


@cache
def war_and_peace() -> str:
    return corpus.load("war-and-peace", say=print).text


def counts(text: str) -> dict[bytes, int]:
    return {word.encode(): n for word, n in Counter(bpe.pre_tokens(text)).items()}


@cache
def tokenizer(name: str) -> BPETokenizer:
    text, size = {"book": (war_and_peace(), V), "code": (CODE, 512)}[name]
    return BPETokenizer(tuple(bpe.train(counts(text), size - 257)))


def rustbpe_tokens(text: str, size: int) -> list[bytes]:
    other = rustbpe.Tokenizer()
    other.train_from_iterator(iter([text]), size, pattern=bpe.PATTERN)
    return [bytes(b) for b, _ in sorted(other.get_mergeable_ranks(), key=lambda item: item[1])]


def test_the_example_of_the_docstring() -> None:
    words = ["low", " low", " lower", " lowest"]
    assert bpe.pre_tokens("low low lower lowest") == words
    merges = bpe.train({word.encode(): 1 for word in words}, 5)
    assert bpe.token_bytes(merges)[256:] == [b"lo", b"low", b" low", b" lowe", b"st"]
    ranks = {pair: i for i, pair in enumerate(merges)}
    assert bpe.encode_word(b" lower", ranks) == [259, ord("r")]


@pytest.mark.parametrize("name", ["book", "code"])
def test_vocabulary_equals_rustbpe(name: str) -> None:
    own = tokenizer(name)
    text = {"book": war_and_peace, "code": lambda: CODE}[name]()
    assert own.token_bytes[:-1] == rustbpe_tokens(text, own.vocab_size - 1)


@given(st.text("ab \n", max_size=60), st.integers(1, 40))
def test_vocabulary_equals_rustbpe_on_any_text(text: str, n: int) -> None:
    """Runs of one letter make pairs that overlap."""
    merges = bpe.train(counts(text), n)
    assert bpe.token_bytes(merges) == rustbpe_tokens(text, 256 + n)


def test_order_of_the_counts_does_not_matter() -> None:
    words = list(counts(CODE).items())
    random.Random(0).shuffle(words)
    assert bpe.train(dict(words), 200) == bpe.train(counts(CODE), 200)


def reference(word: bytes, merges: list[bpe.Pair]) -> list[int]:
    """The definition: each merge in order, at every place from the left."""
    ids = list(word)
    for token, pair in enumerate(merges, 256):
        at = 0
        while at < len(ids) - 1:
            if (ids[at], ids[at + 1]) == pair:
                ids[at : at + 2] = [token]
            at += 1
    return ids


@given(st.binary(max_size=40), st.lists(st.binary(min_size=1, max_size=12), min_size=1))
def test_encode_word_applies_the_merges_in_order(word: bytes, words: list[bytes]) -> None:
    merges = bpe.train(Counter(words), 50)
    ranks = {pair: i for i, pair in enumerate(merges)}
    for one in (word, *words, b"".join(words)):
        assert bpe.encode_word(one, ranks) == reference(one, merges)


def test_a_long_pre_token_is_encoded_in_time() -> None:
    """It has no border; an algorithm that takes the square of its size would take hours."""
    own = tokenizer("code")
    text = "".join(random.Random(0).choices("abcdefghijkst", k=300_000))
    ids = own.encode(text)
    assert own.decode(ids) == text
    assert len(bpe.train(counts(text), 50)) == 50


@given(st.text(st.characters(codec="ascii"), max_size=30))
def test_pre_tokens_of_ascii_text_are_those_of_the_general_pattern(text: str) -> None:
    assert bpe.pre_tokens(text) == regex.findall(bpe.PATTERN, text)
    quotes = text.replace("0", "'re'LL'Ve'S ").replace("1", " \x1c\v")
    assert bpe.pre_tokens(quotes) == regex.findall(bpe.PATTERN, quotes)


ALPHABET = [
    *"aàeé thin'’s\n\r\t  ()_=:.,-01234\"#", "\u0300", "漢", "字", "😀", "\u200d", "\ufeff",
    "\u2028", "\x00", "\x85", "ſ", "İ", "ß", "\xa0", "\u3000", END, "the ", " self", "'LL", "'ve",
]  # fmt: skip


def adversarial(n: int) -> list[str]:
    rng = random.Random(0)

    def char() -> str:
        if rng.random() < 0.9:
            return rng.choice(ALPHABET)
        return chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))

    return ["".join(char() for _ in range(rng.randrange(40))) for _ in range(n)]


@pytest.mark.parametrize("name", ["book", "code"])
def test_ids_equal_those_of_tokenizers_and_tiktoken(name: str) -> None:
    own = tokenizer(name)
    hugging_face = tokenizers.Tokenizer.from_str(json.dumps(own.to_json()))
    hugging_face.encode_special_tokens = True  # as text, not as END
    ranks = {token: i for i, token in enumerate(own.token_bytes[:-1])}
    openai = tiktoken.Encoding("own", pat_str=bpe.PATTERN, mergeable_ranks=ranks, special_tokens={})
    texts = {"book": [war_and_peace()[:1_000_000]], "code": [CODE, *adversarial(8_000)]}[name]
    for text in texts:
        ids = own.encode(text).tolist()
        assert ids == openai.encode_ordinary(text)
        assert ids == hugging_face.encode(text).ids
        assert own.end not in ids
        assert own.decode(ids) == "".join(stream(own, ids)) == text


def test_tokenizers_reads_the_end_of_a_document() -> None:
    own = tokenizer("code")
    other = tokenizers.Tokenizer.from_str(json.dumps(own.to_json()))
    assert other.get_vocab_size() == own.vocab_size == 512
    assert other.encode(f"a{END}b").ids == [ord("a"), own.end, ord("b")]
    assert other.decode([ord("a"), own.end], skip_special_tokens=False) == f"a{END}"


def test_pre_tokens_are_those_of_qwen2() -> None:
    found = bpe.pre_tokens("def f(self, x=10):\n    return 'a\\n'\n\nThey'LL  go…")
    words = "def| f|(self|,| x|=|1|0|):\n|   | return| '|a|\\n|'\n\n|They|'LL| | go|…"
    assert found == words.split("|")
    assert all("".join(bpe.pre_tokens(text)) == text for text in adversarial(500))

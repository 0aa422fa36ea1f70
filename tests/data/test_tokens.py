"""A corpus as ids: char and BPE, one text and documents, in one process and in several, cached."""

import os
import random
from functools import partial
from itertools import chain

import numpy as np
import pytest
import torch

from irongpt.data import bpe, pre_tokens, tokens
from irongpt.data.corpus import Corpus
from irongpt.data.pre_tokens import PreTokens, pieces
from irongpt.data.tokenizer import BPETokenizer
from irongpt.data.tokens import check_vocab_size, encode, tokenize
from irongpt.errors import UserError

RNG = random.Random(0)
WORDS = ["".join(RNG.choices("abcdeé漢", k=RNG.randrange(1, 9))) for _ in range(300)]
TEXT = "".join(
    RNG.choice(WORDS) + RNG.choice([" ", " ", "\n", "(", ":\n    "]) for _ in range(2500)
)
A, B, C = (part.encode() for part in (TEXT[:4000], TEXT[4000:9000], TEXT[9000:]))
ONE = Corpus("one", (A + B,), (C,))
MANY = Corpus("many", (A, b"", B), (C, b"x"), {"a": "1", "b": "2"})


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IRONGPT_DATA", str(tmp_path))


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_ids_of_one_text_decode_to_its_two_parts(tmp_path, kind):
    tokenizer, ids = tokenize(ONE, kind, 320 if kind == "bpe" else None)
    assert ids.train.dtype == ids.val.dtype == torch.uint16
    assert tokenizer.decode(ids.train).encode() == ONE.train[0]
    assert tokenizer.decode(ids.val).encode() == ONE.val[0]
    assert torch.equal(ids.before_val, ids.train[-1:])
    assert ids.val_bytes == len(ONE.val[0])
    assert not (tmp_path / "tokens").exists()  # the text is too small for the cache


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_end_precedes_each_document(kind):
    tokenizer, ids = tokenize(MANY, kind, 320 if kind == "bpe" else None)
    end = tokenizer.end
    assert end == tokenizer.vocab_size - 1
    for part, documents in ((ids.train, MANY.train), (ids.val, MANY.val)):
        values = part.tolist()
        starts = [i for i, value in enumerate(values) if value == end]
        assert starts[0] == 0
        bounds = zip(starts, [*starts[1:], len(values)], strict=True)
        assert [tokenizer.decode(values[a + 1 : b]).encode() for a, b in bounds] == [*documents]
    assert len(ids.before_val) == 0
    assert ids.val_bytes == sum(map(len, MANY.val))


def test_merges_are_learned_from_the_training_text_alone():
    tokenizer, ids = tokenize(Corpus("x", (TEXT.encode(),), (b"zqzq" * 50,)), "bpe", 320)
    assert b"zq" not in tokenizer.token_bytes
    assert len(ids.val) == 200


def test_pieces_in_processes_and_in_one_give_the_ids_of_the_entire_text(monkeypatch):
    """Cutting a text into pieces, in several processes, changes no token."""
    monkeypatch.setattr(pre_tokens, "CHUNK", 500)
    whole = tokenize(ONE, "bpe", 384)
    assert len(list(pieces(ONE.train, marked=False))) > 10
    monkeypatch.setattr(pre_tokens, "_cores", lambda n_bytes: 2)
    assert same(encode(ONE, whole[0]), whole[1])
    own = whole[0].encode(ONE.train[0].decode())
    assert torch.equal(own, whole[1].train.long())


def test_a_part_of_a_text_with_many_pre_tokens_is_divided(monkeypatch):
    expected = tokenize(MANY, "bpe", 384)
    whole = PreTokens(MANY.train, MANY.val, marked=True)
    monkeypatch.setattr(pre_tokens, "MOST_INDICES", 64)
    found = PreTokens(MANY.train, MANY.val, marked=True)
    assert len(found.train) > 5
    assert max(len(part.numbers) for part in found.train) <= 64
    assert list(found.words) == list(whole.words)
    assert indices(found) == indices(whole)
    assert same(encode(MANY, expected[0]), expected[1])


def indices(found: PreTokens) -> list[int]:
    return np.concatenate([found.indices(part) for part in found.train]).tolist()


def same(a, b) -> bool:
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in tokens.ARRAYS)


def test_a_killed_process_is_replaced_by_this_one(monkeypatch):
    expected = PreTokens(ONE.train, ONE.val, marked=False)
    monkeypatch.setattr(pre_tokens, "CHUNK", 500)
    monkeypatch.setattr(pre_tokens, "_cores", lambda n_bytes: 2)
    monkeypatch.setattr(pre_tokens, "_begin", partial(os._exit, 1))
    found = PreTokens(ONE.train, ONE.val, marked=False)
    assert list(found.words) == list(expected.words)
    assert indices(found) == indices(expected)


@pytest.mark.parametrize("error", [PermissionError, ImportError])
def test_one_process_cuts_up_the_text_where_no_pool_can_start(monkeypatch, error):
    expected = PreTokens(ONE.train, ONE.val, marked=False)

    def fail(*args):
        raise error("no semaphores")

    monkeypatch.setattr(pre_tokens, "_cores", lambda n_bytes: 2)
    monkeypatch.setattr(pre_tokens, "ProcessPoolExecutor", fail)
    found = PreTokens(ONE.train, ONE.val, marked=False)
    assert indices(found) == indices(expected)


@pytest.mark.parametrize(
    ("text", "chunk"),
    [
        ("one two, three(4) five's " * 9, 8),
        ("Война и мир 😀, и снова. " * 9, 8),
        ("漢字、かな7。" * 9, 8),
        ("a\n\n\nb\r\n c\n'll\n\n  \nd\n)\n.x\n\n", 2),
    ],
)
def test_a_cut_is_at_the_border_of_a_pre_token(monkeypatch, text, chunk):
    monkeypatch.setattr(pre_tokens, "CHUNK", chunk)
    parts = list(pieces((text.encode(),), marked=False))
    assert len(parts) > 5
    assert "".join(parts) == text
    assert list(chain(*map(bpe.pre_tokens, parts))) == bpe.pre_tokens(text)


def test_the_cache_gives_the_same_ids_and_a_damaged_file_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "CACHED_FROM", 1)
    first = tokenize(ONE, "bpe", 320)
    [file] = (tmp_path / "tokens").iterdir()

    def fail(*args, **kwargs):
        raise AssertionError("not cached")

    with monkeypatch.context() as patch:
        patch.setattr(tokens, "PreTokens", fail)
        again = tokenize(ONE, "bpe", 320)
        assert again[0] == first[0]
        assert same(again[1], first[1])
        assert same(encode(ONE, first[0]), first[1])
        with pytest.raises(AssertionError, match="not cached"):
            encode(ONE, BPETokenizer(first[0].merges[:-1]))
    data = bytearray(file.read_bytes())
    for at in (5, 200, len(data) - 3):
        data[at] ^= 1
        file.write_bytes(data)
        assert same(tokenize(ONE, "bpe", 320)[1], first[1])
    file.write_bytes(data[:100])
    assert same(tokenize(ONE, "bpe", 320)[1], first[1])


def test_only_the_newest_corpora_stay_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "CACHED_FROM", 1)
    monkeypatch.setattr(tokens, "CACHED", 2)
    for i in range(4):
        tokenize(Corpus("x", (TEXT[i:].encode(),), (b"ab",)), "bpe", 320)
    assert len(list((tmp_path / "tokens").iterdir())) == 2


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "CACHED_FROM", 1)
    (tmp_path / "tokens").write_text("a file")
    assert tokenize(ONE, "bpe", 320)[0].vocab_size == 320


def test_default_vocabulary_grows_with_the_text(monkeypatch):
    monkeypatch.setattr(tokens, "SMALL", 320)
    monkeypatch.setattr(tokens, "LARGE", 384)
    assert tokenize(ONE, "bpe")[0].vocab_size == 320
    monkeypatch.setattr(tokens, "LARGE_FROM", 100)
    assert tokenize(ONE, "bpe")[0].vocab_size == 384


def test_a_vocabulary_is_a_multiple_of_64():
    for asked, given in ((None, None), (257, 320), (4096, 4096), (65536, 65536)):
        assert check_vocab_size("bpe", asked) == given
    for kind, size in (("bpe", 256), ("bpe", -1), ("bpe", 65537), ("char", 99)):
        with pytest.raises(UserError, match="--vocab-size"):
            check_vocab_size(kind, size)


def test_a_text_with_too_few_pairs_is_refused_with_their_number():
    with pytest.raises(UserError, match=r"has 2 pairs to merge, and .* 320 .* 63"):
        tokenize(Corpus("x", (b"ab ab",), (b"ab",)), "bpe", 320)
    text = " ".join(chr(97 + i % 26) * (2 + i // 26) for i in range(120))
    with pytest.raises(UserError, match=r"has 146 pairs .*--vocab-size 384"):
        tokenize(Corpus("x", (text.encode(),), (b"ab",)), "bpe", 4096)


def test_counts_are_those_of_the_most_frequent_pre_tokens(monkeypatch):
    found = PreTokens((b"a b b c c c",), (b"z",), marked=False)
    assert found.counts() == {b"a": 1, b" b": 2, b" c": 3}
    monkeypatch.setattr(pre_tokens, "MOST_WORDS", 2)
    assert found.counts() == {b" b": 2, b" c": 3}

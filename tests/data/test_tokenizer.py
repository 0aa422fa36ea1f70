import json

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st

from irongpt.data.tokenizer import END, BPETokenizer, CharTokenizer, from_json, stream
from irongpt.errors import UserError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(TEXTS)
def test_decode_inverts_encode(text: str) -> None:
    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode(text)
    assert ids.dtype == torch.int64
    assert ids.shape == (len(text),)
    assert [tokenizer.chars[i] for i in ids] == list(text)
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == text
    assert tokenizer.vocab_size == len(set(text))


def test_ids_are_indices_in_code_point_order() -> None:
    tokenizer = CharTokenizer.from_text("b😀a\nb”a")
    assert tokenizer.chars == "\nab”😀"
    assert tokenizer == CharTokenizer.from_text("”😀ba\n")
    assert tokenizer.encode("😀b\n").tolist() == [4, 2, 0]


def test_an_empty_text_has_no_ids_and_no_vocabulary() -> None:
    ids = CharTokenizer("ab").encode("")
    assert (ids.shape, ids.dtype) == ((0,), torch.int64)
    assert CharTokenizer("ab").decode(ids) == ""
    with pytest.raises(UserError):
        CharTokenizer.from_text("")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("abXc", "character 'X' (U+0058) is not among the 3"),
        ("aéb", "character 'é' (U+00E9) is not"),
        ("a\nb", r"character '\n' (U+000A) is not"),
        ("a\u2028", r"character '\u2028' (U+2028) is not"),  # a line end to splitlines
        ("😀", "character '😀' (U+1F600) is not"),
        ("a\udce9", r"character '\udce9' (U+DCE9) is not"),  # byte 0xE9 of a shell's argument
        ("zyzaz", "character 'z' (U+007A) and 1 other are not among the 3"),
        ("zyxzz", "character 'z' (U+007A) and 2 others are not"),
    ],
)
def test_a_character_outside_the_vocabulary_is_named_in_one_line(text: str, named: str) -> None:
    with pytest.raises(UserError) as error:
        CharTokenizer("abc").encode(text)
    assert named in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 180


@pytest.mark.parametrize("ids", [[3], [0, -1], torch.tensor([1, -2]), torch.tensor([9])])
def test_an_id_outside_the_vocabulary_is_an_index_error(ids: list[int] | torch.Tensor) -> None:
    with pytest.raises(IndexError):
        CharTokenizer("abc").decode(ids)


BPE = BPETokenizer(((97, 98), (256, 99)))  # "ab" and "abc"


@given(TEXTS, st.booleans())
def test_json_round_trip(text: str, documents: bool) -> None:
    tokenizer = CharTokenizer.from_text(text, documents=documents)
    assert from_json(json.loads(json.dumps(tokenizer.to_json()))) == tokenizer


def test_json_of_bpe_and_of_old_checkpoints_is_read() -> None:
    assert from_json(json.loads(json.dumps(BPE.to_json()))) == BPE
    assert (BPE.vocab_size, BPE.end) == (259, 258)
    assert from_json({"kind": "char", "chars": "abc"}) == CharTokenizer("abc")


@given(TEXTS.filter(lambda text: END not in text))  # in which theirs would find the token
def test_hugging_face_gives_the_ids_of_a_char_tokenizer(text: str) -> None:
    tokenizer = CharTokenizer.from_text(text, documents=True)
    other = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.to_json()))
    assert other.encode(text).ids == tokenizer.encode(text).tolist()
    assert other.decode(tokenizer.encode(text).tolist()) == text
    assert other.encode(END).ids == [tokenizer.end] == [tokenizer.vocab_size - 1]


def test_end_has_an_id_of_its_own_that_no_text_has() -> None:
    chars = CharTokenizer.from_text(END, documents=True)
    assert chars.encode(END).tolist() == [chars.chars.index(c) for c in END]
    assert BPE.encode(END).tolist() == list(END.encode())
    for tokenizer in (chars, BPE):
        assert tokenizer.decode([tokenizer.end or 0]) == END


def test_bpe_encodes_any_text_but_half_of_a_surrogate_pair() -> None:
    """Also bytes of a shell's argument that are not UTF-8, which Python holds as surrogates."""
    for text in ("", "ab", "abcabc", "é漢😀", "\udce9", "a\udcff\udc80b", "x\x00\r\n"):
        data = b"".join(BPE.token_bytes[i] for i in BPE.encode(text))
        assert data == text.encode(errors="surrogateescape")
    with pytest.raises(UserError, match="surrogate"):
        BPE.encode("a\ud800")


def test_a_character_is_streamed_with_its_last_byte() -> None:
    ids = [*"é漢".encode(), 0xFF, ord("a"), *"😀".encode()[:3]]
    pieces = list(stream(BPE, ids))
    assert pieces == ["", "é", "", "", "漢", "\ufffd", "a", "", "", "", "\ufffd"]
    assert "".join(pieces) == BPE.decode(ids)


@given(st.lists(st.integers(0, 258), max_size=40))
def test_streamed_pieces_are_the_decoded_text(ids: list[int]) -> None:
    assert "".join(stream(BPE, ids)) == BPE.decode(ids)


BAD_CHARS = [None, ["a", "b"], 3, "", "aab", "ba", "a\ud800"]
MODEL = BPE.to_json()["model"]
BAD_BPE = [
    BPE.to_json() | {"model": MODEL | {"merges": [["a", "b"], ["a", "b"]]}},
    BPE.to_json() | {"model": MODEL | {"merges": [["a", "zz"]]}},
    BPE.to_json() | {"model": MODEL | {"merges": []}},
    BPE.to_json() | {"model": MODEL | {"vocab": {"a": "b"}}},
    BPE.to_json() | {"model": None},
    BPE.to_json() | {"added_tokens": []},
    BPE.to_json() | {"pre_tokenizer": {"type": "Whitespace"}},
    CharTokenizer("ab").to_json() | {"model": MODEL},
]


@pytest.mark.parametrize(
    "value",
    [
        None, [], "abc", {}, {"chars": "abc"}, {"kind": "char"}, {"kind": "bpe", "chars": "abc"},
        {"kind": "char", "chars": "abc", "merges": []}, *BAD_BPE,
        *({"kind": "char", "chars": chars} for chars in BAD_CHARS),
    ],
)  # fmt: skip
def test_json_of_no_tokenizer_is_rejected_in_one_line(value: object) -> None:
    with pytest.raises(UserError) as error:
        from_json(value)
    assert len(str(error.value).splitlines()) == 1

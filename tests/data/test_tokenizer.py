import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from irongpt.data.tokenizer import CharTokenizer
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


@given(TEXTS)
def test_json_round_trip(text: str) -> None:
    tokenizer = CharTokenizer.from_text(text)
    value = json.loads(json.dumps(tokenizer.to_json()))
    assert value == {"kind": "char", "chars": tokenizer.chars}
    assert CharTokenizer.from_json(value) == tokenizer


BAD_CHARS = [None, ["a", "b"], 3, "", "aab", "ba", "a\ud800"]
BAD_KINDS = [{"kind": kind, "chars": "abc"} for kind in ("bpe", ["char"])]
BAD_FIELDS = [
    {},
    {"chars": "abc"},
    {"kind": "char"},
    {"kind": "char", "chars": "abc", "merges": []},
]


@pytest.mark.parametrize(
    "value",
    [None, [], "abc", *BAD_FIELDS, *BAD_KINDS, *({"kind": "char", "chars": x} for x in BAD_CHARS)],
)
def test_json_of_no_tokenizer_is_rejected_in_one_line(value: object) -> None:
    with pytest.raises(UserError) as error:
        CharTokenizer.from_json(value)
    assert len(str(error.value).splitlines()) == 1

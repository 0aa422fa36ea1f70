"""Bytes to text: one function for --data, prompt files and standard input."""

import codecs
import gzip
import io
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from irongpt import cli
from irongpt.data import text as text_module
from irongpt.data.text import NotTextError, check_encoding, decoded, unpacked
from irongpt.errors import UserError

GERMAN = "für Käse über größere Straßen\n" * 3
TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\n\t“é😀"))
BOMS = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}


def text_of(raw: bytes, *notes: str, **options: str) -> str:
    """The text of the bytes. Checks that there are these notes about it."""
    text = decoded(raw, "'file'", **options)
    assert len(text.notes) == len(notes), text.notes
    assert all(part in note for part, note in zip(notes, text.notes, strict=True)), text.notes
    return text.utf8.decode()


def refused(raw: bytes, *parts: str, **options: str) -> None:
    with pytest.raises(NotTextError) as error:
        decoded(raw, "'file'", **options)
    message = str(error.value)
    assert message.startswith("'file' ")
    assert len(message.splitlines()) == 1
    assert len(message) < 200
    assert all(part in message for part in parts), message


@given(TEXTS, st.sampled_from(["\n", "\r\n", "\r"]), st.integers(1, 9))
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_a_text_is_the_same_however_it_was_saved(
    encoding: str, content: str, line_end: str, chunk: int
) -> None:
    """The chunks cut characters and line ends at every place."""
    content = content.lstrip("\ufeff")  # at the start it is a byte order mark
    raw = BOMS.get(encoding, b"") + content.replace("\n", line_end).encode(encoding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "CHUNK", chunk)
        assert text_of(raw) == content


@given(TEXTS, st.integers(1, 9))
@example("a" * 200 + "é“😀", 1)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "gb18030"])
def test_a_text_that_is_cut_loses_its_last_character_and_says_so(
    encoding: str, content: str, chunk: int
) -> None:
    content = "éa" + content.lstrip("\ufeff")  # ASCII alone does not show that it is UTF-8
    named = {} if encoding == "utf-8" else {"encoding": encoding}
    for missing in range(1, len((last := content[-1:]).encode(encoding))):
        raw = content.encode(encoding)[:-missing]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text_module, "CHUNK", chunk)
            note = "ends in the middle of a character"
            for errors in ("strict", "replace"):
                got = decoded(raw, "'file'", errors=errors, **named)
                if encoding != "gb18030":  # whose first two bytes of four may be a character
                    assert got.utf8.decode() == content.removesuffix(last)
                    assert note in got.notes[0]


def test_a_replacement_character_of_the_text_is_not_counted() -> None:
    content = "a\ufffdb".encode()
    assert text_of(content, errors="replace") == "a\ufffdb"
    note = "1 character of 'file' could not be decoded"
    assert text_of(content + b"\xffc", note, errors="replace") == "a\ufffdb\ufffdc"


def test_one_byte_order_mark_is_removed() -> None:
    for encoding in ("utf-8", "utf-16", "utf-32"):
        raw = ("\ufeff" * (encoding == "utf-8") + "\ufefftext").encode(encoding)
        assert text_of(raw) == "\ufefftext"
    assert text_of(BOMS["utf-16-le"] + b"a\0", encoding="utf-16-le") == "a"


def test_few_control_characters_are_text() -> None:
    assert text_of(b"a\x07") == "a\x07"
    for raw in (b"a\x07" * 5, bytes(range(256)) * 9, b"BM" + bytes(99), b"\xff\xfea\0\0\0"):
        refused(raw, "looks binary: give a text file")
    assert text_of(b"\x1b" * 20 + b"x" * 2000) == "\x1b" * 20 + "x" * 2000


def test_a_wrong_last_byte_of_ascii_may_be_another_encoding() -> None:
    refused(b"a caf\xe9", "byte 5 (line 1) is 0xE9")
    refused(b"\nthe\ncaf\xe9", "byte 8 (line 3)")
    assert text_of(codecs.BOM_UTF8 + b"caf\xe9", "its last 1 byte is left out") == "caf"
    assert text_of(b"a caf\xe9", "its last 1 byte is left out", errors="replace") == "a caf"
    assert text_of("a “quote”".encode()[:-1], "its last 2 bytes are left out") == "a “quote"


@given(st.binary(max_size=60), st.sampled_from(["strict", "replace"]))
def test_any_bytes_are_text_or_refused_in_one_line(raw: bytes, errors: str) -> None:
    message = ""
    try:
        text = decoded(raw, "'file'", errors=errors).utf8.decode()
    except NotTextError as error:
        text, message = "", str(error)
    assert len(message.splitlines()) <= 1
    assert "\r" not in text
    assert "\0" not in text


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_a_wrong_byte_is_named_with_its_position_and_line(
    monkeypatch, line_end: str, chunk: int
) -> None:
    monkeypatch.setattr(text_module, "CHUNK", chunk)
    before = GERMAN.replace("\n", line_end).encode()
    raw = before + b"M\xfcnchen" + before
    where = f"byte {len(before) + 1:,} (line 4) is 0xFC"
    refused(raw, "is not UTF-8 text", where, "--encoding cp1252", "--errors replace")
    refused(codecs.BOM_UTF8 + raw, f"byte {len(before) + 4:,} (line 4)")
    assert text_of(raw, "1 character", errors="replace") == f"{GERMAN}M\ufffdnchen{GERMAN}"


def test_a_wrong_half_of_a_pair_in_utf_16_is_named() -> None:
    raw = codecs.BOM_UTF16_LE + "ab\n".encode("utf-16-le") + b"\x00\xd8" + "cd".encode("utf-16-le")
    advice = "; name another --encoding, or use --errors replace"
    refused(raw, "is not UTF-16 text: byte 8 (line 2)", advice)
    refused(b"ab \x81", "is not CP1252 text: byte 3", advice, encoding="cp1252")
    assert text_of(raw, "1 character", errors="replace") == "ab\n\ufffdcd"


@pytest.mark.parametrize("name", ["", "utf-9", "rot13", "hex", "base64", "a\0b", "undefined", "é"])
def test_an_unknown_encoding_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="is not an encoding that Python knows"):
        check_encoding(name)


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (gzip.compress(b"text", mtime=0), "compressed (gzip)"),
        (b"\xfd7zXZ\0\0\4", "compressed (xz)"),
        (b"\x28\xb5\x2f\xfd\x04", "compressed (zstd)"),
        (b"BZh91AY&SY\0\1", "compressed (bzip2)"),
        (b"PK\x03\x04\x14\0\0\0text.txt", "an archive (zip)"),
        (b"PK\x03\x04\x14\0" + b"[Content_Types].xml\0word/document.xml", "a document (Word)"),
        (b"PK\x03\x04\x14\0mimetypeapplication/epub+zip", "EPUB"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a PDF"),
        (b"PAR1\x15\x04\x15\0", "a table (Parquet)"),
        (b"\x40\0\0\0\0\0\0\0" + b'{"w":{"dtype":"F32"}}', "a model (safetensors)"),
        (b"\x89PNG\r\n\x1a\n\0", "a picture (PNG)"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "a picture (JPEG)"),
        (b"GGUF\3\0\0\0", "a model (GGUF)"),
        (b"text.txt" + bytes(249) + b"ustar\0", "an archive (tar)"),
        (b"\x80\x04\x95", "pickle"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_format_is_named(raw: bytes, what: str) -> None:
    refused(raw, what)
    refused(raw, what, errors="replace")


@pytest.mark.parametrize("content", ["PAR1 is a road", "BZh? asked Anna", "GIF89a", "ID3", "MZ"])
def test_a_text_may_start_like_another_format(content: str) -> None:
    assert text_of(content.encode()) == content


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_utf_16_without_a_mark_is_binary_with_a_hint(encoding: str) -> None:
    for content in (GERMAN, "Все счастливые семьи похожи друг на друга\n"):
        raw = content.encode(encoding)
        refused(raw, "or is UTF-", f"without a byte order mark (--encoding {encoding}): give a")
        assert text_of(raw, encoding=encoding) == content
    refused(raw, "looks binary: give a text file", encoding="utf-8")


@given(st.binary(max_size=300), st.integers(1, 50), st.integers(1, 3))
def test_gzip_is_unpacked(content: bytes, chunk: int, members: int) -> None:
    raw = gzip.compress(content) * members
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "CHUNK", chunk)
        assert unpacked(raw, "'file'", 10**6) == content * members
        for rest in (bytes(9), b"\x1f", b"garbage"):
            assert unpacked(raw + rest, "'file'", 10**6) == content * members
        for cut in (len(raw) - 1, len(raw) - 9):
            with pytest.raises(UserError, match="its end is missing"):
                unpacked(raw[:cut], "'file'", 10**6)
    assert unpacked(b"not " + raw, "'file'", 10) == b"not " + raw


def test_a_damaged_or_huge_gzip_file_is_refused_or_cut_early() -> None:
    raw = gzip.compress(bytes(100))
    with pytest.raises(UserError, match="damaged"):
        unpacked(raw[:12] + bytes([raw[12] ^ 0x55]) + raw[13:], "'file'", 1000)
    compressor = zlib.compressobj(9, wbits=31)
    bomb = b"".join(compressor.compress(bytes(1 << 24)) for _ in range(4)) + compressor.flush()
    assert 10**6 < len(unpacked(bomb, "'file'", 10**6)) < 2e7  # of 67 MB


@pytest.mark.parametrize("kind", ["prompt.txt", "-"])
def test_a_prompt_is_read_like_a_training_text(tmp_path, monkeypatch, capsys, kind: str) -> None:
    def prompt(raw: bytes, **options: str) -> str:
        Path("prompt.txt").write_bytes(raw)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        return cli.read_file({"prompt_file": kind, **options}, "--prompt-file FILE")

    monkeypatch.chdir(tmp_path)
    assert prompt("the “quick”\r\n".encode("utf-16")) == "the “quick”"
    assert prompt(b"one\rtwo\r\r") == "one\ntwo\n"
    assert prompt(b"") == ""
    assert prompt("all".encode("utf-8-sig")) == "all"
    assert prompt("“cut”".encode()[:-1]) == "“cut"
    assert "ends in the middle of a character" in capsys.readouterr().err
    assert prompt(b"M\xfcnchen", encoding="latin-1") == "München"
    assert prompt(b"M\xfcnchen", errors="replace") == "M\ufffdnchen"
    assert prompt(gzip.compress(b"one\n")) == "one"
    ebook = "OF THE PROJECT GUTENBERG EBOOK X ***"
    assert prompt(f"licence\n*** START {ebook}\n\none\n*** END {ebook}\nlicence".encode()) == "one"
    for raw, part in ((b"M\xfcnchen", "byte 1 "), (b"PK\3\4", "zip"), (b"\0", "bin")):
        with pytest.raises(UserError, match=part):
            prompt(raw)
    with pytest.raises(UserError, match="--encoding 'utf-9'"):
        prompt(b"text", encoding="utf-9")

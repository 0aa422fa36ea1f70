"""The bytes of a text as UTF-8 whose line breaks are \\n: of --data, prompt files, standard input.

Without --encoding a text is UTF-8, or UTF-16 or UTF-32 with a byte order mark. No other encoding is
guessed. Line breaks may be \\n, \\r\\n or \\r. If the text was cut in the middle of its last
character, that character is dropped, and a note reports it.
"""

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from irongpt.errors import UserError

ERRORS = ("strict", "replace")
CHUNK = 1 << 20  # bytes that are decoded at a time, so that memory never holds 4 bytes a character

Say = Callable[[str], None]
Utf8 = bytes | bytearray

_BOMS = (  # UTF-32 first, because its mark starts with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CONTROLS = bytes({*range(1, 32)} - {*b"\t\n\f\r"})
_REPLACED = "\ufffd".encode()
GZIP = b"\x1f\x8b"


class NotTextError(UserError):
    """The bytes are not text. `kind` is for counts: binary, damaged, or not UTF-8, for example."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class Text(NamedTuple):
    """A text in UTF-8. `notes` are the lines for the user about what was changed in it."""

    utf8: Utf8
    notes: list[str]


def check_encoding(name: str) -> None:
    """Raises UserError unless the name is that of a text encoding."""
    try:
        text = "a\n".encode(name).decode(name, "replace")
        if text == "a\n" and codecs.getincrementaldecoder(name) and name != "punycode":
            return  # punycode cannot be decoded in chunks
    except (LookupError, UnicodeError, ValueError):
        pass
    raise UserError(
        f"--encoding {name!r} is not an encoding that Python knows: "
        "use utf-8, utf-16, cp1252, cp1251, shift_jis, gb18030 or another"
    )


def decoded(raw: Utf8, name: str, encoding: str | None = None, errors: str = "strict") -> Text:
    """The text of these bytes.

    name: what messages call it. encoding: a name that `check_encoding` accepts, or None: see above.
    errors: replace decodes invalid bytes as U+FFFD. Raises NotTextError if the bytes are not text
    in that encoding.
    """
    if what := _other_format(raw):
        raise NotTextError(f"{name} is {what}", "binary")
    codec = encoding or next((codec for bom, codec in _BOMS if raw.startswith(bom)), "utf-8")
    if is_utf8 := codecs.lookup(codec).name in ("utf-8", "utf-8-sig"):
        codec = "utf-8"
    skipped = len(codecs.BOM_UTF8) if is_utf8 and raw.startswith(codecs.BOM_UTF8) else 0
    kept = is_utf8 and errors == "strict"  # the result is the bytes themselves
    unnamed = is_utf8 and not encoding
    decoder = codecs.getincrementaldecoder(codec)(errors)
    result, notes = bytearray(), []

    def wrong(position: int) -> NotTextError:
        before = io.TextIOWrapper(io.BytesIO(raw[:position]), codec, "replace")
        lines = 1 + sum(line.endswith("\n") for line in before)
        advice = "its encoding, such as --encoding cp1252" if unnamed else "another --encoding"
        return NotTextError(
            f"{name} is not {codec.upper()} text: byte {position:,} (line {lines:,}) is "
            f"0x{raw[position]:02X}; name {advice}, or use --errors replace",
            f"not {codec.upper()}",
        )

    def check_controls(utf8: Utf8) -> None:
        controls = sum(len(part) - len(part.translate(None, _CONTROLS)) for part in _chunks(utf8))
        if b"\0" in utf8 or controls > max(len(raw) / 100, 4):
            hint = ""
            if unnamed and (guess := _codec_by_nuls(raw)):
                hint = f" or is {guess[:6].upper()} without a byte order mark (--encoding {guess})"
            raise NotTextError(f"{name} looks binary{hint}: give a text file", "binary")

    if is_utf8:
        check_controls(raw)
    try:
        for first in range(skipped, len(raw), CHUNK):
            text = decoder.decode(raw[first : first + CHUNK])
            if not kept:
                result += text.encode()
    except UnicodeDecodeError as e:
        raise wrong(min(first + CHUNK, len(raw)) - len(e.object) + e.start) from None
    except UnicodeError as e:  # for one, half of a surrogate pair, which UTF-7 can hold
        raise NotTextError(f"{name} is not {codec.upper()} text", f"not {codec.upper()}") from e
    if not is_utf8:
        check_controls(result)

    end = len(raw)
    decoder.errors = "strict"
    rest = len(decoder.getstate()[0])
    try:
        result += decoder.decode(b"", True).encode()
    except UnicodeError:
        end -= rest
        # One byte after ASCII alone may also be a character of cp1252.
        if kept and rest == 1 and not skipped and raw[:end].isascii():
            raise wrong(end) from None
        notes.append(
            f"{name} ends in the middle of a character: its last {rest} "
            f"byte{'s are' if rest > 1 else ' is'} left out"
        )
    content: Utf8 = result if not kept else raw[skipped:end] if end - skipped < len(raw) else raw
    genuine = raw.count(_REPLACED) if is_utf8 else 0
    if count := content.count(_REPLACED) - genuine if errors == "replace" else 0:
        what = f"{count:,} characters" if count > 1 else "1 character"
        notes.append(f"{what} of {name} could not be decoded, and became U+FFFD")
    if encoding and not skipped and content.startswith(codecs.BOM_UTF8):  # utf-16-le leaves it
        content = content[len(codecs.BOM_UTF8) :]
    if b"\r" in content:
        content = content.replace(b"\r\n", b"\n")
        content = content.replace(b"\r", b"\n")
    return Text(content, notes)


_NULS = {  # in text of mostly ASCII: which of four bytes are NUL
    (1, 3): "utf-16-le", (0, 2): "utf-16-be", (1, 2, 3): "utf-32-le", (0, 1, 2): "utf-32-be"
}  # fmt: skip


def _codec_by_nuls(raw: Utf8) -> str | None:
    columns = (raw[i:4096:4] for i in range(4))
    return _NULS.get(tuple(i for i, part in enumerate(columns) if part.count(0) > len(part) / 50))


def unpacked(raw: bytes, name: str, limit: int) -> Utf8:
    """The content of gzip's format, or `raw` if it is anything else. Ends early above the limit.
    Bytes after the last member are left out, as by gzip."""
    if not raw.startswith(GZIP):
        return raw
    result = bytearray()
    try:
        with gzip.open(io.BytesIO(raw)) as file:
            while len(result) <= limit and (chunk := file.read1(CHUNK)):
                result += chunk
    except EOFError as e:
        raise NotTextError(f"{name} is compressed (gzip), and its end is missing", "damaged") from e
    except (OSError, zlib.error) as e:
        if not str(e).startswith("Not a gzipped file"):  # other bytes after the last member
            raise NotTextError(f"{name} is compressed (gzip), and damaged: {e}", "damaged") from e
    return result


# One match per book in the file. Its group is the book from its first line that is not blank.
_BOOK = re.compile(
    rb"(?ms)^\*\*\* ?START OF TH(?:E|IS) PROJECT GUTENBERG EBOOK[^\n]*\n(?:[ \t]*\n)*"
    rb"(.*?)^\*\*\* ?END OF TH(?:E|IS) PROJECT GUTENBERG EBOOK"
)


def without_license(utf8: Utf8) -> Utf8:
    """The books between Project Gutenberg's markers, or the text itself if it has no markers."""
    if b"PROJECT GUTENBERG EBOOK" not in utf8:
        return utf8
    books = [book.decode().rstrip().encode() + b"\n" for book in _BOOK.findall(utf8)]
    return b"\n\n".join(books) or utf8


_CONTINUATION = bytes(range(0x80, 0xC0))  # the bytes of a character after its first


def _chunks(utf8: Utf8) -> Iterator[Utf8]:
    return (utf8[i : i + CHUNK] for i in range(0, len(utf8), CHUNK))


def length(utf8: Utf8) -> int:
    """Number of characters."""
    return sum(len(chunk.translate(None, _CONTINUATION)) for chunk in _chunks(utf8))


def has_text(utf8: Utf8) -> bool:
    """Whether there is a character that is not white space."""
    return any(chunk.decode("utf-8", "ignore").strip() for chunk in _chunks(utf8))


_FORMATS = (  # first bytes, and what a file with them is
    (GZIP, "compressed (gzip): unpack it first"),
    (b"\xfd7zXZ\0", "compressed (xz): unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed (zstd): unpack it first"),
    (b"\x04\x22\x4d\x18", "compressed (lz4): unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "an archive (7z): unpack it first"),
    (b"Rar!\x1a\x07", "an archive (rar): unpack it first"),
    (b"PK\x03\x04", "an archive (zip): unpack it first"),
    (b"PK\x05\x06", "an archive (zip) without files"),
    (b"%PDF-", "a PDF: convert it to text first"),
    (rb"{\rtf", "a document (RTF): save it as text first"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document: save it as text first"),
    (b"\x89PNG\r\n\x1a\n", "a picture (PNG): give a text file"),
    (b"\xff\xd8\xff", "a picture (JPEG): give a text file"),
    (b"SQLite format 3\0", "a database (SQLite): export its text first"),
    (b"\x89HDF\r\n\x1a\n", "data (HDF5): export its text first"),
    (b"\x93NUMPY", "an array (NumPy): export its text first"),
    (b"\x7fELF", "a program (ELF): give a text file"),
)
_FORMATS_IF_BINARY = (  # the same, but a text may start like this
    (b"BZh", "compressed (bzip2): unpack it first"),
    (b"PAR1", "a table (Parquet): export its text first"),
    (b"ARROW1", "a table (Arrow): export its text first"),
    (b"GGUF", "a model (GGUF): give a text file"),
    (b"GIF8", "a picture (GIF): give a text file"),
    (b"RIFF", "a sound, picture or film (RIFF): give a text file"),
    (b"OggS", "a sound (Ogg): give a text file"),
    (b"ID3", "a sound (MP3): give a text file"),
    (b"fLaC", "a sound (FLAC): give a text file"),
    (b"MZ", "a program (Windows): give a text file"),
)


def _other_format(raw: Utf8) -> str | None:
    """What the file is, from its first bytes; None if it may be text."""
    head = bytes(raw[:1024])
    if head.startswith(b"PK\x03\x04"):
        documents = ((b"word/", "Word"), (b"xl/", "Excel"), (b"ppt/", "PowerPoint"))
        for mark, program in documents:
            if mark in raw[: 1 << 16]:
                return f"a document ({program}): save it as text first"
        if b"epub+zip" in head or b"opendocument" in head:
            return "a document (EPUB or OpenDocument): save it as text first"
    if head[257:262] == b"ustar":
        return "an archive (tar): unpack it first"
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < 1 << 32 and b"\0" in head[:8]:
        return "a model (safetensors): give a text file"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "an object of Python (pickle): export its text first"
    binary = head.translate(None, _CONTROLS + b"\0") != head
    formats = _FORMATS + _FORMATS_IF_BINARY * binary
    return next((what for first, what in formats if head.startswith(first)), None)

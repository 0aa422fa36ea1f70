"""The training text: War and Peace, Python's own docs and code, a file, a folder, or several.

war-and-peace    downloaded once, verified, and stored in the cache folder
python-docs      the language reference that every Python contains (pydoc_data.topics)
python-code      the source of the standard library, by file
python-packages  the source of the larger packages that are installed, such as torch, by file
FILE             text, also in gzip's format; - is standard input
FOLDER           its .py files, or those that match --include
"""

import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from irongpt.console import read_standard_input
from irongpt.data.download import war_and_peace
from irongpt.data.folder import (
    MAX_BYTES,
    Reader,
    folder_files,
    packages,
    standard_library,
    val_files,
)
from irongpt.data.text import (
    CHUNK,
    NotTextError,
    Say,
    Text,
    Utf8,
    has_text,
    length,
    without_license,
)
from irongpt.errors import UserError, short_reason

BUILT_IN = ("war-and-peace", "python-docs", "python-code", "python-packages")
STDIN = "-"
TRAIN_SHARE = 0.9  # share of the characters of one text; a text of several files is split by file


@dataclass(frozen=True)
class Corpus:
    """The documents for training and for validation, in UTF-8. Their line breaks are \\n.

    Of one text these are the first 90 % of its characters and the rest. They are bytes and not str,
    because a str with one rare character takes up to 4 bytes for each of its characters. The name
    is valid as the name of a folder.
    """

    name: str
    train: tuple[bytes, ...]
    val: tuple[bytes, ...]
    files: dict[str, str] = field(default_factory=dict)  # path -> SHA-256; {} for one text

    @property
    def text(self) -> str:
        """All documents in one piece: for one text, that text."""
        return b"".join(self.train + self.val).decode()

    @cached_property
    def sha256(self) -> str:
        """Hexadecimal digest of the text in UTF-8, or of its files and their split."""
        if self.files:
            split = [length(utf8) for utf8 in self.train], [length(utf8) for utf8 in self.val]
            described = json.dumps([*self.files.items(), split])
            return hashlib.sha256(described.encode()).hexdigest()
        digest = hashlib.sha256()
        for document in self.train + self.val:
            digest.update(document)
        return digest.hexdigest()

    @property
    def n_bytes(self) -> int:
        """Size of all documents in UTF-8."""
        return sum(map(len, self.train + self.val))


def load(
    data: Sequence[str] | str | None,
    *,
    say: Say,
    include: Sequence[str] = (),
    encoding: str | None = None,
    errors: str = "strict",
    exclude: Path | None = None,
    sha256: str | None = None,
    val: str | None = None,
) -> Corpus:
    """The text called `data`: names of BUILT_IN, paths of files and folders. Raises UserError.

    None is War and Peace, or python-docs if it cannot be downloaded. `say` receives lines for the
    user about files, downloads and problems that were worked around.
    include: patterns for the files of folders. encoding, errors: see `text.decoded`.
    exclude: the run's folder, which no folder of `data` may contain.
    sha256: the digest of a resumed run's text. Earlier versions read python-code as one text; it is
    read that way again if the digest matches.
    val: the validation text, given like one of `data`. All of `data` is then for training.
    """
    reader = Reader(say, encoding, errors)
    if data is None:
        try:
            return _one_text("war-and-peace", war_and_peace(say), reader)
        except UserError as error:
            say(f"warning: using python-docs, Python's language reference, instead: {error}")
            data = "python-docs"
    sources = [data] if isinstance(data, str) else list(data)
    if sources == ["python-code"] and sha256 and val is None:
        text = _python_code_as_one_text()
        if text.sha256 == sha256:
            return text
    given = sources if val is None else [*sources, val]
    if include and not any(os.path.isdir(os.path.expanduser(source)) for source in given):
        raise UserError("--include is for folders: give one with --data FOLDER")
    if val == STDIN:
        raise UserError("--val cannot be read from the standard input: give a file")
    # It is read first, so that a file of `data` with the same text is left out as a duplicate.
    own = None if val is None else _source(val, reader, include, exclude)
    return _joined([_source(s, reader, include, exclude) for s in sources], say, own)


def _source(data: str, reader: Reader, include: Sequence[str], exclude: Path | None) -> Corpus:
    as_utf8 = replace(reader, encoding=None, errors="strict")
    if data == "war-and-peace":
        return _one_text(data, war_and_peace(reader.say), reader)
    if data == "python-docs":
        return _one_text(data, _python_docs(), reader)
    if data == "python-code":
        return _by_file(data, data, standard_library(), as_utf8)
    if data == "python-packages":
        return _by_file(data, data, packages(reader.say), as_utf8)
    if data == STDIN:
        name, raw = "the standard input", read_standard_input(MAX_BYTES + 1)
        return _checked("stdin", name, reader.decode(raw, name), reader)
    path = os.path.expanduser(data)
    try:
        if os.path.isdir(path):
            paths = folder_files(Path(path), include, say=reader.say, exclude=exclude)
            name = _folder_name(Path(path).resolve().name)
            return _by_file(name, repr(data), paths, reader)
        text = reader.read(path, repr(data))
    except (FileNotFoundError, ValueError):  # a name with a NUL in it is a ValueError
        raise UserError(f"no file {data!r}; the built-in texts are {', '.join(BUILT_IN)}") from None
    except OSError as error:
        raise UserError(f"cannot read {data!r}: {short_reason(error)}") from None
    return _checked(_folder_name(Path(data.removesuffix(".gz")).stem), repr(data), text, reader)


def _checked(name: str, shown: str, text: Text, reader: Reader) -> Corpus:
    """The corpus of a user's text, without the licence of a book of Project Gutenberg."""
    utf8 = without_license(text.utf8)
    for note in text.notes:
        reader.say(f"warning: {note}")
    if utf8 is not text.utf8:
        reader.say(
            f"removed Project Gutenberg's licence from {shown}: {length(utf8):,} characters remain"
        )
    if not has_text(utf8):
        what = "is empty except for white space" if utf8 else "is empty"
        raise UserError(f"{shown} {what}: give a file that contains text")
    return _one_text(name, utf8, reader)


def _one_text(name: str, utf8: Utf8, reader: Reader) -> Corpus:
    if reader.kept.add(utf8) is None:
        return Corpus(name, (), ())
    return _split(name, utf8)


def _split(name: str, utf8: Utf8) -> Corpus:
    cut, view = _offset(utf8, int(TRAIN_SHARE * length(utf8))), memoryview(utf8)
    return Corpus(name, (bytes(view[:cut]),), (bytes(view[cut:]),))


def _by_file(name: str, shown: str, paths: Iterable[tuple[str, Path]], reader: Reader) -> Corpus:
    """The corpus of (relative path, path) pairs. `say` receives what was changed in a file.

    The relative path decides the split, and is the name of the file in `Corpus.files`.
    """
    texts: dict[str, bytes] = {}
    digests: dict[str, str] = {}
    left_out: Counter[str] = Counter()  # number of files by reason
    for relative, path in sorted(paths):
        try:
            utf8, notes = reader.read(path, repr(str(path)))
        except NotTextError as e:
            left_out[e.kind] += 1
            continue
        except OSError:
            left_out["unreadable"] += 1
            continue
        utf8 = without_license(utf8)
        if not has_text(utf8):
            left_out["empty"] += 1
        elif digest := reader.kept.add(utf8):
            texts[relative], digests[relative] = bytes(utf8), digest
            for note in notes:
                reader.say(note)
        else:
            left_out["duplicates"] += 1
    size = sum(map(len, texts.values())) / 1e6
    found = f"{len(texts):,} file{'s' * (len(texts) != 1)}, {size:,.1f} MB"
    if left_out:
        reasons = (f"{count:,} {reason}" for reason, count in left_out.most_common())
        found += f"; left out: {', '.join(reasons)}"
    if not texts and not left_out["duplicates"]:
        raise UserError(f"{shown} has no text in the files that match: {found}")
    reader.say(f"files     {name}: {found}")
    if len(texts) == 1:
        return _split(name, *texts.values())
    in_val = val_files(list(texts))
    train = tuple(text for path, text in texts.items() if path not in in_val)
    val = tuple(text for path, text in texts.items() if path in in_val)
    return Corpus(name, train, val, digests)


def _joined(parts: Sequence[Corpus], say: Say, val: Corpus | None = None) -> Corpus:
    """All documents of several corpora. A corpus without documents, because all of them were
    duplicates, is left out.

    val: the corpus to validate on; the others are then for training only.
    """
    before = "the data before it" if val is None else "--val or in the data before it"
    for part in parts:
        if not part.train:
            say(f"warning: all text of {part.name} is in {before}: it is left out")
    parts = [part for part in parts if part.train]
    if not parts:
        raise UserError("all text of --data is in --val too: give another text to validate on")
    if len(parts) == 1 and val is None:
        return parts[0]
    names = labels = [part.name for part in parts]
    if len({*names}) < len(names):
        labels = [f"{name}-{i}" for i, name in enumerate(names, 1)]
    files: dict[str, str] = {}
    for label, part in zip(labels, parts, strict=True):
        by_path = {f"{label}/{path}": digest for path, digest in part.files.items()}
        files |= by_path or {label: part.sha256}
    train = tuple(utf8 for part in parts for utf8 in (part.train if val is None else _all(part)))
    if val is not None:
        digests = val.files or {val.name: val.sha256}
        files |= {f"val/{path}": digest for path, digest in digests.items()}
    name = "+".join(names)
    return Corpus(
        name if len(name) <= 64 else f"{names[0][:48]}+{len(parts) - 1}-more",
        train,
        tuple(utf8 for part in parts for utf8 in part.val) if val is None else _all(val),
        files,
    )


def _all(part: Corpus) -> tuple[bytes, ...]:
    """The documents of both splits of a corpus. One text is one document again."""
    return part.train + part.val if part.files else (b"".join(part.train + part.val),)


def _folder_name(name: str) -> str:
    """A name without the characters that a folder's name cannot have everywhere."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:64].strip("-.") or "text"


def _offset(utf8: Utf8, index: int) -> int:
    """Position of the first byte of character number `index`; at the end, the length in bytes."""
    for first in range(0, len(utf8), CHUNK):
        chunk = utf8[first : first + CHUNK]
        if index < (count := length(chunk)):
            starts = (i for i, byte in enumerate(chunk) if byte & 0xC0 != 0x80)
            return first + next(itertools.islice(starts, index, None))
        index -= count
    return len(utf8)


def _python_docs() -> bytes:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("this Python has no pydoc_data.topics: use --data FILE") from None
    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


def _python_code_as_one_text() -> Corpus:
    """The ASCII files of the standard library in one text, as earlier versions read them."""
    files = (path.read_bytes() for _, path in standard_library())
    ascii_files = (raw.replace(b"\r\n", b"\n") for raw in files if raw.isascii())
    text = b"\n".join(raw.replace(b"\r", b"\n") for raw in ascii_files)
    return _split("python-code", text)

import hashlib
import os
import string
import subprocess
import sys
from pathlib import Path

import pytest
from book_server import Lines, refused

from irongpt.data import corpus
from irongpt.data.corpus import BUILT_IN, Corpus, load

TEXT = "“Well, naïve Prince,”\n\n she said…\n"
START = "*** START OF THE PROJECT GUTENBERG EBOOK A BOOK ***\n"
END = "*** END OF THE PROJECT GUTENBERG EBOOK A BOOK ***\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory, empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def text_of(raw: bytes, *notes: str) -> str:
    """The text of a file with these bytes. Checks that `notes` is all that is printed about it."""
    Path("file.txt").write_bytes(raw)
    lines = Lines()
    text = load("file.txt", say=lines).text
    assert len(lines) == len(notes), lines
    for line, part in zip(lines, notes, strict=True):
        assert part in line
    return text


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_the_locale_does_not_change_the_text(folder, locale: str) -> None:
    Path("file.txt").write_bytes(TEXT.encode())
    code = (
        "import locale, sys; from irongpt.data import corpus; "
        "print(locale.getpreferredencoding(False), "
        "*(corpus.load(name, say=print).sha256 for name in sys.argv[1:]))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code, str(folder / "file.txt"), "python-docs"],
        cwd=Path(corpus.__file__).parents[2],
        env=os.environ | {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    ).stdout.split()
    if locale == "C" and sys.platform == "linux":
        assert "UTF-8" not in printed[0].upper()
    assert printed[1] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert printed[2:] == [load("python-docs", say=print).sha256]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b" \r\n\t\n", "is empty except for white space"),
        (" \u00a0\u3000\n".encode(), "is empty except for white space"),
        (f"{START}\n{END}".encode(), "is empty"),
        (b"\xff\xfea", "is empty"),
    ],
)
def test_a_file_without_text_is_rejected(raw: bytes, reason: str) -> None:
    Path("file.txt").write_bytes(raw)
    assert len(refused("file.txt", "'file.txt'", reason)) < 200
    assert os.listdir() == ["file.txt"]


@pytest.mark.parametrize("data", ["", "nosuch.txt", "War-and-Peace", "a\nb", "a\0b", "\udcff"])
def test_a_missing_file_is_rejected_with_a_list_of_the_built_in_texts(data: str) -> None:
    assert len(refused(data, repr(data), *BUILT_IN)) < 200
    assert len(refused([data, "python-docs"], repr(data), *BUILT_IN)) < 200


def test_a_file_that_cannot_be_read_is_rejected(monkeypatch) -> None:
    Path("file").touch()
    refused("file/text", "cannot read 'file/text': ")
    refused("x" * 5000, "cannot read ")
    if hasattr(os, "mkfifo"):
        os.mkfifo("fifo")
        os.symlink(os.devnull, "device")
        refused("device", "'device' is not a regular file")  # first: a fifo would make it wait
        refused("fifo", "'fifo' is not a regular file")

    def forbidden(path: Path) -> bytes:  # chmod does not keep root out
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    assert refused("file") == "cannot read 'file': Permission denied"
    with open("file", "wb") as file:
        file.truncate(corpus.MAX_BYTES + 1)  # takes no space
    refused("file", "'file' is larger than 2 GB")


@pytest.mark.parametrize("word", ["THE", "THIS"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_gutenbergs_licence_is_removed(word: str, line_end: str) -> None:
    book = f"License\n{START}\n \n  A\n\n b \n\n\n{END}License\n".replace("THE", word)
    assert text_of(book.replace("\n", line_end).encode(), "'file.txt': 8 char") == "  A\n\n b\n"


def test_all_books_of_a_file_are_kept() -> None:
    books = f"License\n{START}one\n{END}License\n{START}two\n{END}License\n"
    assert text_of(books.encode(), "licence") == "one\n\n\ntwo\n"


WHITE = "\n\n  a \t\n\n b  \n\n"


@pytest.mark.parametrize(
    "text", [WHITE, f"a\n{START}b\n", f"a\n{END}b\n", f"a\n{END}b\n{START}c\n"]
)
def test_a_text_keeps_its_white_space_and_a_single_marker_cuts_nothing(text: str) -> None:
    assert text_of(text.encode()) == text


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("text.txt", "text"),
        ("sub/my book (1).txt", "my-book-1"),
        ("v1.2.txt", "v1.2"),
        ("--x_.txt", "x_"),
        (".hidden", "hidden"),
        ("война.txt", "text"),
        ("a" * 100, "a" * 64),
    ],
)
def test_the_name_of_a_corpus_is_valid_as_a_folder(folder, path: str, name: str) -> None:
    (folder / path).parent.mkdir(exist_ok=True)
    (folder / path).write_bytes(b"text")
    assert load(path, say=Lines()) == Corpus(name, (b"tex",), (b"t",))


def test_a_file_of_a_built_in_name_needs_a_path(monkeypatch) -> None:
    monkeypatch.setattr(corpus, "war_and_peace", lambda say: b"book")
    monkeypatch.setattr(corpus, "packages", lambda say: [("os.py", Path(os.__file__))])
    for name in BUILT_IN:
        Path(name).write_bytes(b"mine")
        assert load(name, say=Lines()).text != "mine"
        assert load(f"./{name}", say=Lines()).text == "mine"
    assert load("war-and-peace", say=Lines()).text == "book"


def test_python_docs_is_the_topics_of_the_manual_in_order(monkeypatch) -> None:
    docs = load("python-docs", say=Lines())
    assert docs.name == "python-docs"
    assert len(docs.text) > 300_000
    monkeypatch.setattr("pydoc_data.topics.topics", {"b": "two\n", "a": "one"})
    assert load("python-docs", say=Lines()).text == "one\n\ntwo\n"
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)  # as if it were not installed
    refused("python-docs", "pydoc_data.topics", "--data FILE")


def test_python_code_is_large_and_split_by_file() -> None:
    """Earlier versions joined the ASCII files to one text, which old runs know by its digest."""
    new = load("python-code", say=Lines())
    assert new.name == "python-code"
    assert 5e6 < new.n_bytes < 15e6
    assert len(new.files) == len(new.train) + len(new.val) > 300
    assert 0.05 < len(new.val) / len(new.files) < 0.15
    old = corpus._python_code_as_one_text()
    assert set(old.text) <= {*string.printable}
    assert 5e6 < len(old.text) < 12e6
    assert len(b"".join(old.train)) == int(0.9 * len(old.text))
    for data in ("python-code", ["python-code"]):
        assert load(data, say=Lines(), sha256=old.sha256) == old
    assert load("python-code", say=Lines(), sha256=new.sha256) == new != old


def test_python_code_is_the_standard_library_alone(folder, monkeypatch) -> None:
    files = {
        "ast.py": b"ast\r\n",
        "json/__init__.py": b"json\n",
        "json/tool.py": b"tool\n",
        "json/tests/test_tool.py": b"a test\n",
        "unittest/test/test_it.py": b"a test\n",
        "lib2to3/main.py": b"old\n",
        "abc.py": "é\n".encode(),
        "heapq.py": b"\xe9\n",
        "json/data.txt": b"data\n",
        "site-packages/torch/ast.py": b"installed\n",
        "dist-packages/ast.py": b"installed\n",
        "sitecustomize.py": b"mine\n",
    }
    for name, raw in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)
    monkeypatch.setattr(os, "__file__", str(folder / "os.py"))
    assert corpus._python_code_as_one_text().text == "ast\n\njson\n\ntool\n"
    lines = Lines()
    code = load("python-code", say=lines)
    assert sorted(code.train + code.val) == [b"ast\n", b"json\n", b"tool\n", "é\n".encode()]
    assert [*code.files] == ["abc.py", "ast.py", "json/__init__.py", "json/tool.py"]
    assert lines == ["files     python-code: 4 files, 0.0 MB; left out: 1 not UTF-8"]
    monkeypatch.setattr(os, "__file__", str(folder / "python.zip" / "os.py"))
    refused("python-code", "has no source of the standard library", "--data FILE")


def test_a_text_is_cut_after_nine_tenths_of_its_characters() -> None:
    text = "ab" * 50 + "é😀" * 50
    Path("file.txt").write_text(text, encoding="utf-8")
    found = load("file.txt", say=Lines())
    cut = int(0.9 * len(text))
    assert [part.decode() for part in found.train + found.val] == [text[:cut], text[cut:]]

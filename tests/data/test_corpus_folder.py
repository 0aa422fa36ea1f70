"""Folders, several sources and standard input as the text of a run."""

import gzip
import hashlib
import io
import os
import random
import sys
import sysconfig
import tracemalloc
from pathlib import Path

import pytest
from book_server import Lines, refused
from hypothesis import given
from hypothesis import strategies as st

from irongpt.data import folder as folder_module
from irongpt.data.corpus import Corpus, load
from irongpt.data.folder import val_files

PATHS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), unique=True)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory, empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(root: str, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def source(count: int, first: int = 0) -> dict[str, str | bytes]:
    return {f"sub/{i}.py": f"print({i})\n" for i in range(first, first + count)}


def documents(corpus: Corpus) -> list[str]:
    return sorted(part.decode() for part in corpus.train + corpus.val)


def test_the_files_of_a_folder_are_documents_in_order_of_their_paths() -> None:
    write("code", {"b.py": "b\r\n", "a/z.py": "z\n", "a.py": "é\n", "c.txt": "no\n", "x.pyc": "no"})
    lines = Lines()
    corpus = load("code", say=lines)
    assert corpus.name == "code"
    assert [*corpus.files] == ["a.py", "a/z.py", "b.py"]
    assert corpus.files["b.py"] == hashlib.sha256(b"b\n").hexdigest()
    assert documents(corpus) == ["b\n", "z\n", "é\n"]
    assert corpus.n_bytes == 7
    assert lines == ["files     code: 3 files, 0.0 MB"]
    assert load("./code/", say=Lines()) == load(str(Path("code").resolve()), say=Lines()) == corpus


def test_files_that_are_no_text_of_ones_own_are_left_out_and_counted(folder, monkeypatch) -> None:
    write("code", source(5))
    write("code", {"same.py": "print(3)\n", "same-too.py": "print(3)\r\n"})
    write("code", {"binary.py": b"\0\1", "latin.py": b"# M\xfcnchen\n", "empty.py": " \n"})
    write("code", {".git/x.py": "no\n", ".hidden.py": "no\n", "sub/.cache/x.py": "no\n"})
    write("code", {"venv/pyvenv.cfg": "home\n", "venv/lib/x.py": "no\n"})
    os.symlink(folder / "code", "code/sub/loop")
    os.symlink("nowhere.py", "code/broken.py")
    os.mkfifo("code/pipe.py")
    write("code", {"cut.py": gzip.compress(b"text")[:-1]})
    Path("code/folder.py").mkdir()
    write("code", {"secret.py": "no\n"})
    read = Path.read_bytes

    def forbidden(path: Path) -> bytes:  # chmod does not keep root out
        if path.name == "secret.py":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    lines = Lines()
    corpus = load("code", say=lines)
    assert len(corpus.files) == 5
    assert documents(corpus) == [f"print({i})\n" for i in range(5)]
    assert lines == [
        "files     code: 5 files, 0.0 MB; left out: 2 duplicates, 1 binary, 1 damaged, 1 empty, "
        "1 not UTF-8, 1 unreadable"
    ]
    assert "# München\n" in documents(load("code", say=Lines(), encoding="latin-1"))
    assert "# M\ufffdnchen\n" in documents(load("code", say=Lines(), errors="replace"))


@given(PATHS, PATHS)
def test_a_file_stays_on_its_side_when_others_are_added(paths: list[str], new: list[str]) -> None:
    """Unless it is on its side only because that would have been empty."""
    val = val_files(paths)
    assert val <= {*paths}
    assert 0 < len(val) < len(paths) or len(paths) < 2
    share = {p: int(hashlib.sha256(p.encode()).hexdigest()[:12], 16) / 16**12 for p in paths}
    natural = {p for p in paths if share[p] < 0.1}
    if 0 < len(natural) < len(paths):
        assert val == natural
        assert val_files([*{*paths, *new}]) & {*paths} == natural


def test_the_digest_depends_on_every_file_and_the_split_and_on_nothing_else(folder) -> None:
    write("a", source(30))
    write("b/a", dict(reversed(source(30).items())))
    digest = load("a", say=Lines()).sha256
    assert load("b/a", say=Lines()).sha256 == digest
    write("a", {"sub/3.py": "changed\n"})
    assert load("a", say=Lines()).sha256 != digest
    Path("b/a/sub/3.py").rename("b/a/sub/x.py")
    assert load("b/a", say=Lines()).sha256 != digest
    splits = (((b"aa",), (b"b",)), ((b"b",), (b"aa",)))
    assert len({Corpus("x", *split, {"a": "1", "b": "2"}).sha256 for split in splits}) == 2


def test_a_single_file_is_like_one_text() -> None:
    write("code", {"only.py": "é" * 10, "copy.py": "é" * 10})
    assert load("code", say=Lines()) == Corpus("code", ("é".encode() * 9,), ("é".encode(),))


@pytest.mark.parametrize(
    ("include", "found"),
    [
        (["*.js"], ["a.js", "web/b.js"]),
        ([".js"], ["a.js", "web/b.js"]),
        (["*.js", "*.md"], ["a.js", "c.md", "web/b.js"]),
        (["web/*"], ["web/b.js", "web/x.gz"]),
        (["Makefile", "a.*"], ["Makefile", "a.js", "a.py"]),
        (["*.gz"], ["web/x.gz"]),
    ],
)
def test_include_selects_files_by_name_or_path(include: list[str], found: list[str]) -> None:
    names = ["a.js", "a.py", "c.md", "web/b.js", "Makefile"]
    write("code", {name: name for name in names} | {"web/x.gz": gzip.compress(b"packed")})
    corpus = load("code", say=Lines(), include=include)
    if len(found) == 1:
        assert corpus.text == "packed"
    else:
        assert [*corpus.files] == found


def test_a_folder_without_text_is_refused(folder) -> None:
    write("code", {"a.js": "a", "b.js": "b", "c.md": "c", ".x/d.py": "d"})
    refused("code", "'code' has no file *.py: --include '*.js' finds 2, '*.md' finds 1")
    refused("code", "no file *.rs or *.go: --include", include=[".rs", "*.go"])
    write("empty/sub", {"Makefile": "all:"})
    refused("empty", "has no file *.py: no other file has a suffix")
    write("blank", {"a.py": " \n", "b.py": b"\0"})
    refused("blank", "no text in the files", "1 empty", "1 binary")
    write("", {"file.txt": "text"})
    refused("file.txt", "--include is for folders", include=["*.js"])


def test_a_folder_with_the_run_itself_is_refused(folder) -> None:
    write("code", source(3))
    os.symlink("code", "link")
    for run in ("code/runs/a", "code", "link/run"):
        for data in ("code", "link", str(folder / "code/../code")):
            refused(data, "contains the run's own folder", repr(run), "--out", exclude=Path(run))
    assert load("code", say=Lines(), exclude=Path("code-run")).files


def test_several_sources_are_joined_without_duplicates() -> None:
    write("code", source(20))
    write("other/code", source(20, first=10))
    write("", {"a.txt": "0123456789", "copy.txt": "0123456789"})
    lines = Lines()
    corpus = load(["a.txt", "code", "other/code", "copy.txt"], say=lines)
    code, text = load("code", say=Lines()), load("a.txt", say=Lines())
    assert corpus.name == "a+code+code"
    assert corpus.train[: 1 + len(code.train)] == text.train + code.train
    assert corpus.val[: 1 + len(code.val)] == text.val + code.val
    assert len(corpus.files) == 31
    assert corpus.files["a-1"] == text.sha256
    assert corpus.files["code-2/sub/3.py"] == code.files["sub/3.py"]
    assert "code-3/sub/20.py" in corpus.files
    assert "10 duplicates" in lines[1]
    assert lines[2] == "warning: all text of copy is in the data before it: it is left out"
    assert load(["a.txt", "copy.txt"], say=Lines()) == load(["a.txt"], say=Lines()) == text
    orders = (["a.txt", "code"], ["code", "a.txt"])
    assert len({load(order, say=Lines()).sha256 for order in orders}) == 2


def test_a_large_text_among_several_is_one_document() -> None:
    text = "Well, Prince.\n" * 20_000
    write("", {"a.txt": text, "b.txt": "x" * 10})
    corpus = load(["a.txt", "b.txt"], say=Lines())
    assert [*map(len, corpus.train)] == [252_000, 9]
    assert corpus.text == text[:252_000] + "x" * 9 + text[252_000:] + "x"


def test_the_name_of_many_sources_is_short() -> None:
    for i in range(9):
        write("", {f"a-long-name-{i}.txt": f"text {i} {i}"})
    corpus = load([f"a-long-name-{i}.txt" for i in range(9)], say=Lines())
    assert corpus.name == "a-long-name-0+8-more"
    assert len(corpus.train) == len(corpus.val) == len(corpus.files) == 9


def test_built_in_texts_are_utf_8_whatever_encoding_is_given(monkeypatch) -> None:
    monkeypatch.setattr("pydoc_data.topics.topics", {"a": "“docs”"})
    write("", {"ru.txt": "Все счастливые".encode("cp1251")})
    corpus = load(["python-docs", "ru.txt"], say=Lines(), encoding="cp1251")
    assert [part.decode() for part in corpus.train] == ["“docs", "Все счастлив"]
    assert corpus.name == "python-docs+ru"


def test_home_is_expanded_and_gzip_unpacked(monkeypatch, folder) -> None:
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.setenv("USERPROFILE", str(folder / "home"))
    write("home", {"book.txt.gz": gzip.compress("naïve Prince\r\n".encode())})
    corpus = load("~/book.txt.gz", say=Lines())
    assert (corpus.name, corpus.text) == ("book", "naïve Prince\n")
    refused("~/none.txt", "no file '~/none.txt'")


def test_standard_input_is_a_text(monkeypatch) -> None:
    for raw in ("naïve\r\n".encode("utf-16"), gzip.compress("naïve\n".encode())):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        corpus = load("-", say=Lines())
        assert (corpus.name, corpus.text) == ("stdin", "naïve\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    refused("-", "the standard input is empty")
    monkeypatch.setattr(sys, "stdin", stream := io.StringIO("naïve\n"))  # it has no bytes
    assert load("-", say=Lines()).text == "naïve\n"
    stream.close()
    for closed in (stream, None):
        monkeypatch.setattr(sys, "stdin", closed)
        refused("-", "the standard input is closed")


def test_a_text_over_the_limit_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(folder_module, "MAX_BYTES", 100)
    write("", {"a.txt": "a" * 60, "b.txt": "b" * 60, "c.txt.gz": gzip.compress(b"c" * 200)})
    refused(["a.txt", "b.txt"], "the text up to 'b.txt' is larger than")
    refused("c.txt.gz", "'c.txt.gz' is larger than", "use a part of it")


def test_python_packages_are_the_larger_packages_without_tests(monkeypatch, folder) -> None:
    big = {f"big/{i}.py": f"# {i}\n" + "x = 1\n" * 2000 for i in range(100)}
    tests = {"big/tests/test_a.py": "no\n", "big/test_b.py": "no\n", "big/conftest.py": "no\n"}
    write("site", big | tests | {"big/__init__.py": "\n", "small/__init__.py": "s = 1\n"})
    write("site", {"six.py": "x = 1\n" * 10**6, "data/x.py": "x = 1\n" * 10**6})
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folder / "site"))
    lines = Lines()
    corpus = load("python-packages", say=lines)
    assert corpus.name == "python-packages"
    assert {*corpus.files} == {*big}
    assert lines[0] == "packages  big 1.2: 1.2 MB in total"
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folder / "nowhere"))
    refused("python-packages", "no package", "--data python-code")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_loading_takes_about_twice_the_size_of_the_text(kind: str) -> None:
    words = random.Random(0)
    text = [f"{words.getrandbits(400):x}\n" * 2000 for _ in range(40)]  # 200 kB each
    if kind == "folder":
        write("code", {f"{i}.py": part for i, part in enumerate(text)})
    else:
        write("", {"code": "".join(text)})
    size = sum(map(len, text))
    del text
    tracemalloc.start()
    corpus = load("code", say=Lines())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert corpus.n_bytes == size
    assert peak < (1.2 if kind == "folder" else 2.2) * size

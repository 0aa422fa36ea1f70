"""Runs on folders and on several texts, or with --val: what they store, and resuming them."""

import dataclasses
import io
import json
import math
import sys
from pathlib import Path

import pytest
from book_server import Lines, refused
from conftest import TINY, Result, assert_mistake, assert_refused

from irongpt.config import DataConfig
from irongpt.data.corpus import load
from irongpt.data.tokenizer import CharTokenizer
from irongpt.data.tokens import encode
from irongpt.errors import UserError
from irongpt.files import sealed
from irongpt.runs.run_folder import open_run

FLAGS = [x for x in TINY if x not in ("--data", "text.txt")] + ["--iters", "2"]
VAL = "alike families, happy: naïve\r\n" * 20


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory, with code/ and val.txt."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code").mkdir()
    for i in range(30):
        (tmp_path / f"code/{i}.py").write_text(f"print({i})\n" * 20)
    (tmp_path / "val.txt").write_bytes(VAL.encode("utf-16"))
    return tmp_path


def test_a_run_on_a_folder_is_resumed_by_its_name_alone(cli, tmp_path, monkeypatch) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 50)
    texts = ["--data", "code", "--data", "latin.txt", "--encoding", "latin-1"]
    cli("train", *FLAGS, *texts, "--include", "*.py", "--out", "run")
    data = open_run(tmp_path / "run").config.data
    sources = (str(tmp_path / "code"), str(tmp_path / "latin.txt"))
    assert data == DataConfig(sources, ("*.py",), "latin-1", "strict")
    files = json.loads((tmp_path / "run/files.json").read_text())["files"]
    assert len(files) == 31
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    cli("train", "--resume", "../run", "--iters", 3)
    assert open_run(tmp_path / "run").config.data == data
    message = "not the text that ../run is trained on: 1 changed (latin)"
    assert_mistake(cli, message, "train", "--resume", "../run", "--encoding", "cp1251")


def test_a_resumed_run_names_the_files_that_differ(cli, folder) -> None:
    code = folder / "code"
    cli("train", *FLAGS, "--data", "code", "--out", "run")
    (code / "3.py").write_text("changed\n")
    (code / "x.py").write_text("new\n")
    for i in range(10, 15):
        (code / f"{i}.py").unlink()
    differ = "1 new (x.py); 5 removed (10.py, 11.py, 12.py, ...); 1 changed (3.py)"
    message = f"is not the text that run is trained on: {differ}: give that text"
    assert_refused(cli, message, "train", "--resume", "run", "--iters", 3)
    (folder / "run/files.json").write_bytes(b"{}")
    assert_mistake(cli, "run/files.json is damaged", "train", "--resume", "run")


def test_a_run_of_one_text_has_no_list_of_files(cli, tmp_path, run) -> None:
    """And its config.json may name the text as earlier versions did."""
    assert not (tmp_path / run / "files.json").exists()
    config = tmp_path / run / "config.json"
    values = json.loads(config.read_text())
    values.pop("sha256")
    config.write_bytes(sealed({**values, "data": str(tmp_path / "text.txt")}))
    cli("train", "--resume", run, "--iters", 31)
    assert json.loads(config.read_text())["data"]["sources"] == [str(tmp_path / "text.txt")]
    (tmp_path / "other.txt").write_text("another text " * 50)
    message = "not among the 16 of the vocabulary"
    assert_mistake(cli, message, "train", "--resume", run, "--data", "other.txt")
    good = dataclasses.asdict(DataConfig(("text.txt",)))
    changes = ({"x": 1}, {"sources": []}, {"sources": "ab"}, {"sources": [1]}, {"include": 3})
    changes += ({"encoding": 1}, {"encoding": 0}, {"val": False})
    for data in (1, [], {}, *(good | change for change in changes)):
        config.write_bytes(sealed({**values, "data": data}))
        assert_mistake(cli, "does not describe a run", "train", "--resume", run)


def test_a_run_from_standard_input_asks_for_its_text(cli, tmp_path, monkeypatch) -> None:
    def train(*args: object, code: int = 0) -> Result:
        content = io.BytesIO((tmp_path / "text.txt").read_bytes())
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(content))
        return cli("train", *args, code=code)

    train(*FLAGS, "--data", "-", "--out", "run")
    assert_mistake(train, "from the standard input: give that text with --data", "--resume", "run")
    for data in ("-", "text.txt"):
        train("--resume", "run", "--data", data)
    assert open_run(tmp_path / "run").config.data.sources == (str(tmp_path / "text.txt"),)


def test_all_of_the_data_is_for_training() -> None:
    Path("a.txt").write_text("0123456789")
    val = VAL.replace("\r", "").encode()
    corpus = load("a.txt", say=Lines(), val="val.txt")
    assert (corpus.name, corpus.train, corpus.val) == ("a", (b"0123456789",), (val,))
    assert [*corpus.files] == ["a", "val/val"]
    corpus = load(["code", "a.txt"], say=Lines(), val="val.txt")
    assert (len(corpus.train), corpus.val) == (31, (val,))
    digests = {load("a.txt", say=Lines(), val=v).sha256 for v in (None, "val.txt", "code")}
    assert len(digests) == 3
    assert len(load("a.txt", say=Lines(), val="code").val) == 30


def test_files_of_the_data_with_the_same_text_are_left_out() -> None:
    lines = Lines()
    corpus = load("code", say=lines, val="code/3.py")
    assert (len(corpus.train), len(corpus.val)) == (29, 1)
    assert "left out: 1 duplicates" in lines[-1]
    refused("val.txt", "all text of --data is in --val too", val="val.txt")


def test_a_wrong_text_is_refused_as_that_of_data(cli, folder) -> None:
    (folder / "short.txt").write_text("abc")
    for val, message in (
        ("none.txt", "no file 'none.txt'"),
        ("-", "--val cannot be read from the standard input"),
        ("short.txt", "4 of them for validation, but one sequence needs 17: use a longer text (--"),
        (".", "contains the run's own folder"),
    ):
        data = ["--data", "code", "--val", val, "--out", "run"]
        assert_refused(cli, message, "train", *FLAGS, *data)
    assert_refused(cli, "--val must come with --data", "train", *FLAGS, "--val", "val.txt")


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_run_is_validated_on_it_and_resumed(cli, folder, monkeypatch, kind: str) -> None:
    size = ["--vocab-size", 320] if kind == "bpe" else []
    words = ("".join(chr(97 + i * k % 26) for k in range(2, 9)) for i in range(300))
    (folder / "text.txt").write_text(" ".join(words))
    text = ["--data", "text.txt", "--val", "val.txt"]
    result = cli("train", *FLAGS, *text, "--tokenizer", kind, *size, "--out", "run")
    n_bytes = len(VAL.replace("\r", "").encode())
    [line] = [line for line in result.out.splitlines() if line.startswith("val text")]
    assert line.startswith(f"val text  val.txt: {n_bytes:,} bytes; ")
    tokens = int(line.split()[-2].replace(",", ""))
    values = json.loads((folder / "run/result.json").read_text())
    bits = values["val_loss"] * (tokens - 1) / math.log(2) / n_bytes  # but <|endoftext|>
    assert values["bits_per_byte"] == pytest.approx(bits)
    assert open_run(folder / "run").config.data.val == str(folder / "val.txt")
    monkeypatch.chdir(folder / "code")
    again = cli("train", "--resume", "../run", "--iters", 3)
    assert f"val text  {folder / 'val.txt'}: {n_bytes:,} bytes" in again.out
    monkeypatch.chdir(folder)
    (folder / "val.txt").write_text("happy families are alike: naïve\n" * 30)
    message = "is not the text that run is trained on: 1 changed (val/val)"
    assert_mistake(cli, message, "train", "--resume", "run", "--iters", 4)
    other = cli("train", "--resume", "run", "--iters", 4, "--val", "val.txt")
    assert "val.txt is not the text that run was trained on: the run continues" in other.out


def test_a_run_on_one_text_may_get_its_own_validation_text(cli, run):
    """But its vocabulary has no sign for the start of a document, which several need."""
    Path("words.txt").write_text(Path("text.txt").read_text()[:225])
    words = ["--val", "words.txt"]
    result = cli("train", "--resume", run, "--iters", 32, *words)
    assert "val text  words.txt: 225 bytes; 225 tokens" in result.out
    message = "made for a single text and this one has several documents, or the reverse: start a"
    assert_mistake(cli, message, "train", "--resume", run, "--data", "code")
    text = load("text.txt", say=print)
    with pytest.raises(UserError, match=message):
        encode(text, CharTokenizer.from_text([text.text], documents=True))

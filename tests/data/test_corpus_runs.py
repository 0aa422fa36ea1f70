"""Runs on folders and on several texts: what they store, and what `--resume` checks."""

import dataclasses
import io
import json
import sys
from pathlib import Path

import pytest
from conftest import TINY, Cli, assert_mistake, assert_refused

from irongpt.config import DataConfig
from irongpt.files import sealed
from irongpt.runs.run_folder import open_run

FLAGS = [x for x in TINY if x not in ("--data", "text.txt")] + ["--iters", "2"]


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "code").mkdir()
    for i in range(30):
        (tmp_path / f"code/{i}.py").write_text(f"print({i})\n" * 20)
    return tmp_path / "code"


def test_a_run_on_a_folder_is_resumed_by_its_name_alone(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: Path
) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 50)
    texts = ["--data", "code", "--data", "latin.txt", "--encoding", "latin-1"]
    assert cli("train", *FLAGS, *texts, "--include", "*.py", "--out", "run").code == 0
    data = open_run(tmp_path / "run").config.data
    sources = (str(code), str(tmp_path / "latin.txt"))
    assert data == DataConfig(sources, ("*.py",), "latin-1", "strict")
    files = json.loads((tmp_path / "run/files.json").read_text())["files"]
    assert len(files) == 31
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli("train", "--resume", "../run", "--iters", 3).code == 0
    assert open_run(tmp_path / "run").config.data == data
    result = cli("train", "--resume", "../run", "--encoding", "cp1251")
    assert_mistake(result, "not the text that ../run is trained on: 1 changed (latin)")


def test_a_resumed_run_names_the_files_that_differ(cli: Cli, tmp_path: Path, code: Path) -> None:
    assert cli("train", *FLAGS, "--data", "code", "--out", "run").code == 0
    (code / "3.py").write_text("changed\n")
    (code / "x.py").write_text("new\n")
    for i in range(10, 15):
        (code / f"{i}.py").unlink()
    differ = "1 new (x.py); 5 removed (10.py, 11.py, 12.py, ...); 1 changed (3.py)"
    message = f"is not the text that run is trained on: {differ}: give that text"
    assert_refused(cli, message, "train", "--resume", "run", "--iters", 3)
    (tmp_path / "run/files.json").write_bytes(b"{}")
    assert_mistake(cli("train", "--resume", "run"), "run/files.json is damaged")


def test_a_run_of_one_text_has_no_list_of_files(cli: Cli, tmp_path: Path, run: str) -> None:
    """And its config.json may name the text as earlier versions did."""
    assert not (tmp_path / run / "files.json").exists()
    config = tmp_path / run / "config.json"
    values = json.loads(config.read_text())
    values.pop("sha256")
    config.write_bytes(sealed({**values, "data": str(tmp_path / "text.txt")}))
    assert cli("train", "--resume", run, "--iters", 31).code == 0
    assert json.loads(config.read_text())["data"]["sources"] == [str(tmp_path / "text.txt")]
    (tmp_path / "other.txt").write_text("another text " * 50)
    result = cli("train", "--resume", run, "--data", "other.txt")
    assert_mistake(result, "not among the 16 of the vocabulary")
    good = dataclasses.asdict(DataConfig(("text.txt",)))
    changes = ({"x": 1}, {"sources": []}, {"sources": "ab"}, {"sources": [1]}, {"include": 3})
    changes += ({"encoding": 1}, {"encoding": 0}, {"val": False})
    for data in (1, [], {}, *(good | change for change in changes)):
        config.write_bytes(sealed({**values, "data": data}))
        assert_mistake(cli("train", "--resume", run), "does not describe a run")


def test_a_run_from_standard_input_asks_for_its_text(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*args: object) -> object:
        content = io.BytesIO((tmp_path / "text.txt").read_bytes())
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(content))
        return cli("train", *args)

    assert train(*FLAGS, "--data", "-", "--out", "run").code == 0
    assert_mistake(train("--resume", "run"), "from the standard input: give that text with --data")
    for data in ("-", "text.txt"):
        assert train("--resume", "run", "--data", data).code == 0
    assert open_run(tmp_path / "run").config.data.sources == (str(tmp_path / "text.txt"),)

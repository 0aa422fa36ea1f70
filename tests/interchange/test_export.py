"""`irongpt export`: transformers loads the folder, and computes what our model computes."""

import argparse
import json
import logging
import os
import shutil
import socket
import string
from pathlib import Path
from typing import NamedTuple
from unittest.mock import Mock

import pytest
import torch
from conftest import TINY, assert_refused, make_quick
from run_helpers import change
from safetensors import safe_open

from irongpt import files
from irongpt.cli import main
from irongpt.data import corpus
from irongpt.generation.sample import trained_model
from irongpt.runs import checkpoint

transformers = pytest.importorskip("transformers")

CODE = Path(argparse.__file__).read_text()


class Exported(NamedTuple):
    run: Path
    folder: Path
    text: str  # part of War and Peace

    @property
    def ours(self):
        return trained_model(self.run, "best", "eager", "cpu")


@pytest.fixture(scope="module", params=["char", "bpe"])
def exported(request, tmp_path_factory) -> Exported:
    """A run whose text has all printable ASCII characters, code and prose, and its export."""
    folder = tmp_path_factory.mktemp(request.param)
    book = corpus.load("war-and-peace", say=print).text[100_000:400_000]
    (folder / "text.txt").write_text(string.printable + CODE + book)
    size = ["--vocab-size", "1024"] if request.param == "bpe" else []
    flags = ["--iters", "20", "--tokenizer", request.param, *size, "--out", "run"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_quick(patch)
        assert main(["train", *TINY, *flags]) == 0
        assert main(["export", "run", "exported"]) == 0
    return Exported(folder / "run", folder / "exported", book)


@pytest.fixture
def complaints(monkeypatch) -> list[str]:
    """The warnings that transformers logs, and its attempts to reach a network."""
    found: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "handlers", [Handler(logging.WARNING)])
    monkeypatch.setattr(socket.socket, "connect", lambda *args: found.append(f"connect {args}"))
    return found


def theirs(folder: Path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.mark.filterwarnings("error")
def test_transformers_loads_the_folder_and_has_the_same_logits(exported, complaints) -> None:
    model, tokenizer = exported.ours
    reference = theirs(exported.folder)
    ids = tokenizer.encode(exported.text[:200])[None, : model.config.context]
    with torch.no_grad():
        logits, expected = model(ids), reference(ids).logits
    assert complaints == []
    assert type(reference).__name__ == "GPT2LMHeadModel"
    assert logits.std() > 0.1  # so 1e-4 is small
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("error")
def test_the_tokenizer_of_transformers_has_the_same_ids(exported, complaints) -> None:
    _, tokenizer = exported.ours
    reference = transformers.AutoTokenizer.from_pretrained(exported.folder)
    for text in ["", " ", "\r\n\t \n", string.printable, CODE, exported.text]:
        if tokenizer.end is None:
            text = text.replace("\r", "")  # a text is read without it, so it is no token
        ids = tokenizer.encode(text).tolist()
        found = reference.backend_tokenizer.encode(text).ids  # no warning about the length
        assert found == ids, text[:100]
        assert reference.decode(ids) == text
    assert complaints == []
    assert reference.eos_token_id == tokenizer.end


@pytest.mark.filterwarnings("error")
def test_transformers_generates_as_the_model_card_shows(exported, complaints, capsys) -> None:
    card = (exported.folder / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    path = repr(str(exported.folder))
    namespace: dict = {}
    torch.manual_seed(0)
    exec(code.replace('"exported"', path).replace('"run"', path), namespace)
    assert complaints == []
    assert len(capsys.readouterr().out) >= 10
    model, _ = exported.ours
    assert namespace["model"].config.n_positions == model.config.context
    assert f"{model.config.vocab_size:,} " in card
    assert "step 20 of 20" in card
    record = json.loads((exported.run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"{record['val_loss']:.4f} on validation text" in card
    assert "bits per byte" in card
    assert str(exported.run.parent) not in card  # a path of the user's machine


def test_float16(exported, tmp_path) -> None:
    assert main(["export", str(exported.run), str(tmp_path / "half"), "--dtype", "float16"]) == 0
    with safe_open(tmp_path / "half/model.safetensors", "pt") as file:
        assert {file.get_tensor(k).dtype for k in file.keys()} == {torch.float16}  # noqa: SIM118
    reference = theirs(tmp_path / "half")
    assert reference.dtype == torch.float16
    model, _ = exported.ours
    ids = torch.arange(16)[None]
    with torch.no_grad():
        logits, expected = model(ids), reference.float()(ids).logits
    torch.testing.assert_close(logits, expected, atol=2e-2, rtol=0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("run full", "full exists and is not empty"),
        ("run text.txt", "text.txt exists and is not empty"),
        ("run text.txt/folder", "cannot write a model at text.txt/folder"),
        ("nowhere new", "it has no config.json"),
        ("empty new", "empty has no checkpoint best: train it first"),
        ("empty new --checkpoint last", "empty has no checkpoint last: train it first"),
        ("damaged new", "model.safetensors is damaged"),
        ("run new --dtype int8", "--dtype"),
    ],
    ids=lambda v: v[:30],
)
def test_a_mistake_writes_nothing(cli, tmp_path, run, args, message) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("kept")
    shutil.copytree("run", "empty", ignore=shutil.ignore_patterns("best", "last"))
    shutil.copytree("run", "damaged")
    with open("damaged/best/model.safetensors", "ab") as file:
        file.write(b"x")
    assert_refused(cli, message, "export", *args.split())


def test_a_full_disk_leaves_nothing(cli, run, monkeypatch) -> None:
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr("irongpt.interchange.export.write", full)
    assert_refused(cli, "No space left on device", "export", run, "deep/new")


def test_an_empty_folder_stays_empty_if_its_files_cannot_be_moved(cli, tmp_path, run, monkeypatch):
    (tmp_path / "new").mkdir()
    moves = [os.rename, Mock(side_effect=OSError(28, "No space left on device"))]
    monkeypatch.setattr(files.os, "rename", lambda *names: moves.pop(0)(*names))
    assert_refused(cli, "No space left on device", "export", run, "new")


def test_names_that_are_not_utf_8_get_question_marks(cli, tmp_path, run) -> None:
    name = os.fsdecode(b"caf\xe9")
    os.rename(run, name)
    change(data=name)(tmp_path / name / "config.json")
    cli("export", name, "new")
    card = (tmp_path / "new/README.md").read_text()
    assert "\n# caf?\n" in card
    assert "| Text | caf? " in card


@pytest.mark.parametrize("folder", [".", "link", "new"])
def test_an_empty_folder_is_filled_and_not_replaced(cli, tmp_path, monkeypatch, run, folder):
    """A mount point cannot be replaced, nor a link or the working directory."""
    (tmp_path / "new").mkdir()
    os.symlink("new", tmp_path / "link")
    before = (tmp_path / "new").stat().st_ino
    if folder == ".":
        monkeypatch.chdir("new")
    cli("export", tmp_path / run, folder)
    assert (tmp_path / "new").stat().st_ino == before
    assert {p.name for p in (tmp_path / "new").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "README.md",
    }  # fmt: skip


def test_a_run_without_an_evaluation(cli, tmp_path, run) -> None:
    shutil.rmtree("run/best")
    result = cli("export", run, "new")
    assert "using its last checkpoint" in result.err
    step = checkpoint.load(tmp_path / "run/last")[3]["step"]
    assert f"step {step} of" in (tmp_path / "new/README.md").read_text()

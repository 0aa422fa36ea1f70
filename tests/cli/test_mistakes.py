"""Every mistake of a user's: one line on stderr, exit code 2, nothing written or lost."""

import json
import os

import pytest
from conftest import TINY, assert_mistake
from irongpt_kernels.runtime import launch

from irongpt.files import sealed
from irongpt.runs import checkpoint


def tree(folder) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


BAD_FLAGS = [
    (["--n-layer", "-1"], "--n-layer must be at least 1"),
    (["--n-embd", "0"], "--n-embd must be at least 1"),
    (["--n-head", "3"], "--n-embd 16 does not divide by --n-head 3"),
    (["--context", "0"], "--context must be at least 1"),
    (["--dropout", "1"], "--dropout must be in [0, 1)"),
    (["--batch-size", "-4"], "--batch-size must be at least 1"),
    (["--grad-accum", "0"], "--grad-accum must be at least 1"),
    (["--iters", "0"], "--iters must be at least 1"),
    (["--iters", "many"], "--iters"),
    (["--lr", "nan"], "--lr"),
    (["--lr", "-1"], "--lr must be above 0"),
    (["--seed", "-1"], "--seed must be in"),
    (["--n-embd", str(2**40), "--n-head", "1"], "--n-embd must be at most 10^9"),
    (["--n-embd", str(2**28)], "is too large"),
    (["--context", "5000"], "use a longer text or a shorter --context"),
    (["--device", "tpu"], "--device must be"),
    (["--device", "cuda:7"], "--device"),
    (["--ops", "magic"], "--ops"),
    (["--fused", "--n-head", "1"], "--fused needs an NVIDIA GPU"),
    (["--preset", "giant"], "--preset"),
    (["--frobnicate"], "--frobnicate"),
    (["--ite", "5"], "--ite"),
    (["--data", "nowhere.txt"], "nowhere.txt"),
    (["--data", "empty.txt"], "empty.txt"),
    (["--data", "binary.bin"], "binary.bin"),
    (["--data", "short.txt"], "the corpus has"),
    (["--data", "."], "."),
    (["--out", "text.txt"], "--out text.txt exists"),
    (["--out", "full"], "--out full exists"),
    (["--out", "text.txt/run"], "cannot write a run at text.txt/run"),
    (["--out", "new/" + "x" * 300], "cannot write a run at"),
    (["--resume", "nowhere"], "nowhere is not an IronGPT run"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS, ids=lambda v: " ".join(v)[:30])
def test_a_mistake_is_one_line_and_leaves_nothing(cli, tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("to be or not")
    (tmp_path / "binary.bin").write_bytes(bytes(range(256)) * 50)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    before = sorted(tmp_path.rglob("*"))
    assert_mistake(cli("train", *TINY, *flags), message)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("args", [[], ["dance"], ["generate"], ["train", "extra"]])
def test_a_mistake_in_the_command_itself(cli, args):
    assert_mistake(cli(*args), "--help")


def reseal(path, change) -> None:
    values = json.loads(path.read_bytes())
    del values["sha256"]
    change(values)
    path.write_bytes(sealed(values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "config.json").unlink(), "is not an IronGPT run"),
        (lambda run: (run / "config.json").write_text("{}"), "config.json is damaged"),
        (
            lambda run: reseal(run / "config.json", lambda c: c.update(format=2)),
            "config.json does not describe a run: IronGPT",
        ),
        (
            lambda run: reseal(run / "config.json", lambda c: c["model"].update(n_layer=-2)),
            "--n-layer must be at least 1",
        ),
        (
            lambda run: reseal(run / "config.json", lambda c: c["model"].update(n_embd=10**4)),
            "is of another model",
        ),
        (
            lambda run: reseal(run / "config.json", lambda c: c["model"].update(n_layer="2")),
            "n_layer of a GPTConfig cannot be '2'",
        ),
        (
            lambda run: reseal(run / "config.json", lambda c: c["model"].update(vocab_size=9)),
            "is of another vocabulary",
        ),
        (lambda run: (run / "last/model.safetensors").unlink(), "cannot read"),
        (
            lambda run: (run / "last/model.safetensors").write_bytes(b"\xff" * 8 + b"{}"),
            "model.safetensors is damaged",
        ),
        (
            lambda run: (run / "last/tokenizer.json").write_text('{"kind": "char", "chars": "ab"}'),
            "tokenizer.json is damaged",
        ),
        (lambda run: (run / "last/state.json").write_text("{"), "state.json is damaged"),
        (
            lambda run: reseal(run / "last/state.json", lambda s: s.pop("best_val")),
            "last is damaged",
        ),
        (
            lambda run: reseal(run / "last/state.json", lambda s: s.update(step="9")),
            "last is damaged",
        ),
        (lambda run: (run / "../text.txt").write_text("another text\n" * 500), "is not the text"),
        (lambda run: (run / "../text.txt").unlink(), "text.txt"),
    ],
)
def test_a_run_that_cannot_be_taken_up(cli, tmp_path, run, damage, message):
    damage(tmp_path / run)
    before = tree(tmp_path)
    assert_mistake(cli("train", "--resume", run, "--iters", 60), message)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "flags", [["--lr", "0.5"], ["--n-layer", "3"], ["--preset", "iron"], ["--out", "other"]]
)
def test_what_a_resumed_run_cannot_change(cli, tmp_path, run, flags):
    before = tree(tmp_path)
    assert_mistake(cli("train", "--resume", run, *flags), flags[0])
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "a☃"], "the character '☃' (U+2603)"),
        (["--prompt", "a\x07"], "(U+0007)"),
        (["--prompt-file", "nowhere"], "cannot read the prompt file nowhere"),
        (["--prompt-file", "."], "cannot read the prompt file"),
        (["--prompt-file", "latin"], "latin is not UTF-8"),
        (["--prompt", "a", "--prompt-file", "text.txt"], "not allowed with"),
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--top-k", "0"], "--top-k must be at least 1"),
        (["--top-p", "0"], "--top-p must be in (0, 1]"),
        (["--top-p", "1.1"], "--top-p"),
        (["--tokens", "-1"], "--tokens"),
        (["--seed", "-1"], "--seed"),
        (["--checkpoint", "first"], "--checkpoint"),
        (["--fused", "--device", "cpu"], "--fused"),
    ],
    ids=lambda v: " ".join(v)[:30],
)
def test_a_mistake_in_generate(cli, tmp_path, monkeypatch, run, flags, message):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    assert_mistake(cli("generate", run, *flags), message)


def test_generate_from_something_that_is_no_run(cli):
    for path in ("nowhere", ".", "text.txt"):
        assert_mistake(cli("generate", path), f"{path} is not an IronGPT run")


def test_a_full_disk_while_saving_keeps_the_checkpoint_before(cli, tmp_path, monkeypatch, run):
    before = (tmp_path / run / "last/state.json").read_bytes()

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write", full)
    result = cli("train", "--resume", run, "--iters", 40)
    assert_mistake(result, "No space left on device")
    assert "--resume run" in result.err
    assert (tmp_path / run / "last/state.json").read_bytes() == before
    assert not list((tmp_path / run).glob(".*"))
    monkeypatch.undo()
    os.chdir(tmp_path)
    assert cli("train", "--resume", run).code == 0


def test_a_full_disk_at_the_start_leaves_no_folder(cli, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write", full)
    before = sorted(tmp_path.rglob("*"))
    assert_mistake(cli("train", *TINY, "--out", "deep/down/run"), "No space left on device")
    assert sorted(tmp_path.rglob("*")) == before

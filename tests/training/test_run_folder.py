"""The folder of a run: which ones are accepted, its lock, and what is said when it fails."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import TINY, assert_mistake, assert_refused
from run_helpers import change, history, state

from irongpt import files
from irongpt.data import corpus
from irongpt.errors import UserError
from irongpt.runs import lock
from irongpt.runs.run_folder import RunFolder
from irongpt.training.loop import TrainingLoop
from irongpt.training.trainer import Trainer

QUICK = [*TINY, "--iters", "10", "--sample-tokens", "0"]


@pytest.mark.parametrize("out", ["empty", "link", "~/run", "deep/er", "killed", "."])
def test_folders_that_a_run_may_have(cli, tmp_path, monkeypatch, out):
    (tmp_path / "empty/lost+found").mkdir(parents=True)
    (tmp_path / "killed/.new-1234").mkdir(parents=True)
    (tmp_path / "killed/last").mkdir()
    os.symlink("empty", tmp_path / "link")
    monkeypatch.setenv("HOME", str(tmp_path))
    text = str(tmp_path / "text.txt")
    if out == ".":
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
    flags = [text if flag == "text.txt" else flag for flag in QUICK]
    cli("train", *flags, "--out", out)
    folder = Path(out).expanduser()
    assert {p.name for p in folder.iterdir()} - {"lost+found"} == {
        "config.json", "metrics.jsonl", "last", "best", "loss.png", "result.json",
    }  # fmt: skip
    assert_mistake(cli, "--resume", "train", *QUICK, "--out", out)
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("runs", ["file", "read-only", "cannot be made"])
def test_the_default_folder_is_checked_before_the_text_is_read(cli, tmp_path, monkeypatch, runs):
    monkeypatch.setattr(corpus, "load", Mock(side_effect=AssertionError))
    named = tmp_path / "runs"
    if runs == "file":
        named.touch()
    elif runs == "read-only":
        named.mkdir()
    else:
        named = tmp_path
    monkeypatch.setattr(os, "access", lambda path, mode: runs == "file" or path.absolute() != named)
    assert_refused(cli, f"cannot write to {named}: give a folder", "train", *QUICK)


def test_a_default_folder_that_another_process_takes_first(cli, tmp_path, monkeypatch):
    claim, other = RunFolder.claim, []

    def slow(self):
        if not other:
            self.path.mkdir(parents=True)
            other.append(lock.Lock(self.path))
        claim(self)

    monkeypatch.setattr(RunFolder, "claim", slow)
    cli("train", *QUICK)
    assert {p.name for p in (tmp_path / "runs/text-nano").iterdir()} == {".lock"}
    assert (tmp_path / "runs/text-nano-2/config.json").exists()
    other[0].release()


def test_a_signal_while_a_file_is_moved_into_an_empty_folder_leaves_it_empty(tmp_path, monkeypatch):
    rename = os.rename

    def stopped(*names: Path) -> None:
        rename(*names)
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "rename", stopped)
    with pytest.raises(KeyboardInterrupt):
        files.new_folder(tmp_path, "run", lambda folder: (folder / "last").mkdir())
    assert not any(tmp_path.iterdir())


def test_a_folder_that_becomes_read_only_is_one_line(cli, tmp_path, monkeypatch):
    def refuse(method):
        def refused(self, *args, **kwargs):
            if self.name.startswith(".new-") or self.name == "files.json":
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            return method(self, *args, **kwargs)

        return refused

    for name in ("mkdir", "unlink"):
        monkeypatch.setattr(Path, name, refuse(getattr(Path, name)))
    assert_mistake(cli, "Read-only file system", "train", *QUICK, "--out", "run")
    assert not (tmp_path / "run").exists()


def test_a_second_process_is_told_which_one_trains_the_run(cli, tmp_path, run):
    code = "import sys; from irongpt.runs.lock import *; Lock(Path(sys.argv[1])); input()"
    command = [sys.executable, "-c", code, str(tmp_path / run)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    while not (tmp_path / run / ".lock").exists() and process.poll() is None:
        time.sleep(0.01)
    before = history(tmp_path / run)
    message = f"run is trained by process {process.pid} on "
    result = assert_mistake(cli, message, "train", "--resume", run, "--iters", 40)
    assert " since 20" in result.err
    assert history(tmp_path / run) == before
    process.kill()
    process.wait()
    assert (tmp_path / run / ".lock").exists()
    cli("train", "--resume", run, "--iters", 40)  # the lock of a dead process
    assert not (tmp_path / run / ".lock").exists()


@pytest.mark.parametrize("beats", [True, False])
def test_a_process_of_another_machine_lives_while_it_writes(tmp_path, monkeypatch, beats):
    monkeypatch.setattr(lock, "TIMEOUT", 0.5)
    monkeypatch.setattr(lock, "HEARTBEAT", 0.05)
    other = lock.Lock(tmp_path)
    other.owner["boot"] = other.owner["machine"] = "another"
    other._write("w")
    if not beats:
        other.ended.set()
        time.sleep(0.1)
        lock.Lock(tmp_path).release()
    else:
        with pytest.raises(UserError, match="on another since"):
            lock.Lock(tmp_path)
        other.release()


def test_a_process_whose_run_was_taken_over_stops(tmp_path):
    first = lock.Lock(tmp_path)
    with pytest.raises(UserError, match="is trained by process"):
        lock.Lock(tmp_path)  # also of the same process
    first.path.unlink()
    second = lock.Lock(tmp_path)
    with pytest.raises(UserError, match="is trained by process"):
        first.check()
    first.release()
    second.release()
    assert not second.path.exists()


def test_a_beat_that_fails_keeps_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.01)
    first = lock.Lock(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(lock.json, "dumps", full := Mock(side_effect=OSError(28, "No space")))
        while full.call_count < 2:
            time.sleep(0.01)
    with pytest.raises(UserError, match="is trained by process"):
        lock.Lock(tmp_path)
    first.release()


def test_an_empty_lock_is_waited_for_with_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.1)
    (tmp_path / ".lock").touch()
    lock.Lock(tmp_path).release()
    assert capsys.readouterr().out.startswith("waiting   up to ")


def test_a_folder_that_vanished_is_named(cli, tmp_path, monkeypatch):
    step = Trainer.train_step

    def vanish(self):
        os.rename(tmp_path / "run", tmp_path / "moved")
        monkeypatch.setattr(Trainer, "train_step", step)
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", vanish)
    assert_mistake(cli, "the folder run is gone", "train", *QUICK, "--out", "run")


@pytest.mark.parametrize("full", ["run", "cache", "neither"])
def test_the_disk_that_is_full_is_named(tmp_path, monkeypatch, full):
    """A write to Triton's cache fails without a name."""
    for name in ("run", "cache"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "_mount", lambda path: path)
    free = os.statvfs(tmp_path)
    none = os.statvfs_result([*free[:4], 0, *free[5:]])
    monkeypatch.setattr(os, "statvfs", lambda path: none if path.name == full else free)
    named = tmp_path / ("cache" if full == "cache" else "run")
    reason = files.write_error_reason(OSError(28, "No space left on device"), tmp_path / "run")
    assert f"({named} has " in reason
    assert "MB and" in reason


def _full(*args: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "write",
    [
        lambda path: files.write_result(path / "file", b""),
        lambda path: files.new_folder(path / "new", "model", _full),
        lock.Lock,
    ],
    ids=["file", "folder", "lock"],
)
def test_every_message_about_a_full_disk_names_it(tmp_path, monkeypatch, write):
    monkeypatch.setattr(files, "replace_file", _full)
    monkeypatch.setattr(lock.Lock, "_write", _full)
    with pytest.raises(UserError, match=r": No space left on device \(/.* MB and .* files free\)"):
        write(tmp_path)


def test_the_full_disk_of_a_user_without_a_home_is_named(monkeypatch):
    for name in ("HOME", "USERPROFILE", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", Mock(side_effect=KeyError))
    monkeypatch.setattr("tempfile.gettempdir", Mock(side_effect=FileNotFoundError))
    reason = files.write_error_reason(OSError(28, "No space left on device"), Path("run"))
    assert reason.startswith("No space left on device (/")


@pytest.mark.parametrize(("part", "kind"), [("train", "TrainConfig"), ("data", "DataConfig")])
def test_the_field_and_the_version_of_another_config_are_named(cli, tmp_path, part, kind, run):
    values = {"irongpt": "9.0.0", part: {"label_smoothing": 0.1}}
    if part == "data":  # in the fixture's config.json it is a string
        values[part] |= {"sources": ["text.txt"]}
    change(**values)(tmp_path / run / "config.json")
    message = f"fields of its {kind} are unknown: ['label_smoothing']"
    result = assert_mistake(cli, message, "generate", run)
    assert "IronGPT 9.0.0" in result.err


def test_memory_that_is_short_because_of_the_text(cli, monkeypatch):
    fail = Mock(side_effect=MemoryError)
    monkeypatch.setattr("irongpt.training.start.tokenized.tokenize", fail)
    assert_refused(cli, "use a smaller text", "train", *QUICK, "--out", "run")


@pytest.mark.parametrize(
    ("flags", "killed"), [([], 0), ([], 1), (["--iters", 40], 1), (["--patience", 1], 0)], ids=str
)
def test_a_run_continues_with_another_text_and_chooses_best_again(
    cli, tmp_path, run, monkeypatch, flags, killed
):
    """Also if the process ends before its first evaluation on that text."""
    (tmp_path / "other.txt").write_text((tmp_path / "text.txt").read_text()[::-1])
    vocabulary = (tmp_path / run / "last/tokenizer.json").read_bytes()
    change(not_better=1, best_val=0.001)(tmp_path / run / "last/state.json")
    command = ["train", "--resume", run, *flags, "--data", "other.txt"]
    if killed:
        with monkeypatch.context() as patch:
            patch.setattr(TrainingLoop, "fit", Mock(side_effect=KeyboardInterrupt))
            cli(*command, code=130)
        command = command[:-2]
    out = cli(*command).out
    warning = "is not the text that run was trained on: the run continues with it"
    assert (warning in out) == (not killed)
    assert "train nan" not in out
    assert (tmp_path / run / "last/tokenizer.json").read_bytes() == vocabulary
    now, result = state(tmp_path / run), json.loads((tmp_path / run / "result.json").read_bytes())
    assert f"best validation loss {now['best_val']:.4f} at step {now['best_step']}" in out
    assert now["best_step"] == json.loads((tmp_path / run / "best/state.json").read_text())["step"]
    assert result["step"] == now["best_step"] >= 30
    assert result["val_loss"] == pytest.approx(now["best_val"], rel=0.1)
    assert [r["val_loss"] for r in history(tmp_path / run) if r["step"] == 30] > [0.1]
    assert "nothing to do" in cli("train", "--resume", run).out


def test_generate_takes_a_checkpoint_of_a_run(cli, run):
    a, b = (cli("generate", run, "--checkpoint", "last", "--tokens", 9).out for _ in range(2))
    assert a == b == cli("generate", f"{run}/last", "--tokens", 9).out

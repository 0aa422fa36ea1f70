"""A user's mistake gives one line on stderr and exit code 2, and no file is written or lost."""

import os
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import TINY, assert_mistake, assert_refused
from irongpt_kernels.runtime import launch
from run_helpers import REMOVED, change

from irongpt.runs import checkpoint

BAD_FLAGS = [
    ("--n-layer -1", "--n-layer must be at least 1"),
    ("--n-head 3", "--n-embd (16) must be divisible by --n-head (3)"),
    ("--iters many", "--iters"),
    ("--patience 0", "--patience must be at least 1"),
    ("--tokenizer bpe --vocab-size 100", "--vocab-size must be from 257 to 65,536, got 100"),
    ("--tokenizer bpe --vocab-size 65537", "--vocab-size must be from 257"),
    ("--tokenizer bpe --vocab-size 4096", "pairs to merge"),
    ("--vocab-size 512", "--vocab-size is for --tokenizer bpe"),
    (f"--n-embd {2**28}", "is too large"),
    ("--context 5000", "use a longer text (--val or --data) or a shorter --context"),
    ("--device tpu", "--device must be"),
    ("--device cuda:7", "--device"),
    ("--ops magic", "--ops"),
    ("--fused --n-head 1", "--fused needs an NVIDIA GPU"),
    ("--fused", "--fused needs a head dimension of 16, 32, ... or 128"),
    ("--preset giant", "--preset"),
    ("--frobnicate", "--frobnicate"),
    ("--ite 5", "--ite"),
    ("--data nowhere.txt", "nowhere.txt"),
    ("--data short.txt", "the corpus has"),
    ("--data .", "'.' contains the run's own folder"),
    ("--data other --include *.c", "no file *.c"),
    ("--data other --include *.js --out other/run", "contains the run's own folder"),
    ("--data latin.txt", "'latin.txt' is not UTF-8 text: byte 5,003 (line 1,001) is 0xE9"),
    ("--data latin.txt --encoding nonsense", "--encoding 'nonsense'"),
    ("--data latin.txt --errors ignore", "--errors"),
    ("--data -", "the standard input is closed"),
    ("--out text.txt", "--out text.txt exists"),
    ("--out full", "--out full exists"),
    ("--out=", "the name is empty"),
    ("--out dangling", "is a link to a folder that does not exist"),
    ("--out text.txt/run", "cannot write a run at text.txt/run"),
    (f"--out new/{'x' * 300}", "cannot write a run at"),
    ("--out a\0b", "a name cannot have the character U+0000"),
    (f"--shards {10**400}", " ... 0"),  # of a long message, the middle is left out
    ("--resume nowhere", "it has no config.json"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS, ids=lambda v: v[:30])
def test_a_mistake_is_one_line_and_leaves_nothing(cli, tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(sys, "stdin", None)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.js").write_text("text")
    (tmp_path / "latin.txt").write_bytes(b"abcd\n" * 1000 + b"caf\xe9\n")
    (tmp_path / "short.txt").write_text("to be or not")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    base = [x for x in TINY if "--data" not in flags or x not in ("--data", "text.txt")]
    assert_refused(cli, message, "train", *base, *flags.split())


@pytest.mark.parametrize("args", [[], ["dance"], ["generate"], ["train", "extra"]])
def test_a_mistake_in_the_command_itself(cli, args):
    assert_mistake(cli, "--help", *args)


TRAINER, GENERATE = "training.trainer.Trainer", "generation.command.generate"
NEW, RESUMED = ["train", *TINY], "train --resume run --iters 60".split()


@pytest.mark.parametrize(
    ("at", "args", "hint"),
    [
        ("training.start.GPT", NEW, " for 6,736 parameters: start a run with a smaller --n-embd"),
        (f"{TRAINER}.train_step", NEW, ": use a smaller --batch-size with a larger --grad-a"),
        (f"{TRAINER}.train_step", RESUMED, ": start a new run: use a smaller --batch-size with"),
        (GENERATE, ["generate", "run", "--samples", 2], ": use fewer --samples"),
        (GENERATE, ["generate", "run"], ": close other programs, or use a"),
        ("interchange.export.export", ["export", "run", "x"], ": close other programs, or use a"),
    ],
    ids=["model", "step", "resumed", "samples", "sample", "export"],
)
@pytest.mark.usefixtures("run")
def test_out_of_memory_names_flags_that_help_and_that_the_command_takes(
    cli, monkeypatch, at, args, hint
):
    fail = Mock(side_effect=RuntimeError("CUDA out of memory. Tried to allocate 20 GiB"))
    monkeypatch.setattr(f"irongpt.{at}", fail)
    assert_mistake(cli, f"out of memory{hint}", *args)


def test_a_matplotlib_that_cannot_be_imported_is_a_mistake(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    flags = "--device cpu --ops builtin --plot c.png"
    assert_refused(cli, "cannot import matplotlib: Modul", "compare", *flags.split())


def test_a_full_disk_of_another_folder_is_one_line(cli, monkeypatch, run):
    """As when Triton writes to its cache."""
    full = OSError(28, "No space left on device", "/dev/shm/kernel.json")
    monkeypatch.setattr("irongpt.generation.command.generate", Mock(side_effect=full))
    assert_mistake(cli, "cannot write: No space left on device (/dev/shm has ", "generate", run)


def write(data: str):
    return lambda path: path.write_bytes(data.encode("latin-1"))


def pipe(path) -> None:
    path.unlink()
    os.mkfifo(path)


RECORD = '{"step": "1", "train_loss": 1.0, "val_loss": null}\n'
DAMAGES = [
    ("config.json", Path.unlink, "it has no config.json"),
    ("config.json", write("{}"), "config.json is damaged"),
    ("config.json", change(format=2), "config.json does not describe a run"),
    ("config.json", change(model={"n_layer": -2}), "--n-layer must be at least 1"),
    ("config.json", change(model={"n_embd": 10**4}), "has another model"),
    ("config.json", change(model={"n_layer": "2"}), "n_layer of a GPTConfig cannot be '2'"),
    ("config.json", change(model={"vocab_size": 9}), "has another vocabulary"),
    ("last/model.safetensors", write("\xff" * 8 + "{}"), "model.safetensors is damaged"),
    ("last/tokenizer.json", write('{"kind": "char", "chars": "ab"}'), "tokenizer.json is damaged"),
    ("last/state.json", change(best_val=REMOVED), "last is damaged"),
    ("last/state.json", change(step="9"), "last is damaged"),
    ("last/state.json", change(step=-1, evaluated_at=-1), "last is damaged"),
    ("last/state.json", change(seconds=None), "last is damaged"),
    ("last/state.json", change(seconds=float("nan")), "last is damaged"),
    ("last/state.json", change(rows=["x"]), "last is damaged"),
    ("last/state.json", change(files=[1]), "model.safetensors is damaged"),
    ("last/state.json", pipe, "state.json: it is not a file"),
    ("metrics.jsonl", write(RECORD), "metrics.jsonl has a line that is not a record"),
    ("config.json", change(format="x" * 1000), "config.json does not describe a run"),
    ("../text.txt", write("another text\n" * 500), "is not the text"),
    ("../text.txt", Path.unlink, "text.txt"),
]


@pytest.mark.parametrize(("file", "damage", "message"), DAMAGES)
def test_a_damaged_run_is_not_resumed(cli, tmp_path, run, file, damage, message):
    damage(tmp_path / run / file)
    assert_refused(cli, message, "train", "--resume", run, "--iters", 60)


@pytest.mark.parametrize("missing", ["val_loss", "bits_per_byte"])
def test_an_incomplete_result_is_computed_again(cli, tmp_path, run, missing):
    path = tmp_path / run / "result.json"
    before = path.read_bytes()
    change(**{missing: REMOVED})(path)
    cli("train", "--resume", run)
    assert path.read_bytes() == before


def test_records_without_numbers_do_not_end_a_run(cli, tmp_path, run):
    change(bits_per_byte=None)(tmp_path / run / "result.json")
    cli("train", "--resume", run)
    (tmp_path / run / "metrics.jsonl").write_text("[" * 100_000)
    cli("train", "--resume", run)


@pytest.mark.parametrize(
    "flags",
    ["--lr 1", "--n-layer 3", "--preset iron", "--out new", "--tokenizer bpe", "--vocab-size 384"],
)
def test_flags_that_a_resumed_run_cannot_change(cli, run, flags):
    assert_refused(cli, flags.split()[0], "train", "--resume", run, *flags.split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--prompt a☃", "the character '☃' (U+2603)"),
        ("--prompt a\x07", "(U+0007)"),
        ("--prompt-file nowhere", "cannot read the prompt file nowhere"),
        ("--prompt-file .", "cannot read the prompt file"),
        ("--prompt-file latin", "latin is not UTF-8"),
        ("--prompt a --encoding latin-1", "are for --prompt-file"),
        ("--prompt a --prompt-file text.txt", "not allowed with"),
        ("--temperature nan", "--temperature"),
        ("--checkpoint first", "--checkpoint"),
        ("--fused --device cpu", "--fused"),
    ],
    ids=lambda v: v[:30],
)
def test_a_mistake_in_generate(cli, tmp_path, monkeypatch, run, flags, message):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    assert_mistake(cli, message, "generate", run, *flags.split(" "))


def test_generating_from_a_path_that_is_not_a_run(cli):
    for path in ("nowhere", ".", "text.txt"):
        assert_mistake(cli, f"{path} is no", "generate", path)


LONG = "n" * 300


@pytest.mark.parametrize(
    "args",
    [f"generate {LONG}", f"generate {LONG}/last", f"export {LONG} new", f"show {LONG}",
     f"import {LONG} new",
     f"show run --out {LONG}", f"doctor --json {LONG}", f"compare --plot {LONG}"],
    ids=lambda args: args.replace(LONG, "LONG"),
)  # fmt: skip
@pytest.mark.usefixtures("run")
def test_a_name_that_is_too_long_is_one_line(cli, args):
    assert_refused(cli, ": File name too long", *args.split())


FULL_DISK = Mock(side_effect=OSError(28, "No space left on device"))


def test_a_full_disk_while_saving_keeps_the_previous_checkpoint(cli, tmp_path, monkeypatch, run):
    before = (tmp_path / run / "last/state.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", FULL_DISK)
        flags = ["train", "--resume", run, "--iters", 40]
        result = assert_mistake(cli, "No space left on device", *flags)
    assert "--resume run" in result.err
    assert (tmp_path / run / "last/state.json").read_bytes() == before
    assert not list((tmp_path / run).glob(".*"))
    cli("train", "--resume", run)


def test_a_full_disk_at_the_start_leaves_no_folder(cli, monkeypatch):
    monkeypatch.setattr(checkpoint, "write", FULL_DISK)
    assert_refused(cli, "No space left on device", "train", *TINY, "--out", "deep/down/run")

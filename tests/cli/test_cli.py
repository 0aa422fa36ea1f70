"""The commands train and generate from start to end, on a tiny model."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import TINY, assert_mistake

from irongpt import console
from irongpt.cli import build_parser, main
from irongpt.config import PRESETS
from irongpt.data import corpus, download
from irongpt.errors import UserError
from irongpt.runs import checkpoint

PNG = b"\x89PNG\r\n\x1a\n"


def records_of(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("real_plots")
def test_the_files_and_records_of_a_run(cli, tmp_path):
    result = cli("train", *TINY, "--out", "run")
    run = tmp_path / "run"
    names = set("best config.json last loss.png metrics.jsonl result.json sample.txt".split())
    assert {p.name for p in run.iterdir()} == names
    for name in ("best", "last"):
        assert {p.name for p in (run / name).iterdir()} == {*checkpoint.FILES, "state.json"}
    records = records_of(run)
    assert [r["step"] for r in records] == [10, 20, 30]
    keys = "step train_loss val_loss lr grad_norm loss_scale tokens_per_s mfu seconds"
    assert all(list(r) == [*keys.split(), "bits_per_byte", "sample"] for r in records)
    for loss in ("train_loss", "val_loss"):
        assert records[-1][loss] < records[0][loss]
    assert (run / "loss.png").read_bytes().startswith(PNG)
    samples = (run / "sample.txt").read_text()
    assert samples.count("--- step") == 3
    assert f"best validation loss {min(r['val_loss'] for r in records):.4f}" in result.out


def test_the_times_add_up_to_the_total(cli, monkeypatch):
    load = corpus.load
    monkeypatch.setattr(corpus, "load", lambda *a, **k: time.sleep(0.1) or load(*a, **k))
    long = [*TINY, "--iters", 300, "--eval-every", 150]
    line = next(x for x in cli("train", *long).out.splitlines() if x.startswith("time"))
    total, parts = line.removeprefix("time      ").split(" s in total: ")
    seconds = [float(part.split(" s ")[0]) for part in parts.split(", ")]
    # Parts under 0.05 s are not shown, and each is rounded to 0.1 s.
    assert sum(seconds) == pytest.approx(float(total), abs=0.1 * (len(seconds) + 3))
    assert {"set-up", "training"} <= {part.split(" s ")[1] for part in parts.split(", ")}


def test_a_log_between_evaluations(cli, tmp_path):
    cli("train", *TINY, "--out", "run", "--eval-every", 15)
    records = records_of(tmp_path / "run")
    assert [r["step"] for r in records] == [10, 15, 20, 30]
    assert [r["val_loss"] is None for r in records] == [True, False, True, False]


def test_the_default_folder_is_numbered(cli, tmp_path):
    for _ in range(3):
        cli("train", *TINY, "--iters", 1)
    names = {p.name for p in (tmp_path / "runs").iterdir()}
    assert names == {"text-nano", "text-nano-2", "text-nano-3"}


def test_the_default_preset_is_printed(cli):
    line = "preset    nano, the default on a CPU; --preset selects another"
    assert line in cli("train", *TINY[2:], "--iters", 1).out
    assert "preset" not in cli("train", *TINY, "--iters", 1).out


def test_a_target_loss_ends_the_run(cli, tmp_path):
    first = cli("train", *TINY, "--out", "run", "--target-loss", 100)
    assert "target loss reached at step 10" in first.out
    again = cli("train", "--resume", "run")
    assert "nothing to do" in again.out
    assert "finished at step 30" in cli("train", "--resume", "run", "--target-loss", 0.001).out


@pytest.mark.parametrize("args", [["--help"], ["train", "--help"], ["generate", "--help"]])
def test_help_shows_defaults_and_groups(capsys, args):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    if args[0] == "train":
        iters = [f"{name} {preset.train['iters']}" for name, preset in PRESETS.items()]
        assert f"[{', '.join(iters)}]" in out
        assert len(set(re.findall(r"--[a-z-]+", out))) <= 36
        assert all(f" {group}: " in out for group in ("run", "model", "recipe", "machine"))
    assert "None" not in out


@pytest.mark.parametrize(
    "args", ["export run", "import folder", "import", "show run --out", "doctor --json"]
)
def test_a_path_may_begin_with_the_home_folder_and_is_not_empty(args, tmp_path, monkeypatch):
    """In --out=~/page.html, bash leaves the ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    more = ["run"] * (args == "import")
    given = vars(build_parser().parse_args([*args.split(), "~/x", *more]))
    assert tmp_path / "x" in given.values()
    with pytest.raises(UserError, match="the name is empty"):
        build_parser().parse_args([*args.split(), "", *more])


def test_a_resumed_run_reads_its_text_from_a_new_path(cli, tmp_path, run):
    (tmp_path / "text.txt").rename(tmp_path / "moved.txt")
    assert_mistake(cli, "text.txt", "train", "--resume", run, "--iters", 35)
    cli("train", "--resume", run, "--iters", 35, "--data", "moved.txt")
    cli("train", "--resume", run, "--iters", 36)


def test_gradients_that_stay_non_finite_end_the_run(cli, tmp_path):
    """At a learning rate that makes the weights overflow; the previous checkpoint is kept."""
    args = [*TINY, "--out", "run", "--iters", 400, "--lr", 1e30, "--eval-every", 1000]
    result = cli("train", *args, code=1)
    assert "were not finite; the first non-finite tensor: the " in result.err
    assert result.err.count("\n") == 1
    assert checkpoint.load(tmp_path / "run/last")[3]["step"] == 0
    records = records_of(tmp_path / "run")
    assert records[-1]["step"] <= 50
    assert records[-1]["grad_norm"] is None


def test_without_network_and_data_it_uses_python_docs_with_a_warning(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("IRONGPT_DATA", str(tmp_path / "cache"))
    closed = replace(download.SOURCES[0], url="http://127.0.0.1:9/2600-0.txt")
    monkeypatch.setattr(download, "SOURCES", (closed,))
    flags = [x for x in TINY if x not in ("--data", "text.txt")]
    result = cli("train", *flags, "--iters", 2)
    assert "warning: using python-docs" in result.out
    assert (tmp_path / "runs/python-docs-nano").is_dir()
    assert "finished" in cli("train", "--resume", "runs/python-docs-nano", "--iters", 3).out


def test_without_a_terminal_progress_is_a_line_every_ten_seconds(monkeypatch, capsys):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    progress = console.Progress(100, 0)
    for now.seconds in range(1, 61):
        progress.advance(now.seconds)
        if now.seconds <= 25:  # later steps are too slow for a record
            record = dict(step=now.seconds, train_loss=1.0, tokens_per_s=5000, mfu=0.25)
            progress.show(record)
    assert capsys.readouterr().out.splitlines() == [
        "step 10 of 100: loss 1.000, 5,000 tokens/s, MFU 25.0%",
        "step 20 of 100: loss 1.000, 5,000 tokens/s, MFU 25.0%",
        "step 50 of 100",
    ]


def test_python_m_irongpt_is_the_same_command():
    command = [sys.executable, "-m", "irongpt", "train", "--nope"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    message = "irongpt: error: unrecognized arguments: --nope (see irongpt train --help)\n"
    assert done.stderr == message

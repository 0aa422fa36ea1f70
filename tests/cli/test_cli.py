import json
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import TINY, assert_mistake

from irongpt.cli import main
from irongpt.config import PRESETS
from irongpt.data import corpus
from irongpt.runs import checkpoint

PNG = b"\x89PNG\r\n\x1a\n"


def records_of(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("real_plots")
def test_a_run_leaves_what_the_design_says(cli, tmp_path):
    result = cli("train", *TINY, "--out", "run")
    assert result.code == 0, result.err
    run = tmp_path / "run"
    assert sorted(p.name for p in run.iterdir()) == [
        "best", "config.json", "last", "loss.png", "metrics.jsonl", "sample.txt",
    ]  # fmt: skip
    for name in ("best", "last"):
        assert sorted(p.name for p in (run / name).iterdir()) == sorted(
            [*checkpoint.FILES, "state.json"]
        )
    records = records_of(run)
    assert [r["step"] for r in records] == [10, 20, 30]
    keys = "step train_loss val_loss lr grad_norm loss_scale tokens_per_s mfu seconds sample"
    assert all(list(r) == keys.split() for r in records)
    assert records[-1]["train_loss"] < records[0]["train_loss"]
    assert records[-1]["val_loss"] < records[0]["val_loss"]
    assert (run / "loss.png").read_bytes().startswith(PNG)
    samples = (run / "sample.txt").read_text()
    assert samples.count("--- step") == 3
    assert f"best validation loss {min(r['val_loss'] for r in records):.4f}" in result.out


def test_the_summary_explains_every_second(cli):
    long = [*TINY, "--iters", 300, "--eval-every", 150]
    line = next(x for x in cli("train", *long).out.splitlines() if x.startswith("time"))
    total, parts = line.removeprefix("time      ").split(" s in all: ")
    seconds = [float(part.split(" s ")[0]) for part in parts.split(", ")]
    # Parts under 0.05 s are left out, and each is rounded to 0.1 s.
    assert sum(seconds) == pytest.approx(float(total), abs=0.1 * (len(seconds) + 3))
    assert {"set-up", "training"} <= {part.split(" s ")[1] for part in parts.split(", ")}


def test_a_log_between_evaluations(cli, tmp_path):
    cli("train", *TINY, "--out", "run", "--eval-every", 15)
    records = records_of(tmp_path / "run")
    assert [(r["step"], r["val_loss"] is None) for r in records] == [
        (10, True), (15, False), (20, True), (30, False),
    ]  # fmt: skip


def test_the_default_folder_is_numbered(cli, tmp_path):
    for _ in range(3):
        assert cli("train", *TINY, "--iters", 1).code == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [
        "text-nano", "text-nano-2", "text-nano-3",
    ]  # fmt: skip


def test_the_preset_is_named_where_the_user_names_none(cli):
    flags = TINY[2:]
    assert "preset    nano, as this is for a CPU; --preset chooses" in cli("train", *flags).out
    assert "preset" not in cli("train", *TINY).out


def test_a_target_loss_ends_the_run(cli, tmp_path):
    first = cli("train", *TINY, "--out", "run", "--target-loss", 100)
    assert "target loss reached at step 10" in first.out
    again = cli("train", "--resume", "run")
    assert again.code == 0
    assert "nothing to do" in again.out
    assert "finished at step 30" in cli("train", "--resume", "run", "--target-loss", 0.001).out


def test_a_finished_run_goes_on_with_more_iterations(cli):
    cli("train", *TINY, "--out", "run")
    assert "nothing to do" in cli("train", "--resume", "run").out
    assert "finished at step 40" in cli("train", "--resume", "run", "--iters", 40).out


@pytest.mark.parametrize("args", [["--help"], ["train", "--help"], ["generate", "--help"]])
def test_help_is_there_and_shows_defaults(capsys, args):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    if args[0] == "train":
        iters = [f"{name} {preset.train['iters']}" for name, preset in PRESETS.items()]
        assert f"[{', '.join(iters)}]" in out
        assert out.count(" --") <= 2 * 26  # each flag stands in the usage and in the list
    assert "None" not in out


def test_a_resumed_run_finds_its_text_where_the_user_says(cli, tmp_path, run):
    (tmp_path / "text.txt").rename(tmp_path / "moved.txt")
    assert_mistake(cli("train", "--resume", run, "--iters", 35), "text.txt")
    assert cli("train", "--resume", run, "--iters", 35, "--data", "moved.txt").code == 0
    assert cli("train", "--resume", run, "--iters", 36).code == 0


def test_gradients_that_stay_non_finite_end_the_run(cli, tmp_path):
    """At a learning rate that blows the weights up; the checkpoint before it stays."""
    args = [*TINY, "--out", "run", "--iters", 400, "--lr", 1e30, "--eval-every", 1000]
    result = cli("train", *args)
    assert result.code == 1
    assert "were not finite; the first non-finite tensor: the " in result.err
    assert result.err.count("\n") == 1
    assert checkpoint.load(tmp_path / "run/last")[3]["step"] == 0
    records = records_of(tmp_path / "run")
    assert records[-1]["step"] <= 50
    assert records[-1]["grad_norm"] is None


def test_no_network_and_no_corpus_named_falls_back_with_a_warning(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("IRONGPT_DATA", str(tmp_path / "cache"))
    nobody = replace(corpus.SOURCES[0], url="http://127.0.0.1:9/2600-0.txt")
    monkeypatch.setattr(corpus, "SOURCES", (nobody,))
    flags = [x for x in TINY if x not in ("--data", "text.txt")]
    result = cli("train", *flags, "--iters", 2)
    assert result.code == 0
    assert "warning: falling back to python-docs" in result.out
    assert (tmp_path / "runs/python-docs-nano").is_dir()
    assert "finished" in cli("train", "--resume", "runs/python-docs-nano", "--iters", 3).out


def test_python_m_irongpt_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "irongpt", "train", "--nope"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("irongpt: error: unrecognized arguments: --nope")
    assert done.stdout == ""

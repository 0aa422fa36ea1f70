"""The course of a run, with evaluations and gradients made to order."""

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import TINY, Cli

from irongpt.cli import build_parser
from irongpt.config import PRESETS, from_json
from irongpt.config import TrainConfig as Recipe
from irongpt.console import Clock
from irongpt.errors import DivergenceError
from irongpt.generation.sample import generate
from irongpt.runs.run_folder import open_run
from irongpt.training import loop, optimizer
from irongpt.training.start import new_run, resumed_run
from irongpt.training.trainer import Trainer


@pytest.fixture
def training(cli: Cli) -> loop.Training:
    """A run of 30 steps, evaluated every 10, about to begin."""
    return start()


def start(*flags: object) -> loop.Training:
    given = vars(build_parser().parse_args(["train", *TINY, "--out", "run", *map(str, flags)]))
    given.pop("run_command")
    return new_run(given, Clock(0.0))


def evaluate_to(monkeypatch, *losses: float) -> None:
    answers = iter(losses)
    monkeypatch.setattr(Trainer, "evaluate", lambda self, go_on: next(answers))


def step_of(folder) -> int:
    return json.loads((folder / "state.json").read_text())["step"]


def test_best_is_the_best_and_last_the_last(training, monkeypatch):
    evaluate_to(monkeypatch, 2.0, 1.5, 1.7)
    assert training.fit() is None
    assert (step_of(training.run.best), step_of(training.run.last)) == (20, 30)
    assert training.outcome() == "finished at step 30: best validation loss 1.5000, of step 20"


def test_a_model_that_evaluates_to_nothing_finite_is_not_saved(training, monkeypatch):
    evaluate_to(monkeypatch, 2.0, math.nan, math.inf)
    assert training.fit() is None
    assert (step_of(training.run.best), step_of(training.run.last)) == (10, 10)
    assert [r["val_loss"] for r in training.run.records()] == [2.0, None, None]


def test_a_run_without_a_finite_evaluation_says_so(training, monkeypatch):
    evaluate_to(monkeypatch, math.nan, math.nan, math.nan)
    training.fit()
    assert training.outcome() == "finished at step 30: no validation loss was finite"
    assert not training.run.best.exists()


def test_the_numbers_of_a_record(training, monkeypatch):
    rows = []
    plain = Trainer.train_step

    def train_step(self):
        rows.append(plain(self).tolist())
        return torch.tensor(rows[-1])

    monkeypatch.setattr(Trainer, "train_step", train_step)
    training.fit()
    trainer, records = training.trainer, training.run.records()
    for i, r in enumerate(records):
        mine = rows[10 * i : 10 * i + 10]
        assert r["train_loss"] == pytest.approx(sum(row[0] for row in mine) / 10)
        assert (r["grad_norm"], r["loss_scale"]) == (mine[-1][1], 1.0)
        assert r["lr"] == optimizer.lr_at(10 * i + 9, trainer.config)
        rate = r["tokens_per_s"] * trainer.model.config.flops_per_token()
        assert r["mfu"] == pytest.approx(rate / training.peak_flops)
    seconds = sum(10 * trainer.tokens_per_step() / r["tokens_per_s"] for r in records)
    assert seconds == pytest.approx(training.clock.parts["training"], rel=1e-6)
    assert [r["seconds"] for r in records] == sorted(r["seconds"] for r in records)


def test_seconds_go_on_in_a_resumed_run(training):
    training.fit()
    before = training.run.records()[-1]["seconds"]
    again = resumed_run(training.run.path, {"iters": 40}, Clock(0.0))
    again.clock.start = again.clock.start + again.clock.total()  # this process has just begun
    again.fit()
    assert before < again.run.records()[-1]["seconds"] < before + 60


@pytest.mark.parametrize("changes", [{"eval_every": 10}, {"iters": 10}, {"iters": 5}])
def test_an_evaluation_that_a_resumed_run_owes_at_a_step_already_recorded(cli, changes):
    training = start("--eval-every", 25)
    while training.trainer.step < 10:
        training._step(loop.Progress(30, 0))
    training.save(training.run.last)
    again = resumed_run(training.run.path, changes, Clock(0.0))
    assert again.fit() is None
    first, second = again.run.records()[:2]
    assert (first["step"], first["val_loss"]) == (10, None)
    assert (second["step"], second["train_loss"]) == (10, None)
    assert second["val_loss"] > 0


def test_steps_in_vain_count_in_a_row_alone(training, monkeypatch):
    bad, good = torch.tensor([1.0, math.inf, 1.0]), torch.tensor([1.0, 1.0, 1.0])
    for _ in range(5):
        training.recent = [bad] * (loop.PATIENCE - 1) + [good]
        training._collect()
        training._record(loop.Progress(30, 0))
    training.recent = [bad] * (loop.PATIENCE - 1)
    training._collect()
    training._record(loop.Progress(30, 0))
    training.recent = [bad]
    training._collect()
    with pytest.raises(DivergenceError, match=f"of {loop.PATIENCE} steps"):
        training._record(loop.Progress(30, 0))


def test_divergence_is_named_even_if_an_evaluation_meets_it_first(cli: Cli):
    result = cli("train", *TINY, "--iters", 400, "--lr", 1e30, "--decay", "constant")
    assert result.code == 1
    assert "the first tensor that is not: the " in result.err


def test_training_samples_do_not_steer_a_terminal(training, monkeypatch, capsys):
    monkeypatch.setattr(loop.Training, "_sample", lambda self: "wild \x1b[31m text")
    training.fit()
    out = capsys.readouterr().out
    assert "wild \\x1b[31m text" in out
    assert "\x1b" not in out
    assert "\x1b" in training.run.records()[0]["sample"]


def test_the_plot_is_drawn_while_the_run_goes_on(training, monkeypatch):
    monkeypatch.setattr(loop, "PLOT_EVERY", 0.0)
    drawn = []
    monkeypatch.setattr(loop.report, "draw", lambda run: drawn.append(len(run.records())))
    training.fit()
    assert drawn == [1, 2, 3, 3]


def test_a_run_killed_before_its_last_plot_gets_it_later(cli, tmp_path):
    assert cli("train", *TINY, "--out", "run").code == 0
    for name in ("loss.png", "sample.txt"):
        (tmp_path / "run" / name).unlink()
    assert "nothing to do" in cli("train", "--resume", "run").out
    assert (tmp_path / "run/loss.png").exists()
    assert (tmp_path / "run/sample.txt").exists()


def test_a_sample_is_what_the_model_writes_with_the_runs_seed(training):
    training.fit()
    ids = generate(
        training.trainer.model,
        [training.tokenizer.chars.index("\n")],
        loop.SampleConfig(tokens=200),
    )
    sample = training.run.records()[-1]["sample"]
    assert sample == training.tokenizer.decode(list(ids))


def test_config_json_is_the_presets_recipe_but_for_what_was_given(training):
    stored = open_run(training.run.path).config.train
    given = {"iters": 30, "eval_every": 10, "batch_size": 4, "warmup": 2, "lr": 0.01}
    recipe = {**PRESETS["nano"].train, **given, "device": "cpu"}
    assert stored == replace(Recipe(**recipe))
    assert from_json(Recipe, json.loads(json.dumps(recipe | vars(stored)))) == stored

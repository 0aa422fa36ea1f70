"""The training loop, with given evaluations and gradients."""

import json
import math
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from conftest import TINY

from irongpt.cli import build_parser
from irongpt.config import PRESETS, SampleConfig, from_json
from irongpt.config import TrainConfig as Recipe
from irongpt.console import Clock
from irongpt.errors import DivergenceError
from irongpt.generation.sample import generate_batch
from irongpt.runs import checkpoint
from irongpt.runs.run_folder import open_run
from irongpt.training import loop, optimizer
from irongpt.training.distributed import World
from irongpt.training.start import new_run, resumed_run
from irongpt.training.trainer import Trainer


@pytest.fixture
def training(cli) -> loop.TrainingLoop:
    """A run of 30 steps with an evaluation every 10, before its first step."""
    return start()


def start(*flags: object) -> loop.TrainingLoop:
    given = vars(build_parser().parse_args(["train", *TINY, "--out", "run", *map(str, flags)]))
    given.pop("run_command")
    return new_run(given, Clock(0.0), World(), ExitStack())


def resume(training: loop.TrainingLoop, **flags: object) -> loop.TrainingLoop:
    training.run.release()
    clock = Clock(time.perf_counter())
    return resumed_run(training.run.path, flags, clock, World(), ExitStack())


def step_of(folder) -> int:
    return json.loads((folder / "state.json").read_text())["step"]


@pytest.mark.parametrize(
    ("losses", "saved", "outcome"),
    [
        ((2.0, 1.5, 1.7), (20, 30), "best validation loss 1.5000 at step 20"),
        ((2.0, math.nan, math.inf), (10, 10), "best validation loss 2.0000 at step 10"),
        ((math.nan, math.nan, math.nan), None, "no validation loss was finite"),
    ],
    ids=["finite", "not finite later", "never finite"],
)
def test_best_is_the_best_and_last_the_last_finite_checkpoint(
    training, monkeypatch, losses, saved, outcome
):
    evaluations = iter(losses)
    monkeypatch.setattr(Trainer, "evaluate", lambda *_: next(evaluations))
    assert training.fit() is None
    assert training.outcome() == f"finished at step 30: {outcome}"
    run = training.run
    assert (saved is None) == (not run.best.exists())
    assert saved is None or (step_of(run.best), step_of(run.last)) == saved
    assert [r["val_loss"] for r in run.records()] == [
        loss if math.isfinite(loss) else None for loss in losses
    ]


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


def test_a_resumed_run_continues_the_count_of_seconds(training):
    training.fit()
    before = training.run.records()[-1]["seconds"]
    resumed = resume(training, iters=40)
    resumed.fit()
    after = resumed.run.records()[-1]["seconds"]
    assert before < after <= before + resumed.clock.total()


@pytest.mark.parametrize("changes", [{"eval_every": 10}, {"iters": 10}, {"iters": 5}])
def test_a_resumed_run_evaluates_a_step_that_has_a_record(cli, changes):
    training = start("--eval-every", 25)
    while training.trainer.step < 10:
        training._step()
    training.save(training.run.last)
    resumed = resume(training, **changes)
    assert resumed.fit() is None
    first, second = resumed.run.records()[:2]
    assert (first["step"], first["val_loss"]) == (10, None)
    assert (second["step"], second["train_loss"]) == (10, None)
    assert second["val_loss"] > 0


def test_only_consecutive_steps_without_finite_gradients_end_a_run(training):
    bad, good = torch.tensor([1.0, math.inf, 1.0]), torch.tensor([1.0, 1.0, 1.0])

    def record(rows: list[torch.Tensor]) -> None:
        training.recent = rows
        training._collect()
        training._record()

    for _ in range(5):
        record([bad] * (loop.MAX_BAD_STEPS - 1) + [good])
    record([bad] * (loop.MAX_BAD_STEPS - 1))
    with pytest.raises(DivergenceError, match=f"of {loop.MAX_BAD_STEPS} steps"):
        record([bad])


def test_divergence_is_reported_even_if_an_evaluation_meets_it_first(cli):
    result = cli("train", *TINY, "--iters", 60, "--lr", 1e30, "--decay", "constant", code=1)
    assert "the first non-finite tensor: the " in result.err


def test_control_characters_of_samples_do_not_reach_the_terminal(training, monkeypatch, capsys):
    monkeypatch.setattr(loop.TrainingLoop, "_sample", lambda self: "wild \x1b[31m text")
    training.fit()
    out = capsys.readouterr().out
    assert "wild \\x1b[31m text" in out
    assert "\x1b" not in out
    assert "\x1b" in training.run.records()[0]["sample"]


def test_the_plot_is_updated_during_the_run(training, monkeypatch):
    monkeypatch.setattr(loop, "PLOT_EVERY", 0.0)
    drawn = []
    monkeypatch.setattr(loop.plots, "draw", lambda run: drawn.append(len(run.records())))
    training.fit()
    assert drawn == [1, 2, 3, 3]


def test_a_run_killed_before_its_last_plot_gets_it_later(cli, run, tmp_path):
    for name in ("loss.png", "sample.txt"):
        (tmp_path / "run" / name).unlink()
    assert "nothing to do" in cli("train", "--resume", "run").out
    assert (tmp_path / "run/loss.png").exists()
    assert (tmp_path / "run/sample.txt").exists()


def test_a_sample_is_generated_with_the_runs_seed(training):
    training.fit()
    with training.trainer.optimizer.averaged():
        steps = generate_batch(
            training.trainer.model,
            [[training.tokenizer.chars.index("\n")]],
            SampleConfig(tokens=training.trainer.config.sample_tokens),
        )
        ids = [token for (token,) in steps]
    sample = training.run.records()[-1]["sample"]
    assert sample == training.tokenizer.decode(ids)


def test_config_json_is_the_presets_recipe_with_the_given_options(training):
    stored = open_run(training.run.path).config.train
    given = {"iters": 30, "eval_every": 10, "batch_size": 4, "warmup": 2, "lr": 0.01}
    recipe = {**PRESETS["nano"].train, **given, "device": "cpu"}
    assert stored == replace(Recipe(**recipe))
    assert from_json(Recipe, json.loads(json.dumps(recipe | vars(stored)))) == stored


def test_an_evaluation_saves_before_it_samples(training, monkeypatch):
    """A sample can break the GPU or end the process; the steps before it are not lost."""

    monkeypatch.setattr(loop.TrainingLoop, "_sample", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        training.fit()
    assert step_of(training.run.last) == 10


@pytest.mark.parametrize(
    ("train_loss", "losses", "steps"),
    [(1.0, {20: 1.9}, [10, 20]), (1.0, {20: 2.1}, [10, 20, 30]), (2.2, {20: 1.9}, [10, 20, 30])],
    ids=["reached", "not reached", "the training loss is above it"],
)
def test_the_target_loss_is_looked_for_between_evaluations(
    training, monkeypatch, train_loss, losses, steps
):
    """An evaluation of 20, between those at 0 and 30, ends the run if it is at the target."""
    training = start("--eval-every", 30, "--out", "other", "--target-loss", 2.0)
    limits = []

    def evaluate(self: Trainer, should_continue: object, limit: float) -> float:
        limits.append((self.step, limit))
        return losses.get(self.step, 2.5)

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    monkeypatch.setattr(
        Trainer, "_run_step", lambda self: torch.tensor([train_loss, 1.0, 1.0]), raising=True
    )
    training.trainer.run_step = training.trainer._run_step
    assert training.fit() is None
    records = training.run.records()
    assert [r["step"] for r in records] == steps
    found = [(r["step"], r["val_loss"]) for r in records if r["val_loss"] is not None]
    assert found == [(20, 1.9) if steps[-1] == 20 else (30, 2.5)]
    looked = [(20, 2.0)] if train_loss <= 2.0 + loop.AVERAGE_GAIN else []
    assert limits == looked + ([(30, math.inf)] if steps[-1] == 30 else [])
    assert (training.run.path / "result.json").exists() == (steps[-1] == 30)


def test_a_run_that_a_signal_ends_while_it_looked_for_the_target_looks_again(cli, monkeypatch):
    training = start("--eval-every", 30, "--target-loss", 9.0)

    def evaluate(self: Trainer, should_continue: Callable[[], bool], limit: float) -> None:
        signal.raise_signal(signal.SIGTERM)
        assert not should_continue()

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", evaluate)
        assert training.fit() == signal.SIGTERM
    assert step_of(training.run.last) == 20
    assert [r["step"] for r in training.run.records()] == [10]
    resumed = resume(training)
    assert resumed.fit() is None
    assert resumed.outcome().startswith("target loss reached at step 20")


def test_best_has_the_average_of_the_weights_and_last_the_weights(training) -> None:
    training.fit()
    trainer = training.trainer
    weights = {name: w.clone() for name, w in trainer.model.state_dict().items()}
    with trainer.optimizer.averaged():
        average = {name: w.clone() for name, w in trainer.model.state_dict().items()}
    found = {name: checkpoint.load(training.run.path / name)[0] for name in ("last", "best")}
    for name in weights:
        assert torch.equal(found["last"][name], weights[name])
        assert torch.equal(found["best"][name], average[name])
        assert not torch.equal(weights[name], average[name])


def test_a_target_loss_leaves_only_a_result_of_the_best_model(cli, tmp_path) -> None:
    result = tmp_path / "run/result.json"
    cli("train", *TINY, "--out", "run")
    before = result.read_text()
    assert "result    best/" in cli("train", "--resume", "run", "--target-loss", "9").out
    assert result.read_text() == before
    best = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["val_loss"]
    again = ["--resume", "run", "--iters", "60", "--target-loss", str(best - 0.01)]
    assert "target loss reached" in cli("train", *again).out
    assert not result.exists()

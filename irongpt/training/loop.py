"""The course of a run: steps, records, evaluations, samples, checkpoints, and how it ends."""

import math
import statistics
import textwrap
import time
from pathlib import Path
from typing import Any

import torch
from irongpt_kernels.runtime import launch_table
from torch import Tensor

from irongpt.config import SampleConfig
from irongpt.console import Clock, Interrupt, Progress, duration, say
from irongpt.data.tokenizer import CharTokenizer
from irongpt.errors import DivergenceError, UserError
from irongpt.generation.sample import generate, printable, start_ids
from irongpt.runs import checkpoint, plots
from irongpt.runs.run_folder import Record, Run
from irongpt.training import optimizer
from irongpt.training.trainer import Trainer

PATIENCE = 30  # steps in a row whose gradients are not finite before a run gives up
PLOT_EVERY = 30.0  # seconds


class Training:
    """A trainer at work in a run's folder.

    What a record needs beyond the trainer is state too, and is in the checkpoint: the losses since
    the last record, the best validation loss, the last step evaluated.
    """

    def __init__(
        self, run: Run, trainer: Trainer, tokenizer: CharTokenizer, peak_flops: float, clock: Clock
    ) -> None:
        self.run, self.trainer, self.tokenizer = run, trainer, tokenizer
        self.peak_flops, self.clock = peak_flops, clock
        self.recent: list[Tensor] = []  # per step: loss, gradient norm, loss scale, on the device
        self.rows: list[list[float]] = []  # the same of earlier steps that are in no record yet
        self.bad_steps = 0  # the latest of them whose gradients were not finite, in a row
        self.evaluated_at = 0
        self.best_val: float | None = None
        self.best_step = 0
        self.seconds_before = 0.0  # of the processes that this one resumes
        self.timed = (trainer.step, 0.0)  # step and training seconds at the last record
        self.plotted = time.monotonic()

    def save(self, folder: Path) -> None:
        """Writes a checkpoint, or raises OSError and leaves the one that is there."""
        self._collect()
        trainer = self.trainer
        state = {
            "step": trainer.step,
            "evaluated_at": self.evaluated_at,
            "best_val": self.best_val,
            "best_step": self.best_step,
            "bad_steps": self.bad_steps,
            "seconds": self.seconds_before + self.clock.total(),
            "rows": self.rows,
            "tiles": self._tiles(),
        }
        checkpoint.save(
            folder,
            trainer.model.state_dict(),
            trainer.optimizer_tensors(),
            self.tokenizer.to_json(),
            state,
        )

    def restore(self, state: dict[str, Any]) -> None:
        self.evaluated_at, self.best_val = state["evaluated_at"], state["best_val"]
        self.best_step, self.seconds_before = state["best_step"], state["seconds"]
        self.bad_steps, self.rows = state["bad_steps"], state["rows"]
        self.timed = (self.trainer.step, 0.0)
        before, now = state.get("tiles"), self._tiles()
        if before is not None and now is not None and before != now:
            say(
                f"kernels   saved with {_table(before)}, goes on with {_table(now)}: "
                "not to the bit the run that was left alone"
            )

    def _tiles(self) -> str | None:
        """Which launch options the sums depend on; None where none of ours add up."""
        trainer = self.trainer
        return launch_table.digest(trainer.device) if trainer.config.ops == "fused" else None

    def reached_target(self) -> bool:
        target = self.trainer.config.target_loss
        return target is not None and self.best_val is not None and self.best_val <= target

    def finished(self) -> bool:
        """Nothing is left to do: the last step is evaluated, or the target loss reached."""
        trainer = self.trainer
        done = trainer.step >= trainer.config.iters and self.evaluated_at == trainer.step
        return done or self.reached_target()

    def outcome(self) -> str:
        step = f"{'target loss reached' if self.reached_target() else 'finished'} at step "
        best = "no validation loss was finite"
        if self.best_val is not None:
            best = f"best validation loss {self.best_val:.4f}, of step {self.best_step:,}"
        return f"{step}{self.trainer.step:,}: {best}"

    def fit(self) -> int | None:
        """Trains until the end, the target loss, or a signal, which it returns.

        Raises DivergenceError if the gradients stay non-finite, and UserError if a file cannot be
        written; the last good checkpoint stays.
        """
        progress = Progress(self.trainer.config.iters, self.trainer.step)
        try:
            with Interrupt() as interrupt:
                while not self.finished() and interrupt.signal is None:
                    if self._evaluation_is_due():
                        self._evaluate(interrupt, progress)
                    else:
                        self._step(progress)
                if not self.finished():
                    with self.clock("saving"):
                        self.save(self.run.last)
            self._draw()
        except OSError as e:
            raise UserError(
                f"cannot write to {self.run.path}: {e.strerror}; the checkpoint saved before is "
                f"whole, go on with --resume {self.run.path}"
            ) from e
        finally:
            progress.close()
        return None if self.finished() else interrupt.signal

    def _step(self, progress: Progress) -> None:
        """A step, and a record every so often. An evaluation makes its own."""
        with self.clock("training"):
            self.recent.append(self.trainer.train_step())
            log = self.trainer.step % self.trainer.config.log_every == 0
            evaluation = self._evaluation_is_due()
            if log or evaluation:
                self._collect()
        progress.advance(self.trainer.step)
        if log and not evaluation:
            self._record(progress)

    def _evaluation_is_due(self) -> bool:
        step, config = self.trainer.step, self.trainer.config
        due = step % config.eval_every == 0 or step >= config.iters
        return due and step > self.evaluated_at

    def _collect(self) -> None:
        """Reads back what the last steps gave: here the host waits for the device."""
        rows = torch.stack(self.recent).tolist() if self.recent else []
        for _, norm, _ in rows:
            self.bad_steps = 0 if math.isfinite(norm) else self.bad_steps + 1
        self.rows += rows
        self.recent = []

    def _record(self, progress: Progress, **evaluation: Any) -> Record:
        """Adds a line to the metrics, of the steps since the last one.

        There are none where a resumed run evaluates a step that has a line already.
        """
        trainer, config = self.trainer, self.trainer.config
        if self.bad_steps >= PATIENCE:
            raise DivergenceError(
                f"the gradients of {self.bad_steps} steps up to step {trainer.step:,} were not "
                f"finite; the first tensor that is not: {trainer.first_nonfinite()}; "
                f"{self.run.last} is the last good checkpoint, a lower --lr may help"
            )
        losses = [row[0] for row in self.rows]
        norm, scale = self.rows[-1][1:] if self.rows else (math.nan, math.nan)
        seconds = self.clock.parts.get("training", 0.0)
        tokens = (trainer.step - self.timed[0]) * trainer.tokens_per_step()
        rate = tokens / (seconds - self.timed[1]) if tokens else math.nan
        record = {
            "step": trainer.step,
            "train_loss": statistics.fmean(losses) if losses else math.nan,
            "val_loss": None,
            "lr": optimizer.lr_at(trainer.step - 1, config),
            "grad_norm": norm,
            "loss_scale": scale,
            "tokens_per_s": rate,
            "mfu": rate * trainer.model.config.flops_per_token() / self.peak_flops,
            "seconds": self.seconds_before + self.clock.total(),
            **evaluation,
        }
        self.run.append(record)
        self.rows, self.timed = [], (trainer.step, seconds)
        progress.show(record)
        return record

    def _evaluate(self, interrupt: Interrupt, progress: Progress) -> None:
        """Evaluation, sample, record, checkpoints; nothing of it if a signal comes first."""
        trainer, run = self.trainer, self.run
        with self.clock("evaluation"):
            val_loss = trainer.evaluate(lambda: interrupt.signal is None)
        if val_loss is None:
            return
        finite = math.isfinite(val_loss)  # if not, the model is of no use now, and is not saved
        with self.clock("samples"):
            sample = self._sample() if finite else ""
        record = self._record(progress, val_loss=val_loss, sample=sample)
        self.evaluated_at = trainer.step
        improved = finite and (self.best_val is None or val_loss < self.best_val)
        if improved:
            self.best_val, self.best_step = val_loss, trainer.step
        with self.clock("saving"):
            if improved:  # before `last`: a run killed in between does this step again, the same
                self.save(run.best)
            if finite:
                self.save(run.last)
        say(
            f"step {trainer.step:,}: train {record['train_loss']:.4f}, validation {val_loss:.4f}"
            f"{' (best)' if improved else ''}, {duration(record['seconds'])}"
        )
        say(textwrap.indent(printable(sample).strip("\n"), "    | ", lambda line: True))
        if time.monotonic() - self.plotted > PLOT_EVERY:
            self._draw()

    def _sample(self) -> str:
        """What the model writes now, from a new line on."""
        trainer, config = self.trainer, self.trainer.config
        sampling = SampleConfig(tokens=config.sample_tokens, seed=config.seed)
        start = start_ids(self.tokenizer)
        ids = generate(trainer.model, start, sampling, trainer.dtype, config.graph)
        return self.tokenizer.decode(list(ids))

    def _draw(self) -> None:
        """Brings loss.png and sample.txt up to the metrics."""
        with self.clock("plots"):
            plots.draw(self.run)
        self.plotted = time.monotonic()


def _table(digest: str) -> str:
    return f"the measured tiles {digest}" if digest else "the shipped tiles"

"""The training loop: steps, logging, evaluation, samples, checkpoints, stopping."""

import itertools
import math
import signal
import statistics
import textwrap
import time
from pathlib import Path
from typing import Any

import torch
from irongpt_kernels.runtime import launch_table
from torch import Tensor

from irongpt.config import SampleConfig
from irongpt.console import Attempt, Clock, Interrupt, Progress, duration, say
from irongpt.data.tokenizer import Tokenizer
from irongpt.errors import DivergenceError, UserError
from irongpt.files import write_error_reason
from irongpt.generation.sample import generate_batch, printable, start_ids
from irongpt.runs import checkpoint, plots
from irongpt.runs.run_folder import Record, RunFolder
from irongpt.runs.tensorboard import Events
from irongpt.training import optimizer
from irongpt.training.trainer import Trainer

MAX_BAD_STEPS = 30  # consecutive steps with non-finite gradients before a run gives up
PLOT_EVERY = 30.0  # seconds
AVERAGE_GAIN = 0.1  # nats by which averaged weights may be better than the training loss shows
TARGET_EVERY = 20  # steps between two checks of the target loss; only multiples of log_every count
STATE = (  # attributes of the loop that a checkpoint has
    "evaluated_at", "best_val", "best_step", "not_better", "bad_steps", "rows"
)  # fmt: skip
COUNTS = ("step", "evaluated_at", "best_step", "bad_steps")  # every checkpoint has these integers


class TrainingLoop:
    """Trains in a run's folder, which gets the records, checkpoints and plots."""

    def __init__(
        self,
        run: RunFolder,
        trainer: Trainer,
        tokenizer: Tokenizer,
        peak_flops: float,
        clock: Clock,
    ) -> None:
        self.run, self.trainer, self.tokenizer = run, trainer, tokenizer
        self.peak_flops, self.clock = peak_flops, clock
        self.recent: list[Tensor] = []  # per step: loss, gradient norm, loss scale, on the device
        self.rows: list[list[float]] = []  # the same on the host, of steps without a record yet
        self.bad_steps = 0  # consecutive steps up to now whose gradients were not finite
        self.evaluated_at = 0
        self.best_val: float | None = None
        self.best_step = 0
        self.not_better = 0  # evaluations since the best one
        self.seconds_before = 0.0  # spent by earlier processes of this run
        self.last_record = (trainer.step, 0.0)  # its step and training seconds
        self.result: dict[str, Any] | None = None  # of `best` over the entire validation text
        self.plotted = time.monotonic()
        self.attempt = Attempt()
        self.events: Events | None = None  # for TensorBoard
        self.primary = trainer.world.rank == 0  # the process that writes, samples and prints
        self.alone = trainer.world.size == 1
        self.interrupt = Interrupt(twice=self.alone)
        self.progress = Progress(trainer.config.iters, trainer.step, bar=False)  # until `fit`
        self.signal: int | None = None  # received by some process, and known to all of them

    def save(self, folder: Path) -> None:
        """Writes a checkpoint to the folder. In `best` the weights are the average, if one is kept.

        Raises OSError if it cannot; the previous one then stays.
        """
        self._collect()
        if not self.primary:
            return
        if self.run.lock is not None:
            self.run.lock.check()
        trainer = self.trainer
        state = {
            **{name: getattr(self, name) for name in STATE},
            "step": trainer.step,
            "seconds": self.seconds_before + self.clock.total(),
            "tiles": self._launch_digest(),
        }
        weights = trainer.model.state_dict()
        if folder == self.run.best:
            with trainer.optimizer.averaged():
                weights = {name: w.clone() for name, w in weights.items()}
        tensors = weights, trainer.optimizer_tensors()
        checkpoint.save(folder, *tensors, self.tokenizer.to_json(), state)

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a checkpoint's state, which `check_state` has accepted."""
        state = {"not_better": 0, **state}  # checkpoints of older versions lack this count
        for name in STATE:
            setattr(self, name, state[name])
        self.seconds_before = state["seconds"]
        self.last_record = (self.trainer.step, 0.0)
        before, now = state.get("tiles"), self._launch_digest()
        if before is not None and now is not None and before != now:
            say(
                f"kernels   saved with {_table_name(before)}, resumed with {_table_name(now)}: "
                "results are not bitwise those of an uninterrupted run"
            )

    def _launch_digest(self) -> str | None:
        """Identifies the launch options of the fused ops, on which their rounding depends."""
        trainer = self.trainer
        return launch_table.digest(trainer.device) if trainer.config.ops == "fused" else None

    def reached_target(self) -> bool:
        target = self.trainer.config.target_loss
        return target is not None and self.best_val is not None and self.best_val <= target

    def out_of_patience(self) -> bool:
        """Whether `patience` evaluations in a row were not better than the best one."""
        patience = self.trainer.config.patience
        return patience is not None and self.not_better >= patience

    def finished(self) -> bool:
        """Whether the last step was evaluated, or the target loss or `patience` was reached."""
        trainer = self.trainer
        done = trainer.step >= trainer.config.iters and self.evaluated_at == trainer.step
        return done or self.reached_target() or self.out_of_patience()

    def _has_result(self) -> bool:
        """Whether a finished run gets a result.json. One that reached its target loss does not, so
        that evaluating the entire validation text adds nothing to its time."""
        return self.best_val is not None and not self.reached_target()

    def ending(self) -> tuple[str, str]:
        """Why a finished run has ended, and what continues it."""
        if self.reached_target():
            return "target loss reached", "a lower --target-loss"
        if self.out_of_patience():
            patience = self.trainer.config.patience
            return f"no improvement in {patience} evaluations: stopped", "a larger --patience"
        return "finished", "a larger --iters"

    def outcome(self) -> str:
        best = "no validation loss was finite"
        if self.best_val is not None:
            best = f"best validation loss {self.best_val:.4f} at step {self.best_step:,}"
        return f"{self.ending()[0]} at step {self.trainer.step:,}: {best}"

    def fit(self) -> int | None:
        """Trains until the last step, the target loss, `patience` evaluations without improvement,
        or a signal, whose number it returns.

        Raises DivergenceError if the gradients stay non-finite, and UserError if a file cannot be
        written; the last good checkpoint stays.
        """
        trainer = self.trainer
        self.progress = Progress(trainer.config.iters, trainer.step, bar=self.primary)
        if trainer.config.tensorboard and self.primary:
            with self.attempt("TensorBoard's event file"):
                self.events = Events(self.run)
        try:
            with self.interrupt:
                while not self.finished() and self.signal is None:
                    if self._evaluation_is_due():
                        self._evaluate()
                    elif self._target_check_is_due():
                        self._check_target()
                    else:
                        trainer.signal.fill_(self.interrupt.signal or 0)
                        self._step()
                    if self.alone:
                        self.signal = self.interrupt.signal
                if not self.finished():
                    with self.clock("saving"):
                        self.save(self.run.last)
                elif self.best_val is not None:
                    self._evaluate_best()
            self._plot()
        except OSError as e:
            raise UserError(self._failed_write(e)) from e
        finally:
            self.progress.close()
            if self.events:
                with self.attempt("TensorBoard's event file"):
                    self.events.writer.close()
        incomplete = self._has_result() and self.result is None
        return self.signal if incomplete or not self.finished() else None

    def _failed_write(self, error: OSError) -> str:
        path = self.run.path
        if not path.exists():
            return f"the folder {path} is gone: it was deleted or moved while the run was trained"
        return (
            f"cannot write to {path}: {write_error_reason(error, path)}; the previous checkpoint "
            f"is intact, continue with --resume {path}"
        )

    def _step(self) -> None:
        """Takes a step, and adds a record every `log_every` steps unless an evaluation will."""
        with self.clock("training"):
            self.recent.append(self.trainer.train_step())
            log = self.trainer.step % self.trainer.config.log_every == 0
            evaluation = self._evaluation_is_due()
            if log or evaluation:
                self._collect()
        self.progress.advance(self.trainer.step)
        if log and not evaluation and not self._target_check_is_due():
            self._record()

    def _target_check_is_due(self) -> bool:
        """Whether to check the target loss now: every TARGET_EVERY steps, if a record is due."""
        target, step = self.trainer.config.target_loss, self.trainer.step
        logged = step % self.trainer.config.log_every == 0 and len(self.rows) > 0
        return target is not None and step % TARGET_EVERY == 0 and logged

    def _check_target(self) -> None:
        """Evaluates if the mean training loss is low enough for a validation loss at the target."""
        target = self.trainer.config.target_loss
        assert target is not None
        gain = AVERAGE_GAIN if self.trainer.config.ema else 0.0
        if statistics.fmean(row[0] for row in self.rows) <= target + gain:
            self._evaluate(target)
        else:
            self._record()

    def _evaluation_is_due(self) -> bool:
        step, config = self.trainer.step, self.trainer.config
        due = step % config.eval_every == 0 or step >= config.iters
        return due and step > self.evaluated_at

    def _collect(self) -> None:
        """Copies the results of the last steps to the host, which waits for the device here."""
        rows = torch.stack(self.recent).tolist() if self.recent else []
        for _, norm, _, *signals in rows:
            self.bad_steps = 0 if math.isfinite(norm) else self.bad_steps + 1
            self.signal = int(max(signals, default=0)) or self.signal
        self.rows += [row[:3] for row in rows]
        self.recent = []

    def _record(self, **evaluation: Any) -> Record:
        """Adds a line to the metrics that covers the steps since the previous line.

        If a resumed run evaluates a step that already has a line, the new line covers no steps.
        """
        trainer, config = self.trainer, self.trainer.config
        if self.bad_steps >= MAX_BAD_STEPS:
            raise DivergenceError(
                f"the gradients of {self.bad_steps} steps up to step {trainer.step:,} were not "
                f"finite; the first non-finite tensor: {trainer.first_nonfinite()}; "
                f"{self.run.last} is the last good checkpoint, a lower --lr may help"
            )
        losses = [row[0] for row in self.rows]
        norm, scale = self.rows[-1][1:] if self.rows else (math.nan, math.nan)
        seconds = self.clock.parts.get("training", 0.0)
        tokens = (trainer.step - self.last_record[0]) * trainer.tokens_per_step()
        rate = tokens / (seconds - self.last_record[1]) if tokens else math.nan
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
        if self.events:
            with self.attempt("TensorBoard's event file"):
                self.events.add([record])
        self.rows, self.last_record = [], (trainer.step, seconds)
        if losses:
            self.progress.show(record)
        return record

    def _evaluate(self, limit: float = math.inf) -> None:
        """Adds an evaluation, or if the validation loss is above the limit, a record without one.

        A signal interrupts it; the resumed run then evaluates again.
        """
        with self.clock("evaluation"):
            val_loss = self.trainer.evaluate(lambda: self.interrupt.signal is None, limit)
        if val_loss is None:
            self.signal = self.interrupt.signal or signal.SIGTERM
        elif limit == math.inf or val_loss <= limit:
            self._add_evaluation(val_loss)
        else:
            self._record()

    def _add_evaluation(self, val_loss: float) -> None:
        """Saves a checkpoint, generates a sample, and saves again with the new record.

        The first save comes before the sample, which uses the GPU in another way than training. If
        it ends the process, a resumed run continues here and repeats the evaluation.
        """
        trainer, run = self.trainer, self.run
        finite = math.isfinite(val_loss)  # a model whose loss is not finite is not saved
        if finite:
            with self.clock("saving"):
                self.save(run.last)
        sample = self._sample() if finite and trainer.config.sample_tokens else ""
        bits_per_byte = trainer.tokens.bits_per_byte(val_loss)
        steps = len(self.rows)
        record = self._record(val_loss=val_loss, bits_per_byte=bits_per_byte, sample=sample)
        self.evaluated_at = trainer.step
        improved = finite and (self.best_val is None or val_loss < self.best_val)
        self.not_better = 0 if improved else self.not_better + 1
        if improved:
            self.best_val, self.best_step = val_loss, trainer.step
        with self.clock("saving"):
            if improved:  # before `last`: a run that is killed in between repeats the evaluation
                self.save(run.best)
            if finite:
                self.save(run.last)
        train = f"train {record['train_loss']:.4f}, " if steps else ""
        say(
            f"step {trainer.step:,}: {train}validation {val_loss:.4f} "
            f"({bits_per_byte:.3f} bits per byte{', best' if improved else ''}), "
            f"{duration(record['seconds'])}"
        )
        if sample:
            say(textwrap.indent(printable(sample).strip("\n"), "    | ", lambda line: True))
        if time.monotonic() - self.plotted > PLOT_EVERY:
            self._plot()

    def _evaluate_best(self) -> None:
        """Evaluates `best` over the entire validation text, and writes result.json.

        If the target loss was reached, it only deletes the result.json of an earlier `best`.
        """
        trainer, run = self.trainer, self.run
        trainer.world.gather(None)  # waits until `best` is written
        self.result = run.result(self.best_step)
        if self.result is not None:  # an earlier process has computed it
            return
        if not self._has_result():
            if self.primary:
                (run.path / "result.json").unlink(missing_ok=True)
            return
        weights = {name: w.clone() for name, w in trainer.model.state_dict().items()}
        with self.clock("evaluation"):
            trainer.model.load_state_dict(checkpoint.load(run.best)[0])
            loss = trainer.evaluate_all(lambda: self.interrupt.signal is None)
            trainer.model.load_state_dict(weights)
        if loss is None:
            self.signal = self.interrupt.signal or signal.SIGTERM
            return
        self.result = {
            "step": self.best_step,
            "val_loss": loss,
            "bits_per_byte": trainer.tokens.bits_per_byte(loss),
            "val_tokens": trainer.tokens.val_targets,
            "val_bytes": trainer.tokens.val_bytes,
        }
        run.write_result(self.result)

    def _sample(self) -> str:
        """Text that the model generates now, after the default prompt (`start_ids`); empty if that
        fails, and on every process but the first."""
        trainer, config = self.trainer, self.trainer.config
        sampling = SampleConfig(tokens=config.sample_tokens, seed=config.seed)
        text = ""
        if not self.primary:
            return text
        averaged = trainer.optimizer.averaged()
        with self.clock("samples"), self.attempt("the sample"), averaged:
            start = start_ids(self.tokenizer, documents=len(trainer.tokens.before_val) == 0)
            steps = generate_batch(trainer.model, [start], sampling, trainer.dtype, config.graph)
            text = self.tokenizer.decode([token for (token,) in steps])
        return text  # noqa: RET504

    def _plot(self) -> None:
        """Updates loss.png and sample.txt."""
        if self.primary:
            with self.clock("plots"), self.attempt("the plot"):
                plots.draw(self.run)
        self.plotted = time.monotonic()


def check_state(state: dict[str, Any]) -> None:
    """Raises KeyError, TypeError or ValueError unless `TrainingLoop.save` can have written it."""
    counts = [state.get("not_better", 0), *(state[name] for name in COUNTS)]
    finite = [state["seconds"], 0 if state["best_val"] is None else state["best_val"]]
    numbers = [*finite, *itertools.chain(*state["rows"])]
    if not (
        all(type(n) is int and 0 <= n <= 10**9 for n in counts)
        and all(type(x) in (int, float) for x in numbers)
        and all(len(row) == 3 for row in state["rows"])
        and all(map(math.isfinite, finite))
        and state["evaluated_at"] <= state["step"]
    ):
        raise ValueError("not the state of a training run")


def _table_name(digest: str) -> str:
    return f"measured launch options {digest}" if digest else "the default launch options"

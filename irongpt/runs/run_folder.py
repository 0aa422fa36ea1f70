"""A run's folder: what it was asked for (config.json) and what has happened (metrics.jsonl).

Everything else in it is drawn from these (loss.png, sample.txt) or is a checkpoint (last, best).
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irongpt import __version__
from irongpt.config import GPTConfig, TrainConfig, check, from_json, to_json
from irongpt.data.tokenizer import CharTokenizer
from irongpt.errors import UserError
from irongpt.files import beside, read, replace_file, sealed, unsealed
from irongpt.runs import checkpoint

FORMAT = 1
RECORD_KEYS = {"step", "train_loss", "val_loss"}  # what is read back; a record has more

Record = dict[str, Any]


@dataclass(frozen=True)
class RunConfig:
    """What decides a run, but for the text itself. `data` is a built-in name or a file's path."""

    preset: str
    data: str
    data_sha256: str
    model: GPTConfig
    train: TrainConfig


class Run:
    """A run's folder, which `create` makes."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path, self.config = path, config

    @property
    def last(self) -> Path:
        return self.path / "last"

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def create(self, save_first: Callable[[Path], None]) -> None:
        """Makes the folder with config.json and a first checkpoint, all of it or nothing.

        save_first: writes the checkpoint of step 0 into the folder it is given.
        Raises UserError if the folder is taken or cannot be written.
        """
        check_free(self.path)
        missing = [p for p in self.path.parents if not p.exists()]
        temporary = beside(self.path)
        try:
            temporary.mkdir(parents=True)
            replace_file(temporary / "config.json", _encode(self.config))
            save_first(temporary / "last")
            os.rename(temporary, self.path)
        except BaseException as e:
            shutil.rmtree(temporary, ignore_errors=True)
            for folder in missing:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            if isinstance(e, OSError):
                raise UserError(f"cannot write a run at {self.path}: {e.strerror}") from e
            raise

    def resume(self, config: RunConfig, step: int) -> None:
        """Forgets what is after `step` and what a killed save left; writes config.json anew."""
        self.config = config
        kept = [r for r in self.records() if r["step"] <= step]
        replace_file(self.metrics, "".join(json.dumps(r) + "\n" for r in kept).encode())
        replace_file(self.path / "config.json", _encode(config))
        for name in ("last", "best", "config.json", "metrics.jsonl", "loss.png", "sample.txt"):
            for stray in self.path.glob(f".{name}-????????"):
                shutil.rmtree(stray) if stray.is_dir() else stray.unlink()

    def append(self, record: Record) -> None:
        """Adds a line to metrics.jsonl. A number that is not finite becomes null."""
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in record.items()
        }
        with open(self.metrics, "a", encoding="utf-8") as f:
            f.write(json.dumps(finite) + "\n")

    def records(self) -> list[Record]:
        """The lines of metrics.jsonl, up to one that a kill has cut short."""
        records = []
        for line in read(self.metrics).splitlines() if self.metrics.exists() else []:
            try:
                record = json.loads(line)
            except ValueError:
                break
            if not isinstance(record, dict) or not record.keys() >= RECORD_KEYS:
                raise UserError(f"{self.metrics} has a line that is no record: {line[:60]!r}")
            records.append(record)
        return records


def default_path(name: str) -> Path:
    """runs/<name>, with -2, -3, ... behind it if that is taken."""
    path, n = Path("runs") / name, 1
    while path.exists():
        n += 1
        path = Path("runs") / f"{name}-{n}"
    return path


def open_run(path: Path) -> Run:
    """The run in a folder. Raises UserError if it is no run, or its config.json is not as saved."""
    try:
        if not (path / "config.json").is_file():
            raise UserError(f"{path} is no run of IronGPT: it has no config.json")
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e
    values = unsealed(read(path / "config.json"), path / "config.json")
    try:
        if values["format"] != FORMAT:
            raise UserError(f"format {values['format']!r} is not of this version, {__version__}")
        texts = {name: values[name] for name in ("preset", "data", "data_sha256")}
        if not all(isinstance(text, str) for text in texts.values()):
            raise UserError(f"{', '.join(texts)} must be strings")
        model = from_json(GPTConfig, values["model"])
        train = from_json(TrainConfig, values["train"])
    except (UserError, KeyError) as e:
        raise UserError(f"{path / 'config.json'} does not describe a run: {e}") from e
    return Run(path, RunConfig(model=model, train=train, **texts))


def load_checkpoint(
    run: Run, which: str
) -> tuple[checkpoint.Tensors, checkpoint.Tensors, CharTokenizer, dict[str, Any]]:
    """Weights, optimizer, tokenizer and state of the checkpoint `last` or `best`.

    Raises UserError unless it fits the run's model, before any memory is allocated for the model.
    """
    folder = run.path / which
    weights, optimizer, vocabulary, state = checkpoint.load(folder)
    try:
        tokenizer = CharTokenizer.from_json(vocabulary)
    except UserError as e:
        raise UserError(f"{folder / 'tokenizer.json'}: {e}") from e
    config, count = run.config.model, sum(w.numel() for w in weights.values())
    check(
        tokenizer.vocab_size == config.vocab_size,
        f"{folder} has another vocabulary: {tokenizer.vocab_size} tokens, "
        f"and the run's model has {config.vocab_size}",
    )
    check(
        count == config.n_params(),
        f"{folder} has another model: {count:,} weights, "
        f"and the run's model has {config.n_params():,}",
    )
    return weights, optimizer, tokenizer, state


def check_free(path: Path) -> None:
    """Raises UserError unless a run can be made at `path`: it is not there, or an empty folder."""
    try:
        taken = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    except OSError as e:
        raise UserError(f"cannot write a run at {path}: {e.strerror}") from e
    if taken:
        raise UserError(f"--out {path} exists: choose another folder, or --resume {path}")


def _encode(config: RunConfig) -> bytes:
    return sealed(
        {
            "format": FORMAT,
            "irongpt": __version__,
            "preset": config.preset,
            "data": config.data,
            "data_sha256": config.data_sha256,
            "model": to_json(config.model),
            "train": to_json(config.train),
        }
    )

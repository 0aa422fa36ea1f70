"""A run's folder: its configuration (config.json), metrics (metrics.jsonl) and checkpoints.

The checkpoints are the folders last and best; loss.png and sample.txt are made from the metrics.
result.json has the loss of best over the entire validation text, once the training has ended, but
not where it has reached its target loss.
"""

import contextlib
import json
import os
import reprlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from irongpt import __version__
from irongpt.config import DataConfig, GPTConfig, TrainConfig, check, from_json
from irongpt.data.tokenizer import Tokenizer
from irongpt.data.tokenizer import from_json as tokenizer_from_json
from irongpt.errors import UserError
from irongpt.files import (
    finite,
    new_folder,
    read,
    remove,
    replace_file,
    reported,
    sealed,
    unsealed,
    write,
)
from irongpt.runs import checkpoint
from irongpt.runs.lock import NAME, Lock

FORMAT = 1
IMPORTED = "imported"  # the preset of a run that `irongpt import` has made
RUNS = Path("runs")  # the parent of the runs for which no folder is given
UNFINISHED = ".new-*"  # of a run that is being created
WRITTEN = "last best config.json metrics.jsonl loss.png sample.txt result.json".split()

Record = dict[str, Any]


@dataclass(frozen=True)
class RunConfig:
    """Determines a run, together with the text.

    data_sha256: empty for an imported run until it is trained on a text.
    """

    preset: str
    data: DataConfig
    data_sha256: str
    model: GPTConfig
    train: TrainConfig


class RunFolder:
    """A run's folder. `claim` makes and locks it, `create` fills it, `open_run` opens one."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path, self.config = path, config
        self.last, self.best = path / "last", path / "best"  # checkpoints
        self.metrics = path / "metrics.jsonl"
        self.lock: Lock | None = None
        self.made: list[Path] = []  # folders that did not exist, the deepest first

    def claim(self) -> None:
        """Makes the folder if it does not exist, and takes its lock. The caller releases both.

        Raises UserError if it is not empty, cannot be written, or another process has it.
        """
        check_run_is_new(self.path)
        self.made = [p for p in (self.path, *self.path.parents) if not p.exists()]
        with reported(f"cannot write a run at {self.path}", disk=self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = Lock(self.path)
            check_run_is_new(self.path)  # again: another process may have been faster

    def release(self) -> None:
        """Frees the lock. Folders that `claim` made are removed if there is no run in them."""
        if self.lock is not None:
            self.lock.release()
        for folder in self.made:  # a run is not empty, and stays
            with contextlib.suppress(OSError):
                folder.rmdir()

    def create(
        self, save_first: Callable[[Path], None], files: dict[str, str] | None = None
    ) -> None:
        """Fills the claimed folder with a first checkpoint and config.json, which makes it a run.

        save_first: writes the checkpoint of step 0 into the folder it is given.
        files: the digests of the text's files, which files.json keeps if there are any.
        Raises UserError, and leaves nothing, if the folder cannot be written.
        """

        def fill(folder: Path) -> None:
            if files:
                write(folder / "files.json", sealed({"files": files}))
            write(folder / "config.json", _encode(self.config))
            save_first(folder / "last")

        for unfinished in [*self.path.glob(UNFINISHED)]:  # of a killed start
            remove(self.path / "last", self.path / "files.json", unfinished)
        new_folder(self.path, "run", fill)

    def resume(
        self, config: RunConfig, step: int, files: dict[str, str], evaluated_at: int
    ) -> None:
        """Writes config.json, and deletes records after `step` and remains of a killed save.

        files: as for `create`, if the run is trained on another text from now on.
        evaluated_at: the last evaluation that is complete; the record of a later one is deleted,
        because that evaluation is repeated.
        """
        if config.data_sha256 != self.config.data_sha256:
            path = self.path / "files.json"
            if files:
                replace_file(path, sealed({"files": files}))
            else:
                path.unlink(missing_ok=True)
            (self.path / "result.json").unlink(missing_ok=True)  # of the earlier text
        self.config = config
        records = [
            r
            for r in self.records()
            if r["step"] <= step and (r["val_loss"] is None or r["step"] <= evaluated_at)
        ]
        replace_file(self.metrics, "".join(json.dumps(r) + "\n" for r in records).encode())
        replace_file(self.path / "config.json", _encode(config))
        for name in WRITTEN:
            for temporary in self.path.glob(f".{name}-????????"):
                remove(temporary)

    def check_text(self, sha256: str, files: dict[str, str], given: str) -> None:
        """Raises UserError unless this is the text of the run, and names the files that differ.

        files: the digests of its files. given: what the message calls the text.
        """
        if sha256 == self.config.data_sha256:
            return
        changes, path = [], self.path / "files.json"
        before = unsealed(read(path), path)["files"] if path.is_file() else {}
        for what, names in (
            ("new", files.keys() - before.keys()),
            ("removed", before.keys() - files.keys()),
            ("changed", {f for f in files.keys() & before.keys() if files[f] != before[f]}),
        ):
            if names and before and files:
                listed = ", ".join(sorted(names)[:3]) + ", ..." * (len(names) > 3)
                changes.append(f"{len(names):,} {what} ({listed})")
        details = f": {'; '.join(changes)}" if changes else ""
        raise UserError(
            f"{given} is not the text that {self.path} is trained on{details}: "
            "give that text with --data, or start a new run"
        )

    def append(self, record: Record) -> None:
        """Adds a line to metrics.jsonl. Non-finite numbers become null."""
        if self.lock is not None:
            self.lock.check()
        with open(self.metrics, "a", encoding="utf-8") as f:
            f.write(json.dumps(finite(record)) + "\n")

    def result(self, step: int) -> dict[str, Any] | None:
        """The saved evaluation of `best` on the entire validation text; None if it is of another
        step."""
        path = self.path / "result.json"
        try:
            values = unsealed(read(path), path)
        except UserError:  # it is computed again
            return None
        losses = (values.get(name, "missing") for name in ("val_loss", "bits_per_byte"))
        return values if values.get("step") == step and all(map(_is_number, losses)) else None

    def write_result(self, values: dict[str, Any]) -> None:
        replace_file(self.path / "result.json", sealed(finite(values)))

    def records(self) -> list[Record]:
        """The lines of metrics.jsonl, up to one that is incomplete because of a kill."""
        records = []
        for line in read(self.metrics).splitlines() if self.metrics.exists() else []:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not _is_record(record):
                raise UserError(f"{self.metrics} has a line that is not a record: {line[:60]!r}")
            records.append(record)
        return records


class ReadOnlyRunFolder(RunFolder):
    """The run folder in the processes other than process 0, which alone writes to it."""

    def _nothing(self, *args: Any) -> None:
        """Does nothing."""

    claim = create = append = write_result = _nothing  # type: ignore[assignment]

    def resume(self, config: RunConfig, *args: Any) -> None:
        self.config = config


def claim_default(name: str, config: RunConfig) -> RunFolder:
    """Claims runs/<name>, with the suffix -2, -3, ... if that exists. Raises UserError."""
    run, n = RunFolder(RUNS / name, config), 1
    while True:
        try:
            if not run.path.exists():
                run.claim()
                return run
        except UserError:
            run.release()
            if not run.path.exists():  # else another process was faster
                raise
        n += 1
        run = RunFolder(RUNS / f"{name}-{n}", config)


def check_runs_can_be_written() -> None:
    """Raises UserError unless `claim_default` can make a folder."""
    parent = RUNS if os.path.lexists(RUNS) else Path()
    writable = os.path.isdir(parent) and os.access(parent, os.W_OK)
    check(writable, f"cannot write to {parent.absolute()}: give a folder for the run with --out")


def open_run(path: Path) -> RunFolder:
    """Opens a run. Raises UserError if the folder is not a run or config.json was changed."""
    with reported(f"cannot read {path}"):
        if not (path / "config.json").is_file():
            raise UserError(f"{path} is not an IronGPT run: it has no config.json")
    values = unsealed(read(path / "config.json"), path / "config.json")
    try:
        if values["format"] != FORMAT:
            raise UserError(f"its format is {reprlib.repr(values['format'])}")
        preset, data_sha256 = values["preset"], values["data_sha256"]
        data = _data_config(values["data"])
        model = from_json(GPTConfig, values["model"])
        train = from_json(TrainConfig, values["train"])
    except (UserError, KeyError) as e:
        other = str(values.get("irongpt"))[:20]
        versions = (
            f" (it is of IronGPT {other}, this is {__version__})" if other != __version__ else ""
        )
        raise UserError(f"{path / 'config.json'} does not describe a run: {e}{versions}") from e
    return RunFolder(path, RunConfig(preset, data, data_sha256, model, train))


def load_checkpoint(
    run: RunFolder, which: str
) -> tuple[checkpoint.Tensors, checkpoint.Tensors, Tokenizer, dict[str, Any]]:
    """Weights, optimizer, tokenizer and state of the checkpoint `last` or `best`.

    Raises UserError unless it fits the run's model, before any memory is allocated for the model.
    """
    folder = run.path / which
    weights, optimizer, vocabulary, state = checkpoint.load(folder)
    try:
        tokenizer = tokenizer_from_json(vocabulary)
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


def check_run_is_new(path: Path) -> None:
    """Raises UserError unless `path` does not exist or is an empty folder, or a link to one."""
    with reported(f"cannot write a run at {path}"):
        if path.is_symlink() and not path.exists():
            raise UserError(f"--out {path} is a link to a folder that does not exist")
        exists = path.exists() and not (path.is_dir() and all(map(_is_nothing, path.iterdir())))
    if exists:
        resume = f", or --resume {path}" if (path / "config.json").is_file() else ""
        raise UserError(f"--out {path} exists: choose another folder{resume}")


def _is_record(values: Any) -> bool:
    """Whether it is a line of metrics.jsonl."""
    return (
        isinstance(values, dict)
        and type(values.get("step")) is int
        and all(_is_number(values.get(name, "missing")) for name in ("train_loss", "val_loss"))
    )


def _is_number(value: Any) -> bool:
    """Whether the value is a number, or the null that a file has for a non-finite one."""
    return value is None or type(value) in (int, float)


def _is_nothing(path: Path) -> bool:
    """Whether a folder with this file counts as empty: system files, remains of a killed start."""
    systems = ("lost+found", ".DS_Store", "desktop.ini", "Thumbs.db")
    if path.name in ("last", "files.json"):  # moved up, and config.json was not
        return any(path.parent.glob(UNFINISHED)) and not (path.parent / "config.json").exists()
    return path.name in (NAME, *systems) or path.match(UNFINISHED)


def _data_config(value: Any) -> DataConfig:
    """The inverse of `asdict`, or a single source as earlier versions wrote it."""
    if isinstance(value, str):
        return DataConfig((value,))
    data = from_json(DataConfig, value)
    check(bool(data.sources), "it names no text")
    return replace(data, sources=tuple(data.sources), include=tuple(data.include))


def _encode(config: RunConfig) -> bytes:
    return sealed({"format": FORMAT, "irongpt": __version__, **asdict(config)})

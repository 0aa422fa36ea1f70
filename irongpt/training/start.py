"""Builds the `TrainingLoop` of a new or a resumed run from the flags of `irongpt train`."""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from irongpt_kernels import Ops

from irongpt import device as devices
from irongpt import ops
from irongpt.config import (
    PRESETS,
    DataConfig,
    Flags,
    GPTConfig,
    TrainConfig,
    check,
    flag,
)
from irongpt.console import Clock, say
from irongpt.data import corpus
from irongpt.data import tokens as tokenized
from irongpt.data.batches import Tokens
from irongpt.data.corpus import Corpus
from irongpt.data.tokenizer import Tokenizer
from irongpt.errors import UserError, out_of_memory
from irongpt.files import damaged, reported
from irongpt.model import GPT
from irongpt.runs import tensorboard
from irongpt.runs.lock import Lock
from irongpt.runs.run_folder import (
    IMPORTED,
    RUNS,
    ReadOnlyRunFolder,
    RunConfig,
    RunFolder,
    check_run_is_new,
    check_runs_can_be_written,
    claim_default,
    load_checkpoint,
    open_run,
)
from irongpt.training.distributed import World
from irongpt.training.loop import TrainingLoop, check_state
from irongpt.training.trainer import Trainer

# The flags that give a resumed run another text, and others that it may change, because any
# checkpoint can be loaded with them.
DATA_FLAGS = ("data", "val", "include", "encoding", "errors")
CHANGEABLE = """
    iters eval_every target_loss patience ops device dtype graph tensorboard sample_tokens
""".split()

TEXT = "while the text was read: use a smaller text"
MANY_EPOCHS = 20  # from here on a warning is printed


@dataclass(frozen=True)
class Setup:
    """Everything that a run is built from, except the text. It is decided once, from the flags, so
    that a mistake in a flag is reported before anything is downloaded."""

    preset: str
    data: DataConfig | None  # None: War and Peace, or python-docs if it cannot be downloaded
    model: GPTConfig  # vocab_size is 1 in a new run until the text is read
    train: TrainConfig
    device: torch.device
    precision: devices.Precision
    ops: Ops
    vocab_size: int | None = None  # of a new BPE; None: it depends on the size of the text


def new_setup(flags: Flags) -> Setup:
    """The preset's values, replaced by those that the user gave. Raises UserError."""
    device = devices.pick(flags.get("device", "auto"))
    preset = flags.get("preset") or ("iron" if device.type == "cuda" else "nano")
    train = TrainConfig(**_fields(TrainConfig, PRESETS[preset].train | flags))
    model = GPTConfig(**_fields(GPTConfig, PRESETS[preset].model | flags | {"vocab_size": 1}))
    size = flags.get("vocab_size", PRESETS[preset].vocab_size if train.tokenizer == "bpe" else None)
    vocab_size = tokenized.check_vocab_size(train.tokenizer, size)
    precision = devices.precision(train.dtype, device)
    if train.tensorboard:
        tensorboard.check_installed()
    module = ops.load(train.ops, device, model)
    data = _data_config(flags, DataConfig(PRESETS[preset].data) if PRESETS[preset].data else None)
    return Setup(preset, data, model, train, device, precision, module, vocab_size)


def resumed_setup(run: RunFolder, flags: Flags, first: bool = False) -> Setup:
    """The run's own values, with the changes that a resumed run may make. Raises UserError.

    first: whether the run was imported and not trained yet, so that its recipe may still change.
    """
    config = run.config
    stored = {**vars(config.model), **vars(config.train), "preset": config.preset}
    recipe = {f.name for f in dataclasses.fields(TrainConfig)} - {"tokenizer"}
    changeable = recipe | {"dropout"} if first else {*CHANGEABLE}
    for name, value in flags.items():
        check(
            name in changeable | {*DATA_FLAGS} or value == stored.get(name),
            f"{flag(name)} cannot change when a run is resumed: leave it out, or start a new run",
        )
    data = _data_config(flags, config.data)
    check(
        "data" in flags or bool(config.data_sha256),
        f"{run.path} is imported and has no text yet: give it one with --data",
    )
    check(
        "data" in flags or corpus.STDIN not in config.data.sources,
        f"{run.path} is trained on text from the standard input: give that text with --data",
    )
    train = replace(config.train, **{k: v for k, v in flags.items() if k in changeable & recipe})
    model = replace(config.model, dropout=flags.get("dropout", config.model.dropout))
    device = devices.pick(train.device)
    precision = devices.precision(train.dtype, device)
    if train.tensorboard:
        tensorboard.check_installed()
    module = ops.load(train.ops, device, model)
    return Setup(config.preset, data, model, train, device, precision, module)


def new_run(flags: Flags, clock: Clock, world: World, cleanup: ExitStack) -> TrainingLoop:
    """Creates the run's folder, with a first checkpoint. `cleanup` releases it at the end."""
    if not world.rank:
        check_run_is_new(flags["out"]) if "out" in flags else check_runs_can_be_written()
    setup = new_setup({"shards": world.size} | flags if world.size > 1 else flags)
    _check_world(world, setup)
    if "preset" not in flags:
        kind = "GPU" if setup.device.type == "cuda" else "CPU"
        say(f"preset    {setup.preset}, the default on a {kind}; --preset selects another")
    config = RunConfig(setup.preset, DataConfig(()), "", setup.model, setup.train)
    run = (ReadOnlyRunFolder if world.rank else RunFolder)(flags.get("out", RUNS), config)
    cleanup.callback(run.release)
    if "out" in flags:
        run.claim()
    with world.local_first(), _report_out_of_memory(TEXT):
        text = _load(setup.data, run.path)
        tokenizer, tokens = tokenized.tokenize(text, setup.train.tokenizer, setup.vocab_size)
    model = replace(setup.model, vocab_size=tokenizer.vocab_size)
    setup = replace(setup, model=model, train=_recipe(setup, len(tokens.train), flags))
    data = _stored(setup.data) if setup.data else DataConfig((text.name,))
    config = RunConfig(setup.preset, data, text.sha256, setup.model, setup.train)
    run.config = config
    if not ("out" in flags or world.rank):
        run = claim_default(f"{text.name}-{setup.preset}", config)
        cleanup.callback(run.release)
    path = Path(world.gather(str(run.path))[0])
    if world.rank:
        run = ReadOnlyRunFolder(path, config)
    training = _training(run, setup, text, tokenizer, tokens, clock, world)
    run.create(training.save, text.files)
    return training


def resumed_run(
    path: Path, flags: Flags, clock: Clock, world: World, cleanup: ExitStack
) -> TrainingLoop:
    """Continues a run from its last checkpoint. For the flags allowed see `resumed_setup`.

    `cleanup` releases the run at the end.
    """
    run = open_run(path)
    if world.rank:
        run = ReadOnlyRunFolder(path, run.config)
    else:
        run.lock = Lock(path)
    cleanup.callback(run.release)
    weights, optimizer, tokenizer, state = load_checkpoint(run, "last")
    first = run.config.preset == IMPORTED and state.get("step") == 0
    setup = resumed_setup(run, flags, first)
    data = setup.data or run.config.data
    _check_world(world, setup)
    with world.local_first(), _report_out_of_memory(TEXT):
        text = _load(data, run.path, run.config.data_sha256)
        given = "data" in flags or "val" in flags
        other_text = not first and given and text.sha256 != run.config.data_sha256
        if not (first or other_text):
            run.check_text(text.sha256, text.files, ", ".join(data.sources))
        tokens = tokenized.encode(text, tokenizer)
    training = _training(run, setup, text, tokenizer, tokens, clock, world, state.get("step", 0))
    if other_text:
        say(
            f"warning   {', '.join(filter(None, (*data.sources, data.val)))} is not the text that "
            f"{run.path} was trained on: the run continues with it and keeps its vocabulary; "
            "best/ is replaced at the next evaluation"
        )
    try:
        check_state(state)
        if other_text:  # what is known about `best` is of the earlier text
            again = max(0, state["step"] - 1)
            state |= dict(best_val=None, best_step=0, not_better=0, evaluated_at=again)
        training.trainer.model.load_state_dict(weights)
        training.trainer.restore(state["step"], optimizer)
        training.restore(state)
        model, train = setup.model, setup.train
        config = RunConfig(setup.preset, _stored(data), text.sha256, model, train)
        with reported(f"cannot write to {run.path}", disk=run.path):
            if other_text:  # before config.json names this text, so that a kill in between is safe
                training.save(run.last)
            run.resume(config, training.trainer.step, text.files, training.evaluated_at)
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise damaged(run.last) from e
    return training


@contextmanager
def _report_out_of_memory(what: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as e:
        if not out_of_memory(e):
            raise
        raise UserError(f"out of memory {what}") from e


def _training(
    run: RunFolder,
    setup: Setup,
    text: Corpus,
    tokenizer: Tokenizer,
    tokens: Tokens,
    clock: Clock,
    world: World,
    step: int = 0,
) -> TrainingLoop:
    """The training loop of a model with new weights. Prints a summary of the run."""
    m, train, device, precision = setup.model, setup.train, setup.device, setup.precision
    devices.make_deterministic()
    torch.manual_seed(train.seed)
    size = f"for {m.n_params():,} parameters: start a run with a smaller --n-embd or --n-layer"
    with _report_out_of_memory(size):
        model = GPT(m, setup.ops).to(device)
        trainer = Trainer(model, tokens, train, device, precision.dtype, world)
    trainer.separate_generators()
    world.check_equal(
        {
            "text": text.sha256,
            "step": step,
            "dtype": devices.dtype_name(precision.dtype),
            **{flag(name): x for name, x in {**vars(m), **vars(train)}.items()},
        }
    )
    peak, source = devices.peak_flops(device, precision.dtype)
    peak *= world.size
    per_step = trainer.tokens_per_step()
    epochs = train.iters * per_step / len(tokens.train)

    count = len(tokens.train) + len(tokens.val)
    per_byte = f", {text.n_bytes / count:.2f} bytes per token" if train.tokenizer == "bpe" else ""
    kind = {"char": "distinct characters", "bpe": "BPE tokens"}[train.tokenizer]
    say(f"corpus    {text.name}: {text.n_bytes:,} bytes; {count:,} tokens{per_byte}")
    if setup.data and setup.data.val:
        size = f"{tokens.val_bytes:,} bytes; {len(tokens.val):,} tokens"
        say(f"val text  {setup.data.val}: {size}")
    say(f"tokenizer {m.vocab_size:,} {kind}")
    say(
        f"model     {m.n_params():,} parameters: {m.n_layer} layers, {m.n_head} heads, "
        f"width {m.n_embd}, context {m.context}"
    )
    say(
        f"device    {devices.describe(device)}; {devices.dtype_name(precision.dtype)} "
        f"({precision.reason}); {train.ops} ops; 100% MFU is {peak / 1e12:,.3g} TFLOP/s ({source})"
    )
    if train.shards > 1:
        say(f"shards    {train.shards} in every step; processes: {world.size}")
    for note in ops.notes(train.ops, device):
        say(f"kernels   {note}")
    say(
        f"training  {train.iters:,} steps of {per_step:,} tokens, {epochs:.1f} epochs; "
        f"seed {train.seed}"
    )
    if epochs > MANY_EPOCHS:
        say(
            f"warning   the model sees the text {epochs:.0f} times and may overfit; "
            "best/ keeps the checkpoint with the lowest validation loss"
        )
    return TrainingLoop(run, trainer, tokenizer, peak, clock)


def _check_world(world: World, setup: Setup) -> None:
    """Raises UserError unless these processes can train together."""
    world.check_device(setup.device)
    shards = setup.train.shards
    check(
        shards % world.size == 0,
        f"{world.size} processes cannot share {shards} shards evenly: "
        "use a number of processes that divides --shards",
    )
    check(
        world.size == 1 or not setup.data or corpus.STDIN not in setup.data.sources,
        "several processes cannot read standard input: give --data a file",
    )


def _recipe(setup: Setup, train_tokens: int, flags: Flags) -> TrainConfig:
    """The recipe of a new run, with at most the preset's epochs if it is trained on BPE tokens."""
    train = setup.train
    if train.tokenizer == "char" or "iters" in flags:
        return train
    per_step = train.batch_size * train.grad_accum * setup.model.context
    most = max(1, int(PRESETS[setup.preset].epochs * train_tokens / per_step))
    iters = min(train.iters, most)
    return replace(train, iters=iters, eval_every=min(train.eval_every, iters))


def _fields(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """The values that are fields of `cls`."""
    names = [f.name for f in dataclasses.fields(cls)]
    return {k: v for k, v in values.items() if k in names}


def _data_config(flags: Flags, stored: DataConfig | None = None) -> DataConfig | None:
    """The text that the flags name, else the stored one."""
    if stored is None and "data" not in flags:
        given = [flag(name) for name in DATA_FLAGS if name in flags]
        check(not given, f"{', '.join(given)} must come with --data FILE or --data FOLDER")
        return None
    old = stored or DataConfig(())
    sources = flags.get("data", old.sources)
    return DataConfig(
        (sources,) if isinstance(sources, str) else tuple(sources),
        tuple(flags.get("include", old.include)),
        flags.get("encoding", old.encoding),
        flags.get("errors", old.errors),
        flags.get("val", old.val),
    )


def _stored(data: DataConfig) -> DataConfig:
    """As config.json stores it: a path stays valid in another working folder."""

    def stored(source: str) -> str:
        names = (*corpus.BUILT_IN, corpus.STDIN)
        return source if source in names else os.path.realpath(os.path.expanduser(source))

    val = None if data.val is None else stored(data.val)
    return replace(data, sources=tuple(map(stored, data.sources)), val=val)


def _load(data: DataConfig | None, run: Path, sha256: str | None = None) -> Corpus:
    """The text. run: the run's folder. sha256: the digest of a resumed run's text."""
    if data is None:
        return corpus.load(None, say=say)
    options = vars(data) | dict(say=say, exclude=run, sha256=sha256)
    return corpus.load(options.pop("sources"), **options)

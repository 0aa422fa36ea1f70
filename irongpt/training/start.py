"""From what the user asked for to a Training that is ready: a new run, or one taken up again."""

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from irongpt import device as devices
from irongpt import launch_cache, ops
from irongpt.config import PRESETS, GPTConfig, TrainConfig, check, flag, to_json
from irongpt.console import Clock, say
from irongpt.data import corpus
from irongpt.data.batches import split
from irongpt.data.corpus import Corpus
from irongpt.data.tokenizer import CharTokenizer
from irongpt.errors import UserError
from irongpt.files import damaged
from irongpt.model import GPT
from irongpt.runs import checkpoint
from irongpt.runs.run_folder import RunConfig, RunFolder, check_free, default_path, open_run
from irongpt.training.loop import TrainingLoop
from irongpt.training.trainer import Trainer

# What may change when a run is taken up: none of it belongs to what has been computed so far.
CHANGEABLE = ("iters", "eval_every", "target_loss", "ops", "device", "dtype", "graph")


def new_run(given: dict[str, Any], clock: Clock) -> TrainingLoop:
    """given: the flags that the user gave, by their names in the configs, and preset, data, out."""
    out = Path(given["out"]) if "out" in given else None
    if out is not None:
        check_free(out)
    device = devices.pick(given.get("device", "auto"))
    preset = given.get("preset") or ("iron" if device.type == "cuda" else "nano")
    train = TrainConfig(**_choose(TrainConfig, PRESETS[preset].train, given))
    # Mistakes in the flags are told before a corpus is downloaded: any vocabulary does for that.
    shape = _choose(GPTConfig, PRESETS[preset].model, given)
    devices.precision(train.dtype, device)
    ops.load(train.ops, device, GPTConfig(vocab_size=1, **shape))
    if "preset" not in given:
        why = "there is a GPU" if device.type == "cuda" else "this is for a CPU"
        say(f"preset    {preset}, as {why}; {flag('preset')} chooses")

    data = given.get("data")
    text = corpus.load(data, say=say)
    tokenizer = CharTokenizer.from_text(text.text)
    model = GPTConfig(vocab_size=tokenizer.vocab_size, **shape)
    spec = text.name if data is None else _data_spec(data)
    config = RunConfig(preset, spec, text.sha256, model, train)
    run = RunFolder(out or default_path(f"{text.name}-{preset}"), config)
    training = _prepare(run, config, text, tokenizer, clock)
    run.create(training.save)
    return training


def resumed_run(path: Path, given: dict[str, Any], clock: Clock) -> TrainingLoop:
    """Takes up a run where its last checkpoint stands. `given` may hold what is in CHANGEABLE."""
    run = open_run(path)
    stored = {**to_json(run.config.model), **to_json(run.config.train), "preset": run.config.preset}
    for name, value in given.items():
        check(
            name in (*CHANGEABLE, "data") or value == stored.get(name),
            f"{flag(name)} cannot change in a run that is resumed: leave it out or start anew",
        )
    data = given.get("data", run.config.data)
    train = replace(run.config.train, **{k: v for k, v in given.items() if k in CHANGEABLE})
    weights, optimizer, tokenizer, state = _load(run, "last")
    text = corpus.load(data, say=say)
    check(
        text.sha256 == run.config.data_sha256,
        f"{data} is not the text that {path} is trained on: name that text with {flag('data')}",
    )
    config = replace(run.config, train=train, data=_data_spec(data))
    training = _prepare(run, config, text, tokenizer, clock)
    try:
        training.trainer.model.load_state_dict(weights)
        training.trainer.restore(state["step"], optimizer)
        training.restore(state)
        run.resume(config, training.trainer.step)
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise damaged(run.last) from e
    except OSError as e:
        raise UserError(f"cannot write to {path}: {e.strerror}") from e
    return training


def trained_model(path: Path, which: str, op_set: str, device: str) -> tuple[GPT, CharTokenizer]:
    """The model of a run's best or last checkpoint, ready to sample from, and its vocabulary."""
    run = open_run(path)
    target = devices.pick(device)
    op_module = ops.load(op_set, target, run.config.model)
    weights, _, tokenizer, _ = _load(run, which)
    model = GPT(run.config.model, op_module)
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:
        raise damaged(path / which) from e
    return model.to(target), tokenizer


def _load(
    run: RunFolder, which: str
) -> tuple[checkpoint.Tensors, checkpoint.Tensors, CharTokenizer, dict[str, Any]]:
    """A checkpoint that fits the run's model. Looks before anything of the model's size is made."""
    folder = run.path / which
    weights, optimizer, vocabulary, state = checkpoint.load(folder)
    try:
        tokenizer = CharTokenizer.from_json(vocabulary)
    except UserError as e:
        raise UserError(f"{folder / 'tokenizer.json'}: {e}") from e
    config, count = run.config.model, sum(w.numel() for w in weights.values())
    check(
        tokenizer.vocab_size == config.vocab_size,
        f"{folder} is of another vocabulary: {tokenizer.vocab_size} tokens, "
        f"and the run's model has {config.vocab_size}",
    )
    check(
        count == config.n_params(),
        f"{folder} is of another model: {count:,} weights, "
        f"and the run's model has {config.n_params():,}",
    )
    return weights, optimizer, tokenizer, state


def _prepare(
    run: RunFolder, config: RunConfig, text: Corpus, tokenizer: CharTokenizer, clock: Clock
) -> TrainingLoop:
    """A model with fresh weights, on its device, with its batches; and says what they are."""
    train = config.train
    device = devices.pick(train.device)
    precision = devices.precision(train.dtype, device)
    devices.make_deterministic()
    torch.manual_seed(train.seed)
    ids = tokenizer.encode(text.text)
    split(ids, config.model.context)  # a text too short is told of before a model is made
    model = GPT(config.model, ops.load(train.ops, device, config.model)).to(device)
    trainer = Trainer(model, ids, train, device, precision.dtype)
    peak, source = devices.peak_flops(device, precision.dtype)

    m, tokens = config.model, trainer.tokens_per_step()
    epochs = train.iters * tokens / len(trainer.train_batches.ids)
    say(f"corpus    {text.name}: {len(text.text):,} characters, {m.vocab_size} distinct")
    say(
        f"model     {m.n_params():,} parameters: {m.n_layer} layers, {m.n_head} heads, "
        f"width {m.n_embd}, context {m.context}"
    )
    say(
        f"device    {devices.describe(device)}; {str(precision.dtype)[6:]} ({precision.reason}); "
        f"{train.ops} ops; MFU 100% is {peak / 1e12:,.3g} TFLOP/s ({source})"
    )
    if note := ops.slow_note(train.ops, device):
        say(f"kernels   {note}")
    if note := launch_cache.note(train.ops, device):
        say(f"kernels   {note}")
    say(
        f"training  {train.iters:,} steps of {tokens:,} tokens, {epochs:.1f} epochs; "
        f"seed {train.seed}"
    )
    return TrainingLoop(run, trainer, tokenizer, peak, clock)


def _choose(cls: type, preset: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The preset's values with what the user gave over them, as far as `cls` has such fields."""
    names = [f.name for f in dataclasses.fields(cls)]
    return {k: v for k, v in {**preset, **given}.items() if k in names}


def _data_spec(data: str) -> str:
    """What config.json remembers of --data: still right in another working folder."""
    return data if data in corpus.BUILT_IN else str(Path(data).resolve())

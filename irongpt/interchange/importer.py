"""`irongpt import`: a run from a folder with a GPT2LMHeadModel of Hugging Face's transformers.

It reads what `irongpt export` writes, and any other GPT-2 whose shape our model has: in
config.json, model.safetensors and tokenizer.json. Pickled weights are not read.

The run is at step 0 and has no text yet. The first `irongpt train --resume RUN --data TEXT` may
change everything but the shape of the model. Its recipe is one for finetuning: the learning rate
and the schedule of transformers' Trainer.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from irongpt.config import DataConfig, GPTConfig, TrainConfig, check
from irongpt.data.tokenizer import BPETokenizer, CharTokenizer, Tokenizer
from irongpt.data.tokenizer import from_json as our_tokenizer
from irongpt.errors import UserError
from irongpt.files import check_free, damaged, read, reported
from irongpt.interchange.export import BIAS
from irongpt.interchange.gpt2_layout import Tensors, from_config_json, from_gpt2
from irongpt.runs import checkpoint
from irongpt.runs.run_folder import IMPORTED, RunConfig, RunFolder

RECIPE: dict[str, Any] = dict(
    iters=500, batch_size=4, grad_accum=4, lr=5e-5, warmup=20, decay="linear", weight_decay=0.1,
    eval_every=50, eval_windows=512,
)  # fmt: skip


def import_model(folder: Path, path: Path) -> GPTConfig:
    """Makes the run `path`, which must be new or empty. Returns the model's shape.

    Raises UserError, and then leaves nothing, if the folder has no model that IronGPT supports.
    """
    check_free(path, "run", f"{path} exists and is not empty: choose another folder")
    config = _read_json(folder, "config.json")
    tensors, metadata = _read_tensors(folder)
    vocabulary = _read_json(folder, "tokenizer.json")
    try:
        model = from_config_json(config, bias=metadata.get(BIAS) != "false")
        tokenizer = read_tokenizer(vocabulary)
        check(
            tokenizer.vocab_size == model.vocab_size,
            f"its tokenizer has {tokenizer.vocab_size:,} tokens and its model "
            f"{model.vocab_size:,}: the vocabulary does not fit",
        )
        weights = from_gpt2(tensors, model)
    except UserError as e:
        raise UserError(f"{folder} cannot be imported: {e}") from None
    kind = "char" if isinstance(tokenizer, CharTokenizer) else "bpe"
    train = TrainConfig(tokenizer=kind, **RECIPE)
    source = DataConfig((str(folder.resolve()),))
    random = torch.Generator().manual_seed(train.seed).get_state()
    state: dict[str, Any] = dict(
        step=0, evaluated_at=0, best_val=None, best_step=0, bad_steps=0, rows=[], seconds=0.0
    )

    def save_first(last: Path) -> None:
        checkpoint.save(last, weights, {"rng.cpu": random}, tokenizer.to_json(), state)

    run = RunFolder(path, RunConfig(IMPORTED, source, "", model, train))
    try:
        run.claim()
        run.create(save_first)
    finally:
        run.release()
    return model


def read_tokenizer(value: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a tokenizer.json: one of ours, or that of a GPT-2.

    Raises UserError for any other: its ids would be wrong.
    """
    try:
        model, pre_tokenizer = value["model"], value["pre_tokenizer"]
        added = {token["content"]: token["id"] for token in value["added_tokens"]}
        vocab = {**model["vocab"], **added}
        if pre_tokenizer is not None and pre_tokenizer["type"] == "ByteLevel":
            pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
            tokenizer = BPETokenizer(tuple((vocab[a], vocab[b]) for a, b in pairs), gpt2=True)
            ours = tokenizer.to_json()
            same = (
                ours["model"]["vocab"] == vocab
                and {"use_regex": True, **pre_tokenizer} == ours["pre_tokenizer"]
                and value["normalizer"] is None
                and (value["post_processor"] or {"type": "ByteLevel"})["type"] == "ByteLevel"
                and not any(model.get(k) for k in ("dropout", "unk_token", "ignore_merges"))
            )
            if same:
                return tokenizer
        else:
            return our_tokenizer({**value, "truncation": None, "padding": None})
    except (LookupError, TypeError, ValueError, AttributeError, UserError):
        pass
    raise UserError(
        "its tokenizer.json is neither one of IronGPT's nor that of a GPT-2: 256 bytes, "
        "a token for each merge, and <|endoftext|> as the last one"
    )


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    with reported(f"cannot read {folder}"):
        check(path.is_file(), f"{folder} has no {name}: {_ADVICE}")
    try:
        values = json.loads(read(path))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object")
    return values


_ADVICE = "save_pretrained() of transformers writes config.json, model.safetensors, tokenizer.json"


def _read_tensors(folder: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of model.safetensors, and its metadata."""
    path = folder / "model.safetensors"
    check(path.is_file(), f"{folder} has no model.safetensors: {_ADVICE}")
    try:
        with reported(f"cannot read {path}"), safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except SafetensorError as e:
        raise damaged(path) from e

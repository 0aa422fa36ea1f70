"""`irongpt export`: a run as a folder that Hugging Face's transformers loads.

    config.json, generation_config.json    the shape, and the defaults of generate()
    model.safetensors                      the weights, named as in GPT2LMHeadModel
    tokenizer.json, tokenizer_config.json  the vocabulary
    README.md                              the model card: text, recipe, losses

tokenizer_config.json names the class PreTrainedTokenizerFast. Without it transformers would take
the class of the architecture, GPT2Tokenizer, which silently replaces our pre-tokens by GPT-2's.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save as to_bytes

from irongpt import __version__
from irongpt.data.tokenizer import END, CharTokenizer, Tokenizer
from irongpt.device import DTYPES
from irongpt.files import check_free, damaged, new_folder, write
from irongpt.interchange.gpt2_layout import Tensors, to_config_json, to_gpt2
from irongpt.runs.run_folder import RunFolder, load_checkpoint, open_run

Values = dict[str, Any]
BIAS = "bias"  # the key in the metadata of model.safetensors: whether the run's model has biases


@dataclass(frozen=True)
class Trained:
    """A checkpoint of a run with its tensors in GPT-2's layout."""

    run: RunFolder
    step: int
    tokenizer: Tokenizer
    tensors: Tensors


def load(path: Path, which: str, dtype: str = "float32") -> Trained:
    """The checkpoint `best` or `last` of the run at `path`. Raises UserError."""
    run = open_run(path)
    weights, _, tokenizer, state = load_checkpoint(run, which)
    try:
        tensors = to_gpt2(weights, run.config.model, DTYPES[dtype])
        return Trained(run, int(state["step"]), tokenizer, tensors)
    except (KeyError, TypeError, ValueError) as e:
        raise damaged(path / which) from e


def export(path: Path, folder: Path, which: str = "best", dtype: str = "float32") -> None:
    """Writes `folder` from the checkpoint `best` or `last` of the run at `path`.

    folder: new, or empty. dtype: that of the weights, float32 or float16. Raises UserError, and
    then leaves nothing.
    """
    check_free(folder, "model", f"{folder} exists and is not empty: choose another folder")
    trained = load(path, which, dtype)
    tokenizer, model = trained.tokenizer, trained.run.config.model
    metadata = {"format": "pt", BIAS: json.dumps(model.bias)}
    end = {} if tokenizer.end is None else {"bos_token": END, "eos_token": END, "pad_token": END}
    generation: Values = dict(do_sample=True, temperature=0.8, max_length=model.context)
    generation |= {f"{name}_id": tokenizer.end for name in end}
    encoding: Values = dict(tokenizer_class="PreTrainedTokenizerFast")
    encoding |= dict(model_max_length=model.context, clean_up_tokenization_spaces=False) | end
    contents = {
        "config.json": _json(to_config_json(model, tokenizer.end, dtype)),
        "generation_config.json": _json(generation),
        "model.safetensors": to_bytes(trained.tensors, metadata),
        "tokenizer.json": _json(tokenizer.to_json()),
        "tokenizer_config.json": _json(encoding),
        "README.md": card(trained, dtype).encode(errors="replace"),
    }

    def fill(temporary: Path) -> None:
        for name, data in contents.items():
            write(temporary / name, data)

    new_folder(folder, "model", fill)


def card(trained: Trained, dtype: str) -> str:
    """The model card, in Markdown."""
    run, tokenizer = trained.run, trained.tokenizer
    model, train, data = run.config.model, run.config.train, run.config.data
    name = run.path.resolve().name
    text = ", ".join(os.path.basename(source) for source in data.sources)
    kind = "characters" if isinstance(tokenizer, CharTokenizer) else "BPE tokens"
    tokens = train.batch_size * train.grad_accum * model.context
    rows = [
        ("Text", f"{text} (SHA-256 {run.config.data_sha256[:16] or 'unknown'})"),
        ("Vocabulary", f"{model.vocab_size:,} {kind}"),
        (
            "Model",
            f"GPT-2, {model.n_params():,} parameters: {model.n_layer} layers, {model.n_head} "
            f"heads, width {model.n_embd}, context {model.context:,}; weights in {dtype}",
        ),
        (
            "Recipe",
            f"step {trained.step:,} of {train.iters:,}, {tokens:,} tokens each; {train.optimizer}, "
            f"learning rate {train.lr:g} ({train.decay}, {train.warmup:,} steps of warmup), "
            f"weight decay {train.weight_decay:g}, dropout {model.dropout:g}, seed {train.seed}",
        ),
        *_losses(trained),
    ]
    limits = [f"The model sees at most {model.context:,} tokens; transformers fails above that."]
    if isinstance(tokenizer, CharTokenizer):
        limits.append(
            f"The vocabulary is the {len(tokenizer.chars):,} characters of its text; transformers "
            "drops any other character without a warning."
        )
    table = "\n".join(f"| {what} | {value} |" for what, value in rows)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, irongpt]
---
# {name}

A language model trained from scratch with IronGPT {__version__}.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{name}")  # this folder
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("\\n", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs)[0]))
```

{" ".join(limits)}
"""


def _losses(trained: Trained) -> list[tuple[str, str]]:
    """The losses of the checkpoint's step, and of the entire validation text if they are known."""
    run, step = trained.run, trained.step
    rows = []
    for record in run.records():
        if record["step"] == step and record["val_loss"] is not None:
            losses = (
                f"{record['train_loss']:.4f} on training text, {record['val_loss']:.4f} on "
                "validation text, in nats per token"
            )
            rows.append(("Losses in training", losses))
    if result := run.result(step):
        loss, bits = result["val_loss"], result["bits_per_byte"]
        losses = f"{loss:.4f} nats per token, {bits:.4f} bits per byte"
        rows.append(("Entire validation text", losses))
    return rows


def _json(values: Values) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()

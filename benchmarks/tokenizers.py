"""Measures how long BPE takes to train and to encode, and what it gains over characters.

    python -m benchmarks.tokenizers                      all of it, on War and Peace and python-code
    python -m benchmarks.tokenizers --parts speed        only the seconds of training and encoding
    python -m benchmarks.tokenizers --parts runs --seconds 120 --data python-code

    speed        seconds to train a vocabulary and to encode, on one core, interleaved with Hugging
                 Face's tokenizers, which has to give the same ids
    compressors  bits per byte of general compressors for the validation text, given the training
                 text
    runs         bits per byte of a model trained on characters, and of one trained on BPE tokens
                 for the same seconds on the same cores

speed needs the package tokenizers, and compressors needs pyppmd.
"""

import bz2
import gzip
import json
import lzma
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.measure import result_file
from benchmarks.measure.rows import shown
from irongpt import device as devices
from irongpt import ops
from irongpt.config import PRESETS, TOKENIZERS, GPTConfig, TrainConfig
from irongpt.data import bpe, corpus, tokens
from irongpt.data.corpus import Corpus
from irongpt.data.pre_tokens import PreTokens
from irongpt.data.tokenizer import BPETokenizer
from irongpt.model import GPT
from irongpt.training.trainer import Trainer

PARTS = ("speed", "compressors", "runs")
SPEED_BYTES = 8 * 10**6  # the most of a text; above that several processes encode it
Row = dict[str, Any]


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def speed(text: Corpus) -> Row:
    """Seconds on one core: to cut the text into pre-tokens, to train, to encode."""
    import tokenizers

    whole = text.text[:SPEED_BYTES]
    size = len(whole.encode())
    words, counts = timed(lambda: Counter(bpe.pre_tokens(whole)))
    merging, merges = timed(
        lambda: bpe.train({w.encode(): n for w, n in counts.items()}, tokens.SMALL - 257)
    )
    tokenizer = BPETokenizer(tuple(merges))
    other = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.to_json()))
    other.encode_special_tokens = True

    def encode() -> Any:
        cold = BPETokenizer(tuple(merges))  # without the tables of the first
        cut = PreTokens((whole.encode(),), (), marked=False)
        ids = [[cold.end], *map(cold.encode_word, list(cut.words)[1:])]
        return cut.replace(ids)[0]

    ours, theirs = [], []
    for _ in range(3):
        seconds, ids = timed(encode)
        ours.append(seconds)
        seconds, encoding = timed(lambda: other.encode(whole))
        theirs.append(seconds)
    if ids.tolist() != encoding.ids:
        raise AssertionError("tokenizers gives other ids")
    return {
        "text": text.name,
        "bytes": size,
        "vocab_size": tokenizer.vocab_size,
        "train_seconds": words + merging,
        "encode_seconds": min(ours),
        "tokenizers_encode_seconds": min(theirs),
        "bytes_per_token": size / len(ids),
    }


def compressors(text: Corpus) -> Row:
    """Bits per byte of the validation text: size(training + validation) - size(training)."""
    import pyppmd

    packers: dict[str, Callable[[bytes], bytes]] = {
        "gzip": lambda data: gzip.compress(data, 9),
        "bzip2": lambda data: bz2.compress(data, 9),
        "xz": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
        "PPMd": lambda data: pyppmd.compress(data, max_order=8, mem_size=256 << 20),
    }
    train, val = (b"".join(part) for part in (text.train, text.val))
    row: Row = {"text": text.name, "val_bytes": len(val)}
    for name, pack in packers.items():
        row[name] = (len(pack(train + val)) - len(pack(train))) * 8 / len(val)
    return row


def run(text: Corpus, kind: str, seconds: float, device: torch.device, preset: str) -> Row:
    """Trains for about `seconds` and evaluates the model on the entire validation text."""
    p = PRESETS[preset]
    tokenizer, ids = tokens.tokenize(text, kind)
    config = GPTConfig(vocab_size=tokenizer.vocab_size, **p.model)
    recipe = TrainConfig(**p.train | dict(tokenizer=kind, iters=10**6))
    dtype = devices.precision("auto", device).dtype

    def trainer(recipe: TrainConfig) -> Trainer:
        torch.manual_seed(recipe.seed)
        model = GPT(config, ops.load("builtin", device, config)).to(device)
        return Trainer(model, ids, recipe, device, dtype)

    def steps(t: Trainer, n: int) -> float:
        start = time.perf_counter()
        for _ in range(n):
            row = t.train_step()
        row.tolist()  # waits for the device
        return time.perf_counter() - start

    probe = trainer(recipe)
    steps(probe, 5)
    iters = max(30, round(seconds / (steps(probe, 25) / 25)))
    t = trainer(replace(recipe, iters=iters))
    spent = steps(t, iters)
    loss = t.evaluate_all()
    assert loss is not None
    return {
        "text": text.name,
        "tokenizer": kind,
        "vocab_size": tokenizer.vocab_size,
        "parameters": config.n_params(),
        "steps": iters,
        "seconds": spent,
        "epochs": iters * t.tokens_per_step() / len(ids.train),
        "val_loss": loss,
        "bits_per_byte": ids.bits_per_byte(loss),
    }


def main(argv: list[str] | None = None) -> None:
    parser = result_file.parser("benchmarks.tokenizers", __doc__)
    help = f"measure only these parts: {', '.join(PARTS)} [all]"
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, metavar="NAME", help=help
    )
    usual, help = ["war-and-peace", "python-code"], "texts to measure [war-and-peace python-code]"
    parser.add_argument("--data", nargs="+", metavar="TEXT", default=usual, help=help)
    help = "model and batch size of the runs [nano-code]"
    parser.add_argument("--preset", choices=list(PRESETS), default="nano-code", help=help)
    help = "training time of each run [120]"
    parser.add_argument("--seconds", type=float, default=120, help=help)
    args, device = result_file.parsed(parser, argv)
    devices.make_deterministic()
    options = dict(seconds=args.seconds, device=device, preset=args.preset)
    calls: dict[str, list[Callable[[Corpus], Row]]] = {
        "speed": [speed],
        "compressors": [compressors],
        "runs": [partial(run, kind=kind, **options) for kind in TOKENIZERS],
    }
    with result_file.Section("tokenizers", device, args) as section:
        section.put(preset=args.preset, **{part: [] for part in PARTS})
        for name in args.data:
            text = corpus.load(name, say=print)
            for part in args.parts:
                for measure in calls[part]:
                    row = measure(text)
                    print(part, ", ".join(f"{k} {shown(v)}" for k, v in row.items()), flush=True)
                    section.put(**{part: [*section.values[part], row]})


if __name__ == "__main__":
    main()

"""`irongpt generate`: prints a prompt and the text with which a trained model continues it."""

import sys
import time
from collections.abc import Iterable
from itertools import chain, takewhile
from pathlib import Path

from irongpt import device as devices
from irongpt import ops
from irongpt.config import SampleConfig
from irongpt.console import say_on_stderr
from irongpt.data.tokenizer import stream
from irongpt.generation.sample import generate_batch, heal, printable, start_ids, trained_model


def generate(
    run: Path,
    checkpoint: str,
    prompt: str,
    config: SampleConfig,
    stop_at_end: bool,
    op_set: str,
    device: str,
) -> None:
    """Prints `config.samples` texts (a single one token by token), and the speed on stderr.

    checkpoint: `best` or `last`. prompt: an empty one is the start of a document, or a line break.
    stop_at_end: a text ends before its first <|endoftext|>.
    """
    model, tokenizer = trained_model(run, checkpoint, op_set, device)
    documents = (run / "files.json").exists()
    target, context = model.wte.weight.device, model.config.context
    for note in ops.notes(op_set, target):
        say_on_stderr(note)
    first = start_ids(tokenizer, documents)
    ids = tokenizer.encode(prompt).tolist() if prompt else first
    if len(ids) > context:
        say_on_stderr(f"the prompt has {len(ids):,} tokens: only the last {context:,} are used")

    # A byte of the prompt that is not UTF-8 is written as it came.
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]
    terminal = sys.stdout.isatty()
    show = printable if terminal else str
    dtype = devices.precision("auto", target).dtype
    start = time.perf_counter()
    prompts, skip = heal(model, tokenizer, ids, config, dtype, first if prompt else ())
    steps: Iterable[list[int]] = generate_batch(model, prompts, config, dtype)
    if config.samples > 1:  # a single text is printed token by token
        steps = list(steps)
    total, text = 0, ""
    for sample, ids in enumerate(prompts):
        text = prompt if sample == 0 else f"\n---\n{prompt}"
        sys.stdout.write(show(text))
        row: Iterable[int] = (step[sample] for step in steps)
        if stop_at_end:
            row = takewhile(lambda token: token != tokenizer.end, row)
        count = -1  # without the last token of the prompt
        for piece in stream(tokenizer, chain(ids[-1:], row), skip):
            text = piece or text
            sys.stdout.write(show(piece))
            if config.samples == 1:
                sys.stdout.flush()
            count += 1
        total += min(count, config.tokens)  # one more piece may end a character
    if terminal and not text.endswith("\n"):
        sys.stdout.write("\n")
    sys.stdout.flush()
    say_on_stderr(f"{total:,} tokens, {total / (time.perf_counter() - start):,.0f} tokens/s")

"""`irongpt generate`: prints a prompt and the text with which a trained model continues it."""

import sys
import time
from collections.abc import Iterable, Iterator
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
    steps = generate_batch(model, prompts, config, dtype)

    def pieces(last_of_prompt: int, rest: Iterable[int]) -> Iterator[str]:
        """The text after the prompt, piece by piece."""
        if stop_at_end:
            rest = takewhile(lambda token: token != tokenizer.end, rest)
        return stream(tokenizer, chain([last_of_prompt], rest), skip)

    count, piece = 0, prompt
    if config.samples == 1:
        sys.stdout.write(show(prompt))
        for count, text in enumerate(  # noqa: B007
            pieces(prompts[0][-1], (step[0] for step in steps))
        ):
            piece = text or piece
            sys.stdout.write(show(text))
            sys.stdout.flush()
    else:
        rows = zip(*steps, strict=True) if config.tokens else [()] * config.samples
        texts = ["".join(pieces(p[-1], row)) for p, row in zip(prompts, rows, strict=True)]
        count = config.tokens * config.samples
        piece = "\n---\n".join(show(prompt + text) for text in texts)
        sys.stdout.write(piece)
    if terminal and not piece.endswith("\n"):
        sys.stdout.write("\n")
    sys.stdout.flush()
    count = min(count, config.tokens * config.samples)  # one more piece may end a character
    say_on_stderr(f"{count:,} tokens, {count / (time.perf_counter() - start):,.0f} tokens/s")

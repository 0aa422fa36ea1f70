"""Text from a model: one token at a time, with the keys and values of what it has seen kept.

The model sees at most `context` tokens. When its window is full, the last half of it is kept and
read again as a new window, and the text goes on: learned positions are part of the cached keys and
values, so a window cannot slide by one. A token thus sees between half a context and a whole one.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from irongpt import device as devices
from irongpt import ops
from irongpt.config import SampleConfig
from irongpt.data.tokenizer import CharTokenizer
from irongpt.files import damaged
from irongpt.generation.decode import ROOM, Decoder
from irongpt.model import GPT

_CONTROLS = ("Cc", "Cf", "Cs", "Zl", "Zp")


def trained_model(path: Path, which: str, op_set: str, device: str) -> tuple[GPT, CharTokenizer]:
    """The model of a run's checkpoint `best` or `last`, on the device, and its tokenizer."""
    from irongpt.runs.run_folder import load_checkpoint, open_run  # needs safetensors

    run = open_run(path)
    target = devices.pick(device)
    op_module = ops.load(op_set, target, run.config.model)
    weights, _, tokenizer, _ = load_checkpoint(run, which)
    model = GPT(run.config.model, op_module)
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:
        raise damaged(path / which) from e
    return model.to(target), tokenizer


def generate(
    model: GPT,
    prompt: Sequence[int],
    config: SampleConfig,
    dtype: torch.dtype | None = None,
    graph: bool = True,
) -> Iterator[int]:
    """Yields `config.tokens` token ids that continue the prompt: `generate_texts`, for one text."""
    for (token,) in generate_texts(model, [prompt], config, dtype, graph):
        yield token


@torch.inference_mode()
def generate_texts(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    config: SampleConfig,
    dtype: torch.dtype | None = None,
    graph: bool = True,
    ahead: int | None = None,
) -> Iterator[list[int]]:
    """Yields, `config.tokens` times, the next token of every prompt's text.

    prompts: at least one id each; of one longer than the context, the last `context` tokens count.
    A draw is a pure function of the seed, the text's place among the prompts and the token's number
    in it: the same seed gives the same texts, and no generator is touched.

    dtype, graph: see `Decoder`. ahead: how many tokens a device writes before the host reads them,
    32 on a GPU and 1 on a CPU unless given; never more than 32.
    """
    context, device = model.config.context, model.wte.weight.device
    ahead = min(ahead or (ROOM if device.type == "cuda" else 1), ROOM)
    windows = [list(prompt[-context:]) for prompt in prompts]
    was_training = model.training
    model.eval()
    try:
        decoder = Decoder(model, len(prompts), config, dtype, graph)
        fresh, left = dict(enumerate(windows)), config.tokens
        while left:
            if fresh:
                decoder.read(fresh)
            n = min(ahead, left, *(context + 1 - len(window) for window in windows))
            for tokens in decoder.write(n):
                yield tokens
                for window, token in zip(windows, tokens, strict=True):
                    window.append(token)
            left -= n
            fresh = {text: window for text, window in enumerate(windows) if len(window) > context}
            for window in fresh.values():
                del window[: -max(1, context // 2)]
    finally:
        model.train(was_training)


def start_ids(tokenizer: CharTokenizer) -> list[int]:
    """What stands before a text that has no prompt: a line end, or the vocabulary's first token."""
    return tokenizer.encode("\n").tolist() if "\n" in tokenizer.chars else [0]


def printable(text: str) -> str:
    """The text with its control characters escaped, so that it cannot steer a terminal.

    Those are Unicode's controls, formats, surrogates and line separators, but newline and tab.
    """
    return "".join(
        repr(c)[1:-1] if unicodedata.category(c) in _CONTROLS and c not in "\n\t" else c
        for c in text
    )

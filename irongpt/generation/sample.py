"""Generates text from a model, one token at a time, with a cache of keys and values.

The model sees at most `context` tokens. When its context is full, the last half is encoded again
from position 0 and generation continues: learned positions are part of the cached keys and values,
so a window cannot slide by one. Every token is thus conditioned on at least half a context.
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
    """Yields `config.tokens` token ids that continue the prompt: `generate_batch` of one prompt."""
    for (token,) in generate_batch(model, [prompt], config, dtype, graph):
        yield token


@torch.inference_mode()
def generate_batch(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    config: SampleConfig,
    dtype: torch.dtype | None = None,
    graph: bool = True,
    read_every: int | None = None,
) -> Iterator[list[int]]:
    """Yields, `config.tokens` times, the next token of every prompt's continuation.

    prompts: at least one id each; long ones are truncated to their last `context` tokens. Sampling
    is a pure function of the seed, the prompt's index and the token's number: the same seed gives
    the same tokens, and no random generator is used.

    dtype, graph: see `Decoder`. read_every: how many tokens a device generates before the host
    reads them, by default 32 on a GPU and 1 on a CPU; at most 32.
    """
    context, device = model.config.context, model.wte.weight.device
    read_every = min(read_every or (ROOM if device.type == "cuda" else 1), ROOM)
    windows = [list(prompt[-context:]) for prompt in prompts]
    was_training = model.training
    model.eval()
    try:
        decoder = Decoder(model, len(prompts), config, dtype, graph)
        unread, left = dict(enumerate(windows)), config.tokens
        while left:
            if unread:
                decoder.prefill(unread)
            n = min(read_every, left, *(context + 1 - len(window) for window in windows))
            for tokens in decoder.generate(n):
                yield tokens
                for window, token in zip(windows, tokens, strict=True):
                    window.append(token)
            left -= n
            unread = {i: window for i, window in enumerate(windows) if len(window) > context}
            for window in unread.values():
                del window[: -max(1, context // 2)]
    finally:
        model.train(was_training)


def start_ids(tokenizer: CharTokenizer) -> list[int]:
    """The default prompt: a line break, or the first token of a vocabulary without one."""
    return tokenizer.encode("\n").tolist() if "\n" in tokenizer.chars else [0]


def printable(text: str) -> str:
    """The text with its control characters escaped, so that it cannot steer a terminal.

    These are Unicode's controls, formats, surrogates and line separators, except newline and tab.
    """
    return "".join(
        repr(c)[1:-1] if unicodedata.category(c) in _CONTROLS and c not in "\n\t" else c
        for c in text
    )

"""Text from a model: one token at a time, with the keys and values of what it has seen kept.

The model sees at most `context` tokens. When its window is full, the last half of it is kept and
read again as a new window, and the text goes on: learned positions are part of the cached keys and
values, so a window cannot slide by one. A token thus sees between half a context and a whole one.
"""

import unicodedata
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from irongpt.config import SampleConfig
from irongpt.errors import UserError
from irongpt.model import GPT, KVCache
from irongpt.tokenizer import CharTokenizer

_CONTROLS = ("Cc", "Cf", "Cs", "Zl", "Zp")


@torch.inference_mode()
def generate(model: GPT, prompt: Sequence[int], config: SampleConfig) -> Iterator[int]:
    """Yields `config.tokens` token ids that continue the prompt (at least one id).

    Of a prompt longer than the context, the last `context` tokens count. Draws from a generator of
    its own: the same seed gives the same text, and no other generator is touched.
    """
    context, device = model.config.context, model.wte.weight.device
    generator = torch.Generator(device).manual_seed(config.seed)
    window = list(prompt[-context:])
    cache = KVCache(model.config)
    was_training = model.training
    model.eval()
    try:
        fresh = window
        for _ in range(config.tokens):
            logits = model(torch.tensor([fresh], device=device), cache=cache)[0, -1]  # (V,)
            token = pick(logits.float(), config, generator)
            yield token
            window.append(token)
            fresh = [token]
            if cache.length == context:
                window = fresh = window[-max(1, context // 2) :]
                cache = KVCache(model.config)
    finally:
        model.train(was_training)


def pick(logits: Tensor, config: SampleConfig, generator: torch.Generator) -> int:
    """The next token: the likeliest at temperature 0, else a draw. logits: (V,) float32.

    top-k keeps the k likeliest tokens; top-p (Holtzman et al. 2020) the fewest likeliest ones that
    hold p of what is left, one at least.
    """
    if not logits.isfinite().all():
        raise UserError("the model's logits are not finite: its weights are of no use")
    if config.temperature == 0:
        return int(logits.argmax())
    # In float64, which holds any temperature; the largest becomes 0, so that nothing overflows.
    logits = (logits - logits.max()).double() / config.temperature
    if config.top_k is not None and config.top_k < len(logits):
        kept = logits.topk(config.top_k).indices
        logits = torch.full_like(logits, -torch.inf).index_copy(0, kept, logits[kept])
    probabilities = logits.softmax(-1)
    if config.top_p is not None:
        ordered, index = probabilities.sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # mass of the likelier tokens
        probabilities[index[before >= config.top_p]] = 0
    return int(torch.multinomial(probabilities, 1, generator=generator))


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

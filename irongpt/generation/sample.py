"""Generates text from a model, one token at a time, with a cache of keys and values.

The model sees at most `context` tokens. When the context is full, its last half is passed through
the model again from position 0, and generation continues. The cache cannot just drop its oldest
token, because learned positions are part of the cached keys and values. So once the context was
full, every token still sees at least half of it.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from irongpt_kernels import eager
from irongpt_kernels.op_inputs import RING_SIZE

from irongpt import device as devices
from irongpt import ops
from irongpt.config import SampleConfig
from irongpt.data.tokenizer import Tokenizer
from irongpt.errors import UserError
from irongpt.files import damaged
from irongpt.generation.decode import Decoder, matmuls_in
from irongpt.model import GPT

READ_EVERY = {"cuda": RING_SIZE}  # tokens that a device generates before the host reads them; or 1
HEALED = 2**31 - 1  # the number by which a healed token is sampled; no generated token has it
_CONTROLS = ("Cc", "Cf", "Cs", "Zl", "Zp")
# Formats that are shown: joiners, direction marks and tags, which Persian, Mongolian, Indic scripts
# and emoji need, soft hyphens, and signs of Arabic, Syriac and Kaithi that are visible.
_SHOWN = {*"\n\t\u00ad\u180e\u200c\u200d\u200e\u200f\u061c\u06dd\u070f\u0890\u0891\u08e2"}
_SHOWN |= {*map(chr, (*range(0x600, 0x606), 0x110BD, 0x110CD, *range(0xE0020, 0xE0080)))}


def trained_model(path: Path, which: str, op_set: str, device: str) -> tuple[GPT, Tokenizer]:
    """The model of a run's checkpoint `best` or `last`, in evaluation mode, and its tokenizer."""
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
    return model.to(target).eval(), tokenizer


@torch.inference_mode()
def generate_batch(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    config: SampleConfig,
    dtype: torch.dtype | None = None,
    graph: bool = True,
) -> Iterator[list[int]]:
    """Yields, `config.tokens` times, the next token of every prompt's continuation.

    prompts: at least one id each; long ones are truncated to their last `context` tokens. Sampling
    is a pure function of the seed, the prompt's index and the token's number: the same seed gives
    the same tokens, and no random generator is used.

    dtype, graph: see `Decoder`.
    """
    context, device = model.config.context, model.wte.weight.device
    windows = [list(prompt[-context:]) for prompt in prompts]
    was_training = model.training
    model.eval()
    try:
        decoder = Decoder(model, len(prompts), config, dtype, graph)
        unread, left = [*range(len(windows))], config.tokens
        while left:
            if unread:
                decoder.prefill(windows, unread)
            room = context + 1 - max(map(len, windows))
            n = min(READ_EVERY.get(device.type, 1), left, room)
            for tokens in decoder.generate(n):
                yield tokens
                for window, token in zip(windows, tokens, strict=True):
                    window.append(token)
            left -= n
            unread = [i for i, window in enumerate(windows) if len(window) > context]
            for i in unread:
                del windows[i][: -max(1, context // 2)]
    finally:
        model.train(was_training)


def start_ids(tokenizer: Tokenizer, documents: bool) -> list[int]:
    """The default prompt: the start of a document, or a line break if there is only one text.

    documents: whether the model was trained on several.
    """
    if documents and tokenizer.end is not None:
        return [tokenizer.end]
    try:
        return tokenizer.encode("\n").tolist()
    except UserError:  # a vocabulary of characters without one
        return [0]


@torch.inference_mode()
def heal(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    config: SampleConfig,
    dtype: torch.dtype | None = None,
    before: Sequence[int] = (),
) -> tuple[list[list[int]], int]:
    """Prompts, one per sample, that end in a token which may be longer than that of `prompt`.

    A text cut off anywhere can end in tokens that a model has never seen there: in "def ", the
    last one is a space, but in code the space belongs to the name that follows, " name". So the
    last token is sampled again, from the tokens whose bytes begin with those of the old one (token
    healing). Returns the prompts and the number of bytes of the old token, which are in the prompt
    already. With characters nothing changes, because no token is a prefix of another.

    before: ids that the model sees before a prompt of one token. Without them it is not healed.
    """
    kept, last = list(prompt[:-1]), tokenizer.token_bytes[prompt[-1]]
    tokens = enumerate(tokenizer.token_bytes)
    longer = [i for i, b in tokens if b.startswith(last) and i != tokenizer.end]
    if not (kept or before) or not config.tokens or len(longer) == 1 or prompt[-1] == tokenizer.end:
        return [list(prompt)] * config.samples, len(last)
    device = model.wte.weight.device
    seen = torch.tensor([(kept or [*before])[-model.config.context :]], device=device)
    with matmuls_in(dtype, model):
        logits = model(seen)[:, -1, longer]
    sampled = torch.zeros(config.samples, 1, dtype=torch.int64, device=device)
    counts = torch.full_like(sampled, HEALED)
    eager.sample_tokens(
        logits.expand(config.samples, -1), sampled, counts, config.seed,
        temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
    )  # fmt: skip
    return [[*kept, longer[i]] for i in sampled[:, 0].tolist()], len(last)


def printable(text: str) -> str:
    """The text with its control characters escaped, so that it cannot steer a terminal.

    These are Unicode's controls, formats, surrogates and line separators, except for newline, tab
    and formats without such an effect. Those that reverse the rest of a line are escaped.
    """
    return "".join(
        repr(c)[1:-1] if unicodedata.category(c) in _CONTROLS and c not in _SHOWN else c
        for c in text
    )

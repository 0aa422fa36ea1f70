"""Sampling: equal to the algorithm without a cache, reproducible, printable."""

from dataclasses import replace

import pytest
import torch
from irongpt_kernels import builtin, eager
from torch import Tensor

from irongpt import device as devices
from irongpt.config import GPTConfig, SampleConfig
from irongpt.data.tokenizer import CharTokenizer
from irongpt.errors import UserError
from irongpt.generation.sample import READ_EVERY, generate_batch, printable, start_ids
from irongpt.model import GPT

CONTEXT, VOCAB = 8, 13
CONFIG = SampleConfig(tokens=40, temperature=1.0)
SHAPE = GPTConfig(vocab_size=VOCAB, n_layer=2, n_head=2, n_embd=16, context=CONTEXT, dropout=0.5)


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(3)
    model = GPT(SHAPE, builtin)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)  # sharper than a fresh model's nearly even odds
    return model


def continuation(model: GPT, prompt: list[int], config: SampleConfig, dtype=None) -> list[int]:
    return [token for (token,) in generate_batch(model, [prompt], config, dtype)]


def sample(logits: Tensor, config: SampleConfig, number: int, index: int = 0, ops=eager) -> int:
    """Token `number` of sequence `index`, from its logits (V,)."""
    tokens = torch.zeros(index + 1, 4, dtype=torch.int64)
    counts = torch.full((index + 1, 1), number)
    options = dict(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    ops.sample_tokens(logits.expand(index + 1, -1), tokens, counts, config.seed, **options)
    return int(tokens[index, number % 4])


def uncached(
    model: GPT, prompt: list[int], config: SampleConfig, index: int = 0, dtype=torch.float32
) -> list[int]:
    """The documented algorithm without a cache: every token encodes its whole window."""
    window, out = prompt[-CONTEXT:], []
    model.eval()
    for number in range(config.tokens):
        with torch.no_grad(), devices.autocast(torch.device("cpu"), dtype):
            logits = model(torch.tensor([window]))[0, -1]
        out.append(sample(logits, config, number, index))
        full = len(window) == CONTEXT
        window = [*window, out[-1]]
        if full:
            window = window[-(CONTEXT // 2) :]
    return out


@pytest.mark.parametrize("length", [*range(1, CONTEXT + 2), 3 * CONTEXT])
def test_the_cache_changes_nothing_at_any_length(model, length):
    """Of a longer prompt the last tokens are used. 20 tokens refill the context three times."""
    prompt = [(7 * i) % VOCAB for i in range(length)]
    for config in (replace(CONFIG, tokens=20), replace(CONFIG, tokens=20, temperature=0.0)):
        assert continuation(model, prompt, config) == uncached(model, prompt, config)


def test_every_sequence_of_a_batch_is_the_one_it_is_alone(model):
    """Prompts of different lengths, which fill the context at different tokens."""
    prompts = [[(7 * i + n) % VOCAB for i in range(n)] for n in (1, 5, CONTEXT, 2, CONTEXT + 9)]
    columns = list(generate_batch(model, prompts, CONFIG))
    for i, prompt in enumerate(prompts):
        assert [row[i] for row in columns] == uncached(model, prompt, CONFIG, i)
    assert [row[0] for row in columns] == continuation(model, prompts[0], CONFIG)


@pytest.mark.parametrize("read_every", [3, 7, 32])
def test_how_often_the_host_reads_changes_nothing(model, monkeypatch, read_every):
    prompts, config = [[1], [2, 3, 4]], replace(CONFIG, tokens=70)
    wanted = list(generate_batch(model, prompts, config))
    monkeypatch.setitem(READ_EVERY, "cpu", read_every)
    assert list(generate_batch(model, prompts, config)) == wanted


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ops", [eager, builtin], ids=["eager", "builtin"])
@pytest.mark.parametrize("bias", [False, True])
def test_weights_cast_once_give_the_tokens_of_autocast(dtype, ops, bias):
    torch.manual_seed(3)
    model = GPT(replace(SHAPE, bias=bias), ops)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.3)
    config = replace(CONFIG, tokens=30)
    text = continuation(model, [1, 2], config, dtype)
    assert text == uncached(model, [1, 2], config, dtype=dtype)
    assert model.wte.weight.dtype == torch.float32


def test_ambient_autocast_changes_nothing(model):
    prompts = [[(i * j) % VOCAB for i in range(1, 7)] for j in range(1, 40)]
    wanted = list(generate_batch(model, prompts, CONFIG))
    with torch.autocast("cpu", torch.bfloat16):
        assert list(generate_batch(model, prompts, CONFIG)) == wanted


def test_the_seed_determines_the_tokens_and_no_generator_is_used(model):
    state = torch.get_rng_state()
    first = continuation(model, [1], CONFIG)
    assert first == continuation(model, [1], CONFIG)
    assert first != continuation(model, [1], replace(CONFIG, seed=1))
    assert torch.equal(state, torch.get_rng_state())


def test_dropout_is_off_and_the_mode_restored(model):
    model.train()
    greedy = replace(CONFIG, temperature=0.0)
    assert continuation(model, [1], greedy) == continuation(model, [1], replace(greedy, seed=1))
    assert model.training
    stream = generate_batch(model, [[1]], CONFIG)
    next(stream)
    stream.close()
    assert model.training


@pytest.mark.parametrize(("tokens", "context"), [(0, CONTEXT), (1, CONTEXT), (40, 1)])
def test_the_number_of_tokens_is_the_requested_one(tokens, context):
    model = GPT(replace(SHAPE, context=context), builtin)
    assert len(continuation(model, [1, 2, 3], replace(CONFIG, tokens=tokens))) == tokens


def test_logits_that_are_not_finite_are_an_error():
    model = GPT(SHAPE, builtin)
    with torch.no_grad():
        model.ln_f.weight[0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        continuation(model, [1], CONFIG)


def test_control_characters_are_escaped():
    text = "".join(map(chr, [*range(0x110), 0x200E, 0x202E, 0x2028, 0xFEFF, 0xD800, 0x1F600]))
    shown = printable(text)
    assert shown.count("\\") == 1 + 30 + 1 + 32 + 4  # itself, C0, DEL, C1, others
    assert printable("\x1b[2J\x9b1m\u202e\u2066\r\b\x7f\u2028\ufeff") == (
        r"\x1b[2J\x9b1m\u202e\u2066\r\x08\x7f\u2028\ufeff"
    )
    same = "می\u200cخواهم क्\u200dष 👩\u200d💻 \u200e\u200f\u061c\u06dd\n\t é “Пьер” 😀"
    same += "co\u00adop ᠠ\u180e \U000110bd \U0001f3f4\U000e0067\U000e0062\U000e0065\U000e007f"
    assert printable(same) == same


def test_generation_without_a_prompt_starts_after_a_line_break():
    assert start_ids(CharTokenizer.from_text("b\na"), documents=False) == [0]
    assert start_ids(CharTokenizer.from_text("ab"), documents=False) == [0]
    assert start_ids(CharTokenizer.from_text("\t\na"), documents=False) == [1]

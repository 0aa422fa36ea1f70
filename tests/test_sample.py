from dataclasses import replace

import pytest
import torch
from irongpt_kernels import builtin

from irongpt.config import GPTConfig, SampleConfig
from irongpt.errors import UserError
from irongpt.model import GPT
from irongpt.sample import generate, pick, printable, start_ids
from irongpt.tokenizer import CharTokenizer

CONTEXT, VOCAB = 8, 13
CONFIG = SampleConfig(tokens=40, temperature=1.0)


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(3)
    shape = GPTConfig(
        vocab_size=VOCAB, n_layer=2, n_head=2, n_embd=16, context=CONTEXT, dropout=0.5
    )
    model = GPT(shape, builtin)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)  # sharper than a fresh model's nearly even odds
    return model


def write(model: GPT, prompt: list[int], config: SampleConfig) -> list[int]:
    return list(generate(model, prompt, config))


def write_uncached(model: GPT, prompt: list[int], config: SampleConfig) -> list[int]:
    """What the documentation says, without a cache: the whole window is read for every token."""
    generator = torch.Generator().manual_seed(config.seed)
    window, out = prompt[-CONTEXT:], []
    model.eval()
    for _ in range(config.tokens):
        with torch.no_grad():
            logits = model(torch.tensor([window]))[0, -1]
        out.append(pick(logits, config, generator))
        full = len(window) == CONTEXT
        window = [*window, out[-1]]
        if full:
            window = window[-(CONTEXT // 2) :]
    return out


@pytest.mark.parametrize("length", range(1, 3 * CONTEXT + 1))
def test_the_cache_changes_nothing_at_any_length(model, length):
    prompt = [(7 * i) % VOCAB for i in range(length)]
    for config in (CONFIG, replace(CONFIG, temperature=0.0)):
        assert write(model, prompt, config) == write_uncached(model, prompt, config)


def test_the_seed_decides_and_no_other_generator_is_touched(model):
    state = torch.get_rng_state()
    first = write(model, [1], CONFIG)
    assert first == write(model, [1], CONFIG)
    assert first != write(model, [1], replace(CONFIG, seed=1))
    assert torch.equal(state, torch.get_rng_state())


def test_dropout_is_off_and_the_mode_restored(model):
    model.train()
    greedy = replace(CONFIG, temperature=0.0)
    assert write(model, [1], greedy) == write(model, [1], replace(greedy, seed=1))
    assert model.training
    stream = generate(model, [1], CONFIG)
    next(stream)
    stream.close()
    assert model.training


def test_no_token_is_drawn_too_many(model):
    assert write(model, [1], replace(CONFIG, tokens=0)) == []
    assert len(write(model, [1], replace(CONFIG, tokens=1))) == 1


def test_a_context_of_one():
    model = GPT(
        GPTConfig(vocab_size=VOCAB, n_layer=1, n_head=1, n_embd=4, context=1, dropout=0.0), builtin
    )
    assert len(write(model, [1, 2, 3], CONFIG)) == 40


def counts(config: SampleConfig, logits: torch.Tensor, draws: int = 2000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = [pick(logits, config, generator) for _ in range(draws)]
    return torch.bincount(torch.tensor(drawn), minlength=len(logits))


LOGITS = torch.tensor([0.4, 0.3, 0.2, 0.1]).log() + 5


def test_draws_follow_the_probabilities():
    share = counts(CONFIG, LOGITS) / 2000
    # Five standard deviations of a share of 2,000 draws are at most 0.056.
    torch.testing.assert_close(share, torch.tensor([0.4, 0.3, 0.2, 0.1]), atol=0.056, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 1e-8, 1e-300])
def test_the_coldest_is_greedy(temperature):
    assert counts(SampleConfig(temperature=temperature), LOGITS).tolist() == [2000, 0, 0, 0]


def test_the_hottest_is_even():
    share = counts(SampleConfig(temperature=1e9), LOGITS) / 2000
    torch.testing.assert_close(share, torch.full((4,), 0.25), atol=0.056, rtol=0)


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (1, None, 1),
        (2, None, 2),
        (4, None, 4),
        (5, None, 4),
        (None, 1e-9, 1),
        (None, 0.39, 1),
        (None, 0.41, 2),
        (None, 0.71, 3),
        (None, 1.0, 4),
        (2, 0.5, 1),  # of the two that are left, the first holds 0.57
        (2, 0.6, 2),
    ],
)
def test_what_top_k_and_top_p_keep(top_k, top_p, kept):
    config = replace(CONFIG, top_k=top_k, top_p=top_p)
    assert (counts(config, LOGITS) > 0).tolist() == [i < kept for i in range(4)]


def test_of_equal_logits_top_k_keeps_k():
    assert int((counts(replace(CONFIG, top_k=2), torch.zeros(6)) > 0).sum()) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(model, value):
    logits = LOGITS.clone()
    logits[1] = value
    with pytest.raises(UserError, match="not finite"):
        pick(logits, CONFIG, torch.Generator())


def test_a_terminal_gets_no_control_character_raw():
    text = "".join(map(chr, [*range(0x110), 0x200E, 0x202E, 0x2028, 0xFEFF, 0xD800, 0x1F600]))
    shown = printable(text)
    assert shown.count("\\") == 1 + 30 + 1 + 32 + 1 + 5  # itself, C0, DEL, C1, soft hyphen, others
    assert "\x1b" not in shown
    assert "\\x1b" in shown
    assert "\\u202e" in shown
    assert printable("tab\t, line\n, é “Пьер” 😀") == "tab\t, line\n, é “Пьер” 😀"


def test_text_without_a_prompt_starts_on_a_new_line():
    assert start_ids(CharTokenizer.from_text("b\na")) == [0]
    assert start_ids(CharTokenizer.from_text("ab")) == [0]
    assert start_ids(CharTokenizer.from_text("\t\na")) == [1]

"""A run on documents by BPE: training, resuming, its result, and generation."""

import io
import json
import math
import os
import random
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
from conftest import TINY, copy_run, train_in
from run_helpers import assert_same, assert_same_tensors, history

from irongpt.cli import main
from irongpt.config import PRESETS, SampleConfig
from irongpt.data import corpus, tokens
from irongpt.data.batches import every_target
from irongpt.data.tokenizer import END
from irongpt.generation import command
from irongpt.generation.sample import heal, start_ids, trained_model
from irongpt.training.start import new_setup
from irongpt.training.trainer import Trainer

BPE = [*TINY[: TINY.index("--data")], "--tokenizer", "bpe", "--vocab-size", "320"]
BPE += ["--data", "code"]


def write_code(folder: Path) -> None:
    """Twenty files of Python, of which some are for validation."""
    rng = random.Random(0)
    names = ["".join(rng.choices("abcdefgh", k=4)) for _ in range(30)]
    folder.mkdir()
    for i in range(20):
        lines = [
            f"def {rng.choice(names)}(self, {rng.choice(names)}):\n    return '{'é漢'[i % 2]}'\n"
            for _ in range(8)
        ]
        (folder / f"{i}.py").write_text("\n\n".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with the code and a finished run, at 30 steps."""
    folder = tmp_path_factory.mktemp("bpe")
    write_code(folder / "code")
    train_in(folder, *BPE)
    return folder


@pytest.fixture
def code(cli, trained, tmp_path) -> Path:
    """A copy of the run and its code in the folder of `cli`."""
    shutil.copytree(trained / "code", tmp_path / "code")
    data = json.loads((trained / "run/config.json").read_text())["data"]
    data["sources"] = [str(tmp_path / "code")]
    copy_run(trained / "run", tmp_path / "run", data)
    return tmp_path


def test_the_run_names_its_tokens_epochs_and_bits_per_byte(cli, code):
    out = cli("train", *BPE, "--out", "other").out
    assert "tokenizer 320 BPE tokens" in out
    assert "bytes per token" in out
    assert "bits per byte" in out
    assert "over the entire validation text" in out
    assert_same(code / "run", code / "other")


def test_result_is_the_loss_of_best_over_every_validation_token(code):
    run = code / "run"
    values = json.loads((run / "result.json").read_text())
    model, tokenizer = trained_model(run, "best", "builtin", "cpu")
    nats, n_bytes, n_tokens = 0.0, values["val_bytes"], 0
    text = corpus.load([str(code / "code")], say=lambda line: None)
    ids = tokens.encode(text, tokenizer).val
    for x, y in every_target(ids, model.config.context, batch_size=4):
        nats += model.loss(x, y).item() * y.numel()
        n_tokens += y.numel()
    assert n_tokens == values["val_tokens"] == len(ids) - 1
    assert values["val_loss"] == pytest.approx(nats / n_tokens, rel=1e-5)
    assert values["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
    decoded = tokenizer.decode(ids).replace(END, "")
    assert len(decoded.encode()) == n_bytes
    best = min((r for r in history(run) if r["val_loss"]), key=lambda r: r["val_loss"])
    assert values["step"] == best["step"]


@pytest.mark.parametrize("ops", ["builtin", "eager"])
def test_a_stopped_run_resumes_bit_for_bit(cli, code, ops: str):
    train = ["train", *BPE, "--ops", ops, "--decay", "constant"]
    cli(*train, "--out", "whole")
    cli(*train, "--iters", 17, "--out", "cut")
    cli("train", "--resume", "cut", "--iters", 30)
    assert history(code / "whole")[-1] == history(code / "cut")[-1]
    for name in ("last", "best"):
        assert_same_tensors(code / "whole" / name, code / "cut" / name)
    results = [(code / run / "result.json").read_bytes() for run in ("whole", "cut")]
    assert results[0] == results[1]


def test_a_run_on_documents_by_characters(cli, code):
    flags = [flag for flag in BPE if flag not in ("--tokenizer", "bpe", "--vocab-size", "320")]
    cli("train", *flags, "--out", "chars")
    values = json.loads((code / "chars/result.json").read_text())
    bpe = json.loads((code / "run/result.json").read_text())
    assert values["val_bytes"] == bpe["val_bytes"]
    assert values["val_tokens"] > 1.5 * bpe["val_tokens"]
    cli("generate", "chars", "--tokens", 30)


def test_steps_follow_from_the_corpus(cli, code, monkeypatch):
    """BPE shortens a text, so the preset's steps would be too many epochs."""
    without = [f for i, f in enumerate(BPE) if f != "--iters" and BPE[i - 1] != "--iters"]
    monkeypatch.setitem(PRESETS["nano"].train, "iters", 10**6)
    out = cli("train", *without, "--batch-size", 64, "--out", "new").out
    [epochs] = re.findall(r"([\d.]+) epochs", out)
    assert 19 < float(epochs) <= 20
    assert "warning" not in out
    out = cli("train", *BPE, "--iters", 45, "--batch-size", 64, "--out", "many").out
    assert "warning   the model sees the text" in out


def test_patience_ends_a_run_for_good_also_after_a_resume_between_two_evaluations(
    cli, code, monkeypatch
):
    """The best evaluation is at step 15, and the three after it are at 20, 30 and 40."""
    monkeypatch.setattr(Trainer, "evaluate", lambda self, *_: abs(15.0 - self.step))
    flags = ["--patience", 3, "--iters", 15, "--out", "new"]
    cli("train", *BPE, *flags)
    resumed = cli("train", "--resume", "new", "--iters", 500)
    assert "no improvement in 3 evaluations: stopped at step 40" in resumed.out
    run = history(code / "new")
    assert [r["step"] for r in run if r["val_loss"] is not None] == [10, 15, 20, 30, 40]
    again = cli("train", "--resume", "new")
    assert "a larger --patience continues it" in again.out
    assert history(code / "new") == run


def test_half_of_a_character_at_the_end_is_shown_and_counts_once(cli, code, monkeypatch):
    monkeypatch.setattr(command, "generate_batch", lambda *_: [[0xE6]])
    result = cli("generate", "run", "--prompt", "def ", "--tokens", 1)
    assert result.out.endswith("\ufffd")
    assert result.err.startswith("irongpt: 1 tokens")


@pytest.mark.parametrize("prompt", ["def <", "def ", "é", "漢字 😀\x00", "    return"])
def test_a_prompt_may_be_any_text(cli, code, prompt: str):
    result = cli("generate", "run", "--prompt", prompt, "--tokens", 40)
    assert result.out.startswith(prompt)
    assert result.err.startswith("irongpt: 40 tokens")


def test_bytes_of_a_prompt_that_are_not_utf8_are_written_as_they_came(cli, code, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    prompt = os.fsdecode(b"a\xff")  # as in sys.argv
    assert main(["generate", "run", "--prompt", prompt, "--tokens", "3"]) == 0
    assert written.getvalue().startswith(b"a\xff")


def test_the_last_token_of_a_prompt_may_become_longer(code):
    """A prompt that ends in a space goes on with " name", which is one token of the text."""
    model, tokenizer = trained_model(code / "run", "best", "builtin", "cpu")
    config = SampleConfig(samples=64, seed=3)
    ids = tokenizer.encode("def ").tolist()
    prompts, skip = heal(model, tokenizer, ids, config)
    assert skip == 1
    assert all(prompt[:-1] == ids[:-1] for prompt in prompts)
    last = {tokenizer.token_bytes[prompt[-1]] for prompt in prompts}
    assert all(token.startswith(b" ") for token in last)
    assert any(len(token) > 1 for token in last)
    assert heal(model, tokenizer, ids, config) == (prompts, skip)
    greedy = SampleConfig(samples=2, temperature=0.0)
    first, second = heal(model, tokenizer, ids, greedy)[0]
    assert first == second


def test_generation_starts_with_a_document_and_stops_at_its_end_if_asked(cli, code, monkeypatch):
    _, tokenizer = trained_model(code / "run", "best", "builtin", "cpu")
    assert start_ids(tokenizer, documents=True) == [tokenizer.end]
    newline = tokenizer.encode("\n").tolist()
    assert start_ids(tokenizer, documents=False) == newline
    steps = [[tokenizer.encode(c).item()] for c in "abc"] + [[tokenizer.end], *[[97]] * 3]

    def fake(model, prompts, config, dtype=None):
        return iter([step * len(prompts) for step in steps[: config.tokens]])

    monkeypatch.setattr("irongpt.generation.command.generate_batch", fake)
    assert cli("generate", "run", "--tokens", 7).out == f"abc{END}aaa"
    result = cli("generate", "run", "--tokens", 7, "--stop-at-end")
    assert (result.out, result.err[:18]) == ("abc", "irongpt: 3 tokens,")
    two = cli("generate", "run", "--tokens", 7, "--stop-at-end", "--samples", 2)
    assert two.out == "abc\n---\nabc"


def test_code_presets_train_on_code_by_bpe():
    for name, data in (("code", "python-packages"), ("nano-code", "python-code")):
        preset = PRESETS[name]
        assert preset.train["tokenizer"] == "bpe"
        assert preset.data == (data,)
        assert new_setup({"preset": name, "device": "cpu"}).vocab_size == 4096
        flags = {"preset": name, "device": "cpu", "vocab_size": 8192}
        assert new_setup(flags).vocab_size == 8192
        assert new_setup({"preset": name, "device": "cpu", "tokenizer": "char"}).vocab_size is None


def test_a_prompt_of_one_token_may_become_longer_too(code):
    model, tokenizer = trained_model(code / "run", "best", "builtin", "cpu")
    config = SampleConfig(samples=64, seed=3)
    ids = tokenizer.encode("d").tolist()
    assert heal(model, tokenizer, ids, config) == ([ids] * 64, 1)
    prompts, skip = heal(model, tokenizer, ids, config, before=[tokenizer.end])
    assert (skip, {len(prompt) for prompt in prompts}) == (1, {1})
    tokens = {tokenizer.token_bytes[first] for (first,) in prompts}
    assert len(tokens) > 1
    assert all(token.startswith(b"d") for token in tokens)


def test_a_signal_in_the_evaluation_of_best_leaves_it_to_the_next_process(cli, code, monkeypatch):
    """The run is saved; a resumed one evaluates, and gives the result of an uninterrupted one."""
    expected = json.loads((code / "run/result.json").read_text())
    (code / "run/result.json").unlink()
    evaluate = Trainer.evaluate_all

    def interrupted(self, should_continue):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, should_continue)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate_all", interrupted)
        result = cli("train", "--resume", "run", code=128 + signal.SIGTERM)
    assert "continue: irongpt train --resume" in result.out
    assert not (code / "run/result.json").exists()
    cli("train", "--resume", "run")
    assert json.loads((code / "run/result.json").read_text()) == expected

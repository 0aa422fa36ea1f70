"""`irongpt generate` with a terminal, a pipe, a file and standard input."""

import contextlib
import io
import os
import pty
import shutil
import subprocess
import sys
from unittest.mock import Mock

import pytest
from conftest import TINY, assert_mistake

from irongpt.cli import main
from irongpt.generation import command


def test_stdout_has_the_prompt_and_its_continuation_and_nothing_else(cli, run):
    result = cli("generate", run, "--prompt", "all happy", "--tokens", 50)
    assert result.out.startswith("all happy")
    assert len(result.out) == len("all happy") + 50
    assert result.err.startswith("irongpt: 50 tokens")


def test_the_same_seed_gives_the_same_text(cli, run):
    texts = [cli("generate", run, "--seed", seed, "--tokens", 40).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert len(cli("generate", run).out) == 1000


def test_several_samples_are_several_texts(cli, run):
    first = cli("generate", run, "--prompt", "all ", "--tokens", 60).out
    result = cli("generate", run, "--prompt", "all ", "--tokens", 60, "--samples", 3)
    texts = result.out.split("\n---\n")
    assert texts[0] == first
    assert len(set(texts)) == 3
    assert all(len(text) == 64 and text.startswith("all ") for text in texts)
    assert result.err.startswith("irongpt: 180 tokens")
    assert cli("generate", run, "--tokens", 0, "--samples", 2).out == "\n---\n"
    assert_mistake(cli, "--samples must be from 1 to 10,000", "generate", run, "--samples", 0)


def test_a_single_text_is_printed_token_by_token_and_several_at_once(cli, run, monkeypatch):
    printed, generated, flush = [], command.generate_batch, Mock()

    def watched(*args):
        for step in generated(*args):
            printed.append(len(sys.stdout.getvalue()))
            yield step

    monkeypatch.setattr(command, "generate_batch", watched)
    monkeypatch.setattr(sys.stdout, "flush", flush)
    flags = ["generate", run, "--prompt", "all", "--tokens", 40]
    cli(*flags)
    assert printed == [*range(3, 43)]
    assert flush.call_count >= 40
    flush.reset_mock()
    cli(*flags, "--samples", 3)
    assert printed[40:] == [0] * 40
    assert flush.call_count < 40


def test_greedy_and_top_k_one_agree(cli, run):
    greedy = cli("generate", run, "--temperature", 0, "--tokens", 60).out
    assert greedy == cli("generate", run, "--top-k", 1, "--tokens", 60).out
    assert greedy == cli("generate", run, "--top-p", 1e-9, "--tokens", 60, "--seed", 5).out


def test_a_prompt_from_a_file_is_one_on_the_command_line(cli, run, tmp_path):
    """`test_corpus_text` has other contents, and standard input."""
    for stored, prompt in ((b"all\r\n", "all"), (b"", "")):
        (tmp_path / "prompt").write_bytes(stored)
        expected = cli("generate", run, "--prompt", prompt, "--tokens", 9).out
        assert cli("generate", run, "--prompt-file", "prompt", "--tokens", 9).out == expected


def test_a_warning_says_that_a_long_prompt_is_truncated(cli, run):
    result = cli("generate", run, "--prompt", "happy " * 20, "--tokens", 9)
    assert result.out.startswith("happy " * 20)
    assert "the prompt has 120 tokens: only the last 16 are used" in result.err
    assert "its last" not in cli("generate", run, "--prompt", "happy", "--tokens", 9).err


def test_best_and_last_are_two_checkpoints(cli, run, tmp_path):
    cli("train", "--resume", run, "--iters", 32)
    for which in ("best", "last"):
        assert (tmp_path / run / which / "state.json").exists()
        cli("generate", run, "--checkpoint", which, "--tokens", 5)
    (tmp_path / run / "best/model.safetensors").unlink()
    cli("generate", run, "--tokens", 5, code=2)
    cli("generate", run, "--checkpoint", "last", "--tokens", 5)


@pytest.mark.parametrize("command", ["generate", "export"])
def test_best_is_found_if_its_save_was_killed_between_two_renames(cli, run, tmp_path, command):
    args = ["--tokens", 5] if command == "generate" else ["new"]
    (tmp_path / run / "best").rename(tmp_path / run / ".best.old")
    (tmp_path / run / "last/state.json").unlink()  # so that it cannot be used instead
    result = cli(command, run, *args)
    assert "not been evaluated" not in result.err
    shutil.rmtree(tmp_path / run / ".best.old")
    message = "has no checkpoint best: train it first"
    assert_mistake(cli, message, "generate", run, "--checkpoint", "best")


@pytest.fixture
def run_with_controls(cli, tmp_path) -> str:
    """An untrained run whose vocabulary is full of control characters."""
    text = "".join(map(chr, [*range(1, 32), 127, 0x9B, 0x202E])) * 3 + "plain words here. " * 600
    (tmp_path / "text.txt").write_text(text)
    cli("train", *TINY, "--iters", 1, "--lr", "0.0001", "--out", "run")
    return "run"


def test_a_terminal_gets_controls_escaped_and_a_pipe_gets_them_raw(
    cli, run_with_controls, monkeypatch
):
    flags = ["generate", run_with_controls, "--tokens", 300, "--prompt", "\x1b", "--seed", 1]
    piped = cli(*flags).out
    assert piped.startswith("\x1b")
    assert len(piped) == 301
    controller, terminal = pty.openpty()
    with open(terminal, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        assert main(list(map(str, flags))) == 0  # its output fits in the terminal's buffer
    shown = b""
    with contextlib.suppress(OSError):  # Linux's error after the last byte
        while data := os.read(controller, 4096):
            shown += data
    os.close(controller)
    assert b"\x1b" not in shown
    assert shown.startswith(rb"\x1b")
    assert shown.endswith(b"\n")
    text = shown.replace(b"\r\n", b"\n").decode()
    assert all(c == "\n" or c == "\t" or c.isprintable() for c in text)
    assert text.count("\n") == piped.count("\n") + (not piped.endswith("\n"))


def test_output_is_utf_8_in_any_locale_and_a_closed_pipe_is_not_an_error(run_with_controls):
    command = f"-m irongpt generate {run_with_controls} --tokens 3000 --prompt \u202e".split()
    env = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    child = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
    )
    with io.TextIOWrapper(child.stdout, encoding="utf-8", newline="") as stdout:
        text = stdout.read(401)
    assert (len(text), text[0]) == (401, "\u202e")
    assert b"Traceback" not in child.stderr.read()
    assert child.wait() == 0

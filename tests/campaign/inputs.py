"""Malformed command lines and files: one line on stderr, exit code 2, and nothing is written.

Every case is another kind of mistake. Where a file has random bytes, the seed decides them.
"""

import gzip
import json
import random
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from conftest import contents

from irongpt.config import GPTConfig, SampleConfig, TrainConfig, flag
from irongpt.data import text as texts
from tests.campaign.process import TINY, Commands, Worker, assert_mistake, fill

Make = Callable[[random.Random], bytes]
NEW = [*TINY, "--out", "new"]
RESUMED = ("iters", "eval_every", "target_loss", "patience", "ops", "device", "dtype",
           "sample_tokens")  # fmt: skip


def numbers(config: Any) -> Iterator[tuple[str, list[str]]]:
    """Values that the numeric flags of a config do not accept."""
    for f in fields(config):
        if "help" in f.metadata and not f.metadata["choices"] and f.name != "device":
            wrong = ["x", "", "nan"]
            if f.name != "target_loss":
                wrong.append("-1")
            if f.name not in ("target_loss", "patience", "sample_tokens", "temperature"):
                wrong.append("1" + "0" * 400)
            if f.name in ("tokens", "top_k"):
                wrong.pop()
            yield f.name, wrong


def flags() -> Iterator[list[str]]:
    for config in (GPTConfig, TrainConfig):
        for name, wrong in numbers(config):
            yield from (["train", *NEW, flag(name), value] for value in wrong)
    for name, wrong in numbers(SampleConfig):
        yield from (["generate", "run", flag(name), value] for value in wrong)
    for f in fields(TrainConfig):
        if f.metadata.get("choices"):
            yield from (["train", *NEW, flag(f.name), value] for value in ("x", "", "None"))
    more = (
        "--device tpu|--device cuda:99|--device cpu:|--vocab-size 100"
        "|--tokenizer bpe --vocab-size 9|--tokenizer bpe --vocab-size 60000|--n-head 3"
        "|--context 5000|--shards 3|--resume run"
        "|--iters|--it 5|extra|--fused=1|--include *.c|--encoding nonsense|--encoding rot13"
        "|--encoding base64|--encoding undefined|--errors ignore|--data nowhere|--data ."
        "|--data run|--data empty|--data ~nobody/x|--data http://localhost/x|--preset x"
    )
    yield from (["train", *NEW, *words.split()] for words in more.split("|"))
    for name in ("lr", "seed", "batch_size", "n_layer", "n_head", "n_embd", "context", "warmup",
                 "grad_accum", "weight_decay", "decay", "optimizer", "tokenizer"):  # fmt: skip
        value = {"decay": "cosine", "optimizer": "adamw", "tokenizer": "bpe"}.get(name, "3")
        yield ["train", "--resume", "run", flag(name), value]
    for name in (
        "run",
        "text.txt",
        "text.txt/x",
        "nowhere-link",
        "x" * 300,
        "",
        "a\0b",
        "run/last",
    ):
        yield ["train", *TINY, "--out", name]
    yield from ([], ["dance"], ["generate"], ["train", "x"], ["export", "run"], ["import"], ["-x"])


def commands() -> Iterator[list[str]]:
    """The other commands, with folders without a run and with wrong options."""
    for verb in (["generate"], ["train", "--resume"], ["show"]):
        for folder in ("nowhere", "text.txt", "empty", "garbage", "nowhere-link", "", "run/best/x"):
            yield [*verb, folder]
    more = (
        "export nowhere new|export run run|export run text.txt|export run new --dtype float64"
        "|export run new --checkpoint first|export empty new.gguf|generate run --prompt é"
        "|generate run --prompt a\0|generate run --prompt a --prompt-file text.txt"
        "|generate run --prompt-file nowhere|generate run --prompt-file run"
        "|generate run --encoding utf-8|generate run --errors replace|generate run --checkpoint x"
        "|generate run --prompt-file text.txt --encoding x|generate run --ops x"
        "|generate run --device cuda:9|show run --text é|show run --file nowhere"
        "|show run --out empty|show run --out nowhere/x.html|show run --text a --file text.txt"
        "|doctor --json empty|doctor --json nowhere/x|doctor --device x|compare --dtype int8"
        "|compare --arch sm_1|compare --json empty|compare --ops eager|compare --device cuda:9"
        "|tune|tune --preset x|tune --device cpu|import nowhere new|import empty new"
        "|import text.txt new|import gpt2 run|import gpt2 text.txt"
    )
    yield from (words.split(" ") for words in more.split("|"))


def malformed() -> Iterator[tuple[str, Make]]:
    """Contents that are not text, or not enough of it."""
    for magic, what in texts._FORMATS + texts._FORMATS_IF_BINARY:
        yield what.split(":")[0], lambda rng, magic=magic: magic + rng.randbytes(3000)
    lines = b"the quick brown fox\n" * 400

    def stray(rng: random.Random) -> bytes:
        at = rng.randrange(100, len(lines) - 100)
        return lines[:at] + bytes([rng.randrange(128, 256)]) + lines[at:]

    def cut_gzip(rng: random.Random) -> bytes:
        data = gzip.compress(lines)
        return data[: rng.randrange(3, len(data) - 1)]

    def bad_gzip(rng: random.Random) -> bytes:
        data = bytearray(gzip.compress(rng.randbytes(999).hex().encode(), mtime=0))
        data[rng.randrange(10, len(data) - 8)] ^= 1 << rng.randrange(8)
        return bytes(data)

    yield from {
        "nothing": lambda rng: b"",
        "white space": lambda rng: bytes(rng.choice(b" \n\t\r") for _ in range(3000)),
        "too short": lambda rng: b"ab" * rng.randrange(1, 8),
        "random bytes": lambda rng: rng.randbytes(5000),
        "a stray byte": stray,
        "UTF-16 without a mark": lambda rng: lines.decode().encode("utf-16-le"),
        "zeros": lambda rng: bytes(rng.randrange(1, 5000)),
        "Latin-1": lambda rng: "Käse und Brötchen\n".encode("latin-1") * 300,
        "Shift JIS": lambda rng: "日本語の文章\n".encode("shift_jis") * 300,
        "a cut gzip": cut_gzip,
        "a damaged gzip": bad_gzip,
        "a gzip of bytes": lambda rng: gzip.compress(b"\1\2" + rng.randbytes(5000)),
        "a gzip of nothing": lambda rng: gzip.compress(b""),
        "deflate": lambda rng: zlib.compress(lines),
    }.items()


def imports(gpt2: dict[str, Any]) -> Iterator[tuple[str, Callable[[random.Random], Any]]]:
    """Folders of a GPT-2, each with one fault."""

    def change(name: str, key: str, value: Any) -> Callable[[random.Random], Any]:
        values = json.loads(gpt2[name])
        values.pop(key) if value is None else values.update({key: value})
        return lambda rng: gpt2 | {name: json.dumps(values).encode()}

    def cut(name: str) -> Callable[[random.Random], Any]:
        return lambda rng: gpt2 | {name: gpt2[name][: rng.randrange(len(gpt2[name]) - 1)]}

    def gone(name: str) -> Callable[[random.Random], Any]:
        return lambda rng: {n: x for n, x in gpt2.items() if n != name}

    def resized(rng: random.Random) -> Any:
        made = safetensors.torch.load(gpt2["model.safetensors"])
        name = rng.choice(list(made))
        made[name] = torch.zeros(*made[name].shape, 2)
        return gpt2 | {"model.safetensors": safetensors.torch.save(made)}

    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        yield f"{name} is missing", gone(name)
        yield f"{name} is cut", cut(name)
        yield f"{name} is a list", lambda rng, name=name: gpt2 | {name: b"[]"}
        yield f"{name} is nested", lambda rng, name=name: gpt2 | {name: b"[" * 100_000}
    yield "a tensor is resized", resized
    for key in ("model_type", "n_layer", "n_embd", "n_head", "vocab_size", "n_positions"):
        for value in ("x", -1, 10**12, [1]):
            yield f"{key} is {value}", change("config.json", key, value)
    for key in ("model", "added_tokens", "pre_tokenizer"):
        for value in ("x", 3, [1], {"type": "x"}, None):
            yield f"{key} of the tokenizer is {value}", change("tokenizer.json", key, value)


class Case(Commands):
    """Runs one wrong command in a folder that it must not change."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        super().__init__(folder, stack)
        self.worker = stack.enter_context(Worker(self.folder))
        for args in (["train", *TINY, "--out", "run"], ["export", "run", "gpt2"]):
            done = self.worker(*args)
            assert done.code == 0, done.err
        (self.folder / "empty").mkdir()
        (self.folder / "garbage").mkdir()
        (self.folder / "nowhere-link").symlink_to("nothing")
        gpt2 = contents(self.folder / "gpt2")
        Entry = tuple[str, list[str], str, Any]
        entries: list[Entry] = [(" ".join(a), a, "", None) for a in [*flags(), *commands()]]
        for what, make in malformed():
            data = ["train", *[x if x != "text.txt" else "bad" for x in NEW]]
            entries.append((f"--data: {what}", data, "bad", make))
            if what not in ("white space", "too short", "nothing", "a gzip of nothing"):
                read = ["generate", "run", "--prompt-file", "bad"]
                entries.append((f"--prompt-file: {what}", read, "bad", make))
            config = "garbage/config.json"
            entries.append((f"config.json: {what}", ["generate", "garbage"], config, make))
        for what, folder_of in imports(gpt2):
            entries.append((f"import: {what}", ["import", "bad", "new"], "bad", folder_of))
        self.entries = entries
        self.count = len(entries)
        assert len({what for what, *_ in entries}) == self.count >= 150

    def __call__(self, rng: random.Random, number: int) -> str:
        what, args, place, make = self.entries[number]
        path, made = self.folder / place, make(rng) if place else None
        if isinstance(made, bytes):
            path.write_bytes(made)
        elif made:
            fill(path, made)
        before = contents(self.folder)
        try:
            assert_mistake(self.worker(*args))
            assert contents(self.folder) == before, "something was written"
        except AssertionError as e:
            raise AssertionError(f"{what}: {args}: {e}") from e
        finally:
            if isinstance(made, bytes):
                path.unlink()
            elif made:
                shutil.rmtree(path)
        return (what.split(":")[0] if place else args[0] if args else "no command")[:20]

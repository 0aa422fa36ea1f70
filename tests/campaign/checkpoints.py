"""Run folders with one mutation: `generate` and `train --resume` reject it, or are unharmed.

Most mutations are accidents: a bit, the length or the name of a file. The digests find them, or
what is loaded has to be what was saved. The others are made as an attacker would, with the digests
computed again: then any model may come out, but no crash, no hang, no memory bomb, no code.
"""

import json
import os
import random
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from conftest import Result, contents
from torch import Tensor

from irongpt import files
from tests.campaign.process import TINY, Commands, Worker, assert_mistake, fill

GENERATE = ("generate", "run", "--tokens", "8", "--device", "cpu")
PLAIN, LONGER = ("train", "--resume", "run"), ("train", "--resume", "run", "--iters", "10")
TENSORS = ("model.safetensors", "optimizer.safetensors")
SEALED = ("config.json", "result.json", "last/state.json", "best/state.json")
WORK = {"iters", "grad_accum", "batch_size", "sample_tokens", "patience", "eval_every"}
FORBIDDEN = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen")
EXPLOIT = b"cos\nsystem\n(S'touch ran'\ntR."  # a pickle that runs a command
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 3, 2**31, 2**63, 2**70, -(2**70), 0.5, -0.5, 1e308, float("nan"),
    float("inf"), "", "x", "char", "bpe", "fused", "\ud800", "../../x", "a" * 100_000, [], {}, [1],
    [None], ["x"], {"x": 1}, [[]] * 1000,
]  # fmt: skip
Files = dict[str, Any]


def no_code() -> None:
    """Ends the process if something that was read makes it run code."""

    def hook(event: str, args: Any) -> None:
        if event in FORBIDDEN:
            print(f"the event {event} {str(args)[:200]}", file=sys.__stderr__, flush=True)
            os.abort()

    sys.addaudithook(hook)


# Accidents ---------------------------------------------------------------------------------------


def flip(rng: random.Random, run: Files, name: str) -> None:
    data = bytearray(run[name])
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    run[name] = bytes(data)


def cut(rng: random.Random, run: Files, name: str) -> None:
    run[name] = run[name][: rng.choice((0, 1, 8, rng.randrange(len(run[name]))))]


def longer(rng: random.Random, run: Files, name: str) -> None:
    run[name] += rng.choice((b"\0", b"\n", b" {}", b"\n{}\n", rng.randbytes(100), run[name]))


def hole(rng: random.Random, run: Files, name: str) -> None:
    """A block of zeros, as file systems leave it after a power cut."""
    at, n = rng.randrange(len(run[name])), rng.choice((1, 16, 512, 4096))
    run[name] = (run[name][:at] + bytes(n) + run[name][at + n :])[: len(run[name])]


def swap(rng: random.Random, run: Files, name: str) -> None:
    other = rng.choice([n for n in run if run[n] is not None])
    run[name], run[other] = run[other], run[name]


def gone(rng: random.Random, run: Files, name: str) -> None:
    del run[name]


def special(rng: random.Random, run: Files, name: str) -> None:
    """Something else has the name: a folder, a pipe, a link to itself, an endless device."""
    make: list[Callable[[Path], Any]] = [
        Path.mkdir,
        os.mkfifo,
        lambda path: path.symlink_to(path.name),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to("/dev/full"),
        lambda path: path.symlink_to("nowhere"),
    ]
    run[name] = rng.choice(make)


ACCIDENTS = (flip, flip, flip, cut, longer, hole, swap, gone, special)


# Edited with digests that fit --------------------------------------------------------------------


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values inside of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*at, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*at, key))


def edit(rng: random.Random, values: Any) -> None:
    """One value is changed, removed or added, or all are in another order."""
    at = rng.choice([p for p in places(values) if p[-1] != "sha256"])
    where = values
    for key in at[:-1]:
        where = where[key]
    kind = rng.randrange(8)
    if kind == 0:
        del where[at[-1]]
    elif kind == 1 and isinstance(where, dict):
        where[rng.choice(("x", "", "__class__", at[-1] + " "))] = rng.choice(VALUES)
    elif kind == 2 and isinstance(where[at[-1]], int | float):
        where[at[-1]] = where[at[-1]] * rng.choice((2, -1, 10**6, 0.5))
    else:
        where[at[-1]] = rng.choice(VALUES)
    if at[-1] in WORK and where.get(at[-1]) not in (None, True, False, 0, 1, -1, "", "x"):
        where[at[-1]] = rng.choice((None, -1, 0, 1, "x"))  # not a training of many steps


def sealed_json(rng: random.Random, run: Files) -> None:
    name = rng.choice(SEALED)
    values = files.unsealed(run[name], Path(name))
    edit(rng, values)
    run[name] = files.sealed(values)


def digests(run: Files) -> None:
    for which in ("last", "best"):
        state = files.unsealed(run[f"{which}/state.json"], Path(which))
        for name in state["files"]:
            state["files"][name] = files.digest(run[f"{which}/{name}"])
        run[f"{which}/state.json"] = files.sealed(state)


def tokenizer(rng: random.Random, run: Files) -> None:
    values = json.loads(run["last/tokenizer.json"])
    if rng.random() < 0.2:
        values = rng.choice(VALUES)
    elif rng.random() < 0.4:  # the format of the first version, with a character that is none
        chars = list(values["model"]["vocab"])
        chars[rng.randrange(len(chars))] = rng.choice(["a", "\ud800", "", "\0", "ab", "\U0010ffff"])
        values = {"kind": "char", "chars": "".join(chars)}
    else:
        edit(rng, values)
    for which in ("last", "best"):
        run[f"{which}/tokenizer.json"] = json.dumps(values).encode()
    digests(run)


def tensors(rng: random.Random, run: Files) -> None:
    """A tensor of another size, dtype, name or value, one more or one less."""
    file = rng.choice(TENSORS)
    names = [f"{which}/{file}" for which in ("last", "best")]
    made = safetensors.torch.load(run[names[0]])
    name = rng.choice(list(made))
    x = made.pop(name)
    sizes = [(), (0,), (1,), (7, 3), (*x.shape, 2), (1, *x.shape)]
    kinds = (torch.int64, torch.float16, torch.float64, torch.bool)
    values = (float("nan"), float("inf"), -1e38, 255.0)
    changes: list[Callable[[], dict[str, Tensor]]] = [
        dict,
        lambda: {rng.choice(("x", "", name + ".x")): x},
        lambda: {name: x, "more": torch.zeros(rng.choice((0, 1, 10**5)))},
        lambda: {name: x.flatten()},
        lambda: {name: torch.zeros(rng.choice(sizes))},
        lambda: {name: x.to(rng.choice(kinds))},
        lambda: {name: torch.full(x.shape, rng.choice(values)).to(x.dtype)},
        lambda: {name: x.t().contiguous() if x.dim() == 2 else x.flatten()[:-1].clone()},
        lambda: {name: x.flatten()[torch.randperm(x.numel())].view(x.shape)},
    ]
    made |= changes[rng.randrange(9)]()
    for n in names:
        run[n] = safetensors.torch.save(made)
    digests(run)


def header(rng: random.Random, run: Files) -> None:
    """The header of a safetensors file: its length, or a shape, dtype or offset in it."""
    name = f"{rng.choice(('last', 'best'))}/{rng.choice(TENSORS)}"
    size = struct.unpack("<Q", run[name][:8])[0]
    text, rest = run[name][8 : 8 + size], run[name][8 + size :]
    if rng.random() < 0.3:
        size = rng.choice((0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1))
    else:
        values = json.loads(text)
        edit(rng, values)
        text = json.dumps(values).encode()
        size = len(text)
    run[name] = struct.pack("<Q", size) + text + rest
    digests(run)


def code(rng: random.Random, run: Files) -> None:
    """A pickle in the place of a file."""
    run[f"{rng.choice(('last', 'best'))}/{rng.choice((*TENSORS, 'tokenizer.json'))}"] = EXPLOIT
    digests(run)


def nested(rng: random.Random, run: Files) -> None:
    """JSON that is nested deeper than a parser's stack."""
    text = rng.choice(("[", '{"a":')) * 100_000
    name = rng.choice([n for n in run if n.endswith((".json", ".jsonl"))])
    run[name] = text.encode()
    if name.endswith("tokenizer.json"):
        digests(run)


def metrics(rng: random.Random, run: Files) -> None:
    """The records have no digest."""
    records = [json.loads(line) for line in run["metrics.jsonl"].splitlines()]
    edit(rng, records)
    run["metrics.jsonl"] = "".join(json.dumps(r) + "\n" for r in records).encode()


EDITS = (sealed_json, sealed_json, sealed_json, tokenizer, tensors, tensors, header, code, nested)
EDITS += (metrics,)


class Case(Commands):
    """Mutates a run, generates from it and resumes it, in a process that a crash would end."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        super().__init__(folder, stack)
        self.worker = stack.enter_context(Worker(self.folder, before=no_code))
        done = self.worker("train", *TINY, "--out", "run")
        assert done.code == 0, done.err
        self.run = contents(self.folder / "run")
        self.expected = {args: self.results(args, self.run) for args in (GENERATE, PLAIN, LONGER)}
        assert all(ended.code == 0 for ended, _ in self.expected.values())

    def results(self, args: tuple[str, ...], run: Files) -> tuple[Result, Any]:
        """The end of a command with this run, and what must not depend on how it was read."""
        fill(self.folder / "run", run)
        ended = self.worker(*args)
        if args == GENERATE:
            return ended, ended.out
        last = self.folder / "run/last"
        return ended, [(last / n).read_bytes() for n in TENSORS if (last / n).is_file()]

    def __call__(self, rng: random.Random, number: int) -> str:
        if number % 200 == 199 or not self.worker.process.is_alive():
            self.worker.__exit__()
            self.worker = self.stack.enter_context(Worker(self.folder, before=no_code))
        run = dict(self.run)
        accident = rng.random() < 0.5
        if accident:
            mutate: Any = rng.choice(ACCIDENTS)
            name = rng.choice([n for n, data in run.items() if data])
            mutate(rng, run, name)
        else:
            mutate = rng.choice(EDITS)
            mutate(rng, run)
        outcomes = []
        for args in (GENERATE, rng.choice((PLAIN, LONGER))):
            ended, found = self.results(args, run)
            if ended.code in (0, 1) and not accident:
                outcomes.append("loaded" if ended.code == 0 else "diverged")
                assert ended.code == 0 or "were not finite" in ended.err, ended.err
            elif ended.code == 0:
                assert found == self.expected[args][1], f"{args} gives something else"
                outcomes.append("unharmed")
            else:
                assert_mistake(ended)
                outcomes.append("rejected")
        return f"{mutate.__name__}: {', '.join(outcomes)}"

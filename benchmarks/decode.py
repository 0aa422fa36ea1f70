"""Tokens a second of writing text: naive, with kept keys and values, and for a batch of texts.

    python -m benchmarks.decode

    naive      the whole window goes through the model for every token, as nanoGPT's generate does
    cached     `irongpt.sample.generate`: one row a token, greedy
    batched    the same for several texts at once; tokens of all of them count

A text starts with one token and stays within one window of the model, so no window is read again.
Weights are fresh ones: a trained model writes no faster.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import results, timing
from irongpt import device as devices
from irongpt import ops, sample
from irongpt.config import PRESETS, GPTConfig, SampleConfig
from irongpt.errors import UserError
from irongpt.model import GPT, KVCache

VOCABULARY = 109  # characters of War and Peace
ROUNDS = 5


@torch.inference_mode()
def naive(model: GPT, tokens: int) -> None:
    text = torch.zeros(1, 1, dtype=torch.int64, device=model.wte.weight.device)
    for _ in range(tokens):
        logits = model(text[:, -model.config.context :])
        text = torch.cat((text, logits[:, -1].argmax(-1, keepdim=True)), 1)


def cached(model: GPT, tokens: int) -> None:
    for _ in sample.generate(model, [0], SampleConfig(tokens=tokens, temperature=0.0)):
        pass


@torch.inference_mode()
def batched(model: GPT, tokens: int, batch: int) -> None:
    cache = KVCache(model.config)
    last = torch.zeros(batch, 1, dtype=torch.int64, device=model.wte.weight.device)
    for _ in range(tokens):
        last = model(last, cache=cache)[:, -1].argmax(-1, keepdim=True)


def measure(
    model: GPT, dtype: torch.dtype, tokens: int, batches: list[int], rounds: int
) -> list[dict[str, Any]]:
    """A row for each way to write. The ways take turns."""
    device = model.wte.weight.device
    ways: dict[tuple[str, int], Callable[[], None]] = {
        ("naive", 1): lambda: naive(model, tokens),
        ("cached", 1): lambda: cached(model, tokens),
    }
    for B in batches:
        ways["batched", B] = lambda B=B: batched(model, tokens, B)  # type: ignore[misc]
    samples: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    model.eval()
    with devices.autocast(device, dtype):
        for turn in range(rounds + 1):  # the first one warms up
            for way, write in ways.items():
                _wait(device)
                start = time.perf_counter()
                write()
                _wait(device)
                if turn:
                    samples[way].append(time.perf_counter() - start)
    rows = []
    for (kind, B), seconds in samples.items():
        t = timing.Timing(seconds, False)
        rows.append(
            {
                "way": kind,
                "batch": B,
                "tokens": tokens,
                "tokens_per_s": B * tokens / t.median,
                "seconds_a_token": t.median / tokens,
                "iqr": t.iqr / tokens,
                "samples": rounds,
            }
        )
    return rows


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="tokens a second of writing")
    parser.add_argument("--preset", choices=list(PRESETS), help="[iron on a GPU, else nano]")
    parser.add_argument("--ops", nargs="+", default=["builtin", "fused"])
    parser.add_argument("--tokens", type=int, help="[the context less one]")
    results.add_options(parser)
    args = parser.parse_args(argv)
    device = devices.pick(args.device)
    gpu = device.type == "cuda"
    preset = args.preset or ("iron" if gpu else "nano")
    config = GPTConfig(vocab_size=VOCABULARY, **PRESETS[preset].model)
    tokens = min(args.tokens or config.context - 1, config.context - 1)
    dtype = devices.precision("auto", device).dtype
    with results.Section("decode", device, args) as section:
        section.put(preset=preset, dtype=str(dtype)[6:], rows=[])
        for name in args.ops:
            try:
                model = GPT(config, ops.load(name, device, config)).to(device)
            except UserError as e:
                print(f"no {name}: {e}")
                continue
            rows = measure(model, dtype, tokens, [8, 64] if gpu else [8], ROUNDS if gpu else 2)
            for row in rows:
                row["ops"] = name
                print(
                    f"{name:8} {row['way']:8} batch {row['batch']:3} "
                    f"{row['tokens_per_s']:11,.0f} tokens/s",
                    flush=True,
                )
            section.put(rows=section.values["rows"] + rows)
    print(f"written to {section.path}")


if __name__ == "__main__":
    main()

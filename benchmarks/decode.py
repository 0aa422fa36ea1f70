"""Tokens a second of writing text, one at a time and many at once.

    python -m benchmarks.decode

    naive      the whole window goes through the model for every token, as nanoGPT's generate does
    cached     `irongpt.sample.generate`, its kernels launched one by one
    graphed    the same, a CUDA graph a token; on a GPU alone
    batched    several texts at once, by graphs where there is a GPU; tokens of all of them count

A text starts with one token and stays within one window of the model, so no window is read again.
Weights are fresh ones: a trained model writes no faster. The draw is at temperature 0.8, in naive
by PyTorch. A graph is captured for every text, and the capture is in the time, as a user has it;
`steady` leaves out all up to the tokens after it. `nodes` are the kernels of one token.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import result_file
from irongpt import device as devices
from irongpt import ops, timing
from irongpt.config import PRESETS, WAR_AND_PEACE_VOCAB, GPTConfig, SampleConfig
from irongpt.errors import UserError
from irongpt.generation import sample
from irongpt.generation.decode import ROOM, Decoder
from irongpt.model import GPT

ROUNDS = 5
TEMPERATURE = 0.8

Row = dict[str, Any]
Stamps = list[float]  # when tokens came, seconds


@torch.inference_mode()
def naive(model: GPT, dtype: torch.dtype, tokens: int) -> Stamps:
    device = model.wte.weight.device
    text = torch.zeros(1, 1, dtype=torch.int64, device=device)
    stamps = []
    with devices.autocast(device, dtype):
        for _ in range(tokens):
            logits = model(text[:, -model.config.context :])[:, -1].float() / TEMPERATURE
            text = torch.cat((text, logits.softmax(-1).multinomial(1)), 1)
            stamps.append(time.perf_counter())
    return stamps


def written(model: GPT, dtype: torch.dtype, tokens: int, texts: int, graph: bool) -> Stamps:
    config = SampleConfig(tokens=tokens, temperature=TEMPERATURE)
    return [
        time.perf_counter()
        for _ in sample.generate_batch(model, [[0]] * texts, config, dtype, graph)
    ]


def measure(
    model: GPT, dtype: torch.dtype, tokens: int, batches: list[int], rounds: int
) -> list[Row]:
    """A row for each way to generate; one that fails has a `skipped_reason`. Runs interleave."""
    device = model.wte.weight.device
    gpu = device.type == "cuda"
    ways: dict[tuple[str, int], Callable[[], Stamps]] = {
        ("naive", 1): lambda: naive(model, dtype, tokens),
        ("cached", 1): lambda: written(model, dtype, tokens, 1, False),
    }
    if gpu:
        ways["graphed", 1] = lambda: written(model, dtype, tokens, 1, True)
    for B in batches:
        ways["batched", B] = lambda B=B: written(model, dtype, tokens, B, gpu)  # type: ignore[misc]
    samples: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    steady: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    failed: dict[tuple[str, int], str] = {}
    model.eval()
    for turn in range(rounds + 1):  # the first one warms up
        for way, write in ways.items():
            if way in failed:
                continue
            try:
                devices.synchronize(device)
                start = time.perf_counter()
                stamps = write()
                devices.synchronize(device)
            except Exception as e:  # the other ways have their turn
                failed[way] = " ".join(f"{type(e).__name__}: {e}".split())[:300]
                continue
            if turn:
                end = time.perf_counter()
                samples[way].append(end - start)
                if len(stamps) > ROOM:
                    steady[way].append((end - stamps[ROOM - 1]) / (len(stamps) - ROOM))
    rows = []
    for way in ways:
        row = Row(way=way[0], batch=way[1], tokens=tokens)
        if way in failed:
            rows.append(row | {"skipped_reason": failed[way]})
            continue
        t = timing.Timing(samples[way], False)
        row |= {
            "tokens_per_s": way[1] * tokens / t.median,
            "seconds_per_token": t.median / tokens,
            "iqr": t.iqr / tokens,
            "samples": rounds,
        }
        if steady[way]:
            row["steady_tokens_per_s"] = way[1] / timing.Timing(steady[way], False).median
        if gpu and way[0] != "naive":
            row["nodes"] = nodes(model, dtype, way[1])
        rows.append(row)
    return rows


@torch.inference_mode()
def nodes(model: GPT, dtype: torch.dtype, texts: int) -> int | str:
    """Kernels, copies and fills of one token, as the profiler sees them; or why it saw none."""
    try:
        decoder = Decoder(model, texts, SampleConfig(temperature=TEMPERATURE), dtype, graph=False)
        decoder.prefill({text: [0] for text in range(texts)})
        decoder.step()
        devices.synchronize(decoder.tokens.device)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            decoder.step()
            devices.synchronize(decoder.tokens.device)
        return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in seen.events() or ())
    except Exception as e:  # a count that is not there spoils no measurement
        return " ".join(f"{type(e).__name__}: {e}".split())[:200]


def line(row: Row) -> str:
    head = f"{row['ops']:8} {row['way']:8} batch {row['batch']:3} "
    if "skipped_reason" in row:
        return head + row["skipped_reason"]
    text = (
        f"{row['tokens_per_s']:11,.0f} tokens/s {row['seconds_per_token'] * 1e6:9,.1f} us a token"
    )
    if "steady_tokens_per_s" in row:
        text += f", {row['steady_tokens_per_s']:,.0f} tokens/s after {ROOM}"
    return head + text + (f", {row['nodes']} nodes" if "nodes" in row else "")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="tokens a second of writing")
    parser.add_argument("--preset", choices=list(PRESETS), help="[iron on a GPU, else nano]")
    parser.add_argument("--ops", nargs="+", default=["builtin", "fused"])
    parser.add_argument("--tokens", type=int, help="[the context]")
    result_file.add_options(parser)
    args = parser.parse_args(argv)
    device = devices.pick(args.device)
    gpu = device.type == "cuda"
    preset = args.preset or ("iron" if gpu else "nano")
    config = GPTConfig(vocab_size=WAR_AND_PEACE_VOCAB, **PRESETS[preset].model)
    tokens = min(args.tokens or config.context, config.context)
    dtype = devices.precision("auto", device).dtype
    with result_file.Section("decode", device, args) as section:
        section.put(preset=preset, dtype=devices.dtype_name(dtype), rows=[])
        for name in args.ops:
            try:
                model = GPT(config, ops.load(name, device, config)).to(device)
            except UserError as e:
                print(f"no {name}: {e}")
                continue
            batches = [4, 8, 64] if gpu else [8]
            rows = measure(model, dtype, tokens, batches, ROUNDS if gpu else 2)
            for row in rows:
                row["ops"] = name
                print(line(row), flush=True)
            section.put(rows=section.values["rows"] + rows)
    print(f"written to {section.path}")


if __name__ == "__main__":
    main()
